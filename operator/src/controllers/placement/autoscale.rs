//! How many workers a placement with `autoscaling` is to have. Pure.
//!
//! [`Past`] takes note of each load as it is heard; [`decide`] says how many workers it wants.
//!
//! - Up at once, to as many as the load takes, but in [`RAISE_WINDOW`] to no more than twice as many or four more:
//!   one wave of requests must not order a cluster.
//! - Down to the most that were wanted at any moment of the last `scaleDownDelaySeconds`, so that no worker leaves
//!   that a wave needs again. Between two waves that are closer to each other than that, nothing changes.
//! - The last one leaves when nobody asked for `scaleToZeroAfterSeconds`, and only while somebody is heard who can
//!   wake the first one again.
//!
//! What is remembered is lost with the process, and nothing is lost by that: the next one begins with the workers that
//! there are as if they had been needed until then, so it removes none sooner.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Duration,
};

use turret_crds::placement::Autoscaling;

/// Time since the operator started.
pub type Moment = Duration;

/// Within this time the number of workers at most doubles, or grows by [`RAISE_BY`].
pub const RAISE_WINDOW: Duration = Duration::from_secs(15);
/// So many workers may always be added within [`RAISE_WINDOW`].
pub const RAISE_BY: i32 = 4;

/// What the spec allows and asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Fewest workers.
    pub min: i32,
    /// Most workers; not below `min`.
    pub max: i32,
    /// Requests that one worker is there for; at least 1.
    pub target: u32,
    /// When the last worker leaves.
    pub to_zero_after: Duration,
    /// When workers leave.
    pub down_after: Duration,
}

impl Limits {
    /// As the spec says, with its defaults.
    pub fn of(autoscaling: &Autoscaling) -> Self {
        let seconds = |number: i32| Duration::from_secs(u64::try_from(number).unwrap_or(0));
        let min = autoscaling.min_replicas.max(0);
        Self {
            min,
            max: autoscaling.max_replicas.max(min),
            target: u32::try_from(autoscaling.target_running_per_replica()).unwrap_or(1).max(1),
            to_zero_after: seconds(autoscaling.scale_to_zero_after_seconds()),
            down_after: seconds(autoscaling.scale_down_delay_seconds()),
        }
    }

    /// Workers that so many requests take, whatever is allowed.
    fn workers_for(&self, requests: u32) -> i32 {
        i32::try_from(requests.div_ceil(self.target)).unwrap_or(i32::MAX)
    }
}

/// What is asked of a placement at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Rows that workers compute, and requests that wait on them.
    pub rows: u32,
    /// Requests that gateways hold.
    pub held: u32,
    /// Whether a worker that may have rows does not say so: then none leaves.
    pub is_silent: bool,
    /// Whether a gateway is heard, which could wake a first worker.
    pub can_wake: bool,
    /// Requests so far, by who counted them; a number that moves shows a request that was never seen running.
    pub counted: BTreeMap<String, u64>,
}

impl Load {
    fn requests(&self) -> u32 {
        self.rows.saturating_add(self.held)
    }
}

/// What was decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// Workers to have.
    pub replicas: i32,
    /// For a person.
    pub why: String,
    /// When to decide again, even if nothing is heard before.
    pub look_again: Option<Duration>,
}

/// What was heard and decided before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Past {
    /// Workers as decided last.
    replicas: i32,
    /// What was heard last.
    load: Load,
    /// Workers that this load takes.
    wanted: i32,
    /// Until when how many were wanted, oldest first; each less than the one before, since a smaller number that ended
    /// sooner never counts.
    wants: VecDeque<(Moment, i32)>,
    /// When how many were added.
    raises: VecDeque<(Moment, i32)>,
    /// When somebody asked last, as far as was heard.
    last_request: Moment,
}

impl Past {
    /// Begins with so many workers, as if they had been needed until now.
    pub fn begin(replicas: i32, now: Moment) -> Self {
        Self {
            replicas,
            load: Load::default(),
            wanted: replicas,
            wants: VecDeque::new(),
            raises: VecDeque::new(),
            last_request: now,
        }
    }

    /// Workers as decided last.
    pub fn replicas(&self) -> i32 {
        self.replicas
    }

