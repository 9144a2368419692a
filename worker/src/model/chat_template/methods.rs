//! Methods of Python's strings, lists and dictionaries: minijinja's own where they are Python's, and others here.
//!
//! Templates come to rely on Python's idea of whitespace, of a line and of a title, which are not Rust's.

use minijinja::value::{Kwargs, ValueKind, from_args};
use minijinja::{Error, State, Value};
use minijinja_contrib::pycompat;

use super::budget;
use super::operators::type_error;

/// Calls `value.method(*args)`.
pub fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    budget::skim(state, value)?;
    for arg in args {
        budget::weigh(state, arg)?;
    }
    let found = match value.kind() {
        ValueKind::String => of_string(state, value.as_str().unwrap_or_default(), method, args)?,
        ValueKind::Seq if method == "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let index = value.try_iter()?.position(|item| item == *what);
            Some(Value::from(index.ok_or_else(|| type_error("the item is not in the list"))?))
        }
        _ => None,
    };
    let result = match found {
        Some(result) => result,
        None => pycompat::unknown_method_callback(state, value, method, args)?,
    };
    listed(state, result)
}

/// A result whose items are all there, instead of being made whenever they are asked for, and paid for.
pub fn listed(state: &mut State, result: Value) -> Result<Value, Error> {
    budget::skim(state, &result)?;
    if result.kind() != ValueKind::Iterable {
        return Ok(result);
    }
    let mut items = Vec::new();
    for item in result.try_iter()? {
        budget::spend(state, size_of::<Value>())?;
        items.push(item);
    }
    iterator(&Value::from(items))
}

/// The items of a value, all there, but not as a list: it has no JSON, and is no sequence.
pub fn iterator(value: &Value) -> Result<Value, Error> {
    let items: Vec<Value> = value.try_iter()?.collect();
    Ok(Value::make_iterable(move || items.clone().into_iter()))
}

/// What `str.isspace` holds for.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

fn of_string(state: &mut State, s: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            Value::from(strip(s, chars, method != "rstrip", method != "lstrip"))
        }
        "split" | "rsplit" => {
            let (sep, limit, kwargs): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
            let sep = sep.or(kwargs.get("sep")?);
            let limit = limit.or(kwargs.get("maxsplit")?);
            kwargs.assert_all_used()?;
            let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
            // Each piece is a value of its own.
            budget::spend(state, s.len().saturating_mul(size_of::<Value>()))?;
            split(s, sep, limit, method == "rsplit")?
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(kwargs.get("keepends")?).unwrap_or(false);
            kwargs.assert_all_used()?;
            budget::spend(state, s.len().saturating_mul(size_of::<Value>()))?;
            lines(s, keep)
        }
        "replace" => {
            let (old, new, count, kwargs): (&str, &str, Option<i64>, Kwargs) = from_args(args)?;
            let count = count.or(kwargs.get("count")?).and_then(|count| usize::try_from(count).ok());
            kwargs.assert_all_used()?;
            replace(state, s, old, new, count.unwrap_or(usize::MAX))?
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (index, item) in items.try_iter()?.enumerate() {
                let item = item.as_str().ok_or_else(|| type_error("only texts can be joined"))?;
                budget::spend(state, s.len() + item.len())?;
                out.push_str(if index == 0 { "" } else { s });
                out.push_str(item);
            }
            Value::from(out)
        }
        "format" => {
            pay_widths(state, s)?;
            return Ok(None);
        }
        "title" => Value::from(title(s)),
        "isdigit" => Value::from(!s.is_empty() && s.chars().all(is_digit)),
        "isspace" => Value::from(!s.is_empty() && s.chars().all(is_space)),
        "index" => match s.find(argument(args)?) {
            Some(at) => Value::from(s[..at].chars().count()),
            None => return Err(type_error("the text is not in the other")),
        },
        "removeprefix" => Value::from(s.strip_prefix(argument(args)?).unwrap_or(s)),
        "removesuffix" => Value::from(s.strip_suffix(argument(args)?).unwrap_or(s)),
        "partition" | "rpartition" => {
            let separator = argument(args)?;
            let forwards = method == "partition";
            let found = if forwards { s.split_once(separator) } else { s.rsplit_once(separator) };
            match (found, forwards) {
                (Some((before, after)), _) => Value::from((before, separator, after)),
                (None, true) => Value::from((s, "", "")),
                (None, false) => Value::from(("", "", s)),
            }
        }
        "startswith" | "endswith" => match &args {
            // A list is not a tuple.
            [affix] if affix.as_str().is_some() || affix.is_tuple() => return Ok(None),
            [_] => return Err(type_error(format!("{method} takes a text or a tuple of texts"))),
            [affix, start, rest @ ..] => {
                let none = Value::from(());
                let end = rest.first().unwrap_or(&none).clone();
                let part = state.apply_filter("[:]", &[Value::from(s), start.clone(), end, none])?;
                return call(state, &part, method, std::slice::from_ref(affix)).map(Some);
            }
            [] => return Ok(None),
        },
        "ljust" | "rjust" | "center" | "zfill" => {
            let (width, fill): (usize, Option<&str>) = from_args(args)?;
            budget::spend(state, width.saturating_mul(4))?;
            Value::from(justified(s, method, width, fill.unwrap_or(" ")))
        }
        "swapcase" => {
            s.chars()
                .map(|c| {
                    if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() }
                })
                .collect::<String>()
                .into()
        }
        _ => return Ok(None),
    }))
}

