//! `/v1/lenses`: every lens, and what each worker says of it.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Path, State},
};

use super::{ApiError, App, models::id_of, request::NamedNamespace};
use crate::gateway::{
    listing::{self, Lens, List},
    waiting::scope,
};

/// `GET /v1/lenses`
pub async fn list(
    State(app): State<Arc<App>>,
    NamedNamespace(namespace): NamedNamespace,
) -> Json<List<Lens>> {
    let scope = scope(namespace.as_deref());
    Json(List::of(listing::lenses(&app.proxy.directory().view(), scope)))
}

/// `GET /v1/lenses/{id}`
pub async fn one(
    State(app): State<Arc<App>>,
    NamedNamespace(namespace): NamedNamespace,
    Path(params): Path<Vec<(String, String)>>,
) -> Result<Json<Lens>, ApiError> {
    let view = app.proxy.directory().view();
    let target = view.catalog.resolve(scope(namespace.as_deref()), id_of(params).as_deref())?;
    match (listing::find_lens(&view, &target), view.targets(&target)) {
        (Some(lens), _) => Ok(Json(lens)),
        (None, Some(targets)) => {
            let leads_to =
                targets.into_iter().map(|t| format!("{}:{}", target.model.group, t.lens)).collect();
            Err(ApiError::AnAlias { alias: target.model.to_string(), leads_to })
        }
        (None, None) => Err(ApiError::NotALens(target.model.to_string())),
    }
}
