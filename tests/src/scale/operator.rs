//! The operator that is measured: a process of this machine, as its Deployment would start it.

use std::fs::File;
use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tokio::process::{Child, Command};

use super::layout::NAMESPACE;
use super::order::Order;
use super::process::{Usage, usage};
use super::scrape::Scrape;
use crate::faults::story::NO_IMAGE;

/// It gives its Lease back and ends within this time; else it is killed.
const LEAVING: Duration = Duration::from_secs(20);
/// For an answer of its own port.
const ANSWER: Duration = Duration::from_secs(5);
/// How long to wait between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(5);

/// A running operator. Its process is killed when this is dropped.
pub struct Operator {
    child: Child,
    pid: u32,
    url: String,
    http: reqwest::Client,
}

/// Keeps a process stopped until it is dropped.
pub struct Paused(u32);

impl Drop for Paused {
    fn drop(&mut self) {
        // A process that has ended meanwhile is found out by the next look at it.
        let _ = signal(self.0, "CONT");
    }
}

impl Operator {
    /// Starts it.
    pub fn start(order: &Order) -> Result<Self> {
        let log = File::options().create(true).append(true).open(&order.operator_log);
        let log = log.with_context(|| format!("failed to open {}", order.operator_log.display()))?;
        let listen = free_address()?;
        let mut command = Command::new(&order.operator);
        command
            .args(["run", "--namespace", NAMESPACE, "--operator-namespace", NAMESPACE])
            // The same in every life: it need not wait for the Lease of one that was killed.
            .args(["--identity", "the-operator", "--worker-image", NO_IMAGE])
            .args(["--listen", &listen])
            .env("KUBECONFIG", &order.operator_kubeconfig)
            .env("RUST_LOG", "info,kube_client=warn,kube_runtime=warn")
            .env_remove("HTTPS_PROXY")
            .env_remove("https_proxy")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true);
        let child =
            command.spawn().with_context(|| format!("failed to start {}", order.operator.display()))?;
        let pid = child.id().context("the operator has no process id")?;
        let http = reqwest::Client::builder().no_proxy().timeout(ANSWER).build()?;
        Ok(Self { child, pid, url: format!("http://{listen}"), http })
    }

    /// Waits until its caches hold all that there is.
    pub async fn synced(&mut self, within: Duration) -> Result<()> {
        let began = Instant::now();
        loop {
            let answer = self.http.get(format!("{}/readyz", self.url)).send().await;
            if answer.is_ok_and(|answer| answer.status().is_success()) {
                return Ok(());
            }
            self.is_there()?;
            ensure!(began.elapsed() < within, "it is not synced after {} s", within.as_secs());
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
    }

    /// What its metrics say now.
    pub async fn scrape(&mut self) -> Result<Scrape> {
        self.is_there()?;
        let answer = self.http.get(format!("{}/metrics", self.url)).send().await;
        let answer = answer.context("the operator's metrics cannot be read")?.error_for_status()?;
        Ok(Scrape(answer.text().await?))
    }

    /// Waits until its metrics say so; returns them.
    pub async fn until(
        &mut self,
        what: &str,
        within: Duration,
        is_so: impl Fn(&Scrape) -> bool,
    ) -> Result<Scrape> {
        let began = Instant::now();
        loop {
            let scrape = self.scrape().await?;
            if is_so(&scrape) {
                return Ok(scrape);
            }
            let (looks, streams) = (scrape.looks(), scrape.streams());
            ensure!(
                began.elapsed() < within,
                "waited {} s until {what}; {looks} looks, {streams} streams",
                within.as_secs()
            );
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
    }

    /// What its process has used so far.
    pub fn usage(&self) -> Result<Usage> {
        usage(self.pid)
    }

    /// Stops it as it is, without its knowledge.
    pub fn pause(&self) -> Result<Paused> {
        signal(self.pid, "STOP")?;
        Ok(Paused(self.pid))
    }

    /// Has it end, and waits for that.
    pub async fn stop(mut self) -> Result<()> {
        self.is_there()?;
        signal(self.pid, "TERM")?;
        match tokio::time::timeout(LEAVING, self.child.wait()).await {
            Ok(status) => status.map(drop).context("failed to wait for the operator"),
            Err(_) => self.child.kill().await.context("failed to kill the operator"),
        }
    }

    fn is_there(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the operator has ended by itself: {status}"),
        }
    }
}

/// An address of this machine on which nobody listens.
fn free_address() -> Result<String> {
    let listener = TcpListener::bind("127.0.0.1:0").context("no port is free")?;
    Ok(listener.local_addr()?.to_string())
}

fn signal(pid: u32, signal: &str) -> Result<()> {
    let status = std::process::Command::new("kill").args(["-s", signal, &pid.to_string()]).status();
    let status = status.context("failed to run kill")?;
    ensure!(status.success(), "`kill -s {signal} {pid}` failed: {status}");
    Ok(())
}
