//! Who is to hold what, and when that is published. Pure.
//!
//! [`assign()`](turret_crds::assign::assign) answers at every look. What it answers is published as hints when it differs
//! from what is published: at once with a document that is written anyway (lenses or bases came, changed or went), within
//! seconds when a worker came or went, and at most once a minute when only demand moved. Noise of demand gives the same
//! answer to the letter, so nothing is written in steady state.

use std::{
    collections::{BTreeSet, HashMap},
    time::Duration,
};

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use turret_crds::{
    Assignment, WorkerDocument, WorkerReport,
    assign::{Availability, BaseDemand, LensDemand, LensId, Situation, Spread, WorkerRoom, assign},
    document::{BaseKey, DocumentGroup},
    hints::Hints,
    report::{Tier, TierReport},
};

use super::demand::Averages;
use crate::controllers::assess::ObservedWorker;

/// What moves with demand is published at most this often.
const DEMAND_EVERY: SignedDuration = SignedDuration::from_secs(60);
/// Workers that come or go together, such as those of a new placement, are told of together.
const WORKERS_EVERY: SignedDuration = SignedDuration::from_secs(2);

/// What is known when hints are decided on.
pub struct Seen<'a> {
    /// What the workers are to serve.
    pub document: &'a WorkerDocument,
    /// Whether it is written now: hints then cost no write of their own.
    pub is_written: bool,
    /// On how many workers one lens may be.
    pub spread: Spread,
    /// Hash of the pod template that pods are made from now.
    pub template: Option<&'a str>,
    /// The workers.
    pub workers: &'a [ObservedWorker],
    /// How much is asked for.
    pub demand: &'a Averages,
    /// The hints that are published.
    pub published: Option<&'a Hints>,
}

/// What becomes of hints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Those that are published stay, or that there are none.
    Keep {
        /// When others may be published, if they are due.
        look_again: Option<Duration>,
    },
    /// These are published.
    Publish(Hints),
}

/// Decides which hints are published.
pub fn decide(seen: &Seen<'_>, now: Timestamp) -> Decision {
    if seen.published.is_some() && !seen.is_written && is_blind(seen.workers) {
        return Decision::Keep { look_again: None };
    }
    let previous = seen.published.map(Hints::previous).unwrap_or_default();
    let answer = assign(&situation(seen), &previous);
    let reported = seen.workers.iter().filter_map(|worker| worker.report.as_ref()?.state.hints_version);
    publish(seen.published, answer, reported.max().unwrap_or(0), seen.is_written, now)
}

/// Whether too little is known to tell anybody anything: of the workers that take requests one has not been asked yet, or
/// none answers. This is so for a moment after a start of the operator.
fn is_blind(workers: &[ObservedWorker]) -> bool {
    let takes_requests = |worker: &&ObservedWorker| worker.pod.counts() && worker.pod.ready;
    let mut ready = workers.iter().filter(takes_requests).peekable();
    let is_any = ready.peek().is_some();
    let (mut answers, mut unasked) = (false, false);
    for worker in ready {
        answers |= worker.report.is_some();
        unasked |= worker.report.is_none() && worker.lost.is_none();
    }
    is_any && (unasked || !answers)
}

/// Whether and when an answer is published. `reported` is the greatest version that a worker says it has: a ConfigMap that
/// was deleted must not take it back.
pub fn publish(
    published: Option<&Hints>,
    answer: Assignment,
    reported: u64,
    is_written: bool,
    now: Timestamp,
) -> Decision {
    let seconds = u64::try_from(now.as_second()).unwrap_or(0);
    let known = published.map_or(0, |hints| hints.version).max(reported);
    let next = Hints::of(answer, known + 1, seconds);
    let Some(published) = published else { return Decision::Publish(next) };
    let outrun = reported > published.version;
    if next.says_the_same(published) && !outrun {
        return Decision::Keep { look_again: None };
    }
    let same_workers = next.workers.keys().eq(published.workers.keys());
    let every = if same_workers && !outrun { DEMAND_EVERY } else { WORKERS_EVERY };
    let at =
        i64::try_from(published.published_at).ok().and_then(|second| Timestamp::from_second(second).ok());
    let due = at.and_then(|at| at.checked_add(every).ok());
    match due {
        // A time farther ahead than that was written before the clock was set back.
        Some(due) if !is_written && due > now && due.duration_since(now) <= every => {
            Decision::Keep { look_again: Some(due.duration_since(now).unsigned_abs()) }
        }
        _ => Decision::Publish(next),
    }
}

