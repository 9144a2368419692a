//! Low-rank deltas: `A x` of every delta first, then `B (A x)` onto the outputs of each task.
//!
//! A is multiplied row by row (sixteen partial sums over the inputs, then their sum), B along the outputs (one chain over
//! the ranks): both stream their matrix once for up to four rows.
#![allow(unsafe_code)]

use half::{bf16, f16};

use super::{DeltaOutputs, Deltas, Linear, Range, RowsDelta, Shared, WORTH_SHARING, Weight};
use crate::simd::{Element, Kernel, LANES, Simd, launch, load_part, unroll};
use turret_threads::Pool;

/// `A x` of every delta into the scratch, scaled.
pub(super) fn down(pool: &Pool, linear: &Linear<'_>, deltas: &dyn Deltas, x: &[f32], scratch: &mut [f32]) {
    let count = deltas.count();
    let inputs = linear.inputs();
    let mut work = 0;
    for index in 0..count {
        let Some(delta) = deltas.delta(index) else { continue };
        work += delta.rows * delta.ranks * inputs;
        assert!(scratch.len() >= delta.scratch_start + delta.rows * delta.ranks, "the scratch is too short");
        assert!(x.len() >= (delta.row_start + delta.rows) * inputs, "x is too short");
        assert_eq!(delta.a.len(), delta.ranks * inputs, "A has another shape");
    }
    if work == 0 {
        return;
    }
    let to = Shared(scratch.as_mut_ptr());
    let one = |index: usize, slice: usize, slices: usize| {
        let Some(delta) = deltas.delta(index) else { return };
        let share = delta.ranks.div_ceil(slices).next_multiple_of(4);
        let first = (slice * share).min(delta.ranks);
        let last = (first + share).min(delta.ranks);
        // SAFETY: the lengths were checked above.
        let (x, y) = unsafe { (x.as_ptr().add(delta.row_start * inputs), to.get().add(delta.scratch_start)) };
        launch(Dots { x, y, rows: delta.rows, inputs, a: delta.a, ranks: delta.ranks, first, last });
        for part in 0..deltas.parts(index) {
            let part = deltas.part(index, part);
            let ranks = part.rank_start.max(first)..(part.rank_start + part.ranks).min(last);
            for rank in ranks {
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
pub(crate) fn up(range: &Range<'_>, indexes: std::ops::Range<usize>, deltas: &dyn Deltas, scratch: &[f32]) {
    for index in indexes {
        let Some(delta) = deltas.delta(index) else { continue };
        for part in 0..deltas.parts(index) {
            up_part(range, &delta, &deltas.part(index, part), scratch);
        }
    }
}

/// Adds one part of a delta to the outputs of one task.
pub(crate) fn up_part(range: &Range<'_>, delta: &RowsDelta<'_>, part: &DeltaOutputs<'_>, scratch: &[f32]) {
    assert!(delta.row_start + delta.rows <= range.rows, "a delta is outside of the batch");
    assert!(part.output_start + part.outputs <= range.linear.outputs(), "a delta is outside of its matrix");
    assert_eq!(part.b.len(), part.ranks * part.outputs, "B has another shape");
    assert!(part.rank_start + part.ranks <= delta.ranks, "a part is outside of its delta");
    let Some((first, last)) = range.overlap(part) else { return };
    if delta.rows == 0 || part.ranks == 0 {
        return;
    }
    let t = &scratch[delta.scratch_start + part.rank_start..];
    assert!(t.len() >= (delta.rows - 1) * delta.ranks + part.ranks, "the scratch is too short");
    launch(Up {
        t: t.as_ptr(),
        ranks: delta.ranks,
        // SAFETY: rows and outputs are inside of y, and this task's own.
        y: unsafe { range.y.add(delta.row_start * range.linear.outputs() + first) },
        stride: range.linear.outputs(),
        rows: delta.rows,
        part,
        first: first - part.output_start,
        count: last - first,
    });
}

/// Asks memory for the numbers of B that [`up`] will read: short pieces far from each other, which the hardware does not
/// foresee.
pub(super) fn ask(range: &Range<'_>, deltas: &dyn Deltas) {
    for index in 0..deltas.count() {
        for part in 0..deltas.parts(index) {
            let part = deltas.part(index, part);
            if let Some((first, last)) = range.overlap(&part) {
                launch(Ask { part: &part, first: first - part.output_start, last: last - part.output_start });
            }
        }
    }
}

struct Ask<'a> {
    part: &'a DeltaOutputs<'a>,
    first: usize,
    last: usize,
}

impl Kernel for Ask<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (b, size) = match self.part.b {
            Weight::F32(b) => (b.as_ptr().cast::<u8>(), 4),
            Weight::BF16(b) => (b.as_ptr().cast(), 2),
            Weight::F16(b) => (b.as_ptr().cast(), 2),
        };
        for rank in 0..self.part.ranks {
            let row = rank * self.part.outputs;
            for at in ((row + self.first) * size..(row + self.last) * size).step_by(64) {
                // SAFETY: a hint; it reads nothing.
                unsafe { S::prefetch(b.wrapping_add(at)) };
            }
        }
    }
}

/// Ranks `first..last` of `A x` for some rows.
struct Dots<'a> {
    x: *const f32,
    y: *mut f32,
    rows: usize,
    inputs: usize,
    a: Weight<'a>,
    ranks: usize,
    first: usize,
    last: usize,
}

