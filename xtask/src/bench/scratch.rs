//! A folder of one run.

use std::path::PathBuf;

use anyhow::{Context, Result};

/// A folder of one run: what its processes are told, log and keep. Nothing of it is left when this is dropped.
pub(super) struct Scratch(pub(super) PathBuf);

impl Scratch {
    /// An empty one. What a run left that was killed is removed.
    pub(super) fn new(path: PathBuf) -> Result<Self> {
        if path.exists() {
            std::fs::remove_dir_all(&path).with_context(|| format!("failed to remove {}", path.display()))?;
        }
        std::fs::create_dir_all(&path).with_context(|| format!("failed to make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_empty_at_first_and_gone_in_the_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("run");
        std::fs::create_dir_all(path.join("left")).unwrap();
        let scratch = Scratch::new(path.clone()).unwrap();
        assert_eq!(std::fs::read_dir(&scratch.0).unwrap().count(), 0);
        drop(scratch);
        assert!(!path.exists());
    }
}
