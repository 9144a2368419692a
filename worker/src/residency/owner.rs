//! The task that owns the residency table: takes documents, requests and events, one at a time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use turret_crds::condition::FailureReason;
use turret_crds::document::{
    BaseKey, DocumentBase, DocumentLens, EvictionRule, Verdict, WorkerDocument, judge,
};
use turret_crds::model_name::ModelName;
use turret_crds::report::{AppliedDocument, CannotFit, EvictionReason, FetchReport};

use super::advice::Advice;
use super::declared::{Counts, DeclaredLens, LensName, Lenses};
use super::failure::{Failure, backoff};
use super::lease::Leases;
use super::loader::Loader;
use super::orders::{Obeyed, OrderError, epoch_seconds};
use super::plan::Budgets;
use super::publish::{News, Published};
use super::resolve::{ResolvedBase, Wish};
use super::resolving::{Checks, Supplier};
use super::source::Listed;
use super::table::{LensKey, Table};
use super::warmup::Warmup;
use super::work::Event;
use super::{DEFAULT_DISK_BYTES, Measured, Message, Outcome, Permit, Refusal, Start, View};
use crate::engine::handle::{BaseId, EngineConfig, EngineHandle};
use crate::engine::memory::{fits_alone, fits_inactive};
use crate::eviction::history::{Entry, History};
use crate::model::weights::BaseLayout;

/// Longest sequence where the document says nothing.
const DEFAULT_CONTEXT_TOKENS: u32 = 8192;
/// Part of the device budget that is for lenses where the document says nothing: an eighth.
const LENS_PART: u64 = 8;
/// How often files that were found good are looked at again.
pub(super) const RECHECK: Duration = Duration::from_secs(30);

/// How far a declared artifact is, as it is told.
#[derive(Clone, Debug)]
pub(super) enum Stage<T> {
    Resolving,
    Ready(T),
    Failed {
        failure: Failure,
        retry_at: Option<Instant>,
        retry_epoch: Option<u64>,
        /// A new document may have mended it, which is being found out.
        in_doubt: bool,
    },
}

/// How far it is for whoever needs it.
pub(super) enum Standing<'a, T> {
    /// It will be known.
    Open,
    Ready(&'a T),
    Failed {
        failure: &'a Failure,
        retry_at: Option<Instant>,
    },
}

impl<T> Stage<T> {
    pub(super) fn ready(&self) -> Option<&T> {
        match self {
            Self::Ready(value) => Some(value),
            _ => None,
        }
    }

    /// What to do with a request for it. Who asks after a change waits for what comes of it, and is not refused for what
    /// was before.
    pub(super) fn standing(&self) -> Standing<'_, T> {
        match self {
            Self::Resolving | Self::Failed { in_doubt: true, .. } => Standing::Open,
            Self::Ready(value) => Standing::Ready(value),
            Self::Failed { failure, retry_at, .. } => Standing::Failed { failure, retry_at: *retry_at },
        }
    }

    /// After a new document that declares the same, or when somebody asks for it: what failed is looked at again at once,
    /// since something else in the document may be what helps. Until that is known, what is said of it stays.
    pub(super) fn looked_at_again(self) -> Self {
        match self {
            Self::Failed { failure, retry_epoch, .. } => {
                Self::Failed { failure, retry_at: Some(Instant::now()), retry_epoch, in_doubt: true }
            }
            other => other,
        }
    }

    pub(super) fn has_failed(&self) -> bool {
        matches!(self, Self::Failed { .. })
    }

    /// When a failure is looked at again, if time has something to do with it.
    pub(super) fn retry_at(&self) -> Option<Instant> {
        match self {
            Self::Failed { retry_at, .. } => *retry_at,
            _ => None,
        }
    }
}

/// A declared base.
#[derive(Debug)]
pub(super) struct DeclaredBase {
    pub(super) base: DocumentBase,
    pub(super) groups: Vec<String>,
    pub(super) stage: Stage<Arc<ResolvedBase>>,
    /// Which resolution is current; an answer to an older one is dropped.
    pub(super) token: u64,
    pub(super) in_flight: bool,
    pub(super) failures: u32,
    pub(super) percent: u8,
    /// Its files, while they are on their way.
    pub(super) fetch: Option<FetchReport>,
}

