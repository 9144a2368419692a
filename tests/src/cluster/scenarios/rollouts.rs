//! Pods are replaced where there is no room for one more.
//!
//! The operator waits half a minute before it believes that, so the rollout begins in one scenario and is looked
//! at again in a later one; the scenarios between them do not mind.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use turret_crds::condition::READY;
use turret_crds::label;
use turret_crds::quantity::ByteQuantity;

use super::{QWEN, case};
use crate::cluster::eventually::when;
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::objects::{Placement, group, placement};
use crate::cluster::release::Release;
use crate::cluster::space::Space;

const SPACE: &str = "full-node";

/// A worker that takes most of the node is to be replaced: the new pod finds no room, the status says so, and
/// the old one serves on.
pub async fn a_rollout_begins_where_there_is_no_room_for_one_more(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, SPACE).await?;
    let workers = most_of_the_node(release).await?;
    space.apply(&[group(QWEN, "base").manifest(), workers.manifest()]).await?;
    space.serves("large", &[QWEN]).await?;
    space.apply(&[workers.draining_for(6).manifest()]).await?;
    space.placement_is("large", READY, "False", "Unschedulable").await?;
    ensure!(strategy(&space).await? == (1, 0), "not one more first: {:?}", strategy(&space).await?);
    space.gateway().verify(QWEN, case(&family, QWEN, None), Mode::Whole).await?;
    Ok(())
}

/// Later: the old worker made room, the new one serves, and the next rollout will try one more first again.
pub async fn the_rollout_ends_with_one_worker_less_meanwhile(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = match Space::find(release, SPACE).await? {
        Some(space) => space,
        None => {
            Box::pin(a_rollout_begins_where_there_is_no_room_for_one_more(release)).await?;
            Space::find(release, SPACE).await?.context("the rollout has begun")?
        }
    };
    space.serves("large", &[QWEN]).await?;
    // Ready means that it is of the newest template, and alone.
    let pods = space.workers("large").await?;
    ensure!(pods.len() == 1, "{} pods", pods.len());
    space
        .eventually("the strategy is one more first again", async || {
            let now = strategy(&space).await?;
            Ok(when(now == (1, 0), || format!("surge and unavailable {now:?}")))
        })
        .await?;
    space.gateway().verify(QWEN, case(&family, QWEN, None), Mode::Whole).await?;
    space.remove().await
}

/// One worker that asks for six tenths of the node's memory: a second one cannot be scheduled.
async fn most_of_the_node(release: &Release) -> Result<Placement> {
    let nodes: Api<Node> = Api::all(release.client.clone());
    let node = nodes.list(&ListParams::default()).await?.items.pop().context("the cluster has a node")?;
    let allocatable = node.status.clone().and_then(|status| status.allocatable).unwrap_or_default();
    let memory = allocatable.get("memory").with_context(|| format!("{} has no memory", node.name_any()))?;
    let bytes = ByteQuantity(memory.0.clone()).bytes()?;
    Ok(placement("large", &[QWEN]).asking_for_memory(bytes / 10 * 6))
}

/// `maxSurge` and `maxUnavailable` of the workers' Deployment.
async fn strategy(space: &Space<'_>) -> Result<(i32, i32)> {
    let deployment = space.all::<Deployment>().get(&label::owned_name("large")).await?;
    let rolling = deployment.spec.and_then(|s| s.strategy).and_then(|s| s.rolling_update);
    let rolling = rolling.context("the Deployment rolls")?;
    let number = |value: Option<IntOrString>| match value {
        Some(IntOrString::Int(number)) => Ok(number),
        other => anyhow::bail!("{other:?} is no number"),
    };
    Ok((number(rolling.max_surge)?, number(rolling.max_unavailable)?))
}
