//! A worker that holds nothing: it takes documents as the real one does, says that it serves them, and streams its state.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, put};
use axum::{Json, Router};
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use turret_crds::document::{PROTOCOL, Verdict, judge};
use turret_crds::report::{
    AppliedDocument, ArtifactState, BaseReport, DeviceReport, LensReport, StateEvent, Tier, WorkerIdentity,
    WorkerState, diff,
};
use turret_crds::token::{Claims, Scope};
use turret_crds::{WorkerDocument, WorkerReport};

/// Bytes that a base is said to take.
const BASE_BYTES: u64 = 6 << 20;
/// A line at least this often.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// A running worker. Ends with its token.
#[derive(Clone)]
pub struct Worker {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    document: Mutex<WorkerDocument>,
    report: watch::Sender<WorkerReport>,
    /// Documents that were offered.
    offers: AtomicU64,
    complaints: Mutex<Vec<String>>,
    stop: CancellationToken,
}

impl Worker {
    /// Serves a document on a control port at this address, until `stop`.
    pub async fn start(
        address: SocketAddr,
        name: &str,
        document: WorkerDocument,
        stop: CancellationToken,
    ) -> Result<Self> {
        let listener =
            TcpListener::bind(address).await.with_context(|| format!("failed to listen on {address}"))?;
        let inner = Arc::new(Inner {
            name: name.to_owned(),
            report: watch::Sender::new(report(name, &document)),
            document: Mutex::new(document),
            offers: AtomicU64::default(),
            complaints: Mutex::default(),
            stop: stop.clone(),
        });
        let router = Router::new()
            .route("/control/v1/state", get(state))
            .route("/control/v1/document", put(take))
            .layer(axum::extract::DefaultBodyLimit::disable())
            .with_state(inner.clone());
        let server = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
        tokio::spawn(async move { server.await });
        Ok(Self { inner })
    }

    /// Its name: that of its pod.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Has it say something else of itself, until it takes another document. Its streams tell what changed.
    pub fn change(&self, change: impl FnOnce(&mut WorkerReport)) {
        self.inner.report.send_modify(change);
    }

    /// How many documents it was offered so far, whether it took them or not.
    pub fn offers(&self) -> u64 {
        self.inner.offers.load(Ordering::Relaxed)
    }

    /// What it says of itself.
    pub fn report(&self) -> WorkerReport {
        self.inner.report.borrow().clone()
    }

