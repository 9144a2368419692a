//! Which worker answers a request: pure. Filter, score, order.
//!
//! A worker can take a request when its state stream is up, it is ready, not draining, and its own
//! report knows the base and the lens and does not call them failed. Of those, the smallest
//! [`Score`] is best. What this gateway has sent and has not been answered ([`InFlight`]) counts
//! as if the worker had already reported it; so a burst of requests over another base makes *one* worker
//! switch, and the requests over the base it leaves go elsewhere. That is how two workers and
//! two bases settle into one base each.

use std::{cmp::Reverse, collections::BTreeMap, time::Duration};

use turret_crds::{
    ModelName, WorkerReport, assign,
    condition::FailureReason,
    document::BaseKey,
    report::{ArtifactState, Tier},
};

use crate::fleet::{Worker, WorkerId};

/// Time since the gateway started.
pub type Moment = Duration;

/// How well a worker suits a request; the smallest is best, and the order of the fields is the
/// order of what matters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Score<'a> {
    /// Whether the base is active there.
    pub base: BaseRank,
    /// Where a switch is needed: whether it is advised to prefer another base.
    pub switch: SwitchRank,
    /// Where the base is held: a base parked in memory is soon active.
    pub base_tier: Reverse<Tier>,
    /// How full it is, in steps of [`CROWD`] requests: loading a lens a second time (milliseconds) is better than
    /// letting one worker answer everybody who wants a popular lens.
    pub crowd: u32,
    /// Whether the lens is usable there, or soon will be: who holds it answers, whoever it is assigned to by now.
    pub reach: Reach,
    /// Whom the operator assigned the lens to: of those who hold it, and of those who would have to load it. So several
    /// gateways pull in one direction, and the lens comes where it is to stay.
    pub advice: AdviceRank,
    /// Where the lens is held.
    pub lens: LensRank,
    /// Requests it has: the larger of what it reports and of what this gateway has sent, since
    /// the first lags behind and the second does not see other gateways.
    pub queue: u32,
    /// A hash of worker and lens (of worker and base, where a switch is needed): spreads lenses over
    /// equal workers, and several gateways choose alike without talking. The operator assigns by the same.
    pub affinity: Reverse<u64>,
    /// The worker.
    pub id: &'a WorkerId,
}

/// Requests that make a worker one step more crowded.
pub const CROWD: u32 = 16;

/// What a request's base is on a worker, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum BaseRank {
    /// Active, and nobody asks for another.
    Active,
    /// Being switched to, or asked for by requests on their way.
    Coming,
    /// Active, but about to leave.
    Leaving,
    /// Another base is active, without rows.
    OtherIdle,
    /// Another base is active and busy.
    OtherBusy,
}

/// What a worker is advised to do with its base, where a request needs another one to be active; best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SwitchRank {
    /// To prefer the request's. Also where nothing is to be switched.
    Wanted,
    /// Nothing.
    Free,
    /// To prefer another one.
    Unwanted,
}

/// Whether a request's lens is near on a worker, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reach {
    /// Usable at once.
    Here,
    /// On its way.
    Coming,
    /// It has to be loaded.
    Away,
}

/// What a worker is advised to hold of what a request needs, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum AdviceRank {
    /// The lens.
    Lens,
    /// The base.
    Base,
    /// Neither.
    Nothing,
}

/// What a request's lens is on a worker, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum LensRank {
    /// Usable at once. Also the bare base.
    Device,
    /// On its way to the device, or asked for by requests on their way.
    Arriving,
    /// In host memory.
    Host,
    /// On disk.
    Disk,
    /// At its source.
    Remote,
    /// Its files are still being checked.
    Resolving,
}

/// What this gateway has sent to each worker and has not been answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InFlight {
    workers: BTreeMap<WorkerId, WorkerLoad>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct WorkerLoad {
    total: u32,
    bases: BTreeMap<BaseKey, u32>,
    models: BTreeMap<ModelName, u32>,
}

impl InFlight {
    /// Notes a request.
    pub fn add(&mut self, worker: &WorkerId, base: &BaseKey, model: &ModelName) {
        let load = self.workers.entry(worker.clone()).or_default();
        load.total += 1;
        *load.bases.entry(base.clone()).or_default() += 1;
        *load.models.entry(model.clone()).or_default() += 1;
    }

    /// Forgets a request that was noted.
    pub fn remove(&mut self, worker: &WorkerId, base: &BaseKey, model: &ModelName) {
        let Some(load) = self.workers.get_mut(worker) else { return };
        load.total = load.total.saturating_sub(1);
        lower(&mut load.bases, base);
        lower(&mut load.models, model);
        if load.total == 0 {
            self.workers.remove(worker);
        }
    }

    /// How many there are in all.
    pub fn total(&self) -> u32 {
        self.workers.values().map(|w| w.total).sum()
    }
}

