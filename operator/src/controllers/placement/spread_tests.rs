//! Who is told what to hold, and when.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use proptest::prelude::*;
use serde_json::json;
use turret_crds::{
    Assignment, WorkerDocument, WorkerReport,
    assign::{BaseShare, LensId, LensShare, WorkerShare},
    document::BaseKey,
    hints::Hints,
};

use super::{
    demand::{Averages, Rows},
    plan::OwnedKind,
    resources,
    spread::{Decision, publish},
};
use crate::controllers::{
    assess::ObservedWorker,
    fixtures::{World, at, group, pod},
    pod::Trouble,
};

const LENSES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// A placement of one group with six preloaded lenses whose document is stored.
fn world() -> World {
    let mut world = World::new();
    world.groups = vec![group("a", &LENSES)];
    for lens in &mut world.groups[0].spec.lenses {
        lens.residency = Some(turret_crds::group::LensResidency::Preloaded);
    }
    world.carry_out();
    world
}

impl World {
    fn hints(&self) -> Hints {
        let config_map = self.live.config_map.as_deref().expect("a ConfigMap");
        resources::stored_hints(config_map).expect("hints").0
    }

    /// Workers that know of hints and serve the document.
    fn with_workers(mut self, names: &[&str]) -> Self {
        self.workers = names.iter().map(|name| self.knowing(name)).collect();
        self
    }

    fn knowing(&self, name: &str) -> ObservedWorker {
        self.serving(name).reporting(|report| report.state.hints_version = Some(0))
    }

    fn document(&self) -> WorkerDocument {
        self.plan().compiled.document.expect("a document")
    }
}

fn preloaded(hints: &Hints, worker: &str) -> BTreeSet<String> {
    hints.workers[worker].preload.iter().map(|id| id.0.clone()).collect()
}

#[test]
fn a_new_placement_tells_nobody_to_hold_anything_and_all_of_its_workers_together() {
    let mut world = world();
    assert_eq!((world.hints().version, world.hints().workers.len()), (1, 0));
    // Its pods are made one after the other; none has said anything.
    let starting = |name: &str| {
        let pod = crate::controllers::pod::PodFacts { ready: false, ip: None, ..pod(name, None) };
        ObservedWorker { pod, report: None, lost: None }
    };
    world.workers = vec![starting("w0")];
    let early = world.plan_at(1);
    assert_eq!((early.writes.len(), early.look_again), (0, Some(Duration::from_secs(1))));
    world.workers.push(starting("w1"));
    assert_eq!(world.carry_out_at(2), [OwnedKind::ConfigMap]);
    let hints = world.hints();
    assert_eq!((hints.version, hints.workers.len()), (2, 2));
    let (one, other) = (preloaded(&hints, "w0"), preloaded(&hints, "w1"));
    assert!(one.is_disjoint(&other), "{hints:?}");
    assert_eq!(one.len() + other.len(), LENSES.len(), "each is on one of them");

    // They say what they have: the same answer, and nothing is written.
    let world = world.with_workers(&["w0", "w1"]);
    assert_eq!(world.plan_at(500).writes, []);
}

#[test]
fn one_worker_more_takes_lenses_from_the_others_and_gives_them_back_when_it_goes() {
    let mut world = world().with_workers(&["w0", "w1"]);
    world.carry_out_at(100);
    let before = world.hints();
    let third = world.knowing("w2");
    world.workers.push(third);
    assert_eq!(world.carry_out_at(101), [], "not again within two seconds");
    assert_eq!(world.carry_out_at(103), [OwnedKind::ConfigMap]);
    let after = world.hints();
    for worker in ["w0", "w1"] {
        assert!(
            preloaded(&after, worker).is_subset(&preloaded(&before, worker)),
            "nothing moves between these"
        );
    }
    assert!(!preloaded(&after, "w2").is_empty(), "{after:?}");
    world.workers[2].pod.leaving = true;
    world.carry_out_at(200);
    assert!(world.hints().says_the_same(&before));
}

