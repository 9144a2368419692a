//! One forward pass over a ragged batch: rows in prefill and in decode, each with its own length, lenses and cache blocks.
//!
//! Activations are allocated once, in [`Workspace::new`], for the largest step; every operation works on their first
//! rows in place. A step allocates nothing.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{Result, bail};

use super::config::{LayerKind, ModelConfig};
use super::kv_cache::KvCache;
use super::lora::{HeadDeltas, LensUse, NormSite, Site, SiteDeltas};
use super::replaced::{EmbeddingsOf, NormsAt, head_of};
use super::residual::{ActiveRow, Touch};
use super::rope::Frequencies;
use super::weights::{Dtype, FilledBase, PackedMatrix, Vector};
use crate::lens::tap::Activations;
use crate::lens::{Effects, FilledLens};
use turret_kernels::attention::{Query, Scoring};
use turret_kernels::buffer::Buffer;
use turret_kernels::matmul::{Deltas, Linear, Scratch};
use turret_kernels::ops::{
    ActivateMul, Attend, Embed, Project, RmsNorm, Rotary, RotateAndStore, RowEmbeddings, RowNorms, SoftCap,
};
use turret_threads::Pool;

/// Tokens of one row to compute in a step.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// Position of the first.
    pub start: u32,
    /// Tokens that the row has now, computed or not. All of them are rotated alike.
    pub length: u32,
    /// Cache blocks of the row's positions from 0; enough for the last token of this chunk.
    pub blocks: &'a [u32],
    /// Lenses on this row, with the row's own scales.
    pub lenses: &'a [(Arc<FilledLens>, f32)],
    /// What the row reads from and writes into the residual stream, and how many tokens its prompt has.
    pub activations: Option<(&'a Arc<Activations>, u32)>,
    /// From which token of the chunk on logits are wanted; `tokens.len()` for none.
    pub outputs_from: usize,
}

/// The rows of a step, flattened. Reused from step to step.
#[derive(Debug, Default)]
pub struct Batch {
    tokens: Vec<u32>,
    queries: Vec<Query>,
    /// Tokens of each token's row.
    lengths: Vec<u32>,
    tables: Vec<u32>,
    uses: Vec<LensUse>,
    scratch_len: usize,
    outputs: Vec<u32>,
    active: Vec<ActiveRow>,
    /// Vectors that taps read.
    captures: usize,
    /// Tokens of rows that go through all blocks; they come first.
    whole: usize,
    /// Before which block rows leave, and where the tokens of the last one that leaves there end. Latest first.
    leaving: Vec<(u32, usize)>,
    /// Per output, tokens of its lens's own head; 0 for the base's.
    vocabularies: Vec<u32>,
    /// Of all lenses of the step together.
    effects: Effects,
}

