//! Takes an object that may be fine and spoils it in one place: a wrong type, a null, a bound that is passed, a field too many
//! or too few, an entry twice. Pure.

use serde_json::{Value, json};

use crate::numbers::Numbers;

/// Spoils something below `spec`. What comes out may still be valid: an optional field that is gone, for example.
pub fn spoil(object: &mut Value, numbers: &mut Numbers) {
    let mut places = Vec::new();
    find(&object["spec"], "/spec".to_owned(), &mut places);
    let place = numbers.pick(&places).clone();
    let Some(value) = object.pointer_mut(&place) else { return };
    match (numbers.below(4), &mut *value) {
        (0, _) => *value = Value::Null,
        (1, _) => *value = of_another_type(value, numbers),
        (_, Value::Number(_)) => {
            *value = numbers.pick(&[json!(-1_000_000_000), json!(1_000_000_000), json!(1.5)]).clone();
        }
        (_, Value::String(text)) => {
            *text = match numbers.below(4) {
                0 => String::new(),
                1 => "a".repeat(5000),
                2 => format!("{text} "),
                _ => "../No Such".to_owned(),
            };
        }
        (2, Value::Array(items)) if !items.is_empty() => {
            let again = numbers.pick(items.as_slice()).clone();
            items.push(again);
        }
        (_, Value::Array(items)) => items.clear(),
        (2, Value::Object(fields)) if !fields.is_empty() => {
            let names: Vec<String> = fields.keys().cloned().collect();
            fields.remove(numbers.pick(&names));
        }
        (_, Value::Object(fields)) => drop(fields.insert("nosuch".into(), json!({"field": 1}))),
        (_, other) => *other = json!("true"),
    }
}

/// All places of a value, as JSON pointers.
fn find(value: &Value, at: String, places: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            for (field, child) in fields {
                find(child, format!("{at}/{}", field.replace('~', "~0").replace('/', "~1")), places);
            }
        }
        Value::Array(items) => {
            for (index, item) in items.iter().enumerate() {
                find(item, format!("{at}/{index}"), places);
            }
        }
        _ => {}
    }
    places.push(at);
}

fn of_another_type(value: &Value, numbers: &mut Numbers) -> Value {
    let others =
        [json!("text"), json!(7), json!(true), json!([]), json!([null]), json!({}), json!({"a": "b"})];
    let is_another = |other: &&Value| std::mem::discriminant(*other) != std::mem::discriminant(value);
    let others: Vec<&Value> = others.iter().filter(is_another).collect();
    (*numbers.pick(&others)).clone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_place_is_spoiled_and_every_place_comes_up() {
        let object = json!({"spec": {"a": [{"name": "x"}], "example.org/b": {"c": 1}}});
        let mut places = Vec::new();
        find(&object["spec"], "/spec".into(), &mut places);
        assert!(places.iter().all(|place| object.pointer(place).is_some()), "{places:?}");
        assert_eq!(places.len(), 6);
        let mut numbers = Numbers::of(5);
        let spoiled: std::collections::BTreeSet<String> = (0..400)
            .map(|_| {
                let mut spoiled = object.clone();
                spoil(&mut spoiled, &mut numbers);
                spoiled.to_string()
            })
            .collect();
        for expected in [
            json!({"spec": null}),
            json!({"spec": {"a": [{"name": "x"}, {"name": "x"}], "example.org/b": {"c": 1}}}),
            json!({"spec": {"a": [{"name": "x"}], "example.org/b": {"c": 1_000_000_000}}}),
            json!({"spec": {"a": [{"name": "x", "nosuch": {"field": 1}}], "example.org/b": {"c": 1}}}),
        ] {
            assert!(spoiled.contains(&expected.to_string()), "{expected} is not among {}", spoiled.len());
        }
    }
}
