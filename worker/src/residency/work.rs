//! What runs beside the owner, and what it hears of it: loads and removals of lenses, and the outcomes of all other jobs.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use tokio::time::Instant;
use turret_crds::document::BaseKey;
use turret_crds::report::{Eviction, EvictionReason, FetchReport};

use super::Message;
use super::declared::LensName;
use super::failure::Failure;
use super::fetch::OnFetch;
use super::loader::{LoadError, OnPercent, SwitchOutcome};
use super::orders::epoch_seconds;
use super::owner::{Counting, Owner, Stage};
use super::plan::Leaving;
use super::resolve::{ResolvedBase, ResolvedLens};
use super::resolving::Supplier;
use super::table::{HeldLens, LensKey, Phase};
use crate::engine::handle::{BaseId, ChangeError, EngineConfig, LensId};

/// Bytes of a download between two reports of how far it is.
const FETCH_STEP: u64 = 4 << 20;
/// Percent of a load between two.
const PERCENT_STEP: u64 = 5;

/// What a job reports.
#[derive(Debug)]
pub(super) enum Event {
    BaseResolved {
        key: BaseKey,
        token: u64,
        result: Result<ResolvedBase, Failure>,
    },
    LensResolved {
        name: LensName,
        token: u64,
        result: Result<ResolvedLens, Failure>,
    },
    /// Sizes of lens files, so that small ones are resolved first.
    Measured(Vec<(LensName, u64, u64)>),
    /// Artifacts whose files are no longer those that were checked.
    Rechecked {
        supplier: Supplier,
        lenses: Vec<LensName>,
    },
    LensLoaded {
        key: LensKey,
        result: Result<LensId, LoadError>,
        since: Instant,
    },
    LensGone {
        key: LensKey,
        result: Result<(), Failure>,
    },
    BaseLoaded {
        key: BaseKey,
        result: Result<BaseId, LoadError>,
    },
    BaseGone {
        key: BaseKey,
        outcome: SwitchOutcome,
        failure: Option<Failure>,
    },
    BaseFetched {
        key: BaseKey,
        token: u64,
        fetch: FetchReport,
    },
    LensFetched {
        name: LensName,
        token: u64,
        fetch: FetchReport,
    },
    BasePercent {
        key: BaseKey,
        percent: u8,
    },
    LensPercent {
        key: LensKey,
        percent: u8,
    },
    /// There is one prepared file more.
    Prepared,
    /// Bytes of the prepared files.
    PreparedCounted(u64),
    Switched(SwitchOutcome),
    Reconfigured {
        limits: EngineConfig,
        result: Result<(), ChangeError>,
    },
}

impl Owner {
    pub(super) fn spawn(&self, work: impl Future<Output = Event> + Send + 'static) {
        let messages = self.messages.clone();
        tokio::spawn(async move {
            let event = work.await;
            let _ = messages.send(Message::Event(event));
        });
    }

