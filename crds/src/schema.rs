//! Last touches on the generated CRDs that no attribute expresses.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray as Items,
    JSONSchemaPropsOrBool as Additional,
};

/// Finishes a generated CRD: `status.observedGeneration` defaults to -1, and uninstalling a Helm
/// release leaves the CRD (and so every object) in place.
pub(crate) fn finish(mut crd: CustomResourceDefinition) -> CustomResourceDefinition {
    crd.metadata.annotations.get_or_insert_default().insert("helm.sh/resource-policy".into(), "keep".into());
    for version in &mut crd.spec.versions {
        if let Some(root) = version.schema.as_mut().and_then(|s| s.open_api_v3_schema.as_mut()) {
            tidy(root);
            bound_texts(root);
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

/// Most characters of texts whose types are not ours, or which are the values of a map (`*`): what Kubernetes takes
/// for a label, and for all annotations of a Pod divided by how many there may be.
const LONGEST: [(&str, i64); 8] = [
    ("spec.allowedPlacements.selector.matchLabels.*", 63),
    ("spec.worker.nodeSelector.*", 63),
    ("spec.worker.podLabels.*", 63),
    ("spec.worker.podAnnotations.*", 4096),
    ("spec.worker.tolerations.[].key", 317),
    ("spec.worker.tolerations.[].operator", 63),
    ("spec.worker.tolerations.[].value", 63),
    ("spec.worker.tolerations.[].effect", 63),
];

fn bound_texts(root: &mut JSONSchemaProps) {
    for (path, longest) in LONGEST {
        if let Some(text) = find(root, path) {
            text.max_length = Some(longest);
        }
    }
}

/// The schema at a path, where `[]` stands for the items of a list and `*` for the values of a map.
fn find<'a>(root: &'a mut JSONSchemaProps, path: &str) -> Option<&'a mut JSONSchemaProps> {
    path.split('.').try_fold(root, |schema, step| match step {
        "[]" => match schema.items.as_mut()? {
            Items::Schema(item) => Some(&mut **item),
            Items::Schemas(_) => None,
        },
        "*" => match schema.additional_properties.as_mut()? {
            Additional::Schema(value) => Some(&mut **value),
            Additional::Bool(_) => None,
        },
        field => schema.properties.as_mut()?.get_mut(field),
    })
}