#[test]
fn a_worker_with_trouble_gets_nothing_until_it_reports() {
    let mut world = world().with_workers(&["w0", "w1"]);
    world.workers[1].report = None;
    world.workers[1].lost = Some("connection refused".into());
    world.workers[1].pod.trouble =
        Some(Trouble { reason: "Crashing", message: String::new(), needs_change: false });
    world.carry_out_at(100);
    assert_eq!(world.hints().workers.into_keys().collect::<Vec<_>>(), ["w0"]);
    // Without trouble, and not heard for a moment: it stays.
    world.workers[1].pod.trouble = None;
    world.carry_out_at(200);
    assert_eq!(world.hints().workers.len(), 2);
}

#[test]
fn before_the_workers_are_heard_nothing_is_told_anew() {
    let mut world = world().with_workers(&["w0", "w1"]);
    world.carry_out_at(100);
    let before = world.hints();
    for worker in &mut world.workers {
        worker.report = None;
    }
    world.workers.pop();
    assert_eq!(world.plan_at(5000).writes, [], "the operator has just started");
    world.workers[0].lost = Some("no route".into());
    assert_eq!(world.plan_at(5000).writes, [], "none can be reached");
    // A document that is written takes what is known along.
    world.groups[0].metadata.generation = Some(2);
    world.carry_out_at(5000);
    assert!(world.hints().version > before.version);
}

#[test]
fn copies_follow_demand_and_are_published_once_a_minute() {
    let mut world = world().with_workers(&["w0", "w1", "w2"]);
    world.placement.spec.spread =
        Some(serde_json::from_value(json!({"minCopies": 1, "maxCopies": 2})).unwrap());
    world.carry_out_at(100);
    let copies = |world: &World| {
        let hints = world.hints();
        hints.workers.keys().filter(|worker| preloaded(&hints, worker).contains("a:c")).count()
    };
    assert_eq!(copies(&world), 1);
    let ask = |world: &mut World, rows: u32, second: i64| {
        let mut seen = Rows::default();
        let worker = world.knowing("any").reporting(|report| {
            report.bases[0].running_rows = rows;
            let lens = report.lenses.iter_mut().find(|lens| lens.name == "c").expect("it is declared");
            Arc::make_mut(lens).active_rows = rows;
        });
        seen.add(worker.report.as_deref().expect("it reports"));
        world.demand = Averages::of(None, at(second - 3000));
        world.demand.observe(&seen, at(second));
    };
    ask(&mut world, 64, 110);
    let early = world.plan_at(110);
    assert_eq!((early.writes.len(), early.look_again), (0, Some(Duration::from_secs(50))));
    assert_eq!(world.carry_out_at(160), [OwnedKind::ConfigMap]);
    assert_eq!(copies(&world), 2, "as many as maxCopies allows");
    ask(&mut world, 66, 400);
    assert_eq!(world.plan_at(400).writes, [], "noise");
    ask(&mut world, 0, 500);
    world.carry_out_at(500);
    assert_eq!(copies(&world), 1);
    // Minima hold without any demand.
    world.placement.spec.spread = Some(serde_json::from_value(json!({"minCopies": 2})).unwrap());
    world.carry_out_at(600);
    assert_eq!(copies(&world), 2);
}

#[test]
fn hints_change_neither_the_document_nor_what_is_ready() {
    let mut world = world().with_workers(&["w0", "w1"]);
    let document = world.document();
    world.carry_out_at(100);
    assert_eq!(world.document(), document);
    let plan = world.plan_at(101);
    assert_eq!(plan.document.map(|d| (d.sequence, d.digest)), Some((document.sequence, document.digest)));
    assert_eq!(plan.hints, Some(world.hints()));
}

#[test]
fn a_config_map_that_is_lost_does_not_take_the_version_back() {
    let mut world = world().with_workers(&["w0", "w1"]);
    world.carry_out_at(100);
    world.workers[0] = world.knowing("w0").reporting(|report| report.state.hints_version = Some(41));
    world.carry_out_at(200);
    assert_eq!(world.hints().version, 42);
    assert_eq!(world.plan_at(5000).writes, [], "and it is written once");
    world.live.config_map = None;
    world.carry_out_at(300);
    assert_eq!(world.hints().version, 42);
}

