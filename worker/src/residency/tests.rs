//! The owner with its messages in the hands of a test, which decides when it hears of what. Engine and files are real.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use turret_crds::condition::FailureReason;
use turret_crds::document::{BaseKey, Previous, WorkerDocument, compile};
use turret_crds::group::Dtype;
use turret_crds::model_name::ModelName;
use turret_crds::report::{DeviceReport, WorkerIdentity};
use turret_crds::{ModelGroup, ModelPlacement};

use super::cache::Cache;
use super::failure::Failure;
use super::fetch::Fetcher;
use super::files::Hasher;
use super::orders::{Obeyed, Order};
use super::owner::{Owner, Stage, Turn};
use super::resolve::Resolver;
use super::source::Roots;
use super::table::Phase;
use super::work::Event;
use super::{Message, Permit, Refusal, Start};
use crate::config::{Cli, Command};
use crate::engine::Engine;
use crate::engine::handle::{EngineConfig, EngineHandle};
use crate::engine::memory::BaseNeeds;
use crate::model::weights::BaseFolder;
use crate::synth::{self, SynthArgs};

/// Groups, and about how large their bases are. The first is the default, the last is declared `Preloaded`.
const GROUPS: [(&str, u64); 3] = [("a", 2 << 20), ("b", 8 << 20), ("c", 2 << 20)];
const LENS_BYTES: u64 = 1 << 20;
/// How long anything may take that is not in a test's hands. Generous: the machine may be busy with something else.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with the bases.
fn bases() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (seed, (name, bytes)) in (1..).zip(GROUPS) {
        let (out, dtype) = (folder.path().join(name), Dtype::F32);
        synth::run(&SynthArgs { out, bytes, dtype, lenses: Vec::new(), seed }).unwrap();
    }
    folder
}

/// Limits with so many bytes for bases and what serving one takes.
fn limits(room: u64) -> EngineConfig {
    EngineConfig {
        device_bytes: room + LENS_BYTES,
        lens_bytes: LENS_BYTES,
        max_context_tokens: 64,
        max_running_rows: 4,
        prefill_chunk_tokens: 16,
        max_waiting_rows: 24,
        prefix_cache: true,
    }
}

/// Bytes of a base, and with what serving it takes at least.
fn bytes_of(folder: &TempDir, group: &str) -> (u64, u64) {
    let base = BaseFolder::open(&folder.path().join(group).join("base"), None).unwrap();
    let layout = base.layout();
    let needs = BaseNeeds::of(&layout.config, layout.dtype, &limits(0));
    let working = needs.workspace_bytes + u64::from(needs.min_blocks) * needs.block_bytes;
    (layout.bytes, layout.bytes + working)
}

fn document(folder: &Path, limits: &EngineConfig) -> WorkerDocument {
    let object = |kind: &str, name: &str, spec: Value| {
        json!({"apiVersion": "turret.dev/v1alpha1", "kind": kind, "spec": spec,
               "metadata": {"name": name, "namespace": "default", "uid": format!("uid-of-{name}"), "generation": 1}})
    };
    let groups = GROUPS.map(|(name, _)| {
        let uri = format!("file://{}", folder.join(name).join("base").display());
        let spec = json!({"base": {"source": {"uri": uri}}, "lenses": []});
        serde_json::from_value::<ModelGroup>(object("ModelGroup", name, spec)).unwrap()
    });
    let spec = json!({
        "groups": [{"name": "a"}, {"name": "b"}, {"name": "c", "residency": "Preloaded"}],
        "defaultGroupName": "a",
        "memory": {"deviceBudget": limits.device_bytes, "lensBudget": limits.lens_bytes},
        "batching": {
            "maxContextTokens": limits.max_context_tokens,
            "maxRunningRows": limits.max_running_rows,
            "prefillChunkTokens": limits.prefill_chunk_tokens,
        },
        "switching": {"minHoldSeconds": 0, "maxWaitSeconds": 0, "drainSeconds": 1},
    });
    let placement: ModelPlacement = serde_json::from_value(object("ModelPlacement", "p", spec)).unwrap();
    let by_name: BTreeMap<_, _> =
        groups.iter().map(|g| (("default".to_owned(), g.metadata.name.clone().unwrap()), g)).collect();
    let compiled = compile(&placement, &by_name, &BTreeMap::new(), &[], &Previous::default());
    assert_eq!(compiled.problems, []);
    compiled.document.unwrap()
}

