//! Probes and metrics.

use std::sync::Arc;

use axum::{extract::State, response::IntoResponse};
use http::{StatusCode, header};

use super::App;

/// `GET /livez`: the process answers.
pub async fn livez() -> &'static str {
    "ok\n"
}

/// `GET /readyz`: everything declared has been read, and the gateway is not stopping.
pub async fn readyz(State(app): State<Arc<App>>) -> (StatusCode, &'static str) {
    if *app.stopping.borrow() {
        return (StatusCode::SERVICE_UNAVAILABLE, "stopping\n");
    }
    if !app.proxy.directory().view().catalog.complete {
        return (StatusCode::SERVICE_UNAVAILABLE, "what is served has not been read yet\n");
    }
    (StatusCode::OK, "ok\n")
}

/// `GET /metrics`
pub async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    let metrics = app.proxy.metrics();
    metrics.workers.set(app.proxy.directory().open_streams());
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], metrics.text())
}
