//! Looks at one group: observe → status. It owns nothing, so there is nothing to apply.

use std::{sync::Arc, time::Duration};

use k8s_openapi::jiff::Timestamp;
use kube::{Api, ResourceExt, runtime::controller::Action};
use turret_crds::{ModelGroup, ModelGroupStatus, ModelPlacement, label};

use super::{
    naming,
    status::{self, Placed},
};
use crate::controllers::{
    asked,
    assess::{DocumentRef, UNDECIDED, WantedWorkers, assess},
    context::{self, Context},
    placement::{pause, reconcile::is_conflict, resources},
    status_write::{self, Gist},
    wakes::Key,
};

/// The kind's name in logs and metrics.
pub const KIND: &str = "ModelGroup";

/// Looked at this often even if nothing happens.
const EVERY: Duration = Duration::from_secs(300);

/// Why a look at a group failed: its status could not be written.
#[derive(Debug, thiserror::Error)]
#[error("failed to write the status")]
pub struct ReconcileError(#[source] kube::Error);

impl ReconcileError {
    /// Whether the view was stale: look again as soon as the caches have caught up.
    pub fn is_conflict(&self) -> bool {
        is_conflict(&self.0)
    }
}

/// A placement that names the group and may, with what is observed of it.
struct Observed {
    placement: Arc<ModelPlacement>,
    shown: String,
    refused: Option<String>,
    document: Option<DocumentRef>,
}

/// Looks at a group.
pub async fn reconcile(group: Arc<ModelGroup>, ctx: Arc<Context>) -> Result<Action, ReconcileError> {
    let _timer = ctx.metrics.reconcile(KIND);
    if group.metadata.deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }
    let now = Timestamp::now();
    let observed = observe(&group, &ctx);
    let placed: Vec<Placed<'_>> = observed.iter().flat_map(|o| placed(&group, o, &ctx)).collect();
    if placed.iter().any(|p| p.assessment.undecided) {
        return Ok(Action::requeue(UNDECIDED));
    }
    let new = status::status(&group, &placed, now);
    let old = status::ours(group.status.as_ref());
    if new == old {
        return Ok(Action::requeue(EVERY));
    }
    let gist = |s: &ModelGroupStatus| Gist::of(s.observed_generation, &s.conditions);
    if let Some(wait) =
        status_write::may_wait(gist(&old), gist(&new), status_write::last_written(&*group), now)
    {
        return Ok(Action::requeue(wait));
    }
    // Before it is noted as handled: one too many does no harm.
    if new.last_handled_reconcile_at != old.last_handled_reconcile_at {
        let acting = observed.iter().filter(|o| !asked::is_paused(&*o.placement));
        let keys: Vec<Key> =
            acting.map(|o| (o.placement.namespace().unwrap_or_default(), o.placement.name_any())).collect();
        for key in &keys {
            ctx.look_again(key).await;
        }
    }
    let api = Api::<ModelGroup>::namespaced(ctx.client.clone(), &group.namespace().unwrap_or_default());
    status_write::write(&api, &*group, &new).await.map_err(ReconcileError)?;
    ctx.count_status_write(KIND);
    ctx.tell_ready(&*group, &old.conditions, &new.conditions).await;
    Ok(Action::requeue(EVERY))
}

fn observe(group: &ModelGroup, ctx: &Context) -> Vec<Observed> {
    let labels = |namespace: &str| ctx.namespace_labels(namespace);
    let mut placements = ctx.caches.placements.state_filter(|p| naming::counts(group, p, labels));
    // Those of its own namespace come first: a status names only so many.
    placements.sort_by_key(|p| (p.namespace() != group.namespace(), p.namespace(), p.name_any()));
    placements
        .into_iter()
        .map(|placement| {
            let owned = label::owned_name(&placement.name_any());
            let namespace = placement.namespace().unwrap_or_default();
            let config_map = context::get(&ctx.caches.config_maps, &namespace, &owned);
            Observed {
                shown: naming::shown(group, &placement),
                refused: naming::refused(&placement),
                document: config_map.and_then(|c| resources::document_ref(&c)),
                placement,
            }
        })
        .collect()
}

fn placed<'a>(group: &ModelGroup, observed: &'a Observed, ctx: &Context) -> Vec<Placed<'a>> {
    let placement = &observed.placement;
    let namespace = placement.namespace().unwrap_or_default();
    let key = (namespace.clone(), placement.name_any());
    let deployment = context::get(&ctx.caches.deployments, &namespace, &label::owned_name(&key.1));
    let workers = ctx.workers(&key);
    let (of_group, name) = (group.namespace().unwrap_or_default(), group.name_any());
    let target = (of_group.as_str(), name.as_str());
    let names = placement.spec.groups.iter().filter(|g| g.target(&namespace) == target);
    let paused = asked::is_paused(&**placement);
    let replicas = pause::replicas(placement, deployment.as_deref());
    names
        .map(|name| {
            let wanted = WantedWorkers {
                replicas,
                template: deployment.as_deref().and_then(resources::template_hash),
                document: observed.document.as_ref(),
            };
            Placed {
                placement: &observed.shown,
                group: &name.name,
                replicas,
                refused: observed.refused.as_deref(),
                paused,
                document: observed.document.as_ref(),
                assessment: assess(&wanted, deployment.as_deref(), &workers),
            }
        })
        .collect()
}
