//! Both kinds against a real API server: what is valid is accepted, at the largest size too, and
//! what is not is refused with a message a person understands.
//!
//! Everything is a server-side dry run, so nothing is left behind. The examples are those that
//! `crds/tests/crd/cel.rs` tries without a cluster.

use anyhow::{Context, Result, bail};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{Api, DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;

#[path = "../../../crds/tests/rules/mod.rs"]
pub mod examples;

use examples::{Kind, bounds, kinds};

/// How much was tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tried {
    /// Valid objects that were accepted.
    pub accepted: usize,
    /// Objects that broke a rule and were refused with its message.
    pub refused_by_rule: usize,
    /// Objects one beyond a bound of the schema that were refused.
    pub refused_by_bound: usize,
}

/// Tries every example of both kinds. The error names all that went otherwise than expected.
pub async fn check(client: &Client) -> Result<Tried> {
    let mut tried = Tried::default();
    let mut wrong = Vec::new();
    for kind in kinds() {
        installed_as_printed(client, &kind).await?;
        let api = api(client, &kind);
        for (what, object) in kind.valid() {
            match create(&api, &kind, &object).await? {
                Outcome::Accepted => tried.accepted += 1,
                Outcome::Refused(message) => {
                    wrong.push(format!("{}: {what} was refused: {message}", kind.name()))
                }
            }
        }
        for (message, object) in kind.invalid() {
            match create(&api, &kind, &object).await? {
                Outcome::Refused(said) if said.contains(&message) => tried.refused_by_rule += 1,
                other => wrong.push(format!("{}: expected «{message}», got {other:?}", kind.name())),
            }
        }
        for bound in bounds(&kind) {
            match create(&api, &kind, &bound.beyond).await? {
                Outcome::Refused(said) if said.contains(bound.refusal) => tried.refused_by_bound += 1,
                other => wrong.push(format!(
                    "{}: {}: expected «{}», got {other:?}",
                    kind.name(),
                    bound.name,
                    bound.refusal
                )),
            }
        }
    }
    if !wrong.is_empty() {
        bail!("the API server judged otherwise than the examples say:\n{}", wrong.join("\n"));
    }
    Ok(tried)
}

#[derive(Debug)]
enum Outcome {
    Accepted,
    Refused(String),
}

/// The CRD must be the one under test, and the API server must have compiled all of its rules.
async fn installed_as_printed(client: &Client, kind: &Kind) -> Result<()> {
    let name = kind.crd.metadata.name.as_deref().context("a CRD has a name")?;
    let live = Api::<CustomResourceDefinition>::all(client.clone())
        .get(name)
        .await
        .with_context(|| format!("CRD {name} is not installed"))?;
    let conditions = live.status.and_then(|s| s.conditions).unwrap_or_default();
    if !conditions.iter().any(|c| c.type_ == "Established" && c.status == "True") {
        bail!("CRD {name} is not established: {conditions:?}");
    }
    if let Some(bad) = conditions.iter().find(|c| c.type_ == "NonStructuralSchema" && c.status == "True") {
        bail!("CRD {name} has no structural schema: {:?}", bad.message);
    }
    if live.spec.versions != kind.crd.spec.versions {
        bail!("the installed CRD {name} is not what `turret-operator crds` prints");
    }
    Ok(())
}

fn api(client: &Client, kind: &Kind) -> Api<DynamicObject> {
    let gvk = GroupVersionKind::gvk(turret_crds::GROUP, turret_crds::VERSION, kind.name());
    let resource = ApiResource::from_gvk_with_plural(&gvk, &kind.crd.spec.names.plural);
    Api::namespaced_with(client.clone(), "default", &resource)
}

async fn create(api: &Api<DynamicObject>, kind: &Kind, object: &Value) -> Result<Outcome> {
    let object: DynamicObject = serde_json::from_value(object.clone())?;
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    match api.create(&dry, &object).await {
        Ok(_) => Ok(Outcome::Accepted),
        Err(kube::Error::Api(status)) if status.code == 422 => Ok(Outcome::Refused(status.message.clone())),
        Err(error) => Err(error).with_context(|| format!("failed to try a {}", kind.name())),
    }
}
