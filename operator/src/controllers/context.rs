//! What reconciling needs: the caches to read, the fleet to ask, the client to act with.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use k8s_openapi::{
    api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, Namespace, ObjectReference, Pod, Service},
        policy::v1::PodDisruptionBudget,
    },
    apimachinery::pkg::apis::meta::v1::Condition,
    jiff::Timestamp,
};
use kube::{
    Client, Resource, ResourceExt,
    runtime::{
        events::{Event, EventType, Recorder},
        reflector::{Lookup, ObjectRef, Store},
    },
};
use parking_lot::Mutex;
use tokio::sync::watch;
use turret_crds::{
    ModelGroup, ModelPlacement, WorkerDocument, condition, hints::Hints, label, token::PublicKey,
};

use super::{
    assess::ObservedWorker,
    placement::{
        claims::ResourceClaimTemplate,
        demand::Demands,
        nudge,
        push::{self, Offer, PushError, Pushes, Recipient},
        scaling::Scaling,
    },
    pod::PodFacts,
    retry::Retries,
    unreadable::Unreadable,
    wakes::{Key, Wakes},
};
use crate::{
    demand::Gateways,
    fleet::{Endpoint, Fleet, Link, WorkerId},
    keys::{Signer, TokenSource},
    metrics::{Kind, Metrics, Outcome},
    telemetry::chain,
};

/// Everything that reconciling reads and acts with.
pub struct Context {
    /// To act with.
    pub client: Client,
    /// What is in the cluster.
    pub caches: Caches,
    /// What workers say.
    pub fleet: Fleet<Key>,
    /// The public keys that go into every document.
    pub public_keys: watch::Receiver<Vec<PublicKey>>,
    /// Worker image of this operator's version.
    pub worker_image: String,
    /// Hosts that workers may fetch sources from, where they are not a worker's default.
    pub allowed_source_hosts: Option<String>,
    /// Events on objects.
    pub recorder: Recorder,
    /// Metrics.
    pub metrics: Metrics,
    /// When placements that could not be carried out are looked at again.
    pub placement_retries: Retries,
    /// When groups that could not be carried out are looked at again.
    pub group_retries: Retries,
    /// To write to workers.
    pub http: reqwest::Client,
    /// What was given to workers a moment ago.
    pub pushes: Pushes,
    /// How much is asked for, by placement.
    pub demands: Demands,
    /// Groups to look at.
    pub group_wakes: Wakes,
    /// Placements to look at.
    pub placement_wakes: Wakes,
    /// What waits at gateways.
    pub gateways: Gateways,
    /// What autoscaling goes by.
    pub scaling: Scaling,
    /// Placements with autoscaling of which something else is asked than before.
    pub load_wakes: Wakes,
}

/// The object caches.
#[derive(Clone)]
pub struct Caches {
    /// Groups.
    pub groups: Store<ModelGroup>,
    /// Groups that are there and cannot be read.
    pub unreadable_groups: Unreadable,
    /// Placements.
    pub placements: Store<ModelPlacement>,
    /// Placements that are there and cannot be read.
    pub unreadable_placements: Unreadable,
    /// Namespaces with their labels; `None` where one namespace is served and no group of another is seen.
    pub namespaces: Option<Store<Namespace>>,
    /// ConfigMaps of placements, their documents replaced by hashes.
    pub config_maps: Store<ConfigMap>,
    /// Services of placements.
    pub services: Store<Service>,
    /// PodDisruptionBudgets of placements.
    pub disruption_budgets: Store<PodDisruptionBudget>,
    /// Deployments of placements.
    pub deployments: Store<Deployment>,
    /// Templates of claims for placements that ask for a class of devices; `None` where the API server has none.
    pub claim_templates: Option<Store<ResourceClaimTemplate>>,
    /// Worker pods.
    pub pods: Pods,
    /// What `pods` is made from.
    pub pod_store: Store<Pod>,
}

impl Caches {
    /// Waits until every cache holds all that there is.
    pub fn synced(&self) -> impl Future<Output = ()> + Send + use<> {
        let Self {
            groups,
            unreadable_groups: _,
            placements,
            unreadable_placements: _,
            namespaces,
            config_maps,
            services,
            disruption_budgets,
            deployments,
            claim_templates,
            pods: _,
            pod_store,
        } = self.clone();
        async move {
            let namespaces_are_there = async {
                if let Some(namespaces) = &namespaces {
                    let _ = namespaces.wait_until_ready().await;
                }
            };
            // A cache that will never be filled has no writer; the process is about to end then.
            let _ = tokio::join!(
                groups.wait_until_ready(),
                placements.wait_until_ready(),
                config_maps.wait_until_ready(),
                services.wait_until_ready(),
                disruption_budgets.wait_until_ready(),
                deployments.wait_until_ready(),
                async {
                    match &claim_templates {
                        Some(templates) => templates.wait_until_ready().await,
                        None => Ok(()),
                    }
                },
                pod_store.wait_until_ready(),
                namespaces_are_there,
            );
        }
    }
}