impl Kernel for Dots<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `down` checked the lengths.
        unsafe {
            match self.a {
                Weight::F32(a) => self.all::<S, f32>(a.as_ptr()),
                Weight::BF16(a) => self.all::<S, bf16>(a.as_ptr()),
                Weight::F16(a) => self.all::<S, f16>(a.as_ptr()),
            }
        }
    }
}

impl Dots<'_> {
    #[inline(always)]
    unsafe fn all<S: Simd, E: Element>(&self, a: *const E) {
        let mut rank = self.first;
        // SAFETY: ranks stay inside what was checked.
        unsafe {
            while S::WIDE && rank + 4 <= self.last {
                self.column::<S, E, 4>(a, rank);
                rank += 4;
            }
            while rank + 2 <= self.last {
                self.column::<S, E, 2>(a, rank);
                rank += 2;
            }
            while rank < self.last {
                self.column::<S, E, 1>(a, rank);
                rank += 1;
            }
        }
    }

    #[inline(always)]
    unsafe fn column<S: Simd, E: Element, const N: usize>(&self, a: *const E, rank: usize) {
        let mut row = 0;
        // SAFETY: as above.
        unsafe {
            while S::WIDE && row + 4 <= self.rows {
                self.tile::<S, E, 4, N>(a, row, rank);
                row += 4;
            }
            while row + 2 <= self.rows {
                self.tile::<S, E, 2, N>(a, row, rank);
                row += 2;
            }
            if row < self.rows {
                self.tile::<S, E, 1, N>(a, row, rank);
            }
        }
    }

    /// M rows by N ranks. For each of them: sixteen partial sums over the inputs in order, then their sum.
    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const M: usize, const N: usize>(
        &self,
        a: *const E,
        row: usize,
        rank: usize,
    ) {
        let k = self.inputs;
        // SAFETY: rows `row..row + M` of x and `rank..rank + N` of A exist; the last partial vector is
        // loaded through a copy.
        unsafe {
            let x = self.x.add(row * k);
            let a = a.add(rank * k);
            let mut sums = [[S::splat(0.0); N]; M];
            let mut i = 0;
            while i + LANES <= k {
                let mut xs = [S::splat(0.0); M];
                unroll!(R < M {
                    xs[R] = S::load(x.add(R * k + i));
                });
                unroll!(O < N {
                    let ws = E::load::<S>(a.add(O * k + i));
                    unroll!(R < M {
                        sums[R][O] = S::mul_add(xs[R], ws, sums[R][O]);
                    });
                });
                i += LANES;
            }
            if i < k {
                unroll!(O < N {
                    let ws = load_part::<S, E>(a.add(O * k + i), k - i);
                    unroll!(R < M {
                        let xs = load_part::<S, f32>(x.add(R * k + i), k - i);
                        sums[R][O] = S::mul_add(xs, ws, sums[R][O]);
                    });
                });
            }
            unroll!(R < M {
                unroll!(O < N {
                    *self.y.add((row + R) * self.ranks + rank + O) = S::sum(sums[R][O]);
                });
            });
        }
    }
}

/// `y += Bᵀ t` along the outputs, for some rows.
struct Up<'a> {
    /// Rows of `ranks` numbers, from the part's first rank on.
    t: *const f32,
    ranks: usize,
    /// Rows of `stride` numbers, from the first output on.
    y: *mut f32,
    stride: usize,
    rows: usize,
    part: &'a DeltaOutputs<'a>,
    /// First output of the part, and how many.
    first: usize,
    count: usize,
}

impl Kernel for Up<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: `up_part` checked the lengths.
        unsafe {
            match self.part.b {
                Weight::F32(b) => self.all::<S, f32>(b.as_ptr()),
                Weight::BF16(b) => self.all::<S, bf16>(b.as_ptr()),
                Weight::F16(b) => self.all::<S, f16>(b.as_ptr()),
            }
        }
    }
}

impl Up<'_> {
    #[inline(always)]
    unsafe fn all<S: Simd, E: Element>(&self, b: *const E) {
        // SAFETY: `first + count <= outputs`; a last partial vector goes through a copy.
        unsafe {
            let b = b.add(self.first);
            let mut i = 0;
            while i < self.count {
                let mut row = 0;
                while row + 4 <= self.rows {
                    self.tile::<S, E, 4>(b.add(i), row, i);
                    row += 4;
                }
                while row < self.rows {
                    self.tile::<S, E, 1>(b.add(i), row, i);
                    row += 1;
                }
                i += LANES;
            }
        }
    }

    /// M rows by sixteen outputs, or as many as are left.
    #[inline(always)]
    unsafe fn tile<S: Simd, E: Element, const M: usize>(&self, b: *const E, row: usize, i: usize) {
        let lanes = (self.count - i).min(LANES);
        // SAFETY: as above.
        unsafe {
            let t = self.t.add(row * self.ranks);
            let mut sums = [S::splat(0.0); M];
            for rank in 0..self.part.ranks {
                let at = b.add(rank * self.part.outputs);
                let bs = if lanes == LANES { E::load::<S>(at) } else { load_part::<S, E>(at, lanes) };
                unroll!(R < M {
                    sums[R] = S::mul_add(S::splat(*t.add(R * self.ranks + rank)), bs, sums[R]);
                });
            }
            unroll!(R < M {
                let y = self.y.add((row + R) * self.stride + i);
                if lanes == LANES {
                    S::store(y, S::add(S::load(y), sums[R]));
                } else {
                    let mut part = [0.0; LANES];
                    S::store(part.as_mut_ptr(), S::add(load_part::<S, f32>(y, lanes), sums[R]));
                    std::ptr::copy_nonoverlapping(part.as_ptr(), y, lanes);
                }
            });
        }
    }
}