impl Batch {
    /// A batch that will not grow up to this size.
    pub fn with_capacity(tokens: usize, blocks: usize, lenses: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(tokens),
            queries: Vec::with_capacity(tokens),
            lengths: Vec::with_capacity(tokens),
            tables: Vec::with_capacity(blocks),
            uses: Vec::with_capacity(lenses),
            scratch_len: 0,
            outputs: Vec::with_capacity(tokens),
            vocabularies: Vec::with_capacity(tokens),
            ..Self::default()
        }
    }

    /// Makes room for the block tables of a step.
    pub fn reserve_blocks(&mut self, blocks: usize) {
        self.tables.reserve(blocks.saturating_sub(self.tables.len()));
    }

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.queries.clear();
        self.lengths.clear();
        self.tables.clear();
        self.uses.clear();
        self.scratch_len = 0;
        self.outputs.clear();
        self.active.clear();
        self.captures = 0;
        self.whole = 0;
        self.leaving.clear();
        self.vocabularies.clear();
        self.effects = Effects::default();
    }

    /// Adds a row and says which of the step's outputs are its own. Rows that leave in mid-step come last, those that
    /// leave first at the end.
    pub fn push(&mut self, chunk: Chunk<'_>) -> Range<usize> {
        let token_start = self.tokens.len();
        let table_start = self.tables.len() as u32;
        self.tokens.extend_from_slice(chunk.tokens);
        self.tables.extend_from_slice(chunk.blocks);
        let positions = chunk.start..chunk.start + chunk.tokens.len() as u32;
        self.queries.extend(positions.map(|position| Query { position, table_start }));
        self.lengths.resize(self.tokens.len(), chunk.length);
        let mut vocabulary = 0;
        for (lens, scale) in chunk.lenses {
            let (tokens, scratch_start) = (chunk.tokens.len(), self.scratch_len);
            self.scratch_len += tokens * lens.effects.ranks;
            self.effects = self.effects.beside(&lens.effects);
            vocabulary = vocabulary.max(lens.effects.head_tokens);
            self.uses.push(LensUse { token_start, tokens, lens: lens.clone(), scale: *scale, scratch_start });
        }
        if let Some((activations, prompt)) = chunk.activations {
            let row = ActiveRow {
                token_start,
                tokens: chunk.tokens.len(),
                position: chunk.start,
                prompt,
                activations: activations.clone(),
                captured_start: self.captures,
            };
            self.captures += row.captures();
            self.active.push(row);
        }
        match chunk.activations.and_then(|(activations, _)| activations.stop_layer) {
            Some(layer) => {
                let later = self.leaving.last().is_none_or(|(last, _)| layer <= *last);
                assert!(later, "rows that leave first are at the end");
                self.leaving.push((layer, self.tokens.len()));
            }
            None => {
                assert!(self.leaving.is_empty(), "rows that leave are at the end");
                self.whole = self.tokens.len();
            }
        }
        let outputs = self.outputs.len();
        self.outputs.extend((chunk.outputs_from..chunk.tokens.len()).map(|i| (token_start + i) as u32));
        self.vocabularies.resize(self.outputs.len(), vocabulary as u32);
        outputs..self.outputs.len()
    }

    /// Rows that read or write.
    pub fn active(&self) -> &[ActiveRow] {
        &self.active
    }

    /// Tokens that go through a block.
    fn tokens_at(&self, layer: usize) -> usize {
        let stay = self.leaving.iter().take_while(|(leaves, _)| *leaves as usize > layer);
        stay.last().map_or(self.whole, |(_, end)| *end)
    }

    /// Tokens in the step.
    pub fn tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Outputs wanted of the step.
    pub fn outputs(&self) -> usize {
        self.outputs.len()
    }
}

/// The largest step that a workspace is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepSize {
    /// Tokens.
    pub tokens: usize,
    /// Outputs whose logits are in memory at a time.
    pub outputs: usize,
}

/// Cosines and sines of a step's positions, `[tokens, rotated pairs]`.
struct Angles {
    cos: Vec<f32>,
    sin: Vec<f32>,
}

/// Activations of a base, for the largest step.
pub struct Workspace {
    size: StepSize,
    hidden: Buffer,
    normed: Buffer,
    qkv: Buffer,
    attended: Buffer,
    gate_up: Buffer,
    activated: Buffer,
    outputs: Buffer,
    logits: Buffer,
    angles: [Angles; 2],
    /// Of the rows that room was made for: the most ranks of any, and what else any does.
    promised: Effects,
    /// What taps read, `[vectors, hidden]`. Empty until a row has some.
    captured: RefCell<Vec<f32>>,
    scratch: RefCell<Scratch>,
}

impl Workspace {
    /// Bytes of the activations of a step.
    pub fn bytes(config: &ModelConfig, size: StepSize) -> u64 {
        let c = config;
        let per_token = 2 * c.hidden_size
            + (c.q_size() + 2 * c.kv_size())
            + c.q_size()
            + 3 * c.intermediate_size
            + c.rope.rotary_dim
            + c.sliding_rope.as_ref().map_or(0, |rope| rope.rotary_dim)
            + Self::widest_input(c);
        let per_output = c.hidden_size + c.vocab_size;
        4 * (size.tokens * per_token + size.outputs * per_output) as u64
    }

    /// Numbers of the longest row that a matrix of a block takes.
    fn widest_input(c: &ModelConfig) -> usize {
        c.hidden_size.max(c.q_size()).max(c.intermediate_size)
    }

