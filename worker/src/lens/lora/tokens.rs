//! Single tokens that a lens trained: `trainable_token_indices`. Its file has their new rows; what is kept is by how much
//! they differ from the base's, since that is added like any other delta, by the scale that a request asks for.

use std::collections::BTreeSet;

use super::adapter_config::{AdapterConfig, TokenIndices, unsupported};
use super::targets::{EMBEDDING, HEAD};
use crate::engine::arena::Region;
use crate::lens::{LensError, LensLayout};
use crate::model::config::ModelConfig;
use crate::model::lora::TokenRows;
use crate::model::weights::FilledBase;
use turret_kernels::ops::Table;
use turret_kernels::rows::widen;

/// Most tokens of one lens. Each is a delta of its own for the head; many are better brought as a whole embedding.
const MAX_TOKENS: usize = 512;

/// Tokens in the order of their rows.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Trained {
    /// Rows of the embedding.
    pub(super) embedding: Vec<u32>,
    /// Rows of the head.
    pub(super) head: Vec<u32>,
    /// The head's are the embedding's.
    pub(super) is_tied: bool,
}

/// The tokens that a config names, with what PEFT makes of a tied head.
pub(super) fn trained(config: &AdapterConfig, base: &ModelConfig) -> Result<Trained, LensError> {
    const KEY: &str = "trainable_token_indices";
    let mut trained = Trained::default();
    let of = |why: String| LensError::UnsupportedSetting { key: KEY.into(), value: why };
    match &config.trainable_token_indices {
        None => return Ok(trained),
        Some(TokenIndices::Embedding(tokens)) => trained.embedding.clone_from(tokens),
        Some(TokenIndices::Modules(modules)) => {
            for (name, tokens) in modules {
                let is_it = |key: &str| {
                    key == name || key.strip_suffix(name.as_str()).is_some_and(|k| k.ends_with('.'))
                };
                let to = match (is_it(EMBEDDING), is_it(HEAD)) {
                    (true, _) => &mut trained.embedding,
                    (_, true) => &mut trained.head,
                    _ => return Err(unsupported(KEY, &name.as_str().into())),
                };
                to.clone_from(tokens);
            }
        }
    }
    for tokens in [&trained.embedding, &trained.head] {
        if tokens.len() > MAX_TOKENS {
            let value = format!("{} tokens (at most {MAX_TOKENS}; save the whole embedding)", tokens.len());
            return Err(of(value));
        }
        if let Some(token) = tokens.iter().find(|token| **token as usize >= base.vocab_size) {
            let what = format!("`{KEY}` names token {token}, the base has {}", base.vocab_size);
            return Err(LensError::BaseMismatch { what });
        }
        if tokens.iter().collect::<BTreeSet<_>>().len() < tokens.len() {
            return Err(of("a list with some token twice".into()));
        }
    }
    let saved = |key: &str| config.modules_to_save.iter().flatten().any(|name| key.ends_with(name.as_str()));
    let targets = [(EMBEDDING, &trained.embedding), (HEAD, &trained.head)];
    if let Some((key, _)) = targets.iter().find(|(key, tokens)| !tokens.is_empty() && saved(key)) {
        return Err(of(format!("some of `{key}`, which `modules_to_save` brings whole")));
    }
    // A head that is the embedding follows it, unless it is given tokens of its own.
    if base.tie_word_embeddings && !trained.embedding.is_empty() {
        trained.is_tied = trained.head.is_empty() || trained.head == trained.embedding;
        if trained.is_tied {
            trained.head.clone_from(&trained.embedding);
        }
    }
    Ok(trained)
}

/// Turns rows as the lens brings them into what they differ from the base's by.
pub(super) fn subtract_base(layout: &LensLayout, base: &FilledBase, region: &mut Region) {
    let (embedding, head) = (&layout.deltas.tokens, &layout.deltas.head_tokens);
    if let Some(own) = embedding {
        subtract(own, region, |token, row| match base.embedding() {
            Table::Rows(table) => widen(table, token, row),
            Table::Packed(table) => table.row(token, row),
        });
    }
    let Some(own) = head else { return };
    if embedding.as_ref().is_none_or(|embedding| embedding.rows != own.rows) {
        subtract(own, region, |token, row| base.matrix(&base.layout().head).row(token, row));
    }
    // What their rows of A are multiplied by.
    for part in layout.deltas.head.iter().flat_map(|delta| &delta.parts) {
        region.bytes_mut()[part.b.offset..][..4].copy_from_slice(&1.0_f32.to_ne_bytes());
    }
}

fn subtract(own: &TokenRows, region: &mut Region, base_row: impl Fn(usize, &mut [f32])) {
    let hidden = own.rows.inputs;
    let mut base = vec![0.0_f32; hidden];
    for (token, row) in &own.tokens {
        base_row(*token as usize, &mut base);
        let to = &mut region.bytes_mut()[own.rows.offset + *row as usize * hidden * 4..][..hidden * 4];
        for (to, base) in to.as_chunks_mut::<4>().0.iter_mut().zip(&base) {
            *to = (f32::from_ne_bytes(*to) - base).to_ne_bytes();
        }
    }
}
