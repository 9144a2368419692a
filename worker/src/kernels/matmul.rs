//! `y = x Wᵀ + b`, with every row's own low-rank deltas on top.
//!
//! Threads share the outputs. Inside a share, weights are read once per block of rows, in tiles of rows × outputs that
//! only change how often a loaded number is used, never the order in which a row's products are added.
#![allow(unsafe_code)]

use half::{bf16, f16};

use super::finish::{Gain, finish};
use super::simd::{Element, Kernel, LANES, Simd, launch, load_part, unroll};
use super::threads::Pool;

/// A weight matrix `[outputs, inputs]`, row-major.
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
}

/// What is multiplied.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// The weights.
    pub weight: Weight<'a>,
    /// One number per output, or nothing.
    pub bias: Option<&'a [f32]>,
    /// Rows of the weights.
    pub outputs: usize,
    /// Columns of the weights.
    pub inputs: usize,
    /// Add to what is in `y`, instead of replacing it.
    pub accumulate: bool,
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
    /// When any part here has a gain or a bias: from where on the scratch is free. `rows * outputs` numbers are used there
    /// when the product is added to something.
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
/// Rows that are worked on while a share of the weights is in the cache.
const ROW_BLOCK: usize = 64;

/// A slice that several threads write disjoint parts of.
struct Shared(*mut f32);
// SAFETY: every task writes its own outputs only.
unsafe impl Sync for Shared {}
impl Shared {
    fn get(&self) -> *mut f32 {
        self.0
    }
}

/// `y[row] = W x[row] + b + Σ deltas`, for `rows` rows. `scratch` holds the `A x` of all deltas.
pub fn linear(
    pool: &Pool,
    linear: Linear<'_>,
    deltas: &dyn Deltas,
    x: &[f32],
    y: &mut [f32],
    rows: usize,
    scratch: &mut [f32],
) {
    assert!(x.len() >= rows * linear.inputs, "x is too short");
    assert!(y.len() >= rows * linear.outputs, "y is too short");
    assert_eq!(linear.weight.len(), linear.outputs * linear.inputs, "the weights have another shape");
    assert!(linear.bias.is_none_or(|b| b.len() == linear.outputs), "the bias has another length");
    if rows == 0 {
        return;
    }
    down(pool, &linear, deltas, x, scratch);

    // Whole tiles per task, enough tasks that a thread which is held up does not hold up the others.
    let work = rows * linear.outputs * linear.inputs;
    let tasks = if work < WORTH_SHARING { 1 } else { (pool.threads() * 6).min(linear.outputs.div_ceil(16)) };
    let share = linear.outputs.div_ceil(tasks).next_multiple_of(16);
    let tasks = linear.outputs.div_ceil(share);
    let to = Shared(y.as_mut_ptr());
    let Some(finish_start) = deltas.finish_start() else {
        let scratch = &*scratch;
        pool.run(tasks, &|task| {
            let first = task * share;
            let last = (first + share).min(linear.outputs);
            let range = Range { x: x.as_ptr(), y: to.get(), rows, linear: &linear, first, last };
            launch(range);
            up(&range, 0..deltas.count(), deltas, scratch);
        });
        return;
    };
    let (scratch, free) = scratch.split_at_mut(finish_start);
    assert!(!linear.accumulate || free.len() >= rows * linear.outputs, "the scratch is too short");
    let scratch = &*scratch;
    let products = Linear { bias: None, accumulate: false, ..linear };
    let kept = if linear.accumulate { Shared(free.as_mut_ptr()) } else { Shared(y.as_mut_ptr()) };
    pool.run(tasks, &|task| {
        let first = task * share;
        let last = (first + share).min(linear.outputs);
        let products = Range { x: x.as_ptr(), y: kept.get(), rows, linear: &products, first, last };
        launch(products);
        finish(&products, &Range { y: to.get(), linear: &linear, ..products }, deltas, scratch);
    });
}

