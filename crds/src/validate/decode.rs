//! What becomes of an object while the API server reads it, before anything is checked.

use serde_json::Value;

use super::{Refusal, join, metadata, schema_of};

/// Fields of every object, which no schema of ours declares.
const OF_EVERY_OBJECT: [&str; 3] = ["apiVersion", "kind", "metadata"];

/// Names the fields that the schema does not have, and drops them.
pub(super) fn drop_unknown_fields(schema: &Value, object: &mut Value) -> Vec<Refusal> {
    let mut unknown = Vec::new();
    for field in object["metadata"].as_object().into_iter().flat_map(|fields| fields.keys()) {
        if !metadata::FIELDS.contains(&field.as_str()) {
            unknown.push(join("metadata", field));
        }
    }
    prune(schema, object, "", &mut unknown);
    unknown.sort();
    unknown.into_iter().map(Refusal::unknown_field).collect()
}

fn prune(schema: &Value, value: &mut Value, path: &str, unknown: &mut Vec<String>) {
    match value {
        Value::Object(fields) => fields.retain(|field, child| {
            if path.is_empty() && OF_EVERY_OBJECT.contains(&field.as_str()) {
                return true;
            }
            let path = join(path, field);
            match schema_of(schema, field) {
                Some(schema) => prune(schema, child, &path, unknown),
                None => unknown.push(path),
            }
            schema_of(schema, field).is_some()
        }),
        Value::Array(items) => {
            for (index, item) in items.iter_mut().enumerate() {
                prune(&schema["items"], item, &format!("{path}[{index}]"), unknown);
            }
        }
        _ => {}
    }
}

/// A field that is null is no field, where the schema neither allows null nor has a default.
pub(super) fn drop_nulls(schema: Option<&Value>, value: &mut Value) {
    match value {
        Value::Object(fields) => fields.retain(|field, child| {
            let schema = schema.and_then(|schema| schema_of(schema, field));
            let dropped = child.is_null()
                && schema.is_some_and(|schema| schema["nullable"] != true && schema.get("default").is_none());
            if !dropped {
                drop_nulls(schema, child);
            }
            !dropped
        }),
        Value::Array(items) => {
            let schema = schema.map(|schema| &schema["items"]);
            items.iter_mut().for_each(|item| drop_nulls(schema, item));
        }
        _ => {}
    }
}

/// Fills in what is absent, or null, and has a default.
pub(super) fn fill_defaults(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(fields) => {
            for (field, declared) in schema["properties"].as_object().into_iter().flatten() {
                let absent = fields.get(field).is_none_or(|v| v.is_null() && declared["nullable"] != true);
                if let Some(default) = declared.get("default").filter(|_| absent) {
                    fields.insert(field.clone(), default.clone());
                }
            }
            for (field, child) in fields.iter_mut() {
                if let Some(schema) = schema_of(schema, field) {
                    fill_defaults(schema, child);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| fill_defaults(&schema["items"], item)),
        _ => {}
    }
}

/// Where a `generateName` takes the place of a name, the API server makes one before it looks at it.
pub(super) fn generate_name(object: &mut Value) {
    let Some(fields) = object.get_mut("metadata").and_then(Value::as_object_mut) else { return };
    let named = fields.get("name").is_some_and(|name| !matches!(name.as_str(), Some("")) && !name.is_null());
    let start =
        fields.get("generateName").and_then(Value::as_str).filter(|start| !start.is_empty() && !named);
    if let Some(start) = start {
        let start: String = start.chars().take(LONGEST_START).collect();
        fields.insert("name".into(), format!("{start}xxxxx").into());
    }
}

/// Characters of a `generateName` that are kept, so that the five that follow make it no longer than a DNS label.
const LONGEST_START: usize = 58;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn schema() -> Value {
        json!({"properties": {
            "a": {"type": "integer", "default": 1},
            "b": {"type": "object", "properties": {"c": {"type": "string"}}},
            "list": {"type": "array", "items": {"type": "object", "properties": {"c": {"type": "string"}}}},
            "map": {"type": "object", "additionalProperties": {"type": "string"}},
        }})
    }

    #[test]
    fn unknown_fields_are_dropped_and_named_in_order() {
        let mut object = json!({
            "kind": "K", "z": 1, "b": {"c": "x", "kind": "y"}, "list": [{"c": "x"}, {"d": 1}], "map": {"any": "x"},
        });
        let unknown = drop_unknown_fields(&schema(), &mut object);
        let paths: Vec<_> = unknown.iter().map(|refusal| refusal.path.as_str()).collect();
        assert_eq!(paths, ["b.kind", "list[1].d", "z"]);
        assert_eq!(
            object,
            json!({"kind": "K", "b": {"c": "x"}, "list": [{"c": "x"}, {}], "map": {"any": "x"}})
        );
    }

    #[test]
    fn nulls_make_way_for_defaults_and_defaults_for_values() {
        let mut object =
            json!({"a": null, "b": {"c": null}, "list": [null, {"c": null}], "map": {"x": null}});
        drop_nulls(Some(&schema()), &mut object);
        fill_defaults(&schema(), &mut object);
        assert_eq!(object, json!({"a": 1, "b": {}, "list": [null, {}], "map": {}}));
        let mut object = json!({"a": 7});
        fill_defaults(&schema(), &mut object);
        assert_eq!(object, json!({"a": 7}));
    }

    #[test]
    fn a_name_is_generated_only_where_there_is_none() {
        for (metadata, name) in [
            (json!({"generateName": "a-"}), json!("a-xxxxx")),
            (json!({"generateName": "a-", "name": "b"}), json!("b")),
            (json!({"generateName": "a".repeat(60)}), json!(format!("{}xxxxx", "a".repeat(58)))),
            (json!({}), json!(null)),
        ] {
            let mut object = json!({"metadata": metadata});
            generate_name(&mut object);
            assert_eq!(object["metadata"]["name"], name);
        }
    }
}
