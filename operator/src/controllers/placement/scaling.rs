//! How many workers a placement is to have: gathers what is asked of it, and keeps what was heard and decided before
//! for [`autoscale`](super::autoscale), which decides.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt;
use parking_lot::Mutex;
use turret_crds::{ModelPlacement, placement::Autoscaling};

use super::{
    autoscale::{Decision, Limits, Load, Moment, Past, decide},
    resources,
};
use crate::{
    controllers::{
        asked,
        assess::ObservedWorker,
        context::{self, Context},
        wakes::Key,
    },
    demand::Asked,
};

/// What was heard and decided of each placement with `autoscaling`, since this process leads.
pub struct Scaling {
    started: Instant,
    memories: Mutex<HashMap<Key, Memory>>,
}

struct Memory {
    /// Another placement of the same name begins anew.
    uid: Option<String>,
    past: Past,
}

impl Default for Scaling {
    fn default() -> Self {
        Self { started: Instant::now(), memories: Mutex::default() }
    }
}

/// How many workers a placement is to have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decided {
    /// How many.
    pub replicas: i32,
    /// When to decide again, even if nothing happens.
    pub look_again: Option<Duration>,
    /// From how many, and why, when it is not as many as before.
    pub change: Option<(i32, String)>,
}

impl Context {
    /// Decides how many workers a placement is to have, and takes the decision for carried out.
    pub fn decide_replicas(
        &self,
        placement: &ModelPlacement,
        deployment: Option<&Deployment>,
        workers: &[ObservedWorker],
    ) -> Decided {
        let Some(autoscaling) = decided_by(placement) else {
            self.scaling.memories.lock().remove(&key_of(placement));
            let replicas = resources::replicas(placement, deployment);
            return Decided { replicas, look_again: None, change: None };
        };
        self.consider(placement, autoscaling, (deployment, workers), |past, decision, now| {
            let before = past.replicas();
            past.settle(decision.replicas, now);
            Decided {
                replicas: decision.replicas,
                look_again: decision.look_again,
                change: (decision.replicas != before).then_some((before, decision.why)),
            }
        })
    }

    /// Takes note of what is asked of a placement now. Returns whether it is to have another number of workers.
    pub fn is_to_be_rescaled(&self, key: &Key) -> bool {
        let Some(placement) = context::get(&self.caches.placements, &key.0, &key.1) else { return false };
        let Some(autoscaling) = decided_by(&placement) else { return false };
        let owned = turret_crds::label::owned_name(&key.1);
        let deployment = context::get(&self.caches.deployments, &key.0, &owned);
        let workers = self.workers(key);
        self.consider(&placement, autoscaling, (deployment.as_deref(), &workers), |past, decision, _| {
            decision.replicas != past.replicas()
        })
    }

    fn consider<T>(
        &self,
        placement: &ModelPlacement,
        autoscaling: &Autoscaling,
        (deployment, workers): (Option<&Deployment>, &[ObservedWorker]),
        judge: impl FnOnce(&mut Past, Decision, Moment) -> T,
    ) -> T {
        let key = key_of(placement);
        let limits = Limits::of(autoscaling);
        let load = load(workers, self.gateways.asked(&key));
        let now = self.scaling.started.elapsed();
        let mut memories = self.scaling.memories.lock();
        if memories.get(&key).is_none_or(|memory| memory.uid != placement.metadata.uid) {
            // The only time at which there are more: what is gone is forgotten.
            memories.retain(|(namespace, name), _| {
                context::get(&self.caches.placements, namespace, name).is_some()
            });
            let past = Past::begin(resources::replicas(placement, deployment), now);
            memories.insert(key.clone(), Memory { uid: placement.metadata.uid.clone(), past });
        }
        let past = &mut memories.get_mut(&key).expect("it is there, or was put there above").past;
        past.note(&limits, load, now);
        let decision = decide(&limits, past, now);
        judge(past, decision, now)
    }
}