fn lower<K: Ord>(counts: &mut BTreeMap<K, u32>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

/// Workers that refused one request, and until when they are not asked again.
#[derive(Clone, Debug, Default)]
pub struct Refusals(Vec<Refusal>);

#[derive(Clone, Debug)]
struct Refusal {
    worker: WorkerId,
    until: Moment,
    phase: Phase,
}

/// What must change on a worker for its refusal to be worth nothing any more.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Phase {
    instance: String,
    ready: bool,
    active: Option<BaseKey>,
    switching_to: Option<BaseKey>,
    document: u64,
}

fn phase<A>(worker: &Worker<A>) -> Option<Phase> {
    let report = worker.believed()?;
    Some(Phase {
        instance: report.worker.instance.clone(),
        ready: report.state.ready,
        active: report.state.active_base.clone(),
        switching_to: report.state.switch.as_ref().map(|switch| switch.to.clone()),
        document: report.state.document.as_ref().map_or(0, |d| d.sequence),
    })
}

impl Refusals {
    /// Notes that a worker refused. It counts until `until`, or until the worker's phase changes.
    pub fn add<A>(&mut self, worker: &Worker<A>, until: Moment) {
        self.0.retain(|r| r.worker != worker.endpoint.id);
        if let Some(phase) = phase(worker) {
            self.0.push(Refusal { worker: worker.endpoint.id.clone(), until, phase });
        }
    }

    /// Whether a worker's refusal still counts.
    pub fn refuses<A>(&self, worker: &Worker<A>, now: Moment) -> bool {
        self.0.iter().any(|r| {
            r.worker == worker.endpoint.id && r.until > now && phase(worker).as_ref() == Some(&r.phase)
        })
    }

    /// When the first refusal that still counts ends by itself.
    pub fn next_end(&self, now: Moment) -> Option<Moment> {
        self.0.iter().map(|r| r.until).filter(|until| *until > now).min()
    }
}

/// Why no worker can take a request now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unserved {
    /// The gateway has just started and has not read what is served.
    #[error("what is served has not been read yet")]
    Unread,
    /// There is none.
    #[error("no worker is running for it yet")]
    NoWorker,
    /// The placements want none.
    #[error("its placement wants no worker (spec.replicas is 0)")]
    ScaledToZero,
    /// There are workers, and none of them answers.
    #[error("its workers cannot be reached")]
    Unreachable,
    /// Workers start or leave.
    #[error("its workers are not ready yet")]
    Starting,
    /// It is declared, but no worker has been told yet.
    #[error("it is declared, but no worker has taken it up yet")]
    OnItsWay,
    /// All that could serve it refused for the moment.
    #[error("all of its workers refuse for the moment")]
    Refused,
    /// Every worker says that it cannot be served.
    #[error("{what} cannot be served: {reason}: {message}")]
    Failed {
        /// ``the lens `group:lens` `` or ``the base of `group` ``.
        what: String,
        /// For machines.
        reason: FailureReason,
        /// For people.
        message: String,
        /// Seconds since the epoch when a worker tries again.
        retry_at: Option<u64>,
    },
}

/// A worker that can take the request.
#[derive(Clone, Debug)]
pub struct Choice<'a, A> {
    /// The worker.
    pub worker: &'a Worker<A>,
    /// The base that answers.
    pub base: &'a BaseKey,
    /// Why it is where it is in the order.
    pub score: Score<'a>,
}

enum Verdict<'a, A> {
    Serves(Choice<'a, A>),
    Silent,
    NotReady,
    Unknown,
    Refused,
    Failed(Unserved),
}

/// Orders the workers that can take a request, best first; or says why none can.
pub fn pick<'a, A: 'a>(
    model: &ModelName,
    workers: impl IntoIterator<Item = &'a Worker<A>>,
    in_flight: &InFlight,
    refused: impl Fn(&Worker<A>) -> bool,
) -> Result<Vec<Choice<'a, A>>, Unserved> {
    let verdicts: Vec<Verdict<'a, A>> = workers
        .into_iter()
        .map(|worker| match judge(model, worker, in_flight) {
            Verdict::Serves(_) if refused(worker) => Verdict::Refused,
            verdict => verdict,
        })
        .collect();
    if verdicts.is_empty() {
        return Err(Unserved::NoWorker);
    }
    let any = |wanted: fn(&Verdict<'a, A>) -> bool| verdicts.iter().any(wanted);
    // What may yet become good goes before what has failed; a worker that never spoke does not.
    let unserved = if any(|v| matches!(v, Verdict::Refused)) {
        Some(Unserved::Refused)
    } else if any(|v| matches!(v, Verdict::NotReady)) {
        Some(Unserved::Starting)
    } else if any(|v| matches!(v, Verdict::Unknown)) {
        Some(Unserved::OnItsWay)
    } else {
        None
    };
    let mut choices = Vec::new();
    let mut failed = None;
    for verdict in verdicts {
        match verdict {
            Verdict::Serves(choice) => choices.push(choice),
            Verdict::Failed(reason) if failed.is_none() => failed = Some(reason),
            _ => {}
        }
    }
    if choices.is_empty() {
        return Err(unserved.or(failed).unwrap_or(Unserved::Unreachable));
    }
    choices.sort_by(|a, b| a.score.cmp(&b.score));
    Ok(choices)
}

