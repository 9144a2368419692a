//! The cheap, cloneable way to the engine thread.
//!
//! # Threads
//! One engine thread owns the device: the arena's budget, the installed bases and lenses, the KV cache and all
//! rows. Every method here sends it a command and waits for its answer, which comes between two steps. The
//! futures are not tied to a runtime: a loader thread may drive them with `futures::executor::block_on`.
//!
//! # From files to a row
//! 1. `BaseFolder::open` / `LoraFolder::open` (loader thread) check everything a header can tell and give a layout.
//! 2. [`EngineHandle::reserve_base`] / [`EngineHandle::reserve_lens`] give a [`Region`] of exactly that many bytes, or
//!    say how many bytes are missing. Reserving a base may shrink the KV cache down to what running rows
//!    and one longest sequence need.
//! 3. The loader thread fills the region while the engine keeps stepping. Dropping it gives the memory back. What a lens
//!    needs of its base's weights (DoRA's norms) it reads from the base itself, which [`EngineHandle::lend_base`] shares.
//! 4. [`EngineHandle::install_base`] / [`EngineHandle::install_lens`] make it usable; [`EngineHandle::activate`] chooses the base.
//! 5. [`EngineHandle::submit`] starts a row.
//!
//! # Invariants
//! - A lens is an attribute of a row. A row keeps its lenses from the moment `submit` answers until its last
//!   event, and [`EngineHandle::remove_lens`] refuses until then.
//! - When a removal is answered, its memory has been given back to the operating system.
//! - A row submitted for a base that is not active is refused, never computed with other weights.
//! - Rows share the KV blocks of equal beginnings: the same tokens under lenses of the same content and scale, with the
//!   same salt. A lens that is replaced under its name has another content and finds nothing of the old one's.
//! - A running row never fails for another's sake: when KV blocks run out, the youngest row steps back and is
//!   recomputed later, with the same tokens.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot};

use super::arena::{ArenaUse, Region};
use super::row::{RowFailure, RowRequest, RowStream};
use crate::lens::tap::ActivationError;
use crate::lens::{FilledLens, LensLayout};
use crate::model::weights::{BaseLayout, FilledBase};

/// What the engine may use, and how it batches. Everything here can be changed while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Bytes for everything: bases, lenses, workspace and KV cache.
    pub device_bytes: u64,
    /// Of these, bytes for lenses. Hard: no lens goes beyond it and nothing else takes from it.
    pub lens_bytes: u64,
    /// Longest sequence, prompt and answer. A base with a shorter context lowers it for itself.
    pub max_context_tokens: u32,
    /// Rows computed together.
    pub max_running_rows: u32,
    /// Prompt tokens computed in one step at most; while rows decode, as many as hold them up little.
    pub prefill_chunk_tokens: u32,
    /// Rows that may wait for their first step; more are refused.
    pub max_waiting_rows: u32,
    /// Whether rows use keys and values that rows before them computed for the same tokens. The answers are the same either
    /// way, to the bit.
    pub prefix_cache: bool,
}

/// An installed base.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BaseId(pub(crate) u64);

/// An installed lens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LensId(pub(crate) u64);

/// Why memory cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// It does not fit beside what is resident now.
    #[error(transparent)]
    ArenaFull(CannotFit),
    /// It does not fit the budget, whatever else is freed.
    #[error(transparent)]
    TooLarge(CannotFit),
    /// The operating system refused.
    #[error("{0}")]
    System(String),
    /// The engine thread ended.
    #[error("the engine stopped")]
    Stopped,
}

/// By how much something does not fit, and why, in words with numbers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{short_by_bytes} bytes short: {why}")]
pub struct CannotFit {
    /// Bytes that would have to be freed or added to the budget.
    pub short_by_bytes: u64,
    /// The sum, written out.
    pub why: String,
}

/// Why a base cannot be made active.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ActivateError {
    /// No such base is installed.
    #[error("the base is not installed")]
    Unknown,
    /// Rows over the active base are still in flight.
    #[error("{rows} rows are still in flight over the active base")]
    RowsInFlight {
        /// Running and waiting rows.
        rows: u32,
    },
    /// Workspace and KV cache do not fit beside what is resident.
    #[error(transparent)]
    CannotFit(#[from] CannotFit),
    /// The operating system refused.
    #[error("{0}")]
    System(String),
    /// The engine thread ended.
    #[error("the engine stopped")]
    Stopped,
}

/// Why an installation or a change of limits is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    /// The lens was made for a base that is not installed.
    #[error("the lens's base is not installed")]
    UnknownBase,
    /// The lens was checked against another base than the one named.
    #[error("the lens was checked against another base's shapes: {0}")]
    BaseMismatch(String),
    /// What is resident or running does not fit the new limits.
    #[error(transparent)]
    CannotFit(#[from] CannotFit),
    /// The engine thread ended.
    #[error("the engine stopped")]
    Stopped,
}

