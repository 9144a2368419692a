//! The control groups of a cluster: `/turret-<name>` in each hierarchy, with the node's own
//! programs in `node` and the pods in what the kubelet makes beside it.
//!
//! Version 1 has a hierarchy for each controller, version 2 one for all; both are supported.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::wait;

/// Where the hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// The controllers of version 2 that the kubelet limits pods with.
const CONTROLLERS: [&str; 3] = ["cpu", "memory", "pids"];
/// How long processes that were killed may take to leave.
const LEAVING: Duration = Duration::from_secs(10);

/// Why the control groups cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// They are not mounted, or not writable.
    #[error(
        "failed to {attempt} `{path}`: a node needs writable control groups; run on the machine itself, or in a \
         container that is privileged and has its own cgroup namespace"
    )]
    Io {
        /// What was tried.
        attempt: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Controllers are not available.
    #[error(
        "the control groups in {ROOT} offer only `{available}`, and a node needs {missing} too: boot with them \
         enabled (`systemd.unified_cgroup_hierarchy=1`, no `cgroup_disable=`), or have them delegated to this container"
    )]
    NoController {
        /// What there is.
        available: String,
        /// What is missing.
        missing: String,
    },
    /// Version 2, in a container whose own processes are in the root.
    #[error(
        "cannot hand the controllers in {ROOT} on to new groups: processes sit in the root itself, as in a container; \
         move them first: mkdir {ROOT}/init && xargs -rn1 < {ROOT}/cgroup.procs > {ROOT}/init/cgroup.procs"
    )]
    BusyRoot {
        /// What the kernel said.
        source: io::Error,
    },
    /// Processes would not leave.
    #[error("control group `{path}` could not be removed: processes stay in it after being killed")]
    Stays {
        /// The group.
        path: PathBuf,
    },
}

/// The name of a cluster's control groups.
pub fn name_of(cluster: &str) -> String {
    format!("turret-{cluster}")
}

/// Makes the groups of a cluster and puts the process `pid` into them.
pub fn create(name: &str, pid: u32) -> Result<(), CgroupError> {
    let hierarchies = hierarchies(Path::new(ROOT));
    if is_version_2(Path::new(ROOT)) {
        delegate(Path::new(ROOT))?;
    }
    for hierarchy in &hierarchies {
        let group = hierarchy.join(name);
        let leaf = group.join("node");
        for folder in [&group, &leaf] {
            fs::create_dir_all(folder).map_err(failed("create", folder))?;
            inherit_cpuset(folder)?;
        }
        if hierarchy == Path::new(ROOT) {
            // The kubelet's own groups lie beside `node` and want the controllers, too.
            hand_on(&group)?;
        }
        let members = leaf.join("cgroup.procs");
        fs::write(&members, pid.to_string()).map_err(failed("write", &members))?;
    }
    Ok(())
}

/// Leaves the groups of a cluster, so that they can be removed by one of their own.
pub fn leave() {
    for hierarchy in hierarchies(Path::new(ROOT)) {
        // A process that cannot leave only keeps an empty group alive.
        let _ = fs::write(hierarchy.join("cgroup.procs"), "0");
    }
}

/// Ends every process in a cluster's groups, and removes the groups.
pub fn remove(name: &str) -> Result<(), CgroupError> {
    for hierarchy in hierarchies(Path::new(ROOT)) {
        let group = hierarchy.join(name);
        let gone = wait::until(LEAVING, || {
            kill_members(&group);
            remove_tree(&group);
            (!group.exists()).then_some(())
        });
        if gone.is_none() {
            return Err(CgroupError::Stays { path: group });
        }
    }
    Ok(())
}

/// The groups of a cluster that exist.
pub fn present(name: &str) -> Vec<PathBuf> {
    let groups = hierarchies(Path::new(ROOT)).into_iter().map(|hierarchy| hierarchy.join(name));
    groups.filter(|group| group.exists()).collect()
}

fn is_version_2(root: &Path) -> bool {
    root.join("cgroup.controllers").exists()
}

/// The root of version 2, or each hierarchy of version 1: also the one of version 2 beside
/// them, in which runc makes groups too. A controller that shares one with another is a link.
fn hierarchies(root: &Path) -> Vec<PathBuf> {
    if is_version_2(root) {
        return vec![root.to_path_buf()];
    }
    let mut found: Vec<PathBuf> = fs::read_dir(root)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .filter(|path| path.join("cgroup.procs").exists())
        .collect();
    found.sort();
    found
}

