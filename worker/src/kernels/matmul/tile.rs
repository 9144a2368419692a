//! The inner loops of a packed matrix: a tile of rows × outputs whose sums stay in registers.
//!
//! Every sum is one chain over the groups of inputs in order, whatever the tile: tiles only change how often a loaded
//! number is used. Where inputs are cut into stretches for the cache, a sum rests in memory and goes on from the same bits.
#![allow(unsafe_code)]

use half::{bf16, f16};

use super::packed::{PANEL, Packed};
use super::{Linear, Range};
use crate::kernels::simd::{Element, Kernel, LANES, Simd, round_pair};
use crate::model::weights::Dtype;

/// Groups of inputs after which rows take turns, so that a stretch of a panel (128 KiB at most) stays in the cache.
const STRETCH: usize = 1024;
/// Rows that are worked on while a stretch is in the cache; a multiple of every tile's rows.
const BLOCK_ROWS: usize = 96;
/// How far ahead of a single tile its weights are asked for, in bytes. Measured: between 4 and 32 KiB it hardly matters.
const AHEAD: usize = 16 << 10;

/// How the rows of a step are cut into tiles: as few as can be, and as equal.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiles {
    rows: usize,
    tiles: usize,
}

impl Tiles {
    #[inline(always)]
    pub(super) fn of<S: Simd>(rows: usize) -> Self {
        Self { rows, tiles: rows.div_ceil(S::TILE_ROWS) }
    }

    #[inline(always)]
    fn start(&self, tile: usize) -> usize {
        self.rows * tile / self.tiles
    }
}

/// An element of a packed matrix.
trait Operand: Element {
    type Weights<S: Simd>: Copy;
    type Input<S: Simd>: Copy;
    /// Inputs in a group.
    const GROUP: usize;
    /// One group of sixteen outputs.
    unsafe fn weights<S: Simd>(from: *const Self) -> Self::Weights<S>;
    /// One group of one row, in all lanes.
    unsafe fn input<S: Simd>(from: *const u32) -> Self::Input<S>;
    unsafe fn multiply_add<S: Simd>(w: Self::Weights<S>, x: Self::Input<S>, sum: S::V) -> S::V;
}

