//! The disk tier of fetched files: blobs by content, and what is known of each URL. Processes may share one.
//!
//! ```text
//! CACHE/blobs/<sha256>               a whole file
//! CACHE/used/<sha256>                empty: when the blob was last used
//! CACHE/partial/<sha256 of url>.*    what has arrived of one, with its validator beside it
//! CACHE/urls/<sha256 of url>.json    which blob a URL was, its validator, and who was given it
//! CACHE/glimpses/<sha256 of url>.*   the header of a file that is not here, what else is known of it, and who was told
//! CACHE/listings/<sha256>.json       the names of a hub folder's files, which never change, and who was told
//! CACHE/prepared/<sha256>            weights as they lie in memory, see [`super::prepared`]
//! CACHE/claims/                      what each process needs, see [`claims`]
//! CACHE/folders/<process>/<name>/    links to blobs: a source as an ordinary folder; while it is only looked at, sparse
//!                                    files with a header and no more
//! ```
//!
//! Blobs of folders that are in use are never removed; of the others the least recently used go first when the budget
//! is short. Notes of files that have left go when nobody asked for long. Everything is written under another name, synced and renamed, so a crash leaves nothing half.
//!
//! Everything here may wait for a disk, and most of it for another process: not for async threads.

mod claims;
mod folder;
mod glimpse;
mod place;
mod readers;
mod room;
mod tidy;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::files::{FileIdentity, Hasher};
use super::token::Token;
use claims::Claims;
pub use folder::Draft;
pub use glimpse::Glimpse;
pub use place::Place;
pub use readers::Readers;
pub use room::{NoRoom, Partial};

const BLOBS: &str = "blobs";
const GLIMPSES: &str = "glimpses";
const LISTINGS: &str = "listings";
const PARTIAL: &str = "partial";
const PREPARED: &str = "prepared";
const URLS: &str = "urls";
const USED: &str = "used";

/// The disk tier.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    claims: Claims,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    budget_bytes: u64,
    /// Blobs that folders in use link to, by folder.
    folders: BTreeMap<String, Vec<String>>,
}

/// What is known of a URL.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UrlRecord {
    /// The URL.
    pub url: String,
    /// SHA-256 of the file, hex.
    pub sha256: String,
    /// Bytes of the file.
    pub size: u64,
    /// `ETag` or `Last-Modified`, for asking whether it is still the same.
    pub validator: Option<String>,
    /// Who may have it while its server cannot be asked.
    #[serde(default)]
    pub readers: Readers,
}

/// The files of a folder whose content never changes.
#[derive(Debug, Serialize, Deserialize)]
struct Listing {
    folder: String,
    names: BTreeSet<String>,
    #[serde(default)]
    readers: Readers,
}

