//! Sources that fail: a disk with no room for what is fetched, files that are gone, a token that is taken back.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::DeleteParams;
use serde_json::{Value, json};
use turret_crds::condition::{FailureReason, READY};
use turret_crds::report::Tier;

use super::{QWEN, case, is_answered_again, is_refused, lens_fails, model, questions_to};
use crate::cluster::eventually::when;
use crate::cluster::family::{Family, copy_readable};
use crate::cluster::gateway::Mode;
use crate::cluster::load::Load;
use crate::cluster::objects::{group, placement, token_secret};
use crate::cluster::release::Release;
use crate::cluster::space::{Space, changed};
use crate::cluster::worker::Direct;
use crate::worker::hub::{COMMIT, HubServer};

/// The hub's repository with the lenses of the demo family.
const REPO: &str = "demo-org/family";

/// A disk budget that holds one of two lenses that are to be kept on the disk: the other one is named with the numbers while the
/// first one is served. A larger disk is another pod, and holds both.
pub async fn a_full_disk_is_told_and_what_is_there_is_served(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let hub = hub(release).await?;
    let space = Space::create(release, "full-disk").await?;
    let budget = bytes_of("lenses/pirate")? + bytes_of("lenses/shout")? / 2;
    let workers =
        placement("shared", &[QWEN]).asking_hub(&hub.endpoint).with_disk_budget(&budget.to_string());
    let declared = group(QWEN, "base").lens_of("pirate", on_hub("lenses/pirate")).cached();
    space.apply(&[declared.manifest(), workers.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;
    let load = Load::start(&space.gateway(), questions_to(&family, &[("pirate", "pirate")]), 2);

    // Declared later: which of the two finds room is not left to chance.
    space.apply(&[declared.lens_of("shout", on_hub("lenses/shout")).cached().manifest()]).await?;
    // It would fit alone, so it is tried again: the other one may leave.
    let message = lens_fails(&space, "shout", FailureReason::DiskFull).await?;
    for word in ["disk budget", budget.to_string().as_str(), REPO] {
        ensure!(message.contains(word), "{word:?} is not in: {message}");
    }
    is_refused(&space, &model(QWEN, Some("shout")), FailureReason::DiskFull).await?;
    load.goes_on().await?;
    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    changed(&lives, &space.lives("shared").await?)?;

    space.patch("mpl/shared", &json!({"spec": {"memory": {"diskBudget": "64Mi"}}})).await?;
    space.serves("shared", &[QWEN]).await?;
    for lens in ["shout", "pirate"] {
        let answer = case(&family, QWEN, Some(lens));
        is_answered_again(&space, &model(QWEN, Some(lens)), answer).await?;
    }
    space.remove().await
}

/// The files of a lens are removed from their volume: it is served while it is in memory, and named once it is missed. With the
/// files it comes back by itself.
pub async fn a_source_that_disappears_is_told_once_it_is_missed_and_heals(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "vanished").await?;
    let declared = group(QWEN, "base").lens("pirate", "lenses/pirate").lens("terse", "lenses/terse");
    space.apply(&[declared.manifest(), placement("shared", &[QWEN]).manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;
    let gateway = space.gateway();
    let (terse, answer) = (model(QWEN, Some("terse")), case(&family, QWEN, Some("terse")));
    gateway.verify(&terse, answer, Mode::Whole).await?;
    let load = Load::start(&gateway, questions_to(&family, &[("pirate", "pirate")]), 2);

    let files = space.files().join("lenses/terse");
    fs::remove_dir_all(&files).with_context(|| format!("failed to remove {}", files.display()))?;
    for mode in [Mode::Streamed, Mode::Whole] {
        gateway.verify(&terse, answer, mode).await?;
    }
    space.group_is(QWEN, READY, "True", "Serving").await?;

    let worker = Direct::to(release, &space, "shared", &space.workers("shared").await?[0]).await?;
    leaves_memory(&space, &worker, "terse").await?;
    is_refused(&space, &terse, FailureReason::SourceNotFound).await?;
    let message = lens_fails(&space, "terse", FailureReason::SourceNotFound).await?;
    ensure!(message.contains("pvc://models/lenses/terse"), "the source is not named: {message}");
    load.goes_on().await?;

    copy_readable(&Family::folder().join("lenses/terse"), &files)?;
    let began = Instant::now();
    space.serves("shared", &[QWEN]).await?;
    println!("    healed by itself after {:.1} s", began.elapsed().as_secs_f64());
    is_answered_again(&space, &terse, answer).await?;
    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

/// A hub takes a token no more: what was fetched with it is served, also when it has to be loaded again; a new lens is refused
/// and named. A new token in the Secret is used as soon as the kubelet brings it, and nothing restarts.
pub async fn a_revoked_token_is_told_and_a_new_one_is_used_without_a_restart(
    release: &Release,
) -> Result<()> {
    const SECRET: &str = "hub-token";
    let family = Family::read()?;
    let hub = hub(release).await?;
    hub.ask_for("hf_first");
    let space = Space::create(release, "revoked").await?;
    let private = |path: &str| {
        let mut source = on_hub(path);
        source["secretRef"] = json!({"name": SECRET});
        source
    };
    let workers = placement("shared", &[QWEN]).asking_hub(&hub.endpoint).with_secret(SECRET);
    let declared =
        group(QWEN, "base").lens("pirate", "lenses/pirate").lens_of("fetched", private("lenses/terse"));
    space.apply(&[token_secret(SECRET, "hf_first"), declared.manifest(), workers.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let lives = space.lives("shared").await?;
    let gateway = space.gateway();
    let (fetched, answer) = (model(QWEN, Some("fetched")), case(&family, QWEN, Some("terse")));
    gateway.verify(&fetched, answer, Mode::Whole).await?;

    hub.ask_for("hf_second");
    let sent = hub.served("").len();
    let worker = Direct::to(release, &space, "shared", &space.workers("shared").await?[0]).await?;
    leaves_memory(&space, &worker, "fetched").await?;
    gateway.verify(&fetched, answer, Mode::Whole).await?;
    ensure!(hub.served("").len() == sent, "what was fetched once was fetched again");
    let lenses = [("pirate", "pirate"), ("fetched", "terse")];
    let load = Load::start(&gateway, questions_to(&family, &lenses), 2);

    space.apply(&[declared.lens_of("new", private("lenses/shout")).manifest()]).await?;
    let message = lens_fails(&space, "new", FailureReason::Unauthorized).await?;
    for word in ["401", REPO, format!("`{SECRET}`").as_str()] {
        ensure!(message.contains(word), "{word:?} is not in: {message}");
    }
    ensure!(!message.contains("hf_"), "a token is told: {message}");
    let new = model(QWEN, Some("new"));
    is_refused(&space, &new, FailureReason::Unauthorized).await?;
    load.goes_on().await?;

    let began = Instant::now();
    space.patch(&format!("secret/{SECRET}"), &json!({"stringData": {"token": "hf_second"}})).await?;
    // The kubelet looks now and then, and the worker less and less often.
    space
        .at_length("the new token is used", async || {
            let status = space.group(QWEN).await?.status.unwrap_or_default();
            Ok(when(status.failed_lenses.is_empty(), || format!("{:?}", status.failed_lenses)))
        })
        .await?;
    space.serves("shared", &[QWEN]).await?;
    println!("    healed by itself after {:.1} s", began.elapsed().as_secs_f64());
    is_answered_again(&space, &new, case(&family, QWEN, Some("shout"))).await?;
    let answered = load.stop().await?;
    println!("    {answered} requests meanwhile, all right");
    changed(&lives, &space.lives("shared").await?)?;
    space.remove().await
}

/// The cache is a claim: the worker that takes the place of another finds there what that one fetched.
pub async fn a_new_worker_finds_on_a_claim_what_the_one_before_fetched(release: &Release) -> Result<()> {
    const CLAIM: &str = "cache";
    let family = Family::read()?;
    let hub = hub(release).await?;
    let space = Space::create(release, "cache-claim").await?;
    space.offer(CLAIM).await?;
    // A folder of the node stays whose it was, whatever group a pod is given.
    fs::set_permissions(space.on_volume(CLAIM), fs::Permissions::from_mode(0o777))?;
    let workers = placement("shared", &[QWEN]).asking_hub(&hub.endpoint).caching_on(CLAIM);
    let declared = group(QWEN, "base").lens_of("pirate", on_hub("lenses/pirate")).cached();
    space.apply(&[declared.manifest(), workers.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let (pirate, answer) = (model(QWEN, Some("pirate")), case(&family, QWEN, Some("pirate")));
    space.gateway().verify(&pirate, answer, Mode::Whole).await?;

    let sent = hub.served("").len();
    ensure!(sent > 0, "nothing was fetched");
    let before = space.workers("shared").await?.remove(0);
    space.all::<Pod>().delete(&before.name_any(), &DeleteParams::default()).await?;
    space
        .eventually("another worker takes its place", async || {
            let lives = space.lives("shared").await?;
            let is_replaced = lives.len() == 1 && !lives.contains_key(&before.name_any());
            Ok(when(is_replaced, || format!("{lives:?}")))
        })
        .await?;
    space.serves("shared", &[QWEN]).await?;
    is_answered_again(&space, &pirate, answer).await?;
    ensure!(hub.served("").len() == sent, "what was fetched once was fetched again: {:?}", hub.served(""));
    space.remove().await
}

/// A hub with the lenses of the demo family, where pods reach it.
pub(super) async fn hub(release: &Release) -> Result<HubServer> {
    let hub = HubServer::start_on(release.address_of_this_machine().await?).await;
    for path in ["lenses/pirate", "lenses/shout", "lenses/terse"] {
        hub.add(REPO, &format!("{path}/"), &Family::folder().join(path));
    }
    Ok(hub)
}

/// A folder of the hub's repository, as a source.
pub(super) fn on_hub(path: &str) -> Value {
    json!({"uri": format!("hf://{REPO}/{path}"), "revision": COMMIT})
}

/// Bytes of the files in a folder of the demo family.
fn bytes_of(folder: &str) -> Result<u64> {
    let folder = Family::folder().join(folder);
    let mut bytes = 0;
    for entry in fs::read_dir(&folder).with_context(|| format!("failed to list {}", folder.display()))? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}

/// Has the worker let a lens of the Qwen group leave its memory.
async fn leaves_memory(space: &Space<'_>, worker: &Direct, lens: &str) -> Result<()> {
    space
        .eventually(&format!("`{lens}` has left memory"), async || {
            let may = worker.evict(&model(QWEN, Some(lens))).await?;
            let report = worker.report().await?;
            let tier = report.lens(QWEN, lens).map(|lens| lens.tier);
            let left = may && tier.is_some_and(|tier| tier < Tier::Device);
            Ok(when(left, || format!("it may leave: {may}, it is in {tier:?}")))
        })
        .await
}
