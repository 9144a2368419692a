//! What is done for a placement, and what is not.

use std::sync::Arc;

use k8s_openapi::{
    api::apps::v1::DeploymentStatus, api::core::v1::ServicePort, apimachinery::pkg::api::resource::Quantity,
    apimachinery::pkg::apis::meta::v1::OwnerReference, apimachinery::pkg::util::intstr::IntOrString,
};
use kube::ResourceExt;
use proptest::prelude::*;
use turret_crds::{
    condition::reason,
    placement::{
        Accelerator, GroupRef, Memory, Resources, UpgradePolicy, Worker,
        cache::{Cache, EmptyDirCache, EphemeralCache},
    },
    quantity::ByteQuantity,
};

use super::{plan::*, resources, victims::Mark};
use crate::controllers::{
    fixtures::{World, at, group, pod},
    pod::LEAVES_FIRST,
};

const ALL: [OwnedKind; 4] =
    [OwnedKind::ConfigMap, OwnedKind::Service, OwnedKind::PodDisruptionBudget, OwnedKind::Deployment];

fn in_place(world: &World) -> bool {
    let deployment = world.live.deployment.as_ref().unwrap();
    let rolling =
        deployment.spec.as_ref().unwrap().strategy.as_ref().unwrap().rolling_update.as_ref().unwrap();
    rolling.max_surge == Some(IntOrString::Int(0)) && rolling.max_unavailable == Some(IntOrString::Int(1))
}

#[test]
fn a_new_placement_gets_its_document_before_its_workers() {
    let mut world = World::new();
    let plan = world.plan();
    assert_eq!(plan.writes.iter().map(|w| w.kind).collect::<Vec<_>>(), ALL);
    assert!(plan.writes.iter().all(|w| !w.exists && w.why == "it does not exist"));
    assert_eq!(plan.document.unwrap().sequence, 1);
    assert_eq!(world.carry_out(), ALL);
}

#[test]
fn a_group_that_cannot_be_read_is_told_and_not_taken_from_the_workers() {
    let mut world = World::new();
    world.carry_out();
    world.groups.clear();
    world.unreadable.insert(("ns".into(), "a".into()), "invalid type: null".into());
    let plan = world.plan();
    assert_eq!((plan.writes.len(), plan.compiled.document), (0, None));
    assert_eq!(plan.document.unwrap().sequence, 1, "what is stored stays");
    let [problem] = &plan.compiled.problems[..] else { panic!("{:?}", plan.compiled.problems) };
    assert_eq!(problem.reason, reason::GROUP_UNREADABLE);
    assert!(problem.message.starts_with("ModelGroup `a` cannot be read: invalid type: null"));
    // The rest of the placement is carried out.
    world.placement.spec.replicas = 5;
    assert_eq!(world.plan().writes.iter().map(|w| w.kind).collect::<Vec<_>>(), [OwnedKind::Deployment]);
}

#[test]
fn a_plan_on_the_planned_state_is_empty() {
    let mut world = World::new();
    world.carry_out();
    assert_eq!(world.plan().writes, []);
    assert_eq!(world.plan().document.unwrap().sequence, 1);
}

