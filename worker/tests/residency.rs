//! The whole of residency under random orders and faults: requests, leases, pins, loads and evictions by hand, switches,
//! documents that change budgets, policies and lenses, files that vanish, change and come back. The engine is the real
//! one, and so are files and time; only what is asked is made up.
//!
//! After every step: budgets hold; what a row uses, or what is pinned or leased, is where it was, unless its base left,
//! the budget became smaller or it is another lens now. At the end, when everything was given back: every request has
//! its answer, and what the report says is what a recount finds, in the table and in the engine.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use clap::Parser;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use turret_crds::assign::{LensId, WorkerShare};
use turret_crds::document::{Previous, WorkerDocument, compile};
use turret_crds::group::Dtype;
use turret_crds::hints::Hints;
use turret_crds::model_name::ModelName;
use turret_crds::report::{
    DeviceReport, EvictionReason, LensReport, Tier, TierReport, WorkerIdentity, WorkerReport,
};
use turret_crds::{ModelGroup, ModelPlacement};
use turret_worker::config::{Cli, Command};
use turret_worker::engine::Engine;
use turret_worker::engine::handle::{EngineConfig, EngineHandle};
use turret_worker::residency::cache::Cache;
use turret_worker::residency::fetch::Fetcher;
use turret_worker::residency::files::Hasher;
use turret_worker::residency::orders::{Obeyed, Order, lease_number};
use turret_worker::residency::resolve::Resolver;
use turret_worker::residency::source::Roots;
use turret_worker::residency::{Permit, Refusal, Residency, Start};
use turret_worker::synth::{self, SynthArgs};

/// Lenses of four sizes in each of two groups.
const LENSES: [(&str, u32); 5] = [("a", 4), ("b", 8), ("c", 8), ("d", 16), ("e", 32)];
const GROUPS: [&str; 2] = ["one", "two"];
const DEVICE_BYTES: u64 = 48 << 20;
/// How long anything may take once nothing is in its way. Generous: the machine may be busy with something else.
const PATIENCE: Duration = Duration::from_secs(60);

/// Bases and lenses, made once.
static MODELS: LazyLock<TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().unwrap();
    for (seed, group) in (1..).zip(GROUPS) {
        let lenses = LENSES.iter().map(|(name, rank)| ((*name).to_owned(), *rank)).collect();
        let (bytes, dtype) = (2 << 20, Dtype::F32);
        synth::run(&SynthArgs { out: folder.path().join(group), bytes, dtype, lenses, seed }).unwrap();
    }
    folder
});

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// What is declared.
#[derive(Clone, Debug)]
struct Declared {
    /// Per lens: whether it is declared, and how it is kept.
    lenses: BTreeMap<(usize, usize), &'static str>,
    lens_budget: u64,
    policy: &'static str,
    sweep: bool,
}

struct World {
    folder: TempDir,
    engine: EngineHandle,
    residency: Residency,
    declared: Declared,
    sequence: u64,
    document: WorkerDocument,
    asked: Vec<JoinHandle<Result<Permit, Refusal>>>,
    permits: Vec<(ModelName, Permit)>,
    leases: Vec<(u64, (String, String))>,
    pins: BTreeSet<(String, String)>,
    loads: Vec<JoinHandle<()>>,
    last: WorkerReport,
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Ask { group: usize, lens: Option<usize> },
    GiveBack(usize),
    Lease { group: usize, lens: usize, seconds: u64 },
    Release(usize),
    Renew(usize),
    Pin { group: usize, lens: usize, pinned: bool },
    Load { group: usize, lens: usize },
    Evict { group: usize, lens: usize },
    Activate(usize),
    Budget(u64),
    Policy(usize, bool),
    Declare { group: usize, lens: usize, how: usize },
    Vanish { group: usize, lens: usize },
    Change { group: usize, lens: usize },
    Restore { group: usize, lens: usize },
    Wait(u64),
}

const POLICIES: [&str; 6] = ["LRU", "LFU", "Priority", "Specialization", "Hybrid", "ALRFU"];
const RESIDENCIES: [&str; 5] = ["OnDemand", "Cached", "Preloaded", "Pinned", "gone"];

