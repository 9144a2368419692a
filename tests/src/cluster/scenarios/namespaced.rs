//! A release that serves one namespace only: without a ClusterRole, and without a look at any other.

use anyhow::{Context as _, Result, bail, ensure};

use super::{QWEN, case, model, whole_group};
use crate::cluster::audit::{Mark, Request};
use crate::cluster::family::Family;
use crate::cluster::gateway::Mode;
use crate::cluster::objects::placement;
use crate::cluster::release::{NAMESPACE, Part, Release};
use crate::cluster::space::Space;

/// What is declared in its namespace is served, the same elsewhere is not touched, nothing is refused to it, and nothing outside
/// is asked for. Afterwards all namespaces are served again.
pub async fn a_release_of_one_namespace_asks_for_nothing_outside(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let inside = Space::create(release, "inside").await?;
    let outside = Space::create(release, "outside").await?;
    let mark = release.audit.mark()?;
    release.serve_only(&[&inside.name]).await?;
    let tried = one_namespace(release, &family, &inside, &outside, mark).await;
    // Whatever came of it, the other scenarios count on what the chart declares.
    release.serve_only(&[]).await?;
    tried?;
    outside.serves("shared", &[QWEN]).await?;
    // The kinds may go next: nothing is to be on its way out then.
    inside.remove_and_wait().await?;
    outside.remove_and_wait().await
}

async fn one_namespace(
    release: &Release,
    family: &Family,
    inside: &Space<'_>,
    outside: &Space<'_>,
    mark: Mark,
) -> Result<()> {
    let objects = [whole_group(family, QWEN).manifest(), placement("shared", &[QWEN]).manifest()];
    outside.apply(&objects).await?;
    inside.apply(&objects).await?;
    inside.serves("shared", &[QWEN]).await?;
    let name = model(QWEN, None);
    inside.gateway().verify(&name, case(family, QWEN, None), Mode::Whole).await?;

    // It was declared first, so it would be there by now.
    let status = outside.placement("shared").await?.status;
    ensure!(status.is_none_or(|s| s.conditions.is_empty()), "the operator wrote a status outside");
    ensure!(outside.workers("shared").await?.is_empty(), "workers were made outside");
    let question = &case(family, QWEN, None).messages;
    match outside.gateway().ask(&name, question, Mode::Whole).await {
        Err(refused) if refused.status == 404 => {}
        other => bail!("what is not served must be refused with 404; got {other:?}"),
    }

    for part in [Part::Operator, Part::Gateway] {
        let pod = release.pods(part).await?.pop().context("a pod of the release runs")?;
        let address = pod.status.and_then(|s| s.pod_ip).context("a running pod has an address")?;
        let user = release.user(part).await?;
        let mut requests = release.audit.of(&user, mark)?;
        // The pod of before had other rights.
        requests.retain(|r| r.source_ips.contains(&address) && !r.object_ref.resource.is_empty());
        ensure!(!requests.is_empty(), "the audit log knows nothing of {user} at {address}");
        let allowed = [inside.name.as_str(), NAMESPACE];
        let is_wrong = |r: &&Request| r.is_forbidden() || !allowed.contains(&r.object_ref.namespace.as_str());
        let wrong: Vec<String> = requests.iter().filter(is_wrong).map(ToString::to_string).collect();
        ensure!(wrong.is_empty(), "{user} was refused or looked outside:\n    {}", wrong.join("\n    "));
        println!("    {user}: {} requests, all in {allowed:?}", requests.len());
    }
    Ok(())
}
