//! The field that the scale subresource sets: wanted replicas.

use serde_json::Value;

use super::print::printed;
use super::{Cause, Refusal};

/// Where the wanted replicas are.
#[derive(Debug)]
pub(super) struct Replicas {
    /// As the CRD has it, and so the API server: `.spec.replicas`.
    path: String,
}

impl Replicas {
    pub(super) fn at(path: &str) -> Self {
        Self { path: path.into() }
    }

    /// They are a number of 32 bits and not negative.
    pub(super) fn check(&self, object: &Value) -> Option<Refusal> {
        let path = self.path.as_str();
        let value = path.split('.').skip(1).try_fold(object, |at, field| at.get(field))?;
        let refuse =
            |value: String, detail: &str| Some(Refusal::new(Cause::Invalid, path, Some(value), detail));
        match (value.as_i64(), value) {
            (Some(count), _) if count < 0 => refuse(count.to_string(), "should be a non-negative integer"),
            (Some(count), _) if count > i64::from(i32::MAX) => {
                refuse(count.to_string(), &format!("should be less than or equal to {}", i32::MAX))
            }
            (Some(_), _) => None,
            (None, value) => {
                let (shown, kind) = match value {
                    Value::String(text) => (text.clone(), "string"),
                    Value::Bool(_) => (printed(value), "bool"),
                    Value::Number(_) => (printed(value), "float64"),
                    Value::Array(_) => (printed(value), "[]interface {}"),
                    Value::Object(_) => (printed(value), "map[string]interface {}"),
                    Value::Null => ("<nil>".into(), "<nil>"),
                };
                let detail = format!("{path} accessor error: {shown} is of the type {kind}, expected int64");
                refuse("0".into(), &detail)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn replicas_are_a_small_whole_number() {
        let said = |value: Value| {
            let refusal = Replicas::at(".spec.replicas").check(&json!({"spec": {"replicas": value}}));
            refusal.map(|refusal| refusal.to_string())
        };
        assert_eq!(said(json!(3)), None);
        assert_eq!(Replicas::at(".spec.replicas").check(&json!({"spec": {}})), None);
        assert_eq!(
            said(json!(-1)).unwrap(),
            ".spec.replicas: Invalid value: -1: should be a non-negative integer"
        );
        let huge = ".spec.replicas: Invalid value: 4294967296: should be less than or equal to 2147483647";
        assert_eq!(said(json!(1_i64 << 32)).unwrap(), huge);
        let text = ".spec.replicas: Invalid value: 0: .spec.replicas accessor error: 2 is of the type string, expected int64";
        assert_eq!(said(json!("2")).unwrap(), text);
    }
}
