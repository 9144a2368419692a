//! What a group's status should say. Pure.

use std::collections::BTreeMap;

use k8s_openapi::{apimachinery::pkg::apis::meta::v1::Time, jiff::Timestamp};
use turret_crds::{
    ModelGroup, ModelGroupStatus,
    condition::{self, FailureReason, Wanted, reason},
    group::{FailedLens, MAX_FAILED_IN_STATUS},
    label,
};

use super::aliases;
use crate::controllers::{
    asked,
    assess::{Artifacts, Assessment, DocumentRef, Obstacle, artifacts},
    placement::status::{greatest, human_bytes, progress, wanted},
};

/// Most placements named in a status.
const MAX_PLACEMENTS: usize = 64;

/// A placement that names the group and may.
pub struct Placed<'a> {
    /// Name of the placement; `NAMESPACE/NAME` when it is of another namespace.
    pub placement: &'a str,
    /// What it calls the group.
    pub group: &'a str,
    /// How many workers it wants.
    pub replicas: i32,
    /// Why the placement is not carried out, when it is not.
    pub refused: Option<&'a str>,
    /// Whether it is paused: its workers are told of nothing new.
    pub paused: bool,
    /// The document its workers are to serve.
    pub document: Option<&'a DocumentRef>,
    /// How far its workers are.
    pub assessment: Assessment,
}

