//! One story with real pods: the worker's own image on the real node.

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use turret_crds::{ModelGroup, ModelPlacement};

use super::plan::Crash;
use super::step::{Step, serves};
use super::story::Story;
use super::world::World;
use crate::cluster::family::{Family, copy_readable};
use crate::cluster::objects::{folder_as_claim, group, placement};
use crate::cluster::tools::Tools;

/// The group, over the first base of the demo family.
const GROUP: &str = "demo";
/// The placement.
const PLACEMENT: &str = "shared";

/// The operator is killed while it makes what a placement owns, and again while it adds a lens; it hears of neither write that it
/// did last. Both are carried out, no pod is replaced, no container restarts, and nothing is left when all is deleted.
pub async fn real_workers_are_told_what_a_killed_operator_had_begun(world: &World) -> Result<()> {
    let mut story = Story::begin(world, "real-pods", None, 0).await?;
    let folder = world.environment.volumes.join(&story.namespace);
    copy_readable(&Family::folder(), &folder)?;
    let tools = Tools::new(world.environment.clone());
    tools.apply(&folder_as_claim(&story.namespace, "models", &folder).to_string()).await?;
    story.proxy.begin_step(None);
    story.start(&world.environment.worker_image)?;
    story.settles("the operator starts", |state| Step::Start.is_reached(state)).await?;

    story.proxy.begin_step(Some(Crash { after: 3, answered: false }));
    let declared = group(GROUP, "base").lens("pirate", "lenses/pirate");
    story.apply::<ModelGroup>(&declared.manifest()).await?;
    story.apply::<ModelPlacement>(&placement(PLACEMENT, &[GROUP]).replicas(2).manifest()).await?;
    story.settles("two real workers", |state| serves(state, GROUP, PLACEMENT, 2)).await?;
    let lives = containers(&story).await?;

    story.proxy.begin_step(Some(Crash { after: 1, answered: false }));
    let declared = declared.lens("shout", "lenses/shout");
    story.apply::<ModelGroup>(&declared.manifest()).await?;
    story
        .settles("one more lens", |state| {
            serves(state, GROUP, PLACEMENT, 2)?;
            let ready = &state.objects[&format!("ModelGroup/{GROUP}")]["status"]["readyLenses"];
            if *ready == 2 { Ok(()) } else { Err(format!("{ready} of 2 lenses are ready")) }
        })
        .await?;
    let after = containers(&story).await?;
    ensure!(after == lives, "pods were replaced or restarted: {lives:?} became {after:?}");
    let operator = story.lives().context("the operator was started")?;
    ensure!(operator.kills == 2, "the operator was killed {} times", operator.kills);

    story.proxy.begin_step(None);
    story.delete::<ModelPlacement>(PLACEMENT).await?;
    story.delete::<ModelGroup>(GROUP).await?;
    story.settles("deleting everything", |state| Step::DeleteGroup.is_reached(state)).await?;
    story.remove().await
}

/// Name, UID and restarts of every pod.
async fn containers(story: &Story<'_>) -> Result<Vec<(String, String, i32)>> {
    let pods: Api<Pod> = story.all();
    let pods = pods.list(&ListParams::default()).await?.items;
    let life = |pod: &Pod| {
        let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        let restarts: i32 = containers.map(|container| container.restart_count).sum();
        (pod.name_any(), pod.uid().unwrap_or_default(), restarts)
    };
    Ok(pods.iter().map(life).collect())
}
