//! Causal attention over a paged cache, with grouped heads.
//!
//! # A block of the cache
//! Sixteen positions of all layers. For every layer: for every KV head the keys as `[head_dim, 16]`, then for every KV
//! head the values as `[16, head_dim]`. So sixteen scores are one vector, and no product is summed across lanes.
//!
//! # Order
//! A query visits the positions it sees block by block from the first, keeping a running maximum and sum. Which blocks
//! those are follows from its own position and the layer's window; where they lie, and what else is in the batch, changes
//! nothing. Blocks before the window are not read.
#![allow(unsafe_code)]

use half::{bf16, f16};

use super::rows::cap_lanes;
use super::simd::{Element, Kernel, LANES, Simd, exp, launch, load_part, unroll};
use super::threads::Pool;
use crate::model::weights::Dtype;

/// Positions in a block.
pub const BLOCK_TOKENS: usize = 16;

/// The shape of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Decoder blocks of the model.
    pub layers: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Query heads per KV head.
    pub group: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Kind of numbers.
    pub dtype: Dtype,
}

impl CacheShape {
    /// Numbers that keys, and values, of one layer take in a block.
    fn half_layer(&self) -> usize {
        self.kv_heads * self.head_dim * BLOCK_TOKENS
    }

    /// Bytes of a block.
    pub fn block_bytes(&self) -> usize {
        self.layers * 2 * self.half_layer() * self.dtype.bytes()
    }

    /// Numbers of q, k and v of one token.
    pub fn qkv_width(&self) -> usize {
        (self.group + 2) * self.kv_heads * self.head_dim
    }

    fn q_width(&self) -> usize {
        self.group * self.kv_heads * self.head_dim
    }
}

/// Exclusive access to the blocks of a cache for one operation.
#[derive(Debug)]
pub struct CacheBlocks<'a> {
    shape: CacheShape,
    bytes: *mut u8,
    blocks: usize,
    lifetime: std::marker::PhantomData<&'a mut [u8]>,
}

// SAFETY: threads write disjoint positions, and no operation both writes and reads.
unsafe impl Sync for CacheBlocks<'_> {}

impl<'a> CacheBlocks<'a> {
    /// The blocks in `bytes`, which must be aligned for any number.
    pub fn new(shape: CacheShape, bytes: &'a mut [u8]) -> Self {
        assert_eq!(bytes.as_ptr() as usize % 64, 0, "the cache is aligned to a cache line");
        let blocks = bytes.len() / shape.block_bytes();
        Self { shape, bytes: bytes.as_mut_ptr(), blocks, lifetime: std::marker::PhantomData }
    }

    /// Where keys of a layer start in a block.
    fn keys<E>(&self, block: u32, layer: usize) -> *mut E {
        assert!((block as usize) < self.blocks && layer < self.shape.layers, "outside of the cache");
        // SAFETY: the block and layer exist.
        unsafe {
            self.bytes
                .add(block as usize * self.shape.block_bytes())
                .cast::<E>()
                .add(layer * 2 * self.shape.half_layer())
        }
    }

    /// Writes one token's keys and values. No two calls at a time may be for the same position.
    pub(crate) fn store(&self, layer: usize, block: u32, slot: usize, k: &[f32], v: &[f32]) {
        match self.shape.dtype {
            Dtype::F32 => self.store_as::<f32>(layer, block, slot, k, v),
            Dtype::BF16 => self.store_as::<bf16>(layer, block, slot, k, v),
            Dtype::F16 => self.store_as::<f16>(layer, block, slot, k, v),
        }
    }

    fn store_as<E: Element>(&self, layer: usize, block: u32, slot: usize, k: &[f32], v: &[f32]) {
        let width = self.shape.kv_heads * self.shape.head_dim;
        assert!(slot < BLOCK_TOKENS && k.len() == width && v.len() == width, "one token's keys and values");
        let keys = self.keys::<E>(block, layer);
        let head_dim = self.shape.head_dim;
        for i in 0..width {
            let head = i / head_dim;
            // SAFETY: inside this layer of this block; the slot is this call's alone.
            unsafe {
                *keys.add(i * BLOCK_TOKENS + slot) = E::from_f32(k[i]);
                let values = keys.add(self.shape.half_layer());
                *values.add((head * BLOCK_TOKENS + slot) * head_dim + i % head_dim) = E::from_f32(v[i]);
            }
        }
    }
}

