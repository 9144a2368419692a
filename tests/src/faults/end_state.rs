//! What there is in a namespace, in words that are the same in every run: without UIDs, versions, times and made-up names, but
//! with what they must agree on. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};
use turret_crds::{WorkerDocument, WorkerReport, label};

/// Annotations whose values are hashes over UIDs.
const HASHES: [&str; 2] = ["turret.dev/applied", "turret.dev/pod-shape"];
/// Annotation of a pod template: hash of itself.
const TEMPLATE: &str = "turret.dev/pod-template";
/// Kinds whose objects have made-up names.
const UNNAMED: [&str; 2] = ["Pod", "ReplicaSet"];
/// What is refreshed at most once a minute says how fast a run was.
const SUMMARIES: [&str; 3] = ["activeSummary", "deviceMemorySummary", "summarizedAt"];

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// The namespace.
    pub namespace: String,
    /// Its objects, each with its `kind`.
    pub objects: Vec<Value>,
    /// What its workers say.
    pub workers: Vec<WorkerReport>,
}

/// The same in words that two runs have in common.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EndState {
    /// By `Kind/name`, or `Kind/number` where names are made up.
    pub objects: BTreeMap<String, Value>,
    /// UIDs of the pods, which no two runs have in common.
    pub pods: BTreeSet<String>,
}

impl EndState {
    /// Of what was found.
    pub fn of(found: &Found) -> Self {
        let words = Words::of(found);
        let mut objects = BTreeMap::new();
        let mut unnamed: BTreeMap<String, Vec<Value>> = BTreeMap::new();
        for object in &found.objects {
            let kind = text(&object["kind"]);
            let mut reduced = reduce(kind, object, &words);
            words.replace(&mut reduced);
            if UNNAMED.contains(&kind) {
                unnamed.entry(kind.to_owned()).or_default().push(reduced);
            } else {
                objects.insert(format!("{kind}/{}", text(&object["metadata"]["name"])), reduced);
            }
        }
        for report in &found.workers {
            let mut reduced = worker(report, &words);
            words.replace(&mut reduced);
            unnamed.entry("worker".into()).or_default().push(reduced);
        }
        for (kind, mut all) in unnamed {
            all.sort_by_key(Value::to_string);
            objects.extend((1..).zip(all).map(|(number, object)| (format!("{kind}/{number}"), object)));
        }
        let pods = found.objects.iter().filter(|object| object["kind"] == "Pod");
        let pods = pods.map(|pod| text(&pod["metadata"]["uid"]).to_owned()).collect();
        Self { objects, pods }
    }

    /// How many objects of a kind there are.
    pub fn count(&self, kind: &str) -> usize {
        self.objects.keys().filter(|name| name.split_once('/').is_some_and(|(of, _)| of == kind)).count()
    }

    /// Where this differs from what is expected, in words; empty where it does not.
    pub fn differences(&self, expected: &Self) -> Vec<String> {
        let names: BTreeSet<_> = expected.objects.keys().chain(self.objects.keys()).collect();
        let mut found = Vec::new();
        for name in names {
            match (expected.objects.get(name), self.objects.get(name)) {
                (Some(expected), Some(is)) => differences(expected, is, name, &mut found),
                (Some(_), None) => found.push(format!("{name} is missing")),
                (None, Some(is)) => found.push(format!("{name} should not be there: {is}")),
                (None, None) => {}
            }
        }
        found
    }
}

