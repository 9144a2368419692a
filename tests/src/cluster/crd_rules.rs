//! Both kinds against a real API server: what is valid is accepted, at the largest size too, and
//! what is not is refused with a message a person understands; and `turret_crds::validate`, which
//! judges without a cluster, says exactly the same of each example, path by path and word by word.
//!
//! Everything is a server-side dry run, so nothing is left behind. The examples are those that
//! `crds/tests/crd/cel.rs` tries without a cluster.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::Client;
use kube::api::{Api, DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind, Request};
use serde_json::{Value, json};
use turret_crds::validate::{Cause, Refusal, Rules};

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
        let rules = Rules::of(&kind.crd);
        for (what, object) in kind.valid() {
            let outcome = create(&api, &kind, &object).await?;
            wrong.extend(said_otherwise(&rules, &object, &outcome));
            match outcome {
                Outcome::Accepted => tried.accepted += 1,
                Outcome::Refused(message, _) => {
                    wrong.push(format!("{}: {what} was refused: {message}", kind.name()))
                }
            }
        }
        for (message, object) in kind.invalid() {
            let outcome = create(&api, &kind, &object).await?;
            wrong.extend(said_otherwise(&rules, &object, &outcome));
            match outcome {
                Outcome::Refused(said, _) if said.contains(&message) => tried.refused_by_rule += 1,
                other => wrong.push(format!("{}: expected «{message}», got {other:?}", kind.name())),
            }
        }
        for bound in bounds(&kind) {
            let outcome = create(&api, &kind, &bound.beyond).await?;
            wrong.extend(said_otherwise(&rules, &bound.beyond, &outcome));
            match outcome {
                Outcome::Refused(said, _) if said.contains(bound.refusal) => tried.refused_by_bound += 1,
                other => wrong.push(format!(
                    "{}: {}: expected «{}», got {other:?}",
                    kind.name(),
                    bound.name,
                    bound.refusal
                )),
            }
        }
        wrong.extend(unknown_fields_named_otherwise(client, &kind, &rules).await?);
    }
    if !wrong.is_empty() {
        bail!(
            "the API server judged otherwise than the examples and `turret_crds::validate` say:\n{}",
            wrong.join("\n")
        );
    }
    Ok(tried)
}

#[derive(Debug)]
enum Outcome {
    Accepted,
    /// The message, and each cause.
    Refused(String, BTreeSet<Said>),
}

/// Path and message of one fault.
type Said = (String, String);

/// What is judged here otherwise than by the API server, if anything is.
fn said_otherwise(rules: &Rules, object: &Value, outcome: &Outcome) -> Option<String> {
    let refusals = rules.judge(object).refusals;
    let here: BTreeSet<Said> = refusals.into_iter().map(|r| (r.path, comparable(&r.message))).collect();
    let there = match outcome {
        Outcome::Accepted => BTreeSet::new(),
        Outcome::Refused(_, causes) => causes.clone(),
    };
    let only =
        |one: &BTreeSet<Said>, other: &BTreeSet<Said>| one.difference(other).cloned().collect::<Vec<_>>();
    (here != there).then(|| {
        let (missing, added) = (only(&there, &here), only(&here, &there));
        format!("without a cluster {missing:?} is not said, but {added:?}, of {}", object["spec"])
    })
}

/// Why a rule could not be evaluated is told by each evaluator in its own words; which one it was is not.
fn comparable(message: &str) -> String {
    match message.split_once(" evaluating rule: ") {
        Some((_, rule)) => format!("evaluating rule: {rule}"),
        None => message.to_owned(),
    }
}

/// Unknown fields are errors only where validation is strict, and then the API server says nothing else.
async fn unknown_fields_named_otherwise(
    client: &Client,
    kind: &Kind,
    rules: &Rules,
) -> Result<Option<String>> {
    let mut object = kind.examples.complete.clone();
    object["spec"]["nosuch"] = json!({"field": 1});
    object["metadata"]["nosuch"] = json!(1);
    let refusals = rules.judge(&object).refusals;
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let api = api(client, kind);
    let mut request = Request::new(api.resource_url()).create(&dry, serde_json::to_vec(&object)?)?;
    *request.uri_mut() = format!("{}&fieldValidation=Strict", request.uri()).parse()?;
    let said = match client.request::<DynamicObject>(request).await {
        Err(kube::Error::Api(status)) => status.message.clone(),
        Ok(_) => "nothing".into(),
        Err(error) => return Err(error).context("failed to try unknown fields"),
    };
    let is_said = |refusal: &Refusal| refusal.cause == Cause::UnknownField && said.contains(&refusal.message);
    let same = refusals.len() == 2 && refusals.iter().all(is_said);
    Ok((!same).then(|| format!("{}: of unknown fields {refusals:?} is said, but {said}", kind.name())))
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
        Err(kube::Error::Api(status)) if status.code == 422 => {
            let causes = status.details.iter().flat_map(|details| &details.causes);
            // What is about the whole object has no path here.
            let path = |field: &str| if field == "<nil>" { String::new() } else { field.to_owned() };
            let said = causes.map(|cause| (path(&cause.field), comparable(&cause.message))).collect();
            Ok(Outcome::Refused(status.message.clone(), said))
        }
        Err(error) => Err(error).with_context(|| format!("failed to try a {}", kind.name())),
    }
}
