//! A client of the gateway: asks one model one question, streamed or not.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use futures::StreamExt as _;
use serde_json::{Value, json};
use turret_crds::label::{LENS_DIGEST_HEADER, WORKER_HEADER};

use super::family::Case;

/// Where to ask, and as whom.
#[derive(Clone, Debug)]
pub struct Gateway {
    client: reqwest::Client,
    /// `http://ADDRESS:PORT`
    url: String,
    headers: Vec<(&'static str, String)>,
}

/// How an answer comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// As one JSON body.
    Whole,
    /// Token by token, as server-sent events.
    Streamed,
}

/// What was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The text.
    pub text: String,
    /// Why it ended.
    pub finish_reason: String,
    /// How many tokens the server counted in the prompt.
    pub prompt_tokens: Option<u64>,
    /// Digest of the lens that answered.
    pub lens_digest: Option<String>,
    /// The worker that answered.
    pub worker: Option<String>,
    /// From the question to the first text.
    pub first_token: Duration,
}

/// A refusal: status and body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The HTTP status; 0 when there was no answer at all.
    pub status: u16,
    /// The body, or what went wrong on the way.
    pub body: String,
}

impl Gateway {
    /// A client of `url` that asks for what is served in `namespace`.
    pub fn of_namespace(client: reqwest::Client, url: &str, namespace: &str) -> Self {
        Self { client, url: url.into(), headers: vec![("x-turret-namespace", namespace.into())] }
    }

    /// A client of `url` that says by its path that it asks for what is served in `namespace`.
    pub fn below_path_of(client: reqwest::Client, url: &str, namespace: &str) -> Self {
        Self { client, url: format!("{url}/ns/{namespace}"), headers: Vec::new() }
    }

    /// A client that goes to a worker itself, with a signed token.
    pub fn of_worker(client: reqwest::Client, url: &str, token: &str) -> Self {
        Self { client, url: url.into(), headers: vec![("authorization", format!("Bearer {token}"))] }
    }

    fn request(&self, method: reqwest::Method, path: &str) -> reqwest::RequestBuilder {
        let mut request = self.client.request(method, format!("{}{path}", self.url));
        for (name, value) in &self.headers {
            request = request.header(*name, value);
        }
        request
    }

    /// `GET path` as JSON.
    pub async fn get(&self, path: &str) -> Result<Value, Refused> {
        let response = self.request(reqwest::Method::GET, path).send().await.map_err(Refused::broken)?;
        let status = response.status().as_u16();
        let body = response.text().await.map_err(Refused::broken)?;
        match serde_json::from_str(&body) {
            Ok(value) if status == 200 => Ok(value),
            _ => Err(Refused { status, body }),
        }
    }

    /// The ids that `/v1/models` lists, sorted.
    pub async fn models(&self) -> Result<Vec<String>, Refused> {
        let list = self.get("/v1/models").await?;
        let mut ids: Vec<String> = list["data"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|model| model["id"].as_str().map(str::to_owned))
            .collect();
        ids.sort();
        Ok(ids)
    }

    /// `POST path`, and every event of the stream that is answered, an error among them too.
    pub async fn stream(&self, path: &str, body: &Value) -> Result<Vec<Value>, Refused> {
        let request = self.request(reqwest::Method::POST, path).json(body);
        let response = request.send().await.map_err(Refused::broken)?;
        let status = response.status().as_u16();
        let text = response.text().await.map_err(Refused::broken)?;
        if status != 200 {
            return Err(Refused { status, body: text });
        }
        let lines = EventLines::default().feed(text.as_bytes());
        Ok(lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect())
    }

