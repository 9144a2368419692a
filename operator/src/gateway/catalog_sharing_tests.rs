//! Groups of other namespaces in the catalog: there as long as they allow it, and just when workers are told of them.

use proptest::prelude::*;
use serde_json::{Value, json};
use turret_crds::document::{Previous, compile};

use super::*;

fn labels(team: &str) -> BTreeMap<String, String> {
    BTreeMap::from([("team".to_owned(), team.to_owned())])
}

fn group_of(namespace: &str, name: &str, lens: &str, allowed: Value) -> ModelGroup {
    let mut spec = json!({
        "base": {"source": {"uri": "pvc://m/base"}}, "lenses": [{"name": lens, "source": {"uri": "pvc://m/lens"}}],
    });
    if !allowed.is_null() {
        spec["allowedPlacements"] = allowed;
    }
    serde_json::from_value(json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
        "metadata": {"name": name, "namespace": namespace, "uid": format!("{namespace}-{name}"), "generation": 1},
        "spec": spec,
    }))
    .unwrap()
}

/// A placement of the namespace `lab`.
fn placement(groups: Value) -> ModelPlacement {
    serde_json::from_value(json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement",
        "metadata": {"name": "p", "namespace": "lab", "uid": "u"}, "spec": {"groups": groups},
    }))
    .unwrap()
}

fn of_team(team: &str) -> Value {
    json!({"namespaces": "Selector", "selector": {"matchLabels": {"team": team}}})
}

#[test]
fn a_group_of_another_namespace_is_there_by_its_placed_name_while_it_allows_it() {
    let own = group_of("lab", "chat", "mine", json!(null));
    let placed = placement(json!([
        {"name": "chat"}, {"name": "theirs", "groupRef": {"name": "chat", "namespace": "prod"}},
    ]));
    for (allowed, team, expected) in [
        (json!(null), "x", false),
        (json!({"namespaces": "All"}), "x", true),
        (of_team("y"), "x", false),
        (of_team("y"), "y", true),
    ] {
        let groups = [own.clone(), group_of("prod", "chat", "other", allowed.clone())];
        let found = Namespace::declared(&groups, [&placed], &labels(team));
        assert!(
            found.groups["chat"].lenses.contains_key("mine"),
            "its own of the same name is served all along"
        );
        assert_eq!(found.groups.contains_key("theirs"), expected, "{allowed}");
        let asked = found.resolve(Some("theirs:other")).map(|model| model.to_string());
        assert_eq!(asked.ok(), expected.then(|| "theirs:other".to_owned()), "{allowed}");
    }
}

fn consent() -> impl Strategy<Value = Value> {
    prop_oneof![Just(json!(null)), Just(json!({"namespaces": "All"})), Just(of_team("x")), Just(of_team("y")),]
}

proptest! {
    /// A request must not be sent for what workers were not told of, nor refused for what they were.
    #[test]
    fn the_catalog_offers_what_workers_are_told_of(
        consents in proptest::collection::vec(consent(), 4),
        targets in proptest::collection::vec((0..3usize, 0..2usize), 1..6),
        team in "[xyz]",
    ) {
        let (namespaces, names) = (["lab", "prod", "nowhere"], ["a", "b"]);
        let of = |n: usize| (namespaces[n / 2], names[n % 2]);
        let groups: Vec<ModelGroup> = consents
            .into_iter()
            .enumerate()
            .map(|(n, allowed)| group_of(of(n).0, of(n).1, "l", allowed))
            .collect();
        let placed: Vec<Value> = targets
            .iter()
            .enumerate()
            .map(|(n, &(namespace, name))| {
                let target = json!({"name": names[name], "namespace": namespaces[namespace]});
                json!({"name": format!("g{n}"), "groupRef": target})
            })
            .collect();
        let placement = placement(placed.into());
        let by_name = groups
            .iter()
            .map(|g| ((g.metadata.namespace.clone().unwrap(), g.metadata.name.clone().unwrap()), g))
            .collect();
        let told = compile(&placement, &by_name, &labels(&team), &[], &Previous::default()).document;
        let told: Vec<String> = told.into_iter().flat_map(|d| d.groups).map(|g| g.name).collect();
        let offered = Namespace::declared(&groups, [&placement], &labels(&team));
        prop_assert_eq!(offered.groups.into_keys().collect::<Vec<_>>(), told);
    }
}
