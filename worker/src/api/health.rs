//! Probes, version and metrics. Nothing here asks for a token.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use parking_lot::Mutex;
use serde_json::json;
use tokio::time::Instant;

use super::App;
use crate::engine::handle::EngineHandle;

/// An engine with rows that computes no layer and takes no command for this long is stuck.
const STUCK: Duration = Duration::from_secs(60);

/// Watches the engine's heartbeat from probe to probe.
#[derive(Debug)]
pub struct Liveness(Mutex<(u64, Instant)>);

impl Liveness {
    /// From now on.
    pub fn new() -> Self {
        Self(Mutex::new((0, Instant::now())))
    }

    fn is_alive(&self, engine: &EngineHandle) -> bool {
        let (heartbeat, snapshot) = (engine.heartbeat(), engine.snapshot());
        let idle = snapshot.running_rows == 0 && snapshot.waiting_rows == 0;
        let mut last = self.0.lock();
        if idle || last.0 != heartbeat {
            *last = (heartbeat, Instant::now());
        }
        engine.is_running() && last.1.elapsed() < STUCK
    }
}

impl Default for Liveness {
    fn default() -> Self {
        Self::new()
    }
}

/// `GET /livez`: the engine moves.
pub async fn livez(State(app): State<App>) -> Response {
    match app.liveness.is_alive(&app.engine) {
        true => "ok\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "the engine is stuck\n").into_response(),
    }
}

/// `GET /readyz` and `GET /health`: the worker's warm-up is over, and it is not leaving.
pub async fn readyz(State(app): State<App>) -> Response {
    let view = app.residency.view();
    let state = &view.report.state;
    let why = match (state.ready, state.draining) {
        (true, _) => return "ok\n".into_response(),
        (false, true) => "draining\n".to_owned(),
        (false, false) => {
            let failed = view.report.bases.iter().find_map(|b| match &b.state {
                turret_crds::report::ArtifactState::Failed { reason, message, .. } => {
                    Some(format!("{reason}: {message}\n"))
                }
                _ => None,
            });
            failed.unwrap_or_else(|| match state.active_base {
                Some(_) => "lenses are being loaded ahead of requests\n".to_owned(),
                None => "the base is being loaded\n".to_owned(),
            })
        }
    };
    (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
}

/// `GET /version`.
pub async fn version(State(app): State<App>) -> Response {
    let view = app.residency.view();
    let worker = &view.report.worker;
    Json(json!({"version": worker.version, "name": worker.name, "instance": worker.instance})).into_response()
}

/// `GET /metrics`.
pub async fn metrics(State(app): State<App>) -> Response {
    let text = app.metrics.text(&app.residency.view(), &app.engine.snapshot());
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
