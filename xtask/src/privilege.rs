//! Root, where it is needed: only the node itself and the packages it wants.

use std::ffi::OsString;
use std::process::Command;

use crate::packages::find_program;

/// How this process can act as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Privilege {
    /// It is root.
    Root,
    /// It can ask `sudo`.
    Sudo,
    /// Not at all.
    None,
}

/// How this process can act as root.
pub fn of_this_process() -> Privilege {
    if rustix::process::geteuid().is_root() {
        Privilege::Root
    } else if find_program("sudo").is_some() {
        Privilege::Sudo
    } else {
        Privilege::None
    }
}

/// A command that runs `words` as root: as it is for root, else through `sudo`. Without
/// either it fails when it starts; ask [`of_this_process`] first where a clear message matters.
pub fn as_root(words: &[OsString]) -> Command {
    let (first, rest) = words.split_first().expect("a command has a program");
    let mut command = match of_this_process() {
        Privilege::Root => Command::new(first),
        Privilege::Sudo | Privilege::None => {
            let mut sudo = Command::new("sudo");
            sudo.arg(first);
            sudo
        }
    };
    command.args(rest);
    command
}
