//! Every format, shape and number of rows against sums in f64; and a row alone against the same row in any batch, to the bit.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::number::Dtype;
use turret_threads::Pool;

/// Numbers that differ from place to place, between -1 and 1.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Row-major bytes of a matrix as it is packed from, and the numbers that are then in it.
fn stored(values: &[f32], inputs: usize, format: Format) -> (Vec<u8>, Vec<f32>) {
    match format {
        Format::Plain(Dtype::F32) => (bytemuck::cast_slice(values).to_vec(), values.to_vec()),
        Format::Q8_0 => {
            let rounded = values.chunks(inputs).flat_map(|row| row.chunks(32).flat_map(rounded_weights));
            (bytemuck::cast_slice(values).to_vec(), rounded.collect())
        }
        Format::Plain(Dtype::BF16) => {
            let w: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            (bytemuck::cast_slice(&w).to_vec(), w.iter().map(|w| w.to_f32()).collect())
        }
        Format::Plain(Dtype::F16) => {
            let w: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            (bytemuck::cast_slice(&w).to_vec(), w.iter().map(|w| w.to_f32()).collect())
        }
    }
}

fn largest(block: &[f32]) -> f32 {
    block.iter().fold(0.0, |largest, x| x.abs().max(largest))
}

/// A block of weights as Q8_0 keeps it, written down once more and plainly.
fn rounded_weights(block: &[f32]) -> Vec<f32> {
    let d = largest(block) / 127.0;
    block.iter().map(|w| (w * (1.0 / d)).round() * f16::from_f32(d).to_f32()).collect()
}

struct Case {
    shape: PackedShape,
    bytes: Vec<u32>,
    exact: Vec<f32>,
    bias: Vec<f32>,
    x: Vec<f32>,
    rows: usize,
}

impl Case {
    fn new(format: Format, outputs: usize, inputs: usize, rows: usize) -> Self {
        let shape = PackedShape { outputs, inputs, format };
        let (row_major, exact) = stored(&numbers(outputs * inputs, 7), inputs, format);
        let mut bytes = vec![0_u32; shape.bytes().div_ceil(4)];
        // In uneven pieces, as a loader brings them.
        let row_bytes = inputs * shape.row_dtype().bytes();
        let mut output = 0;
        for piece in row_major.chunks(row_bytes * 7) {
            shape.pack(output, piece, &mut bytemuck::cast_slice_mut(&mut bytes)[..shape.bytes()]);
            output += piece.len() / row_bytes;
        }
        Self { shape, bytes, exact, bias: numbers(outputs, 3), x: numbers(rows * inputs, 5), rows }
    }

    fn packed(&self) -> Packed<'_> {
        Packed::new(self.shape, &bytemuck::cast_slice(&self.bytes)[..self.shape.bytes()])
    }

    fn compute(&self, x: &[f32], rows: usize, start: Option<f32>) -> Vec<f32> {
        let mut y = vec![start.unwrap_or(f32::NAN); rows * self.shape.outputs];
        let linear_map =
            Linear { weight: self.packed(), bias: Some(&self.bias), accumulate: start.is_some() };
        linear(&Pool::new(2), linear_map, &NoDeltas, x, &mut y, rows, &mut Scratch::default());
        y
    }
}

const FORMATS: [Format; 4] =
    [Format::Plain(Dtype::F32), Format::Plain(Dtype::F16), Format::Plain(Dtype::BF16), Format::Q8_0];

/// How far an output may be from the sum in f64 of these weights and inputs: from rounding inputs, and from adding. `other` is
/// added as well.
fn bound(format: Format, w: &[f32], x: &[f32], other: f64) -> f64 {
    let size = |w: &[f32]| w.iter().map(|w| f64::from(w.abs())).sum::<f64>();
    let products = w.iter().zip(x).map(|(w, x)| f64::from((w * x).abs())).sum::<f64>();
    let rounding = match format {
        Format::Plain(Dtype::BF16) => 2.0_f64.powi(-9) * products,
        Format::Plain(_) => 0.0,
        Format::Q8_0 => {
            // Half a step, and what the quotient's own rounding moves at most: 127 steps by 2⁻²³.
            let half_step = (0.5 + 127.0 * 2.0_f64.powi(-23)) / 127.0;
            let blocks = w.chunks(32).zip(x.chunks(32));
            blocks.map(|(w, x)| f64::from(largest(x)) * half_step * size(w)).sum()
        }
    };
    rounding + w.len().max(4) as f64 * 2.0_f64.powi(-24) * (products + rounding + other)
}

