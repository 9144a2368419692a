//! What the API server asks of every object's metadata.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::Value;

use super::print::quoted;
use super::{Cause, Refusal};

/// All fields of `metadata`.
pub(super) const FIELDS: [&str; 15] = [
    "annotations",
    "creationTimestamp",
    "deletionGracePeriodSeconds",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "labels",
    "managedFields",
    "name",
    "namespace",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

/// Most bytes of all annotations together, keys and values.
const ANNOTATIONS_BYTES: usize = 256 << 10;

/// Name, namespace, labels, annotations and finalizers. A namespace may be absent: the request has it then.
pub(super) fn check(object: &Value) -> Vec<Refusal> {
    let given = object.get("metadata").filter(|metadata| !metadata.is_null());
    let metadata = match given.map(|metadata| serde_json::from_value::<ObjectMeta>(metadata.clone())) {
        None => ObjectMeta::default(),
        Some(Ok(metadata)) => metadata,
        Some(Err(error)) => {
            return vec![Refusal::new(Cause::TypeInvalid, "metadata", None, &error.to_string())];
        }
    };
    let mut refusals = Vec::new();
    let mut refuse = |path: &str, value: &str, faults: Vec<String>| {
        let one = |fault: String| Refusal::new(Cause::Invalid, path, Some(quoted(value)), &fault);
        refusals.extend(faults.into_iter().map(one));
    };
    let name = metadata.name.as_deref().unwrap_or_default();
    if !name.is_empty() {
        refuse("metadata.name", name, subdomain_faults(name));
    }
    if let Some(namespace) = metadata.namespace.as_deref().filter(|namespace| !namespace.is_empty()) {
        refuse("metadata.namespace", namespace, label_faults(namespace));
    }
    for (key, value) in metadata.labels.iter().flatten() {
        refuse("metadata.labels", key, key_faults(key));
        refuse("metadata.labels", value, value_faults(value));
    }
    let annotations = metadata.annotations.unwrap_or_default();
    for key in annotations.keys() {
        refuse("metadata.annotations", key, key_faults(&key.to_lowercase()));
    }
    for finalizer in metadata.finalizers.iter().flatten() {
        refuse("metadata.finalizers", finalizer, key_faults(finalizer));
    }
    if name.is_empty() {
        refusals.push(Refusal::new(
            Cause::Required,
            "metadata.name",
            None,
            "name or generateName is required",
        ));
    }
    let bytes: usize = annotations.iter().map(|(key, value)| key.len() + value.len()).sum();
    if bytes > ANNOTATIONS_BYTES {
        let detail = format!("may not be more than {ANNOTATIONS_BYTES} bytes");
        refusals.push(Refusal::new(Cause::TooLong, "metadata.annotations", None, &detail));
    }
    refusals
}

const LABEL: &str = "[a-z0-9]([-a-z0-9]*[a-z0-9])?";
const KEY: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";

fn is_label(text: &str) -> bool {
    let edge = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    within(text, edge, |byte| edge(byte) || *byte == b'-')
}

fn is_subdomain(text: &str) -> bool {
    text.split('.').all(is_label)
}

fn is_key(text: &str) -> bool {
    within(text, u8::is_ascii_alphanumeric, |byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

/// Whether a text is not empty, has `edge` at both ends and `inner` everywhere.
fn within(text: &str, edge: impl Fn(&u8) -> bool, inner: impl Fn(&u8) -> bool) -> bool {
    let bytes = text.as_bytes();
    bytes.first().is_some_and(&edge) && bytes.last().is_some_and(&edge) && bytes.iter().all(inner)
}

/// Why a text is no DNS label.
fn label_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > 63 {
        faults.push("must be no more than 63 characters".to_owned());
    }
    if !is_label(text) && is_subdomain(text) {
        faults.push("must not contain dots".to_owned());
    } else if !is_label(text) {
        faults.push(format!(
            "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and \
             end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '{LABEL}')"
        ));
    }
    faults
}

/// Why a text is no DNS subdomain.
fn subdomain_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > 253 {
        faults.push("must be no more than 253 characters".to_owned());
    }
    if !is_subdomain(text) {
        faults.push(not_a_subdomain());
    }
    faults
}

fn not_a_subdomain() -> String {
    format!(
        "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start \
         and end with an alphanumeric character (e.g. 'example.com', regex used for validation is \
         '{LABEL}(\\.{LABEL})*')"
    )
}

/// Why a text is no key of a label or an annotation.
fn key_faults(text: &str) -> Vec<String> {
    let shape = format!(
        "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric \
         character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '{KEY}')"
    );
    let mut faults = Vec::new();
    let (prefix, name) = match text.split_once('/') {
        None => (None, text),
        Some((_, name)) if name.contains('/') => {
            return vec![format!(
                "a valid label key {shape} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
        Some((prefix, name)) => (Some(prefix), name),
    };
    match prefix {
        Some("") => faults.push("prefix part must be non-empty".to_owned()),
        Some(prefix) => {
            if prefix.len() > 253 {
                faults.push("prefix part must be no more than 253 bytes".to_owned());
            }
            if !is_subdomain(prefix) {
                faults.push(format!("prefix part {}", not_a_subdomain()));
            }
        }
        None => {}
    }
    if name.is_empty() {
        faults.push("name part must be non-empty".to_owned());
    } else if name.len() > 63 {
        faults.push("name part must be no more than 63 bytes".to_owned());
    }
    if !is_key(name) {
        faults.push(format!("name part {shape}"));
    }
    faults
}

/// Why a text is no value of a label.
fn value_faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if text.len() > 63 {
        faults.push("must be no more than 63 bytes".to_owned());
    }
    if !text.is_empty() && !is_key(text) {
        faults.push(format!(
            "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must \
             start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for \
             validation is '({KEY})?')"
        ));
    }
    faults
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(metadata: Value) -> Vec<String> {
        check(&json!({"metadata": metadata})).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ordinary_metadata_is_fine() {
        let metadata = json!({
            "name": "a.b-c",
            "namespace": "team-a",
            "labels": {"app.kubernetes.io/name": "x", "empty": ""},
            "annotations": {"Example.org/Any": "any \n text", "plain": ""},
            "finalizers": ["example.org/keep"],
            "creationTimestamp": null,
        });
        assert_eq!(said(metadata), Vec::<String>::new());
    }

    #[test]
    fn each_fault_is_named_in_the_words_of_the_api_server() {
        let name = "metadata.name: Invalid value: \"A\": a lowercase RFC 1123 subdomain must consist of lower case alphanumeric \
                    characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used \
                    for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
        assert_eq!(said(json!({"name": "A"})), [name]);
        assert_eq!(said(json!({})), ["metadata.name: Required value: name or generateName is required"]);
        assert_eq!(
            said(json!({"name": "a", "namespace": "a.b"})),
            ["metadata.namespace: Invalid value: \"a.b\": must not contain dots"]
        );
        for (metadata, expected) in [
            (json!({"name": "a", "labels": {"/x": "y"}}), "prefix part must be non-empty"),
            (json!({"name": "a", "labels": {"x/": "y"}}), "name part must be non-empty"),
            (json!({"name": "a", "labels": {"x": "no spaces"}}), "a valid label must be an empty string or"),
            (json!({"name": "a", "annotations": {"a/b/c": ""}}), "a valid label key must consist of"),
            (
                json!({"name": "a", "annotations": {"x": "y".repeat(ANNOTATIONS_BYTES)}}),
                "may not be more than 262144 bytes",
            ),
            (json!({"name": 5}), "metadata: Invalid value: "),
        ] {
            let said = said(metadata);
            assert!(!said.is_empty() && said[0].contains(expected), "{expected}: {said:?}");
        }
    }
}
