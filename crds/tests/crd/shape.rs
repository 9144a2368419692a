//! The shape of both CRDs: small, documented, friendly to GitOps, with the columns people read.

use serde_json::{Value, json};

use crate::rules::{kinds, walk};

#[test]
fn each_crd_is_smaller_than_64_kilobytes() {
    for kind in kinds() {
        let yaml = serde_yaml::to_string(&kind.crd).unwrap();
        assert!(yaml.len() < 64 << 10, "{} has {} bytes", kind.name(), yaml.len());
    }
}

#[test]
fn lists_of_objects_are_merged_by_key() {
    for kind in kinds() {
        walk(&kind.schema(), "", &mut |path, schema| {
            if schema["type"] != "array" {
                return;
            }
            let merge = &schema["x-kubernetes-list-type"];
            match (schema["items"]["type"].as_str(), path) {
                // Tolerations have no key of their own; a Pod keeps them as one list too.
                (_, "spec.worker.tolerations") => assert_eq!(merge, "atomic"),
                (Some("object"), _) => assert_eq!(merge, "map", "{} {path}", kind.name()),
                _ => assert_eq!(merge, "set", "{} {path}", kind.name()),
            }
            assert!(schema["maxItems"].is_number(), "{} {path} is unbounded", kind.name());
        });
    }
}

#[test]
fn a_new_object_is_never_taken_for_a_finished_one() {
    for kind in kinds() {
        let status = &kind.schema()["properties"]["status"];
        assert_eq!(status["default"], json!({"observedGeneration": -1}), "{}", kind.name());
        assert_eq!(status["properties"]["observedGeneration"]["default"], json!(-1), "{}", kind.name());
    }
}

#[test]
fn columns_and_names_are_those_people_type() {
    let expected = [
        ("mg", "READY REASON LENSES BASE AGE", "SIZE MESSAGE"),
        ("mpl", "GROUPS DESIRED READY UPDATED ACTIVE REASON AGE", "VRAM MESSAGE"),
    ];
    for (kind, (short, columns, wide)) in kinds().iter().zip(expected) {
        let names = &kind.crd.spec.names;
        assert_eq!(names.short_names.as_deref().unwrap_or_default(), [short]);
        assert_eq!(names.categories.as_deref().unwrap_or_default(), ["turret"]);
        let of = |priority: i32| {
            let shown = kind.crd.spec.versions[0].additional_printer_columns.iter().flatten();
            let names: Vec<_> = shown
                .filter(|c| c.priority.unwrap_or(0) == priority)
                .map(|c| c.name.to_uppercase())
                .collect();
            names.join(" ")
        };
        assert_eq!((of(0).as_str(), of(1).as_str()), (columns, wide), "{}", kind.name());
    }
}

#[test]
fn a_placement_scales_by_selector_and_both_kinds_have_a_status() {
    let subresources: Vec<Value> = kinds()
        .iter()
        .map(|kind| serde_json::to_value(&kind.crd.spec.versions[0].subresources).unwrap())
        .collect();
    assert_eq!(subresources[0], json!({"status": {}}));
    let scale = json!({
        "labelSelectorPath": ".status.selector",
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
    });
    assert_eq!(subresources[1], json!({"status": {}, "scale": scale}));
}

#[test]
fn uninstalling_a_helm_release_keeps_the_objects() {
    for kind in kinds() {
        let annotations = kind.crd.metadata.annotations.unwrap_or_default();
        assert_eq!(annotations.get("helm.sh/resource-policy").map(String::as_str), Some("keep"));
    }
}
