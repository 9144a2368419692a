//! Objects that were stored before there was a schema: with fields of old, nulls, texts where numbers belong. They are made while
//! the kinds allow anything, and then the kinds are as they should be.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::JSONSchemaProps;
use kube::api::{DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use turret_crds::{ModelGroup, ModelPlacement};

use super::node::LABEL;
use super::random::kind::{Kind, kinds};
use super::story::{NO_IMAGE, Story};
use super::world::{World, apply_kind};
use crate::cluster::eventually::{PATIENCE, eventually, when};

/// What the namespace is called after.
const STORY: &str = "malformed";
/// A group that cannot be read, and the placement that names it.
const BROKEN: &str = "no-base";

/// Specs that no schema of ours allows, by kind and name.
fn specs() -> Vec<(&'static str, &'static str, Value)> {
    let base = json!({"source": {"uri": "file:///models/base"}});
    let lens = |lens: Value| json!({"base": base, "lenses": [lens]});
    vec![
        ("ModelGroup", BROKEN, json!({})),
        ("ModelGroup", "null", Value::Null),
        ("ModelGroup", "null-base", json!({"base": null, "lenses": []})),
        ("ModelGroup", "null-lenses", json!({"base": base, "lenses": null})),
        ("ModelGroup", "null-among-lenses", lens(Value::Null)),
        ("ModelGroup", "numbers", lens(json!({"name": 7, "source": {"uri": 8}}))),
        ("ModelGroup", "of-old", json!({"model": {"uri": "file:///models/base"}, "adapters": []})),
        (
            "ModelGroup",
            "too-large",
            lens(json!({"name": "a", "source": base["source"], "scaleMilli": 1u64 << 40})),
        ),
        ("ModelGroup", "unknown-choice", json!({"base": {"source": base["source"], "dtype": "INT4"}})),
        ("ModelGroup", "text", json!("none")),
        ("ModelPlacement", "no-groups", json!({"replicas": 1})),
        ("ModelPlacement", "null-groups", json!({"groups": null})),
        ("ModelPlacement", "groups-by-name", json!({"groups": ["g"], "replicas": 1})),
        ("ModelPlacement", "text-for-number", json!({"groups": [{"name": "g"}], "replicas": "two"})),
        ("ModelPlacement", "list", json!([])),
    ]
}

/// Makes them: the kinds allow anything until they are installed as they should be.
pub async fn store(client: &Client) -> Result<()> {
    let namespace = json!({
        "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("faults-{STORY}")},
    });
    let name = format!("faults-{STORY}");
    let params = PatchParams::apply("turret-test-user").force();
    Api::<Namespace>::all(client.clone()).patch(&name, &params, &Patch::Apply(&namespace)).await?;
    for kind in kinds() {
        let mut definition = kind.crd.clone();
        for version in &mut definition.spec.versions {
            // The scale subresource asks for a number.
            version.subresources = None;
            let anything = JSONSchemaProps {
                type_: Some("object".into()),
                x_kubernetes_preserve_unknown_fields: Some(true),
                ..JSONSchemaProps::default()
            };
            version.schema.get_or_insert_default().open_api_v3_schema = Some(anything);
        }
        apply_kind(client, &definition).await?;
        let api = kind.api(client, &name);
        for (_, object, spec) in specs().into_iter().filter(|(of, ..)| *of == kind.name()) {
            let manifest: DynamicObject = serde_json::from_value(kind.object(object, &spec))?;
            // The kind may be served, or allow anything, a moment after it says so.
            eventually(PATIENCE, &format!("`{object}` is stored"), async || {
                match api.create(&PostParams::default(), &manifest).await {
                    Ok(_) => Ok(Ok(())),
                    Err(kube::Error::Api(status)) if status.code == 409 => Ok(Ok(())),
                    Err(kube::Error::Api(status)) => Ok(Err(status.message.clone())),
                    Err(error) => Err(error.into()),
                }
            })
            .await?;
        }
    }
    Ok(())
}

/// The kinds are as they should be: waits until they refuse what they allowed.
pub async fn is_refused_from_now_on(client: &Client) -> Result<()> {
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    for kind in kinds() {
        let api = kind.api(client, "default");
        let broken: DynamicObject = serde_json::from_value(kind.object("broken", &json!({})))?;
        eventually(PATIENCE, &format!("a broken {} is refused", kind.name()), async || {
            match api.create(&dry, &broken).await {
                Err(kube::Error::Api(status)) if status.code == 422 => Ok(Ok(())),
                other => Ok(Err(format!("{:?}", other.map(|_| "it is allowed")))),
            }
        })
        .await?;
    }
    Ok(())
}

/// The operator starts, passes over each of them with an event, and serves all others. A placement that names one says so, and
/// serves it once it is mended.
pub async fn malformed_objects_are_skipped_with_an_event(world: &World) -> Result<()> {
    let mut story = Story::begin(world, STORY, None, 0).await?;
    let (readable, unreadable) = sort(world, &story.namespace).await?;
    let names = format!("{unreadable:?}");
    ensure!(
        unreadable.len() >= specs().len() - 3,
        "nearly all of them cannot be read, but these are {names}"
    );
    ensure!(unreadable.contains(BROKEN), "`{BROKEN}` cannot be read, but these are {names}");

    story.proxy.begin_step(None);
    story.start(NO_IMAGE)?;
    declare(&story, "g", "good").await?;
    story.apply::<ModelPlacement>(&placement("of-broken", BROKEN)).await?;
    says(&story.all::<ModelPlacement>(), "good", ["Ready", "True", "Serving"]).await?;
    says(&story.all::<ModelPlacement>(), "of-broken", ["Accepted", "False", "GroupUnreadable"]).await?;
    let events = story.all::<Event>();
    eventually(PATIENCE, "each of them has an event", async || {
        let told: BTreeSet<String> = events
            .list(&ListParams::default())
            .await?
            .items
            .into_iter()
            .filter(|event| event.reason.as_deref() == Some("Unreadable"))
            .filter_map(|event| event.regarding?.name)
            .collect();
        Ok(when(told == unreadable, || format!("{told:?} instead of {unreadable:?}")))
    })
    .await?;

    // Mended in place, and then deleted.
    let mended = json!({"base": {"source": {"uri": "file:///models/base"}}});
    let group = kinds().into_iter().find(|kind| kind.name() == "ModelGroup").context("groups are a kind")?;
    mend(&group, world, &story.namespace, &mended).await?;
    says(&story.all::<ModelPlacement>(), "of-broken", ["Ready", "True", "Serving"]).await?;
    for kind in kinds() {
        let api = kind.api(&world.client, &story.namespace);
        for object in api.list(&ListParams::default()).await?.items {
            api.delete(&object.name_any(), &DeleteParams::default()).await?;
        }
        eventually(PATIENCE, &format!("no {} is left", kind.name()), async || {
            let left = api.list(&ListParams::default()).await?.items.len();
            Ok(when(left == 0, || format!("{left} are left")))
        })
        .await?;
    }
    let exits = story.lives().map(|lives| lives.exits).unwrap_or_default();
    ensure!(exits.is_empty(), "the operator ended by itself: {exits:?}");
    println!(
        "    {} malformed objects skipped with an event, {} whose nulls the API server drops; 2 placements served",
        unreadable.len(),
        readable.len()
    );
    story.remove().await
}

/// Names of those that can be read as the API server shows them now, and of those that cannot.
async fn sort(world: &World, namespace: &str) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
    let (mut readable, mut unreadable) = (BTreeSet::new(), BTreeSet::new());
    for kind in kinds() {
        for object in kind.api(&world.client, namespace).list(&ListParams::default()).await?.items {
            let (name, json) = (object.name_any(), serde_json::to_value(&object)?);
            let is_readable = match kind.name() {
                "ModelGroup" => serde_json::from_value::<ModelGroup>(json).is_ok(),
                _ => serde_json::from_value::<ModelPlacement>(json).is_ok(),
            };
            if is_readable {
                readable.insert(name)
            } else {
                unreadable.insert(name)
            };
        }
    }
    Ok((readable, unreadable))
}

