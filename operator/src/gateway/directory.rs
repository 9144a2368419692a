//! What is declared and what the workers say, in one place: the two things a request is routed by.
//!
//! A [`View`] is both at one moment, immutable and cheap to take. Whenever either changes the
//! version moves, which is what held requests wait for.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, RwLock};
use tokio::{sync::watch, time::Instant};
use turret_crds::alias::{Asker, WeightedLens, choose};

use super::{
    aliases,
    catalog::{Catalog, Namespace, Target},
    pick::{self, Choice, InFlight, Unserved},
};
use crate::fleet::{Endpoint, Fleet, Link, Moved, Snapshot, Worker};

/// Where a worker belongs and takes requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Namespace of its placement.
    pub namespace: Arc<str>,
    /// Its placement.
    pub placement: Arc<str>,
    /// Base URL of its data port, without a trailing slash.
    pub data_url: Arc<str>,
}

/// Name of the one placement that workers given by URL form.
pub const STATIC_PLACEMENT: &str = "workers";

/// How long a name may be declared and yet unknown to the workers, or unknown to a gateway that
/// has not heard all of its workers, before it is refused.
pub const NEWS_GRACE: Duration = Duration::from_secs(30);

/// What is declared, and what the workers say.
pub struct Directory {
    source: Source,
    fleet: Fleet<Place>,
    version: watch::Sender<u64>,
    started: Instant,
}

enum Source {
    /// From the Kubernetes API.
    Declared(RwLock<Arc<Catalog>>),
    /// From the workers' own reports, gathered again when one of them holds something else.
    Reported { namespace: Arc<str>, holdings: Arc<AtomicU64>, gathered: Mutex<(u64, Arc<Catalog>)> },
}

impl Directory {
    /// A directory of what the Kubernetes API declares; [`Self::declare`] fills it.
    pub fn declared(http: reqwest::Client) -> Self {
        Self::new(http, |_| Source::Declared(RwLock::default()))
    }

    /// A directory of what workers report, as the only namespace there is.
    pub fn reported(http: reqwest::Client, namespace: &str) -> Self {
        Self::new(http, |holdings| Source::Reported {
            namespace: namespace.into(),
            holdings,
            gathered: Mutex::default(),
        })
    }

    fn new(http: reqwest::Client, source: impl FnOnce(Arc<AtomicU64>) -> Source) -> Self {
        let version = watch::Sender::new(0);
        let holdings = Arc::new(AtomicU64::new(1));
        let (moved, moved_holdings) = (version.clone(), holdings.clone());
        let fleet = Fleet::new(http, move |_, what| {
            if what > Moved::Traffic {
                moved_holdings.fetch_add(1, Ordering::Release);
            }
            moved.send_modify(|v| *v += 1);
        });
        Self { source: source(holdings), fleet, version, started: Instant::now() }
    }

    /// Replaces what is declared.
    pub fn declare(&self, catalog: Catalog) {
        if let Source::Declared(declared) = &self.source {
            *declared.write() = Arc::new(catalog);
            self.version.send_modify(|v| *v += 1);
        }
    }

    /// How many workers' state streams are open.
    pub fn open_streams(&self) -> u64 {
        self.fleet.snapshot().values().filter(|w| w.link == Link::Open).count() as u64
    }

    /// Follows exactly these workers.
    pub fn follow(&self, endpoints: impl IntoIterator<Item = Endpoint<Place>>) {
        self.fleet.follow_exactly(endpoints);
    }

    /// A number that moves whenever anything does.
    pub fn version(&self) -> u64 {
        *self.version.borrow()
    }

    /// Wakes whenever anything moves.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Everything as it is now.
    pub fn view(&self) -> View {
        let catalog = match &self.source {
            Source::Declared(catalog) => catalog.read().clone(),
            Source::Reported { namespace, holdings, gathered } => {
                let mut gathered = gathered.lock();
                let now = holdings.load(Ordering::Acquire);
                if gathered.0 != now {
                    *gathered = (now, Arc::new(gather(namespace, &self.fleet.snapshot())));
                }
                // One worker that never spoke must not keep every wrong name waiting; while none
                // has, nothing can be said to not exist.
                let is_late = !gathered.1.complete && self.started.elapsed() >= NEWS_GRACE;
                if is_late && self.fleet.snapshot().values().any(|w| w.report.is_some()) {
                    Arc::make_mut(&mut gathered.1).complete = true;
                }
                gathered.1.clone()
            }
        };
        View { catalog, workers: self.fleet.snapshot() }
    }
}

/// The catalog of workers that nobody declared. Complete once each has spoken; a worker that is
/// lost keeps its names, so that requests for them wait for its return.
fn gather(namespace: &str, workers: &Snapshot<Place>) -> Catalog {
    let reports = workers.values().filter_map(|w| w.report.as_deref());
    let reported = Namespace::reported(STATIC_PLACEMENT, reports);
    Catalog {
        namespaces: [(namespace.to_owned(), Arc::new(reported))].into(),
        complete: workers.values().all(|w| w.report.is_some()),
    }
}

/// The directory at one moment.
#[derive(Clone)]
pub struct View {
    /// What there is to ask for.
    pub catalog: Arc<Catalog>,
    /// Who could answer.
    pub workers: Arc<Snapshot<Place>>,
}

impl View {
    /// The workers of some placements of a namespace; `placements` is sorted.
    pub fn workers_of<'a>(
        &'a self,
        namespace: &'a str,
        placements: &'a [String],
    ) -> impl Iterator<Item = &'a Worker<Place>> {
        self.workers.values().filter(move |worker| {
            let place = &worker.endpoint.attached;
            &*place.namespace == namespace
                && placements.binary_search_by(|p| p.as_str().cmp(&place.placement)).is_ok()
        })
    }

    /// Where an alias leads at the moment; `None` for what is no alias.
    pub fn targets(&self, named: &Target) -> Option<Vec<WeightedLens>> {
        let (_, group) = self.catalog.group(named)?;
        let alias = named.model.lens.as_deref()?;
        let declared = group.aliases.get(alias)?;
        let reported = self.workers_of(&named.namespace, &group.placements).filter_map(|worker| {
            let report = worker.believed().filter(|report| !report.state.draining)?;
            Some(report.alias(&named.model.group, alias)?.targets.as_slice())
        });
        Some(aliases::current(declared, |lens| group.lenses.contains_key(lens), reported))
    }

    /// What answers this asker when they name something: where an alias leads, or just that.
    pub fn lead(&self, mut named: Target, asker: Asker) -> Target {
        let Some(targets) = self.targets(&named) else { return named };
        let alias = named.model.lens.as_deref().unwrap_or_default();
        if let Some(lens) = choose(&targets, asker.draw(&named.model.group, alias)) {
            named.model.lens = Some(lens.to_owned());
        }
        named
    }

    /// Orders the workers that can take a request, best first.
    pub fn pick<'a>(
        &'a self,
        target: &'a Target,
        in_flight: &InFlight,
        refused: impl Fn(&Worker<Place>) -> bool,
    ) -> Result<Vec<Choice<'a, Place>>, Unserved> {
        let Some((namespace, group)) = self.catalog.group(target) else { return Err(Unserved::NoWorker) };
        let workers = self.workers_of(&target.namespace, &group.placements);
        match pick::pick(&target.model, workers, in_flight, refused) {
            Err(Unserved::NoWorker) if namespace.is_scaled_to_zero(&target.model.group) => {
                Err(Unserved::ScaledToZero)
            }
            picked => picked,
        }
    }
}
