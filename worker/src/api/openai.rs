//! OpenAI's request and response bodies for chat and text completions.
//!
//! A parameter is either honoured, or accepted at the value that changes nothing, or refused with a 400 that names it:
//! never silently ignored. `null` always means "not given".

use std::sync::Arc;

use serde_json::{Map, Value, json};
use turret_crds::alias::{ASKER_FIELDS, Asker};

use super::error::ApiError;
use crate::engine::row::{Sampling, TokenLogprobs, Usage};
use crate::model::tokenizer::{GenerationDefaults, Tokenizer};

/// Most stop strings of a request, as OpenAI's limit.
const MAX_STOPS: usize = 16;
/// Bytes of a `cache_salt`, at most.
const MAX_SALT_BYTES: usize = 256;
/// Most alternatives per token, as OpenAI's limit.
const MAX_TOP_LOGPROBS: u64 = 20;

/// Which of the two APIs is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Api {
    /// `/v1/chat/completions`.
    Chat,
    /// `/v1/completions`.
    Text,
}

/// A request that was read and found good.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// What should answer; absent: the default group.
    pub model: Option<String>,
    /// What to go on from.
    pub input: Input,
    /// Most tokens to generate; absent: as many as fit for chat, 16 for text.
    pub max_tokens: Option<u32>,
    /// See [`Sampling`]; absent: the model's defaults.
    pub temperature: Option<f32>,
    /// See [`Sampling`].
    pub top_p: Option<f32>,
    /// See [`Sampling`].
    pub top_k: Option<u32>,
    /// See [`Sampling`].
    pub min_p: Option<f32>,
    /// Seed; absent: a random one.
    pub seed: Option<u64>,
    /// Strings that end the text.
    pub stop: Vec<String>,
    /// Answer piece by piece.
    pub stream: bool,
    /// What else is told in a stream.
    pub stream_options: StreamOptions,
    /// Report log-probabilities, with this many alternatives.
    pub logprobs: Option<u8>,
    /// Only requests with the same salt share what was computed for equal beginnings.
    pub cache_salt: Option<Arc<str>>,
    /// Who asks, if they say so.
    pub asker: Option<Asker>,
}

/// What to go on from.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// A conversation: a list of objects with `role` and `content`, contents as strings.
    Messages(Value),
    /// A text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// Parameters that change nothing at these values, and would change the answer at others.
fn no_op(name: &str, value: &Value) -> Option<bool> {
    let number = |wanted: f64| value.as_f64() == Some(wanted);
    let empty = || {
        value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(Map::is_empty)
            || value.as_str() == Some("")
    };
    Some(match name {
        "n" | "best_of" | "repetition_penalty" | "length_penalty" => number(1.0),
        "frequency_penalty" | "presence_penalty" | "min_tokens" | "prompt_logprobs" => number(0.0),
        "logit_bias" | "suffix" | "tools" | "functions" | "stop_token_ids" | "chat_template_kwargs" => {
            empty()
        }
        "tool_choice" | "function_call" => matches!(value.as_str(), Some("none" | "auto")),
        "parallel_tool_calls" => value.is_boolean(),
        "response_format" => value["type"] == "text",
        "echo"
        | "ignore_eos"
        | "use_beam_search"
        | "store"
        | "include_stop_str_in_output"
        | "return_token_ids"
        | "continue_final_message" => value == &Value::Bool(false),
        "skip_special_tokens" | "spaces_between_special_tokens" | "add_generation_prompt" => {
            value == &Value::Bool(true)
        }
        "service_tier" => matches!(value.as_str(), Some("auto" | "default")),
        "modalities" => value == &json!(["text"]),
        // They change no answer, but may choose among the targets of an alias.
        "user" | "safety_identifier" | "prompt_cache_key" => value.is_string(),
        "metadata" => value.is_object(),
        _ => return None,
    })
}

