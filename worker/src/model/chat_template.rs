//! Chat templates: the Jinja that ships with a model, rendered as transformers renders it.
//!
//! A template is not trusted: it has no files, no network, a bound on its steps and on its own length, and what it raises is
//! an error of the request.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use fancy_regex::Regex;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{Environment, Error, ErrorKind, Value};

/// Steps that a rendering may take.
const FUEL: u64 = 2_000_000;
/// Bytes that a template may have.
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
/// Bytes that a rendering may have.
const MAX_RENDERED_BYTES: usize = 64 << 20;

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
    environment: Arc<Environment<'static>>,
    special_tokens: BTreeMap<String, String>,
}

const NAME: &str = "chat";

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are its variables such as `bos_token`.
    pub fn new(source: &str, special_tokens: BTreeMap<String, String>) -> Result<Self, TemplateError> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(TemplateError::Malformed(format!("it is longer than {MAX_TEMPLATE_BYTES} bytes")));
        }
        let malformed = |e: Error| TemplateError::Malformed(describe(&e));
        let mut environment = Environment::new();
        let syntax =
            SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(malformed)?;
        environment.set_syntax(syntax);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message).with_source(RaisedByTemplate))
        });
        environment.add_template_owned(NAME, without_generation_marks(source)).map_err(malformed)?;
        Ok(Self { environment: Arc::new(environment), special_tokens })
    }

    /// The text of a conversation.
    pub fn render(&self, input: &ChatInput) -> Result<String, TemplateError> {
        let mut variables: BTreeMap<String, Value> = self
            .special_tokens
            .iter()
            .map(|(name, token)| (name.clone(), Value::from(token.as_str())))
            .collect();
        variables.extend(input.variables.clone());
        variables.insert("messages".into(), input.messages.clone());
        variables.insert("tools".into(), input.tools.clone().unwrap_or(Value::from(())));
        variables.insert("documents".into(), Value::from(()));
        variables.insert("add_generation_prompt".into(), Value::from(input.add_generation_prompt));
        let now = input.now.clone();
        let strftime = move |format: String| -> Result<String, Error> {
            jiff::fmt::strtime::format(&format, &now)
                .map_err(|e| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {e}")))
        };
        variables.insert("strftime_now".into(), Value::from_function(strftime));
        let template = self.environment.get_template(NAME).expect("it was added when this was made");
        let mut out = Bounded(Vec::new());
        match template.render_captured_to(Value::from(Serde(&variables)), &mut out) {
            Ok(_) => String::from_utf8(out.0).map_err(|e| TemplateError::Failed(e.to_string())),
            Err(error) if was_raised(&error) => {
                Err(TemplateError::Raised(error.detail().unwrap_or_default().to_owned()))
            }
            Err(error) => Err(TemplateError::Failed(describe(&error))),
        }
    }
}

/// Output that ends at a size.
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            return Err(std::io::Error::other(format!("the text is longer than {MAX_RENDERED_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
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

/// `{% generation %}` marks what a model is trained on; for rendering it is nothing.
fn without_generation_marks(source: &str) -> String {
    static MARKS: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}").expect("the pattern is right")
    });
    let mut out = String::with_capacity(source.len());
    let mut end = 0;
    for mark in MARKS.captures_iter(source).flatten() {
        let whole = mark.get(0).expect("group 0 is the match");
        let part = |i| mark.get(i).map_or("", |m| m.as_str());
        out.push_str(&source[end..whole.start()]);
        let tag = if part(2).is_empty() { "if true" } else { "endif" };
        out.push_str(&format!("{{%{} {tag} {}%}}", part(1), part(3)));
        end = whole.end();
    }
    out.push_str(&source[end..]);
    out
}

