//! The device budget, as arithmetic: what a base needs, what is left for the KV cache, and by how much something does
//! not fit.
//!
//! ```text
//! device = resident bases + lens budget (hard) + workspace of the active base + KV cache (the rest)
//! ```

use super::arena::ArenaUse;
use super::handle::{CannotFit, EngineConfig};
use crate::model::config::ModelConfig;
use crate::model::decoder::{StepSize, Workspace};
use crate::model::kv_cache::{blocks_for, cache_shape};
use crate::model::weights::{BaseLayout, Dtype};

/// Outputs whose logits are in memory at a time, at most.
const MAX_OUTPUTS: usize = 64;
/// Blocks that may be kept for prefixes where rows do not need as many: a million tokens, and some megabytes to list them.
const KEPT_BLOCKS: u32 = 1 << 16;

/// What serving a base takes beside its weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseNeeds {
    /// Longest sequence: the configured one, or the base's own if that is shorter.
    pub context_tokens: u32,
    /// Largest step.
    pub step: StepSize,
    /// Bytes of activations.
    pub workspace_bytes: u64,
    /// Bytes of one block of the KV cache.
    pub block_bytes: u64,
    /// Fewest blocks: one longest sequence.
    pub min_blocks: u32,
    /// Most blocks that are of use: every row as long as can be, or many kept prefixes.
    pub max_blocks: u32,
}

impl BaseNeeds {
    /// What a base of this architecture needs under these limits.
    pub fn of(config: &ModelConfig, dtype: Dtype, limits: &EngineConfig) -> Self {
        let context_tokens = limits.max_context_tokens.min(config.max_position_embeddings as u32).max(1);
        let rows = limits.max_running_rows.max(1);
        let step = StepSize {
            tokens: (rows + limits.prefill_chunk_tokens.max(1)) as usize,
            outputs: (rows as usize).min(MAX_OUTPUTS),
        };
        let min_blocks = blocks_for(context_tokens);
        let kept_blocks = if limits.prefix_cache { KEPT_BLOCKS } else { 0 };
        Self {
            context_tokens,
            step,
            workspace_bytes: Workspace::bytes(config, step),
            block_bytes: cache_shape(config, dtype).block_bytes() as u64,
            min_blocks,
            max_blocks: min_blocks.saturating_mul(rows).max(kept_blocks),
        }
    }

    fn min_kv_bytes(&self) -> u64 {
        u64::from(self.min_blocks) * self.block_bytes
    }
}

/// Whether a base could be served if it were alone with the lens budget.
pub fn fits_alone(layout: &BaseLayout, limits: &EngineConfig) -> Result<(), CannotFit> {
    let needs = BaseNeeds::of(&layout.config, layout.dtype, limits);
    fits(layout.bytes, &needs, needs.min_blocks, limits)
}

/// Whether bases of this many bytes and the active one's workspace and KV blocks fit.
pub fn fits(base_bytes: u64, needs: &BaseNeeds, blocks: u32, limits: &EngineConfig) -> Result<(), CannotFit> {
    let kv_bytes = u64::from(blocks) * needs.block_bytes;
    let sum = base_bytes
        .saturating_add(limits.lens_bytes)
        .saturating_add(needs.workspace_bytes)
        .saturating_add(kv_bytes);
    within(sum, limits.device_bytes, || {
        format!(
            "bases take {base_bytes} bytes, the lens budget {}, the workspace {} and {blocks} KV blocks {kv_bytes} \
             (one sequence of {} tokens takes {}), of a device budget of {}",
            limits.lens_bytes,
            needs.workspace_bytes,
            needs.context_tokens,
            needs.min_kv_bytes(),
            limits.device_bytes,
        )
    })
}

/// Whether bases fit beside the lens budget while none is active.
pub fn fits_inactive(base_bytes: u64, limits: &EngineConfig) -> Result<(), CannotFit> {
    within(base_bytes.saturating_add(limits.lens_bytes), limits.device_bytes, || {
        format!(
            "bases take {base_bytes} bytes and the lens budget {}, of a device budget of {}",
            limits.lens_bytes, limits.device_bytes
        )
    })
}

/// Whether lenses of this many bytes fit their budget.
pub fn lenses_fit(lens_bytes: u64, limits: &EngineConfig) -> Result<(), CannotFit> {
    within(lens_bytes, limits.lens_bytes, || {
        format!("lenses take {lens_bytes} bytes, of a lens budget of {}", limits.lens_bytes)
    })
}

/// How many blocks the KV cache should have: all that is left, as far as it is of use.
pub fn kv_blocks(used: &ArenaUse, needs: &BaseNeeds, limits: &EngineConfig) -> u32 {
    let taken = used.base_bytes.saturating_add(limits.lens_bytes).saturating_add(needs.workspace_bytes);
    let rest = limits.device_bytes.saturating_sub(taken);
    u32::try_from(rest / needs.block_bytes).unwrap_or(u32::MAX).min(needs.max_blocks)
}

fn within(sum: u64, budget: u64, why: impl FnOnce() -> String) -> Result<(), CannotFit> {
    match sum.checked_sub(budget) {
        None | Some(0) => Ok(()),
        Some(short_by_bytes) => Err(CannotFit { short_by_bytes, why: why() }),
    }
}
