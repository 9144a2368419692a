//! A placement that is paused: what is not done for it, and what is said of that. Pure.
//!
//! It is judged by what is stored and made, not by what is declared: while the two agree it is as `Ready` as it would be
//! otherwise. Where they do not, only a person can help, so it is `Stalled`: whoever waits for it need not wait for ever.

use k8s_openapi::api::apps::v1::Deployment;
use turret_crds::{ModelPlacement, condition::reason, label};

use super::{
    plan::{Live, OwnedKind, Plan},
    resources,
};
use crate::controllers::{asked, assess::Obstacle};

/// A placement that is paused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pause {
    /// What would be written and is not; `None` when everything is as declared.
    pub held_back: Option<String>,
    /// The groups that its workers were told of last, as clients call them, sorted.
    pub groups: Vec<String>,
}

impl Pause {
    /// For a person.
    pub fn message(&self) -> String {
        let asked = format!("the annotation {} is there, so nothing is changed", label::PAUSED);
        match &self.held_back {
            None => format!("{asked}; all that is declared is carried out"),
            Some(what) => format!("{asked}; remove it to have this carried out: {what}"),
        }
    }

    /// What stands in the way of serving what is declared.
    pub fn obstacle(&self) -> Option<Obstacle> {
        self.held_back.as_ref().map(|_| Obstacle::stalled(reason::PAUSED, self.message()))
    }
}

/// How many workers are to be there, as far as objects say: while a placement is paused, as many as were asked for before.
pub fn replicas(placement: &ModelPlacement, deployment: Option<&Deployment>) -> i32 {
    let asked_for = deployment.and_then(resources::live_replicas).filter(|_| asked::is_paused(placement));
    asked_for.unwrap_or_else(|| resources::replicas(placement, deployment))
}

/// Takes out of a plan all that would change something. What is left of it speaks of what is there.
pub fn hold_back(plan: &mut Plan, live: &Live) -> Pause {
    let writes = std::mem::take(&mut plan.writes);
    if writes.iter().any(|write| write.kind == OwnedKind::ConfigMap) {
        // Nobody is to serve it.
        plan.compiled.document = None;
        plan.gzip = None;
    }
    plan.document = live.config_map.as_deref().and_then(resources::document_ref);
    plan.template = live.deployment.as_deref().and_then(resources::template_hash).map(str::to_owned);
    // Nobody is to leave, and what pods were made from stays.
    plan.marks.clear();
    plan.stale_claim_templates.clear();
    plan.look_again = None;
    let what: Vec<String> =
        writes.iter().map(|write| format!("{} ({})", write.kind.name(), write.why)).collect();
    Pause {
        held_back: (!what.is_empty()).then(|| what.join(", ")),
        groups: plan.document.iter().flat_map(|d| d.groups.keys().cloned()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use kube::ResourceExt;
    use serde_json::json;

    use super::*;
    use crate::controllers::fixtures::{World, group};

    #[test]
    fn what_is_as_declared_holds_nothing_back() {
        let mut world = World::new();
        world.carry_out();
        let mut plan = world.plan();
        let before = plan.document.clone();
        let pause = hold_back(&mut plan, &world.live);
        assert_eq!((pause.held_back.clone(), pause.obstacle()), (None, None));
        assert_eq!(pause.groups, ["a"]);
        assert_eq!(plan.document, before);
        assert!(plan.compiled.document.is_some() && plan.template.is_some());
    }

    #[test]
    fn a_new_lens_a_new_shape_and_a_new_size_are_held_back_and_named() {
        let mut world = World::new();
        world.carry_out();
        let stored = world.plan().document;
        world.groups = vec![group("a", &["pirate", "terse"])];
        world.placement.spec.replicas = 3;
        let mut plan = world.plan();
        let pause = hold_back(&mut plan, &world.live);
        assert_eq!(plan.writes, []);
        assert_eq!(plan.document, stored, "what workers are to serve is what is stored");
        assert!(plan.compiled.document.is_none() && plan.gzip.is_none(), "nobody is told of another one");
        let obstacle = pause.obstacle().expect("something is held back");
        assert_eq!((obstacle.reason, obstacle.needs_change), (reason::PAUSED, true));
        for word in ["ConfigMap", "Deployment", label::PAUSED] {
            assert!(obstacle.message.contains(word), "{word} in {}", obstacle.message);
        }
        assert!(!obstacle.message.contains("Service"), "{}", obstacle.message);
    }

    #[test]
    fn as_many_workers_stay_as_there_were_and_none_is_marked_to_leave() {
        let mut world = World::new();
        world.placement.spec.replicas = 3;
        world.carry_out();
        world.workers = vec![world.serving("a"), world.serving("b"), world.serving("c")];
        world.placement.spec.replicas = 1;
        world.placement.annotations_mut().insert(label::PAUSED.into(), "true".into());
        let mut plan = world.plan();
        assert_eq!(plan.marks.len(), 2);
        let pause = hold_back(&mut plan, &world.live);
        assert!(plan.marks.is_empty() && pause.held_back.is_some_and(|what| what.contains("Deployment")));
        let deployment = world.live.deployment.as_deref();
        assert_eq!(replicas(&world.placement, deployment), 3);
        world.placement.annotations_mut().clear();
        assert_eq!(replicas(&world.placement, deployment), 1);
    }

    #[test]
    fn what_pods_were_made_from_is_not_removed() {
        let mut world = World::new();
        let claim = |class: &str| serde_json::from_value(json!({"deviceClassName": class})).ok();
        world.placement.spec.accelerator = claim("old.example");
        world.carry_out();
        world.placement.spec.accelerator = claim("new.example");
        world.carry_out();
        world.edit_deployment(|deployment| {
            deployment.status = serde_json::from_value(json!({
                "replicas": 1, "updatedReplicas": 1, "availableReplicas": 1, "observedGeneration": 1,
            }))
            .ok();
        });
        let mut plan = world.plan();
        assert_eq!(plan.stale_claim_templates.len(), 1);
        hold_back(&mut plan, &world.live);
        assert!(plan.stale_claim_templates.is_empty());
    }

    #[test]
    fn hints_that_are_due_wait_and_nobody_is_told_so() {
        let mut world = World::new();
        world.carry_out();
        world.workers = vec![world.serving("w").reporting(|report| report.state.hints_version = Some(0))];
        assert!(world.plan_at(100).publishes_hints);
        world.placement.annotations_mut().insert(label::PAUSED.into(), "true".into());
        let mut plan = world.plan_at(100);
        let pause = hold_back(&mut plan, &world.live);
        assert_eq!((plan.publishes_hints, pause.held_back), (false, None));
        assert!(plan.hints.is_some(), "those that are there stay");
    }

    #[test]
    fn nothing_is_made_for_a_placement_that_begins_paused() {
        let world = World::new();
        let mut plan = world.plan();
        let pause = hold_back(&mut plan, &world.live);
        assert_eq!((plan.writes.len(), plan.document, pause.groups.len()), (0, None, 0));
        assert!(pause.held_back.is_some());
    }
}
