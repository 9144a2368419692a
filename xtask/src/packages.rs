//! What this machine must have: programs and libraries, and the Debian packages that bring them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::privilege::{self, Privilege};
use crate::stage;

/// How to see that something is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Proof {
    /// A program on the `PATH` or in one of the system's folders.
    Program(&'static str),
    /// A library that `pkg-config` knows.
    Library(&'static str),
    /// A file that exists.
    File(&'static str),
}

/// One thing that a step needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// How to see that it is there.
    pub proof: Proof,
    /// The package of Debian and Ubuntu that brings it.
    pub package: &'static str,
    /// What it is needed for.
    pub purpose: &'static str,
}

/// Why a machine cannot be made ready.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// Something is missing and cannot be installed from here.
    #[error("this machine lacks:\n{list}\n{remedy}")]
    Missing {
        /// One line for each missing thing.
        list: String,
        /// What to do about it.
        remedy: String,
    },
    /// The package manager failed.
    #[error("`{command}` failed ({status}):\n{output}")]
    Install {
        /// What was run.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it printed.
        output: String,
    },
    /// The package manager could not be started.
    #[error("failed to start `{command}`")]
    Start {
        /// What was to be run.
        command: String,
        /// Why it did not start.
        source: std::io::Error,
    },
}

/// Finds a program on the `PATH` and in the folders for administrators, which an ordinary
/// user's `PATH` often lacks.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(system)
        .map(|folder| folder.join(name))
        .find(|candidate| candidate.is_file())
}

/// Makes sure of all `needs`: installs Debian packages where root or sudo allows it, and
/// otherwise says exactly what is missing and how to get it.
pub fn ensure(needs: &[Need]) -> Result<(), PackageError> {
    let missing = missing(needs, present);
    if missing.is_empty() {
        return Ok(());
    }
    let packages = packages_of(&missing);
    let privilege = privilege::of_this_process();
    let apt = find_program("apt-get").is_some();
    if !apt || privilege == Privilege::None {
        return Err(PackageError::Missing { list: describe(&missing), remedy: remedy(&packages, apt) });
    }
    stage::run(format!("installing {}", packages.join(" ")), |_| {
        // An index that is old, or was never fetched, is the usual reason for a failure.
        install(&packages).or_else(|_| {
            apt_get(&["update"])?;
            install(&packages)
        })
    })?;
    let still = self::missing(needs, present);
    if still.is_empty() {
        return Ok(());
    }
    Err(PackageError::Missing {
        list: describe(&still),
        remedy: format!("although {} is installed", packages.join(" ")),
    })
}

fn missing(needs: &[Need], present: impl Fn(&Proof) -> bool) -> Vec<Need> {
    needs.iter().filter(|need| !present(&need.proof)).copied().collect()
}

fn present(proof: &Proof) -> bool {
    match proof {
        Proof::Program(name) => find_program(name).is_some(),
        Proof::File(path) => Path::new(path).exists(),
        Proof::Library(name) => find_program("pkg-config")
            .and_then(|program| Command::new(program).args(["--exists", name]).status().ok())
            .is_some_and(|status| status.success()),
    }
}

fn packages_of(missing: &[Need]) -> Vec<&'static str> {
    let mut packages: Vec<_> = missing.iter().map(|need| need.package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

fn describe(missing: &[Need]) -> String {
    let lines: Vec<_> = missing
        .iter()
        .map(|need| {
            let what = match need.proof {
                Proof::Program(name) => format!("the program `{name}`"),
                Proof::Library(name) => format!("the library `{name}` with its headers"),
                Proof::File(path) => format!("the file {path}"),
            };
            format!("  {what}, to {} (Debian package {})", need.purpose, need.package)
        })
        .collect();
    lines.join("\n")
}

fn remedy(packages: &[&str], apt: bool) -> String {
    let packages = packages.join(" ");
    if apt {
        format!("and can neither act as root nor find sudo. As root: apt-get install -y {packages}")
    } else {
        format!("Install what your distribution calls: {packages}")
    }
}

fn install(packages: &[&str]) -> Result<(), PackageError> {
    let mut arguments = vec!["install", "-y", "--no-install-recommends"];
    arguments.extend(packages);
    apt_get(&arguments)
}

fn apt_get(arguments: &[&str]) -> Result<(), PackageError> {
    let described = format!("apt-get {}", arguments.join(" "));
    let mut words: Vec<OsString> = vec!["env".into(), "DEBIAN_FRONTEND=noninteractive".into()];
    words.push("apt-get".into());
    words.extend(arguments.iter().map(OsString::from));
    let output = privilege::as_root(&words)
        .output()
        .map_err(|source| PackageError::Start { command: described.clone(), source })?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = text.lines().collect();
    Err(PackageError::Install {
        command: described,
        status: output.status.to_string(),
        output: lines[lines.len().saturating_sub(12)..].join("\n"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const IP: Need = Need { proof: Proof::Program("ip"), package: "iproute2", purpose: "link the node" };
    const TC: Need = Need { proof: Proof::Program("tc"), package: "iproute2", purpose: "shape traffic" };

    #[test]
    fn only_what_is_absent_is_missing_and_each_package_is_named_once() {
        assert_eq!(missing(&[IP, TC], |proof| *proof == IP.proof), [TC]);
        assert_eq!(packages_of(&[IP, TC]), ["iproute2"]);
    }

    #[test]
    fn a_missing_program_is_described_with_its_purpose_and_its_package() {
        assert_eq!(describe(&[IP]), "  the program `ip`, to link the node (Debian package iproute2)");
        assert!(remedy(&["iproute2"], true).ends_with("apt-get install -y iproute2"));
    }

    #[test]
    fn a_program_of_every_machine_is_found_and_an_invented_one_is_not() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program-of-turret").is_none());
    }
}