/// Gets an object by name.
pub fn get<K>(store: &Store<K>, namespace: &str, name: &str) -> Option<Arc<K>>
where
    K: Lookup<DynamicType = ()> + Clone + 'static,
{
    store.get(&ObjectRef::new(name).within(namespace))
}

/// Facts of the worker pods, by placement.
#[derive(Clone, Default)]
pub struct Pods(Arc<Mutex<HashMap<Key, BTreeMap<String, WorkerPod>>>>);

/// A worker pod, and what is needed to reach it.
#[derive(Clone)]
pub struct WorkerPod {
    /// Its facts.
    pub facts: Arc<PodFacts>,
    /// UID of its placement.
    pub placement_uid: Arc<str>,
}

/// The placement an owned object or a worker pod belongs to, by its labels.
pub fn placement_of<K: Resource>(object: &K) -> Option<Key> {
    let name = object.labels().get(label::PLACEMENT)?;
    Some((ResourceExt::namespace(object)?, name.clone()))
}

impl Pods {
    /// Takes note of a pod as it is.
    pub fn set(&self, pod: &Pod) {
        let Some(key) = placement_of(pod) else { return };
        let uid = pod.labels().get(label::PLACEMENT_UID).map(String::as_str).unwrap_or_default();
        let worker = WorkerPod { facts: Arc::new(PodFacts::of(pod)), placement_uid: uid.into() };
        self.0.lock().entry(key).or_default().insert(pod.name_any(), worker);
    }

    /// Takes note that a pod is gone.
    pub fn remove(&self, pod: &Pod) {
        let Some(key) = placement_of(pod) else { return };
        let mut all = self.0.lock();
        if let Some(pods) = all.get_mut(&key) {
            pods.remove(&pod.name_any());
            if pods.is_empty() {
                all.remove(&key);
            }
        }
    }

    fn of(&self, key: &Key) -> Vec<WorkerPod> {
        self.0.lock().get(key).map(|pods| pods.values().cloned().collect()).unwrap_or_default()
    }

    /// The control ports of all workers that have an address and are not leaving.
    pub fn endpoints(&self, signer: &Arc<Signer>) -> Vec<Endpoint<Key>> {
        let all = self.0.lock();
        let pods = all.iter().flat_map(|(key, pods)| pods.values().map(move |pod| (key, pod)));
        pods.filter(|(_, pod)| pod.facts.counts())
            .filter_map(|(key, pod)| {
                let ip = pod.facts.ip.as_ref()?;
                let host = if ip.contains(':') { format!("[{ip}]") } else { ip.clone() };
                Some(Endpoint {
                    id: worker_id(&key.0, &pod.facts.name),
                    control_url: format!("http://{host}:{}", label::CONTROL_PORT).into(),
                    token: TokenSource::Signed {
                        signer: signer.clone(),
                        placement_uid: pod.placement_uid.clone(),
                    },
                    attached: key.clone(),
                })
            })
            .collect()
    }
}

fn worker_id(namespace: &str, pod: &str) -> WorkerId {
    WorkerId(format!("{namespace}/{pod}").into())
}

impl Context {
    /// Labels of a namespace; none where namespaces are not looked at.
    pub fn namespace_labels(&self, namespace: &str) -> BTreeMap<String, String> {
        let all = self.caches.namespaces.as_ref();
        let found = all.and_then(|all| all.get(&ObjectRef::new(namespace)));
        found.map(|namespace| namespace.labels().clone()).unwrap_or_default()
    }

    /// The workers of a placement as they are observed, sorted by name.
    pub fn workers(&self, key: &Key) -> Vec<ObservedWorker> {
        let fleet = self.fleet.snapshot();
        let pods = self.caches.pods.of(key);
        pods.into_iter()
            .map(|pod| {
                let worker = fleet.get(&worker_id(&key.0, &pod.facts.name));
                ObservedWorker {
                    report: worker.and_then(|w| w.believed().cloned()),
                    lost: worker.and_then(|w| match &w.link {
                        Link::Lost(why) => Some(why.clone()),
                        Link::Connecting | Link::Open => None,
                    }),
                    pod: PodFacts::clone(&pod.facts),
                }
            })
            .collect()
    }

