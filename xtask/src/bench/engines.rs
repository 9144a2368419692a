//! The engines: how each is started and what it is asked for.

use std::process::Command;

use anyhow::Result;
use serde_json::json;

use super::python;
use super::{Bench, LENSES, asked::Asked};

/// An engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Engine {
    Turret,
    TurretQ8,
    LlamaCpp,
    LlamaCppQ8,
    Transformers,
    /// Where a processor has no bf16, its users choose this.
    TransformersF32,
    OpenVino,
}

/// What is measured, the same for all engines.
#[derive(Clone)]
pub(super) struct Sizes {
    pub(super) rows: Vec<u32>,
    /// Steps that are timed.
    pub(super) steps: u32,
    /// Tokens of the prompt that is computed twice, and of the long one.
    pub(super) prefix: u32,
    pub(super) long: u32,
    pub(super) prompt: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self { rows: vec![1, 8, 32], steps: 16, prefix: 2000, long: 4096, prompt: 512 }
    }
}

/// Tokens of context of a decode step, as `turret-worker bench` has it.
const CONTEXT: u32 = 128;
/// Tokens of the synthetic base's vocabulary: Qwen2's.
const VOCABULARY: u32 = 151_936;

impl Engine {
    /// All but Turret itself, which is always measured.
    pub(super) const OTHERS: [Self; 6] = [
        Self::TurretQ8,
        Self::LlamaCpp,
        Self::LlamaCppQ8,
        Self::Transformers,
        Self::TransformersF32,
        Self::OpenVino,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Turret => "turret",
            Self::TurretQ8 => "turret Q8_0",
            Self::LlamaCpp => "llama.cpp",
            Self::LlamaCppQ8 => "llama.cpp Q8_0",
            Self::Transformers => "transformers",
            Self::TransformersF32 => "transformers F32",
            Self::OpenVino => "openvino-genai",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        Self::OTHERS.into_iter().find(|engine| engine.name() == name)
    }

    /// From PyPI.
    pub(super) fn packages(self) -> &'static [&'static str] {
        match self {
            Self::Turret | Self::TurretQ8 => &[],
            Self::LlamaCpp | Self::LlamaCppQ8 => &["llama-cpp-python==0.3.36"],
            Self::Transformers | Self::TransformersF32 => {
                &["torch==2.15.0", "transformers==5.24.0", "peft==0.21.2"]
            }
            Self::OpenVino => &["openvino-genai==2026.4.1.0"],
        }
    }

    /// As what it reads the base, when it reads GGUF.
    pub(super) fn gguf(self) -> Option<&'static str> {
        match self {
            Self::LlamaCpp => Some("BF16"),
            Self::LlamaCppQ8 => Some("Q8_0"),
            // It does not read bf16.
            Self::OpenVino => Some("F16"),
            _ => None,
        }
    }

    /// Whether a take that it offers is of use: a second Turret is there for its decoding and prefill only.
    pub(super) fn wants(self, take: &str) -> bool {
        let compared =
            (take.starts_with("decode") || take.starts_with("prefill")) && !take.ends_with("sampled");
        self != Self::TurretQ8 || compared
    }

    pub(super) fn start(self, bench: &Bench, sizes: &Sizes) -> Result<Asked> {
        let mut command = match self {
            Self::Turret => turret(bench, sizes),
            Self::TurretQ8 => {
                let mut command = turret(bench, &Sizes { prefix: 0, long: 0, ..sizes.clone() });
                command.args(["--quantization", "Q8_0"]);
                command
            }
            _ => peer(self, bench, sizes),
        };
        let threads = bench.threads.to_string();
        command.env("TURRET_THREADS", &threads).env("OMP_NUM_THREADS", &threads);
        // Everything is here; nobody needs to ask a hub.
        command.env("HF_HUB_OFFLINE", "1");
        Asked::start(&mut command, &bench.logs.join(format!("{}.log", self.name())))
    }
}

fn turret(bench: &Bench, sizes: &Sizes) -> Command {
    let mut command = Command::new(&bench.worker);
    let rows = sizes.rows.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
    command.arg("bench").arg(bench.base()).args(["--ask", "--rows", &rows]);
    let numbers = [
        ("--tokens", sizes.steps),
        ("--prompt", sizes.prompt),
        ("--prefix", sizes.prefix),
        ("--context", sizes.long),
    ];
    for (argument, number) in numbers {
        command.args([argument, &number.to_string()]);
    }
    for lens in LENSES {
        command.arg("--lens").arg(bench.lens(lens));
    }
    command
}

fn peer(engine: Engine, bench: &Bench, sizes: &Sizes) -> Command {
    let script = match engine {
        Engine::Transformers | Engine::TransformersF32 => include_str!("engines/torch_run.py"),
        Engine::OpenVino => include_str!("engines/openvino_run.py"),
        _ => include_str!("engines/llama_cpp_run.py"),
    };
    // PEFT is compared once.
    let lenses: &[&str] = if engine == Engine::Transformers { &LENSES[..3] } else { &[] };
    let about = json!({
        "base": bench.base(),
        "lenses": lenses.iter().map(|name| bench.lens(name)).collect::<Vec<_>>(),
        "gguf": engine.gguf().map(|kind| bench.gguf(kind)),
        "dtype": if engine == Engine::TransformersF32 { "float32" } else { "bfloat16" },
        "rows": sizes.rows,
        "steps": sizes.steps,
        "context": CONTEXT,
        "prompt": sizes.prompt,
        "threads": bench.threads,
        "vocabulary": VOCABULARY,
    });
    python::answering(&bench.python, script, &about)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_are_chosen_by_name() {
        assert_eq!(Engine::named("llama.cpp Q8_0"), Some(Engine::LlamaCppQ8));
        assert_eq!(Engine::named("turret"), None, "it is always measured");
        assert!(Engine::OTHERS.into_iter().all(|engine| Engine::named(engine.name()) == Some(engine)));
    }

    #[test]
    fn a_quantized_base_is_only_compared() {
        for take in ["decode, 1 row with a lens", "prefill, 512 tokens"] {
            assert!(Engine::TurretQ8.wants(take), "{take}");
        }
        for take in ["lens", "requests", "decode, 32 rows, sampled"] {
            assert!(!Engine::TurretQ8.wants(take) && Engine::Turret.wants(take), "{take}");
        }
    }
}
