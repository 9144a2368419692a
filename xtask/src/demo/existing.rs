//! The demo on a cluster that exists: `cargo xtask demo --context NAME --operator-image … --worker-image …`.
//!
//! Nothing happens before the cluster was looked at and somebody agreed. What is made lies in two namespaces
//! that carry [`MARK`], beside the chart's own cluster-wide objects; [`clean_up`] removes exactly that, at the
//! end, after a failure, and by `--down`. With `--claim` the samples lie in a namespace of the user's, of which
//! only what carries the mark is removed.

use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::objects::{self, MARK, Samples};
use super::target::Target;
use super::{CLAIM, Large, NAMESPACE, install, perform};
use crate::stage::{self, say};
use crate::{cluster, folders};

/// Options for a cluster that exists.
#[derive(clap::Args, Debug)]
pub struct ExistingArgs {
    /// Run on the cluster of this context of your kubeconfig, instead of one of its own
    #[arg(long, value_name = "NAME", help_heading = "On a cluster that exists")]
    context: Option<String>,
    /// The same with the kubeconfig's current context
    #[arg(long, conflicts_with = "context", help_heading = "On a cluster that exists")]
    current_context: bool,
    /// Image of operator and gateway, where the cluster can pull it: REPOSITORY:TAG or REPOSITORY@sha256:…
    #[arg(long, value_name = "IMAGE", help_heading = "On a cluster that exists")]
    operator_image: Option<String>,
    /// Image of the workers, likewise
    #[arg(long, value_name = "IMAGE", help_heading = "On a cluster that exists")]
    worker_image: Option<String>,
    /// Image with `tar` and `sleep`, for the pod that the demo's files are copied through
    #[arg(
        long,
        value_name = "IMAGE",
        default_value = "docker.io/library/busybox:1.37",
        help_heading = "On a cluster that exists"
    )]
    loader_image: String,
    /// Storage class of the claim for the demo's files; default: the cluster's default
    #[arg(long, value_name = "CLASS", conflicts_with = "claim", help_heading = "On a cluster that exists")]
    storage_class: Option<String>,
    /// Use this claim, which holds what is in tests/fixtures/demo, instead of making and filling one
    #[arg(long, value_name = "NAME", requires = "namespace", help_heading = "On a cluster that exists")]
    claim: Option<String>,
    /// The namespace of that claim; the samples go there
    #[arg(long, value_name = "NAME", help_heading = "On a cluster that exists")]
    namespace: Option<String>,
    /// Do not ask before anything is made
    #[arg(long, help_heading = "On a cluster that exists")]
    yes: bool,
}

/// Namespace of the release: not the usual one, so that nothing of a real installation is meant.
const SYSTEM: &str = "turret-demo-system";
/// What is asked for to hold the demo's files.
const CLAIM_SIZE: &str = "1Gi";
/// The same when a large base is written beside them.
const LARGE_CLAIM_SIZE: &str = "16Gi";
/// First version of Kubernetes that the chart is made for.
const OLDEST: (u32, u32) = (1, 33);

impl ExistingArgs {
    /// Whether a cluster that exists is meant.
    pub fn is_meant(&self) -> bool {
        self.context.is_some() || self.current_context
    }

    /// The context that is meant, if one is. Options that mean nothing without one are refused.
    pub fn context(&self) -> Result<Option<String>> {
        if let Some(context) = &self.context {
            return Ok(Some(context.clone()));
        }
        if self.current_context {
            let target = Target::existing("", SYSTEM, NAMESPACE)?;
            let mut command = target.without_context();
            let current = cluster::finish(command.args(["config", "current-context"]), None)?;
            return Ok(Some(current.trim().to_owned()));
        }
        let given = [
            ("--operator-image", self.operator_image.is_some()),
            ("--worker-image", self.worker_image.is_some()),
            ("--storage-class", self.storage_class.is_some()),
            ("--namespace", self.namespace.is_some()),
            ("--yes", self.yes),
        ];
        match given.iter().find(|(_, given)| *given) {
            Some((option, _)) => bail!("{option} is for a cluster that exists: name it with --context NAME"),
            None => Ok(None),
        }
    }

    fn images(&self) -> Result<[String; 2]> {
        match (&self.operator_image, &self.worker_image) {
            (Some(operator), Some(worker)) => Ok([operator.clone(), worker.clone()]),
            _ => bail!(
                "a cluster that exists pulls its images: build them (cargo xtask image), push them to a registry it can \
                 reach (docs/install.md), and name them with --operator-image and --worker-image"
            ),
        }
    }
}

