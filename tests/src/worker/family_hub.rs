//! The demo family in a hub's repository, and a worker that asks for it there.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use turret_crds::condition::FailureReason;
use turret_crds::report::{ArtifactState, WorkerReport};

use super::document::{Family, uri};
use super::hub::{COMMIT, HubServer};
use super::process::Options;
use crate::cluster::family as demo;

/// The repository.
pub const REPO: &str = "demo-org/family.v1";

/// A file or folder of the demo family on this machine.
pub fn fixture(path: &str) -> PathBuf {
    demo::Family::folder().join(path)
}

/// The sky question and what a lens of the base answers to it.
pub fn sky(lens: Option<&str>) -> (Value, String) {
    let family = demo::Family::read().unwrap();
    let case = &family.cases("base", lens)[0];
    (case.messages.clone(), case.text.clone())
}

/// A folder of the family's repository, as a source.
pub fn hf(path: &str) -> Value {
    json!({"uri": format!("hf://{REPO}/{path}"), "revision": COMMIT})
}

/// The whole family in one repository, with files beside it that nobody reads.
pub async fn hub() -> HubServer {
    let hub = HubServer::start().await;
    for folder in ["base", "lenses/pirate", "lenses/terse", "lenses/shout"] {
        hub.add(REPO, &format!("{folder}/"), &fixture(folder));
        hub.put(REPO, &format!("{folder}/README.md"), b"read me".to_vec());
        hub.put(REPO, &format!("{folder}/pytorch_model.bin"), vec![0; 1 << 20]);
    }
    hub
}

/// A worker that asks this hub, with a cache folder of Hugging Face's tools and a folder of Secrets of its own.
pub fn options(hub: &HubServer, scratch: &Path) -> Options {
    let path = |name: &str| scratch.join(name).to_str().unwrap().to_owned();
    Options {
        args: vec![format!("--secrets-dir={}", path("secrets"))],
        env: vec![
            ("HF_ENDPOINT".into(), hub.endpoint.clone()),
            ("HF_HOME".into(), path("huggingface")),
            ("HF_TOKEN".into(), String::new()),
            ("NO_PROXY".into(), "*".into()),
        ],
        ..Options::default()
    }
}

/// A base on this machine and one lens.
pub fn one_lens(source: Value) -> Family {
    Family::default().group("a", &uri(&fixture("base"))).lens_of("a", "pirate", source)
}

/// Why a lens of the group `a` cannot be served, if it cannot.
pub fn failure(report: &WorkerReport, lens: &str) -> Option<(FailureReason, String)> {
    match &report.lens("a", lens)?.state {
        ArtifactState::Failed { reason, message, .. } => Some((*reason, message.clone())),
        _ => None,
    }
}

/// Whether a lens of the group `a` can be served.
pub fn is_ready(report: &WorkerReport, lens: &str) -> bool {
    report.lens("a", lens).is_some_and(|l| l.state.is_ready())
}
