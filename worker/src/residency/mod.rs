//! Residency: which bases and lenses are in memory, how they get there, and who may use them.
//!
//! One task ([`owner`]) owns the [`table`]. Requests ask it for a [`Permit`] and hold it while their row runs; jobs
//! ([`resolve`], [`loader`]) report back to it as events. What it decides is pure and beside it: [`plan`] (what leaves
//! so that something fits), [`switch`] (when the active base changes), [`failure`] (when to try again), [`spare`] (which files
//! leave the disk). On disk, [`cache`] has the files that were fetched, and [`prepared`] weights as they lie in memory.
//!
//! - A document is taken at once: what is no longer declared gets no new rows, what is new is resolved in the background.
//! - A lens is found by name, held by content. A row keeps the content it began with, whatever the name means later.
//! - A request waits here, not in the engine, while its base or its lens is on the way; one that cannot be served is
//!   told why.

mod admit;
mod advice;
mod ahead;
mod bases;
pub mod cache;
mod content;
mod declared;
pub mod failure;
pub mod fetch;
pub mod files;
pub mod hosts;
pub mod hub;
mod laid;
pub mod lease;
mod limits;
pub mod loader;
pub mod orders;
mod owner;
pub mod plan;
pub mod prepared;
mod preparing;
mod publish;
mod remote;
pub mod resolve;
mod resolving;
pub mod source;
mod spare;
pub mod switch;
pub mod table;
#[cfg(test)]
mod tests;
pub mod token;
mod warmup;
mod work;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use turret_crds::document::{BaseKey, Verdict, WorkerDocument};
use turret_crds::model_name::ModelName;
use turret_crds::report::{EvictionReason, LeaseReport, WorkerIdentity, WorkerReport};

use crate::engine::handle::{BaseId, EngineConfig, EngineHandle, LensId};
use crate::model::tokenizer::Tokenizer;
use failure::Failure;
use orders::{Obeyed, Order, OrderError};
use resolve::{ResolvedBase, Resolver};

/// What everybody may read: the report, and what a request needs before it has a permit.
#[derive(Clone, Debug)]
pub struct View {
    /// What this worker says of itself.
    pub report: WorkerReport,
    /// The newest document, applied in all its parts or about to be.
    pub document: Option<Arc<WorkerDocument>>,
    /// Bases whose files were found good.
    pub bases: BTreeMap<BaseKey, Arc<ResolvedBase>>,
    /// Lenses whose files were found good, by group and name.
    pub lenses: Arc<BTreeMap<(String, String), SpokenLens>>,
    /// Leases that run, the oldest first.
    pub leases: Arc<Vec<LeaseReport>>,
    /// Evictions so far, by reason.
    pub evictions: BTreeMap<EvictionReason, u64>,
    /// Longest sequence that is configured; a base may allow less.
    pub max_context_tokens: u32,
    /// When this process began to serve its groups, seconds since the epoch.
    pub created: u64,
}

/// What a request needs of a lens before it has one.
#[derive(Clone, Debug)]
pub struct SpokenLens {
    /// Digest of its files.
    pub digest: String,
    /// The tokenizer that it brings in place of the base's.
    pub tokenizer: Option<Tokenizer>,
}

/// The right to run one row over a base, perhaps with a lens. Neither leaves memory before it is dropped.
#[derive(Debug)]
pub struct Permit {
    /// The base.
    pub base: BaseId,
    /// What it is: its files, and how it is held.
    pub base_key: BaseKey,
    /// Digest of its files.
    pub base_digest: String,
    /// The lens, its strength and the digest of its files.
    pub lens: Option<PermittedLens>,
    /// How long loading the lens took, if the request waited for it.
    pub loaded_in: Option<Duration>,
    /// How long the switch of base took, if the request waited for it.
    pub switched_in: Option<Duration>,
    /// `None` once it was given back.
    number: Option<u64>,
    outcome: Outcome,
    measured: Measured,
    owner: mpsc::UnboundedSender<Message>,
}

/// What a row took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Measured {
    /// Tokens generated.
    pub tokens: u32,
    /// From the request's arrival to the first token.
    pub time_to_first_token: Option<Duration>,
    /// Per token after the first.
    pub time_per_output_token: Option<Duration>,
}

/// How a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The client has its answer.
    Answered,
    /// It has none, because of the worker.
    Failed,
    /// It went away before.
    Cancelled,
    /// It goes on when its base is active again.
    Preempted,
}

/// The lens of a permit.
#[derive(Clone, Debug)]
pub struct PermittedLens {
    /// As the engine knows it.
    pub id: LensId,
    /// Strength.
    pub scale: f32,
    /// Digest of its files.
    pub digest: String,
}

impl Permit {
    /// Notes how the row ended. Without a word, it was cancelled.
    pub fn ended(&mut self, outcome: Outcome) {
        self.outcome = outcome;
    }

    /// Gives it back, since the row was preempted, and waits for the next one. The row is not refused for what has come since,
    /// nor given up for how long it waits. Dropping the future gives the place in the queue up.
    pub async fn again(mut self, model: ModelName) -> Result<Permit, Refusal> {
        let (reply, answer) = oneshot::channel();
        if let Some(number) = self.number.take() {
            let _ = self.owner.send(Message::AcquireAgain { number, model, reply });
        }
        answer.await.unwrap_or(Err(Refusal::Draining))
    }

