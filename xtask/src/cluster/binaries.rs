//! The programs of a cluster, built from pinned Go modules and kept in the user's cache.
//!
//! A build lies in a folder named by a digest of all that went into it: the module files,
//! how they are built, and Go itself. It is made elsewhere and renamed when complete, so a
//! folder that exists is whole; a lock lets a second process wait instead of building too.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};

use crate::folders;
use crate::packages::{self, Need, PackageError, Proof, find_program};
use crate::stage::{self, Stage};

/// Why the programs are not there.
#[derive(Debug, thiserror::Error)]
pub enum BinariesError {
    /// Go is missing.
    #[error(
        "Go is needed to build Kubernetes, and no `go` is on the PATH: install Go 1.26 or newer from https://go.dev/dl"
    )]
    NoGo,
    /// Another program or library is missing.
    #[error(transparent)]
    Packages(#[from] PackageError),
    /// No cache folder.
    #[error(transparent)]
    Folders(#[from] anyhow::Error),
    /// A file could not be read or written.
    #[error("failed to {attempt} `{path}`")]
    Io {
        /// What was tried.
        attempt: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A build failed.
    #[error("failed to build {what}: `{command}` ended with {status}:\n{output}")]
    Build {
        /// What was built.
        what: &'static str,
        /// The command.
        command: String,
        /// How it ended.
        status: String,
        /// The end of what it said.
        output: String,
    },
    /// The module file does not name a module whose version is stamped into a program.
    #[error("`{set}/go.mod` requires no module `{module}`")]
    NoVersion {
        /// The folder of the module file.
        set: &'static str,
        /// The module.
        module: &'static str,
    },
}

/// One `go build`.
#[derive(Debug)]
struct Recipe {
    /// The folder under `xtask/cluster` with `go.mod` and `go.sum`.
    set: &'static str,
    packages: &'static [&'static str],
    /// The program's name, where it is not the last part of its package.
    rename: Option<&'static str>,
    /// Build tags.
    tags: &'static str,
    cgo: bool,
    /// Variables that carry the version of this module.
    version_of: &'static str,
    /// Whether `v` is part of the stamp.
    stamps: &'static [Stamp],
}

/// A variable that is set at link time.
#[derive(Debug)]
enum Stamp {
    /// To the version as in `v1.2.3`.
    Version(&'static str),
    /// To the version as in `1.2.3`.
    Bare(&'static str),
    /// To the version's first number.
    Major(&'static str),
    /// To the version's second number.
    Minor(&'static str),
}

const RECIPES: [Recipe; 7] = [
    Recipe {
        set: "kubernetes",
        packages: &[
            "k8s.io/kubernetes/cmd/kube-apiserver",
            "k8s.io/kubernetes/cmd/kube-controller-manager",
            "k8s.io/kubernetes/cmd/kube-scheduler",
            "k8s.io/kubernetes/cmd/kube-proxy",
            "k8s.io/kubernetes/cmd/kubelet",
            "k8s.io/kubernetes/cmd/kubectl",
        ],
        rename: None,
        tags: "",
        cgo: false,
        version_of: "k8s.io/kubernetes",
        // Without a stamp clients see v0.0.0 and refuse features.
        stamps: &[
            Stamp::Version("k8s.io/component-base/version.gitVersion"),
            Stamp::Major("k8s.io/component-base/version.gitMajor"),
            Stamp::Minor("k8s.io/component-base/version.gitMinor"),
            Stamp::Version("k8s.io/client-go/pkg/version.gitVersion"),
        ],
    },
    Recipe {
        set: "etcd",
        packages: &["go.etcd.io/etcd/server/v3"],
        rename: Some("etcd"),
        tags: "",
        cgo: false,
        version_of: "go.etcd.io/etcd/server/v3",
        stamps: &[],
    },
    Recipe {
        set: "node",
        packages: &[
            "github.com/containerd/containerd/v2/cmd/containerd",
            "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
            "github.com/containerd/containerd/v2/cmd/ctr",
        ],
        rename: None,
        tags: "no_btrfs no_devmapper no_zfs",
        cgo: false,
        version_of: "github.com/containerd/containerd/v2",
        stamps: &[Stamp::Bare("github.com/containerd/containerd/v2/version.Version")],
    },
    Recipe {
        set: "node",
        packages: &[
            "github.com/containernetworking/plugins/plugins/main/loopback",
            "github.com/containernetworking/plugins/plugins/main/ptp",
            "github.com/containernetworking/plugins/plugins/ipam/host-local",
        ],
        rename: None,
        tags: "",
        cgo: false,
        version_of: "github.com/containernetworking/plugins",
        stamps: &[],
    },
    Recipe {
        set: "node",
        packages: &["github.com/opencontainers/runc"],
        rename: None,
        // The default seccomp profile, which restricted pods must have, needs libseccomp.
        tags: "seccomp",
        cgo: true,
        version_of: "github.com/opencontainers/runc",
        stamps: &[Stamp::Bare("main.version")],
    },
    Recipe {
        set: "coredns",
        packages: &["."],
        rename: Some("coredns"),
        tags: "",
        cgo: false,
        version_of: "github.com/coredns/coredns",
        stamps: &[],
    },
    Recipe {
        set: "helm",
        packages: &["helm.sh/helm/v4/cmd/helm"],
        rename: None,
        tags: "",
        cgo: false,
        version_of: "helm.sh/helm/v4",
        stamps: &[Stamp::Version("helm.sh/helm/v4/internal/version.version")],
    },
];

/// Everything from here that goes into a build; its digest names the build.
const SOURCES: [&str; 13] = [
    "kubernetes/go.mod",
    "kubernetes/go.sum",
    "kubernetes/tools.go",
    "etcd/go.mod",
    "etcd/go.sum",
    "node/go.mod",
    "node/go.sum",
    "coredns/go.mod",
    "coredns/go.sum",
    "coredns/main.go",
    "helm/go.mod",
    "helm/go.sum",
    "pause/pause.c",
];

/// Length of a build's name.
const KEY_DIGITS: usize = 16;

/// Static, so that it runs in an image that holds nothing else.
const PAUSE_FLAGS: [&str; 3] = ["-static", "-Os", "-s"];

const NEEDS: [Need; 4] = [
    Need { proof: Proof::Program("cc"), package: "gcc", purpose: "build runc" },
    Need { proof: Proof::File("/usr/include/stdlib.h"), package: "libc6-dev", purpose: "build runc" },
    Need { proof: Proof::Program("pkg-config"), package: "pkg-config", purpose: "find libseccomp" },
    Need {
        proof: Proof::Library("libseccomp"),
        package: "libseccomp-dev",
        purpose: "build runc with seccomp, without which restricted pods do not start",
    },
];

/// The folder with all programs; builds them when no build of exactly these exists.
pub fn ensure() -> Result<PathBuf, BinariesError> {
    let sources = folders::repository().join("xtask/cluster");
    let store = folders::cache()?.join("kubernetes");
    let key = key(&go_version()?, |file| read(&sources.join(file)))?;
    let complete = store.join(&key);
    if complete.is_dir() {
        return Ok(complete);
    }
    packages::ensure(&NEEDS)?;
    stage::run("building Kubernetes binaries (once; some minutes)", |stage| {
        create_folder(&store)?;
        let lock = File::create(store.join(".lock")).map_err(io("create", &store))?;
        stage.note("waiting for another process that builds them");
        lock.lock().map_err(io("lock", &store))?;
        if complete.is_dir() {
            return Ok(());
        }
        let unfinished = store.join(".unfinished");
        // What a build that was ended left behind; the lock says that nobody is at it.
        let _ = fs::remove_dir_all(&unfinished);
        create_folder(&unfinished)?;
        for recipe in &RECIPES {
            build(recipe, &sources, &unfinished, stage)?;
        }
        build_pause(&sources, &unfinished)?;
        fs::rename(&unfinished, &complete).map_err(io("rename", &unfinished))?;
        remove_outdated(&store, &complete);
        Ok::<_, BinariesError>(())
    })?;
    Ok(complete)
}

/// Removes the builds before this one, half a gigabyte each, but those that a cluster is running from.
fn remove_outdated(store: &Path, current: &Path) {
    let builds: Vec<PathBuf> =
        fs::read_dir(store).into_iter().flatten().flatten().map(|e| e.path()).collect();
    let running = command_lines();
    for build in outdated(&builds, current, &running) {
        // One that cannot be removed costs space and nothing else.
        if let Err(error) = fs::remove_dir_all(build) {
            stage::say(format!("an older build cannot be removed: {}: {error}", build.display()));
        }
    }
}

/// The folders of builds that nothing runs from, the current one apart.
fn outdated<'a>(builds: &'a [PathBuf], current: &Path, running: &[Vec<u8>]) -> Vec<&'a PathBuf> {
    let is_build = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.len() == KEY_DIGITS && name.bytes().all(|b| b.is_ascii_hexdigit())
    };
    let is_used = |path: &Path| {
        use std::os::unix::ffi::OsStrExt as _;
        let folder = [path.as_os_str().as_bytes(), b"/"].concat();
        running.iter().any(|line| line.windows(folder.len()).any(|part| part == folder))
    };
    builds.iter().filter(|path| is_build(path) && *path != current && !is_used(path)).collect()
}

/// The command lines of all processes of this machine; everybody may read them.
fn command_lines() -> Vec<Vec<u8>> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok()).collect()
}