/// Python's `json.dumps(value, ensure_ascii=False, ...)`, which transformers' `tojson` is. Unlike Jinja's own, it escapes no HTML.
fn to_json(value: &Value, indent: Option<usize>, kwargs: Kwargs) -> Result<Value, Error> {
    let indent = indent.or(kwargs.get::<Option<usize>>("indent")?);
    let sort_keys = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let ensure_ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let separators = match kwargs.get::<Option<Vec<String>>>("separators")?.as_deref() {
        None => None,
        Some([item, key]) => Some((item.clone(), key.clone())),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "tojson(separators) is a pair")),
    };
    kwargs.assert_all_used()?;
    if ensure_ascii {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson(ensure_ascii=true) is not supported"));
    }
    if indent.is_some_and(|indent| indent > 64) {
        return Err(Error::new(ErrorKind::InvalidOperation, "tojson(indent) is at most 64"));
    }
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = separators.unwrap_or_else(|| (item.into(), ": ".into()));
    let formatter = PythonJson { item, key, indent, depth: 0, empty: true };
    let mut out = Vec::new();
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    let failed = |e: serde_json::Error| Error::new(ErrorKind::BadSerialization, e.to_string());
    if sort_keys {
        // Without key order of its own, this type sorts.
        let sorted: serde_json::Value = serde_json::to_value(value).map_err(failed)?;
        serde::Serialize::serialize(&sorted, &mut serializer).map_err(failed)?;
    } else {
        serde::Serialize::serialize(value, &mut serializer).map_err(failed)?;
    }
    let text = String::from_utf8(out).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    Ok(Value::from_safe_string(text))
}

struct PythonJson {
    item: String,
    key: String,
    indent: Option<usize>,
    depth: usize,
    empty: bool,
}

impl PythonJson {
    fn open<W: ?Sized + std::io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth += 1;
        self.empty = true;
        out.write_all(bracket)
    }

    fn close<W: ?Sized + std::io::Write>(&mut self, out: &mut W, bracket: &[u8]) -> std::io::Result<()> {
        self.depth -= 1;
        if !self.empty {
            self.new_line(out)?;
        }
        self.empty = false;
        out.write_all(bracket)
    }

    fn next<W: ?Sized + std::io::Write>(&mut self, out: &mut W, first: bool) -> std::io::Result<()> {
        if !first {
            out.write_all(self.item.as_bytes())?;
        }
        self.empty = false;
        self.new_line(out)
    }

    fn new_line<W: ?Sized + std::io::Write>(&self, out: &mut W) -> std::io::Result<()> {
        match self.indent {
            Some(indent) => write!(out, "\n{:1$}", "", indent * self.depth),
            None => Ok(()),
        }
    }
}

impl serde_json::ser::Formatter for PythonJson {
    fn begin_array<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b"[")
    }
    fn end_array<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b"]")
    }
    fn begin_array_value<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(out, first)
    }
    fn end_array_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.empty = false;
        Ok(())
    }
    fn begin_object<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.open(out, b"{")
    }
    fn end_object<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        self.close(out, b"}")
    }
    fn begin_object_key<W: ?Sized + std::io::Write>(
        &mut self,
        out: &mut W,
        first: bool,
    ) -> std::io::Result<()> {
        self.next(out, first)
    }
    fn begin_object_value<W: ?Sized + std::io::Write>(&mut self, out: &mut W) -> std::io::Result<()> {
        out.write_all(self.key.as_bytes())
    }
    fn end_object_value<W: ?Sized + std::io::Write>(&mut self, _: &mut W) -> std::io::Result<()> {
        self.empty = false;
        Ok(())
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

    #[test]
    fn endless_templates_end() {
        let source = "{% for a in range(10000) %}{% for b in range(10000) %}{{ a }}{% endfor %}{% endfor %}";
        assert!(matches!(render(source, HELLO), Err(TemplateError::Failed(_))));
    }

    #[test]
    fn dates_and_generation_marks_and_loop_controls_work() {
        let source = "{{ strftime_now('%d %b %Y') }}|{% generation %}x{%- endgeneration %}|{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}";
        assert_eq!(render(source, HELLO).unwrap(), "26 Jul 2024|x|01");
    }
}
