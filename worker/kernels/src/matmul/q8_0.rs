//! Q8_0: weights in eight bits each and a scale for every thirty-two of them.
//!
//! What ggml calls `Q8_0` (`block_q8_0` in its `ggml-common.h`, `quantize_row_q8_0_ref` in its `ggml-quants.c`): thirty-two
//! inputs of one output are a block; `d = max |w| / 127` is kept as f16, and each number as `round(w / d)`, halves away from
//! zero. An input that is missing in the last block is zero.
//!
//! # Products
//! Inputs are quantized as well, each row by the same blocks, to the nearest of ±127 steps, with a scale in f32. A block's
//! sum of thirty-two products is then exact in i32 (at most `32 · 127²`, which f32 holds exactly too), and
//! `sum · (d_w · d_x)` is added to the output: one chain over the blocks in order, whatever the tile. So every instruction
//! set computes the same whole numbers, and they differ only in how that last addition rounds.
//!
//! Against the weights as they are kept, an output's error is at most `Σ_blocks max |x| / 254 · Σ |w|` from rounding the
//! inputs, and `(k / 32 + 3) · 2⁻²⁴ · Σ |w x|` from scaling and adding.
#![allow(unsafe_code)]

use half::f16;

use super::tile::Operand;
use crate::simd::{Kernel, LANES, Simd, launch};

/// Inputs of a block.
pub(super) const BLOCK: usize = 32;
/// Numbers of one output that lie beside each other: a 32-bit lane.
const QUAD: usize = 4;
const QUADS: usize = BLOCK / QUAD;
/// Bytes of a block of one output.
pub(super) const BLOCK_BYTES: usize = 2 + BLOCK;
/// Words of a block of one row of inputs: its scale and its numbers.
pub(super) const BLOCK_WORDS: usize = 1 + QUADS;

/// The largest number whose block has a scale that f16 holds.
pub const LARGEST: f32 = 127.0 * 65504.0;

/// The size of the largest number. As bits, not-a-number is larger than all numbers.
#[inline(always)]
fn largest(numbers: &[f32; BLOCK]) -> f32 {
    f32::from_bits(numbers.iter().fold(0, |largest, x| (x.to_bits() & 0x7fff_ffff).max(largest)))
}

/// A block of weights as it is kept: its scale and its numbers.
#[inline(always)]
fn quantize(weights: &[f32; BLOCK]) -> (f16, [i8; BLOCK]) {
    let scale = largest(weights) / 127.0;
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    // Rounded with the scale that is not rounded yet, as ggml does. Adding the number before ½ and cutting off is
    // `f32::round`, in a form that becomes vector code.
    let round = |w: f32| (w * inverse + 0.499_999_97_f32.copysign(w)) as i32 as i8;
    (f16::from_f32(scale), weights.map(round))
}

/// Puts a row of f32 numbers into a column of a panel of some width.
pub(super) fn pack(row: &[u8], place: (usize, usize), panel: &mut [u8]) {
    launch(PackRow { row: row.as_chunks().0, place, panel });
}

struct PackRow<'a> {
    row: &'a [[u8; 4]],
    /// Width of the panel, and the column.
    place: (usize, usize),
    panel: &'a mut [u8],
}

impl Kernel for PackRow<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (width, column) = self.place;
        let blocks = self.panel.chunks_exact_mut(width * BLOCK_BYTES);
        for (part, block) in self.row.chunks(BLOCK).zip(blocks) {
            let mut weights = [0.0; BLOCK];
            weights.iter_mut().zip(part).for_each(|(to, from)| *to = f32::from_ne_bytes(*from));
            let (scale, numbers) = quantize(&weights);
            let (scales, quads) = block.split_at_mut(width * 2);
            scales.as_chunks_mut().0[column] = scale.to_ne_bytes();
            let numbers = numbers.map(|number| number as u8);
            for (to, quad) in quads.chunks_exact_mut(width * QUAD).zip(numbers.as_chunks::<QUAD>().0) {
                to.as_chunks_mut().0[column] = *quad;
            }
        }
    }
}

/// The numbers in a column of a panel, times their scales.
pub(super) fn row(panel: &[u8], (width, column): (usize, usize), to: &mut [f32]) {
    for (to, block) in to.chunks_mut(BLOCK).zip(panel.chunks_exact(width * BLOCK_BYTES)) {
        let (scales, quads) = block.split_at(width * 2);
        let scale = f16::from_ne_bytes(scales.as_chunks().0[column]).to_f32();
        for (to, quad) in to.chunks_mut(QUAD).zip(quads.chunks_exact(width * QUAD)) {
            for (to, number) in to.iter_mut().zip(quad.as_chunks::<QUAD>().0[column]) {
                *to = f32::from(number as i8) * scale;
            }
        }
    }
}

/// Quantizes a row of inputs, block by block, into words that are `stride` apart: a block's scale and its numbers, four to a
/// word.
///
/// # Safety
/// There is room for all blocks.
#[inline(always)]
pub(super) unsafe fn pack_inputs(x: &[f32], to: *mut u32, stride: usize) {
    // Adding this rounds to the nearest whole number, halves to even, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    for (index, part) in x.chunks(BLOCK).enumerate() {
        let mut x = [0.0_f32; BLOCK];
        x[..part.len()].copy_from_slice(part);
        // Not-a-number among them makes the scale one, and so all outputs of the row.
        let largest = largest(&x);
        let inverse = 127.0 / largest;
        let inverse = if inverse.is_finite() { inverse } else { 0.0 };
        let numbers = x.map(|x| (x * inverse + ROUND).to_bits() as u8);
        // SAFETY: the caller's contract.
        unsafe {
            let to = to.add(index * BLOCK_WORDS * stride);
            *to = (largest / 127.0).to_bits();
            for (quad, numbers) in numbers.as_chunks::<QUAD>().0.iter().enumerate() {
                *to.add((1 + quad) * stride) = u32::from_ne_bytes(*numbers);
            }
        }
    }
}

