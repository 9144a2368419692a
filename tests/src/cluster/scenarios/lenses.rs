//! Lenses come, change and go by `kubectl apply`; broken ones are named and heal.

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use futures::{StreamExt as _, TryStreamExt as _};
use kube::runtime::{WatchStreamExt as _, watcher};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use turret_crds::ModelGroup;
use turret_crds::condition::{FailureReason, READY};

use super::{QWEN, case, model};
use crate::cluster::eventually::when;
use crate::cluster::family::{Family, copy_readable, digest_of, write_readable};
use crate::cluster::gateway::Mode;
use crate::cluster::load::{Load, Question};
use crate::cluster::objects::{group, placement};
use crate::cluster::process;
use crate::cluster::release::Release;
use crate::cluster::space::{Space, changed};
use crate::cluster::worker::Direct;

/// The three changes of a lens, under load, with no pod restarted and no request failed.
pub async fn a_lens_is_added_replaced_and_removed_without_a_restart(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "lenses").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate").lens("terse", "lenses/terse");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).replicas(2).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;
    let gateway = space.gateway();
    let load = Load::start(&gateway, steady_questions(&family), 4);
    let new = model(QWEN, Some("new"));

    // Added: from the command to the first token of the lens.
    let shout = digest_of(&space.files().join("lenses/shout"))?;
    let declared = declared.lens_of_digest("new", "lenses/shout", &shout);
    let question = case(&family, QWEN, Some("shout"));
    let began = Instant::now();
    let applied = async {
        space.apply(&[declared.manifest()]).await?;
        Ok::<_, anyhow::Error>(began.elapsed())
    };
    let answered = space.eventually("the new lens answers", async || {
        match gateway.ask(&new, &question.messages, Mode::Streamed).await {
            Ok(answer) => Ok(Ok((answer, began.elapsed()))),
            Err(refused) if refused.status == 404 => Ok(Err(refused.to_string())),
            Err(refused) => bail!("a lens that is being added was refused with {refused}"),
        }
    });
    let (applied, (answer, took)) = tokio::try_join!(applied, answered)?;
    ensure!(answer.text == question.text, "the new lens answered {:?}", answer.text);
    ensure!(answer.lens_digest.as_ref() == Some(&shout), "answered by {:?}, not {shout}", answer.lens_digest);
    let (took, applied) = (took.as_secs_f64() * 1e3, applied.as_secs_f64() * 1e3);
    println!(
        "    kubectl apply → answer of the new lens: {took:.0} ms (of which kubectl itself {applied:.0} ms)"
    );
    space.serves("shared", &[QWEN]).await?;

    // Replaced: other files under the same name, told by their digest.
    let french = digest_of(&space.files().join("lenses/french"))?;
    let declared = declared.lens_of_digest("new", "lenses/french", &french);
    let replacement = case(&family, QWEN, Some("french"));
    let began = Instant::now();
    space.apply(&[declared.manifest()]).await?;
    space
        .eventually("the replaced lens answers", async || {
            let answer = gateway.ask(&new, &replacement.messages, Mode::Whole).await;
            let answer = answer.map_err(|refused| anyhow::anyhow!("while it was replaced: {refused}"))?;
            // Old or new, but never a mixture: text and digest belong together.
            let which = (answer.text.as_str(), answer.lens_digest.as_deref());
            if which == (&replacement.text, Some(&french)) {
                return Ok(Ok(()));
            }
            ensure!(which == (&question.text, Some(&shout)), "a mixture answered: {which:?}");
            Ok(Err("the old lens still answers".into()))
        })
        .await?;
    println!("    replaced by another digest: {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    space.serves("shared", &[QWEN]).await?;
    // Ready means every worker: from now on none of them may answer with the old one.
    for _ in 0..8 {
        gateway.verify(&new, replacement, Mode::Whole).await?;
    }

    // Removed.
    let declared = declared.without("new");
    let began = Instant::now();
    space.apply(&[declared.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    match gateway.ask(&new, &question.messages, Mode::Whole).await {
        Err(refused) if refused.status == 404 && refused.body.contains(&new) => {}
        other => bail!("a removed lens must be refused with 404 that names it; got {other:?}"),
    }
    println!("    removed and refused with 404: {:.0} ms", began.elapsed().as_secs_f64() * 1e3);
    let listed = gateway.models().await.map_err(anyhow::Error::msg)?;
    ensure!(!listed.contains(&new), "/v1/models still lists a removed lens: {listed:?}");

    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

fn steady_questions(family: &Family) -> Vec<Question> {
    let models = [None, Some("pirate"), Some("terse")];
    let modes = [Mode::Whole, Mode::Streamed];
    let questions = models.into_iter().flat_map(|lens| {
        modes.map(|mode| Question { model: model(QWEN, lens), case: case(family, QWEN, lens).clone(), mode })
    });
    questions.collect()
}

/// While one of two workers is stopped, nothing may claim that all of them serve the new document.
pub async fn ready_turns_true_only_when_every_worker_reports_the_document(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "truth").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).replicas(2).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let old_sequence = space.document("shared").await?.sequence;
    let seen = Recorder::start(&space);

    let pods = space.workers("shared").await?;
    let running = Direct::to(release, &space, "shared", &pods[1]).await?;
    let uid = pods[0].metadata.uid.clone().context("a pod has a UID")?;
    let paused = process::find(&uid, "turret-worker")?.pause()?;
    let declared = declared.lens("shout", "lenses/shout");
    space.apply(&[declared.manifest()]).await?;
    let generation = space.group(QWEN).await?.metadata.generation;

    // The other worker has the document, and the operator has told so: that is when a careless
    // operator would say Ready.
    space
        .eventually("the worker that runs reports the new document", async || {
            let placement = space.placement("shared").await?;
            let sequence = space.document("shared").await?.sequence;
            let report = running.report().await?;
            let applied = report.state.document.as_ref().map(|document| document.sequence);
            let updated = placement.status.as_ref().and_then(|status| status.updated_replicas);
            let told = sequence > old_sequence && applied == Some(sequence) && updated == Some(1);
            Ok(when(told, || format!("stored {sequence}, applied {applied:?}, updated replicas {updated:?}")))
        })
        .await?;
    space.group_is(QWEN, READY, "False", "Updating").await?;
    let early = seen.ready_for(generation);
    ensure!(!early, "Ready=True for generation {generation:?} while a worker was stopped");
    drop(paused);

    space.serves("shared", &[QWEN]).await?;
    let sequence = space.document("shared").await?.sequence;
    for pod in space.workers("shared").await? {
        let report = Direct::to(release, &space, "shared", &pod).await?.report().await?;
        let document = report.state.document.context("a ready worker has a document")?;
        ensure!(document.sequence == sequence, "Ready, but a worker has document {}", document.sequence);
        let lens = report.lenses.iter().find(|lens| lens.group == QWEN && lens.name == "shout");
        let lens = lens.context("Ready, but a worker does not know the new lens")?;
        ensure!(lens.state.is_ready(), "Ready, but a worker says of the lens: {:?}", lens.state);
    }
    space
        .gateway()
        .verify(&model(QWEN, Some("shout")), case(&family, QWEN, Some("shout")), Mode::Whole)
        .await?;
    space.remove().await
}

/// Every state of a group that a watcher was ever shown.
struct Recorder {
    seen: Arc<Mutex<Vec<ModelGroup>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Recorder {
    fn start(space: &Space<'_>) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stream = watcher(space.all::<ModelGroup>(), watcher::Config::default()).applied_objects();
        let task = tokio::spawn({
            let seen = Arc::clone(&seen);
            async move {
                let mut stream = stream.into_stream().boxed();
                while let Some(Ok(group)) = stream.next().await {
                    seen.lock().expect("nobody panics with it").push(group);
                }
            }
        });
        Self { seen, task }
    }

    /// Whether Ready was ever true for this generation.
    fn ready_for(&self, generation: Option<i64>) -> bool {
        let seen = self.seen.lock().expect("nobody panics with it");
        let conditions =
            seen.iter().filter_map(|group| group.status.as_ref()).flat_map(|status| &status.conditions);
        conditions
            .filter(|condition| condition.type_ == READY && condition.status == "True")
            .any(|condition| condition.observed_generation == generation)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Five lenses broken in five ways beside a good one; each is named, none disturbs the others, and
/// each heals when what is wrong is put right.
pub async fn a_broken_lens_is_named_with_its_reason_and_heals(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "broken").await?;
    let files = space.files();
    let wanted = digest_of(&files.join("lenses/terse"))?;
    copy_readable(&files.join("lenses/shout"), &files.join("made/changed"))?;
    truncate(&files.join("lenses/french"), &files.join("made/short"))?;
    narrow(&files.join("lenses/json"), &files.join("made/narrow"))?;
    fs::create_dir_all(space.on_volume("elsewhere"))?;
    copy_readable(&files.join("lenses/pirate"), &space.on_volume("elsewhere").join("pirate"))?;
    let declared = group(QWEN, "base")
        .lens("good", "lenses/pirate")
        .lens_of_digest("changed", "made/changed", &wanted)
        .lens("short", "made/short")
        .lens("narrow", "made/narrow")
        .lens("absent", "made/absent")
        .lens_at("unlisted", "pvc://elsewhere/pirate", None);
    let workers = placement("shared", &[QWEN]);
    space.apply(&[declared.manifest(), workers.manifest()]).await?;

    let expected = [
        ("absent", FailureReason::SourceNotFound),
        ("changed", FailureReason::DigestMismatch),
        ("narrow", FailureReason::BaseMismatch),
        ("short", FailureReason::Malformed),
        ("unlisted", FailureReason::VolumeNotMounted),
    ];
    failures_are(&space, &expected).await?;
    let group = space.group_is(QWEN, READY, "False", "LensesFailed").await?;
    let status = group.status.context("the operator wrote a status")?;
    ensure!(status.lens_summary.as_deref() == Some("1/6"), "the column says {:?}", status.lens_summary);
    for failed in &status.failed_lenses {
        println!("    {}: {}: {}", failed.name, failed.reason, failed.message);
        ensure!(failed.message.len() > 20, "`{}` says too little: {:?}", failed.name, failed.message);
    }
    let gateway = space.gateway();
    for lens in [None, Some("good")] {
        let recorded = case(&family, QWEN, lens.map(|_| "pirate"));
        gateway.verify(&model(QWEN, lens), recorded, Mode::Whole).await?;
    }
    for (lens, reason) in expected {
        let asked =
            gateway.ask(&model(QWEN, Some(lens)), &case(&family, QWEN, None).messages, Mode::Whole).await;
        match asked {
            Err(refused) if refused.status >= 400 && refused.body.contains(&reason.to_string()) => {}
            other => bail!("`{lens}` must be refused for {reason}; got {other:?}"),
        }
    }

    // Put right what can be put right at the source: nothing is applied, the worker finds out.
    let lives = space.lives("shared").await?;
    copy_readable(&files.join("lenses/terse"), &files.join("made/changed"))?;
    copy_readable(&files.join("lenses/french"), &files.join("made/short"))?;
    copy_readable(&files.join("lenses/json"), &files.join("made/narrow"))?;
    copy_readable(&files.join("lenses/shout"), &files.join("made/absent"))?;
    let began = Instant::now();
    failures_are(&space, &expected[4..]).await?;
    println!("    four healed by themselves after {:.1} s", began.elapsed().as_secs_f64());
    changed(&lives, &space.lives("shared").await?)?;
    let healed = [("changed", "terse"), ("short", "french"), ("narrow", "json"), ("absent", "shout")];
    for (lens, recorded) in healed {
        gateway.verify(&model(QWEN, Some(lens)), case(&family, QWEN, Some(recorded)), Mode::Streamed).await?;
    }

    // The volume is the placement's: listing it replaces the pods, and then all is well.
    space.offer("elsewhere").await?;
    space.apply(&[workers.volume("elsewhere").manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let answer = case(&family, QWEN, Some("pirate"));
    gateway.verify(&model(QWEN, Some("unlisted")), answer, Mode::Whole).await?;
    space.remove().await
}

async fn failures_are(space: &Space<'_>, expected: &[(&str, FailureReason)]) -> Result<()> {
    let what = format!("status names exactly {expected:?}");
    space
        .at_length(&what, async || {
            let group = space.group(QWEN).await?;
            let status = group.status.unwrap_or_default();
            let mut failed: Vec<_> =
                status.failed_lenses.iter().map(|failed| (failed.name.as_str(), failed.reason)).collect();
            failed.sort_unstable();
            Ok(when(failed == expected, || format!("{failed:?}")))
        })
        .await
}

/// A copy of a lens whose weights end in the middle, as after a broken copy.
fn truncate(from: &Path, to: &Path) -> Result<()> {
    copy_readable(from, to)?;
    let file = to.join("adapter_model.safetensors");
    let bytes = fs::read(&file)?;
    write_readable(&file, &bytes[..bytes.len() / 2])
}

/// A copy of a lens whose `lora_A` maps have half as many columns as the base has features.
fn narrow(from: &Path, to: &Path) -> Result<()> {
    copy_readable(from, to)?;
    let file = to.join("adapter_model.safetensors");
    let bytes = fs::read(&file)?;
    let tensors = SafeTensors::deserialize(&bytes)?;
    let mut narrowed = Vec::new();
    for (name, tensor) in tensors.tensors() {
        let mut shape = tensor.shape().to_vec();
        let mut data = tensor.data().to_vec();
        if name.contains("lora_A") {
            shape[1] /= 2;
            data.truncate(data.len() / 2);
        }
        narrowed.push((name, tensor.dtype(), shape, data));
    }
    let views: Result<Vec<_>, _> = narrowed
        .iter()
        .map(|(name, dtype, shape, data)| {
            TensorView::new(*dtype, shape.clone(), data).map(|view| (name, view))
        })
        .collect();
    write_readable(&file, &safetensors::serialize(views?, None)?)
}
