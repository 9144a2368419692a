//! Which device a worker computes on, and how much memory it may take there.
//!
//! On a CPU worker memory is the device, and what counts is the container's limit, never the machine's memory:
//! a worker that plans with more is killed by the kernel in the middle of an answer.

use std::fs;
use std::path::Path;

use turret_crds::label;
use turret_crds::report::DeviceReport;

/// The part of a CPU worker's memory limit that is the default device budget, percent. The rest is for the
/// process itself: tokenizers, connections, file pages that are being read.
const DEFAULT_BUDGET_PERCENT: u64 = 80;

/// What `TURRET_DEVICE` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// The accelerator if one was given, else the CPU.
    Auto,
    /// The CPU, whatever was given.
    Cpu,
    /// The accelerator.
    Cuda,
}

/// A device that was asked for and cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoDevice {
    /// An accelerator was given to the pod, but this worker cannot compute on it.
    #[error(
        "this worker was given an accelerator ({resource}) and can compute only on the CPU; \
         set the environment variable {} to `cpu` to compute there, or remove `accelerator` from the placement",
        label::ENV_DEVICE
    )]
    Accelerator {
        /// The extended resource.
        resource: String,
    },
    /// CUDA was asked for.
    #[error("{}=cuda, but this worker is built for the CPU only; use `cpu` or `auto`", label::ENV_DEVICE)]
    Cuda,
}

/// Decides where to compute. An accelerator that was given and is not used is an error unless the CPU was asked for:
/// crawling along on the CPU of an expensive node helps nobody.
pub fn choose(choice: DeviceChoice, accelerator: Option<&str>) -> Result<(), NoDevice> {
    match (choice, accelerator) {
        (DeviceChoice::Cpu, _) | (DeviceChoice::Auto, None | Some("")) => Ok(()),
        (DeviceChoice::Auto, Some(resource)) => Err(NoDevice::Accelerator { resource: resource.into() }),
        (DeviceChoice::Cuda, _) => Err(NoDevice::Cuda),
    }
}

/// The CPU as a device.
pub fn describe_cpu(threads: usize) -> DeviceReport {
    let model = fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("model name"))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    DeviceReport {
        kind: "cpu".into(),
        name: format!("{model}, {threads} threads"),
        total_bytes: memory_limit_bytes(),
    }
}

/// The default device budget of a device with this much memory.
pub fn default_budget_bytes(total_bytes: u64) -> u64 {
    total_bytes / 100 * DEFAULT_BUDGET_PERCENT
}

/// How many threads compute: what was asked for, else the container's CPU limit, else the processors there are.
pub fn threads(asked: Option<usize>) -> usize {
    let available = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    asked.unwrap_or(available).max(1)
}

/// The container's memory limit, or the machine's memory where there is none.
pub fn memory_limit_bytes() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
            Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
        })
        .unwrap_or(1 << 30);
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    cgroup_limit(Path::new("/sys/fs/cgroup"), &own).map_or(machine, |limit| limit.min(machine))
}

/// The tightest memory limit on the way from the root of the cgroup tree to our own group. A container usually
/// sees its own group as the root.
fn cgroup_limit(root: &Path, proc_self_cgroup: &str) -> Option<u64> {
    let read = |path: &Path| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let mut tightest: Option<u64> = None;
    for line in proc_self_cgroup.lines() {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) =
            (fields.next(), fields.next().unwrap_or(""), fields.next().unwrap_or("/"));
        let (base, file) = match controllers {
            "" => (root.to_path_buf(), "memory.max"),
            c if c.split(',').any(|c| c == "memory") => (root.join("memory"), "memory.limit_in_bytes"),
            _ => continue,
        };
        let mut at = base.clone();
        let own = path.trim_start_matches('/').split('/').filter(|s| !s.is_empty() && *s != "..");
        for folder in std::iter::once("").chain(own) {
            at.push(folder);
            tightest = match (tightest, read(&at.join(file))) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
    }
    // Version 1 writes "no limit" as a number near 2^63.
    tightest.filter(|&limit| limit < 1 << 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_accelerator_is_never_silently_ignored() {
        assert_eq!(choose(DeviceChoice::Auto, None), Ok(()));
        assert_eq!(choose(DeviceChoice::Cpu, Some("nvidia.com/gpu")), Ok(()));
        let refused = choose(DeviceChoice::Auto, Some("nvidia.com/gpu")).unwrap_err().to_string();
        assert!(refused.contains("nvidia.com/gpu") && refused.contains("TURRET_DEVICE"), "{refused}");
        assert_eq!(choose(DeviceChoice::Cuda, None), Err(NoDevice::Cuda));
    }

    #[test]
    fn the_tightest_cgroup_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("kube/memory.max", "2147483648\n");
        write("kube/pod/memory.max", "max\n");
        assert_eq!(cgroup_limit(root.path(), "0::/kube/pod\n"), Some(2 << 30));
        assert_eq!(cgroup_limit(root.path(), "0::/elsewhere\n"), None);
        write("memory/docker/a/memory.limit_in_bytes", "1073741824\n");
        write("memory/memory.limit_in_bytes", "9223372036854771712\n");
        assert_eq!(cgroup_limit(root.path(), "5:cpu,memory:/docker/a\n3:cpuset:/x\n"), Some(1 << 30));
    }
}
