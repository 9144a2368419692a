//! Room on the disk: for files on their way, each given to one process, and made by removing what nobody claims.
//!
//! What a file may come to take is claimed before its first byte is written, so downloads at the same time exceed the budget
//! neither in one process nor in several.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::{BLOBS, Cache, GLIMPSES, PARTIAL, PREPARED, USED, name_of};

const INCOMPLETE: &str = ".incomplete";

/// A file on its way. This process alone writes it, until this is dropped.
#[derive(Debug)]
pub struct Partial {
    cache: Arc<Cache>,
    name: String,
}

/// Why a file gets no room.
#[derive(Debug, thiserror::Error)]
pub enum NoRoom {
    /// It would not have it even alone.
    #[error(
        "with the files beside it, it takes {needed} bytes, more than the disk budget of {budget}; raise spec.memory.diskBudget"
    )]
    Alone {
        /// With the files of the same folder.
        needed: u64,
        /// The budget.
        budget: u64,
    },
    /// It may have it when others have left.
    #[error(
        "it takes {needed} bytes, and of the disk budget of {budget} bytes {used} are in use or promised; raise \
         spec.memory.diskBudget, or declare less"
    )]
    Now {
        /// For the whole file.
        needed: u64,
        /// The budget.
        budget: u64,
        /// By others.
        used: u64,
    },
    /// It cannot be found out.
    #[error("failed to write to the cache folder")]
    Io(#[from] io::Error),
}

/// A file as it is on the disk.
pub(super) struct Stored {
    /// No two have the same, whatever their kind.
    pub(super) name: String,
    pub(super) kind: Kind,
    pub(super) bytes: u64,
    pub(super) last_used: SystemTime,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Blob,
    Glimpse,
    Partial,
    Prepared,
}

impl Partial {
    /// Where the file arrives.
    pub fn path(&self) -> PathBuf {
        self.cache.root.join(PARTIAL).join(&self.name)
    }

    /// Where its validator is kept.
    pub fn validator(&self) -> PathBuf {
        self.path().with_extension("validator")
    }

    /// Claims room for the whole file, and makes it. `beside` are the bytes of the same folder that are there already.
    pub fn make_room(&self, needed: u64, beside: u64) -> Result<(), NoRoom> {
        self.cache.fits_alone(needed, beside)?;
        let budget = self.cache.budget();
        let mut turn = self.cache.claims.turn()?;
        let mut claimed = turn.all()?;
        claimed.insert(self.name.clone(), needed);
        let stored = self.cache.stored();
        let used = charge(&stored, &claimed);
        let idle: Vec<Stored> = stored.into_iter().filter(|file| !claimed.contains_key(&file.name)).collect();
        let short = used.saturating_sub(budget);
        let can_be_freed: u64 = idle.iter().map(|file| file.bytes).sum();
        // What would not help is not removed.
        if can_be_freed < short || self.cache.remove(idle, short) < short {
            let used = used.saturating_sub(can_be_freed).saturating_sub(needed);
            return Err(NoRoom::Now { needed, budget, used });
        }
        turn.resize(&self.name, needed)?;
        Ok(())
    }

    /// Throws away what has arrived.
    pub fn discard(&self) {
        for path in [self.path(), self.validator()] {
            let _ = fs::remove_file(path);
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        self.cache.claims.give_up(&self.name);
    }
}

impl Cache {
    /// Takes a file on, to be fetched or continued; `None` while somebody else has it.
    pub fn take_on(self: &Arc<Self>, url: &str) -> io::Result<Option<Partial>> {
        fs::create_dir_all(self.root.join(PARTIAL))?;
        let name = name_of(url) + INCOMPLETE;
        let mut turn = self.claims.turn()?;
        if turn.all()?.contains_key(&name) {
            return Ok(None);
        }
        turn.claim(&name, 0)?;
        Ok(Some(Partial { cache: self.clone(), name }))
    }

