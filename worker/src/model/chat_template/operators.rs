//! Python's operators. Each pays for its operands before it makes anything of them.

use std::cmp::Ordering;

use minijinja::value::{Tuple, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value};

use super::budget;
use super::text::text;

/// Registers the filters that a program has in place of operators.
pub fn register(environment: &mut Environment<'static>) {
    environment.add_filter("_", |value: Value| value);
    environment.add_filter("+", add);
    environment.add_filter("*", multiply);
    environment.add_filter("%", remainder);
    environment.add_filter("~", concatenate);
    environment.add_filter("==", equal);
    environment.add_filter("!=", unequal);
    environment.add_filter("<", less);
    environment.add_filter("<=", at_most);
    environment.add_filter(">", greater);
    environment.add_filter(">=", at_least);
    environment.add_filter("in", contained);
    environment.add_filter("[]", item);
    environment.add_filter("[:]", slice);
    environment.add_filter("for", each);
    environment.add_filter("keep", kept);
    environment.add_filter("weigh", weighed);
}

/// An operation that Python refuses.
pub fn type_error(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}

fn unsupported(operator: &str, a: &Value, b: &Value) -> Error {
    type_error(format!("`{operator}` of a {} and a {}", a.kind(), b.kind()))
}

pub fn add(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    if a.as_str().is_some() && b.as_str().is_some() && (a.is_safe() || b.is_safe()) {
        return joined_html(state, a, b);
    }
    if let (Some(a), Some(b)) = (a.as_str(), b.as_str()) {
        budget::spend(state, a.len() + b.len())?;
        return Ok(Value::from([a, b].concat()));
    }
    if is_list(a) && is_list(b) && a.is_tuple() == b.is_tuple() {
        budget::skim(state, a)?;
        budget::skim(state, b)?;
        return Ok(like(a, a.try_iter()?.chain(b.try_iter()?).collect()));
    }
    arithmetic("+", a, b, i128::checked_add, |a, b| a + b)
}

fn multiply(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    for (many, times) in [(a, b), (b, a)] {
        if !times.is_integer() {
            continue;
        }
        let times = i64::try_from(times.clone()).unwrap_or(i64::MAX).max(0) as usize;
        if let Some(text) = many.as_str() {
            budget::spend(state, text.len().saturating_mul(times))?;
            return Ok(Value::from(text.repeat(times)));
        }
        if is_list(many) {
            let items: Vec<Value> = many.try_iter()?.collect();
            budget::spend(state, items.len().saturating_mul(times).saturating_mul(size_of::<Value>()))?;
            return Ok(like(many, std::iter::repeat_n(items, times).flatten().collect()));
        }
    }
    arithmetic("*", a, b, i128::checked_mul, |a, b| a * b)
}

/// The remainder of numbers; of a text, Python's formatting.
fn remainder(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    if a.as_str().is_some() {
        let mut arguments = vec![a.clone()];
        match b.is_tuple() {
            true => arguments.extend(b.try_iter()?),
            false => arguments.push(b.clone()),
        }
        return state.apply_filter("format", &arguments);
    }
    if !is_number(a) || !is_number(b) {
        return Err(unsupported("%", a, b));
    }
    // Exact in minijinja, and free of texts and lists here.
    state.env().compile_expression("a % b")?.eval(minijinja::context! { a, b })
}

fn concatenate(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    let joined = text(state, a)? + &text(state, b)?;
    budget::spend(state, joined.len())?;
    Ok(Value::from(joined))
}

/// What is joined to a text that is marked as HTML is escaped. Chats are none, but a published template marks its texts so.
fn joined_html(state: &mut State, a: &Value, b: &Value) -> Result<Value, Error> {
    let (a, b) = (escape(state, a)?, escape(state, b)?);
    let joined = [a.as_str().unwrap_or_default(), b.as_str().unwrap_or_default()].concat();
    budget::spend(state, joined.len())?;
    Ok(Value::from_safe_string(joined))
}

/// A value as HTML, as markupsafe escapes it.
pub fn escape(state: &mut State, value: &Value) -> Result<Value, Error> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let text = text(state, value)?;
    budget::spend(state, text.len() * 5)?;
    let escaped = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    Ok(Value::from_safe_string(escaped.replace('"', "&#34;").replace('\'', "&#39;")))
}

fn arithmetic(
    operator: &str,
    a: &Value,
    b: &Value,
    exact: fn(i128, i128) -> Option<i128>,
    float: fn(f64, f64) -> f64,
) -> Result<Value, Error> {
    let whole = |value: &Value| match value.kind() {
        ValueKind::Bool => Some(i128::from(value.is_true())),
        _ if value.is_integer() => i128::try_from(value.clone()).ok(),
        _ => None,
    };
    if !is_number(a) || !is_number(b) {
        return Err(unsupported(operator, a, b));
    }
    if let (Some(a), Some(b)) = (whole(a), whole(b)) {
        let result = exact(a, b).ok_or_else(|| type_error(format!("`{operator}` is out of range")))?;
        return Ok(i64::try_from(result).map_or_else(|_| Value::from(result), Value::from));
    }
    Ok(Value::from(float(f64::try_from(a.clone())?, f64::try_from(b.clone())?)))
}

fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

fn is_list(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable)
}

/// Items as a tuple where `model` is one, and a list elsewhere.
fn like(model: &Value, items: Vec<Value>) -> Value {
    if model.is_tuple() { Value::from(Tuple::from(items)) } else { Value::from(items) }
}

