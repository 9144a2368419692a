//! Builders of the objects a scenario applies, read as prose.

use serde_json::{Value, json};
use turret_crds::label::{ENV_DEVICE, SECRET_KEY};

/// A `ModelGroup` in the making.
#[derive(Clone, Debug)]
pub struct Group {
    name: String,
    base: Value,
    lenses: Vec<Value>,
    aliases: Vec<Value>,
}

/// A group called `name` over a folder of the volume `models`, computed in F32.
pub fn group(name: &str, base_folder: &str) -> Group {
    let base = json!({"source": {"uri": format!("pvc://models/{base_folder}")}, "dtype": "F32"});
    Group { name: name.into(), base, lenses: Vec::new(), aliases: Vec::new() }
}

impl Group {
    /// With a lens from a folder of the volume `models`; one of the same name is replaced.
    pub fn lens(self, name: &str, folder: &str) -> Self {
        self.lens_at(name, &format!("pvc://models/{folder}"), None)
    }

    /// With a lens whose digest is declared.
    pub fn lens_of_digest(self, name: &str, folder: &str, digest: &str) -> Self {
        self.lens_at(name, &format!("pvc://models/{folder}"), Some(digest))
    }

    /// With a lens from anywhere.
    pub fn lens_at(self, name: &str, uri: &str, digest: Option<&str>) -> Self {
        let mut source = json!({"uri": uri});
        if let Some(digest) = digest {
            source["digest"] = json!(digest);
        }
        self.lens_of(name, source)
    }

    /// With a lens of a source with all its fields.
    pub fn lens_of(mut self, name: &str, source: Value) -> Self {
        self = self.without(name);
        self.lenses.push(json!({"name": name, "source": source}));
        self
    }

    /// With an alias of a lens.
    pub fn alias(mut self, name: &str, lens: &str) -> Self {
        self.aliases.push(json!({"name": name, "targets": [{"lensName": lens}]}));
        self
    }

    /// With all of its lenses kept on the disk.
    pub fn cached(mut self) -> Self {
        for lens in &mut self.lenses {
            lens["residency"] = json!("Cached");
        }
        self
    }

    /// With all of its lenses in memory ahead of requests.
    pub fn preloaded(mut self) -> Self {
        for lens in &mut self.lenses {
            lens["residency"] = json!("Preloaded");
        }
        self
    }

    /// Without a lens.
    pub fn without(mut self, name: &str) -> Self {
        self.lenses.retain(|lens| lens["name"] != name);
        self
    }

    /// The object.
    pub fn manifest(&self) -> Value {
        json!({
            "apiVersion": "turret.dev/v1alpha1",
            "kind": "ModelGroup",
            "metadata": {"name": self.name},
            "spec": {"base": self.base, "lenses": self.lenses, "aliases": self.aliases},
        })
    }
}

/// A `ModelPlacement` in the making.
#[derive(Clone, Debug)]
pub struct Placement {
    name: String,
    spec: Value,
}

/// A placement of these groups on one CPU worker, with the volume `models`.
pub fn placement(name: &str, groups: &[&str]) -> Placement {
    let groups: Vec<_> = groups.iter().map(|name| json!({"name": name})).collect();
    let spec = json!({
        "groups": groups,
        "replicas": 1,
        "memory": {"deviceBudget": "192Mi", "diskBudget": "64Mi"},
        "sourceVolumes": [{"name": "models", "persistentVolumeClaim": {"claimName": "models"}}],
        "terminationDrainSeconds": 5,
        "worker": {"resources": {
            "requests": {"cpu": "50m", "memory": "128Mi"},
            "limits": {"cpu": "1", "memory": "512Mi"},
        }},
    });
    Placement { name: name.into(), spec }
}

impl Placement {
    /// With a group of another namespace, by its own name.
    pub fn group_of(mut self, namespace: &str, name: &str) -> Self {
        let placed = json!({"name": name, "groupRef": {"name": name, "namespace": namespace}});
        self.spec["groups"].as_array_mut().expect("a placement lists groups").push(placed);
        self
    }

