//! A node without a kubelet: pods that the scheduler binds to it get an address of this machine and a [`Worker`] there, and are
//! said to run.
//!
//! Addresses are of the loopback range, which needs no rights and leaves no trace. Endpoints may not have such addresses, so the
//! EndpointSlices of these workers stay empty; nobody here goes through a Service.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Node as KubernetesNode, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{DeleteParams, Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use turret_crds::{WorkerDocument, label};

use super::worker::Worker;
use crate::cluster::eventually::PATIENCE;

/// Its name.
pub const NAME: &str = "simulated";
/// Its label, and its taint.
pub const LABEL: &str = "turret.test/simulated";
/// Who applies what is the kubelet's.
const MANAGER: &str = "turret-test-node";
/// A node that says nothing for 50 seconds counts as lost.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// How long to wait between two looks for what a pod mounts.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Namespace and name of a pod.
type Key = (String, String);

/// The node. Ends when it is dropped.
pub struct Node {
    inner: Arc<Inner>,
    _tasks: JoinSet<()>,
}

struct Inner {
    client: Client,
    addresses: AtomicU32,
    pods: Mutex<BTreeMap<Key, Hosted>>,
    /// By namespace: what workers that ended had to complain of.
    complaints: Mutex<BTreeMap<String, Vec<String>>>,
}

/// A pod that was bound to the node.
struct Hosted {
    stop: CancellationToken,
    worker: Option<Worker>,
}

impl Node {
    /// Joins the cluster.
    pub async fn join(client: Client) -> Result<Self> {
        let nodes = Api::<KubernetesNode>::all(client.clone());
        let params = PatchParams::apply(MANAGER).force();
        nodes.patch(NAME, &params, &Patch::Apply(node())).await.context("failed to make a node")?;
        nodes.patch_status(NAME, &PatchParams::default(), &Patch::Merge(ready())).await?;
        beat(&client).await?;
        let inner = Arc::new(Inner {
            client: client.clone(),
            addresses: AtomicU32::new(1),
            pods: Mutex::default(),
            complaints: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            loop {
                tokio::time::sleep(HEARTBEAT).await;
                if let Err(error) = beat(&client).await {
                    eprintln!("the simulated node cannot renew its Lease: {error:#}");
                }
            }
        });
        tasks.spawn(follow(inner.clone()));
        Ok(Self { inner, _tasks: tasks })
    }

    /// The workers of a namespace that run.
    pub fn workers(&self, namespace: &str) -> Vec<Worker> {
        let pods = lock(&self.inner.pods);
        let of_namespace = pods.iter().filter(|((of, _), _)| of == namespace);
        of_namespace.filter_map(|(_, hosted)| hosted.worker.clone()).collect()
    }

    /// What all workers of a namespace had to complain of, those that ended too.
    pub fn complaints(&self, namespace: &str) -> Vec<String> {
        let ended = lock(&self.inner.complaints).get(namespace).cloned().unwrap_or_default();
        let running = self.workers(namespace);
        ended.into_iter().chain(running.iter().flat_map(Worker::complaints)).collect()
    }
}

/// Pods are told to come here by the label, and others are kept away by the taint.
fn node() -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": NAME, "labels": {LABEL: "true", "kubernetes.io/hostname": NAME}},
        "spec": {"taints": [{"key": LABEL, "value": "true", "effect": "NoSchedule"}]},
    })
}

fn ready() -> Value {
    let room = json!({"cpu": "1000", "memory": "4Ti", "pods": "1000", "ephemeral-storage": "64Ti"});
    json!({"status": {
        "capacity": room,
        "allocatable": room,
        "conditions": [{"type": "Ready", "status": "True", "reason": "Simulated", "message": "it is simulated"}],
    }})
}

/// Tells that the node lives, as a kubelet does.
async fn beat(client: &Client) -> Result<()> {
    let lease = json!({
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": NAME},
        "spec": {
            "holderIdentity": NAME,
            "leaseDurationSeconds": 40,
            "renewTime": MicroTime(Timestamp::now()),
        },
    });
    let leases = Api::<Lease>::namespaced(client.clone(), "kube-node-lease");
    leases.patch(NAME, &PatchParams::apply(MANAGER).force(), &Patch::Apply(lease)).await?;
    Ok(())
}

/// Does what is to be done for every pod that is bound to the node.
async fn follow(inner: Arc<Inner>) {
    let bound = watcher::Config::default().fields(&format!("spec.nodeName={NAME}"));
    let events = watcher(Api::<Pod>::all(inner.client.clone()), bound).default_backoff();
    let mut events = std::pin::pin!(events);
    while let Some(event) = events.next().await {
        match event {
            Ok(watcher::Event::Apply(pod) | watcher::Event::InitApply(pod)) => inner.look(pod),
            Ok(watcher::Event::Delete(pod)) => inner.stop(&key(&pod)),
            Ok(watcher::Event::Init | watcher::Event::InitDone) => {}
            Err(error) => eprintln!("the simulated node cannot see its pods: {error:#}"),
        }
    }
}