/// An owner, and what it is to hear.
struct Hands {
    _folder: TempDir,
    engine: EngineHandle,
    owner: Owner,
    inbox: mpsc::UnboundedReceiver<Message>,
    document: WorkerDocument,
    /// That the base which is loaded ahead is there: kept back.
    loaded: Option<Message>,
}

impl Hands {
    /// The first base is active, and the last one on its way for as long as the owner does not hear of it.
    async fn new(folder: TempDir, room: u64) -> Self {
        let limits = limits(room);
        let engine = Engine::start(limits.clone()).unwrap();
        // The provider of TLS is a choice of the process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let Command::Serve(args) = Cli::parse_from(["turret-worker", "serve", "--file", "none"]).command
        else {
            panic!("it says serve")
        };
        let (hub, hosts) = args.hub().unwrap();
        let hasher = Arc::new(Hasher::default());
        let cache = Arc::new(Cache::new(&folder.path().join("cache"), 1 << 30));
        let roots = Roots {
            file_roots: vec![PathBuf::from("/")],
            volumes: BTreeMap::new(),
            volumes_dir: PathBuf::from("/none"),
        };
        let fetcher = Fetcher::new(cache, hasher.clone(), hosts).unwrap();
        let tokens = Arc::new(args.tokens());
        let resolver = Resolver { roots: Arc::new(roots), hasher, fetcher, hub, tokens };
        let total_bytes = limits.device_bytes;
        let device = DeviceReport { kind: "cpu".into(), name: "test".into(), total_bytes };
        let worker =
            WorkerIdentity { name: "test".into(), instance: "life".into(), version: "0".into(), device };
        let document = document(folder.path(), &limits);
        let start = Start { worker, default_device_bytes: total_bytes, limits, resolver };
        let (messages, inbox) = mpsc::unbounded_channel();
        let owner = Owner::new(engine.clone(), start, messages);
        let mut hands = Self { _folder: folder, engine, owner, inbox, document, loaded: None };

        let (reply, _) = oneshot::channel();
        let document = Box::new(hands.document.clone());
        hands.owner.handle(Message::Offer { document, reply });
        let (first, last) = (hands.key("a"), hands.key("c"));
        hands.until_active(&first).await;
        hands.until("the load ahead", |owner| owner.table.bases.contains_key(&last)).await;
        hands
    }

    fn key(&self, group: &str) -> BaseKey {
        self.document.group(group).unwrap().base.key.clone()
    }

    fn phase(&self, base: &BaseKey) -> Option<Phase> {
        self.owner.table.bases.get(base).map(|held| held.phase)
    }

    /// Has the owner hear the next message, or keeps it back.
    async fn next(&mut self, what: &str) {
        let next = tokio::time::timeout(PATIENCE, self.inbox.recv()).await;
        let message = next.unwrap_or_else(|_| panic!("waited for {what}")).expect("the owner can send");
        match message {
            Message::Event(Event::BaseLoaded { .. }) => self.loaded = Some(message),
            message => self.owner.handle(message),
        }
    }

    /// Goes on until something is so.
    async fn until(&mut self, what: &str, is_so: impl Fn(&Owner) -> bool) {
        loop {
            self.owner.pump();
            if is_so(&self.owner) {
                return;
            }
            self.next(what).await;
        }
    }

    async fn until_active(&mut self, base: &BaseKey) {
        self.until("the switch", |owner| owner.table.active.as_ref() == Some(base)).await;
    }

    /// Goes on until the base of a group is the active one for a row, which has come and ended then.
    async fn until_served(&mut self, group: &str, mut row: oneshot::Receiver<Result<Permit, Refusal>>) {
        let base = self.key(group);
        self.until_active(&base).await;
        self.until("the permit", |owner| !owner.permits.is_empty()).await;
        drop(row.try_recv().unwrap().unwrap());
        self.until("its end", |owner| owner.permits.is_empty()).await;
    }

