//! Lenses are spread over the workers of a placement, and move when there is one worker more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use futures::StreamExt as _;
use kube::ResourceExt as _;
use kube::runtime::{WatchStreamExt as _, watcher};
use turret_crds::ModelPlacement;
use turret_crds::condition::READY;
use turret_crds::report::Tier;

use super::QWEN;
use super::residency::{Made, declare, make_lenses};
use crate::cluster::eventually::when;
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::objects::placement;
use crate::cluster::release::Release;
use crate::cluster::space::{Space, changed};
use crate::cluster::worker::Direct;

/// By lens: the worker that it is assigned to.
type Shares = BTreeMap<String, String>;

/// Each preloaded lens is assigned to one of two workers, in memory there and nowhere else, and answered there. A third worker
/// takes about a third of them; no other moves, no document is written, and nothing stops being ready for it.
pub async fn each_lens_is_where_it_is_assigned_and_a_third_worker_takes_its_share(
    release: &Release,
) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "spread").await?;
    let lenses = make_lenses(&space, &family, QWEN)?;
    let group = declare(&family, QWEN, &lenses).preloaded();
    let workers = placement("shared", &[QWEN]).replicas(2).spreading(1, 1);
    let seen = Recorder::start(&space);
    space.apply(&[group.manifest(), workers.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let sequence = space.document("shared").await?.sequence;
    let lives = space.lives("shared").await?;
    let before = shares(release, &space, &lenses, 2, true).await?;
    // Once until the gateway has heard where they are; from then on nothing goes elsewhere.
    ask_each(&space, &lenses, &before).await?;
    let earlier = served_elsewhere(release, &space, &before).await?;
    ask_each(&space, &lenses, &before).await?;
    let later = served_elsewhere(release, &space, &before).await?;
    ensure!(later == earlier, "answered where they are not assigned: {later} after {earlier}");

    space.apply(&[workers.replicas(3).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let after = shares(release, &space, &lenses, 3, false).await?;
    let moved: Vec<&String> = before.keys().filter(|lens| before[*lens] != after[*lens]).collect();
    for lens in &moved {
        ensure!(
            !lives.contains_key(&after[*lens]),
            "`{lens}` went to a worker that was there before: {after:?}"
        );
    }
    println!("    {} of {} lenses moved to the third worker", moved.len(), lenses.len());
    let most = lenses.len() * 2 / 3;
    ensure!((1..=most).contains(&moved.len()), "{} of {} lenses moved", moved.len(), lenses.len());
    ask_each(&space, &lenses, &after).await?;

    let there: Vec<String> = lives.keys().cloned().collect();
    let mut now = space.lives("shared").await?;
    now.retain(|pod, _| there.contains(pod));
    changed(&lives, &now)?;
    let now = space.document("shared").await?.sequence;
    ensure!(now == sequence, "hints are no part of the document, which went from {sequence} to {now}");
    seen.never_unready_again()?;
    space.remove().await
}

/// Waits until each lens is assigned to one of so many workers, all of which have some, and in its memory; `alone` also that no
/// other has it in memory.
async fn shares(
    release: &Release,
    space: &Space<'_>,
    lenses: &[Made],
    workers: usize,
    alone: bool,
) -> Result<Shares> {
    space
        .eventually("each lens is in memory where it is assigned", async || {
            let mut shares = Shares::new();
            let mut amiss = Vec::new();
            for pod in space.workers("shared").await? {
                let report = Direct::to(release, space, "shared", &pod).await?.report().await?;
                for lens in &report.lenses {
                    let here = lens.tier == Tier::Device;
                    if (lens.assigned && !here) || (alone && here && !lens.assigned) {
                        amiss.push(format!("{} on {}: {:?}", lens.name, pod.name_any(), lens.tier));
                    }
                    if lens.assigned && shares.insert(lens.name.clone(), pod.name_any()).is_some() {
                        amiss.push(format!("{} is assigned twice", lens.name));
                    }
                }
            }
            let having = shares.values().collect::<std::collections::BTreeSet<_>>().len();
            let holds = amiss.is_empty() && shares.len() == lenses.len() && having == workers;
            Ok(if holds {
                Ok(shares)
            } else {
                Err(format!("{} assigned to {having} workers; {}", shares.len(), amiss.join(", ")))
            })
        })
        .await
}

/// Asks for each lens, until it is answered where it is assigned: the gateway hears of that at its own time.
async fn ask_each(space: &Space<'_>, lenses: &[Made], shares: &Shares) -> Result<()> {
    let gateway = space.gateway();
    for lens in lenses {
        let question = &lens.questions[0];
        let worker = &shares[&lens.name];
        space
            .eventually(&format!("`{}` is answered by {worker}", lens.name), async || {
                let answer = gateway.verify(&question.model, &question.case, Mode::Whole).await?;
                let by = answer.worker.context("an answer names its worker")?;
                Ok(when(by.ends_with(worker.as_str()), || by.clone()))
            })
            .await?;
    }
    Ok(())
}

/// Requests that were answered by workers to which their lens is not assigned. All that were assigned have answered some.
async fn served_elsewhere(release: &Release, space: &Space<'_>, shares: &Shares) -> Result<u64> {
    space
        .eventually("each lens is counted where it is assigned", async || {
            let (mut elsewhere, mut counted) = (0, 0);
            for pod in space.workers("shared").await? {
                let report = Direct::to(release, space, "shared", &pod).await?.report().await?;
                for lens in report.lenses.iter().filter(|lens| lens.served > 0) {
                    match shares[&lens.name] == pod.name_any() {
                        true => counted += 1,
                        false => elsewhere += lens.served,
                    }
                }
            }
            let all = shares.len();
            Ok(if counted == all { Ok(elsewhere) } else { Err(format!("{counted} of {all}")) })
        })
        .await
}

/// What `Ready` said: the generation it speaks of, and its status.
type Said = (Option<i64>, String);

/// What a watcher was ever told of the placement's `Ready`.
struct Recorder {
    seen: Arc<Mutex<Vec<Said>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Recorder {
    fn start(space: &Space<'_>) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let stream = watcher(space.all::<ModelPlacement>(), watcher::Config::default()).applied_objects();
        let task = tokio::spawn({
            let seen = Arc::clone(&seen);
            async move {
                let mut stream = stream.boxed();
                while let Some(Ok(placement)) = stream.next().await {
                    let conditions = placement.status.map(|status| status.conditions).unwrap_or_default();
                    let ready = conditions.into_iter().find(|condition| condition.type_ == READY);
                    let said = ready.map(|ready| (ready.observed_generation, ready.status));
                    seen.lock().expect("nobody panics with it").extend(said);
                }
            }
        });
        Self { seen, task }
    }

    /// That a generation which was ready once stayed ready until the next one.
    fn never_unready_again(&self) -> Result<()> {
        let seen = self.seen.lock().expect("nobody panics with it");
        for pair in seen.windows(2) {
            let [(before, was), (after, is)] = pair else { continue };
            let ended = before == after && was == "True" && is != "True";
            ensure!(!ended, "generation {before:?} was ready, and then it was not: {seen:?}");
        }
        let generations =
            seen.iter().filter(|(_, status)| status == "True").map(|(generation, _)| generation);
        let mut generations: Vec<_> = generations.collect();
        generations.dedup();
        ensure!(generations.len() == 2, "two generations were ready: {seen:?}");
        Ok(())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}
