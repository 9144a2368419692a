//! A scenario's own namespace: Pod Security `restricted`, and the demo family on a volume.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, ResourceExt as _};
use serde_json::Value;
use turret_crds::{ModelGroup, ModelPlacement, WorkerDocument, label};

use super::eventually::{PATIENCE, eventually, when};
use super::family::{Family, copy_readable};
use super::gateway::Gateway;
use super::objects::{folder_as_claim, scenario_namespace};
use super::release::Release;
use super::table::Row;

/// Claim, volume and folder that every space has.
pub const MODELS: &str = "models";

/// A scenario's own namespace.
pub struct Space<'r> {
    release: &'r Release,
    /// Name of the namespace.
    pub name: String,
    folder: PathBuf,
}

/// A worker pod and what must not change while it is left alone: UID and restarts.
pub type Lives = BTreeMap<String, (String, i32)>;

impl<'r> Space<'r> {
    /// Makes the namespace, copies the demo family and offers it as the claim `models`.
    pub async fn create(release: &'r Release, name: &str) -> Result<Space<'r>> {
        let folder = release.environment.volumes.join(name);
        let space = Space { release, name: name.into(), folder };
        copy_readable(&Family::folder(), &space.files())?;
        release.tools.apply(&scenario_namespace(name).to_string()).await?;
        space.offer(MODELS).await?;
        Ok(space)
    }

    /// The namespace that an earlier scenario made under this name, if it is there.
    pub async fn find(release: &'r Release, name: &str) -> Result<Option<Space<'r>>> {
        let namespaces: Api<Namespace> = Api::all(release.client.clone());
        let found = namespaces.get_opt(name).await?.filter(|n| n.metadata.deletion_timestamp.is_none());
        let folder = release.environment.volumes.join(name);
        Ok(found.map(|_| Space { release, name: name.into(), folder }))
    }

    /// Offers the folder `claim` of this space as a claim of the same name.
    pub async fn offer(&self, claim: &str) -> Result<()> {
        let folder = self.folder.join(claim);
        fs::create_dir_all(&folder)?;
        self.release.tools.apply(&folder_as_claim(&self.name, claim, &folder).to_string()).await?;
        Ok(())
    }

    /// What is on the volume `models`, as a folder of this machine.
    pub fn files(&self) -> PathBuf {
        self.on_volume(MODELS)
    }

    /// What is on a volume, as a folder of this machine.
    pub fn on_volume(&self, claim: &str) -> PathBuf {
        self.folder.join(claim)
    }

    /// `kubectl apply` of objects into this namespace.
    pub async fn apply(&self, objects: &[Value]) -> Result<()> {
        let mut text = String::new();
        for object in objects {
            let mut object = object.clone();
            object["metadata"]["namespace"] = self.name.clone().into();
            text += &format!("---\n{object}\n");
        }
        self.release.tools.apply(&text).await?;
        Ok(())
    }

    /// `kubectl ARGUMENTS… -n NAMESPACE`.
    pub async fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        self.release.tools.kubectl(arguments.iter().copied().chain(["-n", &self.name])).await
    }

    /// `kubectl patch OBJECT`, merging.
    pub async fn patch(&self, object: &str, patch: &Value) -> Result<()> {
        self.kubectl(&["patch", object, "--type=merge", "-p", &patch.to_string()]).await?;
        Ok(())
    }

    /// What `kubectl get ARGUMENTS…` prints of one object.
    pub async fn row(&self, arguments: &[&str]) -> Result<Row> {
        let arguments: Vec<&str> = ["get"].iter().chain(arguments).copied().collect();
        Row::only(&self.kubectl(&arguments).await?)
    }

    /// A client that asks for what is served in this namespace.
    pub fn gateway(&self) -> Gateway {
        Gateway::of_namespace(self.release.http.clone(), &self.release.gateway_url, &self.name)
    }

    /// Objects of a kind in this namespace.
    pub fn all<K>(&self) -> Api<K>
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope>,
        K::DynamicType: Default,
    {
        Api::namespaced(self.release.client.clone(), &self.name)
    }

    /// The group as it is now.
    pub async fn group(&self, name: &str) -> Result<ModelGroup> {
        Ok(self.all::<ModelGroup>().get(name).await?)
    }

    /// The placement as it is now.
    pub async fn placement(&self, name: &str) -> Result<ModelPlacement> {
        Ok(self.all::<ModelPlacement>().get(name).await?)
    }

    /// Waits until the group's condition has this status and reason for its present spec.
    pub async fn group_is(&self, name: &str, type_: &str, status: &str, reason: &str) -> Result<ModelGroup> {
        let what = format!("the group `{name}` is {type_}={status}/{reason}");
        eventually(PATIENCE, &what, async || {
            let group = self.group(name).await?;
            let conditions = group.status.as_ref().map(|status| status.conditions.clone());
            let generation = group.metadata.generation;
            let found = stands(&conditions.unwrap_or_default(), generation, (type_, status, reason));
            Ok(found.map(|()| group))
        })
        .await
    }

    /// Waits until the placement's condition has this status and reason for its present spec.
    pub async fn placement_is(
        &self,
        name: &str,
        type_: &str,
        status: &str,
        reason: &str,
    ) -> Result<ModelPlacement> {
        let what = format!("the placement `{name}` is {type_}={status}/{reason}");
        eventually(PATIENCE, &what, async || {
            let placement = self.placement(name).await?;
            let conditions = placement.status.as_ref().map(|status| status.conditions.clone());
            let generation = placement.metadata.generation;
            let found = stands(&conditions.unwrap_or_default(), generation, (type_, status, reason));
            Ok(found.map(|()| placement))
        })
        .await
    }

    /// Waits until groups and placement are ready.
    pub async fn serves(&self, placement: &str, groups: &[&str]) -> Result<()> {
        self.placement_is(placement, "Ready", "True", "Serving").await?;
        for group in groups {
            self.group_is(group, "Ready", "True", "Serving").await?;
        }
        Ok(())
    }

    /// The worker pods of a placement that are not leaving, sorted by name.
    pub async fn workers(&self, placement: &str) -> Result<Vec<Pod>> {
        let selector = ListParams::default().labels(&format!("{}={placement}", label::PLACEMENT));
        let mut pods = self.all::<Pod>().list(&selector).await?.items;
        pods.retain(|pod| pod.metadata.deletion_timestamp.is_none());
        pods.sort_by_key(|pod| pod.name_any());
        Ok(pods)
    }

    /// Which worker pods live, and how often their containers were restarted.
    pub async fn lives(&self, placement: &str) -> Result<Lives> {
        Ok(self.workers(placement).await?.iter().map(life).collect())
    }

    /// The stored worker document of a placement.
    pub async fn document(&self, placement: &str) -> Result<WorkerDocument> {
        let config_map = self.all::<ConfigMap>().get(&label::owned_name(placement)).await?;
        let data = config_map.binary_data.unwrap_or_default();
        let document = data.get(label::DOCUMENT_KEY).context("the ConfigMap carries no worker document")?;
        Ok(WorkerDocument::from_gzip(&document.0)?)
    }

    /// Deletes the namespace and all that belongs to it, without waiting: the next scenario need
    /// not wait for pods that take their time to leave.
    pub async fn remove(self) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.release.client.clone());
        namespaces.delete(&self.name, &DeleteParams::default()).await?;
        Ok(())
    }

    /// Deletes the namespace and all that belongs to it, and waits until it is gone.
    pub async fn remove_and_wait(self) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.release.client.clone());
        namespaces.delete(&self.name, &DeleteParams::default()).await?;
        self.gone().await
    }

    /// Waits until the namespace is gone.
    pub async fn gone(&self) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.release.client.clone());
        eventually(PATIENCE, &format!("the namespace `{}` is gone", self.name), async || {
            let namespace = namespaces.get_opt(&self.name).await?;
            Ok(when(namespace.is_none(), || {
                let status = namespace.and_then(|namespace| namespace.status);
                serde_json::to_string(&status).unwrap_or_default()
            }))
        })
        .await
    }

    /// Waits until `probe` is content, at most [`PATIENCE`].
    pub async fn eventually<T>(
        &self,
        what: &str,
        probe: impl AsyncFnMut() -> Result<Result<T, String>>,
    ) -> Result<T> {
        eventually(PATIENCE, what, probe).await
    }

    /// As [`Space::eventually`], for what takes longer: a back-off, a restart.
    pub async fn at_length<T>(
        &self,
        what: &str,
        probe: impl AsyncFnMut() -> Result<Result<T, String>>,
    ) -> Result<T> {
        eventually(PATIENCE + Duration::from_secs(90), what, probe).await
    }
}

