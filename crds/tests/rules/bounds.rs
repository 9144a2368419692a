//! One object beyond each bound that a schema sets, made from the schema itself.

use serde_json::{Map, Value, json};

use super::{Kind, walk};

/// An object that is valid but for one bound.
pub struct Bound {
    /// Where and what: `spec.lenses[0].name maxLength 63`.
    pub name: String,
    /// The object, one beyond the bound.
    pub beyond: Value,
    /// What the API server's refusal must contain.
    pub refusal: &'static str,
}

/// Every bound below `spec` of a kind.
///
/// # Panics
/// When no complete example has a field, since then the field's bounds would go untried.
pub fn bounds(kind: &Kind) -> Vec<Bound> {
    let mut all = Vec::new();
    let examples = kind.complete();
    walk(&kind.schema()["properties"]["spec"], "spec", &mut |path, schema| {
        let found = examples.iter().find_map(|example| Some((example, resolve(example, path)?)));
        let (complete, here) = found.unwrap_or_else(|| panic!("no complete {} sets {path}", kind.name()));
        let at = |name: &str, beyond: Value, refusal: &'static str| Bound {
            name: format!("{path} {name}"),
            beyond: replaced(complete, path, beyond),
            refusal,
        };
        let number = |name: &str| schema[name].as_f64().map(|n| n as i64);
        if let Some(max) = number("maxLength") {
            all.push(at(
                &format!("maxLength {max}"),
                json!("a".repeat(max as usize + 1)),
                "may not be more than",
            ));
        }
        if let Some(min) = number("minLength") {
            all.push(at(
                &format!("minLength {min}"),
                json!("a".repeat(min as usize - 1)),
                "should be at least",
            ));
        }
        if let Some(max) = number("maximum") {
            all.push(at(&format!("maximum {max}"), json!(max + 1), "should be less than or equal to"));
        }
        if let Some(min) = number("minimum") {
            all.push(at(&format!("minimum {min}"), json!(min - 1), "should be greater than or equal to"));
        }
        if let Some(max) = number("maxItems") {
            all.push(at(&format!("maxItems {max}"), grown(here, max as usize + 1), "must have at most"));
        }
        if let Some(min) = number("minItems") {
            let short: Vec<Value> = vec![here[0].clone(); min as usize - 1];
            all.push(at(&format!("minItems {min}"), json!(short), "should have at least"));
        }
        if let Some(max) = number("maxProperties") {
            let many: Map<String, Value> = (0..=max).map(|n| (format!("k{n}"), json!("1"))).collect();
            all.push(at(&format!("maxProperties {max}"), json!(many), "must have at most"));
        }
        if schema["enum"].is_array() {
            all.push(at("enum", json!("NoSuch"), "Unsupported value"));
        }
        if schema["pattern"].is_string() {
            all.push(at("pattern", json!("-1 Gib"), "should match"));
        }
        if schema["x-kubernetes-list-map-keys"].is_array() {
            all.push(at("unique names", json!([here[0], here[0]]), "Duplicate value"));
        }
        for required in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
            let mut without = here.clone();
            without.as_object_mut().expect("an object has required fields").remove(required);
            all.push(at(&format!("requires {required}"), without, "Required value"));
        }
    });
    all
}

/// `count` elements like the first, with names of their own.
pub(super) fn grown(list: &Value, count: usize) -> Value {
    let element = |n: usize| {
        let mut element = list[0].clone();
        for key in ["name", "topologyKey", "lensName"] {
            if element.get(key).is_some() {
                element[key] = json!(format!("n{n}"));
            }
        }
        element
    };
    (0..count).map(element).collect()
}

fn resolve<'a>(object: &'a Value, path: &str) -> Option<&'a Value> {
    steps(path).try_fold(object, |at, step| match (at, step) {
        (Value::Object(map), "*") => map.values().next(),
        (Value::Array(list), index) => list.get(index.parse::<usize>().ok()?),
        (at, name) => at.get(name),
    })
}

fn replaced(object: &Value, path: &str, new: Value) -> Value {
    let mut object = object.clone();
    let mut at = &mut object;
    for step in steps(path) {
        at = match (at, step) {
            (Value::Object(map), "*") => map.values_mut().next().expect("the complete example fills maps"),
            (Value::Array(list), index) => &mut list[index.parse::<usize>().expect("an index")],
            (at, name) => &mut at[name],
        };
    }
    *at = new;
    object
}

fn steps(path: &str) -> impl Iterator<Item = &str> {
    path.split(['.', '[', ']']).filter(|step| !step.is_empty())
}
