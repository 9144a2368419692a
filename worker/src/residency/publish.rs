//! The owner's state as others see it: the report of the contract, and what requests need.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use turret_crds::alias::GroupAliases;
use turret_crds::document::PROTOCOL;
use turret_crds::report::{
    ArtifactState, BaseReport, LeaseReport, LensReport, SwitchPhase, SwitchReport, Tier, TierReport,
    WorkerReport, WorkerState,
};

use super::declared::{Changed, DeclaredLens, LensName, RecentMean};
use super::owner::{DeclaredBase, Owner, Stage, Turn, Waiter};
use super::resolve::CheckedFiles;
use super::table::Phase;
use super::warmup::Warmup;
use super::{SpokenLens, Start, View};

/// The view before there is any document.
pub(super) fn nothing(start: &Start, created: u64) -> View {
    let report = WorkerReport {
        protocol: PROTOCOL,
        worker: start.worker.clone(),
        state: WorkerState::default(),
        bases: Vec::new(),
        lenses: Vec::new(),
        aliases: Arc::default(),
    };
    View {
        report,
        document: None,
        bases: BTreeMap::new(),
        lenses: Arc::default(),
        leases: Arc::default(),
        evictions: BTreeMap::new(),
        max_context_tokens: start.limits.max_context_tokens,
        created,
    }
}

/// How often numbers that merely count are published. Whoever routes by them looks far less often, and a report is as long as
/// the list of lenses.
const COUNTS_EVERY: Duration = Duration::from_millis(10);

/// Whether what others see has changed since it was published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum News {
    None,
    /// A request came or went.
    Soon,
    /// Anything else.
    Now,
}

/// What was published of lenses last: the next view shares what stayed the same.
#[derive(Debug, Default)]
pub(super) struct Published {
    reports: Vec<Arc<LensReport>>,
    spoken: Arc<BTreeMap<LensName, SpokenLens>>,
    pub(super) leases: Arc<Vec<LeaseReport>>,
    /// What the aliases of the newest document lead to.
    pub(super) aliases: Arc<GroupAliases>,
    pub(super) disk: TierUse,
    at: Option<Instant>,
}

/// Bytes of files in the disk tier.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct TierUse {
    base_bytes: u64,
    lens_bytes: u64,
    pub(super) prepared_bytes: u64,
}

impl Owner {
    /// Publishes what changed, or tells when it will be. Whoever waits for the worker to be idle reads a view that says so.
    pub(super) fn publish_in_time(&mut self, now: Instant) -> Option<Instant> {
        let is_awaited = self.is_idle() && !self.idlers.is_empty();
        let due = self.published.at.map(|at| at + COUNTS_EVERY).filter(|due| *due > now);
        match (self.news, due) {
            (News::Soon, Some(due)) if !is_awaited => return Some(due),
            (News::None, _) => {}
            (News::Soon | News::Now, _) => {
                self.publish();
                (self.news, self.published.at) = (News::None, Some(now));
            }
        }
        if self.is_idle() {
            for idler in self.idlers.drain(..) {
                let _ = idler.send(());
            }
        }
        None
    }

    /// Publishes what changed, if anything did.
    pub(super) fn publish(&mut self) {
        self.count_waiting();
        self.follow_lenses();
        let report = WorkerReport {
            protocol: PROTOCOL,
            worker: self.start.worker.clone(),
            state: self.state(),
            bases: self.bases.iter().map(|(key, base)| self.base_report(key, base)).collect(),
            lenses: self.published.reports.clone(),
            aliases: self.published.aliases.clone(),
        };
        let bases = self
            .bases
            .iter()
            .filter_map(|(key, base)| Some((key.clone(), base.stage.ready()?.clone())))
            .collect();
        let limits = self.coming_limits();
        let view = View {
            report,
            document: self.document.clone(),
            bases,
            lenses: self.published.spoken.clone(),
            leases: self.published.leases.clone(),
            evictions: self.evictions.clone(),
            max_context_tokens: limits.max_context_tokens,
            created: self.created,
        };
        self.view.send_if_modified(|current| {
            let same_documents = match (&current.document, &view.document) {
                (Some(a), Some(b)) => Arc::ptr_eq(a, b),
                (None, None) => true,
                _ => false,
            };
            let same_bases = current.bases.len() == view.bases.len()
                && current.bases.iter().zip(&view.bases).all(|(a, b)| a.0 == b.0 && Arc::ptr_eq(a.1, b.1));
            let same_leases = Arc::ptr_eq(&current.leases, &view.leases);
            if same_documents && same_bases && same_leases && current.report == view.report {
                return false;
            }
            *current = Arc::new(view);
            true
        });
    }

