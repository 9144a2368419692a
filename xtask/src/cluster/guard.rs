//! The guard: the one process of a cluster that lives outside its namespaces.
//!
//! It starts the node's first process in new pid, mount and network namespaces, links it to
//! this machine, and then only waits. When the node ends, in whatever way, the kernel ends
//! all of its processes and unmounts and unlinks what was theirs; the guard removes what the
//! kernel keeps, which is the control groups. Should the guard itself be killed, the node's
//! first process sees its input end and does the same from inside (see `node`). So nothing
//! is left behind whichever of the two is killed.
//!
//! The guard holds a lock on a file of the cluster for as long as it lives: that, and no
//! process id, tells others that the cluster is up.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::cgroups;
use super::config::NodePlan;
use super::network::{self, Link};
use super::state::State;
use super::wait;

/// The guard's and the node's process ids, as this machine sees them.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Processes {
    /// The guard.
    pub guard: u32,
    /// The node's first process.
    pub node: u32,
}

/// Runs the guard of the cluster in `state`; returns when the cluster has ended.
pub fn run(state: &State) -> Result<()> {
    // Away from the terminal and the shell's job, which may end before the cluster.
    let _ = rustix::process::setsid();
    let alive = File::create(state.alive()).context("failed to create the guard's lock")?;
    alive.try_lock().context("another guard holds this cluster")?;
    let plan: NodePlan =
        serde_json::from_slice(&fs::read(state.plan())?).context("the node's plan is damaged")?;

    let mut tree = start_node(state)?;
    // Whoever holds the other end of the node's input learns when the guard is gone.
    let input = tree.stdin.take().expect("the node's input is piped");
    let linked = link_node(state, &plan, &tree, &input);
    if let Err(error) = &linked {
        // What starts the node kills it when it is killed itself.
        eprintln!("the node is ended: {error:#}");
        let _ = tree.kill();
    }
    let ended = tree.wait().context("failed to wait for the node")?;
    eprintln!("the node has ended ({ended})");
    if let Ok(link) = &linked {
        network::unlink(link)?;
    }
    cgroups::remove(&plan.cgroup)?;
    linked.map(drop)
}

fn start_node(state: &State) -> Result<Child> {
    let this = crate::folders::this_program()?;
    Command::new("unshare")
        .args(["--pid", "--mount", "--net", "--fork", "--mount-proc", "--kill-child=KILL", "--"])
        .arg(this)
        .args(["cluster", "node", "--state"])
        .arg(state.folder())
        .stdin(Stdio::piped())
        .spawn()
        .context("failed to start `unshare` (package util-linux)")
}

/// Joins the node to this machine, and tells it to go on.
fn link_node(state: &State, plan: &NodePlan, tree: &Child, mut input: &ChildStdin) -> Result<Link> {
    let unshare = tree.id();
    let node = wait::until(Duration::from_secs(10), || first_child(unshare));
    let Some(node) = node else {
        bail!("`unshare` made no namespaces; the kernel may forbid them here");
    };
    cgroups::create(&plan.cgroup, node)?;
    let link = network::link(&plan.subnets, node)?;
    let processes = Processes { guard: std::process::id(), node };
    write_whole(&state.processes(), &serde_json::to_vec(&processes)?)?;
    input.write_all(b"linked\n").context("the node ended before it was linked")?;
    Ok(link)
}

fn first_child(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// Writes a file so that a reader sees the old one or all of the new one.
pub fn write_whole(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let unfinished = path.with_extension("new");
    fs::write(&unfinished, content)?;
    fs::rename(unfinished, path)
}

/// Whether the cluster in `state` has a living guard.
pub fn is_alive(state: &State) -> bool {
    File::open(state.alive())
        .is_ok_and(|file| matches!(file.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
}
