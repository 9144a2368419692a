//! Causal attention over a paged cache, with grouped heads.
//!
//! # A block of the cache
//! Sixteen positions of all layers. For every layer: for every KV head the keys as `[head_dim, 16]`, then for every KV
//! head the values as `[16, head_dim]`. So sixteen scores are one vector, and no product is summed across lanes.
//!
//! # Order
//! A query visits the positions it sees in stretches of eight blocks, counted from the first position of its row: the scores
//! of a stretch, its maximum and sum, then its weighted values, position by position. So what a query adds in which
//! order follows from its own position and the layer's window; where blocks lie, and what else is in the batch, changes nothing.
//! Blocks before the window are not read.
//!
//! # Sharing
//! A *line* is one head of one query. Lines of the same row and KV head go through the stretches together, and as many as stay in
//! registers share every key and value that is loaded. A value that only some of them see is added to those alone.
#![allow(unsafe_code)]

#[cfg(test)]
mod tests;

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use half::{bf16, f16};

use super::rows::cap_lanes;
use super::simd::{Element, Kernel, LANES, Simd, exp, launch, load_part};
use crate::number::Dtype;
use turret_threads::Pool;

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
    pub fn store(&self, layer: usize, block: u32, slot: usize, k: &[f32], v: &[f32]) {
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

/// Blocks that share one maximum.
const STRETCH_BLOCKS: usize = 8;
/// Positions of such a stretch.
const STRETCH: usize = STRETCH_BLOCKS * BLOCK_TOKENS;
/// Lines of a tile: with two registers of 256 bits for each sum and for a key or value, six fill sixteen.
const TILE: usize = 6;
/// Where there are thirty-two registers of 512 bits, eight keep enough sums under way.
const WIDE_TILE: usize = 8;
/// Lines that go through the cache together, so that a stretch is still near when the next tile wants it.
const PACK: usize = 48;
/// Queries that a thread takes together when there are enough for all threads.
const QUERIES: usize = 4;
const MAX_HEAD_DIM: usize = 1024;

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
    let together = if queries.len() >= 8 * QUERIES * pool.threads() { QUERIES } else { 1 };
    // One item is one KV head of some queries; long ones first or last, threads take them as they come.
    let items = queries.len().div_ceil(together) * shape.kv_heads;
    let chunk = (items / (pool.threads() * 8)).max(1);
    pool.run(items.div_ceil(chunk), &|task| {
        for item in task * chunk..((task + 1) * chunk).min(items) {
            let (group, kv_head) = (item / shape.kv_heads, item % shape.kv_heads);
            let last = ((group + 1) * together).min(queries.len());
            let mut token = group * together;
            while token < last {
                let query = queries[token];
                let follows = |(i, next): &(usize, &Query)| {
                    let position = query.position + *i as u32;
                    **next == Query { position, ..query }
                };
                let run = queries[token..last].iter().enumerate().take_while(follows).count();
                let table = &tables[query.table_start as usize..];
                let position = query.position as usize;
                assert!((position + run).div_ceil(BLOCK_TOKENS) <= table.len(), "the table is too short");
                let head = kv_head * shape.group * shape.head_dim;
                // SAFETY: the tokens' heads exist; they are written by this item alone.
                let (q, out) = unsafe {
                    (
                        qkv.as_ptr().add(token * shape.qkv_width() + head),
                        to.get().add(token * shape.q_width() + head),
                    )
                };
                launch(Run { cache, layer, kv_head, table, position, queries: run, scoring, q, out });
                token += run;
            }
        }
    });
}

struct Out(*mut f32);
// SAFETY: every item writes its own heads.
unsafe impl Sync for Out {}
impl Out {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// The heads of some consecutive queries that share a KV head.
struct Run<'a> {
    cache: &'a CacheBlocks<'a>,
    layer: usize,
    kv_head: usize,
    /// The blocks of the row.
    table: &'a [u32],
    /// Of the first query.
    position: usize,
    queries: usize,
    scoring: Scoring,
    /// The first query's first head, and where its result goes.
    q: *const f32,
    out: *mut f32,
}

