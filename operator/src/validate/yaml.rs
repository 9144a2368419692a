//! YAML and JSON as kubectl reads them, which is not quite as the YAML of today has it.
//!
//! Go's library speaks YAML 1.1: there a plain `yes`, `on` or `n` is a boolean, `0644` is octal and `1_000` a number,
//! so that `value: yes` of an environment variable is refused by the API server. The parser used here speaks 1.2 and
//! calls all of these texts; what it hands out is a piece of the input, and the byte before it tells whether it
//! stands there in quotes.

use std::cell::Cell;
use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, IgnoredAny, MapAccess, SeqAccess, VariantAccess,
    Visitor,
};
use serde_json::{Map, Number, Value};

/// The documents of a text in their order, and why it could not be read further than that.
pub fn documents(text: &str) -> (Vec<Value>, Option<String>) {
    let text = text.trim_start_matches('\u{feff}');
    if text.trim_start().starts_with('{')
        && let Ok(documents) = json(text)
    {
        return (documents, None);
    }
    let mut documents = Vec::new();
    let left = Cell::new(most_of(text));
    for document in serde_yaml::Deserializer::from_str(text) {
        match (Reader { text, left: &left }).deserialize(document) {
            Ok(document) => documents.push(document),
            // Asked again, the parser would fail at the same place without end.
            Err(error) => return (documents, Some(error.to_string())),
        }
    }
    (documents, None)
}

fn json(text: &str) -> Result<Vec<Value>, serde_json::Error> {
    let mut input = serde_json::Deserializer::from_str(text);
    let mut documents = Vec::new();
    let left = Cell::new(most_of(text));
    while input.end().is_err() {
        documents.push((Reader { text, left: &left }).deserialize(&mut input)?);
    }
    Ok(documents)
}

/// How much may be read out of a text, in bytes of strings and one for each value: without aliases it is not more than its
/// length, and aliases must not make much of little.
fn most_of(text: &str) -> usize {
    2 * text.len() + (1 << 20)
}

/// Reads one value of `text`.
#[derive(Clone, Copy)]
struct Reader<'de> {
    text: &'de str,
    /// See [`most_of`].
    left: &'de Cell<usize>,
}