/// Runs the demo, or takes down what an earlier one left.
pub fn run(args: &super::Args, context: &str) -> Result<()> {
    let options = &args.existing;
    let namespace = options.namespace.as_deref().unwrap_or(NAMESPACE);
    let target = Target::existing(context, SYSTEM, namespace)?;
    if args.down {
        return clean_up(&target);
    }
    let began = Instant::now();
    let [operator, worker] = options.images()?;
    let set = [image_values("operator", &operator)?, image_values("worker", &worker)?].concat();
    let server =
        stage::run(format!("looking at the cluster of the context `{context}`"), |_| look(&target, options))?;
    agree(args, &target, context, &server)?;
    let down = down_command(context, options);
    let shown = show(args, &target, &set, &worker);
    if args.keep {
        let enter = format!("kubectl config use-context {context}");
        match &shown {
            Ok(()) => super::go_on_by_hand(&target, &enter, &down),
            Err(_) => {
                say(format!("\nThe demo failed, and what it made is still there. Take it down: {down}"))
            }
        }
    } else if let Err(error) = clean_up(&target) {
        say(format!("What the demo made could not be removed; try again with: {down}"));
        return shown.and(Err(error));
    }
    shown?;
    say(format!("The demo took {:.0} s.", began.elapsed().as_secs_f64()));
    Ok(())
}

fn down_command(context: &str, options: &ExistingArgs) -> String {
    let namespace =
        options.namespace.as_ref().map_or_else(String::new, |name| format!(" --namespace {name}"));
    format!("cargo xtask demo --down --context {context}{namespace}")
}

/// What the chart is told of an image.
fn image_values(part: &str, image: &str) -> Result<Vec<String>> {
    let (name, digest) = match image.split_once('@') {
        Some((name, digest)) => (name, Some(digest)),
        None => (image, None),
    };
    // A colon before the last slash is a registry's port.
    let slash = name.rfind('/').map_or(0, |at| at + 1);
    let (repository, tag) = match name[slash..].rfind(':') {
        Some(colon) => (&name[..slash + colon], Some(&name[slash + colon + 1..])),
        None => (name, None),
    };
    ensure!(
        !repository.is_empty() && (tag.is_some_and(|t| !t.is_empty()) || digest.is_some()),
        "`{image}` names no image: REPOSITORY:TAG or REPOSITORY@sha256:…"
    );
    let value = |key: &str, value: &str| format!("{part}.image.{key}={value}");
    let mut values = vec![value("repository", repository)];
    values.extend(tag.map(|tag| value("tag", tag)));
    values.extend(digest.map(|digest| value("digest", digest)));
    Ok(values)
}

/// Looks whether the demo can run here, without changing anything. Answers the cluster's version.
fn look(target: &Target, options: &ExistingArgs) -> Result<String> {
    let json = |words: &[&str]| -> Result<Value> {
        let printed = target.kubectl(words.iter().copied().chain(["--output", "json"]))?;
        serde_json::from_str(&printed)
            .with_context(|| format!("`kubectl {}` printed no JSON", words.join(" ")))
    };
    let version = json(&["version"]).context("the cluster does not answer")?;
    let version = version["serverVersion"]["gitVersion"].as_str().unwrap_or_default().to_owned();
    let mut missing = Vec::new();
    missing.extend(too_old(&version));
    missing.extend(no_node(&json(&["get", "nodes"])?));
    for (verb, resource) in
        [("create", "namespaces"), ("create", "customresourcedefinitions"), ("create", "clusterroles")]
    {
        // It answers `no` with an exit status that says so too.
        if target.kubectl(["auth", "can-i", verb, resource]).is_err() {
            missing.push(format!(
                "you may not {verb} {resource} there; ask for the rights of a cluster's administrator"
            ));
        }
    }
    let definitions = ["get", "customresourcedefinitions", "--ignore-not-found", "--output", "name"];
    if !target.kubectl(definitions.into_iter().chain(objects::DEFINITIONS))?.trim().is_empty() {
        missing.push(
            "Turret is installed there already, or an earlier demo was not taken down (cargo xtask demo --down --context \
             NAME); the demo would share its definitions and leaves them alone"
                .to_owned(),
        );
    }
    let mut own = vec![target.system.as_str()];
    match &options.claim {
        None => {
            own.push(&target.namespace);
            missing.extend(no_class(&json(&["get", "storageclasses"])?, options.storage_class.as_deref()));
        }
        Some(claim) => {
            let words = ["get", "pvc", claim, "--namespace", &target.namespace, "--output", "name"];
            if let Err(error) = target.kubectl(words) {
                missing.push(format!("the claim `{claim}` cannot be read: {error:#}"));
            }
        }
    }
    for namespace in own {
        let words = ["get", "namespace", namespace, "--ignore-not-found", "--output", "name"];
        if !target.kubectl(words)?.trim().is_empty() {
            missing.push(format!(
                "the namespace `{namespace}` exists already; the demo makes it, and removes it again"
            ));
        }
    }
    ensure!(missing.is_empty(), "the demo cannot run there:\n  - {}", missing.join("\n  - "));
    Ok(version)
}

