//! `/v1/chat/completions` and `/v1/completions`: from a request to its answer.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, header};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::Instant;
use turret_crds::alias::Asker;
use turret_crds::label;
use turret_crds::model_name::ModelName;

use super::App;
use super::error::ApiError;
use super::generate::{self, Job, Piece};
use super::models::{alias_of, context_tokens, find, lead};
use super::openai::{self, Answer, Api, Input, Request};
use super::progress;
use crate::engine::handle::SubmitError;
use crate::engine::row::TokenLogprobs;
use crate::metrics::Metrics;
use crate::model::chat_template::ChatInput;
use crate::model::tokenizer::Tokenizer;
use crate::residency::Permit;
use crate::residency::resolve::ResolvedBase;

/// Names a request, where it comes through a gateway or its client gave it a name.
const REQUEST_ID_HEADER: &str = "x-request-id";
/// How long loading the lens took, when the request waited for it.
const LOAD_HEADER: &str = "x-turret-load-ms";
/// How long the switch of base took, when the request waited for it.
const SWITCH_HEADER: &str = "x-turret-switch-ms";
/// Tokens of a text completion that does not say how many, as OpenAI's default.
const DEFAULT_TEXT_TOKENS: u32 = 16;
/// Times that a row is begun: its permit may be overtaken by a switch, or its lens be replaced.
const ATTEMPTS: u32 = 3;

/// `POST /v1/chat/completions`.
pub async fn chat(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    serve(app, Api::Chat, &headers, body).await
}

/// `POST /v1/completions`.
pub async fn complete(
    State(app): State<App>,
    headers: HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    serve(app, Api::Text, &headers, body).await
}

/// Counts a request when it ends, however it ends.
pub(super) struct Ended {
    metrics: Arc<Metrics>,
    model: ModelName,
    since: Instant,
    /// 499, as proxies have it, while nobody said otherwise: the client went away.
    code: u16,
}

impl Ended {
    /// Notes why there is no answer.
    pub(super) fn failed(&mut self, error: ApiError) -> ApiError {
        self.code = error.status().as_u16();
        error
    }
}

impl Drop for Ended {
    fn drop(&mut self) {
        let took = self.since.elapsed();
        self.metrics.answered(&self.model.group, self.model.lens.as_deref(), self.code, took);
    }
}

async fn serve(
    app: App,
    api: Api,
    headers: &HeaderMap,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let since = Instant::now();
    let body = body.map_err(|e| match e.status().as_u16() {
        413 => ApiError::too_large("the body is larger than 8 MiB"),
        _ => ApiError::invalid(None, e.body_text()),
    })?;
    let request = openai::parse(api, &body)?;
    let view = app.residency.view();
    let document = view.document.as_deref();
    let routed = headers.get(label::MODEL_HEADER).and_then(|value| value.to_str().ok());
    let default = document.and_then(|d| d.default_group.as_deref()).unwrap_or_default();
    let named = request.model.as_deref().unwrap_or(default);
    let asker = request.asker.unwrap_or_else(|| asker(headers));
    let model = lead(document, find(document, routed.unwrap_or(named))?, asker);
    // An alias says nothing of what answered.
    let is_alias = |name: &String| find(document, name).is_ok_and(|n| alias_of(document, &n).is_some());
    let answered_as = request.model.clone().filter(|name| !is_alias(name));
    let answered_as = answered_as.unwrap_or_else(|| model.to_string());
    let mut ended = Ended { metrics: app.metrics.clone(), model: model.clone(), since, code: 499 };
    let (stream, progress) = (request.stream, request.stream_options.include_progress);
    let begun = begin(app.clone(), api, request, model.clone(), answered_as, since);
    if stream && progress {
        return progress::told(&app, model, Box::pin(begun), ended).await;
    }
    let begun = begun.await.map_err(|e| ended.failed(e))?;
    if stream {
        let head = event_stream_headers(begun.headers());
        return Ok((head, Body::from_stream(begun.stream(ended))).into_response());
    }
    let response = begun.whole().await.map_err(|e| ended.failed(e))?;
    ended.code = 200;
    Ok(response)
}

