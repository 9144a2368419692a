//! What runs beside the owner, and what it hears of it: resolutions, loads, removals, switches.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::Instant;
use turret_crds::document::BaseKey;
use turret_crds::report::{AppliedDocument, Eviction, EvictionReason, FetchReport};

use super::Message;
use super::declared::LensName;
use super::failure::Failure;
use super::fetch::OnFetch;
use super::loader::{LoadError, LoadFailure, OnPercent, SwitchOrder, SwitchOutcome, Victim};
use super::orders::epoch_seconds;
use super::owner::{Owner, RECHECK, Span, Stage, Turn, base_too_large, lens_too_large};
use super::plan::Leaving;
use super::resolve::{ResolvedBase, ResolvedLens};
use super::source::Listed;
use super::table::{Held, HeldLens, LensKey, Phase};
use crate::engine::handle::{BaseId, ChangeError, EngineConfig, LensId};

/// Sources that are checked at a time.
const RESOLVE_AT_ONCE: usize = 3;
/// Bytes of a download between two reports of how far it is.
const FETCH_STEP: u64 = 4 << 20;
/// Budgets that fit once rows have ended are tried again this often.
const FIT_RETRY: Duration = Duration::from_secs(1);
/// Budgets that do not fit are looked at again this often: a base may have failed meanwhile.
const UNFIT_RECHECK: Duration = Duration::from_secs(10);

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
    fn spawn(&self, work: impl Future<Output = Event> + Send + 'static) {
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
            Event::Rechecked { lenses } => {
                self.rechecking = false;
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
            Event::Prepared if self.counting_prepared => self.count_prepared_again = true,
            Event::Prepared => self.count_prepared(),
            Event::PreparedCounted(bytes) => {
                self.published.disk.prepared_bytes = bytes;
                self.counting_prepared = false;
                if std::mem::take(&mut self.count_prepared_again) {
                    self.count_prepared();
                }
            }
            Event::Switched(outcome) => self.on_switched(outcome),
            Event::Reconfigured { limits, result } => self.on_reconfigured(limits, result),
        }
    }

    /// Starts what can be resolved now: bases first, the default group's before all, then small lenses.
    pub(super) fn start_resolutions(&mut self, now: Instant) {
        if self.resolve_at.is_none_or(|at| now < at) {
            return;
        }
        let Some(document) = self.document.clone() else { return };
        // The end of a resolution, or a new document, is a reason to look again; otherwise only time is.
        self.resolve_at = None;
        let listed = Arc::new(Listed::of(&document));
        let default = document.default_group().map(|g| g.base.key.clone());
        let due = |in_flight: bool, resolving: bool, retry_at: Option<Instant>| {
            !in_flight && (resolving || retry_at.is_some_and(|at| at <= now))
        };
        let mut bases: Vec<BaseKey> = self
            .bases
            .iter()
            .filter(|(_, b)| due(b.in_flight, matches!(b.stage, Stage::Resolving), b.stage.retry_at()))
            .map(|(key, _)| key.clone())
            .collect();
        bases.sort_by_key(|key| (Some(key) != default.as_ref(), key.clone()));
        for key in bases {
            if self.resolving >= RESOLVE_AT_ONCE {
                return;
            }
            self.resolving += 1;
            let declared = self.bases.get_mut(&key).expect("it was just listed");
            declared.in_flight = true;
            let (base, token, resolver, listed) =
                (declared.base.clone(), declared.token, self.start.resolver.clone(), listed.clone());
            let at = key.clone();
            let on_fetch = self.on_fetch(move |fetch| Event::BaseFetched { key: at.clone(), token, fetch });
            self.spawn(async move {
                Event::BaseResolved { key, token, result: resolver.base(base, listed, on_fetch).await }
            });
        }
        let mut lenses: Vec<(u64, LensName)> = self
            .lenses
            .iter()
            .filter(|(_, l)| due(l.in_flight, matches!(l.stage, Stage::Resolving), l.stage.retry_at()))
            .filter(|(_, l)| self.bases.get(&l.base).is_some_and(|b| b.stage.ready().is_some()))
            .map(|(name, l)| (l.file_bytes, name.clone()))
            .collect();
        lenses.sort();
        for (_, name) in lenses {
            if self.resolving >= RESOLVE_AT_ONCE {
                return;
            }
            self.resolve_lens(name, listed.clone());
        }
        let bases = self.bases.values().filter(|b| !b.in_flight).filter_map(|b| b.stage.retry_at());
        let lenses = self.lenses.iter().map(|(_, l)| l).filter(|l| !l.in_flight);
        let lenses = lenses.filter_map(|l| l.stage.retry_at());
        // What is due waits for its base, whose end is a reason too.
        self.resolve_at = bases.chain(lenses).filter(|at| *at > now).min();
    }

    fn resolve_lens(&mut self, name: LensName, listed: Arc<Listed>) {
        let Some(declared) = self.lenses.get(&name) else { return };
        let Some(base) = self.bases.get(&declared.base).and_then(|b| b.stage.ready()).cloned() else {
            return;
        };
        let (lens, token, resolver) = (declared.lens.clone(), declared.token, self.start.resolver.clone());
        self.resolving += 1;
        self.lenses.update(&name, |declared| declared.in_flight = true);
        let at = name.clone();
        let on_fetch = self.on_fetch(move |fetch| Event::LensFetched { name: at.clone(), token, fetch });
        self.spawn(async move {
            let result = resolver.lens(lens, listed, base, on_fetch).await;
            Event::LensResolved { name, token, result }
        });
    }

    /// Checks a lens again that was found good, while it goes on being served.
    fn resolve_again(&mut self, name: &LensName) {
        let Some(document) = &self.document else { return };
        let listed = Arc::new(Listed::of(document));
        if self.lenses.get(name).is_some_and(|l| !l.in_flight && l.stage.ready().is_some()) {
            self.resolve_lens(name.clone(), listed);
        }
    }

    /// Looks how large the files of unresolved lenses are, where that is cheap.
    pub(super) fn measure_lenses(&self) {
        let Some(document) = &self.document else { return };
        let volumes = document.source_volumes.clone();
        let roots = self.start.resolver.roots.clone();
        let wanted: Vec<_> = self
            .lenses
            .iter()
            .filter(|(_, l)| matches!(l.stage, Stage::Resolving))
            .map(|(name, l)| (name.clone(), l.token, l.lens.source.clone()))
            .collect();
        self.spawn(async move {
            let measure = move || {
                let size = |source: &turret_crds::source::Source| match roots.locate(source, &volumes) {
                    Ok(super::source::Place::Folder(folder)) => crate::lens::lora::lora_files(&folder.path)
                        .iter()
                        .filter_map(|f| std::fs::metadata(folder.path.join(f)).ok())
                        .map(|m| m.len())
                        .sum(),
                    // What must be fetched comes after what is there.
                    _ => u64::MAX,
                };
                wanted
                    .iter()
                    .map(|(name, token, source)| (name.clone(), *token, size(source)))
                    .collect::<Vec<_>>()
            };
            Event::Measured(tokio::task::spawn_blocking(measure).await.unwrap_or_default())
        });
    }

    /// Every now and then looks whether files that were found good are still the same.
    pub(super) fn recheck(&mut self, now: Instant) {
        if self.rechecking || now < self.recheck_at {
            return;
        }
        self.rechecking = true;
        self.recheck_at = now + RECHECK;
        let checked: Vec<_> = self
            .lenses
            .iter()
            .filter_map(|(name, l)| Some((name.clone(), l.stage.ready()?.files.clone())))
            .collect();
        self.spawn(async move {
            let changed = move || {
                checked.into_iter().filter(|(_, f)| !f.are_unchanged()).map(|(name, _)| name).collect()
            };
            Event::Rechecked { lenses: tokio::task::spawn_blocking(changed).await.unwrap_or_default() }
        });
    }

    fn on_base_resolved(&mut self, key: &BaseKey, token: u64, result: Result<ResolvedBase, Failure>) {
        self.resolving -= 1;
        self.resolve_at = Some(Instant::now());
        let limits = self.coming_limits().clone();
        let Some(declared) = self.bases.get_mut(key).filter(|b| b.token == token) else { return };
        (declared.in_flight, declared.fetch) = (false, None);
        let result = result.and_then(|base| base_too_large(&base.layout, &limits).map_or(Ok(base), Err));
        declared.stage = match result {
            Ok(base) => {
                tracing::info!(
                    base = %key,
                    digest = base.files.digest,
                    bytes = base.layout.bytes,
                    architecture = ?base.config.architecture,
                    "base resolved"
                );
                Stage::Ready(Arc::new(base))
            }
            Err(failure) => {
                declared.failures += 1;
                tracing::warn!(base = %key, reason = %failure.reason, error = failure.message, "base failed");
                Self::failed(failure, declared.failures)
            }
        };
        self.retain_folders();
    }

    fn on_lens_resolved(&mut self, name: &LensName, token: u64, result: Result<ResolvedLens, Failure>) {
        self.resolving -= 1;
        self.resolve_at = Some(Instant::now());
        let lens_budget = self.coming_limits().lens_bytes;
        let Some(declared) = self.lenses.get(name).filter(|l| l.token == token) else { return };
        let result = result.and_then(|lens| lens_too_large(lens.bytes, lens_budget).map_or(Ok(lens), Err));
        let known = declared.stage.ready().map(|r| r.files.digest.clone());
        let resident = declared.key().is_some_and(|key| self.table.has_lens(&key));
        let (group, lens) = name;
        match &result {
            Ok(resolved) if known.as_ref() == Some(&resolved.files.digest) => {}
            Ok(resolved) => {
                let digest = &resolved.files.digest;
                tracing::info!(group, lens, digest, bytes = resolved.bytes, "lens resolved");
            }
            // What is in memory was good when it came; the files are missed when they are needed again.
            Err(failure) if resident => {
                tracing::warn!(group, lens, reason = %failure.reason, error = failure.message, "the source of a loaded lens is no longer good");
            }
            Err(failure) => {
                tracing::warn!(group, lens, reason = %failure.reason, error = failure.message, "lens failed");
            }
        }
        self.lenses.update(name, |declared| {
            (declared.in_flight, declared.fetch) = (false, None);
            match result {
                Ok(resolved) => {
                    declared.failures = 0;
                    declared.stage = Stage::Ready(resolved);
                }
                Err(_) if resident => {}
                Err(failure) => {
                    declared.failures += 1;
                    declared.stage = Self::failed(failure, declared.failures);
                }
            }
        });
        // It may be other files now, which are in memory under another name already.
        self.follow_names();
        self.retain_folders();
    }

    /// Lets the disk tier forget folders that nothing declared refers to.
    pub(super) fn retain_folders(&mut self) {
        self.measure_disk();
        if self.resolving > 0 {
            return;
        }
        let bases = self.bases.values().filter_map(|b| Some(b.stage.ready()?.files.folder.clone()));
        let lenses = self.lenses.iter().filter_map(|(_, l)| Some(l.stage.ready()?.files.folder.clone()));
        let folders: BTreeSet<PathBuf> = bases.chain(lenses).collect();
        self.start.resolver.fetcher.cache().retain(&folders);
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
            kept: self.is_kept(&key),
            entry,
            group: self.group_index(&key),
            id: None,
        };
        self.table.lenses.insert(key.clone(), held);
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

    fn note_eviction(&mut self, key: &LensKey, reason: EvictionReason, message: String) {
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
        self.counting_prepared = true;
        let cache = self.start.resolver.fetcher.cache().clone();
        self.spawn(async move {
            let counted = tokio::task::spawn_blocking(move || cache.prepared_bytes()).await;
            Event::PreparedCounted(counted.unwrap_or(0))
        });
    }

    /// Has a job report how far its downloads are, every few MiB.
    fn on_fetch(&self, event: impl Fn(FetchReport) -> Event + Send + Sync + 'static) -> OnFetch {
        let messages = self.messages.clone();
        let told = std::sync::atomic::AtomicU64::new(0);
        Arc::new(move |fetched_bytes, known_bytes| {
            let last = told.load(Relaxed);
            // Less than before is an attempt that began anew.
            if fetched_bytes < last
                || fetched_bytes - last >= FETCH_STEP
                || known_bytes == Some(fetched_bytes)
            {
                told.store(fetched_bytes, Relaxed);
                let fetch = FetchReport { fetched_bytes, known_bytes };
                let _ = messages.send(Message::Event(event(fetch)));
            }
        })
    }

    /// Has a job report how far it is, every few percent.
    fn on_percent(&self, event: impl Fn(u8) -> Event + Send + Sync + 'static) -> OnPercent {
        let messages = self.messages.clone();
        let last = std::sync::atomic::AtomicU8::new(0);
        Arc::new(move |percent| {
            if percent >= last.load(Relaxed).saturating_add(5) {
                last.store(percent, Relaxed);
                let _ = messages.send(Message::Event(event(percent)));
            }
        })
    }

    fn on_base_percent(&self, key: &BaseKey) -> OnPercent {
        let key = key.clone();
        self.on_percent(move |percent| Event::BasePercent { key: key.clone(), percent })
    }

    fn hold_base(&mut self, key: &BaseKey, bytes: u64) {
        self.uses += 1;
        let held = Held { bytes, phase: Phase::Loading, users: 0, last_used: self.uses };
        self.table.bases.insert(key.clone(), held);
        if let Some(base) = self.bases.get_mut(key) {
            base.percent = 0;
        }
    }

    /// Loads a base beside the active one, ahead of the switch.
    pub(super) fn preload_base(&mut self, key: BaseKey, base: Arc<ResolvedBase>) {
        tracing::info!(base = %key, bytes = base.layout.bytes, "loading a base beside the active one");
        self.hold_base(&key, base.layout.bytes);
        let loader = self.loader.clone();
        let on_percent = self.on_base_percent(&key);
        self.spawn(async move {
            let result = loader.load_base(base, on_percent).await;
            Event::BaseLoaded { key, result }
        });
    }

    fn on_base_loaded(&mut self, key: &BaseKey, result: Result<BaseId, LoadError>) {
        match result {
            Ok(id) => {
                self.base_ids.insert(key.clone(), id);
                if let Some(held) = self.table.bases.get_mut(key) {
                    held.phase = Phase::Resident;
                }
            }
            Err(LoadError::NoRoom(short)) => {
                tracing::info!(base = %key, error = short.message, "no room beside the active base");
                self.table.bases.remove(key);
                self.not_beside.insert(key.clone());
            }
            Err(error) => {
                self.table.bases.remove(key);
                self.base_load_failed(key, error.into());
            }
        }
    }

    fn base_load_failed(&mut self, key: &BaseKey, error: LoadFailure) {
        let Some(base) = self.bases.get_mut(key) else { return };
        self.next_token += 1;
        self.resolve_at = Some(Instant::now());
        base.token = self.next_token;
        base.in_flight = false;
        base.stage = match error {
            LoadFailure::Changed => Stage::Resolving,
            LoadFailure::Failed(failure) => {
                base.failures += 1;
                tracing::warn!(base = %key, reason = %failure.reason, error = failure.message, "base failed to load");
                Self::failed(failure, base.failures)
            }
        };
    }

    fn victim(&self, key: &BaseKey) -> Option<Victim> {
        let id = *self.base_ids.get(key)?;
        let lenses = self
            .table
            .lenses_over(key)
            .filter_map(|lens| Some((lens.clone(), self.table.lenses.get(lens)?.id?)))
            .collect();
        let base = self.bases.get(key).and_then(|b| b.stage.ready()).cloned();
        Some(Victim { key: key.clone(), id, lenses, base })
    }

    /// Frees a parked base.
    pub(super) fn drop_base(&mut self, key: BaseKey, why: &str) {
        let Some(victim) = self.victim(&key) else { return };
        tracing::info!(base = %key, why, "base leaves");
        self.leaves(&key);
        let loader = self.loader.clone();
        self.spawn(async move {
            let (outcome, failure) = loader.remove_base(victim).await;
            Event::BaseGone { key, outcome, failure }
        });
    }

    fn leaves(&mut self, key: &BaseKey) {
        if let Some(held) = self.table.bases.get_mut(key) {
            held.phase = Phase::Leaving;
        }
        for (lens, held) in &mut self.table.lenses {
            if lens.base == *key {
                held.phase = Phase::Leaving;
                self.lenses.mark_key(lens);
            }
        }
    }

    /// Starts the switch to a base. Nothing runs, and no lens is on its way.
    pub(super) fn switch_to(&mut self, to: BaseKey, base: Arc<ResolvedBase>, free_first: &[BaseKey]) {
        let active = self.table.active.clone();
        let mut parked: Vec<(u64, BaseKey)> = self
            .table
            .bases
            .iter()
            .filter(|(k, h)| **k != to && Some(*k) != active.as_ref() && h.phase == Phase::Resident)
            .filter(|(k, _)| !free_first.contains(k))
            .map(|(k, h)| (h.last_used, k.clone()))
            .collect();
        parked.sort();
        let order = SwitchOrder {
            resident: self.base_ids.get(&to).copied().filter(|_| self.table.has_base(&to)),
            from: active.as_ref().and_then(|k| self.victim(k)),
            free_first: free_first.iter().filter_map(|k| self.victim(k)).collect(),
            parked: parked.iter().filter_map(|(_, k)| self.victim(k)).collect(),
            base: base.clone(),
            to: to.clone(),
        };
        tracing::info!(to = %to, from = ?active.as_ref().map(ToString::to_string), parked = order.resident.is_some(), "switching base");
        if order.resident.is_none() {
            self.hold_base(&to, base.layout.bytes);
        }
        self.turn = Turn::Switching { to: to.clone(), since: Instant::now() };
        let loader = self.loader.clone();
        let on_percent = self.on_base_percent(&to);
        self.spawn(async move { Event::Switched(loader.switch(order, on_percent).await) });
    }

    fn lens_gone(&mut self, key: &LensKey) {
        self.table.lenses.remove(key);
        self.lenses.mark_key(key);
        self.look_ahead = true;
    }

    /// Takes what left out of the table.
    fn remove(&mut self, outcome: &SwitchOutcome) {
        for key in &outcome.removed_lenses {
            self.note_eviction(key, EvictionReason::Base, "its base left the device".into());
            self.lens_gone(key);
        }
        for key in &outcome.removed_bases {
            self.table.bases.remove(key);
            self.base_ids.remove(key);
        }
    }

    fn on_switched(&mut self, outcome: SwitchOutcome) {
        let Turn::Switching { to, since } = std::mem::replace(&mut self.turn, Turn::Steady) else { return };
        self.remove(&outcome);
        for (key, id) in &outcome.installed {
            self.base_ids.insert(key.clone(), *id);
            if let Some(held) = self.table.bases.get_mut(key) {
                held.phase = Phase::Resident;
            } else if let Some(base) = self.bases.get(key).and_then(|b| b.stage.ready()).cloned() {
                self.hold_base(key, base.layout.bytes);
                self.table.bases.get_mut(key).expect("just held").phase = Phase::Resident;
            }
        }
        // What was on its way and did not come.
        self.table.bases.retain(|_, held| held.phase != Phase::Loading);
        let before = std::mem::replace(&mut self.table.active, outcome.active);
        let now = Instant::now();
        self.active_since = now;
        self.not_beside.clear();
        match outcome.error {
            None => {
                let ms = (now - since).as_millis() as u64;
                tracing::info!(base = %to, ms, loaded = outcome.loaded, "base is active");
                self.switches += u64::from(before.is_some());
                if before.is_some() {
                    self.last_switch = Some((to.clone(), (since, now) as Span));
                }
                self.has_served = true;
                if let Some(base) = self.bases.get_mut(&to) {
                    base.failures = 0;
                }
            }
            Some(failure) => self.base_load_failed(&to, failure),
        }
    }

    /// Puts the document's limits in force once what is resident fits them.
    pub(super) fn reconfigure(&mut self, now: Instant) {
        let Some(document) = &self.document else { return };
        match &self.wanted_limits {
            None => {
                let applied =
                    AppliedDocument { sequence: document.sequence, digest: document.digest.clone() };
                if self.applied.as_ref() != Some(&applied) {
                    tracing::info!(sequence = applied.sequence, digest = applied.digest, "document applied");
                    // Nothing declared is nothing to wait for.
                    self.has_served |= document.groups.is_empty();
                    self.applied = Some(applied);
                }
            }
            Some(_) if self.reconfiguring.is_some() || matches!(self.turn, Turn::Switching { .. }) => {}
            Some(_) if self.is_shedding() || now < self.reconfigure_at => {}
            Some(wanted) => {
                if let Some(short) = self.unfit_budgets() {
                    self.cannot_fit = Some(short);
                    self.reconfigure_at = now + UNFIT_RECHECK;
                    return;
                }
                let lens_bytes = self.table.lens_bytes();
                if lens_bytes > wanted.lens_bytes {
                    let why =
                        "lenses that are in use take that much, spec.memory.lensBudget is smaller".into();
                    self.cannot_fit = Some(self.cannot_fit(lens_bytes, wanted.lens_bytes, true, why));
                    self.reconfigure_at = now + FIT_RETRY;
                    return;
                }
                let (engine, limits) = (self.engine.clone(), wanted.clone());
                self.reconfiguring = Some(limits.clone());
                self.spawn(async move {
                    let result = engine.reconfigure(limits.clone()).await;
                    Event::Reconfigured { limits, result }
                });
            }
        }
    }

    /// Whether something leaves, or is about to, so that smaller budgets can be met.
    fn is_shedding(&self) -> bool {
        self.table.phases().any(|phase| phase == Phase::Leaving) || !self.shed().is_empty()
    }

    fn on_reconfigured(&mut self, limits: EngineConfig, result: Result<(), ChangeError>) {
        self.reconfiguring = None;
        match result {
            Ok(()) => {
                // A newer document may have come meanwhile; then its limits are still wanted.
                if self.wanted_limits.take_if(|wanted| *wanted == limits).is_some() {
                    self.cannot_fit = None;
                }
                self.limits = limits;
            }
            Err(ChangeError::CannotFit(_)) if self.wanted_limits.as_ref() != Some(&limits) => {}
            Err(ChangeError::CannotFit(short)) => {
                let now = Instant::now();
                // What is resident was shed before: without rows, nothing else can make room.
                let once_idle = !self.permits.is_empty();
                tracing::warn!(error = %short, once_idle, "the document's budgets do not fit");
                let needed = limits.device_bytes.saturating_add(short.short_by_bytes);
                self.cannot_fit = Some(self.cannot_fit(needed, limits.device_bytes, once_idle, short.why));
                self.reconfigure_at = now + if once_idle { FIT_RETRY } else { UNFIT_RECHECK };
            }
            Err(error) => {
                tracing::warn!(error = %error, "failed to put the document's budgets in force, trying again");
                self.reconfigure_at = Instant::now() + FIT_RETRY;
            }
        }
    }
}
