//! What a placement's status says.

use std::sync::Arc;

use kube::ResourceExt;
use proptest::prelude::*;
use serde_json::json;
use turret_crds::{
    ModelPlacementStatus,
    condition::{self, FailureReason, reason},
    label,
    report::{ArtifactState, CannotFit},
};

use super::{
    pause::hold_back,
    plan::problems,
    resources,
    status::{Facts, status},
};
use crate::controllers::{
    asked::is_paused,
    assess::{ObservedWorker, WantedWorkers, assess},
    fixtures::{World, at, failed, group, pod},
    pod::{PodFacts, Trouble},
};

fn status_at(world: &World, second: i64) -> (ModelPlacementStatus, Option<std::time::Duration>) {
    let mut plan = world.plan_at(second);
    let pause = is_paused(&world.placement).then(|| hold_back(&mut plan, &world.live));
    let wanted = WantedWorkers {
        replicas: world.replicas(),
        template: plan.template.as_deref(),
        document: plan.document.as_ref(),
    };
    let assessment = assess(&wanted, world.live.deployment.as_deref(), &world.workers);
    let leaving = plan.in_the_way.iter().find(|o| o.is_leaving);
    let facts = Facts {
        placement: &world.placement,
        replicas: world.replicas(),
        problems: &problems(&plan.compiled, &plan.in_the_way),
        waiting_for: leaving.map(|o| o.message.as_str()),
        assessment: &assessment,
        document: plan.compiled.document.as_ref(),
        sequence: plan.document.as_ref().map(|d| d.sequence),
        image: &plan.image,
        pause: pause.as_ref(),
    };
    status(&facts, at(second))
}

/// The status as `Ready/reason`, and which of `Reconciling` and `Stalled` is true.
fn said(status: &ModelPlacementStatus) -> (String, &'static str) {
    let ready =
        status.conditions.iter().find(|c| c.type_ == condition::READY).expect("Ready is always there");
    let is = |type_| condition::is_true(&status.conditions, type_);
    let progress = match (is(condition::RECONCILING), is(condition::STALLED)) {
        (true, true) => "both",
        (true, false) => "reconciling",
        (false, true) => "stalled",
        (false, false) => "at rest",
    };
    (format!("{}/{}", ready.status, ready.reason), progress)
}

/// A placement of two groups with two lenses each and one worker that serves all of it.
fn serving() -> World {
    let mut world = World::new();
    world.placement = crate::controllers::fixtures::placement(&["a", "b"]);
    world.groups = vec![group("a", &["pirate", "terse"]), group("b", &["polite"])];
    world.carry_out();
    world.workers = vec![world.serving("w")];
    world
}

fn change(world: &mut World, change: impl FnOnce(ObservedWorker) -> ObservedWorker) {
    let worker = world.workers.remove(0);
    world.workers.insert(0, change(worker));
}

