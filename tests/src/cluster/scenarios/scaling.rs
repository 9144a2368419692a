//! How many workers there are, and which ones leave.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kube::ResourceExt as _;
use serde_json::json;
use turret_crds::condition::READY;
use turret_crds::report::Tier;

use super::{QWEN, case, model};
use crate::cluster::eventually::when;
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::load::{Load, Question};
use crate::cluster::objects::{group, placement};
use crate::cluster::release::{Release, is_ready};
use crate::cluster::space::Space;
use crate::cluster::worker::Direct;

/// Annotation by which a ReplicaSet chooses.
const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// To zero when nobody asks, to one for a request that is held meanwhile, to two for many, and back: no request fails.
pub async fn autoscaling_follows_the_load_to_zero_and_back(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "autoscaling").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    let workers = placement("shared", &[QWEN]).replicas(7).autoscaled(json!({
        "minReplicas": 0, "maxReplicas": 2, "targetRunningPerReplica": 2,
        "scaleToZeroAfterSeconds": 10, "scaleDownDelaySeconds": 5,
    }));
    space.apply(&[declared.manifest(), workers.manifest()]).await?;
    // A first worker shows that it can be served at all.
    space.serves("shared", &[QWEN]).await?;
    space.placement_is("shared", READY, "True", "ScaledToZero").await?;
    space.group_is(QWEN, READY, "True", "ScaledToZero").await?;
    let asleep = space.placement("shared").await?;
    ensure!(asleep.spec.replicas == 7, "somebody wrote spec.replicas: {:?}", asleep.spec.replicas);
    let desired = asleep.status.and_then(|status| status.desired_replicas);
    ensure!(desired == Some(0), "{desired:?} workers are desired");
    workers_are(&space, 0).await?;

    let pirate = case(&family, QWEN, Some("pirate"));
    let began = Instant::now();
    space.gateway().verify(&model(QWEN, Some("pirate")), pirate, Mode::Whole).await?;
    println!("    a held request was answered {:.1} s after it came", began.elapsed().as_secs_f64());

    let question = |lens: Option<&str>| Question {
        model: model(QWEN, lens),
        case: case(&family, QWEN, lens).clone(),
        mode: Mode::Whole,
    };
    let questions = vec![question(Some("pirate")), question(None)];
    let many = Load::start(&space.gateway(), questions.clone(), 8);
    workers_are(&space, 2).await?;
    space.serves("shared", &[QWEN]).await?;
    many.goes_on().await?;

    // One at a time is a load for one worker.
    let few = Load::start(&space.gateway(), questions, 1);
    let answered = many.stop().await?;
    workers_are(&space, 1).await?;
    few.goes_on().await?;
    let answered = answered + few.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    space.placement_is("shared", READY, "True", "ScaledToZero").await?;
    space.remove().await
}

/// Where there are to be fewer, that worker stays which holds a lens in memory, though it is the younger one, which a ReplicaSet
/// would remove by itself.
pub async fn the_worker_that_loses_least_leaves(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "fewer").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let old = space.workers("shared").await?.remove(0).name_any();
    space.kubectl(&["scale", "mpl/shared", "--replicas=2"]).await?;
    workers_are(&space, 2).await?;
    space.serves("shared", &[QWEN]).await?;

    let workers = space.workers("shared").await?;
    let young = workers.iter().find(|pod| pod.name_any() != old).context("another worker came")?;
    let direct = Direct::to(release, &space, "shared", young).await?;
    let pirate = case(&family, QWEN, Some("pirate"));
    direct.client().verify(&model(QWEN, Some("pirate")), pirate, Mode::Whole).await?;
    let report = direct.report().await?;
    let tier = report.lens(QWEN, "pirate").map(|lens| lens.tier);
    ensure!(tier == Some(Tier::Device), "the lens is in {tier:?}");

    space.kubectl(&["scale", "mpl/shared", "--replicas=1"]).await?;
    workers_are(&space, 1).await?;
    let stays = space.workers("shared").await?.remove(0);
    ensure!(stays.name_any() == young.name_any(), "{old} stays, and with {} its lens left", young.name_any());
    ensure!(!stays.annotations().contains_key(DELETION_COST), "who stays is not marked");
    space.serves("shared", &[QWEN]).await?;
    space.remove().await
}

/// Waits until so many workers are there and take requests, and no others but those that leave.
async fn workers_are(space: &Space<'_>, count: usize) -> Result<()> {
    space
        .eventually(&format!("{count} workers are there"), async || {
            let workers = space.workers("shared").await?;
            let ready = workers.iter().filter(|pod| is_ready(pod)).count();
            Ok(when((workers.len(), ready) == (count, count), || {
                format!("{} workers, {ready} ready", workers.len())
            }))
        })
        .await
}