fn argument(args: &[Value]) -> Result<&str, Error> {
    let (argument,): (&str,) = from_args(args)?;
    Ok(argument)
}

/// `str.strip` at either end.
pub fn strip<'s>(s: &'s str, chars: Option<&str>, start: bool, end: bool) -> &'s str {
    let goes = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let s = if start { s.trim_start_matches(goes) } else { s };
    if end { s.trim_end_matches(goes) } else { s }
}

fn split(s: &str, separator: Option<&str>, limit: usize, from_end: bool) -> Result<Value, Error> {
    let more = limit.saturating_add(1);
    let mut pieces: Vec<&str> = match separator {
        Some("") => return Err(type_error("an empty separator")),
        Some(separator) if from_end => s.rsplitn(more, separator).collect(),
        Some(separator) => s.splitn(more, separator).collect(),
        None => words(s, limit, from_end),
    };
    if from_end {
        pieces.reverse();
    }
    Ok(pieces.into_iter().map(Value::from).collect())
}

/// Pieces between runs of whitespace, in the order in which they are found; the last has what is left.
fn words(s: &str, limit: usize, from_end: bool) -> Vec<&str> {
    let mut rest = strip(s, None, !from_end, from_end);
    let mut pieces = Vec::new();
    while !rest.is_empty() {
        let gap = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
        let Some(gap) = gap.filter(|_| pieces.len() < limit) else {
            pieces.push(strip(rest, None, from_end, !from_end));
            break;
        };
        if from_end {
            let after = gap + rest[gap..].chars().next().map_or(0, char::len_utf8);
            pieces.push(&rest[after..]);
            rest = strip(&rest[..gap], None, false, true);
        } else {
            pieces.push(&rest[..gap]);
            rest = strip(&rest[gap..], None, true, false);
        }
    }
    pieces
}

fn lines(s: &str, keep_ends: bool) -> Value {
    let ends = |c: char| {
        matches!(c, '\n' | '\r' | '\x0b' | '\x0c' | '\x1c'..='\x1e' | '\u{85}' | '\u{2028}' | '\u{2029}')
    };
    let mut lines = Vec::new();
    let mut rest = s;
    while let Some((at, end)) = rest.char_indices().find(|(_, c)| ends(*c)) {
        let after = if rest[at..].starts_with("\r\n") { at + 2 } else { at + end.len_utf8() };
        lines.push(Value::from(&rest[..if keep_ends { after } else { at }]));
        rest = &rest[after..];
    }
    if !rest.is_empty() {
        lines.push(Value::from(rest));
    }
    Value::from(lines)
}

/// `str.replace`.
pub fn replace(state: &mut State, s: &str, old: &str, new: &str, count: usize) -> Result<Value, Error> {
    let found = if old.is_empty() { s.chars().count() + 1 } else { s.matches(old).count() };
    budget::spend(state, s.len().saturating_add(found.min(count).saturating_mul(new.len())))?;
    Ok(Value::from(s.replacen(old, new, count)))
}

/// A word begins after what is not a letter.
fn title(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut begins = true;
    for c in s.chars() {
        if begins {
            out.extend(c.to_uppercase())
        } else {
            out.extend(c.to_lowercase())
        }
        begins = !c.is_alphabetic();
    }
    out
}

/// Of what is numeric, fractions and letters are no digits.
fn is_digit(c: char) -> bool {
    c.is_numeric() && !matches!(c, '\u{bc}'..='\u{be}' | '\u{2150}'..='\u{218b}')
}

fn justified(s: &str, method: &str, width: usize, fill: &str) -> String {
    let missing = width.saturating_sub(s.chars().count());
    let pad = |n: usize| fill.repeat(n);
    match method {
        "ljust" => s.to_owned() + &pad(missing),
        "rjust" => pad(missing) + s,
        "zfill" => {
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(missing))
        }
        // As CPython does: what is odd goes to the left if the width is odd.
        _ => {
            let left = missing / 2 + (missing & width & 1);
            pad(left) + s + &pad(missing - left)
        }
    }
}

/// Pays for the widths and precisions of a format, and refuses one that takes them from its arguments.
pub fn pay_widths(state: &mut State, format: &str) -> Result<(), Error> {
    if format.contains("%*") || format.contains(".*") || format.contains(":{") && !format.contains(":{{") {
        return Err(budget::refused("a format takes a width from its arguments".into()));
    }
    for run in format.as_bytes().chunk_by(|a, b| a.is_ascii_digit() && b.is_ascii_digit()) {
        let width = run
            .iter()
            .filter(|byte| byte.is_ascii_digit())
            .fold(0_usize, |width, byte| width.saturating_mul(10).saturating_add(usize::from(byte - b'0')));
        budget::spend(state, width.saturating_mul(4))?;
    }
    Ok(())
}