    /// On so many workers.
    pub fn replicas(mut self, count: u32) -> Self {
        self.spec["replicas"] = json!(count);
        self
    }

    /// On as many workers as the load takes, within these limits.
    pub fn autoscaled(mut self, limits: Value) -> Self {
        self.spec["autoscaling"] = limits;
        self
    }

    /// Each worker asks for an accelerator.
    pub fn on_gpu(mut self) -> Self {
        self.spec["accelerator"] = json!({"resourceName": "nvidia.com/gpu"});
        self
    }

    /// Each worker asks for a device of a class.
    pub fn with_device_class(mut self, class: &str) -> Self {
        self.spec["accelerator"] = json!({"deviceClassName": class});
        self
    }

    /// Workers keep what they fetch on a claim.
    pub fn caching_on(mut self, claim: &str) -> Self {
        self.spec["cache"] = json!({"persistentVolumeClaim": {"claimName": claim}});
        self
    }

    /// Each worker is told to compute on the CPU, whatever it was given.
    pub fn computing_on_cpu(self) -> Self {
        self.with_variable(ENV_DEVICE, "cpu")
    }

    /// Each worker asks this hub.
    pub fn asking_hub(self, endpoint: &str) -> Self {
        self.with_variable("HF_ENDPOINT", endpoint)
    }

    fn with_variable(mut self, name: &str, value: &str) -> Self {
        let env = &mut self.spec["worker"]["env"];
        if env.is_null() {
            *env = json!([]);
        }
        env.as_array_mut().expect("variables are a list").push(json!({"name": name, "value": value}));
        self
    }

    /// Sources may name this Secret.
    pub fn with_secret(mut self, name: &str) -> Self {
        self.spec["sourceSecrets"] = json!([{"name": name}]);
        self
    }

    /// Bases take turns as soon as somebody waits.
    pub fn switching_eagerly(mut self) -> Self {
        self.spec["switching"] = json!({"minHoldSeconds": 0, "maxWaitSeconds": 0});
        self
    }

    /// Rows of a base that leaves may go on for so long.
    pub fn draining_bases_for(mut self, seconds: u32) -> Self {
        self.spec["switching"]["drainSeconds"] = json!(seconds);
        self
    }

    /// Workers that leave may go on for so long. Another value replaces the pods.
    pub fn draining_for(mut self, seconds: u32) -> Self {
        self.spec["terminationDrainSeconds"] = json!(seconds);
        self
    }

    /// One lens is assigned to so many workers, at least and at most.
    pub fn spreading(mut self, min_copies: u32, max_copies: u32) -> Self {
        self.spec["spread"] = json!({"minCopies": min_copies, "maxCopies": max_copies});
        self
    }

    /// With another budget of device memory.
    pub fn with_device_budget(mut self, budget: &str) -> Self {
        self.spec["memory"]["deviceBudget"] = json!(budget);
        self
    }

    /// With another part of it for lenses.
    pub fn with_lens_budget(mut self, budget: &str) -> Self {
        self.spec["memory"]["lensBudget"] = json!(budget);
        self
    }

    /// With another budget for files that are fetched. Another value replaces the pods.
    pub fn with_disk_budget(mut self, budget: &str) -> Self {
        self.spec["memory"]["diskBudget"] = json!(budget);
        self
    }

    /// Each base of the demo family takes about 6 MB in F32 and some for its KV cache: one fits beside the lenses.
    pub fn with_room_for_one_base(mut self) -> Self {
        self.spec["memory"] = json!({"deviceBudget": "14Mi", "lensBudget": "4Mi"});
        self.spec["batching"] =
            json!({"maxContextTokens": 128, "maxRunningRows": 4, "prefillChunkTokens": 64});
        self
    }

