//! Starting and stopping, as root: everything here acts; what to write and where was decided
//! in `config`, `subnets` and `state`.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::config::{self, CLIENTS, NODE, PAUSE_IMAGE, kubeconfig_file};
use super::guard::{self, Processes};
use super::pki::{Authority, Identity, Subject, signing_key};
use super::state::State;
use super::subnets::Subnets;
use super::{Cluster, cgroups, described, flag, network, status, wait};
use crate::image::archive::{Archive, Entry, Files, Start};
use crate::stage;

/// How long each step of a start may take on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long a killed cluster may take to vanish.
const LEAVING: Duration = Duration::from_secs(30);
/// The type that `statfs` tells of an overlay, on which no other overlay can be mounted.
const OVERLAY: u64 = 0x794c_7630;

/// What to start.
pub struct Request {
    /// The cluster's name.
    pub name: String,
    /// Where the programs lie.
    pub bin: PathBuf,
    /// How many made-up accelerators the node offers.
    pub gpus: u32,
    /// The user and group who may use the cluster.
    pub owner: (u32, u32),
}

/// Starts a cluster, or leaves it as it is when it is up.
pub fn start(request: &Request) -> Result<()> {
    let _one_at_a_time = lock()?;
    if let Some(status) = status(&request.name) {
        if status.running {
            stage::say(format!("cluster `{}` is already up", request.name));
            return offer_accelerators(&status.cluster, request.gpus);
        }
        if guard::is_alive(&status.cluster.state()) {
            let ended: Vec<_> =
                status.components.iter().filter(|c| c.ended.is_some()).map(|c| c.name.as_str()).collect();
            stage::say(format!(
                "cluster `{}` is replaced, because {} has ended",
                request.name,
                ended.join(", ")
            ));
        }
    }
    stop_all(&request.name)?;
    let cluster = stage::run("cluster: certificates and configuration", |_| prepare(request))?;
    let result = bring_up(&cluster);
    if result.is_err() {
        // Its logs stay, to be read; its processes do not.
        end_processes(&cluster.state())?;
    }
    result.with_context(|| {
        let said = fs::read_to_string(cluster.state().log("node")).unwrap_or_default();
        format!("the cluster did not start; its logs are in {}\n{}", cluster.logs.display(), said.trim_end())
    })
}

/// Stops a cluster and removes all of it.
pub fn stop(name: &str) -> Result<()> {
    let _one_at_a_time = lock()?;
    let existed = described(name).is_some() || !cgroups::present(&cgroups::name_of(name)).is_empty();
    stop_all(name)?;
    stage::say(if existed {
        format!("cluster `{name}` is down; nothing of it is left")
    } else {
        format!("there is no cluster `{name}`")
    });
    Ok(())
}

/// Two starts at once would choose the same addresses.
fn lock() -> Result<File> {
    let folder = ["/run/lock", "/tmp"].into_iter().find(|folder| Path::new(folder).is_dir());
    let path = Path::new(folder.unwrap_or("/")).join("turret-cluster.lock");
    let file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    file.lock().context("failed to wait for another start or stop")?;
    Ok(file)
}

