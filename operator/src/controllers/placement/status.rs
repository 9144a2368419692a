//! What a placement's status should say. Pure.

use std::{collections::BTreeMap, time::Duration};

use k8s_openapi::{
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::{SignedDuration, Timestamp},
};
use turret_crds::{
    ModelPlacement, ModelPlacementStatus, WorkerDocument, WorkerReport,
    condition::{self, Wanted, reason},
    document::{BaseKey, Problem},
    report::Tier,
};

use super::{pause::Pause, resources};
use crate::controllers::{
    asked,
    assess::{Assessment, Obstacle, artifacts},
};

/// What moves with traffic is written at most this often.
const SUMMARY_EVERY: SignedDuration = SignedDuration::from_secs(60);

/// What a status is made from.
pub struct Facts<'a> {
    /// The placement, with the status it has.
    pub placement: &'a ModelPlacement,
    /// How many workers it is to have.
    pub replicas: i32,
    /// What is wrong with the declaration.
    pub problems: &'a [Problem],
    /// An object of an earlier placement of the same name that is still being removed.
    pub waiting_for: Option<&'a str>,
    /// How far the workers are.
    pub assessment: &'a Assessment,
    /// The document they are to serve, when it was compiled now.
    pub document: Option<&'a WorkerDocument>,
    /// Its sequence, or that of the one that is stored.
    pub sequence: Option<u64>,
    /// The resolved image.
    pub image: &'a str,
    /// What is held back because the placement is paused; `None` when it is not.
    pub pause: Option<&'a Pause>,
}

/// The status as it should be, and when its summaries may be refreshed if they are out of date.
pub fn status(facts: &Facts<'_>, now: Timestamp) -> (ModelPlacementStatus, Option<Duration>) {
    let placement = facts.placement;
    let generation = placement.metadata.generation.unwrap_or_default();
    let old = ours(placement.status.as_ref());
    let assessment = facts.assessment;
    let document_groups = facts.document.map(|d| d.groups.as_slice()).unwrap_or_default();
    let mut names: Vec<_> = document_groups.iter().map(|g| g.name.as_str()).collect();
    let mut current = old.conditions.clone();
    if let Some(pause) = facts.pause {
        names = pause.groups.iter().map(String::as_str).collect();
    } else {
        current.retain(|c| c.type_ != condition::PAUSED);
    }
    let mut status = ModelPlacementStatus {
        observed_generation: generation,
        conditions: condition::merge(&current, conditions(facts), generation, Time(now)),
        desired_replicas: Some(facts.replicas),
        replicas: Some(count(assessment.pods)),
        ready_replicas: Some(count(assessment.ready_pods)),
        updated_replicas: Some(count(assessment.serving.len())),
        selector: Some(resources::selector_text(placement)),
        group_summary: Some(if names.is_empty() { "none".into() } else { names.join(",") }),
        worker_image: Some(facts.image.into()),
        document_sequence: facts.sequence.and_then(|s| i64::try_from(s).ok()),
        active_summary: old.active_summary.clone(),
        device_memory_summary: old.device_memory_summary.clone(),
        summarized_at: old.summarized_at.clone(),
        last_handled_reconcile_at: asked::handled(placement, old.last_handled_reconcile_at.as_ref()),
    };
    if facts.problems.iter().any(Problem::stops_everything) || facts.waiting_for.is_some() {
        // No pod was made of it: noted, it would replace pods once the declaration is what it was before.
        status.worker_image = old.worker_image.clone();
    }
    if facts.pause.is_some() {
        // What the declaration asks for now is not what there is.
        status.worker_image = old.worker_image.clone();
        status.document_sequence = status.document_sequence.or(old.document_sequence);
        status.last_handled_reconcile_at = old.last_handled_reconcile_at.clone();
    }
    let look_again = summarize(&mut status, &old, &assessment.believed, now);
    (status, look_again)
}

/// The status as far as this operator writes it: conditions of others have their own writers.
pub fn ours(status: Option<&ModelPlacementStatus>) -> ModelPlacementStatus {
    let Some(mut ours) = status.cloned() else {
        return ModelPlacementStatus { observed_generation: -1, ..ModelPlacementStatus::default() };
    };
    let types = [
        condition::READY,
        condition::AVAILABLE,
        condition::RECONCILING,
        condition::STALLED,
        condition::ACCEPTED,
        condition::PAUSED,
    ];
    ours.conditions.retain(|c| types.contains(&c.type_.as_str()));
    ours
}

fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

fn conditions(facts: &Facts<'_>) -> Vec<Wanted> {
    let is_autoscaled = facts.placement.spec.autoscaling.is_some();
    let accepted = accepted(facts.problems, is_autoscaled);
    let obstacle = obstacle(facts);
    let wants_none = facts.replicas == 0;
    // Whoever paused it keeps it as it is.
    let wakes = is_autoscaled && facts.pause.is_none();
    let none_wanted = if wakes { "no worker runs; a request wakes one" } else { "no worker is wanted" };
    let ready = match &obstacle {
        Some(o) => wanted(condition::READY, false, o.reason, &o.message),
        None if wants_none => wanted(condition::READY, true, reason::SCALED_TO_ZERO, none_wanted),
        None => {
            let message = format!("{} workers serve the newest document", facts.assessment.serving.len());
            wanted(condition::READY, true, reason::SERVING, &message)
        }
    };
    // A worker with an empty document is ready, and serves nothing.
    let has_groups = facts.document.is_none_or(|d| !d.groups.is_empty());
    let serving = has_groups && facts.assessment.believed.iter().any(|r| r.state.ready);
    let available = match (&obstacle, serving) {
        (_, true) => {
            wanted(condition::AVAILABLE, true, reason::SERVING, "at least one worker takes requests")
        }
        (Some(o), false) => wanted(condition::AVAILABLE, false, o.reason, &o.message),
        (None, false) if wants_none => {
            wanted(condition::AVAILABLE, false, reason::SCALED_TO_ZERO, none_wanted)
        }
        (None, false) => wanted(condition::AVAILABLE, false, reason::LOADING, "no worker takes requests yet"),
    };
    let [reconciling, stalled] = progress(obstacle.as_ref());
    let paused = facts.pause.map(|pause| wanted(condition::PAUSED, true, reason::PAUSED, &pause.message()));
    [ready, available, reconciling, stalled, accepted].into_iter().chain(paused).collect()
}

/// `Reconciling` and `Stalled`, never both.
pub fn progress(obstacle: Option<&Obstacle>) -> [Wanted; 2] {
    let (busy, stuck) = match obstacle {
        Some(o) if o.needs_change => (None, Some(o)),
        other => (other, None),
    };
    [
        busy.map_or_else(
            || wanted(condition::RECONCILING, false, reason::DONE, "nothing is under way"),
            |o| wanted(condition::RECONCILING, true, o.reason, &o.message),
        ),
        stuck.map_or_else(
            || wanted(condition::STALLED, false, reason::NOT_STALLED, "nothing stands in the way"),
            |o| wanted(condition::STALLED, true, o.reason, &o.message),
        ),
    ]
}

/// A condition with this status.
pub fn wanted(type_: &'static str, status: bool, reason: &str, message: &str) -> Wanted {
    Wanted { type_, status: Some(status), reason: reason.into(), message: message.into() }
}

fn accepted(problems: &[Problem], is_autoscaled: bool) -> Wanted {
    match problems.first() {
        None if is_autoscaled => {
            let message =
                "the placement can be carried out; spec.replicas is ignored while spec.autoscaling is set";
            wanted(condition::ACCEPTED, true, reason::VALID, message)
        }
        None => wanted(condition::ACCEPTED, true, reason::VALID, "the placement can be carried out"),
        Some(first) => wanted(condition::ACCEPTED, false, first.reason, &all_messages(problems)),
    }
}

fn all_messages(problems: &[Problem]) -> String {
    problems.iter().map(|p| p.message.as_str()).collect::<Vec<_>>().join("; ")
}

