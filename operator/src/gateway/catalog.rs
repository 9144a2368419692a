//! What there is to ask for, per namespace: pure.
//!
//! In a cluster the catalog is what is *declared* (ModelGroups and the ModelPlacements that name
//! them), so that a lens is known from the moment it is applied and unknown from the moment it is
//! removed, whatever the workers have heard by then. Without a cluster it is what the workers report.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use turret_crds::{
    ModelGroup, ModelName, ModelPlacement, WorkerReport, alias::WeightedLens, document::AdmissionLimits,
    model_name::UnknownModel,
};

/// All namespaces and what they serve.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Catalog {
    /// By name.
    pub namespaces: BTreeMap<String, Arc<Namespace>>,
    /// Whether everything there is has been seen. Until then a name that is not found may still appear.
    pub complete: bool,
}

/// What one namespace serves.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Namespace {
    /// By the name that clients use.
    pub groups: BTreeMap<String, Group>,
    /// By name.
    pub placements: BTreeMap<String, Placement>,
    /// The groups that have a lens or an alias of this name, sorted.
    groups_of_name: BTreeMap<String, Vec<String>>,
}

/// A group that some placement serves.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Where its base comes from, or the base's key without a cluster.
    pub base: String,
    /// Seconds since the epoch when it was made; 0 when unknown.
    pub created: i64,
    /// By name.
    pub lenses: BTreeMap<String, Lens>,
    /// What its aliases are to lead to, by name.
    pub aliases: BTreeMap<String, Vec<WeightedLens>>,
    /// Names of the placements that serve it, sorted.
    pub placements: Vec<String>,
}

impl Group {
    /// Whether it has a lens or an alias of this name.
    fn has(&self, name: &str) -> bool {
        self.lenses.contains_key(name) || self.aliases.contains_key(name)
    }
}

/// A lens of a group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lens {
    /// A name for people.
    pub display_name: Option<String>,
}

/// What matters of a placement to requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Its UID: the audience of tokens for its workers. Empty without a cluster.
    pub uid: String,
    /// The group that is meant when a request names none; `None` where there is no such rule.
    pub default_group: Option<String>,
    /// How many workers are wanted, where nobody but the spec says so.
    pub replicas: i32,
    /// Whether a request that waits makes a worker come.
    pub is_autoscaled: bool,
    /// Limits of what waits.
    pub admission: AdmissionLimits,
}

/// Where a name is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope<'a> {
    /// In this namespace.
    Namespace(&'a str),
    /// In all of them; the name must then exist in just one.
    Anywhere,
}

/// What a request is for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Target {
    /// The namespace.
    pub namespace: String,
    /// The group, and the lens or alias if one is meant.
    pub model: ModelName,
}

/// Why a name leads nowhere. The text is meant for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResolveError {
    /// Nothing is served in that namespace.
    #[error("nothing is served in the namespace `{0}`")]
    UnknownNamespace(String),
    /// The name is unknown, or is that of several lenses, within one namespace.
    #[error(transparent)]
    Model(#[from] UnknownModel),
    /// The name exists in several namespaces and the request names none.
    #[error(
        "`{name}` exists in several namespaces; send the header X-Turret-Namespace with one of {}, \
         or use the path /ns/NAMESPACE/v1/…", .namespaces.join(", ")
    )]
    AmbiguousNamespace {
        /// What was asked for.
        name: String,
        /// Where it exists, sorted.
        namespaces: Vec<String>,
    },
    /// The request names no model, and there is no single one that could be meant.
    #[error("the request names no `model`; it must be one of {}", .groups.join(", "))]
    ModelMissing {
        /// The groups it could be.
        groups: Vec<String>,
    },
}

impl ResolveError {
    /// Whether the thing asked for does not exist (as opposed to: is not said clearly).
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::UnknownNamespace(_) | Self::Model(UnknownModel::NotFound { .. }))
    }
}

