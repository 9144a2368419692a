//! Passes over one row's numbers for a whole vocabulary: `[vocabulary]` logits, or their softmax numerators.
//!
//! A step at the end of a batch of 32 rows looks at millions of them, so each pass is a plain loop over sixteen lanes that
//! runs at the speed of the cache. Sums are made of blocks in a fixed order, so they do not depend on what else is
//! computed.
#![allow(unsafe_code)]

use super::simd::{Kernel, LANES, Simd, exp, launch};

/// Numbers whose sum is kept in f32; sums of blocks are added in f64.
pub const BLOCK: usize = 1024;

/// The largest number; `None` when any is not a number.
pub fn largest(x: &[f32]) -> Option<f32> {
    let mut found = None;
    launch(Largest { x, found: &mut found });
    found
}

struct Largest<'a> {
    x: &'a [f32],
    found: &'a mut Option<f32>,
}

impl Kernel for Largest<'_> {
    #[inline(always)]
    #[allow(
        clippy::needless_range_loop,
        reason = "plain counted loops are what unrolls under target features"
    )]
    unsafe fn run<S: Simd>(self) {
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut odd = [0.0_f32; LANES];
        let (whole, rest) = self.x.as_chunks::<LANES>();
        for x in whole {
            for j in 0..LANES {
                max[j] = if x[j] > max[j] { x[j] } else { max[j] };
                odd[j] = if x[j].is_nan() { 1.0 } else { odd[j] };
            }
        }
        let mut is_odd = odd.iter().any(|odd| *odd > 0.0);
        let mut largest = f32::NEG_INFINITY;
        for x in max.iter().chain(rest) {
            is_odd |= x.is_nan();
            largest = if *x > largest { *x } else { largest };
        }
        *self.found = (!is_odd).then_some(largest);
    }
}

/// `y = e^(scale * (x - max))`; gives the sum of y.
pub fn numerators(x: &[f32], max: f32, scale: f32, y: &mut [f32]) -> f64 {
    assert_eq!(x.len(), y.len(), "one numerator for each number");
    let mut sum = 0.0;
    launch(Numerators { x, max, scale, y, sum: &mut sum });
    sum
}

struct Numerators<'a> {
    x: &'a [f32],
    max: f32,
    scale: f32,
    y: &'a mut [f32],
    sum: &'a mut f64,
}

impl Kernel for Numerators<'_> {
    #[inline(always)]
    #[allow(
        clippy::needless_range_loop,
        reason = "plain counted loops are what unrolls under target features"
    )]
    unsafe fn run<S: Simd>(self) {
        for (x, y) in self.x.chunks(BLOCK).zip(self.y.chunks_mut(BLOCK)) {
            let mut sums = [0.0_f32; LANES];
            let ((whole, rest), (to, to_rest)) = (x.as_chunks::<LANES>(), y.as_chunks_mut::<LANES>());
            for (x, y) in whole.iter().zip(to) {
                let mut e = [0.0; LANES];
                for j in 0..LANES {
                    e[j] = (x[j] - self.max) * self.scale;
                }
                exp(&mut e);
                for j in 0..LANES {
                    sums[j] += e[j];
                }
                *y = e;
            }
            let mut e = [f32::NEG_INFINITY; LANES];
            for (e, x) in e.iter_mut().zip(rest) {
                *e = (*x - self.max) * self.scale;
            }
            exp(&mut e);
            to_rest.copy_from_slice(&e[..rest.len()]);
            for j in 0..LANES {
                sums[j] += e[j];
            }
            *self.sum += f64::from(sums.iter().sum::<f32>());
        }
    }
}

/// How many of these numbers are at least the threshold, and their sum.
pub fn at_least(x: &[f32], threshold: f32) -> (usize, f64) {
    let (mut count, mut mass) = (0, 0.0);
    launch(AtLeast { x, threshold, count: &mut count, mass: &mut mass });
    (count, mass)
}

struct AtLeast<'a> {
    x: &'a [f32],
    threshold: f32,
    count: &'a mut usize,
    mass: &'a mut f64,
}