/// One query token of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Query {
    /// Its position in its sequence; it sees positions up to and with this one.
    pub position: u32,
    /// Where its row's block table starts in the step's list of blocks.
    pub table_start: u32,
}

/// How a layer scores positions, and which of them it sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scoring {
    /// Multiplies the product of query and key.
    pub scale: f32,
    /// Scores become `cap · tanh(score / cap)`.
    pub soft_cap: Option<f32>,
    /// Positions that a query sees, its own included; all when absent.
    pub window: Option<u32>,
}

/// Attention of all queries of a step at one layer. `qkv` has each token's q, k and v, already rotated; keys and values of
/// the step are in the cache. `out` gets `[tokens, heads * head_dim]`.
pub fn attention(
    pool: &Pool,
    cache: &CacheBlocks<'_>,
    (layer, scoring): (usize, Scoring),
    queries: &[Query],
    tables: &[u32],
    qkv: &[f32],
    out: &mut [f32],
) {
    assert_ne!(scoring.window, Some(0), "a query sees itself");
    let shape = cache.shape;
    assert!(qkv.len() >= queries.len() * shape.qkv_width(), "qkv is too short");
    assert!(out.len() >= queries.len() * shape.q_width(), "out is too short");
    assert!(shape.head_dim <= MAX_HEAD_DIM, "heads are at most {MAX_HEAD_DIM} wide");
    let to = Out(out.as_mut_ptr());
    // One item is one KV head of one token; long ones first or last, threads take them as they come.
    let items = queries.len() * shape.kv_heads;
    let chunk = (items / (pool.threads() * 8)).max(1);
    pool.run(items.div_ceil(chunk), &|task| {
        for item in task * chunk..((task + 1) * chunk).min(items) {
            let (token, kv_head) = (item / shape.kv_heads, item % shape.kv_heads);
            let query = queries[token];
            let position = query.position as usize;
            let first = scoring.window.map_or(0, |window| (position + 1).saturating_sub(window as usize));
            let blocks = first / BLOCK_TOKENS..position / BLOCK_TOKENS + 1;
            let table = &tables[query.table_start as usize..][blocks];
            // Positions from here on count from the first block that is seen.
            let skipped = first / BLOCK_TOKENS * BLOCK_TOKENS;
            let mut head = kv_head * shape.group;
            let end = head + shape.group;
            while head < end {
                // Heads that share keys are scored together, as many as stay in registers.
                let heads = match end - head {
                    n if n >= 4 => 4,
                    n if n >= 2 => 2,
                    _ => 1,
                };
                // SAFETY: the token's heads exist; they are written by this item alone.
                let (q, out) = unsafe {
                    (
                        qkv.as_ptr().add(token * shape.qkv_width() + head * shape.head_dim),
                        to.get().add(token * shape.q_width() + head * shape.head_dim),
                    )
                };
                launch(Heads {
                    cache,
                    layer,
                    kv_head,
                    table,
                    first: first - skipped,
                    position: position - skipped,
                    scoring,
                    q,
                    out,
                    heads,
                });
                head += heads;
            }
        }
    });
}

const MAX_HEAD_DIM: usize = 1024;

struct Out(*mut f32);
// SAFETY: every item writes its own heads.
unsafe impl Sync for Out {}
impl Out {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// Some heads of one query that share a KV head.
struct Heads<'a> {
    cache: &'a CacheBlocks<'a>,
    layer: usize,
    kv_head: usize,
    /// The blocks it sees.
    table: &'a [u32],
    /// The first position it sees, and its own, both from the start of the first block.
    first: usize,
    position: usize,
    scoring: Scoring,
    q: *const f32,
    out: *mut f32,
    heads: usize,
}

impl Kernel for Heads<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `attention` checked the shapes.
        unsafe {
            match self.cache.shape.dtype {
                Dtype::F32 => self.count::<S, f32>(),
                Dtype::BF16 => self.count::<S, bf16>(),
                Dtype::F16 => self.count::<S, f16>(),
            }
        }
    }
}

