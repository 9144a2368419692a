//! JSON files that are changed here and there.

use proptest::prelude::*;
use proptest::sample::Index;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;

/// One change of a JSON file.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    /// The value at some place becomes another one.
    Replace(Index, String),
    /// A key or an item goes away.
    Remove(Index),
    /// A key is there twice.
    Twice(Index, String),
    /// A key is new.
    Add(String, String),
}

/// Values of every kind, as JSON or not quite.
fn any_value() -> impl Strategy<Value = String> {
    let nested = |open: &str, close: &str| format!("{}1{}", open.repeat(300), close.repeat(300));
    let long = format!("\"{}\"", "x".repeat(20_000));
    let zeros = format!("[{}0]", "0,".repeat(20_000));
    let fixed: Vec<String> = [
        "null",
        "true",
        "false",
        "0",
        "-0.0",
        "1",
        "2",
        "3",
        "-1",
        "7",
        "13",
        "65536",
        "16777216",
        "16777217",
        "2147483648",
        "4294967295",
        "4294967296",
        "1000000000",
        "9223372036854775807",
        "18446744073709551615",
        "18446744073709551616",
        "340282366920938463463374607431768211456",
        "0.5",
        "-0.5",
        "1.0",
        "1e3",
        "1e-7",
        "1e-45",
        "1e-300",
        "1e300",
        "1e999",
        "-1e999",
        "NaN",
        "Infinity",
        "",
        "\"\"",
        "\"default\"",
        "\"yarn\"",
        "\"longrope\"",
        "\"dynamic\"",
        "\"sliding_attention\"",
        "\"all-linear\"",
        "\"gelu\"",
        "\"\\u0000\"",
        "\"\\ud800\"",
        "\"../../../etc/passwd\"",
        "\"/etc/passwd\"",
        "\"model.safetensors\"",
        "[]",
        "{}",
        "[0]",
        "[[1,2],[3,4]]",
        "[\"q_proj\"]",
        "[\"\"]",
        "[null]",
        "[-1]",
        "[4294967296]",
        "{\"a\":1}",
        "{\"q_proj\":1e9}",
        "{\"\":\"\"}",
        "\"(((((a*)*)*)*)*)*b\"",
        "\"((?=.)(.|.)*)*(?!.)x\"",
        "\"(.*.*.*.*.*.*.*)*x\"",
        "\"(?P<idx>\"",
        "\"\\\\w{1000}{1000}\"",
        "{\"(.|.)*(?=x)y\":4}",
        "{\"type\":\"default\",\"factor\":0}",
        "{\"rope_type\":\"yarn\",\"factor\":1e-300}",
    ]
    .map(str::to_owned)
    .into();
    let made = vec![nested("[", "]"), nested("{\"a\":", "}"), "[".repeat(100_000), long, zeros];
    prop_oneof![
        6 => prop::sample::select(fixed),
        1 => prop::sample::select(made),
        1 => any::<i64>().prop_map(|n| n.to_string()),
        1 => any::<f64>().prop_map(|n| n.to_string()),
    ]
}

fn any_change(keys: &'static [&'static str]) -> impl Strategy<Value = Change> {
    prop_oneof![
        6 => (any::<Index>(), any_value()).prop_map(|(at, value)| Change::Replace(at, value)),
        1 => any::<Index>().prop_map(Change::Remove),
        1 => (any::<Index>(), any_value()).prop_map(|(at, value)| Change::Twice(at, value)),
        2 => (prop::sample::select(keys), any_value()).prop_map(|(key, value)| Change::Add(key.into(), value)),
    ]
}

pub(crate) fn any_changes(keys: &'static [&'static str]) -> impl Strategy<Value = Vec<Change>> {
    prop::collection::vec(any_change(keys), 1..4)
}

/// The text of a JSON file after some changes.
pub(crate) fn changed(mut file: Value, changes: &[Change]) -> Vec<u8> {
    const HERE: &str = "<here>";
    let mut first = String::new();
    let mut texts = Vec::new();
    for change in changes {
        let here = Value::from(format!("{HERE}{}", texts.len()));
        match change {
            Change::Replace(at, text) => {
                let places = places(&file);
                *file.pointer_mut(at.get::<String>(&places)).unwrap() = here;
                texts.push(text);
            }
            Change::Remove(at) => {
                let places = places(&file);
                let Some((parent, last)) = at.get(&places).rsplit_once('/') else { continue };
                match file.pointer_mut(parent).unwrap() {
                    Value::Object(map) => drop(map.remove(&last.replace("~1", "/").replace("~0", "~"))),
                    Value::Array(items) => drop(items.remove(last.parse().unwrap())),
                    _ => unreachable!("it holds something"),
                }
            }
            Change::Twice(at, text) => {
                let keys: Vec<String> =
                    file.as_object().into_iter().flatten().map(|(k, _)| k.clone()).collect();
                if !keys.is_empty() {
                    first += &format!("{}:{text},", Value::from(at.get(&keys).as_str()));
                }
            }
            Change::Add(key, text) => {
                if let Some(map) = file.as_object_mut() {
                    map.insert(key.clone(), here);
                    texts.push(text);
                }
            }
        }
    }
    let mut all = file.to_string();
    for (index, text) in texts.iter().enumerate() {
        all = all.replacen(&format!("\"{HERE}{index}\""), text, 1);
    }
    all.replacen('{', &format!("{{{first}"), 1).into_bytes()
}

/// Pointers to all values.
fn places(value: &Value) -> Vec<String> {
    fn walk(value: &Value, at: &str, places: &mut Vec<String>) {
        places.push(at.to_owned());
        match value {
            Value::Object(map) => {
                for (key, value) in map {
                    walk(value, &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), places);
                }
            }
            Value::Array(items) => {
                items
                    .iter()
                    .enumerate()
                    .for_each(|(index, item)| walk(item, &format!("{at}/{index}"), places));
            }
            _ => {}
        }
    }
    let mut places = Vec::new();
    walk(value, "", &mut places);
    places
}

/// Runs a property, always with the same cases.
pub(crate) fn check<S: Strategy>(cases: u32, strategy: S, test: impl Fn(S::Value)) {
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let test = |value| {
        test(value);
        Ok(())
    };
    runner.run(&strategy, test).unwrap();
}

pub(crate) fn with_keys(mut file: Value, keys: Value) -> String {
    file.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    file.to_string()
}
