//! Budgets and batching that a document asks for, put in force when what runs and what is in memory allows it.

use std::time::Duration;

use tokio::time::Instant;
use turret_crds::report::AppliedDocument;

use super::owner::{Owner, Turn};
use super::table::Phase;
use super::warmup::Warmup;
use super::work::Event;
use crate::engine::handle::{ChangeError, EngineConfig};

/// Budgets that fit once rows have ended are tried again this often.
const FIT_RETRY: Duration = Duration::from_secs(1);
/// Budgets that do not fit are looked at again this often: a base may have failed meanwhile.
const UNFIT_RECHECK: Duration = Duration::from_secs(10);

impl Owner {
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
                    if document.groups.is_empty() {
                        self.warmup = Warmup::Warm;
                    }
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

    pub(super) fn on_reconfigured(&mut self, limits: EngineConfig, result: Result<(), ChangeError>) {
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
