//! Right answers: from every lens at once, and while two bases take turns on one worker.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::{LLAMA, QWEN, all_questions, case, interleave, model, whole_group};
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::load::ask_all;
use crate::cluster::objects::placement;
use crate::cluster::release::Release;
use crate::cluster::space::{Space, changed};
use crate::cluster::worker::Direct;

/// Every recorded question to both bases and all lenses, at once, streamed and not, over two workers.
pub async fn every_lens_of_both_groups_answers_what_was_recorded(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "answers").await?;
    let workers =
        placement("shared", &[QWEN, LLAMA]).replicas(2).switching_eagerly().on_gpu().computing_on_cpu();
    space
        .apply(&[
            whole_group(&family, QWEN).manifest(),
            whole_group(&family, LLAMA).manifest(),
            workers.manifest(),
        ])
        .await?;
    space.serves("shared", &[QWEN, LLAMA]).await?;

    let served = space.gateway().models().await.map_err(anyhow::Error::msg)?;
    let mut declared: Vec<String> = [QWEN, LLAMA].map(String::from).into();
    for group in [QWEN, LLAMA] {
        declared
            .extend(family.bases[super::base_of(group)].lenses.keys().map(|lens| model(group, Some(lens))));
    }
    declared.sort();
    ensure!(served == declared, "/v1/models lists {served:?} instead of {declared:?}");

    let questions = interleave(all_questions(&family, QWEN), all_questions(&family, LLAMA));
    let began = Instant::now();
    let count = ask_all(&space.gateway(), questions, 16).await?;
    println!("    {count} questions, 16 at a time: all right, {:.1} s", began.elapsed().as_secs_f64());
    space.remove().await
}

/// One worker, two bases: each request wants the other base than the one before.
pub async fn two_groups_take_turns_on_one_worker(release: &Release) -> Result<()> {
    const TURNS: u64 = 6;
    let family = Family::read()?;
    let space = Space::create(release, "turns").await?;
    space
        .apply(&[
            whole_group(&family, QWEN).manifest(),
            whole_group(&family, LLAMA).manifest(),
            placement("one", &[QWEN, LLAMA]).switching_eagerly().manifest(),
        ])
        .await?;
    space.serves("one", &[QWEN, LLAMA]).await?;
    let lives = space.lives("one").await?;
    let worker = Direct::to(release, &space, "one", &space.workers("one").await?[0]).await?;
    let before = worker.report().await?;

    let gateway = space.gateway();
    let mut took = Vec::new();
    for turn in 0..TURNS {
        for (group, lens) in [(QWEN, "terse"), (LLAMA, "polite")] {
            let lens = (turn % 2 == 0).then_some(lens);
            let mode = if turn % 3 == 0 { Mode::Streamed } else { Mode::Whole };
            let answer = gateway.verify(&model(group, lens), case(&family, group, lens), mode).await?;
            took.push(answer.first_token.as_secs_f64() * 1e3);
        }
    }
    took.sort_by(f64::total_cmp);
    let after = worker.report().await?;
    let switches = after.state.switches - before.state.switches;
    // The very first request may find its base already active.
    ensure!(switches >= 2 * TURNS - 1, "{} alternating requests made {switches} switches", 2 * TURNS);
    println!(
        "    {switches} switches; request with a switch: median {:.0} ms, longest {:.0} ms",
        took[took.len() / 2],
        took[took.len() - 1]
    );

    let questions = interleave(all_questions(&family, QWEN), all_questions(&family, LLAMA));
    let count = ask_all(&gateway, questions, 8).await?;
    println!("    {count} questions to both bases at once: all right");
    changed(&lives, &space.lives("one").await?)?;
    space.remove().await
}
