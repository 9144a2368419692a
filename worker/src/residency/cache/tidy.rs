//! What was written down of files for which nobody asks any more.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::{Cache, LISTINGS, URLS, USED, UrlRecord};

/// Nobody asked for so long.
const FORGOTTEN: Duration = Duration::from_secs(90 * 24 * 60 * 60);

impl Cache {
    /// Removes old notes of files that are not here. They are small, but would only become more: what leaves when room is needed
    /// are files. Tells how many went.
    pub fn tidy(&self, now: SystemTime) -> io::Result<usize> {
        let is_here = |sha256: &str| self.blob(sha256).exists();
        let names_what_is_here = |note: &Path| {
            let record = fs::read(note).ok().and_then(|text| serde_json::from_slice::<UrlRecord>(&text).ok());
            record.is_some_and(|record| is_here(&record.sha256))
        };
        let is_used = |mark: &Path| mark.file_name().and_then(|name| name.to_str()).is_some_and(is_here);
        // Whoever fetches a file writes its note after it, so what is removed here is old.
        let _turn = self.claims.turn()?;
        let mut removed = 0;
        for (folder, stays) in
            [(URLS, &names_what_is_here as &dyn Fn(&Path) -> bool), (USED, &is_used), (LISTINGS, &|_| false)]
        {
            let Ok(notes) = fs::read_dir(self.root.join(folder)) else { continue };
            for note in notes.flatten() {
                let changed = note.metadata().and_then(|metadata| metadata.modified());
                let is_old = changed.is_ok_and(|at| now.duration_since(at).is_ok_and(|age| age > FORGOTTEN));
                if is_old && !stays(&note.path()) && fs::remove_file(note.path()).is_ok() {
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::tests::{cache, put};
    use super::*;
    use crate::residency::token::Token;

    #[test]
    fn old_notes_of_what_is_not_here_go_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 100);
        let [gone, here] = [1, 2].map(|n| put(&cache, &format!("https://h/{n}"), &[n; 10]));
        let draft = cache.draft().unwrap();
        for (name, record) in [("1", &gone), ("2", &here)] {
            assert!(draft.link(name, record).unwrap());
        }
        fs::remove_file(cache.blob(&gone.sha256)).unwrap();
        let (token, names) = (Token::of_secret("a", "1"), BTreeSet::from(["x".to_owned()]));
        cache.note_listing("hf://a/b@1", &names, &token).unwrap();

        let now = SystemTime::now();
        assert_eq!(cache.tidy(now).unwrap(), 0, "nothing is old");
        let later = now + FORGOTTEN + Duration::from_secs(60);
        assert_eq!(cache.tidy(later).unwrap(), 3, "a record, a mark and a listing");
        assert_eq!(cache.known("https://h/2"), Some(here));
        assert_eq!(cache.listing("hf://a/b@1", &token), None);
        assert_eq!(cache.tidy(later).unwrap(), 0);
    }

    #[test]
    fn a_listing_that_is_asked_for_again_is_young_again() {
        let root = tempfile::tempdir().unwrap();
        let cache = cache(root.path(), 100);
        let (token, names) = (Token::of_secret("a", "1"), BTreeSet::from(["x".to_owned()]));
        cache.note_listing("hf://a/b@1", &names, &token).unwrap();
        let note = fs::read_dir(cache.root.join(LISTINGS)).unwrap().next().unwrap().unwrap().path();
        fs::File::open(&note).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        cache.note_listing("hf://a/b@1", &names, &token).unwrap();
        assert_eq!(cache.tidy(SystemTime::now()).unwrap(), 0);
    }
}
