//! What a policy would have moved, and what no policy could have saved.
//!
//! A lens must be in memory to be served, so a miss always loads: there is no way around the cache, as a cache of web
//! pages has. Victims are chosen when the request arrives; then one loader loads in order of arrival. No lens is in
//! use for longer than that moment, so leases and batches are not simulated.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::replace;

use turret_crds::placement::EvictionPolicy;

use super::history::{Entry, History};
use super::policy::{Resident, choose};
use super::trace::Trace;

/// What the trace is replayed against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Setup {
    /// Bytes for lenses.
    pub budget_bytes: u64,
    /// Of the loader.
    pub bytes_per_second: f64,
    /// Half-life of counters, and Hybrid's greatest idle time.
    pub idle_seconds: f64,
    /// Requests that come first and are not counted: the cache is empty and nothing is known.
    pub warm_up_requests: usize,
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Outcome {
    /// Requests.
    pub requests: usize,
    /// Of these, for what was in memory.
    pub hits: usize,
    /// Bytes loaded.
    pub bytes_moved: u64,
    /// Lenses that left.
    pub evictions: usize,
    /// Sum of the seconds that requests waited for their lens.
    pub wait_seconds: f64,
    /// All but one in a hundred waited less.
    pub p99_wait_seconds: f64,
}

impl Outcome {
    /// Hits per request.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / self.requests.max(1) as f64
    }
}

/// A lens that no eviction makes room for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("lens `{lens}` takes {bytes} bytes, of a budget of {budget_bytes}")]
pub struct TooLarge {
    /// Its name.
    pub lens: String,
    /// Its bytes.
    pub bytes: u64,
    /// Bytes for lenses.
    pub budget_bytes: u64,
}

/// Replays a trace. Time is that of the requests times residents for a miss, and of their logarithm for a hit.
pub fn replay(trace: &Trace, policy: EvictionPolicy, setup: &Setup) -> Result<Outcome, TooLarge> {
    if let Some(lens) = trace.lenses.iter().find(|l| l.bytes > setup.budget_bytes) {
        let (lens, bytes) = (lens.name.clone(), lens.bytes);
        return Err(TooLarge { lens, bytes, budget_bytes: setup.budget_bytes });
    }
    let mut cache = Cache::new(trace, policy, setup);
    let mut loader = Loader { free_at_seconds: 0.0, ready_at_seconds: vec![0.0; trace.lenses.len()] };
    let mut outcome = Outcome::default();
    let mut waits = Vec::new();
    for (n, request) in trace.requests.iter().enumerate() {
        let bytes = trace.lenses[request.lens].bytes;
        let served = cache.serve(Entry(request.lens as u32), bytes, request.at_seconds);
        if !served.hit {
            loader.load(request.lens, request.at_seconds, bytes as f64 / setup.bytes_per_second);
        }
        if n < setup.warm_up_requests {
            continue;
        }
        outcome.requests += 1;
        outcome.hits += usize::from(served.hit);
        outcome.bytes_moved += if served.hit { 0 } else { bytes };
        outcome.evictions += served.evictions;
        waits.push(loader.wait_seconds(request.lens, request.at_seconds));
    }
    outcome.wait_seconds = waits.iter().sum();
    outcome.p99_wait_seconds = p99(&mut waits);
    Ok(outcome)
}

struct Cache {
    policy: EvictionPolicy,
    budget_bytes: u64,
    history: History,
    groups: Vec<u16>,
    residents: Vec<Entry>,
    is_resident: Vec<bool>,
    bytes: u64,
}

struct Served {
    hit: bool,
    evictions: usize,
}

impl Cache {
    fn new(trace: &Trace, policy: EvictionPolicy, setup: &Setup) -> Self {
        let mut history = History::new(setup.idle_seconds);
        for lens in &trace.lenses {
            history.register(lens.bytes, lens.bytes as f64 / setup.bytes_per_second, lens.priority);
        }
        let mut by_name = BTreeMap::new();
        let group = |name| {
            let next = by_name.len() as u16;
            *by_name.entry(name).or_insert(next)
        };
        Self {
            policy,
            budget_bytes: setup.budget_bytes,
            history,
            groups: trace.lenses.iter().map(|l| l.group.as_str()).map(group).collect(),
            residents: Vec::new(),
            is_resident: vec![false; trace.lenses.len()],
            bytes: 0,
        }
    }