async fn declare(story: &Story<'_>, name: &str, placed_as: &str) -> Result<()> {
    let group = json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup", "metadata": {"name": name},
        "spec": {"base": {"source": {"uri": "file:///models/base"}}},
    });
    story.apply::<ModelGroup>(&group).await?;
    story.apply::<ModelPlacement>(&placement(placed_as, name)).await
}

fn placement(name: &str, group: &str) -> Value {
    json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement", "metadata": {"name": name},
        "spec": {
            "groups": [{"name": group}],
            "terminationDrainSeconds": 0,
            "worker": {"nodeSelector": {LABEL: "true"}, "tolerations": [{"operator": "Exists"}]},
        },
    })
}

/// What a person does: the object is replaced by one that the schema allows.
async fn mend(kind: &Kind, world: &World, namespace: &str, spec: &Value) -> Result<()> {
    let api = kind.api(&world.client, namespace);
    let mut object = api.get(BROKEN).await?;
    object.data["spec"] = spec.clone();
    api.replace(BROKEN, &PostParams::default(), &object).await?;
    Ok(())
}

/// Waits until a placement's condition has this type, status and reason.
async fn says(placements: &Api<ModelPlacement>, name: &str, wanted: [&str; 3]) -> Result<()> {
    eventually(PATIENCE, &format!("`{name}` is {wanted:?}"), async || {
        let status = placements.get(name).await?.status;
        let conditions = status.map(|status| status.conditions).unwrap_or_default();
        let is_so =
            conditions.iter().any(|c| [c.type_.as_str(), c.status.as_str(), c.reason.as_str()] == wanted);
        Ok(when(is_so, || format!("{conditions:?}")))
    })
    .await
}