/// Who asks without a word of themselves: whoever sends requests of this id, or anyone.
fn asker(headers: &HeaderMap) -> Asker {
    let id = headers.get(REQUEST_ID_HEADER).and_then(|value| value.to_str().ok());
    id.map_or_else(|| Asker::anyone(rand::random()), Asker::called)
}

/// From a request to its first piece. Nothing is sent before that, so that a row that fails at once is an honest status.
async fn begin(
    app: App,
    api: Api,
    request: Request,
    model: ModelName,
    answered_as: String,
    since: Instant,
) -> Result<Begun, ApiError> {
    let mut attempt = 1;
    let (mut pieces, head, answer, tokenizer) = loop {
        let Spoken { base, lens_digest, tokenizer } = prepared(&app, &model).await?;
        let prompt = prompt(&request.input, &tokenizer)?;
        let context = context_tokens(&app.residency.view(), &base);
        let max_new_tokens = new_tokens(api, &request, prompt.len(), context)?;
        let sampling = request.sampling(base.tokenizer.defaults(), rand::random());
        let permit = app.residency.acquire(model.clone()).await?;
        // Another lens came under this name meanwhile, perhaps with another tokenizer.
        if permit.lens.as_ref().map(|lens| &lens.digest) != lens_digest.as_ref() && attempt < ATTEMPTS {
            attempt += 1;
            continue;
        }
        let waited = (permit.loaded_in, permit.switched_in);
        let head = headers(&permit);
        let answer = Answer {
            api,
            id: format!(
                "{}-{}",
                if api == Api::Chat { "chatcmpl" } else { "cmpl" },
                uuid::Uuid::new_v4().simple()
            ),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            model: answered_as.clone(),
            fingerprint: fingerprint(&permit),
        };
        let job = Job {
            model: model.clone(),
            prompt,
            sampling,
            max_new_tokens,
            stop: request.stop.clone(),
            logprobs: request.logprobs,
            cache_salt: request.cache_salt.clone(),
            tokenizer: tokenizer.clone(),
            since,
        };
        let prompt_tokens = job.prompt.len();
        match generate::start(&app, permit, job).await {
            Ok(pieces) => {
                app.metrics.waited(waited.0, waited.1);
                tracing::info!(
                    model = %model,
                    request = answer.id,
                    prompt_tokens,
                    waited_ms = since.elapsed().as_millis() as u64,
                    load_ms = waited.0.map(|d| d.as_millis() as u64),
                    switch_ms = waited.1.map(|d| d.as_millis() as u64),
                    "row started"
                );
                break (pieces, head, answer, tokenizer);
            }
            // Overtaken by a switch that ended the drain: back into the queue.
            Err(SubmitError::BaseNotActive) if attempt < ATTEMPTS => attempt += 1,
            Err(error) => return Err(error.into()),
        }
    };
    let first = loop {
        match pieces.recv().await {
            Some(Piece::Preempted) => {}
            Some(Piece::Failed(error)) => return Err(error),
            Some(piece) => break piece,
            None => return Err(ApiError::internal("the row ended without a word")),
        }
    };
    let (wants_logprobs, include_usage) = (request.logprobs.is_some(), request.stream_options.include_usage);
    Ok(Begun { head, first, pieces, answer, tokenizer, wants_logprobs, include_usage })
}

/// An answer of which the first piece is there.
pub(super) struct Begun {
    head: HeaderMap,
    first: Piece,
    pieces: mpsc::UnboundedReceiver<Piece>,
    answer: Answer,
    tokenizer: Tokenizer,
    wants_logprobs: bool,
    include_usage: bool,
}

