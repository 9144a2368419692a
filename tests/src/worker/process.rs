//! One worker process: started with a document, watched by its state stream, ended when dropped.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use futures::StreamExt;
use serde_json::{Value, json};
use turret_crds::WorkerReport;
use turret_crds::document::WorkerDocument;
use turret_crds::report::{ArtifactState, StateEvent};

/// The token that the workers of tests accept.
pub const TOKEN: &str = "the token of the tests";
/// How long any single thing may take. Generous: the machine may be busy with something else.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// A running worker.
pub struct Worker {
    child: Child,
    /// `http://…` of the data port.
    pub data: String,
    /// `http://…` of the control port.
    pub control: String,
    /// A folder of this worker's own: document, cache, log.
    pub folder: tempfile::TempDir,
    /// Sends with the token.
    pub client: reqwest::Client,
}

/// The worker's binary, which `cargo build -p turret-worker` puts beside the tests.
pub fn binary() -> PathBuf {
    let tests = std::env::current_exe().unwrap();
    let folder = tests.parent().and_then(Path::parent).unwrap();
    let binary = folder.join("turret-worker");
    assert!(binary.exists(), "{} is missing; run `cargo build -p turret-worker`", binary.display());
    binary
}

/// A client without a proxy.
pub fn client() -> reqwest::Client {
    // The provider of TLS is a choice of the process; every test makes the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}

/// How to start a worker beside its document.
#[derive(Default)]
pub struct Options {
    /// Further arguments.
    pub args: Vec<String>,
    /// Further environment.
    pub env: Vec<(String, String)>,
    /// Without the static token.
    pub no_token: bool,
    /// The disk tier of an earlier worker.
    pub cache: Option<PathBuf>,
}

impl Worker {
    /// Starts a worker that serves a document; `file://` sources may be anywhere.
    pub fn start(document: &WorkerDocument) -> Self {
        Self::start_with(document, Options::default())
    }

    /// The same, with options.
    pub fn start_with(document: &WorkerDocument, options: Options) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("document.json");
        std::fs::write(&path, serde_json::to_vec(document).unwrap()).unwrap();
        let mut command = Command::new(binary());
        command
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--control-listen",
                "127.0.0.1:0",
                "--file-roots",
                "/",
            ])
            .arg("--config")
            .arg(path)
            .arg("--cache-dir")
            .arg(options.cache.unwrap_or_else(|| folder.path().join("cache")))
            .args(&options.args)
            .env("RUST_LOG", "info")
            .env("TURRET_THREADS", "1")
            .envs(options.env)
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(folder.path().join("log")).unwrap());
        if !options.no_token {
            command.env("TURRET_TOKEN", TOKEN);
        }
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let address = |name: &str| {
            let found = line.split_whitespace().find_map(|word| word.strip_prefix(&format!("{name}=")));
            let log = || std::fs::read_to_string(folder.path().join("log")).unwrap_or_default();
            found.unwrap_or_else(|| panic!("the worker did not start:\n{}", log())).to_owned()
        };
        let (data, control) = (address("data"), address("control"));
        Self { child, data, control, folder, client: client() }
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    /// Follows the state stream until a report is as wanted.
    pub async fn wait(&self, what: &str, wanted: impl Fn(&WorkerReport) -> bool) -> WorkerReport {
        let mut last = None;
        let watch = async {
            let url = format!("{}/control/v1/state?watch=true", self.control);
            let response = self.client.get(url).bearer_auth(TOKEN).send().await.unwrap();
            assert!(response.status().is_success(), "{}", response.status());
            let mut body = response.bytes_stream();
            let mut buffer = Vec::new();
            loop {
                let chunk = body.next().await.expect("the stream goes on").unwrap();
                buffer.extend_from_slice(&chunk);
                while let Some(end) = buffer.iter().position(|&b| b == b'\n') {
                    let line: Vec<u8> = buffer.drain(..=end).collect();
                    match serde_json::from_slice(&line).unwrap() {
                        StateEvent::Snapshot(report) => last = Some(*report),
                        StateEvent::Change(change) => last.as_mut().unwrap().apply(change),
                        StateEvent::Heartbeat => {}
                    }
                    if last.as_ref().is_some_and(&wanted) {
                        return last.clone().unwrap();
                    }
                }
            }
        };
        match tokio::time::timeout(PATIENCE, watch).await {
            Ok(report) => report,
            Err(_) => panic!("waited for: {what}\nlast report: {last:#?}\nlog:\n{}", self.log()),
        }
    }

    /// Waits until it takes requests and every lens is found good or failed.
    pub async fn settled(&self) -> WorkerReport {
        self.wait("ready, every lens decided", |report| {
            report.state.ready && report.lenses.iter().all(|l| !matches!(l.state, ArtifactState::Resolving))
        })
        .await
    }

    /// Pushes a document and waits until it is applied.
    pub async fn push(&self, document: &WorkerDocument) {
        let url = format!("{}/control/v1/document", self.control);
        let response = self.client.put(url).bearer_auth(TOKEN).json(document).send().await.unwrap();
        assert!(response.status().is_success(), "{}", response.text().await.unwrap());
        let (sequence, digest) = (document.sequence, document.digest.clone());
        self.wait("the document applied", |report| report.serves(sequence, &digest)).await;
    }

    /// Sends a chat request and gives status, headers and body.
    pub async fn chat_raw(&self, body: &Value) -> reqwest::Response {
        let url = format!("{}/v1/chat/completions", self.data);
        self.client.post(url).bearer_auth(TOKEN).json(body).send().await.unwrap()
    }

    /// Asks one question, greedily.
    pub async fn chat(&self, model: &str, messages: &Value) -> Result<String, String> {
        let body = json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 64});
        let response = self.chat_raw(&body).await;
        let status = response.status();
        let text = response.text().await.unwrap();
        if !status.is_success() {
            return Err(format!("{status}: {text}"));
        }
        let answer: Value = serde_json::from_str(&text).unwrap();
        Ok(answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned())
    }

    /// The same as a stream; the pieces joined.
    pub async fn chat_streamed(&self, model: &str, messages: &Value) -> Result<String, String> {
        let body =
            json!({"model": model, "messages": messages, "temperature": 0, "max_tokens": 64, "stream": true});
        let response = self.chat_raw(&body).await;
        let status = response.status();
        let text = response.text().await.unwrap();
        if !status.is_success() {
            return Err(format!("{status}: {text}"));
        }
        let mut answer = String::new();
        for event in events(&text) {
            if event["error"].is_object() {
                return Err(event.to_string());
            }
            answer += event["choices"][0]["delta"]["content"].as_str().unwrap_or_default();
        }
        assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
        Ok(answer)
    }

    /// Asks it to leave, as the kubelet does.
    pub fn terminate(&self) {
        let pid = self.child.id().to_string();
        let status = Command::new("kill").args(["-TERM", &pid]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for its end.
    pub async fn ended(&mut self) -> ExitStatus {
        let ended = async {
            loop {
                if let Some(status) = self.child.try_wait().unwrap() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(PATIENCE, ended).await.expect("the worker ends")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The JSON of a server-sent event stream.
pub fn events(text: &str) -> Vec<Value> {
    text.lines()
        .filter_map(|line| line.strip_prefix("data: "))
        .filter(|data| *data != "[DONE]")
        .map(|data| serde_json::from_str(data).unwrap())
        .collect()
}
