//! What the rows of a step read from and write into the residual stream, between its blocks.

use std::cell::RefCell;
use std::sync::Arc;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result, bail};

use crate::lens::tap::Activations;

/// A row of a step that reads or writes.
#[derive(Debug, Clone)]
pub struct ActiveRow {
    /// Its first token in the step.
    pub token_start: usize,
    /// Its tokens in the step.
    pub tokens: usize,
    /// Position of the first.
    pub position: u32,
    /// Tokens of its prompt.
    pub prompt: u32,
    /// What it reads and writes.
    pub activations: Arc<Activations>,
    /// Where what it reads starts, in vectors: tap after tap, each with its positions of this step.
    pub captured_start: usize,
}

impl ActiveRow {
    fn positions(&self) -> std::ops::Range<u32> {
        self.position..self.position + self.tokens as u32
    }

    /// Vectors that its taps read in this step.
    pub fn captures(&self) -> usize {
        self.activations.taps.iter().map(|tap| self.captures_of(tap)).sum()
    }

    fn captures_of(&self, tap: &crate::lens::tap::Tap) -> usize {
        let positions = self.positions();
        tap.positions.count(positions.end) - tap.positions.count(positions.start)
    }

    /// Hands over what was read: the tap, which of its positions, and the vector.
    pub fn captured(&self, captured: &[f32], width: usize, mut give: impl FnMut(usize, usize, &[f32])) {
        let mut vectors = captured.chunks_exact(width).skip(self.captured_start);
        for (index, tap) in self.activations.taps.iter().enumerate() {
            let first = tap.positions.count(self.position);
            for offset in 0..self.captures_of(tap) {
                give(index, first + offset, vectors.next().expect("every tap has its place"));
            }
        }
    }
}

/// Lets rows write and read at one place of the residual stream.
pub struct Touch<'a> {
    /// The rows that do.
    pub rows: &'a [ActiveRow],
    /// How many blocks come before the place.
    pub boundary: u32,
    /// Width of the residual stream.
    pub width: usize,
    /// Where taps write to.
    pub captured: &'a RefCell<Vec<f32>>,
}

impl InplaceOp1 for Touch<'_> {
    fn name(&self) -> &'static str {
        "touch"
    }

    fn cpu_fwd(&self, stream: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let stream = match (stream, layout.contiguous_offsets()) {
            (CpuStorage::F32(data), Some((start, end))) => &mut data[start..end],
            _ => bail!("activations are contiguous f32"),
        };
        let mut captured = self.captured.borrow_mut();
        let width = self.width;
        for row in self.rows {
            let activations = &*row.activations;
            if activations.stop_layer.is_some_and(|stop_layer| stop_layer < self.boundary) {
                continue;
            }
            let stream = &mut stream[row.token_start * width..][..row.tokens * width];
            let here = activations.injections.iter().filter(|i| i.site.boundary() == self.boundary);
            for injection in here {
                for (position, h) in row.positions().zip(stream.chunks_exact_mut(width)) {
                    if let Some(v) = injection.vector(position, row.prompt, width) {
                        injection.operation.apply(h, v);
                    }
                }
            }
            let mut next = row.captured_start;
            for tap in &activations.taps {
                let count = row.captures_of(tap);
                if tap.site.boundary() == self.boundary {
                    let read = row.positions().zip(stream.chunks_exact(width));
                    let read = read.filter(|(position, _)| tap.positions.index_of(*position).is_some());
                    let to = captured[next * width..].chunks_exact_mut(width);
                    read.zip(to).for_each(|((_, h), to)| to.copy_from_slice(h));
                }
                next += count;
            }
        }
        Ok(())
    }
}
