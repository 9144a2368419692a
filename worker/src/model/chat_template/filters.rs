//! Jinja's filters, tests and functions: minijinja's where they are Jinja's, priced; and those that differ.

use minijinja::functions::Function;
use minijinja::value::{FunctionArgs, FunctionResult, Kwargs, Rest, ValueKind, ValueOrKwargs, from_args};
use minijinja::{Environment, Error, State, Value, filters, functions};

use super::methods::{self, listed, pay_widths, strip};
use super::operators::type_error;
use super::text::{text, to_json};
use super::{budget, operators};

/// Registers all of them.
pub fn register(environment: &mut Environment<'static>) {
    for name in ["chain", "zip", "lines", "split", "bool", "pprint"] {
        environment.remove_filter(name);
    }
    for name in ["startingwith", "endingwith"] {
        environment.remove_test(name);
    }
    environment.remove_global("debug");
    shallow(environment);
    deep(environment);
    own(environment);
    tests(environment);
    environment.add_function("range", range);
    environment.add_function("dict", dict);
    environment.add_function("namespace", namespace);
}

type Price = fn(&mut State, &Value) -> Result<(), Error>;

/// A function whose arguments and result are paid for.
fn priced<F, Rv, Args>(
    price: Price,
    function: F,
) -> impl Fn(&mut State, Rest<ValueOrKwargs>) -> Result<Value, Error> + Send + Sync + 'static
where
    F: Function<Rv, Args>,
    Rv: FunctionResult,
    Args: for<'a> FunctionArgs<'a>,
{
    let function = Value::from_function(function);
    move |state: &mut State, args: Rest<ValueOrKwargs>| {
        let args = args.into_values();
        args.iter().try_for_each(|arg| price(state, arg))?;
        let result = function.call(state, &args)?;
        listed(state, result)
    }
}

/// The same, of a filter whose result is an iterator in Python.
fn lazy<F, Rv, Args>(
    price: Price,
    function: F,
) -> impl Fn(&mut State, Rest<ValueOrKwargs>) -> Result<Value, Error> + Send + Sync + 'static
where
    F: Function<Rv, Args>,
    Rv: FunctionResult,
    Args: for<'a> FunctionArgs<'a>,
{
    let function = priced(price, function);
    move |state: &mut State, args: Rest<ValueOrKwargs>| methods::iterator(&function(state, args)?)
}

/// Filters that look at no more than the items themselves.
fn shallow(environment: &mut Environment<'static>) {
    let price = budget::skim;
    environment.add_filter("abs", priced(price, filters::abs));
    environment.add_filter("attr", priced(price, filters::attr));
    environment.add_filter("batch", priced(fill, filters::batch));
    environment.add_filter("capitalize", priced(price, filters::capitalize));
    environment.add_filter("count", length);
    environment.add_filter("first", priced(price, filters::first));
    environment.add_filter("items", priced(price, filters::items));
    environment.add_filter("last", priced(price, filters::last));
    environment.add_filter("length", length);
    environment.add_filter("list", priced(price, filters::list));
    environment.add_filter("lower", priced(price, filters::lower));
    environment.add_filter("map", lazy(price, filters::map));
    environment.add_filter("reject", lazy(price, filters::reject));
    environment.add_filter("rejectattr", lazy(price, filters::rejectattr));
    environment.add_filter("reverse", priced(price, filters::reverse));
    environment.add_filter("round", priced(price, filters::round));
    environment.add_filter("safe", priced(price, filters::safe));
    environment.add_filter("select", lazy(price, filters::select));
    environment.add_filter("selectattr", lazy(price, filters::selectattr));
    environment.add_filter("slice", priced(fill, filters::slice));
    environment.add_filter("title", priced(price, filters::title));
    environment.add_filter("upper", priced(price, filters::upper));
}

/// Filters that compare or print what they are given.
fn deep(environment: &mut Environment<'static>) {
    let price = budget::weigh;
    environment.add_filter("dictsort", priced(price, filters::dictsort));
    environment.add_filter("groupby", priced(price, filters::groupby));
    environment.add_filter("max", priced(price, filters::max));
    environment.add_filter("min", priced(price, filters::min));
    environment.add_filter("sort", priced(price, filters::sort));
    environment.add_filter("unique", priced(price, filters::unique));
}

