//! Holds requests until something changes: the task around [`HoldQueue`].

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{
    sync::{Notify, oneshot, watch},
    time::Instant,
};
use turret_crds::alias::Asker;

use super::{
    catalog::{ResolveError, Scope, Target},
    directory::{Directory, View},
    hold::{Entry, HoldQueue, Ticket},
    metrics::{HoldEnd, Metrics},
    pick::{InFlight, Moment, Refusals, Unserved},
};

/// What a request asks for, in its own words: what that means may change while it waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask {
    /// The namespace it names.
    pub namespace: Option<String>,
    /// Its `model`.
    pub model: Option<String>,
    /// Who asks.
    pub asker: Asker,
}

impl Ask {
    /// What it means now; where its alias leads, if it names one.
    pub fn resolve(&self, view: &View) -> Result<Target, ResolveError> {
        let named = view.catalog.resolve(scope(self.namespace.as_deref()), self.model.as_deref())?;
        Ok(view.lead(named, self.asker))
    }
}

/// Where to look for what a request names, by the namespace that it names.
pub fn scope(namespace: Option<&str>) -> Scope<'_> {
    namespace.map_or(Scope::Anywhere, Scope::Namespace)
}

/// Lines form by namespace and group.
pub type Line = (String, String);

struct Waiter {
    ask: Ask,
    refusals: Refusals,
    reply: oneshot::Sender<Outcome>,
}

/// Why a wait ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Look again: something changed.
    Go,
    /// The deadline has come.
    Expired,
    /// There is no place to wait.
    Full,
    /// The gateway stops.
    Stopping,
}

/// Time since the gateway started.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Clock {
    /// Starts now.
    pub fn start() -> Self {
        Self(Instant::now())
    }

    /// The time.
    pub fn now(self) -> Moment {
        self.0.elapsed()
    }
}

/// The requests that wait.
pub struct Waiting {
    queue: Mutex<HoldQueue<Line, Waiter>>,
    wake: Notify,
    /// Set once, before the last are sent away.
    is_stopping: AtomicBool,
    clock: Clock,
    metrics: Arc<Metrics>,
    /// Moves whenever other requests wait than before.
    moved: watch::Sender<u64>,
}

/// Takes a waiter out when its request is dropped, which is when its client leaves.
struct Place<'a> {
    waiting: &'a Waiting,
    line: Line,
    ticket: Ticket,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut queue = self.waiting.queue.lock();
        if queue.cancel(&self.line, self.ticket).is_some() {
            self.waiting.metrics.hold_ended(HoldEnd::Cancelled);
        }
        self.waiting.gauge(&queue);
    }
}

impl Waiting {
    /// Nobody waits yet; at most `limit` may.
    pub fn new(limit: usize, clock: Clock, metrics: Arc<Metrics>) -> Self {
        Self {
            queue: Mutex::new(HoldQueue::new(limit)),
            wake: Notify::new(),
            is_stopping: AtomicBool::new(false),
            clock,
            metrics,
            moved: watch::Sender::new(0),
        }
    }

    /// How many wait in each line.
    pub fn lengths(&self) -> Vec<(Line, usize)> {
        self.queue.lock().lengths().map(|(line, length)| (line.clone(), length)).collect()
    }