/// A request that waits.
#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) model: ModelName,
    pub(super) since: Instant,
    /// Whether the request has been counted for its lens.
    pub(super) counted: bool,
    /// Whether it is a row that was preempted: it is not given up for how long it waits.
    pub(super) again: bool,
    pub(super) reply: oneshot::Sender<Result<Permit, Refusal>>,
}

/// What a permit protects.
#[derive(Debug)]
pub(super) struct Permitted {
    pub(super) model: ModelName,
    pub(super) base: BaseKey,
    pub(super) lens: Option<LensKey>,
}

/// Why the base is switched: a drain is given up when that is no longer so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// Requests wait for the other base.
    Waiters,
    /// The document says so.
    Declared,
    /// Somebody asked for it by hand.
    Asked,
    /// The active one is not declared any more.
    Undeclared,
}

/// Where the switch of bases stands.
#[derive(Debug)]
pub(super) enum Turn {
    Steady,
    Draining { to: BaseKey, until: Instant, why: Why },
    Switching { to: BaseKey, since: Instant },
}

/// Whether the prepared files are being counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counting {
    Idle,
    Running,
    /// They are, and there is one more by now: they are counted again after that.
    Outdated,
}

/// When something was on its way, so that those who waited can be told how long it took.
pub(super) type Span = (Instant, Instant);

pub(super) struct Owner {
    pub(super) engine: EngineHandle,
    pub(super) loader: Loader,
    pub(super) start: Start,
    pub(super) messages: mpsc::UnboundedSender<Message>,
    pub(super) view: watch::Sender<Arc<View>>,
    pub(super) published: Published,
    pub(super) news: News,
    pub(super) began: Instant,
    pub(super) created: u64,

    pub(super) document: Option<Arc<WorkerDocument>>,
    /// What the document's hints say to this worker.
    pub(super) advice: Advice,
    pub(super) applied: Option<AppliedDocument>,
    /// Limits in force, and those the document asks for while they are not.
    pub(super) limits: EngineConfig,
    pub(super) wanted_limits: Option<EngineConfig>,
    /// Limits that the engine is about to put in force.
    pub(super) reconfiguring: Option<EngineConfig>,
    pub(super) reconfigure_at: Instant,
    /// Why the wanted limits are not in force, once that is known.
    pub(super) cannot_fit: Option<CannotFit>,

    pub(super) bases: BTreeMap<BaseKey, DeclaredBase>,
    pub(super) lenses: Lenses,
    pub(super) checks: Checks,
    /// When a resolution may start that could not before.
    pub(super) resolve_at: Option<Instant>,
    pub(super) next_token: u64,
    pub(super) recheck_at: Instant,
    pub(super) rechecking: Vec<Supplier>,
    pub(super) counting_prepared: Counting,

    pub(super) table: Table,
    /// Whether something may be in memory that is to leave without anybody needing its room.
    pub(super) untidy: bool,
    pub(super) base_ids: BTreeMap<BaseKey, BaseId>,
    /// What is remembered of lenses, in memory or not; and where.
    pub(super) history: History,
    pub(super) entries: BTreeMap<LensKey, Entry>,
    pub(super) leases: Leases,
    pub(super) leases_changed: bool,
    /// Pinned by hand, until the worker restarts.
    pub(super) pins: BTreeSet<LensName>,
    /// Who waits until a lens is in memory, without a request for it.
    pub(super) awaited: BTreeMap<LensName, Vec<oneshot::Sender<Result<Obeyed, OrderError>>>>,
    /// Whether some lens may have to be loaded ahead of requests that could not be before.
    pub(super) look_ahead: bool,
    /// Whether one waits for room.
    pub(super) ahead_waits: bool,
    pub(super) sweep_at: Instant,
    /// The base that somebody asked for by hand.
    pub(super) asked_base: Option<BaseKey>,
    pub(super) uses: u64,
    pub(super) turn: Turn,
    pub(super) active_since: Instant,
    pub(super) warmup: Warmup,
    pub(super) last_switch: Option<(BaseKey, Span)>,
    pub(super) last_loads: BTreeMap<LensKey, Span>,
    /// Bases that the engine had no room for beside the active one.
    pub(super) not_beside: BTreeSet<BaseKey>,
    pub(super) switches: u64,
    pub(super) evictions: BTreeMap<EvictionReason, u64>,

