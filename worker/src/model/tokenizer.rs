//! Text to token ids and back, with what a model's folder says about both: special tokens, the chat template, the
//! tokens that end a text, and defaults of generation.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::bounded_json::{self, Place};
use super::chat_template::{ChatInput, ChatTemplate, TemplateError};
use super::config::{ConfigError, ModelConfig, parse_token_ids};
use super::tokenizer_file::{guarded, parse, remember_nothing};
use super::weights::{BaseError, read_json};

/// Why a tokenizer cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file cannot be read.
    #[error("failed to read the tokenizer's files")]
    Read(#[source] Box<BaseError>),
    /// `tokenizer.json` is not what the format says.
    #[error("`{path}` is malformed: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The chat template is wrong.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// `generation_config.json` is refused.
    #[error("generation_config.json is refused")]
    Generation(#[source] ConfigError),
    /// A text cannot be encoded, or ids cannot be decoded.
    #[error("failed to {0}")]
    Convert(String),
}

/// What `generation_config.json` says about choosing tokens, where a request says nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct GenerationDefaults {
    /// False means greedy.
    pub do_sample: Option<bool>,
    /// Temperature.
    pub temperature: Option<f32>,
    /// Nucleus.
    pub top_p: Option<f32>,
    /// Best tokens.
    pub top_k: Option<u32>,
    /// Least share of the best token's probability.
    pub min_p: Option<f32>,
}

struct Inner {
    tokenizer: tokenizers::Tokenizer,
    template: Option<ChatTemplate>,
    stop_token_ids: Vec<u32>,
    defaults: GenerationDefaults,
}

/// The tokenizer of a base. Cheap to clone.
#[derive(Clone)]
pub struct Tokenizer(Arc<Inner>);

impl Tokenizer {
    /// Reads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json`; all but the first may be
    /// absent.
    pub fn open(folder: &Path, config: &ModelConfig) -> Result<Self, TokenizerError> {
        Self::read(folder, config, |_| {})
    }

    /// The same, of a lens. Lenses come and go, and what the library remembers of words outlives their tokenizers: these
    /// remember none.
    pub fn open_for_lens(folder: &Path, config: &ModelConfig) -> Result<Self, TokenizerError> {
        Self::read(folder, config, remember_nothing)
    }

    fn read(
        folder: &Path,
        config: &ModelConfig,
        adjust: impl FnOnce(&mut tokenizers::Tokenizer),
    ) -> Result<Self, TokenizerError> {
        let path = folder.join("tokenizer.json");
        let mut tokenizer = parse(&read(&path)?).map_err(|what| TokenizerError::Malformed { path, what })?;
        adjust(&mut tokenizer);

        let settings = read_object(&folder.join("tokenizer_config.json"), &|place| {
            let [key, ..] = place else { return false };
            !(key.ends_with("_token") || key == "chat_template")
        })?;
        let special_tokens = special_tokens(&settings);
        let template_file = folder.join("chat_template.jinja");
        let source =
            if template_file.exists() { Some(read(&template_file)?) } else { inline_template(&settings) };
        let eos = special_tokens.get("eos_token").and_then(|token| tokenizer.token_to_id(token));
        let template = source.map(|source| ChatTemplate::new(&source, special_tokens)).transpose()?;

        let generation = read_object(&folder.join("generation_config.json"), &|_| false)?;
        let mut stop_token_ids = match generation.get("eos_token_id") {
            None | Some(Value::Null) => config.eos_token_ids.clone(),
            ids => parse_token_ids(ids).ok_or_else(|| {
                TokenizerError::Generation(ConfigError::Invalid {
                    key: "eos_token_id".into(),
                    value: "something else".into(),
                    expected: "a token id or a list of token ids",
                })
            })?,
        };
        stop_token_ids.extend(eos);
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        let defaults = generation_defaults(&generation);
        Ok(Self(Arc::new(Inner { tokenizer, template, stop_token_ids, defaults })))
    }

