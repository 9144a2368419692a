//! Writing into the residual stream: which vectors, where, and how they meet what is there.

use super::tap::{Positions, Site};

/// How a vector v meets what is there, h. Norms are Euclidean, over the width of the residual stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operation {
    /// `v`.
    Replace,
    /// `h + scale · v`: a control vector.
    Add {
        /// Multiplies the vector.
        scale: f32,
    },
    /// `h + scale · |h| · v / max(|v|, 1e-12)`: an activation oracle's.
    AddNormMatched {
        /// Multiplies the vector, as long as what is there.
        scale: f32,
    },
    /// `y · |h| / |y|` of `y = h + scale · v`: a control vector that keeps the length of what is there.
    AddKeepingNorm {
        /// Multiplies the vector.
        scale: f32,
    },
}

/// Vectors to write.
#[derive(Debug, Clone, PartialEq)]
pub struct Injection {
    /// Where.
    pub site: Site,
    /// At which positions.
    pub positions: Positions,
    /// How.
    pub operation: Operation,
    /// One vector for all positions, or one for each of a list, one after the other.
    pub vectors: Vec<f32>,
    /// Only at positions of the prompt.
    pub prefill_only: bool,
}

/// A learned map between residual vectors, `W v + b`: what is written is then a projection of what was read.
#[derive(Debug, Clone, Copy)]
pub struct Projection<'a> {
    /// `[outputs, inputs]`, output by output.
    pub weight: &'a [f32],
    /// One number per output, or none.
    pub bias: Option<&'a [f32]>,
}

impl Projection<'_> {
    /// The projection of one vector. Sums run in order, in f64, so that the result depends on nothing else.
    pub fn of(&self, vector: &[f32]) -> Vec<f32> {
        assert_eq!(self.weight.len() % vector.len(), 0, "the projection takes vectors of another width");
        let dot =
            |row: &[f32]| row.iter().zip(vector).map(|(w, v)| f64::from(*w) * f64::from(*v)).sum::<f64>();
        let rows = self.weight.chunks_exact(vector.len()).enumerate();
        rows.map(|(output, row)| (dot(row) + self.bias.map_or(0.0, |bias| f64::from(bias[output]))) as f32)
            .collect()
    }
}

impl Injection {
    /// The vector for a position of a row with a prompt of this many tokens.
    pub fn vector(&self, position: u32, prompt: u32, width: usize) -> Option<&[f32]> {
        let index = self.positions.index_of(position)?;
        if self.prefill_only && position >= prompt {
            return None;
        }
        let index = if self.vectors.len() == width { 0 } else { index };
        self.vectors.get(index * width..(index + 1) * width)
    }
}

impl Operation {
    /// Writes `v` into `h`. Sums run in order, in f64, so that the result depends on nothing else.
    pub fn apply(self, h: &mut [f32], v: &[f32]) {
        assert_eq!(h.len(), v.len(), "the row's vectors were checked");
        match self {
            Self::Replace => h.copy_from_slice(v),
            Self::Add { scale } => add(h, v, scale),
            Self::AddNormMatched { scale } => {
                let ratio = norm(h) / norm(v).max(1e-12);
                add(h, v, (f64::from(scale) * ratio) as f32);
            }
            Self::AddKeepingNorm { scale } => {
                let before = norm(h);
                add(h, v, scale);
                let after = norm(h);
                if after > 0.0 {
                    let ratio = (before / after) as f32;
                    h.iter_mut().for_each(|x| *x *= ratio);
                }
            }
        }
    }
}

fn add(h: &mut [f32], v: &[f32], scale: f32) {
    h.iter_mut().zip(v).for_each(|(h, v)| *h += scale * v);
}

fn norm(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_what_their_formulas_say() {
        let result = |operation: Operation, v: [f32; 2]| {
            let mut h = [3.0, 4.0];
            operation.apply(&mut h, &v);
            h
        };
        assert_eq!(result(Operation::Replace, [7.0, 8.0]), [7.0, 8.0]);
        assert_eq!(result(Operation::Add { scale: -2.0 }, [1.0, 0.5]), [1.0, 3.0]);
        assert_eq!(result(Operation::AddNormMatched { scale: 1.0 }, [0.0, 2.0]), [3.0, 9.0]);
        assert_eq!(
            result(Operation::AddNormMatched { scale: 1.0 }, [0.0, 0.0]),
            [3.0, 4.0],
            "zero adds nothing"
        );
        let [x, y] = result(Operation::AddKeepingNorm { scale: 1.0 }, [5.0, 2.0]);
        assert!((x - 4.0).abs() < 1e-6 && (y - 3.0).abs() < 1e-6, "(8, 6) as long as (3, 4): ({x}, {y})");
        assert_eq!(result(Operation::AddKeepingNorm { scale: 1.0 }, [-3.0, -4.0]), [0.0, 0.0]);
    }

    #[test]
    fn a_projection_is_a_matrix_and_a_bias() {
        let projection =
            Projection { weight: &[1.0, 2.0, 0.0, -1.0, 3.0, 3.0], bias: Some(&[0.5, 0.0, -1.0]) };
        assert_eq!(projection.of(&[10.0, 1.0]), [12.5, -1.0, 32.0]);
        assert_eq!(Projection { bias: None, ..projection }.of(&[10.0, 1.0]), [12.0, -1.0, 33.0]);
    }

    #[test]
    fn vectors_are_found_by_position() {
        let mut injection = Injection {
            site: Site::In(0),
            positions: Positions::At(vec![2, 5]),
            operation: Operation::Replace,
            vectors: vec![1.0, 2.0, 3.0, 4.0],
            prefill_only: true,
        };
        assert_eq!(injection.vector(5, 6, 2), Some(&[3.0, 4.0][..]));
        assert_eq!(injection.vector(5, 5, 2), None, "that one is generated");
        assert_eq!(injection.vector(3, 6, 2), None);
        injection.positions = Positions::From(4);
        injection.vectors.truncate(2);
        assert_eq!(injection.vector(5, 6, 2), Some(&[1.0, 2.0][..]));
        assert_eq!(injection.vector(3, 6, 2), None);
    }
}