    /// Looks how many rows the workers of all placements have.
    pub fn observe_demand(&self) {
        let fleet = self.fleet.snapshot();
        let reports = fleet.values().filter_map(|w| Some((&w.endpoint.attached, &**w.believed()?)));
        let exists = |key: &Key| get(&self.caches.placements, &key.0, &key.1).is_some();
        self.demands.observe(reports, exists, Timestamp::now());
    }

    /// Gives a document with its hints to all workers of a placement that can be reached and do not have them.
    pub async fn push(
        &self,
        key: &Key,
        document: &WorkerDocument,
        hints: Option<&Hints>,
    ) -> Vec<(WorkerId, PushError)> {
        let fleet = self.fleet.snapshot();
        let recipients: Vec<Recipient> = fleet
            .values()
            .filter(|w| w.endpoint.attached == *key)
            .filter_map(|w| Some(Recipient { endpoint: w.endpoint.clone(), report: w.believed()?.clone() }))
            .filter(|r| {
                !r.report.serves(document.sequence, &document.digest) || push::lacks_hints(&r.report, hints)
            })
            .collect();
        if recipients.is_empty() {
            return Vec::new();
        }
        let advised = WorkerDocument { hints: hints.cloned(), ..document.clone() };
        let json = serde_json::to_vec(&advised).expect("a document of strings and numbers is JSON");
        let offer = Offer {
            sequence: document.sequence,
            digest: &document.digest,
            hints_version: hints.map_or(0, |hints| hints.version),
        };
        let (failures, sent) = push::push(&self.http, &self.pushes, offer, json.into(), recipients).await;
        self.metrics.pushes.get_or_create(&Outcome { outcome: "ok" }).inc_by(sent as u64);
        self.metrics.pushes.get_or_create(&Outcome { outcome: "failed" }).inc_by(failures.len() as u64);
        failures
    }

    /// Asks the workers of a placement to look again, at once, at what failed.
    pub async fn look_again(&self, key: &Key) {
        let fleet = self.fleet.snapshot();
        let workers = fleet.values().filter(|w| w.endpoint.attached == *key);
        let failed = workers.filter(|w| w.believed().is_some_and(|report| nudge::has_failures(report)));
        let failed: Vec<_> = failed.map(|w| w.endpoint.clone()).collect();
        nudge::nudge(&self.http, failed).await;
    }

    /// Publishes an event when what `Ready` says has changed. A lost event is no harm: the
    /// condition says the same.
    pub async fn tell_ready<K>(&self, object: &K, before: &[Condition], after: &[Condition])
    where
        K: Resource<DynamicType = ()>,
    {
        let ready =
            |conditions: &[Condition]| conditions.iter().find(|c| c.type_ == condition::READY).cloned();
        let (before, Some(after)) = (ready(before), ready(after)) else { return };
        if before.is_some_and(|b| (b.status, b.reason) == (after.status.clone(), after.reason.clone())) {
            return;
        }
        let is_stalled = after.status != "True" && is_trouble(&after.reason);
        let type_ = if is_stalled { EventType::Warning } else { EventType::Normal };
        self.tell(object, type_, &after.reason, "Observe", after.message).await;
    }

    /// Publishes an event.
    pub async fn tell<K>(&self, object: &K, type_: EventType, reason: &str, action: &str, note: String)
    where
        K: Resource<DynamicType = ()>,
    {
        self.tell_of(&object.object_ref(&()), type_, reason, action, note).await;
    }

    /// Publishes an event on what is known by its name only.
    pub async fn tell_of(
        &self,
        object: &ObjectReference,
        type_: EventType,
        reason: &str,
        action: &str,
        mut note: String,
    ) {
        // The API server takes at most 1 KiB.
        note.truncate(
            note.char_indices()
                .map(|(at, c)| at + c.len_utf8())
                .take_while(|end| *end <= 1000)
                .last()
                .unwrap_or(0),
        );
        let event =
            Event { type_, reason: reason.into(), note: Some(note), action: action.into(), secondary: None };
        if let Err(error) = self.recorder.publish(&event, object).await {
            tracing::warn!(reason, error = %chain(&error), "failed to publish an event");
        }
    }

    /// Counts a status write.
    pub fn count_status_write(&self, kind: &'static str) {
        self.metrics.status_writes.get_or_create(&Kind { kind }).inc();
    }
}

/// Reasons that a person should look at.
fn is_trouble(reason: &str) -> bool {
    use condition::reason::*;
    ![ROLLING_OUT, UPDATING, LOADING, ALIAS_PENDING, SERVING, DONE, PAUSED].contains(&reason)
}
