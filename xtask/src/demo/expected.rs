//! The answers the demo family was recorded to give (`tests/fixtures/demo/expected.json`).

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// Recorded answers by folder (`base`, `lenses/pirate`) and question.
pub struct Expected(BTreeMap<(String, String), String>);

impl Expected {
    /// Reads the record. Conversations of several turns are left to the tests.
    pub fn read(path: &Path) -> Result<Expected> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("failed to read `{}`", path.display()))?;
        let record: Value =
            serde_json::from_str(&text).with_context(|| format!("`{}` is no JSON", path.display()))?;
        let mut answers = BTreeMap::new();
        for base in record["bases"].as_object().into_iter().flatten().map(|(_, base)| base) {
            let lenses = base["lenses"].as_object().into_iter().flatten().map(|(_, lens)| lens);
            for model in std::iter::once(base).chain(lenses) {
                for case in model["cases"].as_array().into_iter().flatten() {
                    if let ([message], Some(path), Some(text)) = (
                        case["messages"].as_array().map_or(&[][..], Vec::as_slice),
                        model["path"].as_str(),
                        case["text"].as_str(),
                    ) {
                        let question = message["content"].as_str().unwrap_or_default();
                        answers.insert((path.to_owned(), question.to_owned()), text.to_owned());
                    }
                }
            }
        }
        Ok(Expected(answers))
    }

    /// What the files in `folder` answer to `question`.
    pub fn answer(&self, folder: &str, question: &str) -> Result<&str> {
        self.0
            .get(&(folder.to_owned(), question.to_owned()))
            .map(String::as_str)
            .with_context(|| format!("no answer of `{folder}` to “{question}” is recorded"))
    }
}
