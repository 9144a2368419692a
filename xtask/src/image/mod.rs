//! Images without Docker: a program, the libraries it needs, and what every container
//! expects to find, as one OCI archive.

pub mod archive;
pub mod command;
pub mod libraries;

use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::Serialize;

use self::archive::{Archive, Entry, Files, Start};
use crate::packages::{self, Need, Proof};
use crate::{folders, stage};

/// The user and group that our programs run as; root in no image.
const USER: u32 = 65532;
/// The authorities that programs trust.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// What writing an image needs of this machine.
pub const NEEDS: [Need; 3] = [
    Need { proof: Proof::Program("strip"), package: "binutils", purpose: "make images small" },
    Need { proof: Proof::Program("ldd"), package: "libc-bin", purpose: "find shared libraries" },
    Need {
        proof: Proof::File(AUTHORITIES),
        package: "ca-certificates",
        purpose: "give images the authorities they trust",
    },
];

/// A program that has an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Program {
    /// `turret-operator`: the controllers and the gateway.
    Operator,
    /// `turret-worker`.
    Worker,
}

impl Program {
    /// All of them.
    pub const ALL: [Program; 2] = [Program::Operator, Program::Worker];

    fn name(self) -> &'static str {
        match self {
            Program::Operator => "turret-operator",
            Program::Worker => "turret-worker",
        }
    }
}

/// An image that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Image {
    /// Its name without a tag, as in `turret.local/turret-worker`.
    pub name: String,
    /// The tag that stays.
    pub tag: String,
    /// The tag that changes with the contents, so that new contents roll pods.
    pub content_tag: String,
    /// The manifest's digest.
    pub digest: String,
    /// The archive.
    pub path: PathBuf,
}

impl Image {
    /// The name with the tag that changes with the contents.
    pub fn reference(&self) -> String {
        format!("{}:{}", self.name, self.content_tag)
    }
}

/// Builds `programs` and writes an image of each.
pub fn build(programs: &[Program]) -> Result<Vec<Image>> {
    packages::ensure(&NEEDS)?;
    let names: Vec<_> = programs.iter().map(|program| program.name()).collect();
    let built = stage::run(format!("building {}", names.join(" and ")), |stage| {
        cargo_build(&names, &mut |line| stage.note(line))
    })?;
    let folder = folders::cargo_target()?.join("images");
    names
        .iter()
        .zip(&built)
        .map(|(name, program)| {
            stage::run(format!("writing the image of {name}"), |_| {
                write(&format!("turret.local/{name}"), name, program, &folder)
            })
        })
        .collect()
}

