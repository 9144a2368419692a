//! The inner loops of a packed matrix: a tile of rows × outputs whose sums stay in registers.
//!
//! Every sum is one chain over the groups of inputs in order, whatever the tile: tiles only change how often a loaded
//! number is used. Where inputs are cut into stretches for the cache, a sum rests in memory and goes on from the same bits.
#![allow(unsafe_code)]

use std::marker::PhantomData;

use half::{bf16, f16};

use super::packed::{Format, PANEL, Packed};
use super::q8_0::{self, Q8_0};
use super::{Linear, Range};
use crate::number::Dtype;
use crate::simd::{Element, Kernel, LANES, Simd, round_pair};

/// Bytes of a panel after which rows take turns, so that such a stretch stays in the cache.
const STRETCH_BYTES: usize = 128 << 10;
/// Rows that are worked on while a stretch is in the cache, at most.
const BLOCK_ROWS: usize = 96;
/// How far ahead of a single tile its weights are asked for, in bytes. Measured: between 4 and 32 KiB it hardly matters.
const AHEAD: usize = 16 << 10;
const CACHE_LINE: usize = 64;

/// How the rows of a step are cut into tiles: as few as can be, and as equal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    rows: usize,
    tiles: usize,
}

impl Tiles {
    #[inline(always)]
    fn of<S: Simd, E: Operand>(rows: usize) -> Self {
        Self { rows, tiles: rows.div_ceil(E::tile::<S>().0) }
    }

    #[inline(always)]
    fn start(&self, tile: usize) -> usize {
        self.rows * tile / self.tiles
    }
}

/// What a packed matrix consists of.
pub(super) trait Operand {
    /// Bytes of a group of one output.
    const BYTES: usize;
    /// Words of a group of one row of inputs.
    fn words<S: Simd>() -> usize;
    /// Most rows of a tile of sums that stays in registers, and most vectors.
    fn tile<S: Simd>() -> (usize, usize);
    /// Adds the products of one group to the sums of M rows and N vectors: the group's weights of a panel, the width of
    /// the panel and the first output, the group's inputs of all rows.
    unsafe fn add_group<S: Simd, const M: usize, const N: usize>(
        weights: *const u8,
        at: (usize, usize),
        inputs: *const u32,
        sums: &mut [[S::V; N]; M],
    );
}

/// A number of a packed matrix that is kept by itself.
trait Number: Element {
    type Weights<S: Simd>: Copy;
    type Input<S: Simd>: Copy;
    /// Numbers in a group.
    const GROUP: usize;
    /// In how many phases a group is multiplied, each with a word of every row.
    fn phases<S: Simd>() -> usize {
        1
    }
    /// One phase of one group of sixteen outputs.
    unsafe fn weights<S: Simd>(from: *const Self, phase: usize) -> Self::Weights<S>;
    /// One phase of one group of one row, in all lanes.
    unsafe fn input<S: Simd>(from: *const u32) -> Self::Input<S>;
    unsafe fn multiply_add<S: Simd>(w: Self::Weights<S>, x: Self::Input<S>, sum: S::V) -> S::V;
}

// SAFETY of the blocks below: the caller's contract of `Simd`.
impl<E: Number> Operand for E {
    const BYTES: usize = E::GROUP * size_of::<E>();

    #[inline(always)]
    fn words<S: Simd>() -> usize {
        E::phases::<S>()
    }

    #[inline(always)]
    fn tile<S: Simd>() -> (usize, usize) {
        (S::TILE_ROWS, S::TILE_VECTORS)
    }

    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "counted loops are what unrolls under target features")]
    unsafe fn add_group<S: Simd, const M: usize, const N: usize>(
        weights: *const u8,
        (_, column): (usize, usize),
        inputs: *const u32,
        sums: &mut [[S::V; N]; M],
    ) {
        unsafe {
            let weights = weights.cast::<E>().add(column * E::GROUP);
            for phase in 0..E::phases::<S>() {
                let mut w = [E::weights::<S>(weights, phase); N];
                for n in 1..N {
                    w[n] = E::weights::<S>(weights.add(n * LANES * E::GROUP), phase);
                }
                for r in 0..M {
                    let x = E::input::<S>(inputs.add(phase * M + r));
                    for n in 0..N {
                        sums[r][n] = E::multiply_add::<S>(w[n], x, sums[r][n]);
                    }
                }
            }
        }
    }
}