fn situation(seen: &Seen<'_>) -> Situation {
    let document = seen.document;
    let active = document.active_group.as_deref().and_then(|name| document.group(name));
    let active = active.map(|group| &group.base.key);
    let may_serve = |group: &&DocumentGroup| active.is_none_or(|key| group.base.key == *key);
    let groups: Vec<&DocumentGroup> = document.groups.iter().filter(may_serve).collect();
    let reports: Vec<&WorkerReport> =
        seen.workers.iter().filter_map(|worker| worker.report.as_deref()).collect();
    let bases: BTreeSet<&BaseKey> = groups.iter().map(|group| &group.base.key).collect();
    let base = |key: &BaseKey| BaseDemand { key: key.clone(), demand_millirows: seen.demand.of_base(key) };
    Situation {
        bases: bases.into_iter().map(base).collect(),
        default_base: document.default_group().map(|group| group.base.key.clone()),
        lenses: lenses(&groups, &bytes(&reports), seen.demand),
        workers: workers(seen, &reports),
        spread: seen.spread,
    }
}

/// Group and name of a lens.
type LensName<'a> = (&'a str, &'a str);

/// Bytes in device memory of each lens, as far as a worker knows.
fn bytes<'a>(reports: &[&'a WorkerReport]) -> HashMap<LensName<'a>, u64> {
    let mut most: HashMap<LensName<'a>, u64> = HashMap::new();
    for lens in reports.iter().copied().flat_map(|report| &report.lenses) {
        if let Some(bytes) = lens.bytes {
            let known = most.entry((lens.group.as_str(), lens.name.as_str())).or_default();
            *known = bytes.max(*known);
        }
    }
    most
}

fn lenses(
    groups: &[&DocumentGroup],
    bytes: &HashMap<LensName<'_>, u64>,
    demand: &Averages,
) -> Vec<LensDemand> {
    let all = groups.iter().flat_map(|group| group.lenses.iter().map(move |lens| (group, lens)));
    all.map(|(group, lens)| {
        let id = LensId::of(&group.name, &lens.name);
        LensDemand {
            demand_millirows: demand.of_lens(&id),
            id,
            base: group.base.key.clone(),
            bytes: bytes.get(&(group.name.as_str(), lens.name.as_str())).copied().unwrap_or(0),
            residency: lens.residency,
            priority: lens.priority,
        }
    })
    .collect()
}

/// Workers that run, and those that will soon: of a new placement all are told of together, before the first of them has
/// loaded what it would share with the others. One that has trouble gets nothing until it reports.
fn workers(seen: &Seen<'_>, reports: &[&WorkerReport]) -> Vec<WorkerRoom> {
    let (document, workers) = (seen.document, seen.workers);
    // While pods are replaced, the new ones warm up for all that the old ones will leave behind. Those go on with what they have.
    let is_newest = |worker: &ObservedWorker| worker.pod.template.as_deref() == seen.template;
    let replaces = workers.iter().any(|worker| worker.pod.counts() && is_newest(worker));
    let most = reports.iter().filter_map(|report| lens_budget(report)).max();
    // What one will have that has not said.
    let usual = document.memory.lens_bytes.or(most).unwrap_or(u64::MAX);
    let comes = |worker: &&ObservedWorker| worker.report.is_some() || worker.pod.trouble.is_none();
    let room = |worker: &ObservedWorker| {
        let report = worker.report.as_deref();
        let is_replaced = replaces && !is_newest(worker);
        let leaves =
            is_replaced || !worker.pod.counts() || report.is_some_and(|report| report.state.draining);
        WorkerRoom {
            name: worker.pod.name.clone(),
            lens_budget_bytes: report.and_then(lens_budget).unwrap_or(usual),
            weight: 1,
            availability: if leaves { Availability::Leaving } else { Availability::Available },
            active_base: report.and_then(|report| report.state.active_base.clone()),
        }
    };
    workers.iter().filter(comes).map(room).collect()
}

/// Bytes of device memory for lenses, as a worker says once it has a document.
fn lens_budget(report: &WorkerReport) -> Option<u64> {
    let device = |tier: &&TierReport| tier.tier == Tier::Device;
    report.state.document.as_ref()?;
    report.state.tiers.iter().find(device).map(|tier| tier.lens_budget_bytes)
}
