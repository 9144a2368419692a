//! How much the bases and lenses of a placement are asked for: rows that run or wait, averaged over about a minute.
//!
//! Rows are looked at every few seconds; a request of a moment is seen by chance, and the average is right all the same.
//! It is kept in memory only: after a restart it begins with what the published hints were made for.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use turret_crds::{WorkerReport, assign::LensId, document::BaseKey, hints::Hints};

use crate::controllers::wakes::Key;

/// Rows are looked at this often.
pub const EVERY: Duration = Duration::from_secs(5);
/// What was so long ago counts a third (1/e), seconds.
const MEMORY_SECONDS: f64 = 60.0;
/// A longer time between two looks forgets everything before it.
const LONGEST_PAUSE: SignedDuration = SignedDuration::from_hours(1);
/// Rows below this are none: they would be rounded to no thousandths.
const NOTHING: f64 = 0.0005;

/// Rows of one placement at one moment, over all of its workers.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    bases: BTreeMap<BaseKey, f64>,
    lenses: BTreeMap<LensId, f64>,
}

impl Rows {
    /// Adds those of one worker.
    pub fn add(&mut self, report: &WorkerReport) {
        for base in &report.bases {
            let rows = f64::from(base.running_rows) + f64::from(base.waiting_rows);
            if rows > 0.0 {
                *self.bases.entry(base.key.clone()).or_default() += rows;
            }
        }
        for lens in &report.lenses {
            let rows = f64::from(lens.active_rows) + f64::from(lens.waiting_rows);
            if rows > 0.0 {
                *self.lenses.entry(LensId::of(&lens.group, &lens.name)).or_default() += rows;
            }
        }
    }
}

/// Rows of one placement, averaged.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Averages {
    at: Timestamp,
    mean: Rows,
}

impl Averages {
    /// What hints were made for; nothing without any.
    pub fn of(published: Option<&Hints>, now: Timestamp) -> Self {
        let rows = |millirows: u64| millirows as f64 / 1000.0;
        let demands = || published.into_iter().flat_map(|hints| &hints.demands);
        let lenses = demands().flat_map(|(_, base)| &base.lenses);
        let mean = Rows {
            bases: demands().map(|(key, base)| (key.clone(), rows(base.demand_millirows))).collect(),
            lenses: lenses.map(|(id, millirows)| (id.clone(), rows(*millirows))).collect(),
        };
        Self { at: now, mean }
    }

    /// Takes in what is seen now, as if it had been so since the last time.
    pub fn observe(&mut self, seen: &Rows, now: Timestamp) {
        // The clock may have been set back, or far ahead.
        let passed = now.duration_since(self.at).clamp(SignedDuration::ZERO, LONGEST_PAUSE);
        self.at = now;
        let keep = (-passed.as_secs_f64() / MEMORY_SECONDS).exp();
        blend(&mut self.mean.bases, &seen.bases, keep);
        blend(&mut self.mean.lenses, &seen.lenses, keep);
    }

    /// Rows over a base, with and without a lens, in thousandths.
    pub fn of_base(&self, key: &BaseKey) -> u64 {
        millirows(self.mean.bases.get(key))
    }

    /// Rows with a lens, in thousandths.
    pub fn of_lens(&self, id: &LensId) -> u64 {
        millirows(self.mean.lenses.get(id))
    }
}

fn millirows(rows: Option<&f64>) -> u64 {
    rows.map_or(0, |rows| (rows * 1000.0).round() as u64)
}

fn blend<K: Clone + Ord>(mean: &mut BTreeMap<K, f64>, seen: &BTreeMap<K, f64>, keep: f64) {
    for rows in mean.values_mut() {
        *rows *= keep;
    }
    for (key, rows) in seen {
        *mean.entry(key.clone()).or_default() += (1.0 - keep) * rows;
    }
    mean.retain(|_, rows| *rows >= NOTHING);
}

/// The averages of every placement that was looked at.
#[derive(Default)]
pub struct Demands(Mutex<HashMap<Key, Averages>>);

impl Demands {
    /// Those of a placement. The first time they are what its published hints were made for.
    pub fn of(&self, key: &Key, published: impl FnOnce() -> Option<Hints>, now: Timestamp) -> Averages {
        let mut all = self.0.lock();
        all.entry(key.clone()).or_insert_with(|| Averages::of(published().as_ref(), now)).clone()
    }