impl Kernel for Run<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `attention` checked the shapes.
        unsafe {
            match self.cache.shape.dtype {
                Dtype::F32 => self.packs::<S, f32>(),
                Dtype::BF16 => self.packs::<S, bf16>(),
                Dtype::F16 => self.packs::<S, f16>(),
            }
        }
    }
}

impl Run<'_> {
    #[inline(always)]
    unsafe fn packs<S: Simd, E: Element>(&self) {
        let all = self.queries * self.cache.shape.group;
        let mut lines = [Line::NONE; PACK];
        for first in (0..all).step_by(PACK) {
            let lines = &mut lines[..PACK.min(all - first)];
            // SAFETY: the lines exist.
            unsafe {
                self.begin(first, lines);
                self.visit::<S, E>(lines);
                self.end(lines);
            }
        }
    }

    /// Lines from the first one on.
    #[inline(always)]
    unsafe fn begin(&self, first_line: usize, lines: &mut [Line]) {
        let (shape, d) = (self.cache.shape, self.cache.shape.head_dim);
        for (line, index) in lines.iter_mut().zip(first_line..) {
            let (query, head) = (index / shape.group, index % shape.group);
            let end = self.position + query + 1;
            let first = self.scoring.window.map_or(0, |window| end.saturating_sub(window as usize));
            // SAFETY: the query and its head exist.
            unsafe {
                let q = self.q.add(query * shape.qkv_width() + head * d);
                let out = self.out.add(query * shape.q_width() + head * d);
                for i in 0..d {
                    *out.add(i) = 0.0;
                }
                *line = Line { q, out, first, end, max: f32::NEG_INFINITY, sum: 0.0 };
            }
        }
    }

    #[inline(always)]
    unsafe fn end(&self, lines: &[Line]) {
        for line in lines {
            let norm = 1.0 / line.sum;
            // SAFETY: as above.
            let out = unsafe { std::slice::from_raw_parts_mut(line.out, self.cache.shape.head_dim) };
            out.iter_mut().for_each(|out| *out *= norm);
        }
    }

    /// Goes through all stretches that any line sees. Lines are cut into tiles: as few as can be, and as equal.
    #[inline(always)]
    unsafe fn visit<S: Simd, E: Element>(&self, lines: &mut [Line]) {
        let tiles = lines.len().div_ceil(if S::WIDE { WIDE_TILE } else { TILE });
        // Later lines see no earlier positions, and earlier ones no later.
        let (lowest, highest) = (lines[0].first, lines[lines.len() - 1].end);
        for start in (lowest / STRETCH * STRETCH..highest).step_by(STRETCH) {
            for tile in 0..tiles {
                let (first, last) = (lines.len() * tile / tiles, lines.len() * (tile + 1) / tiles);
                let lines = &mut lines[first..last];
                // SAFETY: the lines exist. Few of them take several vectors at a time, so that enough sums are under way.
                unsafe {
                    match lines.len() {
                        1 => S::call(Tile::<E, 1, 4>::new(self, lines, start)),
                        2 => S::call(Tile::<E, 2, 2>::new(self, lines, start)),
                        3 => S::call(Tile::<E, 3, 1>::new(self, lines, start)),
                        4 => S::call(Tile::<E, 4, 1>::new(self, lines, start)),
                        5 => S::call(Tile::<E, 5, 1>::new(self, lines, start)),
                        6 => S::call(Tile::<E, 6, 1>::new(self, lines, start)),
                        7 if S::WIDE => S::call(Tile::<E, 7, 1>::new(self, lines, start)),
                        8 if S::WIDE => S::call(Tile::<E, 8, 1>::new(self, lines, start)),
                        _ => unreachable!("a tile has at most as many lines"),
                    }
                }
            }
        }
    }

    /// Where keys, or values, of a block start.
    #[inline(always)]
    unsafe fn half<E: Element>(&self, block: usize, half: usize) -> *const E {
        let shape = self.cache.shape;
        // SAFETY: `attention` checked that the table is long enough; the rest is inside of the block.
        unsafe {
            let layer = self.cache.keys::<E>(*self.table.get_unchecked(block), self.layer).cast_const();
            layer.add(half * shape.half_layer() + self.kv_head * shape.head_dim * BLOCK_TOKENS)
        }
    }
}