    pub(super) waiters: BTreeMap<u64, Waiter>,
    pub(super) permits: BTreeMap<u64, Permitted>,
    pub(super) next_number: u64,
    pub(super) grants: VecDeque<Instant>,
    pub(super) idlers: Vec<oneshot::Sender<()>>,
    /// Whether the process is about to end, and whether it takes nothing new by now.
    pub(super) leaving: bool,
    pub(super) refusing: bool,
    /// Rows were ended, and none is let in any more.
    pub(super) ending: bool,
    /// Whether nothing new is taken because somebody asked for that.
    pub(super) drained: bool,
}

impl Owner {
    pub(super) fn new(
        engine: EngineHandle,
        mut start: Start,
        messages: mpsc::UnboundedSender<Message>,
    ) -> Self {
        start.resolver.fetcher = start.resolver.fetcher.of_owner(messages.clone());
        let now = Instant::now();
        let created = epoch_seconds();
        let limits = start.limits.clone();
        let events = messages.clone();
        let on_prepared = Arc::new(move || {
            let _ = events.send(Message::Event(Event::Prepared));
        });
        let mut owner = Self {
            view: watch::Sender::new(Arc::new(super::publish::nothing(&start, created))),
            published: Published::default(),
            news: News::Now,
            loader: Loader::new(engine.clone(), start.resolver.fetcher.cache().clone(), on_prepared),
            engine,
            start,
            messages,
            began: now,
            created,
            document: None,
            advice: Advice::default(),
            applied: None,
            limits,
            wanted_limits: None,
            reconfiguring: None,
            reconfigure_at: now,
            cannot_fit: None,
            bases: BTreeMap::new(),
            lenses: Lenses::default(),
            checks: Checks::default(),
            resolve_at: None,
            next_token: 0,
            recheck_at: now + RECHECK,
            rechecking: Vec::new(),
            counting_prepared: Counting::Idle,
            table: Table::default(),
            untidy: false,
            base_ids: BTreeMap::new(),
            history: History::new(f64::from(EvictionRule::default().idle_seconds)),
            entries: BTreeMap::new(),
            leases: Leases::default(),
            leases_changed: false,
            pins: BTreeSet::new(),
            awaited: BTreeMap::new(),
            look_ahead: false,
            ahead_waits: false,
            sweep_at: now,
            asked_base: None,
            uses: 0,
            turn: Turn::Steady,
            active_since: now,
            warmup: Warmup::Cold,
            last_switch: None,
            last_loads: BTreeMap::new(),
            not_beside: BTreeSet::new(),
            switches: 0,
            evictions: BTreeMap::new(),
            waiters: BTreeMap::new(),
            permits: BTreeMap::new(),
            next_number: 0,
            grants: VecDeque::new(),
            idlers: Vec::new(),
            leaving: false,
            refusing: false,
            ending: false,
            drained: false,
        };
        owner.count_prepared();
        owner.publish();
        owner
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<Arc<View>> {
        self.view.subscribe()
    }

    /// Runs until nobody can send any more.
    pub(super) async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        loop {
            let mut wake = self.pump();
            // What many messages changed is published once.
            if inbox.is_empty() {
                let later = self.publish_in_time(Instant::now());
                wake = wake.into_iter().chain(later).min();
            }
            let message = match wake {
                Some(at) => tokio::select! {
                    biased;
                    message = inbox.recv() => message,
                    () = tokio::time::sleep_until(at) => {
                        self.news = News::Now;
                        continue;
                    }
                },
                None => inbox.recv().await,
            };
            match message {
                None => return,
                Some(message) => self.handle(message),
            }
        }
    }