/// Writes the image `name` of one program, as `<folder>/<file>.tar`.
pub fn write(name: &str, file: &str, program: &Path, folder: &Path) -> Result<Image> {
    let archive = archive_of(program)?;
    let image = Image {
        name: name.to_owned(),
        tag: "dev".into(),
        content_tag: archive.content_tag().to_owned(),
        digest: archive.digest.clone(),
        path: folder.join(format!("{file}.tar")),
    };
    fs::create_dir_all(folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let unfinished = folder.join(format!(".{file}.tar.{}", std::process::id()));
    let names = [format!("{name}:{}", image.tag), image.reference()];
    let output = fs::File::create(&unfinished)
        .with_context(|| format!("failed to create {}", unfinished.display()))?;
    archive.write(&names.each_ref().map(String::as_str), BufWriter::new(output))?;
    fs::rename(&unfinished, &image.path)
        .with_context(|| format!("failed to write {}", image.path.display()))?;
    Ok(image)
}

/// Runs cargo and returns where each program of `names` is; cargo's own words pass through
/// when it fails, and are noted while it works.
pub fn cargo_build(names: &[&str], note: &mut dyn FnMut(String)) -> Result<Vec<PathBuf>> {
    let mut command = folders::cargo()?;
    // With the features of the whole workspace, though only some programs are asked for: cargo unites the
    // features of what it builds together, so another choice would compile shared dependencies again. And not
    // with all its programs: the file of the xtask that runs here stays.
    command.args(["build", "--workspace", "--message-format=json-render-diagnostics"]);
    command.args(names.iter().flat_map(|name| ["--bin", name]));
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .context("failed to start cargo")?;
    let stdout = child.stdout.take().expect("stdout is piped");
    let mut executables: Vec<(String, PathBuf)> = Vec::new();
    for message in serde_json::Deserializer::from_reader(stdout).into_iter::<serde_json::Value>() {
        let message = message.context("failed to read what cargo says")?;
        if message["reason"] != "compiler-artifact" {
            continue;
        }
        let target = message["target"]["name"].as_str().unwrap_or_default();
        note(format!("compiled {target}"));
        if let Some(path) = message["executable"].as_str() {
            executables.push((target.to_owned(), path.into()));
        }
    }
    let status = child.wait().context("failed to wait for cargo")?;
    if !status.success() {
        bail!("cargo failed to build {} ({status}); it says why above", names.join(" and "));
    }
    names
        .iter()
        .map(|name| {
            let found = executables.iter().find(|(target, _)| target == name);
            found.map(|(_, path)| path.clone()).with_context(|| format!("cargo built no program `{name}`"))
        })
        .collect()
}

fn archive_of(program: &Path) -> Result<Archive> {
    let name = program.file_name().context("a program has a name")?.to_string_lossy();
    let inside = format!("/usr/local/bin/{name}");
    let mut files = common_files()?;
    files.add(&inside, Entry::File { content: stripped(program)?, mode: 0o755 });
    let libraries = libraries::of(program)?;
    for library in &libraries {
        let content =
            fs::read(library).with_context(|| format!("failed to read the library {}", library.display()))?;
        files.add(&library.to_string_lossy(), Entry::File { content, mode: 0o755 });
    }
    let start = Start {
        entrypoint: vec![inside],
        environment: environment(&libraries::unusual_folders(&libraries)),
        user: format!("{USER}:{USER}"),
    };
    Ok(Archive::new(&files, &start)?)
}

/// What every container expects: users, name service, authorities, and a place to write.
fn common_files() -> Result<Files> {
    let mut files = Files::default();
    files.add_text(
        "/etc/passwd",
        &format!("root:x:0:0:root:/root:/sbin/nologin\nturret:x:{USER}:{USER}:turret:/tmp:/sbin/nologin\n"),
    );
    files.add_text("/etc/group", &format!("root:x:0:\nturret:x:{USER}:\n"));
    files.add_text("/etc/nsswitch.conf", "hosts: files dns\n");
    let authorities = fs::read_to_string(AUTHORITIES)
        .with_context(|| format!("failed to read {AUTHORITIES} (package ca-certificates)"))?;
    files.add_text(AUTHORITIES, &authorities);
    files.add("/tmp", Entry::Folder { mode: 0o1777 });
    Ok(files)
}

fn environment(unusual_folders: &[PathBuf]) -> Vec<String> {
    let mut environment = vec!["PATH=/usr/local/bin:/usr/bin:/bin".to_owned()];
    if !unusual_folders.is_empty() {
        let folders: Vec<_> = unusual_folders.iter().map(|folder| folder.to_string_lossy()).collect();
        environment.push(format!("LD_LIBRARY_PATH={}", folders.join(":")));
    }
    environment
}

/// The program without symbols: a fifth of the size.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let name = program.file_name().context("a program has a name")?.to_string_lossy();
    let output = std::env::temp_dir().join(format!("turret-stripped-{name}-{}", std::process::id()));
    let run = Command::new("strip").arg("-o").arg(&output).arg(program).output();
    let result = run.context("failed to start `strip` (package binutils)").and_then(|run| {
        if run.status.success() {
            fs::read(&output).context("failed to read what `strip` wrote")
        } else {
            bail!("`strip {}` failed: {}", program.display(), String::from_utf8_lossy(&run.stderr))
        }
    });
    // There may be none.
    let _ = fs::remove_file(&output);
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_of_a_program_is_the_same_each_time() {
        packages::ensure(&NEEDS).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let write = || write("turret.local/sh", "sh", Path::new("/bin/sh"), folder.path()).unwrap();
        let first = write();
        let bytes = fs::read(&first.path).unwrap();
        assert_eq!(first, write());
        assert_eq!(bytes, fs::read(&first.path).unwrap());
        assert_eq!(first.reference(), format!("turret.local/sh:{}", &first.digest[7..19]));
    }

    #[test]
    fn libraries_in_unusual_folders_are_told_to_the_loader() {
        assert_eq!(environment(&[]).len(), 1);
        let environment = environment(&[PathBuf::from("/opt/a"), PathBuf::from("/opt/b")]);
        assert_eq!(environment[1], "LD_LIBRARY_PATH=/opt/a:/opt/b");
    }
}
