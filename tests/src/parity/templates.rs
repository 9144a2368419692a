//! Published chat templates, rendered as transformers renders them: `fixtures/chat_templates`.
//!
//! Every template meets every conversation, and every snippet of Jinja one of them. Either both give a text, the same to the
//! byte; or both refuse, in the template's own words where it raises. Where this differs by intent, `KNOWN` says so.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use minijinja::Value;
use serde::Deserialize;
use turret_worker::model::chat_template::{ChatInput, ChatTemplate, TemplateError};

use super::Line;

/// A snippet that is not rendered as transformers renders it, by intent.
struct Known {
    snippet: &'static str,
    /// What is rendered instead, or what the refusal says.
    instead: &'static str,
    /// Why that is left so.
    why: &'static str,
}

/// All there are. Each is checked to be so still. None of the published templates does any of this.
const KNOWN: &[Known] = &[
    Known {
        snippet: "{% macro f() %}{{ varargs | length }}{{ kwargs }}{% endmacro %}{{ f(1, 2, x=3) }}",
        instead: "too many arguments",
        why: "macros take the arguments they name",
    },
    Known { snippet: "{{ {'a': 1}.items() }} ", instead: "[('a', 1)] ", why: "views and ranges are lists" },
    Known {
        snippet: "{{ {'items': 5}.items() }}",
        instead: "[('items', 5)]",
        why: "views and ranges are lists",
    },
    Known { snippet: "{{ range(3) }}", instead: "[0, 1, 2]", why: "views and ranges are lists" },
    Known {
        snippet: "{% autoescape true %}{{ '<' }}{% endautoescape %}",
        instead: "<",
        why: "chats are no HTML",
    },
    Known {
        snippet: "{{ {'a': 1} | attr('a') }}|{{ messages[0] | attr('role') }}|",
        instead: "1|system|",
        why: "attributes and items are one",
    },
    Known {
        snippet: "{{ 1 < 'a' }}",
        instead: "True",
        why: "literals are compared while compiling, which orders all values",
    },
    Known {
        snippet: "{{ none < 1 }}",
        instead: "True",
        why: "literals are compared while compiling, which orders all values",
    },
    Known {
        snippet: "{{ 1 in 'abc' }}",
        instead: "False",
        why: "literals are compared while compiling, which orders all values",
    },
    Known {
        snippet: "{{ \"%s\" % none }} {{ \"%d\" % 3.7 }} {{ '%s %s' % ('a', [1]) }}",
        instead: "cannot be formatted in decimal format",
        why: "a fraction is not cut without being told to",
    },
    Known {
        snippet: "{{ '%5d|%-5s|%05d|%x|%r' % (42, 'ab', 42, 255, 'q') }}",
        instead: "invalid conversion type 'r'",
        why: "`repr` is Python's own",
    },
    Known {
        snippet: "{{ 'caf\\u00e9' | upper }} {{ '\\U0001F642' }}",
        instead: "CAFÉ \\U0001F642",
        why: "an escape that minijinja does not know",
    },
    Known {
        snippet: "{{ {1: 'a', true: 'b', none: 'c', 1.5: 'd'} | tojson }}",
        instead: "key must be a string",
        why: "JSON has no such keys",
    },
    Known {
        snippet: "{{ \"a\\tb\\\\n\\x41\\u00e9\\'\\\"\" }} {{ 'multi\nline' }} {{ '\\d' }} {{ \"\\/\" }}",
        instead: "a\tb\\nAé'\" multi\nline \\d /",
        why: "an escape that minijinja knows and Python does not",
    },
    Known {
        snippet: "{% block a %}in{% endblock %}",
        instead: "`block` is no tag",
        why: "there is nothing to extend",
    },
    Known {
        snippet: "{{ 'a b&c/d' | urlencode }}",
        instead: "filter urlencode is unknown",
        why: "a filter for web pages",
    },
    Known {
        snippet: "{{ 'hello world foo' | wordcount }}",
        instead: "filter wordcount is unknown",
        why: "a filter for web pages",
    },
    Known {
        snippet: "{% set j = joiner(', ') %}{{ j() }}a{{ j() }}b{{ j() }}c",
        instead: "joiner is unknown",
        why: "a function for web pages",
    },
];

/// What transformers made of a template.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Expected {
    /// A text.
    Text(String),
    /// `raise_exception` with this message.
    Raises(String),
    /// Another exception, of whatever type.
    Fails(serde::de::IgnoredAny),
}