fn key(pod: &Pod) -> Key {
    (pod.namespace().unwrap_or_default(), pod.name_any())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn stop(&self, key: &Key) {
        let hosted = lock(&self.pods).remove(key);
        let Some(hosted) = hosted else { return };
        hosted.stop.cancel();
        if let Some(worker) = hosted.worker {
            lock(&self.complaints).entry(key.0.clone()).or_default().extend(worker.complaints());
        }
    }

    /// Starts a pod that is new, and ends one that is to go.
    fn look(self: &Arc<Self>, pod: Pod) {
        let (key, inner) = (key(&pod), self.clone());
        if pod.metadata.deletion_timestamp.is_some() {
            self.stop(&key);
            tokio::spawn(async move {
                let pods = Api::<Pod>::namespaced(inner.client.clone(), &key.0);
                // It may be gone already, with its namespace for example.
                let _ = pods.delete(&key.1, &DeleteParams::default().grace_period(0)).await;
            });
            return;
        }
        let stop = CancellationToken::new();
        let mut pods = lock(&self.pods);
        // No name of a pod is used twice.
        if pods.contains_key(&key) {
            return;
        }
        pods.insert(key.clone(), Hosted { stop: stop.clone(), worker: None });
        drop(pods);
        tokio::spawn(async move {
            let started = tokio::select! {
                started = inner.start(&pod, &stop) => started,
                () = stop.cancelled() => Ok(()),
            };
            if let Err(error) = started {
                eprintln!("the simulated pod {}/{} does not start: {error:#}", key.0, key.1);
            }
        });
    }

    async fn start(&self, pod: &Pod, stop: &CancellationToken) -> Result<()> {
        let (namespace, name) = key(pod);
        let document = self.document(pod).await?;
        let address = address(std::process::id(), self.addresses.fetch_add(1, Ordering::Relaxed));
        let control = SocketAddr::from((address, label::CONTROL_PORT));
        let worker = Worker::start(control, &name, document, stop.clone()).await?;
        if let Some(hosted) = lock(&self.pods).get_mut(&(namespace.clone(), name.clone())) {
            hosted.worker = Some(worker);
        }
        let pods = Api::<Pod>::namespaced(self.client.clone(), &namespace);
        let status = running(pod, address);
        match pods.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status)).await {
            // It went meanwhile.
            Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
            patched => Ok(patched.map(drop)?),
        }
    }

    /// What a kubelet would mount: it waits for the ConfigMap, too.
    async fn document(&self, pod: &Pod) -> Result<WorkerDocument> {
        let namespace = pod.namespace().unwrap_or_default();
        let placement = pod.labels().get(label::PLACEMENT).context("a pod without a placement came here")?;
        let name = label::owned_name(placement);
        let config_maps = Api::<ConfigMap>::namespaced(self.client.clone(), &namespace);
        let began = Instant::now();
        let config_map = loop {
            if let Some(found) = config_maps.get_opt(&name).await? {
                break found;
            }
            ensure!(began.elapsed() < PATIENCE, "the ConfigMap {name} that it mounts does not exist");
            tokio::time::sleep(BETWEEN_LOOKS).await;
        };
        let data = config_map.binary_data.unwrap_or_default();
        let document = data.get(label::DOCUMENT_KEY).context("the ConfigMap carries no worker document")?;
        Ok(WorkerDocument::from_gzip(&document.0)?)
    }
}

/// The address of the `number`th worker. Two runs on one machine nearly always have different ones.
fn address(process: u32, number: u32) -> Ipv4Addr {
    let [_, _, high, low] = number.to_be_bytes();
    let of_run = u8::try_from(process % 200).expect("less than 200") + 10;
    Ipv4Addr::new(127, of_run, high, low)
}

fn running(pod: &Pod, address: Ipv4Addr) -> Value {
    let condition = |type_: &str| json!({"type": type_, "status": "True"});
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers).map(|container| {
        json!({
            "name": container.name, "image": container.image, "imageID": "", "restartCount": 0,
            "ready": true, "started": true, "state": {"running": {}},
        })
    });
    json!({"status": {
        "phase": "Running",
        "podIP": address,
        "podIPs": [{"ip": address}],
        "conditions": [condition("Initialized"), condition("ContainersReady"), condition("Ready")],
        "containerStatuses": containers.collect::<Vec<_>>(),
    }})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_have_addresses_of_their_own() {
        assert_eq!(address(0, 1), Ipv4Addr::new(127, 10, 0, 1));
        assert_eq!(address(199, 258), Ipv4Addr::new(127, 209, 1, 2));
        assert!(address(u32::MAX, 65_535).is_loopback());
    }

    #[test]
    fn a_pod_that_runs_is_ready_and_has_its_address() {
        let pod = json!({
            "metadata": {"name": "p"},
            "spec": {"containers": [{"name": "worker", "image": "i"}]},
        });
        let mut pod: Value = pod;
        let status = running(&serde_json::from_value(pod.clone()).unwrap(), Ipv4Addr::LOCALHOST);
        pod["status"] = status["status"].clone();
        let pod: Pod = serde_json::from_value(pod).unwrap();
        let status = pod.status.unwrap();
        assert_eq!(status.pod_ip.as_deref(), Some("127.0.0.1"));
        assert!(status.conditions.unwrap().iter().any(|c| c.type_ == "Ready" && c.status == "True"));
        assert!(status.container_statuses.unwrap()[0].ready);
    }
}
