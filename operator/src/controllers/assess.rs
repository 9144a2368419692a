//! How far the workers of a placement are: what their pods and their own reports say, judged
//! against what is wanted. Pure; both kinds' status is made from it.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::apps::v1::Deployment;
use turret_crds::{
    WorkerReport,
    alias::GroupAliases,
    condition::{FailureReason, reason},
    report::ArtifactState,
};

use super::pod::PodFacts;

/// A worker as it is observed.
#[derive(Clone, Debug, PartialEq)]
pub struct ObservedWorker {
    /// What its pod says.
    pub pod: PodFacts,
    /// What the worker itself says, if it can be believed.
    pub report: Option<Arc<WorkerReport>>,
    /// Why its state stream is broken, when it is.
    pub lost: Option<Arc<str>>,
}

/// Which document the workers are to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DocumentRef {
    /// Its sequence.
    pub sequence: u64,
    /// Its digest.
    pub digest: String,
    /// Its groups, as clients call them.
    pub groups: BTreeMap<String, GroupVersion>,
    /// What aliases lead to in it.
    pub aliases: GroupAliases,
}

/// Which version of a ModelGroup a document holds.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct GroupVersion {
    /// UID of the ModelGroup.
    pub uid: String,
    /// Its generation.
    pub generation: i64,
}

/// What is wanted of a placement's workers.
#[derive(Clone, Debug, PartialEq)]
pub struct WantedWorkers<'a> {
    /// How many.
    pub replicas: i32,
    /// Hash of the pod template they are to be made from; `None` when it does not matter.
    pub template: Option<&'a str>,
    /// The document; `None` when there is none to serve.
    pub document: Option<&'a DocumentRef>,
}

/// Something that stands between what is and what is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// A constant of [`reason`].
    pub reason: &'static str,
    /// For a person.
    pub message: String,
    /// Whether only a change by somebody can help.
    pub needs_change: bool,
}

impl Obstacle {
    /// Something that passes by itself.
    pub fn passing(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), needs_change: false }
    }

    /// Something that somebody must change.
    pub fn stalled(reason: &'static str, message: impl Into<String>) -> Self {
        Self { reason, message: message.into(), needs_change: true }
    }
}

/// How far the workers are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Assessment {
    /// The greatest thing in the way of every wanted worker serving the document; `None` when
    /// every one does (their artifacts may still have failed).
    pub obstacle: Option<Obstacle>,
    /// Reports of the workers that serve exactly the document, by name of the pod.
    pub serving: Vec<Arc<WorkerReport>>,
    /// All reports that can be believed, whatever they serve.
    pub believed: Vec<Arc<WorkerReport>>,
    /// Worker pods that exist and are not leaving.
    pub pods: usize,
    /// Of them, those that take requests.
    pub ready_pods: usize,
    /// Whether a worker that takes requests has not been asked yet what it serves, as after a start
    /// of the operator. Nothing should be said of it before it was; it answers, or is lost, within
    /// seconds.
    pub undecided: bool,
}

/// When to look again at what is undecided.
pub const UNDECIDED: std::time::Duration = std::time::Duration::from_millis(500);

/// Judges the workers of one placement. `workers` are sorted by name.
pub fn assess(
    wanted: &WantedWorkers<'_>,
    deployment: Option<&Deployment>,
    workers: &[ObservedWorker],
) -> Assessment {
    let there: Vec<&ObservedWorker> = workers.iter().filter(|w| w.pod.counts()).collect();
    let serves =
        |report: &WorkerReport| wanted.document.is_some_and(|d| report.serves(d.sequence, &d.digest));
    let serving: Vec<_> = there.iter().filter_map(|w| w.report.clone()).filter(|r| serves(r)).collect();
    Assessment {
        obstacle: obstacle(wanted, deployment, &there),
        serving,
        believed: there.iter().filter_map(|w| w.report.clone()).collect(),
        pods: there.len(),
        ready_pods: there.iter().filter(|w| w.pod.ready).count(),
        undecided: there.iter().any(|w| w.pod.ready && w.report.is_none() && w.lost.is_none()),
    }
}

