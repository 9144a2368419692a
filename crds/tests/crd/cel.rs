//! Every CEL rule and every bound of both CRDs against its examples, without a cluster: as `turret-operator validate`
//! judges them. The cluster suite tries the same examples on a real API server and demands the same words.

use std::collections::BTreeSet;

use serde_json::Value;
use turret_crds::validate::{Refusal, Rules};

use crate::rules::{Kind, bounds, kinds, walk};

fn refusals(kind: &Kind, object: &Value) -> Vec<Refusal> {
    Rules::of(&kind.crd).judge(object).refusals
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
fn invalid_examples_are_refused_with_their_message_and_nothing_else() {
    for kind in kinds() {
        for (message, object) in kind.invalid() {
            let said = refusals(&kind, &object);
            let [refusal] = said.as_slice() else { panic!("«{message}», {}: {said:?}", object["spec"]) };
            let beginning = refusal.message.strip_suffix(&message).unwrap_or_default();
            let judged = beginning.starts_with("Invalid value: ") && !beginning.contains("evaluating rule");
            assert!(judged, "«{message}», {}: {refusal}", object["spec"]);
            // Only what a name may be is a rule about the whole object.
            assert_eq!(refusal.path.is_empty(), message.starts_with("the name of a "), "{refusal}");
        }
    }
}

#[test]
fn what_is_one_beyond_a_bound_is_refused() {
    for kind in kinds() {
        let rules = Rules::of(&kind.crd);
        for bound in bounds(&kind) {
            let said = rules.judge(&bound.beyond).refusals;
            let named = said.iter().any(|refusal| refusal.message.contains(bound.refusal));
            assert!(named, "{}: {}: {said:?}", kind.name(), bound.name);
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