fn too_old(version: &str) -> Option<String> {
    let mut numbers = version.trim_start_matches('v').split('.').map(|n| n.parse::<u32>().unwrap_or(0));
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    (found < OLDEST)
        .then(|| format!("it runs Kubernetes {version}; {}.{} or newer is needed", OLDEST.0, OLDEST.1))
}

fn no_node(nodes: &Value) -> Option<String> {
    let is_fine = |node: &&Value| {
        let ready = node["status"]["conditions"].as_array().into_iter().flatten();
        let ready = ready.filter(|c| c["type"] == "Ready").any(|c| c["status"] == "True");
        ready
            && node["status"]["nodeInfo"]["architecture"] == "amd64"
            && node["spec"]["unschedulable"] != true
    };
    let fine = nodes["items"].as_array().into_iter().flatten().filter(is_fine).count();
    (fine == 0).then(|| "it has no amd64 node that is ready and takes pods".to_owned())
}

fn no_class(classes: &Value, wanted: Option<&str>) -> Option<String> {
    let items = classes["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let name = |class: &Value| class["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    let is_default = |class: &&Value| {
        class["metadata"]["annotations"]["storageclass.kubernetes.io/is-default-class"] == "true"
    };
    let names: Vec<String> = items.iter().map(name).collect();
    match wanted {
        Some(wanted) if names.iter().any(|name| name == wanted) => None,
        Some(wanted) => Some(format!("it has no storage class `{wanted}`, but {names:?}")),
        None if items.iter().any(|class| is_default(&class)) => None,
        None => Some(format!(
            "it has no default storage class; name one of {names:?} with --storage-class, or a claim that holds the files \
             with --namespace and --claim"
        )),
    }
}

/// Says what is going to be made and asks whether it may be.
fn agree(args: &super::Args, target: &Target, context: &str, version: &str) -> Result<()> {
    let options = &args.existing;
    let samples = match &options.claim {
        None => format!("namespace {}: a claim of {}, models, workers", target.namespace, claim_size(args)),
        Some(claim) => {
            format!("in your namespace {}: models and workers that read the claim {claim}", target.namespace)
        }
    };
    say(format!(
        "\nOn the cluster of the context `{context}` (Kubernetes {version}) this makes, and removes at the end:\n\
         \n  namespace {}: the Helm release `{}`, with its cluster roles and the definitions of ModelGroup and ModelPlacement\
         \n  {samples}\n\
         \nEverything else is left alone. The workers compute on the CPU and ask for no accelerator.",
        target.system,
        objects::RELEASE,
    ));
    if options.yes {
        return Ok(());
    }
    ensure!(std::io::stdin().is_terminal(), "nobody can be asked whether to go on; say --yes");
    eprint!("Go on? [y/N] ");
    std::io::stderr().flush()?;
    let mut answer = String::new();
    std::io::stdin().lock().read_line(&mut answer)?;
    ensure!(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()), "nothing was made");
    Ok(())
}

fn show(args: &super::Args, target: &Target, set: &[String], worker_image: &str) -> Result<()> {
    let options = &args.existing;
    let mut own = vec![objects::marked(objects::namespace(&target.system))];
    if options.claim.is_none() {
        own.push(objects::marked(objects::namespace(&target.namespace)));
    }
    target.kubectl_with_input(["create", "-f", "-"], &Samples(own).to_json())?;
    stage::run("installing the chart with Helm (its images are pulled)", |_| install(target, set))?;
    let claim = options.claim.as_deref().unwrap_or(CLAIM);
    let node = match &options.claim {
        None => Some(stage::run("copying the demo family to a claim", |stage| {
            stage.note("through a pod with `tar`");
            fill_claim(target, options, claim_size(args))
        })?),
        Some(_) => None,
    };
    let replicas = replicas(target, claim, node.as_deref())?;
    let adapt = |mut objects: Samples| {
        objects.for_existing(claim, node.as_deref(), replicas);
        objects
    };
    let file = folders::repository().join("manifests/samples/demo-family.yaml");
    let samples = adapt(Samples::read(&file, &target.namespace)?);
    let bytes = args.large();
    ensure!(
        bytes == "0" || node.is_some(),
        "--large is written to a claim of the demo's own; leave --claim or --large out"
    );
    let synthesise = || synthesise(target, worker_image, node.as_deref().unwrap_or_default(), bytes);
    let large = (bytes != "0").then_some(Large { bytes, synthesise: &synthesise, adapt: &adapt });
    perform(target, &samples, claim, large.as_ref())
}