fn obstacle(
    wanted: &WantedWorkers<'_>,
    deployment: Option<&Deployment>,
    there: &[&ObservedWorker],
) -> Option<Obstacle> {
    let count = usize::try_from(wanted.replicas).unwrap_or(0);
    if count == 0 {
        return (!there.is_empty()).then(|| rolling(format!("{} workers are leaving", there.len())));
    }
    // A pod that has trouble says best what is wrong; one that needs a change first.
    let mut troubles: Vec<_> = there.iter().filter_map(|w| w.pod.trouble.as_ref()).collect();
    troubles.sort_by_key(|t| !t.needs_change);
    if let Some(trouble) = troubles.first() {
        return Some(Obstacle {
            reason: trouble.reason,
            message: trouble.message.clone(),
            needs_change: trouble.needs_change,
        });
    }
    if let Some(failure) = replica_failure(deployment).filter(|_| there.len() < count) {
        return Some(Obstacle::passing(reason::ROLLING_OUT, format!("no worker pod can be made: {failure}")));
    }
    let current =
        |w: &&&ObservedWorker| wanted.template.is_none() || w.pod.template.as_deref() == wanted.template;
    let up_to_date = there.iter().filter(current).count();
    if up_to_date < count || there.len() != count {
        return Some(rolling(format!(
            "{} of {count} workers are of the newest pod template, {} exist",
            up_to_date.min(count),
            there.len()
        )));
    }
    let starting: Vec<_> = there.iter().filter(|w| w.pod.ip.is_none()).map(|w| w.pod.name.as_str()).collect();
    if !starting.is_empty() {
        return Some(rolling(format!(
            "{} of {count} workers are starting: {}",
            starting.len(),
            list(&starting)
        )));
    }
    if let Some(worker) = there.iter().find(|w| w.report.is_none()) {
        let why = match (&worker.lost, worker.pod.ready) {
            (Some(why), true) => why.to_string(),
            // Not ready and not answering is a worker that starts.
            _ => return Some(rolling(format!("worker {} is starting", worker.pod.name))),
        };
        let message = format!("worker {} does not say what it serves: {why}", worker.pod.name);
        return Some(Obstacle::passing(reason::UNREACHABLE, message));
    }
    let Some(document) = wanted.document else {
        return Some(Obstacle::passing(reason::UPDATING, "there is no document to serve yet"));
    };
    let report = |w: &ObservedWorker| w.report.clone().expect("workers without a report were named above");
    if let Some(obstacle) = too_small(document, there) {
        return Some(obstacle);
    }
    let behind: Vec<_> = there
        .iter()
        .filter(|w| !report(w).serves(document.sequence, &document.digest))
        .map(|w| w.pod.name.as_str())
        .collect();
    if !behind.is_empty() {
        return Some(Obstacle::passing(
            reason::UPDATING,
            format!(
                "{} of {count} workers have yet to take document {}: {}",
                behind.len(),
                document.sequence,
                list(&behind)
            ),
        ));
    }
    if let Some(worker) = there.iter().find(|w| report(w).state.draining) {
        return Some(rolling(format!("worker {} is draining", worker.pod.name)));
    }
    None
}

/// What the first worker that cannot meet the document's budgets says of them; one that only a change can help
/// before one that waits for requests to end.
fn too_small(document: &DocumentRef, there: &[&ObservedWorker]) -> Option<Obstacle> {
    let short = |w: &&&ObservedWorker| {
        let short = w.report.as_ref()?.state.cannot_fit.clone()?;
        (short.sequence == document.sequence).then_some((w.pod.name.clone(), short))
    };
    let (worker, short) = there.iter().filter_map(|w| short(&w)).min_by_key(|(_, short)| short.once_idle)?;
    let message = format!("worker {worker} goes on with the budgets it had: {}", short.message);
    Some(Obstacle { reason: reason::DOES_NOT_FIT, message, needs_change: !short.once_idle })
}

fn rolling(message: String) -> Obstacle {
    Obstacle::passing(reason::ROLLING_OUT, message)
}

