//! What the API server would say of an object of our kinds, without an API server.
//!
//! [`Rules`] are made from a CRD and judge an object as the API server does when it is created: unknown fields are
//! named, as `kubectl --validate=strict` has it; nulls are dropped and defaults filled in; then metadata, the bounds
//! of the schema, the keys of lists and, unless the object is too broken for that, the CEL rules. Rules about
//! changes (`oldSelf`) are skipped, since there is no object before.
//!
//! Paths and texts are the API server's own, of Kubernetes 1.35, down to the way Go prints a value. The cluster suite
//! compares both for every example in `crds/tests/rules`, so that they cannot drift apart. Only what our CRDs use of
//! a schema is read; a test refuses a CRD that uses more.

use std::fmt;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::core::cel::{CompiledSchema, compile_schema};
use serde_json::Value;

mod cel;
mod decode;
mod lists;
mod metadata;
mod print;
mod scale;
mod schema;

use print::quoted;
use scale::Replicas;
use schema::Patterns;

/// Something about an object that the API server refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What kind of fault it is.
    pub cause: Cause,
    /// Where: `spec.lenses[1].source.uri`; empty for the object as a whole, where the API server writes `<nil>`.
    pub path: String,
    /// What the API server says: `Invalid value: "s3://a": uri must begin with …`.
    pub message: String,
}

/// The kind of a fault. The API server names it in `status.details.causes` of its answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// The schema has no such field.
    UnknownField,
    /// A needed field is missing.
    Required,
    /// A value of another type.
    TypeInvalid,
    /// None of the values of an enum.
    NotSupported,
    /// A text that is too long.
    TooLong,
    /// A list or a map with too many entries.
    TooMany,
    /// Two entries with one key.
    Duplicate,
    /// Any other bound or rule.
    Invalid,
}

/// What became of an object.
#[derive(Clone, Debug, PartialEq)]
pub struct Judged {
    /// The object as it would be stored: with defaults, without nulls, unknown fields and status.
    pub object: Value,
    /// What is wrong with it; empty when it would be accepted.
    pub refusals: Vec<Refusal>,
}

/// The rules of one kind.
#[derive(Debug)]
pub struct Rules {
    schema: Value,
    patterns: Patterns,
    replicas: Option<Replicas>,
    compiled: CompiledSchema,
}

impl Rules {
    /// The rules of a CRD's first version.
    ///
    /// # Panics
    /// When it has no schema, or one with a pattern that is no regular expression: ours have one without.
    pub fn of(crd: &CustomResourceDefinition) -> Self {
        let version = crd.spec.versions.first().expect("a CRD of ours has a version");
        let schema = version.schema.as_ref().and_then(|s| s.open_api_v3_schema.as_ref());
        let schema =
            serde_json::to_value(schema.expect("a CRD of ours has a schema")).expect("a schema is JSON");
        let scale = version.subresources.as_ref().and_then(|s| s.scale.as_ref());
        Self {
            patterns: Patterns::of(&schema),
            replicas: scale.map(|scale| Replicas::at(&scale.spec_replicas_path)),
            compiled: compile_schema(&schema),
            schema,
        }
    }

    /// Judges an object that somebody wants to create.
    pub fn judge(&self, object: &Value) -> Judged {
        let mut object = object.clone();
        let mut refusals = decode::drop_unknown_fields(&self.schema, &mut object);
        decode::drop_nulls(Some(&self.schema), &mut object);
        decode::fill_defaults(&self.schema, &mut object);
        decode::generate_name(&mut object);
        if let Some(fields) = object.as_object_mut() {
            // Nobody creates a status; the API server drops it as well, after it looked for unknown fields.
            fields.remove("status");
        }
        refusals.extend(metadata::check(&object));
        refusals.extend(schema::check(&self.patterns, &self.schema, &object));
        refusals.extend(self.replicas.as_ref().and_then(|replicas| replicas.check(&object)));
        refusals.extend(lists::check(&self.schema, &object));
        if refusals.iter().any(|refusal| refusal.cause.keeps_rules_from_running()) {
            refusals.push(Refusal::new(Cause::Invalid, "", Some("null".into()), NOT_CHECKED));
        } else {
            refusals.extend(cel::check(&self.schema, &self.compiled, &object));
        }
        Judged { object, refusals }
    }
}

const NOT_CHECKED: &str = "some validation rules were not checked because the object was invalid; correct the existing \
                           errors to complete validation";

impl Refusal {
    /// `value` is what is wrong, as Go prints it; an empty `detail` is left out.
    fn new(cause: Cause, path: &str, value: Option<String>, detail: &str) -> Self {
        let detail = (!detail.is_empty()).then(|| detail.to_owned());
        let parts: Vec<String> =
            [Some(cause.words().to_owned()), value, detail].into_iter().flatten().collect();
        Self { cause, path: path.into(), message: parts.join(": ") }
    }

    fn unknown_field(path: String) -> Self {
        Self { cause: Cause::UnknownField, message: format!("unknown field {}", quoted(&path)), path }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.path.as_str() {
            "" => f.write_str(&self.message),
            path => write!(f, "{path}: {}", self.message),
        }
    }
}

impl Cause {
    fn words(self) -> &'static str {
        match self {
            Self::UnknownField => "unknown field",
            Self::Required => "Required value",
            Self::TypeInvalid | Self::Invalid => "Invalid value",
            Self::NotSupported => "Unsupported value",
            Self::TooLong => "Too long",
            Self::TooMany => "Too many",
            Self::Duplicate => "Duplicate value",
        }
    }

    /// Whether CEL rules could stumble over it, so that the API server runs none.
    fn keeps_rules_from_running(self) -> bool {
        match self {
            Self::Required | Self::TypeInvalid | Self::NotSupported | Self::TooLong | Self::TooMany => true,
            Self::UnknownField | Self::Duplicate | Self::Invalid => false,
        }
    }
}