    pub(super) fn handle(&mut self, message: Message) {
        let counts = matches!(
            message,
            Message::Acquire { .. } | Message::AcquireAgain { .. } | Message::Release { .. }
        );
        self.news = self.news.max(if counts { News::Soon } else { News::Now });
        match message {
            Message::Offer { document, reply } => {
                let verdict = self.offer(*document);
                self.pump();
                self.publish();
                let _ = reply.send(verdict);
            }
            Message::Acquire { model, reply } => self.enqueue(model, false, reply),
            // One message, so that the row is never unknown in between.
            Message::AcquireAgain { number, model, reply } => {
                // What it took is told once, at its end.
                self.release(number, Outcome::Preempted, &Measured::default());
                self.enqueue(model, true, reply);
            }
            Message::End => self.refuse_all(),
            Message::Release { number, outcome, measured } => self.release(number, outcome, &measured),
            Message::Leave { refuse } => {
                self.leaving = true;
                self.refusing |= refuse;
            }
            Message::Idle { reply } => self.idlers.push(reply),
            // Files are on their way that the disk lacks so much room for.
            Message::MakeWay { bytes, reply } => {
                let _ = reply.send(self.make_way(bytes));
            }
            Message::Order { order, reply } => self.obey(order, reply),
            Message::Event(event) => self.on_event(event),
        }
    }

    /// The limits that will be in force when what runs has ended: the wanted ones, unless they cannot be met.
    pub(super) fn coming_limits(&self) -> &EngineConfig {
        match &self.wanted_limits {
            Some(wanted) if self.cannot_fit.as_ref().is_none_or(|short| short.once_idle) => wanted,
            _ => &self.limits,
        }
    }

    /// Budgets in force; while smaller ones are on their way, already those.
    pub(super) fn budgets(&self) -> Budgets {
        // What the engine was asked for comes into force even if a newer document asks for more by now.
        let all = [Some(&self.limits), Some(self.coming_limits()), self.reconfiguring.as_ref()];
        let least = |bytes: fn(&EngineConfig) -> u64| all.iter().flatten().map(|limits| bytes(limits)).min();
        Budgets {
            device_bytes: least(|limits| limits.device_bytes).unwrap_or(0),
            lens_bytes: least(|limits| limits.lens_bytes).unwrap_or(0),
        }
    }

    fn offer(&mut self, document: WorkerDocument) -> Verdict {
        let known = self.document.as_ref().map(|d| (d.sequence, d.digest.as_str()));
        let other_placement =
            self.document.as_ref().is_some_and(|d| d.placement.uid != document.placement.uid);
        let verdict = match other_placement {
            // The sequence belongs to the placement's UID; another placement under the same name starts afresh.
            true => Verdict::Take,
            false => judge(known, (document.sequence, &document.digest)),
        };
        match verdict {
            Verdict::Take => {
                tracing::info!(
                    sequence = document.sequence,
                    digest = document.digest,
                    groups = document.groups.len(),
                    "document taken"
                );
                self.take(document);
            }
            Verdict::Same => self.take_hints(document.hints),
            Verdict::Stale | Verdict::Conflict => {}
        }
        verdict
    }

