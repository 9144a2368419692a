//! Low-rank deltas as the decoder sees them: per block, one delta for each of its four fused matrices; beside them those
//! of the embedding and of the head.
//!
//! A delta of `qkv` has the A matrices of q, k and v below each other (they read the same input), so that a row's
//! `A x` is one product, and each B transposed, so that `B (A x)` runs along the outputs. A row's delta is added
//! to its own outputs; weights are never merged.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::config::ModelConfig;
use super::weights::{Matrix, Vector};
use crate::lens::FilledLens;
use turret_kernels::finish::Gain;
use turret_kernels::matmul::{DeltaOutputs, Deltas, RowsDelta};

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

/// The norms of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormSite {
    /// Before attention.
    Attention,
    /// On every head of q.
    Q,
    /// On every head of k.
    K,
    /// On what attention adds to the residual stream.
    PostAttention,
    /// Before the feed-forward block.
    Mlp,
    /// On what the feed-forward block adds to the residual stream.
    PostMlp,
}

impl NormSite {
    /// How many there can be.
    pub const COUNT: usize = 6;
}

/// One norm of the published architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Norm {
    /// Name below `model.layers.N.`.
    pub name: &'static str,
    /// Which it is.
    pub site: NormSite,
    /// Its numbers.
    pub len: usize,
}

/// The norms of every block of a base.
pub fn norms(config: &ModelConfig) -> Vec<Norm> {
    let norm = |name, site, len| Norm { name, site, len };
    let mut norms = vec![norm("input_layernorm", NormSite::Attention, config.hidden_size)];
    if config.qk_norm {
        norms.push(norm("self_attn.q_norm", NormSite::Q, config.head_dim));
        norms.push(norm("self_attn.k_norm", NormSite::K, config.head_dim));
    }
    let hidden = config.hidden_size;
    match config.sandwich_norms {
        true => norms.extend([
            norm("post_attention_layernorm", NormSite::PostAttention, hidden),
            norm("pre_feedforward_layernorm", NormSite::Mlp, hidden),
            norm("post_feedforward_layernorm", NormSite::PostMlp, hidden),
        ]),
        false => norms.push(norm("post_attention_layernorm", NormSite::Mlp, hidden)),
    }
    norms
}

/// A delta of one fused matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// `[all ranks, inputs]`: the A of every part below each other.
    pub a: Matrix,
    /// What each range of ranks adds to.
    pub parts: Vec<DeltaPart>,
}

impl Delta {
    /// Whether it does more than to add.
    pub fn finishes(&self) -> bool {
        self.parts.iter().any(|part| part.gain.is_some() || part.bias.is_some() || part.shift.is_some())
    }
}

/// The share of one module in a [`Delta`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DeltaPart {
    /// First row of `a` that is this part's.
    pub rank_start: usize,
    /// First output of the fused matrix.
    pub output_start: usize,
    /// `[rank, outputs]`: B transposed. Without ranks when only a bias is brought.
    pub b: Matrix,
    /// Multiplies `A x`: alpha / rank, or alpha / sqrt(rank).
    pub scale: f32,
    /// DoRA.
    pub gain: Option<GainVectors>,
    /// In place of the base's bias.
    pub bias: Option<Vector>,
    /// Added, multiplied by the scale.
    pub shift: Option<Vector>,
}

/// Where the numbers of a [`Gain`] are, one of each per output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GainVectors {
    /// The trained magnitudes.
    pub magnitude: Vector,
    /// Squares of the rows of the base's matrix.
    pub base: Vector,
    /// Twice their products with the rows of the delta.
    pub cross: Vector,
    /// Squares of the rows of the delta.
    pub delta: Vector,
}

/// A delta of the embedding.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EmbeddingDelta {
    /// `[vocabulary, rank]`: A transposed.
    pub a: Matrix,
    /// `[rank, hidden]`: B transposed.
    pub b: Matrix,
    /// Multiplies their product.
    pub scale: f32,
}

/// Tokens with rows of their own, by what these differ from the base's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenRows {
    /// Tokens, ascending, each with the number of its row.
    pub tokens: Vec<(u32, u32)>,
    /// `[tokens, hidden]`, in f32.
    pub rows: Matrix,
}

/// Deltas of all blocks. Offsets count from the start of the lens's region.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct DeltaLayout {
    /// Per block, per [`Site`].
    pub layers: Vec<[Option<Delta>; 4]>,
    /// Of the embedding.
    pub embedding: Option<EmbeddingDelta>,
    /// Of the head.
    pub head: Option<Delta>,
    /// Of single tokens of the embedding.
    pub tokens: Option<TokenRows>,
    /// Of single tokens of the head, whose delta they are; the embedding's where both are one.
    pub head_tokens: Option<TokenRows>,
}

impl DeltaLayout {
    /// Those of blocks and of the head.
    pub fn linear(&self) -> impl Iterator<Item = &Delta> {
        self.layers.iter().flatten().flatten().chain(&self.head)
    }

    /// The most ranks that any fused matrix has.
    pub fn max_ranks(&self) -> usize {
        self.linear().map(|delta| delta.a.outputs).max().unwrap_or(0)
    }

    /// Whether both bring some bias of the same module.
    pub fn shares_bias(&self, other: &Self) -> bool {
        let biases = |delta: &Option<Delta>| -> Vec<usize> {
            let parts = delta.iter().flat_map(|delta| &delta.parts);
            parts.filter(|part| part.bias.is_some()).map(|part| part.output_start).collect()
        };
        let mut sites = self.layers.iter().flatten().zip(other.layers.iter().flatten());
        sites.any(|(a, b)| biases(a).iter().any(|start| biases(b).contains(start)))
    }

