//! What is tried, one file for each thing a user relies on.

pub mod aliases;
pub mod answers;
pub mod deletion;
pub mod device;
pub mod faults;
pub mod leadership;
pub mod lenses;
pub mod memory;
pub mod namespaced;
pub mod pauses;
pub mod residency;
pub mod rights;
pub mod rollouts;
pub mod scaling;
pub mod sharing;
pub mod sources;
pub mod spread;
pub mod switches;

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use turret_crds::condition::{FailureReason, READY, RECONCILING, STALLED};

use super::eventually::when;
use super::family::{Case, Family, copy_readable};
use super::gateway::Mode;
use super::load::Question;
use super::objects::{Group, group};
use super::release::Release;
use super::space::Space;

/// The group over the Qwen base of the demo family, with all its lenses.
pub const QWEN: &str = "demo-qwen";
/// The group over the Llama base of the demo family, with all its lenses.
pub const LLAMA: &str = "demo-llama";

/// Folder of the base of a group.
fn base_of(group: &str) -> &'static str {
    match group {
        QWEN => "base",
        LLAMA => "base-b",
        other => panic!("the demo family has no group `{other}`"),
    }
}

/// A group with all its recorded lenses.
fn whole_group(family: &Family, name: &str) -> Group {
    let base = &family.bases[base_of(name)];
    base.lenses
        .iter()
        .fold(group(name, &base.path), |group, (lens, recorded)| group.lens(lens, &recorded.path))
}

/// What clients call a group or one of its lenses.
fn model(group: &str, lens: Option<&str>) -> String {
    lens.map_or_else(|| group.to_owned(), |lens| format!("{group}:{lens}"))
}

/// The first recorded case of a base or lens.
fn case<'f>(family: &'f Family, group: &str, lens: Option<&str>) -> &'f Case {
    &family.cases(base_of(group), lens)[0]
}

/// Every recorded question to a group's base and to each of its lenses, streamed in turns with whole.
fn all_questions(family: &Family, group: &str) -> Vec<Question> {
    let base = base_of(group);
    let lenses = family.bases[base].lenses.keys().map(|lens| Some(lens.as_str()));
    let mut questions = Vec::new();
    for lens in lenses.chain([None]) {
        for case in family.cases(base, lens) {
            let mode = if questions.len() % 2 == 0 { Mode::Whole } else { Mode::Streamed };
            questions.push(Question { model: model(group, lens), case: case.clone(), mode });
        }
    }
    questions
}

/// Two lists dealt into one, taking from each in turn.
fn interleave<T>(one: Vec<T>, other: Vec<T>) -> Vec<T> {
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut dealt = Vec::new();
    loop {
        let pair = [one.next(), other.next()];
        if pair.iter().all(Option::is_none) {
            return dealt;
        }
        dealt.extend(pair.into_iter().flatten());
    }
}

/// A question to the Qwen base and one to each of these lenses over it, all of whose files are those of a recorded one.
fn questions_to(family: &Family, lenses: &[(&str, &str)]) -> Vec<Question> {
    let base = Question { model: QWEN.into(), case: case(family, QWEN, None).clone(), mode: Mode::Whole };
    let modes = [Mode::Streamed, Mode::Whole].into_iter().cycle();
    let lenses = lenses.iter().zip(modes).map(|(&(lens, recorded), mode)| Question {
        model: model(QWEN, Some(lens)),
        case: case(family, QWEN, Some(recorded)).clone(),
        mode,
    });
    std::iter::once(base).chain(lenses).collect()
}

/// Waits until the gateway answers for a model that could not be served before, and answers right. It hears of what workers hold
/// at about the same time as the operator, not before.
async fn is_answered_again(space: &Space<'_>, model: &str, case: &Case) -> Result<()> {
    let gateway = space.gateway();
    space
        .eventually("the gateway has heard of it", async || {
            let asked = gateway.ask(model, &case.messages, Mode::Whole).await;
            Ok(when(asked.is_ok(), || format!("{:?}", asked.err())))
        })
        .await?;
    gateway.verify(model, case, Mode::Whole).await.map(drop)
}

/// Waits until one lens keeps the Qwen group from being ready, for this reason. The list of failed
/// lenses and what `kubectl get` prints must say the same; answers what is said of the lens.
async fn lens_fails(space: &Space<'_>, lens: &str, reason: FailureReason) -> Result<String> {
    space.group_is(QWEN, READY, "False", "LensesFailed").await?;
    // Only what may pass by itself is tried again.
    let condition = if reason.needs_change() { STALLED } else { RECONCILING };
    let group = space.group_is(QWEN, condition, "True", "LensesFailed").await?;
    let status = group.status.context("the operator wrote a status")?;
    let [failed] = &status.failed_lenses[..] else { bail!("not one lens failed: {status:?}") };
    ensure!((failed.name.as_str(), failed.reason) == (lens, reason), "another lens or reason: {failed:?}");

    let row = space.row(&["mg", QWEN]).await?;
    let said = (row.cell("READY")?, row.cell("REASON")?, row.cell("LENSES")?);
    let summary = status.lens_summary.as_deref().unwrap_or_default();
    ensure!(said == ("False", "LensesFailed", summary), "the status says {summary}, and kubectl {said:?}");
    let wide = space.row(&["mg", QWEN, "-o", "wide"]).await?;
    let message = wide.cell("MESSAGE")?;
    println!("    {message}");
    for word in [format!("`{lens}`"), reason.to_string(), failed.message.clone()] {
        ensure!(message.contains(&word), "{word:?} is not in what kubectl prints: {message}");
    }
    Ok(failed.message.clone())
}

/// A request for what cannot be served is refused with the reason.
async fn is_refused(space: &Space<'_>, model: &str, reason: FailureReason) -> Result<()> {
    let messages = serde_json::json!([{"role": "user", "content": "?"}]);
    match space.gateway().ask(model, &messages, Mode::Whole).await {
        Err(refused) if refused.status == 503 && refused.body.contains(&reason.to_string()) => Ok(()),
        other => bail!("`{model}` must be refused with 503 for {reason}; got {other:?}"),
    }
}

/// A base of about so many bytes with made-up weights, written by the worker's own program.
fn synthesise(release: &Release, folder: &Path, bytes: &str) -> Result<()> {
    let mut command = Command::new(&release.environment.worker);
    command.arg("synth").arg(folder).args(["--bytes", bytes, "--dtype", "BF16"]);
    let output = command.output().context("failed to run turret-worker synth")?;
    ensure!(output.status.success(), "turret-worker synth: {}", String::from_utf8_lossy(&output.stderr));
    // Made again with the permissions that a pod without privileges needs.
    copy_readable(folder, folder)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recorded_case_is_asked_in_both_modes_of_each_group() {
        let family = Family::read().unwrap();
        let questions = all_questions(&family, QWEN);
        assert_eq!(questions.len(), 6 * 9);
        assert!(questions.iter().any(|q| q.mode == Mode::Streamed && q.model == "demo-qwen:pirate"));
        assert!(questions.iter().any(|q| q.mode == Mode::Whole && q.model == "demo-qwen:pirate"));
        assert_eq!(interleave(vec![1, 3, 4], vec![2]), [1, 2, 3, 4]);
    }
}
