//! Aliases: names that stay while the lenses behind them change.
//!
//! What is declared is an [`Alias`]. What it leads to at the moment is an [`EffectiveAlias`]: [`effective`] decides it
//! whenever a worker document is made, from what it led to before and from what workers say, so that no request is led
//! to a lens that cannot be served yet. Of several targets each request gets one by [`choose`], and the same user always
//! the same one.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A name for clients that stays while the lenses behind it change.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Alias {
    /// A DNS label, unique among the aliases and lenses of the group. Clients write `GROUP:NAME`, or `NAME` alone where
    /// only one group has it.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("an alias name is a DNS label: lower-case letters, digits and `-`, beginning and ending with a letter or digit"))]
    pub name: String,
    /// The lenses it leads to, 1 to 4. When others are declared, requests go to those before until every worker can serve
    /// all of the new ones.
    #[schemars(length(min = 1, max = 4))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["lensName".into()]))]
    pub targets: Vec<AliasTarget>,
}

/// A lens that an alias is to lead to.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AliasTarget {
    /// Name of a lens of the group.
    #[schemars(length(min = 1, max = 63))]
    pub lens_name: String,
    /// Its share of the users, in relation to the weights of the other targets. Absent: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub weight: Option<i32>,
}

impl Alias {
    /// The declared targets, sorted by lens.
    pub fn declared(&self) -> Vec<WeightedLens> {
        let target = |target: &AliasTarget| WeightedLens {
            lens: target.lens_name.clone(),
            weight: target.weight.and_then(|w| u32::try_from(w).ok()).unwrap_or(1),
        };
        let mut targets: Vec<WeightedLens> = self.targets.iter().map(target).collect();
        targets.sort_by(|a, b| a.lens.cmp(&b.lens));
        targets
    }
}

/// What an alias leads to at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EffectiveAlias {
    /// Its name in the group.
    pub name: String,
    /// Where it leads, sorted by lens.
    pub targets: Vec<WeightedLens>,
}

impl EffectiveAlias {
    /// The lens that answers this asker; `group` is what clients call the alias's group.
    pub fn lens_for(&self, group: &str, asker: Asker) -> Option<&str> {
        choose(&self.targets, asker.draw(group, &self.name))
    }
}

/// A lens with its share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WeightedLens {
    /// Name of the lens.
    pub lens: String,
    /// Its share, in relation to the others'.
    pub weight: u32,
}

/// What aliases lead to, sorted by name; by group, as clients call it. A group without aliases is left out.
pub type GroupAliases = BTreeMap<String, Vec<EffectiveAlias>>;

/// What an alias leads to from now on.
///
/// It goes on to lead to what it led to before until all declared targets are ready. Of those before, lenses that are
/// not declared any more drop out; when none is left, and when it is new, it leads at once to what is declared. So it does
/// when only weights changed. Both lists are sorted by lens.
pub fn effective(
    declared: &[WeightedLens],
    previous: Option<&[WeightedLens]>,
    exists: impl Fn(&str) -> bool,
    is_ready: impl Fn(&str) -> bool,
) -> Vec<WeightedLens> {
    let previous = previous.unwrap_or_default().iter();
    let kept: Vec<WeightedLens> = previous.filter(|target| exists(&target.lens)).cloned().collect();
    let leads_there = same_lenses(&kept, declared);
    let stays = !kept.is_empty() && !leads_there && !declared.iter().all(|target| is_ready(&target.lens));
    if stays { kept } else { declared.to_vec() }
}

/// Whether two lists of targets differ in their weights at most.
fn same_lenses(one: &[WeightedLens], other: &[WeightedLens]) -> bool {
    one.iter().map(|target| &target.lens).eq(other.iter().map(|target| &target.lens))
}

/// The target that a number from the whole range of `u64` falls on, by weight; `None` when there is no target.
///
/// Shares lie one after another in the order of the list, so that few numbers change sides when weights change a little.
pub fn choose(targets: &[WeightedLens], draw: u64) -> Option<&str> {
    let total: u64 = targets.iter().map(|target| u64::from(target.weight)).sum();
    let mut at = (u128::from(draw) * u128::from(total)) >> 64;
    for target in targets {
        let weight = u128::from(target.weight);
        if at < weight {
            return Some(&target.lens);
        }
        at -= weight;
    }
    None
}

/// Fields of a request that say who asks; the first that is there counts.
pub const ASKER_FIELDS: [&str; 3] = ["user", "safety_identifier", "prompt_cache_key"];

/// Who asks, as far as the choice among targets goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asker(u64);

impl Asker {
    /// Whoever is called so.
    pub fn called(name: &str) -> Self {
        Self(first_bytes(Sha256::new().chain_update(name)))
    }

    /// Somebody who says nothing of themselves: any number.
    pub fn anyone(number: u64) -> Self {
        Self(number)
    }

