//! Placements that are new: they are made while the operator is stopped, so that it finds all of them at once and nobody else
//! asks for anything while it writes.

use std::time::Duration;

use anyhow::{Context, Result};
use turret_crds::{ModelGroup, ModelPlacement};

use super::bare;
use super::client::apply_all;
use super::found::Fresh;
use super::layout;
use super::operator::Operator;
use super::scene::{Scene, within};
use super::writes::{by_resource, span_seconds};

/// The operator must not lose its Lease meanwhile, nor its workers.
const LONGEST_PAUSE: Duration = Duration::from_secs(8);
/// All is written when nothing was for so long.
const QUIET: Duration = Duration::from_millis(1500);

/// Measures one round, and then the bare loop of the same writes.
pub async fn measure(scene: &Scene, operator: &Operator, round: usize) -> Result<Fresh> {
    let order = &scene.order;
    let names: Vec<String> = (0..order.fresh).map(|number| format!("fresh-{round}-{number:04}")).collect();
    let mut follow = scene.follow()?;
    let used = operator.usage()?.cpu_seconds;
    {
        let _paused = operator.pause()?;
        within(LONGEST_PAUSE, "making new objects", async {
            let groups = names.iter().map(|name| layout::group(name, order.lenses, 0));
            apply_all(&scene.all::<ModelGroup>(), groups).await?;
            let placements = names.iter().map(|name| layout::placement(name, name, 0, 0));
            apply_all(&scene.all::<ModelPlacement>(), placements).await
        })
        .await?;
    }
    follow.quiet(QUIET, order.patience()).await?;
    let cpu_seconds = operator.usage()?.cpu_seconds - used;
    let writes: Vec<_> = follow.writes().cloned().collect();
    let seconds = span_seconds(&writes).context("the operator wrote nothing for new placements")?;
    let bare_seconds = bare::replay(scene, &writes, round).await?;
    Ok(Fresh { placements: names.len(), writes: by_resource(&writes), seconds, cpu_seconds, bare_seconds })
}
