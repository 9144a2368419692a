//! Values as Python writes them: `str`, `repr` and `json.dumps`.

use std::io::{self, Write};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};

use super::budget::{self, PaidText};

/// Python's `str(value)`.
pub fn text(state: &mut State, value: &Value) -> Result<String, Error> {
    if value.is_undefined() {
        return Ok(String::new());
    }
    if let Some(text) = value.as_str() {
        budget::spend(state, text.len())?;
        return Ok(text.to_owned());
    }
    budget::weigh(state, value)?;
    let mut out = PaidText::new(state);
    repr(&mut out, value).map_err(unwritten)?;
    Ok(out.into_string())
}

fn repr(out: &mut PaidText, value: &Value) -> io::Result<()> {
    match value.kind() {
        ValueKind::Undefined => out.write_all(b"Undefined"),
        ValueKind::Number if !value.is_integer() => out.write_all(float(as_f64(value)).as_bytes()),
        ValueKind::String => out.write_all(quoted(value.as_str().unwrap_or_default()).as_bytes()),
        ValueKind::Map => {
            out.write_all(b"{")?;
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.write_all(if index == 0 { "" } else { ", " }.as_bytes())?;
                repr(out, &key)?;
                out.write_all(b": ")?;
                repr(out, &value.get_item(&key).unwrap_or_default())?;
            }
            out.write_all(b"}")
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { (b"(", b")") } else { (b"[", b"]") };
            out.write_all(open)?;
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.write_all(if index == 0 { "" } else { ", " }.as_bytes())?;
                repr(out, &item)?;
            }
            if value.is_tuple() && value.len() == Some(1) {
                out.write_all(b",")?;
            }
            out.write_all(close)
        }
        _ => out.write_all(value.to_string().as_bytes()),
    }
}

fn as_f64(value: &Value) -> f64 {
    f64::try_from(value.clone()).unwrap_or(f64::NAN)
}

/// Python's `repr` of a string: what is not printable is escaped.
fn quoted(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if is_printable(c) => out.push(c),
            c => out.push_str(&match u32::from(c) {
                code @ ..0x100 => format!("\\x{code:02x}"),
                code @ ..0x10000 => format!("\\u{code:04x}"),
                code => format!("\\U{code:08x}"),
            }),
        }
    }
    out.push(quote);
    out
}

/// What Rust does not escape either; a combining mark is printable after a letter.
fn is_printable(c: char) -> bool {
    matches!(c, ' '..='~')
        || !c.is_whitespace() && ['a', c].iter().collect::<String>().escape_debug().count() == 2
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent where it is small or large.
pub fn float(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string().to_lowercase();
    }
    let scientific = format!("{value:e}");
    let (digits, exponent) = scientific.split_once('e').expect("it was formatted with an exponent");
    let exponent: i32 = exponent.parse().expect("it was formatted with an exponent");
    if (-4..16).contains(&exponent) {
        let plain = value.to_string();
        return if plain.contains('.') { plain } else { plain + ".0" };
    }
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{digits}e{sign}{:02}", exponent.abs())
}

fn unwritten(error: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::BadSerialization, error.to_string())
}

/// `tojson` as transformers defines it: `json.dumps` with its arguments, which unlike Jinja's own escapes no HTML.
pub fn to_json(
    state: &mut State,
    value: &Value,
    ensure_ascii: Option<bool>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let ensure_ascii = ensure_ascii.or(kwargs.get("ensure_ascii")?).unwrap_or(false);
    let indent = indentation(kwargs.get("indent")?)?;
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let separators = match kwargs.get::<Option<Vec<String>>>("separators")?.as_deref() {
        None => None,
        Some([item, key]) => Some((item.clone(), key.clone())),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson(separators) is a pair")),
    };
    kwargs.assert_all_used()?;
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "an undefined value is no JSON"));
    }
    if value.kind() == ValueKind::Iterable {
        return Err(Error::new(ErrorKind::BadSerialization, "an iterator is no JSON; make it a list"));
    }
    budget::weigh(state, value)?;
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = separators.unwrap_or_else(|| (item.into(), ": ".into()));
    let formatter = PythonJson { item, key, indent, ensure_ascii, depth: 0, empty: true };
    let mut out = PaidText::new(state);
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    let written = if sort_keys {
        serde_json::to_value(value).and_then(|mut sorted| {
            sorted.sort_all_objects();
            serde::Serialize::serialize(&sorted, &mut serializer)
        })
    } else {
        serde::Serialize::serialize(value, &mut serializer)
    };
    written.map_err(unwritten)?;
    Ok(out.into_string())
}

fn indentation(indent: Option<Value>) -> Result<Option<String>, Error> {
    let refused = || Error::new(ErrorKind::InvalidOperation, "tojson(indent) is at most 64, or a short text");
    match indent {
        None => Ok(None),
        Some(none) if none.is_none() => Ok(None),
        Some(indent) => match (indent.as_str(), i64::try_from(indent.clone())) {
            (Some(text), _) if text.len() <= 64 => Ok(Some(text.to_owned())),
            (None, Ok(width)) if width <= 64 => Ok(Some(" ".repeat(width.max(0) as usize))),
            _ => Err(refused()),
        },
    }
}

struct PythonJson {
    item: String,
    key: String,
    indent: Option<String>,
    ensure_ascii: bool,
    depth: usize,
    empty: bool,
}
impl PythonJson {
    fn open<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth += 1;
        self.empty = true;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.new_line(out)?;
        }
        self.empty = false;
        out.write_all(bracket)
    }

    fn next<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.empty = false;
        self.new_line(out)
    }

    fn new_line<W: ?Sized + io::Write>(&self, out: &mut W) -> io::Result<()> {
        let Some(indent) = &self.indent else { return Ok(()) };
        out.write_all(b"\n")?;
        (0..self.depth).try_for_each(|_| out.write_all(indent.as_bytes()))
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn write_f64<W: ?Sized + io::Write>(&mut self, out: &mut W, value: f64) -> io::Result<()> {
        out.write_all(float(value).as_bytes())
    }
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        if !self.ensure_ascii {
            return out.write_all(text.as_bytes());
        }
        let mut units = [0; 2];
        text.chars().try_for_each(|c| match c {
            ' '..='~' => out.write_all(&[c as u8]),
            _ => c.encode_utf16(&mut units).iter().try_for_each(|unit| write!(out, "\\u{unit:04x}")),
        })
    }
    fn begin_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"[")
    }
    fn end_array<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"]")
    }
    fn begin_array_value<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }
    fn end_array_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }
    fn begin_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.open(out, b"{")
    }
    fn end_object<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.close(out, b"}")
    }
    fn begin_object_key<W: ?Sized + io::Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.next(out, first)
    }
    fn begin_object_value<W: ?Sized + io::Write>(&mut self, out: &mut W) -> io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
    fn end_object_value<W: ?Sized + io::Write>(&mut self, _: &mut W) -> io::Result<()> {
        self.empty = false;
        Ok(())
    }
}
