//! Continuous load: asks in turn, checks every answer, until told to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use tokio::task::JoinSet;

use super::eventually::{PATIENCE, eventually, when};
use super::family::Case;
use super::gateway::{Gateway, Mode};

/// One question whose answer is known.
#[derive(Clone, Debug)]
pub struct Question {
    /// `group` or `group:lens`.
    pub model: String,
    /// The conversation and its answer.
    pub case: Case,
    /// Streamed or not.
    pub mode: Mode,
}

/// Load that runs until [`Load::stop`].
pub struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    askers: JoinSet<Vec<String>>,
}

impl Load {
    /// Starts `askers` that go around `questions`, each from another place.
    pub fn start(gateway: &Gateway, questions: Vec<Question>, askers: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answered = Arc::new(AtomicUsize::new(0));
        let questions = Arc::new(questions);
        let mut set = JoinSet::new();
        for first in 0..askers {
            let (gateway, questions) = (gateway.clone(), Arc::clone(&questions));
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            set.spawn(async move {
                let mut failures = Vec::new();
                let mut at = first * questions.len() / askers;
                while !stop.load(Ordering::Relaxed) {
                    let question = &questions[at % questions.len()];
                    at += 1;
                    match gateway.verify(&question.model, &question.case, question.mode).await {
                        Ok(_) => {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(error) => failures.push(format!("{error:#}")),
                    }
                    // A server that refuses at once must not be asked in a tight loop for ever.
                    if failures.len() >= 20 {
                        break;
                    }
                }
                failures
            });
        }
        Self { stop, answered, askers: set }
    }

    /// Right answers so far.
    pub fn answered(&self) -> usize {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits for further right answers, so that a load that hangs is not taken for one that goes well.
    pub async fn goes_on(&self) -> Result<()> {
        let before = self.answered();
        eventually(PATIENCE, "the load gets further answers", async || {
            let now = self.answered();
            Ok(when(now >= before + 20, || format!("{before} answers before, {now} now")))
        })
        .await
    }

    /// Stops; answers how many requests were answered rightly. Any that was not is an error.
    pub async fn stop(mut self) -> Result<usize> {
        self.stop.store(true, Ordering::Relaxed);
        let mut failures = Vec::new();
        while let Some(done) = self.askers.join_next().await {
            failures.extend(done?);
        }
        let answered = self.answered();
        if !failures.is_empty() {
            let some: Vec<_> = failures.iter().take(5).map(String::as_str).collect();
            bail!(
                "{} requests failed beside {answered} right ones:\n  {}",
                failures.len(),
                some.join("\n  ")
            );
        }
        if answered == 0 {
            bail!("the load never got an answer");
        }
        Ok(answered)
    }
}

/// Asks all questions at once, `at_a_time` of them together.
pub async fn ask_all(gateway: &Gateway, questions: Vec<Question>, at_a_time: usize) -> Result<usize> {
    use futures::StreamExt as _;
    let count = questions.len();
    let mut answers = futures::stream::iter(questions.into_iter().map(|question| {
        let gateway = gateway.clone();
        async move { gateway.verify(&question.model, &question.case, question.mode).await }
    }))
    .buffer_unordered(at_a_time);
    let mut failures = Vec::new();
    while let Some(answer) = answers.next().await {
        if let Err(error) = answer {
            failures.push(format!("{error:#}"));
        }
    }
    if !failures.is_empty() {
        let some: Vec<_> = failures.iter().take(5).map(String::as_str).collect();
        bail!("{} of {count} answers were wrong:\n  {}", failures.len(), some.join("\n  "));
    }
    Ok(count)
}

/// Asks for some time, `at_a_time` together: the questions that `draw` gives for the numbers from 0 on. Answers how long each
/// took, the shortest first; the first answer that is not the right one is the error.
pub async fn ask_for(
    gateway: &Gateway,
    draw: impl Fn(u64) -> Question + Send + Sync + 'static,
    at_a_time: usize,
    duration: Duration,
) -> Result<Vec<Duration>> {
    let (draw, next) = (Arc::new(draw), Arc::new(AtomicU64::new(0)));
    let end = Instant::now() + duration;
    let mut askers = JoinSet::new();
    for _ in 0..at_a_time {
        let (gateway, draw, next) = (gateway.clone(), Arc::clone(&draw), Arc::clone(&next));
        askers.spawn(async move {
            let mut took = Vec::new();
            while Instant::now() < end {
                let question = draw(next.fetch_add(1, Ordering::Relaxed));
                let began = Instant::now();
                gateway.verify(&question.model, &question.case, question.mode).await?;
                took.push(began.elapsed());
            }
            Ok::<_, anyhow::Error>(took)
        });
    }
    let mut all = Vec::new();
    while let Some(took) = askers.join_next().await {
        all.extend(took??);
    }
    all.sort_unstable();
    Ok(all)
}
