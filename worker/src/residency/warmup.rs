//! When a new worker takes its first requests: a base is active, and the lenses over it that are to be in memory ahead of
//! requests ([`super::ahead`]) have come, have failed, or find no room; at the latest `warmupSeconds` after the base.
//! That happens once. Afterwards no load and no switch makes the worker unready.

use std::time::Duration;

use tokio::time::Instant;
use turret_crds::document::DEFAULT_WARMUP_SECONDS;

use super::admit::Demand;
use super::declared::DeclaredLens;
use super::owner::{Owner, Stage};
use super::plan::Wanted;
use super::publish::News;
use super::table::{LensKey, Phase};

/// How far a worker is on its way to its first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Warmup {
    /// No base has been active yet.
    Cold,
    /// One has, for the first time at this moment.
    Warming(Instant),
    /// Nothing is waited for any more.
    Warm,
}

/// How far a lens is that is to be in memory ahead of requests.
enum Far {
    /// There, or failed.
    Done,
    /// On its way.
    Coming,
    /// Its files are here: only room may keep it away.
    Outside(LensKey, u64),
}

impl Owner {
    /// A base is active.
    pub(super) fn begin_warmup(&mut self, now: Instant) {
        if self.warmup == Warmup::Cold {
            self.warmup = Warmup::Warming(now);
        }
    }

    /// When the warm-up is over, whatever has come by then; nothing once it is.
    pub(super) fn warmup_ends(&self) -> Option<Instant> {
        let Warmup::Warming(since) = self.warmup else { return None };
        let seconds = self.document.as_ref().map_or(DEFAULT_WARMUP_SECONDS, |d| d.warmup_seconds);
        Some(since + Duration::from_secs(u64::from(seconds)))
    }

    /// Ends the warm-up when nothing is left to wait for, or its time is over.
    pub(super) fn warm_up(&mut self, demand: &Demand, now: Instant) {
        let Some(ends) = self.warmup_ends() else { return };
        let is_over = now >= ends;
        if !is_over && self.waits_for_lenses(demand, now) {
            return;
        }
        tracing::info!(is_over, "ready for requests");
        self.warmup = Warmup::Warm;
        self.news = News::Now;
    }

    /// Whether a lens over the active base is still to come ahead of requests.
    fn waits_for_lenses(&self, demand: &Demand, now: Instant) -> bool {
        let Some(active) = &self.table.active else { return true };
        // How much room there is, is known when the engine has the document's budgets.
        if self.reconfiguring.is_some() {
            return true;
        }
        let mut outside = Vec::new();
        for (name, instead_of_others) in self.ahead() {
            let Some(lens) = self.lenses.get(&name).filter(|lens| lens.base == *active) else { continue };
            match self.far(lens) {
                Far::Done => {}
                Far::Coming => return true,
                Far::Outside(key, bytes) => outside.push(Wanted::Lens { key, bytes, instead_of_others }),
            }
        }
        // What finds no room is not on its way.
        outside.iter().any(|wanted| self.plan(wanted, &demand.lenses, now).is_ok())
    }

    fn far(&self, lens: &DeclaredLens) -> Far {
        match &lens.stage {
            Stage::Failed { .. } => return Far::Done,
            Stage::Resolving => return Far::Coming,
            Stage::Ready(_) => {}
        }
        let key = lens.key().expect("it is ready");
        // Until its files are here, nobody but the declaration says what a claim is.
        let is_claim = lens.is_claim();
        if let Some(held) = self.table.lenses.get(&key).filter(|_| !is_claim) {
            return if held.phase == Phase::Resident { Far::Done } else { Far::Coming };
        }
        match self.resolved(&key).filter(|resolved| resolved.files.here().is_some()) {
            Some(resolved) if !is_claim => Far::Outside(key, resolved.bytes),
            // Files that could not be fetched are tried again later, like what failed.
            _ if lens.failures > 0 => Far::Done,
            _ => Far::Coming,
        }
    }
}
