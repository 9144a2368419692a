//! A worker of its own: `turret-worker serve` on ports that the system chooses, ended when it is dropped.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::At;
use super::clients::Client;

/// Threads that compute. The models are tiny, and other processors are left for the loader, the sockets and the clients.
pub(super) const THREADS: usize = 1;
/// For starting, checking thousands of lenses, and writing their prepared files.
const PATIENCE: Duration = Duration::from_secs(300);

/// A worker that serves a document.
pub(super) struct Worker {
    process: Child,
    /// `http://…` of the data port.
    data: String,
    /// `http://…` of the control port.
    control: String,
    agent: ureq::Agent,
    cache: PathBuf,
    log: PathBuf,
}

impl Worker {
    /// Starts one in the folder called `name`, and waits until all of its `lenses` can be served. What is prepared on the
    /// disk there by an earlier worker is used.
    pub(super) fn start(at: &At<'_>, name: &str, document: &str, lenses: usize) -> Result<Self> {
        let folder = at.folder.join(name);
        let (path, log, cache) = (folder.join("document.yaml"), folder.join("log"), folder.join("cache"));
        let failed = || format!("failed to write into {}", folder.display());
        std::fs::create_dir_all(&folder).with_context(failed)?;
        std::fs::write(&path, document).with_context(failed)?;
        let errors = File::create(&log).with_context(failed)?;
        let mut command = Command::new(at.program);
        command
            .args(["serve", "--listen", "127.0.0.1:0", "--control-listen", "127.0.0.1:0", "--device", "cpu"])
            .args(["--threads", &THREADS.to_string(), "--file-roots", "/"])
            .arg("--file")
            .arg(&path)
            .arg("--cache-dir")
            .arg(&cache)
            .env_remove("TURRET_TOKEN")
            // A line for each request would be timed too.
            .env("RUST_LOG", "warn")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut process = command.spawn().context("failed to run turret-worker")?;
        let lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let (sender, said) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let agent = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).proxy(None).build().into();
        let mut worker = Self { process, data: String::new(), control: String::new(), agent, cache, log };
        let Ok(line) = said.recv_timeout(PATIENCE) else { bail!("{}", worker.last_words()) };
        (worker.data, worker.control) =
            addresses(&line).with_context(|| format!("`{line}` names no addresses"))?;
        worker.watch("all lenses checked", |worker| is_settled(&worker.report()?, lenses))?;
        Ok(worker)
    }

    /// A client of it.
    pub(super) fn client(&self) -> Client {
        Client::of(&self.data)
    }

    /// So many clients of it.
    pub(super) fn clients(&self, count: usize) -> Vec<Client> {
        (0..count).map(|_| self.client()).collect()
    }

    /// What it says of itself, as JSON.
    pub(super) fn report(&self) -> Result<Value> {
        let what = || "failed to read the worker's state";
        let mut response =
            self.agent.get(format!("{}/control/v1/state", self.control)).call().with_context(what)?;
        response.body_mut().read_json().with_context(what)
    }

    /// Has a lens leave memory that no request uses. It is on its way out then.
    pub(super) fn evict(&self, model: &str) -> Result<()> {
        let url = format!("{}/control/v1/lenses/{model}/evict", self.control);
        self.agent.post(url).send_empty().with_context(|| format!("failed to evict `{model}`"))?;
        Ok(())
    }

    /// Waits until so many lenses are in memory, and so many prepared files are on the disk.
    pub(super) fn wait(&self, resident: usize, prepared: usize) -> Result<()> {
        let what = format!("{resident} lenses in memory and {prepared} prepared files");
        self.watch(&what, |worker| {
            Ok(worker.prepared_files() >= prepared && resident_lenses(&worker.report()?) == resident)
        })
    }

    fn prepared_files(&self) -> usize {
        let Ok(entries) = std::fs::read_dir(self.cache.join("prepared")) else { return 0 };
        let names = entries.flatten().map(|entry| entry.file_name());
        // What is still being written is called otherwise.
        names.filter(|name| name.as_encoded_bytes().ends_with(b".prepared")).count()
    }

    /// Looks whenever its state changes, until `probe` finds what it is for.
    fn watch(&self, what: &str, probe: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let began = Instant::now();
        let failed = || format!("failed to wait for {what}");
        let url = format!("{}/control/v1/state?watch=true", self.control);
        let response = self.agent.get(url).call().with_context(failed)?;
        // A line comes with every change, and every few seconds without one.
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            line.with_context(failed)?;
            if probe(self).with_context(failed)? {
                return Ok(());
            }
            if began.elapsed() > PATIENCE {
                break;
            }
        }
        bail!("waited {} s in vain for {what}", began.elapsed().as_secs())
    }

    /// Ends it, and tells why it did not start.
    fn last_words(&mut self) -> String {
        let _ = self.process.kill();
        let end = self.process.wait().map_or_else(|error| error.to_string(), |end| end.to_string());
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("without a word");
        format!("turret-worker did not start: {end}: {last}")
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Nothing it holds outlives it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Data and control, of the line that a worker prints when it listens.
fn addresses(line: &str) -> Option<(String, String)> {
    let address = |name: &str| {
        let found = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        found.map(str::to_owned)
    };
    Some((address("data")?, address("control")?))
}

fn lenses_of(report: &Value) -> &[Value] {
    report["lenses"].as_array().map(Vec::as_slice).unwrap_or_default()
}

/// Whether the document is in force, and all of its lenses can be served. What cannot be served is an error.
fn is_settled(report: &Value, lenses: usize) -> Result<bool> {
    let found = lenses_of(report);
    let bases = report["bases"].as_array().map(Vec::as_slice).unwrap_or_default();
    for artifact in bases.iter().chain(found) {
        let name = artifact["name"].as_str().unwrap_or("the base");
        let message = artifact["state"]["message"].as_str().unwrap_or("it does not say why");
        ensure!(artifact["state"]["phase"] != "Failed", "{name} cannot be served: {message}");
    }
    let state = &report["state"];
    if let Some(message) = state["cannotFit"]["message"].as_str() {
        bail!("the budgets do not fit: {message}");
    }
    let is_checked = |lens: &Value| lens["state"]["phase"] != "Resolving";
    let is_in_force = state["ready"].as_bool() == Some(true) && state["document"].is_object();
    Ok(is_in_force && found.len() == lenses && found.iter().all(is_checked))
}

fn resident_lenses(report: &Value) -> usize {
    lenses_of(report).iter().filter(|lens| lens["tier"] == "Device").count()
}

/// Bytes of all lenses that came to memory so far, each time counted.
pub(super) fn moved_bytes(report: &Value) -> u64 {
    let number = |lens: &Value, name: &str| lens[name].as_u64().unwrap_or(0);
    lenses_of(report).iter().map(|lens| number(lens, "loads") * number(lens, "bytes")).sum()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_line_of_a_worker_that_listens_is_read() {
        let line = "listening data=http://127.0.0.1:1 control=http://127.0.0.1:2";
        let both = ("http://127.0.0.1:1".to_owned(), "http://127.0.0.1:2".to_owned());
        assert_eq!(addresses(line), Some(both));
        assert_eq!(addresses("listening data=http://127.0.0.1:1"), None);
    }

    fn report(phases: [&str; 2]) -> Value {
        let [one, two] = phases.map(|phase| json!({"phase": phase, "message": "gone"}));
        json!({
            "state": {"ready": true, "document": {"sequence": 1}},
            "bases": [{"state": {"phase": "Ready"}}],
            "lenses": [
                {"name": "one", "state": one, "tier": "Device", "loads": 3, "bytes": 10},
                {"name": "two", "state": two, "tier": "Disk", "bytes": 7},
            ],
        })
    }

    #[test]
    fn a_worker_is_settled_when_its_document_is_in_force_and_every_lens_is_checked() {
        assert!(is_settled(&report(["Ready", "Loading"]), 2).unwrap());
        assert!(!is_settled(&report(["Ready", "Resolving"]), 2).unwrap());
        assert!(!is_settled(&report(["Ready", "Ready"]), 3).unwrap(), "one is not in the report yet");
        let failed = is_settled(&report(["Ready", "Failed"]), 2).unwrap_err().to_string();
        assert_eq!(failed, "two cannot be served: gone");
        for missing in ["ready", "document"] {
            let mut report = report(["Ready", "Ready"]);
            report["state"][missing] = Value::Null;
            assert!(!is_settled(&report, 2).unwrap(), "{missing}");
        }
        let mut unfit = report(["Ready", "Ready"]);
        unfit["state"]["cannotFit"] = json!({"message": "too little"});
        assert!(is_settled(&unfit, 2).is_err());
    }

    #[test]
    fn bytes_are_counted_each_time_they_came() {
        assert_eq!(moved_bytes(&report(["Ready", "Ready"])), 30);
        assert_eq!(resident_lenses(&report(["Ready", "Ready"])), 1);
        assert_eq!((moved_bytes(&json!({})), resident_lenses(&json!({}))), (0, 0));
    }
}
