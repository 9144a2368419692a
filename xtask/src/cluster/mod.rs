//! A real Kubernetes on this machine that the project owns: one node, no Docker.
//!
//! Every program is built from pinned Go modules ([`binaries`]). The node lives in its own
//! pid, mount and network namespaces ([`node`]), watched by one process outside ([`guard`]):
//! whichever of them ends, everything ends, and nothing is left behind. All files of a
//! cluster lie in one folder ([`state`]). What each component is started with is decided in
//! [`config`] and [`subnets`]; [`lifecycle`] carries it out, as root, and is all that needs
//! root. [`api_server`] is only its storage and its API server, without root and without a node.
//!
//! ```no_run
//! let cluster = cluster::up(&Options::default())?;
//! cluster.load(&image.path)?;
//! cluster.kubectl(["get", "nodes"])?;
//! cluster::down("local")?;
//! ```

pub mod api_server;
mod binaries;
mod cgroups;
pub mod command;
mod config;
mod guard;
mod lifecycle;
mod network;
mod node;
mod pki;
mod self_test;
mod state;
mod subnets;
mod traces;
mod wait;

use std::ffi::{OsStr, OsString};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use self::node::Started;
use self::state::State;
pub use self::state::check_name;
use self::subnets::Subnets;
use crate::packages::{self, Need, Proof};
use crate::privilege::{self, Privilege};

/// The cluster that is meant when none is named.
pub const DEFAULT_NAME: &str = "local";

const NEEDS: [Need; 4] = [
    Need { proof: Proof::Program("unshare"), package: "util-linux", purpose: "make namespaces" },
    Need { proof: Proof::Program("mount"), package: "mount", purpose: "let the kubelet mount volumes" },
    Need { proof: Proof::Program("ip"), package: "iproute2", purpose: "link the node to this machine" },
    Need {
        proof: Proof::Program("iptables-restore"),
        package: "iptables",
        purpose: "let kube-proxy route services",
    },
];

/// What a cluster is to be like.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name; several can run side by side.
    pub name: String,
    /// How many made-up `nvidia.com/gpu` its node offers.
    pub gpus: u32,
}

impl Default for Options {
    fn default() -> Options {
        Options { name: DEFAULT_NAME.into(), gpus: 4 }
    }
}

/// A cluster that was started. It goes on when this value is dropped.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Cluster {
    /// Its name.
    pub name: String,
    /// The administrator's kubeconfig.
    pub kubeconfig: PathBuf,
    /// The folder of everything that it writes.
    pub state: PathBuf,
    /// The folder with `kubectl`, `helm`, `ctr` and all else.
    pub bin: PathBuf,
    /// A folder for `hostPath` volumes, readable by every pod and writable by whoever
    /// started the cluster. It goes with the cluster.
    pub volumes: PathBuf,
    /// The API server's audit log: one JSON event a line.
    pub audit_log: PathBuf,
    /// The folder with a log of each component.
    pub logs: PathBuf,
    /// Where the API server answers.
    pub server: String,
    /// The address of the cluster's DNS.
    pub dns: String,
    /// The names of its nodes.
    pub nodes: Vec<String>,
    /// How many made-up accelerators each node offers.
    pub gpus: u32,
    /// The way images are unpacked.
    snapshotter: String,
    /// Its addresses.
    subnets: Subnets,
}

/// How a cluster fares.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// The cluster.
    #[serde(flatten)]
    pub cluster: Cluster,
    /// Whether it is up, with all of its components.
    pub running: bool,
    /// Its components.
    pub components: Vec<Component>,
}

/// How one component of a cluster fares.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Component {
    /// Its name.
    pub name: String,
    /// How it ended, if it has.
    pub ended: Option<String>,
    /// What it said.
    pub log: PathBuf,
}

/// Brings a cluster up, or leaves one that is up as it is.
pub fn up(options: &Options) -> Result<Cluster> {
    packages::ensure(&NEEDS)?;
    let bin = binaries::ensure()?;
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let owner = format!("{user}:{group}");
    as_root(&[
        "start".into(),
        "--name".into(),
        (&options.name).into(),
        "--gpus".into(),
        options.gpus.to_string().into(),
        "--bin".into(),
        bin.into(),
        "--owner".into(),
        owner.into(),
    ])?;
    find(&options.name)
}

/// The folder with kubectl, helm and all that a cluster runs; builds them when they are not there.
pub fn programs() -> Result<PathBuf> {
    Ok(binaries::ensure()?)
}

