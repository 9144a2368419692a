//! Rights and rest: what is refused, what the operator may do and does, and that it does nothing
//! when there is nothing to do.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::rbac::v1::PolicyRule;
use kube::api::ListParams;
use kube::{Api, ResourceExt as _};
use serde::Deserialize;

use super::{LLAMA, QWEN, whole_group};
use crate::cluster::audit::{AuditLog, Request, Right, rights, unused};
use crate::cluster::crd_rules;
use crate::cluster::eventually::{eventually, when};
use crate::cluster::family::Family;
use crate::cluster::objects::placement;
use crate::cluster::release::{NAMESPACE, Part, Release};
use crate::cluster::space::Space;

/// Both kinds refuse each invalid example with a message a person understands.
pub async fn invalid_objects_are_refused_readably(release: &Release) -> Result<()> {
    let tried = crd_rules::check(&release.client).await?;
    println!(
        "    accepted {}, refused by a rule {}, refused by a bound {}",
        tried.accepted, tried.refused_by_rule, tried.refused_by_bound
    );
    ensure!(tried.accepted > 0 && tried.refused_by_rule >= 15, "too little was tried: {tried:?}");
    Ok(())
}

/// All pods, ours and the workers', run where Pod Security `restricted` is enforced, and the API
/// server indeed refuses a pod there that asks for more.
pub async fn every_pod_runs_under_restricted_pod_security(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "restricted").await?;
    let workers = placement("shared", &[QWEN]);
    space.apply(&[whole_group(&family, QWEN).manifest(), workers.manifest()]).await?;
    space.serves("shared", &[QWEN]).await?;
    let privileged = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "namespace": "restricted"},
        "spec": {"containers": [{"name": "c", "image": "none", "securityContext": {"privileged": true}}]}}"#;
    match release.tools.apply(privileged).await {
        Err(error) if error.to_string().contains("PodSecurity") => {}
        other => bail!("Pod Security is not enforced: a privileged pod got {other:?}"),
    }
    let pods: Api<Pod> = Api::all(release.client.clone());
    let namespaces: Api<Namespace> = Api::all(release.client.clone());
    let mut images = Vec::new();
    for pod in pods.list(&ListParams::default()).await? {
        let images_of_pod = pod.spec.iter().flat_map(|spec| &spec.containers).filter_map(|c| c.image.clone());
        images.extend(images_of_pod);
        let namespace = pod.namespace().unwrap_or_default();
        let labels = namespaces.get(&namespace).await?.labels().clone();
        let enforced = labels.get("pod-security.kubernetes.io/enforce").map(String::as_str);
        ensure!(enforced == Some("restricted"), "{namespace}/{} runs under {enforced:?}", pod.name_any());
    }
    for image in [&release.environment.operator_image, &release.environment.worker_image] {
        ensure!(images.contains(image), "no pod runs {image}, so nothing was shown: {images:?}");
    }
    space.remove().await
}

/// In steady state the operator writes nothing but its Lease, though it looks again and again.
pub async fn the_operator_writes_nothing_in_steady_state(release: &Release) -> Result<()> {
    let family = Family::read()?;
    let space = Space::create(release, "steady").await?;
    space
        .apply(&[
            whole_group(&family, QWEN).manifest(),
            whole_group(&family, LLAMA).manifest(),
            placement("shared", &[QWEN, LLAMA]).manifest(),
        ])
        .await?;
    space.serves("shared", &[QWEN, LLAMA]).await?;
    let operator = release.user(Part::Operator).await?;
    let gateway = release.user(Part::Gateway).await?;
    // What was declared just now has echoes: events, and a summary that is refreshed once a minute.
    let mut looks = 0;
    eventually(Duration::from_secs(180), "the operator comes to rest", async || {
        looks += 1;
        let (before, mark) = (reconciles(release).await?, release.audit.mark()?);
        // An annotation makes the operator look at both kinds again, with nothing to do.
        for object in [format!("mg/{QWEN}"), "mpl/shared".into()] {
            space
                .kubectl(&["annotate", "--overwrite", &object, &format!("turret.test/look={looks}")])
                .await?;
        }
        renewals(release, 10).await?;
        let looked = reconciles(release).await? - before;
        ensure!(looked >= 2, "the operator looked {looked} times at two objects that were touched");
        let mut written = writes(release.audit.of(&operator, mark)?);
        written.extend(writes(release.audit.of(&gateway, mark)?));
        if written.is_empty() {
            println!("    {looked} reconciles in ten renewals of the Lease, and nothing written");
        }
        Ok(when(written.is_empty(), || listed(&written)))
    })
    .await?;
    space.remove().await
}

