//! One row, from a permit to pieces of text.
//!
//! A task of its own follows each row and drops the permit when the row ends, so that a client that reads slowly holds
//! neither a base nor a lens. The channel is bounded by the row's own length. A client that goes away closes the channel,
//! which cancels the row.
//!
//! A row that is preempted for another base gives its permit back, waits for the next one like a new request, and goes on
//! behind the tokens that it has. Its client sees a pause.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use turret_crds::model_name::ModelName;

use super::App;
use super::error::ApiError;
use super::stop::StopStrings;
use crate::engine::handle::SubmitError;
use crate::engine::row::{
    FinishReason, RowEvent, RowFailure, RowLens, RowRequest, RowStream, Sampling, TokenLogprobs, Usage,
};
use crate::lens::tap::Activations;
use crate::model::tokenizer::{TextStream, Tokenizer, TokenizerError};
use crate::residency::{Measured, Outcome, Permit};

/// What to generate.
pub(super) struct Job {
    /// By which model.
    pub(super) model: ModelName,
    /// Prompt tokens.
    pub(super) prompt: Vec<u32>,
    /// How tokens are chosen.
    pub(super) sampling: Sampling,
    /// Most tokens.
    pub(super) max_new_tokens: u32,
    /// Strings that end the text.
    pub(super) stop: Vec<String>,
    /// Alternatives to report per token.
    pub(super) logprobs: Option<u8>,
    /// What separates the row's keys and values from others'.
    pub(super) cache_salt: Option<Arc<str>>,
    /// Turns tokens into text.
    pub(super) tokenizer: Tokenizer,
    /// When the request came.
    pub(super) since: Instant,
}

/// What a row gives, in order.
#[derive(Debug)]
pub(super) enum Piece {
    /// Text that is certain, with the log-probabilities of the tokens since the last piece.
    Text { text: String, logprobs: Vec<TokenLogprobs> },
    /// It was preempted and waits to go on.
    Preempted,
    /// The end.
    End { finish: &'static str, usage: Usage },
    /// The row cannot go on.
    Failed(ApiError),
}

/// Starts a row, and a task that follows it.
pub(super) async fn start(
    app: &App,
    permit: Permit,
    job: Job,
) -> Result<mpsc::UnboundedReceiver<Piece>, SubmitError> {
    let row = app.engine.submit(job.row(&permit, Vec::new())).await?;
    let (pieces, receiver) = mpsc::unbounded_channel();
    let text = job.tokenizer.text_stream(true);
    let stop = StopStrings::new(job.stop.clone());
    let follower = Follower {
        app: app.clone(),
        job,
        pieces,
        text,
        stop,
        tokens: Vec::new(),
        pending: Vec::new(),
        first: None,
        time_to_first_token: None,
        cached: None,
    };
    tokio::spawn(follower.follow(row, permit));
    Ok(receiver)
}

impl Job {
    fn row(&self, permit: &Permit, generated: Vec<u32>) -> RowRequest {
        RowRequest {
            base: permit.base,
            prompt: self.prompt.clone(),
            generated,
            lenses: permit.lens.iter().map(|l| RowLens { lens: l.id, scale: l.scale }).collect(),
            sampling: self.sampling,
            stop_token_ids: self.tokenizer.stop_token_ids().to_vec(),
            max_new_tokens: self.max_new_tokens,
            logprobs: self.logprobs,
            prompt_logprobs: None,
            activations: Activations::default(),
            cache_salt: self.cache_salt.clone(),
            parent: None,
        }
    }
}

/// Follows a row until it ends, through every preemption.
struct Follower {
    app: App,
    job: Job,
    pieces: mpsc::UnboundedSender<Piece>,
    text: TextStream,
    stop: StopStrings,
    /// Generated so far.
    tokens: Vec<u32>,
    /// Log-probabilities of tokens whose text is not certain yet.
    pending: Vec<TokenLogprobs>,
    /// When the first of them came; forgotten when the row was preempted, whose pause is no time per token.
    first: Option<Instant>,
    time_to_first_token: Option<Duration>,
    /// Tokens of the prompt that needed not be computed when the row first began.
    cached: Option<u32>,
}

/// A row in the engine and the right to it. Dropped in this order: a permit that ended before its row would let the base be
/// switched under it.
struct Running {
    row: RowStream,
    permit: Permit,
}

/// What came of a row that was preempted.
enum Again {
    /// It goes on.
    Runs(Running),
    /// It cannot go on.
    Failed(ApiError),
    /// The client went away.
    Left,
}

/// Times that a row which goes on may be overtaken by the next switch.
const OVERTAKEN: u32 = 1000;

impl Follower {
    async fn follow(mut self, row: RowStream, permit: Permit) {
        let mut running = Running { row, permit };
        loop {
            let event = tokio::select! {
                event = running.row.next() => event,
                () = self.pieces.closed() => return,
            };
            let last = match event {
                None => return,
                Some(RowEvent::Prompt(_) | RowEvent::Tapped(_)) => continue,
                Some(RowEvent::Failed(RowFailure::Preempted)) => {
                    if !self.tokens.is_empty() {
                        self.cached.get_or_insert(running.row.cached_tokens());
                    }
                    self.first = None;
                    self.send(Piece::Preempted);
                    match self.go_on(running).await {
                        Again::Runs(again) => {
                            running = again;
                            continue;
                        }
                        Again::Failed(error) => return self.send(Piece::Failed(error)),
                        Again::Left => return,
                    }
                }
                Some(RowEvent::Failed(failure)) => {
                    running.permit.ended(Outcome::Failed);
                    Ok(Some(Piece::Failed(failure.into())))
                }
                Some(RowEvent::Token { id, logprobs }) => {
                    self.token(id, logprobs, running.row.cached_tokens())
                }
                Some(RowEvent::Finished { reason, usage }) => self.finish(reason, usage).map(Some),
            };
            let last = match last {
                Ok(None) => continue,
                Ok(Some(last)) => last,
                Err(error) => Piece::Failed(ApiError::internal(error.to_string())),
            };
            if matches!(last, Piece::End { .. }) {
                running.permit.ended(Outcome::Answered);
            }
            running.permit.measured(self.measured());
            // The engine is done, or is cancelled by this: the permit ends before the client has read the rest.
            drop(running);
            return self.send(last);
        }
    }

