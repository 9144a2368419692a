//! What some rows do with a product before it is an output: DoRA's gains, and biases that a lens brings or adds to.
//!
//! `y = g · (W x + Σ s B A x) + b + Σ s c`. In a step where any row has a gain or a bias of its own, the bare products are kept
//! apart until they are settled; every other row gets the same sums in the same order as without it.
#![allow(unsafe_code)]

use super::matmul::{DeltaOutputs, Deltas, Range, up, up_part};
use super::simd::{Kernel, LANES, Simd, launch};

/// What DoRA multiplies an output by: `magnitude / ‖w + t d‖`, where `w` is the output's row of the matrix, `d` that of
/// the delta at its full scale, and `t` the scale the row asks for. As `‖w + t d‖² = w·w + t (2 w·d + t d·d)`, three
/// numbers made when the lens is loaded serve every `t`.
#[derive(Debug, Clone, Copy)]
pub struct Gain<'a> {
    /// One per output, like all below.
    pub magnitude: &'a [f32],
    /// `w·w`.
    pub base: &'a [f32],
    /// `2 w·d`.
    pub cross: &'a [f32],
    /// `d·d`.
    pub delta: &'a [f32],
    /// `t`.
    pub scale: f32,
}

/// `w·w`, `w·d` and `d·d`.
pub fn squares(w: &[f32], d: &[f32]) -> [f64; 3] {
    assert_eq!(w.len(), d.len(), "one number of the delta for each of the row");
    let mut sums = [0.0; 3];
    launch(Squares { w, d, sums: &mut sums });
    sums
}

struct Squares<'a> {
    w: &'a [f32],
    d: &'a [f32],
    sums: &'a mut [f64; 3],
}

impl Kernel for Squares<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // Short runs in f32 lanes, their sums in f64.
        for (w, d) in self.w.chunks(16 * LANES).zip(self.d.chunks(16 * LANES)) {
            let mut lanes = [[0.0_f32; LANES]; 3];
            for (w, d) in w.chunks(LANES).zip(d.chunks(LANES)) {
                for (i, (w, d)) in w.iter().zip(d).enumerate() {
                    lanes[0][i] += w * w;
                    lanes[1][i] += w * d;
                    lanes[2][i] += d * d;
                }
            }
            for (sum, lanes) in self.sums.iter_mut().zip(lanes) {
                *sum += lanes.iter().map(|x| f64::from(*x)).sum::<f64>();
            }
        }
    }
}

/// From bare products to `y`, for the outputs of one task: rows without gain or bias of their own get the same sums in
/// the same order as in a step where nobody has one.
pub(super) fn finish(products: &Range<'_>, to: &Range<'_>, deltas: &dyn Deltas, scratch: &[f32]) {
    let (mut row, mut index) = (0, 0);
    while row < to.rows {
        let next = (index..deltas.count()).find_map(|i| Some((i, deltas.delta(i)?)));
        let Some((start, chunk)) = next else {
            launch(Settle { products, to, rows: row..to.rows, replaced: None });
            return;
        };
        assert!(chunk.row_start >= row && chunk.rows > 0, "deltas are in the order of their rows");
        let rows = chunk.row_start..chunk.row_start + chunk.rows;
        assert!(rows.end <= to.rows, "a delta is outside of the batch");
        launch(Settle { products, to, rows: row..rows.start, replaced: None });
        let same = |i: &usize| deltas.delta(*i).is_none_or(|d| d.row_start == rows.start);
        let group = start..(start..deltas.count()).take_while(same).count() + start;
        let parts = || group.clone().flat_map(|i| (0..deltas.parts(i)).map(move |part| (i, part)));
        let parts = || parts().map(|(i, part)| deltas.part(i, part));
        if parts().any(|part| part.gain.is_some() || part.bias.is_some() || part.shift.is_some()) {
            for i in group.clone() {
                let Some(delta) = deltas.delta(i) else { continue };
                assert_eq!((delta.row_start, delta.rows), (rows.start, chunk.rows), "one range of rows");
                for part in 0..deltas.parts(i) {
                    let part = deltas.part(i, part);
                    up_part(products, &delta, &part, scratch);
                    if let Some(gain) = part.gain {
                        launch(Rescale { products, rows: rows.clone(), part: &part, gain });
                    }
                }
            }
            launch(Settle { products, to, rows: rows.clone(), replaced: Some((&group, deltas)) });
        } else {
            launch(Settle { products, to, rows: rows.clone(), replaced: None });
            up(to, group.clone(), deltas, scratch);
        }
        (row, index) = (rows.end, group.end);
    }
}

