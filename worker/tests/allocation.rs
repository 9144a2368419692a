//! A decode step allocates nothing: not on the engine's thread, and not on its compute threads.
//!
//! This program has an allocator of its own that counts, so it has one test, which goes through bases and rows of all kinds.
#![allow(unsafe_code, reason = "an allocator is unsafe to implement")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::executor::block_on;
use parking_lot::{Condvar, Mutex};
use turret_worker::engine::Engine;
use turret_worker::engine::handle::{BaseId, EngineConfig, EngineHandle, LensId};
use turret_worker::engine::row::{RowEvent, RowLens, RowRequest, RowStream, Sampling};
use turret_worker::lens::inject::{Injection, Operation};
use turret_worker::lens::lora::LoraFolder;
use turret_worker::lens::tap::{Activations, Positions, Site, Tap};
use turret_worker::model::weights::{BaseFolder, Dtype};

/// Counts what other threads than the test's ask of the system's allocator, while it is told to.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;
static COUNTS: AtomicBool = AtomicBool::new(false);
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Bytes of the first allocation that was counted, which is a hint where it came from.
static FIRST: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread is the test's.
    static OWN: Cell<bool> = const { Cell::new(false) };
}

fn count(bytes: usize) {
    if COUNTS.load(Ordering::SeqCst) && !OWN.get() && COUNT.fetch_add(1, Ordering::SeqCst) == 0 {
        FIRST.store(bytes, Ordering::SeqCst);
    }
}

// SAFETY: every call is handed to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Tokens of a row that does not end while steps are watched.
const LONG: u32 = 1 << 14;
const PROMPT: u32 = 40;
/// Steps that are watched: more than a dozen blocks of every row.
const STEPS: u64 = 200;

/// A base of the fixtures, and its lenses that rows take, several together where there is a `+`.
struct Kind {
    folder: &'static str,
    dtype: Dtype,
    rows: &'static [&'static str],
}

const KINDS: [Kind; 5] = [
    Kind { folder: "llama", dtype: Dtype::BF16, rows: &["", "all-linear-r8", "dora-r4", "attn-r4+dora-r4"] },
    Kind {
        folder: "features-qwen2",
        dtype: Dtype::F32,
        rows: &["", "dora-bias", "save-head", "fewer-tokens", "lora-embedding", "save-embedding", "bias-all"],
    },
    Kind { folder: "features-qwen3", dtype: Dtype::F16, rows: &["dora-all", "lora-head", "save-norms"] },
    Kind { folder: "gemma2", dtype: Dtype::BF16, rows: &["", "rslora-r16"] },
    Kind { folder: "phi3", dtype: Dtype::F32, rows: &["", "patterns"] },
];

const SAMPLINGS: [Sampling; 5] = [
    Sampling::GREEDY,
    Sampling { temperature: 1.0, seed: 1, ..Sampling::GREEDY },
    Sampling { temperature: 0.8, top_p: 0.9, seed: 2, ..Sampling::GREEDY },
    Sampling { temperature: 1.2, top_k: 40, seed: 3, ..Sampling::GREEDY },
    Sampling { temperature: 0.9, top_p: 0.95, top_k: 100, min_p: 0.01, seed: 4 },
];

/// A folder of the fixtures whose base takes rows that are long.
fn with_long_context(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        std::fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    let path = copy.path().join("config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["max_position_embeddings"] = LONG.into();
    std::fs::write(&path, config.to_string()).unwrap();
    copy
}

/// parking_lot's table of waiting threads grows, once, when more threads wait than ever before. Here all of it happens before
/// anything is counted.
fn wait_on_many_threads() {
    let (waiting, all_there) = (Mutex::new(0), Condvar::new());
    let threads = 4 * std::thread::available_parallelism().map_or(1, usize::from) + 16;
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let mut waiting = waiting.lock();
                *waiting += 1;
                all_there.wait_while(&mut waiting, |waiting| *waiting <= threads);
            });
        }
        while *waiting.lock() < threads {
            std::thread::yield_now();
        }
        *waiting.lock() += 1;
        all_there.notify_all();
    });
}

async fn load_lens(engine: &EngineHandle, base: BaseId, folder: PathBuf) -> LensId {
    let lent = engine.lend_base(base).await.unwrap();
    let files = LoraFolder::open(&folder, lent.layout()).unwrap();
    let region = engine.reserve_lens(files.layout()).await.unwrap();
    let filled = files.fill(region, &lent, &mut |_| ControlFlow::Continue(())).unwrap();
    drop(lent);
    engine.install_lens(base, filled).await.unwrap()
}

