//! One row, from a permit to pieces of text.
//!
//! A task of its own follows each row and drops the permit when the row ends, so that a client that reads slowly holds
//! neither a base nor a lens. The channel is bounded by the row's own length. A client that goes away closes the channel,
//! which cancels the row.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::error::ApiError;
use super::stop::StopStrings;
use crate::engine::handle::{EngineHandle, SubmitError};
use crate::engine::row::{
    FinishReason, RowEvent, RowLens, RowRequest, RowStream, Sampling, TokenLogprobs, Usage,
};
use crate::lens::tap::Activations;
use crate::metrics::Metrics;
use crate::model::tokenizer::Tokenizer;
use crate::residency::{Outcome, Permit};

/// What to generate.
pub(super) struct Job {
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
    /// The end.
    End { finish: &'static str, usage: Usage },
    /// The row cannot go on.
    Failed(ApiError),
}

/// Starts a row, and a task that follows it.
pub(super) async fn start(
    engine: &EngineHandle,
    metrics: Arc<Metrics>,
    permit: Permit,
    job: Job,
) -> Result<mpsc::UnboundedReceiver<Piece>, SubmitError> {
    let row = RowRequest {
        base: permit.base,
        prompt: job.prompt.clone(),
        lenses: permit.lens.iter().map(|l| RowLens { lens: l.id, scale: l.scale }).collect(),
        sampling: job.sampling,
        stop_token_ids: job.tokenizer.stop_token_ids().to_vec(),
        max_new_tokens: job.max_new_tokens,
        logprobs: job.logprobs,
        prompt_logprobs: None,
        activations: Activations::default(),
        cache_salt: job.cache_salt.clone(),
        parent: None,
    };
    let stream = engine.submit(row).await?;
    let (sender, receiver) = mpsc::unbounded_channel();
    tokio::spawn(follow(stream, sender, permit, job, metrics));
    Ok(receiver)
}

async fn follow(
    mut row: RowStream,
    pieces: mpsc::UnboundedSender<Piece>,
    mut permit: Permit,
    job: Job,
    metrics: Arc<Metrics>,
) {
    let mut text = job.tokenizer.text_stream(true);
    let mut stop = StopStrings::new(job.stop);
    let mut pending = Vec::new();
    let mut generated = 0;
    let prompt_tokens = job.prompt.len() as u32;
    let failed =
        |e: crate::model::tokenizer::TokenizerError| Piece::Failed(ApiError::internal(e.to_string()));
    loop {
        let event = tokio::select! {
            event = row.next() => event,
            // The client went away: dropping the stream cancels the row.
            () = pieces.closed() => return,
        };
        let last = match event {
            None => return,
            Some(RowEvent::Prompt(_) | RowEvent::Tapped(_)) => continue,
            Some(RowEvent::Failed(failure)) => {
                permit.ended(Outcome::Failed);
                Piece::Failed(failure.into())
            }
            Some(RowEvent::Token { id, logprobs }) => {
                generated += 1;
                if generated == 1 {
                    metrics.first_token(job.since.elapsed());
                }
                pending.extend(logprobs);
                let (certain, hit) = match text.push(id) {
                    Ok(piece) => stop.push(&piece),
                    Err(error) => {
                        let _ = pieces.send(failed(error));
                        return;
                    }
                };
                if !certain.is_empty() {
                    let piece = Piece::Text { text: certain, logprobs: std::mem::take(&mut pending) };
                    let _ = pieces.send(piece);
                }
                if !hit {
                    continue;
                }
                permit.ended(Outcome::Answered);
                let cached_tokens = row.cached_tokens();
                let usage = Usage { prompt_tokens, cached_tokens, generated_tokens: generated };
                Piece::End { finish: "stop", usage }
            }
            Some(RowEvent::Finished { reason, usage }) => {
                let mut finish = match reason {
                    FinishReason::Stop { .. } => "stop",
                    FinishReason::Length => "length",
                };
                let rest = match text.finish() {
                    Ok(rest) => rest,
                    Err(error) => {
                        let _ = pieces.send(failed(error));
                        return;
                    }
                };
                let (mut certain, hit) = stop.push(&rest);
                if hit {
                    finish = "stop";
                } else {
                    certain += &stop.finish();
                }
                if !certain.is_empty() || !pending.is_empty() {
                    let _ =
                        pieces.send(Piece::Text { text: certain, logprobs: std::mem::take(&mut pending) });
                }
                permit.ended(Outcome::Answered);
                Piece::End { finish, usage }
            }
        };
        // The engine is done, or is cancelled by this: the permit ends before the client has read the rest.
        drop(row);
        drop(permit);
        let _ = pieces.send(last);
        return;
    }
}
