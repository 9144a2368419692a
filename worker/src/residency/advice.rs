//! What the operator advises this worker to hold.
//!
//! Hints say for every worker which lenses it preloads and which base it prefers. They decide what is loaded ahead of
//! requests, and nothing else: a request for any other lens is served as well. Without hints (no cluster, or an operator
//! that publishes none) and with `lensPreload: Declared`, every worker loads ahead whatever is declared `Preloaded` or
//! `Pinned`. A worker that is alone does too: there is nobody to share with, and what does not fit is told.

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio::time::Instant;
use turret_crds::condition::FailureReason;
use turret_crds::document::{BaseKey, WorkerDocument};
use turret_crds::group::LensResidency;
use turret_crds::hints::Hints;
use turret_crds::placement::LensPreload;

use super::declared::{DeclaredLens, LensName};
use super::owner::{Owner, Stage};

/// What this worker is advised to hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Advice {
    version: u64,
    base: Option<BaseKey>,
    /// The most important first.
    lenses: Vec<LensName>,
    assigned: BTreeSet<LensName>,
    decides: bool,
}

impl Advice {
    /// What the hints of a document say to the worker of this name.
    pub(super) fn of(document: &WorkerDocument, worker: &str) -> Self {
        let Some(hints) = &document.hints else { return Self::default() };
        let share = hints.workers.get(worker);
        let ids = share.into_iter().flat_map(|share| &share.preload);
        let names = ids.filter_map(|id| id.parts());
        let lenses: Vec<LensName> = names.map(|(group, name)| (group.to_owned(), name.to_owned())).collect();
        let is_alone = share.is_some() && hints.workers.len() == 1;
        Self {
            version: hints.version,
            base: share.and_then(|share| share.base.clone()),
            assigned: lenses.iter().cloned().collect(),
            lenses,
            decides: document.lens_preload == LensPreload::Assigned && !is_alone,
        }
    }

    /// Version of the hints; 0 without any.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// The base to prefer.
    pub(super) fn base(&self) -> Option<&BaseKey> {
        self.base.as_ref()
    }

    /// Whether a lens is assigned to this worker.
    pub(super) fn assigns(&self, lens: &LensName) -> bool {
        self.assigned.contains(lens)
    }

    /// All that are.
    pub(super) fn assigned(&self) -> &BTreeSet<LensName> {
        &self.assigned
    }

    /// The lenses to load ahead of requests, the most important first; `None` where that is as declared.
    pub(super) fn share(&self) -> Option<&[LensName]> {
        self.decides.then_some(self.lenses.as_slice())
    }

    /// Whether a lens that is declared to be in memory ahead of requests is to be in this worker's memory.
    pub(super) fn keeps(&self, lens: &LensName) -> bool {
        !self.decides || self.assigns(lens)
    }
}

impl Owner {
    /// Takes newer hints for the document that is known.
    pub(super) fn take_hints(&mut self, hints: Option<Hints>) {
        let Some(hints) = hints.filter(|hints| hints.version > self.advice.version()) else { return };
        let Some(document) = &self.document else { return };
        tracing::info!(version = hints.version, workers = hints.workers.len(), "hints taken");
        let document = WorkerDocument { hints: Some(hints), ..WorkerDocument::clone(document) };
        self.document = Some(Arc::new(document));
        self.follow_hints();
        // Files of what is assigned now are to be here.
        self.resolve_at = Some(Instant::now());
        self.untidy = true;
    }

    /// Puts in force what the document's hints say to this worker.
    pub(super) fn follow_hints(&mut self) {
        let advice = self.document.as_deref().map(|document| Advice::of(document, &self.start.worker.name));
        let before = std::mem::replace(&mut self.advice, advice.unwrap_or_default());
        for name in before.assigned().symmetric_difference(self.advice.assigned()) {
            self.lenses.count(name, |_| {});
        }
        if before.share().is_none() && self.advice.share().is_some() {
            self.doubt_what_cannot_be_pinned();
        }
        self.look_ahead = true;
    }

    /// A pinned lens that had no room beside the others has some when other workers have a share of them.
    fn doubt_what_cannot_be_pinned(&mut self) {
        let is_refused = |lens: &DeclaredLens| {
            let reason = match &lens.stage {
                Stage::Failed { failure, .. } => Some(failure.reason),
                Stage::Resolving | Stage::Ready(_) => None,
            };
            lens.lens.residency == LensResidency::Pinned && reason == Some(FailureReason::DoesNotFit)
        };
        let refused = self.lenses.iter().filter(|(_, lens)| is_refused(lens));
        let refused: Vec<LensName> = refused.map(|(name, _)| name.clone()).collect();
        for name in refused {
            self.lenses.update(&name, |lens| {
                let stage = std::mem::replace(&mut lens.stage, Stage::Resolving);
                lens.stage = stage.looked_at_again();
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn advice(hints: serde_json::Value, lens_preload: &str, worker: &str) -> Advice {
        let document = json!({
            "protocol": 1,
            "placement": {"namespace": "n", "name": "p", "uid": "u"},
            "sequence": 1, "digest": "", "groups": [],
            "memory": {},
            "batching": {"maxRunningRows": 1, "prefillChunkTokens": 1},
            "switching": {"minHoldSeconds": 0, "maxWaitSeconds": 0, "drainSeconds": 0},
            "lensPreload": lens_preload,
            "admission": {"maxQueuedRequests": 1, "holdSeconds": 1},
            "sourceVolumes": [],
            "publicKeys": [],
            "hints": hints,
        });
        Advice::of(&serde_json::from_value(document).unwrap(), worker)
    }

    #[test]
    fn who_shares_loads_its_own_and_who_is_alone_or_told_nothing_what_is_declared() {
        let share = |lens: &str| json!({"weight": 1, "base": "b", "preload": [lens]});
        let hints =
            json!({"version": 7, "publishedAt": 0, "workers": {"a": share("g:x"), "b": share("g:y")}});
        let name = |lens: &str| ("g".to_owned(), lens.to_owned());
        let one = advice(hints.clone(), "Assigned", "a");
        assert_eq!((one.version(), one.share()), (7, Some(&[name("x")][..])));
        assert_eq!(one.base(), Some(&BaseKey("b".into())));
        assert!(one.keeps(&name("x")) && !one.keeps(&name("y")) && one.assigns(&name("x")));

        let new = advice(hints.clone(), "Assigned", "c");
        assert_eq!((new.share(), new.base()), (Some(&[][..]), None), "it will be told");
        let told_to_hold_all = advice(hints, "Declared", "a");
        assert_eq!(told_to_hold_all.share(), None);
        assert!(told_to_hold_all.keeps(&name("y")) && !told_to_hold_all.assigns(&name("y")));

        let alone = json!({"version": 1, "publishedAt": 0, "workers": {"a": share("g:x")}});
        assert_eq!(advice(alone.clone(), "Assigned", "a").share(), None);
        assert!(advice(alone, "Assigned", "b").share().is_some(), "another one is");
        assert_eq!(advice(json!(null), "Assigned", "a"), Advice::default());
        assert_eq!(Advice::default().share(), None);
    }
}