    /// Allocates them.
    pub fn new(config: &ModelConfig, size: StepSize) -> Result<Self> {
        let c = config;
        Ok(Self {
            size,
            hidden: Buffer::zeros(size.tokens, c.hidden_size)?,
            normed: Buffer::zeros(size.tokens, c.hidden_size)?,
            qkv: Buffer::zeros(size.tokens, c.q_size() + 2 * c.kv_size())?,
            attended: Buffer::zeros(size.tokens, c.q_size())?,
            gate_up: Buffer::zeros(size.tokens, 2 * c.intermediate_size)?,
            activated: Buffer::zeros(size.tokens, c.intermediate_size)?,
            outputs: Buffer::zeros(size.outputs, c.hidden_size)?,
            logits: Buffer::zeros(size.outputs, c.vocab_size)?,
            angles: [Some(&c.rope), c.sliding_rope.as_ref()].map(|rope| {
                let len = size.tokens * rope.map_or(0, |rope| rope.rotary_dim / 2);
                Angles { cos: Vec::with_capacity(len), sin: Vec::with_capacity(len) }
            }),
            promised: Effects::default(),
            captured: RefCell::default(),
            scratch: RefCell::new(Scratch::for_inputs(size.tokens.max(size.outputs), Self::widest_input(c))),
        })
    }

    /// What it was made for.
    pub fn size(&self) -> StepSize {
        self.size
    }

    /// Reads what the taps of the last step read.
    pub fn with_captured<T>(&self, read: impl FnOnce(&[f32]) -> T) -> T {
        read(&self.captured.borrow())
    }

    /// Makes room for rows whose lenses do this together, beside any that it was made for before.
    pub fn reserve(&mut self, effects: &Effects) -> Result<()> {
        let ranks = self.promised.ranks.max(effects.ranks);
        self.promised = Effects { ranks, ..self.promised.beside(effects) };
        let promised = self.promised;
        self.reserve_scratch(ranks * self.size.tokens, &promised);
        self.reserve_logits(&promised)
    }

    /// Makes room for so many vectors that taps read in one step.
    pub fn reserve_captures(&mut self, vectors: usize) {
        let (numbers, captured) = (vectors * self.hidden.width(), self.captured.get_mut());
        if captured.len() < numbers {
            captured.resize(numbers, 0.0);
        }
    }

    fn reserve_scratch(&mut self, numbers: usize, effects: &Effects) {
        // What accumulates is as wide as the residual stream.
        let hidden = self.hidden.width();
        let len = numbers + if effects.finishes { self.size.tokens * hidden } else { 0 };
        self.scratch.get_mut().reserve_ranks(len);
    }

    fn reserve_logits(&mut self, effects: &Effects) -> Result<()> {
        if self.logits.width() < effects.head_tokens {
            self.logits = Buffer::zeros(self.size.outputs, effects.head_tokens)?;
        }
        Ok(())
    }
}

/// Logits of some outputs of a step, each over its own vocabulary.
#[derive(Debug, Clone, Copy)]
pub struct Logits<'a> {
    numbers: &'a [f32],
    vocabulary: usize,
    /// Per output, where any has another one; 0 for the base's.
    own: Option<&'a [u32]>,
}

impl<'a> Logits<'a> {
    /// One after the other.
    pub fn numbers(&self) -> &'a [f32] {
        self.numbers
    }

    /// Output by output.
    pub fn rows(&self) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        let Self { mut numbers, vocabulary, own } = *self;
        let mut index = 0;
        std::iter::from_fn(move || {
            let width = width(vocabulary, own.and_then(|own| own.get(index)));
            let (row, rest) = numbers.split_at_checked(width)?;
            (index, numbers) = (index + 1, rest);
            Some(row)
        })
    }
}

fn width(vocabulary: usize, own: Option<&u32>) -> usize {
    own.map_or(vocabulary, |own| if *own == 0 { vocabulary } else { *own as usize })
}

/// Sees the residual stream as it enters a block: the block's number and the stream, `[tokens, hidden]`.
pub type Observe<'a> = &'a mut dyn FnMut(usize, &[f32]);

/// A base that computes.
pub struct Decoder {
    /// Of all layers, and of sliding ones where they have their own.
    frequencies: [Option<Frequencies>; 2],
    pool: Arc<Pool>,
    heartbeat: Arc<AtomicU64>,
}