/// The schema of a field of an object, or of an entry of a map.
fn schema_of<'a>(schema: &'a Value, field: &str) -> Option<&'a Value> {
    let declared = schema["properties"].get(field);
    declared.or_else(|| schema.get("additionalProperties").filter(|entries| entries.is_object()))
}

fn join(path: &str, field: &str) -> String {
    if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn rules() -> Vec<Rules> {
        crate::crds().iter().map(Rules::of).collect()
    }

    /// What is said of a placement with this spec.
    fn said(spec: Value) -> Vec<String> {
        let object = json!({"apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement", "metadata": {"name": "p"}, "spec": spec});
        rules()[1].judge(&object).refusals.iter().map(ToString::to_string).collect()
    }

    const NOT_CHECKED_SAID: &str = "Invalid value: null: some validation rules were not checked because the object was invalid; \
                                    correct the existing errors to complete validation";

    #[test]
    fn an_object_that_is_fine_is_given_back_as_it_would_be_stored() {
        let object = json!({
            "apiVersion": "turret.dev/v1alpha1",
            "kind": "ModelPlacement",
            "metadata": {"name": "p"},
            "spec": {"groups": [{"name": "g", "groupRef": null}], "worker": null},
            "status": {"replicas": 3},
        });
        let judged = rules()[1].judge(&object);
        assert_eq!(judged.refusals, []);
        assert_eq!(judged.object["spec"], json!({"groups": [{"name": "g"}], "replicas": 1}));
        assert_eq!(judged.object.get("status"), None);
    }

    #[test]
    fn rules_are_broken_in_the_words_of_the_api_server() {
        let broken = said(json!({
            "groups": [{"name": "A"}, {"name": "b"}],
            "defaultGroupName": "c",
            "eviction": {"highWatermarkPercent": 10, "lowWatermarkPercent": 20},
        }));
        assert_eq!(
            broken,
            [
                "spec: Invalid value: defaultGroupName must be the name of one of the groups",
                "spec.eviction: Invalid value: lowWatermarkPercent must not be above highWatermarkPercent",
                "spec.groups[0].name: Invalid value: \"A\": a group name is a DNS label: lower-case letters, digits and `-`",
            ]
        );
    }

    #[test]
    fn a_rule_about_the_whole_object_has_no_path() {
        let object =
            json!({"metadata": {"name": "a.b"}, "spec": {"base": {"source": {"uri": "file:///models/a"}}}});
        let refusals = rules()[0].judge(&object).refusals;
        assert_eq!(refusals.len(), 1, "{refusals:?}");
        assert_eq!(refusals[0].path, "");
        assert!(
            refusals[0].message.starts_with("Invalid value: the name of a ModelGroup is part"),
            "{}",
            refusals[0]
        );
    }

    #[test]
    fn a_rule_that_cannot_be_evaluated_is_a_refusal() {
        let broken =
            said(json!({"groups": [{"name": "g"}], "memory": {"deviceBudget": "1 Gi", "lensBudget": "x"}}));
        assert_eq!(broken.len(), 3, "{broken:?}");
        assert!(broken[0].starts_with("spec.memory.deviceBudget: Invalid value: \"1 Gi\": spec.memory.deviceBudget in body should match '^"));
        assert!(broken[2].starts_with("spec.memory: Invalid value: \"object\": "), "{}", broken[2]);
        assert!(
            broken[2].ends_with(" evaluating rule: lensBudget is a part of deviceBudget and must be smaller")
        );
    }

    #[test]
    fn numbers_beyond_what_the_rules_can_compare_are_refused_and_nothing_panics() {
        let device = format!("{}E", "9".repeat(31));
        let memory = json!({"deviceBudget": device, "lensBudget": "0.000000001"});
        assert_eq!(
            said(json!({"groups": [{"name": "g"}], "memory": memory})),
            ["spec: Invalid value: a number is too large for the rules to compare"]
        );
    }

    #[test]
    fn no_rule_is_run_on_what_it_could_stumble_over() {
        assert_eq!(
            said(json!({"groups": [], "defaultGroupName": 5, "replicas": "2"})),
            [
                "spec.defaultGroupName: Invalid value: \"integer\": spec.defaultGroupName in body must be of type string: \"integer\"",
                "spec.groups: Invalid value: 0: spec.groups in body should have at least 1 items",
                "spec.replicas: Invalid value: \"string\": spec.replicas in body must be of type integer: \"string\"",
                ".spec.replicas: Invalid value: 0: .spec.replicas accessor error: 2 is of the type string, expected int64",
                NOT_CHECKED_SAID,
            ]
        );
        assert_eq!(said(json!(null)), ["spec: Required value", NOT_CHECKED_SAID]);
    }

    #[test]
    fn unknown_fields_are_named_wherever_they_are() {
        let object = json!({
            "apiVersion": "turret.dev/v1alpha1",
            "kind": "ModelPlacement",
            "metadata": {"name": "p", "annotation": {}},
            "spec": {"groups": [{"name": "g", "resident": true}], "worker": {"podLabels": {"a": "b"}, "image": {"name": "a"}}},
            "status": {"phase": "Ready"},
            "data": {},
        });
        let refusals = rules()[1].judge(&object).refusals;
        let unknown: Vec<_> =
            refusals.iter().filter(|r| r.cause == Cause::UnknownField).map(|r| r.path.as_str()).collect();
        assert_eq!(
            unknown,
            [
                "data",
                "metadata.annotation",
                "spec.groups[0].resident",
                "spec.worker.image.name",
                "status.phase"
            ]
        );
        assert_eq!(refusals[0].message, "unknown field \"data\"");
    }
}
