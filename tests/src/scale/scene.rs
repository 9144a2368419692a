//! The API server with its objects, and the simulated node with its workers.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use serde_json::json;
use turret_crds::{ModelGroup, ModelPlacement, condition, label};

use super::client::{apply, apply_all, connect, list};
use super::layout::{self, NAMESPACE};
use super::order::Order;
use super::writes::Follow;
use crate::cluster::audit::AuditLog;
use crate::cluster::eventually::{PATIENCE, eventually, when};
use crate::faults::node::Node;
use crate::faults::worker::Worker;
use crate::faults::world::install_kinds;

/// The namespace of what the bare loop writes; the operator does not serve it.
pub const BARE: &str = "bare";
/// The operator makes its objects under this label, and lists them by it.
const OWNED: &str = "app.kubernetes.io/managed-by=turret-operator";
/// Pods that are made before it is waited for their workers.
const PODS_AT_ONCE: usize = 64;
/// How long to wait between two looks at all objects.
const BETWEEN_LISTS: Duration = Duration::from_secs(2);

/// What all measurements share.
pub struct Scene {
    /// What is to be measured.
    pub order: Order,
    /// The bench's own client.
    pub client: Client,
    node: Node,
    log: AuditLog,
}

impl Scene {
    /// Prepares a new API server: both kinds, the namespaces, the node.
    pub async fn prepare(order: Order) -> Result<Self> {
        let client = connect(&order.kubeconfig).await?;
        install_kinds(&client).await?;
        for namespace in [NAMESPACE, BARE] {
            let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
            apply(&Api::<Namespace>::all(client.clone()), &object).await?;
        }
        // Without the controller that makes it, no pod would be let in.
        let account = json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default"}});
        apply(&Api::<ServiceAccount>::namespaced(client.clone(), NAMESPACE), &account).await?;
        let node = Node::join(client.clone()).await?;
        let log = AuditLog::at(&order.audit_log);
        Ok(Self { order, client, node, log })
    }

    /// Objects of a kind in the namespace that the operator serves.
    pub fn all<K>(&self) -> Api<K>
    where
        K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// The operator's requests from now on.
    pub fn follow(&self) -> Result<Follow> {
        Follow::begin(&self.log, &self.order.operator_user)
    }

    /// Declares all groups and placements.
    pub async fn declare(&self) -> Result<()> {
        let Order { groups, lenses, placements, workers, .. } = self.order;
        let all = (0..groups).map(|number| layout::group(&layout::group_name(number), lenses, 0));
        apply_all(&self.all::<ModelGroup>(), all).await?;
        let all = (0..placements).map(|number| {
            let group = layout::group_name(layout::group_of(number, groups));
            layout::placement(&layout::placement_name(number), &group, usize::from(number < workers), 0)
        });
        apply_all(&self.all::<ModelPlacement>(), all).await
    }

    /// Makes the pods of the Deployments that want one and have none, and waits until their workers answer.
    pub async fn make_pods(&self) -> Result<()> {
        let mut pods = Vec::new();
        let mut unreadable = None;
        list(&self.all::<Deployment>(), Some(OWNED), |deployment| {
            let wants = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
            match layout::pod(&deployment) {
                Ok(pod) if wants > 0 => pods.push(pod),
                Ok(_) => {}
                Err(error) => unreadable = Some(error),
            }
        })
        .await?;
        if let Some(error) = unreadable {
            return Err(error);
        }
        let workers = self.workers();
        let has_worker = |name: &str| workers.iter().any(|worker| worker.name() == name);
        let missing: Vec<_> =
            pods.into_iter().filter(|(name, _)| !has_worker(name)).map(|(_, pod)| pod).collect();
        let mut expected = workers.len();
        for chunk in missing.chunks(PODS_AT_ONCE) {
            apply_all(&self.all::<Pod>(), chunk.iter().cloned()).await?;
            expected += chunk.len();
            eventually(PATIENCE, "the workers of new pods run", async || {
                let running = self.workers().len();
                Ok(when(running >= expected, || format!("{running} of {expected}")))
            })
            .await?;
        }
        Ok(())
    }

    /// All workers, by the names of their pods.
    pub fn workers(&self) -> Vec<Worker> {
        self.node.workers(NAMESPACE)
    }

    /// The worker of a placement.
    pub fn worker_of(&self, placement: &str) -> Result<Worker> {
        let pod = layout::pod_name(placement);
        let workers = self.workers();
        let found = workers.into_iter().find(|worker| worker.name() == pod);
        found.with_context(|| format!("the placement `{placement}` has no worker"))
    }

    /// What workers were sent that no operator should send.
    pub fn complaints(&self) -> Vec<String> {
        self.node.complaints(NAMESPACE)
    }

