//! The cluster that the demo runs on: kubectl and helm, pointed at it.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use crate::cluster::{self, Cluster};
use crate::packages::find_program;

/// How kubectl and helm reach a cluster, and which namespaces of it are the demo's.
pub struct Target {
    kubectl: PathBuf,
    helm: PathBuf,
    kubeconfig: Option<PathBuf>,
    context: Option<String>,
    /// Namespace of the release.
    pub system: String,
    /// Namespace of the samples.
    pub namespace: String,
}

impl Target {
    /// The demo's own cluster.
    pub fn local(cluster: &Cluster, system: &str, namespace: &str) -> Target {
        Target {
            kubectl: cluster.bin.join("kubectl"),
            helm: cluster.bin.join("helm"),
            kubeconfig: Some(cluster.kubeconfig.clone()),
            context: None,
            system: system.into(),
            namespace: namespace.into(),
        }
    }

    /// A cluster of the user's kubeconfig. kubectl and helm are those of this machine; the local cluster's are built
    /// where one is missing.
    pub fn existing(context: &str, system: &str, namespace: &str) -> Result<Target> {
        let program = |name: &str| match find_program(name) {
            Some(path) => Ok(path),
            None => anyhow::Ok(cluster::programs()?.join(name)),
        };
        Ok(Target {
            kubectl: program("kubectl")?,
            helm: program("helm")?,
            kubeconfig: None,
            context: Some(context.into()),
            system: system.into(),
            namespace: namespace.into(),
        })
    }

    /// kubectl with the kubeconfig as it is, to ask about the kubeconfig itself.
    pub fn without_context(&self) -> Command {
        Command::new(&self.kubectl)
    }

    /// kubectl, about to be given its words.
    pub fn command(&self) -> Command {
        let mut command = Command::new(&self.kubectl);
        if let Some(file) = &self.kubeconfig {
            command.env("KUBECONFIG", file);
        }
        if let Some(context) = &self.context {
            command.args(["--context", context]);
        }
        command
    }

    /// Runs kubectl and returns what it prints.
    pub fn kubectl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        cluster::finish(self.command().args(arguments), None)
    }

    /// Runs kubectl with `input`, for `apply -f -`, and returns what it prints.
    pub fn kubectl_with_input<S: AsRef<OsStr>>(
        &self,
        arguments: impl IntoIterator<Item = S>,
        input: &str,
    ) -> Result<String> {
        cluster::finish(self.command().args(arguments), Some(input))
    }

    /// Runs helm and returns what it prints.
    pub fn helm<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        let mut command = Command::new(&self.helm);
        if let Some(file) = &self.kubeconfig {
            command.env("KUBECONFIG", file);
        }
        if let Some(context) = &self.context {
            command.args(["--kube-context", context]);
        }
        cluster::finish(command.args(arguments), None)
    }
}