/// The status as it should be. `placed` is sorted by placement.
pub fn status(group: &ModelGroup, placed: &[Placed<'_>], now: Timestamp) -> ModelGroupStatus {
    let generation = group.metadata.generation.unwrap_or_default();
    let old = ours(group.status.as_ref());
    let found: Vec<Found> = placed.iter().map(|p| look(group, p)).collect();
    let total = group.spec.lenses.len();
    let ready = ready_lenses(group, placed, &found);
    let mut placements: Vec<String> = placed.iter().map(|p| p.placement.to_owned()).collect();
    placements.dedup();
    placements.truncate(MAX_PLACEMENTS);
    let misread = asked::is_paused(group).then(not_paused);
    let mut current = old.conditions.clone();
    if misread.is_none() {
        current.retain(|c| c.type_ != condition::PAUSED);
    }
    let wanted = conditions(placed, &found).into_iter().chain(misread).collect();
    ModelGroupStatus {
        observed_generation: generation,
        conditions: condition::merge(&current, wanted, generation, Time(now)),
        lens_summary: Some(format!("{ready}/{total}")),
        ready_lenses: i32::try_from(ready).ok(),
        total_lenses: i32::try_from(total).ok(),
        failed_lenses: failed_lenses(&found),
        base_digest: base(placed, |b| b.digest.clone()).or(old.base_digest),
        base_size: base(placed, |b| b.bytes.map(human_bytes)).or(old.base_size),
        placements,
        last_handled_reconcile_at: asked::handled(group, old.last_handled_reconcile_at.as_ref()),
    }
}

/// For whoever gave a group the annotation that pauses placements.
fn not_paused() -> Wanted {
    let message = format!(
        "a group cannot be paused, and {} does nothing here: give it to the placements that serve the group",
        label::PAUSED
    );
    wanted(condition::PAUSED, false, reason::NOT_PAUSED, &message)
}

/// The status as far as this operator writes it: conditions of others have their own writers.
pub fn ours(status: Option<&ModelGroupStatus>) -> ModelGroupStatus {
    let Some(mut ours) = status.cloned() else {
        return ModelGroupStatus { observed_generation: -1, ..ModelGroupStatus::default() };
    };
    let types = [
        condition::READY,
        condition::AVAILABLE,
        condition::RECONCILING,
        condition::STALLED,
        condition::ACCEPTED,
        condition::RESOLVED,
        condition::PAUSED,
    ];
    ours.conditions.retain(|c| types.contains(&c.type_.as_str()));
    ours
}

/// What one placement has of the group.
struct Found {
    /// What stands in the way of this placement serving exactly this group.
    obstacle: Option<Obstacle>,
    artifacts: Artifacts,
}

fn look(group: &ModelGroup, placed: &Placed<'_>) -> Found {
    let assessment = &placed.assessment;
    let in_document = placed.document.and_then(|d| d.groups.get(placed.group));
    let is_current = in_document.is_some_and(|v| {
        Some(&v.uid) == group.metadata.uid.as_ref() && Some(v.generation) == group.metadata.generation
    });
    // Reports of an older document still say what they serve of the group.
    let reports = if assessment.obstacle.is_none() { &assessment.serving } else { &assessment.believed };
    let names = group.spec.lenses.iter().map(|l| l.name.as_str());
    let artifacts = artifacts(placed.group, names, reports);
    let obstacle = if let (false, Some(why)) = (is_current, placed.refused) {
        Some(Obstacle::stalled(reason::INVALID, why))
    } else if placed.replicas == 0 {
        // What is not served cannot be served wrongly.
        None
    } else if !is_current && placed.paused {
        let message = "it is paused, so its workers are not told of this generation of the group";
        Some(Obstacle::stalled(reason::PAUSED, message))
    } else if !is_current {
        Some(Obstacle::passing(reason::UPDATING, "workers have yet to be told of this generation"))
    } else if let Some(other) = assessment.obstacle.clone()
        && !(is_of_another_part(&other) && was_served(group, placed))
    {
        Some(other)
    } else {
        with_aliases(artifacts.obstacle(placed.group), aliases::held_back(group, placed))
    };
    let named = obstacle
        .map(|o| Obstacle { message: format!("placement `{}`: {}", placed.placement, o.message), ..o });
    Found { obstacle: named, artifacts }
}

/// What is in the way when aliases do not lead yet to what is declared. What has failed is named first, since it may be what
/// they wait for.
fn with_aliases(obstacle: Option<Obstacle>, held_back: Option<String>) -> Option<Obstacle> {
    match (obstacle, held_back) {
        (obstacle, None) => obstacle,
        (Some(o), Some(aliases)) if [reason::BASE_FAILED, reason::LENSES_FAILED].contains(&o.reason) => {
            Some(Obstacle { message: format!("{}; {aliases}", o.message), ..o })
        }
        (_, Some(aliases)) => Some(Obstacle::passing(reason::ALIAS_PENDING, aliases)),
    }
}

/// Whether an obstacle may have nothing to do with this group: workers have yet to take a document, or cannot meet
/// its budgets.
fn is_of_another_part(obstacle: &Obstacle) -> bool {
    [reason::UPDATING, reason::DOES_NOT_FIT].contains(&obstacle.reason)
}

/// Whether all workers of the placement served exactly this generation before. While they take a
/// newer document, in which something else changed, they go on serving it.
fn was_served(group: &ModelGroup, placed: &Placed<'_>) -> bool {
    let old = ours(group.status.as_ref());
    let ready = old.conditions.iter().find(|c| c.type_ == condition::READY);
    let was_ready = ready.is_some_and(|c| {
        c.status == "True"
            && c.reason == reason::SERVING
            && c.observed_generation == group.metadata.generation
    });
    was_ready && old.placements.iter().any(|p| p == placed.placement)
}

fn ready_lenses(group: &ModelGroup, placed: &[Placed<'_>], found: &[Found]) -> usize {
    let serving: Vec<_> = placed.iter().zip(found).filter(|(p, _)| p.replicas > 0).map(|(_, f)| f).collect();
    if serving.is_empty() {
        return 0;
    }
    let is_ready = |lens: &str| {
        serving.iter().all(|f| {
            f.artifacts.asked
                && !f.artifacts.failed.contains_key(lens)
                && !f.artifacts.pending.iter().any(|p| p == lens)
        })
    };
    group.spec.lenses.iter().filter(|l| is_ready(&l.name)).count()
}

fn failed_lenses(found: &[Found]) -> Vec<FailedLens> {
    let mut failed: BTreeMap<&str, &(FailureReason, String)> = BTreeMap::new();
    for (lens, failure) in found.iter().flat_map(|f| &f.artifacts.failed) {
        failed.entry(lens).or_insert(failure);
    }
    let named = failed.into_iter().take(MAX_FAILED_IN_STATUS);
    named
        .map(|(name, (reason, message))| FailedLens {
            name: name.into(),
            reason: *reason,
            message: message.clone(),
        })
        .collect()
}

/// What the first worker that knows says of the base.
fn base<T>(placed: &[Placed<'_>], get: impl Fn(&turret_crds::report::BaseReport) -> Option<T>) -> Option<T> {
    placed.iter().find_map(|p| p.assessment.believed.iter().find_map(|r| get(r.base_of(p.group)?)))
}

fn conditions(placed: &[Placed<'_>], found: &[Found]) -> Vec<Wanted> {
    let obstacle = greatest(found.iter().filter_map(|f| f.obstacle.clone()).collect());
    let wants_workers = placed.iter().any(|p| p.replicas > 0);
    let idle = match (placed.is_empty(), wants_workers) {
        (true, _) => Some((reason::NOT_PLACED, "no ModelPlacement that the group allows names it")),
        (false, false) => Some((reason::SCALED_TO_ZERO, "every placement of the group wants no worker")),
        (false, true) => None,
    };
    let ready = match (&obstacle, idle) {
        (Some(o), _) => wanted(condition::READY, false, o.reason, &o.message),
        (None, Some((why, message))) => wanted(condition::READY, true, why, message),
        (None, None) => {
            let message = format!("every worker of {} serves this generation", list(placed));
            wanted(condition::READY, true, reason::SERVING, &message)
        }
    };
    let serving = placed.iter().any(|p| {
        let reports = p.assessment.believed.iter();
        reports.clone().any(|r| r.state.ready && r.base_of(p.group).is_some_and(|b| b.state.is_ready()))
    });
    let available = match (serving, &obstacle, idle) {
        (true, _, _) => {
            wanted(condition::AVAILABLE, true, reason::SERVING, "at least one worker serves the base")
        }
        (false, Some(o), _) => wanted(condition::AVAILABLE, false, o.reason, &o.message),
        (false, None, Some((why, message))) => wanted(condition::AVAILABLE, false, why, message),
        (false, None, None) => {
            wanted(condition::AVAILABLE, false, reason::LOADING, "no worker serves the base yet")
        }
    };
    let [reconciling, stalled] = progress(obstacle.as_ref());
    let accepted = wanted(condition::ACCEPTED, true, reason::VALID, "the group can be carried out");
    vec![ready, available, reconciling, stalled, accepted, resolved(found, obstacle.as_ref(), idle)]
}

/// Whether all files were found and are what was declared.
fn resolved(found: &[Found], obstacle: Option<&Obstacle>, idle: Option<(&str, &str)>) -> Wanted {
    let failed = found.iter().find_map(|f| {
        let artifacts = &f.artifacts;
        let base = artifacts.base_failed.as_ref().map(|b| (reason::BASE_FAILED, "the base".to_owned(), b));
        let lens =
            artifacts.failed.iter().next().map(|(n, b)| (reason::LENSES_FAILED, format!("lens `{n}`"), b));
        base.or(lens)
    });
    if let Some((why, what, (failure, message))) = failed {
        return wanted(condition::RESOLVED, false, why, &format!("{what}: {failure}: {message}"));
    }
    if let Some((why, message)) = idle {
        let message = format!("{message}, so nobody has looked at its files");
        return Wanted { type_: condition::RESOLVED, status: None, reason: why.into(), message };
    }
    match obstacle {
        None => {
            wanted(condition::RESOLVED, true, reason::DONE, "all files were found and are what was declared")
        }
        Some(o) => Wanted {
            type_: condition::RESOLVED,
            status: None,
            reason: o.reason.into(),
            message: "not all files have been looked at yet".into(),
        },
    }
}

fn list(placed: &[Placed<'_>]) -> String {
    let mut names: Vec<_> = placed.iter().map(|p| format!("`{}`", p.placement)).collect();
    names.dedup();
    let more = names.len().saturating_sub(3);
    names.truncate(3);
    if more > 0 { format!("{} and {more} more", names.join(", ")) } else { names.join(", ") }
}
