//! Looks at one placement: observe → plan → apply → status.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::OptionFuture;
use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, Pod, Service},
        policy::v1::PodDisruptionBudget,
    },
    jiff::Timestamp,
};
use kube::{
    Api, Resource, ResourceExt,
    api::{DeleteParams, Patch, PatchParams, Preconditions},
    core::NamespaceResourceScope,
    runtime::{controller::Action, events::EventType},
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use turret_crds::{
    ModelGroup, ModelPlacement, ModelPlacementStatus, WorkerReport, condition::reason, document::Problem,
};

use super::{
    claims::ResourceClaimTemplate,
    pause::{self, Pause},
    plan::{self, InTheWay, Live, Observed, OwnedKind, Plan, Write},
    push::{self, PushError},
    resources,
    scaling::Decided,
    status::{self, Facts},
    victims::Mark,
};
use crate::{
    controllers::{
        asked,
        assess::{ObservedWorker, UNDECIDED, WantedWorkers, assess},
        context::{self, Context},
        pod::DELETION_COST,
        status_write::{self, FIELD_MANAGER, Gist},
        wakes::Key,
    },
    fleet::WorkerId,
    metrics::{Direction, Kind},
    telemetry::chain,
};

/// The kind's name in logs and metrics.
pub const KIND: &str = "ModelPlacement";

/// What moves with traffic is looked at this often.
const EVERY: Duration = Duration::from_secs(60);
/// A worker that could not be written to is tried again after this long.
const PUSH_RETRY: Duration = Duration::from_secs(1);
/// Marks on pods are looked for after this long if no change of a pod comes.
const MARK_RETRY: Duration = Duration::from_secs(1);
/// An object in the way that is not in the cache is looked for again after this long.
const TAKEN_RETRY: Duration = Duration::from_secs(30);

/// Why a look at a placement failed.
#[derive(Debug, thiserror::Error)]
pub enum ReconcileError {
    /// Whether a name is free could not be asked.
    #[error("failed to look for {kind:?} `{name}`")]
    Look {
        /// Kind of the object.
        kind: OwnedKind,
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// An owned object could not be written.
    #[error("failed to apply {kind:?} `{name}`")]
    Apply {
        /// Kind of the object.
        kind: OwnedKind,
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// A worker that is to leave first could not be marked so.
    #[error("failed to mark the pod `{name}`")]
    Mark {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// An owned object that is no longer needed could not be removed.
    #[error("failed to remove {kind:?} `{name}`")]
    Remove {
        /// Kind of the object.
        kind: OwnedKind,
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: kube::Error,
    },
    /// The status could not be written.
    #[error("failed to write the status")]
    Status(#[source] kube::Error),
}

impl ReconcileError {
    /// Whether the view was stale: look again as soon as the caches have caught up.
    pub fn is_conflict(&self) -> bool {
        let (Self::Look { source, .. }
        | Self::Apply { source, .. }
        | Self::Mark { source, .. }
        | Self::Remove { source, .. }
        | Self::Status(source)) = self;
        is_conflict(source)
    }

    /// What the API server says against an owned object: something in the spec that the CRD's
    /// rules let through, a quota, or a policy of the cluster.
    fn refused(&self) -> Option<String> {
        match self {
            Self::Apply { kind, name, source: kube::Error::Api(status) }
                if is_refused(status) || is_forbidden(status) =>
            {
                Some(format!("{} `{name}` is refused: {}", kind.name(), status.message))
            }
            _ => None,
        }
    }
}

/// Whether the API server refuses an object as it is: trying again does not help.
fn is_refused(status: &kube::core::Status) -> bool {
    status.is_invalid() || status.code == 400
}

/// Whether somebody must allow an object first. A namespace that is leaving forbids it too, and nobody is to be told.
fn is_forbidden(status: &kube::core::Status) -> bool {
    let causes = status.details.iter().flat_map(|details| &details.causes);
    status.is_forbidden() && !causes.into_iter().any(|cause| cause.reason == "NamespaceTerminating")
}

/// Whether an answer of the API server means that the object moved on, or is gone.
pub fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.is_conflict() || status.is_not_found())
}

/// Looks at a placement.
pub async fn reconcile(placement: Arc<ModelPlacement>, ctx: Arc<Context>) -> Result<Action, ReconcileError> {
    let _timer = ctx.metrics.reconcile(KIND);
    // Its objects are removed by garbage collection; there is nothing to do, and nothing to wait for.
    if placement.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let key: Key = (placement.namespace().unwrap_or_default(), placement.name_any());
    let groups = groups(&placement, &ctx);
    let public_keys = ctx.public_keys.borrow().clone();
    let now = Timestamp::now();
    let (live, workers) = (live(&key, &ctx), ctx.workers(&key));
    let published = || live.config_map.as_deref().and_then(resources::stored_hints).map(|(hints, _)| hints);
    let demand = ctx.demands.of(&key, published, now);
    let decided = ctx.decide_replicas(&placement, live.deployment.as_deref(), &workers);
    let observed = Observed {
        placement: &placement,
        replicas: decided.replicas,
        groups: groups.iter().map(|(key, group)| (key.clone(), group.as_ref())).collect(),
        namespace_labels: ctx.namespace_labels(&key.0),
        unreadable: unreadable(&placement, &live, &ctx),
        live,
        workers,
        demand,
        public_keys: &public_keys,
        default_image: &ctx.worker_image,
        allowed_source_hosts: ctx.allowed_source_hosts.as_deref(),
        serves_claim_templates: ctx.caches.claim_templates.is_some(),
    };
    let mut plan = plan::plan(&observed, now);
    let pause = asked::is_paused(&*placement).then(|| pause::hold_back(&mut plan, &observed.live));
    let ours = ask_for_names(&placement, &mut plan, &ctx).await?;
    let writes = std::mem::take(&mut plan.writes).into_iter();
    let mut writes = writes.map(|w| Write { exists: w.exists || ours.contains(&w.kind), ..w }).peekable();
    // The durable way first; then the workers are told at once, whatever becomes of the rest.
    let mut failed = None;
    if let Some(document) = writes.next_if(|w| w.kind == OwnedKind::ConfigMap) {
        match apply(&key, document, &ctx).await {
            // The status says why; else this passes.
            Err(error) if error.refused().is_none() => return Err(error),
            Ok(()) => {
                ctx.metrics.hints_published.inc_by(plan.publishes_hints.into());
            }
            Err(error) => failed = Some(error),
        }
    }
    // What is not stored is not told: the next look would take its number for used, and count on for ever.
    if failed.is_some() || !plan.in_the_way.is_empty() {
        plan.document = observed.live.config_map.as_deref().and_then(resources::document_ref);
    }
    tell_change(&placement, &decided, &ctx).await;
    let mut failures = Vec::new();
    let mut awaits_marks = false;
    // Nobody is told of a document that is not stored, and no pod is made that would wait for it. Of a placement that is
    // paused nothing is left to write, and its workers have what is stored.
    if failed.is_none() && pause.is_none() {
        failures = push_document(&key, &plan, &ctx).await;
        tell_conflicts(&placement, &failures, &ctx).await;
        match mark(&key, &plan.marks, &ctx).await {
            Ok(sent) => awaits_marks = sent,
            Err(error) => {
                awaits_marks = true;
                failed = Some(error);
            }
        }
        // ReplicaSets choose by what they have seen on pods: the Deployment is lowered when the pods show it here as well.
        for write in writes.filter(|w| !(awaits_marks && w.kind == OwnedKind::Deployment)) {
            if let Err(error) = apply(&key, write, &ctx).await {
                failed.get_or_insert(error);
            }
        }
        for template in &plan.stale_claim_templates {
            if let Err(error) = remove(&key, template, &ctx).await {
                failed.get_or_insert(error);
            }
        }
    }
    let refused = failed.as_ref().and_then(ReconcileError::refused);
    let replicas = match &pause {
        Some(_) => pause::replicas(&placement, observed.live.deployment.as_deref()),
        None => observed.replicas,
    };
    let looks = Looks {
        plan: &plan,
        pause: pause.as_ref(),
        replicas,
        workers: &observed.workers,
        live: &observed.live,
        refused,
        now,
    };
    let status_in = write_status(&placement, looks, &ctx).await?;
    if let Some(error) = failed {
        return Err(error);
    }

    let behind = pause.is_none()
        && plan.compiled.document.is_some()
        && updates_are_under_way(&plan, &observed.workers);
    let times = [
        Some(EVERY),
        plan.look_again,
        decided.look_again,
        awaits_marks.then_some(MARK_RETRY),
        status_in,
        (!failures.is_empty()).then_some(PUSH_RETRY),
        behind.then_some(push::AGAIN),
        (!plan.in_the_way.is_empty()).then_some(TAKEN_RETRY),
    ];
    Ok(Action::requeue(times.into_iter().flatten().min().unwrap_or(EVERY)))
}

fn groups(placement: &ModelPlacement, ctx: &Context) -> BTreeMap<Key, Arc<ModelGroup>> {
    let namespace = placement.namespace().unwrap_or_default();
    let targets = placement.spec.groups.iter().map(|g| g.target(&namespace));
    targets
        .filter_map(|(ns, name)| {
            Some(((ns.to_owned(), name.to_owned()), context::get(&ctx.caches.groups, ns, name)?))
        })
        .collect()
}

/// The groups that it names and that cannot be read, and why. Of another namespace only those that its workers serve: more is
/// not told of groups that may not allow it.
fn unreadable(placement: &ModelPlacement, live: &Live, ctx: &Context) -> BTreeMap<Key, String> {
    let namespace = placement.namespace().unwrap_or_default();
    let stored = live.config_map.as_deref().and_then(resources::document_ref);
    let is_served = |name: &str| stored.as_ref().is_some_and(|stored| stored.groups.contains_key(name));
    let groups = placement.spec.groups.iter();
    groups
        .filter_map(|placed| {
            let (of, name) = placed.target(&namespace);
            let key = (of.to_owned(), name.to_owned());
            let why = ctx.caches.unreadable_groups.why(&key)?;
            (of == namespace || is_served(&placed.name)).then_some((key, why))
        })
        .collect()
}

fn live(key: &Key, ctx: &Context) -> Live {
    let name = turret_crds::label::owned_name(&key.1);
    let caches = &ctx.caches;
    Live {
        config_map: context::get(&caches.config_maps, &key.0, &name),
        service: context::get(&caches.services, &key.0, &name),
        disruption_budget: context::get(&caches.disruption_budgets, &key.0, &name),
        deployment: context::get(&caches.deployments, &key.0, &name),
        claim_templates: caches.claim_templates.as_ref().map_or_else(Vec::new, |templates| {
            templates.state_filter(|template| context::placement_of(template).as_ref() == Some(key))
        }),
    }
}

/// Asks the API server about names of objects that are to be made: the caches hold only objects
/// with our labels. If one is taken, nothing is written. Returns the kinds that are ours after all.
async fn ask_for_names(
    placement: &ModelPlacement,
    plan: &mut Plan,
    ctx: &Context,
) -> Result<Vec<OwnedKind>, ReconcileError> {
    let mut ours = Vec::new();
    for write in plan.writes.iter().filter(|w| !w.exists) {
        let namespace = placement.namespace().unwrap_or_default();
        let name = write.name().to_owned();
        let kind = write.kind;
        let found = match kind {
            OwnedKind::ConfigMap => find::<ConfigMap>(ctx, &namespace, &name).await,
            OwnedKind::Service => find::<Service>(ctx, &namespace, &name).await,
            OwnedKind::PodDisruptionBudget => find::<PodDisruptionBudget>(ctx, &namespace, &name).await,
            OwnedKind::ResourceClaimTemplate => find::<ResourceClaimTemplate>(ctx, &namespace, &name).await,
            OwnedKind::Deployment => find::<Deployment>(ctx, &namespace, &name).await,
        };
        let found = found.map_err(|source| ReconcileError::Look { kind, name, source })?;
        match found.as_ref().map(|meta| plan::is_in_the_way(placement, &format!("{kind:?}"), meta)) {
            None => {}
            Some(None) => ours.push(kind),
            Some(Some(in_the_way)) => plan.in_the_way.push(in_the_way),
        }
    }
    if !plan.in_the_way.is_empty() {
        plan.writes.clear();
        plan.marks.clear();
        plan.stale_claim_templates.clear();
    }
    Ok(ours)
}

async fn find<K>(
    ctx: &Context,
    namespace: &str,
    name: &str,
) -> kube::Result<Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta>>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let found = Api::<K>::namespaced(ctx.client.clone(), namespace).get_metadata_opt(name).await?;
    Ok(found.map(|o| o.metadata))
}

async fn apply(key: &Key, write: Write, ctx: &Context) -> Result<(), ReconcileError> {
    let name = write.name().to_owned();
    let Write { kind, object, why, exists } = write;
    tracing::info!(?kind, namespace = key.0, %name, why, "apply");
    let sent = match kind {
        OwnedKind::ConfigMap => patch::<ConfigMap>(ctx, &key.0, &name, object, exists).await,
        OwnedKind::Service => patch::<Service>(ctx, &key.0, &name, object, exists).await,
        OwnedKind::PodDisruptionBudget => {
            patch::<PodDisruptionBudget>(ctx, &key.0, &name, object, exists).await
        }
        OwnedKind::ResourceClaimTemplate => {
            patch::<ResourceClaimTemplate>(ctx, &key.0, &name, object, exists).await
        }
        OwnedKind::Deployment => patch::<Deployment>(ctx, &key.0, &name, object, exists).await,
    };
    ctx.metrics.applies.get_or_create(&Kind { kind: kind.name() }).inc();
    sent.map_err(|source| ReconcileError::Apply { kind, name, source })
}

async fn patch<K>(ctx: &Context, namespace: &str, name: &str, object: Value, exists: bool) -> kube::Result<()>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>
        + Clone
        + DeserializeOwned
        + std::fmt::Debug,
{
    let params = PatchParams { force: exists, ..PatchParams::apply(FIELD_MANAGER) };
    let api = Api::<K>::namespaced(ctx.client.clone(), namespace);
    match api.patch_metadata(name, &params, &Patch::Apply(&object)).await {
        // Lists are merged by keys; an edit by hand can make a key (a Service's port) that clashes
        // with ours. Then our lists take the place of theirs.
        Err(kube::Error::Api(status)) if exists && is_refused(&status) => {
            let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
            api.patch_metadata(name, &params, &Patch::Merge(&object)).await.map(drop)
        }
        other => other.map(drop),
    }
}

/// Marks the pods of workers that are to leave first, and takes marks back. Returns whether the pods are still to show that
/// they are marked; not when the cluster does not let them be, since fewer workers are wanted all the same.
async fn mark(key: &Key, marks: &[Mark], ctx: &Context) -> Result<bool, ReconcileError> {
    let api = Api::<Pod>::namespaced(ctx.client.clone(), &key.0);
    let params = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let mut are_to_show = false;
    for Mark { pod, cost } in marks {
        tracing::info!(namespace = key.0, pod, cost, "mark");
        let patch = json!({"metadata": {"annotations": {DELETION_COST: cost}}});
        match api.patch_metadata(pod, &params, &Patch::Merge(&patch)).await {
            Ok(_) => are_to_show |= cost.is_some(),
            Err(kube::Error::Api(status)) if is_refused(&status) || status.is_forbidden() => {
                tracing::warn!(
                    namespace = key.0,
                    pod,
                    error = status.message,
                    "a pod cannot be marked as the one to leave"
                );
                return Ok(false);
            }
            Err(source) => return Err(ReconcileError::Mark { name: pod.clone(), source }),
        }
    }
    Ok(are_to_show)
}

/// Another number of workers is told, with its reason.
async fn tell_change(placement: &ModelPlacement, decided: &Decided, ctx: &Context) {
    let Some((before, why)) = &decided.change else { return };
    let replicas = decided.replicas;
    let direction = if replicas > *before { "up" } else { "down" };
    ctx.metrics.rescales.get_or_create(&Direction { direction }).inc();
    let (namespace, name) = (placement.namespace().unwrap_or_default(), placement.name_any());
    tracing::info!(namespace, name, before, replicas, why, "rescale");
    let note = format!("{before} → {replicas} workers: {why}");
    ctx.tell(placement, EventType::Normal, "Rescaled", "Scale", note).await;
}

/// Removes a template of claims, unless another one of the same name has taken its place.
async fn remove(key: &Key, template: &ResourceClaimTemplate, ctx: &Context) -> Result<(), ReconcileError> {
    let (kind, name) = (OwnedKind::ResourceClaimTemplate, template.name_any());
    tracing::info!(?kind, namespace = key.0, %name, "remove: no pod is made from it any more");
    let only_this = Preconditions { uid: template.uid(), resource_version: None };
    let params = DeleteParams::background().preconditions(only_this);
    let api = Api::<ResourceClaimTemplate>::namespaced(ctx.client.clone(), &key.0);
    match api.delete(&name, &params).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(source) => Err(ReconcileError::Remove { kind, name, source }),
        Ok(_) => Ok(()),
    }
}

async fn push_document(key: &Key, plan: &Plan, ctx: &Context) -> Vec<(WorkerId, PushError)> {
    let document = plan.compiled.document.as_ref().filter(|_| plan.in_the_way.is_empty());
    let Some(document) = document else { return Vec::new() };
    let failures = ctx.push(key, document, plan.hints.as_ref()).await;
    for (worker, error) in &failures {
        tracing::warn!(%worker, sequence = document.sequence, error = %chain(error), "failed to give a worker its document");
    }
    failures
}

/// A refused document is told, because it means that somebody else writes documents too.
async fn tell_conflicts(placement: &ModelPlacement, failures: &[(WorkerId, PushError)], ctx: &Context) {
    let conflict = failures.iter().find(|(_, e)| matches!(e, PushError::Conflict(_)));
    let told: OptionFuture<_> = conflict
        .map(|(worker, error)| {
            let note = format!("worker {worker}: {error}");
            ctx.tell(placement, EventType::Warning, "DocumentConflict", "Push", note)
        })
        .into();
    told.await;
}

fn updates_are_under_way(plan: &Plan, workers: &[ObservedWorker]) -> bool {
    let Some(document) = &plan.document else { return false };
    let is_behind = |report: &WorkerReport| {
        let serves = report.serves(document.sequence, &document.digest);
        !serves || push::lacks_hints(report, plan.hints.as_ref())
    };
    workers.iter().filter_map(|w| w.report.as_deref()).any(is_behind)
}

/// What a status is made from.
struct Looks<'a> {
    plan: &'a Plan,
    pause: Option<&'a Pause>,
    replicas: i32,
    workers: &'a [ObservedWorker],
    live: &'a Live,
    refused: Option<String>,
    now: Timestamp,
}

