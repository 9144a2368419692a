//! Chat templates: the Jinja that ships with a model, rendered as transformers renders it.
//!
//! minijinja compiles and runs them. What Jinja leaves to Python (operators, methods, how a value is written) is Python's here
//! as far as templates can tell: `operators.rs`, `methods.rs`, `filters.rs`, `text.rs`. The parity suite compares published
//! templates with what transformers makes of them.
//!
//! A template is not trusted: it has no files and no network, what it raises is an error of the request, and it is bounded
//! in length, in steps, and in the bytes it touches (`budget.rs`, `program.rs`), so that it can neither hang nor exhaust its worker.

mod budget;
mod filters;
mod methods;
mod operators;
mod program;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;

use minijinja::machinery::{eval, make_string_output};
use minijinja::value::{Serde, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};

/// Steps that a rendering may take.
const FUEL: u64 = 4_000_000;
/// Frames that a rendering may have at once; a macro's call counts four, and must fit the stack of any thread.
const RECURSION: usize = 160;
/// Bytes that a template may have.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;

/// Why a template cannot be used, or refuses these messages.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template itself is wrong.
    #[error("the chat template is malformed: {0}")]
    Malformed(String),
    /// The template called `raise_exception`.
    #[error("the chat template refuses these messages: {0}")]
    Raised(String),
    /// Rendering failed.
    #[error("the chat template failed: {0}")]
    Failed(String),
    /// The model has none.
    #[error(
        "this base has no chat template; use /v1/completions, or a base with `chat_template` in its tokenizer"
    )]
    Missing,
}

/// What a conversation is rendered with.
#[derive(Debug, Clone)]
pub struct ChatInput {
    /// A list of objects with `role` and `content`. Deserialise requests straight into this type: it keeps the order of keys.
    pub messages: Value,
    /// Tool descriptions, when there are any.
    pub tools: Option<Value>,
    /// Whether the text ends where the assistant begins.
    pub add_generation_prompt: bool,
    /// Further variables of the template.
    pub variables: BTreeMap<String, Value>,
    /// What `strftime_now` calls now.
    pub now: jiff::Zoned,
}

/// A template, ready to render.
#[derive(Debug, Clone)]
pub struct ChatTemplate {
    /// In the normal form of `program`.
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
    special_tokens: BTreeMap<String, String>,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Checks a template. `special_tokens` are its variables such as `bos_token`.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::Malformed(format!("it is longer than {MAX_TEMPLATE_BYTES} bytes")));
        }
        let malformed = |e: Error| TemplateError::Malformed(describe(&e));
        let source = program::normal_form(source).map_err(malformed)?;
        program::compile(&source).map_err(malformed)?;
        let mut environment = Environment::new();
        environment.set_debug(false);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_unknown_method_callback(methods::call);
        environment.set_formatter(|out, state, value| match value.as_str() {
            Some(text) => {
                budget::spend(state, text.len())?;
                Ok(out.write_str(text)?)
            }
            None => Ok(out.write_str(&text::text(state, value)?)?),
        });
        operators::register(&mut environment);
        filters::register(&mut environment);
        environment.add_function("raise_exception", |state: &mut State, message: &Value| {
            let message = text::text(state, message)?;
            Err::<Value, _>(Error::new(ErrorKind::InvalidOperation, message).with_source(RaisedByTemplate))
        });
        Ok(Self { source: source.into(), environment: Arc::new(environment), special_tokens })
    }

    /// The text of a conversation.
    pub fn render(&self, input: &ChatInput) -> Result<String, TemplateError> {
        let mut variables: BTreeMap<String, Value> =
            BTreeMap::from([("documents".to_owned(), Value::from(()))]);
        let special_tokens = self.special_tokens.iter();
        variables.extend(special_tokens.map(|(name, token)| (name.clone(), Value::from(token.as_str()))));
        variables.extend(input.variables.clone());
        variables.insert("messages".into(), as_transformers_passes(&input.messages));
        variables.insert("tools".into(), input.tools.clone().unwrap_or(Value::from(())));
        variables.insert("add_generation_prompt".into(), Value::from(input.add_generation_prompt));
        let now = input.now.clone();
        let strftime = move |state: &mut State, format: String| -> Result<String, Error> {
            methods::pay_widths(state, &format)?;
            jiff::fmt::strtime::format(&format, &now)
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
        };
        variables.insert("strftime_now".into(), Value::from_function(strftime));
        let failed = |e: Error| TemplateError::Failed(describe(&e));
        let program = program::compile(&self.source).map_err(failed)?;
        let (mut text, no_blocks) = (String::new(), BTreeMap::new());
        let rendered = eval(
            &self.environment,
            &program,
            Value::from(Serde(&variables)),
            &no_blocks,
            &mut make_string_output(&mut text),
            AutoEscape::None,
        );
        match rendered {
            Ok(_) => Ok(text),
            Err(error) if was_raised(&error) => {
                Err(TemplateError::Raised(error.detail().unwrap_or_default().to_owned()))
            }
            Err(error) => Err(failed(error)),
        }
    }
}

