//! The owner's state as others see it: the report of the contract, and what requests need.

use std::collections::BTreeMap;
use std::sync::Arc;

use turret_crds::document::PROTOCOL;
use turret_crds::report::{
    ArtifactState, BaseReport, LensReport, Tier, TierReport, WorkerReport, WorkerState,
};

use super::owner::{DeclaredBase, DeclaredLens, Owner, Stage, Turn};
use super::table::Phase;
use super::{SpokenLens, Start, View};

/// The view before there is any document.
pub(super) fn nothing(start: &Start, created: u64) -> View {
    let report = WorkerReport {
        protocol: PROTOCOL,
        worker: start.worker.clone(),
        state: WorkerState::default(),
        bases: Vec::new(),
        lenses: Vec::new(),
    };
    View {
        report,
        document: None,
        bases: BTreeMap::new(),
        lenses: BTreeMap::new(),
        max_context_tokens: start.limits.max_context_tokens,
        created,
    }
}

impl Owner {
    /// Publishes what changed, if anything did.
    pub(super) fn publish(&mut self) {
        let report = WorkerReport {
            protocol: PROTOCOL,
            worker: self.start.worker.clone(),
            state: self.state(),
            bases: self.bases.iter().map(|(key, base)| self.base_report(key, base)).collect(),
            lenses: self.lenses.iter().map(|(name, lens)| self.lens_report(name, lens)).collect(),
        };
        let bases = self
            .bases
            .iter()
            .filter_map(|(key, base)| Some((key.clone(), base.stage.ready()?.clone())))
            .collect();
        let lenses = self
            .lenses
            .iter()
            .filter_map(|(name, lens)| {
                let ready = lens.stage.ready()?;
                let spoken =
                    SpokenLens { digest: ready.files.digest.clone(), tokenizer: ready.tokenizer.clone() };
                Some((name.clone(), spoken))
            })
            .collect();
        let limits = self.coming_limits();
        let view = View {
            report,
            document: self.document.clone(),
            bases,
            lenses,
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
            if same_documents && same_bases && current.report == view.report {
                return false;
            }
            *current = Arc::new(view);
            true
        });
    }

    fn state(&self) -> WorkerState {
        WorkerState {
            document: self.applied.clone(),
            ready: self.has_served && !self.draining,
            draining: self.draining,
            active_base: self.table.active.clone(),
            switching_to: match &self.turn {
                Turn::Steady => None,
                Turn::Draining { to, .. } | Turn::Switching { to, .. } => Some(to.clone()),
            },
            tiers: self.tiers(),
            running_rows: self.leases.len() as u32,
            waiting_rows: self.waiters.len() as u32,
            switches: self.switches,
            evictions: self.evictions,
            cannot_fit: self.cannot_fit.clone(),
        }
    }

    fn tiers(&self) -> Vec<TierReport> {
        let cache = self.start.resolver.fetcher.cache();
        let in_cache = |folder: &std::path::Path| cache.holds(folder);
        let bases = self.bases.values().filter_map(|b| b.stage.ready()).filter(|b| in_cache(&b.files.folder));
        let lenses =
            self.lenses.values().filter_map(|l| l.stage.ready()).filter(|l| in_cache(&l.files.folder));
        let engine = self.engine.snapshot();
        vec![
            TierReport {
                tier: Tier::Disk,
                base_bytes: bases.map(|b| b.files.bytes).sum(),
                lens_bytes: lenses.map(|l| l.files.bytes).sum(),
                working_bytes: 0,
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
            max_context_tokens: resolved.map(|r| r.context_tokens(self.coming_limits().max_context_tokens)),
        }
    }

    fn lens_report(&self, name: &(String, String), lens: &DeclaredLens) -> LensReport {
        let resolved = lens.stage.ready();
        let held = lens.key().and_then(|key| self.table.lenses.get(&key));
        let loading = held.is_some_and(|h| h.phase == Phase::Loading);
        LensReport {
            group: name.0.clone(),
            name: name.1.clone(),
            state: state_of(&lens.stage, loading.then_some(0)),
            tier: tier(held.is_some_and(|h| h.phase == Phase::Resident), resolved.is_some()),
            digest: resolved.map(|r| r.files.digest.clone()),
            revision: resolved.and_then(|_| lens.lens.source.revision.clone()),
            bytes: resolved.map(|r| r.bytes),
            active_rows: lens.active_rows,
            served: lens.served,
        }
    }
}

fn tier(resident: bool, resolved: bool) -> Tier {
    match (resident, resolved) {
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
