//! The only place where an error becomes a status and a body. The body has OpenAI's shape.

use axum::{
    Json,
    response::{IntoResponse, Response},
};
use http::{HeaderValue, StatusCode, header};
use serde_json::json;
use turret_crds::model_name::UnknownModel;

use super::request::RequestError;
use crate::gateway::{catalog::ResolveError, pick::Unserved, proxy::ForwardError};

/// What a client is told when its request is not answered.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The request itself cannot be used.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// It got no answer from a worker.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// It asks for a lens by the name of a group.
    #[error("`{0}` is a group, not a lens; `GET /v1/lenses` lists the lenses")]
    NotALens(String),
    /// It asks for a lens by the name of an alias.
    #[error("`{alias}` is an alias, not a lens; it leads to {}", .leads_to.join(", "))]
    AnAlias {
        /// The alias.
        alias: String,
        /// The lenses behind it at the moment.
        leads_to: Vec<String>,
    },
    /// Nothing is at this path.
    #[error(
        "there is nothing at `{0}`; the gateway has /v1/chat/completions, /v1/completions, /v1/models and /v1/lenses"
    )]
    UnknownPath(String),
    /// The path exists for another method.
    #[error("`{0}` does not take this method")]
    WrongMethod(String),
}

impl From<ResolveError> for ApiError {
    fn from(error: ResolveError) -> Self {
        Self::Forward(error.into())
    }
}

/// What a machine reads: the status, `code`, `param`, and `Retry-After`.
struct Facts {
    status: StatusCode,
    code: &'static str,
    param: Option<&'static str>,
    retry_after: Option<u64>,
}

fn facts(status: StatusCode, code: &'static str) -> Facts {
    Facts { status, code, param: None, retry_after: None }
}

fn about_model(status: StatusCode, code: &'static str) -> Facts {
    Facts { param: Some("model"), ..facts(status, code) }
}

impl ApiError {
    fn facts(&self) -> Facts {
        match self {
            Self::Request(error) => request_facts(error),
            Self::Forward(error) => forward_facts(error),
            Self::NotALens(_) | Self::AnAlias { .. } => about_model(StatusCode::NOT_FOUND, "lens_not_found"),
            Self::UnknownPath(_) => facts(StatusCode::NOT_FOUND, "unknown_path"),
            Self::WrongMethod(_) => facts(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
        }
    }
}

fn request_facts(error: &RequestError) -> Facts {
    match error {
        RequestError::TooLarge { .. } => facts(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"),
        RequestError::TooSlow => facts(StatusCode::REQUEST_TIMEOUT, "body_too_slow"),
        RequestError::Interrupted(_) => facts(StatusCode::BAD_REQUEST, "body_interrupted"),
        RequestError::NotAnObject | RequestError::NotJson(_) => {
            facts(StatusCode::BAD_REQUEST, "invalid_json")
        }
        RequestError::Crowded => {
            Facts { retry_after: Some(1), ..facts(StatusCode::TOO_MANY_REQUESTS, "gateway_full") }
        }
        RequestError::Namespace(_) | RequestError::TwoNamespaces { .. } => {
            facts(StatusCode::BAD_REQUEST, "invalid_namespace")
        }
    }
}

fn forward_facts(error: &ForwardError) -> Facts {
    match error {
        ForwardError::Resolve(ResolveError::UnknownNamespace(_)) => {
            facts(StatusCode::NOT_FOUND, "namespace_not_found")
        }
        ForwardError::Resolve(ResolveError::Model(UnknownModel::NotFound { .. })) => {
            about_model(StatusCode::NOT_FOUND, "model_not_found")
        }
        ForwardError::Resolve(
            ResolveError::Model(UnknownModel::Ambiguous { .. }) | ResolveError::AmbiguousNamespace { .. },
        ) => about_model(StatusCode::BAD_REQUEST, "ambiguous_model"),
        ForwardError::Resolve(ResolveError::ModelMissing { .. }) => {
            about_model(StatusCode::BAD_REQUEST, "model_required")
        }
        ForwardError::Unserved { why, retry_after, .. } => {
            Facts { retry_after: *retry_after, ..about_model(StatusCode::SERVICE_UNAVAILABLE, code(why)) }
        }
        ForwardError::TooManyHeld { .. } => {
            Facts { retry_after: Some(5), ..facts(StatusCode::TOO_MANY_REQUESTS, "gateway_full") }
        }
        ForwardError::Stopping { .. } => {
            Facts { retry_after: Some(1), ..facts(StatusCode::SERVICE_UNAVAILABLE, "gateway_stopping") }
        }
        ForwardError::Broken { .. } => facts(StatusCode::BAD_GATEWAY, "worker_lost"),
    }
}

fn code(why: &Unserved) -> &'static str {
    match why {
        Unserved::Unread => "gateway_starting",
        Unserved::NoWorker => "no_worker",
        Unserved::ScaledToZero => "scaled_to_zero",
        Unserved::Unreachable => "workers_unreachable",
        Unserved::Starting => "workers_starting",
        Unserved::OnItsWay => "not_loaded_yet",
        Unserved::Refused => "workers_busy",
        Unserved::Failed { .. } => "model_failed",
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let facts = self.facts();
        let kind = match facts.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let body = json!({"error": {
            "message": self.to_string(), "type": kind, "param": facts.param, "code": facts.code,
        }});
        let mut response = (facts.status, Json(body)).into_response();
        if let Some(seconds) = facts.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
