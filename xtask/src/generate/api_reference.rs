//! `docs/reference/api.md`: every field of both kinds, from the schemas the API server enforces.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{NOTICE, cell};

/// The page, from the two CustomResourceDefinitions.
pub fn page(definitions: &[Value]) -> Result<String> {
    let mut page = format!(
        "<!-- {NOTICE} -->\n\n# API reference: `turret.dev/v1alpha1`\n\n\
         What `kubectl explain` tells, on one page. Fields marked *required* must be given; a bound or a rule that\n\
         is broken is refused by the API server with the message shown.\n"
    );
    for definition in definitions {
        kind(&mut page, definition)?;
    }
    Ok(page)
}

fn kind(page: &mut String, definition: &Value) -> Result<()> {
    let names = &definition["spec"]["names"];
    let name = names["kind"].as_str().context("a definition names its kind")?;
    let version = &definition["spec"]["versions"][0];
    let schema = &version["schema"]["openAPIV3Schema"];
    let short = names["shortNames"][0].as_str().unwrap_or_default();
    let plural = names["plural"].as_str().unwrap_or_default();
    writeln!(page, "\n## {name}\n\n{}", text(schema))?;
    writeln!(page, "\n`kubectl get {plural}`, short `{short}`; both kinds together: `kubectl get turret`.")?;
    rules(page, schema)?;
    columns(page, version)?;
    object(page, &format!("{name}.spec"), &schema["properties"]["spec"])?;
    object(page, &format!("{name}.status"), &schema["properties"]["status"])
}

fn columns(page: &mut String, version: &Value) -> Result<()> {
    writeln!(page, "\n| column | shows |\n|---|---|")?;
    for column in version["additionalPrinterColumns"].as_array().into_iter().flatten() {
        let name = column["name"].as_str().unwrap_or_default().to_uppercase();
        let wide = if column["priority"] == 1 { " (with `-o wide`)" } else { "" };
        let path = column["jsonPath"].as_str().unwrap_or_default();
        let shows = column["description"].as_str().map_or_else(|| format!("`{path}`"), cell);
        writeln!(page, "| {name}{wide} | {shows} |")?;
    }
    Ok(())
}

/// A table of an object's fields, then one of each object below it.
fn object(page: &mut String, path: &str, schema: &Value) -> Result<()> {
    writeln!(page, "\n### {path}\n\n{}\n", text(schema))?;
    rules(page, schema)?;
    writeln!(page, "| field | type | what |\n|---|---|---|")?;
    let required: Vec<&str> =
        schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let fields = schema["properties"].as_object().context("an object has properties")?;
    for (name, field) in fields {
        let mut what = cell(&text(field));
        if required.contains(&name.as_str()) {
            what = format!("*Required.* {what}");
        }
        if let Some(default) = field.get("default") {
            let _ = write!(what, " Default: `{default}`.");
        }
        if field["properties"].is_null() {
            for message in messages(field).chain(messages(&field["items"])) {
                let _ = write!(what, " Rule: {}.", cell(message));
            }
        }
        writeln!(page, "| `{name}` | {} | {what} |", type_of(field))?;
    }
    for (name, field) in fields {
        if field["properties"].is_object() {
            object(page, &format!("{path}.{name}"), field)?;
        } else if field["items"]["properties"].is_object() {
            object(page, &format!("{path}.{name}[]"), &field["items"])?;
        }
    }
    Ok(())
}

fn rules(page: &mut String, schema: &Value) -> Result<()> {
    let messages: Vec<_> = messages(schema).collect();
    if !messages.is_empty() {
        writeln!(page, "\nRules:\n")?;
        for message in messages {
            writeln!(page, "- {}", cell(message))?;
        }
        writeln!(page)?;
    }
    Ok(())
}

fn messages(schema: &Value) -> impl Iterator<Item = &str> {
    let rules = schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    rules.filter_map(|rule| rule["message"].as_str())
}

fn text(schema: &Value) -> String {
    schema["description"].as_str().unwrap_or_default().trim().to_owned()
}

/// A field's type with its bounds, for a person.
fn type_of(field: &Value) -> String {
    let number = |name: &str| field[name].as_f64().map(|n| n as i64);
    if let Some(values) = field["enum"].as_array() {
        let values: Vec<_> = values.iter().filter_map(Value::as_str).map(|v| format!("`{v}`")).collect();
        return values.join(", ");
    }
    if field["x-kubernetes-int-or-string"] == true {
        return "quantity".into();
    }
    match field["type"].as_str().unwrap_or_default() {
        "array" => {
            let of = if field["items"]["properties"].is_object() {
                "object".into()
            } else {
                type_of(&field["items"])
            };
            let key = field["x-kubernetes-list-map-keys"][0].as_str();
            let key = key.map_or_else(String::new, |key| format!(" by `{key}`"));
            format!("list of {of}{key}{}", range(number("minItems"), number("maxItems")))
        }
        "object" if field["additionalProperties"].is_object() => {
            format!(
                "map of {}{}",
                type_of(&field["additionalProperties"]),
                range(None, number("maxProperties"))
            )
        }
        "string" if field["format"] == "date-time" => "time".into(),
        "string" => format!("string{}", range(number("minLength"), number("maxLength"))),
        "integer" => format!("integer{}", range(number("minimum"), number("maximum"))),
        other => other.into(),
    }
}

fn range(min: Option<i64>, max: Option<i64>) -> String {
    match (min, max) {
        (Some(min), Some(max)) => format!(", {min} to {max}"),
        (None, Some(max)) => format!(", at most {max}"),
        (Some(min), None) => format!(", at least {min}"),
        (None, None) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn types_show_their_bounds() {
        for (schema, shown) in [
            (json!({"type": "string", "maxLength": 63, "minLength": 1}), "string, 1 to 63"),
            (json!({"type": "integer", "minimum": -16000.0, "maximum": 16000.0}), "integer, -16000 to 16000"),
            (json!({"enum": ["F32", "BF16"], "type": "string"}), "`F32`, `BF16`"),
            (
                json!({"type": "array", "maxItems": 256, "items": {"properties": {}}, "x-kubernetes-list-map-keys": ["name"]}),
                "list of object by `name`, at most 256",
            ),
            (json!({"x-kubernetes-int-or-string": true}), "quantity"),
        ] {
            assert_eq!(type_of(&schema), shown);
        }
    }

    #[test]
    fn every_field_of_a_nested_object_is_on_the_page() {
        let inner = json!({"type": "object", "required": ["b"], "properties": {"b": {"type": "string", "description": "A b."}}});
        let schema = json!({"description": "A thing.", "properties": {
            "spec": {"properties": {"list": {"type": "array", "items": inner}}},
            "status": {"properties": {"c": {"type": "string", "description": "A c.", "default": "d"}}},
        }});
        let crd =
            json!({"spec": {"names": {"kind": "K"}, "versions": [{"schema": {"openAPIV3Schema": schema}}]}});
        let page = page(&[crd]).unwrap();
        assert!(page.contains("### K.spec.list[]"), "{page}");
        assert!(page.contains("| `b` | string | *Required.* A b. |"), "{page}");
        assert!(page.contains("| `c` | string | A c. Default: `\"d\"`. |"), "{page}");
    }
}
