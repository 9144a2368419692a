//! What a lens is: a small checkpoint over a base, applied to the rows that ask for it.
//!
//! One file per kind. Opening a lens reads headers only and checks everything against the base; what cannot be honoured
//! exactly is refused with the name of the tensor or key, so a lens is never half loaded.

pub mod inject;
pub mod lora;
pub mod tap;

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::engine::arena::Region;
use crate::model::config::ModelConfig;
use crate::model::lora::DeltaLayout;
use crate::model::replaced::Replaced;
use crate::model::tensor_file::TensorFileError;
use crate::model::tokenizer::TokenizerError;
use crate::model::weights::Vector;

/// Where everything of a lens goes, and how many bytes that takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LensLayout {
    /// Bytes of the region.
    pub bytes: u64,
    /// Its low-rank deltas.
    pub deltas: DeltaLayout,
    /// What it brings in place of the base's own.
    pub replaced: Replaced,
}

impl LensLayout {
    /// Names something that both bring, or that one brings and the other does not fit, so that no row can have both.
    pub fn conflict(&self, other: &Self) -> Option<&'static str> {
        let misfit = |one: &Self, other: &Self| {
            one.replaced.vocab_size().is_some_and(|vocab| !other.deltas.fits_vocabulary(vocab))
        };
        self.replaced
            .conflict(&other.replaced)
            .or_else(|| self.deltas.shares_bias(&other.deltas).then_some("a bias"))
            .or_else(|| (misfit(self, other) || misfit(other, self)).then_some("the vocabulary"))
    }
}

/// A lens whose weights are all in place.
#[derive(Debug)]
pub struct FilledLens {
    pub(crate) base: Arc<ModelConfig>,
    pub(crate) layout: LensLayout,
    pub(crate) region: Region,
    pub(crate) effects: Effects,
    /// Digest of its files, when it is known.
    pub(crate) digest: Option<Arc<str>>,
}

/// What one lens, or several together, do to the rows of a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Effects {
    /// Ranks that a token needs room for.
    pub ranks: usize,
    /// Some output is multiplied or gets another bias.
    pub finishes: bool,
    /// Some norm is another one.
    pub norms: bool,
    /// Embeddings are others, or get something added.
    pub embeddings: bool,
    /// Tokens of the largest head that is another one, 0 without any.
    pub head_tokens: usize,
}

impl Effects {
    fn of(layout: &LensLayout) -> Self {
        let LensLayout { deltas, replaced, .. } = layout;
        Self {
            ranks: deltas.max_ranks(),
            finishes: deltas.finishes(),
            norms: replaced.has_norms(),
            embeddings: replaced.embedding.is_some() || deltas.embedding.is_some() || deltas.tokens.is_some(),
            head_tokens: replaced.head.map_or(0, |head| head.shape.outputs),
        }
    }

    /// Of lenses on the same step.
    #[must_use]
    pub fn beside(&self, other: &Self) -> Self {
        Self {
            ranks: self.ranks + other.ranks,
            finishes: self.finishes || other.finishes,
            norms: self.norms || other.norms,
            embeddings: self.embeddings || other.embeddings,
            head_tokens: self.head_tokens.max(other.head_tokens),
        }
    }
}

impl FilledLens {
    /// Takes a region that was filled by other means than a folder, laid out as `layout` for a base of this architecture.
    pub fn new(base: Arc<ModelConfig>, layout: LensLayout, region: Region) -> Self {
        assert_eq!(region.len() as u64, layout.bytes, "the region was reserved for this layout");
        let effects = Effects::of(&layout);
        Self { base, layout, region, effects, digest: None }
    }

    /// The lens with the digest of its files. Lenses with equal digests find each other's keys and values in the cache, also
    /// after one was evicted and loaded again; without one, an installation finds only its own.
    #[must_use]
    pub fn with_digest(mut self, digest: impl Into<Arc<str>>) -> Self {
        self.digest = Some(digest.into());
        self
    }

    /// Where everything of it is.
    pub fn layout(&self) -> &LensLayout {
        &self.layout
    }

    /// Its region.
    pub fn bytes(&self) -> &[u8] {
        self.region.bytes()
    }

    /// A vector as the kernels take it.
    pub(crate) fn vector(&self, vector: &Vector) -> &[f32] {
        vector.of(self.region.bytes())
    }
}

/// Why a lens cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LensError {
    /// A file of the lens cannot be read.
    #[error("failed to read `{path}`")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The tensor file is refused.
    #[error(transparent)]
    File(#[from] TensorFileError),
    /// The lens's own description is not what the format says.
    #[error("`{path}` is malformed: {what}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The lens was made for a base of another shape.
    #[error("the lens does not fit this base: {what}")]
    BaseMismatch {
        /// What differs.
        what: String,
    },
    /// A setting that would change the answer and that is not computed.
    #[error("adapter_config.json: `{key}` = {value} is not supported")]
    UnsupportedSetting {
        /// The key.
        key: String,
        /// Its value.
        value: String,
    },
    /// The folder is of a kind that is not loaded.
    #[error("`{file}` makes the folder {kind}, which is not supported")]
    UnsupportedKind {
        /// What tells.
        file: &'static str,
        /// Which kind.
        kind: &'static str,
    },
    /// The lens's own tokenizer is refused.
    #[error("the tokenizer `{path}` that the lens brings is refused")]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: TokenizerError,
    },
    /// Something of a tokenizer without the tokenizer.
    #[error("the lens brings `{file}` but no `tokenizer.json`; add it, or remove what belongs to it")]
    SideFileAlone {
        /// What it brings.
        file: &'static str,
    },
    /// A tensor that would change the answer and that is not computed.
    #[error("tensor `{tensor}` is not supported: {why}")]
    UnsupportedTensor {
        /// The tensor.
        tensor: String,
        /// What is missing for it.
        why: &'static str,
    },
}

/// The kinds of failure that a user can act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LensFailure {
    /// It belongs to another base.
    BaseMismatch,
    /// It needs something this version does not compute.
    UnsupportedTensors,
    /// A file ends too early.
    Truncated,
    /// A file is not what its format says, or holds numbers that are not finite.
    Malformed,
    /// A file cannot be read.
    Unreadable,
    /// The caller cancelled the load.
    Cancelled,
}

impl LensError {
    /// Which kind of failure this is.
    pub fn failure(&self) -> LensFailure {
        match self {
            Self::BaseMismatch { .. } => LensFailure::BaseMismatch,
            Self::UnsupportedSetting { .. }
            | Self::UnsupportedTensor { .. }
            | Self::UnsupportedKind { .. }
            | Self::File(TensorFileError::Dtype { .. }) => LensFailure::UnsupportedTensors,
            Self::Malformed { .. }
            | Self::Tokenizer { .. }
            | Self::SideFileAlone { .. }
            | Self::File(TensorFileError::Malformed { .. } | TensorFileError::NotFinite { .. }) => {
                LensFailure::Malformed
            }
            Self::File(TensorFileError::Truncated { .. }) => LensFailure::Truncated,
            Self::File(TensorFileError::Cancelled) => LensFailure::Cancelled,
            Self::Io { .. } | Self::File(TensorFileError::Io { .. }) => LensFailure::Unreadable,
        }
    }
}
