//! `/livez`, `/readyz` and `/metrics` of the operator.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use axum::{Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};

use crate::metrics::Metrics;

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

    /// The endpoints.
    pub fn router(&self) -> Router {
        Router::new()
            .route("/livez", get(|| async { "ok" }))
            .route("/readyz", get(readyz))
            .route("/metrics", get(metrics))
            .with_state(self.clone())
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