#[test]
fn ready_only_when_the_workers_themselves_say_so() {
    type Change = fn(&mut World);
    let cases: [(&str, &str, Change); 20] = [
        ("True/Serving", "at rest", |_| {}),
        ("True/ScaledToZero", "at rest", |w| {
            w.placement.spec.replicas = 0;
            w.carry_out();
            w.workers.clear();
        }),
        ("False/RollingOut", "reconciling", |w| {
            w.placement.spec.replicas = 0;
            w.carry_out();
        }),
        ("False/RollingOut", "reconciling", |w| w.workers.clear()),
        ("False/RollingOut", "reconciling", |w| w.placement.spec.replicas = 2),
        ("False/RollingOut", "reconciling", |w| w.placement.spec.termination_drain_seconds = Some(1)),
        ("False/RollingOut", "reconciling", |w| {
            w.workers.push(ObservedWorker { pod: pod("x", None), report: None, lost: None })
        }),
        ("False/RollingOut", "reconciling", |w| w.workers[0].pod.leaving = true),
        ("False/Unreachable", "reconciling", |w| {
            w.workers[0].report = None;
            w.workers[0].lost = Some("connection refused".into());
        }),
        ("False/Updating", "reconciling", |w| w.groups[0].metadata.generation = Some(2)),
        ("False/Updating", "reconciling", |w| change(w, |o| o.reporting(|r| r.state.document = None))),
        ("False/Loading", "reconciling", |w| change(w, |o| o.reporting(|r| r.state.ready = false))),
        ("False/Loading", "reconciling", |w| {
            change(w, |o| o.reporting(|r| Arc::make_mut(&mut r.lenses[0]).state = ArtifactState::Resolving));
        }),
        ("False/LensesFailed", "stalled", |w| {
            change(w, |o| {
                o.reporting(|r| Arc::make_mut(&mut r.lenses[0]).state = failed(FailureReason::DigestMismatch))
            });
        }),
        ("False/LensesFailed", "reconciling", |w| {
            change(w, |o| {
                o.reporting(|r| {
                    Arc::make_mut(&mut r.lenses[0]).state = failed(FailureReason::SourceUnavailable)
                })
            });
        }),
        ("False/BaseFailed", "stalled", |w| {
            change(w, |o| o.reporting(|r| r.bases[1].state = failed(FailureReason::DoesNotFit)));
        }),
        ("False/GroupNotFound", "stalled", |w| {
            w.groups.pop();
        }),
        ("False/DoesNotFit", "stalled", |w| {
            w.placement.spec.memory = Some(serde_json::from_value(json!({"deviceBudget": "1Mi"})).unwrap());
            let sequence = w.plan().document.unwrap().sequence;
            change(w, |o| o.reporting(|r| r.state.cannot_fit = Some(cannot_fit(sequence, false))));
        }),
        ("False/DoesNotFit", "reconciling", |w| {
            w.placement.spec.memory = Some(serde_json::from_value(json!({"deviceBudget": "1Mi"})).unwrap());
            let sequence = w.plan().document.unwrap().sequence;
            change(w, |o| o.reporting(|r| r.state.cannot_fit = Some(cannot_fit(sequence, true))));
        }),
        // What a worker says of budgets that are no longer wanted does not matter.
        ("False/Updating", "reconciling", |w| {
            let sequence = w.plan().document.unwrap().sequence;
            change(w, |o| o.reporting(|r| r.state.cannot_fit = Some(cannot_fit(sequence, false))));
            w.groups[0].metadata.generation = Some(2);
        }),
    ];
    for (ready, progress, act) in cases {
        let mut world = serving();
        act(&mut world);
        let (status, _) = status_at(&world, 0);
        assert_eq!(said(&status), (ready.to_owned(), progress), "{:#?}", status.conditions);
        let expect_available = world
            .workers
            .first()
            .is_some_and(|w| w.pod.counts() && w.report.as_ref().is_some_and(|r| r.state.ready));
        assert_eq!(condition::is_true(&status.conditions, condition::AVAILABLE), expect_available, "{ready}");
    }
}

fn cannot_fit(sequence: u64, once_idle: bool) -> CannotFit {
    let message = "6291456 bytes are needed, 1048576 are allowed".into();
    CannotFit { sequence, needed_bytes: 6 << 20, budget_bytes: 1 << 20, once_idle, message }
}

#[test]
fn what_autoscaling_decided_is_what_is_wanted() {
    let mut world = serving();
    world.placement.spec.replicas = 7;
    world.placement.spec.autoscaling =
        Some(serde_json::from_value(json!({"minReplicas": 0, "maxReplicas": 4})).unwrap());
    world.decided = Some(1);
    let (status, _) = status_at(&world, 0);
    assert_eq!((said(&status).0.as_str(), status.desired_replicas), ("True/Serving", Some(1)));
    let accepted = status.conditions.iter().find(|c| c.type_ == condition::ACCEPTED).unwrap();
    assert!(accepted.message.contains("spec.replicas is ignored"), "{}", accepted.message);
    world.decided = Some(2);
    assert_eq!(said(&status_at(&world, 0).0), ("False/RollingOut".to_owned(), "reconciling"));
    world.decided = Some(0);
    world.workers.clear();
    let (status, _) = status_at(&world, 0);
    assert_eq!(said(&status).0, "True/ScaledToZero");
    let told = status.conditions.iter().filter(|c| c.reason == reason::SCALED_TO_ZERO);
    assert!(told.clone().count() == 2 && told.clone().all(|c| c.message.contains("a request wakes one")));
    world.carry_out();
    world.placement.annotations_mut().insert(label::PAUSED.into(), "true".into());
    let (status, _) = status_at(&world, 0);
    assert_eq!(said(&status).0, "True/ScaledToZero");
    assert!(status.conditions.iter().all(|c| !c.message.contains("wakes")), "while it is paused none comes");
}

#[test]
fn budgets_that_are_too_small_are_told_with_their_numbers() {
    let mut world = serving();
    change(&mut world, |o| o.reporting(|r| r.state.cannot_fit = Some(cannot_fit(1, false))));
    let (status, _) = status_at(&world, 0);
    for type_ in [condition::READY, condition::STALLED] {
        let condition = status.conditions.iter().find(|c| c.type_ == type_).unwrap();
        assert_eq!(condition.reason, "DoesNotFit");
        assert!(condition.message.contains("6291456 bytes are needed, 1048576 are allowed"), "{condition:?}");
    }
    assert!(condition::is_true(&status.conditions, condition::AVAILABLE), "the old budgets serve on");
}