#[test]
fn only_the_active_group_counts_where_the_spec_says_which_is_active() {
    let mut world = world();
    world.placement = crate::controllers::fixtures::placement(&["a", "b"]);
    world.groups.push(group("b", &["z"]));
    world.placement.spec.switching =
        Some(serde_json::from_value(json!({"mode": "Manual", "activeGroupName": "b"})).unwrap());
    world.carry_out();
    let mut world = world.with_workers(&["w0", "w1"]);
    world.carry_out_at(100);
    let key = world.document().group("b").unwrap().base.key.clone();
    let hints = world.hints();
    assert!(hints.workers.values().all(|share| share.base.as_ref() == Some(&key)), "{hints:?}");
    assert!(hints.workers.values().all(|share| share.preload.is_empty()), "the other group's are of no use");
}

#[test]
fn a_worker_whose_budget_is_known_gets_what_fits() {
    let mut world = world();
    world.workers = ["w0", "w1"]
        .map(|name| {
            world.knowing(name).reporting(|report: &mut WorkerReport| {
                for lens in &mut report.lenses {
                    Arc::make_mut(lens).bytes = Some(512 << 10);
                }
            })
        })
        .into();
    world.carry_out_at(100);
    let hints = world.hints();
    // The fixture's workers have 1 MiB for lenses.
    assert!(hints.workers.values().all(|share| share.preload.len() == 2), "{hints:?}");
}

fn answer(workers: &[u8], millirows: u64) -> Assignment {
    let share = |n: &u8| {
        let share = WorkerShare { base: Some(BaseKey("b".into())), weight: 1, preload: Vec::new() };
        (format!("w{n}"), share)
    };
    let lens = LensShare { demand_millirows: millirows, workers: Vec::new() };
    let base = BaseShare {
        demand_millirows: millirows,
        workers: Vec::new(),
        lenses: [(LensId::of("g", "l"), lens)].into(),
    };
    Assignment { workers: workers.iter().map(share).collect(), bases: [(BaseKey("b".into()), base)].into() }
}

proptest! {
    /// Whatever happens: versions only grow, what is published is never older than a minute behind, and no more is written
    /// than once a minute for demand and once in two seconds for workers.
    #[test]
    fn hints_are_published_soon_and_seldom(
        steps in prop::collection::vec(
            (prop::collection::btree_set(0..4u8, 0..4), 0..3u64, 0..40i64, any::<bool>()),
            1..60,
        ),
    ) {
        let mut published: Option<Hints> = None;
        let mut now = 1_000_000;
        for (workers, millirows, pause, is_written) in steps {
            now += pause;
            let workers: Vec<u8> = workers.into_iter().collect();
            let answer = answer(&workers, millirows * 1000);
            let decision = publish(published.as_ref(), answer.clone(), 0, is_written, at(now));
            let next = match decision {
                Decision::Publish(next) => next,
                Decision::Keep { look_again } => {
                    let kept = published.as_ref().expect("the first answer is published");
                    let same = kept.says_the_same(&Hints::of(answer.clone(), 0, 0));
                    prop_assert_eq!(same, look_again.is_none());
                    if let Some(wait) = look_again {
                        prop_assert!(!is_written && wait <= Duration::from_secs(60));
                        // When it is due, it is published.
                        let due = at(now + i64::try_from(wait.as_secs()).unwrap());
                        let then = publish(published.as_ref(), answer, 0, false, due);
                        prop_assert!(matches!(then, Decision::Publish(_)));
                    }
                    continue;
                }
            };
            if let Some(before) = &published {
                prop_assert!(next.version == before.version + 1 && !next.says_the_same(before));
                let passed = next.published_at - before.published_at;
                let same_workers = next.workers.keys().eq(before.workers.keys());
                let pause = if same_workers { 60 } else { 2 };
                prop_assert!(is_written || passed >= pause);
            }
            prop_assert_eq!(next.published_at, u64::try_from(now).unwrap());
            // The same answer again is nothing new, with a document that is written too.
            let again = publish(Some(&next), answer, 0, true, at(now));
            prop_assert_eq!(again, Decision::Keep { look_again: None });
            published = Some(next);
        }
    }

    /// A clock that is set back holds nothing up for longer than it says.
    #[test]
    fn hints_from_the_future_are_replaced(ahead in 61..100_000i64) {
        let published_at = u64::try_from(1000 + ahead).unwrap();
        let published = Hints { published_at, ..Hints::of(answer(&[0], 0), 1, 0) };
        let decision = publish(Some(&published), answer(&[0], 9000), 0, false, at(1000));
        prop_assert!(matches!(decision, Decision::Publish(_)));
    }
}