    /// The number that decides for this asker among the targets of an alias. One alias says nothing about another, or the
    /// same users would be the first to try everything.
    pub fn draw(self, group: &str, alias: &str) -> u64 {
        // Neither name has a colon.
        let names = format!("{group}:{alias}:");
        first_bytes(Sha256::new().chain_update(names).chain_update(self.0.to_be_bytes()))
    }
}

fn first_bytes(hasher: Sha256) -> u64 {
    let digest = hasher.finalize();
    u64::from_be_bytes(digest[..8].try_into().expect("a SHA-256 has 32 bytes"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        ModelGroup, ModelPlacement, WorkerDocument,
        document::{Previous, compile},
    };

    /// Reads `a=90 b`.
    fn targets(text: &str) -> Vec<WeightedLens> {
        let target = |word: &str| {
            let (lens, weight) = word.split_once('=').unwrap_or((word, "1"));
            WeightedLens { lens: lens.into(), weight: weight.parse().unwrap() }
        };
        text.split_whitespace().map(target).collect()
    }

    #[test]
    fn an_alias_moves_when_all_of_its_new_targets_are_ready() {
        for (declared, previous, exist, ready, leads_to, why) in [
            ("b", None, "a b", "", "b", "a new alias has nothing to stay at"),
            ("b", Some("a"), "a b", "a", "a", "the new target is not ready"),
            ("b", Some("a"), "a b", "b", "b", "it is"),
            ("a=90 b=10", Some("a"), "a b", "a", "a", "one of the new targets is not ready"),
            ("a=90 b=10", Some("a"), "a b", "a b", "a=90 b=10", "both are"),
            ("a=80 b=20", Some("a=90 b=10"), "a b", "", "a=80 b=20", "only weights changed"),
            ("b", Some("a"), "b", "", "b", "the old target is gone"),
            ("c", Some("a=9 b=1"), "b c", "", "b=1", "what is left of the old ones"),
            ("b", Some("a=9 b=1"), "b", "", "b", "what is left is what is declared"),
            ("a", Some("a=9 b=1"), "a b", "b", "a=9 b=1", "a target alone gets more than before"),
            ("a", Some(""), "a", "", "a", "nothing is nothing to stay at"),
        ] {
            let previous = previous.map(targets);
            let has = |names: &'static str| move |lens: &str| names.split(' ').any(|name| name == lens);
            let found = effective(&targets(declared), previous.as_deref(), has(exist), has(ready));
            assert_eq!(found, targets(leads_to), "{declared} after {previous:?}: {why}");
        }
    }

    #[test]
    fn declared_targets_are_sorted_and_weigh_one_unless_they_say_otherwise() {
        let alias: Alias = serde_json::from_value(serde_json::json!({
            "name": "default", "targets": [{"lensName": "b"}, {"lensName": "a", "weight": 9}],
        }))
        .unwrap();
        assert_eq!(alias.declared(), targets("a=9 b"));
    }

    #[test]
    fn the_same_asker_gets_the_same_lens_and_shares_are_as_declared() {
        let alias = EffectiveAlias { name: "default".into(), targets: targets("a=90 b=9 c=1") };
        let lens_of = |n: u32| alias.lens_for("g", Asker::called(&format!("user-{n}"))).unwrap().to_owned();
        let mut counts: BTreeMap<String, u32> = BTreeMap::new();
        for n in 0..20_000 {
            *counts.entry(lens_of(n)).or_default() += 1;
            assert_eq!(lens_of(n), lens_of(n));
        }
        let share = |lens: &str| f64::from(counts[lens]) / 200.0;
        for (lens, percent) in [("a", 90.0), ("b", 9.0), ("c", 1.0)] {
            // Four standard deviations of the widest of the three are 0.9.
            assert!((share(lens) - percent).abs() < 0.9, "{lens}: {} %", share(lens));
        }
    }

    #[test]
    fn another_alias_and_another_group_choose_anew() {
        let choices = |group: &str, alias: &str| -> Vec<bool> {
            let draw = |n: u32| Asker::called(&format!("user-{n}")).draw(group, alias);
            (0..64).map(|n| draw(n) >> 63 == 0).collect()
        };
        assert_ne!(choices("g", "one"), choices("g", "two"));
        assert_ne!(choices("g", "one"), choices("h", "one"));
    }

    #[test]
    fn every_number_falls_on_a_target() {
        assert_eq!(choose(&[], 7), None);
        let two = targets("a b=3");
        let quarter = u64::MAX / 4;
        for (draw, lens) in [(0, "a"), (quarter, "a"), (quarter + 1, "b"), (u64::MAX, "b")] {
            assert_eq!(choose(&two, draw), Some(lens), "{draw}");
        }
    }

    #[test]
    fn a_document_carries_what_an_alias_leads_to_and_nothing_where_there_is_none() {
        let object = |kind: &str, spec: serde_json::Value| {
            serde_json::json!({"apiVersion": "turret.dev/v1alpha1", "kind": kind, "spec": spec,
                               "metadata": {"name": "g", "namespace": "n", "uid": kind, "generation": 1}})
        };
        let placement: ModelPlacement = serde_json::from_value(object(
            "ModelPlacement",
            serde_json::json!({"groups": [{"name": "chat", "groupRef": {"name": "g"}}]}),
        ))
        .unwrap();
        let compiled = |aliases: serde_json::Value, previous: &Previous| {
            let source = serde_json::json!({"uri": "pvc://m/x"});
            let lenses = ["a", "b"].map(|name| serde_json::json!({"name": name, "source": source}));
            let spec = serde_json::json!({"base": {"source": source}, "lenses": lenses, "aliases": aliases});
            let group: ModelGroup = serde_json::from_value(object("ModelGroup", spec)).unwrap();
            let groups = [(("n".to_owned(), "g".to_owned()), &group)].into();
            compile(&placement, &groups, &BTreeMap::new(), &[], previous).document.unwrap()
        };
        let plain = compiled(serde_json::json!([]), &Previous::default());
        assert!(!serde_json::to_string(&plain).unwrap().contains("aliases"), "an older worker reads it too");
        assert_eq!(plain.aliases(), GroupAliases::new());

        let to = |lens: &str| serde_json::json!([{"name": "default", "targets": [{"lensName": lens}]}]);
        let first = compiled(to("a"), &Previous::default());
        let leads_to = |document: &WorkerDocument| {
            document.group("chat").unwrap().alias("default").unwrap().targets.clone()
        };
        assert_eq!(leads_to(&first), targets("a"));
        assert_ne!(first.digest, plain.digest);
        // By the name that clients use, not by that of the ModelGroup.
        let mut previous = Previous { aliases: first.aliases(), ..Previous::default() };
        let pending = compiled(to("b"), &previous);
        assert_eq!((leads_to(&pending), &pending.digest), (targets("a"), &first.digest));
        previous.ready_targets = [("chat".to_owned(), "b".to_owned())].into();
        assert_eq!(leads_to(&compiled(to("b"), &previous)), targets("b"));
    }

    /// Up to four of four lenses, each with a weight.
    fn some_targets() -> impl Strategy<Value = Vec<WeightedLens>> {
        prop::collection::btree_map("[abcd]", 1..=1000u32, 1..=4)
            .prop_map(|all| all.into_iter().map(|(lens, weight)| WeightedLens { lens, weight }).collect())
    }

    proptest! {
        #[test]
        fn an_alias_never_leads_to_what_is_not_declared_and_stays_where_it_is_sent(
            declared in some_targets(),
            previous in prop::option::of(some_targets()),
            others in prop::collection::btree_set("[abcd]", 0..4),
            ready in prop::collection::btree_set("[abcd]", 0..4),
        ) {
            // Targets are lenses of the group; a rule of the CRD sees to that.
            let exists = |lens: &str| others.contains(lens) || declared.iter().any(|t| t.lens == lens);
            let is_ready = |lens: &str| ready.contains(lens);
            let found = effective(&declared, previous.as_deref(), exists, is_ready);
            prop_assert!(!found.is_empty());
            prop_assert!(found.iter().all(|t| exists(&t.lens)));
            let is_declared = found == declared;
            let is_kept = found.iter().all(|t| previous.iter().flatten().any(|p| p == t));
            prop_assert!(is_declared || is_kept, "a mixture of old and new");
            if declared.iter().all(|t| is_ready(&t.lens)) {
                prop_assert!(is_declared, "it moves when it can");
            } else if let Some(previous) = &previous && previous.iter().all(|t| exists(&t.lens)) {
                prop_assert!(is_kept || same_lenses(previous, &declared), "it does not move before");
            }
            prop_assert_eq!(&effective(&declared, Some(&found), exists, is_ready), &found, "idempotent");
        }

        #[test]
        fn a_choice_is_a_target_and_the_same_again(targets in some_targets(), draw in any::<u64>()) {
            let chosen = choose(&targets, draw);
            prop_assert!(targets.iter().any(|t| Some(t.lens.as_str()) == chosen));
            prop_assert_eq!(choose(&targets, draw), chosen);
        }

        #[test]
        fn a_larger_share_takes_no_asker_away(weight in 1..1000u32, draw in any::<u64>()) {
            let before = targets(&format!("a={} b={weight}", 1000 - weight));
            let after = targets(&format!("a={} b={}", 1000 - weight, weight + 1));
            if choose(&before, draw) == Some("b") {
                prop_assert_eq!(choose(&after, draw), Some("b"));
            }
        }
    }
}
