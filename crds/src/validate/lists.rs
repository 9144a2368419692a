//! Lists whose entries must differ: by their keys (`x-kubernetes-list-type: map`) or as a whole (`set`).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::print::printed;
use super::{Cause, Refusal, join};

/// Names each second entry of a key.
pub(super) fn check(schema: &Value, object: &Value) -> Vec<Refusal> {
    let mut refusals = Vec::new();
    walk(schema, object, "", &mut refusals);
    refusals
}

fn walk(schema: &Value, value: &Value, path: &str, refusals: &mut Vec<Refusal>) {
    match value {
        Value::Object(fields) => {
            for (field, child) in fields {
                match (schema["properties"].get(field), &schema["additionalProperties"]) {
                    (Some(declared), _) => walk(declared, child, &join(path, field), refusals),
                    (None, entries) => walk(entries, child, &format!("{path}[{field}]"), refusals),
                }
            }
        }
        Value::Array(items) => {
            refusals.extend(duplicates(schema, items, path));
            for (index, item) in items.iter().enumerate() {
                walk(&schema["items"], item, &format!("{path}[{index}]"), refusals);
            }
        }
        _ => {}
    }
}

fn duplicates(schema: &Value, items: &[Value], path: &str) -> Vec<Refusal> {
    let keys: Vec<Value> = match schema["x-kubernetes-list-type"].as_str() {
        Some("set") => items.to_vec(),
        Some("map") => {
            let no_object = items.iter().position(|item| !item.is_object() && !item.is_null());
            if let Some(index) = no_object {
                let detail = "must be an object for an array of list-type map";
                let path = format!("{path}[{index}]");
                return vec![Refusal::new(Cause::Invalid, &path, Some(printed(&items[index])), detail)];
            }
            items.iter().map(|item| key(schema, item)).collect()
        }
        _ => return Vec::new(),
    };
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    let mut refusals = Vec::new();
    for (index, key) in keys.iter().enumerate() {
        let times = seen.entry(key.to_string()).or_default();
        *times += 1;
        // A third one is not named again.
        if *times == 2 {
            refusals.push(Refusal::new(
                Cause::Duplicate,
                &format!("{path}[{index}]"),
                Some(printed(key)),
                "",
            ));
        }
    }
    refusals
}

/// What tells an entry of a list-map from the others.
fn key(schema: &Value, item: &Value) -> Value {
    let names =
        schema["x-kubernetes-list-map-keys"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let given = names.filter_map(|name| Some((name.to_owned(), item.get(name)?.clone())));
    Value::Object(given.collect::<Map<_, _>>())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(list: Value) -> Vec<String> {
        let schema = json!({"properties": {
            "map": {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"], "items": {"properties": {
                "set": {"x-kubernetes-list-type": "set", "items": {"type": "string"}},
            }}},
            "any": {"x-kubernetes-list-type": "atomic", "items": {"type": "string"}},
        }});
        check(&schema, &list).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_second_of_a_key_is_named_once() {
        let entry = |name: &str| json!({"name": name});
        assert_eq!(
            said(json!({"map": [entry("a"), entry("b"), entry("a"), entry("a")]})),
            [r#"map[2]: Duplicate value: {"name":"a"}"#]
        );
        assert_eq!(said(json!({"map": [{"x": 1}, {"x": 2}]})), ["map[1]: Duplicate value: {}"]);
        assert_eq!(
            said(json!({"map": [{"name": "a", "set": ["x", "y", "x"]}]})),
            [r#"map[0].set[2]: Duplicate value: "x""#]
        );
        assert_eq!(said(json!({"any": ["x", "x"]})), Vec::<String>::new());
    }

    #[test]
    fn entries_of_a_list_map_are_objects() {
        assert_eq!(
            said(json!({"map": [{"name": "a"}, "b"]})),
            ["map[1]: Invalid value: \"b\": must be an object for an array of list-type map"]
        );
    }
}
