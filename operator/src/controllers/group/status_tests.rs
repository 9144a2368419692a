//! What a group's status says.

use std::sync::Arc;

use kube::ResourceExt;
use turret_crds::{
    ModelGroup, ModelGroupStatus,
    condition::{self, FailureReason, reason},
    label,
    report::ArtifactState,
};

use super::status::{Placed, status};
use crate::controllers::{
    asked::is_paused,
    assess::{ObservedWorker, WantedWorkers, assess},
    fixtures::{World, at, failed, group},
};

/// Looks at the group of a world through its placement.
fn status_of(world: &World) -> ModelGroupStatus {
    status_through(&world.groups[0], &[world])
}

fn status_through(group: &ModelGroup, worlds: &[&World]) -> ModelGroupStatus {
    let documents: Vec<_> = worlds
        .iter()
        .map(|w| {
            w.live.config_map.as_deref().and_then(crate::controllers::placement::resources::document_ref)
        })
        .collect();
    let placed: Vec<_> = worlds
        .iter()
        .zip(&documents)
        .map(|(world, document)| {
            let wanted = WantedWorkers {
                replicas: world.placement.spec.replicas,
                template: None,
                document: document.as_ref(),
            };
            Placed {
                placement: world.placement.metadata.name.as_deref().unwrap(),
                group: "a",
                replicas: world.placement.spec.replicas,
                refused: None,
                paused: is_paused(&world.placement),
                document: document.as_ref(),
                assessment: assess(&wanted, None, &world.workers),
            }
        })
        .collect();
    status(group, &placed, at(0))
}

fn serving() -> World {
    let mut world = World::new();
    world.groups = vec![group("a", &["pirate", "terse"])];
    world.carry_out();
    world.workers = vec![world.serving("w")];
    world
}

fn reporting(world: &mut World, change: impl FnOnce(ObservedWorker) -> ObservedWorker) {
    let worker = world.workers.remove(0);
    world.workers.insert(0, change(worker));
}

/// A condition as `status/reason`.
fn said(status: &ModelGroupStatus, type_: &str) -> String {
    let condition =
        status.conditions.iter().find(|c| c.type_ == type_).expect("every condition is always there");
    format!("{}/{}", condition.status, condition.reason)
}

#[test]
fn a_group_is_ready_when_every_placement_serves_this_generation() {
    let world = serving();
    let status = status_of(&world);
    assert_eq!(said(&status, condition::READY), "True/Serving");
    assert_eq!(said(&status, condition::AVAILABLE), "True/Serving");
    assert_eq!(said(&status, condition::RESOLVED), "True/Done");
    assert_eq!((status.lens_summary.as_deref(), status.ready_lenses), (Some("2/2"), Some(2)));
    assert_eq!(status.base_digest.as_deref(), Some("sha256:base"));
    assert_eq!(status.base_size.as_deref(), Some("1.0Mi"));
    assert_eq!(status.placements, ["p"]);
    assert_eq!(status.observed_generation, 1);
}

#[test]
fn one_placement_that_does_not_serve_it_is_enough() {
    let (good, mut bad) = (serving(), serving());
    bad.placement.metadata.name = Some("q".into());
    bad.workers.clear();
    let status = status_through(&good.groups[0], &[&good, &bad]);
    assert_eq!(said(&status, condition::READY), "False/RollingOut");
    assert_eq!(said(&status, condition::AVAILABLE), "True/Serving");
    assert_eq!(status.lens_summary.as_deref(), Some("0/2"), "ready on every placement or not ready");
    assert_eq!(status.placements, ["p", "q"]);
}

#[test]
fn a_new_generation_is_not_ready_before_the_workers_say_so() {
    let mut world = serving();
    world.groups[0].metadata.generation = Some(2);
    assert_eq!(said(&status_of(&world), condition::READY), "False/Updating");
    world.carry_out();
    assert_eq!(said(&status_of(&world), condition::READY), "False/Updating", "written, but not yet served");
    world.workers = vec![world.serving("w")];
    let status = status_of(&world);
    assert_eq!(said(&status, condition::READY), "True/Serving");
    assert_eq!(status.conditions[0].observed_generation, Some(2));
}

#[test]
fn a_group_stays_ready_while_something_else_of_the_document_changes() {
    let mut world = serving();
    world.groups[0].status = Some(status_of(&world));
    world.placement.spec.admission =
        Some(turret_crds::placement::Admission { hold_seconds: Some(7), ..Default::default() });
    assert_eq!(world.carry_out().len(), 1, "a newer document that the workers have yet to take");
    assert_eq!(said(&status_of(&world), condition::READY), "True/Serving");
    // But not what is wrong with the group itself, and not a change of the group.
    let served = world.workers.clone();
    reporting(&mut world, |o| {
        o.reporting(|r| Arc::make_mut(&mut r.lenses[0]).state = failed(FailureReason::DigestMismatch))
    });
    assert_eq!(said(&status_of(&world), condition::READY), "False/LensesFailed");
    world.workers = served;
    world.groups[0].metadata.generation = Some(2);
    world.carry_out();
    assert_eq!(said(&status_of(&world), condition::READY), "False/Updating");
}

