//! Folders as somebody else may have written them: those of the fixtures, with other files among theirs.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// A folder with the files of a fixture, by links: as the caches of model hubs are.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn of(fixture: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(fixtures().join(fixture)).unwrap() {
            let path = entry.unwrap().path();
            std::os::unix::fs::symlink(&path, folder.path().join(path.file_name().unwrap())).unwrap();
        }
        Self(folder)
    }

    pub(crate) fn with(self, file: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.path().join(file);
        let _ = std::fs::remove_file(&path);
        std::fs::write(path, content).unwrap();
        self
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn bytes(&self) -> u64 {
        let files = std::fs::read_dir(self.path()).unwrap();
        files.filter_map(|file| Some(std::fs::metadata(file.ok()?.path()).ok()?.len())).sum()
    }
}

pub(crate) fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity")
}

pub(crate) fn bytes_of(path: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(path)).unwrap()
}

pub(crate) fn json_of(path: &str) -> Value {
    serde_json::from_slice(&bytes_of(path)).unwrap()
}
