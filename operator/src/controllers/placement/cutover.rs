//! What is known when aliases are to lead to other lenses: pure.
//!
//! A cut-over takes two documents. The first one brings the new lenses, with aliases as they were. Once every worker that
//! reports carries it out and can serve the new targets, [`turret_crds::compile`] makes the second one, in which the
//! aliases lead to them. What a worker says of an older document is not believed: a lens of the same name may have
//! other files by now.

use std::collections::BTreeSet;

use turret_crds::{ModelGroup, WorkerReport, alias::GroupAliases};

use super::plan::Observed;
use crate::controllers::assess::{DocumentRef, ObservedWorker};

/// What aliases led to until now: what is stored, or else, if somebody deleted it, what a worker says.
pub fn previous_aliases(stored: Option<&DocumentRef>, workers: &[ObservedWorker]) -> GroupAliases {
    match stored {
        Some(document) => document.aliases.clone(),
        None => workers
            .iter()
            .find_map(|worker| Some(GroupAliases::clone(&worker.report.as_ref()?.aliases)))
            .unwrap_or_default(),
    }
}

/// Targets, by group and lens, that aliases do not lead to yet and every worker can serve.
pub fn ready_targets(observed: &Observed<'_>, stored: Option<&DocumentRef>) -> BTreeSet<(String, String)> {
    let mut ready = BTreeSet::new();
    let Some(stored) = stored else { return ready };
    let namespace = observed.placement.metadata.namespace.as_deref().unwrap_or_default();
    for placed in &observed.placement.spec.groups {
        let (group_namespace, name) = placed.target(namespace);
        let Some(group) = observed.groups.get(&(group_namespace.to_owned(), name.to_owned())) else {
            continue;
        };
        if group.spec.aliases.is_empty() || !is_stored(group, &placed.name, stored) {
            continue;
        }
        let Some(reports) = reports(&observed.workers, stored) else { return ready };
        let before = stored.aliases.get(&placed.name).map(Vec::as_slice).unwrap_or_default();
        for alias in &group.spec.aliases {
            let declared = alias.declared();
            if before.iter().any(|b| b.name == alias.name && b.targets == declared) {
                continue;
            }
            for target in declared {
                let has_it = |r: &&WorkerReport| {
                    r.lens(&placed.name, &target.lens).is_some_and(|l| l.state.is_ready())
                };
                if reports.iter().all(has_it) {
                    ready.insert((placed.name.clone(), target.lens));
                }
            }
        }
    }
    ready
}

/// Whether the stored document holds exactly this group.
fn is_stored(group: &ModelGroup, called: &str, stored: &DocumentRef) -> bool {
    stored.groups.get(called).is_some_and(|version| {
        Some(&version.uid) == group.metadata.uid.as_ref()
            && Some(version.generation) == group.metadata.generation
    })
}

/// What workers say, if each that reports carries out the stored document and none is still to be asked.
fn reports<'a>(workers: &'a [ObservedWorker], stored: &DocumentRef) -> Option<Vec<&'a WorkerReport>> {
    let there = || workers.iter().filter(|worker| worker.pod.counts());
    if there().any(|w| w.pod.ready && w.report.is_none() && w.lost.is_none()) {
        return None;
    }
    let reports: Vec<&WorkerReport> = there().filter_map(|w| w.report.as_deref()).collect();
    let all = !reports.is_empty() && reports.iter().all(|report| carries_out(report, stored));
    all.then_some(reports)
}

/// Whether a worker goes by this document, be it that its budgets have to wait.
fn carries_out(report: &WorkerReport, stored: &DocumentRef) -> bool {
    let but_for_budgets = report.state.cannot_fit.as_ref().is_some_and(|c| c.sequence == stored.sequence);
    but_for_budgets || report.serves(stored.sequence, &stored.digest)
}