/// Why the Deployment cannot make pods: a quota, Pod Security, a missing service account.
fn replica_failure(deployment: Option<&Deployment>) -> Option<&str> {
    let conditions = deployment?.status.as_ref()?.conditions.as_ref()?;
    let failure = conditions.iter().find(|c| c.type_ == "ReplicaFailure" && c.status == "True")?;
    failure.message.as_deref()
}

/// At most three names.
fn list(names: &[&str]) -> String {
    match names {
        [a, b, c, rest @ ..] if !rest.is_empty() => format!("{a}, {b}, {c} and {} more", rest.len()),
        _ => names.join(", "),
    }
}

/// How far the artifacts of one group are, on all workers that were asked.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Artifacts {
    /// Whether any worker was asked.
    pub asked: bool,
    /// Why the base cannot be served.
    pub base_failed: Option<(FailureReason, String)>,
    /// Whether the base can be served by every worker.
    pub base_ready: bool,
    /// Lenses that some worker cannot serve, with what the first such worker says.
    pub failed: BTreeMap<String, (FailureReason, String)>,
    /// Lenses that every worker can serve.
    pub ready: usize,
    /// Lenses that are neither.
    pub pending: Vec<String>,
}

/// Judges the base and the lenses of the group that clients call `group`, by these reports.
pub fn artifacts<'a>(
    group: &str,
    lenses: impl IntoIterator<Item = &'a str>,
    reports: &[Arc<WorkerReport>],
) -> Artifacts {
    let mut found =
        Artifacts { asked: !reports.is_empty(), base_ready: !reports.is_empty(), ..Artifacts::default() };
    for report in reports {
        match report.base_of(group).map(|b| &b.state) {
            Some(ArtifactState::Failed { reason, message, .. }) => {
                found.base_failed.get_or_insert_with(|| (*reason, message.clone()));
                found.base_ready = false;
            }
            Some(state) => found.base_ready &= state.is_ready(),
            None => found.base_ready = false,
        }
    }
    for lens in lenses {
        let states: Vec<_> = reports.iter().map(|r| r.lens(group, lens).map(|l| &l.state)).collect();
        let failure = states.iter().find_map(|s| match s {
            Some(ArtifactState::Failed { reason, message, .. }) => Some((*reason, message.clone())),
            _ => None,
        });
        if let Some(failure) = failure {
            found.failed.insert(lens.to_owned(), failure);
        } else if !states.is_empty() && states.iter().all(|s| s.is_some_and(ArtifactState::is_ready)) {
            found.ready += 1;
        } else {
            found.pending.push(lens.to_owned());
        }
    }
    found
}

impl Artifacts {
    /// The greatest thing in the way of serving all of them.
    pub fn obstacle(&self, group: &str) -> Option<Obstacle> {
        if let Some((reason, message)) = &self.base_failed {
            let message = format!("the base of group `{group}` cannot be served: {reason}: {message}");
            return Some(Obstacle {
                reason: reason::BASE_FAILED,
                message,
                needs_change: reason.needs_change(),
            });
        }
        let pending = !self.base_ready || !self.pending.is_empty();
        if !self.failed.is_empty() {
            let named: Vec<_> = self
                .failed
                .iter()
                .take(3)
                .map(|(lens, (why, says))| format!("`{lens}`: {why}: {says}"))
                .collect();
            let more = match self.failed.len() - named.len() {
                0 => String::new(),
                more => format!(", and {more} more"),
            };
            let total = self.failed.len() + self.ready + self.pending.len();
            return Some(Obstacle {
                reason: reason::LENSES_FAILED,
                message: format!(
                    "{} of {total} lenses of group `{group}` cannot be served: {}{more}",
                    self.failed.len(),
                    named.join("; ")
                ),
                needs_change: !pending && self.failed.values().all(|(reason, _)| reason.needs_change()),
            });
        }
        if !self.base_ready {
            return Some(Obstacle::passing(
                reason::LOADING,
                format!("the base of group `{group}` is being loaded"),
            ));
        }
        let pending: Vec<_> = self.pending.iter().map(String::as_str).collect();
        (!pending.is_empty()).then(|| {
            let message = format!("lenses of group `{group}` are being checked: {}", list(&pending));
            Obstacle::passing(reason::LOADING, message)
        })
    }
}