/// Messages as templates get them from transformers: a key without a value is not there, and reasoning is there under the
/// name that current templates read whichever it came under.
fn as_transformers_passes(messages: &Value) -> Value {
    match messages.try_iter() {
        Ok(list) if messages.kind() == ValueKind::Seq => {
            list.map(|message| message_as_transformers_passes(&message).unwrap_or(message)).collect()
        }
        _ => messages.clone(),
    }
}

fn message_as_transformers_passes(message: &Value) -> Option<Value> {
    if message.kind() != ValueKind::Map {
        return None;
    }
    let mut entries: Vec<(Value, Value)> = Vec::new();
    for key in message.try_iter().ok()? {
        let value = message.get_item(&key).ok()?;
        if !value.is_none() {
            entries.push((key, value));
        }
    }
    let entry = |name: &str| entries.iter().find(|(key, _)| key.as_str() == Some(name)).map(|e| e.1.clone());
    let reasoning = ["reasoning_content", "thinking", "reasoning"].into_iter().find_map(entry);
    if let Some(reasoning) = reasoning {
        let mut all = vec![(Value::from("thinking"), reasoning.clone())];
        all.append(&mut entries);
        all.push((Value::from("reasoning_content"), reasoning));
        entries = all;
    }
    // Of two entries with a key the latter counts, in the place of the former, as in Python.
    Some(Value::from_pairs(entries))
}

#[derive(Debug, thiserror::Error)]
#[error("raised by the template")]
struct RaisedByTemplate;

fn was_raised(error: &Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.is::<RaisedByTemplate>() {
            return true;
        }
        source = error.source();
    }
    false
}

