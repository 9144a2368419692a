//! Leases: lenses that clients reserve. Pure; time is handed in.
//!
//! A lens with a lease is loaded ahead of requests and is not evicted before the lease ends: it is released, or not
//! renewed in time. Nobody's lease ends for another one's sake; where there is no room, the one with the higher priority
//! comes first once there is.

use std::collections::BTreeMap;
use std::time::Duration;

use super::declared::LensName;

/// Longest time that a lease runs without being renewed.
pub const MAX_TTL: Duration = Duration::from_secs(24 * 3600);
/// Leases at a time.
pub const MAX_LEASES: usize = 4096;

/// A lens that somebody reserved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Which lens.
    pub lens: LensName,
    /// Who holds it, in the client's own words.
    pub holder: Option<String>,
    /// Higher comes first where there is no room for all.
    pub priority: u32,
    /// When it ends, in the time that was handed in.
    pub ends: Duration,
}

/// All leases that run.
#[derive(Debug, Default)]
pub struct Leases {
    by_id: BTreeMap<u64, Lease>,
    /// How many there are on each lens.
    on: BTreeMap<LensName, u32>,
    next_id: u64,
}

/// Why there is no such lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseError {
    /// It ended, or never was.
    #[error("there is no such lease: it ended, was released, or the worker restarted; acquire another one")]
    Unknown,
    /// Too long.
    #[error("a lease runs from 1 to {} seconds before it is renewed", MAX_TTL.as_secs())]
    Ttl,
    /// Too many.
    #[error("{MAX_LEASES} leases are running, which is the limit; release some")]
    TooMany,
}

impl Leases {
    /// Reserves a lens, and gives the lease's number.
    ///
    /// # Errors
    /// When the time is out of bounds, or there are too many.
    pub fn acquire(
        &mut self,
        lens: LensName,
        holder: Option<String>,
        priority: u32,
        ttl: Duration,
        now: Duration,
    ) -> Result<u64, LeaseError> {
        let ends = now + checked(ttl)?;
        if self.by_id.len() >= MAX_LEASES {
            return Err(LeaseError::TooMany);
        }
        self.next_id += 1;
        *self.on.entry(lens.clone()).or_default() += 1;
        self.by_id.insert(self.next_id, Lease { lens, holder, priority, ends });
        Ok(self.next_id)
    }

    /// Lets a lease run for `ttl` from now, whatever was left of it.
    ///
    /// # Errors
    /// When it has ended, also if nobody has noticed yet.
    pub fn renew(&mut self, id: u64, ttl: Duration, now: Duration) -> Result<&Lease, LeaseError> {
        let ttl = checked(ttl)?;
        let lease = self.by_id.get_mut(&id).filter(|lease| lease.ends > now).ok_or(LeaseError::Unknown)?;
        lease.ends = now + ttl;
        Ok(lease)
    }

    /// Ends a lease.
    ///
    /// # Errors
    /// When it has ended already.
    pub fn release(&mut self, id: u64) -> Result<Lease, LeaseError> {
        let lease = self.by_id.remove(&id).ok_or(LeaseError::Unknown)?;
        self.forget(&lease.lens);
        Ok(lease)
    }

    /// Ends what is over, and what is on a lens that is not declared any more.
    pub fn expire(&mut self, now: Duration, declared: impl Fn(&LensName) -> bool) -> Vec<Lease> {
        let over: Vec<u64> = self
            .by_id
            .iter()
            .filter(|(_, lease)| lease.ends <= now || !declared(&lease.lens))
            .map(|(id, _)| *id)
            .collect();
        over.into_iter().filter_map(|id| self.release(id).ok()).collect()
    }

    /// When the next one ends.
    pub fn next_end(&self) -> Option<Duration> {
        self.by_id.values().map(|lease| lease.ends).min()
    }

    /// How many there are on a lens.
    pub fn on(&self, lens: &LensName) -> u32 {
        self.on.get(lens).copied().unwrap_or(0)
    }

    /// The lenses that have some, those of the highest priority first, then those that were reserved first.
    pub fn lenses(&self) -> Vec<&LensName> {
        let mut first: BTreeMap<&LensName, (std::cmp::Reverse<u32>, u64)> = BTreeMap::new();
        for (id, lease) in &self.by_id {
            let rank = (std::cmp::Reverse(lease.priority), *id);
            first.entry(&lease.lens).and_modify(|known| *known = rank.min(*known)).or_insert(rank);
        }
        let mut lenses: Vec<_> = first.into_iter().collect();
        lenses.sort_by_key(|(_, rank)| *rank);
        lenses.into_iter().map(|(lens, _)| lens).collect()
    }

