//! Base switches that do not go smoothly: rows that take too long, a base that cannot be loaded.

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use turret_crds::condition::READY;

use super::{LLAMA, QWEN, case, synthesise};
use crate::cluster::eventually::when;
use crate::cluster::family::{Family, copy_readable, write_readable};
use crate::cluster::gateway::Mode;
use crate::cluster::objects::{group, placement};
use crate::cluster::release::Release;
use crate::cluster::space::Space;
use crate::cluster::worker::Direct;

/// A row that goes on for longer than `drainSeconds` is preempted: those who waited for the other base are answered, and then
/// it goes on where it was, to the answer that it has undisturbed.
pub async fn rows_are_preempted_when_the_drain_is_over(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "drain").await?;
    synthesise(release, &space.files().join("slow"), "64Mi")?;
    let workers = placement("one", &["slow", QWEN])
        .switching_eagerly()
        .draining_bases_for(1)
        .with_device_budget("448Mi");
    space
        .apply(&[group("slow", "slow/base").manifest(), group(QWEN, "base").manifest(), workers.manifest()])
        .await?;
    space.serves("one", &["slow", QWEN]).await?;
    let worker = Direct::to(release, &space, "one", &space.workers("one").await?[0]).await?;

    let gateway = space.gateway();
    // Some seconds of work; a made-up base does not come to an end by itself.
    let body =
        json!({"model": "slow", "prompt": [5, 6, 7], "max_tokens": 1500, "temperature": 0, "stream": true});
    let ask = || {
        let (gateway, body) = (gateway.clone(), body.clone());
        async move { gateway.stream("/v1/completions", &body).await }
    };
    let row = tokio::spawn(ask());
    space
        .eventually("the long row runs", async || {
            let state = worker.report().await?.state;
            Ok(when(state.running_rows == 1, || format!("{} rows", state.running_rows)))
        })
        .await?;
    let before = worker.report().await?.state.switches;
    let answer = gateway.verify(QWEN, case(&family, QWEN, None), Mode::Whole).await?;
    ensure!(!row.is_finished(), "the row ended before anybody waited long enough for it to be preempted");
    let refused = |refused| anyhow::anyhow!("the long row was refused: {refused}");
    let preempted = row.await?.map_err(refused)?;
    let undisturbed = ask().await.map_err(refused)?;
    let switched = worker.report().await?.state.switches - before;
    println!(
        "    the other base answered after {:.1} s; the row of {} events went on after {switched} switches",
        answer.first_token.as_secs_f64(),
        preempted.len(),
    );
    ensure!(text(&preempted)? == text(&undisturbed)?, "the row went on with another answer");
    ensure!(switched == 2, "{switched} switches there and back");
    space.remove().await
}

/// All text of a stream, which must have come to its end.
fn text(events: &[serde_json::Value]) -> Result<String> {
    let last = events.last().context("the stream is empty")?;
    ensure!(last["choices"][0]["finish_reason"] == "length", "the stream ended with {last}");
    Ok(events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect())
}

/// The other base is damaged on its volume: the switch fails, the old base is active again and serves, the group
/// is named with its reason, and it heals.
pub async fn a_failed_switch_goes_back_to_the_old_base(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "rollback").await?;
    // One base fits beside the lens budget, two do not: the old one must leave before the new one comes.
    let workers = placement("one", &[QWEN, LLAMA]).switching_eagerly().with_room_for_one_base();
    let declared = [group(QWEN, "base").manifest(), group(LLAMA, "base-b").manifest(), workers.manifest()];
    space.apply(&declared).await?;
    space.serves("one", &[QWEN, LLAMA]).await?;
    let gateway = space.gateway();
    gateway.verify(QWEN, case(&family, QWEN, None), Mode::Whole).await?;

    let weights = space.files().join("base-b/model.safetensors");
    let whole = std::fs::read(&weights)?;
    write_readable(&weights, &whole[..whole.len() / 2])?;
    match gateway.ask(LLAMA, &case(&family, LLAMA, None).messages, Mode::Whole).await {
        Err(refused) if refused.status == 503 && refused.body.contains("Malformed") => {
            println!("    {}", refused.body.trim());
        }
        other => bail!("a base that is cut short must be refused with 503 and its reason; got {other:?}"),
    }
    gateway.verify(QWEN, case(&family, QWEN, None), Mode::Streamed).await?;
    space.group_is(LLAMA, READY, "False", "BaseFailed").await?;
    space.group_is(QWEN, READY, "True", "Serving").await?;
    space.placement_is("one", READY, "False", "BaseFailed").await?;

    copy_readable(&Family::folder().join("base-b"), &space.files().join("base-b"))?;
    space.serves("one", &[QWEN, LLAMA]).await?;
    for group in [LLAMA, QWEN] {
        gateway.verify(group, case(&family, group, None), Mode::Whole).await?;
    }
    space.remove().await
}