/// The greatest thing in the way of serving everything that is declared.
fn obstacle(facts: &Facts<'_>) -> Option<Obstacle> {
    if let Some(first) = facts.problems.first() {
        return Some(Obstacle::stalled(first.reason, all_messages(facts.problems)));
    }
    if let Some(obstacle) = facts.pause.and_then(Pause::obstacle) {
        return Some(obstacle);
    }
    if let Some(message) = facts.waiting_for {
        return Some(Obstacle::passing(reason::ROLLING_OUT, message));
    }
    if let Some(obstacle) = &facts.assessment.obstacle {
        return Some(obstacle.clone());
    }
    let serving = &facts.assessment.serving;
    if serving.is_empty() {
        return None;
    }
    let groups = facts.document.map(|d| d.groups.as_slice()).unwrap_or_default();
    let mut found: Vec<Obstacle> = groups
        .iter()
        .filter_map(|g| {
            artifacts(&g.name, g.lenses.iter().map(|l| l.name.as_str()), serving).obstacle(&g.name)
        })
        .collect();
    if let Some(worker) = serving.iter().find(|r| !r.state.ready) {
        let what = match worker.state.active_base {
            Some(_) => "the lenses that come ahead of requests",
            None => "its base",
        };
        let message = format!("worker {} is loading {what}", worker.worker.name);
        found.push(Obstacle::passing(reason::LOADING, message));
    }
    greatest(found)
}

/// What to name first: a base, then lenses, then what is under way. Something is stalled only when
/// nothing else is under way.
pub fn greatest(mut found: Vec<Obstacle>) -> Option<Obstacle> {
    let severity = |o: &Obstacle| match o.reason {
        reason::BASE_FAILED => 0,
        reason::LENSES_FAILED => 1,
        _ => 2,
    };
    found.sort_by_key(severity);
    let all_need_change = found.iter().all(|o| o.needs_change);
    let mut first = found.into_iter().next()?;
    first.needs_change &= all_need_change;
    Some(first)
}

/// Refreshes what moves with traffic: with any other write, and else once a minute.
fn summarize(
    status: &mut ModelPlacementStatus,
    old: &ModelPlacementStatus,
    reports: &[std::sync::Arc<WorkerReport>],
    now: Timestamp,
) -> Option<Duration> {
    let fresh = (active(reports), device_memory(reports));
    if fresh == (old.active_summary.clone(), old.device_memory_summary.clone()) {
        return None;
    }
    // A time beyond the next refresh was written before the clock was set back.
    let refreshed = old.summarized_at.as_ref().filter(|at| at.0.duration_since(now) <= SUMMARY_EVERY);
    let due = refreshed.and_then(|at| at.0.checked_add(SUMMARY_EVERY).ok());
    let is_written_anyway = {
        // `merge` keeps what did not change, so the rest is equal unless something else moved.
        let rest = |s: &ModelPlacementStatus| ModelPlacementStatus { summarized_at: None, ..s.clone() };
        rest(status) != rest(old)
    };
    match due {
        Some(due) if due > now && !is_written_anyway => Some(due.duration_since(now).unsigned_abs()),
        _ => {
            (status.active_summary, status.device_memory_summary) = fresh;
            status.summarized_at = Some(Time(now));
            None
        }
    }
}

/// `demo×2, other×1`: the active base of each worker, by the first of its groups, counted.
fn active(reports: &[std::sync::Arc<WorkerReport>]) -> Option<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for report in reports {
        if let Some(key) = &report.state.active_base {
            *counts.entry(base_name(report, key)).or_default() += 1;
        }
    }
    let parts: Vec<_> = counts.into_iter().map(|(name, n)| format!("{name}×{n}")).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

fn base_name(report: &WorkerReport, key: &BaseKey) -> String {
    let base = report.bases.iter().find(|b| b.key == *key);
    base.and_then(|b| b.groups.first().cloned()).unwrap_or_else(|| key.to_string())
}

/// Used / allowed device memory of all workers.
fn device_memory(reports: &[std::sync::Arc<WorkerReport>]) -> Option<String> {
    let tiers = reports.iter().flat_map(|r| &r.state.tiers).filter(|t| t.tier == Tier::Device);
    let (used, budget) = tiers.fold((0, 0), |(used, budget), t| {
        (used + t.base_bytes + t.lens_bytes + t.working_bytes, budget + t.budget_bytes)
    });
    (budget > 0).then(|| format!("{} / {}", human_bytes(used), human_bytes(budget)))
}

/// Bytes as people read them: `1.5Gi`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "Ki", "Mi", "Gi", "Ti", "Pi"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes}B") } else { format!("{value:.1}{}", UNITS[unit]) }
}
