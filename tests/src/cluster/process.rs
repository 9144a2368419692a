//! Processes of pods, seen from the machine the cluster runs on: to pause and to kill them as a
//! crash would.

use std::fs;
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

    fn signal(self, signal: &str) -> Result<()> {
        let arguments = ["-s", signal, &self.pid.to_string()];
        let status = Command::new("kill").args(arguments).status().context("failed to run kill")?;
        if !status.success() {
            bail!("`kill -s {signal} {}` failed: {status}", self.pid);
        }
        Ok(())
    }
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
    fn a_process_that_does_not_run_is_not_found() {
        let error = find("00000000-0000-0000-0000-000000000000", "turret-worker").unwrap_err();
        assert!(error.to_string().starts_with("no process `turret-worker`"), "{error}");
    }
}