/// Reads a request, or says what is wrong with it.
pub fn parse(api: Api, body: &[u8]) -> Result<Request, ApiError> {
    let body: Value = serde_json::from_slice(body)
        .map_err(|e| ApiError::invalid(None, format!("the body is not JSON: {e}")))?;
    let Value::Object(body) = body else {
        return Err(ApiError::invalid(None, "the body must be a JSON object"));
    };
    let mut fields = Fields(body.into_iter().filter(|(_, value)| !value.is_null()).collect());
    let input = match api {
        Api::Chat => Input::Messages(messages(fields.take("messages"))?),
        Api::Text => prompt(fields.take("prompt"))?,
    };
    let stream = fields.flag("stream")?.unwrap_or(false);
    let stream_options = stream_options(fields.take("stream_options"), stream)?;
    let logprobs = match api {
        Api::Chat => chat_logprobs(&mut fields)?,
        Api::Text => fields.whole("logprobs", MAX_TOP_LOGPROBS)?.map(|n| n as u8),
    };
    let newer = fields.whole("max_completion_tokens", u64::from(u32::MAX))?;
    let older = fields.whole("max_tokens", u64::from(u32::MAX))?;
    let request = Request {
        model: fields.text("model")?,
        input,
        max_tokens: newer.or(older).map(|n| n as u32),
        temperature: fields.number("temperature", 0.0, 100.0)?,
        top_p: fields.number("top_p", f32::MIN_POSITIVE, 1.0)?,
        // vLLM's -1 means all, as 0 does.
        top_k: match fields.0.get("top_k").and_then(Value::as_i64) {
            Some(-1) => fields.take("top_k").map(|_| 0),
            _ => fields.whole("top_k", u64::from(u32::MAX))?.map(|n| n as u32),
        },
        min_p: fields.number("min_p", 0.0, 1.0)?,
        seed: seed(fields.take("seed"))?,
        stop: stop(fields.take("stop"))?,
        stream,
        stream_options,
        logprobs,
        cache_salt: salt(fields.text("cache_salt")?)?,
        asker: ASKER_FIELDS.iter().find_map(|name| asker(fields.0.get(*name)?)),
    };
    for (name, value) in &fields.0 {
        match no_op(name, value) {
            Some(true) => {}
            Some(false) => {
                return Err(ApiError::unsupported(
                    name,
                    format!("`{name}` is not supported with this value: {value}"),
                ));
            }
            None => {
                return Err(ApiError::unsupported(
                    name,
                    format!("`{name}` is not a parameter this server knows"),
                ));
            }
        }
    }
    Ok(request)
}

fn asker(name: &Value) -> Option<Asker> {
    name.as_str().filter(|name| !name.is_empty()).map(Asker::called)
}

/// The fields that are left to be read.
struct Fields(Map<String, Value>);

impl Fields {
    fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name)
    }

    fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::invalid(Some(name), format!("`{name}` must be a string"))),
        }
    }

    fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(flag)),
            Some(_) => Err(ApiError::invalid(Some(name), format!("`{name}` must be true or false"))),
        }
    }

    fn whole(&mut self, name: &str, most: u64) -> Result<Option<u64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_u64().filter(|n| *n <= most) {
            Some(n) => Ok(Some(n)),
            None => Err(ApiError::invalid(
                Some(name),
                format!("`{name}` must be a whole number from 0 to {most}, not {value}"),
            )),
        }
    }

    fn number(&mut self, name: &str, least: f32, most: f32) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64().map(|n| n as f32).filter(|n| (least..=most).contains(n)) {
            Some(n) => Ok(Some(n)),
            None => {
                let least =
                    if least == f32::MIN_POSITIVE { "above 0".into() } else { format!("from {least}") };
                Err(ApiError::invalid(
                    Some(name),
                    format!("`{name}` must be a number {least} to {most}, not {value}"),
                ))
            }
        }
    }
}

fn messages(value: Option<Value>) -> Result<Value, ApiError> {
    let wrong = |what: String| ApiError::invalid(Some("messages"), what);
    let Some(Value::Array(mut messages)) = value else {
        return Err(wrong("`messages` must be a list of messages".into()));
    };
    if messages.is_empty() {
        return Err(wrong("`messages` is empty; at least one message is needed".into()));
    }
    for (index, message) in messages.iter_mut().enumerate() {
        let at = format!("messages[{index}]");
        let Value::Object(fields) = message else {
            return Err(wrong(format!("`{at}` must be an object with `role` and `content`")));
        };
        fields.retain(|_, value| !value.is_null());
        match fields.get("role").and_then(Value::as_str) {
            Some("system" | "developer" | "user" | "assistant") => {}
            Some(role) => {
                return Err(wrong(format!(
                    "`{at}.role` is `{role}`; this server knows system, developer, user and assistant"
                )));
            }
            None => return Err(wrong(format!("`{at}.role` is missing"))),
        }
        for name in fields.keys() {
            if !matches!(name.as_str(), "role" | "content" | "name" | "refusal" | "annotations") {
                return Err(ApiError::unsupported("messages", format!("`{at}.{name}` is not supported")));
            }
        }
        let content = fields.get_mut("content").ok_or_else(|| wrong(format!("`{at}.content` is missing")))?;
        *content = Value::String(content_text(content, &at)?);
    }
    Ok(Value::Array(messages))
}

