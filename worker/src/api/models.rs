//! `/v1/models` and `/v1/lenses`: what can be asked for.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use turret_crds::document::{DocumentGroup, DocumentLens, WorkerDocument};
use turret_crds::model_name::{ModelName, resolve};

use super::App;
use super::error::ApiError;
use crate::residency::View;

/// Finds what a client's `model` means.
pub(super) fn find(document: Option<&WorkerDocument>, name: &str) -> Result<ModelName, ApiError> {
    let groups = document.map(|d| d.groups.as_slice()).unwrap_or_default();
    let names = groups.iter().map(|g| (g.name.as_str(), g.lenses.iter().map(|l| l.name.as_str())));
    resolve(name, names).map_err(|unknown| ApiError::unknown_model(unknown.to_string()))
}

fn base_model(view: &View, group: &DocumentGroup) -> Value {
    let context = view.bases.get(&group.base.key).map(|base| context_tokens(view, base));
    json!({
        "id": group.name, "object": "model", "created": view.created, "owned_by": group.namespace,
        "root": group.base.source.uri, "parent": null, "max_model_len": context,
    })
}

/// Longest sequence over a base.
pub(super) fn context_tokens(view: &View, base: &crate::residency::resolve::ResolvedBase) -> u32 {
    base.context_tokens(view.max_context_tokens)
}

fn lens_model(view: &View, group: &DocumentGroup, lens: &DocumentLens) -> Value {
    let mut model = base_model(view, group);
    model["id"] = format!("{}:{}", group.name, lens.name).into();
    model["root"] = lens.source.uri.clone().into();
    model["parent"] = group.name.clone().into();
    model
}

/// `GET /v1/models`.
pub async fn list_models(State(app): State<App>) -> Json<Value> {
    let view = app.residency.view();
    let groups = view.document.as_ref().map(|d| d.groups.as_slice()).unwrap_or_default();
    let mut models = Vec::new();
    for group in groups {
        models.push(base_model(&view, group));
        models.extend(group.lenses.iter().map(|lens| lens_model(&view, group, lens)));
    }
    Json(json!({"object": "list", "data": models}))
}

/// `GET /v1/models/{id}`.
pub async fn get_model(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let view = app.residency.view();
    let name = find(view.document.as_deref(), &id)?;
    let group = view.document.as_ref().and_then(|d| d.group(&name.group));
    let group = group.expect("the name was found in this document");
    let lens = name.lens.and_then(|lens| group.lenses.iter().find(|l| l.name == lens));
    Ok(Json(match lens {
        None => base_model(&view, group),
        Some(lens) => lens_model(&view, group, lens),
    }))
}

fn lens_body(view: &View, group: &DocumentGroup, lens: &DocumentLens) -> Value {
    let mut body = json!({
        "id": format!("{}:{}", group.name, lens.name),
        "object": "lens",
        "group": group.name,
        "name": lens.name,
        "kind": lens.kind.map_or_else(|| "LoRA".to_owned(), |k| format!("{k:?}")),
        "display_name": lens.display_name,
        "scale_milli": lens.scale_milli,
        "source": lens.source.uri,
        "revision": lens.source.revision,
        "declared_digest": lens.source.digest,
    });
    if let Some(report) = view.report.lens(&group.name, &lens.name) {
        body["state"] = json!(report.state);
        body["tier"] = json!(report.tier);
        body["digest"] = json!(report.digest);
        body["bytes"] = json!(report.bytes);
        body["active_rows"] = json!(report.active_rows);
        body["served"] = json!(report.served);
    }
    body
}

/// `GET /v1/lenses`.
pub async fn list_lenses(State(app): State<App>) -> Json<Value> {
    let view = app.residency.view();
    let groups = view.document.as_ref().map(|d| d.groups.as_slice()).unwrap_or_default();
    let lenses: Vec<Value> =
        groups.iter().flat_map(|g| g.lenses.iter().map(|lens| lens_body(&view, g, lens))).collect();
    Json(json!({"object": "list", "data": lenses}))
}

/// `GET /v1/lenses/{id}`.
pub async fn get_lens(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let view = app.residency.view();
    let name = find(view.document.as_deref(), &id)?;
    let group = view.document.as_ref().and_then(|d| d.group(&name.group));
    let found = group.and_then(|g| Some((g, g.lenses.iter().find(|l| Some(&l.name) == name.lens.as_ref())?)));
    let (group, lens) =
        found.ok_or_else(|| ApiError::unknown_model(format!("`{id}` is a base, not a lens")))?;
    Ok(Json(lens_body(&view, group, lens)))
}
