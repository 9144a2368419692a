//! What the processes that share a cache need of it: blobs that must stay, and room for what is on its way.
//!
//! Each process writes its claims into a file of its own, a line each, and holds a lock on that file for as long as it
//! lives; the claims of one that has ended are nobody's. Claims are made, and what nobody claims is removed, in a [`Turn`],
//! which is one more lock: so nothing is removed between being found and being claimed. Giving a claim up takes nothing
//! from anybody and needs no turn.
//!
//! Locks are what servers of shared volumes keep consistent. A folder's listing is not (NFS remembers it for a minute), so
//! the processes are listed in the file of the turn, and files are opened anew to be read and closed to be written. Where a
//! file system has no locks, every turn fails: nothing is fetched there, rather than something removed under another's
//! feet.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

use parking_lot::Mutex;
use uuid::Uuid;

/// The file whose lock is the turn.
const TURN: &str = "turn";
/// Lines that a file of claims may have beyond those that still mean something.
const SPARE_LINES: usize = 1024;

/// Claims of this process, and the way to those of others.
#[derive(Debug)]
pub(super) struct Claims {
    at: PathBuf,
    /// Has a folder for each process, which goes with it.
    folders: PathBuf,
    mine: Mutex<Option<Mine>>,
}

#[derive(Debug)]
struct Mine {
    process: String,
    /// Locked while this process lives.
    _alive: File,
    lines: usize,
    held: BTreeMap<String, Claim>,
}

#[derive(Clone, Copy, Debug)]
struct Claim {
    /// Room that it may take, if it takes less at the moment.
    bytes: u64,
    holders: usize,
}

/// The time in which no other process claims or removes anything.
pub(super) struct Turn<'a> {
    claims: &'a Claims,
    lock: File,
    processes: BTreeSet<String>,
}

impl Claims {
    pub(super) fn new(at: PathBuf, folders: PathBuf) -> Self {
        Self { at, folders, mine: Mutex::new(None) }
    }

    /// Waits for the turn. Others keep theirs short, but it may wait for a server: not for async threads.
    pub(super) fn turn(&self) -> io::Result<Turn<'_>> {
        fs::create_dir_all(&self.at)?;
        let path = self.at.join(TURN);
        let mut lock = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        lock.lock().map_err(|error| no_locks(&error))?;
        let mut listed = String::new();
        lock.read_to_string(&mut listed)?;
        // A line that is no name, or an empty one, must not become a path.
        let processes = listed.lines().filter(|line| Uuid::parse_str(line).is_ok()).map(str::to_owned);
        let mut turn = Turn { claims: self, lock, processes: processes.collect() };
        turn.enter()?;
        Ok(turn)
    }

    /// Gives a claim up. Without the file that says so it lasts until this process ends, which harms nobody.
    pub(super) fn give_up(&self, name: &str) {
        let mut mine = self.mine.lock();
        let Some(mine) = mine.as_mut() else { return };
        let Some(claim) = mine.held.get_mut(name) else { return };
        claim.holders -= 1;
        if claim.holders > 0 {
            return;
        }
        mine.held.remove(name);
        if let Err(error) = self.append(mine, &format!("- {name}\n")) {
            tracing::warn!(name, %error, "failed to write down that a file is not needed any more");
        }
    }

    /// The folder of this process, once it has had a turn.
    pub(super) fn own_folder(&self) -> Option<PathBuf> {
        self.mine.lock().as_ref().map(|mine| self.folders.join(&mine.process))
    }

    fn append(&self, mine: &mut Mine, line: &str) -> io::Result<()> {
        mine.lines += 1;
        File::options().append(true).open(self.at.join(&mine.process))?.write_all(line.as_bytes())
    }

    /// Writes the lines that still mean something, and no others. Only in a turn: nobody else reads then.
    fn rewrite(&self, mine: &mut Mine) -> io::Result<()> {
        let lines: Vec<String> =
            mine.held.iter().map(|(name, claim)| format!("+ {name} {}\n", claim.bytes)).collect();
        mine.lines = lines.len();
        fs::write(self.at.join(&mine.process), lines.concat())
    }
}