    /// Takes in what the workers of all placements say now. Placements that do not exist any more are forgotten.
    pub fn observe<'a>(
        &self,
        reports: impl IntoIterator<Item = (&'a Key, &'a WorkerReport)>,
        exists: impl Fn(&Key) -> bool,
        now: Timestamp,
    ) {
        let mut seen: HashMap<&Key, Rows> = HashMap::new();
        for (key, report) in reports {
            seen.entry(key).or_default().add(report);
        }
        let nobody = Rows::default();
        let mut all = self.0.lock();
        all.retain(|key, averages| {
            averages.observe(seen.get(key).unwrap_or(&nobody), now);
            exists(key)
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::controllers::fixtures::{World, at};

    fn key() -> BaseKey {
        BaseKey("b".into())
    }

    fn rows(count: u32) -> Rows {
        Rows {
            bases: [(key(), f64::from(count))].into(),
            lenses: [(LensId::of("g", "l"), f64::from(count))].into(),
        }
    }

    #[test]
    fn what_is_seen_for_a_minute_counts_two_thirds_and_what_is_gone_is_forgotten_within_minutes() {
        let mut averages = Averages::of(None, at(0));
        for second in 1..=12 {
            averages.observe(&rows(8), at(5 * second));
        }
        assert_eq!((averages.of_base(&key()), averages.of_lens(&LensId::of("g", "l"))), (5057, 5057));
        averages.observe(&Rows::default(), at(120));
        assert_eq!(averages.of_base(&key()), 1860);
        averages.observe(&Rows::default(), at(120 + 600));
        assert_eq!(averages, Averages { at: at(720), mean: Rows::default() }, "nothing is kept of nothing");
    }

    #[test]
    fn a_clock_that_was_set_changes_nothing_for_ever() {
        let mut averages = Averages::of(None, at(1_000_000));
        averages.observe(&rows(8), at(0));
        assert_eq!(averages.of_base(&key()), 0, "no time has passed");
        averages.observe(&rows(8), at(600));
        assert_eq!(averages.of_base(&key()), 8000);
    }

    #[test]
    fn rows_of_all_workers_count_and_a_placement_that_is_gone_is_forgotten() {
        let mut world = World::new();
        world.carry_out();
        let report = |name: &str, running: u32| {
            let worker = world.serving(name).reporting(|report| {
                (report.bases[0].running_rows, report.bases[0].waiting_rows) = (running, 1);
                Arc::make_mut(&mut report.lenses[0]).waiting_rows = 1;
            });
            worker.report.unwrap()
        };
        let (one, other) = (report("w0", 2), report("w1", 4));
        let base = one.bases[0].key.clone();
        let mut both = Rows::default();
        both.add(&one);
        both.add(&other);
        assert_eq!(both.bases[&base], 8.0);
        assert_eq!(both.lenses[&LensId::of("a", "pirate")], 2.0);

        let demands = Demands::default();
        let placement: Key = ("ns".into(), "p".into());
        let ask = |second: i64| demands.of(&placement, || None, at(second)).of_base(&base);
        assert_eq!(ask(0), 0);
        let look = |exists: bool, second: i64| {
            demands.observe([(&placement, &*one), (&placement, &*other)], |_| exists, at(second));
        };
        look(true, 600);
        assert_eq!(ask(600), 8000);
        look(false, 600);
        assert_eq!(ask(600), 0, "another one of the same name begins anew");
    }

    #[test]
    fn after_a_restart_it_begins_with_what_was_published() {
        let base = turret_crds::hints::BaseDemands {
            demand_millirows: 1500,
            lenses: [(LensId::of("g", "l"), 700)].into(),
        };
        let hints = Hints { demands: [(key(), base)].into(), ..Hints::default() };
        let averages = Averages::of(Some(&hints), at(0));
        assert_eq!((averages.of_base(&key()), averages.of_lens(&LensId::of("g", "l"))), (1500, 700));
    }

    proptest! {
        /// An average is between the least and the most that was seen, and goes where what is seen stays.
        #[test]
        fn an_average_stays_between_what_was_seen_and_follows_it(
            seen in prop::collection::vec((0..100u32, 0..60i64), 1..40), last in 0..100u32,
        ) {
            let mut averages = Averages::of(None, at(0));
            let mut second = 0;
            for (count, pause) in &seen {
                second += pause;
                averages.observe(&rows(*count), at(second));
                let most = seen.iter().map(|(count, _)| u64::from(*count) * 1000).max().unwrap_or(0);
                prop_assert!(averages.of_base(&key()) <= most);
            }
            for _ in 0..240 {
                second += 5;
                averages.observe(&rows(last), at(second));
            }
            prop_assert!(averages.of_base(&key()).abs_diff(u64::from(last) * 1000) <= 1);
        }
    }
}
