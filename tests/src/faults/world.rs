//! What all stories share: the cluster, the simulated node, and the story without faults that the others are compared with.

use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use futures::{StreamExt as _, stream};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt as _};
use tokio::sync::OnceCell;

use super::end_state::EndState;
use super::malformed;
use super::node::Node;
use super::plan::{Crash, Fault};
use super::step::Step;
use super::story::{Ending, Story, is};
use super::tls::Tls;
use crate::cluster::environment::Environment;
use crate::cluster::eventually::{PATIENCE, eventually, when};

/// Without faults, a step is done when nothing was written for so long.
const CALM: Duration = Duration::from_millis(1200);
/// Stories with crashes that go on at the same time.
const AT_ONCE: usize = 6;
/// Seed of all that is thrown for.
const SEED: u64 = 20_240_607;
/// A story with a fault has these steps, and then everything is deleted.
const SHORT: usize = 4;

/// What all stories share.
pub struct World {
    /// What the suite was told.
    pub environment: Environment,
    /// An administrator's client of the API server.
    pub client: Client,
    /// The same for the proxies: what the API server says is passed on as it is.
    pub upstream: Client,
    /// What the proxies show.
    pub tls: Tls,
    /// Where pods are simulated.
    pub node: Node,
    reference: OnceCell<Result<Reference, String>>,
}

/// The story without faults: after each step what was written and what there was.
#[derive(Clone, Debug)]
pub struct Reference {
    steps: Vec<(Vec<String>, EndState)>,
}

impl Reference {
    fn last(&self) -> &EndState {
        &self.steps.last().expect("a story has steps").1
    }
}

impl World {
    /// Installs both kinds, and makes the simulated node join.
    pub async fn prepare(environment: Environment) -> Result<Self> {
        // A second call in one process finds it set, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let kubeconfig = Kubeconfig::read_from(&environment.kubeconfig)?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config.clone())?;
        let mut passing = config;
        passing.default_retry = false;
        // Before there is anybody whom it could disturb.
        malformed::store(&client).await?;
        install_kinds(&client).await?;
        malformed::is_refused_from_now_on(&client).await?;
        Ok(Self {
            environment,
            upstream: Client::try_from(passing)?,
            tls: Tls::new()?,
            node: Node::join(client.clone()).await?,
            client,
            reference: OnceCell::new(),
        })
    }

    async fn reference(&self) -> Result<&Reference> {
        let told = self
            .reference
            .get_or_init(|| async { self.tell_undisturbed().await.map_err(|error| format!("{error:#}")) });
        told.await.as_ref().map_err(|error| anyhow!("the story without faults has failed: {error}"))
    }

    async fn tell_undisturbed(&self) -> Result<Reference> {
        let mut story = Story::begin(self, "undisturbed", None, SEED).await?;
        story.quiet = CALM;
        let mut steps = Vec::new();
        for step in Step::ALL {
            let state = story.carry_out(step, None, |state| step.is_reached(state)).await?;
            let writes = story.proxy.record().writes();
            println!("    {step:?}: {} writes", writes.len());
            ensure!(
                !writes.is_empty() || step == Step::DeleteGroup,
                "{step:?} made the operator write nothing"
            );
            steps.push((writes, state));
        }
        let reference = Reference { steps };
        let Ending { exits, .. } = story.end(reference.last()).await?;
        ensure!(exits.is_empty(), "the operator ended by itself without faults: {exits:?}");
        Ok(reference)
    }

