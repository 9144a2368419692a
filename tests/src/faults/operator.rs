//! The operator as a process of this machine, with its kubeconfig pointing at a proxy: started again whenever it ends, as a
//! kubelet would, and killed when the proxy says that a crash is due.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::proxy::Proxy;

/// An operator that ends by itself is started again after this long.
const RESTARTS: Duration = Duration::from_millis(100);
/// One that ends so often is not started any more.
const MOST_EXITS: usize = 10;

/// How the operator is started.
#[derive(Clone, Debug)]
pub struct Start {
    /// Its program.
    pub program: PathBuf,
    /// The namespace that it serves, and that has its Lease and its keys.
    pub namespace: String,
    /// Image of the workers.
    pub worker_image: String,
    /// A folder of its own, for its kubeconfig and its log.
    pub folder: PathBuf,
}

/// What became of its processes.
#[derive(Clone, Debug, Default)]
pub struct Lives {
    /// How often it was killed because a crash was due.
    pub kills: usize,
    /// How it ended by itself, each time.
    pub exits: Vec<String>,
    /// Why it is not started any more.
    pub failure: Option<String>,
}

/// A running operator. Its process is killed when this is dropped.
pub struct Operator {
    lives: Arc<Mutex<Lives>>,
    log: PathBuf,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Operator {
    /// Starts it behind the proxy.
    pub fn start(start: Start, proxy: Arc<Proxy>) -> Result<Self> {
        let kubeconfig = start.folder.join("kubeconfig");
        fs::write(&kubeconfig, proxy.kubeconfig(&start.namespace).to_string())
            .with_context(|| format!("failed to write {}", kubeconfig.display()))?;
        let log = start.folder.join("log");
        let stop = CancellationToken::new();
        let lives = Arc::new(Mutex::new(Lives::default()));
        let keeper = Keeper { start, kubeconfig, log: log.clone(), proxy, lives: lives.clone() };
        let task = tokio::spawn(keeper.keep(stop.clone()));
        Ok(Self { lives, log, stop, task })
    }

    /// What became of its processes so far.
    pub fn lives(&self) -> Lives {
        lock(&self.lives).clone()
    }

    /// The end of its log.
    pub fn last_words(&self, lines: usize) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Kills it, and waits until it is dead.
    pub async fn stop(mut self) {
        self.stop.cancel();
        // It panics only where the runtime ends.
        let _ = (&mut self.task).await;
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        // The process goes with the task that keeps it.
        self.task.abort();
    }
}

fn lock(lives: &Mutex<Lives>) -> MutexGuard<'_, Lives> {
    lives.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The task that keeps it running.
struct Keeper {
    start: Start,
    kubeconfig: PathBuf,
    log: PathBuf,
    proxy: Arc<Proxy>,
    lives: Arc<Mutex<Lives>>,
}

enum End {
    Exited(String),
    Crashed,
    Stopped,
}

impl Keeper {
    async fn keep(self, stop: CancellationToken) {
        loop {
            let end = match self.spawn() {
                Ok(child) => self.live(child, &stop).await,
                Err(error) => {
                    lock(&self.lives).failure = Some(format!("{error:#}"));
                    return;
                }
            };
            self.proxy.next_life();
            match end {
                Ok(End::Stopped) => return,
                Ok(End::Crashed) => lock(&self.lives).kills += 1,
                Ok(End::Exited(how)) => {
                    let exits = {
                        let mut lives = lock(&self.lives);
                        lives.exits.push(how);
                        lives.exits.len()
                    };
                    if exits >= MOST_EXITS {
                        lock(&self.lives).failure = Some(format!("it has ended {exits} times by itself"));
                        return;
                    }
                    tokio::time::sleep(RESTARTS).await;
                }
                Err(error) => {
                    lock(&self.lives).failure = Some(format!("{error:#}"));
                    return;
                }
            }
        }
    }

    /// One life, to its end.
    async fn live(&self, mut child: Child, stop: &CancellationToken) -> Result<End> {
        let end = tokio::select! {
            status = child.wait() => return Ok(End::Exited(status?.to_string())),
            () = self.proxy.crash_is_due() => End::Crashed,
            () = stop.cancelled() => End::Stopped,
        };
        child.kill().await.context("failed to kill the operator")?;
        Ok(end)
    }

    fn spawn(&self) -> Result<Child> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("failed to open {}", self.log.display()))?;
        let Start { program, worker_image, .. } = &self.start;
        let namespace = self.start.namespace.as_str();
        let mut command = Command::new(program);
        command
            .args(["run", "--namespace", namespace, "--operator-namespace", namespace])
            // The same in every life, as the name of a pod is.
            .args(["--identity", "the-operator", "--worker-image", worker_image.as_str()])
            .args(["--listen", "127.0.0.1:0"])
            .env("KUBECONFIG", &self.kubeconfig)
            .env("RUST_LOG", "info,kube_client=warn,kube_runtime=warn")
            .env_remove("HTTPS_PROXY")
            .env_remove("https_proxy")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        command.spawn().with_context(|| format!("failed to start {}", program.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tls::Tls;
    use super::*;

    #[tokio::test]
    async fn one_that_ends_by_itself_again_and_again_is_given_up_with_its_reason() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut config = kube::Config::new("http://127.0.0.1:9".parse().unwrap());
        config.root_cert = Some(Vec::new());
        let upstream = kube::Client::try_from(config).unwrap();
        let proxy = Arc::new(Proxy::start(upstream, &Tls::new().unwrap(), None, 0).await.unwrap());
        let folder = tempfile::tempdir().unwrap();
        let start = Start {
            program: "false".into(),
            namespace: "n".into(),
            worker_image: "i".into(),
            folder: folder.path().to_owned(),
        };
        let mut operator = Operator::start(start, proxy).unwrap();
        (&mut operator.task).await.unwrap();
        let lives = operator.lives();
        assert_eq!(lives.exits, vec!["exit status: 1"; MOST_EXITS]);
        assert_eq!((lives.kills, lives.failure.is_some()), (0, true));
        assert!(folder.path().join("kubeconfig").exists());
    }
}