/// One head of one query.
#[derive(Clone, Copy)]
struct Line {
    q: *const f32,
    out: *mut f32,
    /// The positions it sees.
    first: usize,
    end: usize,
    /// Largest score, and sum of weights, of the stretches so far.
    max: f32,
    sum: f32,
}

impl Line {
    const NONE: Self =
        Self { q: std::ptr::null(), out: std::ptr::null_mut(), first: 0, end: 0, max: 0.0, sum: 0.0 };

    /// What it sees of some positions.
    #[inline(always)]
    fn sees(&self, start: usize, end: usize) -> Range<usize> {
        self.first.max(start)..self.end.min(end)
    }
}

/// M lines at one stretch, with N vectors of each at a time.
struct Tile<'a, E, const M: usize, const N: usize> {
    run: &'a Run<'a>,
    lines: &'a mut [Line; M],
    /// Where the stretch starts.
    start: usize,
    element: PhantomData<E>,
}

impl<'a, E: Element, const M: usize, const N: usize> Tile<'a, E, M, N> {
    #[inline(always)]
    fn new(run: &'a Run<'a>, lines: &'a mut [Line], start: usize) -> Self {
        Self { run, lines: lines.try_into().expect("as many lines"), start, element: PhantomData }
    }
}

impl<E: Element, const M: usize, const N: usize> Kernel for Tile<'_, E, M, N> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { run, lines, start, .. } = self;
        let d = run.cache.shape.head_dim;
        let (first, end) = (lines[0].first.max(start), lines[M - 1].end.min(start + STRETCH));
        if first >= end {
            return;
        }
        let mut weights = [MaybeUninit::<[f32; STRETCH]>::uninit(); M];
        // SAFETY: every q and out has d numbers. Blocks of positions that any line sees were written; weights are read where
        // they were written.
        unsafe {
            let weights = weights.as_mut_ptr().cast::<f32>();
            let blocks = first / BLOCK_TOKENS..end.div_ceil(BLOCK_TOKENS);
            let mut block = blocks.start;
            while block + N <= blocks.end {
                score::<S, E, M, N>(run, lines, block, weights.add(block * BLOCK_TOKENS - start));
                block += N;
            }
            while block < blocks.end {
                score::<S, E, M, 1>(run, lines, block, weights.add(block * BLOCK_TOKENS - start));
                block += 1;
            }
            let (mut from, mut to) = (start, end);
            for (r, line) in lines.iter_mut().enumerate() {
                let seen = line.sees(start, end);
                (from, to) = (from.max(seen.start), to.min(seen.end));
                if !seen.is_empty() {
                    let weights = weights.add(r * STRETCH + blocks.start * BLOCK_TOKENS - start);
                    let weights =
                        std::slice::from_raw_parts_mut(weights.cast::<[f32; LANES]>(), blocks.len());
                    let position = blocks.start * BLOCK_TOKENS;
                    S::call(Weigh { weights, position, seen, soft_cap: run.scoring.soft_cap, line, d });
                }
            }
            // What some lines see and others do not is before what all see, and behind it.
            let to = to.max(from);
            for (r, line) in lines.iter().enumerate() {
                let seen = line.sees(start, end);
                let weights = weights.add(r * STRETCH);
                let positions = seen.start..seen.end.min(from);
                S::call(Add::<E, 1, 4> {
                    run,
                    lines: &[*line],
                    start,
                    weights,
                    positions,
                    element: PhantomData,
                });
            }
            S::call(Add::<E, M, N> { run, lines, start, weights, positions: from..to, element: PhantomData });
            for (r, line) in lines.iter().enumerate() {
                let seen = line.sees(start, end);
                let weights = weights.add(r * STRETCH);
                let positions = seen.start.max(to)..seen.end;
                S::call(Add::<E, 1, 4> {
                    run,
                    lines: &[*line],
                    start,
                    weights,
                    positions,
                    element: PhantomData,
                });
            }
        }
    }
}

