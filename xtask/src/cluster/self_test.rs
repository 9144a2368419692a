//! `cargo xtask cluster self-test`: proves on a cluster of its own, beside any other, that
//! it starts, runs pods as a real cluster does, and leaves nothing behind however it ends.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::guard::Processes;
use super::traces::{Traces, processes_of};
use super::{Cluster, NEEDS, Options, down, status, up, wait};
use crate::image::{self, Image};
use crate::packages::{self, find_program};
use crate::privilege;
use crate::stage;

/// The cluster and the namespace in it.
const NAME: &str = "self-test";
/// How long a pod may take to start and end, or a killed cluster to vanish.
const PATIENCE: Duration = Duration::from_secs(60);
/// What the probe reads from its volume and prints when it has reached everything.
const GREETING: &str = "hello from a volume";

/// Runs all of it; the first thing that is not as it should be is the error.
pub fn run() -> Result<()> {
    // Looking for traces takes programs that a new machine gets from `up` only.
    packages::ensure(&NEEDS)?;
    down(NAME)?;
    let before = Traces::look()?;
    let tested = test(&before);
    let ended = down(NAME);
    tested?;
    ended?;
    before.assert_nothing_more(NAME)?;
    stage::say("1 self-test passed: it starts, runs restricted pods, and leaves nothing behind");
    Ok(())
}

fn test(before: &Traces) -> Result<()> {
    let options = Options { name: NAME.into(), gpus: 2 };
    let cluster = up(&options)?;
    let first = processes(&cluster)?;
    up(&options)?;
    ensure!(processes(&cluster)?.node == first.node, "a second `up` replaced a cluster that was up");
    let running = status(NAME).context("a cluster that is up has no status")?;
    ensure!(running.running, "a cluster that is up is not running: {:?}", running.components);

    stage::run("self-test: pods, volume, DNS, services, audit log", |_| pods(&cluster))?;
    stage::run("self-test: a component that ends is told of", |_| lost_component(&cluster))?;
    stage::run("self-test: the node is killed", |_| {
        kill(&[first.node])?;
        vanished(before)
    })?;
    let cluster = up(&options)?;
    stage::run("self-test: the guard is killed", |_| {
        kill(&[processes(&cluster)?.guard])?;
        vanished(before)
    })?;
    let cluster = up(&options)?;
    stage::run("self-test: everything is killed at once", |_| {
        kill(&processes_of(NAME))?;
        let gone = wait::until(PATIENCE, || processes_of(NAME).is_empty().then_some(()));
        gone.context("processes of a killed cluster stay")?;
        ensure!(!status(NAME).is_some_and(|status| status.running), "a killed cluster is running");
        // Now nobody is left to remove empty control groups; the next `down` or `up` does.
        down(NAME)?;
        vanished(before)
    })?;
    ensure!(!cluster.state.exists(), "{} is left", cluster.state.display());
    Ok(())
}

fn pods(cluster: &Cluster) -> Result<()> {
    let volume = cluster.volumes.join("greeting");
    fs::create_dir(&volume)?;
    fs::write(volume.join("text"), GREETING)?;
    let folder = cluster.volumes.join("images");
    let server = write_image(cluster, "server", &cluster.bin.join("kubectl"), &folder)?;
    let bash = find_program("bash").context("the self-test needs bash")?;
    let probe = write_image(cluster, "probe", &bash, &folder)?;

    cluster.kubectl_with_input(["apply", "-f", "-"], &objects(&volume, &server).to_string())?;
    let careless = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "careless", "namespace": NAME},
        "spec": {"containers": [{"name": "c", "image": server.reference()}]},
    });
    let refusal = cluster.kubectl_with_input(["create", "-f", "-"], &careless.to_string());
    let refusal = refusal.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(refusal.contains("violates PodSecurity"), "a careless pod is not refused: {refusal}");

    wait_for(cluster, "condition=Ready", "pod/server")?;
    cluster.kubectl_with_input(["apply", "-f", "-"], &probe_pod(&probe).to_string())?;
    wait_for(cluster, "jsonpath={.status.phase}=Succeeded", "pod/probe")?;
    let said = cluster.kubectl(["logs", "--namespace", NAME, "probe"])?;
    ensure!(said.trim() == GREETING, "the probe said {said:?}");

    from_this_machine(cluster)?;
    let version =
        ["exec", "--namespace", NAME, "server", "--", "/usr/local/bin/kubectl", "version", "--client"];
    ensure!(cluster.kubectl(version)?.contains("Client Version"), "exec printed something else");
    ensure!(cluster.helm(["list", "--all-namespaces"])?.contains("NAME"), "helm printed something else");
    audited(cluster)
}

fn write_image(cluster: &Cluster, name: &str, program: &Path, folder: &Path) -> Result<Image> {
    let image = image::write(&format!("turret.local/{name}"), name, program, folder)?;
    cluster.load(&image.path)?;
    Ok(image)
}

fn wait_for(cluster: &Cluster, condition: &str, object: &str) -> Result<()> {
    let (condition, timeout) = (format!("--for={condition}"), format!("--timeout={}s", PATIENCE.as_secs()));
    let waited = cluster.kubectl(["wait", "--namespace", NAME, &condition, &timeout, object]);
    waited.map(drop).or_else(|error| {
        let described = cluster.kubectl(["describe", "--namespace", NAME, object])?;
        Err(error.context(described))
    })
}

