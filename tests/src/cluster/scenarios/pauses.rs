//! A placement that somebody pauses, and a look that somebody asks for.

use anyhow::{Result, ensure};
use turret_crds::condition::{PAUSED, STALLED};
use turret_crds::label::{PAUSED as PAUSED_ANNOTATION, RECONCILE_REQUESTED_AT};

use super::{QWEN, case, model};
use crate::cluster::eventually::when;
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::objects::{group, placement};
use crate::cluster::release::{Part, Release};
use crate::cluster::space::{Space, changed};

/// While it is paused nothing that it owns is written and its workers are told nothing; what is served goes on, and what is
/// declared meanwhile stalls and is carried out afterwards.
pub async fn a_paused_placement_is_left_alone_and_goes_on_afterwards(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "pauses").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let (lives, sequence) = (space.lives("shared").await?, space.document("shared").await?.sequence);

    space.kubectl(&["annotate", "mpl/shared", &format!("{PAUSED_ANNOTATION}=true")]).await?;
    space.placement_is("shared", PAUSED, "True", "Paused").await?;
    // All that is declared is carried out.
    space.serves("shared", &[QWEN]).await?;
    let mark = release.audit.mark()?;
    space.apply(&[declared.lens("shout", "lenses/shout").manifest()]).await?;
    space.kubectl(&["scale", "mpl/shared", "--replicas=2"]).await?;
    let held = space.placement_is("shared", STALLED, "True", "Paused").await?;
    let status = held.status.unwrap_or_default();
    let message = status.conditions.iter().find(|c| c.type_ == STALLED).map(|c| c.message.as_str());
    println!("    {}", message.unwrap_or_default());
    space.group_is(QWEN, STALLED, "True", "Paused").await?;
    let (pirate, shout) = (model(QWEN, Some("pirate")), model(QWEN, Some("shout")));
    space.gateway().verify(&pirate, case(&family, QWEN, Some("pirate")), Mode::Whole).await?;
    let owned = ["configmaps", "services", "deployments", "poddisruptionbudgets", "pods"];
    let mut written = release.audit.of(&release.user(Part::Operator).await?, mark)?;
    written.retain(|r| {
        let object = &r.object_ref;
        r.is_write() && object.namespace == space.name && owned.contains(&object.resource.as_str())
    });
    ensure!(written.is_empty(), "written while it was paused: {written:?}");
    ensure!(space.document("shared").await?.sequence == sequence, "another document was stored");
    changed(&lives, &space.lives("shared").await?)?;

    space.kubectl(&["annotate", "mpl/shared", &format!("{PAUSED_ANNOTATION}-")]).await?;
    space.serves("shared", &[QWEN]).await?;
    ensure!(space.workers("shared").await?.len() == 2, "the second worker is missing");
    space.gateway().verify(&shout, case(&family, QWEN, Some("shout")), Mode::Whole).await?;

    for object in ["mpl/shared".to_owned(), format!("mg/{QWEN}")] {
        space.kubectl(&["annotate", &object, &format!("{RECONCILE_REQUESTED_AT}=now")]).await?;
    }
    space
        .eventually("both say that the request was handled", async || {
            let placement = space.placement("shared").await?.status.unwrap_or_default();
            let group = space.group(QWEN).await?.status.unwrap_or_default();
            let handled = [placement.last_handled_reconcile_at, group.last_handled_reconcile_at];
            Ok(when(handled.iter().all(|h| h.as_deref() == Some("now")), || format!("{handled:?}")))
        })
        .await?;
    space.remove().await
}