    /// Each worker is given so much memory, and asks for all of it.
    pub fn asking_for_memory(mut self, bytes: u64) -> Self {
        for kind in ["requests", "limits"] {
            self.spec["worker"]["resources"][kind]["memory"] = json!(bytes.to_string());
        }
        self
    }

    /// With one more volume, the claim of the same name.
    pub fn volume(mut self, name: &str) -> Self {
        let volume = json!({"name": name, "persistentVolumeClaim": {"claimName": name}});
        self.spec["sourceVolumes"].as_array_mut().expect("a placement lists volumes").push(volume);
        self
    }

    /// The object.
    pub fn manifest(&self) -> Value {
        json!({
            "apiVersion": "turret.dev/v1alpha1",
            "kind": "ModelPlacement",
            "metadata": {"name": self.name},
            "spec": self.spec,
        })
    }
}

/// A Secret with what the server of a source is shown.
pub fn token_secret(name: &str, token: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "stringData": {SECRET_KEY: token},
    })
}

/// Label of the namespaces of scenarios.
pub const SCENARIO: &str = "turret.test/scenario";

/// A namespace that admits only what Pod Security `restricted` admits.
pub fn restricted_namespace(name: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
    })
}

/// The namespace of a scenario.
pub fn scenario_namespace(name: &str) -> Value {
    let mut namespace = restricted_namespace(name);
    namespace["metadata"]["labels"][SCENARIO] = json!("true");
    namespace
}

/// A claim called `claim` in `namespace` and the volume that fulfils it with a folder of the node.
pub fn folder_as_claim(namespace: &str, claim: &str, folder: &std::path::Path) -> Value {
    let volume = format!("{namespace}-{claim}");
    let size = json!({"storage": "1Gi"});
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {
                "capacity": size,
                "accessModes": ["ReadOnlyMany"],
                "persistentVolumeReclaimPolicy": "Retain",
                "storageClassName": "",
                "claimRef": {"namespace": namespace, "name": claim},
                "hostPath": {"path": folder, "type": "Directory"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim, "namespace": namespace},
            "spec": {
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "volumeName": volume,
                "resources": {"requests": size},
            },
        },
    ]})
}

#[cfg(test)]
mod tests {
    use super::*;
    use turret_crds::{ModelGroup, ModelPlacement};

    #[test]
    fn builders_make_objects_of_the_contract() {
        let manifest =
            group("a", "base").lens("x", "lenses/x").lens_of_digest("x", "y", "sha256:0").manifest();
        let made: ModelGroup = serde_json::from_value(manifest).unwrap();
        assert_eq!(made.spec.lenses.len(), 1, "a lens of the same name is replaced");
        assert_eq!(made.spec.lenses[0].source.digest.as_deref(), Some("sha256:0"));
        let made: ModelGroup =
            serde_json::from_value(group("a", "base").lens("x", "y").alias("z", "x").manifest()).unwrap();
        assert_eq!(made.spec.aliases[0].targets[0].lens_name, "x");
        let manifest = placement("p", &["a"]).replicas(2).on_gpu().computing_on_cpu().volume("v").manifest();
        let made: ModelPlacement = serde_json::from_value(manifest).unwrap();
        assert_eq!((made.spec.replicas, made.spec.source_volumes.len()), (2, 2));
        assert_eq!(made.spec.worker.unwrap().env[0].name, "TURRET_DEVICE");
        let workers = placement("p", &["a"]).computing_on_cpu().asking_hub("http://h").with_secret("s");
        let made: ModelPlacement =
            serde_json::from_value(workers.with_lens_budget("1Mi").manifest()).unwrap();
        assert_eq!((made.spec.worker.unwrap().env.len(), made.spec.source_secrets.len()), (2, 1));
        assert_eq!(made.spec.memory.unwrap().lens_budget.unwrap().0, "1Mi");
        let made: ModelPlacement =
            serde_json::from_value(placement("p", &["a"]).spreading(1, 2).manifest()).unwrap();
        assert_eq!(made.spec.spread().max_copies, 2);
    }
}