fn claim_size(args: &super::Args) -> &'static str {
    if args.large() == "0" { CLAIM_SIZE } else { LARGE_CLAIM_SIZE }
}

/// A claim that only one node can mount keeps two workers on that node, or, where we do not know it, allows one.
fn replicas(target: &Target, claim: &str, node: Option<&str>) -> Result<Option<u32>> {
    if node.is_some() {
        return Ok(None);
    }
    let field = "jsonpath={.status.accessModes[*]}";
    let modes = target.kubectl(["get", "pvc", claim, "--namespace", &target.namespace, "--output", field])?;
    Ok((!modes.contains("Many")).then_some(1))
}

/// Makes the claim, and copies the demo family to it through a pod. Answers the node that it is on, by its host name.
fn fill_claim(target: &Target, options: &ExistingArgs, size: &str) -> Result<String> {
    let Target { namespace, .. } = target;
    let made = Samples(vec![
        objects::claim(namespace, CLAIM, size, options.storage_class.as_deref()),
        objects::loader(namespace, CLAIM, &options.loader_image),
    ]);
    target.kubectl_with_input(["apply", "-f", "-"], &made.to_json())?;
    run_pod(target, objects::LOADER, "--for=condition=Ready")?;
    let from = folders::repository().join("tests/fixtures/demo");
    let pod = format!("{namespace}/{}:/files", objects::LOADER);
    let copied = format!("{}/.", from.display());
    target.kubectl(["cp", &copied, &pod]).context("the loader's image needs `tar` for kubectl cp")?;
    let place = "jsonpath={.spec.nodeName}";
    let node =
        target.kubectl(["get", "pod", objects::LOADER, "--namespace", namespace, "--output", place])?;
    let label = "jsonpath={.metadata.labels.kubernetes\\.io/hostname}";
    let host = target.kubectl(["get", "node", node.trim(), "--output", label])?;
    target.kubectl(["delete", "pod", objects::LOADER, "--namespace", namespace, "--grace-period=1"])?;
    Ok(host.trim().to_owned())
}

/// Writes the large base to the claim, with the program of the worker's image.
fn synthesise(target: &Target, image: &str, node: &str, bytes: &str) -> Result<()> {
    let pod = objects::synthesiser(&target.namespace, CLAIM, image, node, bytes);
    target.kubectl_with_input(["apply", "-f", "-"], &Samples(vec![pod]).to_json())?;
    run_pod(target, objects::SYNTHESISER, "--for=jsonpath={.status.phase}=Succeeded")
}

/// Waits for a pod of ours; where that is in vain, what is known of it is the error.
fn run_pod(target: &Target, pod: &str, until: &str) -> Result<()> {
    let name = format!("pod/{pod}");
    let wait = ["wait", &name, "--namespace", &target.namespace, until, "--timeout=300s"];
    if let Err(error) = target.kubectl(wait) {
        let known = target.kubectl(["describe", "pod", pod, "--namespace", &target.namespace]);
        let known = known.unwrap_or_default();
        let events = known.split_once("\nEvents:").map_or(known.as_str(), |(_, events)| events);
        bail!("{error:#}\n{events}");
    }
    Ok(())
}