impl Number for bf16 {
    type Weights<S: Simd> = S::Pairs;
    type Input<S: Simd> = S::Pairs;
    const GROUP: usize = 2;
    #[inline(always)]
    fn phases<S: Simd>() -> usize {
        S::PAIR_PHASES
    }
    #[inline(always)]
    unsafe fn weights<S: Simd>(from: *const Self, phase: usize) -> S::Pairs {
        unsafe { S::load_pairs(from, phase) }
    }
    #[inline(always)]
    unsafe fn input<S: Simd>(from: *const u32) -> S::Pairs {
        unsafe { S::splat_pair(from) }
    }
    #[inline(always)]
    unsafe fn multiply_add<S: Simd>(w: S::Pairs, x: S::Pairs, sum: S::V) -> S::V {
        unsafe { S::dot_pairs(w, x, sum) }
    }
}

macro_rules! number_in_f32 {
    ($element:ty) => {
        impl Number for $element {
            type Weights<S: Simd> = S::V;
            type Input<S: Simd> = S::V;
            const GROUP: usize = 1;
            #[inline(always)]
            unsafe fn weights<S: Simd>(from: *const Self, _: usize) -> S::V {
                unsafe { Self::load::<S>(from) }
            }
            #[inline(always)]
            unsafe fn input<S: Simd>(from: *const u32) -> S::V {
                unsafe { S::splat(f32::from_bits(*from)) }
            }
            #[inline(always)]
            unsafe fn multiply_add<S: Simd>(w: S::V, x: S::V, sum: S::V) -> S::V {
                unsafe { S::mul_add(w, x, sum) }
            }
        }
    };
}
number_in_f32!(f32);
number_in_f32!(f16);

/// Puts some tiles' rows of x beside each other: for each group of inputs, that group of every row of the tile; as bf16
/// pairs, rounded to nearest even, when the weights are, and quantized when the weights are. Where the instruction set does
/// not multiply pairs, their two numbers are widened here, once for all outputs.
pub(super) struct PackInputs<'a> {
    pub(super) x: &'a [f32],
    pub(super) rows: usize,
    pub(super) linear: &'a Linear<'a>,
    /// Which tiles of how many shares of all tiles.
    pub(super) share: usize,
    pub(super) shares: usize,
    /// `rows * input words`.
    pub(super) to: *mut u32,
}

