//! The bounds that a CRD's schema sets: types, required fields, enums, numbers, lengths, patterns.

use std::collections::BTreeMap;

use regex::Regex;
use serde_json::{Number, Value};

use super::print::{float, number, printed, quoted};
use super::{Cause, Refusal, join};

/// The regular expressions of a schema, by their text.
#[derive(Debug)]
pub(super) struct Patterns(BTreeMap<String, Regex>);

impl Patterns {
    pub(super) fn of(schema: &Value) -> Self {
        let mut patterns = BTreeMap::new();
        collect(schema, &mut patterns);
        Self(patterns)
    }

    fn fits(&self, pattern: &str, text: &str) -> bool {
        self.0.get(pattern).is_some_and(|regex| regex.is_match(text))
    }
}

fn collect(schema: &Value, patterns: &mut BTreeMap<String, Regex>) {
    if let Some(pattern) = schema["pattern"].as_str() {
        let regex = Regex::new(pattern).expect("a pattern of our CRDs is a regular expression");
        patterns.insert(pattern.into(), regex);
    }
    schema["properties"].as_object().into_iter().flatten().for_each(|(_, child)| collect(child, patterns));
    for part in ["items", "additionalProperties"] {
        if schema[part].is_object() {
            collect(&schema[part], patterns);
        }
    }
}

/// Everything in an object that is beyond a bound.
pub(super) fn check(patterns: &Patterns, schema: &Value, object: &Value) -> Vec<Refusal> {
    let mut walk = Walk { patterns, refusals: Vec::new() };
    walk.value(schema, object, "");
    walk.refusals
}

struct Walk<'a> {
    patterns: &'a Patterns,
    refusals: Vec<Refusal>,
}

impl Walk<'_> {
    fn value(&mut self, schema: &Value, value: &Value, path: &str) {
        self.type_of(schema, value, path);
        match value {
            Value::String(text) => self.text(schema, text, path),
            Value::Number(number) => self.number(schema, number, path),
            Value::Array(items) => self.list(schema, items, path),
            _ => {}
        }
        self.choice(schema, value, path);
        if let Value::Object(fields) = value {
            self.fields(schema, fields, path);
        }
    }

    fn type_of(&mut self, schema: &Value, value: &Value, path: &str) {
        let allowed: Vec<&str> = match schema["x-kubernetes-int-or-string"].as_bool() {
            Some(true) => vec!["integer", "string"],
            _ => schema["type"].as_str().into_iter().collect(),
        };
        let found = match value {
            Value::Null if schema["nullable"] == true => return,
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
            Value::Number(number) if number.is_i64() => "integer",
            Value::Number(number) if allowed.contains(&"integer") && is_whole(number) => "integer",
            Value::Number(_) => "number",
        };
        let fits = allowed.contains(&found) || (found == "integer" && allowed.contains(&"number"));
        if !allowed.is_empty() && !fits {
            let found = quoted(found);
            let detail = format!("{path} in body must be of type {}: {found}", allowed.join(","));
            self.refusals.push(Refusal::new(Cause::TypeInvalid, path, Some(found), &detail));
        }
    }

    /// The first bound that a text breaks.
    fn text(&mut self, schema: &Value, text: &str, path: &str) {
        let characters = text.chars().count() as u64;
        let broken =
            match (schema["maxLength"].as_u64(), schema["minLength"].as_u64(), schema["pattern"].as_str()) {
                (Some(max), _, _) if characters > max => {
                    let unit = if max == 1 { "byte" } else { "bytes" };
                    let detail = format!("may not be more than {max} {unit}");
                    Refusal::new(Cause::TooLong, path, None, &detail)
                }
                (_, Some(min), _) if characters < min => {
                    let detail = format!("{path} in body should be at least {min} chars long");
                    Refusal::new(Cause::Invalid, path, Some(quoted(text)), &detail)
                }
                (_, _, Some(pattern)) if !self.patterns.fits(pattern, text) => {
                    let detail = format!("{path} in body should match '{pattern}'");
                    Refusal::new(Cause::Invalid, path, Some(quoted(text)), &detail)
                }
                _ => return,
            };
        self.refusals.push(broken);
    }

    fn number(&mut self, schema: &Value, value: &Number, path: &str) {
        let whole = value.as_i64();
        // As in Go, a bound of a whole number is a whole number too.
        let shown = |bound: f64| whole.map_or_else(|| float(bound), |_| (bound as i64).to_string());
        let below = |bound: f64| whole.map_or_else(|| value.as_f64() < Some(bound), |v| v < bound as i64);
        let above = |bound: f64| whole.map_or_else(|| value.as_f64() > Some(bound), |v| v > bound as i64);
        let minimum = schema["minimum"].as_f64().filter(|bound| below(*bound));
        let maximum = schema["maximum"].as_f64().filter(|bound| above(*bound));
        let minimum = minimum.map(|bound| format!("greater than or equal to {}", shown(bound)));
        let maximum = maximum.map(|bound| format!("less than or equal to {}", shown(bound)));
        for broken in minimum.into_iter().chain(maximum) {
            let detail = format!("{path} in body should be {broken}");
            self.refusals.push(Refusal::new(Cause::Invalid, path, Some(number(value)), &detail));
        }
    }

    fn list(&mut self, schema: &Value, items: &[Value], path: &str) {
        if schema["items"].is_object() {
            for (index, item) in items.iter().enumerate() {
                self.value(&schema["items"], item, &format!("{path}[{index}]"));
            }
        }
        let count = items.len() as u64;
        if let Some(min) = schema["minItems"].as_u64().filter(|min| count < *min) {
            let detail = format!("{path} in body should have at least {min} items");
            self.refusals.push(Refusal::new(Cause::Invalid, path, Some(count.to_string()), &detail));
        }
        if let Some(max) = schema["maxItems"].as_u64().filter(|max| count > *max) {
            self.too_many(path, count, max);
        }
    }

    fn too_many(&mut self, path: &str, count: u64, max: u64) {
        let unit = if max == 1 { "item" } else { "items" };
        let detail = format!("must have at most {max} {unit}");
        self.refusals.push(Refusal::new(Cause::TooMany, path, Some(count.to_string()), &detail));
    }

    fn choice(&mut self, schema: &Value, value: &Value, path: &str) {
        let Some(choices) = schema["enum"].as_array().filter(|choices| !choices.contains(value)) else {
            return;
        };
        let quoted = |choice: &Value| quoted(choice.as_str().unwrap_or(&choice.to_string()));
        let choices: Vec<String> = choices.iter().map(quoted).collect();
        let detail = format!("supported values: {}", choices.join(", "));
        self.refusals.push(Refusal::new(Cause::NotSupported, path, Some(printed(value)), &detail));
    }

    fn fields(&mut self, schema: &Value, fields: &serde_json::Map<String, Value>, path: &str) {
        let count = fields.len() as u64;
        if let Some(max) = schema["maxProperties"].as_u64().filter(|max| count > *max) {
            self.too_many(path, count, max);
        }
        let declared = &schema["properties"];
        let entries = &schema["additionalProperties"];
        for (field, child) in fields {
            match declared.get(field) {
                Some(declared) => self.value(declared, child, &join(path, field)),
                None if entries.is_object() => self.value(entries, child, &join(path, field)),
                // Metadata, which has a check of its own; other unknown fields are gone by now.
                None => {}
            }
        }
        for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            if !fields.contains_key(required) {
                self.refusals.push(Refusal::new(Cause::Required, &join(path, required), None, ""));
            }
        }
    }
}

