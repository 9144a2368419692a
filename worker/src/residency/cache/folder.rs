//! Sources as ordinary folders: a link per file, to blobs that stay for as long as the folder does.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::{Cache, Glimpse, USED, UrlRecord, name_of};

/// A folder that is being filled. What is in it is not removed to make room for what is still to come.
#[derive(Debug)]
pub struct Draft {
    cache: Arc<Cache>,
    path: PathBuf,
    files: Mutex<BTreeMap<String, UrlRecord>>,
    sketches: Mutex<BTreeMap<String, Option<String>>>,
}

impl Cache {
    /// Begins a folder.
    pub fn draft(self: &Arc<Self>) -> io::Result<Draft> {
        drop(self.claims.turn()?);
        let own = self.claims.own_folder().expect("it had a turn");
        let path = own.join(format!(".{}", uuid::Uuid::new_v4()));
        fs::create_dir_all(&path)?;
        Ok(Draft { cache: self.clone(), path, files: Mutex::default(), sketches: Mutex::default() })
    }

    /// Whether a folder is one of the cache's.
    pub fn holds(&self, folder: &Path) -> bool {
        let state = self.state.lock();
        folder.file_name().and_then(|n| n.to_str()).is_some_and(|id| state.folders.contains_key(id))
    }

    /// Forgets all folders but these.
    pub fn retain(&self, folders: &BTreeSet<PathBuf>) {
        let Some(own) = self.claims.own_folder() else { return };
        let kept: BTreeSet<&str> = folders.iter().filter_map(|f| f.file_name()?.to_str()).collect();
        let mut state = self.state.lock();
        let all = std::mem::take(&mut state.folders);
        let (stay, leave): (BTreeMap<_, _>, BTreeMap<_, _>) =
            all.into_iter().partition(|(id, _)| kept.contains(id.as_str()));
        state.folders = stay;
        // Under the lock they only leave their names, so that none is removed that was just made under one of them.
        let aside: Vec<_> = leave.into_iter().map(|(id, blobs)| (set_aside(&own, &id), blobs)).collect();
        drop(state);
        for (path, blobs) in aside {
            let _ = fs::remove_dir_all(path);
            self.give_up(&blobs);
        }
    }

    /// Forgets one: its files may leave the disk when somebody needs the room.
    pub fn forget(&self, folder: &Path) {
        let Some(own) = self.claims.own_folder() else { return };
        let Some(id) = folder.file_name().and_then(|name| name.to_str()) else { return };
        let mut state = self.state.lock();
        let Some(blobs) = state.folders.remove(id) else { return };
        let path = set_aside(&own, id);
        drop(state);
        let _ = fs::remove_dir_all(path);
        self.give_up(&blobs);
    }

    fn give_up(&self, blobs: &[String]) {
        for blob in blobs {
            self.claims.give_up(blob);
        }
    }
}

/// Takes a folder's name from it, and gives where it is then.
fn set_aside(own: &Path, id: &str) -> PathBuf {
    let aside = own.join(format!(".{}", uuid::Uuid::new_v4()));
    let _ = fs::rename(own.join(id), &aside);
    aside
}

impl Draft {
    /// Where it is filled.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes of its files.
    pub fn bytes(&self) -> u64 {
        self.files.lock().values().map(|record| record.size).sum()
    }

    /// Adds a file; false when its blob was removed meanwhile. Names are those of files, without folders.
    pub fn link(&self, name: &str, record: &UrlRecord) -> io::Result<bool> {
        let blob = self.cache.blob(&record.sha256);
        let turn = self.cache.claims.turn()?;
        // Opened, since a server of shared volumes is asked then; what it said of the name before may be old.
        let there = fs::File::open(&blob).and_then(|file| file.metadata());
        if !there.is_ok_and(|metadata| metadata.len() == record.size) {
            return Ok(false);
        }
        let mut files = self.files.lock();
        if files.contains_key(name) {
            return Ok(true);
        }
        std::os::unix::fs::symlink(fs::canonicalize(&blob)?, self.path.join(name))?;
        turn.claim(&record.sha256, 0)?;
        drop(turn);
        files.insert(name.to_owned(), record.clone());
        self.cache.note_use(&record.sha256);
        Ok(true)
    }

    /// Adds a file of which there is only a glimpse. A folder with one is looked at and left, never finished.
    pub fn sketch(&self, name: &str, glimpse: &Glimpse) -> io::Result<()> {
        glimpse.sketch(&self.path.join(name))?;
        self.sketches.lock().insert(name.to_owned(), glimpse.sha256.clone());
        Ok(())
    }

    /// Files of which there is only a glimpse, and their SHA-256, hex, where that is known.
    pub fn sketches(&self) -> BTreeMap<String, Option<String>> {
        self.sketches.lock().clone()
    }

