//! The node's first process: it prepares the namespaces it was started in, starts the
//! cluster's programs, collects whatever ends, and takes everything with it when it ends.
//!
//! It ends when its input does, for that means that the guard is gone (see `guard`).

use std::fs;
use std::io::Read as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::mount::{
    MountFlags, MountPropagationFlags, mount, mount_bind, mount_bind_recursive, mount_change,
};
use rustix::process::{WaitOptions, wait as wait_for_any};
use serde::{Deserialize, Serialize};

use super::config::{Component, NodePlan, Phase, kubeconfig_file};
use super::guard::write_whole;
use super::state::State;
use super::{cgroups, network, wait};

/// How a component fares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Started {
    /// Its name.
    pub name: String,
    /// Its process id inside the node.
    pub pid: u32,
    /// How it ended, if it has.
    pub ended: Option<String>,
}

/// Folders that programs write to although they are the machine's: the node sees empty ones
/// of its own, which vanish with it.
const MASKED: [&str; 2] = ["/run", "/var"];

/// Settings of the kernel that the kubelet would change for the whole machine. It finds them
/// as it wants them in files that only the node sees, and so leaves the kernel's alone.
pub const SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Set once the node is being ended from inside.
static GUARD_IS_GONE: AtomicBool = AtomicBool::new(false);

/// How long a component may take to answer on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// Where etcd answers; the network is the node's own.
const ETCD: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 2379);

/// Runs the node described in `state`; returns only when it could not be started.
pub fn run(state: &State) -> Result<()> {
    if std::process::id() != 1 {
        bail!("`cluster node` is started by `cluster up`, as the first process of a namespace");
    }
    let plan: NodePlan =
        serde_json::from_slice(&fs::read(state.plan())?).context("the node's plan is damaged")?;
    wait_for_link()?;
    end_with_the_guard(plan.cgroup.clone());
    mask_folders(&plan).context("failed to give the node folders of its own")?;
    mask_settings().context("failed to give the node settings of its own")?;
    network::join(&plan.subnets)?;
    fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("failed to let the node route")?;

    let mut components = Running::new(state);
    components.start_all(&plan, Phase::Storage)?;
    components.wait_for("etcd", || is_open(ETCD))?;
    components.start_all(&plan, Phase::Api)?;
    components.wait_for("the API server", || api_server_is_ready(&plan))?;
    components.start_all(&plan, Phase::Rest)?;
    components.collect()
}

/// The guard writes a line when the link and the control groups are there.
fn wait_for_link() -> Result<()> {
    let mut line = [0; 7];
    std::io::stdin().read_exact(&mut line).context("the guard ended before the node was linked")
}

/// Ends the node when the guard is gone, and removes what the guard would have removed.
fn end_with_the_guard(cgroup: String) {
    std::thread::spawn(move || {
        let mut rest = Vec::new();
        // It ends with the guard; nothing is ever written after the first line.
        let _ = std::io::stdin().read_to_end(&mut rest);
        GUARD_IS_GONE.store(true, Ordering::SeqCst);
        cgroups::leave();
        if let Err(error) = cgroups::remove(&cgroup) {
            eprintln!("{error}");
        }
        std::process::exit(0);
    });
}

fn mask_folders(plan: &NodePlan) -> Result<()> {
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let kept = [plan.state.folder(), plan.bin.as_path()];
    // An open folder can be bound again although its path is masked.
    let open = kept.map(fs::File::open);
    for masked in MASKED {
        mount("tmpfs", masked, "tmpfs", MountFlags::empty(), Some(c"mode=755"))
            .with_context(|| format!("failed to mount over {masked}"))?;
    }
    for (folder, open) in kept.into_iter().zip(open) {
        let open = open.with_context(|| format!("failed to open {}", folder.display()))?;
        if !folder.exists() {
            fs::create_dir_all(folder)?;
            mount_bind_recursive(format!("/proc/self/fd/{}", open.as_raw_fd()), folder)
                .with_context(|| format!("failed to keep {}", folder.display()))?;
        }
    }
    for folder in ["/var/log", "/var/lib", "/var/tmp", "/run/lock"] {
        fs::create_dir_all(folder)?;
    }
    std::os::unix::fs::symlink("/run", "/var/run")?;
    Ok(())
}