    /// All of them, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Lease)> {
        self.by_id.iter().map(|(id, lease)| (*id, lease))
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<&Lease> {
        self.by_id.get(&id)
    }

    fn forget(&mut self, lens: &LensName) {
        if let Some(count) = self.on.get_mut(lens) {
            *count -= 1;
            if *count == 0 {
                self.on.remove(lens);
            }
        }
    }
}

fn checked(ttl: Duration) -> Result<Duration, LeaseError> {
    if ttl >= Duration::from_secs(1) && ttl <= MAX_TTL { Ok(ttl) } else { Err(LeaseError::Ttl) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lens(n: u8) -> LensName {
        ("group".into(), format!("lens-{n}"))
    }

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_ends_when_it_is_not_renewed_and_cannot_be_renewed_then() {
        let mut leases = Leases::default();
        let id = leases.acquire(lens(1), None, 0, s(10), s(100)).unwrap();
        leases.renew(id, s(10), s(109)).unwrap();
        assert_eq!(leases.expire(s(118), |_| true), []);
        assert_eq!(leases.next_end(), Some(s(119)));
        assert_eq!(leases.renew(id, s(10), s(119)), Err(LeaseError::Unknown), "nobody has noticed yet");
        assert_eq!(leases.expire(s(119), |_| true).len(), 1);
        assert_eq!((leases.on(&lens(1)), leases.next_end()), (0, None));
        assert_eq!(leases.release(id), Err(LeaseError::Unknown));
    }

    #[test]
    fn the_higher_priority_comes_first_and_then_the_older() {
        let mut leases = Leases::default();
        for (n, priority) in [(1, 5), (2, 9), (3, 5), (1, 0)] {
            leases.acquire(lens(n), None, priority, s(10), s(0)).unwrap();
        }
        assert_eq!(leases.lenses(), [&lens(2), &lens(1), &lens(3)]);
        assert_eq!(leases.on(&lens(1)), 2);
    }

    #[test]
    fn times_out_of_bounds_are_refused() {
        let mut leases = Leases::default();
        for ttl in [Duration::ZERO, Duration::from_millis(999), MAX_TTL + s(1)] {
            assert_eq!(leases.acquire(lens(1), None, 0, ttl, s(0)), Err(LeaseError::Ttl));
        }
        assert_eq!(leases.iter().count(), 0);
    }

    proptest! {
        #[test]
        fn what_runs_is_what_was_acquired_and_has_not_ended(
            steps in proptest::collection::vec((0u8..5, 0u8..4, 1u64..20), 1..60),
        ) {
            let mut leases = Leases::default();
            // By a plain list: number, lens, end.
            let mut model: Vec<(u64, LensName, Duration)> = Vec::new();
            let mut now = s(0);
            for (what, n, seconds) in steps {
                match what {
                    0 => {
                        let id = leases.acquire(lens(n), None, 0, s(seconds), now).unwrap();
                        model.push((id, lens(n), now + s(seconds)));
                    }
                    1 => {
                        let id = model.get(usize::from(n)).map_or(999, |m| m.0);
                        let renewed = leases.renew(id, s(seconds), now).is_ok();
                        let known = model.iter_mut().find(|m| m.0 == id && m.2 > now);
                        prop_assert_eq!(renewed, known.is_some());
                        if let Some(known) = known {
                            known.2 = now + s(seconds);
                        }
                    }
                    2 => {
                        let id = model.get(usize::from(n)).map_or(999, |m| m.0);
                        prop_assert_eq!(leases.release(id).is_ok(), model.iter().any(|m| m.0 == id));
                        model.retain(|m| m.0 != id);
                    }
                    _ => now += s(seconds),
                }
                if what != 1 {
                    let ended = leases.expire(now, |_| true).len();
                    prop_assert_eq!(ended, model.iter().filter(|m| m.2 <= now).count());
                    model.retain(|m| m.2 > now);
                }
                for n in 0..4 {
                    prop_assert_eq!(leases.on(&lens(n)) as usize, model.iter().filter(|m| m.1 == lens(n)).count());
                }
                prop_assert_eq!(leases.next_end(), model.iter().map(|m| m.2).min());
            }
        }
    }
}
