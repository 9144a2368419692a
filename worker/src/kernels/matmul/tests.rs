//! Every dtype, shape and number of rows against sums in f64; and a row alone against the same row in any batch, to the bit.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::kernels::threads::Pool;
use crate::model::weights::Dtype;

/// Numbers that differ from place to place, between -1 and 1.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Row-major bytes of a matrix, and the numbers they stand for.
fn stored(values: &[f32], dtype: Dtype) -> (Vec<u8>, Vec<f32>) {
    match dtype {
        Dtype::F32 => (bytemuck::cast_slice(values).to_vec(), values.to_vec()),
        Dtype::BF16 => {
            let w: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
            (bytemuck::cast_slice(&w).to_vec(), w.iter().map(|w| w.to_f32()).collect())
        }
        Dtype::F16 => {
            let w: Vec<f16> = values.iter().map(|v| f16::from_f32(*v)).collect();
            (bytemuck::cast_slice(&w).to_vec(), w.iter().map(|w| w.to_f32()).collect())
        }
    }
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
    fn new(dtype: Dtype, outputs: usize, inputs: usize, rows: usize) -> Self {
        let shape = PackedShape { outputs, inputs, dtype };
        let (row_major, exact) = stored(&numbers(outputs * inputs, 7), dtype);
        let mut bytes = vec![0_u32; shape.bytes().div_ceil(4)];
        // In uneven pieces, as a loader brings them.
        let row_bytes = inputs * dtype.bytes();
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

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::BF16];

#[test]
fn products_are_right_within_the_stated_bound() {
    for dtype in DTYPES {
        for (outputs, inputs, rows) in
            [(1, 1, 1), (16, 8, 1), (33, 31, 3), (40, 64, 12), (64, 2500, 13), (100, 77, 101), (31, 4864, 2)]
        {
            let case = Case::new(dtype, outputs, inputs, rows);
            let y = case.compute(&case.x, rows, None);
            let added = case.compute(&case.x, rows, Some(2.0));
            for row in 0..rows {
                for output in 0..outputs {
                    let x = &case.x[row * inputs..][..inputs];
                    let w = &case.exact[output * inputs..][..inputs];
                    let terms = || w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let want = terms().sum::<f64>() + f64::from(case.bias[output]);
                    let size = terms().map(f64::abs).sum::<f64>() + 3.0;
                    let rounding = if dtype == Dtype::BF16 { 2.0_f64.powi(-9) } else { 0.0 };
                    let bound = size * (rounding + inputs as f64 * 2.0_f64.powi(-24));
                    let got = y[row * outputs + output];
                    assert!(
                        (f64::from(got) - want).abs() <= bound,
                        "{dtype} {outputs}x{inputs}: {got} {want}"
                    );
                    assert_eq!(added[row * outputs + output], 2.0 + got, "{dtype} {outputs}x{inputs} added");
                }
            }
        }
    }
}

#[test]
fn inputs_of_a_bf16_matrix_are_rounded_to_bf16_and_of_no_other() {
    // 1 + 2⁻⁹ is between two bf16 numbers, nearer to 1.
    let x = [1.0 + 2.0_f32.powi(-9); 6];
    for dtype in DTYPES {
        let mut case = Case::new(dtype, 4, 6, 1);
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
    for dtype in DTYPES {
        let case = Case::new(dtype, 20, 40, 2);
        let mut x = case.x.clone();
        x[40] = f32::NAN;
        let y = case.compute(&x, 2, None);
        assert!(y[..20].iter().all(|y| y.is_finite()) && y[20..].iter().all(|y| y.is_nan()), "{dtype}");
    }
}

#[test]
fn a_packed_matrix_gives_its_rows_back_and_takes_no_more_bytes() {
    for dtype in DTYPES {
        for (outputs, inputs) in [(1, 1), (16, 2), (31, 7), (33, 8), (96, 20)] {
            let case = Case::new(dtype, outputs, inputs, 1);
            let mut row = vec![f32::NAN; inputs];
            for output in 0..outputs {
                case.packed().row(output, &mut row);
                assert_eq!(row, case.exact[output * inputs..][..inputs], "{dtype} {outputs}x{inputs}");
            }
            if outputs % 16 == 0 && inputs % 2 == 0 {
                assert_eq!(case.shape.bytes(), outputs * inputs * dtype.bytes());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn a_row_alone_and_in_any_batch_is_the_same_to_the_bit(
        dtype in prop::sample::select(&DTYPES[..]), outputs in 1_usize..140, inputs in 1_usize..2300, rows in 2_usize..120,
        alone in any::<prop::sample::Index>(),
    ) {
        let case = Case::new(dtype, outputs, inputs, rows);
        let y = case.compute(&case.x, case.rows, Some(0.25));
        let row = alone.index(rows);
        let one = case.compute(&case.x[row * inputs..][..inputs], 1, Some(0.25));
        prop_assert_eq!(&y[row * outputs..][..outputs], &one[..]);
    }
}
