//! A story: what a user does with one group and one placement, step by step, in a namespace of its own, with an operator of its
//! own behind a proxy.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Secret, Service, ServiceAccount};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, Client};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;
use turret_crds::{ModelGroup, ModelPlacement};

use super::end_state::{EndState, Found};
use super::node::LABEL;
use super::operator::{Lives, Operator, Start};
use super::plan::{Crash, Fault};
use super::proxy::Proxy;
use super::step::{GROUP, PLACEMENT, Step};
use super::world::World;
use crate::cluster::eventually::{PATIENCE, eventually};

/// How long a step may take, faults included.
const LONGEST_STEP: Duration = Duration::from_secs(180);
/// A step is done when nothing was written for so long.
const QUIET: Duration = Duration::from_millis(500);
/// How long to wait between two looks at what there is.
const BETWEEN_LOOKS: Duration = Duration::from_millis(250);
/// Image of workers that nobody starts.
pub const NO_IMAGE: &str = "turret.test/worker:simulated";
/// The ConfigMap that every namespace has.
const ROOT_CERTIFICATES: &str = "kube-root-ca.crt";

/// One run of it.
pub struct Story<'w> {
    world: &'w World,
    /// Its namespace.
    pub namespace: String,
    /// Between its operator and the API server.
    pub proxy: Arc<Proxy>,
    /// How long nothing may be written until a step counts as done.
    pub quiet: Duration,
    operator: Option<Operator>,
    folder: TempDir,
}

impl<'w> Story<'w> {
    /// Makes the namespace. The operator does not run yet.
    pub async fn begin(world: &'w World, name: &str, fault: Option<Fault>, seed: u64) -> Result<Self> {
        let namespace = format!("faults-{name}");
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        apply(&Api::<Namespace>::all(world.client.clone()), &object).await?;
        let accounts = Api::<ServiceAccount>::namespaced(world.client.clone(), &namespace);
        eventually(PATIENCE, "the namespace has the service account of its pods", async || {
            Ok(accounts.get_opt("default").await?.map(drop).ok_or_else(|| "it has not".to_owned()))
        })
        .await?;
        let proxy = Proxy::start(world.upstream.clone(), &world.tls, fault, seed).await?;
        let folder = tempfile::tempdir()?;
        Ok(Self { world, namespace, proxy: Arc::new(proxy), quiet: QUIET, operator: None, folder })
    }

    /// Starts the operator.
    pub fn start(&mut self, worker_image: &str) -> Result<()> {
        let start = Start {
            program: self.world.environment.operator.clone(),
            namespace: self.namespace.clone(),
            worker_image: worker_image.to_owned(),
            folder: self.folder.path().to_owned(),
        };
        self.operator = Some(Operator::start(start, self.proxy.clone())?);
        Ok(())
    }

    /// Kills the operator, until it is started again.
    pub async fn halt(&mut self) {
        if let Some(operator) = self.operator.take() {
            operator.stop().await;
        }
    }

    /// Objects of a kind in the namespace.
    pub fn all<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>,
    {
        Api::namespaced(self.world.client.clone(), &self.namespace)
    }

    /// Does one step, with a crash or without, and waits until it has come to the end that `wanted` wants.
    pub async fn carry_out(
        &mut self,
        step: Step,
        crash: Option<Crash>,
        wanted: impl Fn(&EndState) -> Result<(), String>,
    ) -> Result<EndState> {
        let pods = self.look().await?.pods;
        self.proxy.begin_step(crash);
        self.act(step).await.with_context(|| format!("{}: {step:?} could not be done", self.namespace))?;
        let state = self.settles(&format!("{step:?}"), wanted).await?;
        ensure!(
            !step.keeps_pods() || state.pods == pods,
            "{}: {step:?} replaced pods: {pods:?} became {:?}",
            self.namespace,
            state.pods
        );
        Ok(state)
    }

