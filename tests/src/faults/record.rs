//! What one proxy has seen: the writes of the step, what the operator follows, and what was struck.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use tokio::time::{Instant, sleep};

use super::plan::{Call, Crash, Deed, Fault, Roll, Verb};

/// The operator follows so many things once it leads: nine kinds, and two Secrets.
const FOLLOWED: usize = 11;
/// How long to wait between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// What a proxy has seen. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Record {
    state: Arc<Mutex<State>>,
    fault: Option<Fault>,
    seed: u64,
}

#[derive(Debug)]
struct State {
    step: u64,
    life: u64,
    crash: Option<Crash>,
    /// The writes after which a crash is due were done, and the operator is not dead yet.
    is_crashing: bool,
    /// Writes of the step that succeeded.
    writes: Vec<String>,
    /// When something was last written, or something else began that a write may follow.
    last: Instant,
    struck: u32,
    /// How many of each kind were numbered.
    numbers: BTreeMap<String, u32>,
    /// What was listed or watched in this life.
    wanted: BTreeSet<String>,
    /// What is watched now, with all that happened passed on; by which watch.
    following: BTreeMap<String, u64>,
    watches: u64,
    /// Watches of these are told that their place is gone.
    gone: BTreeSet<String>,
    /// The first list of each life, and of which.
    lists: BTreeMap<String, (u64, Bytes)>,
    /// Stale lists that were shown in this life.
    shown: BTreeSet<String>,
}

impl Record {
    /// Nothing seen yet. `seed` decides what is struck.
    pub fn new(fault: Option<Fault>, seed: u64) -> Self {
        let state = State {
            step: 0,
            life: 0,
            crash: None,
            is_crashing: false,
            writes: Vec::new(),
            last: Instant::now(),
            struck: 0,
            numbers: BTreeMap::new(),
            wanted: BTreeSet::new(),
            following: BTreeMap::new(),
            watches: 0,
            gone: BTreeSet::new(),
            lists: BTreeMap::new(),
            shown: BTreeSet::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), fault, seed }
    }

    /// The next step, with a crash or without.
    pub fn begin_step(&self, crash: Option<Crash>) {
        let mut state = self.lock();
        state.step += 1;
        (state.crash, state.is_crashing, state.last) = (crash, false, Instant::now());
        state.writes.clear();
    }

    /// The next life of the operator. A crash was had, or is not to be had any more.
    pub fn begin_life(&self, life: u64) {
        let mut state = self.lock();
        (state.life, state.crash, state.is_crashing, state.last) = (life, None, false, Instant::now());
        state.wanted.clear();
        state.following.clear();
        state.gone.clear();
        state.shown.clear();
    }

    /// Writes of the step so far that succeeded.
    pub fn writes(&self) -> Vec<String> {
        self.lock().writes.clone()
    }

    /// How often a fault struck.
    pub fn strikes(&self) -> u32 {
        self.lock().struck
    }

    /// Number of the step.
    pub fn step(&self) -> u64 {
        self.lock().step
    }

    /// Whether a crash is due and the operator not dead yet.
    pub fn is_crashing(&self) -> bool {
        self.lock().is_crashing
    }

    /// Notes that a fault struck.
    pub fn struck(&self) {
        self.lock().struck += 1;
    }

    /// Throws for the next of a kind.
    pub fn roll(&self, kind: &str) -> Roll {
        self.lock().roll(self.seed, kind)
    }

    /// Notes a request; what is to become of it.
    pub fn note(&self, call: &Call) -> Deed {
        let mut state = self.lock();
        if matches!(call.verb, Verb::List | Verb::Watch) {
            state.wanted.insert(call.subject.clone());
        }
        let deed = self.judge(&mut state, call);
        match deed {
            Deed::Pass if call.verb == Verb::List => {
                state.gone.remove(&call.subject);
            }
            Deed::Pass => {}
            Deed::Gone => {
                state.struck += 1;
                state.gone.insert(call.subject.clone());
            }
            Deed::Refuse(_) | Deed::Break(_) | Deed::Hang(_) => state.struck += 1,
        }
        deed
    }

    fn judge(&self, state: &mut State, call: &Call) -> Deed {
        if call.verb == Verb::Watch && state.gone.contains(&call.subject) {
            return Deed::Gone;
        }
        let Some(fault) = self.fault else { return Deed::Pass };
        let roll = state.roll(self.seed, &call.kind());
        if roll.strikes() { fault.deed(call, roll) } else { Deed::Pass }
    }

    /// Keeps what was listed, for a later life.
    pub fn listed(&self, call: &Call, text: &Bytes) {
        if self.fault == Some(Fault::ListsAreStale) {
            let mut state = self.lock();
            let life = state.life;
            state.lists.insert(call.subject.clone(), (life, text.clone()));
        }
    }

    /// What an earlier life was shown, once in each life.
    pub fn stale_list(&self, call: &Call) -> Option<Bytes> {
        if call.verb != Verb::List || self.fault != Some(Fault::ListsAreStale) {
            return None;
        }
        let mut state = self.lock();
        let (life, text) = state.lists.get(&call.subject)?.clone();
        let is_shown = life < state.life && state.shown.insert(call.subject.clone());
        state.struck += u32::from(is_shown);
        is_shown.then_some(text)
    }

    /// Notes a write that succeeded; the crash that it makes due.
    pub fn wrote(&self, call: &Call) -> Option<Crash> {
        let mut state = self.lock();
        state.writes.push(call.to_string());
        state.last = Instant::now();
        let crash = state.crash.filter(|crash| crash.after == state.writes.len())?;
        state.is_crashing = true;
        Some(crash)
    }

    /// Notes that a watch was opened. The operator needs a while for what it has not seen yet.
    pub fn follow(&self, life: u64, call: &Call) -> Following {
        let mut state = self.lock();
        state.watches += 1;
        state.last = Instant::now();
        Following { state: self.state.clone(), life, subject: call.subject.clone(), watch: state.watches }
    }

    /// Waits until the operator follows everything, all that happened was passed on to it, and it has written nothing for so
    /// long.
    pub async fn quiet(&self, time: Duration) {
        loop {
            let (is_settled, since) = {
                let state = self.lock();
                (state.unsettled().is_none(), state.last.elapsed())
            };
            if is_settled && since >= time {
                return;
            }
            sleep(if is_settled { time.saturating_sub(since) } else { BETWEEN_LOOKS }).await;
        }
    }

    /// What keeps it from being quiet, beside writes.
    pub fn unsettled(&self) -> Option<String> {
        self.lock().unsettled()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn roll(&mut self, seed: u64, kind: &str) -> Roll {
        let nth = self.numbers.entry(kind.to_owned()).or_default();
        let roll = Roll::of(seed, kind, *nth);
        *nth += 1;
        roll
    }

    fn unsettled(&self) -> Option<String> {
        if self.is_crashing {
            return Some("a crash is due".into());
        }
        let missed = self.wanted.iter().filter(|subject| !self.following.contains_key(*subject));
        let missed: Vec<_> = missed.map(String::as_str).collect();
        if missed.is_empty() && self.following.len() >= FOLLOWED {
            return None;
        }
        Some(format!("it follows {} things, and not {missed:?}", self.following.len()))
    }
}

