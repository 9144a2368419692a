//! The CEL rules of a CRD, evaluated by kube's own CEL and told in the API server's words.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use kube::core::cel::{CompiledSchema, ErrorKind, ValidationError, validate_compiled};
use serde_json::Value;

use super::print::{printed, quoted};
use super::{Cause, Refusal, join};

/// All rules that an object breaks, in the order of the schema. It must be within the schema's bounds.
pub(super) fn check(schema: &Value, compiled: &CompiledSchema, object: &Value) -> Vec<Refusal> {
    // The evaluator counts in 128 bits and panics where that is too little, as for a quantity of 31 digits and an `E`.
    let outcome = catch_unwind(AssertUnwindSafe(|| validate_compiled(compiled, object, None)));
    let errors = match outcome {
        Ok(Ok(())) => return Vec::new(),
        Ok(Err(errors)) => errors,
        Err(_) => return vec![Refusal::new(Cause::Invalid, "spec", None, TOO_LARGE)],
    };
    let mut sites = BTreeMap::new();
    locate(schema, object, Place::default(), &mut sites);
    let mut refusals: Vec<(usize, Refusal)> =
        errors.into_iter().map(|error| told(&error, sites.get(&error.field_path))).collect();
    refusals.sort_by_key(|(order, _)| *order);
    refusals.into_iter().map(|(_, refusal)| refusal).collect()
}

const TOO_LARGE: &str = "a number is too large for the rules to compare";

/// A value that has rules.
struct Site<'a> {
    /// How many come before it.
    order: usize,
    /// Where it is, as the API server writes it.
    path: String,
    schema: &'a Value,
    value: &'a Value,
}

/// A path as both write it: they differ at the keys of maps.
#[derive(Clone, Default)]
struct Place {
    evaluator: String,
    server: String,
}

impl Place {
    fn field(&self, name: &str) -> Self {
        Self { evaluator: join(&self.evaluator, name), server: join(&self.server, name) }
    }

    fn entry(&self, key: &str) -> Self {
        Self { evaluator: join(&self.evaluator, key), server: format!("{}[{key}]", self.server) }
    }

    fn item(&self, index: usize) -> Self {
        Self {
            evaluator: format!("{}[{index}]", self.evaluator),
            server: format!("{}[{index}]", self.server),
        }
    }
}

/// Finds all values that have rules, by the evaluator's path.
fn locate<'a>(schema: &'a Value, value: &'a Value, place: Place, sites: &mut BTreeMap<String, Site<'a>>) {
    if schema["x-kubernetes-validations"].is_array() {
        let site = Site { order: sites.len(), path: place.server.clone(), schema, value };
        sites.insert(place.evaluator.clone(), site);
    }
    match value {
        Value::Object(fields) => {
            for (field, child) in fields {
                match (schema["properties"].get(field), &schema["additionalProperties"]) {
                    (Some(declared), _) => locate(declared, child, place.field(field), sites),
                    (None, entries) => locate(entries, child, place.entry(field), sites),
                }
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                locate(&schema["items"], item, place.item(index), sites);
            }
        }
        _ => {}
    }
}

/// A broken rule as the API server tells it, with the order of its site.
fn told(error: &ValidationError, site: Option<&Site<'_>>) -> (usize, Refusal) {
    let Some(site) = site else {
        // A rule that is about another place than its own; ours have no `fieldPath`.
        return (usize::MAX, Refusal::new(Cause::Invalid, &error.field_path, None, &error.message));
    };
    let kind = site.schema["type"].as_str().unwrap_or_default();
    let (value, detail) = if error.kind == ErrorKind::ValidationFailure {
        // What is large is not repeated.
        let value = (!matches!(kind, "object" | "array")).then(|| printed(site.value));
        (value, error.message.trim().to_owned())
    } else {
        let why = error.message.strip_prefix("rule evaluation error: ").unwrap_or(&error.message);
        (Some(quoted(kind)), format!("{why} evaluating rule: {}", message_of(site.schema, &error.rule)))
    };
    (site.order, Refusal::new(Cause::Invalid, &site.path, value, &detail))
}

/// What a rule says when it is broken.
fn message_of<'a>(schema: &'a Value, rule: &'a str) -> &'a str {
    let mut rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    let message =
        rules.find(|declared| declared["rule"] == rule).and_then(|declared| declared["message"].as_str());
    message.unwrap_or(rule).trim()
}

#[cfg(test)]
mod tests {
    use kube::core::cel::compile_schema;
    use serde_json::json;

    use super::*;

    fn said(object: Value) -> Vec<String> {
        let rule = |rule: &str, message: &str| json!([{"rule": rule, "message": message}]);
        let schema = json!({"type": "object", "properties": {
            "number": {"type": "integer", "x-kubernetes-validations": rule("self < 5", "must be small")},
            "list": {"type": "array", "items": {"type": "string", "x-kubernetes-validations": rule("self != 'a'", "not a")}},
            "map": {"type": "object", "additionalProperties": {
                "type": "string", "x-kubernetes-validations": rule("self != 'a'", "not a either"),
            }},
            "any": {"type": "object", "x-kubernetes-validations": rule("nosuch(self)", "cannot be")},
            "old": {"type": "integer", "x-kubernetes-validations": rule("self == oldSelf", "must not change")},
        }});
        check(&schema, &compile_schema(&schema), &object).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_keeps_the_rules_and_what_could_only_change_is_fine() {
        assert_eq!(
            said(json!({"number": 1, "list": ["b"], "map": {"k": "b"}, "old": 3})),
            Vec::<String>::new()
        );
    }

    #[test]
    fn paths_and_values_are_written_as_the_api_server_writes_them() {
        let said = said(json!({"number": 7, "list": ["b", "a"], "map": {"example.org/k": "a"}, "any": {}}));
        assert_eq!(said.len(), 4, "{said:?}");
        assert!(said[0].starts_with("any: Invalid value: \"object\": "), "{}", said[0]);
        assert!(said[0].ends_with(" evaluating rule: cannot be"), "{}", said[0]);
        assert_eq!(
            said[1..],
            [
                "list[1]: Invalid value: \"a\": not a",
                "map[example.org/k]: Invalid value: \"a\": not a either",
                "number: Invalid value: 7: must be small",
            ]
        );
    }
}
