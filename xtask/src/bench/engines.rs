//! The engines: how each is asked for the same numbers.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::{Bench, LENSES, json_of, python};

/// An engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    Turret,
    LlamaCpp,
    Transformers,
    OpenVino,
}

/// What is measured, the same for all engines.
pub(super) struct Sizes {
    pub(super) rows: [u32; 3],
    pub(super) steps: u32,
    pub(super) context: u32,
    pub(super) prompt: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { rows: [1, 8, 32], steps: 16, context: 128, prompt: 512 }
    }
}

/// What one run of an engine found.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Take {
    /// Version and instruction sets, in the engine's own words.
    pub(super) info: String,
    /// Seconds, by what was measured.
    pub(super) seconds: BTreeMap<String, f64>,
}

impl Engine {
    pub(super) const PEERS: [Self; 3] = [Self::LlamaCpp, Self::Transformers, Self::OpenVino];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Turret => "turret",
            Self::LlamaCpp => "llama.cpp",
            Self::Transformers => "transformers",
            Self::OpenVino => "openvino-genai",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::PEERS.into_iter().find(|engine| engine.name() == name)
    }

    pub(super) fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Turret => &[],
            Self::LlamaCpp => &["llama-cpp-python==0.3.36"],
            Self::Transformers => &["torch==2.9.0", "transformers==5.23.0", "peft==0.21.2"],
            Self::OpenVino => &["openvino-genai==2026.4.1.0"],
        }
    }

    pub(super) fn run(self, bench: &Bench, sizes: &Sizes) -> Result<Take> {
        if self == Self::Turret {
            return turret(bench, sizes);
        }
        let text = match self {
            Self::LlamaCpp => include_str!("engines/llama_cpp_run.py"),
            Self::OpenVino => include_str!("engines/openvino_run.py"),
            Self::Turret | Self::Transformers => include_str!("engines/torch_run.py"),
        };
        let mut command = python::script(&bench.python, text);
        match self {
            Self::Turret | Self::Transformers => {
                let lenses = LENSES[..2].iter().map(|name| bench.lens(name).display().to_string());
                command.arg(bench.base()).arg(lenses.collect::<Vec<_>>().join(","));
            }
            Self::LlamaCpp | Self::OpenVino => {
                command.arg(bench.gguf());
            }
        }
        if self != Self::OpenVino {
            command.arg(sizes.rows.map(|n| n.to_string()).join(","));
        }
        for number in [sizes.steps, sizes.context, sizes.prompt] {
            command.arg(number.to_string());
        }
        let threads = bench.threads.to_string();
        command.arg(&threads).env("OMP_NUM_THREADS", &threads);
        let answer = json_of(&mut command)?;
        let seconds = answer["measures"].as_object().context("the engine reports no measures")?;
        let seconds = seconds.iter().filter_map(|(name, value)| Some((name.clone(), value.as_f64()?)));
        Ok(Take { info: answer["info"].as_str().unwrap_or_default().to_owned(), seconds: seconds.collect() })
    }
}

/// Turret's own bench, one round of it, under the names that all engines use.
fn turret(bench: &Bench, sizes: &Sizes) -> Result<Take> {
    let mut command = std::process::Command::new(&bench.worker);
    command.arg("bench").arg(bench.base()).args(["--rounds", "1", "--json"]);
    command.args(["--rows", &sizes.rows.map(|n| n.to_string()).join(",")]);
    command.args(["--tokens", &sizes.steps.to_string(), "--prompt", &sizes.prompt.to_string()]);
    for lens in LENSES {
        command.arg("--lens").arg(bench.lens(lens));
    }
    command.env("TURRET_THREADS", bench.threads.to_string());
    let report = json_of(&mut command)?;
    let mut seconds = BTreeMap::new();
    for measure in report["measures"].as_array().context("turret-worker bench reports no measures")? {
        let name = measure["name"].as_str().unwrap_or_default();
        let one = |list: &str| measure[list].as_array().and_then(|list| list.first()?.as_f64());
        if let Some(value) = one("seconds").or_else(|| one("disturbedSeconds")) {
            seconds.insert(common_name(name, sizes), value);
        }
    }
    let bandwidth = report["bestReadBytesPerSecond"].as_f64().context("no bandwidth is reported")?;
    let bytes = report["stepBytes"].as_f64().context("no bytes of a step are reported")?;
    seconds.insert("read".into(), bytes / bandwidth);
    let info = report["instructionSet"].as_str().unwrap_or_default().to_owned();
    Ok(Take { info, seconds })
}

/// `decode, 8 rows` is `decode 8` everywhere else.
fn common_name(name: &str, sizes: &Sizes) -> String {
    let own = |rows: u32| format!("decode, {rows} rows");
    match sizes.rows.into_iter().find(|rows| name == own(*rows)) {
        Some(rows) => format!("decode {rows}"),
        None if name == format!("prefill, {} tokens", sizes.prompt) => "prefill".into(),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_same_for_all_engines() {
        let sizes = Sizes::default();
        assert_eq!(common_name("decode, 8 rows", &sizes), "decode 8");
        assert_eq!(common_name("prefill, 512 tokens", &sizes), "prefill");
        assert_eq!(common_name("decode, 8 rows, 8 lenses", &sizes), "decode, 8 rows, 8 lenses");
        assert_eq!(Engine::named("llama.cpp"), Some(Engine::LlamaCpp));
        assert_eq!(Engine::named("turret"), None, "it is always measured");
    }
}