/// The price of a filter that fills up to a number it is given.
fn fill(state: &mut State, argument: &Value) -> Result<(), Error> {
    budget::skim(state, argument)?;
    let times = if argument.is_integer() { usize::try_from(argument.clone()).unwrap_or(0) } else { 0 };
    budget::spend(state, times.saturating_mul(size_of::<Value>()))
}

/// Filters that are not minijinja's, or that could make more than they are given.
fn own(environment: &mut Environment<'static>) {
    environment.add_filter("tojson", to_json);
    environment.add_filter("d", default);
    environment.add_filter("default", default);
    environment.add_filter("e", operators::escape);
    environment.add_filter("escape", operators::escape);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("string", text);
    environment.add_filter("trim", trim);
    environment.add_filter("replace", replace);
    environment.add_filter("format", format);
    environment.add_filter("join", join);
    environment.add_filter("indent", indent);
    environment.add_filter("sum", sum);
}

fn length(value: &Value) -> Result<usize, Error> {
    if value.is_undefined() { Ok(0) } else { filters::length(value) }
}

fn default(value: Value, other: Option<Value>, lax: Option<bool>, kwargs: Kwargs) -> Result<Value, Error> {
    let other = other.or(kwargs.get("default_value")?).unwrap_or(Value::from(""));
    let lax = lax.or(kwargs.get("boolean")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    let missing = value.is_undefined() || lax && !value.is_true();
    Ok(if missing { other } else { value })
}

/// What is no number is 0, unless it is given something else to be.
fn int(state: &mut State, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut args = args.into_values();
    args.iter().try_for_each(|arg| budget::weigh(state, arg))?;
    if args.len() == 1 {
        args.push(Value::from(0));
    }
    Value::from_function(filters::int).call(state, &args)
}

fn float(state: &mut State, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut args = args.into_values();
    args.iter().try_for_each(|arg| budget::weigh(state, arg))?;
    if args.len() == 1 {
        args.push(Value::from(0.0));
    }
    Value::from_function(filters::float).call(state, &args)
}

fn trim(state: &mut State, value: &Value, chars: Option<&str>) -> Result<String, Error> {
    let text = text(state, value)?;
    Ok(strip(&text, chars, true, true).to_owned())
}

fn replace(
    state: &mut State,
    value: &Value,
    old: &str,
    new: &str,
    count: Option<i64>,
) -> Result<Value, Error> {
    let text = text(state, value)?;
    let count = count.and_then(|count| usize::try_from(count).ok()).unwrap_or(usize::MAX);
    methods::replace(state, &text, old, new, count)
}

fn format(state: &mut State, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let args = args.into_values();
    pay_widths(state, args.first().and_then(Value::as_str).unwrap_or_default())?;
    args.iter().try_for_each(|arg| budget::weigh(state, arg))?;
    let result = Value::from_function(filters::format).call(state, &args)?;
    listed(state, result)
}

fn join(
    state: &mut State,
    items: &Value,
    separator: Option<&str>,
    attribute: Option<&str>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let separator = separator.or(kwargs.get("d")?).unwrap_or_default();
    let attribute = attribute.or(kwargs.get("attribute")?);
    kwargs.assert_all_used()?;
    let items = state.apply_filter("for", std::slice::from_ref(items))?;
    let mut out = String::new();
    for (index, item) in items.try_iter()?.enumerate() {
        let item = attribute.map_or(Ok(item.clone()), |name| item.get_attr(name))?;
        let item = text(state, &item)?;
        budget::spend(state, separator.len() + item.len())?;
        out.push_str(if index == 0 { "" } else { separator });
        out.push_str(&item);
    }
    Ok(Value::from(out))
}

/// Jinja's: `width` may be a text, and neither the first line nor blank ones are indented unless that is asked for.
fn indent(state: &mut State, value: &Value, args: Rest<ValueOrKwargs>) -> Result<String, Error> {
    let args = args.into_values();
    let (width, first, blank, kwargs): (Option<Value>, Option<bool>, Option<bool>, Kwargs) =
        from_args(&args)?;
    let width = width.or(kwargs.get("width")?).unwrap_or(Value::from(4));
    let first = first.or(kwargs.get("first")?).unwrap_or(false);
    let blank = blank.or(kwargs.get("blank")?).unwrap_or(false);
    kwargs.assert_all_used()?;
    let margin = match width.as_str() {
        Some(margin) => margin.to_owned(),
        None => {
            let width = i64::try_from(width)?.max(0) as usize;
            budget::spend(state, width)?;
            " ".repeat(width)
        }
    };
    let text = text(state, value)?;
    let lines = methods::call(state, &Value::from(text + "\n"), "splitlines", &[])?;
    let mut out = String::new();
    for (index, line) in lines.try_iter()?.enumerate() {
        let line = line.as_str().unwrap_or_default().to_owned();
        let indented = if index == 0 { first } else { blank || !line.is_empty() };
        budget::spend(state, 1 + margin.len() + line.len())?;
        out.push_str(if index == 0 { "" } else { "\n" });
        out.push_str(if indented { &margin } else { "" });
        out.push_str(&line);
    }
    Ok(out)
}

fn sum(
    state: &mut State,
    items: &Value,
    attribute: Option<&str>,
    start: Option<Value>,
    kwargs: Kwargs,
) -> Result<Value, Error> {
    let attribute = attribute.or(kwargs.get("attribute")?);
    let start = start.or(kwargs.get("start")?).unwrap_or(Value::from(0));
    kwargs.assert_all_used()?;
    budget::skim(state, items)?;
    items.try_iter()?.try_fold(start, |sum, item| {
        let item = attribute.map_or(Ok(item.clone()), |name| item.get_attr(name))?;
        operators::add(state, &sum, &item)
    })
}

fn tests(environment: &mut Environment<'static>) {
    for (names, test) in [
        (["eq", "equalto", "=="], operators::equal as fn(&mut State, &Value, &Value) -> Result<bool, Error>),
        (["ne", "ne", "!="], operators::unequal),
        (["lt", "lessthan", "<"], operators::less),
        (["le", "le", "<="], operators::at_most),
        (["gt", "greaterthan", ">"], operators::greater),
        (["ge", "ge", ">="], operators::at_least),
        (["in", "in", "in"], operators::contained),
    ] {
        names.into_iter().for_each(|name| environment.add_test(name, test));
    }
    for (name, test) in
        [("lower", minijinja::tests::is_lower as fn(&Value) -> bool), ("upper", minijinja::tests::is_upper)]
    {
        environment.add_test(name, move |state: &mut State, value: &Value| {
            budget::skim(state, value)?;
            Ok::<bool, Error>(test(value))
        });
    }
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Undefined | ValueKind::String | ValueKind::Map | ValueKind::Seq)
    });
    environment.add_test("iterable", |value: &Value| {
        matches!(
            value.kind(),
            ValueKind::Undefined | ValueKind::String | ValueKind::Map | ValueKind::Seq | ValueKind::Iterable
        )
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

/// Python's `range`, up to the length that Jinja's sandbox allows.
fn range(state: &mut State, first: i64, stop: Option<i64>, step: Option<i64>) -> Result<Value, Error> {
    const MAX_RANGE: usize = 100_000;
    let (start, stop) = stop.map_or((0, first), |stop| (first, stop));
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(type_error("the step of a range is not 0"));
    }
    let numbers = std::iter::successors(Some(start), |number| number.checked_add(step))
        .take_while(|number| if step > 0 { *number < stop } else { *number > stop });
    let numbers: Vec<i64> = numbers.take(MAX_RANGE + 1).collect();
    if numbers.len() > MAX_RANGE {
        return Err(budget::refused(format!("a range has more than {MAX_RANGE} numbers")));
    }
    budget::spend(state, numbers.len() * size_of::<Value>())?;
    Ok(Value::from(numbers))
}

/// `dict`, of a mapping, of pairs, or of names.
fn dict(state: &mut State, from: Option<Value>, names: Kwargs) -> Result<Value, Error> {
    let mut entries: Vec<(Value, Value)> = Vec::new();
    if let Some(from) = from {
        budget::keep(state, &from)?;
        for item in from.try_iter()? {
            match from.kind() {
                ValueKind::Map => entries.push((item.clone(), from.get_item(&item)?)),
                _ if item.len() == Some(2) => {
                    entries.push((item.get_item_by_index(0)?, item.get_item_by_index(1)?));
                }
                _ => return Err(type_error("dict takes a mapping or pairs")),
            }
        }
    }
    for name in names.args() {
        let value: Value = names.get(name)?;
        budget::keep(state, &value)?;
        entries.push((Value::from(name), value));
    }
    Ok(Value::from_pairs(entries))
}

fn namespace(state: &mut State, values: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let values = values.into_values();
    values.iter().try_for_each(|values| budget::keep(state, values))?;
    Value::from_function(functions::namespace).call(state, &values)
}