/// Why something cannot be removed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RemoveError {
    /// Rows in flight use it.
    #[error("in use by {rows} rows")]
    InUse {
        /// How many.
        rows: u32,
    },
    /// Lenses over the base are installed.
    #[error("{lenses} lenses over this base are installed; remove them first")]
    HasLenses {
        /// How many.
        lenses: u32,
    },
    /// It is not installed.
    #[error("not installed")]
    Unknown,
    /// The engine thread ended.
    #[error("the engine stopped")]
    Stopped,
}

/// Why a row is not accepted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum SubmitError {
    /// Too many rows wait already.
    #[error("{waiting} rows are waiting, the limit is {limit}")]
    QueueFull {
        /// Rows waiting.
        waiting: u32,
        /// The limit.
        limit: u32,
    },
    /// The row's base is not the active one.
    #[error("the base of this row is not active")]
    BaseNotActive,
    /// The row names a lens that is not installed.
    #[error("lens {} of this row is not installed", .0.0)]
    UnknownLens(LensId),
    /// The row names a lens over another base.
    #[error("lens {} of this row belongs to another base", .0.0)]
    LensOfOtherBase(LensId),
    /// Two lenses of the row bring the same module whole, so that one would undo the other.
    #[error("lens {} of this row replaces {what} of the base, and so does a lens before it", .lens.0)]
    LensesConflict {
        /// The later one.
        lens: LensId,
        /// What both replace.
        what: &'static str,
    },
    /// The operating system refused memory.
    #[error("{0}")]
    System(String),
    /// The prompt is empty.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// A row that goes on has all its tokens already.
    #[error("{generated} of {new} tokens were generated, so there is nothing to go on with")]
    NothingLeft {
        /// Tokens generated.
        generated: usize,
        /// Tokens that were asked for.
        new: u32,
    },
    /// A prompt token does not exist in the base's vocabulary.
    #[error("prompt token {id} at position {position} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The token.
        id: u32,
        /// Where.
        position: usize,
        /// Size of the vocabulary.
        vocab: u32,
    },
    /// Prompt and answer do not fit the context.
    #[error(
        "{prompt} prompt tokens and {new} new ones exceed the context of {limit} tokens; shorten the prompt or ask for fewer"
    )]
    ContextOverflow {
        /// Prompt tokens.
        prompt: u32,
        /// New tokens asked for.
        new: u32,
        /// The context in force.
        limit: u32,
    },
    /// A number of the request is outside its range.
    #[error("{field} is {value}, which is outside of {range}")]
    OutOfRange {
        /// Which.
        field: &'static str,
        /// What it is.
        value: f32,
        /// What it may be.
        range: &'static str,
    },
    /// What the row would read or write does not fit it.
    #[error(transparent)]
    Activations(#[from] ActivationError),
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// The engine thread ended.
    #[error("the engine stopped")]
    Stopped,
}

impl SubmitError {
    /// Whether the same row may be accepted later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::QueueFull { .. } | Self::BaseNotActive | Self::ShuttingDown | Self::Stopped)
    }
}

/// The engine at the end of its last step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Snapshot {
    /// The active base.
    pub active_base: Option<BaseId>,
    /// Longest sequence in force for the active base, 0 without one.
    pub max_context_tokens: u32,
    /// Rows in the batch.
    pub running_rows: u32,
    /// Rows accepted and not in the batch: new, or stepped back for want of KV blocks.
    pub waiting_rows: u32,
    /// KV blocks in all.
    pub kv_blocks_total: u32,
    /// KV blocks no row holds.
    pub kv_blocks_free: u32,
    /// Of these, blocks that are kept for a prefix that may come again.
    pub kv_blocks_kept: u32,
    /// Tokens in a KV block.
    pub kv_block_tokens: u32,
    /// Charged bytes of bases, lenses and KV cache.
    pub arena: ArenaUse,
    /// Bytes of activations and step metadata.
    pub workspace_bytes: u64,
    /// Steps since the start.
    pub steps_total: u64,
    /// Prompt tokens computed since the start (again after stepping back).
    pub prompt_tokens_total: u64,
    /// Tokens generated since the start.
    pub generated_tokens_total: u64,
    /// Tokens of the prompts of rows that might find some of them in the cache; once for a row that was preempted and goes on.
    pub prefix_queried_tokens_total: u64,
    /// Of these, tokens that were there.
    pub prefix_cached_tokens_total: u64,
    /// Times a row stepped back for want of KV blocks.
    pub preemptions_total: u64,
    /// Nanoseconds of all steps, with everything the engine thread does around them.
    pub step_nanoseconds_total: u64,
    /// Of these, in the model: what a step costs beyond them is the engine's own.
    pub model_nanoseconds_total: u64,
}