    /// Asks `model`, greedily.
    pub async fn ask(&self, model: &str, messages: &Value, mode: Mode) -> Result<Answer, Refused> {
        let began = Instant::now();
        let mut body = json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 64});
        if mode == Mode::Streamed {
            body["stream"] = json!(true);
            body["stream_options"] = json!({"include_usage": true});
        }
        let request = self.request(reqwest::Method::POST, "/v1/chat/completions").json(&body);
        let response = request.send().await.map_err(Refused::broken)?;
        let status = response.status().as_u16();
        let header = |name: &str| {
            response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
        };
        let mut answer = Answer {
            text: String::new(),
            finish_reason: String::new(),
            prompt_tokens: None,
            lens_digest: header(LENS_DIGEST_HEADER),
            worker: header(WORKER_HEADER),
            first_token: Duration::ZERO,
        };
        if status != 200 {
            return Err(Refused { status, body: response.text().await.unwrap_or_default() });
        }
        let broken = |error: anyhow::Error| Refused { status, body: format!("{error:#}") };
        match mode {
            Mode::Whole => {
                let body = response.bytes().await.map_err(Refused::broken)?;
                read_whole(&body, &mut answer).map_err(broken)?;
                answer.first_token = began.elapsed();
            }
            Mode::Streamed => {
                let stream = response.bytes_stream();
                futures::pin_mut!(stream);
                let mut events = EventLines::default();
                let mut ended = false;
                while let Some(chunk) = stream.next().await {
                    for event in events.feed(&chunk.map_err(Refused::broken)?) {
                        ended |= event == "[DONE]";
                        if !ended {
                            read_event(&event, &mut answer).map_err(broken)?;
                        }
                    }
                    if answer.first_token.is_zero() && !answer.text.is_empty() {
                        answer.first_token = began.elapsed();
                    }
                }
                if !ended {
                    return Err(broken(anyhow::anyhow!(
                        "the stream ended without [DONE] after {:?}",
                        answer.text
                    )));
                }
            }
        }
        Ok(answer)
    }

    /// Asks and compares with the record, to the last character.
    pub async fn verify(&self, model: &str, case: &Case, mode: Mode) -> Result<Answer> {
        let answer = self.ask(model, &case.messages, mode).await.map_err(|refused| {
            anyhow::anyhow!("`{model}` refused {} ({mode:?}): {refused}", case.messages)
        })?;
        check(&answer, case).with_context(|| format!("`{model}` was asked {} ({mode:?})", case.messages))?;
        Ok(answer)
    }
}

fn check(answer: &Answer, case: &Case) -> Result<()> {
    if answer.text != case.text {
        bail!("answered {:?} instead of {:?}", answer.text, case.text);
    }
    if answer.finish_reason != "stop" {
        bail!("ended with `{}` instead of `stop`", answer.finish_reason);
    }
    if answer.prompt_tokens != Some(case.prompt_ids.len() as u64) {
        bail!("counted {:?} prompt tokens instead of {}", answer.prompt_tokens, case.prompt_ids.len());
    }
    Ok(())
}

fn read_whole(body: &[u8], answer: &mut Answer) -> Result<()> {
    let body: Value = serde_json::from_slice(body).context("the answer is not JSON")?;
    let choice = &body["choices"][0];
    answer.text = choice["message"]["content"].as_str().context("the answer has no content")?.into();
    answer.finish_reason = choice["finish_reason"].as_str().unwrap_or_default().into();
    answer.prompt_tokens = body["usage"]["prompt_tokens"].as_u64();
    Ok(())
}

fn read_event(event: &str, answer: &mut Answer) -> Result<()> {
    let event: Value =
        serde_json::from_str(event).with_context(|| format!("an event is not JSON: {event}"))?;
    if let Some(error) = event.get("error") {
        bail!("the stream carries an error after {:?}: {error}", answer.text);
    }
    let choice = &event["choices"][0];
    answer.text += choice["delta"]["content"].as_str().unwrap_or_default();
    if let Some(reason) = choice["finish_reason"].as_str() {
        answer.finish_reason = reason.into();
    }
    if let Some(count) = event["usage"]["prompt_tokens"].as_u64() {
        answer.prompt_tokens = Some(count);
    }
    Ok(())
}

impl Refused {
    fn broken(error: reqwest::Error) -> Self {
        Self { status: 0, body: format!("{:#}", anyhow::Error::from(error)) }
    }
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.status, self.body.trim())
    }
}

/// Cuts a stream of bytes into the data of server-sent events.
#[derive(Default)]
struct EventLines {
    rest: Vec<u8>,
}

impl EventLines {
    fn feed(&mut self, bytes: &[u8]) -> Vec<String> {
        self.rest.extend_from_slice(bytes);
        let mut events = Vec::new();
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(data) = line.trim_end().strip_prefix("data:") {
                events.push(data.trim_start().to_owned());
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_found_however_the_bytes_are_cut() {
        let text = b"data: {\"a\":1}\n\n: comment\n\ndata:[DONE]\n\n";
        for cut in 0..text.len() {
            let mut lines = EventLines::default();
            let mut events = lines.feed(&text[..cut]);
            events.extend(lines.feed(&text[cut..]));
            assert_eq!(events, ["{\"a\":1}", "[DONE]"], "cut at {cut}");
        }
    }

    #[test]
    fn an_answer_that_differs_in_anything_is_refused() {
        let case =
            Case { messages: json!([]), text: "blue".into(), prompt_ids: vec![1, 2], output_ids: vec![3] };
        let right = Answer {
            text: "blue".into(),
            finish_reason: "stop".into(),
            prompt_tokens: Some(2),
            lens_digest: None,
            worker: None,
            first_token: Duration::ZERO,
        };
        assert!(check(&right, &case).is_ok());
        assert!(check(&Answer { text: "blue ".into(), ..right.clone() }, &case).is_err());
        assert!(check(&Answer { finish_reason: "length".into(), ..right.clone() }, &case).is_err());
        assert!(check(&Answer { prompt_tokens: Some(3), ..right }, &case).is_err());
    }
}
