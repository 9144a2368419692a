//! The disk tier of fetched files: blobs by content, and what is known of each URL.
//!
//! ```text
//! CACHE/blobs/<sha256>            a whole file
//! CACHE/partial/<sha256 of url>   what has arrived of one, with its validator beside it
//! CACHE/urls/<sha256 of url>.json which blob a URL was, and its validator
//! CACHE/listings/<sha256>.json    the names of a hub folder's files, which never change
//! CACHE/folders/<name>/<file>     links to blobs: a source as an ordinary folder
//! ```
//!
//! Blobs of folders that are in use are never removed; of the others the least recently used go first when the budget
//! is short. Everything is written under another name, synced and renamed, so a crash leaves nothing half.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Folder of prepared files.
const PREPARED: &str = "prepared";
/// A prepared file that nobody has read for so long may leave for another one. Less, and a budget that does not hold all
/// that are in turn would have them written again and again.
const STALE: Duration = Duration::from_secs(3600);

/// The disk tier.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    budget_bytes: u64,
    /// Blobs that folders in use link to, by folder.
    used: BTreeMap<String, BTreeSet<String>>,
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
}

/// The files of a folder whose content never changes.
#[derive(Debug, Serialize, Deserialize)]
struct Listing {
    folder: String,
    names: BTreeSet<String>,
}

/// The budget is too small for a file.
#[derive(Debug, thiserror::Error)]
#[error("{needed} more bytes do not fit the disk budget of {budget} bytes: {used} are in use")]
pub struct DiskFull {
    needed: u64,
    budget: u64,
    used: u64,
}

fn name_of(text: &str) -> String {
    hex::encode(Sha256::digest(text))
}

impl Cache {
    /// Opens the cache in a folder, made when something is stored.
    pub fn new(root: &Path, budget_bytes: u64) -> Self {
        Self { root: root.into(), state: Mutex::new(State { budget_bytes, used: BTreeMap::new() }) }
    }

    /// Changes the budget. Taken into account when the next file comes.
    pub fn set_budget(&self, budget_bytes: u64) {
        self.state.lock().budget_bytes = budget_bytes;
    }

    /// The budget.
    pub fn budget(&self) -> u64 {
        self.state.lock().budget_bytes
    }

    /// Bytes of all blobs and partial files.
    pub fn bytes(&self) -> u64 {
        let sum = |folder: &str| self.list(folder).iter().map(|(_, size, _)| size).sum::<u64>();
        sum("blobs") + sum("partial") + sum(PREPARED)
    }

    fn list(&self, folder: &str) -> Vec<(String, u64, SystemTime)> {
        let Ok(entries) = fs::read_dir(self.root.join(folder)) else { return Vec::new() };
        entries
            .flatten()
            .filter_map(|entry| {
                let metadata = entry.metadata().ok()?;
                let name = entry.file_name().into_string().ok()?;
                Some((name, metadata.len(), metadata.modified().ok()?))
            })
            .collect()
    }

    /// Where a file arrives, and where its validator is kept.
    pub fn partial(&self, url: &str) -> io::Result<(PathBuf, PathBuf)> {
        let folder = self.root.join("partial");
        fs::create_dir_all(&folder)?;
        let name = name_of(url);
        Ok((folder.join(format!("{name}.incomplete")), folder.join(format!("{name}.validator"))))
    }

    /// What is known of a URL, if its blob is still there.
    pub fn known(&self, url: &str) -> Option<UrlRecord> {
        let text = fs::read(self.root.join("urls").join(name_of(url) + ".json")).ok()?;
        let record: UrlRecord = serde_json::from_slice(&text).ok()?;
        let blob = fs::metadata(self.blob(&record.sha256)).ok()?;
        (record.url == url && blob.len() == record.size).then_some(record)
    }

    /// Where a blob is.
    pub fn blob(&self, sha256: &str) -> PathBuf {
        self.root.join("blobs").join(sha256)
    }

    /// Where a prepared file is.
    pub fn prepared(&self, name: &str) -> PathBuf {
        self.root.join(PREPARED).join(name)
    }