    /// Requests that no operator should send: with a token that is not accepted, or with another document of the same
    /// sequence.
    pub fn complaints(&self) -> Vec<String> {
        lock(&self.inner.complaints).clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// Whoever shows no token of this worker's keys is refused, and it is remembered.
    fn check(&self, headers: &HeaderMap, what: &str) -> Result<(), Box<Response>> {
        let checked = verify(headers, &lock(&self.document));
        checked.map_err(|why| {
            lock(&self.complaints).push(format!("{}: {what}: {why}", self.name));
            Box::new((StatusCode::UNAUTHORIZED, why).into_response())
        })
    }

    fn offer(&self, document: WorkerDocument) -> Verdict {
        let mut applied = lock(&self.document);
        let offered = (document.sequence, document.digest.as_str());
        let verdict = judge(Some((applied.sequence, applied.digest.as_str())), offered);
        match verdict {
            Verdict::Take => {
                self.report.send_replace(report(&self.name, &document));
                *applied = document;
            }
            Verdict::Conflict => {
                let complaint = format!(
                    "{}: document {} is {} and another one is offered",
                    self.name, applied.sequence, applied.digest
                );
                lock(&self.complaints).push(complaint);
            }
            Verdict::Same | Verdict::Stale => {}
        }
        verdict
    }
}

/// As the real worker does, for the operator's tokens.
fn verify(headers: &HeaderMap, document: &WorkerDocument) -> Result<(), String> {
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = shown.and_then(|shown| shown.strip_prefix("Bearer ")).ok_or("there is no token")?;
    let head = jsonwebtoken::decode_header(token).map_err(|error| error.to_string())?;
    let key = document.public_keys.iter().find(|key| head.kid.as_ref() == Some(&key.id));
    let key = key.ok_or("it is signed with a key that the document does not have")?;
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.validate_nbf = true;
    validation.set_audience(&[&document.placement.uid]);
    let public = DecodingKey::from_ed_components(&key.x).map_err(|error| error.to_string())?;
    let claims = jsonwebtoken::decode::<Claims>(token, &public, &validation);
    let claims = claims.map_err(|error| error.to_string())?.claims;
    if claims.scope.min(key.scope) < Scope::Control { Err("it does not allow that".into()) } else { Ok(()) }
}

async fn take(State(inner): State<Arc<Inner>>, headers: HeaderMap, body: Bytes) -> Response {
    inner.offers.fetch_add(1, Ordering::Relaxed);
    if let Err(refused) = inner.check(&headers, "a document") {
        return *refused;
    }
    let document = match serde_json::from_slice::<WorkerDocument>(&body) {
        Ok(document) => document,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    };
    match inner.offer(document) {
        Verdict::Conflict => StatusCode::CONFLICT.into_response(),
        verdict => Json(json!({"verdict": format!("{verdict:?}")})).into_response(),
    }
}

async fn state(State(inner): State<Arc<Inner>>, headers: HeaderMap) -> Response {
    if let Err(refused) = inner.check(&headers, "its state") {
        return *refused;
    }
    let mut reports = inner.report.subscribe();
    let stop = inner.stop.clone();
    let lines = async_stream::stream! {
        let mut known = reports.borrow_and_update().clone();
        yield line(&StateEvent::Snapshot(Box::new(known.clone())));
        loop {
            tokio::select! {
                changed = reports.changed() => if changed.is_err() { return },
                () = stop.cancelled() => return,
                () = tokio::time::sleep(HEARTBEAT) => {
                    yield line(&StateEvent::Heartbeat);
                    continue;
                }
            }
            let now = reports.borrow_and_update().clone();
            if let Some(change) = diff(&known, &now) {
                known = now;
                yield line(&StateEvent::Change(change));
            }
        }
    };
    Body::from_stream(lines).into_response()
}

fn line(event: &StateEvent) -> Result<Bytes, Infallible> {
    let mut line = serde_json::to_vec(event).expect("a report is JSON");
    line.push(b'\n');
    Ok(line.into())
}

/// What a worker says that serves all of a document.
pub fn report(name: &str, document: &WorkerDocument) -> WorkerReport {
    let mut bases: Vec<BaseReport> = Vec::new();
    let mut lenses = Vec::new();
    for group in &document.groups {
        match bases.iter_mut().find(|base| base.key == group.base.key) {
            Some(base) => base.groups.push(group.name.clone()),
            None => bases.push(BaseReport {
                key: group.base.key.clone(),
                groups: vec![group.name.clone()],
                state: ArtifactState::Ready,
                tier: Tier::Device,
                digest: Some("sha256:base".into()),
                revision: None,
                bytes: Some(BASE_BYTES),
                fetch: None,
                max_context_tokens: None,
                running_rows: 0,
                waiting_rows: 0,
            }),
        }
        let ready = group.lenses.iter();
        lenses.extend(ready.map(|lens| {
            Arc::new(LensReport::new(&group.name, &lens.name, ArtifactState::Ready, Tier::Disk))
        }));
    }
    bases.sort_by(|one, other| one.key.cmp(&other.key));
    let device = DeviceReport { kind: "cpu".into(), name: "none".into(), total_bytes: 0 };
    WorkerReport {
        protocol: PROTOCOL,
        worker: WorkerIdentity {
            name: name.to_owned(),
            instance: format!("{name}-1"),
            version: "0".into(),
            device,
        },
        state: WorkerState {
            document: Some(AppliedDocument { sequence: document.sequence, digest: document.digest.clone() }),
            ready: true,
            active_base: document.default_group().map(|group| group.base.key.clone()),
            ..WorkerState::default()
        },
        bases,
        lenses,
        aliases: Arc::new(document.aliases()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::document::Family;

    fn document() -> WorkerDocument {
        let family = Family::default().group("g", "file:///base").lens("g", "b", "file:///b");
        let mut family = family.lens("g", "a", "file:///a");
        family.document()
    }

    #[test]
    fn a_worker_says_that_it_serves_all_of_its_document() {
        let document = document();
        let report = report("w", &document);
        assert!(report.serves(document.sequence, &document.digest) && report.state.ready);
        assert!(report.base_of("g").is_some_and(|base| base.state.is_ready()));
        let lenses: Vec<_> = report.lenses.iter().map(|lens| lens.name.as_str()).collect();
        assert_eq!(lenses, ["a", "b"]);
        assert!(report.lens("g", "a").is_some(), "they are sorted as their readers expect");
    }

    #[tokio::test]
    async fn it_takes_newer_documents_and_remembers_what_no_operator_should_send() {
        let first = document();
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let worker = Worker::start(address, "w", first.clone(), CancellationToken::new()).await.unwrap();
        let mut next = first.clone();
        next.sequence += 1;
        assert_eq!(worker.inner.offer(next.clone()), Verdict::Take);
        assert_eq!(worker.inner.offer(first), Verdict::Stale);
        assert_eq!(worker.inner.offer(next.clone()), Verdict::Same);
        assert!(worker.complaints().is_empty());
        assert!(worker.report().serves(next.sequence, &next.digest));
        let other = WorkerDocument { digest: "sha256:other".into(), ..next };
        assert_eq!(worker.inner.offer(other), Verdict::Conflict);
        assert_eq!(worker.complaints().len(), 1);
        assert!(worker.inner.check(&HeaderMap::new(), "its state").is_err());
        assert_eq!(worker.complaints().len(), 2);
    }
}
