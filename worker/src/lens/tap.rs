//! Reading the residual stream: at which layer, at which positions.
//!
//! A base of L blocks has L + 1 places between them: `In(0)` is what the first block reads, `Out(i)` the same place as
//! `In(i + 1)`, and `Out(L - 1)` what the final norm reads. All checks are functions of what the caller asked for.

use super::inject::{Injection, Operation};

/// A place in the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Site {
    /// What this block reads; for the first one the embeddings, as its architecture scales them.
    In(u32),
    /// What this block leaves behind, after both of its additions.
    Out(u32),
}

impl Site {
    /// How many blocks come before it.
    pub fn boundary(self) -> u32 {
        match self {
            Self::In(layer) => layer,
            Self::Out(layer) => layer.saturating_add(1),
        }
    }

    fn layer(self) -> u32 {
        match self {
            Self::In(layer) | Self::Out(layer) => layer,
        }
    }
}

/// Positions of a row, counted from its first token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Positions {
    /// From this one on, generated ones too; from 0 for all.
    From(u32),
    /// These, in ascending order.
    At(Vec<u32>),
}

impl Positions {
    /// All of them.
    pub const ALL: Self = Self::From(0);

    /// Which of them a position is.
    pub fn index_of(&self, position: u32) -> Option<usize> {
        match self {
            Self::From(first) => position.checked_sub(*first).map(|index| index as usize),
            Self::At(list) => list.binary_search(&position).ok(),
        }
    }

    /// How many there are among the first `length`.
    pub fn count(&self, length: u32) -> usize {
        match self {
            Self::From(first) => length.saturating_sub(*first) as usize,
            Self::At(list) => list.partition_point(|&position| position < length),
        }
    }

    /// Those among the first `length`.
    pub fn up_to(&self, length: u32) -> Vec<u32> {
        match self {
            Self::From(first) => (*first..length).collect(),
            Self::At(list) => list[..self.count(length)].to_vec(),
        }
    }
}

/// Vectors to read. A tap reads what goes on from its place, after the row's injections there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    /// Where.
    pub site: Site,
    /// At which positions.
    pub positions: Positions,
}

/// What a tap has read.
#[derive(Debug, Clone, PartialEq)]
pub struct Tapped {
    /// The positions that were computed, in order.
    pub positions: Vec<u32>,
    /// `[positions, width]`.
    pub vectors: Vec<f32>,
}

/// What a row reads from and writes into the residual stream. Without anything it costs nothing.
///
/// Embeddings as input are a replacement at `In(0)`, one vector per position; the tokens there are then placeholders.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Activations {
    /// What to read.
    pub taps: Vec<Tap>,
    /// What to write, in this order where several are at one place.
    pub injections: Vec<Injection>,
    /// The row leaves the batch before this block: only those before are computed, and no token is chosen.
    pub stop_layer: Option<u32>,
}

/// A row, as the checks see it.
#[derive(Debug, Clone, Copy)]
pub struct RowShape {
    /// Blocks of the base.
    pub layers: u32,
    /// Width of the residual stream.
    pub width: usize,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens it may generate.
    pub new: u32,
    /// Whether logits of the prompt are wanted.
    pub scores_prompt: bool,
}

/// Taps, and injections, on one row at most.
pub const MAX_PER_ROW: usize = 256;
/// Bytes that the taps of one row may read together.
pub const MAX_TAPPED_BYTES: u64 = 256 << 20;

/// Why what a row reads or writes is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ActivationError {
    /// No such block, or one that the row does not compute.
    #[error("{what} is at layer {layer}; this row computes layers 0 to {last}")]
    Layer {
        /// Which tap or injection.
        what: String,
        /// Its layer.
        layer: u32,
        /// The last one there is.
        last: u32,
    },
    /// A position outside of the row, or out of order.
    #[error("{what} has position {position}; positions ascend and are below {length}")]
    Position {
        /// Which tap or injection.
        what: String,
        /// The position.
        position: u32,
        /// Tokens that the row may come to have.
        length: u32,
    },
    /// Neither one vector nor one per position.
    #[error(
        "{what} has {numbers} numbers for {positions} positions; the base's width is {width}: give one vector, or one per position"
    )]
    Width {
        /// Which injection.
        what: String,
        /// Numbers given.
        numbers: usize,
        /// Its positions.
        positions: usize,
        /// Width of the residual stream.
        width: usize,
    },
    /// A number is not finite.
    #[error("{what} has a number that is not finite")]
    NotFinite {
        /// Which injection.
        what: String,
    },
    /// Too many taps or injections.
    #[error("{count} {what} on one row; at most {MAX_PER_ROW} are possible")]
    TooMany {
        /// Taps or injections.
        what: &'static str,
        /// How many.
        count: usize,
    },
    /// Taps that would read too much.
    #[error(
        "the taps would read {bytes} bytes, at most {MAX_TAPPED_BYTES} are possible; tap fewer positions or layers"
    )]
    TooLarge {
        /// How much.
        bytes: u64,
    },
    /// A row that stops early has no logits.
    #[error("`stop_layer` leaves no logits: the row can neither generate tokens nor score its prompt")]
    NoLogits,
    /// No such block.
    #[error("`stop_layer` is {stop_layer}; the base has {layers} layers")]
    StopLayer {
        /// The layer.
        stop_layer: u32,
        /// Blocks of the base.
        layers: u32,
    },
}

