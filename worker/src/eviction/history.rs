//! What is remembered of every registered lens, resident or not. One owner changes it; [`super::policy`] reads it.
//!
//! A lens that has left keeps its history: it decides how soon it leaves after it came back. At 64 bytes a lens that
//! is affordable for all of them (10,000 take 640 kB, and the shadow caches about as much again), so nothing is
//! sketched or sampled.

use turret_crds::placement::EvictionPolicy;

use super::policy::Ranking;
use super::shadow::Shadows;
use super::usage::Usage;

/// Half-lives after which the common epoch moves. Until then a counter grows to 2^64 times its events, which an `f32`
/// (up to 2^127) holds.
const EPOCH_HALF_LIVES: f64 = 64.0;

/// A registered lens: an index, used again after [`History::forget`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry(pub u32);

impl Entry {
    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What is remembered. Times are seconds on a clock that does not go back; if it does, it stands still.
#[derive(Clone, Debug)]
pub struct History {
    usages: Vec<Usage>,
    free: Vec<Entry>,
    /// Requests for any lens so far.
    requests: u64,
    idle_seconds: f64,
    epoch_seconds: f64,
    now_seconds: f64,
    shadows: Shadows,
}

impl History {
    /// Nothing yet. `idle_seconds` is the half-life of served, loads and errors, and Hybrid's greatest idle time.
    pub fn new(idle_seconds: f64) -> Self {
        Self {
            usages: Vec::new(),
            free: Vec::new(),
            requests: 0,
            idle_seconds: at_least_one(idle_seconds),
            epoch_seconds: 0.0,
            now_seconds: 0.0,
            shadows: Shadows::default(),
        }
    }

    /// A new lens, which takes `load_seconds` to load from where it is.
    pub fn register(&mut self, bytes: u64, load_seconds: f64, priority: i16) -> Entry {
        let usage = Usage::new(bytes, load_seconds, priority);
        if let Some(id) = self.free.pop() {
            self.usages[id.index()] = usage;
            return id;
        }
        self.usages.push(usage);
        Entry(u32::try_from(self.usages.len() - 1).expect("lenses are counted in thousands"))
    }

    /// The lens is no longer registered; its id is given to another.
    pub fn forget(&mut self, id: Entry) {
        self.shadows.forget(id);
        self.free.push(id);
    }

    /// What is remembered of one lens.
    pub fn usage(&self, id: Entry) -> &Usage {
        &self.usages[id.index()]
    }

    /// Where the lens is loaded from has changed, and with it the time.
    pub fn set_load_seconds(&mut self, id: Entry, load_seconds: f64) {
        self.usages[id.index()].set_load_seconds(load_seconds);
    }

    /// As declared anew.
    pub fn set_priority(&mut self, id: Entry, priority: i16) {
        self.usages[id.index()].priority = priority;
    }

    /// What users think of the lens, see [`Usage::rating_milli`].
    pub fn set_rating_milli(&mut self, id: Entry, rating_milli: u16) {
        self.usages[id.index()].rating_milli = rating_milli;
    }

    /// See [`Self::new`]. What was counted until now keeps its worth of now.
    pub fn set_idle_seconds(&mut self, idle_seconds: f64) {
        self.move_epoch();
        self.idle_seconds = at_least_one(idle_seconds);
    }

    /// A request for the lens is served, or waits for it to be loaded: told once, before victims are chosen for it.
    /// `budget_bytes` is that of all lenses together.
    pub fn served(&mut self, id: Entry, now_seconds: f64, budget_bytes: u64) {
        let weight = self.weight(now_seconds);
        self.requests += 1;
        let usage = &mut self.usages[id.index()];
        usage.count_request(self.requests);
        usage.served += weight;
        usage.last_used_seconds = self.now_seconds;
        self.shadows.request(id, usage, budget_bytes);
    }

    /// The lens was loaded.
    pub fn loaded(&mut self, id: Entry, now_seconds: f64) {
        let weight = self.weight(now_seconds);
        let usage = &mut self.usages[id.index()];
        usage.loads += weight;
        usage.last_used_seconds = self.now_seconds;
    }

    /// The lens failed to load or to serve.
    pub fn failed(&mut self, id: Entry, now_seconds: f64) {
        let weight = self.weight(now_seconds);
        self.usages[id.index()].errors += weight;
    }

    /// How lenses compare now.
    pub fn ranking(&self, policy: EvictionPolicy, now_seconds: f64) -> Ranking {
        Ranking {
            policy,
            now_seconds,
            idle_seconds: self.idle_seconds,
            requests: self.requests,
            horizon: self.shadows.best(),
        }
    }

    /// What an event counts now, in units of the epoch.
    fn weight(&mut self, now_seconds: f64) -> f32 {
        self.now_seconds = self.now_seconds.max(now_seconds);
        if self.half_lives_since_epoch() > EPOCH_HALF_LIVES {
            self.move_epoch();
        }
        self.half_lives_since_epoch().exp2() as f32
    }

    fn half_lives_since_epoch(&self) -> f64 {
        (self.now_seconds - self.epoch_seconds) / self.idle_seconds
    }

    fn move_epoch(&mut self) {
        let decay = (-self.half_lives_since_epoch()).exp2() as f32;
        for usage in &mut self.usages {
            usage.served *= decay;
            usage.loads *= decay;
            usage.errors *= decay;
        }
        self.epoch_seconds = self.now_seconds;
    }
}

/// A half-life of nothing would leave nothing to compare.
fn at_least_one(seconds: f64) -> f64 {
    seconds.max(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_lose_half_in_a_half_life_also_across_epochs() {
        let mut history = History::new(10.0);
        let [old, new] = [0, 1].map(|_| history.register(1, 1.0, 0));
        for start in [0.0, 630.0, 1_275.0] {
            for (id, now_seconds) in [(old, start), (new, start + 10.0)] {
                history.served(id, now_seconds, 9);
                history.loaded(id, now_seconds);
                history.failed(id, now_seconds);
            }
            let [old, new] = [old, new].map(|id| history.usage(id));
            for ratio in [old.served / new.served, old.loads / new.loads, old.errors / new.errors] {
                assert!((ratio - 0.5).abs() < 1e-4, "{ratio}");
            }
        }
    }

    #[test]
    fn another_half_life_changes_no_ratio() {
        let mut history = History::new(10.0);
        let [old, new] = [0, 1].map(|_| history.register(1, 1.0, 0));
        history.loaded(old, 0.0);
        history.loaded(new, 30.0);
        history.set_idle_seconds(1_000.0);
        let ratio = history.usage(old).loads / history.usage(new).loads;
        assert!((ratio - 0.125).abs() < 1e-6, "{ratio}");
    }

    #[test]
    fn a_clock_that_goes_back_stands_still() {
        let mut history = History::new(10.0);
        let id = history.register(1, 1.0, 0);
        history.served(id, 5.0, 9);
        history.served(id, 3.0, 9);
        assert_eq!(history.usage(id).last_used_seconds, 5.0);
    }

    #[test]
    fn an_id_is_used_again_with_nothing_left_of_the_old_lens() {
        let mut history = History::new(10.0);
        let id = history.register(1, 1.0, 0);
        history.served(id, 5.0, 9);
        history.forget(id);
        assert_eq!(history.register(2, 1.0, 7), id);
        assert_eq!(*history.usage(id), Usage::new(2, 1.0, 7));
    }
}
