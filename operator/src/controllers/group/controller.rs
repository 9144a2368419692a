//! Wiring: takes groups that are to be looked at, one visit at a time each, and says when a
//! failed one is looked at again.

use std::{future::Future, sync::Arc};

use futures::{FutureExt, StreamExt};
use kube::{
    ResourceExt,
    runtime::controller::{self, Action, applier},
};
use turret_crds::ModelGroup;

use super::reconcile::{KIND, ReconcileError, reconcile};
use crate::{controllers::context::Context, telemetry::chain};

/// Looks at no more than `at_once` groups at the same time; 0 would be no bound. Runs until `stop`, then finishes what it
/// has begun.
pub async fn run(ctx: Arc<Context>, at_once: u16, stop: impl Future<Output = ()> + Send + 'static) {
    let wakes = ctx.group_wakes.stream::<ModelGroup>().map(Ok::<_, std::convert::Infallible>);
    let store = ctx.caches.groups.clone();
    let config = controller::Config::default().concurrency(at_once);
    let visit = |group: Arc<ModelGroup>, ctx: Arc<Context>| {
        async move {
            let key = (group.namespace().unwrap_or_default(), group.name_any());
            let action = reconcile(group, ctx.clone()).await?;
            ctx.group_retries.succeeded(&key);
            Ok::<Action, ReconcileError>(action)
        }
        .boxed()
    };
    applier(visit, again, ctx, store, wakes.take_until(stop.boxed()), config).for_each(|_| async {}).await;
}

fn again(group: Arc<ModelGroup>, error: &ReconcileError, ctx: Arc<Context>) -> Action {
    let (namespace, name) = (group.namespace().unwrap_or_default(), group.name_any());
    if error.is_conflict() {
        tracing::debug!(kind = KIND, namespace, name, error = %chain(error), "view was stale");
        return Action::requeue(ctx.group_retries.was_stale((namespace, name)));
    }
    ctx.metrics.reconcile_failed(KIND);
    tracing::warn!(kind = KIND, namespace, name, error = %chain(error), "reconcile failed");
    Action::requeue(ctx.group_retries.failed((namespace, name)))
}