    /// Adds up which files of what is declared are in the disk tier; when that may have changed.
    pub(super) fn measure_disk(&mut self) {
        let cache = self.start.resolver.fetcher.cache();
        let bytes = |files: &CheckedFiles| if cache.holds(&files.folder) { files.bytes } else { 0 };
        self.published.disk = TierUse {
            prepared_bytes: self.published.disk.prepared_bytes,
            base_bytes: self.bases.values().filter_map(|b| Some(bytes(&b.stage.ready()?.files))).sum(),
            lens_bytes: self.lenses.iter().filter_map(|(_, l)| Some(bytes(l.files_here()?))).sum(),
        };
    }

    /// Counts who waits for which lens.
    fn count_waiting(&mut self) {
        let mut waiting: BTreeMap<LensName, u32> = BTreeMap::new();
        for model in self.waiters.values().map(|waiter| &waiter.model) {
            if let Some(lens) = &model.lens {
                *waiting.entry((model.group.clone(), lens.clone())).or_default() += 1;
            }
        }
        self.lenses.count_waiting(waiting);
    }

    /// Makes the reports of those lenses anew of which something changed.
    fn follow_lenses(&mut self) {
        let changed = self.lenses.take_changed();
        let leased = match &changed {
            Changed::All => true,
            Changed::These(names) => names.iter().any(|name| self.leases.on(name) > 0),
        };
        if std::mem::take(&mut self.leases_changed) || leased {
            self.published.leases = Arc::new(self.lease_reports());
        }
        if changed == Changed::default() {
            return;
        }
        let mut published = std::mem::take(&mut self.published);
        match changed {
            Changed::All => {
                published.reports =
                    self.lenses.iter().map(|(name, lens)| self.lens_report(name, lens).into()).collect();
                let spoken =
                    self.lenses.iter().filter_map(|(name, lens)| Some((name.clone(), spoken(lens)?)));
                published.spoken = Arc::new(spoken.collect());
            }
            Changed::These(names) => {
                for name in names {
                    let Some(lens) = self.lenses.get(&name) else { continue };
                    let at =
                        published.reports.binary_search_by(|r| (&r.group, &r.name).cmp(&(&name.0, &name.1)));
                    // Names that come or go are `All`.
                    let Ok(at) = at else { continue };
                    published.reports[at] = self.lens_report(&name, lens).into();
                    let digest = lens.stage.ready().map(|ready| ready.files.digest());
                    if published.spoken.get(&name).map(|spoken| spoken.digest.as_str()) != digest {
                        let all = Arc::make_mut(&mut published.spoken);
                        match spoken(lens) {
                            Some(spoken) => all.insert(name, spoken),
                            None => all.remove(&name),
                        };
                    }
                }
            }
        }
        self.published = published;
    }

    fn state(&self) -> WorkerState {
        let draining = self.leaving || self.drained;
        WorkerState {
            document: self.applied.clone(),
            ready: self.warmup == Warmup::Warm && !draining,
            draining,
            active_base: self.table.active.clone(),
            preferred_base: self.advice.base().cloned(),
            hints_version: Some(self.advice.version()),
            switch: self.switch_report(),
            tiers: self.tiers(),
            running_rows: self.permits.len() as u32,
            waiting_rows: self.waiters.len() as u32,
            switches: self.switches,
            evictions: self.evictions.values().sum(),
            cannot_fit: self.cannot_fit.clone(),
        }
    }

    fn switch_report(&self) -> Option<SwitchReport> {
        let (to, phase) = match &self.turn {
            Turn::Steady => return None,
            Turn::Draining { to, .. } => (to, SwitchPhase::Draining),
            Turn::Switching { to, .. } => (to, SwitchPhase::Loading),
        };
        let base = self.bases.get(to);
        let percent = match self.table.bases.get(to).map(|held| held.phase) {
            Some(Phase::Resident) => 100,
            _ => base.map_or(0, |base| base.percent),
        };
        Some(SwitchReport {
            from: self.table.active.clone(),
            to: to.clone(),
            phase,
            percent,
            waiting_requests: base.map_or(0, |base| self.waiting_over(base)),
        })
    }

    fn waiting_over(&self, base: &DeclaredBase) -> u32 {
        let waits = |waiter: &&Waiter| base.groups.contains(&waiter.model.group);
        self.waiters.values().filter(waits).count() as u32
    }