    /// Token ids of a text. `add_special_tokens` adds what the tokenizer puts around a text (a BOS, usually); the
    /// text of a chat template has its own.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        guarded(|| self.0.tokenizer.encode_fast(text, add_special_tokens))
            .map(|encoding| encoding.get_ids().to_vec())
            .map_err(|e| TokenizerError::Convert(format!("encode the text: {e}")))
    }

    /// Text of token ids.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, TokenizerError> {
        guarded(|| self.0.tokenizer.decode(ids, skip_special_tokens))
            .map_err(|e| TokenizerError::Convert(format!("decode tokens: {e}")))
    }

    /// The name of a token in the vocabulary.
    pub fn token(&self, id: u32) -> Option<String> {
        self.0.tokenizer.id_to_token(id)
    }

    /// The text of a conversation.
    pub fn render_chat(&self, input: &ChatInput) -> Result<String, TemplateError> {
        self.0.template.as_ref().ok_or(TemplateError::Missing)?.render(input)
    }

    /// Whether the model has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.0.template.is_some()
    }

    /// Tokens that end a text: those of `generation_config.json` (or else `config.json`), and the tokenizer's own.
    pub fn stop_token_ids(&self) -> &[u32] {
        &self.0.stop_token_ids
    }

    /// What the model's authors would choose where a request says nothing.
    pub fn defaults(&self) -> GenerationDefaults {
        self.0.defaults
    }

    /// Turns a stream of tokens into pieces of text.
    pub fn text_stream(&self, skip_special_tokens: bool) -> TextStream {
        TextStream { tokenizer: self.clone(), skip_special_tokens, ids: Vec::new(), prefix: 0, read: 0 }
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("stop_token_ids", &self.0.stop_token_ids).finish_non_exhaustive()
    }
}

/// Decodes a growing list of tokens, so that all pieces together are the text of all tokens. A piece never ends inside of
/// a character: bytes wait for the tokens that complete them.
pub struct TextStream {
    tokenizer: Tokenizer,
    skip_special_tokens: bool,
    ids: Vec<u32>,
    /// Decoding starts here: some tokens before what is new, since a token's text depends on its neighbours.
    prefix: usize,
    /// Tokens before this have been given out.
    read: usize,
}

impl TextStream {
    /// Takes the next token and gives the text that is now certain; often empty.
    pub fn push(&mut self, id: u32) -> Result<String, TokenizerError> {
        self.ids.push(id);
        let (known, all) = self.window()?;
        if all.len() <= known.len() || all.ends_with('\u{fffd}') || !all.is_char_boundary(known.len()) {
            return Ok(String::new());
        }
        self.prefix = self.read;
        self.read = self.ids.len();
        Ok(all[known.len()..].to_owned())
    }

    /// What is left when no more tokens come: bytes that never became a character.
    pub fn finish(&mut self) -> Result<String, TokenizerError> {
        let (known, all) = self.window()?;
        self.prefix = self.ids.len();
        self.read = self.ids.len();
        Ok(all.get(known.len()..).unwrap_or_default().to_owned())
    }

    fn window(&self) -> Result<(String, String), TokenizerError> {
        let known = self.tokenizer.decode(&self.ids[self.prefix..self.read], self.skip_special_tokens)?;
        let all = self.tokenizer.decode(&self.ids[self.prefix..], self.skip_special_tokens)?;
        Ok((known, all))
    }
}

/// Largest file of a tokenizer: twice that of a published one with a vocabulary of 262,144.
const MAX_BYTES: u64 = 64 << 20;
/// Values that are read of a settings file.
const MAX_VALUES: usize = 1 << 14;

fn read(path: &Path) -> Result<String, TokenizerError> {
    read_json(path, MAX_BYTES).map_err(|e| TokenizerError::Read(Box::new(e)))
}

