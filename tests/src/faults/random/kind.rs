//! Our kinds, as random objects need them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::DynamicObject;
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Api, Client};
use serde_json::{Value, json};

/// A kind and its definition.
pub struct Kind {
    /// What `turret-operator crds` prints.
    pub crd: CustomResourceDefinition,
}

/// Both kinds, groups first.
pub fn kinds() -> Vec<Kind> {
    turret_crds::crds().into_iter().map(|crd| Kind { crd }).collect()
}

impl Kind {
    /// `ModelGroup` or `ModelPlacement`.
    pub fn name(&self) -> &str {
        &self.crd.spec.names.kind
    }

    /// The schema of `spec`.
    ///
    /// # Panics
    /// When the definition has no schema: ours have one.
    pub fn spec_schema(&self) -> Value {
        let schema = self.crd.spec.versions[0].schema.as_ref().and_then(|s| s.open_api_v3_schema.as_ref());
        let schema = serde_json::to_value(schema.expect("a CRD of ours has a schema"));
        schema.expect("a schema is JSON")["properties"]["spec"].clone()
    }

    /// An object of the kind.
    pub fn object(&self, name: &str, spec: &Value) -> Value {
        json!({
            "apiVersion": format!("{}/{}", turret_crds::GROUP, turret_crds::VERSION),
            "kind": self.name(),
            "metadata": {"name": name},
            "spec": spec,
        })
    }

    /// Objects of the kind in a namespace, whether they can be read or not.
    pub fn api(&self, client: &Client, namespace: &str) -> Api<DynamicObject> {
        let gvk = GroupVersionKind::gvk(turret_crds::GROUP, turret_crds::VERSION, self.name());
        let resource = ApiResource::from_gvk_with_plural(&gvk, &self.crd.spec.names.plural);
        Api::namespaced_with(client.clone(), namespace, &resource)
    }
}