pub(crate) enum Command {
    ReserveBase {
        layout: Box<BaseLayout>,
        reply: Reply<Result<Region, ReserveError>>,
    },
    ReserveLens {
        bytes: u64,
        reply: Reply<Result<Region, ReserveError>>,
    },
    InstallBase {
        base: Box<FilledBase>,
        reply: Reply<BaseId>,
    },
    LendBase {
        base: BaseId,
        reply: Reply<Option<Arc<FilledBase>>>,
    },
    LendLens {
        lens: LensId,
        reply: Reply<Option<Arc<FilledLens>>>,
    },
    InstallLens {
        base: BaseId,
        lens: Box<FilledLens>,
        reply: Reply<Result<LensId, ChangeError>>,
    },
    Activate {
        base: BaseId,
        reply: Reply<Result<(), ActivateError>>,
    },
    RemoveBase {
        base: BaseId,
        reply: Reply<Result<u64, RemoveError>>,
    },
    RemoveLens {
        lens: LensId,
        when_idle: bool,
        reply: Reply<Result<u64, RemoveError>>,
    },
    Submit {
        row: Box<RowRequest>,
        reply: Reply<Result<RowStream, SubmitError>>,
    },
    EndRows {
        failure: RowFailure,
        reply: Reply<u32>,
    },
    Reconfigure {
        config: EngineConfig,
        reply: Reply<Result<(), ChangeError>>,
    },
    Shutdown {
        reply: Reply<()>,
    },
    #[cfg(test)]
    Test(TestCommand),
}

/// What only tests ask.
#[cfg(test)]
pub(crate) enum TestCommand {
    /// Makes everything that is kept for a prefix not-a-number.
    PoisonKept(Reply<u32>),
    /// Stands still until the other end is dropped.
    Hold(std::sync::mpsc::Receiver<()>),
}

pub(crate) type Reply<T> = oneshot::Sender<T>;

/// What the engine publishes without being asked.
#[derive(Default)]
pub(crate) struct Published {
    pub(crate) snapshot: Mutex<Snapshot>,
    pub(crate) heartbeat: Arc<AtomicU64>,
}

/// Commands on their way to the engine thread, at most. A submit beyond it is refused, a control command waits.
pub(crate) const COMMANDS: usize = 1024;

/// The way to the engine thread. The engine ends, after its rows, when the last handle is gone.
#[derive(Clone)]
pub struct EngineHandle {
    commands: mpsc::Sender<Command>,
    published: Arc<Published>,
}

impl EngineHandle {
    pub(crate) fn new(commands: mpsc::Sender<Command>, published: Arc<Published>) -> Self {
        Self { commands, published }
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Option<T> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.ok()?;
        answer.await.ok()
    }

    /// Memory for a base, shrinking the KV cache if that makes room.
    pub async fn reserve_base(&self, layout: &BaseLayout) -> Result<Region, ReserveError> {
        let layout = Box::new(layout.clone());
        self.ask(|reply| Command::ReserveBase { layout, reply }).await.unwrap_or(Err(ReserveError::Stopped))
    }

    /// Memory for a lens, inside the lens budget.
    pub async fn reserve_lens(&self, layout: &LensLayout) -> Result<Region, ReserveError> {
        let bytes = layout.bytes;
        self.ask(|reply| Command::ReserveLens { bytes, reply }).await.unwrap_or(Err(ReserveError::Stopped))
    }

    /// Makes a filled base known. It is resident, not yet active.
    pub async fn install_base(&self, base: FilledBase) -> Result<BaseId, ChangeError> {
        let base = Box::new(base);
        self.ask(|reply| Command::InstallBase { base, reply }).await.ok_or(ChangeError::Stopped)
    }

    /// Shares an installed base with who fills a lens over it. Until the last copy is dropped the base cannot be removed,
    /// as if a lens over it were installed.
    pub async fn lend_base(&self, base: BaseId) -> Result<Arc<FilledBase>, ChangeError> {
        let lent = self.ask(|reply| Command::LendBase { base, reply }).await.ok_or(ChangeError::Stopped)?;
        lent.ok_or(ChangeError::UnknownBase)
    }

    /// Shares a lens, which is not freed before it is given back: whoever removes it sees to that first. `None` when there is
    /// no such lens.
    pub async fn lend_lens(&self, lens: LensId) -> Option<Arc<FilledLens>> {
        self.ask(|reply| Command::LendLens { lens, reply }).await.flatten()
    }

