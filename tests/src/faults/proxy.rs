//! What stands between one operator and the API server: it passes everything on, counts writes, and does what a fault says.
//!
//! The operator has *lives*: from a start of its process to the next. A connection belongs to the life in which it was opened,
//! and nothing of a life that is over reaches the API server any more. When a crash is due, further writes are held until the
//! process is dead, so that exactly so many were carried out.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::body::{Body, Bytes, to_bytes};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Request, Response, StatusCode, header};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures::{Stream, StreamExt as _};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};

use super::lines::{self, Act, Lines, Watched};
use super::plan::{Call, Crash, Deed, Fault, Side, Verb};
use super::record::Record;
use super::tls::Tls;

/// How long nothing is heard where requests hang.
const SILENCE: Duration = Duration::from_secs(2);
/// `Retry-After` where requests are throttled, seconds.
const RETRY_AFTER: &str = "1";
/// A watch whose events were dropped or reordered is told so after this long.
const HEALS: Duration = Duration::from_millis(1500);
/// An event that waits for the one behind it waits no longer.
const HELD: Duration = Duration::from_millis(500);
/// The operator has this long to use the answer to its last write before it is killed, unless its next write comes.
const LAST_WORDS: Duration = Duration::from_millis(300);
/// Where the clocks are set, they jump by this much, seconds.
const CLOCK_STEP: i64 = 3600;

/// The connection is broken off.
#[derive(Debug)]
struct Broken;

impl std::fmt::Display for Broken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the connection is broken off")
    }
}

impl std::error::Error for Broken {}

/// A running proxy. Ends when it is dropped.
pub struct Proxy {
    inner: Arc<Inner>,
    address: SocketAddr,
    authority: String,
    accepting: JoinHandle<()>,
}

struct Inner {
    upstream: kube::Client,
    record: Record,
    fault: Option<Fault>,
    /// One write at a time, so that none is on its way when a crash is due.
    turn: tokio::sync::Mutex<()>,
    life: watch::Sender<u64>,
    crash_is_due: Notify,
}

impl Proxy {
    /// Starts a proxy in front of what `upstream` reaches. With no fault it only counts, and crashes.
    pub async fn start(upstream: kube::Client, tls: &Tls, fault: Option<Fault>, seed: u64) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await.context("failed to listen")?;
        let address = listener.local_addr()?;
        let inner = Arc::new(Inner {
            upstream,
            record: Record::new(fault, seed),
            fault,
            turn: tokio::sync::Mutex::default(),
            life: watch::Sender::new(0),
            crash_is_due: Notify::new(),
        });
        let accepting = tokio::spawn(accept(listener, tls.clone(), inner.clone()));
        Ok(Self { inner, address, authority: tls.authority.clone(), accepting })
    }

    /// The kubeconfig of whoever is to go through it.
    pub fn kubeconfig(&self, namespace: &str) -> Value {
        let cluster = json!({
            "server": format!("https://{}", self.address),
            "certificate-authority-data": BASE64.encode(&self.authority),
        });
        json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "proxy", "cluster": cluster}],
            "users": [{"name": "proxy", "user": {}}],
            "contexts": [{"name": "proxy", "context": {
                "cluster": "proxy", "user": "proxy", "namespace": namespace,
            }}],
            "current-context": "proxy",
        })
    }

    /// What went through it.
    pub fn record(&self) -> &Record {
        &self.inner.record
    }

    /// Counts from here: the next step of a story, with a crash or without.
    pub fn begin_step(&self, crash: Option<Crash>) {
        self.inner.record.begin_step(crash);
    }

    /// Waits until the operator is to be killed.
    pub async fn crash_is_due(&self) {
        loop {
            self.inner.crash_is_due.notified().await;
            // What was told of a life before is over.
            if self.inner.record.is_crashing() {
                return;
            }
        }
    }

    /// The operator's process is dead: its connections are over, and the next one's are another life's.
    pub fn next_life(&self) {
        self.inner.life.send_modify(|life| {
            *life += 1;
            self.inner.record.begin_life(*life);
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.next_life();
    }
}

async fn accept(listener: TcpListener, tls: Tls, inner: Arc<Inner>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, inner, ending) = (tls.acceptor.clone(), inner.clone(), inner.clone());
        let life = *inner.life.borrow();
        tokio::spawn(async move {
            // What is broken off ends with a reset, not with an orderly end.
            if stream.set_nodelay(true).and_then(|()| stream.set_zero_linger()).is_err() {
                return;
            }
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = service_fn(move |request| handle(inner.clone(), life, request));
            let connection = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::select! {
                // An error is how it is broken off.
                _ = connection => {}
                () = ending.outlives(life) => {}
            }
        });
    }
}

