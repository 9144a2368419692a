//! What `/v1/models` and `/v1/lenses` show: pure.

use serde::Serialize;
use turret_crds::{
    ModelName,
    alias::WeightedLens,
    report::{ArtifactState, LensReport, Tier},
};

use super::{
    catalog::{Group, Namespace, Scope, Target},
    directory::{Place, View},
    pick::{InFlight, Unserved},
};
use crate::fleet::Worker;

/// A list as OpenAI's API shapes it.
#[derive(Clone, Debug, Serialize)]
pub struct List<T> {
    object: &'static str,
    /// The entries, sorted by namespace and id.
    pub data: Vec<T>,
}

impl<T> List<T> {
    /// A list of these.
    pub fn of(data: Vec<T>) -> Self {
        Self { object: "list", data }
    }
}

/// A model that can be asked for: a group's base, one of its lenses, or one of its aliases.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model {
    /// `group`, `group:lens` or `group:alias`: what to write in `model`.
    pub id: String,
    object: &'static str,
    /// Seconds since the epoch; 0 when unknown.
    pub created: i64,
    owned_by: &'static str,
    /// Where the base comes from.
    pub root: String,
    /// The group, for a lens or an alias.
    pub parent: Option<String>,
    /// Longest sequence in tokens, on every worker that serves it; `null` while none knows.
    pub max_model_len: Option<u32>,
    /// The namespace it is served in.
    pub namespace: String,
    /// For an alias: where it leads at the moment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub targets: Option<Vec<WeightedLens>>,
}

/// A lens, and what each worker says of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Lens {
    /// `group:lens`.
    pub id: String,
    object: &'static str,
    /// The namespace it is served in.
    pub namespace: String,
    /// Its group.
    pub group: String,
    /// Its name.
    pub name: String,
    /// A name for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// The best that any worker says; `null` while none knows it.
    pub state: Option<ArtifactState>,
    /// What each says, sorted by name.
    pub workers: Vec<LensOnWorker>,
}

/// A lens on one worker.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LensOnWorker {
    /// The worker.
    pub worker: String,
    /// How far it is there.
    pub state: ArtifactState,
    /// The highest tier that holds it.
    pub tier: Tier,
    /// Digest of its files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Bytes in device memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Rows that use it now.
    pub active_rows: u32,
    /// Requests it has answered there.
    pub served: u64,
}

/// The models that can be asked for. What every worker calls failed is left out.
pub fn models(view: &View, scope: Scope<'_>) -> Vec<Model> {
    let mut models = Vec::new();
    for (namespace_name, namespace) in view.catalog.within(scope) {
        for (group_name, group) in &namespace.groups {
            let mut names: Vec<&String> = group.lenses.keys().chain(group.aliases.keys()).collect();
            names.sort_unstable();
            let named = names.into_iter().map(|name| Some(name.clone()));
            for lens in std::iter::once(None).chain(named) {
                let target = target(namespace_name, group_name, lens);
                if failure(view, &target).is_none() {
                    models.push(model(view, &target, group));
                }
            }
        }
    }
    models
}

/// One model; or why it cannot be asked for.
pub fn find_model(view: &View, target: &Target) -> Result<Model, Unserved> {
    match (failure(view, target), view.catalog.group(target)) {
        (Some(why), _) => Err(why),
        (None, Some((_, group))) => Ok(model(view, target, group)),
        (None, None) => Err(Unserved::NoWorker),
    }
}

/// All lenses, with what each worker says of them.
pub fn lenses(view: &View, scope: Scope<'_>) -> Vec<Lens> {
    let mut lenses = Vec::new();
    for (namespace_name, namespace) in view.catalog.within(scope) {
        for (group_name, group) in &namespace.groups {
            for lens in group.lenses.keys() {
                let target = target(namespace_name, group_name, Some(lens.clone()));
                lenses.extend(find_lens(view, &target));
            }
        }
    }
    lenses
}

/// One lens.
pub fn find_lens(view: &View, target: &Target) -> Option<Lens> {
    let (_, group): (&Namespace, &Group) = view.catalog.group(target)?;
    let name = target.model.lens.as_ref()?;
    let lens = group.lenses.get(name)?;
    let mut workers: Vec<LensOnWorker> = view
        .workers_of(&target.namespace, &group.placements)
        .filter_map(|worker| on_worker(worker, &target.model.group, name))
        .collect();
    workers.sort_by(|a, b| a.worker.cmp(&b.worker));
    let state = workers.iter().map(|w| &w.state).min_by_key(|state| progress(state)).cloned();
    Some(Lens {
        id: target.model.to_string(),
        object: "lens",
        namespace: target.namespace.clone(),
        group: target.model.group.clone(),
        name: name.clone(),
        display_name: lens.display_name.clone(),
        state,
        workers,
    })
}

fn target(namespace: &str, group: &str, lens: Option<String>) -> Target {
    Target { namespace: namespace.to_owned(), model: ModelName { group: group.to_owned(), lens } }
}

fn model(view: &View, target: &Target, group: &Group) -> Model {
    let workers = view.workers_of(&target.namespace, &group.placements);
    let lengths = workers.filter_map(|w| w.believed()?.base_of(&target.model.group)?.max_context_tokens);
    Model {
        max_model_len: lengths.min(),
        id: target.model.to_string(),
        object: "model",
        created: group.created,
        owned_by: "turret",
        root: group.base.clone(),
        parent: target.model.lens.as_ref().map(|_| target.model.group.clone()),
        namespace: target.namespace.clone(),
        targets: view.targets(target),
    }
}

/// Why every worker calls it failed.
fn failure(view: &View, target: &Target) -> Option<Unserved> {
    match view.pick(target, &InFlight::default(), |_| false) {
        Err(why @ Unserved::Failed { .. }) => Some(why),
        Ok(_) | Err(_) => None,
    }
}

fn on_worker(worker: &Worker<Place>, group: &str, name: &str) -> Option<LensOnWorker> {
    let report = worker.believed()?;
    let lens: &LensReport = report.lens(group, name)?;
    Some(LensOnWorker {
        worker: report.worker.name.clone(),
        state: lens.state.clone(),
        tier: lens.tier,
        digest: lens.digest.clone(),
        bytes: lens.bytes,
        active_rows: lens.active_rows,
        served: lens.served,
    })
}

fn progress(state: &ArtifactState) -> u8 {
    match state {
        ArtifactState::Ready => 0,
        ArtifactState::Loading { .. } => 1,
        ArtifactState::Resolving => 2,
        ArtifactState::Failed { .. } => 3,
    }
}