    pub(super) fn on_event(&mut self, event: Event) {
        // What comes and goes with requests is looked at there.
        let alone = matches!(
            event,
            Event::Measured(_)
                | Event::LensLoaded { .. }
                | Event::LensGone { .. }
                | Event::Prepared
                | Event::PreparedCounted(_)
                | Event::BaseFetched { .. }
                | Event::LensFetched { .. }
                | Event::BasePercent { .. }
                | Event::LensPercent { .. }
        );
        self.untidy |= !alone;
        self.look_ahead |= !alone;
        match event {
            Event::BaseResolved { key, token, result } => self.on_base_resolved(&key, token, result),
            Event::LensResolved { name, token, result } => self.on_lens_resolved(&name, token, result),
            Event::Measured(sizes) => {
                for (name, token, bytes) in sizes {
                    if self.lenses.get(&name).is_some_and(|lens| lens.token == token) {
                        self.lenses.update(&name, |lens| lens.file_bytes = bytes);
                    }
                }
            }
            Event::Rechecked { supplier, lenses } => {
                self.rechecking.retain(|other| *other != supplier);
                for name in lenses {
                    self.resolve_again(&name);
                }
            }
            Event::LensLoaded { key, result, since } => self.on_lens_loaded(&key, result, since),
            Event::LensGone { key, result } => match result {
                Ok(()) => self.lens_gone(&key),
                Err(failure) => {
                    tracing::error!(digest = key.digest, error = %failure, "failed to free a lens");
                    if let Some(held) = self.table.lenses.get_mut(&key) {
                        held.phase = Phase::Resident;
                    }
                    self.untidy = true;
                }
            },
            Event::BaseLoaded { key, result } => self.on_base_loaded(&key, result),
            Event::BaseGone { key, outcome, failure } => {
                if let Some(failure) = failure {
                    tracing::error!(base = %key, error = %failure, "failed to free a base");
                    if let Some(held) = self.table.bases.get_mut(&key) {
                        held.phase = Phase::Resident;
                    }
                    for (lens, held) in &mut self.table.lenses {
                        if lens.base == key {
                            held.phase = Phase::Resident;
                        }
                    }
                }
                self.remove(&outcome);
            }
            Event::BaseFetched { key, token, fetch } => {
                if let Some(base) = self.bases.get_mut(&key).filter(|base| base.token == token) {
                    base.fetch = Some(fetch);
                }
            }
            Event::LensFetched { name, token, fetch } => {
                if self.lenses.get(&name).is_some_and(|lens| lens.token == token && lens.in_flight) {
                    self.lenses.update(&name, |lens| lens.fetch = Some(fetch));
                }
            }
            Event::BasePercent { key, percent } => {
                if let Some(base) = self.bases.get_mut(&key) {
                    base.percent = percent;
                }
            }
            Event::LensPercent { key, percent } => {
                if let Some(held) = self.table.lenses.get_mut(&key) {
                    held.percent = percent;
                    self.lenses.mark_key(&key);
                }
            }
            Event::Prepared => match self.counting_prepared {
                Counting::Idle => self.count_prepared(),
                Counting::Running | Counting::Outdated => self.counting_prepared = Counting::Outdated,
            },
            Event::PreparedCounted(bytes) => {
                self.published.disk.prepared_bytes = bytes;
                match self.counting_prepared {
                    Counting::Outdated => self.count_prepared(),
                    Counting::Idle | Counting::Running => self.counting_prepared = Counting::Idle,
                }
            }
            Event::Switched(outcome) => self.on_switched(outcome),
            Event::Reconfigured { limits, result } => self.on_reconfigured(limits, result),
        }
    }

    pub(super) fn load_lens(&mut self, key: LensKey, lens: ResolvedLens) {
        let Some(base) = self.base_ids.get(&key.base).copied() else { return };
        let Some(over) = self.bases.get(&key.base).and_then(|b| b.stage.ready()).cloned() else { return };
        let Some(entry) = self.entry(&key) else { return };
        let held = HeldLens {
            bytes: lens.bytes,
            phase: Phase::Loading,
            percent: 0,
            users: 0,
            kept: false,
            entry,
            group: 0,
            id: None,
        };
        self.table.lenses.insert(key.clone(), held);
        self.follow_names_of(&key);
        self.lenses.mark_key(&key);
        let loader = self.loader.clone();
        let since = Instant::now();
        let loading = key.clone();
        let on_percent = self.on_percent(move |percent| Event::LensPercent { key: loading.clone(), percent });
        self.spawn(async move {
            let result = loader.load_lens((base, over), lens, on_percent).await;
            Event::LensLoaded { key, result, since }
        });
    }

    fn on_lens_loaded(&mut self, key: &LensKey, result: Result<LensId, LoadError>, since: Instant) {
        self.lenses.mark_key(key);
        let names: Vec<LensName> = self.lenses.names(key).cloned().collect();
        // It was taken out of the declaration on its way, or left too little room.
        self.untidy |= names.is_empty() || self.wanted_limits.is_some();
        self.look_ahead = true;
        match result {
            Ok(id) => {
                let now = Instant::now();
                let seconds = self.seconds(now);
                let ms = (now - since).as_millis() as u64;
                if let Some(held) = self.table.lenses.get_mut(key) {
                    (held.phase, held.id) = (Phase::Resident, Some(id));
                    self.history.loaded(held.entry, seconds);
                    self.history.set_load_seconds(held.entry, (now - since).as_secs_f64());
                }
                for name in &names {
                    self.lenses.update(name, |lens| {
                        lens.failures = 0;
                        lens.counts.loads += 1;
                        lens.counts.load_millis = Some(ms);
                    });
                }
                tracing::info!(lens = ?names.first(), digest = key.digest, ms, "lens loaded");
                if self.last_loads.len() > 4096 {
                    self.last_loads.clear();
                }
                self.last_loads.insert(key.clone(), (since, now));
            }
            Err(error) => {
                if let Some(held) = self.table.lenses.remove(key) {
                    self.history.failed(held.entry, self.seconds(Instant::now()));
                }
                self.resolve_at = Some(Instant::now());
                let failure = match &error {
                    LoadError::Changed => None,
                    LoadError::Failed(failure) | LoadError::NoRoom(failure) => Some(failure),
                };
                for name in &names {
                    if let Some(failure) = failure {
                        tracing::warn!(group = name.0, lens = name.1, reason = %failure.reason, error = failure.message, "lens failed to load");
                    }
                    self.next_token += 1;
                    let token = self.next_token;
                    self.lenses.update(name, |declared| {
                        (declared.token, declared.in_flight) = (token, false);
                        declared.failures += u32::from(failure.is_some());
                        declared.stage = failure.map_or(Stage::Resolving, |failure| {
                            Self::failed(failure.clone(), declared.failures)
                        });
                    });
                }
            }
        }
    }

