//! Low-rank deltas as the decoder sees them: per block, one delta for each of its four fused matrices.
//!
//! A delta of `qkv` has the A matrices of q, k and v below each other (they read the same input), so that a row's
//! `A x` is one product, and each B transposed, so that `B (A x)` runs along the outputs. A row's delta is added
//! to its own outputs; weights are never merged.

use std::sync::Arc;

use super::config::ModelConfig;
use super::weights::Matrix;
use crate::kernels::matmul::{DeltaOutputs, Deltas, RowsDelta};
use crate::lens::FilledLens;

/// The four matrices of a block, in order of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Site {
    /// q, k and v.
    Qkv,
    /// Output of attention.
    O,
    /// gate and up.
    GateUp,
    /// Output of the feed-forward block.
    Down,
}

impl Site {
    /// All of them, in order of use.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::O, Self::GateUp, Self::Down];
}

/// One linear map of the published architecture, inside one of the fused matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Module {
    /// Name below `model.layers.N.`.
    pub name: &'static str,
    /// The fused matrix it is part of.
    pub site: Site,
    /// First output of the fused matrix that is this module's.
    pub output_start: usize,
    /// Its outputs.
    pub outputs: usize,
    /// Its inputs.
    pub inputs: usize,
}

/// The linear maps of every block of a base, in the order in which they lie in the fused matrices.
pub fn modules(config: &ModelConfig) -> Vec<Module> {
    let (d, q, kv, i) = (config.hidden_size, config.q_size(), config.kv_size(), config.intermediate_size);
    let module =
        |name, site, output_start, outputs, inputs| Module { name, site, output_start, outputs, inputs };
    let (o, down) =
        (module("self_attn.o_proj", Site::O, 0, d, q), module("mlp.down_proj", Site::Down, 0, d, i));
    if config.fused_projections {
        let qkv = module("self_attn.qkv_proj", Site::Qkv, 0, q + 2 * kv, d);
        return vec![qkv, o, module("mlp.gate_up_proj", Site::GateUp, 0, 2 * i, d), down];
    }
    vec![
        module("self_attn.q_proj", Site::Qkv, 0, q, d),
        module("self_attn.k_proj", Site::Qkv, q, kv, d),
        module("self_attn.v_proj", Site::Qkv, q + kv, kv, d),
        o,
        module("mlp.gate_proj", Site::GateUp, 0, i, d),
        module("mlp.up_proj", Site::GateUp, i, i, d),
        down,
    ]
}

/// A delta of one fused matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Delta {
    /// `[all ranks, inputs]`: the A of every part below each other.
    pub a: Matrix,
    /// What each range of ranks adds to.
    pub parts: Vec<DeltaPart>,
}

/// The share of one module in a [`Delta`].
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaPart {
    /// First row of `a` that is this part's.
    pub rank_start: usize,
    /// First output of the fused matrix.
    pub output_start: usize,
    /// `[rank, outputs]`: B transposed.
    pub b: Matrix,
    /// Multiplies `A x`: alpha / rank, or alpha / sqrt(rank).
    pub scale: f32,
}

/// Deltas of all blocks. Offsets count from the start of the lens's region.
#[derive(Debug, Clone, PartialEq)]
pub struct DeltaLayout {
    /// Per block, per [`Site`].
    pub layers: Vec<[Option<Delta>; 4]>,
}

impl DeltaLayout {
    /// The most ranks that any fused matrix has.
    pub fn max_ranks(&self) -> usize {
        self.layers.iter().flatten().flatten().map(|delta| delta.a.outputs).max().unwrap_or(0)
    }
}

/// A lens on some consecutive tokens of a step.
#[derive(Debug, Clone)]
pub struct LensUse {
    /// First token.
    pub token_start: usize,
    /// How many.
    pub tokens: usize,
    /// The lens.
    pub lens: Arc<FilledLens>,
    /// Multiplies the lens's own scale.
    pub scale: f32,
    /// Where its low-rank activations are in the scratch.
    pub scratch_start: usize,
}

/// All deltas of a step on one matrix of one block.
pub(crate) struct SiteDeltas<'a> {
    pub(crate) uses: &'a [LensUse],
    pub(crate) layer: usize,
    pub(crate) site: Site,
}

impl SiteDeltas<'_> {
    fn at(&self, index: usize) -> Option<(&LensUse, &Delta)> {
        let one = &self.uses[index];
        let delta = one.lens.layout.deltas.layers[self.layer][self.site as usize].as_ref()?;
        Some((one, delta))
    }
}

impl Deltas for SiteDeltas<'_> {
    fn count(&self) -> usize {
        self.uses.len()
    }

    fn delta(&self, index: usize) -> Option<RowsDelta<'_>> {
        let (one, delta) = self.at(index)?;
        Some(RowsDelta {
            row_start: one.token_start,
            rows: one.tokens,
            a: delta.a.of(one.lens.region.bytes()),
            ranks: delta.a.outputs,
            scratch_start: one.scratch_start,
        })
    }

    fn parts(&self, index: usize) -> usize {
        self.at(index).map_or(0, |(_, delta)| delta.parts.len())
    }

    fn part(&self, index: usize, part: usize) -> DeltaOutputs<'_> {
        let (one, delta) = self.at(index).expect("the caller asked how many parts there are");
        let part = &delta.parts[part];
        DeltaOutputs {
            rank_start: part.rank_start,
            ranks: part.b.outputs,
            output_start: part.output_start,
            outputs: part.b.inputs,
            b: part.b.of(one.lens.region.bytes()),
            scale: part.scale * one.scale,
            gain: None,
            bias: None,
        }
    }
}