fn go_version() -> Result<String, BinariesError> {
    let output = Command::new("go")
        .args(["env", "GOVERSION", "GOOS", "GOARCH"])
        .current_dir(folders::repository().join("xtask/cluster/kubernetes"))
        .output()
        .map_err(|_| BinariesError::NoGo)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" "));
    }
    Err(BinariesError::Build {
        what: "anything with this Go",
        command: "go env".into(),
        status: output.status.to_string(),
        output: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

fn key<E>(go: &str, read: impl Fn(&str) -> Result<String, E>) -> Result<String, E> {
    let mut hash = Sha256::new();
    let mut add = |text: &str| {
        // The length keeps one part from running into the next.
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    };
    add(go);
    add(&format!("{RECIPES:?} {PAUSE_FLAGS:?}"));
    for file in SOURCES {
        add(file);
        add(&read(file)?);
    }
    Ok(hex::encode(&hash.finalize()[..KEY_DIGITS / 2]))
}

fn build(recipe: &Recipe, sources: &Path, output: &Path, stage: &Stage) -> Result<(), BinariesError> {
    let folder = sources.join(recipe.set);
    let module = read(&folder.join("go.mod"))?;
    let version = required_version(&module, recipe.version_of)
        .ok_or(BinariesError::NoVersion { set: recipe.set, module: recipe.version_of })?;
    let destination = match recipe.rename {
        Some(name) => output.join(name),
        // Go puts several programs into a folder when the path ends with a slash.
        None => output.join(""),
    };
    let mut command = Command::new("go");
    command
        .args(["build", "-v", "-mod=readonly", "-trimpath", "-buildvcs=false", "-tags", recipe.tags])
        .arg(format!("-ldflags=-s -w {}", link_flags(recipe.stamps, version)))
        .arg("-o")
        .arg(destination)
        .args(recipe.packages)
        .current_dir(folder)
        .env("CGO_ENABLED", if recipe.cgo { "1" } else { "0" })
        .env("GOFLAGS", "")
        .env("GOWORK", "off");
    let what = recipe.packages.last().expect("a recipe builds something");
    let what = if *what == "." { recipe.set } else { what };
    stage.note(recipe_name(what));
    run_noting(command, what, stage)
}

/// Runs a build, noting what it says as its stage's progress.
fn run_noting(mut command: Command, what: &'static str, stage: &Stage) -> Result<(), BinariesError> {
    let program = PathBuf::from(command.get_program());
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(io("start", &program))?;
    let stderr = child.stderr.take().expect("stderr is piped");
    let mut lines = Vec::new();
    for line in BufReader::new(stderr).lines().map_while(Result::ok) {
        stage.note(format!("{}: {line}", recipe_name(what)));
        lines.push(line);
    }
    let status = child.wait().map_err(io("wait for", &program))?;
    if status.success() {
        return Ok(());
    }
    Err(BinariesError::Build {
        what,
        command: format!("{command:?}"),
        status: status.to_string(),
        output: lines[lines.len().saturating_sub(20)..].join("\n"),
    })
}

fn recipe_name(package: &str) -> &str {
    package.rsplit('/').find(|part| !part.starts_with('v')).unwrap_or(package)
}

fn build_pause(sources: &Path, output: &Path) -> Result<(), BinariesError> {
    let mut command = Command::new(find_program("cc").unwrap_or_else(|| "cc".into()));
    command.args(PAUSE_FLAGS).arg("-o").arg(output.join("pause")).arg(sources.join("pause/pause.c"));
    let run = command.output().map_err(io("start", Path::new("cc")))?;
    if run.status.success() {
        return Ok(());
    }
    Err(BinariesError::Build {
        what: "pause",
        command: format!("{command:?}"),
        status: run.status.to_string(),
        output: String::from_utf8_lossy(&run.stderr).into_owned(),
    })
}

/// The version of `module` in a `go.mod`, as in `v1.2.3`.
fn required_version<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let line = line.trim();
        let line = line.strip_prefix("require ").unwrap_or(line);
        let mut words = line.split_whitespace();
        let version = (words.next()? == module).then(|| words.next())??;
        version.starts_with('v').then_some(version)
    })
}