impl Namespace {
    /// What a namespace declares, from its placements and the groups that they name. A group of another namespace is
    /// served as long as it allows this one, which has these labels.
    ///
    /// Where two placements call different ModelGroups by one name, the first placement by name
    /// decides what the name means: an answer must not depend on which worker was free.
    pub fn declared<'a>(
        groups: impl IntoIterator<Item = &'a ModelGroup>,
        placements: impl IntoIterator<Item = &'a ModelPlacement>,
        labels: &BTreeMap<String, String>,
    ) -> Self {
        let objects: BTreeMap<(&str, &str), &ModelGroup> = groups
            .into_iter()
            .filter(|g| g.metadata.deletion_timestamp.is_none())
            .filter_map(|g| {
                let namespace = g.metadata.namespace.as_deref().unwrap_or_default();
                Some(((namespace, g.metadata.name.as_deref()?), g))
            })
            .collect();
        let placements: BTreeMap<&str, &ModelPlacement> = placements
            .into_iter()
            .filter(|p| p.metadata.deletion_timestamp.is_none())
            .filter_map(|p| Some((p.metadata.name.as_deref()?, p)))
            .collect();
        let mut namespace = Self::default();
        let mut meaning: BTreeMap<&str, (&str, &str)> = BTreeMap::new();
        for (placement_name, placement) in placements {
            let own = placement.metadata.namespace.as_deref().unwrap_or_default();
            let mut served: Vec<&str> = Vec::new();
            for placed in &placement.spec.groups {
                let target = placed.target(own);
                let object = objects.get(&target).copied();
                let Some(object) = object.filter(|object| object.may_be_placed_in(own, labels)) else {
                    continue;
                };
                served.push(&placed.name);
                if *meaning.entry(&placed.name).or_insert(target) != target {
                    continue;
                }
                let group = namespace.groups.entry(placed.name.clone()).or_insert_with(|| group(object));
                group.placements.push(placement_name.to_owned());
            }
            served.sort_unstable();
            let default_group = match placement.spec.default_group_name.as_deref() {
                Some(name) if served.contains(&name) => Some(name),
                _ => served.first().copied(),
            };
            namespace.placements.insert(
                placement_name.to_owned(),
                Placement {
                    uid: placement.metadata.uid.clone().unwrap_or_default(),
                    default_group: default_group.map(str::to_owned),
                    replicas: placement.spec.replicas,
                    is_autoscaled: placement.spec.autoscaling.is_some(),
                    admission: admission(placement),
                },
            );
        }
        namespace.indexed()
    }

    /// What workers that nobody declared report, as one placement called `placement`.
    pub fn reported<'a>(placement: &str, reports: impl IntoIterator<Item = &'a WorkerReport>) -> Self {
        let mut namespace = Self::default();
        let mut workers = 0;
        for report in reports {
            workers += 1;
            for base in &report.bases {
                for name in &base.groups {
                    let group = namespace.groups.entry(name.clone()).or_default();
                    group.base = base.key.to_string();
                    group.placements = vec![placement.to_owned()];
                }
            }
            for lens in &report.lenses {
                if let Some(group) = namespace.groups.get_mut(&lens.group) {
                    group.lenses.entry(lens.name.clone()).or_default();
                }
            }
            for (name, aliases) in report.aliases.iter() {
                if let Some(group) = namespace.groups.get_mut(name) {
                    let aliases = aliases.iter().map(|alias| (alias.name.clone(), alias.targets.clone()));
                    group.aliases.extend(aliases);
                }
            }
        }
        namespace.placements.insert(
            placement.to_owned(),
            Placement {
                uid: String::new(),
                default_group: None,
                replicas: workers,
                is_autoscaled: false,
                admission: AdmissionLimits::default(),
            },
        );
        namespace.indexed()
    }

    fn indexed(mut self) -> Self {
        self.groups_of_name.clear();
        for (name, group) in &self.groups {
            for lens_or_alias in group.lenses.keys().chain(group.aliases.keys()) {
                self.groups_of_name.entry(lens_or_alias.clone()).or_default().push(name.clone());
            }
        }
        self
    }

    /// The group that is meant when a request names none: the only one there is, or the default
    /// group of the only placement.
    fn default_group(&self) -> Option<&str> {
        if self.groups.len() == 1 {
            return self.groups.keys().next().map(String::as_str);
        }
        match self.placements.len() {
            1 => self.placements.values().next()?.default_group.as_deref(),
            _ => None,
        }
    }

    fn resolve(&self, name: Option<&str>) -> Result<ModelName, ResolveError> {
        let Some(name) = name.filter(|n| !n.is_empty()) else {
            return match self.default_group() {
                Some(group) => Ok(ModelName { group: group.to_owned(), lens: None }),
                None => Err(ResolveError::ModelMissing { groups: self.groups.keys().cloned().collect() }),
            };
        };
        Ok(self.find(name)?)
    }

    /// [`turret_crds::model_name::resolve`] with an index: it is asked for every request.
    fn find(&self, name: &str) -> Result<ModelName, UnknownModel> {
        if self.groups.contains_key(name) {
            return Ok(ModelName { group: name.to_owned(), lens: None });
        }
        let full = name.split_once(':').filter(|(g, l)| self.groups.get(*g).is_some_and(|g| g.has(l)));
        if let Some((group, lens)) = full {
            return Ok(ModelName { group: group.to_owned(), lens: Some(lens.to_owned()) });
        }
        match self.groups_of_name.get(name).map(Vec::as_slice) {
            None | Some([]) => Err(UnknownModel::NotFound { name: name.to_owned() }),
            Some([group]) => Ok(ModelName { group: group.clone(), lens: Some(name.to_owned()) }),
            Some(groups) => Err(UnknownModel::Ambiguous {
                name: name.to_owned(),
                candidates: groups.iter().map(|g| format!("{g}:{name}")).collect(),
            }),
        }
    }

    /// How long a request for a group may be held.
    pub fn hold(&self, group: &str) -> Duration {
        let seconds = self
            .placements_of(group)
            .map(|p| p.admission.hold_seconds)
            .max()
            .unwrap_or(AdmissionLimits::default().hold_seconds);
        Duration::from_secs(seconds.into())
    }

    /// How many requests a worker of a group may have waiting.
    pub fn queue_limit(&self, group: &str) -> u32 {
        let limit = self.placements_of(group).map(|p| p.admission.max_queued_requests).max();
        limit.unwrap_or(AdmissionLimits::default().max_queued_requests)
    }

    /// Whether every placement of a group wants no worker at all, whoever waits.
    pub fn is_scaled_to_zero(&self, group: &str) -> bool {
        self.placements_of(group).all(|p| p.replicas == 0 && !p.is_autoscaled)
    }

    fn placements_of(&self, group: &str) -> impl Iterator<Item = &Placement> {
        let names = self.groups.get(group).map(|g| g.placements.as_slice()).unwrap_or_default();
        names.iter().filter_map(|name| self.placements.get(name))
    }
}