#[test]
fn a_placement_without_any_group_left_does_not_call_itself_available() {
    let mut world = serving();
    world.groups.clear();
    world.carry_out();
    let empty = world.serving("w");
    world.workers = vec![empty];
    let (status, _) = status_at(&world, 0);
    assert_eq!(said(&status).0, "False/GroupNotFound");
    let available = status.conditions.iter().find(|c| c.type_ == condition::AVAILABLE).unwrap();
    assert_eq!((available.status.as_str(), available.reason.as_str()), ("False", "GroupNotFound"));
    assert_eq!((status.group_summary.as_deref(), status.updated_replicas), (Some("none"), Some(1)));
}

#[test]
fn a_lens_that_loads_again_is_still_ready() {
    let mut world = serving();
    change(&mut world, |o| {
        o.reporting(|r| Arc::make_mut(&mut r.lenses[0]).state = ArtifactState::Loading { percent: 3 })
    });
    assert_eq!(said(&status_at(&world, 0).0).0, "True/Serving");
}

#[test]
fn troubles_of_pods_are_told_as_they_are() {
    for (reason, needs_change, progress) in [
        (reason::DEVICE_NOT_FOUND, true, "stalled"),
        (reason::CRASHING, false, "reconciling"),
        (reason::UNSCHEDULABLE, false, "reconciling"),
        (reason::IMAGE_UNAVAILABLE, false, "reconciling"),
    ] {
        let mut world = serving();
        world.workers[0].report = None;
        world.workers[0].pod.trouble =
            Some(Trouble { reason, message: "its own words".into(), needs_change });
        let (status, _) = status_at(&world, 0);
        assert_eq!(said(&status), (format!("False/{reason}"), progress));
        let ready = status.conditions.iter().find(|c| c.type_ == condition::READY).unwrap();
        assert_eq!(ready.message, "its own words");
    }
}

#[test]
fn nothing_is_said_of_a_ready_worker_before_it_was_asked() {
    let wanted = WantedWorkers { replicas: 1, template: None, document: None };
    let mut worker = ObservedWorker { pod: pod("w", None), report: None, lost: None };
    assert!(assess(&wanted, None, std::slice::from_ref(&worker)).undecided);
    worker.lost = Some("refused".into());
    assert!(!assess(&wanted, None, std::slice::from_ref(&worker)).undecided, "it was asked");
    let starting =
        ObservedWorker { pod: PodFacts { ready: false, ..pod("w", None) }, report: None, lost: None };
    assert!(!assess(&wanted, None, &[starting]).undecided, "a worker that starts is known to start");
}

#[test]
fn why_no_pod_can_be_made_is_told() {
    let mut world = serving();
    world.workers.clear();
    world.edit_deployment(|d| {
        d.status = serde_json::from_value(json!({"conditions": [{
            "type": "ReplicaFailure", "status": "True", "message": "exceeded quota: gpus"}]}))
        .unwrap();
    });
    let (status, _) = status_at(&world, 0);
    assert!(
        status.conditions[0].message.contains("exceeded quota: gpus"),
        "{}",
        status.conditions[0].message
    );
}

#[test]
fn a_status_that_was_written_is_the_same_when_looked_at_again() {
    let mut world = serving();
    world.placement.status = Some(status_at(&world, 100).0);
    let (again, look_again) = status_at(&world, 5000);
    assert_eq!((Some(again), look_again), (world.placement.status, None));
}

#[test]
fn numbers_and_summaries_are_for_people_and_the_scale_subresource() {
    let (status, _) = status_at(&serving(), 0);
    assert_eq!(
        (status.replicas, status.ready_replicas, status.updated_replicas),
        (Some(1), Some(1), Some(1))
    );
    assert_eq!(status.desired_replicas, Some(1));
    assert_eq!(status.selector, Some(resources::selector_text(&serving().placement)));
    assert_eq!(status.group_summary.as_deref(), Some("a,b"));
    assert_eq!(status.active_summary.as_deref(), Some("a×1"));
    assert_eq!(status.device_memory_summary.as_deref(), Some("1.0Mi / 1.0Gi"));
    assert_eq!((status.worker_image.as_deref(), status.document_sequence), (Some("worker:1"), Some(1)));
}

#[test]
fn what_moves_with_traffic_is_written_once_a_minute_or_with_something_else() {
    let mut world = serving();
    world.placement.status = Some(status_at(&world, 100).0);
    change(&mut world, |o| o.reporting(|r| r.state.active_base = Some(r.bases[1].key.clone())));
    let (early, look_again) = status_at(&world, 130);
    assert_eq!(Some(early), world.placement.status);
    assert_eq!(look_again, Some(std::time::Duration::from_secs(30)));
    assert_eq!(status_at(&world, 160).0.active_summary.as_deref(), Some("b×1"));
    assert_eq!(status_at(&world, 10).0.active_summary.as_deref(), Some("b×1"), "the clock was set back");
    world.workers[0].pod.ready = false;
    assert_eq!(status_at(&world, 130).0.active_summary.as_deref(), Some("b×1"), "written anyway");
}