impl Kernel for PackInputs<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let shape = self.linear.weight.shape;
        let words = shape.input_words();
        let tiles = match shape.format {
            Format::Plain(_) => Tiles::of::<S, f32>(self.rows),
            Format::Q8_0 => Tiles::of::<S, Q8_0>(self.rows),
        };
        for tile in tiles.tiles * self.share / self.shares..tiles.tiles * (self.share + 1) / self.shares {
            let (first, last) = (tiles.start(tile), tiles.start(tile + 1));
            for row in first..last {
                let x = &self.x[row * shape.inputs..][..shape.inputs];
                // SAFETY: `to` has a place for every word of every row, and this row is this task's.
                unsafe {
                    let (to, rows) = (self.to.add(first * words + row - first), last - first);
                    match shape.format {
                        Format::Plain(Dtype::BF16) => pack_pairs::<S>(x, to, rows),
                        Format::Plain(Dtype::F16 | Dtype::F32) => {
                            for (i, x) in x.iter().enumerate() {
                                *to.add(i * rows) = x.to_bits();
                            }
                        }
                        Format::Q8_0 => q8_0::pack_inputs(x, to, rows),
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn pack_pairs<S: Simd>(x: &[f32], to: *mut u32, stride: usize) {
    // SAFETY: the caller has room for every pair.
    unsafe {
        let mut i = 0;
        while i + 2 * LANES <= x.len() {
            let mut pairs = [0; LANES];
            S::round_pairs(x.as_ptr().add(i), pairs.as_mut_ptr());
            for (j, pair) in pairs.iter().enumerate() {
                put_pair::<S>(*pair, to.add((i / 2 + j) * S::PAIR_PHASES * stride), stride);
            }
            i += 2 * LANES;
        }
        while i < x.len() {
            let pair = round_pair(x[i], x.get(i + 1).copied().unwrap_or(0.0));
            put_pair::<S>(pair, to.add(i / 2 * S::PAIR_PHASES * stride), stride);
            i += 2;
        }
    }
}

/// The words of one pair, phase after phase.
#[inline(always)]
unsafe fn put_pair<S: Simd>(pair: u32, to: *mut u32, stride: usize) {
    // SAFETY: the caller has room for every phase.
    unsafe {
        match S::PAIR_PHASES {
            1 => *to = pair,
            _ => (*to, *to.add(stride)) = (pair & 0xffff_0000, pair << 16),
        }
    }
}

/// The sums of a block of rows on one panel.
struct Block {
    tiles: Tiles,
    /// Tiles of this block.
    first: usize,
    last: usize,
    groups: usize,
    /// Rows of x, as [`PackInputs`] laid them.
    inputs: *const u32,
    panel: *const u8,
    /// Outputs of the panel.
    width: usize,
    /// `[rows of the block, PANEL]`.
    sums: *mut f32,
    /// Whether the next panel's weights are asked for meanwhile.
    prefetch: bool,
}

impl Kernel for Range<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `linear` checked the lengths.
        unsafe {
            match self.linear.weight.shape.format {
                Format::Plain(Dtype::F32) => self.panels::<S, f32>(self.linear.weight),
                Format::Plain(Dtype::BF16) => self.panels::<S, bf16>(self.linear.weight),
                Format::Plain(Dtype::F16) => self.panels::<S, f16>(self.linear.weight),
                Format::Q8_0 => self.panels::<S, Q8_0>(self.linear.weight),
            }
        }
    }
}

impl Range<'_> {
    #[inline(always)]
    unsafe fn panels<S: Simd, E: Operand>(&self, weight: Packed<'_>) {
        let tiles = Tiles::of::<S, E>(self.rows);
        let groups = weight.shape.groups();
        let block_tiles = BLOCK_ROWS / E::tile::<S>().0;
        let mut sums = [0.0_f32; BLOCK_ROWS * PANEL];
        for panel in self.first / PANEL..self.last.div_ceil(PANEL) {
            let (start, width) = weight.shape.panel(panel);
            let outputs = panel * PANEL..(panel * PANEL + width).min(self.last);
            let mut first = 0;
            while first < tiles.tiles {
                let last = (first + block_tiles).min(tiles.tiles);
                // SAFETY: the panel and the tiles exist; sums has as many rows as a block.
                unsafe {
                    Block {
                        tiles,
                        first,
                        last,
                        groups,
                        inputs: self.inputs,
                        panel: weight.bytes.as_ptr().add(start),
                        width,
                        sums: sums.as_mut_ptr(),
                        prefetch: last == tiles.tiles,
                    }
                    .sum::<S, E>();
                    self.finish(tiles.start(first)..tiles.start(last), outputs.clone(), &sums);
                }
                first = last;
            }
        }
    }

    /// Writes the sums of a block of rows to y, with the bias.
    #[inline(always)]
    unsafe fn finish(
        &self,
        rows: std::ops::Range<usize>,
        outputs: std::ops::Range<usize>,
        sums: &[f32; BLOCK_ROWS * PANEL],
    ) {
        let bias = self.linear.bias.map(|bias| &bias[outputs.clone()]);
        for (row, sums) in rows.zip(sums.chunks_exact(PANEL)) {
            // SAFETY: the outputs exist and are this task's own.
            let y = unsafe { self.row(row, outputs.start, outputs.len()) };
            match (bias, self.linear.accumulate) {
                (None, false) => y.copy_from_slice(&sums[..y.len()]),
                (None, true) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum),
                (Some(b), false) => {
                    y.iter_mut().zip(sums.iter().zip(b)).for_each(|(y, (sum, b))| *y = sum + b)
                }
                (Some(b), true) => {
                    y.iter_mut().zip(sums.iter().zip(b)).for_each(|(y, (sum, b))| *y += sum + b)
                }
            }
        }
    }
}

