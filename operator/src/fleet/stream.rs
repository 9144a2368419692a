//! One worker's state stream: open, read, reconnect.

use std::{sync::Arc, time::Duration};

use bytes::{Buf, Bytes, BytesMut};
use futures::{Stream, StreamExt};
use tokio::{sync::Semaphore, time::Instant};
use turret_crds::report::StateEvent;

use super::{Endpoint, Sink};
use crate::keys::KeyError;

/// A worker sends a heartbeat every few seconds; a stream that is silent this long is dead.
const SILENCE: Duration = Duration::from_secs(15);
/// Longest time to open a stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// A stream that was open this long was good.
const GOOD: Duration = Duration::from_secs(1);
/// Pauses between attempts to open a stream grow from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Longest line: a snapshot of 16 groups × 256 lenses is about 2 MB.
const MAX_LINE_BYTES: usize = 32 << 20;

/// Why a stream ended or could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// No token could be made.
    #[error("failed to make a token")]
    Token(#[from] KeyError),
    /// The worker cannot be reached, or the connection broke.
    #[error("failed to reach the worker's control port: {0}")]
    Connection(String),
    /// The worker answered, but not with a stream.
    #[error("the worker's control port answered {0}")]
    Refused(http::StatusCode),
    /// Nothing was heard for too long.
    #[error("the worker said nothing for {} s", SILENCE.as_secs())]
    Silent,
    /// The worker closed the stream.
    #[error("the worker closed its state stream")]
    Ended,
    /// A line cannot be understood.
    #[error("the worker's state stream cannot be read: {0}")]
    Malformed(String),
}

/// Reads the stream of a worker for ever. Ends only by being aborted.
pub(super) async fn follow<A: Clone>(
    http: reqwest::Client,
    endpoint: Arc<Endpoint<A>>,
    sink: Sink<A>,
    first_reports: Arc<Semaphore>,
) {
    let mut pause = BACKOFF.0;
    loop {
        let started = Instant::now();
        let mut opened = false;
        let error = read(&http, &endpoint, &sink, &first_reports, &mut opened).await;
        tracing::debug!(worker = %endpoint.id, %error, "state stream ended");
        if opened {
            pause = BACKOFF.0;
        }
        // A stream that was good and breaks is opened again at once; only if that fails is the
        // worker lost, so that a passing break is not noticed.
        if opened && started.elapsed() >= GOOD && !matches!(error, StreamError::Malformed(_)) {
            continue;
        }
        sink.lost(&endpoint.id, &error.to_string());
        let jitter = rand::random_range(0.8..1.2);
        tokio::time::sleep(pause.mul_f64(jitter)).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

async fn read<A: Clone>(
    http: &reqwest::Client,
    endpoint: &Endpoint<A>,
    sink: &Sink<A>,
    first_reports: &Semaphore,
    opened: &mut bool,
) -> StreamError {
    let lines = match tokio::time::timeout(OPEN_TIMEOUT, open(http, endpoint)).await {
        Ok(Ok(body)) => body,
        Ok(Err(error)) => return error,
        Err(_) => return StreamError::Connection("it did not answer in time".into()),
    };
    let mut lines = std::pin::pin!(Lines { body: lines, buffer: BytesMut::new() });
    // Only now: a worker that cannot be reached is not to keep others from being heard.
    let mut place = Some(first_reports.acquire().await.expect("the semaphore is never closed"));
    loop {
        let line = match tokio::time::timeout(SILENCE, lines.next()).await {
            Ok(Ok(Some(line))) => line,
            Ok(Ok(None)) => return StreamError::Ended,
            Ok(Err(error)) => return error,
            Err(_) => return StreamError::Silent,
        };
        match serde_json::from_slice::<StateEvent>(&line) {
            Ok(StateEvent::Snapshot(report)) => {
                *opened = true;
                drop(place.take());
                sink.opened(&endpoint.id, *report);
            }
            Ok(StateEvent::Change(_)) if !*opened => {
                return StreamError::Malformed("a change came before the snapshot".into());
            }
            Ok(StateEvent::Change(change)) => sink.changed(&endpoint.id, change),
            Ok(StateEvent::Heartbeat) => {}
            Err(error) => return StreamError::Malformed(error.to_string()),
        }
    }
}

type Body = futures::stream::BoxStream<'static, reqwest::Result<Bytes>>;

async fn open<A>(http: &reqwest::Client, endpoint: &Endpoint<A>) -> Result<Body, StreamError> {
    let mut request = http.get(format!("{}/control/v1/state?watch=true", endpoint.control_url));
    if let Some(token) = endpoint.token.bearer()? {
        request = request.bearer_auth(token);
    }
    let response = request.send().await.map_err(connection)?;
    if !response.status().is_success() {
        return Err(StreamError::Refused(response.status()));
    }
    Ok(response.bytes_stream().boxed())
}

/// The innermost cause says what a person needs ("connection refused"); the rest repeats the URL.
fn connection(error: reqwest::Error) -> StreamError {
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    StreamError::Connection(cause.to_string())
}

/// Cuts a body into lines.
struct Lines<S> {
    body: S,
    buffer: BytesMut,
}

impl<S: Stream<Item = reqwest::Result<Bytes>> + Unpin> Lines<S> {
    async fn next(&mut self) -> Result<Option<Bytes>, StreamError> {
        let mut searched = 0;
        loop {
            if let Some(at) = self.buffer[searched..].iter().position(|b| *b == b'\n') {
                let line = self.buffer.split_to(searched + at).freeze();
                self.buffer.advance(1);
                if line.is_empty() {
                    searched = 0;
                    continue;
                }
                return Ok(Some(line));
            }
            searched = self.buffer.len();
            if searched > MAX_LINE_BYTES {
                return Err(StreamError::Malformed(format!("a line is longer than {MAX_LINE_BYTES} bytes")));
            }
            match self.body.next().await {
                Some(chunk) => self.buffer.extend_from_slice(&chunk.map_err(connection)?),
                None => return Ok(None),
            }
        }
    }
}
