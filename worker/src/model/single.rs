//! One sequence at a time, with everything visible: the logits of every position and the residual stream at every block.
//!
//! The same arena, weights, kernels and decoder as the engine's, without its thread. Parity is checked with it.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::decoder::{Batch, Chunk, Decoder, StepSize, Workspace};
use super::kv_cache::{KvCache, blocks_for, cache_shape};
use super::weights::{BaseError, BaseFolder, Dtype, FilledBase};
use crate::engine::arena::{Arena, ArenaError, Part};
use crate::lens::lora::LoraFolder;
use crate::lens::tap::Activations;
use crate::lens::{FilledLens, LensError};
use turret_threads::{Pool, allowed_threads};

/// Why a sequence cannot be computed.
#[derive(Debug, thiserror::Error)]
pub enum SingleError {
    /// The base cannot be loaded.
    #[error("failed to load the base")]
    Base(#[from] BaseError),
    /// A lens cannot be loaded.
    #[error("failed to load the lens")]
    Lens(#[from] LensError),
    /// No memory.
    #[error("failed to reserve memory")]
    Arena(#[from] ArenaError),
    /// A kernel failed.
    #[error("the forward pass failed")]
    Compute(#[from] candle_core::Error),
}

/// What a forward pass computed.
#[derive(Debug, Clone, PartialEq)]
pub struct Trace {
    /// `[tokens, vocabulary]`.
    pub logits: Vec<f32>,
    /// The residual stream entering each block, and after the last one its norm; each `[tokens, hidden]`.
    pub hidden: Vec<Vec<f32>>,
}

/// A loaded base for one sequence of at most `context_tokens`.
pub struct SingleRow {
    arena: Arena,
    base: FilledBase,
    cache: KvCache,
    workspace: Workspace,
    decoder: Decoder,
    context_tokens: u32,
}

impl SingleRow {
    /// Loads a base.
    pub fn open(folder: &Path, dtype: Option<Dtype>, context_tokens: u32) -> Result<Self, SingleError> {
        Self::load(BaseFolder::open(folder, dtype)?, context_tokens)
    }

    /// Loads a base whose folder is open.
    pub fn load(folder: BaseFolder, context_tokens: u32) -> Result<Self, SingleError> {
        let arena = Arena::new(1 << 30)?;
        let region = arena.reserve(Part::Base, folder.layout().bytes)?;
        let base = folder.fill(region, &mut |_| ControlFlow::Continue(()))?;
        Self::new(arena, base, context_tokens)
    }

    pub(crate) fn new(arena: Arena, base: FilledBase, context_tokens: u32) -> Result<Self, SingleError> {
        let config = &base.layout.config;
        let shape = cache_shape(config, base.layout.dtype);
        let blocks = blocks_for(context_tokens);
        let span = u64::from(blocks) * shape.block_bytes() as u64;
        let mut cache = KvCache::new(shape, arena.reserve_addresses(Part::Kv, span)?);
        cache.resize(blocks, std::iter::empty());
        let tokens = context_tokens as usize;
        let workspace = Workspace::new(config, StepSize { tokens, outputs: tokens })?;
        let pool = Arc::new(Pool::new(allowed_threads()));
        let decoder = Decoder::new(config, pool, Arc::new(AtomicU64::new(0)));
        Ok(Self { arena, base, cache, workspace, decoder, context_tokens })
    }

    /// The base.
    pub fn base(&self) -> &FilledBase {
        &self.base
    }

    /// Loads a LoRA lens over this base.
    pub fn load_lora(&self, folder: &Path) -> Result<Arc<FilledLens>, SingleError> {
        let folder = LoraFolder::open(folder, &self.base.layout)?;
        let region = self.arena.reserve(Part::Lens, folder.layout().bytes)?;
        Ok(Arc::new(folder.fill(region, &self.base, &mut |_| ControlFlow::Continue(()))?))
    }

    /// Computes a sequence from its first token, in one step.
    pub fn compute(
        &mut self,
        tokens: &[u32],
        lenses: &[(Arc<FilledLens>, f32)],
    ) -> Result<Trace, SingleError> {
        self.compute_with(tokens, lenses, &Activations::default())
    }

    /// The same, with writing into the residual stream. Taps are not needed: everything is visible. All tokens are of the
    /// prompt.
    pub fn compute_with(
        &mut self,
        tokens: &[u32],
        lenses: &[(Arc<FilledLens>, f32)],
        activations: &Activations,
    ) -> Result<Trace, SingleError> {
        let activations = Arc::new(activations.clone());
        assert!(tokens.len() <= self.context_tokens as usize, "the sequence is longer than the context");
        let mut blocks: Vec<u32> = (0..blocks_for(tokens.len() as u32)).collect();
        blocks.reverse();
        let mut batch = Batch::default();
        let outputs = batch.push(Chunk {
            tokens,
            start: 0,
            length: tokens.len() as u32,
            blocks: &blocks,
            lenses,
            activations: Some((&activations, tokens.len() as u32)),
            outputs_from: 0,
        });
        let mut hidden = Vec::new();
        let mut observe = |_: usize, stream: &[f32]| hidden.push(stream.to_vec());
        self.decoder.forward(&self.base, &mut self.cache, &batch, &mut self.workspace, Some(&mut observe))?;
        let (normed, logits) =
            self.decoder.logits(&self.base, &batch, &self.workspace, outputs, |normed, logits| {
                (normed.to_vec(), logits.numbers().to_vec())
            })?;
        hidden.push(normed);
        Ok(Trace { logits, hidden })
    }
}