impl Begun {
    /// What is said of it ahead of it.
    pub(super) fn headers(&self) -> HeaderMap {
        self.head.clone()
    }

    /// All of it at once.
    async fn whole(mut self) -> Result<Response, ApiError> {
        let mut text = String::new();
        let mut tokens: Vec<TokenLogprobs> = Vec::new();
        let mut piece = Some(self.first);
        loop {
            match piece {
                Some(Piece::Text { text: more, logprobs }) => {
                    text += &more;
                    tokens.extend(logprobs);
                }
                Some(Piece::Preempted) => {}
                Some(Piece::End { finish, usage }) => {
                    let api = self.answer.api;
                    let logprobs =
                        self.wants_logprobs.then(|| openai::logprobs(api, &self.tokenizer, &tokens));
                    let body = Json(self.answer.whole(&text, logprobs, finish, usage));
                    return Ok((self.head, body).into_response());
                }
                Some(Piece::Failed(error)) => return Err(error),
                None => return Err(ApiError::internal("the row ended without a word")),
            }
            piece = self.pieces.recv().await;
        }
    }

    /// Piece by piece, while it is computed.
    pub(super) fn stream(
        mut self,
        mut ended: Ended,
    ) -> impl futures::Stream<Item = Result<Bytes, Infallible>> {
        async_stream::stream! {
            if let Some(opening) = self.answer.opening() {
                yield event(&opening);
            }
            let mut piece = Some(self.first);
            loop {
                match piece {
                    Some(Piece::Text { text, logprobs }) => {
                        let logprobs = self
                            .wants_logprobs
                            .then(|| openai::logprobs(self.answer.api, &self.tokenizer, &logprobs));
                        yield event(&self.answer.piece(&text, logprobs));
                    }
                    // A comment, which clients skip: it tells whoever looks why nothing comes, and keeps the connection.
                    Some(Piece::Preempted) => {
                        yield Ok(Bytes::from_static(b": preempted for another base; goes on when this one is back\n\n"));
                    }
                    Some(Piece::End { finish, usage }) => {
                        ended.code = 200;
                        yield event(&self.answer.ending(finish));
                        if self.include_usage {
                            yield event(&self.answer.used(usage));
                        }
                        break;
                    }
                    Some(Piece::Failed(error)) => {
                        yield event(&ended.failed(error).body());
                        break;
                    }
                    None => break,
                }
                piece = self.pieces.recv().await;
            }
            yield Ok(DONE);
            drop(ended);
        }
    }
}

/// The last event of a stream.
pub(super) const DONE: Bytes = Bytes::from_static(b"data: [DONE]\n\n");

/// The head of a stream of events.
pub(super) fn event_stream_headers(mut head: HeaderMap) -> HeaderMap {
    head.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    head.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    head
}

pub(super) fn event(value: &Value) -> Result<Bytes, Infallible> {
    Ok(format!("data: {value}\n\n").into())
}

fn fingerprint(permit: &Permit) -> String {
    let short = |digest: &str| digest.trim_start_matches("sha256:").chars().take(12).collect::<String>();
    let base = short(&permit.base_digest);
    let lens = permit.lens.as_ref().map(|l| format!("-{}", short(&l.digest))).unwrap_or_default();
    format!("turret-{}-{base}{lens}", env!("CARGO_PKG_VERSION"))
}

fn headers(permit: &Permit) -> HeaderMap {
    let mut headers = HeaderMap::new();
    if let Some(lens) = &permit.lens
        && let Ok(digest) = HeaderValue::from_str(&lens.digest)
    {
        headers.insert(label::LENS_DIGEST_HEADER, digest);
    }
    let mut time = |name: &'static str, took: Option<Duration>| {
        if let Some(took) = took
            && let Ok(ms) = HeaderValue::from_str(&format!("{:.1}", took.as_secs_f64() * 1000.0))
        {
            headers.insert(name, ms);
        }
    };
    time(LOAD_HEADER, permit.loaded_in);
    time(SWITCH_HEADER, permit.switched_in);
    headers
}

