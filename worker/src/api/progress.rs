//! What a request waits for, told to its client while it waits.
//!
//! Who asks for a stream with `stream_options.include_progress` has the head of the answer after [`PATIENCE`] at the latest,
//! and then comments, which every SSE client skips: `: turret {"switch": …}`. What would have been the status of a refusal
//! is an error event from then on, so only those who ask for it are told.

use std::convert::Infallible;
use std::pin::Pin;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::{IntoResponse, Response};
use futures::StreamExt;
use http::HeaderMap;
use serde_json::{Value, json};
use tokio::time::{Instant, MissedTickBehavior};
use turret_crds::model_name::ModelName;
use turret_crds::report::{Tier, WorkerReport};

use super::App;
use super::error::ApiError;
use super::text::{Begun, DONE, Ended, event, event_stream_headers};

/// A request that is answered or refused within this time has an ordinary answer.
const PATIENCE: Duration = Duration::from_secs(1);
/// Comments are no closer than this.
const PACE: Duration = Duration::from_millis(500);
/// The last comment is repeated after this long, so that no proxy takes the stream for dead.
const SILENCE: Duration = Duration::from_secs(10);

/// An answer that is about to begin.
type Begins = Pin<Box<dyn Future<Output = Result<Begun, ApiError>> + Send>>;

/// Waits until the answer begins. When that takes long, what it waits for is sent meanwhile.
pub(super) async fn told(
    app: &App,
    model: ModelName,
    mut begins: Begins,
    mut ended: Ended,
) -> Result<Response, ApiError> {
    let headers;
    let body = match tokio::time::timeout(PATIENCE, &mut begins).await {
        Ok(begun) => {
            let begun = begun.map_err(|e| ended.failed(e))?;
            headers = begun.headers();
            Body::from_stream(begun.stream(ended))
        }
        Err(_) => {
            // What answers is not known yet; each chunk names it.
            headers = HeaderMap::new();
            Body::from_stream(waiting(app.clone(), model, begins, ended))
        }
    };
    Ok((event_stream_headers(headers), body).into_response())
}

fn waiting(
    app: App,
    model: ModelName,
    mut begins: Begins,
    mut ended: Ended,
) -> impl futures::Stream<Item = Result<Bytes, Infallible>> {
    async_stream::stream! {
        let mut pace = tokio::time::interval(PACE);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut said, mut said_at) = (Value::Null, Instant::now());
        let begun = loop {
            tokio::select! {
                begun = &mut begins => break begun,
                now = pace.tick() => {
                    let waits_for = waits_for(&app.residency.view().report, &model);
                    if waits_for != said || now.duration_since(said_at) >= SILENCE {
                        yield Ok(format!(": turret {waits_for}\n\n").into());
                        (said, said_at) = (waits_for, now);
                    }
                }
            }
        };
        match begun {
            Ok(begun) => {
                let mut answer = std::pin::pin!(begun.stream(ended));
                while let Some(bytes) = answer.next().await {
                    yield bytes;
                }
            }
            Err(error) => {
                yield event(&ended.failed(error).body());
                yield Ok(DONE);
            }
        }
    }
}

/// What a request for a model waits for: a switch of base, its base, its lens, or its turn. Parts of the state report.
fn waits_for(report: &WorkerReport, model: &ModelName) -> Value {
    let state = &report.state;
    if let Some(switch) = &state.switch {
        return json!({"switch": switch});
    }
    if let Some(base) =
        report.base_of(&model.group).filter(|base| state.active_base.as_ref() != Some(&base.key))
    {
        let (key, tier) = (&base.key, base.tier);
        let waiting = state.waiting_rows;
        return json!({"base": {"key": key, "state": base.state, "tier": tier, "fetch": base.fetch}, "waitingRows": waiting});
    }
    let lens = model.lens.as_deref().and_then(|lens| report.lens(&model.group, lens));
    match lens.filter(|lens| lens.tier != Tier::Device) {
        Some(lens) => {
            let name = &lens.name;
            json!({"lens": {"name": name, "state": lens.state, "tier": lens.tier, "fetch": lens.fetch}})
        }
        None => json!({"waitingRows": state.waiting_rows, "runningRows": state.running_rows}),
    }
}
