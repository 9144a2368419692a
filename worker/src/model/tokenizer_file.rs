//! `tokenizer.json`, looked at before the `tokenizers` crate takes it.
//!
//! That crate trusts its files: it panics at some that are malformed, and a few well-formed ones make much out of little
//! text. Its panics become errors here, and what could grow is refused by name.

use std::panic::{AssertUnwindSafe, catch_unwind};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value};
use tokenizers::Tokenizer;

use super::bounded_json::{Place, object};
use super::excerpt::complaint;

/// Values of everything but the vocabulary. The largest published ones have some hundred.
const MAX_VALUES: usize = 4096;
/// How many bytes may come of one byte of text. Published ones turn a space into the three of `▁`, and put one before.
const MAX_GROWTH: f64 = 64.0;

/// A tokenizer of this text.
pub(super) fn parse(text: &str) -> Result<Tokenizer, String> {
    let outline = object(text, MAX_VALUES, &is_vocabulary)?;
    refuse(&outline)?;
    let mut tokenizer =
        guarded(|| Tokenizer::from_bytes(text)).map_err(|e| format!("it cannot be read: {e}"))?;
    // Both are settings of training runs; a request's text is never cut or padded.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| complaint(&e))?;
    Ok(tokenizer)
}

/// Turns off the memory of words. It is kept per thread and per tokenizer, and nothing ever clears it.
pub(super) fn remember_nothing(tokenizer: &mut Tokenizer) {
    let mut model = tokenizer.get_model().clone();
    model.resize_cache(0);
    tokenizer.with_model(model);
}

/// Calls the `tokenizers` crate. It panics where a file breaks a rule that it did not check when it read it, and where a
/// regular expression takes more steps than its engine allows: that is how it says so.
pub(super) fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(complaint(&error)),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it does not say why");
            Err(format!("the tokenizer's library failed: {}", complaint(&text)))
        }
    }
}

/// What is as large as a vocabulary, and is only ever looked up.
fn is_vocabulary(place: Place<'_>) -> bool {
    match place {
        [top] => top == "added_tokens",
        [top, key] => top == "model" && (key == "vocab" || key == "merges"),
        _ => false,
    }
}

fn refuse(outline: &Map<String, Value>) -> Result<(), String> {
    let model = outline.get("model").unwrap_or(&Value::Null);
    // The crate cuts this many bytes off a token, be that inside of a character.
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or_default();
    if !prefix.is_empty() && model["type"] != "WordPiece" {
        return Err("`continuing_subword_prefix` is supported for WordPiece only".into());
    }
    for part in ["normalizer", "decoder"] {
        let factor = growth(outline.get(part).unwrap_or(&Value::Null));
        if factor > MAX_GROWTH {
            return Err(format!("its {part} may turn one byte into {factor}; {MAX_GROWTH} is the most"));
        }
    }
    match repeats(outline.get("post_processor").unwrap_or(&Value::Null)) {
        0 | 1 => Ok(()),
        times => Err(format!("its post_processor repeats the text {times} times")),
    }
}

/// How many bytes a normalizer or decoder makes of one, at most. Changes that Unicode defines are small and not counted.
fn growth(part: &Value) -> f64 {
    let len = |key: &str| part[key].as_str().map_or(0.0, |text| text.len() as f64);
    let own = match part["pattern"]["String"].as_str() {
        Some(pattern) if !pattern.is_empty() => len("content") / pattern.len() as f64,
        // A regular expression may match nothing at all, between any two characters.
        _ => 1.0 + len("content"),
    };
    let charsmap = part["precompiled_charsmap"].as_str().map_or(1.0, longest_replacement);
    let parts = ["normalizers", "decoders"].iter().filter_map(|key| part[*key].as_array()).flatten();
    let inside: f64 = parts.map(growth).product();
    own.max(1.0) * (1.0 + len("prepend")) * charsmap.max(1.0) * inside
}

/// Of SentencePiece's table: a length, that many bytes of a trie, and texts that each end with a zero.
fn longest_replacement(charsmap: &str) -> f64 {
    let bytes = STANDARD.decode(charsmap).unwrap_or_default();
    let Some((length, rest)) = bytes.split_first_chunk::<4>() else { return 1.0 };
    let texts = rest.get(u32::from_le_bytes(*length) as usize..).unwrap_or_default();
    texts.split(|byte| *byte == 0).map(<[u8]>::len).max().unwrap_or(0) as f64
}

/// How often the text itself is in what a post-processor makes of it.
fn repeats(processor: &Value) -> usize {
    let own = match &processor["single"] {
        Value::String(template) => template.split_whitespace().filter(|piece| piece.starts_with('$')).count(),
        Value::Array(pieces) => pieces
            .iter()
            .filter(|piece| {
                piece.get("Sequence").is_some() || piece.as_str().is_some_and(|p| p.starts_with('$'))
            })
            .count(),
        _ => 1,
    };
    let parts = processor["processors"].as_array().into_iter().flatten();
    own.saturating_mul(parts.map(repeats).fold(1, usize::saturating_mul))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_makes_much_out_of_little_is_refused_by_name() {
        let refused = |part: Value| refuse(part.as_object().unwrap()).err().unwrap_or_default();
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let llama = json!({"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, replace(json!({"String": " "}), "▁")]});
        assert_eq!(refused(json!({"normalizer": llama})), "");
        let doubling = vec![replace(json!({"String": "a"}), "aa"); 7];
        let doubling = json!({"type": "Sequence", "normalizers": doubling});
        assert!(refused(json!({"normalizer": doubling})).contains("normalizer may turn one byte into 128"));
        let between = replace(json!({"Regex": ""}), &"x".repeat(64));
        assert!(refused(json!({"decoder": {"type": "Sequence", "decoders": [between]}})).contains("decoder"));
        let table = STANDARD.encode([&4_u32.to_le_bytes()[..], &[0; 4], &[b'x'; 100], &[0]].concat());
        let table = json!({"type": "Precompiled", "precompiled_charsmap": table});
        assert!(refused(json!({"normalizer": table})).contains("into 100"));
        let a = json!({"Sequence": {"id": "A", "type_id": 0}});
        let twice = json!({"type": "TemplateProcessing", "single": [a, a]});
        assert!(refused(json!({"post_processor": twice})).contains("repeats the text 2 times"));
        let prefix = json!({"type": "BPE", "continuing_subword_prefix": "#"});
        assert!(refused(json!({"model": prefix})).contains("continuing_subword_prefix"));
    }
}