    async fn act(&mut self, step: Step) -> Result<()> {
        let (one, two) = (["a", "one"], ["b", "two"]);
        match step {
            Step::Start => self.start(NO_IMAGE)?,
            Step::Create => {
                self.declare_group(&[one]).await?;
                self.declare_placement(1).await?;
            }
            Step::AddLens => self.declare_group(&[one, two]).await?,
            Step::ScaleUp => self.declare_placement(2).await?,
            Step::ScaleDown => self.declare_placement(1).await?,
            Step::ChangeLens => self.declare_group(&[one, ["b", "three"]]).await?,
            Step::RemoveLens => self.declare_group(&[one]).await?,
            Step::DeletePlacement => self.delete::<ModelPlacement>(PLACEMENT).await?,
            Step::DeleteGroup => self.delete::<ModelGroup>(GROUP).await?,
        }
        Ok(())
    }

    async fn declare_group(&self, lenses: &[[&str; 2]]) -> Result<()> {
        let lenses: Vec<_> = lenses
            .iter()
            .map(
                |[name, folder]| json!({"name": name, "source": {"uri": format!("file:///models/{folder}")}}),
            )
            .collect();
        let group = json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup", "metadata": {"name": GROUP},
            "spec": {"base": {"source": {"uri": "file:///models/base"}}, "lenses": lenses},
        });
        self.apply::<ModelGroup>(&group).await
    }

    async fn declare_placement(&self, replicas: u32) -> Result<()> {
        let placement = json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement", "metadata": {"name": PLACEMENT},
            "spec": {
                "groups": [{"name": GROUP}],
                "replicas": replicas,
                "terminationDrainSeconds": 0,
                "worker": {"nodeSelector": {LABEL: "true"}, "tolerations": [{"operator": "Exists"}]},
            },
        });
        self.apply::<ModelPlacement>(&placement).await
    }

    /// Applies any object of a kind in the namespace.
    pub async fn apply<K>(&self, object: &Value) -> Result<()>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        apply(&self.all::<K>(), object).await
    }

    /// Deletes an object of the namespace, if it is there.
    pub async fn delete<K>(&self, name: &str) -> Result<()>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + Clone
            + std::fmt::Debug
            + DeserializeOwned,
    {
        delete(&self.all::<K>(), name).await
    }

    /// What became of the operator's processes, if it was ever started.
    pub fn lives(&self) -> Option<Lives> {
        self.operator.as_ref().map(Operator::lives)
    }

    /// Waits until what there is is wanted, nothing is written any more, and it is still so.
    pub async fn settles(
        &self,
        what: &str,
        wanted: impl Fn(&EndState) -> Result<(), String>,
    ) -> Result<EndState> {
        let began = Instant::now();
        let record = self.proxy.record();
        loop {
            let rest = LONGEST_STEP.saturating_sub(began.elapsed());
            let is_quiet = tokio::time::timeout(rest, record.quiet(self.quiet)).await.is_ok();
            let writes = record.writes().len();
            let state = self.look().await?;
            let reached = wanted(&state);
            if reached.is_ok() && is_quiet && record.writes().len() == writes {
                return Ok(state);
            }
            let given_up = self.lives().and_then(|lives| lives.failure);
            if began.elapsed() >= LONGEST_STEP || given_up.is_some() {
                let why = given_up.or_else(|| reached.err()).or_else(|| record.unsettled());
                let why = self.explain(&why.unwrap_or_else(|| "it goes on writing".to_owned()));
                let seconds = began.elapsed().as_secs();
                bail!("{}: {what} has not settled after {seconds} s: {why}", self.namespace);
            }
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
    }

    /// What a person would look at next.
    fn explain(&self, why: &str) -> String {
        let mut text = format!("{why}\n--- writes of this step");
        for write in self.proxy.record().writes() {
            text += &format!("\n{write}");
        }
        if let Some(operator) = &self.operator {
            text += &format!("\n--- {:?}\n{}", operator.lives(), operator.last_words(40));
        }
        text
    }

    /// What there is now.
    pub async fn look(&self) -> Result<EndState> {
        let mut objects = Vec::new();
        let (client, namespace) = (&self.world.client, self.namespace.as_str());
        list::<ModelGroup>(client, namespace, &mut objects).await?;
        list::<ModelPlacement>(client, namespace, &mut objects).await?;
        list::<ConfigMap>(client, namespace, &mut objects).await?;
        list::<Service>(client, namespace, &mut objects).await?;
        list::<PodDisruptionBudget>(client, namespace, &mut objects).await?;
        list::<Deployment>(client, namespace, &mut objects).await?;
        list::<ReplicaSet>(client, namespace, &mut objects).await?;
        list::<Pod>(client, namespace, &mut objects).await?;
        list::<Secret>(client, namespace, &mut objects).await?;
        list::<Lease>(client, namespace, &mut objects).await?;
        objects.retain(|object| object["metadata"]["name"] != ROOT_CERTIFICATES);
        let workers = self.world.node.workers(namespace).iter().map(|worker| worker.report()).collect();
        Ok(EndState::of(&Found { namespace: namespace.to_owned(), objects, workers }))
    }

    /// Deletes what is left, and waits until there is no more than `last`. Then nobody may have complained, and the namespace
    /// goes too. Answers how often the operator was killed, and how it ended by itself.
    pub async fn end(mut self, last: &EndState) -> Result<Ending> {
        self.proxy.begin_step(None);
        self.act(Step::DeletePlacement).await?;
        self.act(Step::DeleteGroup).await?;
        self.settles("deleting everything", |state| is(state, last)).await?;
        let lives = self.lives().context("the operator was never started")?;
        let strikes = self.proxy.record().strikes();
        let complaints = self.world.node.complaints(&self.namespace);
        ensure!(
            complaints.is_empty(),
            "{}: workers were sent what no operator should send: {complaints:?}",
            self.namespace
        );
        self.remove().await?;
        Ok(Ending { kills: lives.kills, exits: lives.exits, strikes })
    }

    /// Kills the operator, and deletes the namespace without waiting.
    pub async fn remove(mut self) -> Result<()> {
        self.halt().await;
        delete(&Api::<Namespace>::all(self.world.client.clone()), &self.namespace).await
    }
}

