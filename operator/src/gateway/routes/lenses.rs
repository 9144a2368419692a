//! `/v1/lenses`: every lens, and what each worker says of it.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};

use super::{ApiError, App, models::id_of, request::NamedNamespace};
use crate::gateway::{
    listing::{self, Lens, List},
    waiting::Ask,
};

/// `GET /v1/lenses`
pub async fn list(
    State(app): State<Arc<App>>,
    NamedNamespace(namespace): NamedNamespace,
) -> Json<List<Lens>> {
    let ask = Ask { namespace, model: None };
    Json(List::of(listing::lenses(&app.proxy.directory().view(), ask.scope())))
}

/// `GET /v1/lenses/{id}`
pub async fn one(
    State(app): State<Arc<App>>,
    NamedNamespace(namespace): NamedNamespace,
    Path(params): Path<Vec<(String, String)>>,
) -> Result<Json<Lens>, ApiError> {
    let ask = Ask { namespace, model: id_of(params) };
    let view = app.proxy.directory().view();
    let target = ask.resolve(&view)?;
    match listing::find_lens(&view, &target) {
        Some(lens) => Ok(Json(lens)),
        None => Err(ApiError::NotALens(target.model.to_string())),
    }
}
