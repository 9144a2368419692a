//! What was seen of files that are not here, kept for when their servers are away.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::room::charge;
use super::{Cache, GLIMPSES, Readers, name_of, replace};
use crate::model::tensor_file::head_bytes;

/// What was seen of a file without fetching it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Glimpse {
    /// The URL.
    pub url: String,
    /// SHA-256 of the whole file, hex, where its server tells it.
    pub sha256: Option<String>,
    /// Bytes of the whole file.
    pub size: u64,
    /// `ETag` or `Last-Modified`, for asking whether it is still the same.
    pub validator: Option<String>,
    /// Who may be told while its server cannot be asked.
    pub readers: Readers,
    /// Its bytes before the first tensor.
    #[serde(skip)]
    pub head: Vec<u8>,
}

impl Glimpse {
    /// Whether another one is of the same file in the same state.
    pub fn is_of(&self, other: &Self) -> bool {
        (&self.url, &self.sha256, self.size, &self.validator, &self.head)
            == (&other.url, &other.sha256, other.size, &other.validator, &other.head)
    }

    /// Writes a file of the right length with nothing but its start in it, which takes hardly any room. To be looked at, never
    /// to be loaded.
    pub(super) fn sketch(&self, path: &Path) -> io::Result<()> {
        let file = fs::File::create_new(path)?;
        file.set_len(self.size)?;
        file.write_all_at(&self.head, 0)
    }
}

impl Cache {
    /// What was seen of a URL.
    pub fn glimpse(&self, url: &str) -> Option<Glimpse> {
        let bytes = fs::read(self.glimpse_at(url)).ok()?;
        let (record, head) = bytes.split_at(bytes.iter().position(|byte| *byte == b'\n')?);
        let record: Glimpse = serde_json::from_slice(record).ok()?;
        let glimpse = Glimpse { head: head[1..].to_vec(), ..record };
        let is_whole = glimpse.head.len() as u64 == head_bytes(&glimpse.head, glimpse.size);
        (glimpse.url == url && is_whole).then_some(glimpse)
    }

    /// Writes down what was seen of a URL, if there is room. It leaves when anything else needs that.
    pub fn note_glimpse(&self, glimpse: &Glimpse) -> io::Result<()> {
        let mut bytes = serde_json::to_vec(glimpse)?;
        bytes.push(b'\n');
        bytes.extend_from_slice(&glimpse.head);
        let mut turn = self.claims.turn()?;
        let taken = charge(&self.stored(), &turn.all()?);
        if taken.saturating_add(bytes.len() as u64) > self.budget() {
            // What is there may name somebody who may not be told any more.
            let _ = fs::remove_file(self.glimpse_at(&glimpse.url));
            return Ok(());
        }
        fs::create_dir_all(self.root.join(GLIMPSES))?;
        replace(&self.glimpse_at(&glimpse.url), &bytes)
    }

    fn glimpse_at(&self, url: &str) -> PathBuf {
        self.root.join(GLIMPSES).join(name_of(url) + ".glimpse")
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::super::tests::cache;
    use super::*;
    use crate::model::tensor_file::{TensorFile, TensorFileError};
    use crate::residency::token::Token;

    /// A file with a header of so many bytes, and so many behind it.
    fn head(header: u64) -> Vec<u8> {
        let mut head = header.to_le_bytes().to_vec();
        head.resize(8 + header as usize, b' ');
        head
    }

    fn glimpse(url: &str, size: u64, head: Vec<u8>) -> Glimpse {
        let readers = Readers::of(&Token::of_secret("a", "1"));
        Glimpse { url: url.into(), sha256: Some("5".into()), size, validator: None, readers, head }
    }

    #[test]
    fn what_was_seen_is_found_again_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 1000);
        for (header, size) in [(0, 8), (20, 28), (20, 1 << 40)] {
            let seen = glimpse("https://h/a", size, head(header));
            cache.note_glimpse(&seen).unwrap();
            assert_eq!(cache.glimpse("https://h/a"), Some(seen));
        }
        assert_eq!(cache.glimpse("https://h/b"), None);
        let at = cache.glimpse_at("https://h/a");
        let bytes = fs::read(&at).unwrap();
        fs::write(&at, &bytes[..bytes.len() - 1]).unwrap();
        assert_eq!(cache.glimpse("https://h/a"), None, "it is cut short");
    }

    #[test]
    fn what_was_seen_makes_room_for_what_is_fetched() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 10_000);
        cache.note_glimpse(&glimpse("https://h/a", 1 << 40, head(500))).unwrap();
        assert!((500..1000).contains(&cache.bytes()), "it counts as what it takes");
        let coming = cache.take_on("https://h/coming").unwrap().unwrap();
        coming.make_room(10_000, 0).unwrap();
        assert_eq!(cache.glimpse("https://h/a"), None);
        cache.note_glimpse(&glimpse("https://h/a", 1 << 40, head(500))).unwrap();
        assert_eq!(cache.glimpse("https://h/a"), None, "there is no room");
    }

    #[test]
    fn a_sketch_looks_as_its_file_does_and_takes_no_room() {
        let folder = tempfile::tempdir().unwrap();
        let header = br#"{"a":{"dtype":"F32","shape":[1024,1024],"data_offsets":[0,4194304]}}"#;
        let mut head = (header.len() as u64).to_le_bytes().to_vec();
        head.extend_from_slice(header);
        let size = head.len() as u64 + (4 << 20);
        let opened = |name: &str, glimpse: &Glimpse| {
            let path = folder.path().join(name);
            glimpse.sketch(&path).unwrap();
            assert!(path.metadata().unwrap().blocks() * 512 < 64 << 10);
            TensorFile::open(&path)
        };
        let good = opened("good", &glimpse("https://h/a", size, head.clone())).unwrap();
        assert_eq!(good.shape("a"), Some(&[1024, 1024][..]));
        let short = opened("short", &glimpse("https://h/a", size - 1, head.clone()));
        assert!(matches!(short, Err(TensorFileError::Truncated { .. })));
        let long = opened("long", &glimpse("https://h/a", size + 1, head));
        assert!(matches!(long, Err(TensorFileError::Malformed { .. })));
        let claim = opened("claim", &glimpse("https://h/a", size, u64::MAX.to_le_bytes().to_vec()));
        assert!(matches!(claim, Err(TensorFileError::Malformed { .. })));
    }
}
