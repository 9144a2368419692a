//! Whether a live object already is as wanted, so that nothing needs to be sent.
//!
//! The API server fills in defaults and other writers add fields; neither is a difference. A
//! wanted field that is missing or changed is. What is wanted no longer shows in the annotation
//! [`APPLIED`]: a hash of all that was applied.

use serde_json::Value;
use sha2::{Digest, Sha256};

/// Annotation on every owned object: hash of what was applied.
pub const APPLIED: &str = "turret.dev/applied";

/// A short hash of a value, whatever the order of its fields.
pub fn hash(value: &Value) -> String {
    let mut hasher = Sha256::new();
    feed(&mut hasher, value);
    hex::encode(&hasher.finalize()[..8])
}

/// Feeds a value with sorted keys: whether `serde_json` keeps or sorts them is a feature that any
/// dependency may turn on, and pods must not be replaced for that.
fn feed(hasher: &mut Sha256, value: &Value) {
    match value {
        Value::Object(map) => {
            let mut fields: Vec<_> = map.iter().collect();
            fields.sort_unstable_by_key(|(key, _)| key.as_str());
            hasher.update("{");
            for (key, value) in fields {
                hasher.update(Value::from(key.as_str()).to_string());
                feed(hasher, value);
            }
            hasher.update("}");
        }
        Value::Array(list) => {
            hasher.update("[");
            for value in list {
                feed(hasher, value);
                hasher.update(",");
            }
            hasher.update("]");
        }
        plain => hasher.update(plain.to_string()),
    }
}

/// Seals a wanted object with the hash of itself.
pub fn seal(mut wanted: Value) -> Value {
    let hash = hash(&wanted);
    wanted["metadata"]["annotations"][APPLIED] = hash.into();
    wanted
}

/// The first wanted field that `live` does not have as wanted, as a path; `None` when it has all.
pub fn difference(live: &Value, wanted: &Value) -> Option<String> {
    differs(live, wanted, "")
}

fn differs(live: &Value, wanted: &Value, path: &str) -> Option<String> {
    match (live, wanted) {
        (Value::Object(live), Value::Object(wanted)) => wanted.iter().find_map(|(key, want)| {
            let path = format!("{path}.{key}");
            match live.get(key) {
                Some(have) => differs(have, want, &path),
                None if is_empty(want) => None,
                None => Some(path),
            }
        }),
        // Lists of objects are maps by some key of theirs: others may add entries, so each wanted
        // one must be there somewhere. Lists of plain values are one value.
        (Value::Array(live), Value::Array(wanted)) if wanted.iter().all(Value::is_object) => wanted
            .iter()
            .enumerate()
            .find(|(_, want)| !live.iter().any(|have| differs(have, want, "").is_none()))
            .map(|(at, _)| format!("{path}[{at}]")),
        _ => (live != wanted && !same_quantity(live, wanted, path)).then(|| path.to_owned()),
    }
}

/// The API server drops empty values.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// The API server writes quantities in its own way (`1000m` becomes `1`).
fn same_quantity(live: &Value, wanted: &Value, path: &str) -> bool {
    let is_quantity =
        path.contains(".limits.") || path.contains(".requests.") || path.ends_with(".sizeLimit");
    match (live.as_str(), wanted.as_str()) {
        (Some(live), Some(wanted)) if is_quantity => {
            matches!((quantity(live), quantity(wanted)), (Some(a), Some(b)) if a == b)
        }
        _ => false,
    }
}