/// What becomes of one request.
async fn handle(inner: Arc<Inner>, life: u64, request: Request<Incoming>) -> Result<Response<Body>, Broken> {
    let (parts, body) = request.into_parts();
    let body = to_bytes(Body::new(body), usize::MAX).await.map_err(|_| Broken)?;
    let call = Call::of(&parts.method, &parts.uri);
    let deed = inner.record.note(&call);
    match deed {
        Deed::Refuse(code) => return refusal(code),
        Deed::Gone => return refusal(410),
        Deed::Break(Side::Before) => return Err(Broken),
        Deed::Hang(Side::Before) => {
            sleep(SILENCE).await;
            return Err(Broken);
        }
        Deed::Pass | Deed::Break(Side::After) | Deed::Hang(Side::After) => {}
    }
    if let Some(list) = inner.record.stale_list(&call) {
        return inner.response(StatusCode::OK, list);
    }
    let answer = if call.counts() {
        inner.write(life, &call, &parts, body).await?
    } else {
        inner.forward(life, &parts, body).await?
    };
    match deed {
        Deed::Break(_) => Err(Broken),
        Deed::Hang(_) => {
            sleep(SILENCE).await;
            Err(Broken)
        }
        _ => inner.answer(life, call, answer).await,
    }
}

/// What the API server would say.
fn refusal(code: u16) -> Result<Response<Body>, Broken> {
    let mut response = Response::new(Body::from(lines::status(code).to_string()));
    *response.status_mut() = StatusCode::from_u16(code).map_err(|_| Broken)?;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    if code == 429 {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER));
    }
    Ok(response)
}

type Answer = Response<kube::client::Body>;

impl Inner {
    /// Waits until this life is over.
    async fn outlives(&self, life: u64) {
        // The sender lives as long as this.
        let _ = self.life.subscribe().wait_for(|now| *now != life).await;
    }

    /// Tells that the operator is to be killed, if this life is not over yet.
    fn crash(&self, life: u64) {
        let now = *self.life.borrow();
        if now == life && self.record.is_crashing() {
            self.crash_is_due.notify_one();
        }
    }

    async fn forward(&self, life: u64, parts: &Parts, body: Bytes) -> Result<Answer, Broken> {
        let now = *self.life.borrow();
        if now != life {
            return Err(Broken);
        }
        let mut request = Request::new(kube::client::Body::from(body));
        *request.method_mut() = parts.method.clone();
        *request.uri_mut() = parts.uri.clone();
        *request.headers_mut() = parts.headers.clone();
        for own in [header::HOST, header::CONNECTION, header::CONTENT_LENGTH, header::TRANSFER_ENCODING] {
            request.headers_mut().remove(own);
        }
        self.upstream.send(request).await.map_err(|_| Broken)
    }

    /// Carries a write out, unless a crash is due; and if it makes one due, sees to what the operator still hears.
    async fn write(
        self: &Arc<Self>,
        life: u64,
        call: &Call,
        parts: &Parts,
        body: Bytes,
    ) -> Result<Answer, Broken> {
        let turn = self.turn.lock().await;
        if self.record.is_crashing() {
            // The operator goes on: it has used the answer before.
            self.crash(life);
            self.outlives(life).await;
            return Err(Broken);
        }
        let answer = self.forward(life, parts, body).await?;
        let crash = if answer.status().is_success() { self.record.wrote(call) } else { None };
        drop(turn);
        match crash {
            None => Ok(answer),
            Some(Crash { answered: false, .. }) => {
                self.crash(life);
                self.outlives(life).await;
                Err(Broken)
            }
            Some(Crash { answered: true, .. }) => {
                let inner = self.clone();
                tokio::spawn(async move {
                    sleep(LAST_WORDS).await;
                    inner.crash(life);
                });
                Ok(answer)
            }
        }
    }

