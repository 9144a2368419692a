//! Loops over the rows of a step that need nothing but the row itself: norms, activations, rotation, softmax sums.
#![allow(unsafe_code)]

use super::matmul::Weight;
use super::simd::{Kernel, LANES, Simd, exp, launch, load_part};
use crate::number::Activation;
use turret_threads::Pool;

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
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
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
        // SAFETY: x and y have as many elements as the weight.
        unsafe {
            let scale = self.scale::<S>();
            for (i, weight) in self.weight.iter().enumerate() {
                *self.y.add(i) = *self.x.add(i) * scale * *weight;
            }
        }
    }
}

impl Norm<'_> {
    /// `1 / rms(x)`.
    #[inline(always)]
    unsafe fn scale<S: Simd>(&self) -> f32 {
        let n = self.weight.len();
        // SAFETY: x has as many elements as the weight.
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
            1.0 / (S::sum(sums) / n as f32 + self.eps).sqrt()
        }
    }
}

/// `y += x / rms(x) * weight`: a norm on what a block adds to the residual stream.
pub(crate) fn add_rms_norm(x: &[f32], weight: &[f32], eps: f32, y: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == y.len(), "a norm changes no width");
    launch(AddNorm(Norm { x: x.as_ptr(), weight, eps, y: y.as_mut_ptr() }));
}

struct AddNorm<'a>(Norm<'a>);

impl Kernel for AddNorm<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Norm { x, weight, y, .. } = self.0;
        // SAFETY: x and y have as many elements as the weight.
        unsafe {
            let scale = self.0.scale::<S>();
            for (i, weight) in weight.iter().enumerate() {
                *y.add(i) += *x.add(i) * scale * *weight;
            }
        }
    }
}

/// `y = activation(gate) * up`.
pub(crate) fn activate_mul(activation: Activation, gate: &[f32], up: &[f32], y: &mut [f32]) {
    assert!(gate.len() == y.len() && up.len() == y.len(), "an activation changes no width");
    match activation {
        Activation::Silu => launch(ActivateMul::<false> { gate, up, y }),
        Activation::GeluTanh => launch(ActivateMul::<true> { gate, up, y }),
    }
}

struct ActivateMul<'a, const GELU: bool> {
    gate: &'a [f32],
    up: &'a [f32],
    y: &'a mut [f32],
}

impl<const GELU: bool> Kernel for ActivateMul<'_, GELU> {
    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "lanes of several arrays side by side")]
    unsafe fn run<S: Simd>(self) {
        // √(2/π), doubled: (1 + tanh u) / 2 is 1 / (1 + e^-2u).
        const TWICE_ROOT: f32 = 1.595_769_2;
        let mut i = 0;
        while i < self.y.len() {
            let n = (self.y.len() - i).min(LANES);
            let mut e = [0.0; LANES];
            for j in 0..n {
                let x = self.gate[i + j];
                e[j] = if GELU { -(TWICE_ROOT * (x + 0.044_715 * x * x * x)) } else { -x };
            }
            exp(&mut e);
            for j in 0..n {
                self.y[i + j] = self.gate[i + j] / (1.0 + e[j]) * self.up[i + j];
            }
            i += LANES;
        }
    }
}

/// `y = cap · tanh(y / cap)`.
pub fn soft_cap(y: &mut [f32], cap: f32) {
    launch(SoftCap { y, cap });
}

struct SoftCap<'a> {
    y: &'a mut [f32],
    cap: f32,
}

impl Kernel for SoftCap<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (whole, rest) = self.y.as_chunks_mut::<LANES>();
        for lanes in whole {
            cap_lanes(lanes, self.cap);
        }
        let mut lanes = [0.0; LANES];
        lanes[..rest.len()].copy_from_slice(rest);
        cap_lanes(&mut lanes, self.cap);
        rest.copy_from_slice(&lanes[..rest.len()]);
    }
}

/// `x = cap · tanh(x / cap)` in every lane.
#[inline(always)]
pub(super) fn cap_lanes(x: &mut [f32; LANES], cap: f32) {
    let mut e = [0.0; LANES];
    for j in 0..LANES {
        x[j] /= cap;
        e[j] = 2.0 * x[j];
    }
    exp(&mut e);
    for j in 0..LANES {
        let z = x[j] * x[j];
        // Near zero the other form would lose what 1 - 1 loses (Cephes, tanhf.c).
        let mut p = -5.704_988_6e-3_f32;
        p = p * z + 2.063_908_8e-2;
        p = p * z - 5.373_971_5e-2;
        p = p * z + 1.333_144_2e-1;
        p = p * z - 3.333_328e-1;
        let near = p * z * x[j] + x[j];
        let far = 1.0 - 2.0 / (e[j] + 1.0);
        x[j] = cap * if z < 0.390_625 { near } else { far };
    }
}

/// Rotates the two halves of what is rotated of a head against each other: `(a, b) → (a cos − b sin, b cos + a sin)`.
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
pub fn widen(weight: Weight<'_>, row: usize, y: &mut [f32]) {
    let range = row * y.len()..(row + 1) * y.len();
    match weight {
        Weight::F32(w) => y.copy_from_slice(&w[range]),
        Weight::BF16(w) => y.iter_mut().zip(&w[range]).for_each(|(y, w)| *y = w.to_f32()),
        Weight::F16(w) => y.iter_mut().zip(&w[range]).for_each(|(y, w)| *y = w.to_f32()),
    }
}

/// `y += scale * row of a weight matrix`.
pub fn add_scaled(weight: Weight<'_>, row: usize, scale: f32, y: &mut [f32]) {
    let range = row * y.len()..(row + 1) * y.len();
    match weight {
        Weight::F32(w) => y.iter_mut().zip(&w[range]).for_each(|(y, w)| *y += scale * w),
        Weight::BF16(w) => y.iter_mut().zip(&w[range]).for_each(|(y, w)| *y += scale * w.to_f32()),
        Weight::F16(w) => y.iter_mut().zip(&w[range]).for_each(|(y, w)| *y += scale * w.to_f32()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Far from and near to zero, and where the two forms meet.
    fn numbers() -> Vec<f32> {
        (-400..=400).map(|i| i as f32 * 0.025).chain([0.0, 1e-6, -3e-4, 40.0, -40.0, 1e6, -1e6]).collect()
    }

    #[test]
    fn soft_caps_are_exact_to_a_few_units_in_the_last_place() {
        for cap in [1.0, 16.0, 30.0, 50.0] {
            let mut capped = numbers();
            soft_cap(&mut capped, cap);
            for (x, y) in numbers().iter().zip(&capped) {
                let exact = f64::from(cap) * (f64::from(*x) / f64::from(cap)).tanh();
                assert!(
                    (f64::from(*y) - exact).abs() <= 4e-7 * exact.abs(),
                    "{x} capped at {cap}: {y}, {exact}"
                );
            }
        }
    }

    #[test]
    fn gelu_is_exact_to_single_precision() {
        let (x, mut y) = (numbers(), vec![0.0; numbers().len()]);
        activate_mul(Activation::GeluTanh, &x, &vec![1.0; x.len()], &mut y);
        for (x, y) in x.iter().zip(&y) {
            let wide = f64::from(*x);
            let u = (2.0 / std::f64::consts::PI).sqrt() * (wide + 0.044715 * wide.powi(3));
            let exact = 0.5 * wide * (1.0 + u.tanh());
            assert!((f64::from(*y) - exact).abs() <= 3e-6 * (1.0 + exact.abs()), "gelu({x}) = {y}, {exact}");
        }
    }
}
