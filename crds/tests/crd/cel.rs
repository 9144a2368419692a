//! Every CEL rule of both CRDs against its examples, with kube's CEL and without a cluster.
//! The cluster suite tries the same examples, and every bound, on a real API server.

use std::collections::BTreeSet;

use kube::core::cel::{ErrorKind, Validator};
use serde_json::Value;

use crate::rules::{Kind, bounds, kinds, walk};

/// What the client-side evaluator says of an object.
fn refusals(kind: &Kind, object: &Value) -> Vec<(ErrorKind, String)> {
    match Validator::new().validate(&kind.schema(), object, None) {
        Ok(()) => Vec::new(),
        Err(errors) => errors.into_vec().into_iter().map(|e| (e.kind, e.message)).collect(),
    }
}

#[test]
fn valid_examples_are_accepted() {
    for kind in kinds() {
        for (what, object) in kind.valid() {
            assert_eq!(refusals(&kind, &object), [], "{}: {what}", kind.name());
        }
    }
}

#[test]
fn invalid_examples_are_refused_with_their_message() {
    for kind in kinds() {
        for (message, object) in kind.invalid() {
            let expected = (ErrorKind::ValidationFailure, message);
            assert_eq!(refusals(&kind, &object), [expected], "{}", object["spec"]);
        }
    }
}

#[test]
fn every_rule_has_examples_and_every_example_a_rule() {
    for kind in kinds() {
        let mut declared = BTreeSet::new();
        walk(&kind.schema(), "", &mut |path, schema| {
            for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                let message = rule["message"].as_str();
                declared
                    .insert(message.unwrap_or_else(|| panic!("{path}: a rule without a message")).to_owned());
            }
        });
        let tried: BTreeSet<_> = kind.examples.rules.iter().map(|r| r.message.clone()).collect();
        assert_eq!(declared, tried, "{}", kind.name());
        for rule in &kind.examples.rules {
            assert!(!rule.valid.is_empty() && !rule.invalid.is_empty(), "{}", rule.message);
        }
    }
}

#[test]
fn every_sample_is_tried() {
    let valid: Vec<_> = kinds().iter().flat_map(Kind::valid).map(|(what, _)| what).collect();
    for (file, objects) in [("demo-family.yaml", 3), ("cpu-minimal.yaml", 2)] {
        assert_eq!(valid.iter().filter(|what| *what == file).count(), objects, "{file}");
    }
}

#[test]
fn there_are_at_least_fifteen_rules() {
    let count: usize = kinds().iter().map(|kind| kind.examples.rules.len()).sum();
    assert!(count >= 15, "{count}");
}

#[test]
fn every_bound_has_an_object_beyond_it() {
    for kind in kinds() {
        let all = bounds(&kind);
        assert!(all.len() > 10, "{} has only {} bounds", kind.name(), all.len());
        for bound in all {
            assert_ne!(bound.beyond, kind.examples.complete, "{}: {}", kind.name(), bound.name);
            assert!(!bound.refusal.is_empty());
        }
    }
}

/// What a worker reads without a cluster (`serve -f`) goes through these types: they must take
/// every valid object, and what takes sources apart must agree with the CRD's rules.
#[test]
fn the_types_read_every_valid_object_and_agree_about_sources() {
    let about_sources = |message: &str| {
        ["uri ", "an hf:// source", "only an hf://", "only hf://", "revision ", "secretRef."]
            .iter()
            .any(|start| message.starts_with(start))
    };
    for kind in kinds() {
        for (what, object) in kind.valid() {
            let read = match kind.name() {
                "ModelGroup" => serde_json::from_value::<turret_crds::ModelGroup>(object).map(|group| {
                    assert!(group.validate_cel().is_ok(), "{what}");
                    assert!(group.spec.base.source.location().is_ok(), "{what}");
                    assert!(group.spec.lenses.iter().all(|l| l.source.location().is_ok()), "{what}");
                }),
                _ => serde_json::from_value::<turret_crds::ModelPlacement>(object)
                    .map(|placement| assert!(placement.validate_cel().is_ok(), "{what}")),
            };
            read.unwrap_or_else(|error| panic!("{}: {what}: {error}", kind.name()));
        }
        for (message, object) in kind.invalid().into_iter().filter(|(m, _)| about_sources(m)) {
            let group: turret_crds::ModelGroup = serde_json::from_value(object).unwrap();
            let mut sources = group.spec.lenses.iter().map(|l| &l.source).chain([&group.spec.base.source]);
            assert!(sources.any(|source| source.location().is_err()), "{message}: {:?}", group.spec);
        }
    }
}