impl Turn<'_> {
    /// Has this process listed, so that others see what it claims.
    fn enter(&mut self) -> io::Result<()> {
        let mut mine = self.claims.mine.lock();
        let process = match mine.as_ref() {
            Some(mine) => mine.process.clone(),
            None => Uuid::new_v4().to_string(),
        };
        let path = self.claims.at.join(&process);
        // Somebody may have emptied the cache meanwhile, which is to be survived.
        if mine.is_none() || !path.exists() {
            // Without the lock that it had, which it would wait for.
            let held = mine.take().map(|mine| mine.held).unwrap_or_default();
            let alive = File::options().append(true).create(true).open(path)?;
            alive.lock().map_err(|error| no_locks(&error))?;
            let mine = mine.insert(Mine { process: process.clone(), _alive: alive, lines: 0, held });
            self.claims.rewrite(mine)?;
        }
        if self.processes.insert(process.clone()) {
            self.lock.seek(SeekFrom::End(0))?;
            // The line before may have been cut short.
            self.lock.write_all(format!("\n{process}\n").as_bytes())?;
        }
        Ok(())
    }

    /// Claims a file; as often as it is claimed, it is to be given up.
    pub(super) fn claim(&self, name: &str, bytes: u64) -> io::Result<()> {
        self.write(name, bytes, 1)
    }

    /// Changes the room of a claim.
    pub(super) fn resize(&self, name: &str, bytes: u64) -> io::Result<()> {
        self.write(name, bytes, 0)
    }

    fn write(&self, name: &str, bytes: u64, holders: usize) -> io::Result<()> {
        let mut mine = self.claims.mine.lock();
        let mine = mine.as_mut().expect("whoever has a turn has entered");
        let known = mine.held.get(name).copied();
        let claim = Claim { bytes, holders: known.map_or(0, |claim| claim.holders) + holders };
        mine.held.insert(name.to_owned(), claim);
        if known.is_some_and(|known| known.bytes == bytes) {
            return Ok(());
        }
        let written = match mine.lines > mine.held.len() + SPARE_LINES {
            true => self.claims.rewrite(mine),
            false => self.claims.append(mine, &format!("+ {name} {bytes}\n")),
        };
        // What others cannot read is not claimed.
        if written.is_err() {
            match known {
                Some(known) => mine.held.insert(name.to_owned(), known),
                None => mine.held.remove(name),
            };
        }
        written
    }

    /// What is claimed, by this process or another. Forgets those that have ended.
    pub(super) fn all(&mut self) -> io::Result<BTreeMap<String, u64>> {
        let mut all = BTreeMap::new();
        let own = self.claims.mine.lock().as_ref().map(|mine| {
            all.extend(mine.held.iter().map(|(name, claim)| (name.clone(), claim.bytes)));
            mine.process.clone()
        });
        let mut ended = Vec::new();
        for process in self.processes.iter().filter(|process| Some(*process) != own.as_ref()) {
            // Servers of volumes want a file open for writing that is to be locked.
            let mut log = match File::options().read(true).write(true).open(self.claims.at.join(process)) {
                Ok(log) => log,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    ended.push(process.clone());
                    continue;
                }
                Err(error) => return Err(error),
            };
            match log.try_lock() {
                Ok(()) => ended.push(process.clone()),
                Err(TryLockError::WouldBlock) => {
                    let mut text = String::new();
                    log.read_to_string(&mut text)?;
                    for (name, bytes) in read(&text) {
                        let most: &mut u64 = all.entry(name.to_owned()).or_default();
                        *most = bytes.max(*most);
                    }
                }
                Err(TryLockError::Error(error)) => return Err(no_locks(&error)),
            }
        }
        self.forget(&ended)?;
        Ok(all)
    }

    fn forget(&mut self, ended: &[String]) -> io::Result<()> {
        if ended.is_empty() {
            return Ok(());
        }
        for process in ended {
            self.processes.remove(process);
            let _ = fs::remove_file(self.claims.at.join(process));
            let _ = fs::remove_dir_all(self.claims.folders.join(process));
        }
        let lines: Vec<String> = self.processes.iter().map(|process| format!("{process}\n")).collect();
        let text = lines.concat();
        // Shortened last: who is cut off here finds itself missing at its next turn, not everybody.
        self.lock.seek(SeekFrom::Start(0))?;
        self.lock.write_all(text.as_bytes())?;
        self.lock.set_len(text.len() as u64)
    }
}