fn step() -> impl Strategy<Value = Step> {
    let group = 0..GROUPS.len();
    let lens = 0..LENSES.len();
    let both = (group.clone(), lens.clone());
    prop_oneof![
        8 => (group.clone(), proptest::option::weighted(0.9, lens)).prop_map(|(group, lens)| Step::Ask { group, lens }),
        6 => (0usize..8).prop_map(Step::GiveBack),
        2 => (both.clone(), 1u64..30).prop_map(|((group, lens), seconds)| Step::Lease { group, lens, seconds }),
        1 => (0usize..4).prop_map(Step::Release),
        1 => (0usize..4).prop_map(Step::Renew),
        1 => (both.clone(), any::<bool>()).prop_map(|((group, lens), pinned)| Step::Pin { group, lens, pinned }),
        1 => both.clone().prop_map(|(group, lens)| Step::Load { group, lens }),
        2 => both.clone().prop_map(|(group, lens)| Step::Evict { group, lens }),
        1 => group.prop_map(Step::Activate),
        // From too small for the largest lens to enough for all.
        1 => (30u64..3000).prop_map(|kib| Step::Budget(kib << 10)),
        1 => (0usize..POLICIES.len(), any::<bool>()).prop_map(|(policy, sweep)| Step::Policy(policy, sweep)),
        1 => (both.clone(), 0usize..RESIDENCIES.len()).prop_map(|((group, lens), how)| Step::Declare { group, lens, how }),
        1 => both.clone().prop_map(|(group, lens)| Step::Vanish { group, lens }),
        1 => both.clone().prop_map(|(group, lens)| Step::Change { group, lens }),
        1 => both.prop_map(|(group, lens)| Step::Restore { group, lens }),
        4 => (0u64..40).prop_map(Step::Wait),
    ]
}

fn name(group: usize, lens: usize) -> (String, String) {
    (GROUPS[group].into(), LENSES[lens].0.into())
}

