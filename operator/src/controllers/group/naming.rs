//! Which placements count for a group, and what its status calls them. Pure.

use std::collections::BTreeMap;

use turret_crds::{
    ModelGroup, ModelPlacement,
    condition::{self, reason},
};

/// Whether a placement counts for a group: it names it, and the group allows it. `labels` gives those of a namespace. What
/// is not allowed has no say in whether the group is ready.
pub fn counts(
    group: &ModelGroup,
    placement: &ModelPlacement,
    labels: impl Fn(&str) -> BTreeMap<String, String>,
) -> bool {
    let own = placement.metadata.namespace.as_deref().unwrap_or_default();
    let namespace = group.metadata.namespace.as_deref().unwrap_or_default();
    let name = group.metadata.name.as_deref().unwrap_or_default();
    placement.metadata.deletion_timestamp.is_none()
        && placement.spec.groups.iter().any(|g| g.target(own) == (namespace, name))
        && group.may_be_placed_in(own, &labels(own))
}

/// What the status of a group calls a placement: by its name, and by its namespace where that is another.
pub fn shown(group: &ModelGroup, placement: &ModelPlacement) -> String {
    let name = placement.metadata.name.as_deref().unwrap_or_default();
    match placement.metadata.namespace.as_deref() {
        Some(namespace) if group.metadata.namespace.as_deref() != Some(namespace) => {
            format!("{namespace}/{name}")
        }
        _ => name.to_owned(),
    }
}

/// What a placement's own status says against it, if it speaks of the placement as it is. That it may not have some group
/// keeps it from nothing else: it says nothing against this one, which it may have.
pub fn refused(placement: &ModelPlacement) -> Option<String> {
    let status = placement.status.as_ref()?;
    let accepted = status.conditions.iter().find(|c| c.type_ == condition::ACCEPTED)?;
    let is_current = accepted.observed_generation == placement.metadata.generation;
    let is_refused = accepted.status == "False" && accepted.reason != reason::NOT_PERMITTED;
    (is_current && is_refused).then(|| accepted.message.clone())
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::controllers::fixtures::{group, placement};

    fn nothing(_: &str) -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    /// A placement of the namespace `b` that names the group `a` of the namespace `ns`.
    fn of_another_namespace() -> ModelPlacement {
        let mut placement = placement(&["a"]);
        placement.metadata.namespace = Some("b".into());
        placement.spec.groups[0].group_ref =
            serde_json::from_value(json!({"name": "a", "namespace": "ns"})).unwrap();
        placement
    }

    fn allowing(allowed: Value) -> ModelGroup {
        let mut group = group("a", &[]);
        group.spec.allowed_placements = serde_json::from_value(allowed).unwrap();
        group
    }

    #[test]
    fn a_placement_of_another_namespace_counts_while_it_is_allowed() {
        let far = of_another_namespace();
        let of_team = json!({"namespaces": "Selector", "selector": {"matchLabels": {"team": "b"}}});
        let named = |namespace: &str| BTreeMap::from([("team".to_owned(), namespace.to_owned())]);
        assert!(!counts(&allowing(json!(null)), &far, named));
        assert!(counts(&allowing(json!({"namespaces": "All"})), &far, nothing));
        assert!(counts(&allowing(of_team.clone()), &far, named));
        assert!(!counts(&allowing(of_team), &far, nothing));
    }

    #[test]
    fn a_placement_that_names_another_group_or_leaves_does_not_count() {
        let all = allowing(json!({"namespaces": "All"}));
        assert!(counts(&all, &placement(&["a"]), nothing));
        assert!(!counts(&all, &placement(&["b"]), nothing));
        // The group of the same name in its own namespace is another one.
        let mut own = placement(&["a"]);
        own.metadata.namespace = Some("b".into());
        assert!(!counts(&all, &own, nothing));
        let mut leaving = of_another_namespace();
        leaving.metadata.deletion_timestamp =
            Some(serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap());
        assert!(!counts(&all, &leaving, nothing));
    }

    #[test]
    fn a_placement_is_called_by_its_namespace_only_where_that_is_another() {
        let group = group("a", &[]);
        assert_eq!(shown(&group, &placement(&["a"])), "p");
        assert_eq!(shown(&group, &of_another_namespace()), "b/p");
    }

    #[test]
    fn what_a_placement_may_not_have_says_nothing_against_what_it_may() {
        let mut placement = placement(&["a"]);
        let mut says = |reason: &str| {
            placement.status = serde_json::from_value(json!({"conditions": [{
                "type": "Accepted", "status": "False", "reason": reason, "message": "no", "observedGeneration": 1,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }]}))
            .unwrap();
            refused(&placement)
        };
        assert_eq!(says(reason::INVALID), Some("no".into()));
        assert_eq!(says(reason::NOT_PERMITTED), None);
    }
}