fn group(object: &ModelGroup) -> Group {
    Group {
        base: object.spec.base.source.uri.clone(),
        created: object.metadata.creation_timestamp.as_ref().map_or(0, |t| t.0.as_second()),
        lenses: object
            .spec
            .lenses
            .iter()
            .map(|l| (l.name.clone(), Lens { display_name: l.display_name.clone() }))
            .collect(),
        aliases: object.spec.aliases.iter().map(|alias| (alias.name.clone(), alias.declared())).collect(),
        placements: Vec::new(),
    }
}

fn admission(placement: &ModelPlacement) -> AdmissionLimits {
    let mut limits = AdmissionLimits::default();
    if let Some(given) = &placement.spec.admission {
        let read = |value: Option<i32>| value.and_then(|v| u32::try_from(v).ok());
        limits.max_queued_requests = read(given.max_queued_requests).unwrap_or(limits.max_queued_requests);
        limits.hold_seconds = read(given.hold_seconds).unwrap_or(limits.hold_seconds);
    }
    limits
}

impl Catalog {
    /// Finds what a request means. A missing `model` means the only group, or the default group of
    /// the only placement, of the namespace.
    pub fn resolve(&self, scope: Scope<'_>, model: Option<&str>) -> Result<Target, ResolveError> {
        match scope {
            Scope::Namespace(name) => {
                let namespace = self
                    .namespaces
                    .get(name)
                    .ok_or_else(|| ResolveError::UnknownNamespace(name.to_owned()))?;
                Ok(Target { namespace: name.to_owned(), model: namespace.resolve(model)? })
            }
            Scope::Anywhere => self.resolve_anywhere(model),
        }
    }

