//! Places of prepared files. They are never claimed once they are written: whatever needs the room may have it, since they can be
//! made again.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::room::{Kind, Stored, charge};
use super::{Cache, PREPARED};

/// How names end of files that are being written.
const NEW: &str = ".new";
/// How names end of those that are whole.
const WHOLE: &str = ".prepared";
/// A prepared file that nobody has read for so long may leave for another one. Less, and a budget that does not hold all
/// that are in turn would have them written again and again.
const STALE: Duration = Duration::from_secs(3600);

/// Where a prepared file is being written, by this process alone, and with room for all of it.
#[derive(Debug)]
pub struct Place {
    cache: Arc<Cache>,
    /// Of the file while it is written.
    name: String,
    whole: PathBuf,
}

impl Place {
    /// Where to write.
    pub fn path(&self) -> PathBuf {
        self.cache.root.join(PREPARED).join(&self.name)
    }

    /// Takes the file that was written.
    pub fn keep(self) -> io::Result<()> {
        fs::rename(self.path(), &self.whole)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Nothing is there of one that was kept.
        let _ = fs::remove_file(self.path());
        self.cache.claims.give_up(&self.name);
    }
}

impl Cache {
    /// Where a prepared file is.
    pub fn prepared(&self, name: &str) -> PathBuf {
        self.root.join(PREPARED).join(format!("{name}{WHOLE}"))
    }

    /// Bytes of all prepared files.
    pub fn prepared_bytes(&self) -> u64 {
        self.stored().iter().filter(|file| file.kind == Kind::Prepared).map(|file| file.bytes).sum()
    }

    /// A place to write a prepared file of so many bytes. `None` when it is there or being written, or when there is no room:
    /// what leaves for it is what nobody claims, and of prepared files those that nobody has read for an hour.
    pub fn place_for_prepared(self: &Arc<Self>, name: &str, bytes: u64) -> io::Result<Option<Place>> {
        fs::create_dir_all(self.root.join(PREPARED))?;
        let (whole, name) = (self.prepared(name), format!("{name}{WHOLE}{NEW}"));
        let mut turn = self.claims.turn()?;
        let mut claimed = turn.all()?;
        if whole.exists() || claimed.insert(name.clone(), bytes).is_some() {
            return Ok(None);
        }
        let stored = self.stored();
        let short = charge(&stored, &claimed).saturating_sub(self.budget());
        let now = SystemTime::now();
        let is_stale = |file: &Stored| now.duration_since(file.last_used).is_ok_and(|unused| unused >= STALE);
        let idle: Vec<Stored> =
            stored.into_iter().filter(|file| !claimed.contains_key(&file.name) && is_stale(file)).collect();
        let can_be_freed: u64 = idle.iter().map(|file| file.bytes).sum();
        if can_be_freed < short || self.remove(idle, short) < short {
            return Ok(None);
        }
        turn.claim(&name, bytes)?;
        drop(turn);
        Ok(Some(Place { cache: self.clone(), name, whole }))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{cache, put};
    use super::*;

    fn write(cache: &Arc<Cache>, name: &str, bytes: usize) {
        let place = cache.place_for_prepared(name, bytes as u64).unwrap().unwrap();
        fs::write(place.path(), vec![1; bytes]).unwrap();
        place.keep().unwrap();
    }

    fn read_at(cache: &Cache, name: &str, ago: Duration) {
        let file = fs::File::open(cache.prepared(name)).unwrap();
        file.set_modified(SystemTime::now() - ago).unwrap();
    }

    #[test]
    fn a_prepared_file_takes_no_room_from_what_is_read() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 100);
        write(&cache, "a", 40);
        write(&cache, "b", 40);
        assert!(cache.place_for_prepared("a", 40).unwrap().is_none(), "it is there");
        assert!(cache.place_for_prepared("c", 40).unwrap().is_none(), "no room");
        read_at(&cache, "a", 2 * STALE);
        read_at(&cache, "b", STALE / 2);
        write(&cache, "c", 40);
        assert!(!cache.prepared("a").exists() && cache.prepared("b").exists());
        assert_eq!(cache.bytes(), 80);
        // What is fetched may have all of it.
        let coming = cache.take_on("https://h/coming").unwrap().unwrap();
        coming.make_room(100, 0).unwrap();
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn a_place_is_one_writers_and_what_is_given_up_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (cache(root.path(), 100), cache(root.path(), 100));
        let place = one.place_for_prepared("a", 60).unwrap().unwrap();
        fs::write(place.path(), [1; 30]).unwrap();
        assert!(other.place_for_prepared("a", 60).unwrap().is_none());
        assert!(other.place_for_prepared("b", 50).unwrap().is_none(), "promised to the first");
        assert_eq!(other.free(100).unwrap(), 0, "it is being written");
        drop(place);
        assert_eq!(one.bytes(), 0);
        assert!(!one.prepared("a").exists());
        write(&other, "a", 60);
        assert!(one.prepared("a").exists());
    }

    #[test]
    fn what_a_process_left_half_written_makes_room() {
        let root = tempfile::tempdir().unwrap();
        let (ended, other) = (cache(root.path(), 100), cache(root.path(), 100));
        let place = ended.place_for_prepared("a", 60).unwrap().unwrap();
        fs::write(place.path(), [1; 60]).unwrap();
        // As when it is killed: nothing is given back.
        let half = place.path();
        let claims = place.cache.claims.own_folder().unwrap();
        std::mem::forget(place);
        drop(ended);
        assert!(half.exists());
        let own = claims.file_name().unwrap();
        fs::remove_file(other.root.join("claims").join(own)).unwrap();
        put(&other, "https://h/b", &[2; 10]);
        assert_eq!(other.free(100).unwrap(), 70);
        assert!(!half.exists());
    }
}