pub fn equal(state: &mut State, a: &Value, b: &Value) -> Result<bool, Error> {
    budget::weigh(state, a)?;
    budget::weigh(state, b)?;
    Ok(a == b && a.is_tuple() == b.is_tuple())
}

pub fn unequal(state: &mut State, a: &Value, b: &Value) -> Result<bool, Error> {
    Ok(!equal(state, a, b)?)
}

pub fn less(state: &mut State, a: &Value, b: &Value) -> Result<bool, Error> {
    Ok(order(state, a, b)?.is_lt())
}

pub fn at_most(state: &mut State, a: &Value, b: &Value) -> Result<bool, Error> {
    Ok(order(state, a, b)?.is_le())
}

pub fn greater(state: &mut State, a: &Value, b: &Value) -> Result<bool, Error> {
    Ok(order(state, a, b)?.is_gt())
}

pub fn at_least(state: &mut State, a: &Value, b: &Value) -> Result<bool, Error> {
    Ok(order(state, a, b)?.is_ge())
}

fn kept(state: &mut State, value: Value) -> Result<Value, Error> {
    budget::keep(state, &value)?;
    Ok(value)
}

fn weighed(state: &mut State, value: Value) -> Result<Value, Error> {
    budget::weigh(state, &value)?;
    Ok(value)
}

fn order(state: &mut State, a: &Value, b: &Value) -> Result<Ordering, Error> {
    budget::weigh(state, a)?;
    budget::weigh(state, b)?;
    let comparable = is_number(a) && is_number(b)
        || a.as_str().is_some() && b.as_str().is_some()
        || is_list(a) && is_list(b);
    if comparable { Ok(a.cmp(b)) } else { Err(unsupported("<", a, b)) }
}

pub fn contained(state: &mut State, value: &Value, container: &Value) -> Result<bool, Error> {
    if container.is_undefined() {
        return Ok(false);
    }
    budget::weigh(state, value)?;
    if let Some(container) = container.as_str() {
        budget::spend(state, container.len())?;
        let value = value.as_str().ok_or_else(|| type_error("`in` of a text needs a text"))?;
        return Ok(container.contains(value));
    }
    match container.kind() {
        ValueKind::Map => Ok(container.as_object().is_some_and(|map| map.get_value(value).is_some())),
        ValueKind::Seq | ValueKind::Iterable => {
            budget::weigh(state, container)?;
            Ok(container.try_iter()?.any(|item| item == *value))
        }
        kind => Err(type_error(format!("`in` of a {kind}"))),
    }
}

/// `value[key]`. What is not there is undefined, and nothing is there in what is undefined.
fn item(state: &mut State, value: &Value, key: &Value) -> Result<Value, Error> {
    if value.is_undefined() {
        return Err(Error::new(ErrorKind::UndefinedError, "an item of an undefined value"));
    }
    budget::skim(state, key)?;
    if let (Some(text), true) = (value.as_str(), key.is_integer()) {
        budget::spend(state, text.len())?;
        let index = i64::try_from(key.clone())?;
        let found = match index {
            0.. => text.chars().nth(index as usize),
            _ => text.chars().rev().nth(index.unsigned_abs() as usize - 1),
        };
        return Ok(found.map_or(Value::UNDEFINED, |c| Value::from(c.to_string())));
    }
    Ok(value.get_item(key).unwrap_or_default())
}

fn slice(
    state: &mut State,
    value: &Value,
    start: &Value,
    stop: &Value,
    step: &Value,
) -> Result<Value, Error> {
    budget::skim(state, value)?;
    let bound = |bound: &Value| match bound.is_none() {
        true => Ok(None),
        false => i64::try_from(bound.clone()).map(Some),
    };
    let step = bound(step)?.unwrap_or(1);
    if step == 0 {
        return Err(type_error("the step of a slice is not 0"));
    }
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        let indices = indices(chars.len(), bound(start)?, bound(stop)?, step);
        return Ok(Value::from(indices.map(|index| chars[index]).collect::<String>()));
    }
    if !is_list(value) {
        return Err(type_error(format!("a slice of a {}", value.kind())));
    }
    let items: Vec<Value> = value.try_iter()?.collect();
    let indices = indices(items.len(), bound(start)?, bound(stop)?, step);
    Ok(like(value, indices.map(|index| items[index].clone()).collect()))
}

/// Python's `range(*slice(start, stop, step).indices(length))`.
fn indices(length: usize, start: Option<i64>, stop: Option<i64>, step: i64) -> impl Iterator<Item = usize> {
    let length = length as i64;
    let (first, last) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clamp = |bound: i64| {
        let from_start = if bound < 0 { bound.saturating_add(length) } else { bound };
        from_start.clamp(first, last)
    };
    let start = start.map_or(if step > 0 { first } else { last }, clamp);
    let stop = stop.map_or(if step > 0 { last } else { first }, clamp);
    std::iter::successors(Some(start), move |index| index.checked_add(step))
        .take_while(move |index| if step > 0 { *index < stop } else { *index > stop })
        .map(|index| index as usize)
}

/// What a loop goes through.
fn each(state: &mut State, value: &Value) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Undefined => Ok(Value::from(Vec::<Value>::new())),
        ValueKind::String => {
            budget::skim(state, value)?;
            let text = value.as_str().unwrap_or_default();
            budget::spend(state, text.len().saturating_mul(size_of::<Value>()))?;
            Ok(text.chars().map(|c| Value::from(c.to_string())).collect())
        }
        ValueKind::Map | ValueKind::Seq | ValueKind::Iterable => {
            budget::skim(state, value)?;
            Ok(value.try_iter()?.collect())
        }
        kind => Err(type_error(format!("a loop through a {kind}"))),
    }
}
