//! Wiring: takes placements that are to be looked at, one visit at a time each, and says when a
//! failed one is looked at again.

use std::{future::Future, sync::Arc};

use futures::{FutureExt, StreamExt};
use kube::{
    ResourceExt,
    runtime::controller::{self, Action, applier},
};
use turret_crds::ModelPlacement;

use super::reconcile::{KIND, ReconcileError, reconcile};
use crate::{controllers::context::Context, telemetry::chain};

/// Looks at no more than `at_once` placements at the same time; 0 would be no bound. Runs until `stop`, then finishes what it
/// has begun.
pub async fn run(ctx: Arc<Context>, at_once: u16, stop: impl Future<Output = ()> + Send + 'static) {
    let wakes = ctx.placement_wakes.stream::<ModelPlacement>().map(Ok::<_, std::convert::Infallible>);
    let store = ctx.caches.placements.clone();
    let config = controller::Config::default().concurrency(at_once);
    let visit = |placement: Arc<ModelPlacement>, ctx: Arc<Context>| {
        async move {
            let key = (placement.namespace().unwrap_or_default(), placement.name_any());
            let action = reconcile(placement, ctx.clone()).await?;
            ctx.placement_retries.succeeded(&key);
            Ok::<Action, ReconcileError>(action)
        }
        .boxed()
    };
    applier(visit, again, ctx, store, wakes.take_until(stop.boxed()), config).for_each(|_| async {}).await;
}

fn again(placement: Arc<ModelPlacement>, error: &ReconcileError, ctx: Arc<Context>) -> Action {
    let (namespace, name) = (placement.namespace().unwrap_or_default(), placement.name_any());
    if error.is_conflict() {
        tracing::debug!(kind = KIND, namespace, name, error = %chain(error), "view was stale");
        return Action::requeue(ctx.placement_retries.was_stale((namespace, name)));
    }
    ctx.metrics.reconcile_failed(KIND);
    tracing::warn!(kind = KIND, namespace, name, error = %chain(error), "reconcile failed");
    Action::requeue(ctx.placement_retries.failed((namespace, name)))
}