/// Writes the status if it differs. Returns when to look again for its sake.
async fn write_status(
    placement: &ModelPlacement,
    looks: Looks<'_>,
    ctx: &Context,
) -> Result<Option<Duration>, ReconcileError> {
    let Looks { plan, pause, replicas, workers, live, refused, now } = looks;
    let wanted =
        WantedWorkers { replicas, template: plan.template.as_deref(), document: plan.document.as_ref() };
    let assessment = assess(&wanted, live.deployment.as_deref(), workers);
    let leaving: Option<&InTheWay> = plan.in_the_way.iter().find(|o| o.is_leaving);
    if assessment.undecided {
        return Ok(Some(UNDECIDED));
    }
    let mut problems = plan::problems(&plan.compiled, &plan.in_the_way);
    problems.extend(refused.map(|message| Problem { reason: reason::INVALID, message }));
    let facts = Facts {
        placement,
        replicas,
        problems: &problems,
        waiting_for: leaving.map(|o| o.message.as_str()),
        assessment: &assessment,
        document: plan.compiled.document.as_ref(),
        sequence: plan.document.as_ref().map(|d| d.sequence),
        image: &plan.image,
        pause,
    };
    let (new, look_again) = status::status(&facts, now);
    let old: ModelPlacementStatus = status::ours(placement.status.as_ref());
    if new == old {
        return Ok(look_again);
    }
    let gist = |s: &ModelPlacementStatus| Gist::of(s.observed_generation, &s.conditions);
    let last = status_write::last_written(placement);
    if let Some(wait) = status_write::may_wait(gist(&old), gist(&new), last, now) {
        return Ok(Some(wait));
    }
    let namespace = placement.namespace().unwrap_or_default();
    // Before it is noted as handled: one too many does no harm.
    if new.last_handled_reconcile_at != old.last_handled_reconcile_at {
        ctx.look_again(&(namespace.clone(), placement.name_any())).await;
    }
    let api = Api::<ModelPlacement>::namespaced(ctx.client.clone(), &namespace);
    status_write::write(&api, placement, &new).await.map_err(ReconcileError::Status)?;
    ctx.count_status_write(KIND);
    ctx.tell_ready(placement, &old.conditions, &new.conditions).await;
    Ok(look_again)
}

#[cfg(test)]
mod tests {
    use kube::core::Status;
    use serde_json::json;

    use super::*;

    fn refusal(code: u16, reason: &str, cause: &str) -> Option<String> {
        let status: Status = serde_json::from_value(json!({
            "code": code, "reason": reason, "message": "no",
            "details": {"causes": [{"reason": cause, "message": "", "field": ""}]},
        }))
        .expect("a status");
        let source = kube::Error::Api(status.boxed());
        ReconcileError::Apply { kind: OwnedKind::Service, name: "s".into(), source }.refused()
    }

    #[test]
    fn what_somebody_must_change_or_allow_is_told_and_nothing_else() {
        let told = Some("Service `s` is refused: no".to_owned());
        assert_eq!(refusal(422, "Invalid", ""), told);
        assert_eq!(refusal(403, "Forbidden", ""), told, "a quota, or a policy");
        assert_eq!(refusal(403, "Forbidden", "NamespaceTerminating"), None);
        assert_eq!(refusal(409, "Conflict", ""), None);
        assert_eq!(refusal(500, "InternalError", ""), None);
    }
}