/// Scores of M lines for N blocks: products of queries and keys, times the scale. Meanwhile it asks memory for the blocks'
/// values and for the keys that follow: blocks lie far from each other, which the hardware does not foresee.
#[inline(always)]
#[allow(clippy::needless_range_loop, reason = "counted loops are what unrolls under target features")]
unsafe fn score<S: Simd, E: Element, const M: usize, const N: usize>(
    run: &Run<'_>,
    lines: &[Line; M],
    block: usize,
    to: *mut f32,
) {
    // SAFETY: the caller's contract: blocks and lines exist, and there is a place for every score.
    unsafe {
        let [mut keys, mut values, mut ahead] = [[std::ptr::null::<E>(); N]; 3];
        for n in 0..N {
            keys[n] = run.half::<E>(block + n, 0);
            values[n] = run.half::<E>(block + n, 1);
            ahead[n] = run.half::<E>((block + N + n).min(run.table.len() - 1), 0);
        }
        let mut q = [std::ptr::null::<f32>(); M];
        for r in 0..M {
            q[r] = lines[r].q;
        }
        let mut scores = [[S::splat(0.0); N]; M];
        for i in 0..run.cache.shape.head_dim {
            let mut k = [S::splat(0.0); N];
            for n in 0..N {
                k[n] = E::load::<S>(keys[n]);
                S::prefetch(values[n].cast());
                S::prefetch(ahead[n].cast());
                keys[n] = keys[n].add(BLOCK_TOKENS);
                values[n] = values[n].add(BLOCK_TOKENS);
                ahead[n] = ahead[n].add(BLOCK_TOKENS);
            }
            for r in 0..M {
                let q = S::splat(*q[r].add(i));
                for n in 0..N {
                    scores[r][n] = S::mul_add(q, k[n], scores[r][n]);
                }
            }
        }
        let scale = S::splat(run.scoring.scale);
        for r in 0..M {
            for n in 0..N {
                S::store(to.add(r * STRETCH + n * BLOCK_TOKENS), S::mul(scores[r][n], scale));
            }
        }
    }
}

/// From a line's scores at a stretch of positions to what values are multiplied by.
struct Weigh<'a> {
    /// Block by block.
    weights: &'a mut [[f32; LANES]],
    /// The first one's.
    position: usize,
    /// What the line sees of them.
    seen: Range<usize>,
    soft_cap: Option<f32>,
    /// Its results so far are scaled to the new maximum.
    line: &'a mut Line,
    d: usize,
}

