//! What a lens brings in place of a base's own: norms, embedding, head. A row that uses the lens is computed with these,
//! the row beside it with the base's.

use serde::{Deserialize, Serialize};

use super::lora::{LensUse, NormSite, uses_at};
use super::weights::{Matrix, PackedMatrix, Vector};
use turret_kernels::matmul::Weight;
use turret_kernels::ops::{RowEmbeddings, RowNorms};
use turret_kernels::rows::{add_scaled, widen};

/// Where the whole modules of a lens are. Offsets count from the start of its region.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Replaced {
    /// Per block, per [`NormSite`]; empty when there are none.
    pub norms: Vec<[Option<Vector>; NormSite::COUNT]>,
    /// The norm before the head.
    pub final_norm: Option<Vector>,
    /// The embedding, perhaps with more or fewer tokens than the base has.
    pub embedding: Option<Matrix>,
    /// The head, with as many.
    pub head: Option<PackedMatrix>,
}

impl Replaced {
    /// Whether there is any norm.
    pub fn has_norms(&self) -> bool {
        !self.norms.is_empty() || self.final_norm.is_some()
    }

    /// Tokens of the vocabulary, where it is not the base's.
    pub fn vocab_size(&self) -> Option<usize> {
        self.head.map(|head| head.shape.outputs).or(self.embedding.map(|table| table.outputs))
    }

    /// Names something that both bring, so that no row can have both.
    pub fn conflict(&self, other: &Self) -> Option<&'static str> {
        let both = |a: bool, b: bool| a && b;
        let mut pairs = self.norms.iter().zip(&other.norms);
        let mut any = pairs.any(|(a, b)| a.iter().zip(b).any(|(a, b)| both(a.is_some(), b.is_some())));
        any |= both(self.final_norm.is_some(), other.final_norm.is_some());
        if any {
            Some("a norm")
        } else if both(self.embedding.is_some(), other.embedding.is_some()) {
            Some("the embedding")
        } else if both(self.head.is_some(), other.head.is_some()) {
            Some("the head")
        } else {
            None
        }
    }
}

/// Norms of a step's rows at one place of the decoder.
pub(crate) struct NormsAt<'a> {
    pub(crate) uses: &'a [LensUse],
    /// Block and norm; the one before the head when absent.
    pub(crate) site: Option<(usize, NormSite)>,
}

impl RowNorms for NormsAt<'_> {
    fn of(&self, row: usize) -> Option<&[f32]> {
        uses_at(self.uses, row).iter().find_map(|one| {
            let replaced = &one.lens.layout.replaced;
            let norm = match self.site {
                Some((layer, site)) => replaced.norms.get(layer)?[site as usize].as_ref(),
                None => replaced.final_norm.as_ref(),
            };
            norm.map(|norm| one.lens.vector(norm))
        })
    }
}

/// Embeddings of a step's rows.
pub(crate) struct EmbeddingsOf<'a> {
    pub(crate) uses: &'a [LensUse],
}

impl RowEmbeddings for EmbeddingsOf<'_> {
    fn table(&self, row: usize) -> Option<Weight<'_>> {
        let table = |one: &'_ LensUse| one.lens.layout.replaced.embedding;
        uses_at(self.uses, row).iter().find_map(|one| Some(table(one)?.of(one.lens.region.bytes())))
    }

    fn add(&self, row: usize, token: usize, y: &mut [f32]) {
        for one in uses_at(self.uses, row) {
            let bytes = one.lens.region.bytes();
            let deltas = &one.lens.layout.deltas;
            if let Some(own) = &deltas.tokens
                && let Ok(index) = own.tokens.binary_search_by_key(&token, |(token, _)| *token as usize)
            {
                add_scaled(own.rows.of(bytes), own.tokens[index].1 as usize, one.scale, y);
            }
            let Some(delta) = &deltas.embedding else { continue };
            let (a, b) = (delta.a.of(bytes), delta.b.of(bytes));
            for rank in 0..delta.b.outputs {
                let mut t = [0.0];
                widen(a, token * delta.b.outputs + rank, &mut t);
                add_scaled(b, rank, t[0] * delta.scale * one.scale, y);
            }
        }
    }
}

/// The lens whose head a token's logits come from; the base's when there is none.
pub(crate) fn head_of(uses: &[LensUse], token: usize) -> Option<(&LensUse, PackedMatrix)> {
    uses_at(uses, token).iter().find_map(|one| Some((one, one.lens.layout.replaced.head?)))
}
