//! The short way of a document to its workers: `PUT /control/v1/document`.
//!
//! The ConfigMap is the long and durable way; this one makes a change be served at once. Both are
//! idempotent, so a push that is lost, doubled or late does no harm.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use http::{StatusCode, header};
use parking_lot::Mutex;
use turret_crds::{WorkerReport, hints::Hints};

use crate::{
    controllers::wakes::Key,
    fleet::{Endpoint, WorkerId},
    keys::KeyError,
};

/// A worker that was given a document and does not report it is given it again after this long.
pub const AGAIN: Duration = Duration::from_secs(10);
/// Longest time one push may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Workers that are written to at the same time.
const AT_ONCE: usize = 32;

/// What became of a push.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// No token could be made.
    #[error("failed to make a token")]
    Token(#[from] KeyError),
    /// The worker cannot be reached.
    #[error("failed to reach the worker's control port")]
    Connection(#[source] reqwest::Error),
    /// The worker has another document of the same sequence.
    #[error("the worker has another document of the same sequence: {0}")]
    Conflict(String),
    /// The worker does not take it.
    #[error("the worker answered {0}: {1}")]
    Refused(StatusCode, String),
}

/// Which worker was given which document when. Forgetting it costs a push that changes nothing.
#[derive(Default)]
pub struct Pushes(Mutex<HashMap<WorkerId, (String, DocumentKey, Instant)>>);

type DocumentKey = (u64, String, u64);

/// What is given to workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer<'a> {
    /// Sequence of the document.
    pub sequence: u64,
    /// Its digest.
    pub digest: &'a str,
    /// Version of the hints in it; 0 without any.
    pub hints_version: u64,
}

/// Whether a worker has older hints than these. One of a version that takes none says nothing of them.
pub fn lacks_hints(report: &WorkerReport, hints: Option<&Hints>) -> bool {
    let has = report.state.hints_version;
    hints.zip(has).is_some_and(|(hints, has)| has < hints.version)
}

impl Pushes {
    /// Whether this life of the worker was given the document a moment ago; notes that it is now.
    fn is_due(&self, id: &WorkerId, report: &WorkerReport, offer: Offer<'_>, now: Instant) -> bool {
        let mut pushes = self.0.lock();
        pushes.retain(|_, (_, _, at)| now.duration_since(*at) < AGAIN);
        let key = (offer.sequence, offer.digest.to_owned(), offer.hints_version);
        let entry = (report.worker.instance.clone(), key);
        let known = pushes.get(id).is_some_and(|(instance, key, _)| (instance, key) == (&entry.0, &entry.1));
        if !known {
            pushes.insert(id.clone(), (entry.0, entry.1, now));
        }
        !known
    }

    /// Lets a worker be written to again at once.
    fn forget(&self, id: &WorkerId) {
        self.0.lock().remove(id);
    }
}

/// A worker to write to, and what it said last.
pub struct Recipient {
    /// Where it is.
    pub endpoint: std::sync::Arc<Endpoint<Key>>,
    /// What it said last.
    pub report: std::sync::Arc<WorkerReport>,
}

/// Gives the document with its hints to all of these workers, but to none twice within [`AGAIN`]. Returns the
/// failures, and how many took it.
pub async fn push(
    http: &reqwest::Client,
    pushes: &Pushes,
    offer: Offer<'_>,
    json: Bytes,
    recipients: Vec<Recipient>,
) -> (Vec<(WorkerId, PushError)>, usize) {
    let now = Instant::now();
    let due = recipients.into_iter().filter(|r| pushes.is_due(&r.endpoint.id, &r.report, offer, now));
    let results = stream::iter(due).map(|recipient| {
        let json = json.clone();
        async move {
            let sent = send(http, &recipient.endpoint, json).await;
            (recipient.endpoint.id.clone(), sent)
        }
    });
    let (mut failures, mut sent) = (Vec::new(), 0);
    let mut results = results.buffer_unordered(AT_ONCE);
    while let Some((id, result)) = results.next().await {
        match result {
            Ok(()) => sent += 1,
            Err(error) => {
                pushes.forget(&id);
                failures.push((id, error));
            }
        }
    }
    (failures, sent)
}

async fn send(http: &reqwest::Client, endpoint: &Endpoint<Key>, json: Bytes) -> Result<(), PushError> {
    let mut response = put(http, endpoint, json.clone(), endpoint.token.bearer()?).await?;
    // The document that tells of a new key must be shown with the one before it.
    if response.status() == StatusCode::UNAUTHORIZED
        && let Some(previous) = endpoint.token.previous_bearer()?
    {
        response = put(http, endpoint, json, Some(previous)).await?;
    }
    let status = response.status();
    if status.is_success() {
        return Ok(());
    }
    let mut text = response.text().await.unwrap_or_default();
    text.truncate(text.char_indices().nth(300).map_or(text.len(), |(at, _)| at));
    Err(match status {
        StatusCode::CONFLICT => PushError::Conflict(text),
        _ => PushError::Refused(status, text),
    })
}

async fn put(
    http: &reqwest::Client,
    endpoint: &Endpoint<Key>,
    json: Bytes,
    token: Option<std::sync::Arc<str>>,
) -> Result<reqwest::Response, PushError> {
    let mut request = http
        .put(format!("{}/control/v1/document", endpoint.control_url))
        .header(header::CONTENT_TYPE, "application/json")
        .timeout(TIMEOUT)
        .body(json);
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    request.send().await.map_err(PushError::Connection)
}