/// Lets groups below the root have controllers (version 2).
fn delegate(root: &Path) -> Result<(), CgroupError> {
    let path = root.join("cgroup.controllers");
    let available = fs::read_to_string(&path).map_err(failed("read", &path))?;
    let missing = missing_controllers(&available);
    if !missing.is_empty() {
        let available = available.trim().to_owned();
        return Err(CgroupError::NoController { available, missing: missing.join(", ") });
    }
    hand_on(root)
}

fn missing_controllers(available: &str) -> Vec<&'static str> {
    let available: Vec<_> = available.split_whitespace().collect();
    CONTROLLERS.into_iter().filter(|controller| !available.contains(controller)).collect()
}

fn hand_on(group: &Path) -> Result<(), CgroupError> {
    let path = group.join("cgroup.subtree_control");
    let available = group.join("cgroup.controllers");
    let available = fs::read_to_string(&available).map_err(failed("read", &available))?;
    let enabled = fs::read_to_string(&path).map_err(failed("read", &path))?;
    for controller in available.split_whitespace() {
        if enabled.split_whitespace().any(|enabled| enabled == controller) {
            continue;
        }
        match fs::write(&path, format!("+{controller}")) {
            Ok(()) => {}
            Err(source) if source.kind() == io::ErrorKind::ResourceBusy => {
                return Err(CgroupError::BusyRoot { source });
            }
            Err(source) if CONTROLLERS.contains(&controller) => {
                return Err(failed("write", &path)(source));
            }
            // A controller that no pod needs may be unusable, as `cpu` for realtime is.
            Err(_) => {}
        }
    }
    Ok(())
}

/// A new group of version 1's `cpuset` has no processors, and no process could enter it.
fn inherit_cpuset(group: &Path) -> Result<(), CgroupError> {
    let parent = group.parent().expect("a group lies in a hierarchy");
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let (from, to) = (parent.join(file), group.join(file));
        if !from.exists() || is_version_2(parent) || !to.exists() {
            continue;
        }
        let current = fs::read_to_string(&to).map_err(failed("read", &to))?;
        if current.trim().is_empty() {
            let inherited = fs::read_to_string(&from).map_err(failed("read", &from))?;
            fs::write(&to, inherited.trim()).map_err(failed("write", &to))?;
        }
    }
    Ok(())
}

fn kill_members(group: &Path) {
    for folder in folders_below(group) {
        let members = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
        for pid in members.lines().filter_map(|line| line.parse().ok()).filter_map(Pid::from_raw) {
            // It may just have ended.
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

fn remove_tree(group: &Path) {
    // Children come after their parents; a group goes only when it is empty.
    for folder in folders_below(group).iter().rev() {
        let _ = fs::remove_dir(folder);
    }
}

fn folders_below(group: &Path) -> Vec<PathBuf> {
    let mut all = vec![group.to_path_buf()];
    let mut next = 0;
    while let Some(folder) = all.get(next) {
        let below: Vec<_> = fs::read_dir(folder)
            .into_iter()
            .flatten()
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| entry.path())
            .collect();
        all.extend(below);
        next += 1;
    }
    all
}

fn failed(attempt: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError + use<> {
    let path = path.to_path_buf();
    move |source| CgroupError::Io { attempt, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_has_a_hierarchy_for_each_controller_and_perhaps_one_of_version_2_beside() {
        let root = tempfile::tempdir().unwrap();
        for controller in ["cpu", "memory", "unified"] {
            fs::create_dir(root.path().join(controller)).unwrap();
            fs::write(root.path().join(controller).join("cgroup.procs"), "").unwrap();
        }
        fs::write(root.path().join("unified/cgroup.controllers"), "").unwrap();
        std::os::unix::fs::symlink("cpu", root.path().join("cpuacct")).unwrap();
        let expected = ["cpu", "memory", "unified"].map(|name| root.path().join(name));
        assert_eq!(hierarchies(root.path()), expected);
    }

    #[test]
    fn version_2_is_one_hierarchy() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("cgroup.controllers"), "cpu memory pids").unwrap();
        assert_eq!(hierarchies(root.path()), [root.path()]);
    }

    #[test]
    fn controllers_that_are_missing_are_named() {
        assert_eq!(missing_controllers("cpuset cpu io memory pids\n"), Vec::<&str>::new());
        assert_eq!(missing_controllers("cpu\n"), ["memory", "pids"]);
    }

    #[test]
    fn a_new_cpuset_takes_its_parents_processors() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("g");
        fs::create_dir(&group).unwrap();
        for (file, value) in [("cpuset.cpus", "0-1\n"), ("cpuset.mems", "0\n")] {
            fs::write(root.path().join(file), value).unwrap();
            fs::write(group.join(file), "\n").unwrap();
        }
        inherit_cpuset(&group).unwrap();
        assert_eq!(fs::read_to_string(group.join("cpuset.cpus")).unwrap(), "0-1");
    }
}
