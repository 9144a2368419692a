//! Values as Go prints them in the API server's messages.

use serde_json::{Number, Value};

/// A value as a whole.
pub(super) fn printed(value: &Value) -> String {
    match value {
        Value::String(text) => quoted(text),
        Value::Number(n) => number(n),
        // Go's JSON spells out what HTML would stumble over.
        other => other.to_string().replace('<', "\\u003c").replace('>', "\\u003e").replace('&', "\\u0026"),
    }
}

/// A text in quotes, as by `%q`.
pub(super) fn quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_ascii_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c if c.is_control() || (c.is_whitespace() && c != ' ') => {
                out.push_str(&format!("\\u{:04x}", u32::from(c)));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// A number, as by `%v`.
pub(super) fn number(number: &Number) -> String {
    match number.as_i64() {
        Some(whole) => whole.to_string(),
        None => float(number.as_f64().unwrap_or(f64::NAN)),
    }
}

/// A floating-point number, as by `%v`: with an exponent from a million on and below a ten-thousandth.
pub(super) fn float(value: f64) -> String {
    let scientific = format!("{value:e}");
    let parts = scientific.split_once('e').and_then(|(digits, e)| Some((digits, e.parse::<i32>().ok()?)));
    match parts {
        Some((digits, exponent)) if !(-4..6).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_are_printed_as_go_prints_them() {
        for (value, expected) in [
            (json!("a \"b\"\n\u{1}\u{a0}é"), r#""a \"b\"\n\x01\u00a0é""#),
            (json!(-5), "-5"),
            (json!(1.5), "1.5"),
            (json!(1_234_567.5), "1.2345675e+06"),
            (json!(0.00001), "1e-05"),
            (json!(true), "true"),
            (json!(null), "null"),
            (json!({"name": "<a&b>", "a": [1]}), r#"{"a":[1],"name":"\u003ca\u0026b\u003e"}"#),
        ] {
            assert_eq!(printed(&value), expected);
        }
    }
}