impl Kernel for Weigh<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { weights, position, seen, soft_cap, line, d } = self;
        let mut largest = [f32::NEG_INFINITY; LANES];
        for (block, w) in weights.iter_mut().enumerate() {
            if let Some(cap) = soft_cap {
                cap_lanes(w, cap);
            }
            let position = position + block * BLOCK_TOKENS;
            if position < seen.start || position + BLOCK_TOKENS > seen.end {
                // What lies behind the query in its block was never written, or by another row.
                for (t, w) in w.iter_mut().enumerate() {
                    *w = if seen.contains(&(position + t)) { *w } else { f32::NEG_INFINITY };
                }
            }
            for (largest, w) in largest.iter_mut().zip(w) {
                *largest = if *w > *largest { *w } else { *largest };
            }
        }
        let mut max = line.max;
        for largest in largest {
            max = if largest > max { largest } else { max };
        }
        let mut lanes = [0.0_f32; LANES];
        for w in weights {
            w.iter_mut().for_each(|w| *w -= max);
            exp(w);
            lanes.iter_mut().zip(w).for_each(|(lane, w)| *lane += *w);
        }
        let mut keep = [line.max - max; LANES];
        exp(&mut keep);
        (line.max, line.sum) = (max, line.sum * keep[0] + lanes.iter().sum::<f32>());
        // SAFETY: the line has d results.
        let out = unsafe { std::slice::from_raw_parts_mut(line.out, d) };
        out.iter_mut().for_each(|out| *out *= keep[0]);
    }
}

/// Adds the weighted values of some positions to the results of M lines, N vectors at a time.
struct Add<'a, E, const M: usize, const N: usize> {
    run: &'a Run<'a>,
    lines: &'a [Line; M],
    /// Position of the first weight.
    start: usize,
    /// `[M, STRETCH]`.
    weights: *const f32,
    positions: Range<usize>,
    element: PhantomData<E>,
}

impl<E: Element, const M: usize, const N: usize> Kernel for Add<'_, E, M, N> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        if self.positions.is_empty() {
            return;
        }
        let d = self.run.cache.shape.head_dim;
        let mut i = 0;
        // SAFETY: the caller's contract: the results have d numbers.
        unsafe {
            while i + N * LANES <= d {
                self.vectors::<S, N>(i);
                i += N * LANES;
            }
            while i < d {
                self.vectors::<S, 1>(i);
                i += LANES;
            }
        }
    }
}

impl<E: Element, const M: usize, const N: usize> Add<'_, E, M, N> {
    /// V vectors of the results, from number `i` on; or a last part of one.
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "counted loops are what unrolls under target features")]
    unsafe fn vectors<S: Simd, const V: usize>(&self, i: usize) {
        let Self { run, lines, start, weights, .. } = *self;
        let d = run.cache.shape.head_dim;
        let part = (d - i).min(LANES);
        let whole = V > 1 || part == LANES;
        // SAFETY: the caller's contract; a last part goes through a copy.
        unsafe {
            let mut sums = [[S::splat(0.0); V]; M];
            for r in 0..M {
                for n in 0..V {
                    let at = lines[r].out.add(i + n * LANES);
                    sums[r][n] = if whole { S::load(at) } else { load_part::<S, f32>(at, part) };
                }
            }
            let mut position = self.positions.start;
            while position < self.positions.end {
                let block = position / BLOCK_TOKENS;
                let end = ((block + 1) * BLOCK_TOKENS).min(self.positions.end);
                let mut values = run.half::<E>(block, 1).add(position % BLOCK_TOKENS * d + i);
                let mut weights = weights.add(position - start);
                for _ in position..end {
                    let mut v = [S::splat(0.0); V];
                    for n in 0..V {
                        let at = values.add(n * LANES);
                        v[n] = if whole { E::load::<S>(at) } else { load_part::<S, E>(at, part) };
                    }
                    for r in 0..M {
                        let weight = S::splat(*weights.add(r * STRETCH));
                        for n in 0..V {
                            sums[r][n] = S::mul_add(weight, v[n], sums[r][n]);
                        }
                    }
                    values = values.add(d);
                    weights = weights.add(1);
                }
                position = end;
            }
            for r in 0..M {
                for n in 0..V {
                    let at = lines[r].out.add(i + n * LANES);
                    if whole {
                        S::store(at, sums[r][n]);
                    } else {
                        let mut lanes = [0.0; LANES];
                        S::store(lanes.as_mut_ptr(), sums[r][n]);
                        std::ptr::copy_nonoverlapping(lanes.as_ptr(), at, part);
                    }
                }
            }
        }
    }
}
