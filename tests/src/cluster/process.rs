//! Processes of pods, seen from the machine the cluster runs on: to pause and to kill them as a
//! crash would, and to see how much memory their containers took.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A process of a container, by its id on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContainerProcess {
    pid: u32,
}

/// Finds the process called `program` in the pod with this UID.
pub fn find(pod_uid: &str, program: &str) -> Result<ContainerProcess> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("failed to list processes")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // A process that ended meanwhile is none of ours.
        let (Ok(cgroup), Ok(command)) = (
            fs::read_to_string(format!("/proc/{pid}/cgroup")),
            fs::read_to_string(format!("/proc/{pid}/comm")),
        ) else {
            continue;
        };
        if belongs_to(&cgroup, pod_uid) && is_called(&command, program) {
            found.push(ContainerProcess { pid });
        }
    }
    match found[..] {
        [one] => Ok(one),
        [] => bail!("no process `{program}` runs in the pod {pod_uid}"),
        _ => bail!("{} processes `{program}` run in the pod {pod_uid}", found.len()),
    }
}

impl ContainerProcess {
    /// `kill -9`: it ends without a word.
    pub fn kill(self) -> Result<()> {
        self.signal("KILL")
    }

    /// Stops it until [`Paused`] is dropped, so that a failing test does not leave it stopped.
    pub fn pause(self) -> Result<Paused> {
        self.signal("STOP")?;
        Ok(Paused(self))
    }

    /// Memory of its container, as the kernel counts it.
    pub fn memory(self) -> Result<ContainerMemory> {
        let file = format!("/proc/{}/cgroup", self.pid);
        let cgroup = fs::read_to_string(&file).with_context(|| format!("failed to read {file}"))?;
        let files = memory_files(&cgroup).with_context(|| format!("no memory is counted: {cgroup}"))?;
        let read = |file: &Path| -> Result<u64> {
            let text =
                fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
            text.trim().parse::<u64>().with_context(|| format!("{} says {:?}", file.display(), text.trim()))
        };
        Ok(ContainerMemory { peak_bytes: read(&files.peak)?, limit_bytes: read(&files.limit)? })
    }

    fn signal(self, signal: &str) -> Result<()> {
        let arguments = ["-s", signal, &self.pid.to_string()];
        let status = Command::new("kill").args(arguments).status().context("failed to run kill")?;
        if !status.success() {
            bail!("`kill -s {signal} {}` failed: {status}", self.pid);
        }
        Ok(())
    }
}

/// Memory of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContainerMemory {
    /// The most that it ever used.
    pub peak_bytes: u64,
    /// What it may use.
    pub limit_bytes: u64,
}

/// Where the kernel says how much memory a control group uses.
#[derive(Clone, Debug, PartialEq, Eq)]
struct MemoryFiles {
    peak: PathBuf,
    limit: PathBuf,
}

/// By `/proc/PID/cgroup`. Version 1 has a hierarchy for memory, version 2 one for everything; where both are mounted,
/// memory is counted in the former.
fn memory_files(cgroup: &str) -> Option<MemoryFiles> {
    let path_of = |controller: &str| {
        cgroup.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers.split(',').any(|one| one == controller).then(|| path.trim_start_matches('/'))
        })
    };
    let root = Path::new("/sys/fs/cgroup");
    if let Some(path) = path_of("memory") {
        let group = root.join("memory").join(path);
        let (peak, limit) = (group.join("memory.max_usage_in_bytes"), group.join("memory.limit_in_bytes"));
        return Some(MemoryFiles { peak, limit });
    }
    let group = root.join(path_of("")?);
    Some(MemoryFiles { peak: group.join("memory.peak"), limit: group.join("memory.max") })
}

/// A process that is stopped.
#[derive(Debug)]
pub struct Paused(ContainerProcess);

impl Drop for Paused {
    fn drop(&mut self) {
        // It may have been killed meanwhile, by a probe for example; then nothing is left to do.
        let _ = self.0.signal("CONT");
    }
}

fn belongs_to(cgroup: &str, pod_uid: &str) -> bool {
    // kubelet's systemd driver writes underscores.
    cgroup.contains(pod_uid) || cgroup.contains(&pod_uid.replace('-', "_"))
}

fn is_called(command: &str, program: &str) -> bool {
    // The kernel keeps fifteen characters.
    command.trim_end() == &program[..program.len().min(15)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_is_known_by_its_cgroup_under_either_driver() {
        let uid = "0f8a-11";
        assert!(belongs_to("4:cpu:/turret/kubepods/burstable/pod0f8a-11/abc\n", uid));
        assert!(belongs_to("0::/kubepods.slice/kubepods-pod0f8a_11.slice/cri-abc.scope\n", uid));
        assert!(!belongs_to("0::/kubepods.slice/kubepods-pod0f8a_12.slice\n", uid));
        assert!(is_called("turret-operator\n", "turret-operator"));
        assert!(!is_called("pause\n", "turret-worker"));
    }

    #[test]
    fn memory_is_counted_in_the_group_of_either_version() {
        let of = |cgroup: &str| memory_files(cgroup).map(|files| files.peak);
        let path = |path: &str| Some(PathBuf::from(path));
        assert_eq!(of("0::/pods/podA/b\n"), path("/sys/fs/cgroup/pods/podA/b/memory.peak"));
        let first = "5:cpu,cpuacct:/x\n4:memory:/pods/podA/b\n0::/\n";
        assert_eq!(of(first), path("/sys/fs/cgroup/memory/pods/podA/b/memory.max_usage_in_bytes"));
        assert_eq!(of("1:cpu:/x\n"), None);
    }

    #[test]
    fn a_process_that_does_not_run_is_not_found() {
        let error = find("00000000-0000-0000-0000-000000000000", "turret-worker").unwrap_err();
        assert!(error.to_string().starts_with("no process `turret-worker`"), "{error}");
    }
}
