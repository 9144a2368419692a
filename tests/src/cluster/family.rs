//! The demo family: two trained bases, seven lenses, and the recorded answers of each.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;
use sha2::{Digest, Sha256};
use turret_crds::source::files_digest;

/// The recorded answers of the family.
#[derive(Clone, Debug, Deserialize)]
pub struct Family {
    /// By the folder of the base.
    pub bases: BTreeMap<String, RecordedBase>,
}

/// A base and what it and its lenses answer.
#[derive(Clone, Debug, Deserialize)]
pub struct RecordedBase {
    /// Its folder.
    pub path: String,
    /// What the bare base answers.
    pub cases: Vec<Case>,
    /// Its lenses by name.
    pub lenses: BTreeMap<String, RecordedLens>,
}

/// A lens and what it answers.
#[derive(Clone, Debug, Deserialize)]
pub struct RecordedLens {
    /// Its folder.
    pub path: String,
    /// What it answers.
    pub cases: Vec<Case>,
}

/// One conversation and the greedy answer to it.
#[derive(Clone, Debug, Deserialize)]
pub struct Case {
    /// The conversation as the chat API takes it.
    pub messages: Value,
    /// The answer.
    pub text: String,
    /// The prompt's tokens, template included.
    pub prompt_ids: Vec<u32>,
    /// The answer's tokens, ending with the end-of-turn token.
    pub output_ids: Vec<u32>,
}

impl Family {
    /// The folder of the family in this repository.
    pub fn folder() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/demo")
    }

    /// Reads the recorded answers.
    pub fn read() -> Result<Self> {
        let file = Self::folder().join("expected.json");
        let text = fs::read(&file).with_context(|| format!("failed to read {}", file.display()))?;
        serde_json::from_slice(&text).with_context(|| format!("{} is damaged", file.display()))
    }

    /// What a model answers: `base` is a base's folder, `lens` a lens' name or nothing.
    pub fn cases(&self, base: &str, lens: Option<&str>) -> &[Case] {
        let base = &self.bases[base];
        match lens {
            Some(lens) => &base.lenses[lens].cases,
            None => &base.cases,
        }
    }
}

/// The digest of a lens or a base of the family, `sha256:…`, over all files in its folder.
pub fn digest_of(folder: &Path) -> Result<String> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("failed to list {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
        files.push((name, hex::encode(Sha256::digest(fs::read(&path)?))));
    }
    Ok(files_digest(files.iter().map(|(name, sum)| (name.as_str(), sum.as_str()))))
}

/// Copies a folder so that every user can read it, as an unprivileged pod must. Each file appears
/// whole: a worker that looks meanwhile sees the old one or the new one.
pub fn copy_readable(from: &Path, to: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::create_dir_all(to)?;
    fs::set_permissions(to, fs::Permissions::from_mode(0o755))?;
    for entry in fs::read_dir(from).with_context(|| format!("failed to list {}", from.display()))? {
        let source = entry?.path();
        let target = to.join(source.file_name().expect("an entry has a name"));
        if source.is_dir() {
            copy_readable(&source, &target)?;
        } else {
            write_readable(&target, &fs::read(&source)?)?;
        }
    }
    Ok(())
}

/// Writes a file that every user can read, whole or not at all.
pub fn write_readable(file: &Path, bytes: &[u8]) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let partial = file.with_extension("partial");
    fs::write(&partial, bytes).with_context(|| format!("failed to write {}", partial.display()))?;
    fs::set_permissions(&partial, fs::Permissions::from_mode(0o644))?;
    fs::rename(&partial, file).with_context(|| format!("failed to write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_base_and_lens_has_answers_that_differ_from_its_neighbours() {
        let family = Family::read().unwrap();
        let mut answers = Vec::new();
        for base in family.bases.values() {
            let lenses = base.lenses.values().map(|lens| &lens.cases);
            for cases in lenses.chain([&base.cases]) {
                assert!(!cases.is_empty());
                answers.push(cases[0].text.clone());
            }
        }
        let count = answers.len();
        answers.sort();
        answers.dedup();
        assert_eq!((count, answers.len()), (9, 9), "a test that takes one lens for another would not notice");
    }

    #[test]
    fn the_digest_is_what_the_command_line_prints() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a"), "1").unwrap();
        // printf 1 >a; sha256sum a | sha256sum
        let one = hex::encode(Sha256::digest("1"));
        let want = format!("sha256:{}", hex::encode(Sha256::digest(format!("{one}  a\n"))));
        assert_eq!(digest_of(folder.path()).unwrap(), want);
    }

    #[test]
    fn copies_can_be_read_by_everybody() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from/deep");
        fs::create_dir_all(&from).unwrap();
        fs::write(from.join("file"), "x").unwrap();
        fs::set_permissions(from.join("file"), fs::Permissions::from_mode(0o600)).unwrap();
        let to = folder.path().join("to");
        copy_readable(&folder.path().join("from"), &to).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&to.join("deep")), mode(&to.join("deep/file"))), (0o755, 0o644));
    }
}
