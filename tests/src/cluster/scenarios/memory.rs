//! Memory: budgets that cannot be met, what is larger than they are, and what is freed when nothing is declared any more.

use anyhow::{Context, Result, ensure};
use kube::api::DeleteParams;
use serde_json::json;
use turret_crds::ModelGroup;
use turret_crds::condition::{AVAILABLE, FailureReason, READY, STALLED};
use turret_crds::report::Tier;

use super::{QWEN, case, is_answered_again, is_refused, lens_fails, model, questions_to, synthesise};
use crate::cluster::eventually::when;
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::load::{Load, Question};
use crate::cluster::objects::{group, placement};
use crate::cluster::release::Release;
use crate::cluster::space::{Space, changed};
use crate::cluster::worker::Direct;

/// A device budget below what the base needs: refused with numbers while the old one serves on, and what the
/// message asks for is enough.
pub async fn a_budget_that_cannot_be_met_is_told_and_the_old_one_stays(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "budget").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    let workers = placement("shared", &[QWEN]);
    space.apply(&[declared.manifest(), workers.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;
    let questions = [None, Some("pirate")].map(|lens| Question {
        model: model(QWEN, lens),
        case: case(&family, QWEN, lens).clone(),
        mode: Mode::Whole,
    });
    let load = Load::start(&space.gateway(), questions.into(), 2);

    space.apply(&[workers.clone().with_device_budget("2Mi").manifest()]).await?;
    let stalled = space.placement_is("shared", STALLED, "True", "DoesNotFit").await?;
    let conditions = stalled.status.unwrap_or_default().conditions;
    let said = |type_: &str| conditions.iter().find(|c| c.type_ == type_);
    let message = said(READY).map(|c| c.message.clone()).unwrap_or_default();
    println!("    {message}");
    ensure!(said(READY).is_some_and(|c| c.status == "False"), "{conditions:?}");
    ensure!(said(AVAILABLE).is_some_and(|c| c.status == "True"), "{conditions:?}");
    ensure!(message.contains("2097152"), "the budget is not named: {message}");
    // The group itself is served as declared.
    space.group_is(QWEN, READY, "True", "Serving").await?;

    let needed = message.split_once("to at least ").and_then(|(_, rest)| rest.split(' ').next());
    let needed = needed.with_context(|| format!("the message does not say how much is enough: {message}"))?;
    space.apply(&[workers.with_device_budget(needed).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

/// A lens larger than the lens budget: named with the numbers while the others are served. Patching the budget to the number that
/// is named is enough, and nothing restarts.
pub async fn a_lens_larger_than_its_budget_is_told_and_what_the_message_asks_for_serves_it(
    release: &Release,
) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "large-lens").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate").lens("terse", "lenses/terse");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;
    let worker = Direct::to(release, &space, "shared", &space.workers("shared").await?[0]).await?;
    let report = worker.report().await?;
    let bytes = |lens: &str| {
        let lens = report.lens(QWEN, lens).and_then(|lens| lens.bytes);
        lens.context("a lens that was found good has a size")
    };
    let (small, large) = (bytes("pirate")?, bytes("terse")?);
    ensure!(small < large, "`pirate` takes {small} bytes, `terse` {large}");
    let load = Load::start(&space.gateway(), questions_to(&family, &[("pirate", "pirate")]), 2);

    let budget = (small + large) / 2;
    space.patch("mpl/shared", &json!({"spec": {"memory": {"lensBudget": budget.to_string()}}})).await?;
    let message = lens_fails(&space, "terse", FailureReason::DoesNotFit).await?;
    for number in [large, budget] {
        ensure!(message.contains(&number.to_string()), "{number} is not named: {message}");
    }
    is_refused(&space, &model(QWEN, Some("terse")), FailureReason::DoesNotFit).await?;
    load.goes_on().await?;

    space.patch("mpl/shared", &json!({"spec": {"memory": {"lensBudget": large.to_string()}}})).await?;
    space.serves("shared", &[QWEN]).await?;
    let answer = case(&family, QWEN, Some("terse"));
    is_answered_again(&space, &model(QWEN, Some("terse")), answer).await?;
    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

/// A base that does not fit the device budget even alone: its group is named with the numbers while the other one is served.
/// Patching the budget to the number that is named is enough, and nothing restarts.
pub async fn a_base_larger_than_the_device_is_told_and_the_other_group_is_served(
    release: &Release,
) -> Result<()> {
    const LARGE: &str = "large";
    let family = Family::read()?;
    let space = Space::create(release, "large-base").await?;
    synthesise(release, &space.files().join("large"), "16Mi")?;
    let small = group(QWEN, "base").lens("pirate", "lenses/pirate");
    let workers = placement("shared", &[QWEN, LARGE]).switching_eagerly().with_room_for_one_base();
    space.apply(&[small.manifest(), group(LARGE, "large/base").manifest(), workers.manifest()]).await?;
    space.group_is(LARGE, READY, "False", "BaseFailed").await?;
    space.group_is(LARGE, STALLED, "True", "BaseFailed").await?;
    space.group_is(QWEN, READY, "True", "Serving").await?;
    space.placement_is("shared", READY, "False", "BaseFailed").await?;
    let lives = space.lives("shared").await?;
    let load = Load::start(&space.gateway(), questions_to(&family, &[("pirate", "pirate")]), 2);

    let row = space.row(&["mg", LARGE, "-o", "wide"]).await?;
    let said = (row.cell("READY")?, row.cell("REASON")?);
    ensure!(said == ("False", "BaseFailed"), "kubectl prints {row:?}");
    let message = row.cell("MESSAGE")?;
    println!("    {message}");
    ensure!(message.contains(&FailureReason::DoesNotFit.to_string()), "the reason is not named: {message}");
    let needed = message.split_once("to at least ").and_then(|(_, rest)| rest.split(' ').next());
    let needed = needed.with_context(|| format!("the message does not say how much is enough: {message}"))?;
    is_refused(&space, LARGE, FailureReason::DoesNotFit).await?;
    load.goes_on().await?;

    space.patch("mpl/shared", &json!({"spec": {"memory": {"deviceBudget": needed}}})).await?;
    space.serves("shared", &[QWEN, LARGE]).await?;
    load.goes_on().await?;
    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    let gateway = space.gateway();
    // Made-up weights answer, whatever they say.
    let question = &case(&family, QWEN, None).messages;
    let answer = gateway.ask(LARGE, question, Mode::Whole).await;
    answer.map_err(|refused| anyhow::anyhow!("the large base was refused: {refused}"))?;
    gateway.verify(QWEN, case(&family, QWEN, None), Mode::Whole).await?;
    changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

/// The last group of a placement is deleted: nothing of it is served, or held, and the status says so.
pub async fn nothing_is_held_once_the_last_group_is_gone(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "empty").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let pirate = model(QWEN, Some("pirate"));
    let gateway = space.gateway();
    gateway.verify(&pirate, case(&family, QWEN, Some("pirate")), Mode::Whole).await?;
    let lives = space.lives("shared").await?;
    let worker = Direct::to(release, &space, "shared", &space.workers("shared").await?[0]).await?;

    space.all::<ModelGroup>().delete(QWEN, &DeleteParams::default()).await?;
    space.placement_is("shared", READY, "False", "GroupNotFound").await?;
    space
        .eventually("the worker's memory is free", async || {
            let report = worker.report().await?;
            let device = report.state.tiers.iter().find(|tier| tier.tier == Tier::Device);
            let held = device.map_or(0, |tier| tier.base_bytes + tier.lens_bytes + tier.working_bytes);
            let known = report.bases.len() + report.lenses.len();
            Ok(when(held == 0 && known == 0, || format!("{held} bytes, {known} artifacts")))
        })
        .await?;
    space.placement_is("shared", AVAILABLE, "False", "GroupNotFound").await?;
    for model in [QWEN, &pirate] {
        let messages = &case(&family, QWEN, None).messages;
        let refused = gateway.ask(model, messages, Mode::Whole).await.err().map(|refused| refused.status);
        ensure!(refused == Some(404), "`{model}` is not declared any more and was refused with {refused:?}");
        let direct =
            worker.client().ask(model, messages, Mode::Whole).await.err().map(|refused| refused.status);
        ensure!(direct == Some(404), "the worker itself refused `{model}` with {direct:?}");
    }

    space.apply(&[declared.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    gateway.verify(&pirate, case(&family, QWEN, Some("pirate")), Mode::Whole).await?;
    changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}
