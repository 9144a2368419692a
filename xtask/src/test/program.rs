//! Test programs: built once by cargo, then run as they are, so that no suite builds again.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::tally::{Tally, judge};
use crate::{folders, privilege, stage};

/// A program of tests that cargo built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TestProgram {
    /// The crate it belongs to.
    pub package: String,
    /// What it is there: `lib`, `bin`, `test`; or `loom`, a library's models.
    pub kind: String,
    /// Its name.
    pub name: String,
    /// Where it is.
    pub file: PathBuf,
    /// The folder of its crate, where cargo would run it.
    pub folder: PathBuf,
}

/// What cargo built.
#[derive(Clone, Debug, Default)]
pub struct Built {
    /// The programs of tests.
    pub tests: Vec<TestProgram>,
    /// The product's programs by name.
    pub products: BTreeMap<String, PathBuf>,
}

/// Builds everything that any suite runs.
pub fn build() -> Result<Built> {
    let mut built = Built::default();
    // With the features of the whole workspace, so that both share every dependency; and without
    // xtask, whose file must stay while it runs.
    let programs = ["build", "--workspace", "--bin", "turret-operator", "--bin", "turret-worker"];
    let tests = ["test", "--workspace", "--lib", "--bins", "--tests", "--no-run"];
    for (name, arguments) in [("building the programs", programs), ("building the tests", tests)] {
        let mut command = folders::cargo()?;
        command.args(arguments);
        stage::run(name, |stage| cargo(command, &mut built, &mut |line| stage.note(line)))?;
    }
    Ok(built)
}

/// Builds the tests that try every order in which threads can take turns. They have loom's threads, locks and atomics in place
/// of the real ones, so their crate is built a second time.
pub fn build_models() -> Result<Built> {
    let mut command = folders::cargo()?;
    let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    command
        .args(["test", "--package", "turret-threads", "--lib", "--release", "--no-run"])
        .env("RUSTFLAGS", format!("{flags} --cfg loom"))
        // It would take the place of the other.
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", folders::loom_target()?);
    let mut built = Built::default();
    stage::run("building the models of threads", |stage| {
        cargo(command, &mut built, &mut |line| stage.note(line))
    })?;
    for program in &mut built.tests {
        program.kind = "loom".into();
    }
    Ok(built)
}

fn cargo(mut command: Command, built: &mut Built, note: &mut dyn FnMut(String)) -> Result<()> {
    let arguments: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
    let mut child = command
        .arg("--message-format=json-render-diagnostics")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Warnings and progress are cargo's; errors come with them.
        .stderr(Stdio::inherit())
        .spawn()
        .context("failed to start cargo")?;
    let stdout = child.stdout.take().expect("stdout is piped");
    for message in serde_json::Deserializer::from_reader(stdout).into_iter::<serde_json::Value>() {
        let message = message.context("failed to read what cargo says")?;
        if message["reason"] == "compiler-artifact" {
            note(format!("compiled {}", message["target"]["name"].as_str().unwrap_or_default()));
            collect(&message, built);
        }
    }
    let status = child.wait().context("failed to wait for cargo")?;
    if !status.success() {
        bail!("`cargo {}` failed ({status}); it says why above", arguments.join(" "));
    }
    Ok(())
}

/// Keeps what one of cargo's messages tells of a program.
fn collect(message: &serde_json::Value, built: &mut Built) {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let Some(file) = message["executable"].as_str().map(PathBuf::from) else { return };
    let name = text(&message["target"]["name"]);
    let kind = text(&message["target"]["kind"][0]);
    if message["profile"]["test"] == true {
        let manifest = PathBuf::from(text(&message["manifest_path"]));
        let folder = manifest.parent().unwrap_or(Path::new("")).to_path_buf();
        // `path+file:///…/worker#turret-worker@0.1.0`, or `…/xtask#0.1.0` where folder and crate agree.
        let id = text(&message["package_id"]);
        let named =
            id.rsplit_once('#').and_then(|(_, end)| end.split_once('@')).map(|(name, _)| name.to_owned());
        let package = named.or_else(|| folder.file_name().map(|name| name.to_string_lossy().into_owned()));
        let package = package.unwrap_or_default();
        built.tests.push(TestProgram { package, kind, name, file, folder });
    } else if kind == "bin" {
        built.products.insert(name, file);
    }
}

