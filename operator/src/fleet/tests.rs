//! Following a worker that speaks the golden state stream, and one that takes documents.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, put},
};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use turret_crds::{
    WorkerDocument, WorkerReport,
    document::{Verdict, judge},
    report::{AppliedDocument, Change, StateEvent},
    token::Scope,
};

use super::*;
use crate::{
    controllers::placement::push::{Offer, PushError, Pushes, Recipient, push},
    keys::{OPERATOR_ISSUER, Signer, SigningKey},
};

const STREAM: &str = include_str!("../../../crds/tests/golden/state_stream.ndjson");
const DOCUMENT: &str = include_str!("../../../crds/tests/golden/worker_document.json");

/// A worker as far as its control port goes: real state transitions, nothing computed.
#[derive(Clone)]
struct FakeWorker {
    token: Arc<str>,
    applied: watch::Sender<Option<(u64, String)>>,
    /// What each opened stream says at once; then it stays open, unless the script ends it.
    scripts: Arc<Mutex<VecDeque<Script>>>,
}

struct Script {
    lines: String,
    ends: bool,
}

fn first_report() -> WorkerReport {
    match serde_json::from_str(STREAM.lines().next().unwrap()).unwrap() {
        StateEvent::Snapshot(report) => *report,
        other => panic!("the golden stream begins with a snapshot, not {other:?}"),
    }
}

fn document() -> WorkerDocument {
    serde_json::from_str(DOCUMENT).unwrap()
}

impl FakeWorker {
    /// Serves on a port of its own; returns its control URL.
    async fn start(scripts: Vec<Script>) -> (Self, Arc<str>) {
        let worker = Self {
            token: "secret".into(),
            applied: watch::Sender::new(None),
            scripts: Arc::new(Mutex::new(scripts.into())),
        };
        let router = Router::new()
            .route("/control/v1/state", get(state))
            .route("/control/v1/document", put(take))
            .with_state(worker.clone());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        (worker, url.into())
    }

    fn allows(&self, headers: &HeaderMap) -> bool {
        headers
            .get(header::AUTHORIZATION)
            .is_some_and(|h| h.as_bytes() == format!("Bearer {}", self.token).as_bytes())
    }
}

async fn state(State(worker): State<FakeWorker>, headers: HeaderMap) -> Response {
    if !worker.allows(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let script = worker.scripts.lock().pop_front();
    let mut applied = worker.applied.subscribe();
    let lines = async_stream::stream! {
        let snapshot = serde_json::to_string(&StateEvent::Snapshot(Box::new(first_report()))).unwrap() + "\n";
        let Script { lines, ends } = script.unwrap_or(Script { lines: snapshot, ends: false });
        // Cut where no line ends: the reader must put lines together.
        for part in lines.as_bytes().chunks(97) {
            yield Ok::<_, std::convert::Infallible>(Bytes::copy_from_slice(part));
        }
        if ends {
            return;
        }
        loop {
            applied.changed().await.unwrap();
            let (sequence, digest) = applied.borrow_and_update().clone().unwrap();
            let mut state = first_report().state;
            state.document = Some(AppliedDocument { sequence, digest });
            let change = StateEvent::Change(Change { state: Some(state), ..Change::default() });
            yield Ok(Bytes::from(serde_json::to_string(&change).unwrap() + "\n"));
        }
    };
    Body::from_stream(lines).into_response()
}

async fn take(State(worker): State<FakeWorker>, headers: HeaderMap, body: Bytes) -> Response {
    if !worker.allows(&headers) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let offered: WorkerDocument = serde_json::from_slice(&body).unwrap();
    let applied = worker.applied.borrow().clone();
    let applied = applied.as_ref().map(|(sequence, digest)| (*sequence, digest.as_str()));
    match judge(applied, (offered.sequence, &offered.digest)) {
        Verdict::Take => {
            worker.applied.send_replace(Some((offered.sequence, offered.digest)));
            StatusCode::ACCEPTED.into_response()
        }
        Verdict::Same | Verdict::Stale => StatusCode::OK.into_response(),
        Verdict::Conflict => (StatusCode::CONFLICT, "applied: another digest").into_response(),
    }
}

type Attached = (String, String);

fn endpoint(url: &Arc<str>, token: &str) -> Endpoint<Attached> {
    Endpoint {
        id: WorkerId("ns/w".into()),
        control_url: url.clone(),
        token: TokenSource::Static(token.into()),
        attached: ("ns".into(), "p".into()),
    }
}

/// Sequence and digest of a document.
fn offer(document: &WorkerDocument) -> Offer<'_> {
    Offer { sequence: document.sequence, digest: &document.digest, hints_version: 0 }
}

fn json(document: &WorkerDocument) -> Bytes {
    serde_json::to_vec(document).unwrap().into()
}

fn http() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