impl Kernel for AtLeast<'_> {
    #[inline(always)]
    #[allow(
        clippy::needless_range_loop,
        reason = "plain counted loops are what unrolls under target features"
    )]
    unsafe fn run<S: Simd>(self) {
        let threshold = self.threshold;
        let (mut count, mut mass) = (0, 0.0);
        for x in self.x.chunks(BLOCK) {
            let (mut counts, mut sums) = ([0_u32; LANES], [0.0_f32; LANES]);
            let (whole, rest) = x.as_chunks::<LANES>();
            for x in whole {
                for j in 0..LANES {
                    let keep = x[j] >= threshold;
                    // At most 64 in each lane; a checked addition would keep the loop from being vectors.
                    counts[j] = counts[j].wrapping_add(u32::from(keep));
                    sums[j] += if keep { x[j] } else { 0.0 };
                }
            }
            count += counts.iter().sum::<u32>() as usize;
            mass += f64::from(sums.iter().sum::<f32>());
            for x in rest.iter().filter(|x| **x >= threshold) {
                count += 1;
                mass += f64::from(*x);
            }
        }
        (*self.count, *self.mass) = (count, mass);
    }
}

/// The numbers that are at least `from` and less than `below`, in their order, into `found`: at most `most`.
pub fn between(x: &[f32], from: f32, below: f32, most: usize, found: &mut Vec<f32>) {
    // Every vector is stored whole, also the last one.
    found.clear();
    found.resize(most + LANES, 0.0);
    let mut count = 0;
    launch(Between { x, from, below, found, count: &mut count });
    found.truncate(count);
}

struct Between<'a> {
    x: &'a [f32],
    from: f32,
    below: f32,
    found: &'a mut [f32],
    count: &'a mut usize,
}

impl Kernel for Between<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (whole, rest) = self.x.as_chunks::<LANES>();
        let mut count = 0;
        for x in whole {
            let to = &mut self.found[count..count + LANES];
            // SAFETY: sixteen numbers are read, and sixteen are written.
            count += unsafe { S::store_between(to.as_mut_ptr(), S::load(x.as_ptr()), self.from, self.below) };
        }
        for x in rest.iter().filter(|x| (self.from..self.below).contains(x)) {
            self.found[count] = *x;
            count += 1;
        }
        *self.count = count;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919) % 1013) as f32 / 100.0 - 5.0).collect()
    }

    #[test]
    fn every_length_gives_what_a_plain_loop_gives() {
        for n in [1, 15, 16, 17, 1023, 1024, 1025, 3000] {
            let x = numbers(n);
            let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(largest(&x), Some(max));

            let mut y = vec![f32::NAN; n];
            let sum = numerators(&x, max, 0.5, &mut y);
            let exact: Vec<f64> = x.iter().map(|x| (0.5 * f64::from(x - max)).exp()).collect();
            assert!((sum / exact.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{n}");
            assert!(y.iter().zip(&exact).all(|(y, e)| (f64::from(*y) - e).abs() < 1e-6), "{n}");

            let (count, mass) = at_least(&y, 0.25);
            let kept: Vec<f64> = y.iter().filter(|y| **y >= 0.25).map(|y| f64::from(*y)).collect();
            assert_eq!(count, kept.len());
            assert!((mass - kept.iter().sum::<f64>()).abs() < 1e-4, "{n}");

            let mut found = vec![f32::NAN; 3];
            between(&x, -1.0, 2.5, n, &mut found);
            let inside: Vec<f32> = x.iter().copied().filter(|x| (-1.0..2.5).contains(x)).collect();
            assert_eq!(found, inside, "{n}");
        }
    }

    #[test]
    fn what_is_not_a_number_is_found_wherever_it_is() {
        for n in [1, 16, 40] {
            for at in 0..n {
                let mut x = numbers(n);
                x[at] = f32::NAN;
                assert_eq!(largest(&x), None, "{at} of {n}");
            }
        }
        assert_eq!(largest(&[f32::NEG_INFINITY, 1.0]), Some(1.0));
    }
}
