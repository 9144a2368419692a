//! What the workers say of themselves, gathered from their state streams.
//!
//! [`Fleet`] follows any number of workers, each by one task that reads `GET
//! /control/v1/state?watch=true` and reconnects when the stream ends. [`Fleet::snapshot`] is the one
//! value that controllers and gateway read. Nothing here needs Kubernetes: the caller says whom to
//! follow, and attaches to each worker whatever it wants to find there again.
//!
//! Invariants: a worker's report is exactly what its stream said last; a worker whose stream is
//! broken and cannot be opened again is [`Link::Lost`] and its report must not be believed any more
//! (a stream that reconnects at once is not noticed).

mod stream;

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::{Mutex, RwLock};
use tokio::{sync::Semaphore, task::AbortHandle};
use turret_crds::{WorkerReport, report::Change};

pub use stream::StreamError;

use crate::keys::TokenSource;

/// Names a worker among all that are followed: `namespace/pod`, or a URL without a cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub Arc<str>);

impl std::fmt::Display for WorkerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A worker to follow.
#[derive(Clone, Debug)]
pub struct Endpoint<A> {
    /// Its name.
    pub id: WorkerId,
    /// Base URL of its control port, without a trailing slash: `http://10.0.0.7:8081`.
    pub control_url: Arc<str>,
    /// The token it asks for.
    pub token: TokenSource,
    /// What the caller wants to find again in the snapshot.
    pub attached: A,
}

/// How the stream of a worker is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Link {
    /// Not yet opened.
    Connecting,
    /// Open.
    Open,
    /// Broken, with the reason.
    Lost(Arc<str>),
}

/// A worker as it is known.
#[derive(Clone, Debug)]
pub struct Worker<A> {
    /// Where it is.
    pub endpoint: Arc<Endpoint<A>>,
    /// How its stream is.
    pub link: Link,
    /// What it said last; `None` before its first word.
    pub report: Option<Arc<WorkerReport>>,
}

impl<A> Worker<A> {
    /// Its report, if it can be believed: the stream is open.
    pub fn believed(&self) -> Option<&Arc<WorkerReport>> {
        self.report.as_ref().filter(|_| self.link == Link::Open)
    }
}

/// All workers that are followed, by name.
pub type Snapshot<A> = BTreeMap<WorkerId, Worker<A>>;

/// What moved on a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moved {
    /// Only what moves with traffic: rows, bytes, counters, tiers, which base is active.
    Traffic,
    /// What it holds or whether it serves: its document, readiness, bases, lenses.
    Holdings,
    /// It came, went, answers again or no longer answers.
    Link,
}

/// Workers whose first reports are read at the same time, where nobody says otherwise. Each may be megabytes, and after a start
/// thousands of workers have one to give.
pub const FIRST_REPORTS_AT_ONCE: usize = 64;

type OnChange<A> = dyn Fn(&Endpoint<A>, Moved) + Send + Sync;

/// The task that follows each worker, and where it does.
type Tasks<A> = BTreeMap<WorkerId, (Arc<Endpoint<A>>, AbortHandle)>;

/// Follows workers.
pub struct Fleet<A> {
    shared: Arc<Shared<A>>,
    tasks: Mutex<Tasks<A>>,
    http: reqwest::Client,
    /// One place for each first report that is being read.
    first_reports: Arc<Semaphore>,
}

struct Shared<A> {
    snapshot: RwLock<Arc<Snapshot<A>>>,
    on_change: Box<OnChange<A>>,
}

impl<A: Clone + PartialEq + Send + Sync + 'static> Fleet<A> {
    /// Follows nobody yet. `on_change` is called, outside of any lock, after the snapshot changed.
    pub fn new(
        http: reqwest::Client,
        on_change: impl Fn(&Endpoint<A>, Moved) + Send + Sync + 'static,
    ) -> Self {
        let shared = Shared { snapshot: RwLock::default(), on_change: Box::new(on_change) };
        let first_reports = Arc::new(Semaphore::new(FIRST_REPORTS_AT_ONCE));
        Self { shared: Arc::new(shared), tasks: Mutex::default(), http, first_reports }
    }

    /// Reads the first reports of at most so many workers at the same time; the others wait with their streams open.
    pub fn reading_at_once(mut self, most: usize) -> Self {
        self.first_reports = Arc::new(Semaphore::new(most.max(1)));
        self
    }

    /// All workers as they are known now. Cheap: a shared, immutable value.
    pub fn snapshot(&self) -> Arc<Snapshot<A>> {
        self.shared.snapshot.read().clone()
    }

    /// Follows exactly these workers from now on. One that is followed already at the same place
    /// goes on undisturbed; what is attached to it is replaced.
    pub fn follow_exactly(&self, endpoints: impl IntoIterator<Item = Endpoint<A>>) {
        let wanted: BTreeMap<WorkerId, Endpoint<A>> =
            endpoints.into_iter().map(|e| (e.id.clone(), e)).collect();
        let gone: Vec<WorkerId> =
            self.tasks.lock().keys().filter(|id| !wanted.contains_key(*id)).cloned().collect();
        for id in gone {
            self.forget(&id);
        }
        for endpoint in wanted.into_values() {
            self.follow(endpoint);
        }
    }

    /// Follows one more worker. Must be called within a tokio runtime.
    pub fn follow(&self, endpoint: Endpoint<A>) {
        let endpoint = Arc::new(endpoint);
        let id = endpoint.id.clone();
        let mut tasks = self.tasks.lock();
        if let Some((known, _)) = tasks.get_mut(&id)
            && same_place(known, &endpoint)
        {
            if known.attached == endpoint.attached {
                return;
            }
            *known = endpoint.clone();
            drop(tasks);
            self.shared.update(&id, |worker| worker.endpoint = endpoint.clone());
            (self.shared.on_change)(&endpoint, Moved::Link);
            return;
        }
        if let Some((_, task)) = tasks.remove(&id) {
            task.abort();
        }
        let worker = Worker { endpoint: endpoint.clone(), link: Link::Connecting, report: None };
        Arc::make_mut(&mut *self.shared.snapshot.write()).insert(id.clone(), worker);
        let follow = stream::follow(
            self.http.clone(),
            endpoint.clone(),
            Sink(self.shared.clone()),
            self.first_reports.clone(),
        );
        let task = tokio::spawn(follow);
        tasks.insert(id, (endpoint.clone(), task.abort_handle()));
        drop(tasks);
        (self.shared.on_change)(&endpoint, Moved::Link);
    }

    /// Follows a worker no longer.
    pub fn forget(&self, id: &WorkerId) {
        let Some((endpoint, task)) = self.tasks.lock().remove(id) else { return };
        task.abort();
        Arc::make_mut(&mut *self.shared.snapshot.write()).remove(id);
        (self.shared.on_change)(&endpoint, Moved::Link);
    }
}

