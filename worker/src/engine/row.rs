//! What a caller asks of the engine for one row, and the stream of what comes back.
//!
//! A row is one sequence of a batch: its prompt, the lenses applied to it (and to nothing else in the
//! batch), how its tokens are chosen and when it ends. Events travel over a ring ([`events`]) that is allocated
//! once, when the row is submitted, so that emitting a token allocates nothing. It is bounded by the row's own
//! length: the engine never waits for a slow reader.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use super::handle::{BaseId, LensId};
use crate::lens::tap::{Activations, Tapped};
use turret_threads::events;

/// One row to compute.
#[derive(Debug, Clone, PartialEq)]
pub struct RowRequest {
    /// The base the row was prepared for. A row for a base that is not active is refused, so a switch that
    /// happens between the caller's decision and its submit cannot give an answer from other weights.
    pub base: BaseId,
    /// Token ids of the prompt; at least one.
    pub prompt: Vec<u32>,
    /// Tokens that the row had generated when it was preempted: it goes on behind them as if it had never stopped. They are
    /// of its `max_new_tokens`, and are not reported again.
    pub generated: Vec<u32>,
    /// Lenses applied to this row, in order, unmerged.
    pub lenses: Vec<RowLens>,
    /// How the next token is chosen.
    pub sampling: Sampling,
    /// Tokens that end the row. The ending token is reported by [`FinishReason::Stop`], not as a token.
    pub stop_token_ids: Vec<u32>,
    /// The row ends after this many generated tokens. `prompt + max_new_tokens` must fit the context; zero is
    /// allowed and only scores the prompt.
    pub max_new_tokens: u32,
    /// Report each generated token's log-probability and this many best alternatives (of the raw
    /// log-softmax, before temperature).
    pub logprobs: Option<u8>,
    /// Report the same for every token of the prompt but the first, before the first token.
    pub prompt_logprobs: Option<u8>,
    /// What the row reads from and writes into the residual stream.
    pub activations: Activations,
    /// Separates the row from others: keys and values are shared only among rows with the same salt, so that
    /// nobody learns from the time to the first token what somebody else has asked.
    pub cache_salt: Option<Arc<str>>,
    /// A row in flight that this one is a fork of: it may share what that row has computed where it writes into the
    /// residual stream, as far as tokens, lenses and injections are the same. The answer is the same without.
    pub parent: Option<RowId>,
}

/// A row in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RowId(pub(crate) u64);

/// A lens on a row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowLens {
    /// Which lens.
    pub lens: LensId,
    /// Multiplies the lens's own scale (alpha / rank for LoRA).
    pub scale: f32,
}

/// How the next token is chosen from the logits. Randomness is a function of (seed, token index) alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// 0 is greedy; ties go to the lowest token id.
    pub temperature: f32,
    /// Keep the smallest set of best tokens whose probabilities reach this sum. 1 keeps all.
    pub top_p: f32,
    /// Keep this many best tokens. 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this probable relative to the best. 0 keeps all.
    pub min_p: f32,
    /// Seed of the row's random numbers.
    pub seed: u64,
}

impl Sampling {
    /// The most probable token, always.
    pub const GREEDY: Self = Self { temperature: 0.0, top_p: 1.0, top_k: 0, min_p: 0.0, seed: 0 };
}

/// What a row reports, in order.
#[derive(Debug, Clone, PartialEq)]
pub enum RowEvent {
    /// Log-probabilities of prompt tokens 1.. (the first has none). Only when asked for; once, before any token.
    Prompt(Vec<TokenLogprobs>),
    /// One generated token.
    Token {
        /// Its id.
        id: u32,
        /// Its log-probabilities, when asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// What the row's taps read, in their order. Only with taps; once, before `Finished`.
    Tapped(Vec<Tapped>),
    /// The row is done. The last event.
    Finished {
        /// Why it ended.
        reason: FinishReason,
        /// What it cost.
        usage: Usage,
    },
    /// The row cannot go on. The last event.
    Failed(RowFailure),
}

/// The log-probability of a token, and the best alternatives at its place.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The token.
    pub id: u32,
    /// Its log-probability.
    pub logprob: f32,
    /// The best tokens with their log-probabilities, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why a row ended by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// This stop token was chosen.
    Stop {
        /// The token.
        token: u32,
    },
    /// `max_new_tokens` were generated.
    Length,
}

/// Why the engine gave a row up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowFailure {
    /// [`super::handle::EngineHandle::preempt_rows`] ended it; a row with [`RowRequest::generated`] goes on where it was.
    #[error("the row was preempted")]
    Preempted,
    /// [`super::handle::EngineHandle::abort_rows`] ended it.
    #[error("the row was aborted before it finished; send the request again")]
    Aborted,
    /// The model computed something that is not a number, so no token can be chosen.
    #[error("the model's output at token {position} is not finite; the base or a lens is damaged")]
    NotFinite {
        /// Position in the sequence.
        position: u32,
    },
    /// A kernel failed.
    #[error("the forward pass failed: {0}")]
    Device(String),
    /// The engine thread ended.
    #[error("the engine stopped")]
    EngineStopped,
}

/// Tokens a row used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Of these, tokens whose keys and values were there already when the row began.
    pub cached_tokens: u32,
    /// Tokens generated, the stop token included.
    pub generated_tokens: u32,
}

/// The engine's end of a row's events. Dropping it without a last event says that the engine stopped.
pub(crate) struct RowSender {
    events: events::Sender<RowEvent>,
    cached_tokens: Arc<AtomicU32>,
}

/// The caller's end: a stream that ends after `Finished` or `Failed`. Dropping it cancels the row, which leaves the
/// batch before the next step.
pub struct RowStream {
    id: RowId,
    events: events::Receiver<RowEvent>,
    cached_tokens: Arc<AtomicU32>,
    done: bool,
}

/// The two ends of a row's events, with room for `max_new_tokens`.
pub(crate) fn row_channel(id: RowId, max_new_tokens: u32) -> (RowSender, RowStream) {
    let (sender, receiver) = events::channel(max_new_tokens as usize + 3);
    let cached_tokens = Arc::new(AtomicU32::new(0));
    let stream = RowStream { id, events: receiver, cached_tokens: cached_tokens.clone(), done: false };
    (RowSender { events: sender, cached_tokens }, stream)
}

impl RowSender {
    /// Hands an event to the reader; never waits.
    pub(crate) fn send(&self, event: RowEvent) {
        self.events.send(event);
    }

    /// Notes how many tokens of the prompt need not be computed.
    pub(crate) fn note_cached(&self, tokens: u32) {
        self.cached_tokens.store(tokens, Ordering::Release);
    }

    /// Whether the reader went away.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.events.is_abandoned()
    }
}

impl RowStream {
    /// What a fork of the row names as its parent.
    pub fn id(&self) -> RowId {
        self.id
    }

    /// Tokens of the prompt that needed not be computed; certain once there was an event.
    pub fn cached_tokens(&self) -> u32 {
        self.cached_tokens.load(Ordering::Acquire)
    }

    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<RowEvent> {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<RowEvent>> {
        if self.done {
            return Poll::Ready(None);
        }
        self.events.poll(cx).map(|event| {
            let event = event.unwrap_or(RowEvent::Failed(RowFailure::EngineStopped));
            self.done = matches!(event, RowEvent::Finished { .. } | RowEvent::Failed(_));
            Some(event)
        })
    }
}

impl futures::Stream for RowStream {
    type Item = RowEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<RowEvent>> {
        self.poll(cx)
    }
}

impl std::fmt::Debug for RowStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RowStream").field("done", &self.done).finish_non_exhaustive()
    }
}
