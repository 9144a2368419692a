//! Tokens and a chat template that a lens brings: the files of a tokenizer beside its weights.
//!
//! A lens with a `tokenizer.json` is spoken to through it, and through its own chat template; special tokens that end a
//! text are the base's and its own. Anything of a tokenizer without `tokenizer.json` is refused.

use std::path::Path;

use super::{LENS_SIDE_FILES, LensError, LensLayout};
use crate::model::config::ModelConfig;
use crate::model::tokenizer::Tokenizer;

const TOKENIZER: &str = "tokenizer.json";

/// The lens's own tokenizer, if it has one.
pub(super) fn open(
    folder: &Path,
    (base, spoken): (&ModelConfig, &Tokenizer),
    layout: &LensLayout,
) -> Result<Option<Tokenizer>, LensError> {
    if !folder.join(TOKENIZER).exists() {
        let alone = LENS_SIDE_FILES.iter().find(|file| folder.join(file).exists());
        return alone.map_or(Ok(None), |file| Err(LensError::SideFileAlone { file }));
    }
    // As if it were a base with this vocabulary.
    let mut config = base.clone();
    config.vocab_size = layout.replaced.vocab_size().unwrap_or(base.vocab_size);
    config.eos_token_ids = spoken.stop_token_ids().to_vec();
    config.eos_token_ids.retain(|id| (*id as usize) < config.vocab_size);
    let tokenizer = Tokenizer::open_for_lens(folder, &config)
        .map_err(|source| LensError::Tokenizer { path: folder.join(TOKENIZER), source })?;
    if let Some(token) = tokenizer.token(config.vocab_size as u32) {
        return Err(LensError::BaseMismatch {
            what: format!(
                "`{TOKENIZER}` has the token `{token}` with id {}, but there are {} embeddings",
                config.vocab_size, config.vocab_size
            ),
        });
    }
    Ok(Some(tokenizer))
}
