//! etcd and the API server alone, as processes of this machine: without root, without a node, and without any controller. For
//! measuring what talks to an API server, beside as little else as there can be.
//!
//! Nothing outlives the process that started it, whichever way that ends, and nothing listens beyond this machine.

use std::fs::{self, File, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::pki::{Authority, Subject, signing_key};
use super::{binaries, config, wait};
use crate::packages::{self, Need, Proof};

const NEEDS: [Need; 1] = [Need {
    proof: Proof::Program("setpriv"),
    package: "util-linux",
    purpose: "end the API server together with this program",
}];
/// How long it may take to start on a machine that is busy with other things.
const PATIENCE: Duration = Duration::from_secs(120);
/// The addresses of Services. Nobody routes them.
const SERVICES: &str = "10.96.0.0/16";
/// What it says its own address is. It must not be a loopback address, and nobody asks for it.
const ADVERTISED: &str = "10.96.255.254";

/// A running API server. It ends, with its storage, when this is dropped.
pub struct ApiServer {
    // In this order: the API server ends before its storage.
    api_server: Process,
    etcd: Process,
    folder: PathBuf,
    authority: Authority,
    server: String,
    kubectl: PathBuf,
}

/// A process that is killed when this is dropped.
struct Process {
    child: Child,
    log: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        // What it holds goes with its folder.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Process {
    /// Starts a program of the cluster's that the kernel kills when this process ends.
    fn start(program: &Path, arguments: &[String], log: PathBuf) -> Result<Self> {
        let file = File::create(&log).with_context(|| format!("failed to write {}", log.display()))?;
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(program)
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("failed to start {}", program.display()))?;
        Ok(Self { child, log })
    }

    fn ended(&mut self) -> Option<String> {
        let status = self.child.try_wait().ok()??;
        let said = fs::read_to_string(&self.log).unwrap_or_default();
        let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
        Some(format!("{status}: {last}"))
    }
}

impl ApiServer {
    /// Starts it in a folder of its own, and waits until it is ready. Must be called by the thread that goes on for as long as
    /// it is needed: the kernel ends it with that thread.
    pub fn start(folder: &Path) -> Result<Self> {
        packages::ensure(&NEEDS)?;
        let bin = binaries::ensure()?;
        let [client, peer, port] = free_ports()?;
        let authority = Authority::new("turret-bench")?;
        write_files(folder, &authority)?;
        let etcd = Process::start(&bin.join("etcd"), &etcd(folder, client, peer), folder.join("etcd.log"))?;
        let arguments = api_server(folder, client, port);
        let api_server =
            Process::start(&bin.join("kube-apiserver"), &arguments, folder.join("apiserver.log"))?;
        let mut started = Self {
            api_server,
            etcd,
            folder: folder.to_owned(),
            authority,
            server: format!("https://127.0.0.1:{port}"),
            kubectl: bin.join("kubectl"),
        };
        started.until_ready()?;
        Ok(started)
    }

    /// Writes a kubeconfig of a user who may do everything.
    pub fn kubeconfig(&self, user: &str) -> Result<PathBuf> {
        let identity = self.authority.issue(&Subject::client(user, "system:masters"))?;
        let authority = self.authority.certificate();
        let content = config::kubeconfig("turret-bench", &self.server, authority, &identity);
        let path = self.folder.join(config::kubeconfig_file(user));
        write_secret(&path, &content.to_string())?;
        Ok(path)
    }

    /// Its audit log: one JSON event a line, without what was sent.
    pub fn audit_log(&self) -> PathBuf {
        audit_log(&self.folder)
    }

    fn until_ready(&mut self) -> Result<()> {
        let kubeconfig = self.kubeconfig("starter")?;
        let kubectl = self.kubectl.clone();
        let is_ready = || {
            let asked = Command::new(&kubectl)
                .env("KUBECONFIG", &kubeconfig)
                .args(["get", "--raw", "/readyz"])
                .stdin(Stdio::null())
                .output();
            asked.is_ok_and(|answer| answer.status.success())
        };
        let found = wait::until(PATIENCE, || {
            let ended = |name: &str, how: Option<String>| how.map(|how| format!("{name} has ended: {how}"));
            let etcd = ended("etcd", self.etcd.ended());
            match etcd.or_else(|| ended("the API server", self.api_server.ended())) {
                Some(why) => Some(Err(why)),
                None => is_ready().then_some(Ok(())),
            }
        });
        match found {
            Some(Ok(())) => Ok(()),
            Some(Err(why)) => bail!("{why}"),
            None => bail!("the API server is not ready after {} s", PATIENCE.as_secs()),
        }
    }
}