#[test]
fn products_are_right_within_the_stated_bound() {
    for format in FORMATS {
        for (outputs, inputs, rows) in
            [(1, 1, 1), (16, 8, 1), (33, 31, 3), (40, 64, 12), (64, 2500, 13), (100, 77, 101), (31, 4864, 2)]
        {
            let case = Case::new(format, outputs, inputs, rows);
            let y = case.compute(&case.x, rows, None);
            let added = case.compute(&case.x, rows, Some(2.0));
            for row in 0..rows {
                for output in 0..outputs {
                    let x = &case.x[row * inputs..][..inputs];
                    let w = &case.exact[output * inputs..][..inputs];
                    let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let want = terms.sum::<f64>() + f64::from(case.bias[output]);
                    let got = y[row * outputs + output];
                    assert!(
                        (f64::from(got) - want).abs() <= bound(format, w, x, 3.0),
                        "{format} {outputs}x{inputs}: {got} {want}"
                    );
                    assert_eq!(added[row * outputs + output], 2.0 + got, "{format} {outputs}x{inputs} added");
                }
            }
        }
    }
}

#[test]
fn quantized_products_are_exact_but_for_adding() {
    // Blocks of whole numbers whose largest is 127 are their own quantization, with a scale of one.
    let whole = |count: usize, seed| -> Vec<f32> {
        let mut numbers: Vec<f32> = numbers(count, seed).iter().map(|x| (x * 127.0).round()).collect();
        numbers.iter_mut().step_by(32).for_each(|x| *x = 127.0_f32.copysign(*x));
        numbers
    };
    let (outputs, inputs, rows) = (48, 32 * 31, 5);
    let mut case = Case::new(Format::Q8_0, outputs, inputs, rows);
    let w = whole(outputs * inputs, 11);
    case.bias.fill(0.0);
    case.x = whole(rows * inputs, 12);
    let bytes = &mut bytemuck::cast_slice_mut(&mut case.bytes)[..case.shape.bytes()];
    case.shape.pack(0, bytemuck::cast_slice(&w), bytes);
    let y = case.compute(&case.x, rows, None);
    for (row, y) in case.x.chunks(inputs).zip(y.chunks(outputs)) {
        for (w, y) in w.chunks(inputs).zip(y) {
            // At most 2⁻²⁴ parts of a unit are lost: all sums here are below 2²⁴.
            let sum: i64 = w.iter().zip(row).map(|(w, x)| *w as i64 * *x as i64).sum();
            assert!(sum.unsigned_abs() < 1 << 24, "a sum that f32 holds");
            assert_eq!(*y, sum as f32);
        }
    }
}

#[test]
fn inputs_of_a_bf16_matrix_are_rounded_to_bf16_and_of_no_other() {
    // 1 + 2⁻⁹ is between two bf16 numbers, nearer to 1.
    let x = [1.0 + 2.0_f32.powi(-9); 6];
    for dtype in [Dtype::F32, Dtype::F16, Dtype::BF16] {
        let mut case = Case::new(Format::Plain(dtype), 4, 6, 1);
        case.bias.fill(0.0);
        let sum = |row: usize| case.exact[row * 6..][..6].iter().map(|w| f64::from(*w)).sum::<f64>();
        let factor = if dtype == Dtype::BF16 { 1.0 } else { f64::from(x[0]) };
        for (row, y) in case.compute(&x, 1, None).iter().enumerate() {
            assert!((f64::from(*y) - sum(row) * factor).abs() < 1e-5, "{dtype}");
        }
    }
}

#[test]
fn what_is_not_a_number_stays_so() {
    for format in FORMATS {
        let case = Case::new(format, 20, 40, 2);
        let mut x = case.x.clone();
        x[40] = f32::NAN;
        let y = case.compute(&x, 2, None);
        assert!(y[..20].iter().all(|y| y.is_finite()) && y[20..].iter().all(|y| y.is_nan()), "{format}");
    }
}

#[test]
fn a_packed_matrix_gives_its_rows_back_and_takes_no_more_bytes() {
    for format in FORMATS {
        for (outputs, inputs) in [(1, 1), (16, 2), (31, 7), (33, 8), (96, 20), (48, 96), (40, 65)] {
            let case = Case::new(format, outputs, inputs, 1);
            let mut row = vec![f32::NAN; inputs];
            for output in 0..outputs {
                case.packed().row(output, &mut row);
                assert_eq!(row, case.exact[output * inputs..][..inputs], "{format} {outputs}x{inputs}");
            }
            if outputs % 16 == 0 && inputs % case.shape.group() == 0 {
                let numbers = outputs * inputs;
                let bytes = match format {
                    Format::Plain(dtype) => numbers * dtype.bytes(),
                    Format::Q8_0 => numbers * 34 / 32,
                };
                assert_eq!(case.shape.bytes(), bytes);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_row_alone_and_in_any_batch_is_the_same_to_the_bit(
        format in prop::sample::select(&FORMATS[..]), outputs in 1_usize..140, inputs in 1_usize..2300, rows in 2_usize..120,
        alone in any::<prop::sample::Index>(),
    ) {
        let case = Case::new(format, outputs, inputs, rows);
        let y = case.compute(&case.x, case.rows, Some(0.25));
        let row = alone.index(rows);
        let one = case.compute(&case.x[row * inputs..][..inputs], 1, Some(0.25));
        prop_assert_eq!(&y[row * outputs..][..outputs], &one[..]);
    }
}