#[test]
fn a_group_of_the_same_name_that_was_made_anew_is_another_group() {
    let mut world = serving();
    world.groups[0].metadata.uid = Some("another".into());
    assert_eq!(said(&status_of(&world), condition::READY), "False/Updating");
}

#[test]
fn nothing_to_serve_is_vacuously_ready_and_says_why() {
    let mut world = serving();
    let status = status_through(&world.groups[0], &[]);
    assert_eq!(said(&status, condition::READY), "True/NotPlaced");
    assert_eq!(said(&status, condition::AVAILABLE), "False/NotPlaced");
    assert_eq!(said(&status, condition::RESOLVED), "Unknown/NotPlaced");
    world.placement.spec.replicas = 0;
    world.workers.clear();
    assert_eq!(said(&status_of(&world), condition::READY), "True/ScaledToZero");
}

#[test]
fn failed_lenses_are_named_with_their_reason_and_the_others_served() {
    let mut world = serving();
    reporting(&mut world, |o| {
        o.reporting(|r| Arc::make_mut(&mut r.lenses[1]).state = failed(FailureReason::DigestMismatch))
    });
    let status = status_of(&world);
    assert_eq!(said(&status, condition::READY), "False/LensesFailed");
    assert_eq!(said(&status, condition::STALLED), "True/LensesFailed");
    assert_eq!(said(&status, condition::RECONCILING), "False/Done");
    assert_eq!(said(&status, condition::RESOLVED), "False/LensesFailed");
    assert_eq!(status.lens_summary.as_deref(), Some("1/2"));
    let failed = &status.failed_lenses[0];
    assert_eq!((failed.name.as_str(), failed.reason), ("terse", FailureReason::DigestMismatch));
    let ready = &status.conditions[0].message;
    assert!(ready.contains("`terse`: DigestMismatch: says DigestMismatch"), "{ready}");
}

#[test]
fn a_placement_of_another_namespace_counts_like_one_of_the_own_and_is_named_with_it() {
    let (own, mut far) = (serving(), serving());
    far.placement.metadata.name = Some("b/p".into());
    let status = status_through(&own.groups[0], &[&own, &far]);
    assert_eq!(said(&status, condition::READY), "True/Serving");
    assert_eq!(status.placements, ["p", "b/p"]);
    assert!(status.conditions[0].message.contains("`b/p`"), "{}", status.conditions[0].message);
    far.workers.clear();
    let status = status_through(&own.groups[0], &[&own, &far]);
    assert_eq!(said(&status, condition::READY), "False/RollingOut");
    assert!(
        status.conditions[0].message.starts_with("placement `b/p`: "),
        "{}",
        status.conditions[0].message
    );
    // Its consent withdrawn, it is not looked at.
    assert_eq!(said(&status_through(&own.groups[0], &[&own]), condition::READY), "True/Serving");
}

