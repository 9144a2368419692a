//! LoRA lenses in the PEFT layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The config says which modules are adapted (a list of names, a regex, or "all-linear"; perhaps only some layers), with
//! which rank and alpha (perhaps by pattern), whether by DoRA, which biases are brought, and which modules are brought
//! whole. The file must hold exactly the tensors that follow from it.
//!
//! - [`adapter_config`] reads the config and refuses what is not computed.
//! - [`targets`] decides which modules it is about, [`patterns`] which names a pattern means.
//! - [`layout`] finds a place for every tensor, and refuses those that have none.
//! - [`dora`] makes what follows from lens and base together.
//! - [`tokens`] are single ones that the lens trained.
//! - [`vocabulary`] reads tokens and a template that the lens brings.

mod adapter_config;
mod dora;
mod layout;
mod patterns;
mod targets;
#[cfg(test)]
mod tests;
mod tokens;
mod vocabulary;

use std::path::Path;
use std::sync::Arc;

use self::adapter_config::{AdapterConfig, CONFIG};
use self::layout::{Modules, Move, To, plan, refuse_foreign_tensors};
use super::{FilledLens, LensError, LensLayout};
use crate::engine::arena::Region;
use crate::model::config::ModelConfig;
use crate::model::tensor_file::{OnProgress, Progress, TensorFile};
use crate::model::tokenizer::Tokenizer;
use crate::model::weights::{BaseLayout, Dtype, FilledBase};

const WEIGHTS: &str = "adapter_model.safetensors";
/// Files of a LoRA folder that a worker reads.
pub const LORA_FILES: [&str; 2] = [CONFIG, WEIGHTS];
/// Further ones, where they exist: a tokenizer and a chat template of the lens's own.
pub const LENS_SIDE_FILES: [&str; 6] = [
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// Names of all files that a worker reads from a LoRA folder, sorted: what a digest of the lens covers.
pub fn lora_files(folder: &Path) -> Vec<String> {
    let side = LENS_SIDE_FILES.iter().filter(|file| folder.join(file).exists());
    let mut names: Vec<String> = LORA_FILES.iter().chain(side).map(|&file| file.to_owned()).collect();
    names.sort();
    names
}

/// A LoRA folder with one of these is more than a LoRA, and would answer something else without it.
const OTHER_KINDS: [(&str, &str); 2] =
    [("oracle.json", "an activation oracle"), ("verbalizer.json", "a verbalizer")];

/// Files that tell that a folder is more than a LoRA.
pub fn files_of_other_kinds() -> impl Iterator<Item = &'static str> {
    OTHER_KINDS.iter().map(|(file, _)| *file)
}

/// What of a base a lens is laid out for.
#[derive(Debug, Clone, PartialEq)]
struct BaseKind {
    config: Arc<ModelConfig>,
    dtype: Dtype,
}

/// A LoRA folder whose config and header have been checked against a base.
pub struct LoraFolder {
    base: BaseKind,
    layout: LensLayout,
    file: TensorFile,
    moves: Vec<Move>,
}

impl LoraFolder {
    /// Reads the config and the header, and checks both against the base.
    pub fn open(folder: &Path, base: &BaseLayout) -> Result<Self, LensError> {
        for (file, kind) in OTHER_KINDS {
            if folder.join(file).exists() {
                return Err(LensError::UnsupportedKind { file, kind });
            }
        }
        let config = AdapterConfig::read(folder)?;
        let file = TensorFile::open(&folder.join(WEIGHTS))?;
        refuse_foreign_tensors(&file, &base.config)?;
        let adapted = targets::adapted(&config, &base.config, folder)?;
        let saved = targets::saved(&config, &base.config)?;
        let trained = tokens::trained(&config, &base.config)?;
        let modules = Modules { adapted: &adapted, saved: &saved, trained: &trained };
        let (layout, moves) = plan(&config, base, &file, modules)?;
        let base = BaseKind { config: base.config.clone(), dtype: base.dtype };
        Ok(Self { base, layout, file, moves })
    }