/// How a program of tests is run.
#[derive(Clone, Debug, Default)]
pub struct Manner {
    /// What it is told.
    pub arguments: Vec<OsString>,
    /// Further variables.
    pub variables: Vec<(&'static str, OsString)>,
    /// As root, through sudo where needed.
    pub as_root: bool,
    /// Whether everything it prints is shown at once, or only when it fails.
    pub shown: bool,
    /// How long it may take.
    pub limit: Duration,
}

/// Runs a program of tests to its end.
pub fn run(program: &TestProgram, manner: &Manner) -> Result<Tally> {
    let mut command = if manner.as_root {
        let mut words: Vec<OsString> = vec!["env".into()];
        words.extend(manner.variables.iter().map(|(name, value)| {
            let mut word = OsString::from(format!("{name}="));
            word.push(value);
            word
        }));
        words.push(program.file.clone().into());
        privilege::as_root(&words)
    } else {
        Command::new(&program.file)
    };
    command
        .args(&manner.arguments)
        .envs(manner.variables.iter().map(|(name, value)| (*name, value)))
        .current_dir(&program.folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let described = format!("{} ({})", program.name, program.file.display());
    let mut child = command.spawn().with_context(|| format!("failed to start {described}"))?;
    let (sender, lines) = mpsc::channel();
    forward(child.stdout.take().expect("stdout is piped"), sender.clone());
    forward(child.stderr.take().expect("stderr is piped"), sender);

    let began = Instant::now();
    let mut said = Vec::new();
    let in_time = loop {
        match lines.recv_timeout(manner.limit.saturating_sub(began.elapsed())) {
            Ok(line) => {
                if manner.shown {
                    println!("{line}");
                }
                said.push(line);
            }
            // Both pipes are closed: it ended.
            Err(RecvTimeoutError::Disconnected) => break true,
            Err(RecvTimeoutError::Timeout) => break false,
        }
    };
    if !in_time {
        child.kill().with_context(|| format!("failed to end {described}"))?;
    }
    let status = child.wait().with_context(|| format!("failed to wait for {described}"))?;
    let tally = judge(said.iter().map(String::as_str), in_time && status.success());
    if tally.failed > 0 {
        if !manner.shown {
            said.iter().for_each(|line| println!("{line}"));
        }
        let ending = if in_time {
            format!("ended with {status}")
        } else {
            format!("was ended after {} s", manner.limit.as_secs())
        };
        println!("FAILED: {described} {ending}");
    }
    Ok(tally)
}

fn forward(pipe: impl Read + Send + 'static, lines: Sender<String>) {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        // A test may print bytes that are no text; they are no reason to lose the rest.
        while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
            let text = String::from_utf8_lossy(&line).trim_end_matches(['\r', '\n']).to_owned();
            line.clear();
            if lines.send(text).is_err() {
                break;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn script(text: &str) -> (tempfile::TempDir, TestProgram) {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("program");
        std::fs::write(&file, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755)).unwrap();
        let program = TestProgram {
            package: "p".into(),
            kind: "lib".into(),
            name: "n".into(),
            file,
            folder: folder.path().into(),
        };
        (folder, program)
    }

    /// Runs a script. Another test may have begun a process while the script was open for writing, and the kernel runs no
    /// program that somebody can still write; that passes with the other's `exec`.
    fn tally(script: &TestProgram, manner: &Manner) -> Tally {
        let busy = |error: &anyhow::Error| {
            let cause = error.root_cause().downcast_ref::<std::io::Error>();
            cause.is_some_and(|e| e.kind() == std::io::ErrorKind::ExecutableFileBusy)
        };
        loop {
            match run(script, manner) {
                Err(error) if busy(&error) => std::thread::yield_now(),
                result => return result.unwrap(),
            }
        }
    }

    #[test]
    fn a_program_is_counted_by_what_it_prints_and_how_it_ends() {
        let manner = Manner { limit: Duration::from_secs(20), ..Manner::default() };
        let (_folder, good) = script("echo 'test result: ok. 2 passed; 0 failed; 0 ignored'");
        assert_eq!(tally(&good, &manner), Tally { passed: 2, failed: 0, skipped: 0 });
        let (_folder, crashed) = script("echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; exit 3");
        assert_eq!(tally(&crashed, &manner), Tally { passed: 2, failed: 1, skipped: 0 });
    }

    #[test]
    fn a_program_that_hangs_is_ended_and_fails() {
        let manner = Manner { limit: Duration::from_millis(50), ..Manner::default() };
        let (_folder, hanging) = script("exec tail -f /dev/null");
        assert_eq!(tally(&hanging, &manner), Tally { passed: 0, failed: 1, skipped: 0 });
    }

    #[test]
    fn cargo_s_messages_tell_tests_from_products() {
        let mut built = Built::default();
        let message = |test: bool, kind: &str, name: &str| {
            json!({
                "package_id": "path+file:///r/worker#turret-worker@0.1.0",
                "manifest_path": "/r/worker/Cargo.toml",
                "target": {"name": name, "kind": [kind]},
                "profile": {"test": test},
                "executable": format!("/t/{name}"),
            })
        };
        collect(&message(true, "lib", "turret_worker"), &mut built);
        collect(&message(false, "bin", "turret-worker"), &mut built);
        collect(&message(false, "custom-build", "build-script-build"), &mut built);
        assert_eq!(built.products.keys().collect::<Vec<_>>(), ["turret-worker"]);
        assert_eq!((built.tests.len(), built.tests[0].package.as_str()), (1, "turret-worker"));
        assert_eq!(built.tests[0].folder, Path::new("/r/worker"));
    }
}