fn objects(volume: &Path, server: &Image) -> Value {
    let metadata = |name: &str| json!({"name": name, "namespace": NAME});
    let amount = json!({"storage": "1Mi"});
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {
            "name": NAME,
            "labels": {"pod-security.kubernetes.io/enforce": "restricted"},
        }},
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "greeting"}, "spec": {
            "capacity": amount,
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "hostPath": {"path": volume},
        }},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata("greeting"), "spec": {
            "accessModes": ["ReadOnlyMany"],
            "storageClassName": "",
            "volumeName": "greeting",
            "resources": {"requests": amount},
        }},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata("server"), "spec": {
            "selector": {"app": "server"},
            "ports": [{"port": 80, "targetPort": 8001}],
        }},
        {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": "server", "namespace": NAME, "labels": {"app": "server"}},
            "spec": pod(&json!({
                "name": "server",
                "image": server.reference(),
                "args": ["proxy", "--address=0.0.0.0", "--port=8001"],
                "readinessProbe": {"tcpSocket": {"port": 8001}, "periodSeconds": 1},
            })),
        },
    ]})
}

/// Reads its volume, and reaches another pod and the API server by the names of services.
fn probe_pod(image: &Image) -> Value {
    let script = format!(
        "read -r text < /greeting/text; exec 3<>/dev/tcp/server.{NAME}.svc/80 4<>/dev/tcp/kubernetes.default.svc/443 && echo \"$text\""
    );
    let mut spec = pod(&json!({
        "name": "probe",
        "image": image.reference(),
        "args": ["-c", script],
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "64Mi", "cpu": "500m"}},
        "volumeMounts": [{"name": "greeting", "mountPath": "/greeting", "readOnly": true}],
    }));
    spec["volumes"] = json!([{"name": "greeting", "persistentVolumeClaim": {"claimName": "greeting"}}]);
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe", "namespace": NAME}, "spec": spec})
}

/// A pod that Pod Security `restricted` allows.
fn pod(container: &Value) -> Value {
    let mut container = container.clone();
    container["imagePullPolicy"] = "IfNotPresent".into();
    container["securityContext"] = json!({
        "allowPrivilegeEscalation": false,
        "readOnlyRootFilesystem": true,
        "capabilities": {"drop": ["ALL"]},
    });
    json!({
        // The node hears of a service some moments after it is there: who asked before asks again.
        "restartPolicy": "OnFailure",
        "terminationGracePeriodSeconds": 0,
        "securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
    })
}

/// Services and pods answer on this machine, too.
fn from_this_machine(cluster: &Cluster) -> Result<()> {
    for (object, field, port) in [
        ("service/server", "jsonpath={.spec.clusterIP}", 80),
        ("pod/server", "jsonpath={.status.podIP}", 8001),
    ] {
        let address = cluster.kubectl(["get", "--namespace", NAME, object, "--output", field])?;
        let address: SocketAddr = format!("{address}:{port}").parse()?;
        TcpStream::connect_timeout(&address, Duration::from_secs(5))
            .with_context(|| format!("{object} does not answer this machine on {address}"))?;
    }
    Ok(())
}

/// The audit log has what was done and what was refused, and by whom.
fn audited(cluster: &Cluster) -> Result<()> {
    let text = fs::read_to_string(&cluster.audit_log)?;
    let events: Vec<Value> = text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    for (name, code) in [("probe", 201), ("careless", 403)] {
        let recorded = events.iter().any(|event| {
            event["verb"] == "create"
                && event["objectRef"]["resource"] == "pods"
                && event["objectRef"]["name"] == name
                && event["user"]["username"] == "turret-local-admin"
                && event["responseStatus"]["code"] == code
        });
        ensure!(recorded, "the audit log lacks the creation of pod {name} with code {code}");
    }
    Ok(())
}

fn lost_component(cluster: &Cluster) -> Result<()> {
    let scheduler = cluster.bin.join("kube-scheduler");
    let is_scheduler = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.starts_with(scheduler.as_os_str().as_encoded_bytes())
    };
    let found: Vec<_> = processes_of(NAME).into_iter().filter(is_scheduler).collect();
    ensure!(found.len() == 1, "there are {} schedulers", found.len());
    kill(&found)?;
    let told = wait::until(PATIENCE, || {
        let status = status(NAME)?;
        let lost = status.components.iter().find(|component| component.ended.is_some())?;
        Some((status.running, lost.name.clone(), lost.ended.clone(), lost.log.exists()))
    });
    let told = told.context("a component that was killed is not told of")?;
    let expected = (false, "scheduler".to_owned(), Some("signal 9".to_owned()), true);
    ensure!(told == expected, "a killed scheduler is told of as {told:?}");
    Ok(())
}

fn vanished(before: &Traces) -> Result<()> {
    // Killing is asynchronous; what is still there after a while is left behind.
    let clean = wait::until(PATIENCE, || before.assert_nothing_more(NAME).ok());
    clean.map_or_else(|| before.assert_nothing_more(NAME), Ok)
}

fn processes(cluster: &Cluster) -> Result<Processes> {
    Ok(serde_json::from_slice(&fs::read(cluster.state().processes())?)?)
}

fn kill(pids: &[u32]) -> Result<()> {
    let mut words = vec!["kill".into(), "-KILL".into()];
    words.extend(pids.iter().map(|pid| pid.to_string().into()));
    // Killing one may end the next before its turn; whether all are gone is seen afterwards.
    privilege::as_root(&words).output().context("failed to start `kill`")?;
    Ok(())
}
