//! `/v1/models` and `/v1/lenses`: what can be asked for.

use axum::Json;
use axum::extract::{Path, State};
use serde_json::{Value, json};
use turret_crds::alias::{Asker, EffectiveAlias};
use turret_crds::document::{DocumentGroup, DocumentLens, WorkerDocument};
use turret_crds::model_name::{ModelName, resolve};

use super::App;
use super::error::ApiError;
use crate::residency::View;

/// Finds what a client's `model` means. It may be an alias.
pub(super) fn find(document: Option<&WorkerDocument>, name: &str) -> Result<ModelName, ApiError> {
    let groups = document.map(|d| d.groups.as_slice()).unwrap_or_default();
    let names = groups.iter().map(|group| {
        let lenses = group.lenses.iter().map(|lens| lens.name.as_str());
        (group.name.as_str(), lenses.chain(group.aliases.iter().map(|alias| alias.name.as_str())))
    });
    resolve(name, names).map_err(|unknown| ApiError::unknown_model(unknown.to_string()))
}

/// The alias that a name is, if it is one.
pub(super) fn alias_of<'d>(
    document: Option<&'d WorkerDocument>,
    name: &ModelName,
) -> Option<&'d EffectiveAlias> {
    document?.group(&name.group)?.alias(name.lens.as_deref()?)
}

/// What answers this asker when they name something: where an alias leads, or just that.
pub(super) fn lead(document: Option<&WorkerDocument>, mut name: ModelName, asker: Asker) -> ModelName {
    if let Some(lens) = alias_of(document, &name).and_then(|alias| alias.lens_for(&name.group, asker)) {
        name.lens = Some(lens.to_owned());
    }
    name
}

/// The lenses that an alias leads to, for people.
pub(super) fn leads_to(group: &str, alias: &EffectiveAlias) -> String {
    let lenses: Vec<_> = alias.targets.iter().map(|target| format!("`{group}:{}`", target.lens)).collect();
    lenses.join(", ")
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

fn alias_model(view: &View, group: &DocumentGroup, alias: &EffectiveAlias) -> Value {
    let mut model = base_model(view, group);
    model["id"] = format!("{}:{}", group.name, alias.name).into();
    model["parent"] = group.name.clone().into();
    model["targets"] = json!(alias.targets);
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
        models.extend(group.aliases.iter().map(|alias| alias_model(&view, group, alias)));
    }
    Json(json!({"object": "list", "data": models}))
}

/// `GET /v1/models/{id}`.
pub async fn get_model(State(app): State<App>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let view = app.residency.view();
    let name = find(view.document.as_deref(), &id)?;
    let group = view.document.as_ref().and_then(|d| d.group(&name.group));
    let group = group.expect("the name was found in this document");
    let alias = alias_of(view.document.as_deref(), &name);
    let lens = name.lens.and_then(|lens| group.lenses.iter().find(|l| l.name == lens));
    Ok(Json(match (lens, alias) {
        (Some(lens), _) => lens_model(&view, group, lens),
        (None, Some(alias)) => alias_model(&view, group, alias),
        (None, None) => base_model(&view, group),
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
    if let Some(alias) = alias_of(view.document.as_deref(), &name) {
        let leads_to = leads_to(&name.group, alias);
        return Err(ApiError::unknown_model(format!(
            "`{id}` is an alias, not a lens; it leads to {leads_to}"
        )));
    }
    let group = view.document.as_ref().and_then(|d| d.group(&name.group));
    let found = group.and_then(|g| Some((g, g.lenses.iter().find(|l| Some(&l.name) == name.lens.as_ref())?)));
    let (group, lens) =
        found.ok_or_else(|| ApiError::unknown_model(format!("`{id}` is a base, not a lens")))?;
    Ok(Json(lens_body(&view, group, lens)))
}