    fn serve(&mut self, id: Entry, bytes: u64, now_seconds: f64) -> Served {
        self.history.served(id, now_seconds, self.budget_bytes);
        if self.is_resident[id.index()] {
            return Served { hit: true, evictions: 0 };
        }
        let evictions = self.evict((self.bytes + bytes).saturating_sub(self.budget_bytes), now_seconds);
        self.history.loaded(id, now_seconds);
        self.residents.push(id);
        self.is_resident[id.index()] = true;
        self.bytes += bytes;
        Served { hit: false, evictions }
    }

    fn evict(&mut self, needed_bytes: u64, now_seconds: f64) -> usize {
        if needed_bytes == 0 {
            return 0;
        }
        let resident = |id: &Entry| Resident {
            key: *id,
            usage: self.history.usage(*id),
            group: self.groups[id.index()],
            evictable: true,
        };
        let residents: Vec<_> = self.residents.iter().map(resident).collect();
        let choice = choose(&residents, needed_bytes, &self.history.ranking(self.policy, now_seconds));
        for victim in &choice.victims {
            self.is_resident[victim.key.index()] = false;
            self.bytes -= victim.bytes;
        }
        self.residents.retain(|id| self.is_resident[id.index()]);
        choice.victims.len()
    }
}

/// Loads one lens at a time.
struct Loader {
    free_at_seconds: f64,
    /// By lens.
    ready_at_seconds: Vec<f64>,
}

impl Loader {
    fn load(&mut self, lens: usize, at_seconds: f64, seconds: f64) {
        self.free_at_seconds = self.free_at_seconds.max(at_seconds) + seconds;
        self.ready_at_seconds[lens] = self.free_at_seconds;
    }

    /// Also what is in memory for the policy may still be on its way.
    fn wait_seconds(&self, lens: usize, at_seconds: f64) -> f64 {
        (self.ready_at_seconds[lens] - at_seconds).max(0.0)
    }
}

fn p99(waits: &mut [f64]) -> f64 {
    if waits.is_empty() {
        return 0.0;
    }
    let rank = (waits.len() * 99).div_ceil(100) - 1;
    *waits.select_nth_unstable_by(rank, f64::total_cmp).1
}

/// Bytes moved if what is requested last leaves first (Belady, IBM Systems Journal 5(2), 1966). With lenses of equal
/// size nothing moves less, over a whole trace; with unequal sizes something may.
pub fn belady_bytes(trace: &Trace, setup: &Setup) -> u64 {
    let next_use = next_uses(trace);
    let mut held: Vec<Option<usize>> = vec![None; trace.lenses.len()];
    let mut by_next_use: BTreeSet<(usize, usize)> = BTreeSet::new();
    let (mut used, mut moved) = (0, 0);
    for (n, request) in trace.requests.iter().enumerate() {
        let bytes = trace.lenses[request.lens].bytes;
        match held[request.lens] {
            Some(next) => {
                by_next_use.remove(&(next, request.lens));
            }
            None => {
                moved += if n < setup.warm_up_requests { 0 } else { bytes };
                used += bytes;
            }
        }
        while used > setup.budget_bytes {
            let Some((_, farthest)) = by_next_use.pop_last() else { break };
            held[farthest] = None;
            used -= trace.lenses[farthest].bytes;
        }
        held[request.lens] = Some(next_use[n]);
        by_next_use.insert((next_use[n], request.lens));
    }
    moved
}

/// By request, the number of the next one for the same lens; the largest number if there is none.
fn next_uses(trace: &Trace) -> Vec<usize> {
    let mut next = vec![usize::MAX; trace.lenses.len()];
    let mut uses: Vec<usize> =
        trace.requests.iter().enumerate().rev().map(|(n, r)| replace(&mut next[r.lens], n)).collect();
    uses.reverse();
    uses
}

