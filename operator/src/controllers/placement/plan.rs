//! What to do for a placement, and why. Pure.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, Service},
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
    jiff::{SignedDuration, Timestamp},
};
use kube::{Resource, ResourceExt};
use serde::Serialize;
use serde_json::Value;
use turret_crds::{
    Compiled, ModelGroup, ModelPlacement, compile,
    condition::reason,
    document::{Previous, Problem},
    hints::{self, Hints},
    label,
    placement::UpgradePolicy,
    token::PublicKey,
};

use super::{
    claims::{self, ResourceClaimTemplate},
    cutover,
    demand::Averages,
    resources::{self, Rollout, Settings},
    spread::{self, Decision, Seen},
    victims::{self, Mark},
};
use crate::controllers::{
    asked,
    assess::{DocumentRef, ObservedWorker},
    live,
};

/// A new pod that cannot be scheduled for this long shows that there is no room for one more.
const SURGE_PATIENCE: SignedDuration = SignedDuration::from_secs(30);

/// All that is known when a placement is looked at.
pub struct Observed<'a> {
    /// The placement.
    pub placement: &'a ModelPlacement,
    /// How many workers it is to have: `spec.replicas`, or what `autoscaling` decided.
    pub replicas: i32,
    /// The groups that exist, of those it names.
    pub groups: BTreeMap<(String, String), &'a ModelGroup>,
    /// Those that exist and cannot be read, and why.
    pub unreadable: BTreeMap<(String, String), String>,
    /// Labels of its namespace: groups of other namespaces may choose by them who places them.
    pub namespace_labels: BTreeMap<String, String>,
    /// The objects it owns, as cached.
    pub live: Live,
    /// Its workers, sorted by name.
    pub workers: Vec<ObservedWorker>,
    /// How much its bases and lenses are asked for.
    pub demand: Averages,
    /// Keys whose tokens its workers are to accept.
    pub public_keys: &'a [PublicKey],
    /// Worker image of this operator's version.
    pub default_image: &'a str,
    /// Hosts that sources may be fetched from, where they are not the worker's default.
    pub allowed_source_hosts: Option<&'a str>,
    /// Whether the API server has templates of claims for devices.
    pub serves_claim_templates: bool,
}

/// The owned objects as cached.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// The ConfigMap; its document is replaced by its hash, see [`shrink_config_map`].
    pub config_map: Option<Arc<ConfigMap>>,
    /// The Service.
    pub service: Option<Arc<Service>>,
    /// The PodDisruptionBudget.
    pub disruption_budget: Option<Arc<PodDisruptionBudget>>,
    /// The Deployment.
    pub deployment: Option<Arc<Deployment>>,
    /// Templates of claims: the one that pods are made from, and those of pods before them.
    pub claim_templates: Vec<Arc<ResourceClaimTemplate>>,
}

/// Kinds of owned objects, in the order in which they are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OwnedKind {
    /// The worker document.
    ConfigMap,
    /// The way to the workers.
    Service,
    /// How many may be evicted.
    PodDisruptionBudget,
    /// What the claims of the workers' devices are made from.
    ResourceClaimTemplate,
    /// The workers.
    Deployment,
}

impl OwnedKind {
    /// The kind's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConfigMap => "ConfigMap",
            Self::Service => "Service",
            Self::PodDisruptionBudget => "PodDisruptionBudget",
            Self::ResourceClaimTemplate => "ResourceClaimTemplate",
            Self::Deployment => "Deployment",
        }
    }
}

/// One owned object to write.
#[derive(Clone, Debug, PartialEq)]
pub struct Write {
    /// Its kind.
    pub kind: OwnedKind,
    /// What is applied. Carries the `resourceVersion` it was decided on, where one matters.
    pub object: Value,
    /// Whether the cache has it. If not, whether the name is free must be asked first.
    pub exists: bool,
    /// Why it is written.
    pub why: String,
}

impl Write {
    /// Name of the object.
    pub fn name(&self) -> &str {
        self.object["metadata"]["name"].as_str().unwrap_or_default()
    }
}

