//! The engine under test: loaded once, asked in the ways that are measured.

use std::ops::ControlFlow;
use std::time::Instant;

use futures::future::{join_all, try_join_all};

use super::{BenchArgs, BenchError};
use crate::device;
use crate::engine::Engine;
use crate::engine::handle::{BaseId, EngineConfig, EngineHandle, LensId};
use crate::engine::row::{RowEvent, RowFailure, RowLens, RowRequest, RowStream, Sampling};
use crate::lens::lora::LoraFolder;
use crate::lens::tap::Activations;
use crate::model::weights::{BaseFolder, Embedding};

/// Rows that the engine may compute together, at least.
const ROWS: u32 = 32;
/// Context of the decode steps that are measured.
pub(super) const SHORT: u32 = 128;

/// An engine with a base and lenses.
pub(super) struct Loaded {
    engine: EngineHandle,
    base: BaseId,
    vocab: u32,
    /// In the order of the arguments.
    pub(super) lenses: Vec<LensId>,
    /// Bytes of weights that every step reads.
    pub(super) step_bytes: u64,
    /// Bytes of each lens.
    pub(super) lens_bytes: Vec<u64>,
}

/// Some rows that decode together.
pub(super) struct Decode<'a> {
    pub(super) rows: u32,
    pub(super) context: u32,
    /// Rows take turns among them; none for the bare base.
    pub(super) lenses: &'a [LensId],
    /// Steps that are timed.
    pub(super) steps: u32,
}

impl Loaded {
    pub(super) async fn load(args: &BenchArgs) -> Result<Self, BenchError> {
        let folder = BaseFolder::open(&args.base, None)?.quantized(args.quantization);
        let config = folder.config().clone();
        let lens_folder = |path: &std::path::PathBuf| {
            LoraFolder::open(path, folder.layout())
                .map_err(|source| BenchError::Lens { path: path.clone(), source })
        };
        let lens_folders = args.lenses.iter().map(lens_folder).collect::<Result<Vec<_>, _>>()?;
        let lens_bytes: Vec<u64> = lens_folders.iter().map(|lens| lens.layout().bytes).collect();
        let rows = args.rows.iter().copied().max().unwrap_or(1).max(ROWS);
        let context = args.context.max(args.prompt).max(SHORT) + args.tokens + 2 * rows + 16;
        let engine = Engine::start(EngineConfig {
            device_bytes: device::default_budget_bytes(device::memory_limit_bytes()),
            lens_bytes: lens_bytes.iter().sum(),
            max_context_tokens: context,
            max_running_rows: rows,
            prefill_chunk_tokens: args.prompt.max(SHORT),
            max_waiting_rows: 2 * rows,
            // Rounds repeat their prompts, and each is to be computed.
            prefix_cache: false,
        })?;
        let go_on = &mut |_| ControlFlow::Continue(());
        let region = engine.reserve_base(folder.layout()).await?;
        let base = engine.install_base(folder.fill(region, go_on)?).await?;
        engine.activate(base).await?;
        let mut lenses = Vec::new();
        for (lens, path) in lens_folders.iter().zip(&args.lenses) {
            let region = engine.reserve_lens(lens.layout()).await?;
            let lent = engine.lend_base(base).await?;
            let filled = lens
                .fill(region, &lent, go_on)
                .map_err(|source| BenchError::Lens { path: path.clone(), source })?;
            drop(lent);
            lenses.push(engine.install_lens(base, filled).await?);
        }
        // An embedding of its own is looked up, not read.
        let looked_up = match folder.layout().embedding {
            Embedding::Rows(table) => table.outputs * table.inputs * table.dtype.bytes(),
            Embedding::Tied(_) => 0,
        };
        let step_bytes = folder.layout().bytes - looked_up as u64;
        let vocab = config.vocab_size as u32;
        Ok(Self { engine, base, vocab, lenses, step_bytes, lens_bytes })
    }

    fn row(&self, number: u32, prompt: u32, new: u32, lens: Option<LensId>) -> RowRequest {
        RowRequest {
            base: self.base,
            prompt: (0..prompt).map(|i| (i * 7919 + number * 104_729 + 17) % self.vocab).collect(),
            lenses: lens.map(|lens| RowLens { lens, scale: 1.0 }).into_iter().collect(),
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

    /// Seconds of one step, on average over those that are timed; all rows take part in each of them.
    pub(super) async fn decode(&self, decode: &Decode<'_>) -> Result<f64, BenchError> {
        // Rows that begin some steps later must not end before the first one's last step.
        let new = decode.steps + 2 * decode.rows + 8;
        let lens = |row: u32| decode.lenses.get(row as usize % decode.lenses.len().max(1)).copied();
        let submit = |row| self.engine.submit(self.row(row, decode.context, new, lens(row)));
        let mut rows = try_join_all((0..decode.rows).map(submit)).await?;
        for first in join_all(rows.iter_mut().map(token)).await {
            first?;
        }
        let row = &mut rows[0];
        token(row).await?;
        let start = Instant::now();
        for _ in 0..decode.steps {
            token(row).await?;
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(decode.steps))
        // Dropping the streams cancels the rows.
    }

    /// Seconds from a prompt to its first token.
    pub(super) async fn prefill(&self, tokens: u32, lens: Option<LensId>) -> Result<f64, BenchError> {
        let start = Instant::now();
        let mut row = self.engine.submit(self.row(0, tokens, 1, lens)).await?;
        token(&mut row).await?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// Seconds of one short request on average, when each takes the next of these lenses.
    pub(super) async fn requests(&self, lenses: &[LensId], count: u32) -> Result<f64, BenchError> {
        let start = Instant::now();
        for number in 0..count {
            let lens = lenses.get(number as usize % lenses.len().max(1)).copied();
            let mut row = self.engine.submit(self.row(number, 16, 4, lens)).await?;
            for _ in 0..4 {
                token(&mut row).await?;
            }
        }
        Ok(start.elapsed().as_secs_f64() / f64::from(count))
    }

    pub(super) async fn shutdown(self) {
        self.engine.shutdown().await;
    }
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
