//! What is made by the operator is changed by hand.

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::Api;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use turret_crds::label;

use super::super::story::Story;
use crate::numbers::Numbers;

/// Changes or deletes every object that a placement owns, and answers how many.
pub async fn tamper(story: &Story<'_>, numbers: &mut Numbers) -> Result<usize> {
    let lost = json!({"metadata": {"labels": {(label::APP_MANAGED_BY): "nobody"}}});
    let other_port = json!([{"name": "other", "port": 1, "protocol": "TCP"}]);
    let other_digest = json!({"metadata": {"annotations": {(label::DOCUMENT_DIGEST): "sha256:other"}}});
    let mut count = 0;
    count += each::<Deployment>(
        story.all(),
        &[Some(json!({"spec": {"replicas": 7}})), Some(lost.clone()), None],
        numbers,
    )
    .await?;
    count += each::<Service>(
        story.all(),
        &[Some(json!({"spec": {"ports": other_port}})), Some(lost.clone()), None],
        numbers,
    )
    .await?;
    count += each::<PodDisruptionBudget>(
        story.all(),
        &[Some(json!({"spec": {"maxUnavailable": 0}})), Some(lost.clone()), None],
        numbers,
    )
    .await?;
    count += each::<ConfigMap>(story.all(), &[Some(other_digest), Some(lost), None], numbers).await?;
    Ok(count)
}

/// Does any of these to each object of a kind: a patch, or else it is deleted.
async fn each<K>(api: Api<K>, deeds: &[Option<Value>], numbers: &mut Numbers) -> Result<usize>
where
    K: kube::Resource<DynamicType = ()> + Clone + std::fmt::Debug + DeserializeOwned,
{
    let owned = api.list(&ListParams::default().labels(label::PLACEMENT)).await?.items;
    for object in &owned {
        let name = object.meta().name.as_deref().context("an object has a name")?;
        let tampered = match numbers.pick(deeds) {
            Some(patch) => api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.map(drop),
            None => api.delete(name, &DeleteParams::default()).await.map(drop),
        };
        tampered.with_context(|| format!("failed to change `{name}` by hand"))?;
    }
    Ok(owned.len())
}
