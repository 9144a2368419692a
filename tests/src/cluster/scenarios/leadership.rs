//! Two replicas of the operator: one acts, and when it goes or loses the Lease, the other does.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::json;

use super::{QWEN, case, model};
use crate::cluster::eventually::{PATIENCE, eventually, when};
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::objects::{Group, group, placement};
use crate::cluster::release::{NAMESPACE, Part, Release, is_ready};
use crate::cluster::space::Space;

/// The leader's pod is deleted, then the Lease is taken from its successor; each time the other replica carries
/// out what changes, and it alone writes.
pub async fn another_replica_leads_when_the_leader_goes(release: &Release) -> Result<()> {
    let before = release.deployment(Part::Operator).await?.spec.and_then(|spec| spec.replicas).unwrap_or(1);
    release.scale(Part::Operator, 2).await?;
    let tried = two_replicas(release).await;
    // Whatever came of it, the other scenarios count on what the chart declares.
    release.scale(Part::Operator, before).await?;
    tried
}

async fn two_replicas(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "leaders").await?;
    let mut declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;

    let first = holder(release).await?;
    let pods: Api<Pod> = Api::namespaced(release.client.clone(), NAMESPACE);
    pods.delete(&pod_of(release, &first).await?.name_any(), &DeleteParams::default()).await?;
    declared = carried_out(&space, &family, declared, "shout").await?;
    let second = holder(release).await?;
    ensure!(second != first, "`{first}` was deleted and still holds the Lease");

    // Somebody else writes his name into the Lease: the leader must notice, and not write it back.
    // To a replica that stands by: one that still starts, or ends already, would let the Lease expire.
    let other = eventually(PATIENCE, "another replica of the operator stands by", async || {
        let mut pods = release.pods(Part::Operator).await?.into_iter();
        let standby = pods.find(|pod| {
            is_ready(pod) && pod.metadata.deletion_timestamp.is_none() && pod.name_any() != second
        });
        Ok(standby.map(|pod| pod.name_any()).ok_or_else(|| format!("`{second}` is alone")))
    })
    .await?;
    let lease = lease(release).await?;
    let leases: Api<Lease> = Api::namespaced(release.client.clone(), NAMESPACE);
    let taken = json!({"spec": {"holderIdentity": other}});
    leases.patch(&lease.name_any(), &PatchParams::default(), &Patch::Merge(&taken)).await?;
    eventually(PATIENCE, "the leader whose Lease was taken has stood down", async || {
        let log = release.tools.logs(NAMESPACE).await;
        Ok(when(log.contains("lost the leadership"), || "nobody says that it lost the leadership".into()))
    })
    .await?;
    let mark = release.audit.mark()?;
    carried_out(&space, &family, declared, "terse").await?;
    let third = holder(release).await?;
    ensure!(third == other, "the Lease was given to `{other}` and `{third}` holds it");

    let address = pod_of(release, &third).await?.status.and_then(|status| status.pod_ip).unwrap_or_default();
    let requests = release.audit.of(&release.user(Part::Operator).await?, mark)?;
    let writes = requests.iter().filter(|r| r.is_write() && r.object_ref.resource != "leases");
    let writers: BTreeSet<&str> = writes.flat_map(|r| &r.source_ips).map(String::as_str).collect();
    ensure!(
        writers == BTreeSet::from([address.as_str()]),
        "{third} at {address} leads, and {writers:?} wrote"
    );
    crate::cluster::space::changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

/// Adds a lens and waits until it is served.
async fn carried_out(space: &Space<'_>, family: &Family, declared: Group, lens: &str) -> Result<Group> {
    let declared = declared.lens(lens, &format!("lenses/{lens}"));
    space.apply(&[declared.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    space.gateway().verify(&model(QWEN, Some(lens)), case(family, QWEN, Some(lens)), Mode::Whole).await?;
    Ok(declared)
}

async fn lease(release: &Release) -> Result<Lease> {
    let leases: Api<Lease> = Api::namespaced(release.client.clone(), NAMESPACE);
    let mut found = leases.list(&ListParams::default()).await?.items;
    ensure!(found.len() == 1, "there are {} Leases in {NAMESPACE}", found.len());
    Ok(found.remove(0))
}

/// Who holds the Lease, once somebody does.
async fn holder(release: &Release) -> Result<String> {
    eventually(PATIENCE, "a replica of the operator holds the Lease", async || {
        let holder = lease(release).await?.spec.and_then(|spec| spec.holder_identity).unwrap_or_default();
        Ok(if holder.is_empty() { Err("nobody does".to_owned()) } else { Ok(holder) })
    })
    .await
}

async fn pod_of(release: &Release, identity: &str) -> Result<Pod> {
    let pods = release.pods(Part::Operator).await?;
    let names: Vec<_> = pods.iter().map(|pod| pod.name_any()).collect();
    let pod = pods.into_iter().find(|pod| pod.name_any() == identity);
    pod.with_context(|| format!("the holder `{identity}` is none of {names:?}"))
}