/// `A x` of every delta into the scratch, scaled.
fn down(pool: &Pool, linear: &Linear<'_>, deltas: &dyn Deltas, x: &[f32], scratch: &mut [f32]) {
    let count = deltas.count();
    if count == 0 {
        return;
    }
    let mut work = 0;
    for index in 0..count {
        let Some(delta) = deltas.delta(index) else { continue };
        work += delta.rows * delta.ranks * linear.inputs;
        assert!(scratch.len() >= delta.scratch_start + delta.rows * delta.ranks, "the scratch is too short");
        assert!(x.len() >= (delta.row_start + delta.rows) * linear.inputs, "x is too short");
        assert_eq!(delta.a.len(), delta.ranks * linear.inputs, "A has another shape");
    }
    let to = Shared(scratch.as_mut_ptr());
    let one = |index: usize, slice: usize, slices: usize| {
        let Some(delta) = deltas.delta(index) else { return };
        let share = delta.ranks.div_ceil(slices).next_multiple_of(4);
        let first = (slice * share).min(delta.ranks);
        let last = (first + share).min(delta.ranks);
        let a = Linear {
            weight: delta.a,
            bias: None,
            outputs: delta.ranks,
            inputs: linear.inputs,
            accumulate: false,
        };
        // SAFETY: the lengths were checked above.
        let (x, y) =
            unsafe { (x.as_ptr().add(delta.row_start * linear.inputs), to.get().add(delta.scratch_start)) };
        launch(Range { x, y, rows: delta.rows, linear: &a, first, last });
        for part in 0..deltas.parts(index) {
            let part = deltas.part(index, part);
            for rank in (part.rank_start..part.rank_start + part.ranks).filter(|r| (first..last).contains(r))
            {
                for row in 0..delta.rows {
                    // SAFETY: inside this delta's scratch, in the ranks of this task.
                    unsafe { *y.add(row * delta.ranks + rank) *= part.scale };
                }
            }
        }
    };
    if work < WORTH_SHARING {
        (0..count).for_each(|index| one(index, 0, 1));
    } else {
        let slices = pool.threads() * 2;
        pool.run(count * slices, &|task| one(task / slices, task % slices, slices));
    }
}

/// Adds `B (A x)` of some deltas to the outputs of one task.
pub(super) fn up(range: &Range<'_>, indexes: std::ops::Range<usize>, deltas: &dyn Deltas, scratch: &[f32]) {
    for index in indexes {
        let Some(delta) = deltas.delta(index) else { continue };
        for part in 0..deltas.parts(index) {
            up_part(range, &delta, &deltas.part(index, part), scratch);
        }
    }
}

pub(super) fn up_part(range: &Range<'_>, delta: &RowsDelta<'_>, part: &DeltaOutputs<'_>, scratch: &[f32]) {
    assert!(delta.row_start + delta.rows <= range.rows, "a delta is outside of the batch");
    assert!(part.output_start + part.outputs <= range.linear.outputs, "a delta is outside of its matrix");
    assert_eq!(part.b.len(), part.ranks * part.outputs, "B has another shape");
    assert!(part.rank_start + part.ranks <= delta.ranks, "a part is outside of its delta");
    let Some((first, last)) = range.overlap(part) else { return };
    for row in 0..if part.ranks > 0 { delta.rows } else { 0 } {
        let t = &scratch[delta.scratch_start + row * delta.ranks + part.rank_start..][..part.ranks];
        // SAFETY: row and outputs are inside of y, and this task's own.
        let y = unsafe { range.y.add((delta.row_start + row) * range.linear.outputs + first) };
        launch(Up { t, y, part, first: first - part.output_start, count: last - first });
    }
}

/// Outputs `first..last` of all rows.
#[derive(Clone, Copy)]
pub(super) struct Range<'a> {
    x: *const f32,
    y: *mut f32,
    pub(super) rows: usize,
    pub(super) linear: &'a Linear<'a>,
    pub(super) first: usize,
    pub(super) last: usize,
}