fn device(report: &WorkerReport) -> &TierReport {
    report.state.tiers.iter().find(|tier| tier.tier == Tier::Device).unwrap()
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for group in GROUPS {
            for (lens, _) in LENSES {
                let path = Path::new(group).join("lenses").join(lens);
                copy(&MODELS.path().join(&path), &folder.path().join(&path));
            }
        }
        let limits = EngineConfig {
            device_bytes: DEVICE_BYTES,
            lens_bytes: 2 << 20,
            max_context_tokens: 64,
            max_running_rows: 4,
            prefill_chunk_tokens: 16,
            max_waiting_rows: 32,
            prefix_cache: true,
        };
        let engine = Engine::start(limits.clone()).unwrap();
        // The provider of TLS is a choice of the process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let hasher = Arc::new(Hasher::default());
        let cache = Arc::new(Cache::new(&folder.path().join("cache"), 1 << 30));
        let roots = Roots {
            file_roots: vec![PathBuf::from("/")],
            volumes: BTreeMap::new(),
            volumes_dir: PathBuf::from("/none"),
        };
        let Command::Serve(args) = Cli::parse_from(["turret-worker", "serve", "--file", "none"]).command
        else {
            panic!("it says serve")
        };
        let (hub, hosts) = args.hub().unwrap();
        let fetcher = Fetcher::new(cache, hasher.clone(), hosts).unwrap();
        let tokens = Arc::new(args.tokens());
        let resolver = Resolver { roots: Arc::new(roots), hasher, fetcher, hub, tokens };
        let device = DeviceReport { kind: "cpu".into(), name: "test".into(), total_bytes: DEVICE_BYTES };
        let worker =
            WorkerIdentity { name: "test".into(), instance: "life".into(), version: "0".into(), device };
        let start = Start { worker, default_device_bytes: DEVICE_BYTES, limits, resolver };
        let residency = Residency::start(engine.clone(), start);
        let all = (0..GROUPS.len())
            .flat_map(|group| (0..LENSES.len()).map(move |lens| ((group, lens), "OnDemand")));
        let declared =
            Declared { lenses: all.collect(), lens_budget: 2 << 20, policy: "ALRFU", sweep: false };
        let document = document(folder.path(), &declared, 0);
        let last = residency.view().report.clone();
        let mut world = Self {
            folder,
            engine,
            residency,
            declared,
            sequence: 0,
            document,
            asked: Vec::new(),
            permits: Vec::new(),
            leases: Vec::new(),
            pins: BTreeSet::new(),
            loads: Vec::new(),
            last,
        };
        world.declare().await;
        world.wait("ready", |report| report.state.ready).await;
        world
    }

    async fn declare(&mut self) {
        self.document = document(self.folder.path(), &self.declared, self.sequence);
        self.sequence = self.document.sequence;
        self.residency.offer(self.document.clone()).await;
        // Pins by hand end with the declaration of their lens.
        let declared: BTreeSet<_> =
            self.declared.lenses.keys().map(|&(group, lens)| name(group, lens)).collect();
        self.pins.retain(|pin| declared.contains(pin));
    }

    /// The report as of now: offering what is known already has it published.
    async fn report(&self) -> WorkerReport {
        self.residency.offer(self.document.clone()).await;
        self.residency.view().report.clone()
    }

    async fn wait(&self, what: &str, wanted: impl Fn(&WorkerReport) -> bool) {
        let until = async {
            while !wanted(&self.report().await) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, until).await.is_err() {
            panic!("waited for {what}: {:#?}", self.report().await);
        }
    }

    fn lens_folder(&self, group: usize, lens: usize) -> PathBuf {
        self.folder.path().join(GROUPS[group]).join("lenses").join(LENSES[lens].0)
    }

    async fn take(&mut self, step: Step) {
        match step {
            Step::Ask { group, lens } => {
                let model =
                    ModelName { group: GROUPS[group].into(), lens: lens.map(|lens| LENSES[lens].0.into()) };
                let residency = self.residency.clone();
                self.asked.push(tokio::spawn(async move { residency.acquire(model).await }));
            }
            Step::GiveBack(n) => {
                if !self.permits.is_empty() {
                    self.permits.remove(n % self.permits.len());
                }
            }
            Step::Lease { group, lens, seconds } => {
                let lens = name(group, lens);
                let ttl = Duration::from_secs(seconds);
                let order =
                    Order::AcquireLease { lens: lens.clone(), holder: None, priority: seconds as u32, ttl };
                if let Ok(Obeyed::Lease(lease)) = self.residency.order(order).await {
                    self.leases.push((lease_number(&lease.id, "life").unwrap(), lens));
                }
            }
            Step::Release(n) => {
                if !self.leases.is_empty() {
                    let (id, _) = self.leases.remove(n % self.leases.len());
                    let _ = self.residency.order(Order::ReleaseLease { id }).await;
                }
            }
            Step::Renew(n) => {
                if let Some((id, _)) = self.leases.get(n % self.leases.len().max(1)) {
                    let ttl = Duration::from_secs(20);
                    let _ = self.residency.order(Order::RenewLease { id: *id, ttl }).await;
                }
            }
            Step::Pin { group, lens, pinned } => {
                let lens = name(group, lens);
                if self.residency.order(Order::Pin { lens: lens.clone(), pinned }).await.is_ok() {
                    if pinned {
                        self.pins.insert(lens)
                    } else {
                        self.pins.remove(&lens)
                    };
                }
            }
            Step::Load { group, lens } => {
                let (residency, lens) = (self.residency.clone(), name(group, lens));
                self.loads.push(tokio::spawn(async move {
                    let _ = residency.order(Order::Load { lens }).await;
                }));
            }
            Step::Evict { group, lens } => {
                let _ = self.residency.order(Order::Evict { lens: name(group, lens) }).await;
            }
            Step::Activate(group) => {
                let _ = self.residency.order(Order::Switch { group: GROUPS[group].into() }).await;
            }
            Step::Budget(bytes) => {
                self.declared.lens_budget = bytes;
                self.declare().await;
            }
            Step::Policy(policy, sweep) => {
                (self.declared.policy, self.declared.sweep) = (POLICIES[policy], sweep);
                self.declare().await;
            }
            Step::Declare { group, lens, how } => {
                match RESIDENCIES[how] {
                    "gone" => self.declared.lenses.remove(&(group, lens)),
                    how => self.declared.lenses.insert((group, lens), how),
                };
                self.declare().await;
            }
            Step::Vanish { group, lens } => {
                let _ = std::fs::remove_file(self.lens_folder(group, lens).join("adapter_model.safetensors"));
            }
            Step::Change { group, lens } => {
                // Other weights under the same name: those of another lens of the same base, if the shapes are its own.
                let other = MODELS
                    .path()
                    .join(GROUPS[group])
                    .join("lenses")
                    .join(LENSES[(lens + 1) % LENSES.len()].0);
                copy(&other, &self.lens_folder(group, lens));
            }
            Step::Restore { group, lens } => self.restore(group, lens),
            Step::Wait(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
        }
        self.collect().await;
    }

    fn restore(&self, group: usize, lens: usize) {
        let path = Path::new(GROUPS[group]).join("lenses").join(LENSES[lens].0);
        copy(&MODELS.path().join(path), &self.lens_folder(group, lens));
    }

    /// Takes the permits that were granted.
    async fn collect(&mut self) {
        let mut still = Vec::new();
        for asked in std::mem::take(&mut self.asked) {
            if !asked.is_finished() {
                still.push(asked);
            } else if let Ok(permit) = asked.await.unwrap() {
                let lens = permit.lens.as_ref().map(|lens| lens.digest.clone());
                self.permits.push((ModelName { group: String::new(), lens }, permit));
            }
        }
        self.asked = still;
    }

    /// What must be true at any time.
    async fn check(&mut self) {
        let report = self.report().await;
        let tier = device(&report);
        assert!(tier.lens_bytes <= tier.lens_budget_bytes, "{tier:?}");
        assert!(tier.base_bytes + tier.lens_budget_bytes <= tier.budget_bytes, "{tier:?}");
        let engine = self.engine.snapshot();
        assert!(engine.arena.lens_bytes <= tier.lens_budget_bytes, "{engine:?} {tier:?}");
        assert!(resident_bytes(&report) <= tier.lens_bytes, "{report:#?}");

        for (_, permit) in &self.permits {
            let Some(lens) = &permit.lens else { continue };
            // The same files under a name over the other base are another content.
            let same = |l: &LensReport| {
                let base = report.base_of(&l.group).and_then(|base| base.digest.as_ref());
                l.digest.as_ref() == Some(&lens.digest) && base == Some(&permit.base_digest)
            };
            let mut named = report.lenses.iter().filter(|l| same(l)).peekable();
            let here = named.peek().is_none() || named.any(|l| l.tier == Tier::Device);
            assert!(here, "a row uses {} and it is gone: {report:#?}", lens.digest);
        }
        for before in &self.last.lenses {
            let Some(now) = report.lens(&before.group, &before.name) else { continue };
            let kept = |lens: &LensReport| lens.pinned || lens.leases > 0;
            let left = before.tier == Tier::Device && now.tier != Tier::Device && before.digest == now.digest;
            if left && kept(before) && kept(now) {
                let why = now.last_eviction.as_ref().map(|eviction| eviction.reason);
                use EvictionReason::{Base, Budget, Undeclared};
                assert!(matches!(why, Some(Base | Budget | Undeclared)), "{why:?}: {now:#?}");
            }
        }
        self.last = report;
    }

    /// Gives everything back, and recounts.
    async fn end(mut self) {
        for group in 0..GROUPS.len() {
            for lens in 0..LENSES.len() {
                self.restore(group, lens);
                self.declared.lenses.insert((group, lens), "OnDemand");
            }
        }
        self.declared.lens_budget = 2 << 20;
        self.declare().await;
        for (id, _) in std::mem::take(&mut self.leases) {
            let _ = self.residency.order(Order::ReleaseLease { id }).await;
        }
        for lens in std::mem::take(&mut self.pins) {
            self.residency.order(Order::Pin { lens, pinned: false }).await.unwrap();
        }
        let answered = async {
            while !self.asked.is_empty() {
                self.permits.clear();
                self.collect().await;
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        if tokio::time::timeout(PATIENCE, answered).await.is_err() {
            panic!("{} requests got no answer: {:#?}", self.asked.len(), self.report().await);
        }
        self.permits.clear();
        self.loads.iter().for_each(|load| load.abort());
        // Every lens is good again, and can be loaded.
        self.wait("all found good", |report| report.lenses.iter().all(|lens| lens.state.is_ready())).await;
        for (group, lens) in self.declared.lenses.keys().copied() {
            let (group, lens) = name(group, lens);
            let asked = self.residency.acquire(ModelName { group, lens: Some(lens) });
            tokio::time::timeout(PATIENCE, asked).await.expect("an answer").expect("a permit");
        }
        let settled = |report: &WorkerReport| {
            report.state.running_rows == 0 && resident_bytes(report) == device(report).lens_bytes
        };
        self.wait("settled", settled).await;
        let report = self.report().await;
        let engine = self.engine.snapshot();
        assert_eq!(engine.arena.lens_bytes, resident_bytes(&report), "{report:#?}");
        let bases: u64 =
            report.bases.iter().filter(|b| b.tier == Tier::Device).map(|b| b.bytes.unwrap()).sum();
        assert_eq!((engine.arena.base_bytes, device(&report).base_bytes), (bases, bases), "{report:#?}");
        self.engine.shutdown().await;
    }
}

/// Bytes of everything that is in memory, the same files over the same base once.
fn resident_bytes(report: &WorkerReport) -> u64 {
    let resident = report.lenses.iter().filter(|lens| lens.tier == Tier::Device);
    let contents: BTreeMap<(String, &str), u64> = resident
        .map(|lens| {
            let base = report.base_of(&lens.group).unwrap().key.to_string();
            ((base, lens.digest.as_deref().unwrap()), lens.bytes.unwrap())
        })
        .collect();
    contents.values().sum()
}

fn document(folder: &Path, declared: &Declared, sequence: u64) -> WorkerDocument {
    let object = |kind: &str, name: &str, spec: Value| {
        json!({"apiVersion": "turret.dev/v1alpha1", "kind": kind, "spec": spec,
               "metadata": {"name": name, "namespace": "default", "uid": format!("uid-of-{name}"), "generation": 1}})
    };
    let uri = |path: &Path| format!("file://{}", path.display());
    let groups: Vec<ModelGroup> = (0..GROUPS.len())
        .map(|group| {
            let of_group = declared.lenses.iter().filter(|((g, _), _)| *g == group);
            let lenses: Vec<Value> = of_group
                .map(|((_, lens), how)| {
                    let path = folder.join(GROUPS[group]).join("lenses").join(LENSES[*lens].0);
                    json!({"name": LENSES[*lens].0, "residency": how, "source": {"uri": uri(&path)}})
                })
                .collect();
            let base = uri(&MODELS.path().join(GROUPS[group]).join("base"));
            let spec = json!({"base": {"source": {"uri": base}}, "lenses": lenses});
            serde_json::from_value(object("ModelGroup", GROUPS[group], spec)).unwrap()
        })
        .collect();
    let mut eviction = json!({"policy": declared.policy, "idleSeconds": 1, "sweepSeconds": 1});
    if declared.sweep {
        eviction["highWatermarkPercent"] = 30.into();
    }
    let spec = json!({
        "groups": GROUPS.map(|name| json!({"name": name})),
        "memory": {"deviceBudget": DEVICE_BYTES, "lensBudget": declared.lens_budget},
        "batching": {"maxContextTokens": 64, "maxRunningRows": 4, "prefillChunkTokens": 16},
        "switching": {"minHoldSeconds": 0, "maxWaitSeconds": 0, "drainSeconds": 1},
        "admission": {"holdSeconds": 300},
        "eviction": eviction,
    });
    let placement: ModelPlacement = serde_json::from_value(object("ModelPlacement", "p", spec)).unwrap();
    let by_name: BTreeMap<_, _> =
        groups.iter().map(|g| (("default".to_owned(), g.metadata.name.clone().unwrap()), g)).collect();
    let previous = Previous { reported: sequence, ..Previous::default() };
    let compiled = compile(&placement, &by_name, &BTreeMap::new(), &[], &previous);
    assert_eq!(compiled.problems, []);
    compiled.document.unwrap()
}

/// Hints that give lenses of the first group to this worker and to another one.
fn hints(version: u64, ours: &[&str], theirs: &[&str]) -> Hints {
    let share = |lenses: &[&str]| {
        let preload = lenses.iter().map(|lens| LensId::of(GROUPS[0], lens)).collect();
        WorkerShare { base: None, weight: 1, preload }
    };
    let workers = [("test".to_owned(), share(ours)), ("other".to_owned(), share(theirs))].into();
    Hints { version, workers, ..Hints::default() }
}

fn in_memory(report: &WorkerReport, lens: &str) -> bool {
    report.lens(GROUPS[0], lens).is_some_and(|lens| lens.tier == Tier::Device)
}

#[tokio::test]
async fn workers_that_share_load_ahead_only_what_is_assigned_to_them() {
    let mut world = World::new().await;
    for lens in 0..LENSES.len() {
        world.declared.lenses.insert((0, lens), "Preloaded");
    }
    world.declared.lenses.insert((0, 2), "Pinned");
    world.document = document(world.folder.path(), &world.declared, world.sequence);
    world.document.hints = Some(hints(1, &["b"], &["c", "d"]));
    let is_assigned = |report: &WorkerReport, lens: &str| report.lens(GROUPS[0], lens).unwrap().assigned;
    world.wait("the first share", |report| in_memory(report, "b") && is_assigned(report, "b")).await;

    // Only the hints are others.
    world.document.hints = Some(hints(2, &["a"], &["b", "c"]));
    world.wait("the second share", |report| in_memory(report, "a") && is_assigned(report, "a")).await;
    let report = world.report().await;
    assert_eq!(report.state.hints_version, Some(2));
    assert!(report.serves(world.document.sequence, &world.document.digest));
    assert!(
        in_memory(&report, "b") && !is_assigned(&report, "b"),
        "it stays as long as nobody needs its room"
    );
    let loads: Vec<u64> = ["c", "d", "e"].map(|lens| report.lens(GROUPS[0], lens).unwrap().loads).into();
    assert_eq!(loads, [0, 0, 0], "others have them");

    // A pinned one that is assigned elsewhere comes with a request, and then stays.
    let model = ModelName { group: GROUPS[0].into(), lens: Some("c".into()) };
    drop(world.residency.acquire(model).await.unwrap());
    let evict = Order::Evict { lens: name(0, 2) };
    assert!(world.residency.order(evict).await.is_err());

    world.document.hints = Some(hints(1, &["d"], &[]));
    assert_eq!(world.report().await.state.hints_version, Some(2), "older hints are late");
    let mut alone = hints(3, &["a"], &[]);
    alone.workers.remove("other");
    world.document.hints = Some(alone);
    world.wait("all that is declared", |report| in_memory(report, "d")).await;
    world.engine.shutdown().await;
}

#[tokio::test]
async fn who_runs_and_who_waits_is_told_of_bases_and_lenses() {
    let world = World::new().await;
    let model = |group: usize| ModelName { group: GROUPS[group].into(), lens: Some("a".into()) };
    let runs = world.residency.acquire(model(0)).await.unwrap();
    let residency = world.residency.clone();
    let other = model(1);
    let waits = tokio::spawn(async move { residency.acquire(other).await });
    let rows = |report: &WorkerReport, group: &str| {
        let (base, lens) = (report.base_of(group).unwrap(), report.lens(group, "a").unwrap());
        [base.running_rows, base.waiting_rows, lens.active_rows, lens.waiting_rows]
    };
    let both = |report: &WorkerReport| [rows(report, GROUPS[0]), rows(report, GROUPS[1])];
    world.wait("one that waits", |report| both(report) == [[1, 0, 1, 0], [0, 1, 0, 1]]).await;
    drop(runs);
    let runs = tokio::time::timeout(PATIENCE, waits).await.expect("an answer").unwrap().unwrap();
    world.wait("nobody who waits", |report| both(report) == [[0; 4], [1, 0, 1, 0]]).await;
    drop(runs);
    world.wait("nobody", |report| both(report) == [[0; 4]; 2]).await;
    world.engine.shutdown().await;
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 24,
        max_shrink_iters: 40,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]
    #[test]
    fn nothing_is_lost_whatever_happens(steps in proptest::collection::vec(step(), 10..60)) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            let mut world = World::new().await;
            for step in steps {
                world.take(step).await;
                world.check().await;
            }
            world.end().await;
        });
    }
}
