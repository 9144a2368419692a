//! What gateways tell the operator: for each placement with `autoscaling`, how many requests wait and how many were sent.
//!
//! Where no worker runs, nobody but the gateways knows that one is wanted. Each serves `GET` [`PATH`], a stream of
//! newline-delimited JSON ([`Line`]): first all placements, then those that changed, and a line without any every few seconds.
//! The leading operator follows all gateways that the EndpointSlices of its own namespace name ([`endpoint`]), so that in
//! steady state the API server is asked nothing and a held request is heard of at once.
//!
//! The path is on the port that clients use, so it asks for a token: signed for [`AUDIENCE`] with the gateway's own key, which
//! the operator made and nobody else has.

pub mod endpoint;
mod stream;

use std::{
    collections::{BTreeMap, HashMap, btree_map::Entry},
    sync::Arc,
};

use parking_lot::Mutex;
use prometheus_client::metrics::gauge::Gauge;
use serde::{Deserialize, Serialize};
use tokio::task::AbortHandle;

use crate::{controllers::wakes::Key, keys::Signer};

/// Where a gateway tells it.
pub const PATH: &str = "/internal/v1/demand";
/// Audience of the token that a gateway asks for.
pub const AUDIENCE: &str = "turret-gateway";

/// One line of a gateway's stream: the placements that changed since the line before it, all of them in the first one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// Sorted by namespace and name.
    pub placements: Vec<PlacementDemand>,
}

/// What is asked of one placement, as one gateway knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlacementDemand {
    /// Namespace of the placement.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Requests that wait at the gateway now. One for a group that several placements with `autoscaling` serve counts for each
    /// in part, rounded up.
    pub waiting: u32,
    /// Requests sent to its workers since the gateway started.
    pub sent: u64,
}

/// What is asked of one placement, by all gateways.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// Requests that wait.
    pub waiting: u32,
    /// Requests sent so far, by gateway.
    pub sent: BTreeMap<String, u64>,
    /// Whether any gateway is heard.
    pub is_heard: bool,
}

/// Follows gateways.
pub struct Gateways {
    shared: Arc<Shared>,
    tasks: Mutex<Tasks>,
    http: reqwest::Client,
    signer: Arc<Signer>,
}

/// Where each gateway is followed, and the task that does.
type Tasks = BTreeMap<Arc<str>, (Arc<str>, AbortHandle)>;

type OnChange = dyn Fn(&Key) + Send + Sync;

struct Shared {
    heard: Mutex<BTreeMap<Arc<str>, Heard>>,
    /// How many streams are open.
    open: Gauge,
    on_change: Box<OnChange>,
}

/// What one gateway said.
#[derive(Default)]
struct Heard {
    is_open: bool,
    /// Requests that wait and requests sent.
    placements: HashMap<Key, (u32, u64)>,
}

impl Gateways {
    /// Follows nobody yet. `open` shows how many streams are open; `on_change` is called, outside of any lock, with each
    /// placement of which something else is asked than before.
    pub fn new(
        http: reqwest::Client,
        signer: Arc<Signer>,
        open: Gauge,
        on_change: impl Fn(&Key) + Send + Sync + 'static,
    ) -> Self {
        let shared = Shared { heard: Mutex::default(), open, on_change: Box::new(on_change) };
        Self { shared: Arc::new(shared), tasks: Mutex::default(), http, signer }
    }

    /// Follows exactly these gateways from now on, each by its name at its base URL. Must be called within a tokio runtime.
    pub fn follow_exactly(&self, gateways: BTreeMap<Arc<str>, Arc<str>>) {
        let mut tasks = self.tasks.lock();
        let gone: Vec<Arc<str>> = tasks
            .iter()
            .filter(|(id, (url, _))| gateways.get(*id) != Some(url))
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            if let Some((_, task)) = tasks.remove(&id) {
                task.abort();
            }
            self.shared.forget(&id);
        }
        for (id, url) in gateways {
            let Entry::Vacant(free) = tasks.entry(id.clone()) else { continue };
            self.shared.heard.lock().insert(id.clone(), Heard::default());
            let sink = Sink { shared: self.shared.clone(), id };
            let task =
                tokio::spawn(stream::follow(self.http.clone(), url.clone(), self.signer.clone(), sink));
            free.insert((url, task.abort_handle()));
        }
    }

    /// What is asked of a placement now.
    pub fn asked(&self, placement: &Key) -> Asked {
        let heard = self.shared.heard.lock();
        let open = || heard.iter().filter(|(_, heard)| heard.is_open);
        let of = |heard: &Heard| heard.placements.get(placement).copied();
        Asked {
            waiting: open()
                .filter_map(|(_, heard)| of(heard))
                .map(|(waiting, _)| waiting)
                .fold(0, u32::saturating_add),
            sent: open().filter_map(|(id, heard)| Some((format!("gateway/{id}"), of(heard)?.1))).collect(),
            is_heard: open().next().is_some(),
        }
    }
}

impl Drop for Gateways {
    fn drop(&mut self) {
        for (_, task) in self.tasks.lock().values() {
            task.abort();
        }
    }
}

impl Shared {
    /// Changes what a gateway said, and tells the placements that the change is about.
    fn update(&self, change: impl FnOnce(&mut BTreeMap<Arc<str>, Heard>) -> Vec<Key>) {
        let changed = {
            let mut heard = self.heard.lock();
            let changed = change(&mut heard);
            let open = heard.values().filter(|heard| heard.is_open).count();
            self.open.set(i64::try_from(open).unwrap_or(i64::MAX));
            changed
        };
        for placement in changed {
            (self.on_change)(&placement);
        }
    }

    fn forget(&self, id: &str) {
        self.update(|all| {
            let gone = all.remove(id).unwrap_or_default();
            gone.placements.into_keys().collect()
        });
    }
}

/// Where the stream of one gateway writes what it hears.
struct Sink {
    shared: Arc<Shared>,
    id: Arc<str>,
}

impl Sink {
    /// Changes what the gateway said, while it is followed: a stream that was aborted a moment ago brings none back.
    fn update(&self, change: impl FnOnce(&mut Heard) -> Vec<Key>) {
        self.shared.update(|all| all.get_mut(&self.id).map(change).unwrap_or_default());
    }

    /// The first line of a stream: what was said before is over.
    fn opened(&self, line: Line) {
        self.update(|heard| {
            let placements = line.placements.into_iter().map(entry).collect();
            let before = std::mem::replace(heard, Heard { is_open: true, placements });
            heard.placements.keys().cloned().chain(before.placements.into_keys()).collect()
        });
    }

    fn changed(&self, line: Line) {
        self.update(|heard| {
            let entries: Vec<_> = line.placements.into_iter().map(entry).collect();
            heard.placements.extend(entries.iter().cloned());
            entries.into_iter().map(|(placement, _)| placement).collect()
        });
    }

    /// What waits there is not known any more. Returns whether it was known before.
    fn lost(&self) -> bool {
        let mut was_open = false;
        self.update(|heard| {
            let before = std::mem::take(heard);
            was_open = before.is_open;
            before.placements.into_keys().collect()
        });
        was_open
    }
}

fn entry(demand: PlacementDemand) -> (Key, (u32, u64)) {
    ((demand.namespace, demand.name), (demand.waiting, demand.sent))
}
