//! The API conventions of Kubernetes over both CRDs: what kube-api-linter asks of Go types, asked of the schemas.
//!
//! A failure names the convention and every place that breaks it. What breaks one on purpose is in [`EXCEPTIONS`].

use serde_json::{Value, json};
use turret_crds::{ModelGroupStatus, ModelPlacementStatus};

use crate::rules::kinds;

/// A convention's name, and whether a place breaks it.
type Convention = (&'static str, fn(&Node<'_>) -> bool);

const CONVENTIONS: [Convention; 17] = [
    // Tools wait for conditions, and merge them by type.
    ("Conditions", |node| node.field == "conditions" && !is_map_by_type(node.schema)),
    ("NoPhase", |node| node.field == "phase"),
    // What is a boolean today has a third value tomorrow.
    ("NoBooleans", |node| node.schema["type"] == "boolean"),
    // They are not read back as they were written.
    ("NoFloats", |node| node.schema["type"] == "number"),
    ("SizedIntegers", |node| {
        node.schema["type"] == "integer" && !["int32", "int64"].iter().any(|f| node.schema["format"] == *f)
    }),
    ("BoundedNumbers", |node| {
        let within = node.schema["minimum"].is_number() && node.schema["maximum"].is_number();
        node.schema["type"] == "integer" && node.path.starts_with("spec.") && !within
    }),
    ("BoundedTexts", |node| {
        let is_text = node.schema["type"] == "string" || node.schema["x-kubernetes-int-or-string"] == true;
        is_text && !node.schema["maxLength"].is_number() && !node.schema["enum"].is_array()
    }),
    ("BoundedLists", |node| node.schema["type"] == "array" && !node.schema["maxItems"].is_number()),
    ("BoundedMaps", |node| {
        node.schema["additionalProperties"].is_object() && !node.schema["maxProperties"].is_number()
    }),
    ("CamelCaseFields", |node| !node.field.is_empty() && !is_camel_case(node.field, u8::is_ascii_lowercase)),
    ("CamelCaseValues", |node| {
        let values = node.schema["enum"].as_array().into_iter().flatten();
        !values.filter_map(Value::as_str).all(|value| is_camel_case(value, u8::is_ascii_uppercase))
    }),
    ("References", is_a_misnamed_reference),
    // A number of seconds needs no parser.
    ("Durations", is_a_misnamed_duration),
    // `kubectl explain` shows it.
    ("Documented", |node| !node.field.is_empty() && description(node).trim().is_empty()),
    // Argo CD would show a permanent difference.
    ("NoDefaultInListItem", |node| node.in_list && node.schema.get("default").is_some()),
    ("OptionalIsNotRequired", |node| {
        let optional = node.schema.get("default").is_some() || description(node).contains("Absent:");
        node.required && optional
    }),
    // A null would be a second way to say nothing.
    ("NoNullable", |node| node.schema["nullable"] == true),
];

/// Convention, place (with a dot at its end: all below it), and why it is broken there.
const EXCEPTIONS: [(&str, &str, &str); 3] = [
    (
        "BoundedTexts",
        "status.",
        "Only the operator writes a status and cuts what is long; a bound could make a status that is not written at all.",
    ),
    (
        "BoundedNumbers",
        "spec.worker.tolerations[0].tolerationSeconds",
        "A Pod takes any number, and means something by a negative one.",
    ),
    ("CamelCaseValues", "spec.base.quantization", "`Q8_0` is the name that ggml gave the format."),
];

/// A schema and where it stands.
struct Node<'a> {
    /// `spec.lenses[0].name`; `*` for the values of a map.
    path: String,
    /// The field's name; empty for items, values and the object itself.
    field: &'a str,
    schema: &'a Value,
    required: bool,
    in_list: bool,
}

fn nodes(schema: &Value) -> Vec<Node<'_>> {
    fn collect<'a>(node: Node<'a>, all: &mut Vec<Node<'a>>) {
        let schema = node.schema;
        let required: Vec<&str> =
            schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let join =
            |name: &str| if node.path.is_empty() { name.into() } else { format!("{}.{name}", node.path) };
        for (field, schema) in schema["properties"].as_object().into_iter().flatten() {
            let required = required.contains(&field.as_str());
            collect(Node { path: join(field), field, schema, required, in_list: node.in_list }, all);
        }
        let inner =
            [("items", format!("{}[0]", node.path), true), ("additionalProperties", join("*"), node.in_list)];
        for (part, path, in_list) in inner {
            if schema[part].is_object() {
                collect(Node { path, field: "", schema: &schema[part], required: false, in_list }, all);
            }
        }
        all.push(node);
    }
    let mut all = Vec::new();
    collect(Node { path: String::new(), field: "", schema, required: false, in_list: false }, &mut all);
    all
}

fn description<'a>(node: &Node<'a>) -> &'a str {
    node.schema["description"].as_str().unwrap_or_default()
}

fn is_map_by_type(schema: &Value) -> bool {
    schema["x-kubernetes-list-type"] == "map" && schema["x-kubernetes-list-map-keys"] == json!(["type"])
}

fn is_camel_case(name: &str, first: fn(&u8) -> bool) -> bool {
    let bytes = name.as_bytes();
    bytes.first().is_some_and(first) && bytes.iter().all(u8::is_ascii_alphanumeric)
}