/// Ports on which nobody listens.
fn free_ports() -> Result<[u16; 3]> {
    // All are held before one is let go, so that they differ.
    let mut listeners = Vec::new();
    for _ in 0..3 {
        listeners.push(TcpListener::bind("127.0.0.1:0").context("no port is free")?);
    }
    let mut ports = [0; 3];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener.local_addr()?.port();
    }
    Ok(ports)
}

fn audit_log(folder: &Path) -> PathBuf {
    folder.join("audit.log")
}

fn write_files(folder: &Path, authority: &Authority) -> Result<()> {
    let server = authority.issue(&Subject {
        name: "kube-apiserver",
        group: "",
        addresses: &[[127, 0, 0, 1].into()],
        names: &["localhost"],
    })?;
    let (private, public) = signing_key()?;
    for (file, content) in [
        ("ca.crt", authority.certificate()),
        ("apiserver.crt", server.certificate.as_str()),
        ("accounts.pub", public.as_str()),
        ("audit-policy.json", audit_policy().to_string().as_str()),
        // It must be there before the API server writes it: who follows it may be earlier.
        ("audit.log", ""),
    ] {
        let path = folder.join(file);
        fs::write(&path, content).with_context(|| format!("failed to write {}", path.display()))?;
    }
    write_secret(&folder.join("apiserver.key"), &server.key)?;
    write_secret(&folder.join("accounts.key"), &private)
}

fn write_secret(path: &Path, content: &str) -> Result<()> {
    let failed = || format!("failed to write {}", path.display());
    fs::write(path, content).with_context(failed)?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).with_context(failed)
}

/// Who did what to which object and when, and nothing of what was sent: it is written in the way of every request.
fn audit_policy() -> Value {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [{"level": "Metadata"}],
    })
}

fn etcd(folder: &Path, client: u16, peer: u16) -> Vec<String> {
    vec![
        format!("--data-dir={}", folder.join("etcd").display()),
        format!("--listen-client-urls=http://127.0.0.1:{client}"),
        format!("--advertise-client-urls=http://127.0.0.1:{client}"),
        format!("--listen-peer-urls=http://127.0.0.1:{peer}"),
        // The data need not outlive the run, let alone a power cut.
        "--unsafe-no-fsync".into(),
        // Every version of every object stays until the API server has old ones removed.
        format!("--quota-backend-bytes={}", 8_u64 << 30),
        "--log-level=warn".into(),
    ]
}

fn api_server(folder: &Path, etcd: u16, port: u16) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    vec![
        format!("--etcd-servers=http://127.0.0.1:{etcd}"),
        "--bind-address=127.0.0.1".into(),
        format!("--secure-port={port}"),
        format!("--advertise-address={ADVERTISED}"),
        // There is no Service by which anybody would find it.
        "--endpoint-reconciler-type=none".into(),
        format!("--service-cluster-ip-range={SERVICES}"),
        format!("--tls-cert-file={}", file("apiserver.crt")),
        format!("--tls-private-key-file={}", file("apiserver.key")),
        format!("--client-ca-file={}", file("ca.crt")),
        format!("--service-account-key-file={}", file("accounts.pub")),
        format!("--service-account-signing-key-file={}", file("accounts.key")),
        "--service-account-issuer=https://kubernetes.default.svc".into(),
        "--authorization-mode=RBAC".into(),
        format!("--audit-policy-file={}", file("audit-policy.json")),
        format!("--audit-log-path={}", audit_log(folder).display()),
        // One file: whoever reads it should not miss what was rotated away.
        "--audit-log-maxsize=4096".into(),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_files_are_in_its_folder_and_it_listens_on_this_machine_only() {
        let folder = Path::new("/bench/run");
        let all = [etcd(folder, 1, 2), api_server(folder, 1, 3)].concat();
        for argument in &all {
            let value = argument.split_once('=').map_or("", |(_, value)| value);
            assert!(!value.starts_with('/') || value.starts_with("/bench/run/"), "{argument}");
            assert!(!value.starts_with("http://") || value.starts_with("http://127.0.0.1:"), "{argument}");
        }
        assert!(all.contains(&"--bind-address=127.0.0.1".to_owned()));
    }

    #[test]
    fn every_file_that_it_reads_is_written() {
        let folder = tempfile::tempdir().unwrap();
        write_files(folder.path(), &Authority::new("test").unwrap()).unwrap();
        let arguments = api_server(folder.path(), 1, 3);
        let read = arguments.iter().filter_map(|argument| argument.split_once('=').map(|(_, value)| value));
        let mut files = 0;
        for file in read.filter(|value| value.starts_with('/')) {
            assert!(Path::new(file).exists(), "{file}");
            files += 1;
        }
        assert_eq!(files, 7);
        let ports = free_ports().unwrap();
        assert!(ports[0] != ports[1] && ports[1] != ports[2] && ports[0] != ports[2], "{ports:?}");
    }
}