fn mask_settings() -> Result<()> {
    let own = Path::new("/run/settings");
    fs::create_dir_all(own)?;
    for (setting, value) in SETTINGS {
        let kernels = Path::new("/proc/sys").join(setting);
        let file = own.join(setting.replace('/', "."));
        fs::write(&file, value)?;
        mount_bind(&file, &kernels).with_context(|| format!("failed to mount over {}", kernels.display()))?;
    }
    Ok(())
}

fn is_open(address: SocketAddr) -> Option<()> {
    TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok().map(drop)
}

fn api_server_is_ready(plan: &NodePlan) -> Option<()> {
    // A connection costs nothing; asking whether all is ready costs a process.
    is_open(SocketAddr::from((plan.subnets.node(), 6443)))?;
    let asked = Command::new(plan.bin.join("kubectl"))
        .arg("--kubeconfig")
        .arg(plan.state.config(&kubeconfig_file("supervisor")))
        .args(["get", "--raw=/readyz"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    asked.is_ok_and(|status| status.success()).then_some(())
}

/// The components that were started, told to others through a file.
struct Running<'a> {
    state: &'a State,
    started: Vec<Started>,
    children: Vec<Child>,
}

impl Running<'_> {
    fn new(state: &State) -> Running<'_> {
        Running { state, started: Vec::new(), children: Vec::new() }
    }

    fn start_all(&mut self, plan: &NodePlan, phase: Phase) -> Result<()> {
        for component in plan.components.iter().filter(|component| component.phase == phase) {
            let child =
                start(component, plan).with_context(|| format!("failed to start {}", component.name))?;
            self.started.push(Started { name: component.name.clone(), pid: child.id(), ended: None });
            self.children.push(child);
        }
        self.publish()
    }

    /// Waits for what a component does when it is ready, unless one ends.
    fn wait_for(&mut self, what: &str, mut probe: impl FnMut() -> Option<()>) -> Result<()> {
        let ready = wait::until(PATIENCE, || match self.find_ended() {
            Some(ended) => Some(Err(ended)),
            None => probe().map(Ok),
        });
        match ready {
            Some(Ok(())) => Ok(()),
            Some(Err(name)) => bail!("{name} ended at once; {}", self.state.log(&name).display()),
            None => bail!("{what} is not ready after {} s", PATIENCE.as_secs()),
        }
    }

    /// A component that has ended, while nobody collects yet.
    fn find_ended(&mut self) -> Option<String> {
        for (child, started) in self.children.iter_mut().zip(&mut self.started) {
            if let Ok(Some(status)) = child.try_wait() {
                started.ended = Some(status.to_string());
                return Some(started.name.clone());
            }
        }
        None
    }

    /// Collects whatever ends in the node, for the first process inherits all orphans.
    fn collect(&mut self) -> Result<()> {
        loop {
            let Ok(Some((pid, status))) = wait_for_any(WaitOptions::empty()) else {
                // Whoever ended everything still has to clear up, and ends this process then.
                while GUARD_IS_GONE.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                bail!("everything in the node has ended");
            };
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            let Some(started) = self.started.iter_mut().find(|started| started.pid == pid) else {
                continue;
            };
            started.ended = Some(match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (None, Some(signal)) => format!("signal {signal}"),
                (None, None) => "for no known reason".into(),
            });
            eprintln!("{} has ended: {}", started.name, started.ended.as_deref().unwrap_or_default());
            self.publish()?;
        }
    }

    fn publish(&self) -> Result<()> {
        let text = serde_json::to_vec(&self.started)?;
        write_whole(&self.state.components(), &text).context("failed to write the node's state")
    }
}

fn start(component: &Component, plan: &NodePlan) -> Result<Child> {
    let log = fs::File::create(plan.state.log(&component.name))?;
    let path = format!("{}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", plan.bin.display());
    Ok(Command::new(&component.program)
        .args(&component.arguments)
        .current_dir(plan.state.folder())
        .env_clear()
        .env("PATH", path)
        .env("HOME", plan.state.data("home"))
        .env("TMPDIR", plan.state.data("tmp"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?)
}