    /// Makes it the folder of a source, until [`Cache::retain`] drops that. The same files have the same folder.
    pub fn finish(&self, source: &str) -> io::Result<PathBuf> {
        let files = std::mem::take(&mut *self.files.lock());
        let blobs: Vec<String> = files.values().map(|record| record.sha256.clone()).collect();
        let mut content = format!("{source}\n");
        for (name, record) in &files {
            content += &format!("{}  {name}\n", record.sha256);
        }
        let id = name_of(&content);
        let path = self.path.with_file_name(&id);
        let mut state = self.cache.state.lock();
        if state.folders.contains_key(&id) && path.is_dir() {
            drop(state);
            self.cache.give_up(&blobs);
            return Ok(path);
        }
        match fs::rename(&self.path, &path) {
            Ok(()) => {
                let lost = state.folders.insert(id, blobs);
                drop(state);
                self.cache.give_up(&lost.unwrap_or_default());
                Ok(path)
            }
            Err(error) => {
                drop(state);
                self.cache.give_up(&blobs);
                Err(error)
            }
        }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Nothing is left of one that was finished.
        let _ = fs::remove_dir_all(&self.path);
        let blobs: Vec<String> = self.files.get_mut().values().map(|record| record.sha256.clone()).collect();
        self.cache.give_up(&blobs);
    }
}

impl Cache {
    /// Remembers that a blob is used now. Not in its own times: a file whose times change is hashed again.
    fn note_use(&self, sha256: &str) {
        let at = self.root.join(USED);
        let noted = fs::create_dir_all(&at).and_then(|()| {
            let file = fs::File::options().write(true).create(true).truncate(false).open(at.join(sha256))?;
            file.set_modified(SystemTime::now())
        });
        if let Err(error) = noted {
            tracing::debug!(sha256, %error, "failed to note the use of a file");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Readers;
    use super::super::tests::{cache, put};
    use super::*;
    use crate::residency::files::FileIdentity;

    #[test]
    fn a_folder_is_that_of_its_files_and_leaves_when_nothing_needs_it() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 100);
        let [a, b] = [1, 2].map(|n| put(&cache, &format!("https://h/{n}"), &[n; 10]));
        let identity = FileIdentity::at(&cache.blob(&a.sha256)).unwrap();
        let fill = |files: &[(&str, &UrlRecord)]| {
            let draft = cache.draft().unwrap();
            for (name, record) in files {
                assert!(draft.link(name, record).unwrap());
            }
            draft.finish("https://h").unwrap()
        };
        let both = fill(&[("a", &a), ("b", &b)]);
        assert_eq!(fill(&[("b", &b), ("a", &a)]), both);
        let other = fill(&[("a", &a)]);
        assert_ne!(other, both);
        assert_eq!(fs::read(both.join("b")).unwrap(), [2; 10]);
        assert!(cache.holds(&both) && cache.holds(&other));
        assert_eq!(FileIdentity::at(&both.join("a")).unwrap(), identity, "being used does not change a file");
        cache.retain(&BTreeSet::from([other.clone()]));
        assert!(!both.exists() && !cache.holds(&both) && other.join("a").exists());
        assert_eq!(cache.free(100).unwrap(), 10, "b is needed no more");
        cache.forget(&other);
        assert!(!other.exists() && !cache.holds(&other));
        cache.forget(&other);
        assert_eq!(cache.free(100).unwrap(), 10);
    }

    #[test]
    fn what_is_only_looked_at_is_left_with_nothing() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 100);
        let a = put(&cache, "https://h/a", &[1; 10]);
        let glimpse = Glimpse {
            url: "https://h/b".into(),
            sha256: None,
            size: 1 << 30,
            validator: None,
            readers: Readers::default(),
            head: vec![0; 8],
        };
        let draft = cache.draft().unwrap();
        assert!(draft.link("a", &a).unwrap());
        draft.sketch("b", &glimpse).unwrap();
        assert_eq!(draft.sketches(), BTreeMap::from([("b".to_owned(), None)]));
        assert_eq!((draft.bytes(), cache.bytes()), (10, 10));
        assert_eq!(cache.free(1).unwrap(), 0, "what is beside it is needed");
        let path = draft.path().to_owned();
        drop(draft);
        assert!(!path.exists());
        assert_eq!(cache.free(1).unwrap(), 10);
    }

    #[test]
    fn a_file_that_was_removed_before_it_was_linked_is_missed() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (cache(root.path(), 100), cache(root.path(), 100));
        let a = put(&one, "https://h/a", &[1; 10]);
        let draft = one.draft().unwrap();
        assert_eq!(other.free(1).unwrap(), 10);
        assert!(!draft.link("a", &a).unwrap());
        put(&other, "https://h/a", &[1; 10]);
        assert!(draft.link("a", &a).unwrap());
        assert_eq!(other.free(1).unwrap(), 0, "the other process needs it");
    }

    #[test]
    fn one_process_does_not_take_the_folders_of_another() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (cache(root.path(), 100), cache(root.path(), 100));
        let a = put(&one, "https://h/a", &[1; 10]);
        let [ours, theirs] = [&one, &other].map(|cache| {
            let draft = cache.draft().unwrap();
            assert!(draft.link("a", &a).unwrap());
            draft.finish("https://h").unwrap()
        });
        one.retain(&BTreeSet::new());
        assert!(!ours.exists() && theirs.join("a").exists());
        assert_eq!(one.free(1).unwrap(), 0);
        drop(other);
        assert_eq!(one.free(1).unwrap(), 10, "what has ended needs nothing");
        assert!(!theirs.exists());
    }
}
