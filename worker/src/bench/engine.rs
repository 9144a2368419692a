//! The engine under test: loaded once, asked in the ways that are measured.

use std::cell::Cell;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures::FutureExt as _;
use futures::executor::block_on;
use futures::future::{join_all, try_join_all};
use tokio_util::sync::CancellationToken;

use super::report::{median, nearest_rank};
use super::takes::{Found, Take};
use super::{BenchArgs, BenchError};
use crate::device;
use crate::engine::Engine;
use crate::engine::handle::{BaseId, EngineConfig, EngineHandle, LensId};
use crate::engine::row::{RowEvent, RowFailure, RowLens, RowRequest, RowStream, Sampling};
use crate::lens::lora::LoraFolder;
use crate::lens::tap::Activations;
use crate::model::config::ModelConfig;
use crate::model::weights::{BaseFolder, BaseLayout, Embedding};
use crate::residency::prepared::{Identity, Prepared, PreparedLens, write};

/// Rows that the engine may compute together, at least.
pub(super) const ROWS: u32 = 32;
/// Context of the decode steps that are measured.
pub(super) const SHORT: u32 = 128;
/// Rows that decode while a long prompt is computed.
const BESIDE: u32 = 4;
/// Requests of one lens after the other, in a take of both kinds.
const REQUESTS: usize = 12;
/// Prompt and answer of a short request.
const REQUEST: (u32, u32) = (8, 4);
/// Times that a lens is loaded per take.
const LOADS: usize = 5;
/// Rows that are only accepted, per take.
const ACCEPTED: usize = 50;
/// Tokens of the prompt during whose only step the rows that are to begin together are submitted.
const GATE: u32 = 4 * SHORT;
/// Steps that rows can go on for when the last one is timed: some begin a step later, and ends are not what is measured.
const SLACK: u32 = 16;
/// The usual parameters, which keep nearly all of a made-up model's flat distribution.
const SAMPLED: Sampling = Sampling { temperature: 1.0, top_p: 0.95, top_k: 0, min_p: 0.0, seed: 1 };

/// A lens as it is loaded for the first time, and as a worker keeps it to load it again.
struct Spare {
    folder: PathBuf,
    prepared: tempfile::NamedTempFile,
    identity: Identity,
    base: BaseId,
    config: Arc<ModelConfig>,
}

impl Spare {
    async fn load(&self, engine: &EngineHandle) -> Result<LensId, BenchError> {
        let prepared = Prepared::open(self.prepared.path(), &self.identity)?.expect("it was just written");
        let prepared = PreparedLens::new(prepared)?;
        let region = engine.reserve_lens(prepared.layout()).await?;
        let lens = prepared.fill(self.config.clone(), region, &|_| {})?;
        Ok(engine.install_lens(self.base, lens).await?)
    }

    /// Loads it again and again, and tells how often.
    async fn load_until(&self, engine: &EngineHandle, stop: &AtomicBool) -> Result<u32, BenchError> {
        let mut loads = 0;
        while !stop.load(Ordering::Relaxed) {
            let lens = self.load(engine).await?;
            engine.retire_lens(lens).await?;
            loads += 1;
        }
        Ok(loads)
    }
}

/// An engine with a base and lenses.
pub(super) struct Loaded {
    engine: EngineHandle,
    config: EngineConfig,
    base: BaseId,
    layout: BaseLayout,
    /// In the order of the arguments.
    lenses: Vec<LensId>,
    /// The last one, to be loaded once more.
    spare: Option<Arc<Spare>>,
    /// Steps that are timed.
    steps: u32,
    /// Prompts so far. Each is another one, so that nothing is found in a cache that was not meant to be.
    prompts: Cell<u64>,
    /// Bytes of weights that every step reads.
    pub(super) step_bytes: u64,
    /// Bytes of each lens.
    pub(super) lens_bytes: Vec<u64>,
}

