//! JSON that somebody else wrote, read into no more values than its reader has room for.
//!
//! A parsed value takes up to thirty times its text, so a bound on a file's size alone is a loose one; and what is not
//! looked at need not be held at all.

use std::cell::Cell;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::excerpt::{complaint, excerpt};

/// Where a key is: the keys of the objects around it, and itself last.
pub(super) type Place<'a> = &'a [String];

/// The object that a text holds, without what `skip` tells to leave out. Refused when what is left has more than
/// `max_values` values, and when a key is there twice: readers do not agree on which of the two counts.
pub(super) fn object(
    text: &str,
    max_values: usize,
    skip: &dyn Fn(Place<'_>) -> bool,
) -> Result<Map<String, Value>, String> {
    let left = Cell::new(max_values);
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let seed = Seed { left: &left, skip, place: &[] };
    let value = seed.deserialize(&mut deserializer).map_err(|e| complaint(&e))?;
    deserializer.end().map_err(|e| complaint(&e))?;
    match value {
        Value::Object(map) => Ok(map),
        _ => Err("it is not an object".into()),
    }
}

struct Seed<'a> {
    left: &'a Cell<usize>,
    skip: &'a dyn Fn(Place<'_>) -> bool,
    place: Place<'a>,
}

impl Seed<'_> {
    fn count<E: Error>(&self) -> Result<(), E> {
        let left = self.left.get().checked_sub(1).ok_or_else(|| E::custom("it holds too many values"))?;
        self.left.set(left);
        Ok(())
    }

    fn take<E: Error>(&self, value: impl Into<Value>) -> Result<Value, E> {
        self.count()?;
        Ok(value.into())
    }
}

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        self.take(())
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        self.take(value)
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        self.take(value)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        self.take(value)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        self.take(value)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        self.take(value)
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        self.take(value)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        self.count()?;
        let mut items = Vec::new();
        let inside = || Seed { left: self.left, skip: self.skip, place: self.place };
        while let Some(item) = seq.next_element_seed(inside())? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        self.count()?;
        let mut object = Map::new();
        let mut place = self.place.to_vec();
        place.push(String::new());
        while let Some(key) = map.next_key::<String>()? {
            place[self.place.len()].clone_from(&key);
            if (self.skip)(&place) {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value_seed(Seed { left: self.left, skip: self.skip, place: &place })?;
            if object.insert(key, value).is_some() {
                let key = excerpt(&place[self.place.len()], 60);
                return Err(A::Error::custom(format!("`{key}` is there twice")));
            }
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_skipped_does_not_count_and_what_is_read_does() {
        let text = json!({"a": [1, 2.5, null], "b": {"c": "x", "big": [0, 0, 0, 0]}, "d": true}).to_string();
        let skip = |place: Place<'_>| place == ["b", "big"];
        let expected = json!({"a": [1, 2.5, null], "b": {"c": "x"}, "d": true});
        assert_eq!(Value::Object(object(&text, 8, &skip).unwrap()), expected);
        assert!(object(&text, 7, &skip).unwrap_err().contains("too many values"));
        let nothing = |_: Place<'_>| false;
        assert!(object(r#"{"a": 1, "a": 2}"#, 8, &nothing).unwrap_err().contains("`a` is there twice"));
        assert!(object("[1]", 8, &nothing).unwrap_err().contains("not an object"));
        assert!(object("{} {}", 8, &nothing).unwrap_err().contains("trailing"));
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(object(&deep, usize::MAX, &nothing).unwrap_err().contains("recursion"));
    }
}
