//! Things are deleted, in any order, and nothing hangs and nothing stays.

use anyhow::{Result, ensure};
use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt as _};
use turret_crds::condition::{ACCEPTED, READY, is_true};
use turret_crds::{ModelGroup, ModelPlacement, label};

use super::{QWEN, case, is_answered_again, model};
use crate::cluster::eventually::{PATIENCE, eventually, when};
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::objects::{SCENARIO, group, placement};
use crate::cluster::release::{Part, Release};
use crate::cluster::space::Space;
use crate::cluster::worker::Direct;
use crate::faults::world::apply_kind;

/// Placement first, group first, the namespace at once.
pub async fn objects_deleted_in_any_order_leave_nothing(release: &Release) -> Result<()> {
    let space = serving(release, "placement-first").await?;
    delete::<ModelPlacement>(&space, "shared").await?;
    nothing_is_owned(&space).await?;
    space.group_is(QWEN, READY, "True", "NotPlaced").await?;
    delete::<ModelGroup>(&space, QWEN).await?;
    space.remove().await?;

    let space = serving(release, "group-first").await?;
    delete::<ModelGroup>(&space, QWEN).await?;
    space.placement_is("shared", ACCEPTED, "False", "GroupNotFound").await?;
    // It comes back without further ado, which is what Argo CD does when it recreates an object.
    space.apply(&[group(QWEN, "base").lens("pirate", "lenses/pirate").manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    delete::<ModelGroup>(&space, QWEN).await?;
    delete::<ModelPlacement>(&space, "shared").await?;
    nothing_is_owned(&space).await?;
    space.remove().await?;

    let space = serving(release, "namespace-at-once").await?;
    space.remove_and_wait().await?;
    every_space_is_gone(release).await
}

/// The kinds go first: all objects go with them, and what they own. The operator and the gateway wait, and when the kinds are
/// back, they serve what is declared.
pub async fn kinds_deleted_first_take_everything_along_and_may_come_back(release: &Release) -> Result<()> {
    let space = serving(release, "kinds-first").await?;
    let restarts = restarts(release).await?;
    let definitions: Api<CustomResourceDefinition> = Api::all(release.client.clone());
    for definition in turret_crds::crds() {
        definitions.delete(&definition.name_any(), &DeleteParams::default()).await?;
    }
    space
        .eventually("the kinds are gone", async || {
            let mut left = Vec::new();
            for definition in turret_crds::crds() {
                left.extend(definitions.get_opt(&definition.name_any()).await?.map(|found| found.status));
            }
            Ok(when(left.is_empty(), || format!("{left:?}")))
        })
        .await?;
    nothing_is_owned(&space).await?;

    for definition in turret_crds::crds() {
        apply_kind(&release.client, &definition).await?;
    }
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.at_length("it is served again", async || is_serving(&space).await).await?;
    let family = Family::read()?;
    is_answered_again(&space, QWEN, case(&family, QWEN, None)).await?;
    let after = self::restarts(release).await?;
    ensure!(after == restarts, "containers were restarted: {restarts:?} became {after:?}");
    space.remove_and_wait().await
}

/// The watches of kinds that were gone are tried again ever more rarely, so this may take longer than elsewhere.
async fn is_serving(space: &Space<'_>) -> Result<Result<(), String>> {
    let status = space.placement("shared").await?.status.unwrap_or_default();
    let ready = is_true(&status.conditions, READY);
    Ok(when(ready, || format!("{:?}", status.conditions)))
}

/// How often the containers of operator and gateway were restarted, by pod.
async fn restarts(release: &Release) -> Result<Vec<(String, i32)>> {
    let mut found = Vec::new();
    for part in [Part::Operator, Part::Gateway] {
        for pod in release.pods(part).await? {
            let containers = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
            let restarts = containers.map(|container| container.restart_count).sum();
            found.push((pod.name_any(), restarts));
        }
    }
    found.sort();
    Ok(found)
}

/// The chart goes first: workers serve on without operator and gateway, and the objects can still
/// be deleted. Installs nothing again: the last scenario of a run.
pub async fn workers_serve_on_after_helm_uninstall(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = serving(release, "uninstalled").await?;
    let lives = space.lives("shared").await?;
    // Its token is signed before the key goes with the chart.
    let direct = Direct::to(release, &space, "shared", &space.workers("shared").await?[0]).await?.client();
    release.uninstall().await?;
    for lens in [None, Some("pirate")] {
        direct.verify(&model(QWEN, lens), case(&family, QWEN, lens), Mode::Streamed).await?;
    }
    crate::cluster::space::changed(&lives, &space.lives("shared").await?)?;

    delete::<ModelGroup>(&space, QWEN).await?;
    delete::<ModelPlacement>(&space, "shared").await?;
    nothing_is_owned(&space).await?;
    space.remove().await
}

/// Also those that the scenarios before left behind them without waiting.
async fn every_space_is_gone(release: &Release) -> Result<()> {
    let namespaces: Api<Namespace> = Api::all(release.client.clone());
    let of_scenarios = ListParams::default().labels(SCENARIO);
    eventually(PATIENCE, "no namespace of a scenario is left", async || {
        let left = namespaces.list(&of_scenarios).await?.items;
        Ok(when(left.is_empty(), || {
            format!("{:?}", left.iter().map(|space| space.name_any()).collect::<Vec<_>>())
        }))
    })
    .await
}

async fn serving<'r>(release: &'r Release, name: &str) -> Result<Space<'r>> {
    let space = Space::create(release, name).await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let owned = owned(&space).await?;
    ensure!(owned.len() >= 5, "the label `{}` is missing on owned objects: {owned:?}", label::PLACEMENT);
    Ok(space)
}

async fn delete<K>(space: &Space<'_>, name: &str) -> Result<()>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned,
    K::DynamicType: Default,
{
    let api: Api<K> = space.all();
    api.delete(name, &DeleteParams::default()).await?;
    space
        .eventually(&format!("`{name}` is deleted"), async || {
            let object = api.get_opt(name).await?;
            Ok(when(object.is_none(), || format!("finalizers {:?}", object.map(|o| o.finalizers().to_vec()))))
        })
        .await
}

async fn nothing_is_owned(space: &Space<'_>) -> Result<()> {
    space
        .eventually("nothing that the operator made is left", async || {
            let left = owned(space).await?;
            Ok(when(left.is_empty(), || format!("{left:?}")))
        })
        .await
}

/// Everything with a placement's label, as `Kind/name`.
async fn owned(space: &Space<'_>) -> Result<Vec<String>> {
    let mut found = names::<Deployment>(space).await?;
    found.extend(names::<ReplicaSet>(space).await?);
    found.extend(names::<Pod>(space).await?);
    found.extend(names::<Service>(space).await?);
    found.extend(names::<ConfigMap>(space).await?);
    found.extend(names::<PodDisruptionBudget>(space).await?);
    Ok(found)
}

async fn names<K>(space: &Space<'_>) -> Result<Vec<String>>
where
    K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::de::DeserializeOwned
        + k8s_openapi::Resource,
    K::DynamicType: Default,
{
    let list = space.all::<K>().list(&ListParams::default().labels(label::PLACEMENT)).await?;
    Ok(list
        .items
        .iter()
        .map(|object| format!("{}/{}", <K as k8s_openapi::Resource>::KIND, object.name_any()))
        .collect())
}
