//! Specs made from a CRD's own schema: of the right types, within all bounds and often at them, with optional fields there or
//! not. What rules ask beyond a field of its own is left to [`agree`](super::agree). Pure: the same numbers give the same spec.

use serde_json::{Map, Value, json};

use crate::numbers::Numbers;

/// Most entries of a list or map, beyond those that must be. The largest objects there can be have tests of their own.
const MOST_ENTRIES: usize = 3;

/// A value that a schema allows. `path` is where it is to be: `spec.lenses[].name`.
pub fn generate(schema: &Value, path: &str, numbers: &mut Numbers) -> Value {
    if let Some(choices) = schema["enum"].as_array() {
        return numbers.pick(choices).clone();
    }
    if schema["x-kubernetes-int-or-string"] == true {
        return quantity(schema, numbers);
    }
    match schema["type"].as_str() {
        Some("object") if schema["additionalProperties"].is_object() => map(schema, path, numbers),
        Some("object") => object(schema, path, numbers),
        Some("array") => list(schema, path, numbers),
        Some("integer") => integer(schema, numbers).into(),
        Some("boolean") => numbers.one_in(2).into(),
        _ => text(schema, path, numbers).into(),
    }
}

fn object(schema: &Value, path: &str, numbers: &mut Numbers) -> Value {
    let required =
        |field: &String| schema["required"].as_array().is_some_and(|all| all.contains(&json!(field)));
    let mut fields = Map::new();
    for (field, child) in schema["properties"].as_object().into_iter().flatten() {
        if required(field) || numbers.one_in(2) {
            fields.insert(field.clone(), generate(child, &format!("{path}.{field}"), numbers));
        }
    }
    fields.into()
}

fn map(schema: &Value, path: &str, numbers: &mut Numbers) -> Value {
    let keys: &[&str] =
        if path.contains(".resources.") { &["cpu", "memory"] } else { &["example.org/a", "b", "c.d"] };
    let mut entries = Map::new();
    for _ in 0..numbers.below(MOST_ENTRIES) {
        let value = generate(&schema["additionalProperties"], &format!("{path}.*"), numbers);
        entries.insert((*numbers.pick(keys)).to_owned(), value);
    }
    entries.into()
}

fn list(schema: &Value, path: &str, numbers: &mut Numbers) -> Value {
    let least = schema["minItems"].as_u64().and_then(|least| usize::try_from(least).ok()).unwrap_or(0);
    let mut items: Vec<Value> = Vec::new();
    for _ in 0..least + numbers.below(MOST_ENTRIES + 1) {
        let item = generate(&schema["items"], &format!("{path}[]"), numbers);
        // The lists of ours that have keys have names for them, and sets have no other entries than texts.
        let is_same = |other: &Value| match schema["x-kubernetes-list-type"].as_str() {
            Some("map") => other["name"] == item["name"],
            Some("set") => *other == item,
            _ => false,
        };
        if !items.iter().any(is_same) {
            items.push(item);
        }
    }
    items.into()
}

/// A bound, or something between them.
fn integer(schema: &Value, numbers: &mut Numbers) -> i64 {
    let bound = |name: &str| schema[name].as_f64().map(|bound| bound as i64);
    let (least, most) = (bound("minimum").unwrap_or(0), bound("maximum").unwrap_or(3600));
    match numbers.below(4) {
        0 => least,
        1 => most,
        _ => {
            let width = usize::try_from(most.saturating_sub(least)).unwrap_or(0) + 1;
            least + i64::try_from(numbers.below(width)).unwrap_or(0)
        }
    }
}

fn quantity(schema: &Value, numbers: &mut Numbers) -> Value {
    let is_of_any_resource = schema["pattern"].as_str().is_some_and(|pattern| pattern.contains("(m|"));
    let samples = if is_of_any_resource {
        json!(["500m", "2", 1, "64Mi", "1.5"])
    } else {
        json!(["64Mi", "1Gi", "1.5Gi", "2G", 67_108_864, "128Mi"])
    };
    numbers.pick(samples.as_array().expect("a list of samples")).clone()
}

fn text(schema: &Value, path: &str, numbers: &mut Numbers) -> String {
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let digest = format!("sha256:{}", "ab".repeat(32));
    let (label, long_name) = ("l".repeat(63), "ü".repeat(128));
    let end = path.rsplit('.').next().unwrap_or_default();
    let samples: &[&str] = match end {
        "uri" => &[
            "file:///models/a",
            "file:///models/b",
            "pvc://models/base",
            "hf://org/repo",
            "hf://org/repo/folder",
            "https://models.example.org/a",
        ],
        "digest" => &[digest.as_str()],
        "revision" => &[commit],
        "displayName" => &["", "A name, for people", long_name.as_str()],
        "defaultGroupName" | "activeGroupName" => &["g", "h", "nowhere"],
        "namespace" => &["elsewhere"],
        "image" => &["turret.test/worker:simulated", "registry.example.org:5000/turret/worker@sha256:ab"],
        "resourceName" => &["nvidia.com/gpu", "example.org/gpu"],
        "hosts[]" => &["models.example.org", "*.example.org", "10.1.0.0/16"],
        "operator" => &["Exists"],
        "effect" => &["NoSchedule", "NoExecute"],
        "value" if path.contains(".env[]") => &["", "info", "a b=c"],
        "name" if path.contains(".env[]") => &["RUST_LOG", "_X", "TURRET_THREADS"],
        "name" if path.contains(".groups[]") => &["g", "h", "nowhere"],
        "name" if path.contains(".lenses[].name") => &["a", "b", "c-1", label.as_str()],
        "*" => &["", "x", "true"],
        // Names of other objects, and keys of taints.
        _ => &["a", "models", "b-2"],
    };
    let sample = *numbers.pick(samples);
    let least = schema["minLength"].as_u64().and_then(|least| usize::try_from(least).ok()).unwrap_or(0);
    if sample.chars().count() < least { "a".repeat(least) } else { sample.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(number: usize) -> Value {
        let crd = &turret_crds::crds()[number];
        let schema = crd.spec.versions[0].schema.as_ref().and_then(|s| s.open_api_v3_schema.as_ref());
        serde_json::to_value(schema.expect("a schema")).expect("a schema is JSON")["properties"]["spec"]
            .clone()
    }

    #[test]
    fn the_same_numbers_give_the_same_spec_and_others_another() {
        let made = |seed: u64| generate(&spec(1), "spec", &mut Numbers::of(seed));
        assert_eq!(made(1), made(1));
        assert_ne!(made(1), made(2));
    }

    #[test]
    fn every_field_of_both_kinds_comes_up_and_every_optional_one_is_missing_at_times() {
        for kind in 0..2 {
            let (schema, mut numbers) = (spec(kind), Numbers::of(3));
            let made: Vec<Value> = (0..200).map(|_| generate(&schema, "spec", &mut numbers)).collect();
            for (field, _) in schema["properties"].as_object().expect("a spec has fields") {
                assert!(made.iter().any(|spec| spec.get(field).is_some()), "{field}");
                let required = schema["required"].as_array().is_some_and(|all| all.contains(&json!(field)));
                assert_eq!(made.iter().any(|spec| spec.get(field).is_none()), !required, "{field}");
            }
        }
    }
}