    fn take(&mut self, document: WorkerDocument) {
        let device_bytes = document.memory.device_bytes.unwrap_or(self.start.default_device_bytes);
        let limits = EngineConfig {
            device_bytes,
            lens_bytes: document.memory.lens_bytes.unwrap_or(device_bytes / LENS_PART),
            max_context_tokens: document.batching.max_context_tokens.unwrap_or(DEFAULT_CONTEXT_TOKENS),
            max_running_rows: document.batching.max_running_rows,
            prefill_chunk_tokens: document.batching.prefill_chunk_tokens,
            // The queue is ours: the engine is given no more than it can soon compute, and takes all of it.
            max_waiting_rows: document.batching.max_running_rows.saturating_mul(2).saturating_add(16),
            prefix_cache: true,
        };
        self.wanted_limits = (limits != self.limits || self.reconfiguring.is_some()).then_some(limits);
        self.reconfigure_at = Instant::now();
        let cache = self.start.resolver.fetcher.cache();
        cache.set_budget(document.memory.disk_bytes.unwrap_or(DEFAULT_DISK_BYTES));
        let same_listed = self.document.as_ref().is_some_and(|d| Listed::of(d) == Listed::of(&document));
        self.declare_bases(&document, same_listed);
        self.declare_lenses(&document, same_listed);
        self.not_beside.clear();
        self.published.aliases = Arc::new(document.aliases());
        self.document = Some(Arc::new(document));
        self.follow_hints();
        self.cannot_fit = self.unfit_budgets();
        if let Some(short) = &self.cannot_fit {
            tracing::warn!(error = short.message, "the document's budgets cannot be met, those before stay");
        }
        self.refuse_what_no_longer_fits();
        self.measure_lenses();
        self.retain_folders();
        self.follow_eviction_rule();
        self.resolve_at = Some(Instant::now());
        self.untidy = true;
    }

    /// Why the wanted limits would end the service of a base that is served now, if they would. A base that was never
    /// served under them fails by itself, see [`base_too_large`].
    pub(super) fn unfit_budgets(&self) -> Option<CannotFit> {
        let wanted = self.wanted_limits.as_ref()?;
        let bases = self.bases.values().filter_map(|b| Some((b.groups.join("`, `"), b.stage.ready()?)));
        let unfit = bases
            .filter_map(|(groups, base)| Some((Some(groups), fits_alone(&base.layout, wanted).err()?)))
            .max_by_key(|(_, short)| short.short_by_bytes)
            .or_else(|| Some((None, fits_inactive(0, wanted).err()?)));
        let (groups, short) = unfit?;
        let needed = enough(wanted, short.short_by_bytes);
        let of = groups.map_or_else(String::new, |groups| format!("for group `{groups}` "));
        Some(self.cannot_fit(needed, wanted.device_bytes, false, format!("{of}{}", short.why)))
    }

    /// The same, as it is reported.
    pub(super) fn cannot_fit(&self, needed: u64, budget: u64, once_idle: bool, why: String) -> CannotFit {
        let what = match once_idle {
            true => "they are met when running requests have ended".to_owned(),
            false => format!(
                "raise spec.memory.deviceBudget to at least {needed} bytes, or lower spec.memory.lensBudget, \
                 spec.batching.maxContextTokens or spec.batching.maxRunningRows"
            ),
        };
        CannotFit {
            sequence: self.document.as_ref().map_or(0, |d| d.sequence),
            needed_bytes: needed,
            budget_bytes: budget,
            once_idle,
            message: format!("{needed} bytes are needed, {budget} are allowed: {why}; {what}"),
        }
    }

    /// A smaller lens budget may be too small for a lens that was found good under a larger one.
    fn refuse_what_no_longer_fits(&mut self) {
        let lens_bytes = self.coming_limits().lens_bytes;
        let too_large = |lens: &DeclaredLens| lens_too_large(lens.stage.ready()?.bytes, lens_bytes);
        let refused: Vec<(LensName, Failure)> =
            self.lenses.iter().filter_map(|(name, lens)| Some((name.clone(), too_large(lens)?))).collect();
        for (name, failure) in refused {
            self.lenses.update(&name, |lens| lens.stage = Self::failed(failure, 1));
        }
    }

    fn declare_bases(&mut self, document: &WorkerDocument, same_listed: bool) {
        let mut old = std::mem::take(&mut self.bases);
        for group in &document.groups {
            let key = &group.base.key;
            if let Some(declared) = self.bases.get_mut(key) {
                declared.groups.push(group.name.clone());
                continue;
            }
            let groups = vec![group.name.clone()];
            let declared = match old.remove(key) {
                Some(known) if known.base == group.base && same_listed => {
                    DeclaredBase { groups, stage: known.stage.looked_at_again(), ..known }
                }
                _ => {
                    self.next_token += 1;
                    DeclaredBase {
                        base: group.base.clone(),
                        groups,
                        stage: Stage::Resolving,
                        token: self.next_token,
                        in_flight: false,
                        failures: 0,
                        percent: 0,
                        fetch: None,
                    }
                }
            };
            self.bases.insert(key.clone(), declared);
        }
    }