/// Multiplies the outputs of one part by its gain.
struct Rescale<'a> {
    products: &'a Range<'a>,
    rows: std::ops::Range<usize>,
    part: &'a DeltaOutputs<'a>,
    gain: Gain<'a>,
}

impl Kernel for Rescale<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Some((first, last)) = self.products.overlap(self.part) else { return };
        let Gain { magnitude, base, cross, delta, scale: t } = self.gain;
        let mut start = first;
        while start < last {
            let count = (last - start).min(LANES);
            let mut gains = [0.0_f32; LANES];
            for (i, gain) in gains[..count].iter_mut().enumerate() {
                let o = start + i - self.part.output_start;
                let square = base[o] + t * (cross[o] + t * delta[o]);
                *gain = magnitude[o] / square.max(f32::MIN_POSITIVE).sqrt();
            }
            for row in self.rows.clone() {
                // SAFETY: row and outputs are inside of the products, and this task's own.
                let y = unsafe { self.products.row(row, start, count) };
                y.iter_mut().zip(&gains).for_each(|(y, gain)| *y *= gain);
            }
            start += count;
        }
    }
}

/// Adds the bias to products, and the sum to `y` where it accumulates.
struct Settle<'a> {
    products: &'a Range<'a>,
    to: &'a Range<'a>,
    rows: std::ops::Range<usize>,
    /// Deltas that may have a bias in place of the matrix's own, or shift it.
    replaced: Option<(&'a std::ops::Range<usize>, &'a dyn Deltas)>,
}

impl Kernel for Settle<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let linear = self.to.linear;
        let mut start = self.to.first;
        while start < self.to.last {
            let count = (self.to.last - start).min(4 * LANES);
            let mut bias = linear.bias.map(|bias| {
                let mut own = [0.0; 4 * LANES];
                own[..count].copy_from_slice(&bias[start..start + count]);
                own
            });
            for (part, replaced) in self.biases() {
                let (first, last) =
                    (part.output_start.max(start), (part.output_start + part.outputs).min(start + count));
                if first < last {
                    let from = &replaced[first - part.output_start..last - part.output_start];
                    bias.get_or_insert([0.0; 4 * LANES])[first - start..last - start].copy_from_slice(from);
                }
            }
            for (part, shift) in self.shifts() {
                let (first, last) =
                    (part.output_start.max(start), (part.output_start + part.outputs).min(start + count));
                if first < last {
                    let from = &shift[first - part.output_start..last - part.output_start];
                    let to = &mut bias.get_or_insert([0.0; 4 * LANES])[first - start..last - start];
                    to.iter_mut().zip(from).for_each(|(to, shift)| *to += part.scale * shift);
                }
            }
            for row in self.rows.clone() {
                // SAFETY: row and outputs are inside of both, and this task's own. Where nothing accumulates the two
                // are the same numbers, and only one of the slices is made.
                let products = unsafe { self.products.row(row, start, count) };
                if let Some(bias) = &bias {
                    products.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
                }
                if linear.accumulate {
                    // SAFETY: as above.
                    let y = unsafe { self.to.row(row, start, count) };
                    y.iter_mut().zip(products).for_each(|(y, sum)| *y += *sum);
                }
            }
            start += count;
        }
    }
}

impl<'a> Settle<'a> {
    /// Biases in place of the matrix's own; a later one goes before an earlier one.
    fn biases(&self) -> impl Iterator<Item = (DeltaOutputs<'a>, &'a [f32])> {
        self.parts().filter_map(|part| Some((part, part.bias?)))
    }

    /// What is added to the bias.
    fn shifts(&self) -> impl Iterator<Item = (DeltaOutputs<'a>, &'a [f32])> {
        self.parts().filter_map(|part| Some((part, part.shift?)))
    }

