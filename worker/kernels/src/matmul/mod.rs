//! `y = x Wᵀ + b`, with every row's own low-rank deltas on top.
//!
//! - [`packed`]: how a base's matrix lies in memory. `tile`: the loops over it. [`q8_0`]: quantized weights and inputs.
//! - `delta`: low-rank deltas, which lie row by row.
//!
//! Threads share the outputs. Inside a share, weights are read from memory once, in tiles of rows × outputs that only change
//! how often a loaded number is used, never the order in which a row's products are added: every output is one chain of
//! additions over the inputs from first to last.
//!
//! # Precision
//! F32 and F16 matrices are multiplied in f32. For a BF16 matrix every input is rounded to bf16 first, on every instruction
//! set, and products and sums are f32: what the dot-product instructions do. With `u = 2⁻⁸`, the error of an output is
//! at most `u · Σ |w x|` from rounding (half a unit in the last of 8 bits, per input) plus `k · 2⁻²⁴ · Σ |w x|` from adding.
//! For a quantized matrix inputs are quantized too: [`q8_0`] says how, and how exact that is. Deltas are always computed in
//! f32 from inputs that were not rounded.
#![allow(unsafe_code)]

mod delta;
pub mod packed;
pub mod q8_0;
#[cfg(test)]
mod tests;
mod tile;

use half::{bf16, f16};

pub use packed::{Format, PANEL, Packed, PackedShape};

use super::finish::{Gain, finish};
use super::simd::{LANES, launch};
pub(super) use delta::{up, up_part};
use tile::PackInputs;
use turret_threads::Pool;

/// A matrix `[outputs, inputs]`, row-major: what is looked up by row, and deltas.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// Single precision.
    F32(&'a [f32]),
    /// bfloat16.
    BF16(&'a [bf16]),
    /// Half precision.
    F16(&'a [f16]),
}

impl Weight<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(w) => w.len(),
            Self::BF16(w) => w.len(),
            Self::F16(w) => w.len(),
        }
    }
}

/// A lens's delta on a range of rows.
#[derive(Debug, Clone, Copy)]
pub struct RowsDelta<'a> {
    /// First row it applies to.
    pub row_start: usize,
    /// How many.
    pub rows: usize,
    /// `[ranks, inputs]`.
    pub a: Weight<'a>,
    /// All ranks of all parts.
    pub ranks: usize,
    /// Where this delta's `A x` starts in the scratch: `rows * ranks` numbers.
    pub scratch_start: usize,
}

/// One range of outputs of a [`RowsDelta`].
#[derive(Debug, Clone, Copy)]
pub struct DeltaOutputs<'a> {
    /// First rank of this part.
    pub rank_start: usize,
    /// Its ranks.
    pub ranks: usize,
    /// First output.
    pub output_start: usize,
    /// Its outputs.
    pub outputs: usize,
    /// `[ranks, outputs]`.
    pub b: Weight<'a>,
    /// Multiplies `A x`.
    pub scale: f32,
    /// Multiplies the product and what was added to it so far, this part included, but not the bias.
    pub gain: Option<Gain<'a>>,
    /// In place of the matrix's own bias.
    pub bias: Option<&'a [f32]>,
    /// Added beside the bias, multiplied by the scale.
    pub shift: Option<&'a [f32]>,
}

/// What is multiplied.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// The weights.
    pub weight: Packed<'a>,
    /// One number per output, or nothing.
    pub bias: Option<&'a [f32]>,
    /// Add to what is in `y`, instead of replacing it.
    pub accumulate: bool,
}

impl Linear<'_> {
    fn outputs(&self) -> usize {
        self.weight.shape.outputs
    }

    fn inputs(&self) -> usize {
        self.weight.shape.inputs
    }
}

/// The deltas of a step on one matrix, in order of their rows. Those of one range of rows follow each other, in the
/// order in which they are added, and name the same range.
pub trait Deltas: Sync {
    /// How many deltas there are.
    fn count(&self) -> usize;
    /// One of them, when it touches this matrix.
    fn delta(&self, index: usize) -> Option<RowsDelta<'_>>;
    /// How many parts that one has.
    fn parts(&self, index: usize) -> usize;
    /// One of its parts; the scale includes the row's own.
    fn part(&self, index: usize, part: usize) -> DeltaOutputs<'_>;
    /// When any part here has a gain, a bias or a shift: from where on the scratch's low-rank numbers are free. `rows * outputs`
    /// numbers are used there when the product is added to something.
    fn finish_start(&self) -> Option<usize> {
        None
    }
}

/// No deltas.
pub struct NoDeltas;

impl Deltas for NoDeltas {
    fn count(&self) -> usize {
        0
    }
    fn delta(&self, _: usize) -> Option<RowsDelta<'_>> {
        None
    }
    fn parts(&self, _: usize) -> usize {
        0
    }
    fn part(&self, _: usize, _: usize) -> DeltaOutputs<'_> {
        unreachable!("there are no deltas")
    }
}

/// Products below which a loop is not worth waking other threads.
const WORTH_SHARING: usize = 1 << 15;

/// Panels after which deltas are added: few, so that what they add to is still in the cache and their own numbers arrive
/// while the panels are computed.
const DELTA_PANELS: usize = 8;

