//! Reading the keys of a `config.json`: typed, range-checked, and refused by name.

use serde_json::{Map, Value};

use crate::model::excerpt::excerpt;

/// Why a `config.json` is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not an object.
    #[error("config.json is not a JSON object: {0}")]
    Malformed(String),
    /// A key that must be there is not.
    #[error("config.json has no `{0}`")]
    Missing(String),
    /// A key has a value of the wrong type or outside its range.
    #[error("config.json: `{key}` is {value}, expected {expected}")]
    Invalid {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// Widths whose product no file could hold.
    #[error("config.json: a model of these sizes has more than 17592186044416 weights")]
    TooLarge,
    /// A valid setting that this engine does not compute.
    #[error("config.json: `{key}` = {value} is not supported; {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is.
        supported: &'static str,
    },
}

/// Larger numbers than any published model has, and small enough that no product of two of them overflows.
const LIMIT: u64 = 1 << 24;
/// Factors, divisors and caps. Within these, an f32 holds what is computed from them.
pub(super) const SANE: std::ops::RangeInclusive<f64> = 1e-6..=1e9;
const SANE_TEXT: &str = "a number between 0.000001 and 1000000000";

/// A token id, a list of them, or nothing.
pub(crate) fn parse_token_ids(value: Option<&Value>) -> Option<Vec<u32>> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(id) => Some(vec![one(id)?]),
    }
}

fn brief(value: &Value) -> String {
    excerpt(&value.to_string(), 60)
}

/// One object of the file.
#[derive(Debug, Clone)]
pub(super) struct Keys<'a> {
    map: &'a Map<String, Value>,
    /// Where the object is: empty at the top, or a name and a dot.
    path: String,
}

impl<'a> Keys<'a> {
    pub(super) fn top(map: &'a Map<String, Value>) -> Self {
        Self { map, path: String::new() }
    }

    /// The object at a key, when there is one.
    pub(super) fn object(&self, key: &str) -> Result<Option<Keys<'a>>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, path: format!("{}{key}.", self.path) })),
            Some(_) => Err(self.invalid(key, "an object")),
        }
    }

    /// A key's value; null is as good as absent.
    pub(super) fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether the key is there, be it null.
    pub(super) fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &'a String> {
        self.map.keys()
    }

    /// A key with where it is.
    fn name(&self, key: &str) -> String {
        format!("{}{}", self.path, excerpt(key, 60))
    }

    pub(super) fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing(self.name(key))
    }

    pub(super) fn invalid(&self, key: &str, expected: &'static str) -> ConfigError {
        let value = self.get(key).map_or_else(|| "absent".to_owned(), brief);
        ConfigError::Invalid { key: self.name(key), value, expected }
    }

    pub(super) fn unsupported(&self, key: &str, value: &Value, supported: &'static str) -> ConfigError {
        ConfigError::Unsupported { key: self.name(key), value: brief(value), supported }
    }

    pub(super) fn optional_count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if (1..=LIMIT).contains(&n) => Ok(Some(n as usize)),
                _ => Err(self.invalid(key, "a whole number between 1 and 16777216")),
            },
        }
    }

    /// A count that must be there, unless the architecture has a default for it.
    pub(super) fn count(&self, key: &str, default: Option<usize>) -> Result<usize, ConfigError> {
        self.optional_count(key)?.or(default).ok_or_else(|| self.missing(key))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| self.invalid(key, "a number")),
        }
    }

    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.number(key)? {
            Some(number) if !SANE.contains(&number) => Err(self.invalid(key, SANE_TEXT)),
            number => Ok(number),
        }
    }

    pub(super) fn positive_list(&self, key: &str) -> Result<Option<Vec<f64>>, ConfigError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let numbers: Option<Vec<f64>> =
            value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        match numbers {
            Some(numbers) if numbers.iter().all(|n| SANE.contains(n)) => Ok(Some(numbers)),
            _ => Err(self.invalid(key, "a list of numbers between 0.000001 and 1000000000")),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_bool().map(Some).ok_or_else(|| self.invalid(key, "true or false")),
        }
    }

    /// Refuses a key that is set to anything else than one of these, as written in JSON.
    pub(super) fn refuse_unless(&self, key: &str, allowed: &[&str]) -> Result<(), ConfigError> {
        match self.get(key) {
            Some(value) if !allowed.contains(&value.to_string().as_str()) => {
                Err(self.unsupported(key, value, "models without it are"))
            }
            _ => Ok(()),
        }
    }
}
