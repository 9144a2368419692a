//! HTTP: the OpenAI-compatible data port and the control port.
//!
//! [`openai`] reads requests and writes bodies, [`stop`] cuts text at stop strings, [`auth`] checks tokens, [`error`] alone
//! knows status codes. The routes are thin: resolve the name, make the prompt, wait for a permit, follow the row.

pub mod auth;
mod control;
pub mod error;
mod generate;
mod health;
mod log_level;
mod models;
pub mod openai;
mod progress;
pub mod stop;
mod text;

use std::sync::Arc;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use http::Method;
use tokio_util::sync::CancellationToken;
use turret_crds::token::Scope;

use crate::engine::handle::EngineHandle;
use crate::metrics::Metrics;
use crate::residency::Residency;
use crate::telemetry::LogFilter;
use auth::Verifier;
use error::ApiError;

/// Largest request body on the data port.
const MAX_BODY_BYTES: usize = 8 << 20;
/// Largest worker document as JSON.
const MAX_DOCUMENT_BYTES: usize = turret_crds::document::MAX_JSON_BYTES as usize;

/// What every route needs. Cheap to clone.
#[derive(Clone)]
pub struct App {
    pub(crate) residency: Residency,
    pub(crate) engine: EngineHandle,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) liveness: Arc<health::Liveness>,
    /// Cancelled when streams must end.
    pub(crate) stop: CancellationToken,
    verifier: Arc<Verifier>,
}

impl App {
    /// `token` is the static one; `open` lets everybody in.
    pub fn new(
        residency: Residency,
        engine: EngineHandle,
        token: Option<String>,
        open: bool,
        stop: CancellationToken,
    ) -> Self {
        Self {
            residency,
            engine,
            metrics: Arc::default(),
            liveness: Arc::default(),
            stop,
            verifier: Arc::new(Verifier::new(token, open)),
        }
    }

    /// Lets a request pass whose token has at least this scope.
    fn check(&self, request: &Request, needed: Scope) -> Result<(), ApiError> {
        let view = self.residency.view();
        self.verifier.check(request.headers(), view.document.as_deref(), needed)
    }
}

/// Probes and metrics, the same on both ports.
fn probes(app: App) -> Router {
    Router::new()
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/health", get(health::readyz))
        .route("/metrics", get(health::metrics))
        .with_state(app)
}

/// The data port.
pub fn data_routes(app: App) -> Router {
    let guarded = Router::new()
        .route("/v1/models", get(models::list_models))
        .route("/v1/models/{id}", get(models::get_model))
        .route("/v1/lenses", get(models::list_lenses))
        .route("/v1/lenses/{id}", get(models::get_lens))
        .route("/v1/chat/completions", post(text::chat))
        .route("/v1/completions", post(text::complete))
        .route("/version", get(health::version))
        .layer(middleware::from_fn_with_state(app.clone(), serve_scope))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(app.clone());
    guarded.merge(probes(app)).fallback(not_found).method_not_allowed_fallback(wrong_method)
}

/// The control port. The server must know its peers' addresses, for `/loglevel`.
pub fn control_routes(app: App, log: LogFilter) -> Router {
    let guarded = Router::new()
        .route("/control/v1/document", put(control::put_document))
        .route("/control/v1/state", get(control::get_state))
        .route("/control/v1/policy", get(control::get_policy))
        .route("/control/v1/retry", post(control::retry))
        .route("/control/v1/drain", post(control::drain).delete(control::undrain))
        .route("/control/v1/lenses/{id}/load", post(control::load))
        .route("/control/v1/lenses/{id}/evict", post(control::evict))
        .route("/control/v1/lenses/{id}/pin", post(control::pin).delete(control::unpin))
        .route("/control/v1/lenses/{id}/feedback", post(control::rate))
        .route("/control/v1/groups/{group}/activate", post(control::activate))
        .route("/control/v1/leases", get(control::list_leases).post(control::acquire_lease))
        .route("/control/v1/leases/{id}", put(control::renew_lease).delete(control::release_lease))
        .layer(middleware::from_fn_with_state(app.clone(), control_scope))
        .layer(DefaultBodyLimit::max(MAX_DOCUMENT_BYTES))
        .with_state(app.clone());
    let open = probes(app).merge(log_level::routes(log));
    guarded.merge(open).fallback(not_found).method_not_allowed_fallback(wrong_method)
}

async fn serve_scope(State(app): State<App>, request: Request, next: Next) -> Response {
    match app.check(&request, Scope::Serve) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// Reading the state is the gateway's too; everything else is the operator's.
async fn control_scope(State(app): State<App>, request: Request, next: Next) -> Response {
    let needed = if request.method() == Method::GET { Scope::Serve } else { Scope::Control };
    match app.check(&request, needed) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

async fn not_found(request: Request) -> ApiError {
    ApiError::not_found(format!("there is no `{} {}`", request.method(), request.uri().path()))
}

async fn wrong_method(request: Request) -> ApiError {
    ApiError::wrong_method(format!("`{}` does not take {}", request.uri().path(), request.method()))
}