    /// Takes note of a load.
    pub fn note(&mut self, limits: &Limits, load: Load, now: Moment) {
        let is_asked = |load: &Load| load.is_silent || load.requests() > 0;
        let moves = |(who, count): (&String, &u64)| load.counted.get(who).is_some_and(|new| new != count);
        let moved = self.load.counted.iter().any(moves);
        if moved || is_asked(&load) || is_asked(&self.load) {
            self.last_request = now;
        }
        let mut wanted = limits.workers_for(load.requests());
        if load.is_silent {
            wanted = wanted.max(self.replicas);
        }
        if wanted != self.wanted {
            while self.wants.back().is_some_and(|(_, earlier)| *earlier <= self.wanted) {
                self.wants.pop_back();
            }
            self.wants.push_back((now, self.wanted));
            self.wanted = wanted;
        }
        while self.wants.front().is_some_and(|(until, _)| now.saturating_sub(*until) >= limits.down_after) {
            self.wants.pop_front();
        }
        self.load = load;
    }

    /// Takes note of what was decided, and so will be carried out.
    pub fn settle(&mut self, replicas: i32, now: Moment) {
        self.raises.retain(|(at, _)| now.saturating_sub(*at) < RAISE_WINDOW);
        if replicas > self.replicas {
            self.raises.push_back((now, replicas - self.replicas));
        }
        self.replicas = replicas;
    }

    /// The most workers that may be had now, and when that may be more.
    fn most(&self, now: Moment) -> (i32, Option<Duration>) {
        let recent = || self.raises.iter().filter(move |(at, _)| now.saturating_sub(*at) < RAISE_WINDOW);
        let added: i32 = recent().map(|(_, added)| added).sum();
        let before = (self.replicas - added).max(0);
        let most = before.saturating_mul(2).max(before.saturating_add(RAISE_BY)).max(self.replicas);
        (most, recent().next().map(|(at, _)| (*at + RAISE_WINDOW).saturating_sub(now)))
    }

    /// The most workers that were wanted within the delay, and for how much longer that counts.
    fn recently_wanted(&self, limits: &Limits, now: Moment) -> Option<(i32, Duration)> {
        let counts = |until: Moment| (until + limits.down_after).saturating_sub(now);
        let mut wants = self.wants.iter().map(|(until, wanted)| (*wanted, counts(*until)));
        wants.find(|(_, left)| !left.is_zero())
    }
}

/// Decides how many workers there are to be, by what was heard until now.
pub fn decide(limits: &Limits, past: &Past, now: Moment) -> Decision {
    let (replicas, why, look_again) = if past.wanted.min(limits.max) > past.replicas {
        up(limits, past, now)
    } else {
        down(limits, past, now)
    };
    let within = replicas.max(limits.min).min(limits.max);
    let why =
        if within == replicas { why } else { format!("autoscaling allows {} to {}", limits.min, limits.max) };
    Decision { replicas: within, why, look_again }
}

type Step = (i32, String, Option<Duration>);

fn up(limits: &Limits, past: &Past, now: Moment) -> Step {
    let wanted = past.wanted.min(limits.max);
    let (most, more_in) = past.most(now);
    let why = format!(
        "{} requests run or wait on workers and {} at gateways, {} a worker",
        past.load.rows, past.load.held, limits.target
    );
    // What is added now counts for the whole window.
    (wanted.min(most), why, (most < wanted).then(|| more_in.unwrap_or(RAISE_WINDOW)))
}

fn down(limits: &Limits, past: &Past, now: Moment) -> Step {
    if past.replicas == 0 {
        return (0, "nobody asks".into(), None);
    }
    let recent = past.recently_wanted(limits, now);
    let recently = recent.map_or(0, |(wanted, _)| wanted);
    let kept = past.replicas.min(past.wanted.max(recently).max(1));
    let fewer_in = recent.filter(|_| kept > past.wanted.max(1)).map(|(_, left)| left);
    if kept == 1 && limits.min == 0 && past.load.requests() == 0 && past.load.can_wake {
        let left = (past.last_request + limits.to_zero_after).saturating_sub(now);
        if left.is_zero() {
            let why = format!("nobody asked for {} s", limits.to_zero_after.as_secs());
            return (0, why, None);
        }
        return (1, one_is_enough(limits), Some(left));
    }
    let why = if kept == 1 {
        one_is_enough(limits)
    } else {
        format!("{kept} workers were enough for {} s", limits.down_after.as_secs())
    };
    (kept, why, fewer_in)
}

fn one_is_enough(limits: &Limits) -> String {
    format!("1 worker was enough for {} s", limits.down_after.as_secs())
}

#[cfg(test)]
#[path = "autoscale_tests.rs"]
mod tests;
