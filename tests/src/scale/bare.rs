//! The same writes without an operator: what it wrote, read back and applied in another namespace, as many at the same time as
//! the operator can send.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use futures::{StreamExt as _, TryStreamExt as _, future, stream};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, Patch, PostParams};
use serde_json::{Value, json};
use turret_crds::{ModelGroup, ModelPlacement};

use super::client::{AT_ONCE, apply, user};
use super::layout::NAMESPACE;
use super::scene::{BARE, Scene};
use crate::cluster::audit::Request;

/// One write.
enum Write {
    /// An object, or its status, is applied.
    Apply { api: Api<DynamicObject>, name: String, patch: Value, is_status: bool },
    /// An event is published.
    Publish { api: Api<Event>, event: Box<Event> },
}

/// Writes the same again; returns the seconds that it took. What is read and made before is not counted.
pub async fn replay(scene: &Scene, writes: &[Request], round: usize) -> Result<f64> {
    let mut known: BTreeMap<(String, String), Value> = BTreeMap::new();
    let mut prepared = Vec::new();
    for (number, request) in writes.iter().enumerate() {
        let object = &request.object_ref;
        if object.resource == "events" {
            let api = Api::<Event>::namespaced(scene.client.clone(), BARE);
            prepared.push(Write::Publish { api, event: Box::new(event(round, number)?) });
            continue;
        }
        let resource = resource(&object.resource)
            .with_context(|| format!("the operator wrote what nobody expects: {request}"))?;
        let of = |namespace: &str| {
            Api::<DynamicObject>::namespaced_with(scene.client.clone(), namespace, &resource)
        };
        let key = (object.resource.clone(), object.name.clone());
        let is_status = object.subresource == "status";
        let live = match known.get(&key) {
            Some(live) => live.clone(),
            None => {
                let live = serde_json::to_value(of(NAMESPACE).get(&object.name).await?)?;
                if is_status {
                    // There must be something that has a status.
                    apply(&of(BARE), &without_status(&live)).await?;
                }
                known.insert(key, live.clone());
                live
            }
        };
        let patch = if is_status { status(&live, number) } else { without_status(&live) };
        prepared.push(Write::Apply { api: of(BARE), name: object.name.clone(), patch, is_status });
    }
    let began = Instant::now();
    let sent = stream::iter(&prepared).map(send).buffer_unordered(AT_ONCE);
    sent.try_for_each(|()| future::ready(Ok(()))).await?;
    Ok(began.elapsed().as_secs_f64())
}

async fn send(write: &Write) -> Result<()> {
    let sent = match write {
        Write::Apply { api, name, patch, is_status: false } => {
            api.patch_metadata(name, &user(), &Patch::Apply(patch)).await.map(drop)
        }
        Write::Apply { api, name, patch, is_status: true } => {
            api.patch_status(name, &user(), &Patch::Apply(patch)).await.map(drop)
        }
        Write::Publish { api, event } => api.create(&PostParams::default(), event).await.map(drop),
    };
    sent.context("a write of the bare loop has failed")
}

/// The kinds that the operator writes.
fn resource(plural: &str) -> Option<ApiResource> {
    Some(match plural {
        "configmaps" => ApiResource::erase::<ConfigMap>(&()),
        "services" => ApiResource::erase::<Service>(&()),
        "poddisruptionbudgets" => ApiResource::erase::<PodDisruptionBudget>(&()),
        "deployments" => ApiResource::erase::<Deployment>(&()),
        "modelgroups" => ApiResource::erase::<ModelGroup>(&()),
        "modelplacements" => ApiResource::erase::<ModelPlacement>(&()),
        _ => return None,
    })
}

/// An object as it is applied: what the API server put into it on its own is left out.
fn without_status(live: &Value) -> Value {
    let mut object = live.clone();
    let metadata = &live["metadata"];
    object["metadata"] = json!({
        "name": metadata["name"],
        "labels": metadata.get("labels").cloned().unwrap_or_else(|| json!({})),
        "annotations": metadata.get("annotations").cloned().unwrap_or_else(|| json!({})),
        "ownerReferences": metadata.get("ownerReferences").cloned().unwrap_or_else(|| json!([])),
    });
    if let Some(fields) = object.as_object_mut() {
        fields.remove("status");
    }
    // Another Service has another address.
    if let Some(spec) = object["spec"].as_object_mut() {
        spec.remove("clusterIP");
        spec.remove("clusterIPs");
    }
    object
}

/// A status as it is applied. The API server writes only what differs; so each says that it is of another generation.
fn status(live: &Value, number: usize) -> Value {
    let mut status = live["status"].clone();
    status["observedGeneration"] = json!(number + 1000);
    json!({
        "apiVersion": live["apiVersion"],
        "kind": live["kind"],
        "metadata": {"name": live["metadata"]["name"]},
        "status": status,
    })
}

fn event(round: usize, number: usize) -> Result<Event> {
    let event = json!({
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": format!("bare-{round}-{number}"), "namespace": BARE},
        "eventTime": MicroTime(Timestamp::now()),
        "reportingController": "turret-bench",
        "reportingInstance": "turret-bench",
        "action": "Observe",
        "reason": "ScaledToZero",
        "note": "no worker is wanted",
        "type": "Normal",
        "regarding": {
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement",
            "namespace": BARE, "name": format!("bare-{round}-{number}"),
        },
    });
    Ok(serde_json::from_value(event)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> Value {
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {
                "name": "s", "namespace": "bench", "uid": "u", "resourceVersion": "7", "labels": {"a": "b"},
                "managedFields": [{"manager": "turret-operator"}],
            },
            "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"]},
            "status": {"observedGeneration": 1, "replicas": 0},
        })
    }

    #[test]
    fn what_is_applied_is_what_the_operator_said_and_no_more() {
        let expected = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "s", "labels": {"a": "b"}, "annotations": {}, "ownerReferences": []},
            "spec": {"type": "ClusterIP"},
        });
        assert_eq!(without_status(&live()), expected);
        let patch = status(&live(), 3);
        assert_eq!(patch["status"], json!({"observedGeneration": 1003, "replicas": 0}));
        assert!(patch.get("spec").is_none());
    }

    #[test]
    fn all_that_the_operator_may_write_is_known() {
        for plural in ["configmaps", "services", "poddisruptionbudgets", "deployments"] {
            assert_eq!(resource(plural).unwrap().plural, plural);
        }
        for plural in ["modelgroups", "modelplacements"] {
            assert_eq!(resource(plural).unwrap().group, "turret.dev");
        }
        assert!(resource("pods").is_none());
        assert_eq!(event(1, 2).unwrap().metadata.name.as_deref(), Some("bare-1-2"));
    }
}