/// Bytes that every policy moves at least: PFOO-L (Berger, Beckmann and Harchol-Balter, "Practical Bounds on Optimal
/// Caching with Variable Object Sizes", SIGMETRICS 2018). A hit holds its lens's bytes from the use before it; all
/// hits together hold no more than the budget at all times. PFOO-L asks for that on average only, and takes the hits
/// that hold the least per byte saved: the shortest intervals, the last of them in part.
pub fn pfoo_lower_bound_bytes(trace: &Trace, setup: &Setup) -> u64 {
    let counted = trace.requests.len().saturating_sub(setup.warm_up_requests);
    let mut previous: Vec<Option<usize>> = vec![None; trace.lenses.len()];
    let (mut moved, mut intervals) = (0u64, Vec::new());
    for (n, request) in trace.requests.iter().enumerate() {
        let before = previous[request.lens].replace(n);
        if n < setup.warm_up_requests {
            continue;
        }
        let bytes = trace.lenses[request.lens].bytes;
        moved += bytes;
        // What is held during the warm-up is not charged, as its hits are not counted.
        intervals.extend(before.map(|before| ((n - before.max(setup.warm_up_requests)) as u64, bytes)));
    }
    intervals.sort_unstable();
    let mut room = u128::from(setup.budget_bytes) * counted as u128;
    for (length, bytes) in intervals {
        let holds = u128::from(length) * u128::from(bytes);
        if holds > room {
            // In part, rounded up: still no more is moved than any policy does.
            return moved
                - u64::try_from(room.div_ceil(u128::from(length))).expect("a part of the lens's bytes");
        }
        room -= holds;
        moved -= bytes;
    }
    moved
}

