//! The benchmark's own Python environment, below the cache folder.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::engines::Engine;
use crate::folders;
use crate::stage;

/// What every engine needs.
const COMMON: &[&str] = &["numpy", "safetensors", "gguf==0.19.0"];

/// The one that is built for this very processor: AVX512_BF16 and AMX where it has them.
const FROM_SOURCE: &str = "llama-cpp-python";

/// The interpreter, and which engines could not be installed, and why.
pub(super) fn environment(engines: &[Engine]) -> Result<(PathBuf, Vec<(String, String)>)> {
    let folder = folders::cache()?.join("bench/python");
    let python = folder.join("bin/python");
    let engines: Vec<_> = engines.iter().filter(|engine| !engine.packages().is_empty()).collect();
    if engines.is_empty() {
        return Ok((python, Vec::new()));
    }
    if !python.exists() {
        std::fs::create_dir_all(folder.parent().expect("it is below the cache"))?;
        let made = Command::new("python3").args(["-m", "venv"]).arg(&folder).output();
        let output = made.context(
            "python3 is needed for the engines that Turret is compared with (--peers '' measures it alone)",
        )?;
        ensure!(output.status.success(), "python3 -m venv: {}", String::from_utf8_lossy(&output.stderr));
    }
    install(&folder, COMMON)?;
    let mut missing = Vec::new();
    for engine in engines {
        let installed =
            stage::run(format!("install {}", engine.name()), |_| install(&folder, engine.packages()));
        if let Err(error) = installed {
            missing.push((engine.name().to_owned(), format!("{error:#}")));
        }
    }
    Ok((python, missing))
}

/// Installs packages unless a note in the folder says that just these are. The note has the first one's name.
fn install(folder: &Path, packages: &[&str]) -> Result<()> {
    let name = packages[0].split("==").next().expect("a split has a first part");
    let note = folder.join(format!("{name}.installed"));
    let wanted = packages.join("\n");
    if std::fs::read_to_string(&note).is_ok_and(|installed| installed == wanted) {
        return Ok(());
    }
    let mut pip = Command::new(folder.join("bin/python"));
    pip.args(["-m", "pip", "install", "--quiet"]).args(packages);
    if name == FROM_SOURCE {
        // Its vision models take as long to compile as all the rest.
        pip.args(["--no-binary", FROM_SOURCE]).env("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF");
    }
    let output = pip.output().context("failed to run pip")?;
    let errors = String::from_utf8_lossy(&output.stderr);
    let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed nothing");
    ensure!(output.status.success(), "pip install {}: {last}", packages.join(" "));
    std::fs::write(note, wanted)?;
    Ok(())
}

/// A script that answers what it is asked for, told of all that it needs to know.
pub(super) fn answering(python: &Path, text: &str, about: &Value) -> Command {
    let mut command = script(python, &format!("{}\n\n{text}", include_str!("engines/answers.py")));
    command.arg(about.to_string());
    command
}

/// A script, ready for its arguments.
pub(super) fn script(python: &Path, text: &str) -> Command {
    let mut command = Command::new(python);
    command.args(["-c", text]);
    command
}
