//! Errors as clients see them: an HTTP status and a body in OpenAI's shape. The only place that knows status codes.

use std::borrow::Cow;
use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};

use crate::engine::handle::SubmitError;
use crate::engine::row::RowFailure;
use crate::model::chat_template::TemplateError;
use crate::model::tokenizer::TokenizerError;
use crate::residency::Refusal;
use crate::residency::lease::LeaseError;
use crate::residency::orders::OrderError;

/// What went wrong with a request, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    status: StatusCode,
    code: &'static str,
    param: Option<Cow<'static, str>>,
    message: String,
    retry_after: Option<Duration>,
    close: bool,
}

impl ApiError {
    fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, param: None, message: message.into(), retry_after: None, close: false }
    }

    /// 400: the request is wrong; `param` names the field.
    pub fn invalid(param: Option<&str>, message: impl Into<String>) -> Self {
        let param = param.map(|p| Cow::Owned(p.to_owned()));
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, "invalid_value", message) }
    }

    /// 400: a parameter that would change the answer and is not honoured.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        let param = Some(Cow::Owned(param.to_owned()));
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, "unsupported_parameter", message) }
    }

    /// 400: prompt and answer do not fit the context.
    pub fn context_overflow(param: &'static str, message: impl Into<String>) -> Self {
        let param = Some(Cow::Borrowed(param));
        Self { param, ..Self::new(StatusCode::BAD_REQUEST, "context_length_exceeded", message) }
    }

    /// 401: no token, or one that is not accepted.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message)
    }

    /// 403: the token is good, but not for this.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", message)
    }

    /// 404: no such route.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// 404: no such model or lens.
    pub fn unknown_model(message: impl Into<String>) -> Self {
        let error = Self::new(StatusCode::NOT_FOUND, "model_not_found", message);
        Self { param: Some(Cow::Borrowed("model")), ..error }
    }

    /// 405: the route takes another method.
    pub fn wrong_method(message: impl Into<String>) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
    }

    /// 409: it contradicts what is there.
    pub fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict", message)
    }

    /// 413: the body is too large.
    pub fn too_large(message: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large", message)
    }

    /// 500: our fault.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// 503: not now.
    pub fn unavailable(code: &'static str, message: impl Into<String>, retry_after: Duration) -> Self {
        let error = Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message);
        Self { retry_after: Some(retry_after), ..error }
    }

    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The body, also sent as the last event of a stream that cannot go on.
    pub fn body(&self) -> Value {
        let kind = match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl From<OrderError> for ApiError {
    fn from(error: OrderError) -> Self {
        let message = error.to_string();
        match error {
            OrderError::Unknown(_) => Self::unknown_model(message),
            OrderError::Lease(LeaseError::Unknown) => Self::not_found(message),
            OrderError::Lease(LeaseError::Ttl) => Self::invalid(Some("ttlSeconds"), message),
            OrderError::Lease(LeaseError::TooMany) | OrderError::Conflict(_) => Self::conflict(message),
            OrderError::Failed { .. } => Self::unavailable("lens_failed", message, Duration::from_secs(30)),
            OrderError::Stopped => Self::unavailable("shutting_down", message, Duration::from_secs(1)),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(after) = self.retry_after {
            // Whole seconds, never zero: a client that retries at once only adds to the load.
            let seconds = after.as_secs_f64().ceil().clamp(1.0, 3600.0) as u64;
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if self.close {
            headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        match refusal {
            Refusal::Unknown(_) => Self::unknown_model(message),
            Refusal::Failed { retry_after, .. } => Self::unavailable("model_failed", message, retry_after),
            Refusal::NotActive { .. } => {
                Self::unavailable("base_not_active", message, Duration::from_secs(30))
            }
            Refusal::Overloaded { retry_after, .. } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message);
                Self { retry_after: Some(retry_after), ..error }
            }
            Refusal::TimedOut { retry_after, .. } => Self::unavailable("timed_out", message, retry_after),
            Refusal::Draining => {
                let error = Self::unavailable("draining", message, Duration::from_secs(1));
                Self { close: true, ..error }
            }
        }
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::ContextOverflow { .. } => Self::context_overflow("max_tokens", message),
            SubmitError::EmptyPrompt | SubmitError::UnknownToken { .. } => {
                Self::invalid(Some("prompt"), message)
            }
            SubmitError::LensesConflict { .. } => Self::invalid(Some("lenses"), message),
            SubmitError::OutOfRange { field, .. } => Self::invalid(Some(field), message),
            SubmitError::Activations(_) => Self::invalid(Some("activations"), message),
            SubmitError::QueueFull { .. } => {
                let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "overloaded", message);
                Self { retry_after: Some(Duration::from_secs(1)), ..error }
            }
            SubmitError::ShuttingDown | SubmitError::Stopped | SubmitError::BaseNotActive => {
                Self::unavailable("unavailable", message, Duration::from_secs(1))
            }
            // A permit promises that both are there.
            SubmitError::UnknownLens(_)
            | SubmitError::LensOfOtherBase(_)
            | SubmitError::NothingLeft { .. }
            | SubmitError::System(_) => Self::internal(message),
        }
    }
}

impl From<RowFailure> for ApiError {
    fn from(failure: RowFailure) -> Self {
        let message = failure.to_string();
        match failure {
            RowFailure::Aborted | RowFailure::Preempted => {
                Self::unavailable("preempted", message, Duration::from_secs(1))
            }
            RowFailure::EngineStopped => Self::unavailable("unavailable", message, Duration::from_secs(1)),
            RowFailure::NotFinite { .. } | RowFailure::Device(_) => Self::internal(message),
        }
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        // Templates refuse conversations they were not made for; their own words say why.
        Self::invalid(Some("messages"), error.to_string())
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        match error {
            TokenizerError::Template(template) => template.into(),
            other => Self::internal(other.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_tells_when_to_come_back_and_what_is_wrong() {
        let refusal = Refusal::Overloaded { waiting: 9, limit: 8, retry_after: Duration::from_millis(1200) };
        let response = ApiError::from(refusal).into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        let draining = ApiError::from(Refusal::Draining).into_response();
        assert_eq!(draining.headers()[header::CONNECTION], "close");
    }

    #[test]
    fn the_body_has_openais_shape() {
        let body = ApiError::unsupported("n", "only 1").body();
        let wanted = json!({"error": {"message": "only 1", "type": "invalid_request_error", "param": "n", "code": "unsupported_parameter"}});
        assert_eq!(body, wanted);
    }
}