    /// Whether the disk would hold a file if nothing else were there. `beside` are the bytes of the same folder that are.
    pub fn fits_alone(&self, needed: u64, beside: u64) -> Result<(), NoRoom> {
        let (needed, budget) = (needed.saturating_add(beside), self.budget());
        if needed > budget { Err(NoRoom::Alone { needed, budget }) } else { Ok(()) }
    }

    /// Bytes of all blobs, partial files, prepared files and glimpses.
    pub fn bytes(&self) -> u64 {
        self.stored().iter().map(|file| file.bytes).sum()
    }

    /// Removes so many bytes that nobody claims, if there are, whatever the budget says: the disk may be smaller.
    pub fn free(&self, bytes: u64) -> io::Result<u64> {
        let mut turn = self.claims.turn()?;
        let claimed = turn.all()?;
        let idle = self.stored().into_iter().filter(|file| !claimed.contains_key(&file.name)).collect();
        Ok(self.remove(idle, bytes))
    }

    /// Removes files until so many bytes are free, those first that were not used for longest. Tells how many are.
    pub(super) fn remove(&self, mut idle: Vec<Stored>, bytes: u64) -> u64 {
        idle.sort_by(|a, b| (a.last_used, &a.name).cmp(&(b.last_used, &b.name)));
        let mut freed = 0;
        for Stored { name, kind, bytes: size, .. } in idle {
            if freed >= bytes {
                break;
            }
            let (path, beside) = match kind {
                Kind::Partial => {
                    let path = self.root.join(PARTIAL).join(&name);
                    let validator = path.with_extension("validator");
                    (path, Some(validator))
                }
                Kind::Blob => (self.blob(&name), Some(self.root.join(USED).join(&name))),
                Kind::Glimpse => (self.root.join(GLIMPSES).join(&name), None),
                Kind::Prepared => (self.root.join(PREPARED).join(&name), None),
            };
            if fs::remove_file(path).is_ok() {
                let _ = beside.map(fs::remove_file);
                tracing::debug!(name, size, "removed from the disk");
                freed += size;
            }
        }
        freed
    }

    pub(super) fn stored(&self) -> Vec<Stored> {
        let mut stored = list(&self.root.join(PARTIAL), Kind::Partial);
        stored.retain(|file| file.name.ends_with(INCOMPLETE));
        stored.extend(list(&self.root.join(PREPARED), Kind::Prepared));
        stored.extend(list(&self.root.join(GLIMPSES), Kind::Glimpse));
        for mut blob in list(&self.root.join(BLOBS), Kind::Blob) {
            let used = fs::metadata(self.root.join(USED).join(&blob.name)).and_then(|m| m.modified());
            blob.last_used = used.map_or(blob.last_used, |used| used.max(blob.last_used));
            stored.push(blob);
        }
        stored
    }
}

fn list(folder: &Path, kind: Kind) -> Vec<Stored> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            let name = entry.file_name().into_string().ok()?;
            Some(Stored { name, kind, bytes: metadata.len(), last_used: metadata.modified().ok()? })
        })
        .collect()
}