impl Loaded {
    pub(super) async fn load(args: &BenchArgs) -> Result<Self, BenchError> {
        let folder = BaseFolder::open(&args.base, None)?.quantized(args.quantization);
        let layout = folder.layout().clone();
        let open = |path: &PathBuf| open_lens(path, &layout);
        let lens_folders = args.lenses.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        let lens_bytes: Vec<u64> = lens_folders.iter().map(|lens| lens.layout().bytes).collect();
        let rows = args.rows.iter().copied().max().unwrap_or(1).max(ROWS);
        let longest = args.context.max(args.prompt).max(args.prefix).max(SHORT);
        let config = EngineConfig {
            device_bytes: device::default_budget_bytes(device::memory_limit_bytes()),
            // One of them is loaded a second time.
            lens_bytes: lens_bytes.iter().sum::<u64>() + lens_bytes.last().copied().unwrap_or(0),
            max_context_tokens: longest + args.tokens + SLACK,
            max_running_rows: rows,
            prefill_chunk_tokens: args.chunk,
            max_waiting_rows: 2 * rows,
            // No two prompts begin alike, but where that is what is measured.
            prefix_cache: true,
        };
        let engine = Engine::start(config.clone())?;
        let region = engine.reserve_base(folder.layout()).await?;
        let base = engine.install_base(folder.fill(region, &mut |_| ControlFlow::Continue(()))?).await?;
        engine.activate(base).await?;
        // An embedding of its own is looked up, not read.
        let looked_up = match layout.embedding {
            Embedding::Rows(table) => table.outputs * table.inputs * table.dtype.bytes(),
            Embedding::Tied(_) => 0,
        };
        let mut loaded = Self {
            engine,
            config,
            base,
            step_bytes: layout.bytes - looked_up as u64,
            layout,
            lenses: Vec::new(),
            spare: None,
            steps: args.tokens,
            prompts: Cell::new(0),
            lens_bytes,
        };
        for path in &args.lenses {
            let lens = loaded.load_lens(path).await?;
            loaded.lenses.push(lens);
        }
        loaded.prepare(args.lenses.last()).await?;
        Ok(loaded)
    }

    /// Writes the prepared file of the last lens.
    async fn prepare(&mut self, folder: Option<&PathBuf>) -> Result<(), BenchError> {
        let (Some(folder), Some(last)) = (folder, self.lenses.last()) else { return Ok(()) };
        let prepared = tempfile::NamedTempFile::new().map_err(BenchError::Prepare)?;
        let base = Identity::of_base("bench", self.layout.dtype, self.layout.quantization);
        let identity = Identity::of_lens("bench", &base);
        let lent = self.engine.lend_lens(*last).await.expect("it was just installed");
        let layout = serde_json::to_string(lent.layout()).expect("a layout is JSON");
        write(prepared.as_file(), &identity, layout, lent.bytes(), &CancellationToken::new())
            .map_err(BenchError::Prepare)?;
        let (base, config) = (self.base, self.layout.config.clone());
        self.spare = Some(Arc::new(Spare { folder: folder.clone(), prepared, identity, base, config }));
        Ok(())
    }

    /// Measures.
    pub(super) async fn take(&self, take: Take) -> Result<Vec<Found>, BenchError> {
        match take {
            Take::Decode { rows, lenses } => self.decode(take.name(), rows, lenses).await,
            Take::Sampled { rows } => self.sampled(take.name(), rows).await,
            Take::Prefill { tokens, lens } => {
                let lens = self.lenses.first().filter(|_| lens);
                let bytes = self.step_bytes + lens.map_or(0, |_| self.lens_bytes[0]);
                let seconds = self.first_token(&self.row(tokens, 1, lens)).await?;
                Ok(vec![Found { name: take.name(), tokens, bytes, seconds }])
            }
            Take::Prefix { tokens } => {
                let row = self.row(tokens, 1, None);
                let cold = self.first_token(&row).await?;
                let again = self.first_token(&row).await?;
                let name = |kind| format!("first token after {tokens} tokens, {kind}");
                Ok(vec![Found::time(name("cold"), cold), Found::time(name("again"), again)])
            }
            Take::Requests => self.requests().await,
            Take::Lens => self.lens().await,
            Take::Loads => self.loads().await,
            Take::LongPrompt { tokens } => self.long_prompt(tokens).await,
        }
    }