    /// Whether those of tokens are for an embedding and a head of this many.
    pub fn fits_vocabulary(&self, tokens: usize) -> bool {
        let embedding = self.embedding.as_ref().is_none_or(|delta| delta.a.outputs == tokens);
        let mut head = self.head.iter().flat_map(|delta| &delta.parts);
        let ends = self.tokens.iter().flat_map(|own| own.tokens.last());
        embedding
            && head.all(|part| part.output_start + part.b.inputs <= tokens)
            && ends.into_iter().all(|(token, _)| (*token as usize) < tokens)
    }

    /// Whether any of them does more than to add.
    pub fn finishes(&self) -> bool {
        self.linear().any(Delta::finishes)
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

/// The lenses on one token of a step, from all of the step in the order of their tokens.
pub(crate) fn uses_at(uses: &[LensUse], token: usize) -> &[LensUse] {
    let end = uses.partition_point(|one| one.token_start <= token);
    let Some(last) = uses[..end].last() else { return &[] };
    if token >= last.token_start + last.tokens {
        return &[];
    }
    let start = uses[..end].partition_point(|one| one.token_start < last.token_start);
    &uses[start..end]
}

/// All deltas of a step on one matrix of one block.
pub(crate) struct SiteDeltas<'a> {
    pub(crate) uses: &'a [LensUse],
    pub(crate) layer: usize,
    pub(crate) site: Site,
    /// Numbers of the scratch that the low-rank activations take.
    pub(crate) scratch_len: usize,
}

impl SiteDeltas<'_> {
    fn at(&self, index: usize) -> Option<(&LensUse, &Delta)> {
        let one = &self.uses[index];
        let delta = one.lens.layout.deltas.layers.get(self.layer)?[self.site as usize].as_ref()?;
        Some((one, delta))
    }
}

impl Deltas for SiteDeltas<'_> {
    fn count(&self) -> usize {
        self.uses.len()
    }

    fn delta(&self, index: usize) -> Option<RowsDelta<'_>> {
        let (one, delta) = self.at(index)?;
        Some(rows_delta(one, delta, one.token_start, one.tokens))
    }

    fn parts(&self, index: usize) -> usize {
        self.at(index).map_or(0, |(_, delta)| delta.parts.len())
    }

    fn part(&self, index: usize, part: usize) -> DeltaOutputs<'_> {
        let (one, delta) = self.at(index).expect("the caller asked how many parts there are");
        outputs_of(one, &delta.parts[part])
    }

    fn finish_start(&self) -> Option<usize> {
        let finishes = |index| self.at(index).is_some_and(|(_, delta)| delta.finishes());
        (0..self.uses.len()).any(finishes).then_some(self.scratch_len)
    }
}

/// All deltas of a step on the head, whose rows are some of the step's tokens.
pub(crate) struct HeadDeltas<'a> {
    pub(crate) uses: &'a [LensUse],
    /// Token of each row, ascending.
    pub(crate) tokens: &'a [u32],
}

impl HeadDeltas<'_> {
    fn at(&self, index: usize) -> Option<(&LensUse, &Delta)> {
        let one = &self.uses[index];
        Some((one, one.lens.layout.deltas.head.as_ref()?))
    }
}

impl Deltas for HeadDeltas<'_> {
    fn count(&self) -> usize {
        self.uses.len()
    }

    fn delta(&self, index: usize) -> Option<RowsDelta<'_>> {
        let (one, delta) = self.at(index)?;
        let row = |token: usize| self.tokens.partition_point(|t| (*t as usize) < token);
        let (start, end) = (row(one.token_start), row(one.token_start + one.tokens));
        (start < end).then(|| rows_delta(one, delta, start, end - start))
    }

    fn parts(&self, index: usize) -> usize {
        self.at(index).map_or(0, |(_, delta)| delta.parts.len())
    }

    fn part(&self, index: usize, part: usize) -> DeltaOutputs<'_> {
        let (one, delta) = self.at(index).expect("the caller asked how many parts there are");
        outputs_of(one, &delta.parts[part])
    }
}

fn rows_delta<'a>(one: &'a LensUse, delta: &'a Delta, row_start: usize, rows: usize) -> RowsDelta<'a> {
    let a = delta.a.of(one.lens.region.bytes());
    RowsDelta { row_start, rows, a, ranks: delta.a.outputs, scratch_start: one.scratch_start }
}

fn outputs_of<'a>(one: &'a LensUse, part: &'a DeltaPart) -> DeltaOutputs<'a> {
    let lens = &one.lens;
    DeltaOutputs {
        rank_start: part.rank_start,
        ranks: part.b.outputs,
        output_start: part.output_start,
        outputs: part.b.inputs,
        b: part.b.of(lens.region.bytes()),
        scale: part.scale * one.scale,
        gain: part.gain.map(|gain| Gain {
            magnitude: lens.vector(&gain.magnitude),
            base: lens.vector(&gain.base),
            cross: lens.vector(&gain.cross),
            delta: lens.vector(&gain.delta),
            scale: one.scale,
        }),
        bias: part.bias.as_ref().map(|bias| lens.vector(bias)),
        shift: part.shift.as_ref().map(|shift| lens.vector(shift)),
    }
}