    fn parts(&self) -> impl Iterator<Item = DeltaOutputs<'a>> {
        self.replaced.into_iter().flat_map(|(group, deltas)| {
            let parts = move |i| (0..deltas.parts(i)).map(move |part| deltas.part(i, part));
            group.clone().flat_map(parts)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::matmul::{Format, Linear, Packed, PackedShape, RowsDelta, Scratch, Weight, linear};
    use crate::number::Dtype;
    use turret_threads::Pool;

    use super::*;

    const INPUTS: usize = 37;
    const OUTPUTS: usize = 91;
    const RANK: usize = 3;
    const SHAPE: PackedShape =
        PackedShape { outputs: OUTPUTS, inputs: INPUTS, format: Format::Plain(Dtype::F32) };
    /// Two parts beside each other, the second with a bias of its own.
    const PARTS: [(usize, usize); 2] = [(0, 50), (50, 41)];

    /// Numbers between -1 and 1 that look random.
    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Base,
        Plain,
        Dora,
        /// DoRA that also replaces a bias, then a plain one that shifts it.
        Both,
    }

    struct Lens {
        a: Vec<f32>,
        b: [Vec<f32>; 2],
        magnitude: Vec<f32>,
        squares: [Vec<f32>; 3],
        bias: Vec<f32>,
    }

    impl Lens {
        fn new(seed: u64, w: &[f32]) -> Self {
            let a = numbers(seed, 2 * RANK * INPUTS);
            let b = [numbers(seed + 1, RANK * PARTS[0].1), numbers(seed + 2, RANK * PARTS[1].1)];
            let mut squares = [const { Vec::new() }; 3];
            for o in 0..PARTS[0].1 {
                let mut sums = [0.0; 3];
                for i in 0..INPUTS {
                    let w = f64::from(w[o * INPUTS + i]);
                    let d: f64 = (0..RANK)
                        .map(|r| 0.5 * f64::from(b[0][r * PARTS[0].1 + o]) * f64::from(a[r * INPUTS + i]))
                        .sum();
                    sums = [sums[0] + w * w, sums[1] + 2.0 * w * d, sums[2] + d * d];
                }
                squares.iter_mut().zip(sums).for_each(|(to, sum)| to.push(sum as f32));
            }
            let magnitude = numbers(seed + 3, PARTS[0].1).iter().map(|m| m + 2.0).collect();
            Self { a, b, magnitude, squares, bias: numbers(seed + 4, PARTS[1].1) }
        }
    }

    struct Step<'a> {
        uses: Vec<(usize, usize, &'a Lens, bool, f32)>,
        finish: bool,
    }

    impl Deltas for Step<'_> {
        fn count(&self) -> usize {
            self.uses.len()
        }
        fn delta(&self, index: usize) -> Option<RowsDelta<'_>> {
            let (row_start, rows, lens, ..) = self.uses[index];
            let scratch_start = self.uses[..index].iter().map(|u| u.1 * 2 * RANK).sum();
            Some(RowsDelta { row_start, rows, a: Weight::F32(&lens.a), ranks: 2 * RANK, scratch_start })
        }
        fn parts(&self, _: usize) -> usize {
            2
        }
        fn part(&self, index: usize, part: usize) -> DeltaOutputs<'_> {
            let (_, _, lens, dora, t) = self.uses[index];
            let [base, cross, delta] = &lens.squares;
            let gain = Gain { magnitude: &lens.magnitude, base, cross, delta, scale: t };
            DeltaOutputs {
                rank_start: part * RANK,
                ranks: RANK,
                output_start: PARTS[part].0,
                outputs: PARTS[part].1,
                b: Weight::F32(&lens.b[part]),
                scale: 0.5 * t,
                gain: (dora && part == 0).then_some(gain),
                bias: (dora && part == 1).then_some(&lens.bias),
                shift: (!dora && t == 1.5 && part == 1).then_some(&lens.bias),
            }
        }
        fn finish_start(&self) -> Option<usize> {
            self.finish.then(|| self.uses.iter().map(|u| u.1 * 2 * RANK).sum())
        }
    }

    struct Fixture {
        w: Vec<f32>,
        packed: Vec<f32>,
        bias: Vec<f32>,
        x: Vec<f32>,
        before: Vec<f32>,
        lenses: [Lens; 2],
        pool: Pool,
    }

    impl Fixture {
        fn new(rows: usize) -> Self {
            let w = numbers(1, INPUTS * OUTPUTS);
            let lenses = [Lens::new(10, &w), Lens::new(20, &w)];
            let mut packed = vec![0.0_f32; SHAPE.bytes() / 4];
            SHAPE.pack(0, bytemuck::cast_slice(&w), bytemuck::cast_slice_mut(&mut packed));
            let (bias, x) = (numbers(2, OUTPUTS), numbers(3, rows * INPUTS));
            Self { w, packed, bias, x, before: numbers(4, rows * OUTPUTS), lenses, pool: Pool::new(2) }
        }

        /// Chunks of rows, from row `start` on.
        fn run(&self, start: usize, chunks: &[(usize, Kind)], accumulate: bool) -> Vec<f32> {
            let (mut rows, mut uses) = (0, Vec::new());
            for (count, kind) in chunks {
                let [one, two] = &self.lenses;
                match kind {
                    Kind::Base => {}
                    Kind::Plain => uses.push((rows, *count, two, false, 1.0)),
                    Kind::Dora => uses.push((rows, *count, one, true, 0.75)),
                    Kind::Both => {
                        uses.push((rows, *count, one, true, 1.0));
                        uses.push((rows, *count, two, false, 1.5));
                    }
                }
                rows += count;
            }
            let finish = chunks.iter().any(|(_, kind)| matches!(kind, Kind::Dora | Kind::Both));
            let step = Step { uses, finish };
            let mut y = self.before[start * OUTPUTS..(start + rows) * OUTPUTS].to_vec();
            let mut scratch = Scratch::default();
            scratch.reserve_ranks(rows * (4 * RANK + OUTPUTS));
            let matrix = Linear {
                weight: Packed::new(SHAPE, bytemuck::cast_slice(&self.packed)),
                bias: Some(&self.bias),
                accumulate,
            };
            linear(&self.pool, matrix, &step, &self.x[start * INPUTS..], &mut y, rows, &mut scratch);
            y
        }

        /// The same by the formula, in f64, with the delta and its norm written out.
        fn expected(&self, row: usize, kind: Kind, accumulate: bool) -> Vec<f64> {
            let x = |i: usize| f64::from(self.x[row * INPUTS + i]);
            let w = |o: usize, i: usize| f64::from(self.w[o * INPUTS + i]);
            let delta = |lens: &Lens, part: usize, o: usize, i: usize, scale: f64| -> f64 {
                let (start, count) = PARTS[part];
                (0..RANK)
                    .map(|r| {
                        scale
                            * f64::from(lens.b[part][r * count + o - start])
                            * f64::from(lens.a[(part * RANK + r) * INPUTS + i])
                    })
                    .sum()
            };
            (0..OUTPUTS)
                .map(|o| {
                    let part = usize::from(o >= PARTS[1].0);
                    let dot = |f: &dyn Fn(usize) -> f64| (0..INPUTS).map(|i| f(i) * x(i)).sum::<f64>();
                    let mut y = dot(&|i| w(o, i));
                    let mut bias = f64::from(self.bias[o]);
                    let [one, two] = &self.lenses;
                    if kind == Kind::Plain {
                        y += dot(&|i| delta(two, part, o, i, 0.5));
                    }
                    if matches!(kind, Kind::Dora | Kind::Both) {
                        let t = if kind == Kind::Both { 1.0 } else { 0.75 };
                        y += dot(&|i| delta(one, part, o, i, 0.5 * t));
                        if part == 0 {
                            let square: f64 =
                                (0..INPUTS).map(|i| (w(o, i) + delta(one, 0, o, i, 0.5 * t)).powi(2)).sum();
                            y *= f64::from(one.magnitude[o]) / square.sqrt();
                        } else {
                            bias = f64::from(one.bias[o - PARTS[1].0]);
                        }
                    }
                    if kind == Kind::Both {
                        y += dot(&|i| delta(two, part, o, i, 0.75));
                        if part == 1 {
                            bias += 0.75 * f64::from(two.bias[o - PARTS[1].0]);
                        }
                    }
                    let before = if accumulate { f64::from(self.before[row * OUTPUTS + o]) } else { 0.0 };
                    before + y + bias
                })
                .collect()
        }
    }

    #[test]
    fn gains_and_biases_follow_the_formula_beside_rows_without() {
        let chunks = [
            (1, Kind::Dora),
            (3, Kind::Base),
            (2, Kind::Plain),
            (4, Kind::Both),
            (1, Kind::Dora),
            (5, Kind::Plain),
            (2, Kind::Base),
        ];
        let rows = chunks.iter().map(|c| c.0).sum();
        let fixture = Fixture::new(rows);
        for accumulate in [false, true] {
            let y = fixture.run(0, &chunks, accumulate);
            let kinds = chunks.iter().flat_map(|(count, kind)| std::iter::repeat_n(*kind, *count));
            for (row, kind) in kinds.enumerate() {
                let expected = fixture.expected(row, kind, accumulate);
                for (o, expected) in expected.iter().enumerate() {
                    let found = f64::from(y[row * OUTPUTS + o]);
                    assert!((found - expected).abs() < 2e-5, "row {row}, output {o}: {found}, {expected}");
                }
            }
        }
    }

    #[test]
    fn every_row_of_a_mix_has_the_bits_it_has_alone() {
        let chunks = [(2, Kind::Base), (3, Kind::Dora), (1, Kind::Plain), (2, Kind::Both), (3, Kind::Plain)];
        let fixture = Fixture::new(11);
        for accumulate in [false, true] {
            let mixed = fixture.run(0, &chunks, accumulate);
            let mut start = 0;
            for (count, kind) in chunks {
                for row in start..start + count {
                    let alone = fixture.run(row, &[(1, kind)], accumulate);
                    let bits = |y: &[f32]| y.iter().map(|y| y.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(&alone), bits(&mixed[row * OUTPUTS..][..OUTPUTS]), "row {row}");
                }
                start += count;
            }
        }
    }
}
