//! The objects of the demo: the samples of the repository, and what makes their files reachable.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

/// Name of the Helm release.
pub const RELEASE: &str = "turret";
/// What carries this label was made by the demo, on a cluster that is not its own.
pub const MARK: &str = "demo.turret.dev/made";
/// The CustomResourceDefinitions that come with the chart.
pub const DEFINITIONS: [&str; 2] = ["modelgroups.turret.dev", "modelplacements.turret.dev"];
/// Name of the pod that files are copied through.
pub const LOADER: &str = "turret-demo-loader";
/// Name of the pod that writes the large base.
pub const SYNTHESISER: &str = "turret-demo-synth";
/// The user that workers run as.
const USER: u32 = 65532;

/// The samples' documents, with their namespace set.
pub struct Samples(pub Vec<Value>);

impl Samples {
    /// Reads a file of YAML documents.
    pub fn read(path: &Path, namespace: &str) -> Result<Samples> {
        use serde::Deserialize;
        let text =
            std::fs::read_to_string(path).with_context(|| format!("failed to read `{}`", path.display()))?;
        let mut documents = Vec::new();
        for document in serde_yaml::Deserializer::from_str(&text) {
            let mut value =
                Value::deserialize(document).with_context(|| format!("`{}` is no YAML", path.display()))?;
            if value.is_object() {
                value["metadata"]["namespace"] = namespace.into();
                documents.push(value);
            }
        }
        ensure!(!documents.is_empty(), "`{}` has no document", path.display());
        Ok(Samples(documents))
    }

    /// The documents of one kind.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter(move |document| document["kind"] == kind)
    }

    /// Every model with the folder its answers come from: `group` and `group:lens`, and the path behind
    /// `pvc://VOLUME/`.
    pub fn models(&self) -> Vec<(String, String)> {
        let folder = |source: &Value| {
            let uri = source["uri"].as_str().unwrap_or_default();
            let path =
                uri.strip_prefix("pvc://").and_then(|rest| rest.split_once('/')).map_or("", |(_, path)| path);
            path.to_owned()
        };
        let mut models = Vec::new();
        for group in self.of_kind("ModelGroup") {
            let name = group["metadata"]["name"].as_str().unwrap_or_default();
            models.push((name.to_owned(), folder(&group["spec"]["base"]["source"])));
            for lens in group["spec"]["lenses"].as_array().into_iter().flatten() {
                let lens_name = lens["name"].as_str().unwrap_or_default();
                models.push((format!("{name}:{lens_name}"), folder(&lens["source"])));
            }
        }
        models
    }

    /// A copy without one lens.
    pub fn without(&self, model: &str) -> Samples {
        let (group, lens) = model.split_once(':').unwrap_or((model, ""));
        let mut documents = self.0.clone();
        for document in &mut documents {
            if document["kind"] == "ModelGroup"
                && document["metadata"]["name"] == group
                && let Some(lenses) = document["spec"]["lenses"].as_array_mut()
            {
                lenses.retain(|l| l["name"] != lens);
            }
        }
        Samples(documents)
    }

    /// Makes them fit a cluster that is not the demo's own: marked, computed on the CPU, without accelerators, with their
    /// files on `claim`; on `node`, where only that can mount it; with so many workers, where that matters.
    pub fn for_existing(&mut self, claim: &str, node: Option<&str>, replicas: Option<u32>) {
        for document in &mut self.0 {
            *document = marked(document.take());
            let spec = &mut document["spec"];
            for volume in spec["sourceVolumes"].as_array_mut().into_iter().flatten() {
                volume["persistentVolumeClaim"]["claimName"] = claim.into();
            }
            if document["kind"] != "ModelPlacement" {
                continue;
            }
            let spec = document["spec"].as_object_mut().expect("a placement has a spec");
            spec.remove("accelerator");
            if let Some(replicas) = replicas {
                spec.insert("replicas".into(), replicas.into());
            }
            if let Some(node) = node {
                spec.entry("worker").or_insert_with(|| json!({}))["nodeSelector"] =
                    json!({"kubernetes.io/hostname": node});
            }
        }
    }

    /// As one file for `kubectl apply -f -`.
    pub fn to_json(&self) -> String {
        json!({"apiVersion": "v1", "kind": "List", "items": self.0}).to_string()
    }
}

/// A namespace under the strictest pod security there is.
pub fn namespace(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    })
}

/// The object, marked as the demo's.
pub fn marked(mut object: Value) -> Value {
    object["metadata"]["labels"][MARK] = "true".into();
    object
}

/// A claim of a cluster's storage.
pub fn claim(namespace: &str, name: &str, size: &str, class: Option<&str>) -> Value {
    let mut claim = json!({
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": size}}},
    });
    if let Some(class) = class {
        claim["spec"]["storageClassName"] = class.into();
    }
    claim
}

/// A pod of the demo's own with the claim at `/files`, under restricted pod security, as the user that workers run as:
/// what it writes they can read.
fn pod(namespace: &str, name: &str, claim: &str, container: Value) -> Value {
    let mut container = container;
    container["name"] = "main".into();
    container["volumeMounts"] = json!([{"name": "files", "mountPath": "/files"}]);
    container["securityContext"] =
        json!({"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}});
    marked(json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": false,
            "securityContext": {
                "runAsNonRoot": true, "runAsUser": USER, "runAsGroup": USER, "fsGroup": USER,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "files", "persistentVolumeClaim": {"claimName": claim}}],
        },
    }))
}