/// A content is a string, or a list of text parts.
fn content_text(content: &Value, at: &str) -> Result<String, ApiError> {
    let wrong = |what: String| ApiError::invalid(Some("messages"), what);
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .enumerate()
            .map(|(index, part)| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text),
                (kind, _) => Err(wrong(format!(
                    "`{at}.content[{index}]` is of type `{}`; this server reads text only",
                    kind.unwrap_or("?")
                ))),
            })
            .collect(),
        _ => Err(wrong(format!("`{at}.content` must be a string or a list of text parts"))),
    }
}

fn prompt(value: Option<Value>) -> Result<Input, ApiError> {
    let wrong = |what: &str| ApiError::invalid(Some("prompt"), what);
    match value {
        None => Err(wrong("`prompt` is missing")),
        Some(Value::String(text)) => Ok(Input::Text(text)),
        Some(Value::Array(items)) => match items.as_slice() {
            [] => Err(wrong("`prompt` is empty")),
            [Value::String(text)] => Ok(Input::Text(text.clone())),
            [Value::Array(ids)] => tokens(ids),
            [Value::String(_) | Value::Array(_), ..] => Err(ApiError::unsupported(
                "prompt",
                "several prompts in one request are not supported; send one request for each",
            )),
            ids => tokens(ids),
        },
        Some(_) => Err(wrong("`prompt` must be a string or a list of token ids")),
    }
}

fn tokens(ids: &[Value]) -> Result<Input, ApiError> {
    let ids = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok()));
    let ids = ids.collect::<Option<Vec<u32>>>();
    ids.map(Input::Tokens).ok_or_else(|| {
        ApiError::invalid(Some("prompt"), "a list in `prompt` must hold token ids: whole numbers")
    })
}

/// What is told in a stream besides the answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// The usage, at the end.
    pub include_usage: bool,
    /// What the request waits for, in comments. Turret's own.
    pub include_progress: bool,
}

fn stream_options(value: Option<Value>, stream: bool) -> Result<StreamOptions, ApiError> {
    let wrong = |what: &str| ApiError::invalid(Some("stream_options"), what);
    let mut told = StreamOptions::default();
    let Some(value) = value else { return Ok(told) };
    if !stream {
        return Err(wrong("`stream_options` is only allowed with `stream: true`"));
    }
    let options = value.as_object().ok_or_else(|| wrong("`stream_options` must be an object"))?;
    for (name, value) in options {
        match (name.as_str(), value) {
            ("include_usage", Value::Bool(flag)) => told.include_usage = *flag,
            ("include_progress", Value::Bool(flag)) => told.include_progress = *flag,
            ("include_obfuscation" | "continuous_usage_stats", Value::Bool(false)) | (_, Value::Null) => {}
            _ => {
                return Err(ApiError::unsupported(
                    "stream_options",
                    format!("`stream_options.{name}`: {value} is not supported"),
                ));
            }
        }
    }
    Ok(told)
}

fn chat_logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.whole("top_logprobs", MAX_TOP_LOGPROBS)?;
    match (wanted, top) {
        (true, top) => Ok(Some(top.unwrap_or(0) as u8)),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid(
            Some("top_logprobs"),
            "`top_logprobs` is only allowed with `logprobs: true`",
        )),
    }
}

fn seed(value: Option<Value>) -> Result<Option<u64>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    // Any 64-bit number is a seed; a negative one by its bits.
    let seed = value.as_u64().or_else(|| value.as_i64().map(|n| n as u64));
    seed.map(Some)
        .ok_or_else(|| ApiError::invalid(Some("seed"), format!("`seed` must be a whole number, not {value}")))
}

/// vLLM's `cache_salt`.
fn salt(value: Option<String>) -> Result<Option<Arc<str>>, ApiError> {
    let refused = |why| Err(ApiError::invalid(Some("cache_salt"), why));
    match value {
        Some(salt) if salt.is_empty() => refused("cache_salt must not be empty"),
        Some(salt) if salt.len() > MAX_SALT_BYTES => refused("cache_salt is longer than 256 bytes"),
        salt => Ok(salt.map(Arc::from)),
    }
}

