//! Whether a group allows a placement of another namespace, as far as files show: the labels of a namespace may be known to
//! the cluster only.

use std::collections::BTreeMap;

use serde_json::Value;
use turret_crds::ModelGroup;
use turret_crds::allowed_placements::AllowedNamespaces;
use turret_crds::label::NAMESPACE_NAME;

/// Labels of the namespaces among the files.
#[derive(Debug, Default)]
pub struct Namespaces(BTreeMap<String, BTreeMap<String, String>>);

/// What a group says to a placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consent {
    /// It may serve the group.
    Given,
    /// It may not.
    Withheld,
    /// It depends on labels that the files do not show.
    Unknown,
}

impl Namespaces {
    /// Takes note of an object if it is a namespace.
    pub fn note(&mut self, object: &Value) {
        let is_namespace = object["apiVersion"] == "v1" && object["kind"] == "Namespace";
        let Some(name) = object["metadata"]["name"].as_str().filter(|_| is_namespace) else { return };
        let labels = object["metadata"]["labels"].as_object().into_iter().flatten();
        let texts = labels.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
        self.0.insert(name.to_owned(), texts.collect());
    }

    /// What is known of the labels of a namespace: those in its file, and the one that the API server gives it.
    pub fn labels(&self, namespace: &str) -> BTreeMap<String, String> {
        let mut labels = self.0.get(namespace).cloned().unwrap_or_default();
        labels.insert(NAMESPACE_NAME.into(), namespace.into());
        labels
    }

    /// What a group says to placements of a namespace.
    pub fn consent(&self, group: &ModelGroup, namespace: &str) -> Consent {
        if group.may_be_placed_in(namespace, &self.labels(namespace)) {
            return Consent::Given;
        }
        let allowed = group.spec.allowed_placements.as_ref();
        let by_labels = allowed.filter(|a| a.namespaces == Some(AllowedNamespaces::Selector));
        let selector = by_labels.and_then(|a| a.selector.as_ref());
        // A selector of another name says no whatever the other labels are.
        let may_match = selector.is_some_and(|selector| {
            selector.match_labels.get(NAMESPACE_NAME).is_none_or(|name| name == namespace)
        });
        if may_match && !self.0.contains_key(namespace) { Consent::Unknown } else { Consent::Withheld }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn group(allowed: Value) -> ModelGroup {
        serde_json::from_value(json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
            "metadata": {"name": "g", "namespace": "a"},
            "spec": {"base": {"source": {"uri": "pvc://m"}}, "allowedPlacements": allowed},
        }))
        .unwrap()
    }

    #[test]
    fn only_what_depends_on_labels_that_nobody_showed_is_unknown() {
        let mut namespaces = Namespaces::default();
        namespaces.note(&json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "unlabelled"}}));
        namespaces.note(&json!({"apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": "b", "labels": {"team": "b"}}}));
        let selector = |key: &str, value: &str| {
            let labels = BTreeMap::from([(key, value)]);
            json!({"namespaces": "Selector", "selector": {"matchLabels": labels}})
        };
        for (allowed, of_b, of_unlabelled) in [
            (json!(null), Consent::Withheld, Consent::Withheld),
            (json!({"namespaces": "All"}), Consent::Given, Consent::Given),
            (selector("team", "b"), Consent::Given, Consent::Unknown),
            (selector("team", "c"), Consent::Withheld, Consent::Unknown),
            (selector(NAMESPACE_NAME, "b"), Consent::Given, Consent::Withheld),
            (selector(NAMESPACE_NAME, "unlabelled"), Consent::Withheld, Consent::Given),
        ] {
            let group = group(allowed.clone());
            assert_eq!(namespaces.consent(&group, "b"), of_b, "{allowed}");
            assert_eq!(namespaces.consent(&group, "unlabelled"), of_unlabelled, "{allowed}");
            assert_eq!(namespaces.consent(&group, "a"), Consent::Given, "{allowed}");
        }
    }
}