/// Bytes that are taken, or promised where that is more.
pub(super) fn charge(stored: &[Stored], claimed: &BTreeMap<String, u64>) -> u64 {
    let mut promised = claimed.clone();
    let taken = stored.iter().map(|file| file.bytes.max(promised.remove(&file.name).unwrap_or(0)));
    let taken = taken.fold(0, u64::saturating_add);
    promised.values().fold(taken, |sum, bytes| sum.saturating_add(*bytes))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::{cache, put};
    use super::*;

    fn used_at(cache: &Cache, name: &str, seconds: u64) {
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        for path in [cache.blob(name), cache.root.join(USED).join(name), cache.root.join(PARTIAL).join(name)]
        {
            if let Ok(file) = fs::File::open(path) {
                file.set_modified(at).unwrap();
            }
        }
    }

    #[test]
    fn the_longest_unused_goes_first_and_what_is_claimed_never() {
        let root = tempfile::tempdir().unwrap();
        // Two processes that share a disk.
        let (one, other) = (cache(root.path(), 40), cache(root.path(), 40));
        let [a, b, c] = [1, 2, 3].map(|n| put(&one, &format!("https://h/{n}"), &[n; 10]));
        let left = one.take_on("https://h/left").unwrap().unwrap();
        fs::write(left.path(), [0; 10]).unwrap();
        let left_name = left.name.clone();
        drop(left);
        let draft = one.draft().unwrap();
        assert!(draft.link("a", &a).unwrap());
        for (name, at) in [(&a.sha256, 1), (&left_name, 2), (&c.sha256, 3), (&b.sha256, 4)] {
            used_at(&one, name, at);
        }
        let coming = other.take_on("https://h/coming").unwrap().unwrap();
        coming.make_room(20, 0).unwrap();
        assert!(!one.root.join(PARTIAL).join(&left_name).exists());
        assert_eq!(one.known("https://h/3"), None);
        assert_eq!(one.known("https://h/2"), Some(b.clone()));
        assert_eq!(fs::read(draft.path().join("a")).unwrap(), [1; 10]);
        let refused = coming.make_room(31, 0);
        assert!(matches!(refused, Err(NoRoom::Now { needed: 31, budget: 40, used: 10 })), "{refused:?}");
        assert_eq!(one.known("https://h/2"), Some(b), "what would not help stays");
        let refused = coming.make_room(31, 10);
        assert!(matches!(refused, Err(NoRoom::Alone { needed: 41, budget: 40 })), "{refused:?}");
        drop(draft);
        coming.make_room(40, 0).unwrap();
        assert_eq!(one.bytes(), 0);
    }

    #[test]
    fn downloads_at_the_same_time_do_not_exceed_the_budget_together() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (cache(root.path(), 100), cache(root.path(), 100));
        let [a, b, c] = [("a", &one), ("b", &one), ("c", &other)]
            .map(|(url, cache)| cache.take_on(url).unwrap().unwrap());
        a.make_room(60, 0).unwrap();
        assert!(matches!(b.make_room(50, 0), Err(NoRoom::Now { used: 60, .. })));
        assert!(matches!(c.make_room(50, 0), Err(NoRoom::Now { used: 60, .. })));
        // What arrives is not counted twice.
        fs::write(a.path(), [0; 30]).unwrap();
        b.make_room(40, 0).unwrap();
        assert!(matches!(c.make_room(1, 0), Err(NoRoom::Now { used: 100, .. })));
        drop(b);
        c.make_room(40, 0).unwrap();
        a.discard();
        drop(a);
        c.make_room(100, 0).unwrap();
    }

    #[test]
    fn a_file_on_its_way_has_one_writer() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (cache(root.path(), 100), cache(root.path(), 100));
        let first = one.take_on("https://h/a").unwrap().unwrap();
        assert!(one.take_on("https://h/a").unwrap().is_none());
        assert!(other.take_on("https://h/a").unwrap().is_none());
        assert!(other.take_on("https://h/b").unwrap().is_some());
        fs::write(first.path(), "half").unwrap();
        drop(first);
        let second = other.take_on("https://h/a").unwrap().unwrap();
        assert_eq!(fs::read(second.path()).unwrap(), b"half", "it goes on where the first was");
    }

    #[test]
    fn on_a_full_disk_goes_what_nobody_needs() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 1000);
        let a = put(&cache, "https://h/a", &[1; 10]);
        put(&cache, "https://h/b", &[2; 10]);
        let draft = cache.draft().unwrap();
        draft.link("a", &a).unwrap();
        assert_eq!(cache.free(5).unwrap(), 10);
        assert_eq!(cache.free(5).unwrap(), 0, "a is in use");
        assert_eq!(cache.bytes(), 10);
    }
}