    fn declare_lenses(&mut self, document: &WorkerDocument, same_listed: bool) {
        let mut tokens = self.next_token;
        self.lenses.declare(|mut old| {
            let mut declared = BTreeMap::new();
            for group in &document.groups {
                for lens in &group.lenses {
                    let name = (group.name.clone(), lens.name.clone());
                    let known = old.remove(&name);
                    tokens += 1;
                    declared.insert(name, declare_lens(lens, &group.base.key, known, same_listed, tokens));
                }
            }
            declared
        });
        self.next_token = tokens;
    }

    fn enqueue(&mut self, model: ModelName, again: bool, reply: oneshot::Sender<Result<Permit, Refusal>>) {
        let limit = self.document.as_ref().map_or(0, |d| d.admission.max_queued_requests);
        let refusal = if self.ending {
            Some(Refusal::Draining)
        } else if again {
            None
        } else if self.refusing || self.drained {
            Some(Refusal::Draining)
        } else if self.waiters.len() >= limit as usize && self.document.is_some() {
            let retry_after = self.retry_after();
            Some(Refusal::Overloaded { waiting: self.waiters.len(), limit, retry_after })
        } else {
            None
        };
        if let Some(refusal) = refusal {
            let _ = reply.send(Err(refusal));
            return;
        }
        self.next_number += 1;
        // A preempted row was counted when it came.
        let waiter = Waiter { model, since: Instant::now(), counted: again, again, reply };
        self.waiters.insert(self.next_number, waiter);
    }

    fn release(&mut self, number: u64, outcome: Outcome, measured: &Measured) {
        let Some(permitted) = self.permits.remove(&number) else { return };
        self.uses += 1;
        if let Some(held) = self.table.bases.get_mut(&permitted.base) {
            held.users = held.users.saturating_sub(1);
            held.last_used = self.uses;
        }
        if let Some(key) = &permitted.lens
            && let Some(held) = self.table.lenses.get_mut(key)
        {
            held.users = held.users.saturating_sub(1);
            if outcome == Outcome::Failed {
                self.history.failed(held.entry, self.began.elapsed().as_secs_f64());
            }
        }
        if let Some(lens) = permitted.model.lens {
            let name = (permitted.model.group, lens);
            self.lenses.count(&name, |counts| {
                counts.active_rows = counts.active_rows.saturating_sub(1);
                counts.measure(measured);
                match outcome {
                    Outcome::Answered => counts.served += 1,
                    Outcome::Failed => counts.errors += 1,
                    Outcome::Cancelled | Outcome::Preempted => {}
                }
            });
        }
        // What nothing declares leaves with its last row, and what is too much as soon as it can.
        let declared = self.bases.contains_key(&permitted.base)
            && permitted.lens.as_ref().is_none_or(|key| self.lenses.declares(key));
        self.untidy |= !declared || self.wanted_limits.is_some();
        self.look_ahead |= self.ahead_waits;
    }

    /// The process ends: whoever still waits is told so.
    fn refuse_all(&mut self) {
        self.ending = true;
        for (_, waiter) in std::mem::take(&mut self.waiters) {
            let _ = waiter.reply.send(Err(Refusal::Draining));
        }
    }

    /// When those who are refused now may find room: how long the queue takes at the measured rate.
    pub(super) fn retry_after(&self) -> Duration {
        let waiting = self.waiters.len() as u64 + 1;
        let seconds = match (self.grants.front(), self.grants.len() as u64) {
            (Some(first), n) if n > 1 => {
                let window = first.elapsed().as_secs_f64().max(0.1);
                (waiting as f64 * window / n as f64).ceil() as u64
            }
            _ => 5,
        };
        Duration::from_secs(seconds.clamp(1, 60))
    }