    /// Lists, as typed objects, what the operator lists: all kinds at the same time, with connections of its own. Returns how
    /// many objects there are, and the seconds.
    pub async fn list_all(&self) -> Result<(usize, f64)> {
        let client = connect(&self.order.kubeconfig).await?;
        let began = Instant::now();
        let kinds = [
            spawn_list::<ModelGroup>(&client, None),
            spawn_list::<ModelPlacement>(&client, None),
            spawn_list::<ConfigMap>(&client, Some(OWNED)),
            spawn_list::<Service>(&client, Some(OWNED)),
            spawn_list::<PodDisruptionBudget>(&client, Some(OWNED)),
            spawn_list::<Deployment>(&client, Some(OWNED)),
            spawn_list::<Pod>(&client, Some(OWNED)),
        ];
        let mut objects = 0;
        for kind in kinds {
            objects += kind.await.context("a list was broken off")??;
        }
        Ok((objects, began.elapsed().as_secs_f64()))
    }

    /// Waits until every group and every placement is ready, as it is declared now.
    pub async fn all_ready(&self) -> Result<()> {
        let began = Instant::now();
        loop {
            let mut unready = Vec::new();
            list(&self.all::<ModelGroup>(), None, |group: ModelGroup| {
                let conditions = group.status.as_ref().map(|status| status.conditions.as_slice());
                unready.extend(unready_of(&group, conditions.unwrap_or_default()));
            })
            .await?;
            list(&self.all::<ModelPlacement>(), None, |placement: ModelPlacement| {
                let conditions = placement.status.as_ref().map(|status| status.conditions.as_slice());
                unready.extend(unready_of(&placement, conditions.unwrap_or_default()));
            })
            .await?;
            let Some(first) = unready.first() else { return Ok(()) };
            ensure!(
                began.elapsed() < PATIENCE,
                "{} objects are not ready; one of them: {first}",
                unready.len()
            );
            tokio::time::sleep(BETWEEN_LISTS).await;
        }
    }

    /// Waits until a placement says that its workers serve it as it is declared now.
    pub async fn placement_ready(&self, name: &str) -> Result<()> {
        let api = self.all::<ModelPlacement>();
        eventually(PATIENCE, &format!("the placement `{name}` is ready"), async || {
            let placement = api.get(name).await?;
            let conditions = placement.status.as_ref().map(|status| status.conditions.as_slice());
            Ok(unready_of(&placement, conditions.unwrap_or_default()).map_or(Ok(()), Err))
        })
        .await
    }

    /// Waits until a placement has its Deployment, from which its pods are made.
    pub async fn deployment_of(&self, placement: &str) -> Result<()> {
        let api = self.all::<Deployment>();
        let name = label::owned_name(placement);
        eventually(PATIENCE, &format!("there is the Deployment `{name}`"), async || {
            Ok(api.get_opt(&name).await?.map(drop).ok_or_else(|| "there is none".to_owned()))
        })
        .await
    }
}

fn spawn_list<K>(client: &Client, labels: Option<&'static str>) -> tokio::task::JoinHandle<Result<usize>>
where
    K: Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    let api = Api::<K>::namespaced(client.clone(), NAMESPACE);
    tokio::spawn(async move { list(&api, labels, drop).await })
}

/// What an object says instead of being ready as it is declared now.
fn unready_of<K: Resource<DynamicType = ()>>(object: &K, conditions: &[Condition]) -> Option<String> {
    let ready = conditions.iter().find(|condition| condition.type_ == condition::READY);
    let is_ready = ready
        .is_some_and(|ready| ready.status == "True" && ready.observed_generation == object.meta().generation);
    (!is_ready).then(|| {
        let said = ready.map_or("nothing", |ready| ready.message.as_str());
        format!("{} `{}` says: {said}", K::kind(&()), object.name_any())
    })
}

/// Bounds a step that may hang.
pub async fn within<T>(limit: Duration, what: &str, step: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(limit, step).await {
        Ok(done) => done,
        Err(_) => bail!("{what} has not ended after {} s", limit.as_secs()),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    #[test]
    fn only_the_generation_that_is_declared_now_counts_as_ready() {
        let mut group: ModelGroup = serde_json::from_value(layout::group("g", 1, 0)).unwrap();
        group.metadata.generation = Some(2);
        let ready = |status: &str, generation: i64| Condition {
            type_: condition::READY.into(),
            status: status.into(),
            observed_generation: Some(generation),
            reason: "Serving".into(),
            message: "so it is".into(),
            last_transition_time: Time(Timestamp::UNIX_EPOCH),
        };
        assert_eq!(unready_of(&group, &[ready("True", 2)]), None);
        assert_eq!(unready_of(&group, &[]).unwrap(), "ModelGroup `g` says: nothing");
        for unready in [ready("False", 2), ready("True", 1)] {
            assert_eq!(unready_of(&group, &[unready]).unwrap(), "ModelGroup `g` says: so it is");
        }
    }

    #[tokio::test]
    async fn a_step_that_hangs_is_given_up() {
        let never = std::future::pending::<Result<()>>();
        let given_up = within(Duration::ZERO, "waiting", never).await.unwrap_err().to_string();
        assert_eq!(given_up, "waiting has not ended after 0 s");
        assert_eq!(within(PATIENCE, "a step", async { Ok(7) }).await.unwrap(), 7);
    }
}