#[test]
fn at_most_sixteen_failed_lenses_are_named() {
    let names: Vec<String> = (0..40).map(|n| format!("l{n:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut world = serving();
    world.groups = vec![group("a", &names)];
    world.carry_out();
    world.workers = vec![world.serving("w").reporting(|r| {
        r.lenses.iter_mut().for_each(|l| Arc::make_mut(l).state = failed(FailureReason::SourceNotFound));
    })];
    let status = status_of(&world);
    assert_eq!((status.failed_lenses.len(), status.lens_summary.as_deref()), (16, Some("0/40")));
    assert!(status.conditions[0].message.len() < 400, "{}", status.conditions[0].message);
}

#[test]
fn what_may_pass_by_itself_is_not_stalled() {
    for (state, ready, progress) in [
        (failed(FailureReason::SourceUnavailable), "False/LensesFailed", "False/Progressing"),
        (ArtifactState::Resolving, "False/Loading", "False/Progressing"),
    ] {
        let mut world = serving();
        reporting(&mut world, |o| o.reporting(|r| Arc::make_mut(&mut r.lenses[0]).state = state));
        let status = status_of(&world);
        assert_eq!(said(&status, condition::READY), ready);
        assert_eq!(said(&status, condition::STALLED), progress);
        assert!(condition::is_true(&status.conditions, condition::RECONCILING));
    }
}

/// Has the alias of the group, which leads to `pirate`, lead to `terse` from now on, and the worker take that document and find
/// `terse` in this state.
fn moving_alias(terse: ArtifactState) -> World {
    let mut world = serving();
    let declare = |world: &mut World, lens: &str, generation: i64| {
        let alias = serde_json::json!([{"name": "default", "targets": [{"lensName": lens}]}]);
        world.groups[0].spec.aliases = serde_json::from_value(alias).unwrap();
        world.groups[0].metadata.generation = Some(generation);
        world.carry_out();
        world.workers = vec![world.serving("w")];
    };
    declare(&mut world, "pirate", 2);
    declare(&mut world, "terse", 3);
    reporting(&mut world, |o| o.reporting(|r| Arc::make_mut(&mut r.lenses[1]).state = terse));
    world
}

#[test]
fn a_group_is_not_ready_before_its_aliases_lead_to_what_is_declared() {
    let mut world = moving_alias(ArtifactState::Resolving);
    let status = status_of(&world);
    assert_eq!(said(&status, condition::READY), "False/AliasPending");
    assert_eq!(said(&status, condition::RECONCILING), "True/AliasPending");
    assert_eq!(said(&status, condition::AVAILABLE), "True/Serving");
    let message = &status.conditions[0].message;
    for word in
        ["alias `default` stays at `pirate`", "moves to `terse`", "worker w is still checking `terse`"]
    {
        assert!(message.contains(word), "{word} is not in: {message}");
    }
    reporting(&mut world, |o| o.reporting(|r| Arc::make_mut(&mut r.lenses[1]).state = ArtifactState::Ready));
    let message = status_of(&world).conditions[0].message.clone();
    assert!(message.contains("about to move"), "{message}");
    world.carry_out();
    assert_eq!(said(&status_of(&world), condition::READY), "False/Updating");
    world.workers = vec![world.serving("w")];
    assert_eq!(said(&status_of(&world), condition::READY), "True/Serving");
}

#[test]
fn a_failed_target_is_named_with_the_alias_that_waits_for_it() {
    let status = status_of(&moving_alias(failed(FailureReason::SourceNotFound)));
    assert_eq!(said(&status, condition::READY), "False/LensesFailed");
    assert_eq!(said(&status, condition::STALLED), "True/LensesFailed");
    let message = &status.conditions[0].message;
    for word in ["`terse`: SourceNotFound", "alias `default` stays at `pirate`"] {
        assert!(message.contains(word), "{word} is not in: {message}");
    }
}

#[test]
fn a_placement_that_is_refused_says_why_to_its_groups() {
    let mut world = serving();
    world.groups[0].metadata.generation = Some(2);
    let document =
        world.live.config_map.as_deref().and_then(crate::controllers::placement::resources::document_ref);
    let placed = Placed {
        placement: "p",
        group: "a",
        replicas: 1,
        refused: Some("spec.memory.lensBudget is too large"),
        paused: false,
        document: document.as_ref(),
        assessment: Default::default(),
    };
    let status = status(&world.groups[0], &[placed], at(0));
    assert_eq!(said(&status, condition::READY), format!("False/{}", reason::INVALID));
    assert!(status.conditions[0].message.contains("lensBudget is too large"));
}

#[test]
fn what_a_paused_placement_does_not_serve_stalls_its_groups_and_only_that() {
    let mut world = serving();
    world.placement.annotations_mut().insert(label::PAUSED.into(), "true".into());
    let status = status_of(&world);
    assert_eq!(said(&status, condition::READY), "True/Serving", "it is served as declared");
    assert!(status.conditions.iter().all(|c| c.type_ != condition::PAUSED), "the group itself is not paused");
    world.groups[0].metadata.generation = Some(2);
    let status = status_of(&world);
    assert_eq!(said(&status, condition::READY), "False/Paused");
    assert_eq!(said(&status, condition::STALLED), "True/Paused");
    assert_eq!(said(&status, condition::AVAILABLE), "True/Serving", "the generation before is");
}

#[test]
fn a_group_that_somebody_means_to_pause_says_that_it_is_not_while_they_do() {
    let mut world = serving();
    world.groups[0].annotations_mut().insert(label::PAUSED.into(), "true".into());
    world.groups[0].status = Some(status_of(&world));
    let status = status_of(&world);
    assert_eq!(said(&status, condition::PAUSED), "False/NotPaused");
    assert_eq!(said(&status, condition::READY), "True/Serving");
    world.groups[0].annotations_mut().clear();
    assert!(status_of(&world).conditions.iter().all(|c| c.type_ != condition::PAUSED));
}

#[test]
fn a_request_to_look_is_noted() {
    let mut world = serving();
    assert_eq!(status_of(&world).last_handled_reconcile_at, None);
    world.groups[0].annotations_mut().insert(label::RECONCILE_REQUESTED_AT.into(), "now".into());
    assert_eq!(status_of(&world).last_handled_reconcile_at.as_deref(), Some("now"));
}

#[test]
fn a_status_that_was_written_is_the_same_when_looked_at_again() {
    let mut world = serving();
    world.groups[0].status = Some(status_of(&world));
    let again = status_of(&world);
    assert_eq!(Some(again), world.groups[0].status);
}
