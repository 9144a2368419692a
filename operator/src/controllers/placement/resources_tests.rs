//! The owned objects, as golden YAML, and what replaces pods.

use std::path::Path;

use serde_json::{Value, json};
use turret_crds::ModelPlacement;

use super::resources::{self, Rollout, Settings};
use crate::controllers::fixtures::World;

/// Compares with a file below `tests/golden`; `TURRET_UPDATE_GOLDEN=1` writes it.
fn golden(name: &str, objects: &[Value]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text: String =
        objects.iter().map(|o| format!("---\n{}", serde_yaml::to_string(o).unwrap())).collect();
    if std::env::var_os("TURRET_UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(text, stored, "{name} changed; look at the difference, then run with TURRET_UPDATE_GOLDEN=1");
}

fn placement(spec: Value) -> ModelPlacement {
    let mut whole = json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement",
        "metadata": {"name": "demo", "namespace": "research", "uid": "7e0a", "generation": 1},
        "spec": {"groups": [{"name": "a"}]},
    });
    whole["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(whole).unwrap()
}

/// The operator's settings where only the image is set.
fn of(image: &str) -> Settings<'_> {
    Settings { image, allowed_source_hosts: None }
}

/// With sorted keys, whatever `serde_json` was built to do.
fn value(object: impl serde::Serialize) -> Value {
    fn sorted(value: Value) -> Value {
        match value {
            Value::Object(map) => {
                let mut fields: Vec<_> = map.into_iter().map(|(k, v)| (k, sorted(v))).collect();
                fields.sort_by(|a, b| a.0.cmp(&b.0));
                Value::Object(fields.into_iter().collect())
            }
            Value::Array(list) => list.into_iter().map(sorted).collect(),
            plain => plain,
        }
    }
    sorted(serde_json::to_value(object).unwrap())
}

#[test]
fn the_smallest_placement() {
    let placement = placement(json!({}));
    golden(
        "smallest.yaml",
        &[
            value(resources::service(&placement)),
            value(resources::disruption_budget(&placement)),
            value(resources::deployment(&placement, of("registry.example/worker:1"), Rollout::Surge, 1)),
        ],
    );
}

#[test]
fn a_placement_with_everything_that_shapes_pods() {
    let placement = placement(json!({
        "replicas": 3,
        "accelerator": {"resourceName": "nvidia.com/gpu"},
        "memory": {"deviceBudget": "20Gi", "diskBudget": "10Gi"},
        "sourceVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models-claim"}}],
        "sourceSecrets": [{"name": "hub-token"}, {"name": "team-a.models"}],
        "terminationDrainSeconds": 5,
        "worker": {
            "image": "registry.example/worker:mine",
            "resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": "4", "memory": "16Gi"}},
            "nodeSelector": {"gpu": "a100"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "priorityClassName": "high",
            "serviceAccountName": "models",
            "runtimeClassName": "nvidia",
            "env": [{"name": "TURRET_DEVICE", "value": "cpu"}, {"name": "TURRET_THREADS", "value": "2"}],
            "podLabels": {"team": "a"},
            "podAnnotations": {"example.com/note": "b"},
        },
    }));
    let settings =
        Settings { allowed_source_hosts: Some("hub,10.1.0.0/16"), ..of("registry.example/worker:mine") };
    golden("everything.yaml", &[value(resources::deployment(&placement, settings, Rollout::InPlace, 3))]);
}

#[test]
fn placements_with_caches_of_their_own_and_devices_by_class() {
    let pods = |spec: Value| {
        let placement = placement(spec);
        let deployment =
            resources::deployment(&placement, of("registry.example/worker:1"), Rollout::Surge, 1);
        let mut objects = vec![value(deployment.spec.unwrap().template)];
        objects.extend(super::claims::template(&placement).map(value));
        objects
    };
    let zones = json!([
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "DoNotSchedule", "minDomains": 2},
        {"maxSkew": 2, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"},
    ]);
    let specs = [
        json!({
            "cache": {"ephemeral": {"storageClassName": "fast", "size": "200Gi"}},
            "memory": {"diskBudget": "150Gi"},
            "accelerator": {"deviceClassName": "gpu.example.com"},
            "worker": {"topologySpreadConstraints": zones},
        }),
        json!({"cache": {"persistentVolumeClaim": {"claimName": "shared"}}}),
        json!({"cache": {"emptyDir": {"sizeLimit": "5Gi"}}, "memory": {"diskBudget": "4Gi"}}),
    ];
    golden("caches.yaml", &specs.map(pods).concat());
}

#[test]
fn the_budget_of_files_on_a_claim_replaces_no_pod() {
    for cache in
        [json!({"ephemeral": {"size": "200Gi"}}), json!({"persistentVolumeClaim": {"claimName": "shared"}})]
    {
        let [one, other] = ["1Gi", "2Gi"].map(|budget| {
            resources::pod_shape(&placement(json!({"cache": cache, "memory": {"diskBudget": budget}})))
        });
        assert_eq!(one, other, "{cache}");
    }
    let folder = |cache: Value| resources::pod_shape(&placement(json!({"cache": cache})));
    let without = resources::pod_shape(&placement(json!({})));
    assert_eq!(folder(json!({"emptyDir": {}})), without, "what is the default needs not be said");
    assert_ne!(folder(json!({"emptyDir": {"sizeLimit": "5Gi"}})), without);
}

