//! What waits, told to the operator as it changes.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use http::{HeaderMap, StatusCode, header};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::App;
use crate::{
    demand::{AUDIENCE, Line},
    gateway::demand::{Demands, news},
    keys::OPERATOR_ISSUER,
};

/// Lines are at least this far apart.
const SPACING: Duration = Duration::from_millis(100);
/// Something is sent at least this often.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// `GET /internal/v1/demand`, see [`crate::demand`].
pub async fn watch(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let shown = shown.and_then(|value| value.strip_prefix("Bearer "));
    let is_operator = shown
        .zip(app.signer.get())
        .is_some_and(|(token, signer)| signer.admits(token, OPERATOR_ISSUER, AUDIENCE));
    if !is_operator {
        return (StatusCode::UNAUTHORIZED, "this path is for the operator, which has a token\n")
            .into_response();
    }
    let body = Body::from_stream(lines(app).map(Ok::<_, Infallible>));
    ([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response()
}

/// First everything, then what changes. Ends when the gateway is stopping and nobody waits any more.
fn lines(app: Arc<App>) -> impl Stream<Item = Bytes> + Send + 'static {
    async_stream::stream! {
        let [mut waiting, mut sends] = app.proxy.demand_changes();
        let mut stopping = app.stopping.clone();
        let mut told = Demands::new();
        let mut last: Option<Instant> = None;
        loop {
            waiting.mark_unchanged();
            sends.mark_unchanged();
            let is_stopping = *stopping.borrow_and_update();
            let now = app.proxy.demands();
            let line = news(&told, &now);
            told = now;
            if !line.placements.is_empty() || last.is_none_or(|last| last.elapsed() >= HEARTBEAT) {
                last = Some(Instant::now());
                yield to_bytes(&line);
            }
            if is_stopping && told.values().all(|(waiting, _)| *waiting == 0) {
                return;
            }
            sleep(SPACING).await;
            let rest = last.map_or(Duration::ZERO, |last| HEARTBEAT.saturating_sub(last.elapsed()));
            // Either way it is looked again.
            let _ = timeout(rest, moved(&mut waiting, &mut sends, &mut stopping)).await;
        }
    }
}

async fn moved(
    waiting: &mut watch::Receiver<u64>,
    sends: &mut watch::Receiver<u64>,
    stopping: &mut watch::Receiver<bool>,
) {
    tokio::select! {
        _ = waiting.changed() => {}
        _ = sends.changed() => {}
        _ = stopping.changed() => {}
    }
}

fn to_bytes(line: &Line) -> Bytes {
    let mut json = serde_json::to_vec(line).expect("names and numbers are JSON");
    json.push(b'\n');
    json.into()
}
