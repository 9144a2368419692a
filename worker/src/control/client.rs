//! Thin: sends requests to a control port, and tells refusals, silence and nobody there apart.

use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use turret_crds::WorkerReport;
use turret_crds::report::StateEvent;

use super::ControlError;
use super::show::printable;

/// How long a connection may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How long an answer may take that waits for nothing.
const ANSWER: Duration = Duration::from_secs(30);
/// How long a stream may say nothing; a worker says something every five seconds.
const SILENCE: Duration = Duration::from_secs(30);
/// Longest text of an answer that is none of a worker's.
const MAX_FOREIGN: usize = 200;

/// The way to one worker's control port.
pub(super) struct Client {
    http: reqwest::Client,
    url: Url,
    token: Option<String>,
}

impl Client {
    pub(super) fn new(url: Url, token: Option<String>) -> Result<Self, ControlError> {
        // A control port is not behind anybody's proxy for the internet.
        let builder = reqwest::Client::builder().no_proxy().connect_timeout(CONNECT);
        let agent = concat!("turret-worker/", env!("CARGO_PKG_VERSION"));
        let http = builder.user_agent(agent).build().map_err(ControlError::Request)?;
        Ok(Self { http, url, token })
    }

    /// Asks for something that has no answer but yes.
    pub(super) async fn order(&self, method: Method, path: &[&str]) -> Result<(), ControlError> {
        self.send(self.request(method, path).timeout(ANSWER)).await.map(drop)
    }

    /// Asks for an answer, and gives it as read and as it came.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &[&str],
        body: Option<&Value>,
    ) -> Result<(T, Value), ControlError> {
        let request = self.request(method, path).timeout(ANSWER);
        let request = match body {
            Some(body) => request.json(body),
            None => request,
        };
        let answer = self.send(request).await?.bytes().await.map_err(|error| self.failed(error))?;
        let strange = |source| ControlError::Answer { url: self.place(), source };
        let json: Value = serde_json::from_slice(&answer).map_err(strange)?;
        let read = serde_json::from_value(json.clone()).map_err(strange)?;
        Ok((read, json))
    }

    /// Has a lens loaded, and waits so long.
    pub(super) async fn load(&self, lens: &str, wait_seconds: u32) -> Result<StatusCode, ControlError> {
        let request = self.request(Method::POST, &["lenses", lens, "load"]);
        let limit = ANSWER + Duration::from_secs(u64::from(wait_seconds));
        let request = request.query(&[("waitSeconds", wait_seconds)]).timeout(limit);
        Ok(self.send(request).await?.status())
    }

    /// Follows the worker's state.
    pub(super) async fn watch(&self) -> Result<Watch, ControlError> {
        let request = self.request(Method::GET, &["state"]).query(&[("watch", true)]);
        // The stream has no end, so only its beginning has a limit.
        let response = match tokio::time::timeout(ANSWER, self.send(request)).await {
            Ok(response) => response?,
            Err(_) => return Err(ControlError::Silent { url: self.place() }),
        };
        Ok(Watch { url: self.place(), response, buffer: Vec::new(), report: None })
    }

    fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        let mut url = self.url.clone();
        url.path_segments_mut()
            .expect("a URL of http or https has a path")
            .pop_if_empty()
            .extend(["control", "v1"])
            .extend(path);
        let request = self.http.request(method, url);
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Gives an answer that says yes.
    async fn send(&self, request: RequestBuilder) -> Result<Response, ControlError> {
        let response = request.send().await.map_err(|error| self.failed(error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.unwrap_or_default();
        Err(refusal(self.place(), status, &body))
    }

    fn place(&self) -> String {
        self.url.as_str().trim_end_matches('/').to_owned()
    }

    fn failed(&self, error: reqwest::Error) -> ControlError {
        failure(self.place(), error)
    }
}

/// A worker's state as it changes.
pub(super) struct Watch {
    url: String,
    response: Response,
    buffer: Vec<u8>,
    report: Option<WorkerReport>,
}

impl Watch {
    /// The next line, and what it says.
    pub(super) async fn event(&mut self) -> Result<(String, StateEvent), ControlError> {
        let line = self.line().await?;
        let strange = |source| ControlError::Answer { url: self.url.clone(), source };
        let event = serde_json::from_slice(&line).map_err(strange)?;
        Ok((String::from_utf8_lossy(&line).into_owned(), event))
    }

    /// The report, once something of it is new.
    pub(super) async fn report(&mut self) -> Result<&WorkerReport, ControlError> {
        let report = loop {
            match self.event().await?.1 {
                StateEvent::Snapshot(report) => break *report,
                StateEvent::Change(change) => {
                    // The snapshot comes first.
                    if let Some(mut report) = self.report.take() {
                        report.apply(change);
                        break report;
                    }
                }
                StateEvent::Heartbeat => {}
            }
        };
        Ok(self.report.insert(report))
    }

    async fn line(&mut self) -> Result<Vec<u8>, ControlError> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let mut line: Vec<u8> = self.buffer.drain(..=end).collect();
                line.pop();
                return Ok(line);
            }
            match tokio::time::timeout(SILENCE, self.response.chunk()).await {
                Ok(Ok(Some(chunk))) => self.buffer.extend_from_slice(&chunk),
                Ok(Ok(None)) => return Err(ControlError::Ended { url: self.url.clone() }),
                Ok(Err(error)) => return Err(failure(self.url.clone(), error)),
                Err(_) => return Err(ControlError::Silent { url: self.url.clone() }),
            }
        }
    }
}