impl Block {
    #[inline(always)]
    unsafe fn sum<S: Simd, E: Operand>(&self) {
        let group_bytes = self.width * E::BYTES;
        let stretch = STRETCH_BYTES / (PANEL * E::BYTES);
        let rows = self.tiles.start(self.first + 1) - self.tiles.start(self.first);
        let whole = self.width == PANEL && 2 * rows <= E::tile::<S>().1;
        let columns = if whole { 1 } else { self.width / LANES };
        let passes = (self.last - self.first) * columns;
        let mut group = 0;
        while group < self.groups {
            let groups = (self.groups - group).min(stretch);
            // SAFETY: groups and rows exist; what is prefetched need not.
            unsafe {
                let weights = self.panel.add(group * group_bytes);
                for tile in self.first..self.last {
                    let (row, end) = (self.tiles.start(tile), self.tiles.start(tile + 1));
                    let rows = end - row;
                    // A single pass runs at the speed of memory: its own weights, some way ahead. Several share the work
                    // of fetching the stretch that follows, a part each.
                    let (ahead, step) = match (self.prefetch, passes) {
                        (false, _) => (weights, 0),
                        (true, 1) => (weights.wrapping_add(AHEAD), group_bytes),
                        (true, n) => {
                            let step = group_bytes / n;
                            let own = (tile - self.first) * columns * groups * step;
                            (weights.wrapping_add(groups * group_bytes + own), step)
                        }
                    };
                    let stretch = Stretch {
                        groups,
                        inputs: self.inputs.add((row * self.groups + group * rows) * E::words::<S>()),
                        weights,
                        width: self.width,
                        sums: self.sums.add((row - self.tiles.start(self.first)) * PANEL),
                        resume: group > 0,
                        ahead,
                        step,
                    };
                    stretch.rows::<S, E>(rows);
                }
            }
            group += groups;
        }
    }
}

/// Some rows on one stretch of a panel.
struct Stretch {
    groups: usize,
    inputs: *const u32,
    weights: *const u8,
    width: usize,
    sums: *mut f32,
    /// Whether there are sums to go on from.
    resume: bool,
    ahead: *const u8,
    step: usize,
}

impl Stretch {
    #[inline(always)]
    unsafe fn rows<S: Simd, E: Operand>(&self, rows: usize) {
        macro_rules! rows {
            ($($m:literal)*) => {
                match rows {
                    $($m if $m <= E::tile::<S>().0 => unsafe { self.columns::<S, E, $m>() },)*
                    _ => unreachable!("a tile has at most as many rows"),
                }
            };
        }
        // SAFETY: the caller's contract.
        rows!(1 2 3 4 5 6 7 8 9 10 11 12)
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, E: Operand, const M: usize>(&self) {
        // SAFETY: the vectors are inside of the panel.
        unsafe {
            if self.width == PANEL && 2 * M <= E::tile::<S>().1 {
                S::call(Tile::<E, M, 2> { stretch: self, column: 0, operand: PhantomData });
            } else {
                for column in (0..self.width).step_by(LANES) {
                    let ahead = self.ahead.wrapping_add(column / LANES * self.groups * self.step);
                    let stretch = &Stretch { ahead, ..*self };
                    S::call(Tile::<E, M, 1> { stretch, column, operand: PhantomData });
                }
            }
        }
    }
}

/// M rows by N vectors.
struct Tile<'a, E, const M: usize, const N: usize> {
    stretch: &'a Stretch,
    /// First output.
    column: usize,
    operand: PhantomData<E>,
}

impl<E: Operand, const M: usize, const N: usize> Kernel for Tile<'_, E, M, N> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "counted loops are what unrolls under target features")]
    unsafe fn run<S: Simd>(self) {
        let Stretch { groups, mut inputs, mut weights, width, sums: to, resume, mut ahead, step } =
            *self.stretch;
        // SAFETY: the caller's contract: all groups of M rows and N vectors exist.
        unsafe {
            let to = to.add(self.column);
            let mut sums = [[S::splat(0.0); N]; M];
            if resume {
                for r in 0..M {
                    for n in 0..N {
                        sums[r][n] = S::load(to.add(r * PANEL + n * LANES));
                    }
                }
            }
            for _ in 0..groups {
                // Below three rows the hardware's own prefetching is as good.
                if M > 2 {
                    for line in 0..(N * LANES * E::BYTES).div_ceil(CACHE_LINE) {
                        S::prefetch(ahead.wrapping_add(line * CACHE_LINE));
                    }
                    ahead = ahead.wrapping_add(step);
                }
                E::add_group::<S, M, N>(weights, (width, self.column), inputs, &mut sums);
                weights = weights.add(width * E::BYTES);
                inputs = inputs.add(M * E::words::<S>());
            }
            for r in 0..M {
                for n in 0..N {
                    S::store(to.add(r * PANEL + n * LANES), sums[r][n]);
                }
            }
        }
    }
}