fn judge<'a, A>(model: &ModelName, worker: &'a Worker<A>, in_flight: &InFlight) -> Verdict<'a, A> {
    let Some(report) = worker.believed() else { return Verdict::Silent };
    let base = report.base_of(&model.group);
    let lens = model.lens.as_ref().map(|name| report.lens(&model.group, name));
    if let Some(base) = base
        && let ArtifactState::Failed { reason, message, retry_at } = &base.state
    {
        let what = format!("the base of `{}`", model.group);
        return failed(what, *reason, message, *retry_at);
    }
    if let Some(Some(lens)) = lens
        && let ArtifactState::Failed { reason, message, retry_at } = &lens.state
    {
        return failed(format!("the lens `{model}`"), *reason, message, *retry_at);
    }
    if !report.state.ready || report.state.draining {
        return Verdict::NotReady;
    }
    let Some(base) = base else { return Verdict::Unknown };
    let lens = match lens {
        Some(None) => return Verdict::Unknown,
        Some(Some(lens)) => Some(lens),
        None => None,
    };
    let id = &worker.endpoint.id;
    let load = in_flight.workers.get(id);
    let base_rank = base_rank(report, &base.key, load);
    let spread = match base_rank {
        BaseRank::OtherIdle | BaseRank::OtherBusy => base.key.0.clone(),
        _ => model.to_string(),
    };
    let reported = report.state.running_rows.saturating_add(report.state.waiting_rows);
    let queue = reported.max(load.map_or(0, |l| l.total));
    let lens_rank = match lens {
        None => LensRank::Device,
        Some(lens) => lens_rank(&lens.state, lens.tier, load.is_some_and(|l| l.models.contains_key(model))),
    };
    let preferred = report.state.preferred_base.as_ref();
    let score = Score {
        base: base_rank,
        switch: switch_rank(base_rank, preferred, &base.key),
        base_tier: Reverse(base.tier),
        crowd: queue / CROWD,
        reach: match lens_rank {
            LensRank::Device => Reach::Here,
            LensRank::Arriving => Reach::Coming,
            LensRank::Host | LensRank::Disk | LensRank::Remote | LensRank::Resolving => Reach::Away,
        },
        advice: match lens {
            Some(lens) if lens.assigned => AdviceRank::Lens,
            _ if preferred == Some(&base.key) => AdviceRank::Base,
            _ => AdviceRank::Nothing,
        },
        lens: lens_rank,
        queue,
        affinity: Reverse(assign::affinity(&spread, &report.worker.name)),
        id,
    };
    Verdict::Serves(Choice { worker, base: &base.key, score })
}

fn failed<'a, A>(
    what: String,
    reason: FailureReason,
    message: &str,
    retry_at: Option<u64>,
) -> Verdict<'a, A> {
    Verdict::Failed(Unserved::Failed { what, reason, message: message.to_owned(), retry_at })
}

fn base_rank(report: &WorkerReport, wanted: &BaseKey, load: Option<&WorkerLoad>) -> BaseRank {
    let state = &report.state;
    let asked_for = |base: &BaseKey| load.is_some_and(|l| l.bases.contains_key(base));
    let others_asked_for = load.is_some_and(|l| l.bases.keys().any(|b| b != wanted));
    let is_active = state.active_base.as_ref() == Some(wanted);
    match state.switch.as_ref().map(|switch| &switch.to) {
        Some(next) if next == wanted => BaseRank::Coming,
        Some(_) if is_active => BaseRank::Leaving,
        None if is_active && !others_asked_for => BaseRank::Active,
        None if is_active => BaseRank::Leaving,
        _ if asked_for(wanted) => BaseRank::Coming,
        _ if state.running_rows == 0 && state.waiting_rows == 0 && load.is_none() => BaseRank::OtherIdle,
        _ => BaseRank::OtherBusy,
    }
}

fn switch_rank(rank: BaseRank, preferred: Option<&BaseKey>, wanted: &BaseKey) -> SwitchRank {
    match (rank, preferred) {
        (BaseRank::Active | BaseRank::Coming | BaseRank::Leaving, _) => SwitchRank::Wanted,
        (BaseRank::OtherIdle | BaseRank::OtherBusy, Some(base)) if base == wanted => SwitchRank::Wanted,
        (BaseRank::OtherIdle | BaseRank::OtherBusy, Some(_)) => SwitchRank::Unwanted,
        (BaseRank::OtherIdle | BaseRank::OtherBusy, None) => SwitchRank::Free,
    }
}

fn lens_rank(state: &ArtifactState, tier: Tier, asked_for: bool) -> LensRank {
    match (state, tier) {
        (_, Tier::Device) => LensRank::Device,
        (ArtifactState::Loading { .. }, _) => LensRank::Arriving,
        _ if asked_for => LensRank::Arriving,
        (ArtifactState::Resolving, _) => LensRank::Resolving,
        (_, Tier::Host) => LensRank::Host,
        (_, Tier::Disk) => LensRank::Disk,
        (_, Tier::Remote) => LensRank::Remote,
    }
}

#[cfg(test)]
#[path = "pick_tests.rs"]
mod tests;