impl Heads<'_> {
    #[inline(always)]
    unsafe fn count<S: Simd, E: Element>(&self) {
        // SAFETY: as above.
        unsafe {
            match self.heads {
                4 => self.visit::<S, E, 4>(),
                2 => self.visit::<S, E, 2>(),
                _ => self.visit::<S, E, 1>(),
            }
        }
    }

    #[inline(always)]
    #[allow(
        clippy::needless_range_loop,
        reason = "plain counted loops are what unrolls under target features"
    )]
    unsafe fn visit<S: Simd, E: Element, const G: usize>(&self) {
        let shape = self.cache.shape;
        let d = shape.head_dim;
        let Scoring { scale, soft_cap, .. } = self.scoring;
        let mut maxima = [f32::NEG_INFINITY; G];
        let mut sums = [0.0_f32; G];
        // SAFETY: q and out have G heads of width d; every block of the table holds this layer and head.
        unsafe {
            for i in 0..G * d {
                *self.out.add(i) = 0.0;
            }
            for (index, &block) in self.table.iter().enumerate() {
                let seen = (self.position + 1 - index * BLOCK_TOKENS).min(BLOCK_TOKENS);
                let from = if index == 0 { self.first } else { 0 };
                let layer = self.cache.keys::<E>(block, self.layer).cast_const();
                let keys = layer.add(self.kv_head * d * BLOCK_TOKENS);
                let values = layer.add(shape.half_layer() + self.kv_head * d * BLOCK_TOKENS);

                let mut scores = [S::splat(0.0); G];
                for i in 0..d {
                    let k = E::load::<S>(keys.add(i * BLOCK_TOKENS));
                    unroll!(H < G {
                        scores[H] = S::mul_add(S::splat(*self.q.add(H * d + i)), k, scores[H]);
                    });
                }
                let mut weights = [[0.0_f32; LANES]; G];
                let mut keep = [0.0_f32; G];
                for g in 0..G {
                    let w = &mut weights[g];
                    S::store(w.as_mut_ptr(), S::mul(scores[g], S::splat(scale)));
                    if let Some(cap) = soft_cap {
                        cap_lanes(w, cap);
                    }
                    // What lies behind the query in its block was never written, or by another row.
                    for t in 0..LANES {
                        w[t] = if from <= t && t < seen { w[t] } else { f32::NEG_INFINITY };
                    }
                    let mut max = maxima[g];
                    for t in 0..LANES {
                        max = if w[t] > max { w[t] } else { max };
                    }
                    for t in 0..LANES {
                        w[t] -= max;
                    }
                    exp(w);
                    let mut old = [maxima[g] - max; LANES];
                    exp(&mut old);
                    keep[g] = old[0];
                    let mut sum = 0.0;
                    for t in 0..LANES {
                        sum += w[t];
                    }
                    sums[g] = sums[g] * keep[g] + sum;
                    maxima[g] = max;
                }
                let mut i = 0;
                while i + LANES <= d {
                    let mut out = [S::splat(0.0); G];
                    unroll!(H < G {
                        out[H] = S::mul(S::load(self.out.add(H * d + i)), S::splat(keep[H]));
                    });
                    for t in from..seen {
                        let v = E::load::<S>(values.add(t * d + i));
                        unroll!(H < G {
                            out[H] = S::mul_add(S::splat(weights[H][t]), v, out[H]);
                        });
                    }
                    unroll!(H < G {
                        S::store(self.out.add(H * d + i), out[H]);
                    });
                    i += LANES;
                }
                if i < d {
                    let lanes = d - i;
                    for g in 0..G {
                        let at = self.out.add(g * d + i);
                        let mut out = S::mul(load_part::<S, f32>(at, lanes), S::splat(keep[g]));
                        for t in from..seen {
                            let v = load_part::<S, E>(values.add(t * d + i), lanes);
                            out = S::mul_add(S::splat(weights[g][t]), v, out);
                        }
                        let mut part = [0.0; LANES];
                        S::store(part.as_mut_ptr(), out);
                        std::ptr::copy_nonoverlapping(part.as_ptr(), at, lanes);
                    }
                }
            }
            for g in 0..G {
                let norm = 1.0 / sums[g];
                for i in 0..d {
                    *self.out.add(g * d + i) *= norm;
                }
            }
        }
    }
}