/// What a model is spoken to through: needed before there is a permit.
struct Spoken {
    base: Arc<ResolvedBase>,
    lens_digest: Option<String>,
    tokenizer: Tokenizer,
}

/// The base of a model and the tokenizer of its lens, once their files were found good.
async fn prepared(app: &App, model: &ModelName) -> Result<Spoken, ApiError> {
    let mut view = app.residency.watch();
    loop {
        {
            let now = view.borrow_and_update().clone();
            let group = now.document.as_ref().and_then(|d| d.group(&model.group));
            let Some(group) = group else {
                return Err(ApiError::unknown_model(format!("the model `{model}` does not exist any more")));
            };
            let lens = model.lens.as_ref().map(|lens| now.lenses.get(&(model.group.clone(), lens.clone())));
            match (now.bases.get(&group.base.key), lens) {
                (Some(base), None) => {
                    let tokenizer = base.tokenizer.clone();
                    return Ok(Spoken { base: base.clone(), lens_digest: None, tokenizer });
                }
                (Some(base), Some(Some(lens))) => {
                    let tokenizer = lens.tokenizer.as_ref().unwrap_or(&base.tokenizer).clone();
                    let lens_digest = Some(lens.digest.clone());
                    return Ok(Spoken { base: base.clone(), lens_digest, tokenizer });
                }
                _ => {}
            }
        }
        // The queue knows how long one may wait, and why a base cannot be served.
        tokio::select! {
            changed = view.changed() => if changed.is_err() {
                return Err(ApiError::internal("the worker ended"));
            },
            refused = app.residency.acquire(model.clone()) => match refused {
                Err(refusal) => return Err(refusal.into()),
                // It can be served, so the view is about to say so.
                Ok(permit) => {
                    drop(permit);
                    let _ = tokio::time::timeout(Duration::from_millis(100), view.changed()).await;
                }
            },
        }
    }
}

fn prompt(input: &Input, tokenizer: &Tokenizer) -> Result<Vec<u32>, ApiError> {
    match input {
        Input::Tokens(ids) => Ok(ids.clone()),
        Input::Text(text) => Ok(tokenizer.encode(text, true)?),
        Input::Messages(messages) => {
            if !tokenizer.has_chat_template() {
                let message = "this model has no chat template; use /v1/completions";
                return Err(ApiError::invalid(Some("messages"), message));
            }
            let chat = ChatInput {
                messages: minijinja::Value::from(minijinja::value::Serde(messages)),
                tools: None,
                add_generation_prompt: true,
                variables: std::collections::BTreeMap::new(),
                now: jiff::Zoned::now(),
            };
            let text = tokenizer.render_chat(&chat)?;
            Ok(tokenizer.encode(&text, false)?)
        }
    }
}

fn new_tokens(api: Api, request: &Request, prompt: usize, context: u32) -> Result<u32, ApiError> {
    let prompt = u32::try_from(prompt).unwrap_or(u32::MAX);
    let room = context.saturating_sub(prompt);
    let param = if api == Api::Chat { "messages" } else { "prompt" };
    if room == 0 {
        let message =
            format!("the prompt has {prompt} tokens, the context of this model is {context}; shorten it");
        return Err(ApiError::context_overflow(param, message));
    }
    let wanted = match (request.max_tokens, api) {
        (Some(wanted), _) => wanted,
        (None, Api::Chat) => room,
        (None, Api::Text) => DEFAULT_TEXT_TOKENS.min(room),
    };
    if wanted > room {
        let message = format!(
            "{prompt} prompt tokens and {wanted} new ones exceed the context of {context} tokens; shorten the prompt or \
             ask for fewer"
        );
        return Err(ApiError::context_overflow("max_tokens", message));
    }
    Ok(wanted)
}
