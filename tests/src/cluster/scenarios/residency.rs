//! What stays in memory when not everything can, under a load as users make it.

use std::fs;

use anyhow::{Context, Result, ensure};
use kube::ResourceExt as _;
use serde_json::{Value, json};
use turret_crds::report::Tier;

use super::{LLAMA, QWEN, base_of, interleave, model};
use crate::cluster::family::{Family, copy_readable, write_readable};
use crate::cluster::gateway::Mode;
use crate::cluster::load::{Question, ask_for};
use crate::cluster::objects::{Group, group, placement};
use crate::cluster::process;
use crate::cluster::recount::differences;
use crate::cluster::release::Release;
use crate::cluster::space::{Space, changed};
use crate::cluster::worker::Direct;
use crate::cluster::zipf::Zipf;
use crate::numbers::scattered;

/// Lenses that are made of each recorded one.
const COPIES: usize = 3;
/// Requests at a time.
const AT_A_TIME: usize = 8;
/// Of the choices.
const SEED: u64 = 1;

/// Two groups over two bases on one worker that has room for a third of their lenses, and a Zipf choice among all of them: every
/// answer is the recorded one, the pod neither restarts nor outgrows its memory, and what the worker says of itself in the end
/// is what a recount finds.
pub async fn a_zipf_load_on_two_groups_with_room_for_a_third_of_their_lenses(
    release: &Release,
) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "zipf").await?;
    let (qwen, llama) = (make_lenses(&space, &family, QWEN)?, make_lenses(&space, &family, LLAMA)?);
    let workers = placement("shared", &[QWEN, LLAMA]).switching_eagerly();
    let groups = [declare(&family, QWEN, &qwen).manifest(), declare(&family, LLAMA, &llama).manifest()];
    space.apply(&groups).await?;
    space.apply(&[workers.manifest()]).await?;
    space.serves("shared", &[QWEN, LLAMA]).await?;
    let lives = space.lives("shared").await?;
    let pod = space.workers("shared").await?.remove(0);

    // The popular ones are of both groups.
    let lenses = interleave(qwen, llama);
    let worker = Direct::to(release, &space, "shared", &pod).await?;
    let sizes: Vec<u64> = worker.report().await?.lenses.iter().filter_map(|lens| lens.bytes).collect();
    ensure!(sizes.len() == lenses.len(), "{} of {} lenses have a size", sizes.len(), lenses.len());
    let budget = sizes.iter().sum::<u64>() / 3;
    space.apply(&[workers.with_lens_budget(&budget.to_string()).manifest()]).await?;
    space.serves("shared", &[QWEN, LLAMA]).await?;

    let (count, zipf) = (lenses.len(), Zipf::new(lenses.len(), 1.0));
    let draw = move |number: u64| {
        let questions = &lenses[zipf.rank(scattered(SEED, 2 * number))].questions;
        let which = scattered(SEED, 2 * number + 1) % questions.len() as u64;
        questions[which as usize].clone()
    };
    let seconds = release.environment.zipf_load;
    let took = ask_for(&space.gateway(), draw, AT_A_TIME, seconds).await?;
    ensure!(took.len() >= 100, "only {} requests in {seconds:?}", took.len());

    changed(&lives, &space.lives("shared").await?)?;
    let uid = pod.uid().context("a pod has a UID")?;
    let memory = process::find(&uid, "turret-worker")?.memory()?;
    ensure!(memory.peak_bytes < memory.limit_bytes, "the pod was at its limit: {memory:?}");

    // Again: a token lives for five minutes.
    let worker = Direct::to(release, &space, "shared", &pod).await?;
    let report = space
        .eventually("the worker's report is what a recount finds", async || {
            let (report, samples) = (worker.report().await?, worker.metrics().await?);
            let mut found = differences(&report, &samples);
            let answered: u64 = report.lenses.iter().map(|lens| lens.served).sum();
            if answered != took.len() as u64 {
                found.push(format!("{answered} answers, of {}", took.len()));
            }
            Ok(if found.is_empty() { Ok(report) } else { Err(found.join("; ")) })
        })
        .await?;
    let device = report.state.tiers.iter().find(|tier| tier.tier == Tier::Device);
    let allowed = device.map(|tier| tier.lens_budget_bytes);
    ensure!(allowed == Some(budget), "{allowed:?} bytes are allowed for lenses, not {budget}");
    let errors: u64 = report.lenses.iter().map(|lens| lens.errors).sum();
    ensure!(errors == 0, "the worker counts {errors} requests that it did not answer");
    ensure!(report.state.evictions > 0, "nothing had to leave, so nothing was shown");

    let loads: u64 = report.lenses.iter().map(|lens| lens.loads).sum();
    let hits = 100.0 * (1.0 - loads as f64 / took.len() as f64);
    let ms = |share: f64| took[(share * (took.len() - 1) as f64) as usize].as_secs_f64() * 1e3;
    println!(
        "    {} requests in {} s over {count} lenses, all right: {hits:.1} % hits, {} evictions, {} switches; p50 {:.0} ms, \
         p99 {:.0} ms; {} of {} MiB at most",
        took.len(),
        seconds.as_secs(),
        report.state.evictions,
        report.state.switches,
        ms(0.5),
        ms(0.99),
        memory.peak_bytes >> 20,
        memory.limit_bytes >> 20,
    );
    space.remove().await
}

/// A lens that is made of a recorded one.
pub(super) struct Made {
    pub(super) name: String,
    /// On the volume `models`.
    folder: String,
    pub(super) questions: Vec<Question>,
}

/// Copies of each recorded lens of a group that are other files, and so other lenses: their configs say that they come from
/// elsewhere, which changes nothing of what they answer.
pub(super) fn make_lenses(space: &Space<'_>, family: &Family, group: &str) -> Result<Vec<Made>> {
    let mut made = Vec::new();
    for copy in 0..COPIES {
        for (recorded, lens) in &family.bases[base_of(group)].lenses {
            let name = format!("{recorded}-{copy}");
            let folder = format!("made/{group}/{name}");
            let to = space.files().join(&folder);
            copy_readable(&space.files().join(&lens.path), &to)?;
            let file = to.join("adapter_config.json");
            let mut config: Value = serde_json::from_slice(&fs::read(&file)?)?;
            config["base_model_name_or_path"] = json!(format!("elsewhere/{copy}"));
            write_readable(&file, &serde_json::to_vec(&config)?)?;
            let modes = [Mode::Whole, Mode::Streamed].into_iter().cycle();
            let questions = lens.cases.iter().zip(modes).map(|(case, mode)| Question {
                model: model(group, Some(&name)),
                case: case.clone(),
                mode,
            });
            let questions = questions.collect();
            made.push(Made { name, folder, questions });
        }
    }
    Ok(made)
}

/// A group with lenses that were made.
pub(super) fn declare(family: &Family, name: &str, lenses: &[Made]) -> Group {
    let declared = group(name, &family.bases[base_of(name)].path);
    lenses.iter().fold(declared, |declared, lens| declared.lens(&lens.name, &lens.folder))
}