    /// What a failure becomes: tried again later, or not before something changes.
    pub(super) fn failed<T>(failure: Failure, failures: u32) -> Stage<T> {
        let delay = failure.reason.is_retryable().then(|| backoff(failures));
        Stage::Failed {
            failure,
            retry_at: delay.map(|d| Instant::now() + d),
            retry_epoch: delay.map(|d| epoch_seconds() + d.as_secs()),
            in_doubt: false,
        }
    }

    pub(super) fn ms(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.began).as_millis() as u64
    }
}

/// A lens as a new document declares it; what is the same as before goes on.
fn declare_lens(
    lens: &DocumentLens,
    base: &BaseKey,
    known: Option<DeclaredLens>,
    same_listed: bool,
    token: u64,
) -> DeclaredLens {
    let same = |k: &DeclaredLens| {
        k.base == *base && k.lens.source == lens.source && k.lens.kind == lens.kind && same_listed
    };
    match known {
        Some(known) if same(&known) => {
            DeclaredLens { lens: lens.clone(), stage: known.stage.looked_at_again(), ..known }
        }
        known => DeclaredLens {
            lens: lens.clone(),
            base: base.clone(),
            stage: Stage::Resolving,
            token,
            in_flight: false,
            failures: 0,
            asked: Wish::Glimpse,
            fetch_at: None,
            file_bytes: u64::MAX,
            fetch: None,
            counts: known.map_or_else(Counts::default, |known| known.counts),
        },
    }
}

/// Why a lens of this size can never be loaded, if it cannot.
pub(super) fn lens_too_large(bytes: u64, budget: u64) -> Option<Failure> {
    let short = bytes.checked_sub(budget).filter(|&short| short > 0)?;
    let message = format!(
        "the lens takes {bytes} bytes, {short} more than the lens budget of {budget}; raise spec.memory.lensBudget"
    );
    Some(Failure::new(FailureReason::DoesNotFit, message))
}

/// The device budget that is enough where this one is short. A lens budget that is a part of it grows with it.
fn enough(limits: &EngineConfig, short_by_bytes: u64) -> u64 {
    let needed = limits.device_bytes.saturating_add(short_by_bytes);
    if limits.lens_bytes != limits.device_bytes / LENS_PART {
        return needed;
    }
    let beside_lenses = needed.saturating_sub(limits.lens_bytes);
    beside_lenses.saturating_mul(LENS_PART).div_ceil(LENS_PART - 1)
}

/// Why a base can never be served under these limits, if it cannot.
pub(super) fn base_too_large(layout: &BaseLayout, limits: &EngineConfig) -> Option<Failure> {
    let short = fits_alone(layout, limits).err()?;
    let needed = enough(limits, short.short_by_bytes);
    let message = format!(
        "the base does not fit even alone: {short}; raise spec.memory.deviceBudget to at least {needed} bytes"
    );
    Some(Failure::new(FailureReason::DoesNotFit, message))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(device_bytes: u64, lens_bytes: u64) -> EngineConfig {
        EngineConfig {
            device_bytes,
            lens_bytes,
            max_context_tokens: 1,
            max_running_rows: 1,
            prefill_chunk_tokens: 1,
            max_waiting_rows: 1,
            prefix_cache: true,
        }
    }

    #[test]
    fn the_budget_that_is_named_is_enough_also_when_the_lens_budget_grows_with_it() {
        // 100 bytes beside the lenses.
        assert_eq!(enough(&limits(50, 10), 60), 110, "a lens budget of its own");
        for device_bytes in [0, 8, 50, 79, 80] {
            let lens_bytes = device_bytes / LENS_PART;
            let needed = enough(&limits(device_bytes, lens_bytes), 100 + lens_bytes - device_bytes);
            assert!(needed - needed / LENS_PART >= 100, "{needed}");
            assert!((needed - 2) - (needed - 2) / LENS_PART < 100, "{needed} is more than is needed");
        }
    }
}