impl Decoder {
    /// A decoder for bases of this architecture. `heartbeat` grows with every block computed.
    pub fn new(config: &ModelConfig, pool: Arc<Pool>, heartbeat: Arc<AtomicU64>) -> Self {
        let frequencies = [Some(&config.rope), config.sliding_rope.as_ref()];
        Self { frequencies: frequencies.map(|rope| rope.map(Frequencies::of)), pool, heartbeat }
    }

    /// Computes all blocks for a batch. Afterwards [`Self::logits`] gives the logits of its outputs.
    pub fn forward(
        &self,
        base: &FilledBase,
        cache: &mut KvCache,
        batch: &Batch,
        work: &mut Workspace,
        mut observe: Option<Observe<'_>>,
    ) -> Result<()> {
        let rows = batch.tokens();
        if rows > work.size.tokens {
            bail!("a step of {rows} tokens exceeds the {} it was made for", work.size.tokens);
        }
        for (frequencies, Angles { cos, sin }) in self.frequencies.iter().zip(&mut work.angles) {
            cos.clear();
            sin.clear();
            let Some(frequencies) = frequencies else { continue };
            for (query, length) in batch.queries.iter().zip(&batch.lengths) {
                frequencies.angles(query.position, *length, cos, sin);
            }
        }
        // Nothing is to be done where rows were submitted to this workspace.
        work.reserve_scratch(batch.scratch_len, &batch.effects);
        work.reserve_logits(&batch.effects)?;
        let blocks = cache.blocks();
        let config = &base.layout.config;
        let table = base.embedding();
        let own = batch.effects.embeddings.then_some(EmbeddingsOf { uses: &batch.uses });
        work.hidden.inplace_op1(&Embed {
            pool: &self.pool,
            table,
            width: config.hidden_size,
            tokens: &batch.tokens,
            scale: config.scale_embedding.then(|| embedding_scale(config.hidden_size, base.layout.dtype)),
            own: own.as_ref().map(|own| own as &dyn RowEmbeddings),
        })?;
        work.reserve_captures(batch.captures);
        let mut step = Step { decoder: self, base, batch, work, rows };
        for (index, layer) in base.layout.layers.iter().enumerate() {
            step.touch(index)?;
            step.rows = batch.tokens_at(index);
            let rows = step.rows;
            if rows == 0 {
                return Ok(());
            }
            let queries = &batch.queries[..rows];
            if let Some(observe) = &mut observe {
                work.hidden.with_numbers(|x| observe(index, &x[..rows * config.hidden_size]))?;
            }
            step.norm(&work.normed, &work.hidden, &layer.attention_norm, (index, NormSite::Attention))?;
            step.project(&work.qkv, &work.normed, (&layer.qkv, &layer.qkv_bias), (index, Site::Qkv), false)?;
            let [own_q, own_k] = [NormSite::Q, NormSite::K]
                .map(|site| NormsAt { uses: &batch.uses, site: Some((index, site)) });
            work.qkv.inplace_op1(&RotateAndStore {
                pool: &self.pool,
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                qk_norm: layer
                    .qk_norm
                    .as_ref()
                    .map(|(q, k)| (base.vector(q), base.vector(k), config.rms_norm_eps)),
                own_norms: batch.effects.norms.then_some((&own_q as &dyn RowNorms, &own_k as &dyn RowNorms)),
                rotary: step.rotary(index),
                cache: &blocks,
                layer: index,
                queries,
                tables: &batch.tables,
            })?;
            work.attended.inplace_op2(
                &work.qkv,
                &Attend {
                    pool: &self.pool,
                    cache: &blocks,
                    layer: index,
                    queries,
                    tables: &batch.tables,
                    scoring: Scoring {
                        scale: config.attention_scale,
                        soft_cap: config.attention_soft_cap,
                        window: config.window(index),
                    },
                },
            )?;
            let o = (&layer.o, &layer.o_bias);
            step.add(&work.attended, o, (index, Site::O), &layer.post_attention_norm)?;
            step.norm(&work.normed, &work.hidden, &layer.mlp_norm, (index, NormSite::Mlp))?;
            let gate_up = (&layer.gate_up, &layer.gate_up_bias);
            step.project(&work.gate_up, &work.normed, gate_up, (index, Site::GateUp), false)?;
            let activate = ActivateMul {
                pool: &self.pool,
                activation: config.activation,
                width: config.intermediate_size,
                rows,
            };
            work.activated.inplace_op2(&work.gate_up, &activate)?;
            let down = (&layer.down, &layer.down_bias);
            step.add(&work.activated, down, (index, Site::Down), &layer.post_mlp_norm)?;
            self.heartbeat.fetch_add(1, Ordering::Relaxed);
        }
        step.touch(base.layout.layers.len())
    }