/// Whether a number with a decimal point is a whole one all the same: `2.0`.
fn is_whole(number: &Number) -> bool {
    const LARGEST: f64 = 9_007_199_254_740_991.0;
    number.as_f64().is_some_and(|value| value.fract() == 0.0 && value.abs() <= LARGEST)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(schema: Value, value: Value) -> Vec<String> {
        let schema = json!({"properties": {"x": schema}});
        let refusals = check(&Patterns::of(&schema), &schema, &json!({"x": value}));
        refusals.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_within_all_bounds_is_fine() {
        for (schema, value) in [
            (json!({"type": "string", "maxLength": 3, "minLength": 3, "pattern": "^a"}), json!("aéé")),
            (json!({"type": "integer", "minimum": 0.0, "maximum": 5.0}), json!(5)),
            (json!({"type": "integer"}), json!(2.0)),
            (json!({"type": "number"}), json!(1)),
            (json!({"type": "string", "nullable": true}), json!(null)),
            (
                json!({"x-kubernetes-int-or-string": true, "minimum": 0.0, "pattern": "^[0-9]+Gi$"}),
                json!("1Gi"),
            ),
            (json!({"x-kubernetes-int-or-string": true, "minimum": 0.0, "pattern": "^[0-9]+Gi$"}), json!(7)),
            (json!({"type": "array", "items": {"type": "boolean"}, "maxItems": 1}), json!([true])),
            (
                json!({"type": "object", "maxProperties": 1, "additionalProperties": {"enum": ["A"]}}),
                json!({"k": "A"}),
            ),
        ] {
            assert_eq!(said(schema.clone(), value), Vec::<String>::new(), "{schema}");
        }
    }

    #[test]
    fn each_bound_is_named_in_the_words_of_the_api_server() {
        for (schema, value, expected) in [
            (
                json!({"type": "string"}),
                json!(1),
                "x: Invalid value: \"integer\": x in body must be of type string: \"integer\"",
            ),
            (
                json!({"type": "integer"}),
                json!(1.5),
                "x: Invalid value: \"number\": x in body must be of type integer: \"number\"",
            ),
            (
                json!({"type": "array"}),
                json!({}),
                "x: Invalid value: \"object\": x in body must be of type array: \"object\"",
            ),
            (
                json!({"type": "string"}),
                json!(null),
                "x: Invalid value: \"null\": x in body must be of type string: \"null\"",
            ),
            (
                json!({"x-kubernetes-int-or-string": true}),
                json!(true),
                "x: Invalid value: \"boolean\": x in body must be of type integer,string: \"boolean\"",
            ),
            (json!({"maxLength": 3}), json!("éééé"), "x: Too long: may not be more than 3 bytes"),
            (json!({"maxLength": 1}), json!("aa"), "x: Too long: may not be more than 1 byte"),
            (
                json!({"minLength": 2}),
                json!("a"),
                "x: Invalid value: \"a\": x in body should be at least 2 chars long",
            ),
            (
                json!({"pattern": "^[0-9]+$"}),
                json!("a"),
                "x: Invalid value: \"a\": x in body should match '^[0-9]+$'",
            ),
            (
                json!({"minimum": 1.0}),
                json!(0),
                "x: Invalid value: 0: x in body should be greater than or equal to 1",
            ),
            (
                json!({"maximum": 10_485_760.0}),
                json!(10_485_761),
                "x: Invalid value: 10485761: x in body should be less than or equal to 10485760",
            ),
            (
                json!({"maximum": 2.0}),
                json!(2.5),
                "x: Invalid value: 2.5: x in body should be less than or equal to 2",
            ),
            (json!({"maxItems": 1}), json!([1, 2]), "x: Too many: 2: must have at most 1 item"),
            (
                json!({"minItems": 1}),
                json!([]),
                "x: Invalid value: 0: x in body should have at least 1 items",
            ),
            (json!({"maxProperties": 0}), json!({"a": 1}), "x: Too many: 1: must have at most 0 items"),
            (
                json!({"enum": ["A", "B"]}),
                json!("C"),
                "x: Unsupported value: \"C\": supported values: \"A\", \"B\"",
            ),
            (json!({"required": ["a"]}), json!({}), "x.a: Required value"),
            (
                json!({"items": {"type": "string"}}),
                json!([null]),
                "x[0]: Invalid value: \"null\": x[0] in body must be of type string: \"null\"",
            ),
            (
                json!({"additionalProperties": {"maxLength": 1}}),
                json!({"example.org/k": "aa"}),
                "x.example.org/k: Too long: may not be more than 1 byte",
            ),
        ] {
            assert_eq!(said(schema, value), [expected]);
        }
    }

    /// What a schema may say beyond this, an object would be judged by wrongly.
    #[test]
    fn our_crds_say_only_what_is_understood_here() {
        const KNOWN: [&str; 23] = [
            "additionalProperties",
            "default",
            "description",
            "enum",
            "format",
            "items",
            "maxItems",
            "maxLength",
            "maxProperties",
            "maximum",
            "minItems",
            "minLength",
            "minimum",
            "nullable",
            "pattern",
            "properties",
            "required",
            "title",
            "type",
            "x-kubernetes-int-or-string",
            "x-kubernetes-list-map-keys",
            "x-kubernetes-list-type",
            "x-kubernetes-validations",
        ];
        fn look(schema: &Value, path: &str) {
            for (word, meaning) in schema.as_object().expect("a schema is an object") {
                assert!(KNOWN.contains(&word.as_str()), "{path}: {word}");
                // Formats of numbers bound nothing. Those of texts do, and only a status may have one: nobody creates it.
                let bounds_nothing =
                    word != "format" || schema["type"] == "integer" || path.starts_with("status");
                assert!(bounds_nothing, "{path}: {meaning}");
            }
            for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
                let words: Vec<_> =
                    rule.as_object().into_iter().flatten().map(|(word, _)| word.as_str()).collect();
                assert_eq!(words, ["message", "rule"], "{path}");
            }
            for (field, child) in schema["properties"].as_object().into_iter().flatten() {
                look(child, &join(path, field));
            }
            for part in ["items", "additionalProperties"] {
                if schema.get(part).is_some() {
                    look(&schema[part], &join(path, "*"));
                }
            }
        }
        for crd in crate::crds() {
            let schema = crd.spec.versions[0].schema.as_ref().and_then(|s| s.open_api_v3_schema.as_ref());
            look(&serde_json::to_value(schema).unwrap(), "");
        }
    }
}