    /// For every n, the operator is killed after the nth write of each step, once with the answer to it and once without, and
    /// started again: every step comes to the same end as without.
    pub async fn crash_after_every_write(&self) -> Result<()> {
        let reference = self.reference().await?;
        let most = reference.steps.iter().map(|(writes, _)| writes.len()).max().unwrap_or_default();
        let crashes = (1..=most).flat_map(|after| [true, false].map(|answered| Crash { after, answered }));
        let told: Vec<_> = stream::iter(crashes)
            .map(|crash| self.tell_with_crashes(reference, crash))
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let count = told.len();
        let (mut kills, mut planned, mut failed) = (0, 0, Vec::new());
        for one in told {
            match one {
                Ok((had, wanted)) => (kills, planned) = (kills + had, planned + wanted),
                Err(error) => failed.push(format!("{error:#}")),
            }
        }
        println!("    {count} stories, {kills} crashes after the 1st to {most}th write of a step");
        if !failed.is_empty() {
            // The first ones say what is wrong; the others most often the same.
            bail!(
                "{} of {count} stories went wrong:\n{}",
                failed.len(),
                failed[..failed.len().min(3)].join("\n")
            );
        }
        // How often a status is written on the way depends on how fast pods come: not every story has as many writes.
        ensure!(2 * kills > planned, "only {kills} of {planned} crashes were had");
        Ok(())
    }

    /// A story with a crash in each step that writes often enough; how many were had, and how many wanted.
    async fn tell_with_crashes(&self, reference: &Reference, crash: Crash) -> Result<(usize, usize)> {
        let how = if crash.answered { "answered" } else { "unanswered" };
        let is_had = |(writes, _): &(Vec<String>, EndState)| writes.len() >= crash.after;
        // What comes after the last crash has been seen.
        let steps = reference.steps.iter().rposition(is_had).map_or(0, |last| last + 1);
        let wanted = reference.steps.iter().filter(|(writes, _)| writes.len() >= crash.after).count();
        let mut story = Story::begin(self, &format!("{how}-{}", crash.after), None, SEED).await?;
        for (step, expected) in Step::ALL.into_iter().zip(&reference.steps).take(steps) {
            let crash = is_had(expected).then_some(crash);
            let carried_out = story.carry_out(step, crash, |state| is(state, &expected.1)).await;
            carried_out.with_context(|| format!("killed in {step:?}: {crash:?}"))?;
        }
        let Ending { kills, exits, .. } = story.end(reference.last()).await?;
        ensure!(exits.is_empty(), "{crash:?}: the operator ended by itself: {exits:?}");
        Ok((kills, wanted))
    }

    /// With a fault between operator and API server every step comes to the same end as without.
    pub async fn endure(&self, fault: Fault) -> Result<()> {
        let reference = self.reference().await?;
        let mut story = Story::begin(self, &fault.slug(), Some(fault), SEED).await?;
        for (step, expected) in Step::ALL.into_iter().zip(&reference.steps).take(SHORT) {
            // Lists are stale for whoever starts; so it must start.
            let restarts = fault == Fault::ListsAreStale && step != Step::Start;
            let crash = restarts.then_some(Crash { after: 1, answered: true });
            let carried_out = story.carry_out(step, crash, |state| is(state, &expected.1)).await;
            carried_out.with_context(|| format!("{fault:?}"))?;
        }
        let Ending { kills, exits, strikes } = story.end(reference.last()).await?;
        println!(
            "    {fault:?}: struck {strikes} times; killed {kills} times, ended by itself {} times",
            exits.len()
        );
        ensure!(strikes > 0, "{fault:?} has struck nothing, so nothing was shown");
        Ok(())
    }
}

/// The CRDs of the contract under test.
pub async fn install_kinds(client: &Client) -> Result<()> {
    for definition in turret_crds::crds() {
        apply_kind(client, &definition).await?;
    }
    Ok(())
}

/// Installs or changes a kind, and waits until it is served.
pub async fn apply_kind(client: &Client, definition: &CustomResourceDefinition) -> Result<()> {
    let definitions = Api::<CustomResourceDefinition>::all(client.clone());
    let name = definition.name_any();
    let params = PatchParams::apply("turret-test-user").force();
    definitions.patch(&name, &params, &Patch::Apply(definition)).await?;
    let what = format!("the API server serves {name}");
    eventually(PATIENCE, &what, async || {
        let status = definitions.get(&name).await?.status;
        let conditions = status.and_then(|status| status.conditions).unwrap_or_default();
        let is_served = conditions.iter().any(|c| c.type_ == "Established" && c.status == "True");
        Ok(when(is_served, || format!("{conditions:?}")))
    })
    .await
}
