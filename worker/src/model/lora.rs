//! Low-rank deltas as the decoder sees them: per block, one delta for each of its four fused matrices.
//!
//! A delta of `qkv` has the A matrices of q, k and v below each other (they read the same input), so that a row's
//! `A x` is one product, and each B transposed, so that `B (A x)` runs along the outputs. A row's delta is added
//! to its own outputs; weights are never merged.

use super::config::ModelConfig;
use super::weights::Matrix;

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
pub fn modules(config: &ModelConfig) -> [Module; 7] {
    let (d, q, kv, i) = (config.hidden_size, config.q_size(), config.kv_size(), config.intermediate_size);
    let module =
        |name, site, output_start, outputs, inputs| Module { name, site, output_start, outputs, inputs };
    [
        module("self_attn.q_proj", Site::Qkv, 0, q, d),
        module("self_attn.k_proj", Site::Qkv, q, kv, d),
        module("self_attn.v_proj", Site::Qkv, q + kv, kv, d),
        module("self_attn.o_proj", Site::O, 0, d, q),
        module("mlp.gate_proj", Site::GateUp, 0, i, d),
        module("mlp.up_proj", Site::GateUp, i, i, d),
        module("mlp.down_proj", Site::Down, 0, d, i),
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