/// A JSON object that may be absent, without what `skip` tells to leave out.
fn read_object(path: &Path, skip: &dyn Fn(Place<'_>) -> bool) -> Result<Value, TokenizerError> {
    if !path.exists() {
        return Ok(Value::Object(Default::default()));
    }
    let object = bounded_json::object(&read(path)?, MAX_VALUES, skip);
    object.map(Value::Object).map_err(|what| TokenizerError::Malformed { path: path.into(), what })
}

/// `bos_token` and the like: a string, or an object with the string as its `content`.
fn special_tokens(settings: &Value) -> BTreeMap<String, String> {
    let keys = settings.as_object().into_iter().flatten();
    let named = keys.filter(|(key, _)| key.ends_with("_token"));
    named
        .filter_map(|(key, value)| {
            let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
            Some((key.clone(), text.to_owned()))
        })
        .collect()
}

/// A template in `tokenizer_config.json`: a string, or a list of named ones of which `default` is taken.
fn inline_template(settings: &Value) -> Option<String> {
    match settings.get("chat_template")? {
        Value::String(source) => Some(source.clone()),
        Value::Array(named) => {
            let default = named.iter().find(|t| t["name"] == "default")?;
            default["template"].as_str().map(str::to_owned)
        }
        _ => None,
    }
}

fn generation_defaults(generation: &Value) -> GenerationDefaults {
    let number = |key: &str| generation[key].as_f64().map(|n| n as f32).filter(|n| n.is_finite());
    GenerationDefaults {
        do_sample: generation["do_sample"].as_bool(),
        temperature: number("temperature").filter(|t| *t >= 0.0),
        top_p: number("top_p").filter(|p| *p > 0.0 && *p <= 1.0),
        top_k: generation["top_k"].as_u64().and_then(|k| u32::try_from(k).ok()),
        min_p: number("min_p").filter(|p| (0.0..=1.0).contains(p)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer(folder: &str) -> Tokenizer {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(folder);
        let config =
            ModelConfig::parse(&std::fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
        Tokenizer::open(&folder, &config).unwrap()
    }

    #[test]
    fn pieces_of_a_stream_are_whole_characters_and_add_up_to_the_text() {
        let tokenizer = tokenizer("parity/llama/model");
        let text = "The lens 日本語 🙂🙂 turns – “Ünïcödé”\n\n  é";
        let ids = tokenizer.encode(text, false).unwrap();
        assert!(ids.len() > text.chars().count() / 2, "several tokens make one character");
        let mut stream = tokenizer.text_stream(true);
        let mut pieces: Vec<String> = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
        pieces.push(stream.finish().unwrap());
        assert_eq!(pieces.concat(), text);
        assert!(pieces.iter().all(|piece| !piece.contains('\u{fffd}')));
        assert!(pieces.iter().any(String::is_empty), "bytes wait for the rest of their character");
    }

    #[test]
    fn bytes_that_never_become_a_character_come_at_the_end() {
        let tokenizer = tokenizer("parity/llama/model");
        let ids = tokenizer.encode("ok 🙂", false).unwrap();
        let mut stream = tokenizer.text_stream(true);
        let cut = &ids[..ids.len() - 1];
        let mut text: String = cut.iter().map(|id| stream.push(*id).unwrap()).collect();
        assert!(text.starts_with("ok") && !text.contains('\u{fffd}'));
        text.push_str(&stream.finish().unwrap());
        assert_eq!(text, tokenizer.decode(cut, true).unwrap());
    }

    #[test]
    fn stop_tokens_and_defaults_come_from_the_folder() {
        let demo = tokenizer("demo/base-b");
        assert_eq!(demo.stop_token_ids(), [4]);
        assert_eq!(demo.defaults().do_sample, Some(false));
        assert!(demo.has_chat_template());
        assert_eq!(demo.encode("Hi", true).unwrap()[0], 1, "this tokenizer adds a BOS");
        assert_ne!(demo.encode("Hi", false).unwrap()[0], 1);
    }
}