    fn tiers(&self) -> Vec<TierReport> {
        let cache = self.start.resolver.fetcher.cache();
        let TierUse { base_bytes, lens_bytes, prepared_bytes } = self.published.disk;
        let engine = self.engine.snapshot();
        vec![
            TierReport {
                tier: Tier::Disk,
                base_bytes,
                lens_bytes,
                working_bytes: prepared_bytes,
                budget_bytes: cache.budget(),
                lens_budget_bytes: cache.budget(),
            },
            TierReport {
                tier: Tier::Device,
                base_bytes: self.table.base_bytes(),
                lens_bytes: self.table.lens_bytes(),
                working_bytes: engine.arena.kv_bytes + engine.workspace_bytes,
                budget_bytes: self.limits.device_bytes,
                lens_budget_bytes: self.limits.lens_bytes,
            },
        ]
    }

    fn base_report(&self, key: &turret_crds::document::BaseKey, base: &DeclaredBase) -> BaseReport {
        let resolved = base.stage.ready();
        let held = self.table.bases.get(key);
        let loading = held.is_some_and(|h| h.phase == Phase::Loading);
        BaseReport {
            key: key.clone(),
            groups: base.groups.clone(),
            state: state_of(&base.stage, loading.then_some(base.percent)),
            tier: tier(held.is_some_and(|h| h.phase == Phase::Resident), resolved.is_some()),
            digest: resolved.map(|r| r.files.digest.clone()),
            revision: resolved.and_then(|_| base.base.source.revision.clone()),
            bytes: resolved.map(|r| r.layout.bytes),
            fetch: base.fetch,
            max_context_tokens: resolved.map(|r| r.context_tokens(self.coming_limits().max_context_tokens)),
            running_rows: self.permits.values().filter(|permitted| permitted.base == *key).count() as u32,
            waiting_rows: self.waiting_over(base),
        }
    }

    fn lens_report(&self, name: &LensName, lens: &DeclaredLens) -> LensReport {
        let resolved = lens.stage.ready();
        let held = lens.key().filter(|_| !lens.is_claim()).and_then(|key| self.table.lenses.get(&key));
        let percent = held.filter(|h| h.phase == Phase::Loading).map(|h| h.percent);
        let state = state_of(&lens.stage, percent);
        // The same files may be here under another name.
        let is_here = lens.key().is_some_and(|key| self.has_files(&key));
        let tier = tier(held.is_some_and(|h| h.phase == Phase::Resident), is_here);
        LensReport {
            digest: resolved.map(|r| r.files.digest().to_owned()),
            revision: resolved.and_then(|_| lens.lens.source.revision.clone()),
            bytes: resolved.map(|r| r.bytes),
            fetch: lens.fetch,
            active_rows: lens.counts.active_rows,
            waiting_rows: lens.counts.waiting_rows,
            served: lens.counts.served,
            errors: lens.counts.errors,
            last_used: lens.counts.last_used,
            loads: lens.counts.loads,
            load_millis: lens.counts.load_millis,
            pinned: self.is_pinned(name, lens),
            assigned: self.advice.assigns(name),
            leases: u64::from(self.leases.on(name)),
            last_eviction: lens.counts.last_eviction.clone(),
            generated_tokens: lens.counts.generated_tokens,
            time_to_first_token_millis: millis(lens.counts.time_to_first_token),
            time_per_output_token_micros: micros(lens.counts.time_per_output_token),
            feedback: lens.counts.feedback,
            ..LensReport::new(&name.0, &name.1, state, tier)
        }
    }
}

fn millis(mean: RecentMean) -> Option<u64> {
    mean.get().map(|time| time.as_millis() as u64)
}

fn micros(mean: RecentMean) -> Option<u64> {
    mean.get().map(|time| time.as_micros() as u64)
}

/// What a request needs of a lens before it has a permit, once its files are found good.
fn spoken(lens: &DeclaredLens) -> Option<SpokenLens> {
    let ready = lens.stage.ready()?;
    Some(SpokenLens { digest: ready.files.digest().to_owned(), tokenizer: ready.tokenizer.clone() })
}

fn tier(resident: bool, here: bool) -> Tier {
    match (resident, here) {
        (true, _) => Tier::Device,
        (false, true) => Tier::Disk,
        (false, false) => Tier::Remote,
    }
}

fn state_of<T>(stage: &Stage<T>, loading: Option<u8>) -> ArtifactState {
    match (stage, loading) {
        (Stage::Failed { failure, retry_epoch, .. }, _) => ArtifactState::Failed {
            reason: failure.reason,
            message: failure.message.clone(),
            retry_at: *retry_epoch,
        },
        (Stage::Resolving, _) => ArtifactState::Resolving,
        (Stage::Ready(_), Some(percent)) => ArtifactState::Loading { percent },
        (Stage::Ready(_), None) => ArtifactState::Ready,
    }
}
