//! A worker's device as a claim of dynamic resource allocation: the template that the claim of each pod is made from. Pure.
//!
//! The API server lets nobody change a template. So its name carries a hash of what is in it: another class of devices is
//! another template, pods that were made before still have theirs, and one that no pod is made from any more is removed.

use k8s_openapi::api::core::v1::{PodResourceClaim, ResourceClaim};
use kube::CustomResource;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use turret_crds::{ModelPlacement, condition::reason, document::Problem, label};

use super::resources;
use crate::controllers::live;

/// What the claim of a pod is called in the pod, and its only request in the claim.
const DEVICE: &str = "device";
/// Characters of the hash in a template's name.
const HASH_LENGTH: usize = 8;

/// A template of claims, as far as it is ours. The types of Kubernetes have it in versions newer than the oldest one that
/// is served.
#[derive(Clone, Debug, PartialEq, CustomResource, Serialize, Deserialize)]
#[kube(
    group = "resource.k8s.io",
    version = "v1",
    kind = "ResourceClaimTemplate",
    namespaced,
    schema = "disabled",
    derive = "PartialEq"
)]
pub struct ResourceClaimTemplateSpec {
    /// What the claim asks for.
    pub spec: Value,
}

/// The template for the workers of a placement that asks for a class of devices.
pub fn template(placement: &ModelPlacement) -> Option<ResourceClaimTemplate> {
    let spec = spec(placement)?;
    let mut metadata = resources::metadata(placement, Default::default());
    metadata.name = name(placement);
    Some(ResourceClaimTemplate { metadata, spec: ResourceClaimTemplateSpec { spec } })
}

/// Its name.
pub fn name(placement: &ModelPlacement) -> Option<String> {
    let hash = live::hash(&spec(placement)?);
    let owned = label::owned_name(placement.metadata.name.as_deref().unwrap_or_default());
    Some(format!("{owned}-{}", &hash[..HASH_LENGTH]))
}

fn spec(placement: &ModelPlacement) -> Option<Value> {
    let class = placement.spec.accelerator.as_ref()?.device_class_name.as_ref()?;
    let exactly = json!({"deviceClassName": class, "allocationMode": "ExactCount", "count": 1});
    Some(json!({"devices": {"requests": [{"name": DEVICE, "exactly": exactly}]}}))
}

/// The claims of a worker's pod.
pub fn of_pod(placement: &ModelPlacement) -> Option<Vec<PodResourceClaim>> {
    let template = name(placement)?;
    Some(vec![PodResourceClaim {
        name: DEVICE.into(),
        resource_claim_template_name: Some(template),
        resource_claim_name: None,
    }])
}

/// Those of them that its container uses.
pub fn of_container(placement: &ModelPlacement) -> Option<Vec<ResourceClaim>> {
    name(placement).map(|_| vec![ResourceClaim { name: DEVICE.into(), request: None }])
}

/// Why a placement cannot be carried out where the API server has no such templates.
pub fn unserved(placement: &ModelPlacement) -> Option<Problem> {
    let class = placement.spec.accelerator.as_ref()?.device_class_name.as_ref()?;
    Some(Problem {
        reason: reason::API_NOT_SERVED,
        message: format!(
            "spec.accelerator.deviceClassName is `{class}`, and when the operator started the API server did not serve \
             resource.k8s.io/v1 (dynamic resource allocation, Kubernetes 1.34); use accelerator.resourceName, or \
             restart the operator once it does"
        ),
    })
}