impl Kernel for Range<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `linear` and `down` checked the lengths.
        unsafe {
            match self.linear.weight {
                Weight::F32(w) => self.blocks::<S, f32>(w.as_ptr()),
                Weight::BF16(w) => self.blocks::<S, bf16>(w.as_ptr()),
                Weight::F16(w) => self.blocks::<S, f16>(w.as_ptr()),
            }
        }
    }
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
        unsafe { std::slice::from_raw_parts_mut(self.y.add(row * self.linear.outputs + first), count) }
    }

    #[inline(always)]
    unsafe fn blocks<S: Simd, E: Element>(&self, w: *const E) {
        let mut row = 0;
        while row < self.rows {
            let until = (row + ROW_BLOCK).min(self.rows);
            let mut output = self.first;
            // SAFETY: rows and outputs stay inside what was checked.
            unsafe {
                while S::WIDE && output + 4 <= self.last {
                    self.column::<S, E, 4>(w, row, until, output);
                    output += 4;
                }
                while output + 2 <= self.last {
                    self.column::<S, E, 2>(w, row, until, output);
                    output += 2;
                }
                while output < self.last {
                    self.column::<S, E, 1>(w, row, until, output);
                    output += 1;
                }
            }
            row = until;
        }
    }

    #[inline(always)]
    unsafe fn column<S: Simd, E: Element, const N: usize>(
        &self,
        w: *const E,
        row: usize,
        until: usize,
        output: usize,
    ) {
        let mut row = row;
        // SAFETY: as above.
        unsafe {
            while S::WIDE && row + 4 <= until {
                self.tile::<S, E, 4, N>(w, row, output);
                row += 4;
            }
            while row + 2 <= until {
                self.tile::<S, E, 2, N>(w, row, output);
                row += 2;
            }
            if row < until {
                self.tile::<S, E, 1, N>(w, row, output);
            }
        }
    }

    /// M rows by N outputs. For each of them: sixteen partial sums over k in order, then their sum.
    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const M: usize, const N: usize>(
        &self,
        w: *const E,
        row: usize,
        output: usize,
    ) {
        let k = self.linear.inputs;
        // SAFETY: rows `row..row + M` of x and `output..output + N` of w exist; the last partial vector is
        // loaded through a copy.
        unsafe {
            let x = self.x.add(row * k);
            let w = w.add(output * k);
            let mut sums = [[S::splat(0.0); N]; M];
            let mut i = 0;
            while i + LANES <= k {
                let mut xs = [S::splat(0.0); M];
                unroll!(R < M {
                    xs[R] = S::load(x.add(R * k + i));
                });
                unroll!(O < N {
                    let ws = E::load::<S>(w.add(O * k + i));
                    unroll!(R < M {
                        sums[R][O] = S::mul_add(xs[R], ws, sums[R][O]);
                    });
                });
                i += LANES;
            }
            if i < k {
                unroll!(O < N {
                    let ws = load_part::<S, E>(w.add(O * k + i), k - i);
                    unroll!(R < M {
                        let xs = load_part::<S, f32>(x.add(R * k + i), k - i);
                        sums[R][O] = S::mul_add(xs, ws, sums[R][O]);
                    });
                });
            }
            unroll!(R < M {
                unroll!(O < N {
                    let mut sum = S::sum(sums[R][O]);
                    if let Some(bias) = self.linear.bias {
                        sum += *bias.as_ptr().add(output + O);
                    }
                    let y = self.y.add((row + R) * self.linear.outputs + output + O);
                    *y = if self.linear.accumulate { *y + sum } else { sum };
                });
            });
        }
    }
}

/// `y += Bᵀ t` along the outputs.
struct Up<'a> {
    t: &'a [f32],
    y: *mut f32,
    part: &'a DeltaOutputs<'a>,
    first: usize,
    count: usize,
}

impl Kernel for Up<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `up` checked the lengths.
        unsafe {
            match self.part.b {
                Weight::F32(b) => self.outputs::<S, f32>(b.as_ptr()),
                Weight::BF16(b) => self.outputs::<S, bf16>(b.as_ptr()),
                Weight::F16(b) => self.outputs::<S, f16>(b.as_ptr()),
            }
        }
    }
}

impl Up<'_> {
    #[inline(always)]
    unsafe fn outputs<S: Simd, E: Element>(&self, b: *const E) {
        let stride = self.part.outputs;
        // SAFETY: `first + count <= outputs`; a last partial vector goes through a copy.
        unsafe {
            let b = b.add(self.first);
            let mut i = 0;
            while i < self.count {
                let lanes = (self.count - i).min(LANES);
                let mut sum = S::splat(0.0);
                for (rank, t) in self.t.iter().enumerate() {
                    let at = b.add(rank * stride + i);
                    let bs = if lanes == LANES { E::load::<S>(at) } else { load_part::<S, E>(at, lanes) };
                    sum = S::mul_add(S::splat(*t), bs, sum);
                }
                let y = self.y.add(i);
                if lanes == LANES {
                    S::store(y, S::add(S::load(y), sum));
                } else {
                    let mut part = [0.0; LANES];
                    S::store(part.as_mut_ptr(), S::add(load_part::<S, f32>(y, lanes), sum));
                    std::ptr::copy_nonoverlapping(part.as_ptr(), y, lanes);
                }
                i += LANES;
            }
        }
    }
}