    /// Has the owner hear that the base is there which is loaded ahead.
    async fn hear_of_the_load(&mut self) {
        while self.loaded.is_none() {
            self.next("the load ahead").await;
        }
        let loaded = self.loaded.take().expect("it was just waited for");
        self.owner.handle(loaded);
    }

    /// A row that waits for the base of a group, whose files are found good by now.
    async fn ask(&mut self, group: &str) -> oneshot::Receiver<Result<Permit, Refusal>> {
        let (reply, row) = oneshot::channel();
        let model = ModelName { group: group.into(), lens: None };
        self.owner.handle(Message::Acquire { model, reply });
        let base = self.key(group);
        self.until("its files", |owner| owner.bases[&base].stage.ready().is_some()).await;
        row
    }
}

#[tokio::test]
async fn a_switch_goes_on_beside_a_preload_that_leaves_it_room() {
    let mut hands = Hands::new(bases(), 64 << 20).await;
    let row = hands.ask("b").await;
    hands.until_served("b", row).await;
    let (active, ahead) = (hands.key("b"), hands.key("c"));
    assert_eq!(hands.phase(&ahead), Some(Phase::Loading));
    hands.hear_of_the_load().await;
    hands.owner.pump();
    assert_eq!(hands.phase(&ahead), Some(Phase::Resident));
    let table = &hands.owner.table;
    assert_eq!((table.active.as_ref(), table.bases.len()), (Some(&active), 3));
    assert_eq!(hands.engine.snapshot().arena.base_bytes, table.base_bytes());
    // It came for good, and can be switched to.
    let row = hands.ask("c").await;
    hands.until_served("c", row).await;
}

#[tokio::test]
async fn a_switch_without_room_beside_a_preload_waits_for_it() {
    let folder = bases();
    let [(_, first), (_, wanted)] = ["a", "b"].map(|group| bytes_of(&folder, group));
    let (ahead, _) = bytes_of(&folder, "c");
    // For the first one and the one ahead, and for the wanted one alone.
    let room = wanted.max(first + ahead);
    assert!(wanted + ahead > room);
    let mut hands = Hands::new(folder, room).await;
    let row = hands.ask("b").await;
    let wanted = hands.key("b");
    assert!(matches!(hands.owner.turn, Turn::Steady) && hands.phase(&wanted).is_none());
    hands.hear_of_the_load().await;
    hands.until_served("b", row).await;
    assert_eq!(hands.phase(&hands.key("c")), None, "it left again");
    assert_eq!(hands.engine.snapshot().arena.base_bytes, hands.owner.table.base_bytes());
}

#[tokio::test]
async fn a_switch_to_a_base_that_is_on_its_way_waits_for_it() {
    let mut hands = Hands::new(bases(), 64 << 20).await;
    let row = hands.ask("c").await;
    assert!(matches!(hands.owner.turn, Turn::Steady));
    hands.hear_of_the_load().await;
    hands.until_served("c", row).await;
    assert_eq!(hands.engine.snapshot().arena.base_bytes, hands.owner.table.base_bytes(), "it came once");
}

#[tokio::test]
async fn what_failed_is_looked_at_again_at_once_when_somebody_asks() {
    let mut hands = Hands::new(bases(), 64 << 20).await;
    let base = hands.key("b");
    hands.until("its files", |owner| owner.bases[&base].stage.ready().is_some()).await;
    let declared = hands.owner.bases.get_mut(&base).unwrap();
    declared.failures = 9;
    declared.stage = Stage::Failed {
        failure: Failure::new(FailureReason::SourceUnavailable, "nobody answers"),
        retry_at: Some(Instant::now() + Duration::from_secs(3600)),
        retry_epoch: None,
        in_doubt: false,
    };
    hands.owner.pump();
    assert!(!hands.owner.bases[&base].in_flight, "it is not due");
    let (reply, mut answer) = oneshot::channel();
    hands.owner.handle(Message::Order { order: Order::Retry, reply });
    assert_eq!(answer.try_recv().unwrap(), Ok(Obeyed::Done));
    assert_eq!(hands.owner.bases[&base].failures, 0);
    hands.until("its files again", |owner| owner.bases[&base].stage.ready().is_some()).await;
}
