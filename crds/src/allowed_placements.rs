//! Which placements may serve a group: the consent of the group's owner.
//!
//! As a Gateway says which routes may attach to it (`allowedRoutes.namespaces` of the Gateway API): the owner of what is
//! used says who may use it, and whoever names it without consent does not learn whether it exists.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{condition::reason, document::Problem, group::ModelGroup, placement::PlacedGroup};

/// Which placements may serve a group. Those of the group's own namespace always may.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.namespaces) && self.namespaces == 'Selector') == has(self.selector)").message("selector belongs to `namespaces: Selector`: give both or neither"),
)]
pub struct AllowedPlacements {
    /// Namespaces whose placements may serve the group, beside its own. Absent: `Same`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<AllowedNamespaces>,
    /// With `Selector`: the labels that such a namespace has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<NamespaceSelector>,
}

/// Namespaces whose placements may serve a group. `Same`, the default: the group's own. `All`: every one. `Selector`: the
/// group's own, and those with the labels of `selector`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum AllowedNamespaces {
    /// The group's own.
    #[default]
    Same,
    /// Every one.
    All,
    /// The group's own, and those with certain labels.
    Selector,
}

/// Namespaces with certain labels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceSelector {
    /// Labels that a namespace must have, all of them. `kubernetes.io/metadata.name` is the name of a namespace.
    #[schemars(extend("maxProperties" = 16))]
    #[x_kube(validation = Rule::new("self.size() > 0").message("an empty selector would match every namespace; say `namespaces: All` when that is meant"))]
    pub match_labels: BTreeMap<String, String>,
}

impl NamespaceSelector {
    /// Whether a namespace with these labels is meant. An empty selector, which the API server refuses, means none.
    fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let has = |(key, value): (&String, &String)| labels.get(key) == Some(value);
        !self.match_labels.is_empty() && self.match_labels.iter().all(has)
    }
}

impl AllowedPlacements {
    /// Whether placements of another namespace, which has these labels, may serve the group.
    fn reach(&self, labels: &BTreeMap<String, String>) -> bool {
        match self.namespaces.unwrap_or_default() {
            AllowedNamespaces::Same => false,
            AllowedNamespaces::All => true,
            AllowedNamespaces::Selector => self.selector.as_ref().is_some_and(|s| s.matches(labels)),
        }
    }
}

impl ModelGroup {
    /// Whether placements of `namespace`, which has these labels, may serve the group. Those of its own namespace always
    /// may: whoever narrows a consent means other teams, and is not to take the group from their own.
    pub fn may_be_placed_in(&self, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        self.metadata.namespace.as_deref().unwrap_or_default() == namespace
            || self.spec.allowed_placements.as_ref().is_some_and(|allowed| allowed.reach(labels))
    }
}