    /// Makes a filled lens usable by rows over `base`.
    pub async fn install_lens(&self, base: BaseId, lens: FilledLens) -> Result<LensId, ChangeError> {
        let lens = Box::new(lens);
        self.ask(|reply| Command::InstallLens { base, lens, reply })
            .await
            .unwrap_or(Err(ChangeError::Stopped))
    }

    /// Makes an installed base the active one: builds its workspace and KV cache. Needs that no row is in flight;
    /// on failure the base that was active stays so. The others stay resident, so activating one
    /// again moves no weights.
    pub async fn activate(&self, base: BaseId) -> Result<(), ActivateError> {
        self.ask(|reply| Command::Activate { base, reply }).await.unwrap_or(Err(ActivateError::Stopped))
    }

    /// Frees a base (the active one too, when no row is in flight) and answers with the bytes given back.
    pub async fn remove_base(&self, base: BaseId) -> Result<u64, RemoveError> {
        self.ask(|reply| Command::RemoveBase { base, reply }).await.unwrap_or(Err(RemoveError::Stopped))
    }

    /// Frees a lens that no row uses and answers with the bytes given back.
    pub async fn remove_lens(&self, lens: LensId) -> Result<u64, RemoveError> {
        self.ask(|reply| Command::RemoveLens { lens, when_idle: false, reply })
            .await
            .unwrap_or(Err(RemoveError::Stopped))
    }

    /// Like [`Self::remove_lens`], but waits until its last row has ended. New rows with it are refused from now on.
    pub async fn retire_lens(&self, lens: LensId) -> Result<u64, RemoveError> {
        self.ask(|reply| Command::RemoveLens { lens, when_idle: true, reply })
            .await
            .unwrap_or(Err(RemoveError::Stopped))
    }

    /// Starts a row. Its lenses are in use from this answer until the row's last event.
    pub async fn submit(&self, row: RowRequest) -> Result<RowStream, SubmitError> {
        let (reply, answer) = oneshot::channel();
        let row = Box::new(row);
        self.commands.try_send(Command::Submit { row, reply }).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => {
                SubmitError::QueueFull { waiting: COMMANDS as u32, limit: COMMANDS as u32 }
            }
            mpsc::error::TrySendError::Closed(_) => SubmitError::Stopped,
        })?;
        answer.await.unwrap_or(Err(SubmitError::Stopped))
    }

    /// Ends every row in flight with [`super::row::RowFailure::Aborted`] and answers how many there were.
    pub async fn abort_rows(&self) -> u32 {
        self.ask(|reply| Command::EndRows { failure: RowFailure::Aborted, reply }).await.unwrap_or(0)
    }

    /// The same with [`super::row::RowFailure::Preempted`]: whoever waits for a row's tokens submits it again when its base
    /// is back.
    pub async fn preempt_rows(&self) -> u32 {
        self.ask(|reply| Command::EndRows { failure: RowFailure::Preempted, reply }).await.unwrap_or(0)
    }

    /// Changes budgets and batching between two steps, or refuses with numbers and changes nothing.
    pub async fn reconfigure(&self, config: EngineConfig) -> Result<(), ChangeError> {
        self.ask(|reply| Command::Reconfigure { config, reply }).await.unwrap_or(Err(ChangeError::Stopped))
    }

    /// Makes everything that is kept for a prefix not-a-number, and answers how many blocks that are.
    #[cfg(test)]
    pub(crate) async fn poison_kept(&self) -> u32 {
        self.ask(|reply| Command::Test(TestCommand::PoisonKept(reply))).await.unwrap_or(0)
    }

    /// The engine stands still, and commands queue, until what this gives is dropped.
    #[cfg(test)]
    pub(crate) async fn hold(&self) -> std::sync::mpsc::Sender<()> {
        let (hold, until) = std::sync::mpsc::channel();
        let _ = self.commands.send(Command::Test(TestCommand::Hold(until))).await;
        hold
    }

    /// Refuses new rows from now on and answers when the last one has ended and the engine thread has freed
    /// everything. To end them sooner, call [`Self::abort_rows`].
    pub async fn shutdown(&self) {
        self.ask(|reply| Command::Shutdown { reply }).await;
        self.commands.closed().await;
    }

    /// The engine at the end of its last step. Cheap: no message to the engine thread.
    pub fn snapshot(&self) -> Snapshot {
        *self.published.snapshot.lock()
    }

    /// A number that grows with every layer computed and every command handled. While rows are in flight, an
    /// engine whose number stands still for long is stuck.
    pub fn heartbeat(&self) -> u64 {
        self.published.heartbeat.load(Ordering::Relaxed)
    }

    /// Whether the engine thread is still there.
    pub fn is_running(&self) -> bool {
        !self.commands.is_closed()
    }
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle").field("running", &self.is_running()).finish_non_exhaustive()
    }
}
