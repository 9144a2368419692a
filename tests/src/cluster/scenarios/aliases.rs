//! Aliases: a name goes on to be answered by its old lens until every worker can serve the new one.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use turret_crds::ModelGroup;
use turret_crds::condition::READY;

use super::sources::{hub, on_hub};
use super::{QWEN, base_of, case, model};
use crate::cluster::eventually::when;
use crate::cluster::family::{Case, Family};
use crate::cluster::gateway::{Gateway, Mode};
use crate::cluster::objects::{group, placement};
use crate::cluster::release::Release;
use crate::cluster::space::{Space, changed};

/// The alias is asked one request after another while its target changes, is missing and changes back: each answer is that of
/// a lens it led to at the time, and none fails.
pub async fn an_alias_moves_when_every_worker_can_serve_its_new_target(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let hub = hub(release).await?;
    let space = Space::create(release, "aliases").await?;
    let workers = placement("shared", &[QWEN]).replicas(2).asking_hub(&hub.endpoint);
    let declared = group(QWEN, "base").lens("old", "lenses/pirate");
    space.apply(&[declared.clone().alias("voice", "old").manifest(), workers.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;
    let (gateway, voice) = (space.gateway(), model(QWEN, Some("voice")));
    let old = case(&family, QWEN, Some("pirate"));
    let new = family.cases(base_of(QWEN), Some("shout")).iter().find(|case| case.messages == old.messages);
    let new = new.context("no question was recorded of both lenses")?;
    gateway.verify(&voice, old, Mode::Whole).await?;
    let asking = Asking::start(&gateway, &voice, &old.messages);

    // The new target is slow to come.
    hub.hold("lenses/shout/adapter_config.json");
    let declared = declared.lens_of("new", on_hub("lenses/shout"));
    space.apply(&[declared.clone().alias("voice", "new").manifest()]).await?;
    let pending = space.group_is(QWEN, READY, "False", "AliasPending").await?;
    is_said(&pending, &["alias `voice` stays at `old`", "moves to `new`", "is still checking `new`"])?;
    for _ in 0..8 {
        gateway.verify(&voice, old, Mode::Streamed).await?;
    }
    leads_to(&gateway, "old").await?;
    hub.release();
    space.serves("shared", &[QWEN]).await?;
    is_answered_by(&space, &voice, new).await?;
    for _ in 0..8 {
        gateway.verify(&voice, new, Mode::Whole).await?;
    }
    leads_to(&gateway, "new").await?;

    // The next one is missing.
    let broken = declared.clone().lens("missing", "lenses/missing").alias("voice", "missing");
    space.apply(&[broken.manifest()]).await?;
    let failed = space.group_is(QWEN, READY, "False", "LensesFailed").await?;
    is_said(&failed, &["`missing`: SourceNotFound", "alias `voice` stays at `new`"])?;
    for _ in 0..8 {
        gateway.verify(&voice, new, Mode::Streamed).await?;
    }
    let answers = asking.stop().await?;
    let switched =
        answers.iter().position(|text| *text == new.text).context("the new lens never answered")?;
    let (before, after) = answers.split_at(switched);
    let in_order = before.iter().all(|text| *text == old.text) && after.iter().all(|text| *text == new.text);
    ensure!(in_order, "not first the old and then the new: {answers:?}");
    println!("    {} requests meanwhile, {switched} of them before the cut-over, all right", answers.len());

    // And back.
    space.apply(&[declared.alias("voice", "old").manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    is_answered_by(&space, &voice, old).await?;
    changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

/// What `Ready` says contains all of these words.
fn is_said(group: &ModelGroup, words: &[&str]) -> Result<()> {
    let mut conditions = group.status.iter().flat_map(|status| &status.conditions);
    let ready = conditions.find(|condition| condition.type_ == READY);
    let message = &ready.context("nothing is said about Ready")?.message;
    println!("    {message}");
    for word in words {
        ensure!(message.contains(word), "{word:?} is not in: {message}");
    }
    Ok(())
}

/// `/v1/models` tells where the alias leads.
async fn leads_to(gateway: &Gateway, lens: &str) -> Result<()> {
    let listed = gateway.get("/v1/models/voice").await.map_err(anyhow::Error::msg)?;
    let targets = json!([{"lens": lens, "weight": 1}]);
    ensure!(listed["targets"] == targets, "the alias must lead to {targets}: {listed}");
    Ok(())
}

/// Waits until the gateway has heard where the alias leads now.
async fn is_answered_by(space: &Space<'_>, alias: &str, case: &Case) -> Result<()> {
    let gateway = space.gateway();
    space
        .eventually("the gateway has heard where the alias leads", async || {
            let answer = gateway.ask(alias, &case.messages, Mode::Whole).await;
            let text = answer.map_err(|refused| anyhow::anyhow!("meanwhile: {refused}"))?.text;
            Ok(when(text == case.text, || text.clone()))
        })
        .await
}

/// Asks one question again and again, one request after another. Ends when it is dropped.
struct Asking {
    stop: Arc<AtomicBool>,
    asker: JoinSet<Result<Vec<String>, String>>,
}

impl Asking {
    fn start(gateway: &Gateway, name: &str, messages: &Value) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (gateway, name, messages) = (gateway.clone(), name.to_owned(), messages.clone());
        let stopped = Arc::clone(&stop);
        let mut asker = JoinSet::new();
        asker.spawn(async move {
            let mut texts = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let mode = if texts.len() % 2 == 0 { Mode::Whole } else { Mode::Streamed };
                match gateway.ask(&name, &messages, mode).await {
                    Ok(answer) => texts.push(answer.text),
                    Err(refused) => return Err(format!("after {} answers: {refused}", texts.len())),
                }
            }
            Ok(texts)
        });
        Self { stop, asker }
    }

    /// Stops; all answers in their order. The first that was refused is the error.
    async fn stop(mut self) -> Result<Vec<String>> {
        self.stop.store(true, Ordering::Relaxed);
        match self.asker.join_next().await {
            Some(ended) => ended?.map_err(anyhow::Error::msg),
            None => bail!("nobody asked"),
        }
    }
}