/// An open watch.
#[derive(Debug)]
pub struct Following {
    state: Arc<Mutex<State>>,
    life: u64,
    subject: String,
    watch: u64,
}

impl Following {
    /// Whether all that happened was passed on.
    pub fn is_up_to_date(&self, is_so: bool) {
        let mut state = lock(&self.state);
        if is_so && state.life == self.life {
            state.following.insert(self.subject.clone(), self.watch);
        } else if state.following.get(&self.subject) == Some(&self.watch) {
            state.following.remove(&self.subject);
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.is_up_to_date(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(method: &str, uri: &str) -> Call {
        Call::of(&method.parse().unwrap(), &uri.parse().unwrap())
    }

    fn watch(number: usize) -> Call {
        call("GET", &format!("/api/v1/namespaces/n/kind{number}?watch=true"))
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_quiet_once_everything_is_followed_and_nothing_was_written_for_a_while() {
        let record = Record::new(None, 0);
        record.begin_step(None);
        let follow = |number: usize| {
            record.note(&watch(number));
            let following = record.follow(0, &watch(number));
            following.is_up_to_date(true);
            following
        };
        let mut followed: Vec<_> = (1..FOLLOWED).map(follow).collect();
        assert!(record.unsettled().is_some(), "the operator is starting");
        followed.push(follow(FOLLOWED));
        record.wrote(&call("PATCH", "/api/v1/namespaces/n/services/s"));
        let written = Instant::now();
        record.quiet(Duration::from_secs(1)).await;
        assert!(written.elapsed() >= Duration::from_secs(1));
        followed[0].is_up_to_date(false);
        assert!(record.unsettled().unwrap().contains("kind1"));
        // The watch is opened again before the old one is given up.
        let again = follow(1);
        drop(followed.remove(0));
        assert_eq!(record.unsettled(), None);
        drop(again);
        assert!(record.unsettled().is_some());
    }

    #[test]
    fn a_crash_is_due_after_so_many_writes_of_the_step_and_once() {
        let record = Record::new(None, 0);
        let crash = Crash { after: 2, answered: true };
        record.begin_step(Some(crash));
        let write = call("PATCH", "/api/v1/namespaces/n/services/s");
        assert_eq!(record.wrote(&write), None);
        assert_eq!((record.wrote(&write), record.is_crashing()), (Some(crash), true));
        record.begin_life(1);
        assert_eq!((record.wrote(&write), record.is_crashing()), (None, false));
        assert_eq!(record.writes(), vec!["Patch services s"; 3]);
    }

    #[test]
    fn a_place_that_is_gone_stays_so_until_all_is_listed_again() {
        let record = Record::new(Some(Fault::PlacesAreGone), 2);
        while record.note(&watch(1)) != Deed::Gone {}
        for _ in 0..5 {
            assert_eq!(record.note(&watch(1)), Deed::Gone);
        }
        assert_ne!(record.note(&call("GET", "/api/v1/namespaces/n/kind1/o")), Deed::Gone);
        let list = call("GET", "/api/v1/namespaces/n/kind1");
        let passes = (0..3).any(|_| {
            while record.note(&list) != Deed::Pass {}
            record.note(&watch(1)) == Deed::Pass
        });
        assert!(passes, "at most two in a row are struck");
    }

    #[test]
    fn a_later_life_is_shown_once_what_an_earlier_one_saw() {
        let record = Record::new(Some(Fault::ListsAreStale), 0);
        let list = call("GET", "/api/v1/namespaces/n/pods");
        assert_eq!(record.stale_list(&list), None);
        record.listed(&list, &Bytes::from("old"));
        assert_eq!(record.stale_list(&list), None, "in the same life it is not old");
        record.begin_life(1);
        assert_eq!(record.stale_list(&list), Some(Bytes::from("old")));
        assert_eq!(record.stale_list(&list), None, "then the watch has told the rest");
        record.begin_life(2);
        assert_eq!((record.stale_list(&list).is_some(), record.strikes()), (true, 2));
    }
}