// SAFETY of the blocks below: the caller's contract of `Simd`.
impl Operand for bf16 {
    type Weights<S: Simd> = S::Pairs;
    type Input<S: Simd> = S::Pairs;
    const GROUP: usize = 2;
    #[inline(always)]
    unsafe fn weights<S: Simd>(from: *const Self) -> S::Pairs {
        unsafe { S::load_pairs(from) }
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

macro_rules! operand_in_f32 {
    ($element:ty) => {
        impl Operand for $element {
            type Weights<S: Simd> = S::V;
            type Input<S: Simd> = S::V;
            const GROUP: usize = 1;
            #[inline(always)]
            unsafe fn weights<S: Simd>(from: *const Self) -> S::V {
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
operand_in_f32!(f32);
operand_in_f32!(f16);

/// Puts some tiles' rows of x beside each other: for each group of inputs, that group of every row of the tile; as bf16
/// pairs, rounded to nearest even, when the weights are.
pub(super) struct PackInputs<'a> {
    pub(super) x: &'a [f32],
    pub(super) rows: usize,
    pub(super) linear: &'a Linear<'a>,
    /// Which tiles of how many shares of all tiles.
    pub(super) share: usize,
    pub(super) shares: usize,
    /// `rows * groups`.
    pub(super) to: *mut u32,
}

impl Kernel for PackInputs<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let shape = self.linear.weight.shape;
        let groups = shape.groups();
        let tiles = Tiles::of::<S>(self.rows);
        for tile in tiles.tiles * self.share / self.shares..tiles.tiles * (self.share + 1) / self.shares {
            let (first, last) = (tiles.start(tile), tiles.start(tile + 1));
            for row in first..last {
                let x = &self.x[row * shape.inputs..][..shape.inputs];
                // SAFETY: `to` has a place for every group of every row, and this row is this task's.
                unsafe {
                    let to = self.to.add(first * groups + row - first);
                    match shape.dtype {
                        Dtype::BF16 => pack_pairs::<S>(x, to, last - first),
                        Dtype::F16 | Dtype::F32 => {
                            for (i, x) in x.iter().enumerate() {
                                *to.add(i * (last - first)) = x.to_bits();
                            }
                        }
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
                *to.add((i / 2 + j) * stride) = *pair;
            }
            i += 2 * LANES;
        }
        while i < x.len() {
            *to.add(i / 2 * stride) = round_pair(x[i], x.get(i + 1).copied().unwrap_or(0.0));
            i += 2;
        }
    }
}

/// The sums of a block of rows on one panel.
struct Block<E> {
    tiles: Tiles,
    /// Tiles of this block.
    first: usize,
    last: usize,
    groups: usize,
    /// Rows of x, as [`PackInputs`] laid them.
    inputs: *const u32,
    panel: *const E,
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
            match self.linear.weight.shape.dtype {
                Dtype::F32 => self.panels::<S, f32>(self.linear.weight),
                Dtype::BF16 => self.panels::<S, bf16>(self.linear.weight),
                Dtype::F16 => self.panels::<S, f16>(self.linear.weight),
            }
        }
    }
}

impl Range<'_> {
    #[inline(always)]
    unsafe fn panels<S: Simd, E: Operand>(&self, weight: Packed<'_>) {
        let tiles = Tiles::of::<S>(self.rows);
        let groups = weight.shape.groups();
        let block_tiles = BLOCK_ROWS / S::TILE_ROWS;
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
                        panel: weight.bytes.as_ptr().add(start).cast::<E>(),
                        width,
                        sums: sums.as_mut_ptr(),
                        prefetch: last == tiles.tiles,
                    }
                    .sum::<S>();
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

impl<E: Operand> Block<E> {
    #[inline(always)]
    unsafe fn sum<S: Simd>(&self) {
        let group_bytes = self.width * E::GROUP * size_of::<E>();
        let count = self.last - self.first;
        let mut group = 0;
        while group < self.groups {
            let groups = (self.groups - group).min(STRETCH);
            // SAFETY: groups and rows exist; what is prefetched need not.
            unsafe {
                let weights = self.panel.cast::<u8>().add(group * group_bytes);
                for tile in self.first..self.last {
                    let (row, end) = (self.tiles.start(tile), self.tiles.start(tile + 1));
                    let rows = end - row;
                    // A single tile runs at the speed of memory: its own weights, some way ahead. Several share the work
                    // of fetching the stretch that follows, a part each.
                    let (ahead, step) = match (self.prefetch, count) {
                        (false, _) => (weights, 0),
                        (true, 1) => (weights.wrapping_add(AHEAD), group_bytes),
                        (true, n) => {
                            let step = group_bytes / n;
                            let own = (tile - self.first) * groups * step;
                            (weights.wrapping_add(groups * group_bytes + own), step)
                        }
                    };
                    let stretch = Stretch::<E> {
                        groups,
                        inputs: self.inputs.add(row * self.groups + group * rows),
                        weights: weights.cast(),
                        width: self.width,
                        sums: self.sums.add((row - self.tiles.start(self.first)) * PANEL),
                        resume: group > 0,
                        ahead,
                        step,
                    };
                    stretch.rows::<S>(rows);
                }
            }
            group += groups;
        }
    }
}

/// Some rows on one stretch of a panel.
struct Stretch<E> {
    groups: usize,
    inputs: *const u32,
    weights: *const E,
    width: usize,
    sums: *mut f32,
    /// Whether there are sums to go on from.
    resume: bool,
    ahead: *const u8,
    step: usize,
}

impl<E: Operand> Stretch<E> {
    #[inline(always)]
    unsafe fn rows<S: Simd>(&self, rows: usize) {
        macro_rules! rows {
            ($($m:literal)*) => {
                match rows {
                    $($m if $m <= S::TILE_ROWS => unsafe { self.columns::<S, $m>() },)*
                    _ => unreachable!("a tile has at most as many rows"),
                }
            };
        }
        // SAFETY: the caller's contract.
        rows!(1 2 3 4 5 6 7 8 9 10 11 12)
    }

    #[inline(always)]
    unsafe fn columns<S: Simd, const M: usize>(&self) {
        // SAFETY: the vectors are inside of the panel.
        unsafe {
            if self.width == PANEL && 2 * M <= S::TILE_VECTORS {
                S::call(Tile::<E, M, 2> { stretch: self, column: 0 });
            } else {
                for column in (0..self.width).step_by(LANES) {
                    S::call(Tile::<E, M, 1> { stretch: self, column });
                }
            }
        }
    }
}

/// M rows by N vectors.
struct Tile<'a, E, const M: usize, const N: usize> {
    stretch: &'a Stretch<E>,
    /// First output.
    column: usize,
}

impl<E: Operand, const M: usize, const N: usize> Kernel for Tile<'_, E, M, N> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "counted loops are what unrolls under target features")]
    unsafe fn run<S: Simd>(self) {
        let Stretch { groups, mut inputs, weights, width, sums: to, resume, mut ahead, step } = *self.stretch;
        // SAFETY: the caller's contract: all groups of M rows and N vectors exist.
        unsafe {
            let mut weights = weights.add(self.column * E::GROUP);
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
                if M > 2 && N == 2 {
                    S::prefetch(ahead);
                    S::prefetch(ahead.wrapping_add(64));
                    ahead = ahead.wrapping_add(step);
                }
                let mut w = [E::weights::<S>(weights); N];
                for n in 1..N {
                    w[n] = E::weights::<S>(weights.add(n * LANES * E::GROUP));
                }
                for r in 0..M {
                    let x = E::input::<S>(inputs.add(r));
                    for n in 0..N {
                        sums[r][n] = E::multiply_add::<S>(w[n], x, sums[r][n]);
                    }
                }
                weights = weights.add(width * E::GROUP);
                inputs = inputs.add(M);
            }
            for r in 0..M {
                for n in 0..N {
                    S::store(to.add(r * PANEL + n * LANES), sums[r][n]);
                }
            }
        }
    }
}