/// Takes a cluster down and removes all of it; also what one that was killed left behind.
pub fn down(name: &str) -> Result<()> {
    as_root(&["stop".into(), "--name".into(), name.into()])
}

/// The cluster `name`, if it is up.
pub fn find(name: &str) -> Result<Cluster> {
    match described(name) {
        Some(cluster) if guard::is_alive(&cluster.state()) => Ok(cluster),
        _ => bail!("there is no cluster `{name}`; start it: cargo xtask cluster up{}", flag(name)),
    }
}

/// How the cluster `name` fares; none if it was never started or was taken down.
pub fn status(name: &str) -> Option<Status> {
    let cluster = described(name)?;
    let state = cluster.state();
    let alive = guard::is_alive(&state);
    let started: Vec<Started> = std::fs::read(state.components())
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok())
        .unwrap_or_default();
    let with_the_node = (!alive).then(|| "with the node".to_owned());
    let components: Vec<_> = started
        .into_iter()
        .map(|started| Component {
            log: state.log(&started.name),
            ended: started.ended.or(with_the_node.clone()),
            name: started.name,
        })
        .collect();
    let running = alive && components.iter().all(|component| component.ended.is_none());
    Some(Status { cluster, running, components })
}

impl Cluster {
    /// Runs kubectl and returns what it prints.
    pub fn kubectl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        finish(self.command("kubectl").args(arguments), None)
    }

    /// Runs kubectl with `input`, for `apply -f -`, and returns what it prints.
    pub fn kubectl_with_input<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
        input: &str,
    ) -> Result<String> {
        finish(self.command("kubectl").args(arguments), Some(input))
    }

    /// Runs helm and returns what it prints.
    pub fn helm<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        finish(self.command("helm").args(arguments), None)
    }

    /// A program of the cluster's, `kubectl` or `helm`, that speaks with it.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.bin.join(program));
        command.env("KUBECONFIG", &self.kubeconfig);
        command
    }

    /// Loads an image archive into the node, under every name that it carries.
    pub fn load(&self, archive: &Path) -> Result<()> {
        let archive = std::path::absolute(archive)?;
        let mut words: Vec<OsString> = vec![self.bin.join("ctr").into(), "--address".into()];
        words.push(self.state().containerd_socket().into());
        let import = ["--namespace", "k8s.io", "images", "import", "--local", "--snapshotter"];
        words.extend(import.map(OsString::from));
        words.push((&self.snapshotter).into());
        words.push((&archive).into());
        finish(&mut privilege::as_root(&words), None)
            .with_context(|| format!("failed to load {} into the cluster", archive.display()))?;
        Ok(())
    }

    fn state(&self) -> State {
        State::at(&self.state)
    }
}

/// What a cluster was started as, whether it runs or not.
fn described(name: &str) -> Option<Cluster> {
    State::candidates(name)
        .iter()
        .find_map(|state| serde_json::from_slice(&std::fs::read(state.description()).ok()?).ok())
}

/// Runs a command to its end and returns what it prints; its complaint is the error.
pub fn finish(command: &mut Command, input: Option<&str>) -> Result<String> {
    let described = || {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    };
    let described = described();
    let mut child = command
        .stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to start `{described}`"))?;
    let writer = input.map(|input| {
        let mut pipe = child.stdin.take().expect("stdin is piped");
        let input = input.to_owned();
        // A program that ends early closes its input; its own complaint says why.
        std::thread::spawn(move || drop(pipe.write_all(input.as_bytes())))
    });
    let output = child.wait_with_output()?;
    if let Some(writer) = writer {
        let _ = writer.join();
    }
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    bail!("`{described}` failed ({}): {}", output.status, complaint.trim())
}

/// Runs one of this program's own hidden commands as root.
fn as_root(arguments: &[OsString]) -> Result<()> {
    if privilege::of_this_process() == Privilege::None {
        bail!(
            "a node needs root, for its namespaces, mounts and network: run this as root, or install sudo (everything \
             else, such as building, runs as you)"
        );
    }
    let this = crate::folders::this_program()?;
    let mut words: Vec<OsString> = vec![this.into(), "cluster".into()];
    words.extend_from_slice(arguments);
    let status = privilege::as_root(&words).status().context("failed to act as root")?;
    if status.success() {
        Ok(())
    } else {
        bail!("`cluster {}` failed for the reason above", arguments[0].display())
    }
}

/// How the name is given on the command line, where it must be.
fn flag(name: &str) -> String {
    if name == DEFAULT_NAME { String::new() } else { format!(" --name {name}") }
}