fn name_of(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

impl Cache {
    /// Opens the cache in a folder, made when something is stored.
    pub fn new(root: &Path, budget_bytes: u64) -> Self {
        let claims = Claims::new(root.join("claims"), root.join("folders"));
        Self {
            root: root.into(),
            claims,
            state: Mutex::new(State { budget_bytes, folders: BTreeMap::new() }),
        }
    }

    /// Changes the budget. Taken into account when the next file comes.
    pub fn set_budget(&self, budget_bytes: u64) {
        self.state.lock().budget_bytes = budget_bytes;
    }

    /// The budget.
    pub fn budget(&self) -> u64 {
        self.state.lock().budget_bytes
    }

    /// The root, without symbolic links: files of [`Draft`]s never leave it.
    pub fn root(&self) -> io::Result<PathBuf> {
        fs::create_dir_all(&self.root)?;
        fs::canonicalize(&self.root)
    }

    /// Where a blob is.
    pub fn blob(&self, sha256: &str) -> PathBuf {
        self.root.join(BLOBS).join(sha256)
    }

    /// What is known of a URL, if its blob is still there.
    pub fn known(&self, url: &str) -> Option<UrlRecord> {
        let text = fs::read(self.root.join(URLS).join(name_of(url) + ".json")).ok()?;
        let record: UrlRecord = serde_json::from_slice(&text).ok()?;
        let blob = fs::metadata(self.blob(&record.sha256)).ok()?;
        (record.url == url && blob.len() == record.size).then_some(record)
    }

    /// The same, if its blob is also what it is called. One that is not is removed, so that it comes anew.
    pub fn known_good(&self, url: &str, hasher: &Hasher) -> Option<UrlRecord> {
        let record = self.known(url)?;
        let path = self.blob(&record.sha256);
        let (identity, found) = hasher.sha256(&path).ok()?;
        if found == record.sha256 {
            return Some(record);
        }
        tracing::warn!(file = url, expected = record.sha256, found, "a file on the disk is damaged");
        if let Ok(_turn) = self.claims.turn()
            // Perhaps another process was faster, and it is whole again.
            && FileIdentity::at(&path).is_ok_and(|now| now == identity)
        {
            let _ = fs::remove_file(path);
        }
        None
    }

    /// Takes a file that has arrived whole.
    pub fn keep(&self, partial: &Partial, record: &UrlRecord, hasher: &Hasher) -> io::Result<()> {
        let (arrived, blob) = (partial.path(), self.blob(&record.sha256));
        fs::File::open(&arrived)?.sync_all()?;
        fs::create_dir_all(self.root.join(BLOBS))?;
        // Who uses the same content already keeps the file that was checked for them.
        match hasher.sha256(&blob) {
            Ok((_, found)) if found == record.sha256 => fs::remove_file(&arrived)?,
            _ => {
                fs::rename(&arrived, &blob)?;
                // Nobody claims it yet, so it may have made room for another one already: whoever links it finds out.
                if let Ok(identity) = FileIdentity::at(&blob) {
                    hasher.remember(identity, record.sha256.clone());
                }
            }
        }
        partial.discard();
        self.note(record)
    }

    /// Writes down what a URL is.
    pub fn note(&self, record: &UrlRecord) -> io::Result<()> {
        self.write(URLS, &record.url, record)
    }

    /// Names of the files of a folder, if they were written down, for whoever has been told before.
    pub fn listing(&self, folder: &str, token: &Token) -> Option<BTreeSet<String>> {
        let listing = self.read_listing(folder).filter(|listing| listing.readers.has(token))?;
        // Somebody else's folder serves as well.
        let _ = self.touch_listing(folder);
        Some(listing.names)
    }

    /// Writes down the names of the files of a folder, and who was told.
    pub fn note_listing(&self, folder: &str, names: &BTreeSet<String>, token: &Token) -> io::Result<()> {
        let known = self.read_listing(folder);
        if known.as_ref().is_some_and(|known| known.names == *names && known.readers.has(token)) {
            return self.touch_listing(folder);
        }
        let mut readers = known.map(|known| known.readers).unwrap_or_default();
        readers.admit(token);
        let listing = Listing { folder: folder.to_owned(), names: names.clone(), readers };
        self.write(LISTINGS, folder, &listing)
    }

    /// Tells a folder's names no more to somebody whom its hub refuses.
    pub fn close_listing(&self, folder: &str, token: &Token) -> io::Result<()> {
        let Some(mut listing) = self.read_listing(folder) else { return Ok(()) };
        if listing.readers.expel(token) { self.write(LISTINGS, folder, &listing) } else { Ok(()) }
    }

    fn read_listing(&self, folder: &str) -> Option<Listing> {
        let text = fs::read(self.listing_at(folder)).ok()?;
        let listing: Listing = serde_json::from_slice(&text).ok()?;
        (listing.folder == folder).then_some(listing)
    }

    fn listing_at(&self, folder: &str) -> PathBuf {
        self.root.join(LISTINGS).join(name_of(folder) + ".json")
    }

    /// It is as old as its last use, see [`Self::tidy`].
    fn touch_listing(&self, folder: &str) -> io::Result<()> {
        fs::File::open(self.listing_at(folder))?.set_modified(SystemTime::now())
    }

    fn write(&self, folder: &str, name: &str, value: &impl Serialize) -> io::Result<()> {
        let at = self.root.join(folder);
        fs::create_dir_all(&at)?;
        replace(&at.join(name_of(name) + ".json"), &serde_json::to_vec(value)?)
    }
}

/// Writes a file so that it is there whole or not at all.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    io::Write::write_all(&mut file, bytes)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|e| e.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    /// What one process has of a cache; another one of the same root is another process.
    pub(super) fn cache(root: &Path, budget_bytes: u64) -> Arc<Cache> {
        Arc::new(Cache::new(&root.join("cache"), budget_bytes))
    }

    pub(super) fn put(cache: &Arc<Cache>, url: &str, content: &[u8]) -> UrlRecord {
        let record = UrlRecord {
            url: url.into(),
            sha256: hex::encode(Sha256::digest(content)),
            size: content.len() as u64,
            validator: None,
            readers: Readers::default(),
        };
        let partial = cache.take_on(url).unwrap().unwrap();
        fs::write(partial.path(), content).unwrap();
        cache.keep(&partial, &record, &Hasher::default()).unwrap();
        record
    }

    #[test]
    fn a_listing_is_that_of_its_folder_and_for_those_who_were_told() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 0);
        let names = BTreeSet::from(["config.json".to_owned()]);
        let (a, b) = (Token::of_secret("a", "1"), Token::of_secret("b", "2"));
        cache.note_listing("hf://a/b@1", &names, &a).unwrap();
        assert_eq!(cache.listing("hf://a/b@1", &a), Some(names.clone()));
        assert_eq!(cache.listing("hf://a/b@1", &b), None);
        assert_eq!(cache.listing("hf://a/b@2", &a), None);
        cache.note_listing("hf://a/b@1", &names, &b).unwrap();
        cache.close_listing("hf://a/b@1", &a).unwrap();
        assert_eq!(cache.listing("hf://a/b@1", &a), None);
        assert_eq!(cache.listing("hf://a/b@1", &b), Some(names));
    }

    #[test]
    fn a_blob_that_is_not_what_it_is_called_is_not_known_and_makes_room_for_one_that_is() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 100);
        let hasher = Hasher::default();
        for damage in [&b"nothing?"[..], b"some"] {
            let record = put(&cache, "https://h/a", b"anything");
            assert_eq!(cache.known_good("https://h/a", &hasher), Some(record.clone()));
            let blob = fs::File::create(cache.blob(&record.sha256)).unwrap();
            io::Write::write_all(&mut &blob, damage).unwrap();
            // The clock of a file system may not have moved since it was whole.
            blob.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
            assert_eq!(cache.known_good("https://h/a", &hasher), None, "{damage:?}");
            put(&cache, "https://h/a", b"anything");
            assert_eq!(fs::read(cache.blob(&record.sha256)).unwrap(), b"anything");
        }
    }

    #[test]
    fn the_same_content_from_elsewhere_leaves_the_file_that_is_in_use() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 100);
        let first = put(&cache, "https://h/a", b"anything");
        let before = FileIdentity::at(&cache.blob(&first.sha256)).unwrap();
        put(&cache, "https://other/a", b"anything");
        assert_eq!(FileIdentity::at(&cache.blob(&first.sha256)).unwrap(), before);
        assert_eq!(cache.bytes(), 8);
        assert!(cache.known("https://other/a").is_some() && cache.known("https://h/a").is_some());
    }
}