/// Bytes moved by an oracle that always keeps the same lenses and loads every other one through a spare slot, which
/// the largest of these must fit. A byte of memory saves as many bytes moved as its lens is requested times, so the
/// most requested are kept, by counts of the requests that are still to come; the slot is the one that moves least.
/// No online policy knows these counts; but it may move less, because it also keeps what came through the slot.
/// Takes time of the square of the number of lenses.
pub fn static_top_bytes(trace: &Trace, setup: &Setup) -> u64 {
    let counted = trace.requests.get(setup.warm_up_requests..).unwrap_or(&[]);
    let mut lenses: Vec<Counted> =
        trace.lenses.iter().map(|l| Counted { requests: 0, bytes: l.bytes }).collect();
    counted.iter().for_each(|r| lenses[r.lens].requests += 1);
    lenses.sort_unstable_by(|a, b| b.cmp(a));
    let mut slots: Vec<u64> = lenses.iter().map(|l| l.bytes).chain([0]).collect();
    slots.sort_unstable();
    slots.dedup();
    let moved = slots.iter().filter_map(|slot| bytes_through_slot(&lenses, *slot, setup.budget_bytes));
    moved.min().expect("the largest lens fits into the slot alone")
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Counted {
    requests: u64,
    bytes: u64,
}

/// By lenses of which the most requested come first. Nothing if those that are larger than the slot do not fit.
fn bytes_through_slot(lenses: &[Counted], slot_bytes: u64, budget_bytes: u64) -> Option<u64> {
    let must_stay: u64 = lenses.iter().map(|l| l.bytes).filter(|bytes| *bytes > slot_bytes).sum();
    let mut room = budget_bytes.checked_sub(must_stay + slot_bytes)?;
    let mut moved = 0;
    for Counted { requests, bytes } in lenses.iter().filter(|l| l.bytes <= slot_bytes) {
        match room.checked_sub(*bytes) {
            Some(less) => room = less,
            None => moved += requests * bytes,
        }
    }
    Some(moved)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::eviction::trace::{Lens, Request};

    fn trace(bytes: &[u64], requests: &[usize]) -> Trace {
        let lens = |(n, bytes): (usize, &u64)| Lens {
            name: format!("lens-{n}"),
            bytes: *bytes,
            priority: 0,
            group: String::new(),
        };
        let request = |(n, lens): (usize, &usize)| Request { at_seconds: n as f64, lens: *lens };
        Trace {
            lenses: bytes.iter().enumerate().map(lens).collect(),
            requests: requests.iter().enumerate().map(request).collect(),
        }
    }

    fn setup(budget_bytes: u64) -> Setup {
        Setup { budget_bytes, bytes_per_second: 2.0, idle_seconds: 300.0, warm_up_requests: 0 }
    }

    #[test]
    fn hits_bytes_evictions_and_waits_are_counted() {
        let trace = trace(&[4, 4, 2], &[0, 1, 0, 2, 1]);
        let outcome = replay(&trace, EvictionPolicy::Lru, &setup(8)).unwrap();
        // The loader is busy until 2, 4, 5 and 7; request 2 comes at 2, when lens 0 has just arrived.
        let waits = [2.0, 3.0, 0.0, 2.0, 3.0];
        let expected = Outcome {
            requests: 5,
            hits: 1,
            bytes_moved: 14,
            evictions: 2,
            wait_seconds: waits.iter().sum(),
            p99_wait_seconds: 3.0,
        };
        assert_eq!(outcome, expected);
        assert_eq!(outcome.hit_rate(), 0.2);
        let counted =
            replay(&trace, EvictionPolicy::Lru, &Setup { warm_up_requests: 3, ..setup(8) }).unwrap();
        assert_eq!((counted.requests, counted.bytes_moved, counted.evictions), (2, 6, 2));
    }

    #[test]
    fn a_lens_that_never_fits_is_refused_by_name() {
        let refused = replay(&trace(&[4, 9], &[0]), EvictionPolicy::Lru, &setup(8)).unwrap_err();
        assert_eq!(refused.to_string(), "lens `lens-1` takes 9 bytes, of a budget of 8");
    }

    #[test]
    fn references_are_right_where_they_can_be_counted_by_hand() {
        // Two of three fit. Belady keeps 0 for requests 3 and 6, and loads 1, 2, 1, 2 beside it.
        let by_turns = trace(&[1, 1, 1], &[0, 1, 2, 0, 1, 2, 0]);
        assert_eq!(belady_bytes(&by_turns, &setup(2)), 5);
        // 12 of 14 byte-requests of room hold four intervals of 3.
        assert_eq!(pfoo_lower_bound_bytes(&by_turns, &setup(2)), 3);
        assert_eq!(static_top_bytes(&by_turns, &setup(2)), 4);
        assert_eq!(replay(&by_turns, EvictionPolicy::Lru, &setup(2)).unwrap().bytes_moved, 7);
    }

    fn any_requests() -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec((0usize..8, 0usize..8).prop_map(|(a, b)| a.min(b)), 1..120)
    }

    proptest! {
        #[test]
        fn with_equal_sizes_nothing_moves_less_than_belady(requests in any_requests(), slots in 1u64..7) {
            let trace = trace(&[5; 8], &requests);
            let setup = setup(slots * 5);
            let belady = belady_bytes(&trace, &setup);
            prop_assert!(pfoo_lower_bound_bytes(&trace, &setup) <= belady);
            for policy in EvictionPolicy::ALL {
                prop_assert!(belady <= replay(&trace, policy, &setup).unwrap().bytes_moved, "{policy:?}");
            }
        }

        #[test]
        fn nothing_moves_less_than_the_lower_bound(
            requests in any_requests(), bytes in proptest::collection::vec(1u64..20, 8), more in 0u64..60,
            warm_up_requests in 0usize..60,
        ) {
            let trace = trace(&bytes, &requests);
            let setup = Setup { warm_up_requests, ..setup(bytes.iter().max().unwrap() + more) };
            let bound = pfoo_lower_bound_bytes(&trace, &setup);
            prop_assert!(bound <= belady_bytes(&trace, &setup));
            for policy in EvictionPolicy::ALL {
                let outcome = replay(&trace, policy, &setup).unwrap();
                prop_assert!(bound <= outcome.bytes_moved, "{policy:?}");
                prop_assert_eq!(outcome, replay(&trace, policy, &setup).unwrap());
            }
        }
    }
}