    pub(super) fn evict_lenses(&mut self, leaving: Vec<Leaving>, why: &str) {
        for leaving in leaving {
            self.evict_lens(leaving, why);
        }
    }

    pub(super) fn evict_lens(&mut self, leaving: Leaving, why: &str) {
        let Leaving { key, reason, message } = leaving;
        let Some(held) = self.table.lenses.get_mut(&key) else { return };
        let Some(id) = held.id else { return };
        held.phase = Phase::Leaving;
        tracing::info!(digest = key.digest, bytes = held.bytes, %reason, message, why, "lens evicted");
        self.note_eviction(&key, reason, message);
        let loader = self.loader.clone();
        self.spawn(async move {
            let result = loader.remove_lens(id).await;
            Event::LensGone { key, result }
        });
    }

    pub(super) fn note_eviction(&mut self, key: &LensKey, reason: EvictionReason, message: String) {
        *self.evictions.entry(reason).or_default() += 1;
        let at = epoch_seconds();
        let names: Vec<LensName> = self.lenses.names(key).cloned().collect();
        for name in names {
            let eviction = Eviction { reason, message: message.clone(), at };
            self.lenses.count(&name, |counts| counts.last_eviction = Some(eviction));
        }
    }

    /// Counts what the prepared files take: when the worker starts, and whenever there is one more.
    pub(super) fn count_prepared(&mut self) {
        self.counting_prepared = Counting::Running;
        let cache = self.start.resolver.fetcher.cache().clone();
        self.spawn(async move {
            let counted = tokio::task::spawn_blocking(move || cache.prepared_bytes()).await;
            Event::PreparedCounted(counted.unwrap_or(0))
        });
    }

    /// Has a job report how far its downloads are, every few MiB.
    pub(super) fn on_fetch(&self, event: impl Fn(FetchReport) -> Event + Send + Sync + 'static) -> OnFetch {
        let (messages, told) = (self.messages.clone(), Told::every(FETCH_STEP));
        Arc::new(move |fetched_bytes, known_bytes| {
            // The end is news, however near it was.
            if told.is_news(fetched_bytes) || known_bytes == Some(fetched_bytes) {
                let fetch = FetchReport { fetched_bytes, known_bytes };
                let _ = messages.send(Message::Event(event(fetch)));
            }
        })
    }

    /// Has a job report how far it is, every few percent.
    pub(super) fn on_percent(&self, event: impl Fn(u8) -> Event + Send + Sync + 'static) -> OnPercent {
        let (messages, told) = (self.messages.clone(), Told::every(PERCENT_STEP));
        Arc::new(move |percent| {
            if told.is_news(u64::from(percent)) {
                let _ = messages.send(Message::Event(event(percent)));
            }
        })
    }

    pub(super) fn lens_gone(&mut self, key: &LensKey) {
        self.table.lenses.remove(key);
        self.lenses.mark_key(key);
        self.look_ahead = true;
    }
}

/// How far a job said that it is. Not every step on the way is news to anybody.
#[derive(Debug)]
struct Told {
    step: u64,
    last: AtomicU64,
}

impl Told {
    fn every(step: u64) -> Self {
        Self { step, last: AtomicU64::new(0) }
    }

    /// Whether this is to be told. What is a step less than before is an attempt that began anew.
    fn is_news(&self, now: u64) -> bool {
        let is_news = now.abs_diff(self.last.load(Relaxed)) >= self.step;
        if is_news {
            self.last.store(now, Relaxed);
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_few_steps_are_told_and_an_attempt_that_began_anew() {
        let told = Told::every(5);
        let news: Vec<u64> =
            [0, 4, 5, 6, 9, 11, 100, 0, 3, 5].into_iter().filter(|&now| told.is_news(now)).collect();
        assert_eq!(news, [5, 11, 100, 0, 5]);
    }
}