/// A quantity in billionths, exactly; `None` for what is not one.
fn quantity(text: &str) -> Option<i128> {
    const NANO: i128 = 1_000_000_000;
    const UNITS: [(&str, i128); 16] = [
        ("Ki", NANO << 10),
        ("Mi", NANO << 20),
        ("Gi", NANO << 30),
        ("Ti", NANO << 40),
        ("Pi", NANO << 50),
        ("Ei", NANO << 60),
        ("n", 1),
        ("u", 1_000),
        ("m", 1_000_000),
        ("k", NANO * 1_000),
        ("M", NANO * 1_000_000),
        ("G", NANO * 1_000_000_000),
        ("T", NANO * 1_000_000_000_000),
        ("P", NANO * 1_000_000_000_000_000),
        ("E", NANO * 1_000_000_000_000_000_000),
        ("", NANO),
    ];
    let (digits, unit) =
        UNITS.iter().find_map(|(suffix, unit)| text.strip_suffix(suffix).map(|d| (d, *unit)))?;
    let (digits, exponent) = match digits.split_once(['e', 'E']) {
        Some((digits, exponent)) => (digits, exponent.parse::<u32>().ok().filter(|e| *e <= 18)?),
        None => (digits, 0),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.len() > 9 {
        return None;
    }
    let all: i128 = format!("{whole}{fraction}").parse().ok()?;
    let scaled = all.checked_mul(unit)?.checked_mul(10i128.pow(exponent))?;
    let divisor = 10i128.pow(u32::try_from(fraction.len()).ok()?);
    (scaled % divisor == 0).then_some(scaled / divisor)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn defaults_and_additions_of_others_are_no_difference() {
        let wanted = json!({"spec": {"replicas": 1, "containers": [{"name": "a", "ports": [{"containerPort": 1}]}], "none": {}}});
        let live = json!({"metadata": {"uid": "u"}, "spec": {"replicas": 1, "strategy": {}, "containers": [
            {"name": "sidecar"},
            {"name": "a", "imagePullPolicy": "Always", "ports": [{"containerPort": 1, "protocol": "TCP"}]},
        ]}});
        assert_eq!(difference(&live, &wanted), None);
    }

    #[test]
    fn what_is_missing_or_changed_is_named() {
        let wanted = json!({"a": {"b": 1}, "args": ["x"], "list": [{"name": "n", "v": 1}]});
        for (live, path) in [
            (json!({"a": {"b": 2}, "args": ["x"], "list": [{"name": "n", "v": 1}]}), ".a.b"),
            (json!({"a": {"b": 1}, "args": ["x", "y"], "list": [{"name": "n", "v": 1}]}), ".args"),
            (json!({"a": {"b": 1}, "args": ["x"], "list": [{"name": "n", "v": 2}]}), ".list[0]"),
            (json!({"a": {"b": 1}, "args": ["x"]}), ".list"),
        ] {
            assert_eq!(difference(&live, &wanted).as_deref(), Some(path));
        }
    }

    #[test]
    fn quantities_are_compared_by_value() {
        for (live, wanted, same) in [
            ("1", "1000m", true),
            ("1500m", "1.5", true),
            ("1Gi", "1024Mi", true),
            ("1e3", "1k", true),
            ("0.5", "500m", true),
            ("1", "1001m", false),
            ("1Gi", "1G", false),
        ] {
            let (live, wanted) = (json!({"limits": {"cpu": live}}), json!({"limits": {"cpu": wanted}}));
            assert_eq!(
                difference(&json!({"r": live}), &json!({"r": wanted})).is_none(),
                same,
                "{live} {wanted}"
            );
        }
        assert!(
            difference(&json!({"env": "1000m"}), &json!({"env": "1"})).is_some(),
            "other texts are texts"
        );
    }

    #[test]
    fn sealing_shows_what_is_no_longer_wanted() {
        let before = seal(json!({"metadata": {"name": "x"}, "spec": {"a": 1, "b": 2}}));
        let after = seal(json!({"metadata": {"name": "x"}, "spec": {"a": 1}}));
        assert!(difference(&before, &after).is_some());
        assert_eq!(difference(&after, &after), None);
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-z]{0,3}".prop_map(Value::from)
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z]{1,3}", inner, 0..4)
                    .prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn an_object_is_as_wanted_when_it_is_what_was_wanted(value in json_value()) {
            prop_assert_eq!(difference(&value, &value), None);
        }

        #[test]
        fn an_added_field_is_no_difference_and_a_removed_one_is(value in prop::collection::btree_map("[a-z]{1,3}", 0..9i32, 1..5)) {
            let wanted = json!(value);
            let mut more = wanted.clone();
            more["zzzz"] = json!(1);
            prop_assert_eq!(difference(&more, &wanted), None);
            prop_assert!(difference(&wanted, &more).is_some());
        }
    }
}
