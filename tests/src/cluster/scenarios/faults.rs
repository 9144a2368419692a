//! Things die: workers, and the operator.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::DeleteParams;

use super::{QWEN, case, model};
use crate::cluster::eventually::when;
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::load::{Load, Question};
use crate::cluster::objects::{group, placement};
use crate::cluster::process;
use crate::cluster::release::{Part, Release, is_ready};
use crate::cluster::space::Space;

/// One of two workers is killed like a crash, then one is deleted; the load notices neither.
///
/// The load is not streamed: an answer of which a part was sent cannot be sent again.
pub async fn service_continues_while_workers_are_killed(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "killed").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).replicas(2).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let load = Load::start(&space.gateway(), whole_questions(&family), 4);
    load.goes_on().await?;

    let victim = space.workers("shared").await?.remove(0);
    let restarts = space.lives("shared").await?[&victim.name_any()].1;
    process::find(&uid(&victim)?, "turret-worker")?.kill()?;
    space
        .eventually("the killed worker was restarted", async || {
            let lives = space.lives("shared").await?;
            Ok(when(lives[&victim.name_any()].1 > restarts, || format!("{lives:?}")))
        })
        .await?;
    all_workers_are_ready(&space, 2).await?;
    space.serves("shared", &[QWEN]).await?;
    load.goes_on().await?;

    let victim = space.workers("shared").await?.remove(1);
    space.all::<Pod>().delete(&victim.name_any(), &DeleteParams::default()).await?;
    space
        .eventually("another pod takes its place", async || {
            let lives = space.lives("shared").await?;
            let replaced = lives.len() == 2 && !lives.contains_key(&victim.name_any());
            Ok(when(replaced, || format!("{lives:?}")))
        })
        .await?;
    all_workers_are_ready(&space, 2).await?;
    space.serves("shared", &[QWEN]).await?;
    load.goes_on().await?;
    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    space.remove().await
}

/// The operator dies and comes back; workers and gateway serve on, and what changed meanwhile is
/// carried out.
pub async fn the_operator_is_killed_and_carries_on(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "operator-killed").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;
    let load = Load::start(&space.gateway(), whole_questions(&family), 2);

    for pod in release.pods(Part::Operator).await? {
        process::find(&uid(&pod)?, "turret-operator")?.kill()?;
    }
    let declared = declared.lens("shout", "lenses/shout");
    space.apply(&[declared.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let answer = case(&family, QWEN, Some("shout"));
    space.gateway().verify(&model(QWEN, Some("shout")), answer, Mode::Whole).await?;
    load.goes_on().await?;
    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    crate::cluster::space::changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

/// With no operator at all a worker that restarts reads its document from the mounted ConfigMap.
pub async fn a_worker_restarts_while_the_operator_is_down(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "operator-down").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    // Not the document it started with: that one is in the ConfigMap no more.
    let declared = declared.lens("terse", "lenses/terse");
    space.apply(&[declared.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let replicas = release.deployment(Part::Operator).await?.spec.and_then(|spec| spec.replicas).unwrap_or(1);

    release.scale(Part::Operator, 0).await?;
    let tried = restart_without_operator(&space, &family).await;
    // Whatever came of it, the other scenarios need the operator.
    release.scale(Part::Operator, replicas).await?;
    tried?;
    space.apply(&[declared.lens("shout", "lenses/shout").manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    space.remove().await
}

async fn restart_without_operator(space: &Space<'_>, family: &Family) -> Result<()> {
    let worker = space.workers("shared").await?.remove(0);
    let restarts = space.lives("shared").await?[&worker.name_any()].1;
    process::find(&uid(&worker)?, "turret-worker")?.kill()?;
    space
        .eventually("the killed worker was restarted", async || {
            let lives = space.lives("shared").await?;
            Ok(when(lives[&worker.name_any()].1 > restarts, || format!("{lives:?}")))
        })
        .await?;
    all_workers_are_ready(space, 1).await?;
    let gateway = space.gateway();
    // The gateway may need a moment to notice that the worker is back.
    space
        .eventually("the restarted worker answers", async || {
            let asked = gateway.ask(QWEN, &case(family, QWEN, None).messages, Mode::Whole).await;
            Ok(asked.map_err(|refused| refused.to_string()))
        })
        .await?;
    for lens in [None, Some("pirate"), Some("terse")] {
        gateway.verify(&model(QWEN, lens), case(family, QWEN, lens), Mode::Streamed).await?;
    }
    Ok(())
}

fn whole_questions(family: &Family) -> Vec<Question> {
    let questions = [None, Some("pirate")].map(|lens| Question {
        model: model(QWEN, lens),
        case: case(family, QWEN, lens).clone(),
        mode: Mode::Whole,
    });
    questions.into()
}

fn uid(pod: &Pod) -> Result<String> {
    pod.uid().context("a pod has a UID")
}

async fn all_workers_are_ready(space: &Space<'_>, count: usize) -> Result<()> {
    space
        .eventually(&format!("{count} workers are ready"), async || {
            let pods = space.workers("shared").await?;
            let ready = pods.iter().filter(|pod| is_ready(pod)).count();
            Ok(when(ready == count && pods.len() == count, || format!("{} pods, {ready} ready", pods.len())))
        })
        .await
}