/// The claims that lines add up to.
fn read(text: &str) -> BTreeMap<&str, u64> {
    let mut held = BTreeMap::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        match words.as_slice() {
            ["+", name, bytes] => {
                held.insert(*name, bytes.parse().unwrap_or(0));
            }
            ["-", name] => {
                held.remove(name);
            }
            _ => {}
        }
    }
    held
}

fn no_locks(error: &io::Error) -> io::Error {
    let what = "its file system cannot lock files, so nobody knows which other process uses it; put the cache on one that can";
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(root: &std::path::Path) -> Claims {
        Claims::new(root.join("claims"), root.join("folders"))
    }

    fn all(claims: &Claims) -> Vec<(String, u64)> {
        claims.turn().unwrap().all().unwrap().into_iter().collect()
    }

    #[test]
    fn claims_are_seen_by_all_until_they_are_given_up_or_their_process_ends() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (process(root.path()), process(root.path()));
        {
            let turn = one.turn().unwrap();
            turn.claim("a", 0).unwrap();
            turn.claim("a", 0).unwrap();
            turn.claim("b", 5).unwrap();
            turn.resize("b", 9).unwrap();
        }
        other.turn().unwrap().claim("b", 7).unwrap();
        let expected = [("a".to_owned(), 0), ("b".to_owned(), 9)];
        assert_eq!(all(&one), expected);
        assert_eq!(all(&other), expected);
        one.give_up("a");
        assert_eq!(all(&other), expected, "claimed twice");
        one.give_up("a");
        one.give_up("b");
        assert_eq!(all(&other), [("b".to_owned(), 7)]);
        let folder = other.own_folder().unwrap();
        fs::create_dir_all(&folder).unwrap();
        drop(other);
        assert!(all(&one).is_empty());
        assert!(!folder.exists(), "it goes with its process");
        assert_eq!(fs::read_dir(root.path().join("claims")).unwrap().count(), 2, "the turn and one process");
    }

    #[test]
    fn a_list_of_processes_that_was_lost_is_made_again_by_those_that_live() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (process(root.path()), process(root.path()));
        one.turn().unwrap().claim("a", 1).unwrap();
        fs::write(root.path().join("claims").join(TURN), "\n..\nhalf a na").unwrap();
        drop(one.turn().unwrap());
        assert_eq!(all(&other), [("a".to_owned(), 1)]);
    }

    #[test]
    fn a_cache_that_somebody_emptied_goes_on() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (process(root.path()), process(root.path()));
        one.turn().unwrap().claim("a", 1).unwrap();
        drop(other.turn().unwrap());
        fs::remove_dir_all(root.path().join("claims")).unwrap();
        one.give_up("none");
        one.turn().unwrap().claim("b", 2).unwrap();
        assert_eq!(all(&other), [("a".to_owned(), 1), ("b".to_owned(), 2)]);
    }

    #[test]
    fn a_file_of_claims_stays_as_short_as_what_is_claimed() {
        let root = tempfile::tempdir().unwrap();
        let (one, other) = (process(root.path()), process(root.path()));
        one.turn().unwrap().claim("kept", 3).unwrap();
        for _ in 0..SPARE_LINES {
            one.turn().unwrap().claim("passing", 1).unwrap();
            one.give_up("passing");
        }
        let file = root.path().join("claims").join(one.own_folder().unwrap().file_name().unwrap());
        assert!(fs::read_to_string(file).unwrap().lines().count() <= SPARE_LINES + 8);
        assert_eq!(all(&other), [("kept".to_owned(), 3)]);
    }
}
