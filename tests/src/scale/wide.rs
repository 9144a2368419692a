//! A lens more in a group that has nearly as many as one may have.

use std::time::Duration;

use anyhow::Result;
use turret_crds::{ModelGroup, ModelPlacement};

use super::client::apply;
use super::found::Wide;
use super::layout;
use super::scene::Scene;
use super::writes::is_status_of;

/// Name of the group and of its placement.
const NAME: &str = "wide";
/// As many lenses as a group may have.
const LENSES: usize = 256;
/// All is written when nothing was for so long.
const QUIET: Duration = Duration::from_secs(2);

/// Measures it with an operator that is quiet.
pub async fn measure(scene: &Scene) -> Result<Wide> {
    let groups = scene.all::<ModelGroup>();
    apply(&groups, &layout::group(NAME, LENSES - 1, 0)).await?;
    apply(&scene.all::<ModelPlacement>(), &layout::placement(NAME, NAME, 1, 0)).await?;
    scene.deployment_of(NAME).await?;
    scene.make_pods().await?;
    scene.placement_ready(NAME).await?;
    let mut follow = scene.follow()?;
    follow.quiet(QUIET, scene.order.patience()).await?;

    let worker = scene.worker_of(NAME)?;
    let offered = worker.offers();
    let mut follow = scene.follow()?;
    apply(&groups, &layout::group(NAME, LENSES, 0)).await?;
    follow.quiet(QUIET, scene.order.patience()).await?;
    scene.placement_ready(NAME).await?;
    let count = |resource: &str| follow.writes().filter(|write| is_status_of(write, resource, NAME)).count();
    Ok(Wide {
        lenses: LENSES,
        worker_calls: worker.offers() - offered,
        group_status_writes: count("modelgroups"),
        placement_status_writes: count("modelplacements"),
    })
}
