//! `/v1/models`: what can be asked for.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
    response::{IntoResponse, Response},
};

use super::{ApiError, App, request::NamedNamespace};
use crate::gateway::{
    listing::{self, List, Model},
    pick::Unserved,
    proxy::ForwardError,
    waiting::scope,
};

/// `GET /v1/models`
pub async fn list(
    State(app): State<Arc<App>>,
    NamedNamespace(namespace): NamedNamespace,
) -> Json<List<Model>> {
    let scope = scope(namespace.as_deref());
    Json(List::of(listing::models(&app.proxy.directory().view(), scope)))
}

/// `GET /v1/models/{id}`
pub async fn one(
    State(app): State<Arc<App>>,
    NamedNamespace(namespace): NamedNamespace,
    Path(params): Path<Vec<(String, String)>>,
) -> Result<Response, ApiError> {
    let view = app.proxy.directory().view();
    let target = view.catalog.resolve(scope(namespace.as_deref()), id_of(params).as_deref())?;
    let model = listing::find_model(&view, &target).map_err(|why| failed(target.model.to_string(), why))?;
    Ok(Json(model).into_response())
}

/// The `{id}` of a path, whatever comes before it.
pub(super) fn id_of(params: Vec<(String, String)>) -> Option<String> {
    params.into_iter().find(|(name, _)| name == "id").map(|(_, id)| id)
}

fn failed(model: String, why: Unserved) -> ApiError {
    ForwardError::Unserved { model, why, waited: std::time::Duration::ZERO, retry_after: None }.into()
}