#[test]
fn conditions_of_others_are_not_ours_to_write() {
    let mut world = serving();
    let mut written = status_at(&world, 100).0;
    let foreign = condition::merge(
        &[],
        vec![condition::Wanted {
            type_: "Audited",
            status: Some(true),
            reason: "Yes".into(),
            message: String::new(),
        }],
        1,
        k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(1)),
    );
    let ours = written.clone();
    written.conditions.extend(foreign);
    world.placement.status = Some(written);
    assert_eq!(status_at(&world, 200).0, ours);
}

#[test]
fn a_paused_placement_is_as_ready_as_what_is_carried_out() {
    let mut world = serving();
    world.placement.status = Some(status_at(&world, 0).0);
    world.placement.annotations_mut().insert(label::PAUSED.into(), "true".into());
    let (paused, _) = status_at(&world, 10);
    assert_eq!(said(&paused), ("True/Serving".into(), "at rest"));
    assert!(condition::is_true(&paused.conditions, condition::PAUSED));

    // Declared and held back: whoever waits for it is told that it will not come by itself.
    world.placement.status = Some(paused.clone());
    world.placement.metadata.generation = Some(2);
    world.groups.push(group("c", &[]));
    world.placement.spec.groups = crate::controllers::fixtures::placement(&["a", "b", "c"]).spec.groups;
    world.placement.spec.termination_drain_seconds = Some(7);
    world.default_image = "worker:2".into();
    let (held, _) = status_at(&world, 20);
    assert_eq!(said(&held), ("False/Paused".into(), "stalled"));
    assert_eq!(held.observed_generation, 2);
    assert_eq!(held.group_summary.as_deref(), Some("a,b"), "what is served");
    assert_eq!(held.worker_image, paused.worker_image, "the pods are those of before");
    assert_eq!(held.document_sequence, paused.document_sequence);
    assert!(condition::is_true(&held.conditions, condition::AVAILABLE));

    // It goes on where it was.
    world.placement.status = Some(held);
    world.placement.annotations_mut().clear();
    let (resumed, _) = status_at(&world, 30);
    assert_eq!(said(&resumed).1, "reconciling");
    assert!(resumed.conditions.iter().all(|c| c.type_ != condition::PAUSED));
}

#[test]
fn a_request_to_look_is_noted_once_it_can_be_followed() {
    let mut world = serving();
    world.placement.annotations_mut().insert(label::RECONCILE_REQUESTED_AT.into(), "1".into());
    world.placement.annotations_mut().insert(label::PAUSED.into(), "true".into());
    assert_eq!(status_at(&world, 0).0.last_handled_reconcile_at, None);
    world.placement.annotations_mut().remove(label::PAUSED);
    assert_eq!(status_at(&world, 0).0.last_handled_reconcile_at.as_deref(), Some("1"));
}

proptest! {
    /// Whatever the workers say: `Reconciling` and `Stalled` exclude each other, one of them is true
    /// exactly while `Ready` is not, and every condition speaks of the generation that was seen.
    #[test]
    fn the_conditions_agree_with_each_other(
        replicas in 0..3i32,
        serves in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>(), 0..4u8), 0..3),
        generation in 1..4i64,
    ) {
        let mut world = serving();
        world.placement.spec.replicas = replicas;
        world.placement.metadata.generation = Some(generation);
        let worker = world.serving("w");
        world.workers = serves.iter().enumerate().map(|(at, (document, ready, known, lens))| {
            let mut worker = worker.clone().reporting(|r| {
                if !document { r.state.document = None; }
                r.state.ready = *ready;
                Arc::make_mut(&mut r.lenses[0]).state = match lens {
                    0 => ArtifactState::Ready,
                    1 => ArtifactState::Resolving,
                    2 => failed(FailureReason::SourceNotFound),
                    _ => failed(FailureReason::Internal),
                };
            });
            worker.pod.name = format!("w{at}");
            if !known { worker.report = None; }
            worker
        }).collect();
        let (status, _) = status_at(&world, 0);
        let (ready, progress) = said(&status);
        prop_assert_eq!(progress == "at rest", ready.starts_with("True/"), "{} {}", ready, progress);
        prop_assert!(progress != "both");
        let is_served = serves.len() == usize::try_from(replicas).unwrap()
            && serves.iter().all(|(document, ready, known, lens)| *document && *ready && *known && *lens == 0);
        prop_assert_eq!(ready.starts_with("True/"), is_served);
        prop_assert!(status.conditions.iter().all(|c| c.observed_generation == Some(generation)));
        prop_assert_eq!(status.observed_generation, generation);
    }
}
