//! One gateway's stream: open, read, reconnect.

use std::{io, sync::Arc, time::Duration};

use futures::{StreamExt, TryStreamExt};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::{
    codec::{FramedRead, LinesCodec},
    io::StreamReader,
};

use super::{AUDIENCE, Line, PATH, Sink};
use crate::{
    keys::{KeyError, Signer},
    telemetry::chain,
};

/// A gateway sends something every few seconds; a stream that is silent this long is dead.
const SILENCE: Duration = Duration::from_secs(15);
/// Longest time to open a stream.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Pauses between attempts to open a stream grow from the first to the second.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A gateway that cannot be heard for this long is told of: until then it may just be starting.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest line: ten thousand placements with the longest names are 2 MB.
const MAX_LINE_BYTES: usize = 8 << 20;

/// Why a stream ended or could not be opened.
#[derive(Debug, thiserror::Error)]
enum StreamError {
    #[error("failed to make a token")]
    Token(#[from] KeyError),
    #[error("failed to reach the gateway: {0}")]
    Connection(String),
    #[error("the gateway answered {0}")]
    Refused(http::StatusCode),
    #[error("the gateway said nothing for {} s", SILENCE.as_secs())]
    Silent,
    #[error("the gateway closed its stream")]
    Ended,
    #[error("the gateway's stream cannot be read: {0}")]
    Malformed(String),
}

/// Reads the stream of a gateway for ever. Ends only by being aborted.
pub(super) async fn follow(http: reqwest::Client, url: Arc<str>, signer: Arc<Signer>, sink: Sink) {
    let mut pause = BACKOFF.0;
    let mut heard_last = Instant::now();
    let mut is_told = false;
    loop {
        let error = read(&http, &url, &signer, &sink).await;
        tracing::debug!(gateway = %sink.id, error = %chain(&error), "stream of a gateway ended");
        if sink.lost() {
            (pause, heard_last, is_told) = (BACKOFF.0, Instant::now(), false);
        }
        if !is_told && heard_last.elapsed() >= PATIENCE {
            is_told = true;
            tracing::warn!(gateway = %sink.id, %url, error = %chain(&error),
                "a gateway does not tell what waits there: its requests wake no placement that was scaled to zero");
        }
        sleep(pause.mul_f64(rand::random_range(0.8..1.2))).await;
        pause = (pause * 2).min(BACKOFF.1);
    }
}

async fn read(http: &reqwest::Client, url: &str, signer: &Signer, sink: &Sink) -> StreamError {
    let token = match signer.token(AUDIENCE) {
        Ok(token) => token,
        Err(error) => return error.into(),
    };
    let request = http.get(format!("{url}{PATH}")).bearer_auth(token);
    let response = match timeout(OPEN_TIMEOUT, request.send()).await {
        Ok(Ok(response)) if response.status().is_success() => response,
        Ok(Ok(response)) => return StreamError::Refused(response.status()),
        Ok(Err(error)) => return StreamError::Connection(chain(&error)),
        Err(_) => return StreamError::Connection("it did not answer in time".into()),
    };
    let body = StreamReader::new(response.bytes_stream().map_err(io::Error::other).boxed());
    let mut lines = FramedRead::new(body, LinesCodec::new_with_max_length(MAX_LINE_BYTES));
    let mut is_first = true;
    loop {
        let line = match timeout(SILENCE, lines.next()).await {
            Ok(Some(Ok(line))) => line,
            Ok(Some(Err(error))) => return StreamError::Malformed(error.to_string()),
            Ok(None) => return StreamError::Ended,
            Err(_) => return StreamError::Silent,
        };
        let line: Line = match serde_json::from_str(&line) {
            Ok(line) => line,
            Err(error) => return StreamError::Malformed(error.to_string()),
        };
        if std::mem::take(&mut is_first) {
            sink.opened(line);
        } else {
            sink.changed(line);
        }
    }
}