#[derive(Deserialize)]
struct Conversations {
    now: String,
    special_tokens: BTreeMap<String, String>,
    conversations: BTreeMap<String, Conversation>,
}

#[derive(Deserialize)]
struct Conversation {
    messages: Value,
    tools: Option<Value>,
    documents: Option<Value>,
    add_generation_prompt: Option<bool>,
    #[serde(default)]
    variables: BTreeMap<String, Value>,
}

impl Conversations {
    fn input(&self, conversation: &Conversation) -> Result<ChatInput> {
        let mut variables = conversation.variables.clone();
        variables.extend(conversation.documents.clone().map(|documents| ("documents".into(), documents)));
        Ok(ChatInput {
            messages: conversation.messages.clone(),
            tools: conversation.tools.clone(),
            add_generation_prompt: conversation.add_generation_prompt.unwrap_or(true),
            variables,
            now: format!("{}[UTC]", self.now).parse()?,
        })
    }

    fn render(&self, template: &str, conversation: &Conversation) -> Result<Result<String, TemplateError>> {
        let template = ChatTemplate::new(template, self.special_tokens.clone());
        let input = self.input(conversation)?;
        Ok(template.and_then(|template| template.render(&input)))
    }
}

/// One line per template and conversation, and one per snippet.
pub fn check(folder: &Path) -> Result<Vec<Line>> {
    let read = |name: &str| {
        std::fs::read_to_string(folder.join(name)).with_context(|| format!("failed to read {name}"))
    };
    let all: Conversations = serde_json::from_str(&read("conversations.json")?)?;
    let mut names: Vec<String> = std::fs::read_dir(folder.join("templates"))?
        .filter_map(|entry| Some(entry.ok()?.path().file_stem()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    let mut lines = Vec::new();
    for name in names {
        let template = read(&format!("templates/{name}.jinja"))?;
        let expected: BTreeMap<String, Expected> =
            serde_json::from_str(&read(&format!("expected/{name}.json"))?)?;
        let subject = format!("template {name}");
        anyhow::ensure!(expected.len() == all.conversations.len(), "expected/{name}.json is not up to date");
        for (what, expected) in &expected {
            let conversation = all.conversations.get(what).context("expected/ is not up to date")?;
            lines.push(judged(&subject, what, all.render(&template, conversation)?, expected));
        }
    }

    let snippets: Vec<String> = serde_json::from_str(&read("snippets.json")?)?;
    let expected: Vec<Expected> = serde_json::from_str(&read("expected/snippets.json")?)?;
    anyhow::ensure!(snippets.len() == expected.len(), "expected/snippets.json is not up to date");
    let conversation = all.conversations.get("odd text").context("the snippets' conversation is gone")?;
    for (snippet, expected) in snippets.iter().zip(&expected) {
        let rendered = all.render(snippet, conversation)?;
        lines.push(match KNOWN.iter().find(|known| known.snippet == snippet) {
            Some(known) => differs("template snippets", known, rendered),
            None => judged("template snippets", snippet, rendered, expected),
        });
    }
    for Known { snippet, .. } in KNOWN {
        anyhow::ensure!(snippets.iter().any(|s| s == snippet), "{snippet} is no snippet any more");
    }
    Ok(lines)
}

fn judged(subject: &str, what: &str, rendered: Result<String, TemplateError>, expected: &Expected) -> Line {
    match (rendered, expected) {
        (Ok(text), Expected::Text(expected)) => Line::same(subject, what, &text, expected),
        (Err(TemplateError::Raised(message)), Expected::Raises(expected)) => {
            Line::same(subject, what, &message, expected)
        }
        // Which of Python's exceptions it was is Python's own matter.
        (Err(TemplateError::Failed(_) | TemplateError::Malformed(_)), Expected::Fails(_)) => {
            Line::same(subject, what, &(), &())
        }
        (rendered, expected) => Line::same(subject, what, &format!("{rendered:?}"), &format!("{expected:?}")),
    }
}

fn differs(subject: &str, known: &Known, rendered: Result<String, TemplateError>) -> Line {
    let as_stated = match &rendered {
        Ok(text) => text == known.instead,
        Err(error) => error.to_string().contains(known.instead),
    };
    let got = if as_stated { known.instead.to_owned() } else { format!("{rendered:?}") };
    Line::same(subject, &format!("{} ({})", known.snippet, known.why), &got, &known.instead.to_owned())
}
