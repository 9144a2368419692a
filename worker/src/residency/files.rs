//! Files by what they are: their identity in the file system, and their digest.
//!
//! A file is hashed once: its digest is remembered for as long as device, inode, size, mtime and ctime stay the
//! same. A file that changes while it is read has no digest.

use std::collections::HashMap;
use std::fs::Metadata;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

/// Digests remembered at most; beyond it all are forgotten, which costs reading again.
const MEMO_ENTRIES: usize = 1 << 16;
const CHUNK_BYTES: usize = 1 << 20;

/// What tells one state of a file from another without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    /// Bytes.
    pub size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    /// Of an open file's metadata.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Of the file at a path, links followed.
    pub fn at(path: &Path) -> io::Result<Self> {
        Ok(Self::of(&std::fs::metadata(path)?))
    }
}

/// Hashes files and remembers.
#[derive(Debug, Default)]
pub struct Hasher {
    memo: Mutex<HashMap<FileIdentity, String>>,
}

impl Hasher {
    /// Identity of a file and SHA-256 of its content, hex.
    pub fn sha256(&self, path: &Path) -> io::Result<(FileIdentity, String)> {
        let mut file = crate::model::file::open(path)?;
        let identity = FileIdentity::of(&file.metadata()?);
        if let Some(known) = self.memo.lock().get(&identity) {
            return Ok((identity, known.clone()));
        }
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match file.read(&mut chunk)? {
                0 => break,
                n => hasher.update(&chunk[..n]),
            }
        }
        if FileIdentity::of(&file.metadata()?) != identity {
            return Err(io::Error::other("the file changed while it was read"));
        }
        let digest = hex::encode(hasher.finalize());
        self.remember(identity, digest.clone());
        Ok((identity, digest))
    }

    /// Takes over a digest that was computed while the file was written.
    pub fn remember(&self, identity: FileIdentity, sha256_hex: String) {
        let mut memo = self.memo.lock();
        if memo.len() >= MEMO_ENTRIES {
            memo.clear();
        }
        memo.insert(identity, sha256_hex);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_file_is_hashed_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let hasher = Hasher::default();
        std::fs::write(&path, "one").unwrap();
        let (identity, first) = hasher.sha256(&path).unwrap();
        assert_eq!(first, hex::encode(Sha256::digest("one")));
        assert_eq!(hasher.sha256(&path).unwrap(), (identity, first.clone()));
        std::fs::write(&path, "two!").unwrap();
        let (other, second) = hasher.sha256(&path).unwrap();
        assert!(other != identity && second != first);
    }
}
