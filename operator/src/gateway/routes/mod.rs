//! The gateway's HTTP surface. Everything below `/v1` also exists below `/ns/{namespace}/v1`.

pub mod admin;
mod demand;
mod error;
mod health;
mod inference;
mod lenses;
mod models;
mod request;

use std::sync::{Arc, OnceLock};

use axum::{
    Router,
    extract::OriginalUri,
    routing::{get, post},
};
use tokio::sync::{Semaphore, watch};

pub use error::ApiError;

use super::proxy::Proxy;
use crate::{demand::PATH as DEMAND_PATH, keys::Signer};

/// What handlers share.
pub struct App {
    /// Sends requests to workers.
    pub proxy: Arc<Proxy>,
    /// The namespace of requests that name none.
    pub default_namespace: Option<String>,
    /// Longest body, bytes.
    pub max_body_bytes: usize,
    /// Memory for the bodies of all requests together, KiB.
    pub body_memory: Arc<Semaphore>,
    /// Turns true when the gateway has been told to stop.
    pub stopping: watch::Receiver<bool>,
    /// The gateway's signer, once its key is read.
    pub signer: Arc<OnceLock<Arc<Signer>>>,
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .merge(api())
        .nest("/ns/{namespace}", api())
        .route("/livez", get(health::livez))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(health::metrics))
        .route(DEMAND_PATH, get(demand::watch))
        .fallback(|OriginalUri(uri): OriginalUri| async move { ApiError::UnknownPath(uri.path().into()) })
        .method_not_allowed_fallback(|OriginalUri(uri): OriginalUri| async move {
            ApiError::WrongMethod(uri.path().into())
        })
        .with_state(app)
}

fn api() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/chat/completions", post(inference::chat_completions))
        .route("/v1/completions", post(inference::completions))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{id}", get(models::one))
        .route("/v1/lenses", get(lenses::list))
        .route("/v1/lenses/{id}", get(lenses::one))
}