impl Activations {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Checks everything against the row that it is for.
    pub fn check(&self, row: RowShape) -> Result<(), ActivationError> {
        if let Some(stop_layer) = self.stop_layer {
            if stop_layer >= row.layers {
                return Err(ActivationError::StopLayer { stop_layer, layers: row.layers });
            }
            if row.new > 0 || row.scores_prompt {
                return Err(ActivationError::NoLogits);
            }
        }
        for (what, count) in [("taps", self.taps.len()), ("injections", self.injections.len())] {
            if count > MAX_PER_ROW {
                return Err(ActivationError::TooMany { what, count });
            }
        }
        let last_boundary = self.stop_layer.unwrap_or(row.layers);
        let length = row.prompt + row.new;
        let place = |what: &dyn Fn() -> String, site: Site, positions: &Positions| {
            if site.boundary() > last_boundary || site.layer() >= row.layers {
                let last = last_boundary.max(1) - 1;
                return Err(ActivationError::Layer { what: what(), layer: site.layer(), last });
            }
            let wrong = match positions {
                Positions::From(first) => (*first >= length).then_some(*first),
                Positions::At(list) => {
                    let unordered = list.windows(2).find(|pair| pair[0] >= pair[1]).map(|pair| pair[1]);
                    unordered.or(list.last().copied().filter(|&last| last >= length))
                }
            };
            match wrong {
                Some(position) => Err(ActivationError::Position { what: what(), position, length }),
                None => Ok(()),
            }
        };
        let mut bytes = 0;
        for (index, tap) in self.taps.iter().enumerate() {
            place(&|| format!("tap {index}"), tap.site, &tap.positions)?;
            bytes += (tap.positions.count(length) * row.width * 4) as u64;
        }
        if bytes > MAX_TAPPED_BYTES {
            return Err(ActivationError::TooLarge { bytes });
        }
        for (index, injection) in self.injections.iter().enumerate() {
            let what = || format!("injection {index}");
            place(&what, injection.site, &injection.positions)?;
            let (numbers, positions) = (injection.vectors.len(), injection.positions.count(length));
            let one_each =
                matches!(injection.positions, Positions::At(_)) && numbers == positions * row.width;
            if numbers != row.width && !one_each {
                return Err(ActivationError::Width { what: what(), numbers, positions, width: row.width });
            }
            let scale = match injection.operation {
                Operation::Replace => 0.0,
                Operation::Add { scale }
                | Operation::AddNormMatched { scale }
                | Operation::AddKeepingNorm { scale } => scale,
            };
            if !(scale.is_finite() && injection.vectors.iter().all(|x| x.is_finite())) {
                return Err(ActivationError::NotFinite { what: what() });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: RowShape = RowShape { layers: 4, width: 2, prompt: 5, new: 3, scores_prompt: false };

    fn injection(site: Site, positions: Positions, vectors: Vec<f32>) -> Activations {
        let injection =
            Injection { site, positions, operation: Operation::Replace, vectors, prefill_only: false };
        Activations { injections: vec![injection], ..Activations::default() }
    }

    fn tap(site: Site, positions: Positions) -> Activations {
        Activations { taps: vec![Tap { site, positions }], ..Activations::default() }
    }

    #[test]
    fn what_fits_the_row_is_accepted() {
        for fine in [
            Activations::default(),
            tap(Site::In(0), Positions::ALL),
            tap(Site::Out(3), Positions::At(vec![0, 7])),
            injection(Site::In(3), Positions::From(5), vec![1.0; 2]),
            injection(Site::Out(0), Positions::At(vec![1, 2, 4]), vec![1.0; 6]),
            injection(Site::Out(0), Positions::At(vec![1, 2, 4]), vec![1.0; 2]),
        ] {
            assert_eq!(fine.check(ROW), Ok(()), "{fine:?}");
        }
        let reads = RowShape { new: 0, ..ROW };
        let stops = Activations { stop_layer: Some(2), ..tap(Site::Out(1), Positions::ALL) };
        assert_eq!(stops.check(reads), Ok(()));
        assert_eq!(stops.check(ROW), Err(ActivationError::NoLogits));
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let refused = |asked: Activations, word: &str| {
            let error = asked.check(ROW).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        };
        refused(tap(Site::Out(4), Positions::ALL), "layer 4");
        refused(tap(Site::Out(u32::MAX), Positions::ALL), "tap 0");
        refused(tap(Site::In(1), Positions::At(vec![3, 8])), "position 8");
        refused(tap(Site::In(1), Positions::At(vec![3, 3])), "position 3");
        refused(tap(Site::In(1), Positions::From(8)), "below 8");
        refused(injection(Site::In(1), Positions::ALL, vec![1.0; 16]), "16 numbers");
        refused(injection(Site::In(1), Positions::At(vec![1]), vec![]), "injection 0");
        refused(injection(Site::In(1), Positions::ALL, vec![1.0, f32::NAN]), "not finite");
        let many = Activations {
            taps: vec![tap(Site::In(0), Positions::ALL).taps[0].clone(); 257],
            ..Activations::default()
        };
        refused(many, "257 taps");
        let reads = RowShape { new: 0, ..ROW };
        let beyond = Activations { stop_layer: Some(2), ..tap(Site::Out(2), Positions::ALL) };
        assert!(matches!(beyond.check(reads), Err(ActivationError::Layer { layer: 2, last: 1, .. })));
        let no_such = Activations { stop_layer: Some(4), ..Activations::default() };
        assert!(matches!(no_such.check(reads), Err(ActivationError::StopLayer { .. })));
        let huge = RowShape { width: 1 << 20, new: 1000, ..ROW };
        assert!(matches!(
            tap(Site::In(0), Positions::ALL).check(huge),
            Err(ActivationError::TooLarge { .. })
        ));
    }
}