fn stop_all(name: &str) -> Result<()> {
    for state in State::candidates(name) {
        end_processes(&state)?;
    }
    cgroups::remove(&cgroups::name_of(name))?;
    for state in State::candidates(name) {
        match fs::remove_dir_all(state.folder()) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                let folder = state.folder().display().to_string();
                return Err(error).with_context(|| format!("failed to remove {folder}"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn end_processes(state: &State) -> Result<()> {
    let gone = wait::until(LEAVING, || {
        if !guard::is_alive(state) {
            return Some(());
        }
        // Read each time: the guard may only just be writing it.
        let text = fs::read(state.processes()).ok()?;
        let processes: Processes = serde_json::from_slice(&text).ok()?;
        let pid = Pid::from_raw(i32::try_from(processes.node).ok()?)?;
        // It may just have ended; the guard still has to clear up.
        let _ = kill_process(pid, Signal::KILL);
        None
    });
    gone.with_context(|| format!("the cluster in {} does not end", state.folder().display()))
}

/// Writes everything that the node reads.
fn prepare(request: &Request) -> Result<Cluster> {
    let state = create_state(&request.name)?;
    let subnets = Subnets::choose(&network::routes()?)?;
    let cluster = Cluster {
        name: request.name.clone(),
        kubeconfig: state.kubeconfig(),
        state: state.folder().to_path_buf(),
        bin: request.bin.clone(),
        volumes: state.volumes(),
        audit_log: state.audit_log(),
        logs: state.folder().join("log"),
        server: config::server_url(&subnets),
        dns: subnets.dns_service().to_string(),
        nodes: vec![NODE.to_owned()],
        gpus: request.gpus,
        snapshotter: snapshotter(&state)?.to_owned(),
        subnets,
    };
    write_identities(&cluster, &state)?;
    write_configuration(&cluster, &state)?;
    let (user, group) = request.owner;
    for path in [state.kubeconfig(), state.volumes()] {
        chown(&path, Some(user), Some(group))?;
    }
    write_json(&state.description(), &serde_json::to_value(&cluster)?)?;
    Ok(cluster)
}

fn create_state(name: &str) -> Result<State> {
    let candidates = State::candidates(name);
    let state = candidates.iter().find(|state| fs::create_dir_all(state.folder()).is_ok());
    let Some(state) = state else {
        bail!("none of these folders can be created: {candidates:?}");
    };
    let folders = [
        (state.folder().join("config/cni"), 0o755),
        (state.folder().join("log"), 0o755),
        (state.folder().join("run"), 0o755),
        (state.folder().join("data"), 0o711),
        (state.volumes(), 0o755),
        (state.data("tmp"), 0o1777),
        (state.data("home"), 0o700),
    ];
    for (folder, mode) in folders {
        fs::create_dir_all(&folder)?;
        fs::set_permissions(&folder, Permissions::from_mode(mode))?;
    }
    for (folder, mode) in [(state.folder().to_path_buf(), 0o755), (state.folder().join("config"), 0o700)] {
        fs::set_permissions(&folder, Permissions::from_mode(mode))?;
    }
    fs::create_dir_all(state.folder().join("pki"))?;
    fs::set_permissions(state.folder().join("pki"), Permissions::from_mode(0o700))?;
    Ok(state.clone())
}

/// Overlays are quick, but none can lie on another one, as in most containers.
fn snapshotter(state: &State) -> Result<&'static str> {
    let kind = rustix::fs::statfs(state.folder())?.f_type;
    Ok(if u64::try_from(kind) == Ok(OVERLAY) { "native" } else { "overlayfs" })
}

fn write_identities(cluster: &Cluster, state: &State) -> Result<()> {
    let subnets = &cluster.subnets;
    let authority = Authority::new("turret-local")?;
    let write_identity = |file: &str, identity: &Identity| -> Result<()> {
        write(&state.pki(&format!("{file}.crt")), &identity.certificate)?;
        write_secret(&state.pki(&format!("{file}.key")), &identity.key)
    };
    let context = format!("turret-{}", cluster.name);
    let kubeconfig = |identity: &Identity| {
        config::kubeconfig(&context, &cluster.server, authority.certificate(), identity).to_string()
    };
    write(&state.pki("ca.crt"), authority.certificate())?;

    let server = authority.issue(&Subject {
        name: "kube-apiserver",
        group: "",
        addresses: &[subnets.node(), subnets.kubernetes_service(), [127, 0, 0, 1].into()],
        names: &["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"],
    })?;
    write_identity("apiserver", &server)?;

    let user = format!("system:node:{NODE}");
    let kubelet = authority.issue(&Subject {
        name: &user,
        group: "system:nodes",
        addresses: &[subnets.node()],
        names: &[NODE],
    })?;
    write_identity("kubelet", &kubelet)?;
    write_secret(&state.config(&kubeconfig_file("kubelet")), &kubeconfig(&kubelet))?;

    for (file, user, group) in CLIENTS {
        let identity = authority.issue(&Subject::client(user, group))?;
        match file {
            "admin" => write_secret(&state.kubeconfig(), &kubeconfig(&identity))?,
            "kubelet-client" => write_identity(file, &identity)?,
            _ => write_secret(&state.config(&kubeconfig_file(file)), &kubeconfig(&identity))?,
        }
    }
    let (private, public) = signing_key()?;
    write_secret(&state.pki("accounts.key"), &private)?;
    write(&state.pki("accounts.pub"), &public)
}

fn write_configuration(cluster: &Cluster, state: &State) -> Result<()> {
    let (subnets, bin) = (&cluster.subnets, &cluster.bin);
    let cgroup = cgroups::name_of(&cluster.name);
    let plan = config::node_plan(state, &cgroup, bin, subnets);
    write_json(&state.plan(), &serde_json::to_value(&plan)?)?;
    write_json(&state.config("audit-policy.json"), &config::audit_policy())?;
    write_json(&state.config("kubelet.json"), &config::kubelet(state, subnets, &cgroup))?;
    write_json(&state.config("proxy.json"), &config::proxy(state, subnets))?;
    write_json(&state.config("cni/10-pods.conflist"), &config::pod_network(state, subnets))?;
    write(&state.config("containerd.toml"), &config::containerd(state, bin, &cluster.snapshotter))?;
    write(&state.config("Corefile"), &config::corefile(state, subnets))?;
    write(&state.config("resolv.conf"), &format!("nameserver {}\n", subnets.dns_service()))?;
    // It must be there before the API server writes it, so that its owner's tests can watch it.
    write(&state.audit_log(), "")
}

fn bring_up(cluster: &Cluster) -> Result<()> {
    let state = cluster.state();
    let mut guard = stage::run("cluster: namespaces", |_| start_guard(&state))?;
    stage::run("cluster: etcd and API server", |_| {
        until_or_ended(&mut guard, "the API server", || api_server_is_ready(&state))
    })?;
    stage::run("cluster: node, pause image and DNS", |stage| {
        let dns = config::dns_service(&cluster.subnets).to_string();
        cluster.kubectl_with_input(["create", "--validate=false", "-f", "-"], &dns)?;
        stage.note("loading the pause image");
        load_pause(cluster)?;
        stage.note("waiting for the node");
        until_or_ended(&mut guard, "the node", || node_is_ready(cluster))
    })?;
    offer_accelerators(cluster, cluster.gpus)
}

fn start_guard(state: &State) -> Result<Child> {
    let log = File::create(state.log("node"))?;
    let this = crate::folders::this_program()?;
    let mut guard = Command::new(this)
        .args(["cluster", "guard", "--state"])
        .arg(state.folder())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    until_or_ended(&mut guard, "the node's namespaces", || state.processes().exists().then_some(()))?;
    Ok(guard)
}

/// Waits for something of the cluster, unless the cluster ends.
fn until_or_ended<T>(guard: &mut Child, what: &str, mut probe: impl FnMut() -> Option<T>) -> Result<T> {
    let found = wait::until(PATIENCE, || match guard.try_wait() {
        Ok(Some(status)) => Some(Err(status)),
        _ => probe().map(Ok),
    });
    match found {
        Some(Ok(found)) => Ok(found),
        Some(Err(status)) => bail!("the cluster ended ({status}) before {what} was ready"),
        None => bail!("{what} is not ready after {} s", PATIENCE.as_secs()),
    }
}

/// The node's first process starts the rest when the API server is ready, and says so.
fn api_server_is_ready(state: &State) -> Option<()> {
    let started: Vec<Value> = serde_json::from_slice(&fs::read(state.components()).ok()?).ok()?;
    started.iter().any(|component| component["name"] == "kubelet").then_some(())
}

fn node_is_ready(cluster: &Cluster) -> Option<()> {
    let wanted = ["get", "node/node-1", "serviceaccount/default", "--output=json"];
    let both: Value = serde_json::from_str(&cluster.kubectl(wanted).ok()?).ok()?;
    let conditions = both["items"][0]["status"]["conditions"].as_array()?;
    let is_ready = |condition: &Value| condition["type"] == "Ready" && condition["status"] == "True";
    conditions.iter().any(is_ready).then_some(())
}

fn load_pause(cluster: &Cluster) -> Result<()> {
    let program = fs::read(cluster.bin.join("pause")).context("failed to read the program `pause`")?;
    let mut files = Files::default();
    files.add("/pause", Entry::File { content: program, mode: 0o755 });
    let start = Start { entrypoint: vec!["/pause".into()], ..Start::default() };
    let path = cluster.state().data("pause.tar");
    Archive::new(&files, &start)?.write(&[PAUSE_IMAGE], File::create(&path)?)?;
    let socket = cluster.state().containerd_socket();
    wait::until(PATIENCE, || socket.exists().then_some(())).context("containerd did not start")?;
    cluster.load(&path)
}

/// The kubelet leaves extended resources that it does not know as they are.
fn offer_accelerators(cluster: &Cluster, count: u32) -> Result<()> {
    let patch = config::accelerators(count).to_string();
    for node in &cluster.nodes {
        cluster.kubectl([
            "patch",
            "node",
            node,
            "--subresource=status",
            "--type=merge",
            "--patch",
            &patch,
        ])?;
    }
    let changed = Cluster { gpus: count, ..cluster.clone() };
    write_json(&cluster.state().description(), &serde_json::to_value(changed)?)
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    write(path, &format!("{value:#}\n"))
}

fn write(path: &Path, content: &str) -> Result<()> {
    fs::write(path, content).with_context(|| format!("failed to write {}", path.display()))
}

fn write_secret(path: &Path, content: &str) -> Result<()> {
    write(path, content)?;
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .with_context(|| format!("failed to protect {}", path.display()))
}

/// What to do after a start.
pub fn next_steps(cluster: &Cluster) -> String {
    format!(
        "cluster `{name}` is up. Next:\n  export KUBECONFIG={kubeconfig} PATH={bin}:$PATH\n  kubectl get nodes\n  \
         cargo xtask cluster down{flag}",
        name = cluster.name,
        kubeconfig = cluster.kubeconfig.display(),
        bin = cluster.bin.display(),
        flag = flag(&cluster.name),
    )
}