    pub(super) async fn shutdown(self) {
        self.engine.shutdown().await;
    }

    async fn load_lens(&self, path: &Path) -> Result<LensId, BenchError> {
        let folder = open_lens(path, &self.layout)?;
        let region = self.engine.reserve_lens(folder.layout()).await?;
        let lent = self.engine.lend_base(self.base).await?;
        let filled = folder
            .fill(region, &lent, &mut |_| ControlFlow::Continue(()))
            .map_err(|source| BenchError::Lens { path: path.into(), source })?;
        drop(lent);
        Ok(self.engine.install_lens(self.base, filled).await?)
    }

    /// A row with a prompt that no other has.
    fn row(&self, prompt: u32, new: u32, lens: Option<&LensId>) -> RowRequest {
        let number = self.prompts.replace(self.prompts.get() + 1);
        let vocab = self.layout.config.vocab_size as u64;
        RowRequest {
            base: self.base,
            prompt: (0..u64::from(prompt))
                .map(|i| ((i * 7919 + number * 104_729 + 17) % vocab) as u32)
                .collect(),
            generated: Vec::new(),
            lenses: lens.map(|&lens| RowLens { lens, scale: 1.0 }).into_iter().collect(),
            sampling: Sampling::GREEDY,
            stop_token_ids: Vec::new(),
            max_new_tokens: new,
            logprobs: None,
            prompt_logprobs: None,
            activations: Activations::default(),
            cache_salt: None,
            parent: None,
        }
    }