    fn resolve_anywhere(&self, model: Option<&str>) -> Result<Target, ResolveError> {
        let asked = model.unwrap_or_default();
        let mut found = Vec::new();
        // A name that is ambiguous inside a namespace is there all the same.
        let mut unclear: Vec<(&str, ResolveError)> = Vec::new();
        for (name, namespace) in &self.namespaces {
            match namespace.resolve(model) {
                Ok(model) => found.push(Target { namespace: name.clone(), model }),
                Err(error) if error.is_not_found() || namespace.groups.is_empty() => {}
                Err(error) => unclear.push((name, error)),
            }
        }
        match (found.len(), unclear.len()) {
            (1, 0) => Ok(found.remove(0)),
            (0, 1) => Err(unclear.remove(0).1),
            (0, 0) => Err(UnknownModel::NotFound { name: asked.to_owned() }.into()),
            _ => {
                let mut namespaces: Vec<String> = found.into_iter().map(|t| t.namespace).collect();
                namespaces.extend(unclear.into_iter().map(|(name, _)| name.to_owned()));
                namespaces.sort();
                let name = if asked.is_empty() { "a default model" } else { asked };
                Err(ResolveError::AmbiguousNamespace { name: name.to_owned(), namespaces })
            }
        }
    }

    /// The namespaces of a scope, by name.
    pub fn within<'a>(&'a self, scope: Scope<'a>) -> impl Iterator<Item = (&'a str, &'a Namespace)> {
        self.namespaces
            .iter()
            .filter(move |(name, _)| match scope {
                Scope::Namespace(wanted) => *name == wanted,
                Scope::Anywhere => true,
            })
            .map(|(name, namespace)| (name.as_str(), namespace.as_ref()))
    }

    /// The group of a target, with its namespace.
    pub fn group(&self, target: &Target) -> Option<(&Namespace, &Group)> {
        let namespace = self.namespaces.get(&target.namespace)?;
        Some((namespace, namespace.groups.get(&target.model.group)?))
    }
}