    /// Passes an answer on.
    async fn answer(
        self: Arc<Self>,
        life: u64,
        call: Call,
        answer: Answer,
    ) -> Result<Response<Body>, Broken> {
        let (mut parts, body) = answer.into_parts();
        for own in [header::CONNECTION, header::CONTENT_LENGTH, header::TRANSFER_ENCODING] {
            parts.headers.remove(own);
        }
        let body = Body::new(body);
        if call.verb == Verb::Watch && parts.status.is_success() {
            let lines = self.watch(life, call, body);
            return Ok(Response::from_parts(parts, Body::from_stream(lines)));
        }
        let mut text = to_bytes(body, usize::MAX).await.map_err(|_| Broken)?;
        if call.verb == Verb::List && parts.status.is_success() {
            self.record.listed(&call, &text);
        }
        // The Lease is written back with all its times, some of which must not change.
        if matches!(call.verb, Verb::List | Verb::Get) && !call.is_of_election() {
            text = self.by_its_clock(text);
        }
        Ok(Response::from_parts(parts, Body::from(text)))
    }

    fn response(&self, status: StatusCode, text: Bytes) -> Result<Response<Body>, Broken> {
        let mut response = Response::new(Body::from(self.by_its_clock(text)));
        *response.status_mut() = status;
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }

    /// What the API server says, with the times that its clock would give.
    fn by_its_clock(&self, text: Bytes) -> Bytes {
        if self.fault != Some(Fault::ClocksAreSet) {
            return text;
        }
        self.record.struck();
        let ahead = if self.record.step().is_multiple_of(2) { CLOCK_STEP } else { -CLOCK_STEP };
        lines::shift_times_in(text, ahead)
    }

    /// Passes a watch on, line by line.
    fn watch(
        self: Arc<Self>,
        life: u64,
        call: Call,
        body: Body,
    ) -> impl Stream<Item = Result<Bytes, Broken>> + Send + 'static {
        let following = self.record.follow(life, &call);
        let events = format!("events of {}", call.resource);
        async_stream::stream! {
            let mut body = body.into_data_stream();
            let mut lines = Lines::default();
            let mut watched = Watched::new(self.fault);
            let mut heals_at: Option<Instant> = None;
            loop {
                following.is_up_to_date(heals_at.is_none() && !watched.is_holding());
                let mut acts = Vec::new();
                tokio::select! {
                    piece = body.next() => {
                        let Some(Ok(piece)) = piece else { break };
                        for line in lines.push(&piece) {
                            if !lines::is_event(&line) {
                                acts.push(Act::Send(line));
                                continue;
                            }
                            let taken = watched.take(line, self.record.roll(&events));
                            if !matches!(taken[..], [Act::Send(_)]) {
                                self.record.struck();
                            }
                            acts.extend(taken);
                        }
                    }
                    () = sleep(HELD), if watched.is_holding() => acts.extend(watched.release()),
                    () = sleep_until(heals_at.unwrap_or_else(Instant::now)), if heals_at.is_some() => {
                        acts.push(Act::Gone);
                    }
                    () = self.outlives(life) => break,
                }
                for act in acts {
                    match act {
                        Act::Send(line) => {
                            let mut line = self.by_its_clock(line).to_vec();
                            line.push(b'\n');
                            yield Ok(Bytes::from(line));
                        }
                        Act::Wait(time) => {
                            following.is_up_to_date(false);
                            sleep(time).await;
                        }
                        Act::Hurt => {
                            heals_at.get_or_insert(Instant::now() + HEALS);
                        }
                        Act::Gone => {
                            let mut line = lines::gone().to_vec();
                            line.push(b'\n');
                            yield Ok(Bytes::from(line));
                            return;
                        }
                        Act::End => return,
                        Act::Break => {
                            yield Err(Broken);
                            return;
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