    /// Seconds from a row's submission to its first token.
    async fn first_token(&self, row: &RowRequest) -> Result<f64, BenchError> {
        let row = row.clone();
        let start = Instant::now();
        let mut row = self.engine.submit(row).await?;
        token(&mut row).await?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Rows of which each has its first token, for `new` tokens more.
    ///
    /// Beside rows that decode prompts are computed slowly, so all of them begin in one step: while a prompt is computed
    /// that nobody wants an answer to, they come and wait.
    async fn running(
        &self,
        rows: u32,
        lenses: usize,
        sampling: Sampling,
        new: u32,
    ) -> Result<Vec<RowStream>, BenchError> {
        // Rows of the take before are cancelled and may be in one more step, behind which some of these would begin.
        while self.engine.snapshot().running_rows > 0 {
            wait(Duration::from_millis(1));
        }
        let chunk = GATE + rows * SHORT;
        self.engine.reconfigure(EngineConfig { prefill_chunk_tokens: chunk, ..self.config.clone() }).await?;
        let mut gate = self.engine.submit(self.row(GATE, 1, None)).await?;
        // Until its step has begun: who comes just before would begin in it, ahead of the others.
        wait(Duration::from_millis(20));
        let submit = |row: u32| {
            let lens = self.lenses[..lenses].get(row as usize % lenses.max(1));
            self.engine.submit(RowRequest { sampling, ..self.row(SHORT, new + SLACK, lens) })
        };
        let mut rows = try_join_all((0..rows).map(submit)).await?;
        token(&mut gate).await?;
        for first in join_all(rows.iter_mut().map(token)).await {
            first?;
        }
        self.engine.reconfigure(self.config.clone()).await?;
        catch_up(&mut rows[0])?;
        token(&mut rows[0]).await?;
        Ok(rows)
    }

    /// Seconds of one step, on average over those that are timed.
    async fn step(&self, row: &mut RowStream) -> Result<f64, BenchError> {
        let start = Instant::now();
        for _ in 0..self.steps {
            token(row).await?;
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(self.steps))
        // Dropping the streams cancels the rows.
    }

    async fn decode(&self, name: String, rows: u32, lenses: usize) -> Result<Vec<Found>, BenchError> {
        let mut running = self.running(rows, lenses, Sampling::GREEDY, self.steps).await?;
        let seconds = self.step(&mut running[0]).await?;
        let bytes = self.step_bytes + self.lens_bytes[..lenses].iter().sum::<u64>();
        Ok(vec![Found { name, tokens: rows, bytes, seconds }])
    }

    async fn sampled(&self, name: String, rows: u32) -> Result<Vec<Found>, BenchError> {
        let mut running = self.running(rows, 0, SAMPLED, self.steps).await?;
        let before = self.engine.snapshot();
        let seconds = self.step(&mut running[0]).await?;
        let after = self.engine.snapshot();
        let nanoseconds = after.step_nanoseconds_total - before.step_nanoseconds_total;
        let model = after.model_nanoseconds_total - before.model_nanoseconds_total;
        let steps = (after.steps_total - before.steps_total).max(1);
        let outside = nanoseconds.saturating_sub(model) as f64 / steps as f64 / 1e9;
        let part = Found::time(format!("{name}, outside of the model"), outside);
        Ok(vec![Found { name, tokens: rows, bytes: self.step_bytes, seconds }, part])
    }

    async fn requests(&self) -> Result<Vec<Found>, BenchError> {
        let pair = &self.lenses[..2];
        let (prompt, new) = REQUEST;
        let mut seconds = [0.0; 2];
        // Both kinds in four turns, so that both see the same machine.
        for (turn, number) in (0..4).flat_map(|turn| (0..REQUESTS / 2).map(move |n| (turn % 2, n))) {
            let lens = if turn == 0 { &pair[0] } else { &pair[number % 2] };
            let row = self.row(prompt, new, Some(lens));
            let start = Instant::now();
            let mut row = self.engine.submit(row).await?;
            for _ in 0..new {
                token(&mut row).await?;
            }
            seconds[turn] += start.elapsed().as_secs_f64();
        }
        // A step for the prompt, and one for every token but the first.
        let bytes = u64::from(new) * (self.step_bytes + self.lens_bytes[0]);
        let found = |kind: &str, seconds: f64| Found {
            name: format!("request, {kind}"),
            tokens: new,
            bytes,
            seconds: seconds / REQUESTS as f64,
        };
        Ok(vec![found("the same lens", seconds[0]), found("two lenses in turn", seconds[1])])
    }

    async fn lens(&self) -> Result<Vec<Found>, BenchError> {
        let spare = self.spare.as_ref().expect("there is a lens");
        let (mut first, mut loads, mut cold, mut warm) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for _ in 0..LOADS {
            let start = Instant::now();
            let lens = self.load_lens(&spare.folder).await?;
            first.push(start.elapsed().as_secs_f64());
            self.engine.retire_lens(lens).await?;
            let start = Instant::now();
            let lens = spare.load(&self.engine).await?;
            let load = start.elapsed().as_secs_f64();
            loads.push(load);
            cold.push(load + self.first_token(&self.row(REQUEST.0, 1, Some(&lens))).await?);
            warm.push(self.first_token(&self.row(REQUEST.0, 1, Some(&lens))).await?);
            self.engine.retire_lens(lens).await?;
        }
        let mut accepted = Vec::new();
        for number in 0..ACCEPTED {
            let row = self.row(1, 1, self.lenses.get(number % 2).or(self.lenses.first()));
            let start = Instant::now();
            let mut row = self.engine.submit(row).await?;
            accepted.push(start.elapsed().as_secs_f64());
            token(&mut row).await?;
        }
        Ok(vec![
            Found::time("lens, loaded for the first time", median(&first)),
            Found::time("lens, loaded", median(&loads)),
            Found::time("lens, switched", median(&accepted)),
            Found::time("first token, lens evicted", median(&cold)),
            Found::time("first token, lens resident", median(&warm)),
        ])
    }

    async fn loads(&self) -> Result<Vec<Found>, BenchError> {
        let (spare, engine) = (self.spare.clone().expect("there is a lens"), self.engine.clone());
        let count = 4 * self.steps;
        let mut beside = self.running(BESIDE, 0, Sampling::GREEDY, 2 * count + SLACK).await?;
        let alone = Self::gaps(&mut beside[0], count as usize).await?;
        let stop = Arc::new(AtomicBool::new(false));
        let until = stop.clone();
        let loader = std::thread::spawn(move || block_on(spare.load_until(&engine, &until)));
        let gaps = Self::gaps(&mut beside[0], count as usize).await;
        stop.store(true, Ordering::Relaxed);
        let loads = loader.join().expect("loading does not panic")?;
        let gaps = gaps?;
        let between = format!("between tokens, {BESIDE} rows,");
        let per_load = gaps.iter().sum::<f64>() / f64::from(loads.max(1));
        Ok(vec![
            Found::time(format!("{between} nothing else"), nearest_rank(&alone, 0.99)),
            Found::time(format!("{between} beside lenses that load"), nearest_rank(&gaps, 0.99)),
            Found::time("lens, loaded beside 4 rows", per_load),
        ])
    }

    /// Seconds between the tokens of rows that decode while this happens.
    async fn gaps(row: &mut RowStream, count: usize) -> Result<Vec<f64>, BenchError> {
        let mut gaps = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            token(row).await?;
            gaps.push(start.elapsed().as_secs_f64());
        }
        Ok(gaps)
    }