    /// Where a prepared file of so many bytes may be written. `None` when it is there, or when there is no room for it:
    /// nothing leaves for it but other prepared files that nobody has read for [`STALE`].
    pub fn place_for_prepared(&self, name: &str, bytes: u64) -> io::Result<Option<PathBuf>> {
        fs::create_dir_all(self.root.join(PREPARED))?;
        let path = self.prepared(name);
        if path.exists() {
            return Ok(None);
        }
        let budget = self.state.lock().budget_bytes;
        let used = self.bytes().saturating_add(bytes);
        let freed = self.remove_prepared(used.saturating_sub(budget), STALE);
        Ok((used.saturating_sub(freed) <= budget).then_some(path))
    }

    /// Removes prepared files that nobody has read for so long, the longest unread first, until so many bytes are free.
    fn remove_prepared(&self, bytes: u64, unread_for: Duration) -> u64 {
        let now = SystemTime::now();
        let mut stale = self.list(PREPARED);
        stale.retain(|(_, _, read)| now.duration_since(*read).is_ok_and(|unread| unread >= unread_for));
        stale.sort_by(|a, b| (a.2, &a.0).cmp(&(b.2, &b.0)));
        let mut freed = 0;
        for (name, size, _) in stale {
            if freed >= bytes {
                break;
            }
            if fs::remove_file(self.prepared(&name)).is_ok() {
                freed += size;
            }
        }
        freed
    }

    /// Makes room for so many more bytes by removing blobs that nothing uses, the longest unused first.
    pub fn make_room(&self, needed: u64) -> Result<(), DiskFull> {
        let state = self.state.lock();
        let used: BTreeSet<&String> = state.used.values().flatten().collect();
        let mut bytes = self.bytes();
        let mut idle: Vec<_> =
            self.list("blobs").into_iter().filter(|(name, ..)| !used.contains(name)).collect();
        idle.sort_by(|a, b| (a.2, &a.0).cmp(&(b.2, &b.0)));
        for (name, size, _) in idle {
            if bytes.saturating_add(needed) <= state.budget_bytes {
                break;
            }
            if fs::remove_file(self.blob(&name)).is_ok() {
                bytes -= size;
            }
        }
        // What was prepared can be prepared again from what was fetched.
        bytes -= self
            .remove_prepared(bytes.saturating_add(needed).saturating_sub(state.budget_bytes), Duration::ZERO);
        if bytes.saturating_add(needed) > state.budget_bytes {
            return Err(DiskFull { needed, budget: state.budget_bytes, used: bytes });
        }
        Ok(())
    }

    /// Takes a file that has arrived whole.
    pub fn keep(&self, arrived: &Path, record: &UrlRecord) -> io::Result<()> {
        fs::File::open(arrived)?.sync_all()?;
        fs::create_dir_all(self.root.join("blobs"))?;
        fs::rename(arrived, self.blob(&record.sha256))?;
        self.note(record)
    }

    /// Writes down what a URL is.
    pub fn note(&self, record: &UrlRecord) -> io::Result<()> {
        let folder = self.root.join("urls");
        fs::create_dir_all(&folder)?;
        let path = folder.join(name_of(&record.url) + ".json");
        replace(&path, &serde_json::to_vec(record)?)
    }

    /// Names of the files of a folder, if they were written down.
    pub fn listing(&self, folder: &str) -> Option<BTreeSet<String>> {
        let text = fs::read(self.root.join("listings").join(name_of(folder) + ".json")).ok()?;
        let listing: Listing = serde_json::from_slice(&text).ok()?;
        (listing.folder == folder).then_some(listing.names)
    }

    /// Writes down the names of the files of a folder.
    pub fn note_listing(&self, folder: &str, names: &BTreeSet<String>) -> io::Result<()> {
        let at = self.root.join("listings");
        fs::create_dir_all(&at)?;
        let listing = Listing { folder: folder.to_owned(), names: names.clone() };
        replace(&at.join(name_of(folder) + ".json"), &serde_json::to_vec(&listing)?)
    }