impl<A> Drop for Fleet<A> {
    fn drop(&mut self) {
        for (_, task) in self.tasks.lock().values() {
            task.abort();
        }
    }
}

/// Whether both are the same worker at the same address, asked with the same kind of token.
fn same_place<A>(a: &Endpoint<A>, b: &Endpoint<A>) -> bool {
    let same_token = match (&a.token, &b.token) {
        (TokenSource::Open, TokenSource::Open) => true,
        (TokenSource::Static(a), TokenSource::Static(b)) => a == b,
        (
            TokenSource::Signed { signer: a, placement_uid: a_uid },
            TokenSource::Signed { signer: b, placement_uid: b_uid },
        ) => Arc::ptr_eq(a, b) && a_uid == b_uid,
        _ => false,
    };
    a.control_url == b.control_url && same_token
}

impl<A: Clone> Shared<A> {
    /// Changes a worker; returns its endpoint, with what is attached to it now. `None` when it is
    /// not followed any more.
    fn update(&self, id: &WorkerId, change: impl FnOnce(&mut Worker<A>)) -> Option<Arc<Endpoint<A>>> {
        let mut snapshot = self.snapshot.write();
        let worker = Arc::make_mut(&mut *snapshot).get_mut(id)?;
        change(worker);
        Some(worker.endpoint.clone())
    }
}

/// Where a stream writes what it hears.
struct Sink<A>(Arc<Shared<A>>);

impl<A: Clone> Sink<A> {
    fn opened(&self, id: &WorkerId, report: WorkerReport) {
        let mut moved = Moved::Link;
        let endpoint = self.0.update(id, |worker| {
            if worker.link == Link::Open {
                moved = Moved::Holdings;
            }
            worker.link = Link::Open;
            worker.report = Some(Arc::new(report));
        });
        self.tell(endpoint, moved);
    }

    fn changed(&self, id: &WorkerId, change: Change) {
        let mut moved = Moved::Traffic;
        let endpoint = self.0.update(id, |worker| {
            if let Some(report) = &mut worker.report {
                moved = what_moved(report, &change);
                Arc::make_mut(report).apply(change);
            }
        });
        self.tell(endpoint, moved);
    }

    fn lost(&self, id: &WorkerId, why: &str) {
        let mut is_new = false;
        let endpoint = self.0.update(id, |worker| {
            is_new = !matches!(worker.link, Link::Lost(_));
            worker.link = Link::Lost(why.into());
        });
        self.tell(endpoint.filter(|_| is_new), Moved::Link);
    }

    fn tell(&self, endpoint: Option<Arc<Endpoint<A>>>, moved: Moved) {
        if let Some(endpoint) = endpoint {
            (self.0.on_change)(&endpoint, moved);
        }
    }
}

/// Tells changes that matter to a status from those that come with every request.
fn what_moved(old: &WorkerReport, change: &Change) -> Moved {
    let state = change.state.as_ref().is_some_and(|new| {
        let old = &old.state;
        (&new.document, new.ready, new.draining) != (&old.document, old.ready, old.draining)
    });
    let bases = change.bases.iter().any(|new| {
        old.bases.iter().find(|b| b.key == new.key).is_none_or(|b| {
            (b.state.is_ready(), &b.digest, &b.groups, b.bytes)
                != (new.state.is_ready(), &new.digest, &new.groups, new.bytes)
                || !new.state.is_ready() && b.state != new.state
        })
    });
    let lenses = change.lenses.iter().any(|new| {
        old.lens(&new.group, &new.name).is_none_or(|l| {
            (l.state.is_ready(), &l.digest) != (new.state.is_ready(), &new.digest)
                || !new.state.is_ready() && l.state != new.state
        })
    });
    let removed = !change.removed_bases.is_empty() || !change.removed_lenses.is_empty();
    if state || bases || lenses || removed || change.aliases.is_some() {
        Moved::Holdings
    } else {
        Moved::Traffic
    }
}

#[cfg(test)]
mod tests;