/// How often the operator has looked at an object, by its own metrics.
async fn reconciles(release: &Release) -> Result<u64> {
    let pod = release.pods(Part::Operator).await?.pop().context("an operator runs")?;
    let address = pod.status.and_then(|status| status.pod_ip).context("a running pod has an address")?;
    let text = release.http.get(format!("http://{address}:8080/metrics")).send().await?.text().await?;
    let counts = text.lines().filter_map(|line| {
        let (_, count) = line.strip_prefix("turret_operator_reconciles_total")?.rsplit_once(' ')?;
        count.parse::<u64>().ok()
    });
    Ok(counts.sum())
}

/// Waits until the operator has renewed its Lease so many times: the clock of a live operator.
async fn renewals(release: &Release, count: usize) -> Result<()> {
    let leases: Api<Lease> = Api::namespaced(release.client.clone(), NAMESPACE);
    let mut last = None;
    let mut seen = 0;
    while seen <= count {
        last = eventually(Duration::from_secs(60), "the operator renews its Lease", async || {
            let lease = leases.list(&ListParams::default()).await?.items.pop();
            let renewed = lease.and_then(|lease| lease.spec).and_then(|spec| spec.renew_time);
            let moved = renewed.is_some() && renewed != last;
            Ok(if moved { Ok(renewed) } else { Err(format!("{renewed:?}")) })
        })
        .await?;
        seen += 1;
    }
    Ok(())
}

fn writes(requests: Vec<Request>) -> Vec<Request> {
    requests.into_iter().filter(|r| r.is_write() && r.object_ref.resource != "leases").collect()
}

fn listed(requests: &[Request]) -> String {
    requests.iter().take(12).map(|request| format!("\n    {request}")).collect()
}

/// What `turret-operator rbac` prints.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Rules {
    operator: Vec<PolicyRule>,
    operator_of_cluster: Vec<PolicyRule>,
    operator_own_namespace: Vec<PolicyRule>,
    gateway: Vec<PolicyRule>,
    gateway_of_cluster: Vec<PolicyRule>,
    gateway_own_namespace: Vec<PolicyRule>,
}

/// By the audit log of everything before: nothing was refused, and no right is there for nothing.
pub async fn rights_are_exactly_what_is_used(release: &Release) -> Result<()> {
    let printed = tokio::process::Command::new(&release.environment.operator).arg("rbac").output().await?;
    ensure!(printed.status.success(), "`turret-operator rbac` failed: {printed:?}");
    let rules: Rules =
        serde_yaml::from_slice(&printed.stdout).context("`turret-operator rbac` printed no rules")?;
    let mut wrong = Vec::new();
    for (part, rules) in [
        (Part::Operator, [rules.operator, rules.operator_of_cluster, rules.operator_own_namespace].concat()),
        (Part::Gateway, [rules.gateway, rules.gateway_of_cluster, rules.gateway_own_namespace].concat()),
    ] {
        let user = release.user(part).await?;
        let requests = release.audit.of(&user, AuditLog::beginning())?;
        ensure!(!requests.is_empty(), "the audit log knows nothing of {user}");
        let refused = requests.iter().filter(|request| request.is_forbidden());
        wrong.extend(refused.map(|request| format!("{user} was refused: {request}")));
        let rights: Vec<Right> = rights(&rules);
        ensure!(rights.len() >= 3, "`turret-operator rbac` lists only {} rights for {user}", rights.len());
        wrong.extend(unused(&rights, &requests).iter().map(|right| format!("{user} never used: {right}")));
        println!("    {user}: {} requests, {} rights", requests.len(), rights.len());
    }
    wrong.sort();
    wrong.dedup();
    ensure!(wrong.is_empty(), "rights and use differ:\n    {}", wrong.join("\n    "));
    Ok(())
}