/// Removes what the demo made, and nothing else: what carries the mark, the release, and definitions that are of this
/// release and that nobody else has objects of.
fn clean_up(target: &Target) -> Result<()> {
    stage::run("removing what the demo made", |_| {
        let marked = format!("{MARK}=true");
        let words =
            ["get", "namespaces", "--selector", &marked, "--output", "jsonpath={.items[*].metadata.name}"];
        let ours = target.kubectl(words)?;
        let ours: Vec<&str> = ours.split_whitespace().collect();
        let definitions = ["get", "customresourcedefinitions", "--ignore-not-found", "--output", "name"];
        let defined = target.kubectl(definitions.into_iter().chain(objects::DEFINITIONS))?;
        if defined.lines().count() == objects::DEFINITIONS.len() {
            let namespace = ["--namespace", target.namespace.as_str(), "--selector", &marked];
            target.kubectl(
                ["delete", "modelplacements,modelgroups", "--timeout=120s"].into_iter().chain(namespace),
            )?;
        }
        if !ours.contains(&target.system.as_str()) {
            say("there is no release of the demo's on this cluster");
            return Ok(());
        }
        let release =
            ["uninstall", objects::RELEASE, "--namespace", &target.system, "--ignore-not-found", "--wait"];
        target.helm(release)?;
        remove_definitions(target)?;
        let spaces: Vec<&str> = [target.namespace.as_str(), &target.system]
            .into_iter()
            .filter(|name| ours.contains(name))
            .collect();
        let words = ["delete", "namespaces", "--wait", "--timeout=180s"];
        target.kubectl(words.into_iter().chain(spaces)).map(drop)
    })
}

/// The chart keeps its definitions when it is uninstalled, so that nobody's objects are lost. These came with the demo.
fn remove_definitions(target: &Target) -> Result<()> {
    let field = "jsonpath={.metadata.annotations.meta\\.helm\\.sh/release-namespace}";
    for definition in objects::DEFINITIONS {
        let words = ["get", "customresourcedefinition", definition, "--ignore-not-found", "--output", field];
        if target.kubectl(words)?.trim() != target.system {
            continue;
        }
        let left = target.kubectl(["get", definition, "--all-namespaces", "--output", "name"])?;
        if left.trim().is_empty() {
            target.kubectl(["delete", "customresourcedefinition", definition, "--timeout=60s"])?;
        } else {
            say(format!(
                "the definition {definition} stays: there are objects of it that are not the demo's"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_image_is_taken_apart_at_its_tag_and_digest() {
        let values = |image: &str| image_values("worker", image).map_err(|error| error.to_string());
        let set = |pairs: &[(&str, &str)]| -> Vec<String> {
            pairs.iter().map(|(key, value)| format!("worker.image.{key}={value}")).collect()
        };
        assert_eq!(values("a/b:c"), Ok(set(&[("repository", "a/b"), ("tag", "c")])));
        assert_eq!(values("host:5000/b:c"), Ok(set(&[("repository", "host:5000/b"), ("tag", "c")])));
        let pinned = set(&[("repository", "host:5000/b"), ("digest", "sha256:1")]);
        assert_eq!(values("host:5000/b@sha256:1"), Ok(pinned));
        let both = set(&[("repository", "b"), ("tag", "c"), ("digest", "sha256:1")]);
        assert_eq!(values("b:c@sha256:1"), Ok(both));
        for bad in ["a/b", "host:5000/b", "", ":c", "a/b:"] {
            assert!(values(bad).unwrap_err().contains("names no image"), "{bad}");
        }
    }

    #[test]
    fn what_a_cluster_lacks_is_named() {
        assert_eq!(too_old("v1.33.0"), None);
        assert_eq!(too_old("v1.35.2+k3s1"), None);
        assert!(too_old("v1.32.9").unwrap().contains("1.33 or newer"));
        let node = |ready: &str, architecture: &str, closed: bool| {
            json!({"items": [{"spec": {"unschedulable": closed}, "status": {
                "nodeInfo": {"architecture": architecture}, "conditions": [{"type": "Ready", "status": ready}]}}]})
        };
        assert_eq!(no_node(&node("True", "amd64", false)), None);
        for bad in [node("False", "amd64", false), node("True", "arm64", false), node("True", "amd64", true)]
        {
            assert!(no_node(&bad).is_some(), "{bad}");
        }
    }

    #[test]
    fn a_storage_class_must_be_named_where_there_is_no_default() {
        let class = |name: &str, default: &str| {
            json!({"metadata": {"name": name,
                "annotations": {"storageclass.kubernetes.io/is-default-class": default}}})
        };
        let classes = json!({"items": [class("slow", "false"), class("fast", "true")]});
        assert_eq!((no_class(&classes, None), no_class(&classes, Some("slow"))), (None, None));
        assert!(no_class(&classes, Some("other")).unwrap().contains("`other`"));
        let none = json!({"items": [class("slow", "false")]});
        assert!(no_class(&none, None).unwrap().contains("--storage-class"));
    }
}
