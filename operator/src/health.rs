//! `/livez`, `/readyz`, `/metrics` and `/loglevel` of the operator.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};

use crate::{log_level, metrics::Metrics, telemetry::LogFilter};

/// What the endpoints tell.
#[derive(Clone)]
pub struct Health {
    /// The metrics.
    pub metrics: Metrics,
    synced: Arc<AtomicBool>,
}

impl Health {
    /// Not ready yet.
    pub fn new(metrics: Metrics) -> Self {
        Self { metrics, synced: Arc::default() }
    }

    /// The caches hold all that there is: ready.
    pub fn caches_are_synced(&self) {
        self.synced.store(true, Ordering::Release);
    }

    /// The endpoints. The server must know its peers' addresses, see [`log_level`].
    pub fn router(&self, log: LogFilter) -> Router {
        Router::new()
            .route("/livez", get(|| async { "ok" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
            .merge(log_level::routes(log))
    }
}

async fn readyz(State(health): State<Health>) -> impl IntoResponse {
    if health.synced.load(Ordering::Acquire) {
        (StatusCode::OK, "ok")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "caches are not synced yet")
    }
}

async fn metrics(State(health): State<Health>) -> impl IntoResponse {
    let content = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(axum::http::header::CONTENT_TYPE, content)], health.metrics.text())
}
