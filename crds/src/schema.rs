//! Last touches on the generated CRDs that no attribute expresses.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps,
};

/// Finishes a generated CRD: `status.observedGeneration` defaults to -1, and uninstalling a Helm
/// release leaves the CRD (and so every object) in place.
pub(crate) fn finish(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    crd.metadata.annotations.get_or_insert_default().insert("helm.sh/resource-policy".into(), "keep".into());
    for version in &mut crd.spec.versions {
        if let Some(root) = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut()) {
            tidy(root);
            default_status(root);
        }
    }
    crd
}

/// A `status` that is absent is filled in by the API server only when `status` itself has a default.
fn default_status(root: &mut JSONSchemaProps) {
    let Some(status) = root.properties.as_mut().and_then(|p| p.get_mut("status")) else { return };
    status.default = Some(JSON(serde_json::json!({"observedGeneration": -1})));
}

/// Removes `format` values that Kubernetes does not know (it warns about them), and `nullable`:
/// an explicit null is then dropped by the API server like an absent field, before any rule sees it.
fn tidy(schema: &mut JSONSchemaProps) {
    schema.nullable = None;
    if schema.description.as_deref().is_some_and(|d| d.starts_with("Quantity is a fixed-point")) {
        bound_quantity(schema);
    }
    if schema.format.as_deref().is_some_and(|f| f.starts_with("uint") || f == "double") {
        schema.format = None;
    }
    for child in schema.properties.iter_mut().flat_map(|p| p.values_mut()) {
        tidy(child);
    }
    use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
        JSONSchemaPropsOrArray as Items, JSONSchemaPropsOrBool as Additional,
    };
    match schema.items.as_mut() {
        Some(Items::Schema(item)) => {
            tidy(item);
            // A default inside a list item shows as a permanent difference in GitOps tools.
            item.properties.iter_mut().flat_map(|p| p.values_mut()).for_each(|p| p.default = None);
        }
        Some(Items::Schemas(_)) | None => {}
    }
    if let Some(Additional::Schema(value)) = schema.additional_properties.as_mut() {
        tidy(value);
    }
}

/// Gives Kubernetes' quantity the bounds that its own schema lacks, so that CEL rules can read it,
/// and one sentence in place of a page.
fn bound_quantity(schema: &mut JSONSchemaProps) {
    schema.description = Some("A quantity as in a Pod: `500m`, `2`, `4Gi`.".into());
    schema.pattern = Some(r"^[0-9]+(\.[0-9]{1,9})?(m|[kMGTPE]|[KMGTPE]i)?$".into());
    schema.max_length = Some(32);
    schema.minimum = Some(0.0);
}