/// By what the number of its workers is decided. While it is paused, by nothing: what was decided before stands in its
/// Deployment, and afterwards begins what is heard then.
fn decided_by(placement: &ModelPlacement) -> Option<&Autoscaling> {
    placement.spec.autoscaling.as_ref().filter(|_| !asked::is_paused(placement))
}

fn key_of(placement: &ModelPlacement) -> Key {
    (placement.namespace().unwrap_or_default(), placement.name_any())
}

/// What workers and gateways say.
fn load(workers: &[ObservedWorker], asked: Asked) -> Load {
    let there = || workers.iter().filter(|worker| worker.pod.counts());
    let reports = || there().filter_map(|worker| worker.report.as_deref());
    let rows = reports().map(|r| r.state.running_rows.saturating_add(r.state.waiting_rows));
    let mut counted = asked.sent;
    // A worker's numbers begin anew with its process.
    counted.extend(reports().map(|report| {
        let ended = report.lenses.iter().map(|lens| lens.served.saturating_add(lens.errors));
        let life = format!("{}/{}", report.worker.name, report.worker.instance);
        (life, ended.fold(0, u64::saturating_add))
    }));
    // One that starts is there for somebody, be it only for whoever made the placement. While nothing stands in its way,
    // it is waited for: were it removed in the middle of a long download, the next one would begin it again.
    let starts = |worker: &ObservedWorker| !worker.pod.ready && worker.pod.trouble.is_none();
    let is_silent = |worker: &ObservedWorker| worker.pod.ready && worker.report.is_none();
    Load {
        rows: rows.fold(0, u32::saturating_add),
        held: asked.waiting,
        is_silent: there().any(|worker| is_silent(worker) || starts(worker)),
        can_wake: asked.is_heard,
        counted,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;
    use turret_crds::label;

    use super::*;
    use crate::controllers::{
        fixtures::{World, pod},
        pod::{PodFacts, Trouble},
    };

    #[test]
    fn nothing_is_decided_while_a_placement_is_paused() {
        let mut world = World::new();
        assert_eq!(decided_by(&world.placement), None, "its replicas are declared");
        world.placement.spec.autoscaling =
            serde_json::from_value(json!({"minReplicas": 0, "maxReplicas": 4})).ok();
        assert!(decided_by(&world.placement).is_some());
        world.placement.annotations_mut().insert(label::PAUSED.into(), "true".into());
        assert_eq!(decided_by(&world.placement), None);
    }

    #[test]
    fn rows_of_all_workers_and_requests_at_gateways_are_the_load() {
        let world = World::new();
        let busy = world.serving("a").reporting(|report| {
            (report.state.running_rows, report.state.waiting_rows) = (3, 2);
            Arc::make_mut(&mut report.lenses[0]).served = 40;
        });
        let leaving = {
            let mut worker = world.serving("b").reporting(|report| report.state.running_rows = 7);
            worker.pod.leaving = true;
            worker
        };
        let trouble = Some(Trouble { reason: "Unschedulable", message: String::new(), needs_change: false });
        let stuck = PodFacts { ready: false, trouble, ..pod("c", None) };
        let stuck = ObservedWorker { pod: stuck, report: None, lost: None };
        let asked = Asked { waiting: 4, sent: [("gateway".to_owned(), 9)].into(), is_heard: true };
        let mut workers = vec![busy, leaving, stuck];
        let heard = load(&workers, asked);
        assert_eq!((heard.rows, heard.held, heard.is_silent, heard.can_wake), (5, 4, false, true));
        let counted: Vec<_> = heard.counted.iter().map(|(who, count)| (who.as_str(), *count)).collect();
        assert_eq!(counted, [("a/1", 40), ("gateway", 9)]);
        workers[2].pod.trouble = None;
        assert!(load(&workers, Asked::default()).is_silent, "it starts, and is waited for");
        workers[2].pod.ready = true;
        assert!(load(&workers, Asked::default()).is_silent, "it may have rows and does not say so");
    }
}