impl Reader<'_> {
    fn take<E: Error>(self, bytes: usize) -> Result<(), E> {
        let left = self.left.get().checked_sub(bytes);
        self.left.set(left.ok_or_else(|| E::custom("its aliases expand to far more than is written"))?);
        Ok(())
    }

    /// Whether a piece of the text stands there without quotes, and is not called a text by its tag.
    fn is_plain(self, piece: &str) -> bool {
        let start = piece.as_ptr().addr().checked_sub(self.text.as_ptr().addr());
        let before = start.and_then(|start| self.text.get(..start));
        before.is_some_and(|before| !before.ends_with(['"', '\'']) && !before.trim_end().ends_with("!!str"))
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'de> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, input: D) -> Result<Value, D::Error> {
        self.take(1)?;
        input.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'de> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML or JSON")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i128<E: Error>(self, value: i128) -> Result<Value, E> {
        self.visit_f64(value as f64)
    }

    fn visit_u128<E: Error>(self, value: u128) -> Result<Value, E> {
        self.visit_f64(value as f64)
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        number(value).map(Value::Number).ok_or_else(|| E::custom(format!("JSON has no number `{value}`")))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Value, E> {
        self.take(text.len())?;
        Ok(text.into())
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Value, E> {
        self.take(text.len())?;
        let plain = self.is_plain(text).then(|| in_yaml_1_1(text)).flatten();
        Ok(plain.unwrap_or_else(|| text.into()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = list.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut fields = Map::new();
        let mut merged = Vec::new();
        while let Some(key) = entries.next_key_seed(self)? {
            let key = match key {
                Value::String(text) => text,
                Value::Bool(value) => value.to_string(),
                Value::Number(value) => value.to_string(),
                other => return Err(A::Error::custom(format!("`{other}` cannot be a key"))),
            };
            let value = entries.next_value_seed(self)?;
            if key == "<<" && (value.is_object() || value.is_array()) {
                merged.push(value);
            } else if fields.contains_key(&key) {
                return Err(A::Error::custom(format!("key `{key}` already set in map")));
            } else {
                fields.insert(key, value);
            }
        }
        merged.into_iter().for_each(|other| merge(&mut fields, other));
        Ok(Value::Object(fields))
    }

    /// A value with a tag of its own, `!something`: the tag means nothing here.
    fn visit_enum<A: EnumAccess<'de>>(self, tagged: A) -> Result<Value, A::Error> {
        let (_, value): (IgnoredAny, A::Variant) = tagged.variant()?;
        value.newtype_variant_seed(self)
    }
}

/// Adds what `<<` refers to, where it is not given.
fn merge(fields: &mut Map<String, Value>, other: Value) {
    match other {
        Value::Object(other) => {
            for (key, value) in other {
                fields.entry(key).or_insert(value);
            }
        }
        Value::Array(others) => others.into_iter().for_each(|other| merge(fields, other)),
        _ => {}
    }
}

/// What is written into JSON: whole numbers without a decimal point.
fn number(value: f64) -> Option<Number> {
    const WHOLE_BELOW: f64 = 9.0e18;
    if value.fract() == 0.0 && value.abs() < WHOLE_BELOW {
        return Some(Number::from(value as i64));
    }
    Number::from_f64(value)
}

/// A plain text that YAML 1.1 does not take for one.
fn in_yaml_1_1(plain: &str) -> Option<Value> {
    match plain {
        "y" | "Y" | "yes" | "Yes" | "YES" | "on" | "On" | "ON" => return Some(Value::Bool(true)),
        "n" | "N" | "no" | "No" | "NO" | "off" | "Off" | "OFF" => return Some(Value::Bool(false)),
        _ => {}
    }
    let digits = plain.replace('_', "");
    let (negative, unsigned) = match digits.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, digits.strip_prefix('+').unwrap_or(&digits)),
    };
    if !plain.starts_with(|c: char| c.is_ascii_digit() || c == '-' || c == '+')
        || !unsigned.starts_with(|c: char| c.is_ascii_digit())
    {
        return None;
    }
    let prefixes = [("0x", 16), ("0X", 16), ("0o", 8), ("0O", 8), ("0b", 2), ("0B", 2), ("0", 8)];
    let prefixed = prefixes.iter().find_map(|(prefix, radix)| Some((unsigned.strip_prefix(prefix)?, *radix)));
    let (whole, radix) = prefixed.filter(|(rest, _)| !rest.is_empty()).unwrap_or((unsigned, 10));
    if whole.bytes().all(|b| b.is_ascii_alphanumeric())
        && let Ok(value) = i64::from_str_radix(whole, radix)
    {
        return Some(Value::from(if negative { -value } else { value }));
    }
    let is_decimal = digits.bytes().all(|b| b.is_ascii_digit() || b"+-.eE".contains(&b));
    let value = digits.parse::<f64>().ok().filter(|_| is_decimal)?;
    number(value).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Vec<Value> {
        let (documents, error) = documents(text);
        assert_eq!(error, None, "{text}");
        documents
    }

    #[test]
    fn aliases_do_not_make_much_of_little() {
        let listed = |what: &str, times: usize| format!("[{}]", vec![what; times].join(","));
        let bomb = format!("a: &a {}\nb: {}\n", listed("x", 20_000), listed("*a", 20_000));
        let (read, error) = documents(&bomb);
        assert!(read.is_empty() && error.as_deref().is_some_and(|e| e.contains("aliases")), "{error:?}");
        let (read, error) = documents("a: &a [x, y]\nb: [*a, *a]\n");
        assert_eq!((read.len(), error), (1, None));
    }

    #[test]
    fn plain_words_and_numbers_mean_what_they_mean_in_yaml_1_1() {
        for (text, value) in [
            ("yes", json!(true)),
            ("Off", json!(false)),
            ("y", json!(true)),
            ("'yes'", json!("yes")),
            ("\"no\"", json!("no")),
            ("!!str no", json!("no")),
            ("|-\n  no", json!("no")),
            ("yesterday", json!("yesterday")),
            ("true", json!(true)),
            ("~", json!(null)),
            ("0644", json!(420)),
            ("-0x1F", json!(-31)),
            ("0b101", json!(5)),
            ("1_000", json!(1000)),
            ("08", json!(8)),
            ("1_0.5", json!(10.5)),
            ("2.0", json!(2)),
            ("1e3", json!(1000)),
            ("0", json!(0)),
            ("\"0644\"", json!("0644")),
            ("1.2.3", json!("1.2.3")),
            ("2024-01-02", json!("2024-01-02")),
            ("12:30", json!("12:30")),
            ("0a1b", json!("0a1b")),
            ("_1", json!("_1")),
            ("500m", json!("500m")),
        ] {
            assert_eq!(read(&format!("v: {text}\n")), [json!({"v": value})], "{text}");
            assert_eq!(read(&format!("- x: é\n- {text}\n")), [json!([{"x": "é"}, value])], "{text}");
        }
        assert_eq!(read("{on: off, 'no': \"yes\", 1: 2}"), [json!({"true": false, "no": "yes", "1": 2})]);
    }

    #[test]
    fn json_is_read_as_json() {
        assert_eq!(
            read("{\"a\": \"yes\", \"b\": 2.0, \"c\": \"\\ud83d\\ude00\"}\n{\"a\": null}\n"),
            [json!({"a": "yes", "b": 2, "c": "😀"}), json!({"a": null})]
        );
    }

    #[test]
    fn documents_anchors_and_tags_are_read() {
        assert_eq!(read("a: 1\n---\n---\nb: 2\n"), [json!({"a": 1}), json!(null), json!({"b": 2})]);
        assert_eq!(read(""), [json!(null)]);
        assert_eq!(
            read("base: &b {x: 1, y: 2}\nmore:\n  <<: *b\n  y: 3\n"),
            [json!({"base": {"x": 1, "true": 2}, "more": {"x": 1, "true": 3}})]
        );
        assert_eq!(read("a: !local b\n"), [json!({"a": "b"})]);
    }

    #[test]
    fn what_cannot_be_read_is_said_and_what_stood_before_it_is_kept() {
        for (text, expected) in [
            ("a: 1\n---\nb: {c: 1, c: 2}\n", "key `c` already set in map"),
            ("a: 1\n---\n{{ .Values.b }}: [\n", "line"),
            ("a: 1\n---\nb: .inf\n", "JSON has no number"),
            ("a: 1\n---\n? [b]\n: c\n", "cannot be a key"),
        ] {
            let (documents, error) = documents(text);
            assert_eq!(documents, [json!({"a": 1})], "{text}");
            let error = error.unwrap();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
