//! The control port: documents in, state out, drain.

use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use turret_crds::WorkerDocument;
use turret_crds::document::Verdict;
use turret_crds::report::{StateEvent, diff};

use super::App;
use super::error::ApiError;
use crate::document;

/// Changes within this time travel together.
const COALESCE: Duration = Duration::from_millis(50);
/// A line at least this often.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// What came of an offered document.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Offered {
    /// `Taken`, `Same` or `Stale`.
    verdict: &'static str,
    /// Sequence of the document that was applied last in all its parts.
    applied_sequence: Option<u64>,
}

/// `PUT /control/v1/document`.
pub async fn put_document(State(app): State<App>, body: Bytes) -> Result<Response, ApiError> {
    let document: WorkerDocument = serde_json::from_slice(&body)
        .map_err(|e| ApiError::invalid(None, format!("the body is not a worker document: {e}")))?;
    document::check(&document).map_err(|e| ApiError::invalid(None, e.to_string()))?;
    let (sequence, digest) = (document.sequence, document.digest.clone());
    let verdict = app.residency.offer(document).await;
    let applied_sequence = app.residency.view().report.state.document.as_ref().map(|d| d.sequence);
    let offered = |verdict| Json(Offered { verdict, applied_sequence }).into_response();
    match verdict {
        Verdict::Take => Ok(offered("Taken")),
        Verdict::Same => Ok(offered("Same")),
        Verdict::Stale => Ok(offered("Stale")),
        Verdict::Conflict => Err(ApiError::conflict(format!(
            "another document with sequence {sequence} is applied, this one has digest {digest}; somebody else writes documents too"
        ))),
    }
}

/// Query of `GET /control/v1/state`.
#[derive(Debug, Default, Deserialize)]
pub struct StateQuery {
    /// Stream the changes too.
    #[serde(default)]
    watch: bool,
}

/// `GET /control/v1/state`.
pub async fn get_state(State(app): State<App>, Query(query): Query<StateQuery>) -> Response {
    if query.watch { watch_state(app) } else { Json(app.residency.view().report.clone()).into_response() }
}

fn watch_state(app: App) -> Response {
    let lines = async_stream::stream! {
        let mut view = app.residency.watch();
        let mut last = view.borrow_and_update().report.clone();
        yield line(&StateEvent::Snapshot(Box::new(last.clone())));
        let mut heartbeat = Instant::now() + HEARTBEAT;
        loop {
            let ends = tokio::select! {
                changed = view.changed() => changed.is_err(),
                () = tokio::time::sleep_until(heartbeat) => {
                    heartbeat = Instant::now() + HEARTBEAT;
                    yield line(&StateEvent::Heartbeat);
                    continue;
                }
                () = app.stop.cancelled() => true,
            };
            if !ends {
                tokio::time::sleep(COALESCE).await;
            }
            let now = view.borrow_and_update().report.clone();
            if let Some(change) = diff(&last, &now) {
                last = now;
                heartbeat = Instant::now() + HEARTBEAT;
                yield line(&StateEvent::Change(change));
            }
            if ends {
                return;
            }
        }
    };
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson"), (header::CACHE_CONTROL, "no-store")];
    (StatusCode::OK, headers, Body::from_stream(lines)).into_response()
}

fn line(event: &StateEvent) -> Result<Bytes, std::convert::Infallible> {
    let mut line = serde_json::to_vec(event).expect("a report is JSON");
    line.push(b'\n');
    Ok(line.into())
}

/// `POST /control/v1/drain`: reports the worker as leaving and refuses new requests from now on. It does not end; SIGTERM
/// does that.
pub async fn drain(State(app): State<App>) -> StatusCode {
    app.residency.drain(true);
    StatusCode::ACCEPTED
}