/// A pod that waits for files to be copied into it.
pub fn loader(namespace: &str, claim: &str, image: &str) -> Value {
    pod(namespace, LOADER, claim, json!({"image": image, "command": ["sleep", "3600"]}))
}

/// A pod that writes the large base with the worker's own program, on the node that has the claim.
pub fn synthesiser(namespace: &str, claim: &str, image: &str, node: &str, bytes: &str) -> Value {
    let container = json!({"image": image, "args": synth("/files/large", bytes)});
    let mut pod = pod(namespace, SYNTHESISER, claim, container);
    pod["spec"]["nodeSelector"] = json!({"kubernetes.io/hostname": node});
    pod
}

/// The words for `turret-worker` that write the large base and its two lenses into `folder`.
pub fn synth(folder: &str, bytes: &str) -> Vec<String> {
    ["synth", folder, "--bytes", bytes, "--lens", "one:64", "--lens", "two:64"].map(str::to_owned).to_vec()
}

/// A claim for the demo's files and the volume behind it: a folder of the local node.
pub fn local_volume(namespace: &str, claim: &str, folder: &Path) -> [Value; 2] {
    let volume = format!("{namespace}-{claim}");
    [
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {
                "capacity": {"storage": "16Gi"},
                "accessModes": ["ReadOnlyMany"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": "",
                "hostPath": {"path": folder, "type": "Directory"},
                "claimRef": {"namespace": namespace, "name": claim},
            },
        }),
        json!({
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": namespace},
            "spec": {
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "volumeName": volume,
                "resources": {"requests": {"storage": "16Gi"}},
            },
        }),
    ]
}

/// The synthesised group and a worker of its own beside a small base, so that a switch moves a gigabyte.
pub fn large(namespace: &str, volume: &str, small: &Value) -> Samples {
    let lens =
        |name: &str| json!({"name": name, "source": {"uri": format!("pvc://{volume}/large/lenses/{name}")}});
    let small_name = &small["metadata"]["name"];
    Samples(vec![
        json!({
            "apiVersion": "turret.dev/v1alpha1",
            "kind": "ModelGroup",
            "metadata": {"name": "large", "namespace": namespace},
            "spec": {
                "base": {"source": {"uri": format!("pvc://{volume}/large/base")}},
                "lenses": [lens("one"), lens("two")],
            },
        }),
        json!({
            "apiVersion": "turret.dev/v1alpha1",
            "kind": "ModelPlacement",
            "metadata": {"name": "large", "namespace": namespace},
            "spec": {
                "groups": [{"name": small_name}, {"name": "large"}],
                "defaultGroupName": small_name,
                "accelerator": {"resourceName": "nvidia.com/gpu"},
                "memory": {"deviceBudget": "3Gi", "lensBudget": "128Mi"},
                "batching": {"maxContextTokens": 512},
                "sourceVolumes": [{"name": volume, "persistentVolumeClaim": {"claimName": volume}}],
                "terminationDrainSeconds": 5,
                "worker": {"env": [{"name": "TURRET_DEVICE", "value": "cpu"}]},
            },
        }),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Samples {
        let lens = |name: &str| json!({"name": name, "source": {"uri": format!("pvc://v/lenses/{name}")}});
        Samples(vec![
            json!({"kind": "ModelGroup", "metadata": {"name": "a"},
                   "spec": {"base": {"source": {"uri": "pvc://v/base"}}, "lenses": [lens("x"), lens("y")]}}),
            json!({"kind": "ModelPlacement", "metadata": {"name": "p"}, "spec": {}}),
        ])
    }

    #[test]
    fn models_are_the_bases_and_every_lens_with_their_folders() {
        let names: Vec<_> = samples().models();
        let wanted = [("a", "base"), ("a:x", "lenses/x"), ("a:y", "lenses/y")];
        assert_eq!(names, wanted.map(|(m, p)| (m.to_owned(), p.to_owned())));
    }

    #[test]
    fn for_a_cluster_that_exists_they_are_marked_and_ask_for_no_accelerator() {
        let file = crate::folders::repository().join("manifests/samples/demo-family.yaml");
        let mut samples = Samples::read(&file, "mine").unwrap();
        samples.for_existing("shelf", Some("node-1"), Some(1));
        for document in &samples.0 {
            assert_eq!(document["metadata"]["labels"][MARK], "true");
        }
        let spec = &samples.of_kind("ModelPlacement").next().unwrap()["spec"];
        assert_eq!((&spec["accelerator"], &spec["replicas"]), (&Value::Null, &json!(1)));
        assert_eq!(spec["sourceVolumes"][0]["name"], "lenses", "sources go on naming the volume");
        assert_eq!(spec["sourceVolumes"][0]["persistentVolumeClaim"]["claimName"], "shelf");
        assert_eq!(spec["worker"]["nodeSelector"]["kubernetes.io/hostname"], "node-1");
        assert_eq!(spec["worker"]["env"][0]["value"], "cpu");
    }

    #[test]
    fn one_lens_can_be_left_out() {
        let names: Vec<_> = samples().without("a:x").models().into_iter().map(|(m, _)| m).collect();
        assert_eq!(names, ["a", "a:y"]);
    }
}
