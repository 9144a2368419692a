//! What is declared, and which pod belongs to which placement. Pure.

use anyhow::{Context, Result};
use k8s_openapi::api::apps::v1::Deployment;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use turret_crds::label;

use crate::faults::node;

/// The namespace that the operator serves.
pub const NAMESPACE: &str = "bench";

/// A group with so many lenses. `touched` is what moves from one edit to the next.
pub fn group(name: &str, lenses: usize, touched: usize) -> Value {
    let lens = |number: usize| {
        json!({
            "name": format!("lens-{number:03}"),
            "displayName": format!("Lens {number} of {name}, edited {} times", if number == 0 { touched } else { 0 }),
            "source": {"uri": format!("file:///models/{name}/lens-{number:03}")},
        })
    };
    json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup", "metadata": {"name": name},
        "spec": {
            "base": {"source": {"uri": format!("file:///models/{name}/base")}},
            "lenses": (0..lenses).map(lens).collect::<Vec<_>>(),
        },
    })
}

/// A placement of one group on so many workers. `touched` is what moves from one edit to the next.
pub fn placement(name: &str, group: &str, workers: usize, touched: usize) -> Value {
    json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement", "metadata": {"name": name},
        "spec": {
            "groups": [{"name": group}],
            "replicas": workers,
            "admission": {"holdSeconds": 100 + touched % 1000},
            "terminationDrainSeconds": 0,
        },
    })
}

/// Name of a group of the many.
pub fn group_name(number: usize) -> String {
    format!("g-{number:05}")
}

/// Name of a placement of the many.
pub fn placement_name(number: usize) -> String {
    format!("p-{number:05}")
}

/// The group that a placement of the many names.
pub fn group_of(placement: usize, groups: usize) -> usize {
    placement % groups
}

/// Name of the only pod of a placement.
pub fn pod_name(placement: &str) -> String {
    format!("{placement}-0")
}

/// The placement of a pod with such a name.
pub fn placement_of(pod: &str) -> &str {
    pod.strip_suffix("-0").unwrap_or(pod)
}

/// The pod of a placement, as a ReplicaSet would make it and the scheduler bind it.
pub fn pod(deployment: &Deployment) -> Result<(String, Value)> {
    let placement = deployment.labels().get(label::PLACEMENT).context("a Deployment of no placement")?;
    let template = &deployment.spec.as_ref().context("a Deployment without a spec")?.template;
    let (mut metadata, mut spec) = (json!({}), serde_json::to_value(&template.spec)?);
    if let Some(of_template) = &template.metadata {
        metadata = json!({"labels": of_template.labels, "annotations": of_template.annotations});
    }
    metadata["name"] = pod_name(placement).into();
    spec["nodeName"] = node::NAME.into();
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec});
    Ok((pod_name(placement), pod))
}

#[cfg(test)]
mod tests {
    use turret_crds::{ModelGroup, ModelPlacement};

    use super::*;

    #[test]
    fn an_edit_changes_the_spec_and_nothing_else_does() {
        assert_eq!(group("g", 2, 0), group("g", 2, 0));
        assert_ne!(group("g", 2, 0)["spec"], group("g", 2, 1)["spec"]);
        assert_ne!(placement("p", "g", 1, 0)["spec"], placement("p", "g", 1, 1)["spec"]);
        let group: ModelGroup = serde_json::from_value(group("g", 20, 7)).unwrap();
        assert_eq!(group.spec.lenses.len(), 20);
        let placement: ModelPlacement = serde_json::from_value(placement("p", "g", 3, 7)).unwrap();
        assert_eq!(placement.spec.replicas, 3);
    }

    #[test]
    fn names_sort_as_their_numbers_and_pods_name_their_placement() {
        assert!(group_name(9) < group_name(10) && placement_name(99) < placement_name(100));
        assert_eq!(placement_of(&pod_name("p-00007")), "p-00007");
        assert_eq!((group_of(3, 10), group_of(13, 10)), (3, 3));
    }

    #[test]
    fn a_pod_is_what_the_deployment_s_template_says() {
        let deployment: Deployment = serde_json::from_value(json!({
            "metadata": {"name": "turret-p", "labels": {label::PLACEMENT: "p"}},
            "spec": {
                "selector": {},
                "template": {
                    "metadata": {"labels": {"a": "b"}, "annotations": {"turret.dev/pod-template": "h"}},
                    "spec": {"containers": [{"name": "worker"}]},
                },
            },
        }))
        .unwrap();
        let (name, pod) = pod(&deployment).unwrap();
        assert_eq!((name.as_str(), &pod["metadata"]["name"]), ("p-0", &json!("p-0")));
        assert_eq!(pod["metadata"]["annotations"]["turret.dev/pod-template"], "h");
        assert_eq!(pod["spec"]["containers"][0]["name"], "worker");
        assert_eq!(pod["spec"]["nodeName"], node::NAME);
    }
}
