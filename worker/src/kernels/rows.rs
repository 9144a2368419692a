//! Loops over the rows of a step that need nothing but the row itself: norms, activations, rotation, softmax sums.
#![allow(unsafe_code)]

use super::matmul::Weight;
use super::simd::{Kernel, LANES, Simd, exp, launch, load_part};
use super::threads::Pool;

/// Numbers below which a loop is not worth waking other threads.
const WORTH_SHARING: usize = 1 << 14;

/// A slice of rows that several threads write, each its own rows.
struct Rows {
    start: *mut f32,
    width: usize,
}
// SAFETY: `each_row` hands every row to one task.
unsafe impl Sync for Rows {}
impl Rows {
    /// # Safety
    /// The row exists, and nobody else has it.
    #[allow(clippy::mut_from_ref, reason = "rows are disjoint")]
    unsafe fn row(&self, index: usize) -> &mut [f32] {
        // SAFETY: the caller's contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(index * self.width), self.width) }
    }
}

/// Calls `call(index, row)` for the first `rows` rows of `y`, shared between threads when there is enough to do.
pub(crate) fn each_row(
    pool: &Pool,
    y: &mut [f32],
    width: usize,
    rows: usize,
    call: impl Fn(usize, &mut [f32]) + Sync,
) {
    assert!(y.len() >= rows * width, "there are fewer rows");
    let all = Rows { start: y.as_mut_ptr(), width };
    let tasks = if rows * width < WORTH_SHARING { 1 } else { rows.min(pool.threads() * 4) };
    pool.run(tasks, &|task| {
        for index in (rows * task / tasks)..(rows * (task + 1) / tasks) {
            // SAFETY: the ranges of the tasks are disjoint and end at `rows`.
            call(index, unsafe { all.row(index) });
        }
    });
}

/// `y = x / rms(x) * weight`.
pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == y.len(), "a norm changes no width");
    launch(Norm { x: x.as_ptr(), weight, eps, y: y.as_mut_ptr() });
}

/// The same in place.
pub(crate) fn rms_norm_in_place(y: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(y.len(), weight.len(), "a norm changes no width");
    let y = y.as_mut_ptr();
    launch(Norm { x: y.cast_const(), weight, eps, y });
}

struct Norm<'a> {
    /// May be `y`: every element is read before it is written.
    x: *const f32,
    weight: &'a [f32],
    eps: f32,
    y: *mut f32,
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let n = self.weight.len();
        // SAFETY: x and y have as many elements as the weight.
        unsafe {
            let mut sums = S::splat(0.0);
            let mut i = 0;
            while i + LANES <= n {
                let x = S::load(self.x.add(i));
                sums = S::mul_add(x, x, sums);
                i += LANES;
            }
            if i < n {
                let x = load_part::<S, f32>(self.x.add(i), n - i);
                sums = S::mul_add(x, x, sums);
            }
            let scale = 1.0 / (S::sum(sums) / n as f32 + self.eps).sqrt();
            for i in 0..n {
                *self.y.add(i) = *self.x.add(i) * scale * *self.weight.as_ptr().add(i);
            }
        }
    }
}

/// `y = silu(gate) * up`.
pub(crate) fn silu_mul(gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len(), "silu changes no width");
    launch(SiluMul { gate, up, y });
}

struct SiluMul<'a> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "lanes of several arrays side by side")]
    unsafe fn run<S: Simd>(self) {
        let mut i = 0;
        while i < self.y.len() {
            let n = (self.y.len() - i).min(LANES);
            let mut e = [0.0; LANES];
            for j in 0..n {
                e[j] = -self.gate[i + j];
            }
            exp(&mut e);
            for j in 0..n {
                self.y[i + j] = self.gate[i + j] / (1.0 + e[j]) * self.up[i + j];
            }
            i += LANES;
        }
    }
}

/// Rotates the two halves of a head against each other: `(a, b) → (a cos − b sin, b cos + a sin)`.
pub(crate) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = head.len() / 2;
    assert!(cos.len() == half && sin.len() == half, "one angle for each pair");
    let (a, b) = head.split_at_mut(half);
    for i in 0..half {
        let (x, y) = (a[i], b[i]);
        a[i] = x * cos[i] - y * sin[i];
        b[i] = y * cos[i] + x * sin[i];
    }
}

/// A row of a weight matrix in f32.
pub(crate) fn widen(weight: Weight<'_>, row: usize, y: &mut [f32]) {
    let range = row * y.len()..(row + 1) * y.len();
    match weight {
        Weight::F32(w) => y.copy_from_slice(&w[range]),
        Weight::BF16(w) => y.iter_mut().zip(&w[range]).for_each(|(y, w)| *y = w.to_f32()),
        Weight::F16(w) => y.iter_mut().zip(&w[range]).for_each(|(y, w)| *y = w.to_f32()),
    }
}

/// The largest number and the sum of `e^(x - largest)` over all. Not-a-number anywhere makes the sum so.
pub(crate) fn max_and_exp_sum(x: &[f32]) -> (f32, f32) {
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
    launch(ExpSum { x, scale: 1.0, y: None, max: &mut max, sum: &mut sum });
    (max, sum)
}

/// `y = e^(scale * (x - largest))`; gives the sum of y.
pub(crate) fn softmax_numerators(x: &[f32], scale: f32, y: &mut [f32]) -> f32 {
    assert_eq!(x.len(), y.len(), "one numerator for each number");
    let (mut max, mut sum) = (f32::NEG_INFINITY, 0.0);
    launch(ExpSum { x, scale, y: Some(y), max: &mut max, sum: &mut sum });
    sum
}

struct ExpSum<'a> {
    x: &'a [f32],
    scale: f32,
    y: Option<&'a mut [f32]>,
    max: &'a mut f32,
    sum: &'a mut f32,
}

impl Kernel for ExpSum<'_> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "lanes of several arrays side by side")]
    unsafe fn run<S: Simd>(mut self) {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = self.x.as_chunks::<LANES>();
        for x in whole {
            for j in 0..LANES {
                lanes[j] = if x[j] > lanes[j] { x[j] } else { lanes[j] };
            }
        }
        let mut max = f32::NEG_INFINITY;
        for x in lanes.iter().chain(rest) {
            max = if *x > max { *x } else { max };
        }
        let mut sums = [0.0_f32; LANES];
        let mut i = 0;
        while i < self.x.len() {
            let n = (self.x.len() - i).min(LANES);
            let mut e = [f32::NEG_INFINITY; LANES];
            for j in 0..n {
                e[j] = (self.x[i + j] - max) * self.scale;
            }
            exp(&mut e);
            for j in 0..LANES {
                sums[j] += e[j];
            }
            if let Some(y) = &mut self.y {
                y[i..i + n].copy_from_slice(&e[..n]);
            }
            i += LANES;
        }
        *self.max = max;
        *self.sum = sums.iter().sum();
    }
}
