//! What is asked of each placement with `autoscaling`, for the operator: how many requests wait, how many were sent.
//! Pure but for the counters.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::{catalog::Catalog, directory::Place, waiting::Line};
use crate::demand::{self, PlacementDemand};

/// Requests that wait and requests sent, by namespace and name of the placement.
pub type Demands = BTreeMap<(String, String), (u32, u64)>;

/// Requests sent, by name of the placement.
type OfNamespace = BTreeMap<Arc<str>, u64>;

/// Requests sent, by namespace and placement.
pub struct Sends {
    counts: Mutex<BTreeMap<Arc<str>, OfNamespace>>,
    moved: watch::Sender<u64>,
}

impl Default for Sends {
    fn default() -> Self {
        Self { counts: Mutex::default(), moved: watch::Sender::new(0) }
    }
}

impl Sends {
    /// Counts a request that goes to a worker.
    pub fn count(&self, place: &Place) {
        let mut counts = self.counts.lock();
        let of_namespace = counts.entry(place.namespace.clone()).or_default();
        *of_namespace.entry(place.placement.clone()).or_default() += 1;
        drop(counts);
        self.moved.send_modify(|version| *version += 1);
    }

    /// Requests sent so far.
    pub fn of(&self, namespace: &str, placement: &str) -> u64 {
        let counts = self.counts.lock();
        counts.get(namespace).and_then(|of| of.get(placement)).copied().unwrap_or(0)
    }

    /// Wakes whenever a request was sent.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.moved.subscribe()
    }
}

/// What is asked of each placement with autoscaling. `waiting` is how many wait in each line; those for a group that several
/// such placements serve are shared among them, rounded up: one that waits wakes all, since any of them may be unable to come.
pub fn demands(catalog: &Catalog, waiting: &[(Line, usize)], sent: impl Fn(&str, &str) -> u64) -> Demands {
    let mut demands = Demands::new();
    for (namespace, served) in &catalog.namespaces {
        let autoscaled = served.placements.iter().filter(|(_, placement)| placement.is_autoscaled);
        for (name, _) in autoscaled {
            demands.insert((namespace.clone(), name.clone()), (0, sent(namespace, name)));
        }
    }
    for ((namespace, group), length) in waiting {
        let group = catalog.namespaces.get(namespace).and_then(|served| served.groups.get(group));
        let places = group.map(|group| group.placements.as_slice()).unwrap_or_default();
        let keys = places.iter().map(|name| (namespace.clone(), name.clone()));
        let keys: Vec<_> = keys.filter(|key| demands.contains_key(key)).collect();
        let share = u32::try_from(length.div_ceil(keys.len().max(1))).unwrap_or(u32::MAX);
        for key in keys {
            let (waiting, _) = demands.get_mut(&key).expect("keys were filtered by what is there");
            *waiting = waiting.saturating_add(share);
        }
    }
    demands
}

/// The placements of which something else is asked than was told before. One that is gone is told once more, with nothing waiting.
pub fn news(told: &Demands, now: &Demands) -> demand::Line {
    let gone =
        told.iter().filter(|(key, _)| !now.contains_key(*key)).map(|(key, (_, sent))| (key, (0, *sent)));
    let changed = now.iter().filter(|(key, demand)| told.get(*key) != Some(*demand));
    let mut news: Vec<_> = gone.chain(changed.map(|(key, demand)| (key, *demand))).collect();
    news.sort_unstable();
    let placements = news.into_iter().map(|((namespace, name), (waiting, sent))| PlacementDemand {
        namespace: namespace.clone(),
        name: name.clone(),
        waiting,
        sent,
    });
    demand::Line { placements: placements.collect() }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use turret_crds::{ModelGroup, ModelPlacement};

    use super::*;
    use crate::gateway::catalog::Namespace;

    fn catalog() -> Catalog {
        let group = |name: &str| -> ModelGroup {
            serde_json::from_value(json!({
                "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup", "metadata": {"name": name, "namespace": "lab"},
                "spec": {"base": {"source": {"uri": "pvc://m/b"}}},
            }))
            .unwrap()
        };
        let placement = |name: &str, groups: &[&str], autoscaling: serde_json::Value| -> ModelPlacement {
            let groups: Vec<_> = groups.iter().map(|name| json!({"name": name})).collect();
            serde_json::from_value(json!({
                "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement",
                "metadata": {"name": name, "namespace": "lab"},
                "spec": {"groups": groups, "replicas": 0, "autoscaling": autoscaling},
            }))
            .unwrap()
        };
        let scaled = json!({"minReplicas": 0, "maxReplicas": 2});
        let placements = [
            placement("both", &["north", "south"], scaled.clone()),
            placement("fixed", &["south"], json!(null)),
            placement("one", &["south"], scaled),
        ];
        let namespace = Namespace::declared(&[group("north"), group("south")], &placements);
        Catalog { namespaces: [("lab".to_owned(), Arc::new(namespace))].into(), complete: true }
    }

    fn key(name: &str) -> (String, String) {
        ("lab".into(), name.into())
    }

    #[test]
    fn what_waits_is_shared_among_the_placements_that_could_answer_it() {
        let waiting =
            [(key("north"), 2), (key("south"), 3), (key("nowhere"), 9), ((String::new(), String::new()), 4)];
        let demands = demands(&catalog(), &waiting, |_, placement| placement.len() as u64);
        let expected: Demands = [(key("both"), (4, 4)), (key("one"), (2, 3))].into();
        assert_eq!(demands, expected);
        let one = super::demands(&catalog(), &[(key("south"), 1)], |_, _| 0);
        let expected: Demands = [(key("both"), (1, 0)), (key("one"), (1, 0))].into();
        assert_eq!(one, expected);
    }

    #[test]
    fn only_news_are_told_and_what_is_gone_has_nothing_waiting() {
        let told: Demands = [(key("a"), (1, 5)), (key("b"), (2, 6)), (key("c"), (0, 7))].into();
        let now: Demands = [(key("b"), (2, 6)), (key("c"), (1, 7)), (key("d"), (0, 0))].into();
        let line = news(&told, &now);
        let said: Vec<_> = line.placements.iter().map(|p| (p.name.as_str(), p.waiting, p.sent)).collect();
        assert_eq!(said, [("a", 0, 5), ("c", 1, 7), ("d", 0, 0)]);
        assert_eq!(news(&now, &now), demand::Line::default());
    }

    #[test]
    fn sends_are_counted_by_placement() {
        let sends = Sends::default();
        let changes = sends.changes();
        let place = Place { namespace: "lab".into(), placement: "one".into(), data_url: "http://w".into() };
        sends.count(&place);
        sends.count(&place);
        assert_eq!((sends.of("lab", "one"), sends.of("lab", "two"), sends.of("x", "one")), (2, 0, 0));
        assert!(changes.has_changed().unwrap());
    }
}