    /// Notes what the row took.
    pub fn measured(&mut self, measured: Measured) {
        self.measured = measured;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let message = Message::Release { number, outcome: self.outcome, measured: self.measured };
        // Without an owner nothing is left to release.
        let _ = self.owner.send(message);
    }
}

/// Why a request gets no permit. The texts are meant for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Its group or lens is not declared, or not any more.
    #[error("the model `{0}` does not exist; `GET /v1/models` lists what is served")]
    Unknown(String),
    /// What it needs cannot be served.
    #[error("`{what}` cannot be served at the moment: {failure}")]
    Failed {
        /// Which base or lens.
        what: String,
        /// Why.
        failure: Failure,
        /// When it is tried again.
        retry_after: Duration,
    },
    /// Its base is not the one that the document says is active.
    #[error(
        "the base of `{group}` is not active: spec.switching.mode is Manual and `{active}` is the active group; set \
         spec.switching.activeGroupName"
    )]
    NotActive {
        /// The group that was asked for.
        group: String,
        /// The group whose base is to be active.
        active: String,
    },
    /// Too many wait.
    #[error("{waiting} requests are waiting, the limit is {limit}; try again later")]
    Overloaded {
        /// How many.
        waiting: usize,
        /// At most.
        limit: u32,
        /// When it may be better.
        retry_after: Duration,
    },
    /// It waited too long.
    #[error("the request waited {} s for {what} and was given up; try again later", .waited.as_secs())]
    TimedOut {
        /// For what.
        what: String,
        /// How long.
        waited: Duration,
        /// When it may be better.
        retry_after: Duration,
    },
    /// The worker is leaving, or was asked to take nothing new.
    #[error("this worker is draining; send the request again")]
    Draining,
}

/// The way to the owner of the table. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Residency {
    messages: mpsc::UnboundedSender<Message>,
    view: watch::Receiver<Arc<View>>,
}

/// What the owner is told. Unbounded, because what it carries is bounded elsewhere: requests by the queue's limit, permits by
/// the batch, events by the jobs that run.
#[derive(Debug)]
enum Message {
    Offer { document: Box<WorkerDocument>, reply: oneshot::Sender<Verdict> },
    Acquire { model: ModelName, reply: oneshot::Sender<Result<Permit, Refusal>> },
    AcquireAgain { number: u64, model: ModelName, reply: oneshot::Sender<Result<Permit, Refusal>> },
    End,
    Release { number: u64, outcome: Outcome, measured: Measured },
    Leave { refuse: bool },
    Idle { reply: oneshot::Sender<()> },
    MakeWay { bytes: u64, reply: oneshot::Sender<u64> },
    Order { order: Order, reply: oneshot::Sender<Result<Obeyed, OrderError>> },
    Event(work::Event),
}

/// What a worker starts with.
#[derive(Clone, Debug)]
pub struct Start {
    /// Who reports.
    pub worker: WorkerIdentity,
    /// Device bytes where the document says nothing.
    pub default_device_bytes: u64,
    /// What the engine was started with.
    pub limits: EngineConfig,
    /// Finds and checks files.
    pub resolver: Resolver,
}

/// Disk for fetched files where the document says nothing.
pub const DEFAULT_DISK_BYTES: u64 = 64 << 30;

impl Residency {
    /// Starts the owner's task.
    pub fn start(engine: EngineHandle, start: Start) -> Self {
        let (messages, inbox) = mpsc::unbounded_channel();
        let cache = start.resolver.fetcher.cache().clone();
        // Nobody waits for it.
        tokio::task::spawn_blocking(move || {
            if let Err(error) = cache.tidy(SystemTime::now()) {
                tracing::debug!(%error, "failed to tidy the cache folder");
            }
        });
        let owner = owner::Owner::new(engine, start, messages.clone());
        let view = owner.subscribe();
        tokio::spawn(owner.run(inbox));
        Self { messages, view }
    }

    /// What everybody may read, as of the last change.
    pub fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Follows the view.
    pub fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// Offers a document that was checked, and tells what came of it.
    pub async fn offer(&self, document: WorkerDocument) -> Verdict {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Offer { document: Box::new(document), reply });
        answer.await.unwrap_or(Verdict::Stale)
    }

    /// Waits for the right to run a row. Dropping the future gives the place in the queue up.
    pub async fn acquire(&self, model: ModelName) -> Result<Permit, Refusal> {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Acquire { model, reply });
        answer.await.unwrap_or(Err(Refusal::Draining))
    }

    /// Refuses all who wait, and from now on everybody: the process ends.
    pub fn end(&self) {
        let _ = self.messages.send(Message::End);
    }

    /// Asks for something by hand. A load is answered when the lens is in memory; dropping the future gives it up.
    pub async fn order(&self, order: Order) -> Result<Obeyed, OrderError> {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Order { order, reply });
        answer.await.unwrap_or(Err(OrderError::Stopped))
    }

    /// Reports this worker as leaving. With `refuse` new requests are refused from now on.
    pub fn leave(&self, refuse: bool) {
        let _ = self.messages.send(Message::Leave { refuse });
    }

    /// Waits until nothing runs and nothing waits.
    pub async fn idle(&self) {
        let (reply, answer) = oneshot::channel();
        let _ = self.messages.send(Message::Idle { reply });
        let _ = answer.await;
    }
}
