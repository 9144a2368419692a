//! What the API server says of random objects, and what is said of them without it.

use anyhow::{Context, Result, bail};
use kube::api::{DynamicObject, PostParams};
use kube::{Api, Client};
use serde_json::Value;
use turret_crds::validate::{Cause, Rules};

use super::agree::agree;
use super::generate::generate;
use super::kind::kinds;
use super::spoil::spoil;
use crate::numbers::Numbers;

/// How much was judged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Judged {
    /// Objects that both take.
    pub valid: usize,
    /// Objects that both refuse.
    pub refused: usize,
}

/// Tries so many objects of each kind with a server-side dry run. The error names those that are judged otherwise without a
/// cluster.
pub async fn compare(client: &Client, numbers: &mut Numbers, of_each: usize) -> Result<Judged> {
    let (mut judged, mut wrong) = (Judged::default(), Vec::new());
    for kind in kinds() {
        let (rules, api, schema) = (Rules::of(&kind.crd), kind.api(client, "default"), kind.spec_schema());
        for _ in 0..of_each {
            let mut spec = generate(&schema, "spec", numbers);
            if !numbers.one_in(4) {
                agree(kind.name(), &mut spec);
            }
            let mut object = kind.object("random", &spec);
            if numbers.one_in(2) {
                spoil(&mut object, numbers);
            }
            let here: Vec<String> = rules
                .judge(&object)
                .refusals
                .into_iter()
                // Such fields are dropped where validation is not strict.
                .filter(|refusal| refusal.cause != Cause::UnknownField)
                .map(|refusal| refusal.to_string())
                .collect();
            match (here.as_slice(), refusal(&api, &object).await?) {
                ([], None) => judged.valid += 1,
                ([_, ..], Some(_)) => judged.refused += 1,
                ([], Some(said)) => wrong.push(format!("only the API server refuses {object}: {said}")),
                (here, None) => wrong.push(format!("the API server takes {object}, in spite of {here:?}")),
            }
        }
    }
    if !wrong.is_empty() {
        let shown = wrong[..wrong.len().min(5)].join("\n");
        bail!("{} objects are judged otherwise without a cluster:\n{shown}", wrong.len());
    }
    Ok(judged)
}

/// Why an object is refused, if it is.
async fn refusal(api: &Api<DynamicObject>, object: &Value) -> Result<Option<String>> {
    let object: DynamicObject = serde_json::from_value(object.clone())?;
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    match api.create(&dry, &object).await {
        Ok(_) => Ok(None),
        Err(kube::Error::Api(status)) if (400..500).contains(&status.code) && status.code != 429 => {
            Ok(Some(status.message.clone()))
        }
        Err(error) => Err(error).context("failed to try an object"),
    }
}
