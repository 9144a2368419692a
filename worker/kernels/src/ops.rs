//! The kernels as candle's in-place operations on preallocated activations.
//!
//! An operation captures what is not an activation (weights, deltas, cache, the step's metadata) by reference into
//! our own memory, and works on the first `rows` rows of its tensors. Another device adds its side to these, and the
//! decoder above stays the same.

use candle_core::{CpuStorage, InplaceOp1, InplaceOp2, Layout, Result, bail};

use super::attention::{BLOCK_TOKENS, CacheBlocks, Query, Scoring, attention};
use super::matmul::{Deltas, Linear, Packed, Scratch, Weight, linear};
use super::rows::{
    activate_mul, add_rms_norm, each_row, rms_norm, rms_norm_in_place, rotate, soft_cap, widen,
};
use crate::number::Activation;
use turret_threads::Pool;

fn read<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&data[start..end]),
        _ => bail!("activations are contiguous f32"),
    }
}

fn write<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match (storage, layout.contiguous_offsets()) {
        (CpuStorage::F32(data), Some((start, end))) => Ok(&mut data[start..end]),
        _ => bail!("activations are contiguous f32"),
    }
}

/// What embeddings are looked up in.
#[derive(Debug, Clone, Copy)]
pub enum Table<'a> {
    /// One row per token id.
    Rows(Weight<'a>),
    /// The head's matrix, one output per token id.
    Packed(Packed<'a>),
}

/// Norms that some rows of a step have in place of the base's.
pub trait RowNorms: Sync {
    /// The row's own.
    fn of(&self, row: usize) -> Option<&[f32]>;
}

/// Embeddings of rows that have their own.
pub trait RowEmbeddings: Sync {
    /// The row's own table.
    fn table(&self, row: usize) -> Option<Weight<'_>>;
    /// Adds the row's own deltas of a token.
    fn add(&self, row: usize, token: usize, y: &mut [f32]);
}

/// `y[i] = table[tokens[i]] * scale`.
pub struct Embed<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// One embedding per token id.
    pub table: Table<'a>,
    /// Width of a row.
    pub width: usize,
    /// What to look up.
    pub tokens: &'a [u32],
    /// Multiplies every embedding, where the architecture has it so.
    pub scale: Option<f32>,
    /// When some rows have their own.
    pub own: Option<&'a dyn RowEmbeddings>,
}

impl InplaceOp1 for Embed<'_> {
    fn name(&self) -> &'static str {
        "embed"
    }

    fn cpu_fwd(&self, y: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let y = write(y, layout)?;
        each_row(self.pool, y, self.width, self.tokens.len(), |i, y| {
            let token = self.tokens[i] as usize;
            match (self.own.and_then(|own| own.table(i)), self.table) {
                (Some(own), _) => widen(own, token, y),
                (None, Table::Rows(table)) => widen(table, token, y),
                (None, Table::Packed(table)) => table.row(token, y),
            }
            if let Some(own) = self.own {
                own.add(i, token, y);
            }
            if let Some(scale) = self.scale {
                y.iter_mut().for_each(|y| *y *= scale);
            }
        });
        Ok(())
    }
}

/// `y[i] = norm(x[source(i)])`, or added to what is there.
pub struct RmsNorm<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// One number per column.
    pub weight: &'a [f32],
    /// Added to the mean of squares.
    pub eps: f32,
    /// Rows of y.
    pub rows: usize,
    /// Which row of x each row of y is made from; the same row when absent.
    pub sources: Option<&'a [u32]>,
    /// Add to what is in y, instead of replacing it.
    pub accumulate: bool,
    /// When some rows of x have their own weight.
    pub own: Option<&'a dyn RowNorms>,
}

impl InplaceOp2 for RmsNorm<'_> {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(&self, y: &mut CpuStorage, yl: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        let (x, y) = (read(x, xl)?, write(y, yl)?);
        let width = self.weight.len();
        each_row(self.pool, y, width, self.rows, |i, y| {
            let from = self.sources.map_or(i, |sources| sources[i] as usize);
            let weight = self.own.and_then(|own| own.of(from)).unwrap_or(self.weight);
            let x = &x[from * width..(from + 1) * width];
            match self.accumulate {
                true => add_rms_norm(x, weight, self.eps, y),
                false => rms_norm(x, weight, self.eps, y),
            }
        });
        Ok(())
    }
}

/// `y = x Wᵀ + b` and the rows' deltas.
pub struct Project<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Weights.
    pub linear: Linear<'a>,
    /// The rows' own deltas.
    pub deltas: &'a dyn Deltas,
    /// Rows of x and y.
    pub rows: usize,
    /// First row of x.
    pub row_start: usize,
    /// First number of y.
    pub start: usize,
    /// Room to work in.
    pub scratch: &'a std::cell::RefCell<Scratch>,
}

impl InplaceOp2 for Project<'_> {
    fn name(&self) -> &'static str {
        "project"
    }

    fn cpu_fwd(&self, y: &mut CpuStorage, yl: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        let (x, y) = (read(x, xl)?, write(y, yl)?);
        let (x, y) = (&x[self.row_start * self.linear.weight.shape.inputs..], &mut y[self.start..]);
        linear(self.pool, self.linear, self.deltas, x, y, self.rows, &mut self.scratch.borrow_mut());
        Ok(())
    }
}

