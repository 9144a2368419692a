//! A worker that computes nothing: it speaks the real state stream and does with requests as it is told.

use std::{
    collections::VecDeque,
    convert::Infallible,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{HeaderMap, StatusCode, header};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc, watch},
};
use turret_crds::{
    WorkerReport,
    document::BaseKey,
    report::{
        ArtifactState, BaseReport, DeviceReport, LensReport, StateEvent, SwitchPhase, SwitchReport, Tier,
        WorkerIdentity, WorkerState, diff,
    },
};
use turret_operator::gateway::StaticWorker;

/// The token that fake workers ask for.
pub const TOKEN: &str = "only-for-workers";

/// What a worker does with a request.
pub enum Reply {
    /// Answers with its name and the model it was asked for.
    Answer,
    /// Says no, with this status and `Retry-After`.
    Refuse(u16, Option<u64>),
    /// Sends what the test sends; `Err` breaks the connection.
    Stream(mpsc::Receiver<Result<Bytes, std::io::Error>>),
    /// Breaks the connection before the first byte of the body.
    Break,
    /// Never answers.
    Hang,
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

#[derive(Clone)]
pub struct FakeWorker {
    pub name: String,
    pub address: StaticWorker,
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    report: watch::Sender<WorkerReport>,
    script: Mutex<VecDeque<Reply>>,
    seen: Mutex<Vec<Seen>>,
    /// One permit for each request that arrived.
    arrived: Semaphore,
    /// One permit for each request that was given up by its sender.
    cancelled: Semaphore,
    /// Whether a request over another base makes it switch, one at a time.
    switches: Option<tokio::sync::Mutex<()>>,
}

/// Adds a permit unless the answer was finished.
struct Watched {
    inner: Arc<Inner>,
    finished: bool,
}

impl Watched {
    fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.finished {
            self.inner.cancelled.add_permits(1);
        }
    }
}

/// A report with these groups, each over the base named, the first one active; lenses on disk.
pub fn report(name: &str, groups: &[(&str, &str, &[&str])]) -> WorkerReport {
    let mut bases: Vec<BaseReport> = Vec::new();
    let mut lenses = Vec::new();
    for (group, base, names) in groups {
        match bases.iter_mut().find(|b| b.key.0 == *base) {
            Some(base) => base.groups.push((*group).into()),
            None => bases.push(BaseReport {
                key: BaseKey((*base).into()),
                groups: vec![(*group).into()],
                state: ArtifactState::Ready,
                tier: Tier::Disk,
                digest: None,
                revision: None,
                bytes: None,
                fetch: None,
                max_context_tokens: None,
                running_rows: 0,
                waiting_rows: 0,
            }),
        }
        lenses.extend(names.iter().map(|name| lens(group, name)));
    }
    bases.sort_by(|a, b| a.key.cmp(&b.key));
    lenses.sort_by(|a: &Arc<LensReport>, b| (&a.group, &a.name).cmp(&(&b.group, &b.name)));
    WorkerReport {
        protocol: turret_crds::document::PROTOCOL,
        worker: WorkerIdentity {
            name: name.into(),
            instance: format!("{name}-1"),
            version: "0.1.0".into(),
            device: DeviceReport { kind: "cpu".into(), name: "fake".into(), total_bytes: 0 },
        },
        state: WorkerState {
            ready: true,
            active_base: groups.first().map(|g| BaseKey(g.1.into())),
            ..WorkerState::default()
        },
        bases,
        lenses,
        aliases: Arc::default(),
    }
}

pub fn lens(group: &str, name: &str) -> Arc<LensReport> {
    LensReport::new(group, name, ArtifactState::Ready, Tier::Disk).into()
}

impl FakeWorker {
    pub async fn start(report: WorkerReport) -> Self {
        Self::run(report, true, None).await
    }

    /// One whose data port refuses connections although its state stream is fine.
    pub async fn without_data_port(report: WorkerReport) -> Self {
        Self::run(report, false, None).await
    }

    /// One that switches its base for each request that asks for another.
    pub async fn switching(report: WorkerReport) -> Self {
        Self::run(report, true, Some(tokio::sync::Mutex::default())).await
    }

    async fn run(
        report: WorkerReport,
        has_data_port: bool,
        switches: Option<tokio::sync::Mutex<()>>,
    ) -> Self {
        let name = report.worker.name.clone();
        let inner = Arc::new(Inner {
            name: name.clone(),
            report: watch::Sender::new(report),
            script: Mutex::default(),
            seen: Mutex::default(),
            arrived: Semaphore::new(0),
            cancelled: Semaphore::new(0),
            switches,
        });
        let data = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let control = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address =
            format!("http://{},http://{}", data.local_addr().unwrap(), control.local_addr().unwrap());
        let routes = Router::new()
            .route("/v1/chat/completions", post(answer))
            .route("/v1/completions", post(answer))
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(inner.clone());
        if has_data_port {
            tokio::spawn(async move { axum::serve(data, routes).await });
        }
        let routes = Router::new().route("/control/v1/state", get(state)).with_state(inner.clone());
        tokio::spawn(async move { axum::serve(control, routes).await });
        Self { name, address: address.parse().unwrap(), inner }
    }

