//! Examples for every rule and every bound of the CRDs.
//!
//! Read by two tests: `crds/tests/crd/cel.rs` tries rules and bounds without a cluster; the cluster
//! suite tries them on a real API server.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use serde::Deserialize;
use serde_json::{Map, Value, json};

mod bounds;
mod largest;

pub use bounds::bounds;
pub use largest::largest;

/// The examples of one kind.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Examples {
    /// The smallest valid object.
    pub smallest: Value,
    /// A valid object with every field set once, of fields that exclude each other one.
    pub complete: Value,
    /// Merge patches on it, each with a field that excludes one of its own.
    #[serde(default)]
    pub alternatives: Vec<Value>,
    /// Examples of each CEL rule.
    pub rules: Vec<RuleExamples>,
}

/// Examples of one CEL rule.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleExamples {
    /// The rule's message.
    pub message: String,
    /// Merge patches on the complete object that stay valid.
    pub valid: Vec<Value>,
    /// Merge patches on the complete object that break this rule.
    pub invalid: Vec<Value>,
}

/// A kind, its definition and its examples.
pub struct Kind {
    /// What `turret-operator crds` prints.
    pub crd: CustomResourceDefinition,
    /// Its examples.
    pub examples: Examples,
}

/// Both kinds.
pub fn kinds() -> Vec<Kind> {
    let tables = [include_str!("model_group.yaml"), include_str!("model_placement.yaml")];
    let read = |(crd, table): (_, &str)| {
        let examples: Examples = serde_yaml::from_str(table).expect("a table of examples");
        Kind { crd, examples }
    };
    turret_crds::crds().into_iter().zip(tables).map(read).collect()
}

impl Kind {
    /// `ModelGroup` or `ModelPlacement`.
    pub fn name(&self) -> &str {
        &self.crd.spec.names.kind
    }

    /// The schema of the served version.
    pub fn schema(&self) -> Value {
        let schema = self.crd.spec.versions[0].schema.as_ref().and_then(|s| s.open_api_v3_schema.as_ref());
        serde_json::to_value(schema.expect("a schema")).expect("a schema is JSON")
    }

    /// A merge patch, applied to the complete object.
    pub fn patched(&self, patch: &Value) -> Value {
        merged(self.examples.complete.clone(), patch)
    }

    /// The complete object and its alternatives: every field there is is set in one of them.
    pub fn complete(&self) -> Vec<Value> {
        let alternatives = self.examples.alternatives.iter().map(|patch| self.patched(patch));
        std::iter::once(self.examples.complete.clone()).chain(alternatives).collect()
    }

    /// Every valid object there is: smallest, complete, largest, the repository's samples and the
    /// valid examples of each rule.
    pub fn valid(&self) -> Vec<(String, Value)> {
        let mut all = vec![
            ("the smallest object".to_owned(), self.examples.smallest.clone()),
            ("the complete object".to_owned(), self.examples.complete.clone()),
            ("the largest object".to_owned(), largest(self.name())),
        ];
        all.extend(self.complete().into_iter().skip(1).map(|object| ("an alternative".to_owned(), object)));
        all.extend(samples().into_iter().filter(|(_, object)| object["kind"] == self.name()));
        for rule in &self.examples.rules {
            all.extend(
                rule.valid
                    .iter()
                    .map(|p| (format!("{p}, which rule «{}» allows", rule.message), self.patched(p))),
            );
        }
        all
    }

    /// Every invalid example with the message it must be refused with.
    pub fn invalid(&self) -> Vec<(String, Value)> {
        let one = |rule: &RuleExamples| -> Vec<_> {
            rule.invalid.iter().map(|p| (rule.message.clone(), self.patched(p))).collect()
        };
        self.examples.rules.iter().flat_map(one).collect()
    }
}

/// The objects in `manifests/samples`, each with the name of its file.
fn samples() -> Vec<(String, Value)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/samples");
    let mut files: Vec<_> = std::fs::read_dir(folder).expect("there are samples").flatten().collect();
    files.sort_by_key(std::fs::DirEntry::path);
    let mut all = Vec::new();
    for file in files {
        let text = std::fs::read_to_string(file.path()).expect("a sample is text");
        let documents = serde_yaml::Deserializer::from_str(&text);
        let read = documents.map(|d| Value::deserialize(d).expect("a sample is YAML"));
        all.extend(read.map(|object| (file.file_name().to_string_lossy().into_owned(), object)));
    }
    all
}

/// [RFC 7386](https://www.rfc-editor.org/rfc/rfc7386): null removes, objects merge, the rest replaces.
fn merged(target: Value, patch: &Value) -> Value {
    let Value::Object(patch) = patch else { return patch.clone() };
    let mut object = match target {
        Value::Object(object) => object,
        _ => Map::new(),
    };
    for (key, value) in patch {
        match value {
            Value::Null => drop(object.remove(key)),
            value => {
                let old = object.remove(key).unwrap_or(json!(null));
                object.insert(key.clone(), merged(old, value));
            }
        }
    }
    Value::Object(object)
}

/// Calls `visit` with every schema below `schema`, and where in an object it applies
/// (`spec.lenses[0].name`; `*` for the values of a map).
pub fn walk(schema: &Value, path: &str, visit: &mut impl FnMut(&str, &Value)) {
    visit(path, schema);
    let join = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    if let Some(properties) = schema["properties"].as_object() {
        properties.iter().for_each(|(name, child)| walk(child, &join(name), visit));
    }
    if schema["items"].is_object() {
        walk(&schema["items"], &format!("{path}[0]"), visit);
    }
    if schema["additionalProperties"].is_object() {
        walk(&schema["additionalProperties"], &join("*"), visit);
    }
}
