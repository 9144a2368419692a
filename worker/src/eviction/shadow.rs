//! Caches that hold names only: what would have been moved, had one horizon decided all along.
//!
//! LRFU (Lee et al., IEEE Transactions on Computers 50(12), 2001) spans everything between LRU and LFU by one number:
//! how fast a past request loses its worth. No fixed number serves all traffic. A stationary popularity wants a
//! long memory, a working set that moves wants none. Here every horizon runs a shadow cache of the same budget over
//! all requests, and the real cache follows the one whose loads cost least lately (following the best of several
//! simulated caches: Gramacy et al., "Adaptive Caching by Refetching", NIPS 2002).
//!
//! Shadows know nothing of leases, pins and older requests: they give advice on what frequencies are worth, the
//! real candidates are [`super::policy`]'s. One request costs a few tree operations, whether it hits or not.

use std::collections::BTreeSet;

use super::history::Entry;
use super::usage::{HALF_LIVES, Rank, Usage};

/// Requests after which the cost of a load counts half in the comparison of horizons. From 200 to 4,000 the bytes
/// moved differ by 4 % at most.
const COST_HALF_LIFE: f64 = 1024.0;

/// How much of the past counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Horizon {
    /// Only the last use, as in LRU.
    LastUse,
    /// All requests, decayed with this one of [`HALF_LIVES`].
    Frequency(usize),
}

/// All of them, shortest first.
pub const HORIZONS: [Horizon; 1 + HALF_LIVES.len()] =
    [Horizon::LastUse, Horizon::Frequency(0), Horizon::Frequency(1), Horizon::Frequency(2)];

impl Horizon {
    /// What is least by this number leaves first. By frequency it is the log2 of seconds of loading that a byte of
    /// memory saves; where loading takes a time per byte, sizes cancel out and the rate of requests decides.
    pub fn worth(self, usage: &Usage) -> f64 {
        match self {
            Self::LastUse => usage.last_used_seconds,
            Self::Frequency(n) => usage.frequency_log2[n] + f64::from(usage.cost_per_byte_log2),
        }
    }
}

/// One shadow cache per horizon.
#[derive(Clone, Debug)]
pub(crate) struct Shadows([Shadow; HORIZONS.len()]);

impl Default for Shadows {
    fn default() -> Self {
        Self(HORIZONS.map(Shadow::new))
    }
}

impl Shadows {
    /// A request for a lens, already counted in its usage.
    pub fn request(&mut self, id: Entry, usage: &Usage, budget_bytes: u64) {
        for shadow in &mut self.0 {
            shadow.request(id, usage, budget_bytes);
        }
    }

    /// The lens is no longer registered.
    pub fn forget(&mut self, id: Entry) {
        for shadow in &mut self.0 {
            shadow.remove(id);
        }
    }

    /// The horizon whose loads cost least lately; of equals the shortest.
    pub fn best(&self) -> Horizon {
        let best = self.0.iter().min_by(|a, b| a.recent_cost_seconds.total_cmp(&b.recent_cost_seconds));
        best.expect("there is more than one horizon").horizon
    }
}

#[derive(Clone, Debug)]
struct Shadow {
    horizon: Horizon,
    /// By lens; `None` is not held.
    held: Vec<Option<Held>>,
    /// The same, least worth first.
    by_rank: BTreeSet<(Rank, Entry)>,
    bytes: u64,
    recent_cost_seconds: f64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    rank: Rank,
    bytes: u64,
}

impl Shadow {
    fn new(horizon: Horizon) -> Self {
        Self { horizon, held: Vec::new(), by_rank: BTreeSet::new(), bytes: 0, recent_cost_seconds: 0.0 }
    }

    fn request(&mut self, id: Entry, usage: &Usage, budget_bytes: u64) {
        self.recent_cost_seconds *= (-1.0 / COST_HALF_LIFE).exp2();
        if !self.remove(id) {
            self.recent_cost_seconds += usage.load_seconds();
        }
        while self.bytes.saturating_add(usage.bytes) > budget_bytes {
            let Some((_, least)) = self.by_rank.first().copied() else { return };
            self.remove(least);
        }
        self.insert(id, Held { rank: self.horizon.worth(usage).into(), bytes: usage.bytes });
    }

    fn insert(&mut self, id: Entry, held: Held) {
        if self.held.len() <= id.index() {
            self.held.resize(id.index() + 1, None);
        }
        self.held[id.index()] = Some(held);
        self.by_rank.insert((held.rank, id));
        self.bytes += held.bytes;
    }

    /// Whether it was there.
    fn remove(&mut self, id: Entry) -> bool {
        let Some(held) = self.held.get_mut(id.index()).and_then(Option::take) else { return false };
        self.by_rank.remove(&(held.rank, id));
        self.bytes -= held.bytes;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(shadows: &mut Shadows, usages: &mut [Usage], lens: usize, number: u64) {
        usages[lens].count_request(number);
        usages[lens].last_used_seconds = number as f64;
        shadows.request(Entry(lens as u32), &usages[lens], 2);
    }

    #[test]
    fn a_scan_beside_a_favourite_prefers_frequency_and_a_moving_pair_the_last_use() {
        let mut usages = vec![Usage::new(1, 1.0, 0); 100];
        let mut shadows = Shadows::default();
        // Lens 0 comes back after three others.
        let beside_a_scan = |n| if n % 4 == 0 { 0 } else { 1 + (n * 7 % 99) as usize };
        let moving = |n| (n / 20 % 50 * 2 + n % 2) as usize;
        (0..400).for_each(|n| request(&mut shadows, &mut usages, beside_a_scan(n), n));
        assert_ne!(shadows.best(), Horizon::LastUse);
        (400..20_000).for_each(|n| request(&mut shadows, &mut usages, moving(n), n));
        assert_eq!(shadows.best(), Horizon::LastUse);
        (20_000..26_000).for_each(|n| request(&mut shadows, &mut usages, beside_a_scan(n), n));
        assert_ne!(shadows.best(), Horizon::LastUse, "what was best for long is not so for ever");
    }

    #[test]
    fn a_shadow_never_holds_more_than_its_budget_and_forgets() {
        let mut shadow = Shadow::new(Horizon::LastUse);
        shadow.request(Entry(0), &Usage::new(3, 1.0, 0), 4);
        shadow.request(Entry(1), &Usage::new(2, 1.0, 0), 4);
        assert_eq!((shadow.bytes, shadow.by_rank.len()), (2, 1));
        shadow.request(Entry(2), &Usage::new(5, 1.0, 0), 4);
        assert_eq!(shadow.bytes, 0, "what never fits is passed on, after all has left for it");
        shadow.request(Entry(1), &Usage::new(2, 1.0, 0), 4);
        assert!(shadow.remove(Entry(1)) && !shadow.remove(Entry(1)));
    }
}
