//! Worker documents for tests, compiled as the operator compiles them.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Value, json};
use turret_crds::document::{Previous, WorkerDocument, compile};
use turret_crds::token::PublicKey;
use turret_crds::{ModelGroup, ModelPlacement};

/// Groups and a placement on their way to a document.
#[derive(Clone, Debug)]
pub struct Family {
    groups: BTreeMap<String, Value>,
    /// How groups are placed, where that says more than their name.
    placed: BTreeMap<String, Value>,
    /// The placement's spec beside its groups.
    pub placement: Value,
    /// Keys whose tokens are accepted.
    pub public_keys: Vec<PublicKey>,
    sequence: u64,
}

/// A `file://` URI of a folder.
pub fn uri(folder: &Path) -> String {
    format!("file://{}", folder.display())
}

impl Default for Family {
    fn default() -> Self {
        let placement = json!({
            "memory": {"deviceBudget": "512Mi", "lensBudget": "64Mi"},
            "switching": {"minHoldSeconds": 0, "maxWaitSeconds": 0, "drainSeconds": 20},
            "admission": {"holdSeconds": 60},
        });
        Self {
            groups: BTreeMap::new(),
            placed: BTreeMap::new(),
            placement,
            public_keys: Vec::new(),
            sequence: 0,
        }
    }
}

impl Family {
    /// Adds a group over a base, computed in F32.
    pub fn group(self, name: &str, base_uri: &str) -> Self {
        self.group_of(name, json!({"uri": base_uri}))
    }

    /// The same, over a source with all its fields.
    pub fn group_of(mut self, name: &str, source: Value) -> Self {
        let base = json!({"source": source, "dtype": "F32"});
        self.groups.insert(name.into(), json!({"base": base, "lenses": []}));
        self
    }

    /// Has the placement say more of a group than its name.
    pub fn placed(mut self, group: &str, more: Value) -> Self {
        self.placed.insert(group.into(), more);
        self
    }

    /// Has a group's base held in Q8_0.
    pub fn quantized(mut self, group: &str) -> Self {
        self.groups.get_mut(group).unwrap()["base"]["quantization"] = "Q8_0".into();
        self
    }

    /// Adds a lens to a group, or replaces it.
    pub fn lens(mut self, group: &str, name: &str, uri: &str) -> Self {
        self.set_lens(group, name, json!({"name": name, "source": {"uri": uri}}));
        self
    }

    /// The same, of a source with all its fields.
    pub fn lens_of(mut self, group: &str, name: &str, source: Value) -> Self {
        self.set_lens(group, name, json!({"name": name, "source": source}));
        self
    }

    /// Adds a lens to a group, or replaces it, with all its fields.
    pub fn set_lens(&mut self, group: &str, name: &str, lens: Value) {
        self.remove_lens(group, name);
        self.groups.get_mut(group).unwrap()["lenses"].as_array_mut().unwrap().push(lens);
    }

    /// Has every lens that is declared so far kept on the disk.
    pub fn cached(mut self) -> Self {
        for group in self.groups.values_mut() {
            for lens in group["lenses"].as_array_mut().unwrap() {
                lens["residency"] = "Cached".into();
            }
        }
        self
    }

    /// Gives a group these aliases in place of those it has.
    pub fn set_aliases(&mut self, group: &str, aliases: Value) {
        self.groups.get_mut(group).unwrap()["aliases"] = aliases;
    }

    /// Removes a lens.
    pub fn remove_lens(&mut self, group: &str, name: &str) {
        let lenses = self.groups.get_mut(group).unwrap()["lenses"].as_array_mut().unwrap();
        lenses.retain(|l| l["name"] != name);
    }

    /// Goes on with the sequence of another family, as documents of one placement do.
    pub fn follow(&mut self, other: &Family) {
        self.sequence = other.sequence;
    }

    /// The next document, as if every group had been deleted.
    pub fn empty_document(&mut self) -> WorkerDocument {
        let groups = std::mem::take(&mut self.groups);
        let document = self.document();
        self.groups = groups;
        document
    }

    /// The next document.
    pub fn document(&mut self) -> WorkerDocument {
        let object = |kind: &str, name: &str, spec: Value| {
            json!({"apiVersion": "turret.dev/v1alpha1", "kind": kind,
                   "metadata": {"name": name, "namespace": "default", "uid": format!("uid-of-{name}"), "generation": 1},
                   "spec": spec})
        };
        let groups: Vec<ModelGroup> = self
            .groups
            .iter()
            .map(|(name, spec)| serde_json::from_value(object("ModelGroup", name, spec.clone())).unwrap())
            .collect();
        let mut spec = self.placement.clone();
        let placed = self.groups.keys().map(|name| {
            let mut placed = self.placed.get(name).cloned().unwrap_or_else(|| json!({}));
            placed["name"] = name.as_str().into();
            placed
        });
        spec["groups"] = placed.collect();
        let placement: ModelPlacement =
            serde_json::from_value(object("ModelPlacement", "demo", spec)).unwrap();
        let by_name = groups
            .iter()
            .map(|g| (("default".to_owned(), g.metadata.name.clone().unwrap()), g))
            .collect::<BTreeMap<_, _>>();
        let previous = Previous { reported: self.sequence, ..Previous::default() };
        let compiled = compile(&placement, &by_name, &BTreeMap::new(), &self.public_keys, &previous);
        assert_eq!(compiled.problems, []);
        let document = compiled.document.unwrap();
        self.sequence = document.sequence;
        document
    }
}