/// A pod's name, UID and restarts.
fn life(pod: &Pod) -> (String, (String, i32)) {
    let status = pod.status.as_ref();
    let restarts = status
        .and_then(|status| status.container_statuses.as_ref())
        .into_iter()
        .flatten()
        .map(|c| c.restart_count);
    (pod.name_any(), (pod.uid().unwrap_or_default(), restarts.sum()))
}

/// Whether the condition is as wanted and speaks of this generation; else all that is said.
fn stands(
    conditions: &[Condition],
    generation: Option<i64>,
    (type_, status, reason): (&str, &str, &str),
) -> Result<(), String> {
    let holds = conditions.iter().any(|condition| {
        condition.type_ == type_
            && condition.status == status
            && condition.reason == reason
            && condition.observed_generation == generation
    });
    when(holds, || {
        let said: Vec<String> = conditions
            .iter()
            .map(|c| {
                let seen = c.observed_generation.unwrap_or_default();
                format!("{}={}/{} ({}) of generation {seen}", c.type_, c.status, c.reason, c.message)
            })
            .collect();
        format!("generation {generation:?}: {}", said.join(", "))
    })
}

/// Pods that were replaced or restarted between two looks.
pub fn changed(before: &Lives, after: &Lives) -> Result<()> {
    if before != after {
        bail!("pods were restarted or replaced: before {before:?}, after {after:?}");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    #[test]
    fn a_condition_of_an_older_generation_does_not_count() {
        let ready = Condition {
            type_: "Ready".into(),
            status: "True".into(),
            reason: "Serving".into(),
            message: "all".into(),
            observed_generation: Some(1),
            last_transition_time: Time(k8s_openapi::jiff::Timestamp::UNIX_EPOCH),
        };
        let want = ("Ready", "True", "Serving");
        assert_eq!(stands(std::slice::from_ref(&ready), Some(1), want), Ok(()));
        let seen = stands(&[ready], Some(2), want).unwrap_err();
        assert_eq!(seen, "generation Some(2): Ready=True/Serving (all) of generation 1");
    }
}