/// How a story ended.
#[derive(Clone, Debug)]
pub struct Ending {
    /// How often the operator was killed.
    pub kills: usize,
    /// How it ended by itself.
    pub exits: Vec<String>,
    /// How often a fault struck.
    pub strikes: u32,
}

/// Whether two ends are the same; else where they differ.
pub fn is(state: &EndState, expected: &EndState) -> Result<(), String> {
    let differences = state.differences(expected);
    if differences.is_empty() { Ok(()) } else { Err(differences.join("\n")) }
}

async fn apply<K>(api: &Api<K>, object: &Value) -> Result<()>
where
    K: Clone + std::fmt::Debug + DeserializeOwned,
{
    let name = object["metadata"]["name"].as_str().context("an object has a name")?;
    let params = PatchParams::apply("turret-test-user").force();
    api.patch(name, &params, &Patch::Apply(object))
        .await
        .with_context(|| format!("failed to apply `{name}`"))?;
    Ok(())
}

/// Deletes an object, if it is there.
async fn delete<K>(api: &Api<K>, name: &str) -> Result<()>
where
    K: Clone + std::fmt::Debug + DeserializeOwned,
{
    match api.delete(name, &DeleteParams::default()).await {
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        deleted => deleted.map(drop).with_context(|| format!("failed to delete `{name}`")),
    }
}

async fn list<K>(client: &Client, namespace: &str, found: &mut Vec<Value>) -> Result<()>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
        + Clone
        + std::fmt::Debug
        + DeserializeOwned
        + Serialize,
{
    let objects = Api::<K>::namespaced(client.clone(), namespace).list(&ListParams::default()).await?;
    for object in objects.items {
        let mut value = serde_json::to_value(&object)?;
        value["kind"] = K::kind(&()).into_owned().into();
        found.push(value);
    }
    Ok(())
}
