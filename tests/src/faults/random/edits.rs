//! What users do to some objects: each object has a history of its own, and histories go on in any order. Pure.

use serde_json::Value;
use turret_crds::validate::Rules;

use super::agree::{agree, ground};
use super::generate::generate;
use super::kind::Kind;
use crate::numbers::Numbers;

/// Most versions that an object has, one after another.
const MOST_VERSIONS: usize = 3;
/// Specs that are tried until one is valid.
const TRIES: usize = 100;

/// One thing that a user does.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    /// `ModelGroup` or `ModelPlacement`.
    pub kind: String,
    /// Name of the object.
    pub name: String,
    /// The object as it is to be; `None`: it is deleted.
    pub object: Option<Value>,
}

/// A history for each of two groups and two placements, of objects that are valid; the second ones may be deleted in the end.
///
/// # Panics
/// When the schema gives no valid object: then whatever makes them is wrong.
pub fn histories(kinds: &[Kind], numbers: &mut Numbers) -> Vec<Vec<Edit>> {
    let mut all = Vec::new();
    for (kind, names) in kinds.iter().zip([["g", "h"], ["p", "q"]]) {
        let rules = Rules::of(&kind.crd);
        for (name, may_go) in names.into_iter().zip([false, true]) {
            let mut history = Vec::new();
            for _ in 0..=numbers.below(MOST_VERSIONS) {
                let object = valid(kind, &rules, name, numbers);
                history.push(Edit { kind: kind.name().into(), name: name.into(), object: Some(object) });
            }
            if may_go && numbers.one_in(3) {
                history.push(Edit { kind: kind.name().into(), name: name.into(), object: None });
            }
            all.push(history);
        }
    }
    all
}

fn valid(kind: &Kind, rules: &Rules, name: &str, numbers: &mut Numbers) -> Value {
    let schema = kind.spec_schema();
    let made = (0..TRIES).map(|_| {
        let mut spec = generate(&schema, "spec", numbers);
        ground(kind.name(), &mut spec);
        agree(kind.name(), &mut spec);
        kind.object(name, &spec)
    });
    let mut valid = made.filter(|object| rules.judge(object).refusals.is_empty());
    valid.next().expect("a spec that agrees with itself is nearly always valid")
}

/// All edits in any order that keeps the order of each history.
pub fn in_any_order(histories: &[Vec<Edit>], numbers: &mut Numbers) -> Vec<Edit> {
    let lengths = histories.iter().enumerate();
    let mut turns: Vec<usize> = lengths.flat_map(|(of, history)| vec![of; history.len()]).collect();
    numbers.shuffle(&mut turns);
    let mut rest: Vec<_> = histories.iter().map(|history| history.iter()).collect();
    turns.into_iter().filter_map(|of| rest[of].next().cloned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::random::kind::kinds;

    #[test]
    fn each_order_has_all_edits_and_keeps_that_of_each_object() {
        let mut numbers = Numbers::of(9);
        let histories = histories(&kinds(), &mut numbers);
        assert_eq!(histories.len(), 4);
        let orders: Vec<_> = (0..20).map(|_| in_any_order(&histories, &mut numbers)).collect();
        assert!(orders.iter().any(|order| *order != orders[0]));
        for order in orders {
            for history in &histories {
                let of_object =
                    order.iter().filter(|e| (&e.kind, &e.name) == (&history[0].kind, &history[0].name));
                assert!(of_object.eq(history));
            }
        }
    }

    #[test]
    fn what_is_first_is_never_deleted_and_placements_always_name_it() {
        for seed in 0..20 {
            for history in histories(&kinds(), &mut Numbers::of(seed)) {
                for edit in history {
                    assert!(edit.object.is_some() || ["h", "q"].contains(&edit.name.as_str()));
                    let groups = edit.object.as_ref().and_then(|object| object["spec"]["groups"].as_array());
                    assert!(groups.is_none_or(|groups| groups.iter().any(|group| group["name"] == "g")));
                }
            }
        }
    }
}