    async fn long_prompt(&self, tokens: u32) -> Result<Vec<Found>, BenchError> {
        // For as long as the prompt can take; it gets on by some tokens a step.
        let new = (self.config.max_context_tokens - SHORT - SLACK).min(tokens);
        let mut beside = self.running(BESIDE, 0, Sampling::GREEDY, new).await?;
        let alone = Self::gaps(&mut beside[0], 2 * self.steps as usize).await?;
        let mut long = self.engine.submit(self.row(tokens, self.steps + 8, None)).await?;
        let mut gaps = Vec::new();
        loop {
            gaps.extend(Self::gaps(&mut beside[0], 1).await?);
            if let Some(first) = token(&mut long).now_or_never() {
                first?;
                break;
            }
        }
        drop(beside);
        token(&mut long).await?;
        token(&mut long).await?;
        let seconds = self.step(&mut long).await?;
        let between = format!("between tokens, {BESIDE} rows");
        Ok(vec![
            Found::time(format!("{between} beside a prompt of {tokens}"), nearest_rank(&gaps, 0.99)),
            Found::time(between, nearest_rank(&alone, 0.99)),
            Found {
                name: format!("decode, 1 row, context {tokens}"),
                tokens: 1,
                bytes: self.step_bytes,
                seconds,
            },
        ])
    }
}

/// Lets the engine's thread go on while this one has nothing to do but to be in time.
#[expect(clippy::disallowed_methods, reason = "there is no event for what has not happened yet")]
fn wait(time: Duration) {
    std::thread::sleep(time);
}

/// Takes what a row has generated already, so that the next token is one that is waited for.
fn catch_up(row: &mut RowStream) -> Result<(), BenchError> {
    while let Some(next) = token(row).now_or_never() {
        next?;
    }
    Ok(())
}

fn open_lens(path: &Path, base: &BaseLayout) -> Result<LoraFolder, BenchError> {
    LoraFolder::open(path, base).map_err(|source| BenchError::Lens { path: path.into(), source })
}

/// Waits for the row's next token.
async fn token(row: &mut RowStream) -> Result<(), RowFailure> {
    loop {
        match row.next().await {
            Some(RowEvent::Token { .. }) => return Ok(()),
            Some(RowEvent::Failed(failure)) => return Err(failure),
            Some(RowEvent::Prompt(_) | RowEvent::Tapped(_)) => {}
            // No row has a stop token, and none is asked for more tokens than it was submitted for.
            Some(RowEvent::Finished { .. }) | None => return Err(RowFailure::EngineStopped),
        }
    }
}