/// The angles of a step's tokens.
#[derive(Debug, Clone, Copy)]
pub struct Rotary<'a> {
    /// Leading dimensions of a head that are rotated.
    pub dim: usize,
    /// `[tokens, dim / 2]`.
    pub cos: &'a [f32],
    /// `[tokens, dim / 2]`.
    pub sin: &'a [f32],
}

/// Norms and rotates q and k in place, and puts k and v into the cache.
pub struct RotateAndStore<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Query heads.
    pub heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Norms on every head of q and of k, with their epsilon.
    pub qk_norm: Option<(&'a [f32], &'a [f32], f32)>,
    /// When some rows have their own of q and of k.
    pub own_norms: Option<(&'a dyn RowNorms, &'a dyn RowNorms)>,
    /// Angles.
    pub rotary: Rotary<'a>,
    /// Where keys and values go.
    pub cache: &'a CacheBlocks<'a>,
    /// Which layer of the cache.
    pub layer: usize,
    /// Positions of the tokens.
    pub queries: &'a [Query],
    /// Block tables of the rows.
    pub tables: &'a [u32],
}

impl<'a> InplaceOp1 for RotateAndStore<'a> {
    fn name(&self) -> &'static str {
        "rotate-and-store"
    }

    fn cpu_fwd(&self, qkv: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let qkv = write(qkv, layout)?;
        let (d, half) = (self.head_dim, self.rotary.dim / 2);
        let (q, kv) = (self.heads * d, self.kv_heads * d);
        each_row(self.pool, qkv, q + 2 * kv, self.queries.len(), |token, qkv| {
            let (rotated, v) = qkv.split_at_mut(q + kv);
            let (cos, sin) =
                (&self.rotary.cos[token * half..][..half], &self.rotary.sin[token * half..][..half]);
            let norms = self.qk_norm.map(|(q, k, eps)| {
                let own = |norms: &'a dyn RowNorms, base| norms.of(token).unwrap_or(base);
                self.own_norms.map_or((q, k, eps), |(own_q, own_k)| (own(own_q, q), own(own_k, k), eps))
            });
            for (index, head) in rotated.chunks_exact_mut(d).enumerate() {
                if let Some((q_norm, k_norm, eps)) = norms {
                    rms_norm_in_place(head, if index < self.heads { q_norm } else { k_norm }, eps);
                }
                rotate(&mut head[..2 * half], cos, sin);
            }
            let Query { position, table_start } = self.queries[token];
            let (block, slot) = (position as usize / BLOCK_TOKENS, position as usize % BLOCK_TOKENS);
            self.cache.store(self.layer, self.tables[table_start as usize + block], slot, &rotated[q..], v);
        });
        Ok(())
    }
}

/// Attention of every token over its own row's cache.
pub struct Attend<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// Keys and values.
    pub cache: &'a CacheBlocks<'a>,
    /// Which layer of the cache.
    pub layer: usize,
    /// Positions of the tokens.
    pub queries: &'a [Query],
    /// Block tables of the rows.
    pub tables: &'a [u32],
    /// How positions are scored, and which are seen.
    pub scoring: Scoring,
}

impl InplaceOp2 for Attend<'_> {
    fn name(&self) -> &'static str {
        "attend"
    }

    fn cpu_fwd(&self, out: &mut CpuStorage, ol: &Layout, qkv: &CpuStorage, ql: &Layout) -> Result<()> {
        let (qkv, out) = (read(qkv, ql)?, write(out, ol)?);
        attention(self.pool, self.cache, (self.layer, self.scoring), self.queries, self.tables, qkv, out);
        Ok(())
    }
}

/// `y = activation(gate) * up`, from gate and up side by side.
pub struct ActivateMul<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// The nonlinearity.
    pub activation: Activation,
    /// Width of y.
    pub width: usize,
    /// Rows.
    pub rows: usize,
}

impl InplaceOp2 for ActivateMul<'_> {
    fn name(&self) -> &'static str {
        "activate-mul"
    }

    fn cpu_fwd(&self, y: &mut CpuStorage, yl: &Layout, x: &CpuStorage, xl: &Layout) -> Result<()> {
        let (x, y) = (read(x, xl)?, write(y, yl)?);
        each_row(self.pool, y, self.width, self.rows, |i, y| {
            let (gate, up) = x[i * 2 * self.width..][..2 * self.width].split_at(self.width);
            activate_mul(self.activation, gate, up, y);
        });
        Ok(())
    }
}

/// `y = cap · tanh(y / cap)`.
pub struct SoftCap<'a> {
    /// Threads.
    pub pool: &'a Pool,
    /// The cap.
    pub cap: f32,
    /// Width of y.
    pub width: usize,
    /// Rows.
    pub rows: usize,
}

impl InplaceOp1 for SoftCap<'_> {
    fn name(&self) -> &'static str {
        "soft-cap"
    }

    fn cpu_fwd(&self, y: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let y = write(y, layout)?;
        each_row(self.pool, y, self.width, self.rows, |_, y| soft_cap(y, self.cap));
        Ok(())
    }
}