fn link_flags(stamps: &[Stamp], version: &str) -> String {
    let bare = version.trim_start_matches('v');
    let mut numbers = bare.split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let flags: Vec<_> = stamps
        .iter()
        .map(|stamp| {
            let (variable, value) = match stamp {
                Stamp::Version(variable) => (variable, version),
                Stamp::Bare(variable) => (variable, bare),
                Stamp::Major(variable) => (variable, major),
                Stamp::Minor(variable) => (variable, minor),
            };
            format!("-X {variable}={value}")
        })
        .collect();
    flags.join(" ")
}

fn read(path: &Path) -> Result<String, BinariesError> {
    fs::read_to_string(path).map_err(io("read", path))
}

fn create_folder(path: &Path) -> Result<(), BinariesError> {
    fs::create_dir_all(path).map_err(io("create the folder", path))
}

fn io(attempt: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BinariesError + use<> {
    let path = path.to_path_buf();
    move |source| BinariesError::Io { attempt, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample_key(go: &str, changed: &str) -> String {
        key(go, |file| Ok::<_, ()>(if file == changed { "new".into() } else { "old".to_owned() })).unwrap()
    }

    #[test]
    fn a_build_is_named_by_each_of_its_sources_and_by_go() {
        let before = sample_key("go1.26", "");
        assert_eq!(before, sample_key("go1.26", ""));
        assert_ne!(before, sample_key("go1.27", ""));
        for file in SOURCES {
            assert_ne!(before, sample_key("go1.26", file), "{file}");
        }
    }

    #[test]
    fn older_builds_leave_unless_something_runs_from_them() {
        let name = |digit: &str| PathBuf::from(format!("/cache/kubernetes/{}", digit.repeat(KEY_DIGITS)));
        let builds = [
            name("a"),
            name("b"),
            name("c"),
            "/cache/kubernetes/.lock".into(),
            "/cache/kubernetes/mine".into(),
        ];
        let running = [format!("{}/kubelet\0--config\0x", name("b").display()).into_bytes(), b"sh".to_vec()];
        assert_eq!(outdated(&builds, &name("c"), &running), [&name("a")]);
        assert_eq!(outdated(&builds, &name("c"), &[]), [&name("a"), &name("b")]);
    }

    #[test]
    fn a_running_process_is_found_by_its_command_line() {
        let mine = std::env::args_os().next().unwrap();
        let mine = mine.as_encoded_bytes();
        assert!(command_lines().iter().any(|line| line.starts_with(mine)));
    }

    #[test]
    fn every_source_is_committed_and_every_version_is_pinned() {
        let sources = folders::repository().join("xtask/cluster");
        for file in SOURCES {
            assert!(sources.join(file).is_file(), "{file}");
        }
        for recipe in &RECIPES {
            let module = read(&sources.join(recipe.set).join("go.mod")).unwrap();
            assert!(required_version(&module, recipe.version_of).is_some(), "{recipe:?}");
        }
    }

    #[test]
    fn versions_are_found_in_blocks_and_lines_and_not_in_replacements() {
        let text = "require k8s.io/kubernetes v1.35.4\n\nrequire (\n\ta.b/c v0.1.0 // indirect\n)\nreplace (\n\tk8s.io/api => k8s.io/api v0.35.4\n)\n";
        assert_eq!(required_version(text, "k8s.io/kubernetes"), Some("v1.35.4"));
        assert_eq!(required_version(text, "a.b/c"), Some("v0.1.0"));
        assert_eq!(required_version(text, "k8s.io/api"), None);
    }

    #[test]
    fn stamps_carry_the_version_in_the_form_each_program_reads() {
        let stamps = [Stamp::Version("a.V"), Stamp::Bare("b.V"), Stamp::Minor("c.V")];
        assert_eq!(link_flags(&stamps, "v1.35.4"), "-X a.V=v1.35.4 -X b.V=1.35.4 -X c.V=35");
    }

    #[test]
    fn a_program_is_called_by_the_last_part_of_its_package_that_is_no_version() {
        assert_eq!(recipe_name("go.etcd.io/etcd/server/v3"), "server");
        assert_eq!(recipe_name("k8s.io/kubernetes/cmd/kubectl"), "kubectl");
    }
}