/// What to do for a placement.
#[derive(Debug)]
pub struct Plan {
    /// What compiling gave; its document is what workers are to serve.
    pub compiled: Compiled,
    /// The document that is or will be stored. May be an older one when none can be compiled.
    pub document: Option<DocumentRef>,
    /// The same as gzip of JSON, when it was compiled now.
    pub gzip: Option<Vec<u8>>,
    /// The hints that are or will be stored beside the document.
    pub hints: Option<Hints>,
    /// Whether they are other ones than before.
    pub publishes_hints: bool,
    /// What to write on pods before the Deployment is written, so that those leave that lose least.
    pub marks: Vec<Mark>,
    /// Objects to write, in order.
    pub writes: Vec<Write>,
    /// Templates of claims to remove: no pod is made from them any more.
    pub stale_claim_templates: Vec<Arc<ResourceClaimTemplate>>,
    /// Hash of the wanted pod template.
    pub template: Option<String>,
    /// The resolved image of the workers.
    pub image: String,
    /// Objects that have the names of ours and are not.
    pub in_the_way: Vec<InTheWay>,
    /// When to look again, even if nothing happens.
    pub look_again: Option<Duration>,
}

/// An object that has the name of one of ours and belongs to somebody else.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InTheWay {
    /// Says whose it is and what to do.
    pub message: String,
    /// Whether it goes by itself: it belonged to an earlier placement of the same name.
    pub is_leaving: bool,
}

/// Decides what to do.
pub fn plan(observed: &Observed<'_>, now: Timestamp) -> Plan {
    let placement = observed.placement;
    let stored = observed.live.config_map.as_deref().and_then(resources::document_ref);
    let previous = previous(observed, stored.as_ref());
    let problems = unreadable(observed);
    let mut compiled = if problems.is_empty() {
        compile(placement, &observed.groups, &observed.namespace_labels, observed.public_keys, &previous)
    } else {
        // What cannot be read is not taken from workers: they go on with the document they have.
        Compiled { document: None, problems }
    };
    if let Some(problem) = claims::unserved(placement).filter(|_| !observed.serves_claim_templates) {
        compiled.document = None;
        compiled.problems.push(problem);
    }
    let image = image(observed);
    let (rollout, patience) = rollout(observed, now);
    let advice = advice(observed, &compiled, stored.as_ref(), now);
    let settings = Settings { image: &image, allowed_source_hosts: observed.allowed_source_hosts };
    let deployment = resources::deployment(placement, settings, rollout, observed.replicas);
    let mut plan = Plan {
        document: compiled.document.as_ref().map(resources::reference).or_else(|| stored.clone()),
        gzip: compiled.document.as_ref().map(|d| d.to_gzip()),
        hints: advice.hints,
        publishes_hints: advice.is_new,
        template: resources::template_hash(&deployment).map(str::to_owned),
        compiled,
        marks: Vec::new(),
        writes: Vec::new(),
        stale_claim_templates: Vec::new(),
        image,
        in_the_way: in_the_way(observed),
        look_again: patience.into_iter().chain(advice.look_again).min(),
    };
    // An unusable value in the spec, or a name that belongs to somebody else: nothing is touched.
    let invalid = plan.compiled.problems.iter().any(Problem::stops_everything);
    // Pods without a document would wait for it in vain.
    if invalid || !plan.in_the_way.is_empty() || plan.document.is_none() {
        return plan;
    }
    let live = &observed.live;
    let mut writes = Vec::new();
    if let (Some(document), Some(gzip)) = (&plan.document, &plan.gzip) {
        let wanted = resources::config_map(placement, document, gzip.clone(), advice.gzip);
        let mut shrunk = wanted.clone();
        shrink_config_map(&mut shrunk);
        let write = compare(OwnedKind::ConfigMap, live.config_map.as_deref(), &wanted, &shrunk);
        // The next sequence was counted from what is stored: if that moved, count again.
        let version = live.config_map.as_ref().and_then(|c| c.resource_version());
        writes.extend(write.map(|mut w| {
            if let Some(version) = version {
                w.object["metadata"]["resourceVersion"] = version.into();
            }
            w
        }));
    }
    let service = resources::service(placement);
    writes.extend(compare(OwnedKind::Service, live.service.as_deref(), &service, &service));
    let budget = resources::disruption_budget(placement);
    writes.extend(compare(
        OwnedKind::PodDisruptionBudget,
        live.disruption_budget.as_deref(),
        &budget,
        &budget,
    ));
    if let Some(template) = claims::template(placement) {
        let there = live.claim_templates.iter().find(|t| t.metadata.name == template.metadata.name);
        let there = there.map(|there| &**there);
        writes.extend(compare(OwnedKind::ResourceClaimTemplate, there, &template, &template));
    }
    writes.extend(compare(OwnedKind::Deployment, live.deployment.as_deref(), &deployment, &deployment));
    plan.writes = writes;
    let live_replicas = live.deployment.as_deref().and_then(resources::live_replicas);
    plan.marks = victims::marks(&observed.workers, live_replicas, observed.replicas);
    plan.stale_claim_templates = stale_claim_templates(observed, plan.template.as_deref());
    plan
}

