//! Accelerators and the number of workers.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use turret_crds::condition::READY;

use super::{QWEN, case, model};
use crate::cluster::eventually::when;
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::objects::{group, placement};
use crate::cluster::release::{Release, is_ready};
use crate::cluster::space::Space;

/// The made-up accelerator of the cluster is no device: a worker that is not told to use the CPU
/// must say so, instead of serving a hundred times slower than its owner pays for.
pub async fn a_worker_without_the_device_it_was_given_says_so(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "device").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate");
    let workers = placement("gpu", &[QWEN]).on_gpu();
    space.apply(&[declared.manifest(), workers.manifest()]).await?;
    let failed = space.placement_is("gpu", READY, "False", "DeviceNotFound").await?;
    let conditions = failed.status.unwrap_or_default().conditions;
    let ready = conditions.iter().find(|condition| condition.type_ == READY);
    let message = ready.map(|condition| condition.message.as_str()).unwrap_or_default();
    println!("    {message}");
    ensure!(message.contains("TURRET_DEVICE"), "the message does not tell what to do: {message:?}");

    space.apply(&[workers.computing_on_cpu().manifest()]).await?;
    space.serves("gpu", &[QWEN]).await?;
    let answer = case(&family, QWEN, Some("pirate"));
    space.gateway().verify(&model(QWEN, Some("pirate")), answer, Mode::Whole).await?;
    space.remove().await
}

/// Each worker claims a device of a class by a template that the operator makes. No driver has such devices here, so the
/// worker waits, and its status says for what. Another class is another template, and the old one goes with the last pod.
pub async fn a_worker_claims_a_device_of_a_class(release: &Release) -> Result<()> {
    const CLASSES: [&str; 2] = ["small.turret.test", "large.turret.test"];
    for class in CLASSES {
        let class = json!({
            "apiVersion": "resource.k8s.io/v1", "kind": "DeviceClass", "metadata": {"name": class}, "spec": {},
        });
        release.tools.apply(&class.to_string()).await?;
    }
    let space = Space::create(release, "device-class").await?;
    let workers = placement("claims", &[QWEN]);
    let small = workers.clone().with_device_class(CLASSES[0]);
    space.apply(&[group(QWEN, "base").manifest(), small.manifest()]).await?;
    let waiting = space.placement_is("claims", READY, "False", "Unschedulable").await?;
    let conditions = waiting.status.unwrap_or_default().conditions;
    let ready = conditions.iter().find(|condition| condition.type_ == READY).context("a condition")?;
    println!("    {}", ready.message);

    let pods = space.workers("claims").await?;
    let spec = pods.first().and_then(|pod| pod.spec.clone()).context("a worker waits")?;
    let claim = spec.resource_claims.unwrap_or_default().pop().context("its pod claims a device")?;
    let used = spec.containers[0].resources.clone().and_then(|r| r.claims).unwrap_or_default();
    ensure!(used.iter().any(|used| used.name == claim.name), "the worker does not use its claim: {used:?}");
    let template = claim.resource_claim_template_name.context("the claim is made from a template")?;
    let classes = space.kubectl(&TEMPLATES).await?;
    let only = format!("{template}={}", CLASSES[0]);
    ensure!(classes.trim() == only, "not one template of the class: {classes:?}");

    let large = workers.with_device_class(CLASSES[1]).replicas(0);
    space.apply(&[large.manifest()]).await?;
    space
        .eventually("the template of the other class is the only one", async || {
            let classes = space.kubectl(&TEMPLATES).await?;
            let of_class = format!("={}", CLASSES[1]);
            let is_alone = classes.matches('=').count() == 1 && classes.trim().ends_with(&of_class);
            Ok(when(is_alone, || classes.clone()))
        })
        .await?;
    space.remove().await?;
    for class in CLASSES {
        release.tools.kubectl(["delete", "deviceclass", class]).await?;
    }
    Ok(())
}

/// Prints the templates of claims as `NAME=CLASS `.
const TEMPLATES: [&str; 4] = [
    "get",
    "resourceclaimtemplates",
    "-o",
    "jsonpath={range .items[*]}{.metadata.name}={.spec.spec.devices.requests[0].exactly.deviceClassName} {end}",
];

/// `kubectl scale`, up, to zero and back.
pub async fn kubectl_scale_changes_the_number_of_workers(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "scale").await?;
    let declared = group(QWEN, "base");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;

    for (count, reason) in [(2, "Serving"), (0, "ScaledToZero"), (1, "Serving")] {
        space.kubectl(&["scale", "mpl/shared", &format!("--replicas={count}")]).await?;
        let placement = space.placement_is("shared", READY, "True", reason).await?;
        ensure!(placement.spec.replicas == count, "somebody else wrote spec.replicas: {placement:?}");
        space
            .eventually(&format!("{count} workers are counted"), async || {
                let status = space.placement("shared").await?.status.unwrap_or_default();
                let workers = space.workers("shared").await?;
                let ready = workers.iter().filter(|pod| is_ready(pod)).count();
                let counts = (status.replicas, status.ready_replicas, status.updated_replicas);
                let wanted = Some(count);
                let holds = counts == (wanted, wanted, wanted) && ready == usize::try_from(count)?;
                Ok(when(holds, || format!("status {counts:?}, {} pods, {ready} ready", workers.len())))
            })
            .await?;
    }
    space.gateway().verify(QWEN, case(&family, QWEN, None), Mode::Whole).await?;
    space.remove().await
}
