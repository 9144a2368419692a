//! Accelerators and the number of workers.

use anyhow::{Result, ensure};
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
