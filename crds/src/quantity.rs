//! Byte counts as people write them in Kubernetes.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A number of bytes in Kubernetes notation: `1073741824`, `512Mi`, `70Gi`, `1.5G`.
///
/// Kept as written, so that server-side apply never sees a difference of spelling.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "IntOrString")]
pub struct ByteQuantity(pub String);

#[derive(Deserialize)]
#[serde(untagged)]
enum IntOrString {
    Int(u64),
    Text(String),
}

impl From<IntOrString> for ByteQuantity {
    fn from(value: IntOrString) -> Self {
        match value {
            IntOrString::Int(n) => Self(n.to_string()),
            IntOrString::Text(s) => Self(s),
        }
    }
}

/// A byte quantity that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a number of bytes; write for example 1073741824, 512Mi or 70Gi")]
pub struct InvalidQuantity(pub String);

const SUFFIXES: [(&str, u64); 13] = [
    ("Ki", 1 << 10),
    ("Mi", 1 << 20),
    ("Gi", 1 << 30),
    ("Ti", 1 << 40),
    ("Pi", 1 << 50),
    ("Ei", 1 << 60),
    ("k", 1_000),
    ("M", 1_000_000),
    ("G", 1_000_000_000),
    ("T", 1_000_000_000_000),
    ("P", 1_000_000_000_000_000),
    ("E", 1_000_000_000_000_000_000),
    ("", 1),
];

impl ByteQuantity {
    /// Bytes, rounded up to a whole one.
    pub fn bytes(&self) -> Result<u64, InvalidQuantity> {
        let invalid = || InvalidQuantity(self.0.clone());
        let (digits, unit) = SUFFIXES
            .iter()
            .find_map(|(suffix, unit)| self.0.strip_suffix(suffix).map(|digits| (digits, *unit)))
            .ok_or_else(invalid)?;
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let all_digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
        if whole.is_empty()
            || digits.ends_with('.')
            || !all_digits(whole)
            || !all_digits(fraction)
            || fraction.len() > 9
        {
            return Err(invalid());
        }
        let whole: u128 = whole.parse().map_err(|_| invalid())?;
        let scale = 10u128.pow(fraction.len() as u32);
        let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| invalid())? };
        let numerator = whole
            .checked_mul(scale)
            .and_then(|n| n.checked_add(fraction))
            .and_then(|n| n.checked_mul(u128::from(unit)))
            .ok_or_else(invalid)?;
        u64::try_from(numerator.div_ceil(scale)).map_err(|_| invalid())
    }
}

impl JsonSchema for ByteQuantity {
    fn schema_name() -> Cow<'static, str> {
        "ByteQuantity".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "x-kubernetes-int-or-string": true,
            "minimum": 0,
            "pattern": r"^[0-9]+(\.[0-9]{1,9})?([KMGTPE]i|[kMGTPE])?$",
            "maxLength": 32
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1073741824", 1 << 30),
            ("512Mi", 512 << 20),
            ("70Gi", 70 << 30),
            ("1.5G", 1_500_000_000),
            ("0.1Ki", 103),
            ("16Ei", 0),
        ] {
            let read = ByteQuantity(text.into()).bytes();
            if bytes == 0 && text != "0" {
                assert!(read.is_err(), "{text} overflows");
            } else {
                assert_eq!(read, Ok(bytes), "{text}");
            }
        }
        for text in ["", "Gi", "-1", "1 Gi", "1gi", "1e3", "1.", ".5Gi", "0x10"] {
            let read = ByteQuantity(text.into()).bytes();
            assert!(read.is_err(), "{text} should be refused, got {read:?}");
        }
    }

    #[test]
    fn numbers_and_strings_are_both_accepted() {
        let read: Vec<ByteQuantity> = serde_json::from_str(r#"[1024, "1Ki"]"#).unwrap();
        assert_eq!(read.iter().map(|q| q.bytes().unwrap()).collect::<Vec<_>>(), [1024, 1024]);
    }
}