/// Our templates that no pod is made from any more: all but the wanted one, once all pods are of the wanted pod template.
fn stale_claim_templates(
    observed: &Observed<'_>,
    pod_template: Option<&str>,
) -> Vec<Arc<ResourceClaimTemplate>> {
    let (placement, live) = (observed.placement, &observed.live);
    let is_done = live.deployment.as_deref().is_some_and(|deployment| {
        is_rolled_out(deployment) && resources::template_hash(deployment) == pod_template
    });
    if !is_done {
        return Vec::new();
    }
    let wanted = claims::name(placement);
    let is_ours = |t: &ResourceClaimTemplate| {
        is_in_the_way(placement, OwnedKind::ResourceClaimTemplate.name(), &t.metadata).is_none()
    };
    let others = live.claim_templates.iter().filter(|t| t.metadata.name != wanted && is_ours(t));
    others.cloned().collect()
}

/// What is said of groups that cannot be read.
fn unreadable(observed: &Observed<'_>) -> Vec<Problem> {
    let one = |((_, name), why): (&(String, String), &String)| Problem {
        // Everything but the document is carried out.
        reason: reason::GROUP_UNREADABLE,
        message: format!(
            "ModelGroup `{name}` cannot be read: {why}; correct it, or remove it from spec.groups"
        ),
    };
    observed.unreadable.iter().map(one).collect()
}

/// Hints as they will be stored.
#[derive(Default)]
struct Advice {
    hints: Option<Hints>,
    gzip: Option<Vec<u8>>,
    is_new: bool,
    look_again: Option<Duration>,
}

impl Advice {
    /// What is published stays.
    fn keep(published: Option<(Hints, &[u8])>, look_again: Option<Duration>) -> Self {
        let (hints, gzip) = published.map(|(hints, gzip)| (hints, gzip.to_vec())).unzip();
        Self { hints, gzip, is_new: false, look_again }
    }
}

/// Hints beside the document that was compiled. Those that stay go on as the bytes they are.
fn advice(
    observed: &Observed<'_>,
    compiled: &Compiled,
    stored: Option<&DocumentRef>,
    now: Timestamp,
) -> Advice {
    let Some(document) = &compiled.document else { return Advice::default() };
    let published = observed.live.config_map.as_deref().and_then(resources::stored_hints);
    // They move by themselves. Were others due while nothing may be written, what is declared would seem not to be carried out.
    if asked::is_paused(observed.placement) {
        return Advice::keep(published, None);
    }
    let is_other =
        |stored: &DocumentRef| (stored.sequence, &stored.digest) != (document.sequence, &document.digest);
    let seen = Seen {
        document,
        is_written: stored.is_none_or(is_other),
        spread: observed.placement.spec.spread(),
        template: observed.live.deployment.as_deref().and_then(resources::template_hash),
        workers: &observed.workers,
        demand: &observed.demand,
        published: published.as_ref().map(|(hints, _)| hints),
    };
    match spread::decide(&seen, now) {
        Decision::Keep { look_again } => Advice::keep(published, look_again),
        Decision::Publish(hints) => {
            let gzip = hints.to_gzip();
            // Beyond what a ConfigMap has room for, workers go on as declared.
            if gzip.len() > hints::MAX_GZIP_BYTES {
                return Advice::default();
            }
            Advice { hints: Some(hints), gzip: Some(gzip), is_new: true, look_again: None }
        }
    }
}