    /// Wakes whenever other requests wait than before.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.moved.subscribe()
    }

    fn gauge(&self, queue: &HoldQueue<Line, Waiter>) {
        self.moved.send_modify(|version| *version += 1);
        self.metrics.held.set(i64::try_from(queue.len()).unwrap_or(i64::MAX));
    }

    /// Waits until the request may be tried again, or `deadline`. `seen` is the version of the
    /// directory by which it was decided to wait.
    pub async fn wait(
        &self,
        line: Line,
        (ask, refusals): (&Ask, &Refusals),
        deadline: Moment,
        (directory, seen): (&Directory, u64),
    ) -> Outcome {
        let (reply, outcome) = oneshot::channel();
        let waiter = Waiter { ask: ask.clone(), refusals: refusals.clone(), reply };
        let place = {
            let mut queue = self.queue.lock();
            if self.is_stopping.load(Ordering::Acquire) {
                return Outcome::Stopping;
            }
            let entry = queue.hold(line.clone(), deadline, waiter);
            self.gauge(&queue);
            let (ticket, displaced) = match entry {
                Entry::Held(ticket) => (ticket, None),
                Entry::HeldInstead(ticket, displaced) => (ticket, Some(displaced)),
                Entry::Full(_) => {
                    self.metrics.hold_ended(HoldEnd::Refused);
                    return Outcome::Full;
                }
            };
            if let Some(displaced) = displaced {
                self.end([displaced], Outcome::Full, HoldEnd::Refused);
            }
            Place { waiting: self, line, ticket }
        };
        // The timer of the task may have to be set earlier, and what changed between the
        // decision and here woke nobody.
        if directory.version() != seen
            || refusals.next_end(self.clock.now()).is_some()
            || self.is_first(deadline)
        {
            self.wake.notify_one();
        }
        let outcome = outcome.await.unwrap_or(Outcome::Expired);
        drop(place);
        outcome
    }

    /// Sends everyone away: the gateway stops, and another may have more luck.
    pub fn send_away(&self) {
        self.is_stopping.store(true, Ordering::Release);
        let mut queue = self.queue.lock();
        let all = queue.let_go(|_, _| true);
        self.gauge(&queue);
        drop(queue);
        self.end(all, Outcome::Stopping, HoldEnd::Stopped);
    }

    /// A worker has finished a request, so one that waits for a place may have it.
    pub fn place_freed(&self) {
        if self.metrics.held.get() > 0 {
            self.wake.notify_one();
        }
    }

    fn is_first(&self, deadline: Moment) -> bool {
        self.queue.lock().next_deadline().is_some_and(|first| first >= deadline)
    }

    fn end(&self, waiters: impl IntoIterator<Item = Waiter>, outcome: Outcome, end: HoldEnd) {
        for waiter in waiters {
            self.metrics.hold_ended(end);
            // Nobody listens when the client left at this moment.
            let _ = waiter.reply.send(outcome);
        }
    }

    /// Lets requests go for as long as the gateway lives.
    pub async fn run(&self, directory: &Directory, in_flight: &Mutex<InFlight>) {
        let mut changes = directory.changes();
        loop {
            changes.mark_unchanged();
            let next = self.pass(&directory.view(), in_flight);
            let pause = next.map(|at| at.saturating_sub(self.clock.now()));
            tokio::select! {
                changed = changes.changed() => if changed.is_err() { return },
                () = self.wake.notified() => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// Lets go who can, and says when to look again if nothing changes before.
    fn pass(&self, view: &View, in_flight: &Mutex<InFlight>) -> Option<Moment> {
        let now = self.clock.now();
        let mut queue = self.queue.lock();
        if queue.is_empty() {
            return None;
        }
        let expired = queue.expire(now);
        // Those let go now are not in flight yet: count them, or all go to one worker's queue.
        let mut sent = in_flight.lock().clone();
        let gone = queue.let_go(|_, waiter| {
            let Ok(target) = waiter.ask.resolve(view) else { return view.catalog.complete };
            let limit = view.catalog.group(&target).map_or(0, |(ns, _)| ns.queue_limit(&target.model.group));
            match view.pick(&target, &sent, |worker| waiter.refusals.refuses(worker, now)) {
                Ok(choices) => {
                    let best = &choices[0];
                    let has_room = best.score.queue < limit;
                    if has_room {
                        sent.add(&best.worker.endpoint.id, best.base, &target.model);
                    }
                    has_room
                }
                Err(why) => is_hopeless(&why),
            }
        });
        self.gauge(&queue);
        let first_end = queue.iter().filter_map(|w| w.refusals.next_end(now)).min();
        let next = [queue.next_deadline(), first_end].into_iter().flatten().min();
        drop(queue);
        self.end(expired, Outcome::Expired, HoldEnd::Expired);
        self.end(gone, Outcome::Go, HoldEnd::LetGo);
        next
    }
}

/// Whether waiting cannot help.
pub fn is_hopeless(why: &Unserved) -> bool {
    matches!(why, Unserved::Failed { .. } | Unserved::ScaledToZero)
}

async fn sleep(pause: Option<Duration>) {
    match pause {
        Some(pause) => tokio::time::sleep(pause).await,
        None => std::future::pending().await,
    }
}
