//! A cluster's folder: where each file of it lies.
//!
//! Unix sockets' paths must stay below 108 bytes, so the folder's own path is short:
//! `/var/lib/turret/<name>`, or `/tmp/turret-0/<name>` where `/var/lib` cannot be written.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// The folder of one cluster, and the names of what lies in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct State(PathBuf);

/// The longest name of a cluster: it becomes part of paths, links and cgroups.
const LONGEST_NAME: usize = 24;

impl State {
    /// The folder at `path`.
    pub fn at(path: impl Into<PathBuf>) -> State {
        State(path.into())
    }

    /// Where the cluster `name` may have its folder, best first.
    pub fn candidates(name: &str) -> [State; 2] {
        [State::at(Path::new("/var/lib/turret").join(name)), State::at(Path::new("/tmp/turret-0").join(name))]
    }

    /// The folder itself.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    /// What the cluster is; see `Cluster`.
    pub fn description(&self) -> PathBuf {
        self.0.join("cluster.json")
    }

    /// The administrator's kubeconfig, with everything in it.
    pub fn kubeconfig(&self) -> PathBuf {
        self.0.join("kubeconfig")
    }

    /// Folders that pods may mount by `hostPath`; every pod can read them.
    pub fn volumes(&self) -> PathBuf {
        self.0.join("volumes")
    }

    /// The certificate or key `file`.
    pub fn pki(&self, file: &str) -> PathBuf {
        self.0.join("pki").join(file)
    }

    /// The configuration `file` of a component.
    pub fn config(&self, file: &str) -> PathBuf {
        self.0.join("config").join(file)
    }

    /// What a component remembers.
    pub fn data(&self, component: &str) -> PathBuf {
        self.0.join("data").join(component)
    }

    /// What a component says.
    pub fn log(&self, component: &str) -> PathBuf {
        self.0.join("log").join(format!("{component}.log"))
    }

    /// The API server's audit log.
    pub fn audit_log(&self) -> PathBuf {
        self.log("audit")
    }

    /// A file or socket that exists only while the cluster runs.
    pub fn run(&self, file: &str) -> PathBuf {
        self.0.join("run").join(file)
    }

    /// Locked by the guard for as long as it lives, which is how others know.
    pub fn alive(&self) -> PathBuf {
        self.run("alive")
    }

    /// The guard's and the node's process ids on this machine.
    pub fn processes(&self) -> PathBuf {
        self.run("processes.json")
    }

    /// What the node's first process tells of its components.
    pub fn components(&self) -> PathBuf {
        self.run("components.json")
    }

    /// What the node's first process is to do.
    pub fn plan(&self) -> PathBuf {
        self.config("node.json")
    }

    /// containerd's socket.
    pub fn containerd_socket(&self) -> PathBuf {
        self.run("containerd.sock")
    }
}

/// Checks a cluster's name: it becomes part of paths, links and cgroups.
pub fn check_name(name: &str) -> Result<String, String> {
    let fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > LONGEST_NAME {
        return Err(format!("a cluster's name has 1 to {LONGEST_NAME} characters"));
    }
    if !name.chars().all(fine) || name.starts_with('-') || name.ends_with('-') {
        return Err("a cluster's name has lower-case letters, digits and inner dashes".into());
    }
    Ok(name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_name_keeps_sockets_below_the_limit_of_the_kernel() {
        let longest = check_name(&"x".repeat(LONGEST_NAME)).unwrap();
        for state in State::candidates(&longest) {
            // kubelet's deepest socket is the longest of all.
            let deepest = state.data("kubelet").join("device-plugins/kubelet.sock");
            assert!(deepest.as_os_str().len() < 108, "{deepest:?}");
            assert!(state.containerd_socket().as_os_str().len() < 108);
        }
    }

    #[test]
    fn names_that_would_break_a_path_are_refused() {
        for bad in ["", "../x", "A", "a/b", "-a", "a-", &"x".repeat(LONGEST_NAME + 1)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        assert_eq!(check_name("test-2").unwrap(), "test-2");
    }
}