/// The operand whose groups are blocks. In a panel, a block's scales come first, then its quads.
pub(super) struct Q8_0;

// SAFETY of the block below: the caller's contract of `Simd`.
impl Operand for Q8_0 {
    const BYTES: usize = BLOCK_BYTES;

    #[inline(always)]
    fn words<S: Simd>() -> usize {
        BLOCK_WORDS
    }

    #[inline(always)]
    fn tile<S: Simd>() -> (usize, usize) {
        (S::BYTE_TILE_ROWS, S::BYTE_TILE_VECTORS)
    }

    #[inline(always)]
    #[allow(clippy::needless_range_loop, reason = "counted loops are what unrolls under target features")]
    unsafe fn add_group<S: Simd, const M: usize, const N: usize>(
        weights: *const u8,
        (width, column): (usize, usize),
        inputs: *const u32,
        sums: &mut [[S::V; N]; M],
    ) {
        unsafe {
            let scales = weights.cast::<f16>().add(column);
            let mut quads = weights.add(width * 2 + column * QUAD);
            let mut whole = [[S::zero_ints(); N]; M];
            for quad in 1..=QUADS {
                let mut w = [S::load_quads(quads); N];
                for n in 1..N {
                    w[n] = S::load_quads(quads.add(n * LANES * QUAD));
                }
                for r in 0..M {
                    let x = S::splat_quad(inputs.add(quad * M + r));
                    for n in 0..N {
                        whole[r][n] = S::dot_quads(w[n], x, whole[r][n]);
                    }
                }
                quads = quads.add(width * QUAD);
            }
            for n in 0..N {
                let d = S::load_f16(scales.add(n * LANES));
                for r in 0..M {
                    let d = S::mul(d, S::splat(f32::from_bits(*inputs.add(r))));
                    sums[r][n] = S::mul_add(S::ints_to_floats(whole[r][n]), d, sums[r][n]);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use safetensors::SafeTensors;

    use super::*;

    /// Weights and their blocks by the `gguf` package; see `make_q8_0.py` beside the file.
    const FIXTURE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/q8_0/q8_0.safetensors");

    #[test]
    fn weights_are_quantized_as_ggml_does() {
        let bytes = std::fs::read(FIXTURE).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let weights = tensors.tensor("weights").unwrap();
        let weights: Vec<f32> = weights.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        let blocks = tensors.tensor("blocks").unwrap();
        let blocks = blocks.data().as_chunks::<BLOCK_BYTES>().0;
        assert_eq!((weights.len(), blocks.len()), (64 * 96, 64 * 3));
        for (index, (weights, want)) in weights.as_chunks().0.iter().zip(blocks).enumerate() {
            let (scale, numbers) = quantize(weights);
            assert_eq!(scale.to_le_bytes(), want[..2], "scale of block {index}");
            assert_eq!(numbers.map(|number| number as u8), want[2..], "numbers of block {index}");
        }
    }

    /// Scales and numbers of a row, taken out of the words that tiles take.
    fn quantized(x: &[f32]) -> Vec<(f32, [i8; BLOCK])> {
        let mut words = vec![0; x.len().div_ceil(BLOCK) * BLOCK_WORDS];
        // SAFETY: there is room for all blocks.
        unsafe { pack_inputs(x, words.as_mut_ptr(), 1) };
        let block = |words: &[u32; BLOCK_WORDS]| {
            let bytes: &[u8] = bytemuck::cast_slice(&words[1..]);
            (f32::from_bits(words[0]), std::array::from_fn(|i| bytes[i] as i8))
        };
        words.as_chunks().0.iter().map(block).collect()
    }

    #[test]
    fn inputs_are_rounded_to_the_nearest_step_of_their_block() {
        let mut x: Vec<f32> = (0..77).map(|i| (i as f32 * 0.7).sin() * 3.0_f32.powi(i / 32)).collect();
        x[40] = 0.0;
        for ((scale, numbers), x) in quantized(&x).iter().zip(x.chunks(BLOCK)) {
            let largest = x.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
            assert_eq!(*scale, largest / 127.0);
            assert_eq!(numbers.iter().map(|number| number.unsigned_abs()).max(), Some(127));
            for (number, x) in numbers.iter().zip(x) {
                assert!((f32::from(*number) * scale - x).abs() <= scale * 0.500_02, "{number} for {x}");
            }
            assert!(numbers[x.len()..].iter().all(|number| *number == 0), "nothing follows the row");
        }
    }

    #[test]
    fn blocks_without_a_size_are_zero_and_those_without_numbers_are_none() {
        for tiny in [0.0, 1e-45, 1e-39] {
            let (scale, numbers) = quantized(&[tiny; BLOCK])[0];
            assert!(numbers.iter().all(|n| (f32::from(*n) * scale).abs() <= 1e-38), "{tiny}: {numbers:?}");
        }
        assert!(quantized(&[1.0, f32::NAN, 2.0])[0].0.is_nan());
        assert!(quantized(&[1.0, f32::NEG_INFINITY])[0].0.is_infinite());
    }
}
