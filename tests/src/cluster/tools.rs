//! The programs a person would use: kubectl and helm, run as they are.

use std::ffi::OsStr;
use std::process::{Output, Stdio};

use anyhow::{Context, Result, bail};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::environment::Environment;

/// Runs `kubectl` and `helm` against the cluster.
#[derive(Clone, Debug)]
pub struct Tools {
    environment: Environment,
}

impl Tools {
    /// For the cluster of `environment`.
    pub fn new(environment: Environment) -> Self {
        Self { environment }
    }

    /// `kubectl ARGUMENTS…`; answers what it printed.
    pub async fn kubectl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        self.run("kubectl", arguments, None).await
    }

    /// `kubectl apply -f -` of these manifests (server side, so that a big object fits).
    pub async fn apply(&self, manifests: &str) -> Result<String> {
        self.run("kubectl", ["apply", "--server-side", "--force-conflicts", "-f", "-"], Some(manifests)).await
    }

    /// `helm ARGUMENTS…`; answers what it printed.
    pub async fn helm<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<String> {
        self.run("helm", arguments, None).await
    }

    async fn run<S: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = S>,
        input: Option<&str>,
    ) -> Result<String> {
        let mut command = Command::new(self.environment.programs.join(program));
        command.args(arguments).env("KUBECONFIG", &self.environment.kubeconfig);
        command.current_dir(&self.environment.repository).kill_on_drop(true);
        let described = format!("{:?}", command.as_std());
        let output = feed(command, input).await.with_context(|| format!("failed to run {described}"))?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            bail!("{described} failed: {}{printed}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(printed)
    }

    /// What a person would look at when a namespace does not do what it should: objects, events,
    /// and the last words of its pods.
    pub async fn explain(&self, namespace: &str) -> String {
        let looks: [&[&str]; 4] = [
            &["get", "modelgroups,modelplacements,deployments,pods,configmaps,pvc", "-o", "wide"],
            &["get", "modelgroups,modelplacements", "-o", "yaml"],
            &["describe", "pods"],
            &["get", "events", "--sort-by=.lastTimestamp"],
        ];
        let mut text = String::new();
        for look in looks {
            let shown = self.kubectl(look.iter().copied().chain(["-n", namespace])).await;
            text += &format!("\n--- {namespace}: kubectl {}\n", look.join(" "));
            text += &tail(&shown.unwrap_or_else(|error| format!("{error:#}")), 160);
        }
        text + &self.logs(namespace).await
    }

    /// The ends of the logs of all pods in a namespace, also of containers that ended.
    pub async fn logs(&self, namespace: &str) -> String {
        let mut text = String::new();
        let names = self.kubectl(["get", "pods", "-n", namespace, "-o", "name"]).await.unwrap_or_default();
        for pod in names.split_whitespace() {
            for previous in ["--previous=true", "--previous=false"] {
                let arguments = ["logs", "-n", namespace, pod, "--all-containers", "--tail=40", previous];
                if let Ok(log) = self.kubectl(arguments).await {
                    text += &format!("\n--- {namespace}/{pod} {previous}\n{log}");
                }
            }
        }
        text
    }
}

async fn feed(mut command: Command, input: Option<&str>) -> std::io::Result<Output> {
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn()?;
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        stdin.write_all(input.as_bytes()).await?;
    }
    child.wait_with_output().await
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