fn describe(error: &Error) -> String {
    match error.line() {
        Some(line) => format!("line {line}: {error}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str, messages: &str) -> Result<String, TemplateError> {
        let special = BTreeMap::from([("bos_token".to_owned(), "<s>".to_owned())]);
        let input = ChatInput {
            messages: serde_json::from_str(messages).unwrap(),
            tools: None,
            add_generation_prompt: true,
            variables: BTreeMap::new(),
            now: "2024-07-26T10:00:00[UTC]".parse().unwrap(),
        };
        ChatTemplate::new(source, special)?.render(&input)
    }

    const HELLO: &str = r#"[{"role": "user", "content": " <Hello> \"é\" "}]"#;

    #[test]
    fn python_methods_and_whitespace_control_work_as_in_transformers() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n  {%- if m['content'].strip().startswith('<H') %}\n{{ m.content.strip() | upper }}\n  {% endif %}\n{% endfor %}\n{% if add_generation_prompt %}>{% endif %}\n";
        assert_eq!(render(source, HELLO).unwrap(), "<s>\n<HELLO> \"É\"\n>");
    }

    #[test]
    fn tojson_is_pythons() {
        let value = r#"{"z": [1, 2.5, []], "a": {"<b>": null, "é": true, "e": {}}}"#;
        let compact = render("{{ messages | tojson }}", value).unwrap();
        assert_eq!(compact, r#"{"z": [1, 2.5, []], "a": {"<b>": null, "é": true, "e": {}}}"#);
        let pretty = render("{{ messages | tojson(indent=2) }}", value).unwrap();
        let expected = "{\n  \"z\": [\n    1,\n    2.5,\n    []\n  ],\n  \"a\": {\n    \"<b>\": null,\n    \"é\": true,\n    \"e\": {}\n  }\n}";
        assert_eq!(pretty, expected);
        let tight = render("{{ messages | tojson(separators=(',', ':'), sort_keys=true) }}", value).unwrap();
        assert_eq!(tight, r#"{"a":{"<b>":null,"e":{},"é":true},"z":[1,2.5,[]]}"#);
    }

    #[test]
    fn exceptions_of_a_template_are_told_apart_from_its_faults() {
        let raised = render("{{ raise_exception('no system role') }}", HELLO);
        assert_eq!(raised, Err(TemplateError::Raised("no system role".into())));
        assert!(matches!(render("{{ messages[0].x.y }}", HELLO), Err(TemplateError::Failed(_))));
        assert!(matches!(render("{% if %}", HELLO), Err(TemplateError::Malformed(_))));
    }

    /// A template that must be refused, for one of these reasons; quickly, or the suite would not end.
    #[track_caller]
    fn assert_refused(source: &str) {
        match render(source, HELLO) {
            Err(TemplateError::Failed(_) | TemplateError::Malformed(_)) => {}
            other => panic!("{:.60}: {:.200}", source, format!("{other:?}")),
        }
    }

    #[test]
    fn endless_templates_run_out_of_steps() {
        for source in [
            "{% for a in range(100000) %}{% for b in range(1000) %}{{ a }}{% endfor %}{% endfor %}",
            "{% for a in range(100000) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
            "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
            "{% for x in range(1000000000) %}{% endfor %}",
            "{% for x in range(9223372036854775807, -9223372036854775807, -1) %}{% endfor %}",
            "{% set n = namespace(f=1) %}{% macro f() %}{{ n.f() }}{% endmacro %}{% set n.f = f %}{{ f() }}",
            "{% include 'chat' %}",
            "{% extends 'chat' %}",
            "{% block a %}{{ self.a() }}{% endblock %}",
        ] {
            assert_refused(source);
        }
    }

    #[test]
    fn growing_templates_run_out_of_bytes() {
        let doubled = |step: &str| {
            format!(
                "{{% set n = namespace(x='aaaaaaaa', l=[1]) %}}{{% for i in range(60) %}}{step}{{% endfor %}}{{{{ n.x }}}}"
            )
        };
        for source in [
            "{{ 'a' * 10000000000 }}".to_owned(),
            "{{ 10000000000 * 'a' }}".to_owned(),
            "{{ 'a' * 9223372036854775807 }}".to_owned(),
            "{% if [1] * 1000000000 %}{% endif %}".to_owned(),
            "{% if (1,) * 99999999 %}{% endif %}".to_owned(),
            "{% set x = 'a' * 99999999 * 10 %}".to_owned(),
            format!("{{% if {} %}}{{% endif %}}", vec!["'a' * 99999999"; 100].join(" ~ ")),
            doubled("{% set n.x = n.x + n.x %}"),
            doubled("{% set n.x = n.x ~ n.x %}"),
            doubled("{% set n.x = n.x * 2 %}"),
            doubled("{% set n.l = n.l + n.l %}"),
            doubled("{% set n.l = [n.l, n.l] %}{{ n.l }}"),
            doubled("{% set n.l = [n.l, n.l] %}{{ n.l == n.l }}"),
            doubled("{% set n.l = {'a': n.l, 'b': n.l} %}{{ n.l | tojson | length }}"),
            doubled("{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
            doubled("{% set n.x = n.x.replace('a', 'aa') %}"),
            doubled("{% set n.x = n.x.replace('', n.x) %}"),
            doubled("{% set n.x = n.x | replace('a', 'aa') %}"),
            doubled("{% set n.x = [n.x, n.x] | join %}"),
            doubled("{% set n.x = n.x.join(['a', 'a', 'a']) %}"),
            doubled("{% set n.x = '%s%s' % (n.x, n.x) %}"),
            doubled("{% set n.x = '{0}{0}'.format(n.x) %}"),
            doubled("{% set n.x = n.x | indent(n.x) ~ n.x %}"),
            doubled("{% filter upper %}{% set n.x = n.x ~ n.x %}{% endfilter %}"),
            doubled("{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set n.x = f(n.x) %}"),
            "{{ '%999999999999d' % 1 }}".to_owned(),
            "{{ '%*d' % (999999999, 1) }}".to_owned(),
            "{{ '{:>999999999999}'.format(1) }}".to_owned(),
            "{{ '{:{}}'.format(1, 999999999) }}".to_owned(),
            "{{ 'a'.center(99999999999) }}".to_owned(),
            "{{ 'a'.zfill(999999999) }}".to_owned(),
            "{{ 'a' | indent(99999999999, true) }}".to_owned(),
            "{{ messages | tojson(indent=99999999999) }}".to_owned(),
            "{{ [1] | batch(999999999, 'x') | list }}".to_owned(),
            "{{ [1] | slice(999999999) | list }}".to_owned(),
            "{{ strftime_now('%9999999999d') }}".to_owned(),
            "{% set x %}{% for i in range(99999) %}TEXT{% endfor %}{% endset %}".replace("TEXT", &"text ".repeat(9999)),
            "{% for i in range(99999) %}TEXT{% endfor %}".replace("TEXT", &"text ".repeat(9999)),
            "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% if x == x %}{% endif %}{% endfor %}".to_owned(),
            "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% if 'b' in x %}{% endif %}{% endfor %}".to_owned(),
            "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% if {}[x] %}{% endif %}{% endfor %}".to_owned(),
            "{% set x = 'a' * 9999999 %}{% for i in range(99999) %}{% if x is lower %}{% endif %}{% endfor %}".to_owned(),
            "{% set x = [1] * 999999 %}{% for i in range(99999) %}{% if x | sum %}{% endif %}{% endfor %}".to_owned(),
        ] {
            assert_refused(&source);
        }
    }

    #[test]
    fn deep_templates_exhaust_no_stack() {
        let nested = |step: &str| {
            format!(
                "{{% set n = namespace(l=[]) %}}{{% for i in range(90000) %}}{step}{{% endfor %}}{{{{ n.l }}}}"
            )
        };
        let many = 50_000;
        for source in [
            nested("{% set n.l = [n.l] %}"),
            nested("{% set n.l = (n.l,) %}"),
            nested("{% set n.l = {'a': n.l} %}"),
            nested("{% set n.l = dict(a=n.l) %}"),
            nested("{% set n.l = [n.l] | batch(1) %}"),
            nested("{% set n.l = n.l | batch(1) | list + [1] %}"),
            nested("{% set n.l = n.l | items | list %}"),
            nested("{% set n.n = n %}"),
            nested("{% set n.l = [n] %}"),
            nested("{% set n.l = namespace(l=n) %}"),
            format!("{{{{ {}1{} }}}}", "(".repeat(many), ")".repeat(many)),
            format!("{{{{ {}1{} }}}}", "[".repeat(many), "]".repeat(many)),
            format!("{{{{ 1{} }}}}", " + 1".repeat(many)),
            format!("{{{{ 1{} }}}}", " ~ 1".repeat(many)),
            format!("{{{{ 1{} }}}}", " and 1".repeat(many)),
            format!("{{{{ 1{} }}}}", " if 1 else 1".repeat(many)),
            format!("{{{{ {}1 }}}}", "not ".repeat(many)),
            format!("{{{{ {}1 }}}}", "- ".repeat(many)),
            format!("{{{{ x{} }}}}", ".x".repeat(many)),
            format!("{{{{ x{} }}}}", "[0]".repeat(many)),
            format!("{{{{ x{} }}}}", "|upper".repeat(many)),
            format!("{{{{ x{} }}}}", "()".repeat(many)),
            format!("{{{{ x{} }}}}", " is defined".repeat(many)),
            format!("{}{}", "{% if 1 %}".repeat(many), "{% endif %}".repeat(many)),
            format!("{}{}", "{% for i in [1] %}".repeat(many), "{% endfor %}".repeat(many)),
            format!("{{% if 0 %}}{}{{% endif %}}", "{% elif 0 %}".repeat(many)),
        ] {
            assert_refused(&source);
        }
    }

    #[test]
    fn ordinary_long_conversations_are_within_bounds() {
        let message = format!(r#"{{"role": "user", "content": "{}"}}"#, "word ".repeat(100));
        let messages = format!("[{}]", vec![message; 5000].join(","));
        let source = "{% for m in messages %}{% if m.role == 'user' and m['content'] is string %}{{ '<|' + m.role + '|>' + m.content | trim }}{% endif %}{% endfor %}";
        let rendered = render(source, &messages).unwrap();
        assert_eq!(rendered.matches("<|user|>").count(), 5000);
    }

    #[test]
    fn dates_and_generation_marks_and_loop_controls_work() {
        let source = "{{ strftime_now('%d %b %Y') }}|{% generation %}x{%- endgeneration %}|{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}";
        assert_eq!(render(source, HELLO).unwrap(), "26 Jul 2024|x|01");
    }
}