    /// Where everything will be, and how many bytes that takes.
    pub fn layout(&self) -> &LensLayout {
        &self.layout
    }

    /// The tokenizer that the lens brings, with its chat template; the base's is to be used when there is none. `spoken`
    /// is the base's.
    pub fn tokenizer(&self, spoken: &Tokenizer) -> Result<Option<Tokenizer>, LensError> {
        let folder = self.file.path().parent().expect("the file was opened in a folder");
        vocabulary::open(folder, (&self.base.config, spoken), &self.layout)
    }

    /// Reads all tensors into a region of `layout().bytes`. `base` is the one that the lens was opened for.
    pub fn fill(
        &self,
        mut region: Region,
        base: &FilledBase,
        on_progress: OnProgress<'_>,
    ) -> Result<FilledLens, LensError> {
        assert_eq!(region.len() as u64, self.layout.bytes, "the region was reserved for this layout");
        let kind = BaseKind { config: base.layout().config.clone(), dtype: base.layout().dtype };
        assert_eq!(kind, self.base, "the lens was opened for this base");
        let total_bytes = self.layout.bytes;
        let mut done_bytes = 0;
        let mut written = |bytes| {
            done_bytes += bytes;
            on_progress(Progress { done_bytes, total_bytes })
        };
        let mut scratch = Vec::new();
        for Move { tensor, rows, columns, dtype, to } in &self.moves {
            let (rows, columns, dtype) = (*rows, *columns, *dtype);
            let bytes = rows * columns * dtype.bytes();
            match to {
                To::Plain(offset) => {
                    let to = &mut region.bytes_mut()[*offset..][..bytes];
                    self.file.read(tensor, dtype, to, &mut written)?;
                }
                To::PlusOne(offset) => {
                    let to = &mut region.bytes_mut()[*offset..][..bytes];
                    self.file.read(tensor, dtype, to, &mut written)?;
                    for number in to.as_chunks_mut::<4>().0 {
                        *number = (f32::from_ne_bytes(*number) + 1.0).to_ne_bytes();
                    }
                }
                To::Transposed(offset) => {
                    let to = &mut region.bytes_mut()[*offset..][..bytes];
                    scratch.resize(bytes, 0);
                    self.file.read(tensor, dtype, &mut scratch, &mut written)?;
                    match dtype.bytes() {
                        2 => transpose::<2>(&scratch, to, rows, columns),
                        _ => transpose::<4>(&scratch, to, rows, columns),
                    }
                }
                To::Panels(matrix) => {
                    let to = &mut region.bytes_mut()[matrix.offset..][..matrix.shape.bytes()];
                    let mut output = 0;
                    self.file.read_rows(tensor, dtype, columns, &mut |chunk| {
                        matrix.shape.pack(output, chunk, to);
                        output += chunk.len() / (columns * dtype.bytes());
                        written(chunk.len() as u64)
                    })?;
                }
            }
        }
        tokens::subtract_base(&self.layout, base, &mut region);
        dora::measure(&self.layout, base, &mut region, &mut || written(0))?;
        Ok(FilledLens::new(self.base.config.clone(), self.layout.clone(), region))
    }
}

/// `[rows, columns]` → `[columns, rows]`, in squares that stay in the cache.
fn transpose<const N: usize>(from: &[u8], to: &mut [u8], rows: usize, columns: usize) {
    const SQUARE: usize = 32;
    let (from, to) = (from.as_chunks::<N>().0, to.as_chunks_mut::<N>().0);
    for row in (0..rows).step_by(SQUARE) {
        for column in (0..columns).step_by(SQUARE) {
            for r in row..rows.min(row + SQUARE) {
                for c in column..columns.min(column + SQUARE) {
                    to[c * rows + r] = from[r * columns + c];
                }
            }
        }
    }
}