/// Reads two places of every token from one within the watched steps on, and writes to each.
fn touch(width: usize) -> Activations {
    let late = Positions::From(PROMPT + 50);
    let injection = Injection {
        site: Site::Out(0),
        positions: Positions::ALL,
        operation: Operation::AddNormMatched { scale: 0.1 },
        vectors: (0..width).map(|i| i as f32 - 7.0).collect(),
        prefill_only: false,
    };
    let taps = [Site::In(0), Site::Out(1)].map(|site| Tap { site, positions: late.clone() });
    Activations { taps: taps.to_vec(), injections: vec![injection], stop_layer: None }
}

async fn tokens(row: &mut RowStream, count: usize) {
    for _ in 0..count {
        let event = row.next().await;
        assert!(matches!(event, Some(RowEvent::Token { .. })), "{event:?}");
    }
}

/// How often anything was allocated in some steps in which all rows of a kind decode together.
async fn allocations_of(kind: &Kind) -> usize {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity").join(kind.folder);
    let folder = with_long_context(&fixture.join("model"));
    let rows = kind.rows.len() * SAMPLINGS.len() + 1;
    let engine = Engine::start(EngineConfig {
        device_bytes: 256 << 20,
        lens_bytes: 32 << 20,
        max_context_tokens: LONG,
        max_running_rows: rows as u32,
        prefill_chunk_tokens: 64,
        max_waiting_rows: rows as u32,
        prefix_cache: true,
    })
    .unwrap();
    let files = BaseFolder::open(folder.path(), Some(kind.dtype)).unwrap();
    let width = files.config().hidden_size;
    let region = engine.reserve_base(files.layout()).await.unwrap();
    let filled = files.fill(region, &mut |_| ControlFlow::Continue(())).unwrap();
    let base = engine.install_base(filled).await.unwrap();
    engine.activate(base).await.unwrap();

    let plain = RowRequest {
        base,
        prompt: (6..6 + PROMPT).collect(),
        generated: Vec::new(),
        lenses: Vec::new(),
        sampling: Sampling::GREEDY,
        stop_token_ids: Vec::new(),
        max_new_tokens: LONG - PROMPT,
        logprobs: None,
        prompt_logprobs: None,
        activations: Activations::default(),
        cache_salt: None,
        parent: None,
    };
    let mut requests = vec![RowRequest { activations: touch(width), ..plain.clone() }];
    for row in kind.rows {
        let mut lenses = Vec::new();
        for name in row.split('+').filter(|name| !name.is_empty()) {
            let lens = load_lens(&engine, base, fixture.join("lenses").join(name)).await;
            lenses.push(RowLens { lens, scale: 0.5 });
        }
        requests.extend(SAMPLINGS.map(|sampling| RowRequest {
            lenses: lenses.clone(),
            sampling,
            ..plain.clone()
        }));
    }
    let mut streams = Vec::new();
    for request in requests {
        streams.push(engine.submit(request).await.unwrap());
    }
    for stream in &mut streams {
        tokens(stream, 2).await;
    }

    let before = engine.snapshot();
    assert_eq!(before.running_rows as usize, rows, "all of them decode");
    COUNT.store(0, Ordering::SeqCst);
    COUNTS.store(true, Ordering::SeqCst);
    while engine.snapshot().steps_total < before.steps_total + STEPS {
        tokens(&mut streams[0], 1).await;
    }
    COUNTS.store(false, Ordering::SeqCst);
    let after = engine.snapshot();
    assert_eq!(after.running_rows as usize, rows, "none of them ended");
    assert_eq!(after.preemptions_total, 0, "none of them stepped back");
    drop(streams);
    engine.shutdown().await;
    COUNT.load(Ordering::SeqCst)
}

#[test]
fn a_decode_step_allocates_nothing() {
    OWN.set(true);
    wait_on_many_threads();
    for kind in &KINDS {
        let count = block_on(allocations_of(kind));
        let first = FIRST.load(Ordering::SeqCst);
        assert_eq!(count, 0, "{} in {:?}, the first of {first} bytes", kind.folder, kind.dtype);
    }
}
