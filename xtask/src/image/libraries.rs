//! The shared libraries that a program needs, as `ldd` tells.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Folders that the dynamic loader searches by itself.
const SEARCHED: [&str; 4] = ["/lib", "/usr/lib", "/lib64", "/usr/lib64"];

/// Why a program's libraries are not known.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LibraryError {
    /// `ldd` failed.
    #[error("failed to ask `ldd` for the libraries of `{program}`: {reason}")]
    Ldd {
        /// The program.
        program: PathBuf,
        /// What went wrong.
        reason: String,
    },
    /// A library is not on this machine.
    #[error("`{program}` needs the library `{library}`, which this machine does not have")]
    NotFound {
        /// The program.
        program: PathBuf,
        /// The library.
        library: String,
    },
}

/// The paths of all libraries of `program`, the loader's too, sorted; none for a static one.
pub fn of(program: &Path) -> Result<Vec<PathBuf>, LibraryError> {
    let failed = |reason: String| LibraryError::Ldd { program: program.to_path_buf(), reason };
    let output = Command::new("ldd")
        .arg(program)
        .env_remove("LD_PRELOAD")
        .output()
        .map_err(|error| failed(error.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let is_static = [&text, &errors].iter().any(|said| said.contains("not a dynamic"));
        return if is_static { Ok(Vec::new()) } else { Err(failed(errors.trim().to_owned())) };
    }
    let mut libraries =
        parse(&text).map_err(|library| LibraryError::NotFound { program: program.to_path_buf(), library })?;
    libraries.extend(name_service(&libraries, Path::exists));
    libraries.sort();
    libraries.dedup();
    Ok(libraries)
}

/// Reads `ldd`'s lines; fails with the name of a library that was not found.
fn parse(text: &str) -> Result<Vec<PathBuf>, String> {
    let mut found = Vec::new();
    for line in text.lines().map(str::trim) {
        let (name, target) = line.split_once(" => ").unwrap_or((line, line));
        let target = target.split(" (").next().unwrap_or_default().trim();
        if target == "not found" {
            return Err(name.to_owned());
        }
        // The kernel's own library has no file.
        if target.starts_with('/') {
            found.push(PathBuf::from(target));
        }
    }
    Ok(found)
}

/// C libraries before 2.34 open these by name when a host is looked up, so `ldd` does not
/// tell of them; without them no name resolves.
fn name_service(libraries: &[PathBuf], exists: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let Some(folder) =
        libraries.iter().find(|path| path.ends_with("libc.so.6")).and_then(|path| path.parent())
    else {
        return Vec::new();
    };
    let names = ["libnss_dns.so.2", "libnss_files.so.2", "libresolv.so.2"];
    names.iter().map(|name| folder.join(name)).filter(|path| exists(path)).collect()
}

/// The folders of `libraries` that the loader must be told of.
pub fn unusual_folders(libraries: &[PathBuf]) -> Vec<PathBuf> {
    let mut folders: Vec<_> = libraries
        .iter()
        .filter_map(|path| path.parent())
        .filter(|folder| !is_searched(folder))
        .map(Path::to_path_buf)
        .collect();
    folders.sort();
    folders.dedup();
    folders
}

fn is_searched(folder: &Path) -> bool {
    SEARCHED.iter().any(|searched| {
        // Debian's loader also searches the folder of its architecture, one level below.
        folder == Path::new(searched)
            || folder.parent() == Some(Path::new(searched))
                && folder.file_name().is_some_and(|name| name.to_string_lossy().ends_with("-linux-gnu"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LDD: &str = "\tlinux-vdso.so.1 (0x00007ffd)\n\
        \tlibgcc_s.so.1 => /lib/x86_64-linux-gnu/libgcc_s.so.1 (0x00007f)\n\
        \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
        \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n";

    fn paths(texts: &[&str]) -> Vec<PathBuf> {
        texts.iter().map(PathBuf::from).collect()
    }

    #[test]
    fn libraries_and_the_loader_are_found_and_the_kernels_own_is_not() {
        let expected = paths(&[
            "/lib/x86_64-linux-gnu/libgcc_s.so.1",
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ]);
        assert_eq!(parse(LDD).unwrap(), expected);
    }

    #[test]
    fn a_library_that_is_not_there_is_named() {
        assert_eq!(parse("\tlibcuda.so.1 => not found\n"), Err("libcuda.so.1".to_owned()));
    }

    #[test]
    fn what_the_c_library_opens_by_itself_comes_along_where_it_exists() {
        let libraries = paths(&["/lib/libc.so.6"]);
        let exists = |path: &Path| path.ends_with("libnss_dns.so.2");
        assert_eq!(name_service(&libraries, exists), paths(&["/lib/libnss_dns.so.2"]));
        assert_eq!(name_service(&[], exists), paths(&[]));
    }

    #[test]
    fn only_folders_that_the_loader_does_not_search_are_unusual() {
        let libraries = paths(&[
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
            "/usr/local/cuda/lib64/libcudart.so",
        ]);
        assert_eq!(unusual_folders(&libraries), paths(&["/usr/local/cuda/lib64"]));
    }

    #[test]
    fn a_real_program_names_libraries_that_exist() {
        let libraries = of(Path::new("/bin/sh")).unwrap();
        assert!(libraries.iter().all(|library| library.exists()), "{libraries:?}");
    }
}