    /// Computes the final norm and the logits of some outputs of the batch of the last [`Self::forward`], at most as
    /// many as the workspace holds, and hands both over: `[outputs, hidden]` and the logits.
    pub fn logits<T>(
        &self,
        base: &FilledBase,
        batch: &Batch,
        work: &Workspace,
        outputs: Range<usize>,
        read: impl FnOnce(&[f32], Logits<'_>) -> T,
    ) -> Result<T> {
        let rows = outputs.len();
        if rows > work.size.outputs {
            bail!("{rows} outputs exceed the {} a step was made for", work.size.outputs);
        }
        let layout = &base.layout;
        let tokens = &batch.outputs[outputs.clone()];
        let own = batch.effects.norms.then_some(NormsAt { uses: &batch.uses, site: None });
        work.outputs.inplace_op2(
            &work.hidden,
            &RmsNorm {
                pool: &self.pool,
                weight: base.vector(&layout.final_norm),
                eps: layout.config.rms_norm_eps,
                rows,
                sources: Some(tokens),
                accumulate: false,
                own: own.as_ref().map(|own| own as &dyn RowNorms),
            },
        )?;
        let step = Step { decoder: self, base, batch, work, rows };
        let numbers = step.heads(tokens)?;
        if let Some(cap) = layout.config.final_soft_cap {
            let has_own = batch.effects.head_tokens > 0;
            let (width, rows) = if has_own { (numbers, 1) } else { (layout.config.vocab_size, rows) };
            work.logits.inplace_op1(&SoftCap { pool: &self.pool, cap, width, rows })?;
        }
        let (hidden, vocabulary) = (layout.config.hidden_size, layout.config.vocab_size);
        let own = (batch.effects.head_tokens > 0).then(|| &batch.vocabularies[outputs]);
        work.outputs.with_numbers(|outputs| {
            work.logits.with_numbers(|logits| {
                read(&outputs[..rows * hidden], Logits { numbers: &logits[..numbers], vocabulary, own })
            })
        })?
    }
}

/// The square root of the width, rounded to the dtype of the weights as transformers rounds it
/// (<https://github.com/huggingface/transformers/pull/29402>).
fn embedding_scale(width: usize, dtype: Dtype) -> f32 {
    let scale = (width as f64).sqrt() as f32;
    match dtype {
        Dtype::F32 => scale,
        Dtype::BF16 => half::bf16::from_f32(scale).to_f32(),
        Dtype::F16 => half::f16::from_f32(scale).to_f32(),
    }
}

/// What the operations of one step share.
struct Step<'a> {
    decoder: &'a Decoder,
    base: &'a FilledBase,
    batch: &'a Batch,
    work: &'a Workspace,
    rows: usize,
}

