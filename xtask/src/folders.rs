//! Where things are: the repository, the user's cache, and the folder cargo builds into.

use std::fs::File;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

/// The folder of [`loom_target`] in [`cargo_target`], which a clone owns as a whole.
const LOOM: &str = "loom";

/// The root of this repository.
pub fn repository() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("xtask lies in the repository's root").to_path_buf()
}

/// Turret's folder in the user's cache: `$XDG_CACHE_HOME/turret` or `~/.cache/turret`.
pub fn cache() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    cache_of(variable("XDG_CACHE_HOME"), variable("HOME")).context(
        "neither XDG_CACHE_HOME nor HOME is an absolute path, so there is no cache folder: set one of them",
    )
}

fn cache_of(xdg: Option<PathBuf>, home: Option<PathBuf>) -> Option<PathBuf> {
    // The XDG specification tells to ignore a relative path.
    let base = xdg
        .filter(|path| path.is_absolute())
        .or_else(|| home.filter(|path| path.is_absolute()).map(|home| home.join(".cache")))?;
    Some(base.join("turret"))
}

/// This program's own file, to be run again.
///
/// Building the workspace replaces the file of an xtask that runs from the folder cargo builds into;
/// Linux then calls the old one deleted, and the new one in its place is the same program.
pub fn this_program() -> Result<PathBuf> {
    let found = std::env::current_exe().context("failed to find this program's own file")?;
    let path =
        found.to_str().and_then(|path| path.strip_suffix(" (deleted)")).map_or(found.clone(), PathBuf::from);
    ensure!(path.exists(), "this program's own file {} is gone; run the command again", path.display());
    Ok(path)
}

/// Where the product is built: `$CARGO_TARGET_DIR` when set, else in the user's cache, so
/// that a fresh clone finds what an earlier one compiled.
pub fn cargo_target() -> Result<PathBuf> {
    match std::env::var_os("CARGO_TARGET_DIR").filter(|value| !value.is_empty()) {
        Some(folder) => std::path::absolute(folder).context("CARGO_TARGET_DIR is no usable path"),
        None => Ok(cache()?.join("target")),
    }
}

/// Where what has loom's types in place of the real ones is built, so that cargo keeps both.
pub fn loom_target() -> Result<PathBuf> {
    Ok(cargo_target()?.join(LOOM))
}

/// `cargo`, in the repository and with [`cargo_target`], for building and running the product.
pub fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let target = cargo_target()?;
    claim(&target).with_context(|| format!("failed to prepare {}", target.display()))?;
    command.current_dir(repository()).env("CARGO_TARGET_DIR", target);
    // `cargo xtask` runs inside of cargo, which describes xtask in these variables. Build scripts watch
    // them (ring's does), so everything above ring would be compiled again whenever somebody calls
    // cargo directly and then xtask.
    let about_xtask = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(about_xtask) {
            command.env_remove(name);
        }
    }
    Ok(command)
}

/// Makes this clone the owner of the shared target folder, until this process ends.
///
/// Cargo names what it builds of a workspace's own crates without the workspace's path and trusts
/// modification times, so it would take another clone's newer programs for this one's. When
/// the folder was last used by another clone, what is known of our own crates is forgotten; the
/// dependencies, nearly all of the work, stay. Commands of one clone share the folder; another clone waits
/// until they have ended, since it replaces the programs that they build and run.
fn claim(target: &Path) -> std::io::Result<()> {
    static HELD: Mutex<Option<File>> = Mutex::new(None);
    let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
    if held.is_none() {
        std::fs::create_dir_all(target)?;
        *held = Some(share(target, repository().as_os_str().as_encoded_bytes())?);
    }
    Ok(())
}

/// A shared lock on the folder's owner file, which names `clone`.
fn share(target: &Path, clone: &[u8]) -> std::io::Result<File> {
    let path = target.join("turret-clone");
    // The lock is on this file, so it is written in place and never replaced.
    let owner = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
    loop {
        // Another clone may take the folder between the two locks; then the turn begins again.
        owner.lock_shared()?;
        if std::fs::read(&path)? == clone {
            return Ok(owner);
        }
        owner.unlock()?;
        if owner.try_lock().is_err() {
            let other = std::fs::read(&path)?;
            crate::stage::say(format!(
                "waiting for a command of the clone {}, which builds into {} too (set CARGO_TARGET_DIR for another folder)",
                String::from_utf8_lossy(&other),
                target.display()
            ));
            owner.lock()?;
        }
        forget_our_crates(target)?;
        owner.set_len(0)?;
        (&owner).seek(SeekFrom::Start(0))?;
        (&owner).write_all(clone)?;
        owner.unlock()?;
    }
}

fn forget_our_crates(target: &Path) -> std::io::Result<()> {
    for built in [target.join("debug"), target.join(LOOM).join("release")] {
        let fingerprints = built.join(".fingerprint");
        if !fingerprints.is_dir() {
            continue;
        }
        for entry in std::fs::read_dir(&fingerprints)? {
            let entry = entry?;
            let name = entry.file_name();
            let ours = name.to_str().is_some_and(|n| n.starts_with("turret-") || n.starts_with("xtask-"));
            if ours {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_waits_for_another_one_s_commands_and_then_forgets_what_it_built() {
        let folder = tempfile::tempdir().unwrap();
        let builds = ["debug", "loom/release"].map(|build| folder.path().join(build).join(".fingerprint"));
        let known = |name: &str| builds.each_ref().map(|build| build.join(name).is_dir());
        let first = [share(folder.path(), b"/one").unwrap(), share(folder.path(), b"/one").unwrap()];
        for name in ["turret-worker-1", "xtask-2", "serde-3"] {
            for build in &builds {
                std::fs::create_dir_all(build.join(name)).unwrap();
            }
        }

        let (path, (sender, receiver)) = (folder.path().to_owned(), std::sync::mpsc::channel());
        let second = std::thread::spawn(move || {
            let held = share(&path, b"/two").unwrap();
            sender.send(()).unwrap();
            held
        });
        let [one, other] = first;
        drop(one);
        let patience = std::time::Duration::from_millis(50);
        assert!(receiver.recv_timeout(patience).is_err(), "one command of the first clone still runs");
        assert_eq!(known("turret-worker-1"), [true; 2]);
        drop(other);
        let held = second.join().unwrap();
        assert_eq!(["turret-worker-1", "xtask-2", "serde-3"].map(known), [[false; 2], [false; 2], [true; 2]]);
        assert_eq!(std::fs::read(folder.path().join("turret-clone")).unwrap(), b"/two");
        drop(held);
    }

    #[test]
    fn the_cache_follows_xdg_and_falls_back_to_home() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(cache_of(path("/x"), path("/h")), path("/x/turret"));
        assert_eq!(cache_of(path("relative"), path("/h")), path("/h/.cache/turret"));
        assert_eq!(cache_of(None, path("/h")), path("/h/.cache/turret"));
        assert_eq!(cache_of(None, None), None);
    }
}