    /// What it does with the next requests, in order; afterwards it answers.
    pub fn will(&self, replies: impl IntoIterator<Item = Reply>) {
        self.inner.script.lock().unwrap().extend(replies);
    }

    /// A stream for the next request, fed by the test.
    pub fn will_stream(&self) -> mpsc::Sender<Result<Bytes, std::io::Error>> {
        let (sender, receiver) = mpsc::channel(16);
        self.will([Reply::Stream(receiver)]);
        sender
    }

    /// Changes what it reports.
    pub fn now(&self, change: impl FnOnce(&mut WorkerReport)) {
        self.inner.report.send_modify(change);
    }

    pub fn report(&self) -> WorkerReport {
        self.inner.report.borrow().clone()
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }

    /// Waits for the next request to arrive.
    pub async fn arrival(&self) {
        self.inner.arrived.acquire().await.unwrap().forget();
    }

    /// Waits for the next request to be given up by its sender.
    pub async fn cancellation(&self) {
        self.inner.cancelled.acquire().await.unwrap().forget();
    }
}

async fn state(State(inner): State<Arc<Inner>>, headers: HeaderMap) -> Response {
    if !is_authorized(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let mut changes = inner.report.subscribe();
    let first = changes.borrow_and_update().clone();
    let line = |event: &StateEvent| {
        let mut line = serde_json::to_vec(event).unwrap();
        line.push(b'\n');
        Ok::<_, Infallible>(Bytes::from(line))
    };
    let snapshot = line(&StateEvent::Snapshot(Box::new(first.clone())));
    let rest = stream::unfold((changes, first), move |(mut changes, mut known)| async move {
        loop {
            changes.changed().await.ok()?;
            let new = changes.borrow_and_update().clone();
            let change = diff(&known, &new);
            known = new;
            if let Some(change) = change {
                return Some((line(&StateEvent::Change(change)), (changes, known)));
            }
        }
    });
    Body::from_stream(stream::iter([snapshot]).chain(rest)).into_response()
}

fn is_authorized(headers: &HeaderMap) -> bool {
    headers.get(header::AUTHORIZATION).is_some_and(|v| v == &format!("Bearer {TOKEN}"))
}

async fn answer(State(inner): State<Arc<Inner>>, request: http::Request<Body>) -> Response {
    let (parts, body) = request.into_parts();
    if !is_authorized(&parts.headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let body = axum::body::to_bytes(body, usize::MAX).await.unwrap();
    let model = parts.headers.get("x-turret-model").unwrap().to_str().unwrap().to_owned();
    let seen = Seen { path: parts.uri.path().into(), headers: parts.headers, body };
    inner.seen.lock().unwrap().push(seen);
    inner.arrived.add_permits(1);
    let watched = Watched { inner: inner.clone(), finished: false };
    let reply = inner.script.lock().unwrap().pop_front().unwrap_or(Reply::Answer);
    match reply {
        Reply::Answer => {
            if let Some(turn) = &inner.switches {
                switch(&inner, turn, &model).await;
            }
            watched.finish();
            axum::Json(serde_json::json!({"worker": inner.name, "model": model})).into_response()
        }
        Reply::Refuse(status, retry_after) => {
            watched.finish();
            let body =
                axum::Json(serde_json::json!({"error": {"message": format!("{} says no", inner.name)}}));
            let mut response = (StatusCode::from_u16(status).unwrap(), body).into_response();
            if let Some(seconds) = retry_after {
                response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
            }
            response
        }
        Reply::Stream(chunks) => {
            let chunks = stream::unfold((chunks, watched), |(mut chunks, watched)| async move {
                match chunks.recv().await {
                    Some(chunk) => Some((chunk, (chunks, watched))),
                    None => {
                        watched.finish();
                        None
                    }
                }
            });
            let headers = [
                (header::CONTENT_TYPE, "text/event-stream"),
                (header::HeaderName::from_static("keep-alive"), "9"),
            ];
            (headers, Body::from_stream(chunks)).into_response()
        }
        Reply::Break => {
            watched.finish();
            let broken = stream::iter([Err::<Bytes, _>(std::io::Error::other("told to break"))]);
            Body::from_stream(broken).into_response()
        }
        Reply::Hang => std::future::pending().await,
    }
}

/// Makes the base of the model's group the active one, visibly in the report.
async fn switch(inner: &Inner, turn: &tokio::sync::Mutex<()>, model: &str) {
    let group = model.split(':').next().unwrap();
    let wanted = inner.report.borrow().base_of(group).unwrap().key.clone();
    let _turn = turn.lock().await;
    if inner.report.borrow().state.active_base.as_ref() == Some(&wanted) {
        return;
    }
    inner.report.send_modify(|r| {
        r.state.switch = Some(SwitchReport {
            from: r.state.active_base.clone(),
            to: wanted.clone(),
            phase: SwitchPhase::Loading,
            percent: 0,
            waiting_requests: 1,
        });
    });
    tokio::task::yield_now().await;
    inner.report.send_modify(|r| {
        r.state.switch = None;
        r.state.active_base = Some(wanted);
        r.state.switches += 1;
    });
}