fn differences(expected: &Value, is: &Value, path: &str, found: &mut Vec<String>) {
    match (expected, is) {
        (Value::Object(expected), Value::Object(is)) => {
            let fields: BTreeSet<_> = expected.keys().chain(is.keys()).collect();
            for field in fields {
                let (expected, is) = (expected.get(field), is.get(field));
                let nothing = &Value::Null;
                let path = format!("{path}.{field}");
                differences(expected.unwrap_or(nothing), is.unwrap_or(nothing), &path, found);
            }
        }
        (Value::Array(expected), Value::Array(is)) if expected.len() == is.len() => {
            for (number, (expected, is)) in expected.iter().zip(is).enumerate() {
                differences(expected, is, &format!("{path}[{number}]"), found);
            }
        }
        _ if expected != is => found.push(format!("{path}: expected {expected}, found {is}")),
        _ => {}
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// What is called otherwise in every run, and a word for it.
struct Words {
    /// The longest first, so that none is taken for a part of another.
    words: Vec<(String, String)>,
    /// Sequence of the stored document of each placement.
    sequences: BTreeMap<String, u64>,
}

impl Words {
    fn of(found: &Found) -> Self {
        let mut words = vec![(found.namespace.clone(), "<namespace>".to_owned())];
        let mut sequences = BTreeMap::new();
        for object in &found.objects {
            let (kind, metadata) = (text(&object["kind"]), &object["metadata"]);
            let name = if UNNAMED.contains(&kind) { "" } else { text(&metadata["name"]) };
            words.push((text(&metadata["uid"]).to_owned(), format!("<uid of {kind} {name}>")));
            let annotations = &metadata["annotations"];
            if let Some(digest) = annotations[label::DOCUMENT_DIGEST].as_str() {
                words.push((digest.to_owned(), format!("<digest of {name}>")));
            }
            if let Some(sequence) = annotations[label::DOCUMENT_SEQUENCE].as_str() {
                let placement = text(&metadata["labels"][label::PLACEMENT]).to_owned();
                sequences.extend(sequence.parse::<u64>().ok().map(|sequence| (placement, sequence)));
            }
            let template = &object["spec"]["template"]["metadata"]["annotations"][TEMPLATE];
            if let (Some(template), "Deployment") = (template.as_str(), kind) {
                words.push((template.to_owned(), format!("<template of {name}>")));
            }
        }
        words.retain(|(from, _)| !from.is_empty());
        words.sort_by_key(|(from, _)| std::cmp::Reverse(from.len()));
        Self { words, sequences }
    }

    fn replace(&self, value: &mut Value) {
        match value {
            Value::Object(fields) => fields.values_mut().for_each(|field| self.replace(field)),
            Value::Array(items) => items.iter_mut().for_each(|item| self.replace(item)),
            Value::String(text) => {
                for (from, to) in &self.words {
                    if text.contains(from.as_str()) {
                        *text = text.replace(from.as_str(), to);
                    }
                }
            }
            _ => {}
        }
    }

    /// A sequence as it is said, or a word for it where it is that of the stored document.
    fn sequence(&self, placement: &str, said: Option<u64>) -> Value {
        match (self.sequences.get(placement), said) {
            (Some(stored), Some(said)) if *stored == said => "<sequence>".into(),
            (_, said) => json!(said),
        }
    }
}

/// What matters of an object.
fn reduce(kind: &str, object: &Value, words: &Words) -> Value {
    let (metadata, spec, status) = (metadata(object), &object["spec"], &object["status"]);
    match kind {
        "ModelGroup" => json!({"metadata": metadata, "spec": spec, "status": conditioned(status)}),
        "ModelPlacement" => {
            let mut status = conditioned(status);
            if let Value::Object(fields) = &mut status {
                fields.retain(|field, _| !SUMMARIES.contains(&field.as_str()));
                let said = fields.get("documentSequence").and_then(Value::as_u64);
                let sequence = words.sequence(text(&object["metadata"]["name"]), said);
                fields.insert("documentSequence".into(), sequence);
            }
            json!({"metadata": metadata, "spec": spec, "status": status})
        }
        "ConfigMap" => json!({"metadata": metadata, "document": document(object, words)}),
        "Secret" => json!({"fields": object["data"].as_object().map(|data| data.keys().collect::<Vec<_>>())}),
        "Service" => json!({"metadata": metadata, "spec": without(spec, &["clusterIP", "clusterIPs"])}),
        "PodDisruptionBudget" => json!({"metadata": metadata, "spec": spec}),
        "Deployment" => {
            let of = ["replicas", "updatedReplicas", "readyReplicas", "availableReplicas"];
            let replicas = of.map(|of| &status[of]);
            json!({"metadata": metadata, "spec": spec, "replicas": replicas})
        }
        "ReplicaSet" => json!({"metadata": metadata, "replicas": spec["replicas"]}),
        "Pod" => {
            let conditions = status["conditions"].as_array().into_iter().flatten();
            let ready = conditions.into_iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
            json!({"metadata": metadata, "phase": status["phase"], "ready": ready})
        }
        // Who holds a Lease, and until when, is another thing in each run; that there is one is not.
        "Lease" => json!({}),
        _ => json!({"metadata": metadata, "spec": spec}),
    }
}

fn without(value: &Value, fields: &[&str]) -> Value {
    let mut rest = value.clone();
    if let Value::Object(all) = &mut rest {
        all.retain(|field, _| !fields.contains(&field.as_str()));
    }
    rest
}

/// Labels, annotations and owners; of our own kinds the generation too.
fn metadata(object: &Value) -> Value {
    let metadata = &object["metadata"];
    let mut annotations = metadata["annotations"].as_object().cloned().unwrap_or_default();
    annotations.retain(|name, _| !name.starts_with("deployment.kubernetes.io/"));
    for (name, value) in &mut annotations {
        if HASHES.contains(&name.as_str()) {
            *value = "<hash>".into();
        }
        if name == label::DOCUMENT_SEQUENCE {
            *value = "<sequence>".into();
        }
    }
    let labels = without(&metadata["labels"], &["pod-template-hash"]);
    let owners = metadata["ownerReferences"].as_array().into_iter().flatten();
    let owners: Vec<_> = owners.map(|owner| json!({"kind": owner["kind"], "uid": owner["uid"]})).collect();
    let mut reduced = json!({"labels": labels, "annotations": annotations, "owners": owners});
    if text(&object["kind"]).starts_with("Model") {
        reduced["generation"] = metadata["generation"].clone();
    }
    reduced
}

/// A status whose conditions are sorted and say nothing of times.
fn conditioned(status: &Value) -> Value {
    let mut status = status.clone();
    if let Some(conditions) = status.get_mut("conditions").and_then(Value::as_array_mut) {
        for condition in conditions.iter_mut() {
            *condition = without(condition, &["lastTransitionTime"]);
        }
        conditions.sort_by_key(|condition| text(&condition["type"]).to_owned());
    }
    status
}

/// The worker document in a ConfigMap. Public keys are another thing in each run; whose they are is not.
fn document(object: &Value, words: &Words) -> Value {
    let config_map = serde_json::from_value::<ConfigMap>(object.clone()).ok();
    let data = config_map.and_then(|config_map| config_map.binary_data?.remove(label::DOCUMENT_KEY));
    let Some(document) = data.and_then(|data| WorkerDocument::from_gzip(&data.0).ok()) else {
        return Value::Null;
    };
    let mut reduced = json!(document);
    reduced["sequence"] = words.sequence(&document.placement.name, Some(document.sequence));
    // Sorted by keys, which are others in each run.
    let mut scopes: Vec<Value> = document.public_keys.iter().map(|key| json!(key.scope)).collect();
    scopes.sort_by_key(Value::to_string);
    reduced["publicKeys"] = scopes.into();
    reduced["isSealed"] = (document.compute_digest() == document.digest).into();
    reduced
}

fn worker(report: &WorkerReport, words: &Words) -> Value {
    let applied = report.state.document.as_ref();
    let said = applied.map(|applied| applied.sequence);
    // One placement in a namespace: each worker is of it.
    let placement = words.sequences.keys().next().map(String::as_str).unwrap_or_default();
    let lenses: Vec<_> = report.lenses.iter().map(|lens| format!("{}:{}", lens.group, lens.name)).collect();
    json!({
        "sequence": words.sequence(placement, said),
        "digest": applied.map(|applied| &applied.digest),
        "ready": report.state.ready,
        "lenses": lenses,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::worker::report;
    use crate::worker::document::Family;

    /// A placement with its document, a pod and a worker, as one run may find them.
    fn run(tag: &str, sequence: u64) -> Found {
        let mut family = Family::default().group("g", "file:///base").lens("g", "a", "file:///a");
        let mut document = family.document();
        document.placement.uid = format!("uid-{tag}");
        document.sequence = sequence;
        document.digest = document.compute_digest();
        let placement = document.placement.name.clone();
        let owner = json!([{"kind": "ModelPlacement", "uid": format!("uid-{tag}"), "name": placement}]);
        let gzip = k8s_openapi::ByteString(document.to_gzip());
        let objects = vec![
            json!({
                "kind": "ModelPlacement",
                "metadata": {"name": placement, "namespace": tag, "uid": format!("uid-{tag}"), "generation": 2,
                             "resourceVersion": tag},
                "spec": {"replicas": 1},
                "status": {
                    "documentSequence": sequence, "summarizedAt": tag,
                    "conditions": [
                        {"type": "Ready", "status": "True", "lastTransitionTime": tag},
                        {"type": "Accepted", "status": "True", "message": format!("in {tag}")},
                    ],
                },
            }),
            json!({
                "kind": "ConfigMap",
                "metadata": {
                    "name": label::owned_name(&placement), "uid": format!("cm-{tag}"), "ownerReferences": owner,
                    "labels": {(label::PLACEMENT): placement},
                    "annotations": {
                        (label::DOCUMENT_SEQUENCE): sequence.to_string(),
                        (label::DOCUMENT_DIGEST): document.digest,
                        "turret.dev/applied": tag,
                    },
                },
                "binaryData": {(label::DOCUMENT_KEY): gzip},
            }),
            json!({
                "kind": "Pod",
                "metadata": {"name": format!("p-{tag}"), "uid": format!("pod-{tag}"), "ownerReferences": owner},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
            }),
        ];
        Found { namespace: tag.into(), objects, workers: vec![report("w", &document)] }
    }

    #[test]
    fn two_runs_that_came_to_the_same_end_do_not_differ() {
        let (one, other) = (EndState::of(&run("one", 1)), EndState::of(&run("other", 4)));
        assert_eq!(one.differences(&other), [""; 0]);
        assert_eq!(one.objects, other.objects);
        assert_ne!(one.pods, other.pods);
        assert_eq!((one.count("Pod"), one.count("worker"), one.count("Service")), (1, 1, 0));
        let names: Vec<_> = one.objects.keys().map(String::as_str).collect();
        assert_eq!(names, ["ConfigMap/turret-demo", "ModelPlacement/demo", "Pod/1", "worker/1"]);
    }

    #[test]
    fn what_does_not_agree_within_a_run_is_a_difference() {
        let expected = EndState::of(&run("one", 1));
        let differences = |change: &dyn Fn(&mut Found)| {
            let mut found = run("two", 3);
            change(&mut found);
            EndState::of(&found).differences(&expected).join("; ")
        };
        let of_status =
            differences(&|found: &mut Found| found.objects[0]["status"]["documentSequence"] = json!(2));
        assert_eq!(
            of_status,
            "ModelPlacement/demo.status.documentSequence: expected \"<sequence>\", found 2"
        );
        let of_worker = differences(&|found: &mut Found| {
            found.workers[0].state.document.as_mut().unwrap().digest = "sha256:old".into();
        });
        assert_eq!(of_worker, "worker/1.digest: expected \"<digest of turret-demo>\", found \"sha256:old\"");
        let of_owner = differences(&|found: &mut Found| {
            found.objects[2]["metadata"]["ownerReferences"][0]["uid"] = json!("of nobody");
        });
        assert!(
            of_owner.contains("expected \"<uid of ModelPlacement demo>\", found \"of nobody\""),
            "{of_owner}"
        );
        let gone = differences(&|found: &mut Found| drop(found.objects.pop()));
        assert_eq!(gone, "Pod/1 is missing");
        let more = differences(&|found: &mut Found| {
            found.objects.push(json!({"kind": "Service", "metadata": {"name": "s"}}))
        });
        assert!(more.starts_with("Service/s should not be there"), "{more}");
    }

    #[test]
    fn a_document_that_was_tampered_with_is_a_difference() {
        let mut found = run("one", 1);
        let expected = EndState::of(&found);
        let other = k8s_openapi::ByteString(Family::default().group("g", "file:///x").document().to_gzip());
        found.objects[1]["binaryData"][label::DOCUMENT_KEY] = json!(other);
        assert!(!EndState::of(&found).differences(&expected).is_empty());
    }
}