    /// Waits for the base and the lens, and submits the row again: over the same weights, at the same strength.
    async fn go_on(&self, preempted: Running) -> Again {
        let what = |permit: &Permit| {
            (
                permit.base_key.clone(),
                permit.base_digest.clone(),
                permit.lens.as_ref().map(|l| l.digest.clone()),
            )
        };
        let Running { row, mut permit } = preempted;
        drop(row);
        let before = what(&permit);
        let scale = permit.lens.as_ref().map(|lens| lens.scale);
        for _ in 0..OVERTAKEN {
            permit = tokio::select! {
                again = permit.again(self.job.model.clone()) => match again {
                    Ok(permit) => permit,
                    Err(refusal) => return Again::Failed(refusal.into()),
                },
                () = self.pieces.closed() => return Again::Left,
            };
            if what(&permit) != before {
                let message = "the row was preempted for another base, and the model's files changed before it could go on; \
                               send the request again";
                return Again::Failed(ApiError::unavailable("preempted", message, Duration::from_secs(1)));
            }
            if let (Some(lens), Some(scale)) = (&mut permit.lens, scale) {
                lens.scale = scale;
            }
            match self.app.engine.submit(self.job.row(&permit, self.tokens.clone())).await {
                Ok(row) => return Again::Runs(Running { row, permit }),
                // Overtaken by the next switch.
                Err(SubmitError::BaseNotActive) => {}
                Err(error) => return Again::Failed(error.into()),
            }
        }
        Again::Failed(SubmitError::BaseNotActive.into())
    }

    fn token(
        &mut self,
        id: u32,
        logprobs: Option<TokenLogprobs>,
        cached_tokens: u32,
    ) -> Result<Option<Piece>, TokenizerError> {
        self.tokens.push(id);
        if self.tokens.len() == 1 {
            let now = Instant::now();
            self.first = Some(now);
            self.time_to_first_token = Some(now - self.job.since);
            self.app.metrics.first_token(now - self.job.since);
        }
        self.pending.extend(logprobs);
        let (certain, hit) = self.stop.push(&self.text.push(id)?);
        if !certain.is_empty() {
            let logprobs = std::mem::take(&mut self.pending);
            self.send(Piece::Text { text: certain, logprobs });
        }
        let usage = Usage {
            prompt_tokens: self.job.prompt.len() as u32,
            cached_tokens: self.cached.unwrap_or(cached_tokens),
            generated_tokens: self.tokens.len() as u32,
        };
        Ok(hit.then_some(Piece::End { finish: "stop", usage }))
    }

    fn measured(&self) -> Measured {
        let tokens = self.tokens.len() as u32;
        let later = tokens.saturating_sub(1);
        Measured {
            tokens,
            time_to_first_token: self.time_to_first_token,
            time_per_output_token: self.first.filter(|_| later > 0).map(|first| first.elapsed() / later),
        }
    }

    fn finish(&mut self, reason: FinishReason, usage: Usage) -> Result<Piece, TokenizerError> {
        let mut finish = match reason {
            FinishReason::Stop { .. } => "stop",
            FinishReason::Length => "length",
        };
        let (mut certain, hit) = self.stop.push(&self.text.finish()?);
        if hit {
            finish = "stop";
        } else {
            certain += &self.stop.finish();
        }
        if !certain.is_empty() || !self.pending.is_empty() {
            let logprobs = std::mem::take(&mut self.pending);
            self.send(Piece::Text { text: certain, logprobs });
        }
        let cached_tokens = self.cached.unwrap_or(usage.cached_tokens);
        Ok(Piece::End { finish, usage: Usage { cached_tokens, ..usage } })
    }

    fn send(&self, piece: Piece) {
        // Whoever went away is noticed at the next event.
        let _ = self.pieces.send(piece);
    }
}