#[cfg(test)]
#[path = "catalog_sharing_tests.rs"]
mod sharing_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn model_group(name: &str, lenses: &[&str]) -> ModelGroup {
        let lenses: Vec<_> =
            lenses.iter().map(|l| json!({"name": l, "source": {"uri": format!("pvc://m/{l}")}})).collect();
        serde_json::from_value(json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
            "metadata": {"name": name, "namespace": "lab"},
            "spec": {"base": {"source": {"uri": format!("pvc://m/{name}")}}, "lenses": lenses},
        }))
        .unwrap()
    }

    fn placement(name: &str, spec: serde_json::Value) -> ModelPlacement {
        serde_json::from_value(json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement",
            "metadata": {"name": name, "namespace": "lab", "uid": format!("uid-{name}")}, "spec": spec,
        }))
        .unwrap()
    }

    fn catalog(namespaces: Vec<(&str, Namespace)>) -> Catalog {
        Catalog {
            namespaces: namespaces.into_iter().map(|(n, v)| (n.to_owned(), Arc::new(v))).collect(),
            complete: true,
        }
    }

    fn lab() -> Namespace {
        Namespace::declared(
            &[model_group("north", &["pirate", "terse"]), model_group("south", &["pirate"])],
            &[placement(
                "shared",
                json!({"groups": [{"name": "north"}, {"name": "south"}], "defaultGroupName": "south"}),
            )],
            &BTreeMap::new(),
        )
    }

    fn find(catalog: &Catalog, scope: Scope<'_>, model: &str) -> Result<String, ResolveError> {
        let model = (!model.is_empty()).then_some(model);
        catalog.resolve(scope, model).map(|t| format!("{}/{}", t.namespace, t.model))
    }

    #[test]
    fn names_resolve_inside_a_namespace() {
        let catalog = catalog(vec![("lab", lab())]);
        let lab = Scope::Namespace("lab");
        for (asked, found) in [
            ("north", "lab/north"),
            ("north:pirate", "lab/north:pirate"),
            ("terse", "lab/north:terse"),
            ("", "lab/south"),
        ] {
            assert_eq!(find(&catalog, lab, asked).unwrap(), found);
            assert_eq!(find(&catalog, Scope::Anywhere, asked).unwrap(), found, "anywhere");
        }
        let ambiguous = find(&catalog, lab, "pirate").unwrap_err();
        assert_eq!(
            ambiguous.to_string(),
            "`pirate` is a lens or an alias of several groups; write one of north:pirate, south:pirate"
        );
        assert!(!ambiguous.is_not_found());
        assert_eq!(find(&catalog, Scope::Anywhere, "pirate").unwrap_err(), ambiguous);
        assert!(find(&catalog, lab, "east").unwrap_err().is_not_found());
        assert_eq!(
            find(&catalog, Scope::Namespace("prod"), "north").unwrap_err().to_string(),
            "nothing is served in the namespace `prod`"
        );
    }

    #[test]
    fn a_name_of_several_namespaces_asks_for_one() {
        let only = Namespace::declared(
            &[model_group("north", &[])],
            &[placement("p", json!({"groups": [{"name": "north"}]}))],
            &BTreeMap::new(),
        );
        let catalog = catalog(vec![("lab", lab()), ("prod", only)]);
        let error = find(&catalog, Scope::Anywhere, "north").unwrap_err();
        assert_eq!(
            error,
            ResolveError::AmbiguousNamespace {
                name: "north".into(),
                namespaces: vec!["lab".into(), "prod".into()]
            }
        );
        assert!(!error.is_not_found());
        assert_eq!(find(&catalog, Scope::Anywhere, "south").unwrap(), "lab/south");
        assert_eq!(find(&catalog, Scope::Namespace("prod"), "").unwrap(), "prod/north");
        assert!(matches!(find(&catalog, Scope::Anywhere, ""), Err(ResolveError::AmbiguousNamespace { .. })));
    }

    #[test]
    fn a_missing_model_is_refused_where_several_could_be_meant() {
        let two = Namespace::declared(
            &[model_group("north", &[]), model_group("south", &[])],
            &[
                placement("a", json!({"groups": [{"name": "north"}]})),
                placement("b", json!({"groups": [{"name": "south"}]})),
            ],
            &BTreeMap::new(),
        );
        let catalog = catalog(vec![("lab", two)]);
        let error = find(&catalog, Scope::Namespace("lab"), "").unwrap_err();
        assert_eq!(error.to_string(), "the request names no `model`; it must be one of north, south");
    }

    #[test]
    fn only_what_a_placement_serves_is_in_the_catalog() {
        let mut gone = model_group("gone", &[]);
        gone.metadata.deletion_timestamp =
            Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        let namespace = Namespace::declared(
            &[model_group("placed", &["a"]), model_group("alone", &[]), gone],
            &[placement(
                "p",
                json!({"groups": [
                    {"name": "alias", "groupRef": {"name": "placed"}}, {"name": "gone"}, {"name": "missing"},
                    {"name": "placed", "groupRef": {"name": "placed", "namespace": "prod"}},
                ], "replicas": 0, "admission": {"holdSeconds": 7}}),
            )],
            &BTreeMap::new(),
        );
        assert_eq!(namespace.groups.keys().collect::<Vec<_>>(), ["alias"]);
        assert_eq!(namespace.groups["alias"].placements, ["p"]);
        assert_eq!(namespace.placements["p"].default_group.as_deref(), Some("alias"));
        assert_eq!(namespace.hold("alias"), Duration::from_secs(7));
        assert_eq!(namespace.queue_limit("alias"), 512);
        assert!(namespace.is_scaled_to_zero("alias"));
    }

    proptest! {
        #[test]
        fn the_index_finds_what_the_contract_says(
            groups in proptest::collection::btree_map(
                "[ab]{1,2}",
                // Whether each name is that of an alias.
                proptest::collection::btree_map("[abc]{1,2}", any::<bool>(), 0..4),
                0..5,
            ),
            name in "[abc]{0,2}(:[abc]{0,2})?",
        ) {
            let namespace = Namespace {
                groups: groups.iter().map(|(name, names)| {
                    let of = |alias: bool| {
                        let those = names.iter().filter(move |(_, is_alias)| **is_alias == alias);
                        those.map(|(name, _)| name.clone())
                    };
                    let lenses = of(false).map(|lens| (lens, Lens::default())).collect();
                    let aliases = of(true).map(|alias| (alias, Vec::new())).collect();
                    (name.clone(), Group { lenses, aliases, ..Group::default() })
                }).collect(),
                ..Namespace::default()
            }.indexed();
            let served = groups.iter().map(|(g, names)| (g.as_str(), names.keys().map(String::as_str)));
            prop_assert_eq!(namespace.find(&name), turret_crds::model_name::resolve(&name, served));
        }
    }

    #[test]
    fn an_alias_is_found_as_a_lens_is_and_not_led_on_yet() {
        let mut group = model_group("north", &["pirate", "terse"]);
        group.spec.aliases = serde_json::from_value(json!([
            {"name": "default", "targets": [{"lensName": "terse"}, {"lensName": "pirate", "weight": 9}]},
        ]))
        .unwrap();
        let placed = placement("p", json!({"groups": [{"name": "chat", "groupRef": {"name": "north"}}]}));
        let namespace = Namespace::declared(&[group], &[placed], &BTreeMap::new());
        let weights: Vec<_> =
            namespace.groups["chat"].aliases["default"].iter().map(|t| (t.lens.as_str(), t.weight)).collect();
        assert_eq!(weights, [("pirate", 9), ("terse", 1)]);
        let catalog = catalog(vec![("lab", namespace)]);
        for asked in ["default", "chat:default"] {
            assert_eq!(find(&catalog, Scope::Anywhere, asked).unwrap(), "lab/chat:default");
        }
        assert!(find(&catalog, Scope::Anywhere, "north:default").unwrap_err().is_not_found());
    }

    #[test]
    fn a_name_that_two_placements_use_differently_means_what_the_first_says() {
        let namespace = Namespace::declared(
            &[model_group("one", &["x"]), model_group("two", &["y"])],
            &[
                placement("b", json!({"groups": [{"name": "chat", "groupRef": {"name": "two"}}]})),
                placement("a", json!({"groups": [{"name": "chat", "groupRef": {"name": "one"}}]})),
                placement("c", json!({"groups": [{"name": "chat", "groupRef": {"name": "one"}}]})),
            ],
            &BTreeMap::new(),
        );
        assert_eq!(namespace.groups["chat"].placements, ["a", "c"]);
        assert!(namespace.groups["chat"].lenses.contains_key("x"));
    }
}