    /// Makes the folder of a source: a link per file, and only those. Its blobs stay until [`Self::retain`] drops it.
    pub fn folder(&self, source: &str, files: &[(String, UrlRecord)]) -> io::Result<PathBuf> {
        let mut content = String::new();
        for (name, record) in files {
            content += &format!("{}  {name}\n", record.sha256);
        }
        let id = name_of(&format!("{source}\n{content}"));
        let folder = self.root.join("folders").join(&id);
        fs::create_dir_all(&folder)?;
        for (name, record) in files {
            let link = folder.join(name);
            let target = self.blob(&record.sha256);
            if fs::read_link(&link).ok().as_deref() != Some(&target) {
                let temporary = folder.join(format!(".{name}.new"));
                let _ = fs::remove_file(&temporary);
                std::os::unix::fs::symlink(fs::canonicalize(&target)?, &temporary)?;
                fs::rename(&temporary, &link)?;
            }
            // The time of last use is the blob's mtime.
            let _ = fs::File::open(&target).and_then(|f| f.set_modified(SystemTime::now()));
        }
        let blobs = files.iter().map(|(_, r)| r.sha256.clone()).collect();
        self.state.lock().used.insert(id, blobs);
        Ok(folder)
    }

    /// The root, without symbolic links: files of [`Self::folder`] never leave it.
    pub fn root(&self) -> io::Result<PathBuf> {
        fs::create_dir_all(&self.root)?;
        fs::canonicalize(&self.root)
    }

    /// Whether a folder is one of the cache's.
    pub fn holds(&self, folder: &Path) -> bool {
        let state = self.state.lock();
        folder.file_name().and_then(|n| n.to_str()).is_some_and(|id| state.used.contains_key(id))
    }

    /// Forgets all folders but these.
    pub fn retain(&self, folders: &BTreeSet<PathBuf>) {
        let at = self.root.join("folders");
        self.state.lock().used.retain(|id, _| {
            let keep = folders.iter().any(|f| f.file_name().is_some_and(|n| n.to_str() == Some(id)));
            if !keep {
                let _ = fs::remove_dir_all(at.join(id));
            }
            keep
        });
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
    use super::*;

    fn put(cache: &Cache, root: &Path, url: &str, content: &[u8]) -> UrlRecord {
        let arrived = root.join("arrived");
        fs::write(&arrived, content).unwrap();
        let record = UrlRecord {
            url: url.into(),
            sha256: hex::encode(Sha256::digest(content)),
            size: content.len() as u64,
            validator: None,
        };
        cache.keep(&arrived, &record).unwrap();
        record
    }

    #[test]
    fn a_listing_is_that_of_its_folder() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::new(root.path(), 0);
        let names = BTreeSet::from(["config.json".to_owned()]);
        cache.note_listing("hf://a/b@1", &names).unwrap();
        assert_eq!(cache.listing("hf://a/b@1"), Some(names));
        assert_eq!(cache.listing("hf://a/b@2"), None);
    }

    #[test]
    fn the_longest_unused_blob_goes_first_and_one_in_use_never() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache::new(&root.path().join("cache"), 30);
        let a = put(&cache, root.path(), "https://h/a", &[1; 10]);
        let b = put(&cache, root.path(), "https://h/b", &[2; 10]);
        let c = put(&cache, root.path(), "https://h/c", &[3; 10]);
        let at = |record: &UrlRecord, seconds: u64| {
            let file = fs::File::open(cache.blob(&record.sha256)).unwrap();
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds)).unwrap();
        };
        let folder = cache.folder("https://h", &[("a".into(), a.clone())]).unwrap();
        at(&a, 1);
        at(&b, 3);
        at(&c, 2);
        cache.make_room(10).unwrap();
        assert!(cache.known("https://h/c").is_none());
        assert_eq!(cache.known("https://h/b"), Some(b));
        assert_eq!(fs::read(folder.join("a")).unwrap(), [1; 10]);
        assert!(cache.make_room(21).is_err(), "a is in use");
        cache.retain(&BTreeSet::new());
        assert!(!folder.exists());
        cache.make_room(30).unwrap();
        assert_eq!(cache.bytes(), 0);
    }
}