/// What a placement of `namespace` is told of a group of another namespace that it may not serve. The words are the same
/// when there is no such group: what was not allowed is not to be found out by naming it.
pub fn not_permitted(placed: &PlacedGroup, namespace: &str) -> Problem {
    let (owner, name) = placed.target(namespace);
    Problem {
        reason: reason::NOT_PERMITTED,
        message: format!(
            "group `{}`: namespace `{owner}` has no ModelGroup `{name}`, or it does not allow placements of namespace \
             `{namespace}`; its owner allows them with `spec.allowedPlacements: {{namespaces: All}}`, or with `Selector` and \
             labels that `{namespace}` has",
            placed.name
        ),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::{
        document::{Previous, compile},
        placement::ModelPlacement,
    };

    fn labels(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// The group `shared` of the namespace `owner`.
    fn shared(allowed: Value) -> ModelGroup {
        let mut spec = json!({"base": {"source": {"uri": "pvc://models/base"}}});
        if !allowed.is_null() {
            spec["allowedPlacements"] = allowed;
        }
        serde_json::from_value(json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
            "metadata": {"name": "shared", "namespace": "owner", "uid": "u", "generation": 1}, "spec": spec,
        }))
        .unwrap()
    }

    #[test]
    fn consent_is_given_to_all_or_to_those_with_the_labels_and_never_withheld_from_the_own_namespace() {
        let selector = json!({"namespaces": "Selector", "selector": {"matchLabels": {"a": "1", "b": "2"}}});
        let one = labels(&[("a", "1")]);
        let both = labels(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let other = labels(&[("a", "1"), ("b", "3")]);
        for (allowed, consents) in [
            (json!(null), [false, false, false]),
            (json!({}), [false, false, false]),
            (json!({"namespaces": "Same"}), [false, false, false]),
            (json!({"namespaces": "All"}), [true, true, true]),
            (selector, [false, true, false]),
            // Neither passes the API server; an old rule or a hand in the store is no consent.
            (json!({"namespaces": "Selector"}), [false, false, false]),
            (json!({"namespaces": "Selector", "selector": {"matchLabels": {}}}), [false, false, false]),
        ] {
            let group = shared(allowed.clone());
            let found = [&one, &both, &other].map(|labels| group.may_be_placed_in("user", labels));
            assert_eq!(found, consents, "{allowed}");
            assert!(group.may_be_placed_in("owner", &BTreeMap::new()), "{allowed}");
        }
    }

    /// Names of the groups that are served, and `REASON: MESSAGE` of each problem, for a placement of the namespace `user`
    /// with its own group `own` and that of the owner.
    fn compiled(
        group: Option<&ModelGroup>,
        namespace_labels: &BTreeMap<String, String>,
    ) -> (Vec<String>, Vec<String>) {
        let placement: ModelPlacement = serde_json::from_value(json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement",
            "metadata": {"name": "p", "namespace": "user", "uid": "v", "generation": 1},
            "spec": {"groups": [
                {"name": "own"},
                {"name": "theirs", "groupRef": {"name": "shared", "namespace": "owner"}},
            ]},
        }))
        .unwrap();
        let mut own = shared(json!(null));
        own.metadata.name = Some("own".into());
        own.metadata.namespace = Some("user".into());
        let mut groups = BTreeMap::from([(("user".to_owned(), "own".to_owned()), &own)]);
        groups.extend(group.map(|group| (("owner".to_owned(), "shared".to_owned()), group)));
        let compiled = compile(&placement, &groups, namespace_labels, &[], &Previous::default());
        let document = compiled.document.expect("the own group is always served");
        let served = document.groups.iter().map(|g| format!("{}={}/{}", g.name, g.namespace, g.object_name));
        let problems = compiled.problems.iter().map(|p| format!("{}: {}", p.reason, p.message));
        (served.collect(), problems.collect())
    }

    #[test]
    fn a_group_of_another_namespace_is_served_while_it_consents_and_the_others_all_along() {
        let (own, both) = (vec!["own=user/own"], vec!["own=user/own", "theirs=owner/shared"]);
        let selector = json!({"namespaces": "Selector", "selector": {"matchLabels": {"team": "b"}}});
        let (none, of_b) = (BTreeMap::new(), labels(&[("team", "b")]));
        for (allowed, labels, expected) in [
            (json!(null), &of_b, &own),
            (json!({"namespaces": "All"}), &none, &both),
            (selector.clone(), &none, &own),
            (selector, &of_b, &both),
        ] {
            let (served, problems) = compiled(Some(&shared(allowed.clone())), labels);
            assert_eq!(&served, expected, "{allowed}");
            assert_eq!(problems.is_empty(), expected.len() == 2, "{allowed}: {problems:?}");
        }
    }

    #[test]
    fn what_is_not_allowed_is_told_like_what_does_not_exist_and_says_who_must_write_what() {
        let none = BTreeMap::new();
        let (_, withheld) = compiled(Some(&shared(json!(null))), &none);
        let [told] = &withheld[..] else { panic!("{withheld:?}") };
        assert!(told.starts_with("NotPermitted: group `theirs`: "), "{told}");
        for word in ["`shared`", "`owner`", "`user`", "allowedPlacements: {namespaces: All}"] {
            assert!(told.contains(word), "{word} is not in {told}");
        }
        assert_eq!(compiled(None, &none).1, withheld, "it does not exist");
        let mut leaving = shared(json!({"namespaces": "All"}));
        leaving.metadata.deletion_timestamp =
            Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        assert_eq!(compiled(Some(&leaving), &none).1, withheld, "it is being deleted");
    }
}
