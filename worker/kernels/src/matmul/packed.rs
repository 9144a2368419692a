//! How a matrix lies in device memory so that one pass over it, in order, feeds any number of rows.
//!
//! Outputs are cut into panels of [`PANEL`]. A panel has, for each *group* of inputs in order, the numbers of that group
//! for all its outputs beside each other. A group is two inputs of bf16 (a 32-bit lane, which is what dot-product
//! instructions take), one input of any other dtype, and a block of thirty-two inputs of [`Q8_0`](super::q8_0): the scales of
//! all outputs of the panel, then their numbers, four inputs to a 32-bit lane. So a vector load gives one group (of a block, an
//! eighth) of sixteen outputs, it is multiplied by one broadcast group of a row, and no sum crosses lanes. The last panel is
//! narrower where outputs end, rounded up to sixteen; missing numbers are zero.
//!
//! Packing adds no byte to a matrix whose outputs are a multiple of sixteen (and whose inputs are even, for bf16, or whole
//! blocks). It is the same for every instruction set.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use super::q8_0;
use crate::number::Dtype;
use crate::simd::pair_words;

/// Outputs that lie beside each other.
pub const PANEL: usize = 32;
/// Outputs are rounded up to this.
const LANES: usize = super::LANES;

/// How the numbers of a packed matrix are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Format {
    /// Each by itself.
    Plain(Dtype),
    /// As whole numbers of eight bits, with a scale for every thirty-two inputs of an output.
    Q8_0,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Plain(dtype) => dtype.fmt(f),
            Self::Q8_0 => f.write_str("Q8_0"),
        }
    }
}

/// The shape of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PackedShape {
    /// Rows of the matrix.
    pub outputs: usize,
    /// Columns of the matrix.
    pub inputs: usize,
    /// How its numbers are kept.
    pub format: Format,
}

impl PackedShape {
    /// The dtype of rows that [`Self::pack`] takes.
    pub fn row_dtype(&self) -> Dtype {
        match self.format {
            Format::Plain(dtype) => dtype,
            Format::Q8_0 => Dtype::F32,
        }
    }

    /// Inputs in a group.
    pub fn group(&self) -> usize {
        match self.format {
            Format::Plain(Dtype::BF16) => 2,
            Format::Plain(Dtype::F16 | Dtype::F32) => 1,
            Format::Q8_0 => q8_0::BLOCK,
        }
    }

    /// Groups of inputs.
    pub fn groups(&self) -> usize {
        self.inputs.div_ceil(self.group())
    }

    /// Bytes of one group of one output.
    fn unit(&self) -> usize {
        match self.format {
            Format::Plain(dtype) => self.group() * dtype.bytes(),
            Format::Q8_0 => q8_0::BLOCK_BYTES,
        }
    }

    /// Words of one row of inputs, as tiles take it.
    pub(super) fn input_words(&self) -> usize {
        match self.format {
            Format::Plain(Dtype::BF16) => self.groups() * pair_words(),
            Format::Plain(Dtype::F16 | Dtype::F32) => self.groups(),
            Format::Q8_0 => self.groups() * q8_0::BLOCK_WORDS,
        }
    }

    /// Bytes of one output.
    pub fn row_bytes(&self) -> usize {
        self.groups() * self.unit()
    }

    /// Bytes of the matrix.
    pub fn bytes(&self) -> usize {
        self.outputs.next_multiple_of(LANES) * self.row_bytes()
    }

    /// Where a panel starts, and how many outputs it is wide.
    pub(crate) fn panel(&self, panel: usize) -> (usize, usize) {
        let width = (self.outputs.next_multiple_of(LANES) - panel * PANEL).min(PANEL);
        (panel * PANEL * self.groups() * self.unit(), width)
    }

    /// Puts consecutive rows of the matrix, from `first_output` on, into their places in `to`, the bytes of the whole matrix.
    /// Rows are numbers of [`Self::row_dtype`].
    pub fn pack(&self, first_output: usize, rows: &[u8], to: &mut [u8]) {
        assert_eq!(to.len(), self.bytes(), "the place was reserved for this matrix");
        let row_bytes = self.inputs * self.row_dtype().bytes();
        assert_eq!(rows.len() % row_bytes.max(1), 0, "whole rows");
        for (index, row) in rows.chunks_exact(row_bytes).enumerate() {
            let output = first_output + index;
            let (start, width) = self.panel(output / PANEL);
            let panel = &mut to[start..start + width * self.row_bytes()];
            let place = (width, output % PANEL);
            match (self.format, self.unit()) {
                (Format::Q8_0, _) => q8_0::pack(row, place, panel),
                (Format::Plain(_), 4) => pack_units::<4>(row, place, panel),
                (Format::Plain(_), _) => pack_units::<2>(row, place, panel),
            }
        }
    }
}

/// Puts one row's numbers into a column of a panel of some width.
fn pack_units<const U: usize>(row: &[u8], (width, column): (usize, usize), panel: &mut [u8]) {
    let (units, rest) = row.as_chunks::<U>();
    let mut groups = panel.chunks_exact_mut(width * U);
    for (unit, group) in units.iter().zip(&mut groups) {
        group[column * U..][..U].copy_from_slice(unit);
    }
    if let Some(group) = groups.next() {
        group[column * U..][..rest.len()].copy_from_slice(rest);
    }
}

/// A packed matrix.
#[derive(Debug, Clone, Copy)]
pub struct Packed<'a> {
    /// Its shape.
    pub shape: PackedShape,
    /// Its bytes.
    pub bytes: &'a [u8],
}

impl<'a> Packed<'a> {
    /// A matrix in bytes that [`PackedShape::pack`] filled, aligned to a vector's sixteen numbers.
    pub fn new(shape: PackedShape, bytes: &'a [u8]) -> Self {
        assert_eq!(bytes.len(), shape.bytes(), "the weights have another shape");
        assert_eq!(bytes.as_ptr() as usize % 4, 0, "weights are aligned");
        Self { shape, bytes }
    }

    /// One row of the matrix in f32.
    pub fn row(&self, output: usize, to: &mut [f32]) {
        let shape = self.shape;
        assert!(output < shape.outputs && to.len() == shape.inputs, "one row of the matrix");
        let (start, width) = shape.panel(output / PANEL);
        let column = output % PANEL;
        match shape.format {
            Format::Q8_0 => q8_0::row(&self.bytes[start..], (width, column), to),
            Format::Plain(Dtype::F32) => {
                let panel: &[f32] = bytemuck::cast_slice(&self.bytes[start..]);
                for (to, group) in to.iter_mut().zip(panel.chunks_exact(width)) {
                    *to = group[column];
                }
            }
            Format::Plain(Dtype::F16) => {
                let panel: &[f16] = bytemuck::cast_slice(&self.bytes[start..]);
                for (to, group) in to.iter_mut().zip(panel.chunks_exact(width)) {
                    *to = group[column].to_f32();
                }
            }
            Format::Plain(Dtype::BF16) => {
                let panel: &[[bf16; 2]] = bytemuck::cast_slice(&self.bytes[start..]);
                for (to, group) in to.chunks_mut(2).zip(panel.chunks_exact(width)) {
                    for (to, number) in to.iter_mut().zip(group[column]) {
                        *to = number.to_f32();
                    }
                }
            }
        }
    }
}