#[test]
fn the_document_is_readable_where_it_is_stored() {
    let plan = World::new().plan();
    let (document, gzip) = (plan.document.unwrap(), plan.gzip.unwrap());
    let config_map = resources::config_map(&World::new().placement, &document, gzip, None);
    assert_eq!(resources::document_ref(&config_map), Some(document));
    let bytes = &config_map.binary_data.as_ref().unwrap()[turret_crds::label::DOCUMENT_KEY].0;
    assert_eq!(turret_crds::WorkerDocument::from_gzip(bytes).unwrap(), plan.compiled.document.unwrap());
}

#[test]
fn only_the_pod_shaped_part_of_the_spec_replaces_pods() {
    // Every field of the spec is here: a new one must be put on one side or the other.
    let rolls = [
        json!({"accelerator": {"resourceName": "nvidia.com/gpu"}}),
        json!({"accelerator": {"deviceClassName": "gpu.nvidia.com"}}),
        json!({"memory": {"diskBudget": "10Gi"}}),
        json!({"cache": {"emptyDir": {"sizeLimit": "10Gi"}}}),
        json!({"cache": {"ephemeral": {"size": "10Gi"}}}),
        json!({"cache": {"persistentVolumeClaim": {"claimName": "c"}}}),
        json!({"sourceVolumes": [{"name": "m", "persistentVolumeClaim": {"claimName": "c"}}]}),
        json!({"sourceSecrets": [{"name": "hub-token"}]}),
        json!({"terminationDrainSeconds": 5}),
        json!({"worker": {"image": "other"}}),
        json!({"worker": {"resources": {"limits": {"memory": "1Gi"}}}}),
        json!({"worker": {"nodeSelector": {"a": "b"}}}),
        json!({"worker": {"tolerations": [{"key": "a", "operator": "Exists"}]}}),
        json!({"worker": {"topologySpreadConstraints": [{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}]}}),
        json!({"worker": {"priorityClassName": "p"}}),
        json!({"worker": {"serviceAccountName": "s"}}),
        json!({"worker": {"runtimeClassName": "r"}}),
        json!({"worker": {"env": [{"name": "A", "value": "b"}]}}),
        json!({"worker": {"podLabels": {"a": "b"}}}),
        json!({"worker": {"podAnnotations": {"a": "b"}}}),
    ];
    let stays = [
        json!({"groups": [{"name": "a"}, {"name": "b", "residency": "Preloaded"}]}),
        json!({"defaultGroupName": "a"}),
        json!({"replicas": 5}),
        json!({"memory": {"deviceBudget": "10Gi", "lensBudget": "1Gi"}}),
        json!({"batching": {"maxRunningRows": 3}}),
        json!({"switching": {"drainSeconds": 3}}),
        json!({"switching": {"mode": "Manual", "activeGroupName": "a"}}),
        json!({"eviction": {"policy": "LRU", "highWatermarkPercent": 80}}),
        json!({"spread": {"maxCopies": 2}}),
        json!({"admission": {"holdSeconds": 3}}),
        json!({"autoscaling": {"minReplicas": 0, "maxReplicas": 3}}),
        json!({"warmupSeconds": 3}),
        json!({"upgradePolicy": "Rolling"}),
    ];
    let shape = |spec: &Value| {
        let placement = placement(spec.clone());
        let image = placement.spec.worker.as_ref().and_then(|w| w.image.clone()).unwrap_or("image".into());
        let deployment = resources::deployment(&placement, of(&image), Rollout::Surge, 1);
        let hash = resources::template_hash(&deployment).unwrap().to_owned();
        (value(deployment.spec.unwrap().template), hash, resources::pod_shape(&placement))
    };
    let plain = shape(&json!({}));
    for spec in &rolls {
        let other = shape(spec);
        assert!(other.0 != plain.0 && other.1 != plain.1 && other.2 != plain.2, "{spec} replaces pods");
    }
    for spec in &stays {
        assert_eq!(shape(spec), plain, "{spec} replaces no pod");
    }
    let named = |value: &Value| value.as_object().unwrap().keys().next().unwrap().clone();
    let covered: std::collections::BTreeSet<_> = rolls.iter().chain(&stays).map(named).collect();
    let spec = turret_crds::crds()[1].spec.versions[0].schema.clone().unwrap().open_api_v3_schema.unwrap();
    let fields: std::collections::BTreeSet<_> =
        spec.properties.unwrap()["spec"].properties.clone().unwrap().into_keys().collect();
    assert_eq!(covered, fields, "every field of the spec is tried");
}

#[test]
fn a_setting_of_the_operator_replaces_pods_and_brings_no_other_image() {
    let placement = placement(json!({}));
    let hosts = |allowed_source_hosts| Settings { allowed_source_hosts, ..of("image") };
    let [open, closed] = [None, Some("hub")]
        .map(|allowed| resources::deployment(&placement, hosts(allowed), Rollout::Surge, 1));
    assert_ne!(resources::template_hash(&open), resources::template_hash(&closed));
    assert_eq!(open.metadata.annotations, closed.metadata.annotations, "the shape that keeps an image");
}
