//! Requests that a worker answers.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    response::{IntoResponse, Response},
};
use http::{HeaderName, HeaderValue, Request};
use tracing::Instrument;
use turret_crds::alias::Asker;

use super::{
    ApiError, App,
    request::{NamedNamespace, probe, read_body},
};
use crate::gateway::{
    headers::{self, REQUEST_ID_HEADER},
    proxy::Inference,
    waiting::Ask,
};

/// `POST /v1/chat/completions`
pub async fn chat_completions(
    State(app): State<Arc<App>>,
    namespace: Result<NamedNamespace, ApiError>,
    request: Request<Body>,
) -> Response {
    answer(app, namespace, request, "/v1/chat/completions").await
}

/// `POST /v1/completions`
pub async fn completions(
    State(app): State<Arc<App>>,
    namespace: Result<NamedNamespace, ApiError>,
    request: Request<Body>,
) -> Response {
    answer(app, namespace, request, "/v1/completions").await
}

async fn answer(
    app: Arc<App>,
    namespace: Result<NamedNamespace, ApiError>,
    request: Request<Body>,
    path: &'static str,
) -> Response {
    let id = headers::request_id(request.headers(), || uuid::Uuid::new_v4().to_string());
    let span = tracing::info_span!("request", request_id = ?id, path, model = tracing::field::Empty);
    let answered = match namespace {
        Ok(namespace) => forward(&app, namespace, request, (path, &id)).instrument(span.clone()).await,
        Err(error) => Err(error),
    };
    let mut response = answered.unwrap_or_else(|error| {
        span.in_scope(|| tracing::debug!(%error, "not answered"));
        error.into_response()
    });
    app.proxy.metrics().answered(response.status());
    response.headers_mut().insert(HeaderName::from_static(REQUEST_ID_HEADER), id);
    response
}

async fn forward(
    app: &App,
    NamedNamespace(namespace): NamedNamespace,
    request: Request<Body>,
    (path, id): (&'static str, &HeaderValue),
) -> Result<Response, ApiError> {
    let arrived = app.proxy.clock().now();
    let (parts, body) = request.into_parts();
    let body = read_body(&parts.headers, body, app.max_body_bytes, &app.body_memory).await?;
    let probed = probe(&body.bytes)?;
    tracing::Span::current().record("model", probed.model.as_deref().unwrap_or_default());
    // Who says nothing of themselves is a new asker with each request, unless they give it an id of their own.
    let asker = probed.asker.unwrap_or_else(|| Asker::called(&String::from_utf8_lossy(id.as_bytes())));
    let ask = Ask { namespace, model: probed.model, asker };
    let mut headers = headers::to_worker(&parts.headers);
    headers.insert(HeaderName::from_static(REQUEST_ID_HEADER), id.clone());
    let inference = Inference { ask, path, headers, body: body.bytes, arrived };
    let answered = app.proxy.forward(&inference).await;
    // The body has been sent, or will never be: others may have its memory while the answer streams.
    drop(body.share);
    Ok(answered?)
}
