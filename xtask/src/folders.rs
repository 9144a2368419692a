//! Where things are: the repository, the user's cache, and the folder cargo builds into.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

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

/// Makes this clone the owner of the shared target folder.
///
/// Cargo names what it builds of a workspace's own crates without the workspace's path and trusts
/// modification times, so it would take another clone's newer programs for this one's. When
/// the folder was last used by another clone, what is known of our own crates is forgotten; the
/// dependencies, nearly all of the work, stay.
fn claim(target: &Path) -> std::io::Result<()> {
    let owner = target.join("turret-clone");
    let this = repository().into_os_string().into_encoded_bytes();
    if std::fs::read(&owner).is_ok_and(|last| last == this) {
        return Ok(());
    }
    std::fs::create_dir_all(target)?;
    let fingerprints = target.join("debug/.fingerprint");
    if fingerprints.is_dir() {
        for entry in std::fs::read_dir(&fingerprints)? {
            let entry = entry?;
            let name = entry.file_name();
            let ours = name.to_str().is_some_and(|n| n.starts_with("turret-") || n.starts_with("xtask-"));
            if ours {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
    }
    std::fs::write(owner, this)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_follows_xdg_and_falls_back_to_home() {
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(cache_of(path("/x"), path("/h")), path("/x/turret"));
        assert_eq!(cache_of(path("relative"), path("/h")), path("/h/.cache/turret"));
        assert_eq!(cache_of(None, path("/h")), path("/h/.cache/turret"));
        assert_eq!(cache_of(None, None), None);
    }
}