fn fleet() -> (Fleet<Attached>, mpsc::UnboundedReceiver<Moved>) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let fleet = Fleet::new(http(), move |_, moved| {
        let _ = sender.send(moved);
    });
    (fleet, receiver)
}

/// Waits until the worker is as expected; every change wakes it up.
async fn until(
    fleet: &Fleet<Attached>,
    moves: &mut mpsc::UnboundedReceiver<Moved>,
    expected: impl Fn(&Worker<Attached>) -> bool,
) -> Worker<Attached> {
    let id = WorkerId("ns/w".into());
    let wait = async {
        loop {
            if let Some(worker) = fleet.snapshot().get(&id).filter(|w| expected(w)) {
                return worker.clone();
            }
            moves.recv().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(10), wait)
        .await
        .unwrap_or_else(|_| panic!("still {:?}", fleet.snapshot().get(&id)))
}

#[tokio::test]
async fn a_reader_of_the_golden_stream_has_exactly_the_worker_s_report() {
    let mut expected: Option<WorkerReport> = None;
    for line in STREAM.lines() {
        match serde_json::from_str(line).unwrap() {
            StateEvent::Snapshot(report) => expected = Some(*report),
            StateEvent::Change(change) => expected.as_mut().unwrap().apply(change),
            StateEvent::Heartbeat => {}
        }
    }
    let expected = expected.unwrap();
    let (_, url) = FakeWorker::start(vec![Script { lines: STREAM.into(), ends: false }]).await;
    let (fleet, mut moves) = fleet();
    fleet.follow(endpoint(&url, "secret"));
    let worker = until(&fleet, &mut moves, |w| w.report.as_deref() == Some(&expected)).await;
    assert_eq!(worker.believed().map(|r| &**r), Some(&expected));
}

#[tokio::test]
async fn first_reports_are_read_a_few_at_a_time() {
    let silent = || Script { lines: String::new(), ends: false };
    let snapshot = serde_json::to_string(&StateEvent::Snapshot(Box::new(first_report()))).unwrap() + "\n";
    let (_, first) = FakeWorker::start(vec![silent()]).await;
    let (second, url) = FakeWorker::start(vec![Script { lines: snapshot, ends: false }]).await;
    let (fleet, mut moves) = fleet();
    let fleet = fleet.reading_at_once(1);
    let asked = async {
        let id = WorkerId("ns/first".into());
        fleet.follow(Endpoint { id: id.clone(), ..endpoint(&first, "secret") });
        while fleet.first_reports.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        fleet.follow(endpoint(&url, "secret"));
        while !second.scripts.lock().is_empty() {
            tokio::task::yield_now().await;
        }
        id
    };
    let id = tokio::time::timeout(Duration::from_secs(10), asked).await.expect("both are asked");
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(fleet.snapshot()[&WorkerId("ns/w".into())].link, Link::Connecting, "it waits for its turn");
    fleet.forget(&id);
    until(&fleet, &mut moves, |w| w.believed().is_some()).await;
    assert_eq!(fleet.first_reports.available_permits(), 1, "what has been read takes no place");
}

#[tokio::test]
async fn a_worker_that_refuses_or_cannot_be_reached_is_lost_and_says_why() {
    let (_, url) = FakeWorker::start(vec![]).await;
    let (fleet, mut moves) = fleet();
    fleet.follow(endpoint(&url, "wrong"));
    let why = |w: &Worker<Attached>| match &w.link {
        Link::Lost(why) => why.to_string(),
        other => format!("{other:?}"),
    };
    let worker = until(&fleet, &mut moves, |w| matches!(w.link, Link::Lost(_))).await;
    assert!(why(&worker).contains("401"), "{}", why(&worker));
    // The same worker with another token is asked again.
    fleet.follow(endpoint(&url, "secret"));
    until(&fleet, &mut moves, |w| w.believed().is_some()).await;
    fleet.follow(endpoint(&"http://127.0.0.1:9".into(), "secret"));
    let worker = until(&fleet, &mut moves, |w| matches!(w.link, Link::Lost(_))).await;
    assert!(why(&worker).contains("refused"), "{}", why(&worker));
    assert!(worker.believed().is_none());
}

#[tokio::test]
async fn a_broken_stream_is_opened_again_and_starts_from_a_snapshot() {
    let ended = Script { lines: STREAM.into(), ends: true };
    let broken = Script { lines: STREAM.lines().next().unwrap().to_owned() + "\nnonsense\n", ends: false };
    let (_, url) = FakeWorker::start(vec![ended, broken]).await;
    let (fleet, mut moves) = fleet();
    fleet.follow(endpoint(&url, "secret"));
    until(&fleet, &mut moves, |w| matches!(&w.link, Link::Lost(why) if why.contains("cannot be read"))).await;
    let worker = until(&fleet, &mut moves, |w| w.link == Link::Open).await;
    assert_eq!(worker.report.as_deref(), Some(&first_report()));
}

#[tokio::test]
async fn a_pushed_document_is_reported_back_and_a_conflict_is_told() {
    let (fake, url) = FakeWorker::start(vec![]).await;
    let (fleet, mut moves) = fleet();
    fleet.follow(endpoint(&url, "secret"));
    let worker = until(&fleet, &mut moves, |w| w.believed().is_some()).await;

    let (http, pushes) = (http(), Pushes::default());
    let to = |worker: &Worker<Attached>| {
        vec![Recipient { endpoint: worker.endpoint.clone(), report: worker.believed().unwrap().clone() }]
    };
    let document = document();
    let (wanted, json) = (offer(&document), json(&document));
    let (failures, sent) = push(&http, &pushes, wanted, json.clone(), to(&worker)).await;
    assert!(failures.is_empty() && sent == 1, "{failures:?}");
    // Before it reports it, it is not given it again.
    assert_eq!(push(&http, &pushes, wanted, json.clone(), to(&worker)).await.1, 0);
    let advised = Offer { hints_version: 1, ..wanted };
    assert_eq!(push(&http, &pushes, advised, json, to(&worker)).await.1, 1, "newer hints are something else");
    let serves =
        |w: &Worker<Attached>| w.believed().is_some_and(|r| r.serves(wanted.sequence, wanted.digest));
    let worker = until(&fleet, &mut moves, serves).await;

    let mut other = document.clone();
    other.default_group = Some("llama".into());
    other.digest = other.compute_digest();
    let (failures, _) = push(&http, &pushes, offer(&other), self::json(&other), to(&worker)).await;
    assert!(
        matches!(&failures[..], [(_, PushError::Conflict(says))] if says.contains("another digest")),
        "{failures:?}"
    );
    assert_eq!(fake.applied.borrow().as_ref().unwrap().1, document.digest, "the applied one stays");
}

#[tokio::test]
async fn only_workers_that_are_wanted_are_followed() {
    let (_, url) = FakeWorker::start(vec![]).await;
    let (fleet, mut moves) = fleet();
    fleet.follow_exactly([endpoint(&url, "secret")]);
    let opened = until(&fleet, &mut moves, |w| w.link == Link::Open).await;
    fleet.follow_exactly([endpoint(&url, "secret")]);
    let kept = fleet.snapshot()[&opened.endpoint.id].clone();
    assert!(Arc::ptr_eq(&kept.endpoint, &opened.endpoint), "an unchanged worker goes on undisturbed");
    let renamed = Endpoint { attached: ("ns".into(), "q".into()), ..endpoint(&url, "secret") };
    fleet.follow_exactly([renamed]);
    let now = fleet.snapshot()[&opened.endpoint.id].clone();
    assert_eq!((now.endpoint.attached.1.as_str(), now.link), ("q", Link::Open));
    fleet.follow_exactly([]);
    assert!(fleet.snapshot().is_empty());
}

#[test]
fn traffic_is_told_from_what_matters_to_a_status() {
    let mut report: Option<WorkerReport> = None;
    let mut moved = Vec::new();
    for line in STREAM.lines() {
        match serde_json::from_str(line).unwrap() {
            StateEvent::Snapshot(first) => report = Some(*first),
            StateEvent::Change(change) => {
                let report = report.as_mut().unwrap();
                moved.push(what_moved(report, &change));
                report.apply(change);
            }
            StateEvent::Heartbeat => {}
        }
    }
    assert_eq!(moved[0], Moved::Holdings, "a document was applied");
    let report = report.unwrap();
    let mut state = report.state.clone();
    state.running_rows += 1;
    let mut lens = report.lenses[0].clone();
    Arc::make_mut(&mut lens).served += 1;
    let traffic = Change { state: Some(state.clone()), lenses: vec![lens.clone()], ..Change::default() };
    assert_eq!(what_moved(&report, &traffic), Moved::Traffic);
    let aliases = Change { aliases: Some(Arc::default()), ..Change::default() };
    assert_eq!(what_moved(&report, &aliases), Moved::Holdings);
    state.ready = !state.ready;
    assert_eq!(what_moved(&report, &Change { state: Some(state), ..Change::default() }), Moved::Holdings);
}

#[test]
fn endpoints_signed_by_the_same_signer_are_the_same_place() {
    let signer = Arc::new(Signer::new(OPERATOR_ISSUER, Scope::Control, SigningKey::generate()));
    let signed = |uid: &str| Endpoint {
        token: TokenSource::Signed { signer: signer.clone(), placement_uid: uid.into() },
        ..endpoint(&"http://h".into(), "")
    };
    assert!(same_place(&signed("a"), &signed("a")));
    assert!(!same_place(&signed("a"), &signed("b")));
    assert!(!same_place(&signed("a"), &endpoint(&"http://h".into(), "secret")));
}