fn stop(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    let wrong = || {
        ApiError::invalid(Some("stop"), format!("`stop` must be a string or a list of at most {MAX_STOPS}"))
    };
    match value {
        None => Ok(Vec::new()),
        Some(Value::String(stop)) => Ok(vec![stop]),
        Some(Value::Array(stops)) if stops.len() <= MAX_STOPS => {
            stops.iter().map(|s| s.as_str().map(str::to_owned).ok_or_else(wrong)).collect()
        }
        Some(_) => Err(wrong()),
    }
}

impl Request {
    /// How tokens are chosen: as the request says, else as the model's authors say, else as OpenAI does.
    pub fn sampling(&self, defaults: GenerationDefaults, random_seed: u64) -> Sampling {
        let greedy = defaults.do_sample == Some(false) && self.temperature.is_none();
        let temperature = self.temperature.or(defaults.temperature).unwrap_or(1.0);
        Sampling {
            temperature: if greedy { 0.0 } else { temperature },
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: self.top_k.or(defaults.top_k).unwrap_or(0),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(0.0),
            seed: self.seed.unwrap_or(random_seed),
        }
    }
}

/// What all bodies of one answer have in common.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Which API is spoken.
    pub api: Api,
    /// Id of the answer.
    pub id: String,
    /// Seconds since the epoch.
    pub created: u64,
    /// The model as the client named it, or the lens that its alias led to.
    pub model: String,
    /// What computed it: base and version.
    pub fingerprint: String,
}

/// Log-probabilities of a piece of text, in the form of its API.
pub fn logprobs(api: Api, tokenizer: &Tokenizer, tokens: &[TokenLogprobs]) -> Value {
    let text = |id: u32| tokenizer.decode(&[id], false).unwrap_or_default();
    match api {
        Api::Chat => {
            let entry = |id: u32, logprob: f32| {
                let token = text(id);
                json!({"token": token, "logprob": logprob, "bytes": token.as_bytes()})
            };
            let content: Vec<Value> = tokens
                .iter()
                .map(|t| {
                    let mut value = entry(t.id, t.logprob);
                    value["top_logprobs"] = t.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
                    value
                })
                .collect();
            json!({"content": content, "refusal": null})
        }
        Api::Text => json!({
            "tokens": tokens.iter().map(|t| text(t.id)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(),
            "top_logprobs": tokens
                .iter()
                .map(|t| t.top.iter().map(|&(id, logprob)| (text(id), json!(logprob))).collect::<Map<_, _>>())
                .collect::<Vec<_>>(),
        }),
    }
}

/// Tokens used, in OpenAI's form.
pub fn usage(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    })
}