impl Step<'_> {
    /// Lets rows write and read after this many blocks.
    fn touch(&self, boundary: usize) -> Result<()> {
        if self.batch.active.is_empty() {
            return Ok(());
        }
        self.work.hidden.inplace_op1(&Touch {
            rows: &self.batch.active,
            boundary: boundary as u32,
            width: self.base.layout.config.hidden_size,
            captured: &self.work.captured,
        })
    }

    fn norm(&self, to: &Buffer, from: &Buffer, weight: &Vector, site: (usize, NormSite)) -> Result<()> {
        self.rms_norm((to, from), weight, site, false)
    }

    fn rms_norm(
        &self,
        (to, from): (&Buffer, &Buffer),
        weight: &Vector,
        site: (usize, NormSite),
        accumulate: bool,
    ) -> Result<()> {
        let (weight, eps) = (self.base.vector(weight), self.base.layout.config.rms_norm_eps);
        let own = self.batch.effects.norms.then_some(NormsAt { uses: &self.batch.uses, site: Some(site) });
        let own = own.as_ref().map(|own| own as &dyn RowNorms);
        let pool = &self.decoder.pool;
        let norm = RmsNorm { pool, weight, eps, rows: self.rows, sources: None, accumulate, own };
        to.inplace_op2(from, &norm)
    }

    /// The angles of a layer's rotation.
    fn rotary(&self, layer: usize) -> Rotary<'_> {
        let config = &self.base.layout.config;
        let (rope, angles) = match (&config.sliding_rope, config.layer_kinds[layer]) {
            (Some(rope), LayerKind::Sliding) => (rope, &self.work.angles[1]),
            _ => (&config.rope, &self.work.angles[0]),
        };
        Rotary { dim: rope.rotary_dim, cos: &angles.cos, sin: &angles.sin }
    }

    /// Adds a projection to the residual stream, through a norm where the architecture has one.
    fn add(
        &self,
        from: &Buffer,
        weights: (&PackedMatrix, &Option<Vector>),
        site: (usize, Site),
        norm: &Option<Vector>,
    ) -> Result<()> {
        let work = self.work;
        let Some(norm) = norm else { return self.project(&work.hidden, from, weights, site, true) };
        self.project(&work.normed, from, weights, site, false)?;
        let after = if site.1 == Site::O { NormSite::PostAttention } else { NormSite::PostMlp };
        self.rms_norm((&work.hidden, &work.normed), norm, (site.0, after), true)
    }

    /// The logits of some tokens, one after the other; gives how many numbers that are. Neighbours with the same head
    /// are computed together.
    fn heads(&self, tokens: &[u32]) -> Result<usize> {
        let (uses, layout) = (self.batch.uses.as_slice(), &self.base.layout);
        let has_own = self.batch.effects.head_tokens > 0;
        let head = |token: &u32| if has_own { head_of(uses, *token as usize) } else { None };
        let (mut row_start, mut start) = (0, 0);
        while row_start < tokens.len() {
            let own = head(&tokens[row_start]);
            let same = |token: &&u32| {
                head(token).map(|(one, _)| Arc::as_ptr(&one.lens))
                    == own.map(|(one, _)| Arc::as_ptr(&one.lens))
            };
            let rows =
                if has_own { tokens[row_start..].iter().take_while(same).count() } else { tokens.len() };
            let weight = match own {
                Some((one, matrix)) => matrix.of(one.lens.region.bytes()),
                None => self.base.matrix(&layout.head),
            };
            let deltas = HeadDeltas { uses, tokens: &tokens[row_start..row_start + rows] };
            let project = Project {
                pool: &self.decoder.pool,
                linear: Linear { weight, bias: None, accumulate: false },
                deltas: &deltas,
                rows,
                row_start,
                start,
                scratch: &self.work.scratch,
            };
            self.work.logits.inplace_op2(&self.work.outputs, &project)?;
            start += rows * weight.shape.outputs;
            row_start += rows;
        }
        Ok(start)
    }

    fn project(
        &self,
        to: &Buffer,
        from: &Buffer,
        weights: (&PackedMatrix, &Option<Vector>),
        (layer, site): (usize, Site),
        accumulate: bool,
    ) -> Result<()> {
        // Rows that left the batch took their lenses along.
        let uses = self.batch.uses.partition_point(|one| one.token_start < self.rows);
        let scratch_len = self.batch.scratch_len;
        let deltas = SiteDeltas { uses: &self.batch.uses[..uses], layer, site, scratch_len };
        self.multiply(to, from, weights, &deltas, accumulate)
    }

    fn multiply(
        &self,
        to: &Buffer,
        from: &Buffer,
        (matrix, bias): (&PackedMatrix, &Option<Vector>),
        deltas: &dyn Deltas,
        accumulate: bool,
    ) -> Result<()> {
        let linear = Linear {
            weight: self.base.matrix(matrix),
            bias: bias.as_ref().map(|bias| self.base.vector(bias)),
            accumulate,
        };
        let project = Project {
            pool: &self.decoder.pool,
            linear,
            deltas,
            rows: self.rows,
            row_start: 0,
            start: 0,
            scratch: &self.work.scratch,
        };
        to.inplace_op2(from, &project)
    }
}