/// What is known of earlier documents. Whoever knows the largest sequence wins: the ConfigMap, a
/// worker, or the placement's own status.
fn previous(observed: &Observed<'_>, stored: Option<&DocumentRef>) -> Previous {
    let reports = observed.workers.iter().filter_map(|w| w.report.as_ref()?.state.document.as_ref());
    let reported = reports.map(|applied| match stored {
        // A worker has another document of the same sequence: somebody else counted too.
        Some(s) if s.sequence == applied.sequence && s.digest != applied.digest => applied.sequence + 1,
        _ => applied.sequence,
    });
    let noted = observed.placement.status.as_ref().and_then(|s| s.document_sequence);
    let noted = noted.and_then(|n| u64::try_from(n).ok());
    Previous {
        stored: stored.map(|s| (s.sequence, s.digest.clone())),
        reported: reported.chain(noted).max().unwrap_or(0),
        aliases: cutover::previous_aliases(stored, &observed.workers),
        ready_targets: cutover::ready_targets(observed, stored),
    }
}

/// The image of the workers: the spec's, or else the one they have, as long as nothing else
/// replaces the pods. A new operator's default comes along with the next change that does, and
/// with the policy `Rolling` at once.
fn image(observed: &Observed<'_>) -> String {
    let placement = observed.placement;
    if let Some(image) = placement.spec.worker.as_ref().and_then(|w| w.image.clone()) {
        return image;
    }
    if placement.spec.upgrade_policy == Some(UpgradePolicy::Rolling) {
        return observed.default_image.to_owned();
    }
    let kept = observed.live.deployment.as_deref().and_then(|deployment| {
        let same_shape = deployment.annotations().get(resources::POD_SHAPE).map(String::as_str)
            == Some(resources::pod_shape(placement).as_str());
        let noted = placement.status.as_ref().and_then(|s| s.worker_image.clone());
        same_shape.then(|| noted.or_else(|| live_image(deployment))).flatten()
    });
    kept.unwrap_or_else(|| observed.default_image.to_owned())
}

fn live_image(deployment: &Deployment) -> Option<String> {
    deployment.spec.as_ref()?.template.spec.as_ref()?.containers.first()?.image.clone()
}

/// How pods are replaced: one more first. If the one more finds no room for a while, one less
/// first, until this rollout is over.
fn rollout(observed: &Observed<'_>, now: Timestamp) -> (Rollout, Option<Duration>) {
    let Some(deployment) = observed.live.deployment.as_deref() else { return (Rollout::Surge, None) };
    if is_rolled_out(deployment) {
        return (Rollout::Surge, None);
    }
    if is_in_place(deployment) {
        return (Rollout::InPlace, None);
    }
    let live = resources::template_hash(deployment);
    let there = || observed.workers.iter().filter(|w| w.pod.counts());
    // Without old pods in its way, a pod that finds no room waits for the cluster, not for us.
    if !there().any(|w| w.pod.template.as_deref() != live) {
        return (Rollout::Surge, None);
    }
    let new = there().filter(|w| w.pod.template.as_deref() == live);
    match new.filter_map(|w| w.pod.unschedulable_since).min() {
        None => (Rollout::Surge, None),
        Some(since) => {
            // The scheduler's clock may be ahead of ours.
            let waited = now.duration_since(since).max(SignedDuration::ZERO);
            if waited >= SURGE_PATIENCE {
                (Rollout::InPlace, None)
            } else {
                (Rollout::Surge, Some((SURGE_PATIENCE - waited).unsigned_abs()))
            }
        }
    }
}

fn is_in_place(deployment: &Deployment) -> bool {
    let strategy = deployment.spec.as_ref().and_then(|s| s.strategy.as_ref());
    let rolling = strategy.and_then(|s| s.rolling_update.as_ref());
    rolling.and_then(|r| r.max_surge.as_ref())
        == Some(&k8s_openapi::apimachinery::pkg::util::intstr::IntOrString::Int(0))
}

/// Whether the Deployment's own controller says that all its pods are of the newest template.
fn is_rolled_out(deployment: &Deployment) -> bool {
    let Some(status) = &deployment.status else { return false };
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    status.observed_generation >= deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && status.available_replicas.unwrap_or(0) == wanted
}