impl Answer {
    fn head(&self, object: &str) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint,
        })
    }

    /// The whole answer.
    pub fn whole(&self, text: &str, logprobs: Option<Value>, finish: &str, used: Usage) -> Value {
        let (object, mut choice) = match self.api {
            Api::Chat => (
                "chat.completion",
                json!({"message": {"role": "assistant", "content": text, "refusal": null}}),
            ),
            Api::Text => ("text_completion", json!({"text": text})),
        };
        choice["index"] = 0.into();
        choice["logprobs"] = logprobs.unwrap_or_default();
        choice["finish_reason"] = finish.into();
        let mut body = self.head(object);
        body["choices"] = json!([choice]);
        body["usage"] = usage(used);
        body
    }

    /// The first event of a chat stream: who speaks. Text streams have none.
    pub fn opening(&self) -> Option<Value> {
        (self.api == Api::Chat).then(|| self.chunk(json!({"role": "assistant", "content": ""}), None, None))
    }

    /// An event with a piece of text.
    pub fn piece(&self, text: &str, logprobs: Option<Value>) -> Value {
        match self.api {
            Api::Chat => self.chunk(json!({"content": text}), logprobs, None),
            Api::Text => self.chunk(json!(text), logprobs, None),
        }
    }

    /// The event that ends the text.
    pub fn ending(&self, finish: &str) -> Value {
        match self.api {
            Api::Chat => self.chunk(json!({}), None, Some(finish)),
            Api::Text => self.chunk(json!(""), None, Some(finish)),
        }
    }

    /// The event with the usage, after the end: no choices.
    pub fn used(&self, used: Usage) -> Value {
        let mut body = self.head(self.chunk_object());
        body["choices"] = json!([]);
        body["usage"] = usage(used);
        body
    }

    fn chunk_object(&self) -> &'static str {
        match self.api {
            Api::Chat => "chat.completion.chunk",
            Api::Text => "text_completion",
        }
    }

    fn chunk(&self, content: Value, logprobs: Option<Value>, finish: Option<&str>) -> Value {
        let mut choice = json!({"index": 0, "logprobs": logprobs, "finish_reason": finish});
        choice[if self.api == Api::Chat { "delta" } else { "text" }] = content;
        let mut body = self.head(self.chunk_object());
        body["choices"] = json!([choice]);
        body
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(extra: Value) -> Result<Request, ApiError> {
        let mut body = json!({"model": "a", "messages": [{"role": "user", "content": "hi"}]});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        parse(Api::Chat, body.to_string().as_bytes())
    }

    #[test]
    fn null_and_no_op_values_are_accepted() {
        let plain = chat(json!({})).unwrap();
        let same = chat(json!({
            "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": null, "tool_choice": "none",
            "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "store": false, "stop": null,
            "logprobs": false, "top_logprobs": null, "stream": false, "max_tokens": null, "seed": null, "temperature": null,
        }));
        // Who asks says which target of an alias answers, and nothing else.
        let same = same.unwrap();
        assert!(same.asker.is_some() && plain.asker.is_none());
        assert_eq!(Request { asker: None, ..same }, plain);
    }

    #[test]
    fn what_would_change_the_answer_is_refused_by_name() {
        for (name, value) in [
            ("n", json!(2)),
            ("presence_penalty", json!(0.5)),
            ("logit_bias", json!({"5": 1})),
            ("response_format", json!({"type": "json_object"})),
            ("tools", json!([{"type": "function"}])),
            ("temprature", json!(0)),
            ("temperature", json!(-1)),
            ("top_p", json!(0)),
            ("max_tokens", json!(-1)),
            ("stop", json!(7)),
            ("seed", json!("x")),
            ("top_logprobs", json!(3)),
            ("stream_options", json!({"include_usage": true})),
        ] {
            let error = chat(json!({name: value})).unwrap_err();
            assert_eq!(error.status(), 400);
            assert_eq!(error.body()["error"]["param"], name, "{error:?}");
        }
    }

    #[test]
    fn contents_are_strings_or_text_parts() {
        let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]});
        let request = parse(Api::Chat, parts.to_string().as_bytes()).unwrap();
        assert_eq!(request.input, Input::Messages(json!([{"role": "user", "content": "ab"}])));
        for bad in [
            json!({"messages": []}),
            json!({"messages": "hi"}),
            json!({}),
            json!({"messages": [{"role": "robot", "content": "hi"}]}),
            json!({"messages": [{"role": "user"}]}),
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
            json!([1]),
        ] {
            assert_eq!(parse(Api::Chat, bad.to_string().as_bytes()).unwrap_err().status(), 400, "{bad}");
        }
    }

    #[test]
    fn prompts_are_texts_or_tokens() {
        let read = |prompt: Value| parse(Api::Text, json!({"prompt": prompt}).to_string().as_bytes());
        assert_eq!(read(json!("a")).unwrap().input, Input::Text("a".into()));
        assert_eq!(read(json!(["a"])).unwrap().input, Input::Text("a".into()));
        assert_eq!(read(json!([1, 2])).unwrap().input, Input::Tokens(vec![1, 2]));
        assert_eq!(read(json!([[1, 2]])).unwrap().input, Input::Tokens(vec![1, 2]));
        for bad in [json!(["a", "b"]), json!([]), json!([-1]), json!(1), json!(null), json!([1, "a"])] {
            assert_eq!(read(bad.clone()).unwrap_err().status(), 400, "{bad}");
        }
    }

    #[test]
    fn sampling_follows_request_then_model_then_openai() {
        let model = GenerationDefaults {
            do_sample: Some(true),
            temperature: Some(0.7),
            top_k: Some(20),
            ..Default::default()
        };
        let asked = chat(json!({"temperature": 0.2, "seed": 5})).unwrap().sampling(model, 1);
        assert_eq!((asked.temperature, asked.top_k, asked.seed), (0.2, 20, 5));
        let bare = chat(json!({})).unwrap();
        assert_eq!(bare.sampling(GenerationDefaults::default(), 1).temperature, 1.0);
        let greedy =
            GenerationDefaults { do_sample: Some(false), temperature: Some(0.7), ..Default::default() };
        assert_eq!(bare.sampling(greedy, 1).temperature, 0.0);
    }
}