/// References end with `Ref` where they are objects, and with `Name` where they are texts.
fn is_a_misnamed_reference(node: &Node<'_>) -> bool {
    let of_a_reference = |name: &str| ["name", "namespace", "kind", "apiGroup", "key"].contains(&name);
    let says_which = node.schema["properties"]
        .as_object()
        .is_some_and(|fields| fields.contains_key("name") && fields.keys().all(|name| of_a_reference(name)));
    let is_object = says_which && !node.field.is_empty() && !node.field.ends_with("Ref");
    let mut rules = node.schema["x-kubernetes-validations"].as_array().into_iter().flatten();
    let names_one =
        rules.any(|rule| rule["message"].as_str().is_some_and(|m| m.contains(" is the name of a ")));
    let is_name = ["name", "namespace"].contains(&node.field) || node.field.ends_with("Name");
    is_object || (names_one && !is_name) || node.field.contains("Reference")
}

/// Durations are whole seconds and say so.
fn is_a_misnamed_duration(node: &Node<'_>) -> bool {
    let is_scalar = node.schema["type"] == "integer" || node.schema["type"] == "string";
    let speaks_of_time = ["second", "minute", "hour"].iter().any(|unit| description(node).contains(unit));
    let means_time = ["Timeout", "Interval", "Period", "Duration", "Delay", "Deadline", "Ttl"];
    let named_so = means_time.iter().any(|word| node.field.ends_with(word));
    let in_spec = node.path.starts_with("spec.") && !node.field.is_empty();
    in_spec && is_scalar && (speaks_of_time || named_so) && !node.field.ends_with("Seconds")
}

fn covers(exception: &str, path: &str) -> bool {
    path == exception || (exception.ends_with('.') && path.starts_with(exception))
}

/// Convention and place of all that is broken, exceptions too.
fn broken(schema: &Value) -> Vec<(&'static str, String)> {
    let all = nodes(schema);
    let by = |(name, is_broken): Convention| {
        let broken = all.iter().filter(move |node| is_broken(node));
        broken.map(move |node| (name, node.path.clone()))
    };
    CONVENTIONS.into_iter().flat_map(by).collect()
}

#[test]
fn both_kinds_keep_the_conventions() {
    let mut unexcused = Vec::new();
    for kind in kinds() {
        for (name, path) in broken(&kind.schema()) {
            if !EXCEPTIONS.iter().any(|(of, place, _)| *of == name && covers(place, &path)) {
                unexcused.push(format!("{name}: {} {path}", kind.name()));
            }
        }
    }
    unexcused.sort();
    assert!(unexcused.is_empty(), "{} places break a convention:\n{}", unexcused.len(), unexcused.join("\n"));
}

#[test]
fn every_exception_is_needed() {
    let all: Vec<_> = kinds().iter().flat_map(|kind| broken(&kind.schema())).collect();
    for (of, place, why) in EXCEPTIONS {
        assert!(
            all.iter().any(|(name, path)| *name == of && covers(place, path)),
            "{of} {place} is kept: {why}"
        );
    }
}

#[test]
fn conditions_come_first_in_a_status() {
    let condition = json!({
        "type": "Ready", "status": "True", "reason": "Serving", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z",
    });
    let status = json!({"observedGeneration": 1, "conditions": [condition]});
    let group: ModelGroupStatus = serde_json::from_value(status.clone()).unwrap();
    let placement: ModelPlacementStatus = serde_json::from_value(status).unwrap();
    for text in [serde_json::to_string(&group), serde_json::to_string(&placement)] {
        let text = text.unwrap();
        assert!(text.starts_with(r#"{"conditions":"#), "{text}");
    }
}

#[test]
fn each_convention_finds_what_it_is_for() {
    let list =
        |items: Value| json!({"type": "array", "maxItems": 1, "description": "A list.", "items": items});
    let named = json!({"type": "string", "maxLength": 1, "description": "Its name."});
    let examples = [
        ("Conditions", "conditions", list(json!({"type": "object"}))),
        ("NoPhase", "phase", json!({"type": "string"})),
        ("NoBooleans", "enabled", json!({"type": "boolean"})),
        ("NoFloats", "share", json!({"type": "number"})),
        ("SizedIntegers", "count", json!({"type": "integer", "minimum": 0, "maximum": 1})),
        ("BoundedNumbers", "count", json!({"type": "integer", "format": "int32", "minimum": 0})),
        ("BoundedTexts", "text", json!({"type": "string"})),
        ("BoundedLists", "list", json!({"type": "array"})),
        (
            "BoundedMaps",
            "map",
            json!({"type": "object", "additionalProperties": {"type": "string", "maxLength": 1}}),
        ),
        ("CamelCaseFields", "some-text", json!({"type": "string"})),
        ("CamelCaseValues", "mode", json!({"type": "string", "enum": ["Manual", "on_demand"]})),
        ("References", "group", json!({"type": "object", "properties": {"name": named.clone()}})),
        (
            "References",
            "secret",
            json!({"type": "string", "x-kubernetes-validations": [{"rule": "true", "message": "secret is the name of a Secret"}]}),
        ),
        ("Durations", "hold", json!({"type": "integer", "description": "How long, in seconds."})),
        ("Durations", "holdTimeout", json!({"type": "string"})),
        ("Documented", "text", json!({"type": "string", "description": " "})),
        (
            "NoDefaultInListItem",
            "list",
            list(json!({"type": "object", "properties": {"name": {"default": "a"}}})),
        ),
        ("OptionalIsNotRequired", "text", json!({"type": "string", "default": "a"})),
        ("NoNullable", "text", json!({"type": "string", "nullable": true})),
    ];
    for (name, field, schema) in &examples {
        let schema = json!({"properties": {"spec": {"required": [field], "properties": {(*field): schema}}}});
        let found = broken(&schema);
        assert!(
            found.iter().any(|(of, path)| of == name && path.starts_with(&format!("spec.{field}"))),
            "{name}: {found:?}"
        );
    }
    for (name, _) in CONVENTIONS {
        assert!(examples.iter().any(|(of, _, _)| *of == name), "{name} has no example");
    }
}