#[test]
fn a_manual_edit_is_seen_named_and_repaired() {
    type Edit = (OwnedKind, &'static str, fn(&mut World));
    let edits: [Edit; 4] = [
        (OwnedKind::Deployment, ".spec.replicas", |w| {
            w.edit_deployment(|d| d.spec.as_mut().unwrap().replicas = Some(7))
        }),
        (OwnedKind::Service, ".spec.ports[1]", |w| {
            let service = Arc::make_mut(w.live.service.as_mut().unwrap());
            let ports = service.spec.as_mut().unwrap().ports.as_mut().unwrap();
            ports[1] = ServicePort { port: 1, ..ports[1].clone() };
        }),
        (OwnedKind::PodDisruptionBudget, ".spec.maxUnavailable", |w| {
            let budget = Arc::make_mut(w.live.disruption_budget.as_mut().unwrap());
            budget.spec.as_mut().unwrap().max_unavailable = Some(IntOrString::Int(9));
        }),
        (OwnedKind::ConfigMap, ".binaryData.document.json.gz", |w| {
            let config_map = Arc::make_mut(w.live.config_map.as_mut().unwrap());
            config_map.binary_data.as_mut().unwrap().values_mut().for_each(|v| v.0 = b"other".to_vec());
        }),
    ];
    for (kind, what, edit) in edits {
        let mut world = World::new();
        world.carry_out();
        edit(&mut world);
        let writes = world.plan().writes;
        assert_eq!(writes.len(), 1, "{kind:?}");
        assert_eq!(
            (writes[0].kind, writes[0].why.as_str()),
            (kind, format!("{what} is not as wanted").as_str())
        );
        world.carry_out();
        assert_eq!(world.plan().writes, [], "{kind:?}");
    }
}

#[test]
fn what_autoscaling_decided_goes_to_the_deployment_whatever_the_spec_says() {
    let mut world = World::new();
    world.placement.spec.replicas = 7;
    world.placement.spec.autoscaling =
        Some(serde_json::from_value(serde_json::json!({"minReplicas": 0, "maxReplicas": 4})).unwrap());
    assert_eq!(
        resources::replicas(&world.placement, None),
        1,
        "a first worker shows whether it can be served"
    );
    world.decided = Some(2);
    world.carry_out();
    let live = |world: &World| world.live.deployment.as_deref().and_then(resources::live_replicas);
    assert_eq!(live(&world), Some(2));
    assert_eq!(resources::replicas(&world.placement, world.live.deployment.as_deref()), 2);
    world.decided = Some(0);
    assert_eq!(world.carry_out(), [OwnedKind::Deployment]);
    assert_eq!(resources::replicas(&world.placement, world.live.deployment.as_deref()), 0);
    world.placement.spec.autoscaling = None;
    assert_eq!(resources::replicas(&world.placement, world.live.deployment.as_deref()), 7);
}

#[test]
fn the_pod_that_leaves_is_marked_before_the_deployment_is_lowered() {
    let mut world = World::new();
    world.placement.spec.replicas = 2;
    world.carry_out();
    let busy = world.serving("a").reporting(|r| r.state.running_rows = 3);
    world.workers = vec![busy, world.serving("b")];
    assert_eq!(world.plan().marks, []);
    world.placement.spec.replicas = 1;
    let plan = world.plan();
    assert_eq!(plan.marks, [Mark { pod: "b".into(), cost: Some(LEAVES_FIRST) }]);
    assert_eq!(plan.writes.iter().map(|w| w.kind).collect::<Vec<_>>(), [OwnedKind::Deployment]);
}

#[test]
fn what_others_add_is_left_alone() {
    let mut world = World::new();
    world.carry_out();
    world.edit_deployment(|d| {
        d.metadata
            .annotations
            .get_or_insert_default()
            .insert("deployment.kubernetes.io/revision".into(), "3".into());
        let template = d.spec.as_mut().unwrap().template.spec.as_mut().unwrap();
        template
            .containers
            .push(k8s_openapi::api::core::v1::Container { name: "sidecar".into(), ..Default::default() });
        template.dns_policy = Some("ClusterFirst".into());
    });
    assert_eq!(world.plan().writes, []);
}

#[test]
fn a_changed_lens_changes_the_document_and_nothing_else() {
    let mut world = World::new();
    world.carry_out();
    world.groups[0] = group("a", &["pirate", "terse"]);
    world.groups[0].metadata.generation = Some(2);
    let plan = world.plan();
    assert_eq!(plan.writes.iter().map(|w| w.kind).collect::<Vec<_>>(), [OwnedKind::ConfigMap]);
    assert_eq!(plan.document.unwrap().sequence, 2);
}

#[test]
fn the_document_is_written_on_the_version_it_was_counted_from() {
    let mut world = World::new();
    world.carry_out();
    Arc::make_mut(world.live.config_map.as_mut().unwrap()).metadata.resource_version = Some("41".into());
    world.groups[0].metadata.generation = Some(2);
    assert_eq!(world.plan().writes[0].object["metadata"]["resourceVersion"], "41");
}

#[test]
fn a_deleted_config_map_does_not_take_the_sequence_back() {
    let mut world = World::new();
    world.carry_out();
    let worker = world.serving("w").reporting(|r| r.state.document.as_mut().unwrap().sequence = 9);
    world.workers = vec![worker];
    world.live.config_map = None;
    assert_eq!(world.plan().document.unwrap().sequence, 10);
    // Without any worker, the placement's own status remembers.
    world.workers.clear();
    world.placement.status =
        Some(turret_crds::ModelPlacementStatus { document_sequence: Some(5), ..Default::default() });
    assert_eq!(world.plan().document.unwrap().sequence, 6);
}

#[test]
fn a_worker_with_another_document_of_the_same_sequence_is_outrun() {
    let mut world = World::new();
    world.carry_out();
    let worker =
        world.serving("w").reporting(|r| r.state.document.as_mut().unwrap().digest = "sha256:other".into());
    world.workers = vec![worker];
    assert!(world.plan().document.unwrap().sequence > 1);
}

#[test]
fn names_that_are_taken_stop_everything_and_say_whose_they_are() {
    let owners = [
        (None, false, "is not the operator's"),
        (Some(("Release", "web")), false, "belongs to Release `web`"),
        (Some(("ModelPlacement", "p")), true, "earlier placement of the same name"),
    ];
    for (owner, leaves, says) in owners {
        let mut world = World::new();
        world.carry_out();
        let service = Arc::make_mut(world.live.service.as_mut().unwrap());
        service.metadata.owner_references = owner.map(|(kind, name)| {
            vec![OwnerReference {
                kind: kind.into(),
                name: name.into(),
                uid: "other".into(),
                controller: Some(true),
                ..OwnerReference::default()
            }]
        });
        world.groups[0].metadata.generation = Some(2);
        let plan = world.plan();
        assert_eq!((plan.writes.len(), plan.in_the_way.len()), (0, 1));
        assert_eq!(plan.in_the_way[0].is_leaving, leaves);
        assert!(plan.in_the_way[0].message.contains(says), "{}", plan.in_the_way[0].message);
        let reasons: Vec<_> = problems(&plan.compiled, &plan.in_the_way).iter().map(|p| p.reason).collect();
        assert_eq!(reasons, if leaves { vec![] } else { vec![reason::NAME_TAKEN] });
    }
}

#[test]
fn without_any_group_no_worker_is_started() {
    let mut world = World::new();
    world.groups.clear();
    let plan = world.plan();
    assert_eq!(plan.writes, []);
    assert_eq!(plan.compiled.problems[0].reason, reason::GROUP_NOT_FOUND);
}

#[test]
fn workers_are_given_an_empty_document_when_their_last_group_is_gone() {
    let mut world = World::new();
    world.carry_out();
    world.groups.clear();
    world.placement.spec.replicas = 3;
    let plan = world.plan();
    let document = plan.compiled.document.unwrap();
    assert_eq!((document.sequence, document.groups.len(), document.default_group), (2, 0, None));
    assert_eq!(plan.document.unwrap().sequence, 2);
    assert_eq!(
        plan.writes.iter().map(|w| w.kind).collect::<Vec<_>>(),
        [OwnedKind::ConfigMap, OwnedKind::Deployment],
        "scaling still works"
    );
    world.carry_out();
    assert_eq!(world.plan().writes, [], "it is written once");
    world.groups = vec![group("a", &["pirate"])];
    assert_eq!(world.plan().compiled.document.unwrap().sequence, 3, "and it comes back");
}

#[test]
fn an_unusable_value_touches_nothing() {
    let mut world = World::new();
    world.carry_out();
    world.placement.spec.replicas = 3;
    let budget = |text: &str| Some(ByteQuantity(text.into()));
    world.placement.spec.memory =
        Some(Memory { device_budget: budget("1Gi"), lens_budget: budget("2Gi"), ..Memory::default() });
    let plan = world.plan();
    assert_eq!(plan.writes, []);
    assert_eq!(plan.compiled.problems[0].reason, reason::INVALID);
}

#[test]
fn a_budget_that_the_container_does_not_hold_begins_nothing_and_ends_nothing() {
    let limit = |limit: &str| Worker {
        resources: Some(Resources {
            limits: [("memory".to_owned(), Quantity(limit.into()))].into(),
            ..Resources::default()
        }),
        ..Worker::default()
    };
    let budget = Some(ByteQuantity("1Gi".into()));
    let mut world = World::new();
    world.placement.spec.memory = Some(Memory { device_budget: budget, ..Memory::default() });
    world.placement.spec.worker = Some(limit("1Gi"));
    let plan = world.plan();
    assert_eq!((plan.writes, plan.compiled.document), (vec![], None));
    let problem = &plan.compiled.problems[0];
    assert_eq!(problem.reason, reason::BUDGET_EXCEEDS_LIMIT);
    assert!(problem.message.contains("(1073741824 bytes) must be smaller"), "{}", problem.message);

    world.placement.spec.worker = Some(limit("1025Mi"));
    let device_bytes = |world: &World| world.plan().compiled.document.unwrap().memory.device_bytes;
    assert!(world.plan().compiled.problems.is_empty());
    assert_eq!(device_bytes(&world), Some(1 << 30));
    // What runs is told of new lenses as before, and of a budget that its container holds.
    world.carry_out();
    world.placement.spec.worker = Some(limit("1Gi"));
    assert_eq!(world.plan().compiled.problems[0].reason, reason::BUDGET_EXCEEDS_LIMIT);
    assert_eq!(device_bytes(&world), None);
    // An accelerator's memory is not the container's, and 0 is no limit.
    world.placement.spec.worker = Some(limit("0"));
    assert!(world.plan().compiled.problems.is_empty());
    world.placement.spec.worker = Some(limit("512Mi"));
    let resource_name = Some("nvidia.com/gpu".to_owned());
    world.placement.spec.accelerator = Some(Accelerator { resource_name, ..Accelerator::default() });
    assert!(world.plan().compiled.problems.is_empty());
}

#[test]
fn a_group_of_another_namespace_comes_and_goes_with_its_consent_and_replaces_no_pod() {
    let mut world = World::new();
    let mut far = world.placement.spec.groups[0].clone();
    far.name = "far".into();
    far.group_ref = Some(GroupRef { name: "shared".into(), namespace: Some("elsewhere".into()) });
    world.placement.spec.groups.push(far);
    let mut shared = group("shared", &["terse"]);
    shared.metadata.namespace = Some("elsewhere".into());
    world.groups.push(shared);
    let served = |world: &World| world.plan().document.unwrap().groups.into_keys().collect::<Vec<_>>();
    let allow = |world: &mut World, allowed: serde_json::Value| {
        world.groups[1].spec.allowed_placements = serde_json::from_value(allowed).unwrap();
    };
    assert_eq!(world.plan().compiled.problems[0].reason, reason::NOT_PERMITTED);
    world.carry_out();
    assert_eq!(served(&world), ["a"]);

    let of_team_b = serde_json::json!({"namespaces": "Selector", "selector": {"matchLabels": {"team": "b"}}});
    allow(&mut world, serde_json::json!({"namespaces": "All"}));
    assert_eq!(served(&world), ["a", "far"]);
    assert_eq!(world.carry_out(), [OwnedKind::ConfigMap]);
    allow(&mut world, of_team_b);
    assert_eq!(served(&world), ["a"]);
    assert_eq!(world.carry_out(), [OwnedKind::ConfigMap]);
    world.namespace_labels.insert("team".into(), "b".into());
    assert_eq!(served(&world), ["a", "far"]);
    assert_eq!(world.carry_out(), [OwnedKind::ConfigMap]);
    assert_eq!(world.plan().compiled.problems, []);

    // What is deleted in one namespace is lost in the other: nothing but the placement owns what was made.
    world.groups[1].metadata.deletion_timestamp =
        Some(serde_json::from_value("2026-01-01T00:00:00Z".into()).unwrap());
    assert_eq!(served(&world), ["a"]);
    let owners = world.live.config_map.as_ref().unwrap().metadata.owner_references.clone().unwrap();
    assert_eq!(owners.iter().map(|owner| owner.name.as_str()).collect::<Vec<_>>(), ["p"]);
}

#[test]
fn a_new_default_image_comes_with_the_next_roll_and_never_causes_one() {
    let mut world = World::new();
    world.carry_out();
    world.default_image = "worker:2".into();
    let unchanged = world.plan();
    assert_eq!((unchanged.image.as_str(), unchanged.writes.len()), ("worker:1", 0));
    // Even when only the status remembers, or only the Deployment.
    world.placement.status = Some(turret_crds::ModelPlacementStatus {
        worker_image: Some("worker:1".into()),
        ..Default::default()
    });
    assert_eq!(world.plan().image, "worker:1");
    // Not pod-shaped: still the old one.
    world.placement.spec.replicas = 2;
    assert_eq!(world.plan().image, "worker:1");
    // Pod-shaped: the pods are replaced anyway.
    world.placement.spec.termination_drain_seconds = Some(7);
    assert_eq!(world.plan().image, "worker:2");
    // The spec's own goes before everything.
    world.placement.spec.worker =
        Some(turret_crds::placement::Worker { image: Some("mine".into()), ..Default::default() });
    assert_eq!(world.plan().image, "mine");
}

#[test]
fn a_new_default_image_comes_at_once_where_the_policy_says_so() {
    let mut world = World::new();
    world.carry_out();
    world.default_image = "worker:2".into();
    world.placement.status = Some(turret_crds::ModelPlacementStatus {
        worker_image: Some("worker:1".into()),
        ..Default::default()
    });
    world.placement.spec.upgrade_policy = Some(UpgradePolicy::Manual);
    assert_eq!((world.plan().image.as_str(), world.plan().writes.len()), ("worker:1", 0));
    world.placement.spec.upgrade_policy = Some(UpgradePolicy::Rolling);
    assert_eq!(world.plan().image, "worker:2");
    assert_eq!(world.carry_out(), [OwnedKind::Deployment]);
    // What has come stays.
    world.placement.spec.upgrade_policy = None;
    world.placement.status = None;
    assert_eq!((world.plan().image.as_str(), world.plan().writes.len()), ("worker:2", 0));
    // The spec's own goes before the policy.
    world.placement.spec.upgrade_policy = Some(UpgradePolicy::Rolling);
    world.placement.spec.worker = Some(Worker { image: Some("mine".into()), ..Worker::default() });
    assert_eq!(world.plan().image, "mine");
}

#[test]
fn the_disk_budget_is_what_is_declared_or_what_the_cache_holds_and_never_more() {
    let quantity = |text: &str| ByteQuantity(text.into());
    let own = |size: &str| {
        let ephemeral = Some(EphemeralCache { storage_class_name: None, size: quantity(size) });
        Some(Cache { ephemeral, ..Cache::default() })
    };
    let folder = |size: &str| {
        let empty_dir = Some(EmptyDirCache { size_limit: Some(quantity(size)) });
        Some(Cache { empty_dir, ..Cache::default() })
    };
    let mut world = World::new();
    let mut disk_bytes = |cache: Option<Cache>, budget: Option<&str>| {
        world.placement.spec.cache = cache;
        world.placement.spec.memory = Some(Memory { disk_budget: budget.map(quantity), ..Memory::default() });
        let compiled = world.plan().compiled;
        let reasons: Vec<_> = compiled.problems.iter().map(|p| p.reason).collect();
        compiled.document.map(|d| d.memory.disk_bytes).ok_or(reasons)
    };
    assert_eq!(disk_bytes(None, None), Ok(None));
    assert_eq!(disk_bytes(None, Some("1Gi")), Ok(Some(1 << 30)));
    assert_eq!(disk_bytes(own("64Gi"), None), Ok(Some(62 << 30)));
    assert_eq!(disk_bytes(folder("64Gi"), None), Ok(Some(62 << 30)));
    assert_eq!(disk_bytes(own("64Gi"), Some("64Gi")), Ok(Some(62 << 30)), "what is no file needs room too");
    assert_eq!(disk_bytes(own("64Gi"), Some("32Gi")), Ok(Some(32 << 30)));
    for cache in [own("1Gi"), folder("1Gi")] {
        assert_eq!(disk_bytes(cache, Some("1025Mi")), Err(vec![reason::INVALID]));
    }
}

/// A world whose workers ask for a class of devices.
fn of_class(class: &str) -> World {
    let mut world = World::new();
    ask_for(&mut world, class);
    world
}

fn ask_for(world: &mut World, class: &str) {
    let device_class_name = Some(class.to_owned());
    world.placement.spec.accelerator = Some(Accelerator { device_class_name, ..Accelerator::default() });
}

/// Every pod is of the newest template by now.
fn roll_out(world: &mut World) {
    let count = Some(world.placement.spec.replicas);
    world.edit_deployment(|d| {
        d.status = Some(DeploymentStatus {
            replicas: count,
            updated_replicas: count,
            available_replicas: count,
            ..DeploymentStatus::default()
        });
    });
}

#[test]
fn a_class_of_devices_has_a_template_of_claims_before_it_has_pods() {
    let mut world = of_class("gpu.example.com");
    let written = world.carry_out();
    assert_eq!(written[3..], [OwnedKind::ResourceClaimTemplate, OwnedKind::Deployment]);
    assert_eq!(world.plan().writes, []);
    let template = &world.live.claim_templates[0];
    let exactly = &template.spec.spec["devices"]["requests"][0]["exactly"];
    assert_eq!((&exactly["deviceClassName"], &exactly["count"]), (&"gpu.example.com".into(), &1.into()));
    let pod = world.live.deployment.as_ref().unwrap().spec.as_ref().unwrap().template.spec.as_ref().unwrap();
    let claim = &pod.resource_claims.as_ref().unwrap()[0];
    assert_eq!(claim.resource_claim_template_name, template.metadata.name);
    let used = pod.containers[0].resources.as_ref().unwrap().claims.as_ref().unwrap();
    assert_eq!((used.len(), &used[0].name), (1, &claim.name));
}

#[test]
fn another_class_is_another_template_and_the_old_one_goes_when_no_pod_needs_it() {
    let mut world = of_class("old.example.com");
    world.carry_out();
    roll_out(&mut world);
    let old = world.live.claim_templates[0].clone();
    ask_for(&mut world, "new.example.com");
    // Until the last old pod is gone, one that dies is made again from the old template.
    assert_eq!(world.carry_out(), [OwnedKind::ResourceClaimTemplate, OwnedKind::Deployment]);
    assert_eq!((world.live.claim_templates.len(), world.plan().stale_claim_templates.len()), (2, 0));
    roll_out(&mut world);
    assert_eq!(world.plan().stale_claim_templates, [old]);
    world.carry_out();
    assert_eq!((world.live.claim_templates.len(), world.plan().stale_claim_templates.len()), (1, 0));
    // Without any class there is no template.
    world.placement.spec.accelerator = None;
    world.carry_out();
    roll_out(&mut world);
    world.carry_out();
    assert!(world.live.claim_templates.is_empty());
}

#[test]
fn the_template_of_an_earlier_placement_is_neither_taken_nor_removed() {
    let mut world = of_class("gpu.example.com");
    world.carry_out();
    roll_out(&mut world);
    world.placement.metadata.uid = Some("uid-of-another".into());
    let mut plan = world.plan();
    plan.in_the_way.retain(|o| o.message.contains("ResourceClaimTemplate"));
    assert!(plan.in_the_way.len() == 1 && plan.in_the_way[0].is_leaving, "{:?}", plan.in_the_way);
    assert_eq!((plan.writes.len(), plan.stale_claim_templates.len()), (0, 0));
}

#[test]
fn a_class_of_devices_is_refused_where_nothing_serves_it_and_what_runs_goes_on() {
    let mut world = World::new();
    world.carry_out();
    ask_for(&mut world, "gpu.example.com");
    world.serves_claim_templates = false;
    let plan = world.plan();
    assert_eq!((plan.writes.len(), plan.compiled.document), (0, None));
    assert_eq!(plan.document.unwrap().sequence, 1, "the one that is stored");
    let problem = &plan.compiled.problems[0];
    assert_eq!(problem.reason, reason::API_NOT_SERVED);
    assert!(problem.message.contains("`gpu.example.com`"), "{}", problem.message);
    world.placement.spec.accelerator = None;
    assert_eq!(world.plan().writes, []);
}

/// A world in the middle of a rollout: one old pod, one new pod that found no room at 100 s.
fn stuck() -> World {
    let mut world = World::new();
    world.carry_out();
    world.placement.spec.termination_drain_seconds = Some(7);
    world.carry_out();
    let new = resources::template_hash(world.live.deployment.as_ref().unwrap()).unwrap().to_owned();
    let mut waiting = pod("new", Some(&new));
    waiting.unschedulable_since = Some(at(100));
    let worker = |pod| crate::controllers::assess::ObservedWorker { pod, report: None, lost: None };
    world.workers = vec![worker(waiting), worker(pod("old", Some("old")))];
    world
}

#[test]
fn a_rollout_that_finds_no_room_goes_on_in_place_after_30_s_and_returns_to_surge_when_done() {
    let mut world = stuck();
    let early = world.plan_at(110);
    assert_eq!(early.writes, []);
    assert_eq!(early.look_again, Some(std::time::Duration::from_secs(20)));
    let by_a_clock_far_behind = world.plan_at(10).look_again;
    assert_eq!(by_a_clock_far_behind, Some(std::time::Duration::from_secs(30)));

    let late = world.plan_at(130);
    assert_eq!(late.writes.len(), 1);
    let strategy = &late.writes[0].object["spec"]["strategy"]["rollingUpdate"];
    assert_eq!((&strategy["maxSurge"], &strategy["maxUnavailable"]), (&0.into(), &1.into()));
    world.live.deployment = Some(Arc::new(serde_json::from_value(late.writes[0].object.clone()).unwrap()));
    assert!(in_place(&world));

    // The pod that waited is gone: it stays in place until the rollout is over.
    world.workers.clear();
    assert_eq!(world.plan_at(140).writes, []);
    world.edit_deployment(|d| {
        d.status = Some(DeploymentStatus {
            replicas: Some(1),
            updated_replicas: Some(1),
            available_replicas: Some(1),
            ..DeploymentStatus::default()
        });
    });
    world.carry_out();
    assert!(!in_place(&world));
}

#[test]
fn a_new_pod_without_room_and_without_old_pods_waits_for_the_cluster() {
    let mut world = stuck();
    world.workers.truncate(1);
    assert_eq!(world.plan_at(1000).writes, []);
}

proptest! {
    /// Whatever is asked for and whatever the workers say: doing what is planned leaves nothing to
    /// do, and the sequence never goes back.
    #[test]
    fn planning_settles_after_one_step(
        replicas in 0..4i32,
        lenses in prop::collection::btree_set("[a-z]{1,4}", 0..4),
        reported in prop::option::of(0..20u64),
        drain in prop::option::of(0..100i32),
        again in any::<bool>(),
    ) {
        let mut world = World::new();
        world.carry_out();
        let before = world.plan().document.unwrap().sequence;
        world.placement.spec.replicas = replicas;
        world.placement.spec.termination_drain_seconds = drain;
        let lenses: Vec<_> = lenses.iter().map(String::as_str).collect();
        world.groups[0] = group("a", &lenses);
        if again {
            world.groups[0].metadata.generation = Some(2);
        }
        if let Some(sequence) = reported {
            let worker = world.serving("w").reporting(|r| r.state.document.as_mut().unwrap().sequence = sequence);
            world.workers = vec![worker];
        }
        let planned = world.plan().document.unwrap().sequence;
        prop_assert!(planned >= before && planned >= reported.unwrap_or(0));
        world.carry_out();
        prop_assert_eq!(world.plan().writes, vec![]);
        prop_assert_eq!(world.plan().document.unwrap().sequence, planned);
        prop_assert!(world.live.deployment.unwrap().name_any().ends_with("-p"));
    }
}