/// What to write so that the live object is as wanted; `None` when it is. `shrunk` is the wanted
/// object in the form in which the cache keeps live ones.
fn compare<K: Resource<DynamicType = ()> + Serialize>(
    kind: OwnedKind,
    live: Option<&K>,
    wanted: &K,
    shrunk: &K,
) -> Option<Write> {
    let json = |object: &K| serde_json::to_value(object).expect("a Kubernetes object is JSON");
    let sealed = live::seal(json(wanted));
    let Some(live) = live else {
        return Some(Write { kind, object: sealed, exists: false, why: "it does not exist".into() });
    };
    let mut compared = json(shrunk);
    compared["metadata"]["annotations"][live::APPLIED] =
        sealed["metadata"]["annotations"][live::APPLIED].clone();
    let difference = live::difference(&json(live), &compared)?;
    Some(Write { kind, object: sealed, exists: true, why: format!("{difference} is not as wanted") })
}

/// Replaces a ConfigMap's document by its hash: all that is needed to see whether it is as wanted, and a hundredth of the
/// memory. Of the rest only the hints and what aliases lead to are kept: the next ones are made from them.
pub fn shrink_config_map(config_map: &mut ConfigMap) {
    let data = config_map.binary_data.iter_mut().flatten();
    for (_, bytes) in data.filter(|(key, _)| *key != label::HINTS_KEY) {
        bytes.0 = <sha2::Sha256 as sha2::Digest>::digest(&bytes.0).to_vec();
    }
    if let Some(data) = &mut config_map.data {
        data.retain(|key, _| key == resources::ALIASES_KEY);
    }
    if config_map.data.as_ref().is_some_and(BTreeMap::is_empty) {
        config_map.data = None;
    }
}

/// Cached objects with our names and labels that this placement does not control.
fn in_the_way(observed: &Observed<'_>) -> Vec<InTheWay> {
    let live = &observed.live;
    let wanted = claims::name(observed.placement);
    let template = live.claim_templates.iter().find(|t| wanted.is_some() && t.metadata.name == wanted);
    let objects = [
        ("ConfigMap", live.config_map.as_deref().map(|o| &o.metadata)),
        ("Service", live.service.as_deref().map(|o| &o.metadata)),
        ("PodDisruptionBudget", live.disruption_budget.as_deref().map(|o| &o.metadata)),
        ("ResourceClaimTemplate", template.map(|o| &o.metadata)),
        ("Deployment", live.deployment.as_deref().map(|o| &o.metadata)),
    ];
    objects.into_iter().filter_map(|(kind, meta)| is_in_the_way(observed.placement, kind, meta?)).collect()
}

/// Whether an object with the name of one of ours belongs to somebody else.
pub fn is_in_the_way(placement: &ModelPlacement, kind: &str, meta: &ObjectMeta) -> Option<InTheWay> {
    let owner = meta.owner_references.iter().flatten().find(|o| o.controller == Some(true));
    if owner.is_some_and(|o| Some(&o.uid) == placement.metadata.uid.as_ref()) {
        return None;
    }
    let name = meta.name.as_deref().unwrap_or_default();
    let is_leaving =
        owner.is_some_and(|o| o.kind == ModelPlacement::kind(&()) && o.name == placement.name_any());
    let message = match owner {
        Some(_) if is_leaving => {
            format!("{kind} `{name}` of an earlier placement of the same name is being removed")
        }
        Some(o) => format!(
            "{kind} `{name}` exists and belongs to {} `{}`: give the placement another name",
            o.kind, o.name
        ),
        None => format!(
            "{kind} `{name}` exists and is not the operator's: remove it, or give the placement another name"
        ),
    };
    Some(InTheWay { message, is_leaving })
}

/// The problems of a placement: what compiling found, and names that are taken.
pub fn problems(compiled: &Compiled, in_the_way: &[InTheWay]) -> Vec<Problem> {
    let taken = in_the_way.iter().filter(|o| !o.is_leaving);
    let taken = taken.map(|o| Problem { reason: reason::NAME_TAKEN, message: o.message.clone() });
    compiled.problems.iter().cloned().chain(taken).collect()
}