/// A slice that several threads write disjoint parts of.
struct Shared<T>(*mut T);
// SAFETY: every task writes its own numbers only.
unsafe impl<T> Sync for Shared<T> {}
impl<T> Shared<T> {
    fn get(&self) -> *mut T {
        self.0
    }
}

/// Room that [`linear`] works in.
#[derive(Debug, Default)]
pub struct Scratch {
    /// `A x` of all deltas, then bare products where they are kept apart.
    ranks: Vec<f32>,
    /// The inputs as tiles take them.
    inputs: Vec<u32>,
}

impl Scratch {
    /// Makes room for `rows` rows of at most `inputs` numbers, which takes four bytes each.
    pub fn for_inputs(rows: usize, inputs: usize) -> Self {
        Self { ranks: Vec::new(), inputs: vec![0; rows * inputs.next_multiple_of(2)] }
    }

    /// Makes room for so many numbers of all deltas' `A x`, and what [`Deltas::finish_start`] asks for.
    pub fn reserve_ranks(&mut self, numbers: usize) {
        if self.ranks.len() < numbers {
            self.ranks.resize(numbers, 0.0);
        }
    }
}

/// `y[row] = W x[row] + b + Σ deltas`, for `rows` rows.
pub fn linear(
    pool: &Pool,
    linear: Linear<'_>,
    deltas: &dyn Deltas,
    x: &[f32],
    y: &mut [f32],
    rows: usize,
    scratch: &mut Scratch,
) {
    assert!(x.len() >= rows * linear.inputs(), "x is too short");
    assert!(y.len() >= rows * linear.outputs(), "y is too short");
    assert!(linear.bias.is_none_or(|b| b.len() == linear.outputs()), "the bias has another length");
    if rows == 0 {
        return;
    }
    delta::down(pool, &linear, deltas, x, &mut scratch.ranks);

    let work = rows * linear.outputs() * linear.inputs();
    let words = linear.weight.shape.input_words();
    if scratch.inputs.len() < rows * words {
        scratch.inputs.resize(rows * words, 0);
    }
    let packed = Shared(scratch.inputs.as_mut_ptr());
    let shares = if rows * words < WORTH_SHARING { 1 } else { pool.threads() };
    pool.run(shares, &|share| {
        launch(PackInputs { x, rows, linear: &linear, share, shares, to: packed.get() });
    });
    let to = Shared(y.as_mut_ptr());
    let panels = linear.outputs().div_ceil(PANEL);
    let outputs =
        |panels: std::ops::Range<usize>| (panels.start * PANEL, (panels.end * PANEL).min(linear.outputs()));
    let share = |call: &(dyn Fn(std::ops::Range<usize>) + Sync)| {
        if work < WORTH_SHARING { call(0..panels) } else { pool.share(panels, call) }
    };
    let Some(finish_start) = deltas.finish_start() else {
        let ranks = &*scratch.ranks;
        let stretch = if deltas.count() == 0 { panels } else { DELTA_PANELS };
        share(&|panels| {
            for start in panels.clone().step_by(stretch) {
                let (first, last) = outputs(start..panels.end.min(start + stretch));
                let range = Range { inputs: packed.get(), y: to.get(), rows, linear: &linear, first, last };
                delta::ask(&range, deltas);
                launch(range);
                up(&range, 0..deltas.count(), deltas, ranks);
            }
        });
        return;
    };
    if linear.accumulate {
        scratch.reserve_ranks(finish_start + rows * linear.outputs());
    }
    let (ranks, free) = scratch.ranks.split_at_mut(finish_start);
    let ranks = &*ranks;
    let bare = Linear { bias: None, accumulate: false, ..linear };
    let kept = if linear.accumulate { Shared(free.as_mut_ptr()) } else { Shared(y.as_mut_ptr()) };
    share(&|panels| {
        let (first, last) = outputs(panels);
        let products = Range { inputs: packed.get(), y: kept.get(), rows, linear: &bare, first, last };
        launch(products);
        finish(&products, &Range { y: to.get(), linear: &linear, ..products }, deltas, ranks);
    });
}

/// Outputs `first..last` of all rows; `first` is where a panel starts.
#[derive(Clone, Copy)]
pub(super) struct Range<'a> {
    /// As [`PackInputs`] laid them.
    inputs: *const u32,
    y: *mut f32,
    pub(super) rows: usize,
    pub(super) linear: &'a Linear<'a>,
    pub(super) first: usize,
    pub(super) last: usize,
}

impl Range<'_> {
    /// The outputs of a part that are this task's.
    pub(super) fn overlap(&self, part: &DeltaOutputs<'_>) -> Option<(usize, usize)> {
        let first = self.first.max(part.output_start);
        let last = self.last.min(part.output_start + part.outputs);
        (first < last).then_some((first, last))
    }

    /// # Safety
    /// The outputs exist, are this task's own, and no other slice of them is in use.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "tasks have disjoint outputs")]
    pub(super) unsafe fn row(&self, row: usize, first: usize, count: usize) -> &mut [f32] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.y.add(row * self.linear.outputs() + first), count) }
    }
}
