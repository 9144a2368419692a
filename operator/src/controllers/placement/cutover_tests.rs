//! When an alias moves, seen through what is planned and written.

use std::sync::Arc;

use serde_json::json;
use turret_crds::{
    alias::{Alias, EffectiveAlias},
    condition::FailureReason,
    report::{ArtifactState, CannotFit},
};

use super::{plan::OwnedKind, resources};
use crate::controllers::{
    assess::ObservedWorker,
    fixtures::{World, failed, group},
};

/// Lets the one alias of the world lead to these lenses, as an edit of the group does.
fn declare(world: &mut World, targets: &[&str]) {
    let targets: Vec<_> = targets.iter().map(|lens| json!({"lensName": lens})).collect();
    let alias: Alias = serde_json::from_value(json!({"name": "default", "targets": targets})).unwrap();
    let group = &mut world.groups[0];
    group.spec.aliases = vec![alias];
    group.metadata.generation = group.metadata.generation.map(|generation| generation + 1);
}

/// A worker that serves the stored document, in which the alias leads to the first of two lenses.
fn serving() -> World {
    let mut world = World::new();
    world.groups = vec![group("a", &["new", "old"])];
    declare(&mut world, &["old"]);
    world.carry_out();
    world.workers = vec![world.serving("w")];
    world
}

/// What the alias leads to in the document that is to be served.
fn leads_to(world: &World) -> Vec<String> {
    let document = world.plan().compiled.document.unwrap();
    let alias = document.group("a").unwrap().alias("default").unwrap();
    alias.targets.iter().map(|target| target.lens.clone()).collect()
}

/// Writes the document, and has a worker take it that finds the new lens in this state.
fn taken(world: &mut World, new: ArtifactState) -> ObservedWorker {
    world.carry_out();
    world.serving("w").reporting(|r| Arc::make_mut(&mut r.lenses[0]).state = new)
}

#[test]
fn an_alias_moves_in_a_document_of_its_own_once_the_worker_has_its_new_target() {
    let mut world = serving();
    declare(&mut world, &["new"]);
    assert_eq!(leads_to(&world), ["old"], "what the worker says is of the document before");
    assert_eq!(world.carry_out(), [OwnedKind::ConfigMap]);
    assert_eq!(leads_to(&world), ["old"], "the worker has yet to take it");
    world.workers = vec![taken(&mut world, ArtifactState::Resolving)];
    assert_eq!((leads_to(&world), world.carry_out()), (vec!["old".to_owned()], vec![]));
    world.workers = vec![taken(&mut world, ArtifactState::Ready)];
    assert_eq!(leads_to(&world), ["new"]);
    assert_eq!(world.carry_out(), [OwnedKind::ConfigMap]);
    // It has moved, whatever becomes of the lens; and nothing is written any more.
    world.workers = vec![taken(&mut world, failed(FailureReason::SourceNotFound))];
    assert_eq!((leads_to(&world), world.carry_out()), (vec!["new".to_owned()], vec![]));
    let stored = resources::document_ref(world.live.config_map.as_ref().unwrap()).unwrap();
    assert_eq!((stored.sequence, &stored.aliases), (3, &world.plan().compiled.document.unwrap().aliases()));
}

#[test]
fn a_failed_target_leaves_the_alias_where_it_is() {
    let mut world = serving();
    declare(&mut world, &["new", "old"]);
    world.carry_out();
    world.workers = vec![taken(&mut world, failed(FailureReason::SourceNotFound))];
    assert_eq!((leads_to(&world), world.carry_out()), (vec!["old".to_owned()], vec![]));
}

#[test]
fn every_worker_that_reports_has_a_say() {
    let mut world = serving();
    declare(&mut world, &["new"]);
    let ready = taken(&mut world, ArtifactState::Ready);
    let slow = |world: &World| {
        world.serving("x").reporting(|r| {
            Arc::make_mut(&mut r.lenses[0]).state = ArtifactState::Resolving;
        })
    };
    let unasked = |world: &World| ObservedWorker { report: None, ..world.serving("x") };
    let lost = |world: &World| ObservedWorker { lost: Some("no route".into()), ..unasked(world) };
    let starting = |world: &World| {
        let mut worker = unasked(world);
        worker.pod.ready = false;
        worker
    };
    let cases: [(&str, ObservedWorker, &str); 4] = [
        ("one does not have it", slow(&world), "old"),
        ("one has not been asked, as after a start of the operator", unasked(&world), "old"),
        ("one cannot be asked", lost(&world), "new"),
        ("one starts", starting(&world), "new"),
    ];
    for (why, other, lens) in cases {
        world.workers = vec![ready.clone(), other];
        assert_eq!(leads_to(&world), [lens], "{why}");
    }
    world.workers.clear();
    assert_eq!(leads_to(&world), ["old"], "nobody says that it can be served");
}

#[test]
fn budgets_that_wait_hold_no_alias_back() {
    let mut world = serving();
    declare(&mut world, &["new"]);
    let sequence = world.plan().document.unwrap().sequence;
    let behind = taken(&mut world, ArtifactState::Ready).reporting(|r| {
        r.state.document.as_mut().unwrap().sequence = sequence - 1;
        r.state.cannot_fit = Some(CannotFit {
            sequence,
            needed_bytes: 2,
            budget_bytes: 1,
            once_idle: false,
            message: "2 bytes are needed".into(),
        });
    });
    world.workers = vec![behind];
    assert_eq!(leads_to(&world), ["new"]);
}

#[test]
fn a_removed_target_is_left_at_once() {
    let mut world = serving();
    world.groups[0].spec.lenses.retain(|lens| lens.name != "old");
    declare(&mut world, &["new"]);
    assert_eq!(leads_to(&world), ["new"]);
}

#[test]
fn an_operator_that_finds_no_stored_document_believes_the_worker() {
    let mut world = serving();
    declare(&mut world, &["new"]);
    world.live.config_map = None;
    assert_eq!(leads_to(&world), ["old"]);
}

#[test]
fn an_edit_of_what_is_stored_is_repaired() {
    let mut world = serving();
    let config_map = Arc::make_mut(world.live.config_map.as_mut().unwrap());
    let data = config_map.data.as_mut().unwrap();
    assert_eq!(data.keys().collect::<Vec<_>>(), [resources::ALIASES_KEY]);
    data.insert(resources::ALIASES_KEY.into(), "no JSON".into());
    assert_eq!(world.carry_out(), [OwnedKind::ConfigMap]);
    assert_eq!(world.plan().writes, []);
    let kept: Vec<EffectiveAlias> =
        resources::document_ref(world.live.config_map.as_ref().unwrap()).unwrap().aliases["a"].clone();
    assert_eq!(kept, world.plan().compiled.document.unwrap().groups[0].aliases);
}

#[test]
fn without_aliases_nothing_is_stored_of_them() {
    let mut world = serving();
    world.groups[0].spec.aliases.clear();
    world.groups[0].metadata.generation = Some(9);
    world.carry_out();
    assert_eq!(world.live.config_map.as_ref().unwrap().data, None);
    assert_eq!(world.plan().writes, []);
}