/// What a request came to that got no whole answer.
fn failure(url: String, error: reqwest::Error) -> ControlError {
    // It is said already who was asked.
    let source = error.without_url();
    if source.is_builder() {
        ControlError::Request(source)
    } else if source.is_connect() {
        ControlError::Unreachable { url, source }
    } else if source.is_timeout() {
        ControlError::Silent { url }
    } else {
        ControlError::BrokenOff { url, source }
    }
}

/// The body of a refusal.
#[derive(Deserialize)]
struct Body {
    error: Reason,
}

#[derive(Deserialize)]
struct Reason {
    message: String,
}

/// What an answer means that does not say yes.
fn refusal(url: String, status: StatusCode, body: &[u8]) -> ControlError {
    let Ok(Body { error }) = serde_json::from_slice(body) else {
        let text: String = String::from_utf8_lossy(body).trim().chars().take(MAX_FOREIGN).collect();
        let reason = format!("{url} answers {status}: {text}");
        return ControlError::Refused { reason: printable(reason.trim_end_matches([':', ' '])) };
    };
    let reason = printable(&error.message);
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ControlError::NotAllowed { url, reason },
        // It names the request, not the lens or the lease.
        StatusCode::NOT_FOUND if reason.contains("/control/v1/") && reason.starts_with("there is no `") => {
            ControlError::OtherPort { url, reason }
        }
        _ => ControlError::Refused { reason },
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn said(status: u16, body: &[u8]) -> String {
        refusal("http://worker:8081".into(), StatusCode::from_u16(status).unwrap(), body).to_string()
    }

    fn refused(status: u16, message: &str) -> String {
        let body = json!({"error": {"message": message, "type": "x", "param": null, "code": "x"}});
        said(status, body.to_string().as_bytes())
    }

    #[test]
    fn a_refusal_is_one_sentence_that_says_what_to_do() {
        assert_eq!(refused(409, "`a:b` is pinned; unpin it first"), "`a:b` is pinned; unpin it first");
        for status in [401, 403] {
            let text = refused(status, "the token is not accepted");
            assert!(
                text.starts_with("http://worker:8081 does not allow this: the token is not acc"),
                "{text}"
            );
            assert!(text.contains("--token-file") && text.contains("TURRET_TOKEN"), "{text}");
        }
        assert!(refused(404, "there is no `GET /control/v1/state`").contains("not its data port"));
        let lens = "`a:b` is not declared; `GET /control/v1/state` lists what is";
        assert_eq!(refused(404, lens), lens);
        assert_eq!(refused(503, "two\nlines\u{1b}[2J"), "two lines [2J");
    }

    #[test]
    fn what_no_worker_answers_is_quoted_and_cut() {
        assert_eq!(
            said(502, b"<html>bad</html>"),
            "http://worker:8081 answers 502 Bad Gateway: <html>bad</html>"
        );
        assert_eq!(said(500, b""), "http://worker:8081 answers 500 Internal Server Error");
        assert!(said(500, &[b'x'; 5000]).len() < 300);
    }

    #[test]
    fn a_name_is_one_segment_of_the_path_whatever_it_holds() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        for (url, lens, wanted) in [
            ("http://w:8081", "a:b", "http://w:8081/control/v1/lenses/a:b/pin"),
            ("http://w:8081/", "a/../b?c#d", "http://w:8081/control/v1/lenses/a%2F..%2Fb%3Fc%23d/pin"),
            ("http://w/proxy/8081/", "a:b", "http://w/proxy/8081/control/v1/lenses/a:b/pin"),
        ] {
            let client = Client::new(url.parse().unwrap(), None).unwrap();
            let request = client.request(Method::POST, &["lenses", lens, "pin"]).build().unwrap();
            assert_eq!(request.url().as_str(), wanted);
        }
    }
}
