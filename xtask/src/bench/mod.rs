//! `cargo xtask bench engine`: Turret's engine and its peers on the same weights, on this machine, round by round.
//!
//! Every round runs each engine once, as a process of its own, one after the other, with a probe of the memory's
//! bandwidth before and after. What lies between two probes of which one is much slower than the best was
//! disturbed by something else on the machine, and is left out.

mod engines;
mod python;
mod table;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::folders;
use crate::stage;
use engines::{Engine, Sizes};
use table::{Round, Table};

/// What is measured.
#[derive(clap::Subcommand, Debug)]
pub enum BenchCommand {
    /// Tokens per second of the engine, beside llama.cpp, transformers with PEFT, and openvino-genai
    Engine(EngineArguments),
}

/// Options of `cargo xtask bench engine`.
#[derive(clap::Args, Debug)]
pub struct EngineArguments {
    /// Rounds of all engines.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Engines beside Turret; those that do not run here are left out, and the table says why.
    #[arg(long, value_delimiter = ',', default_value = "llama.cpp,transformers,openvino-genai")]
    peers: Vec<String>,
    /// Threads of every engine. Default: the processors this process may use.
    #[arg(long)]
    threads: Option<usize>,
    /// Print JSON, for machines.
    #[arg(long)]
    json: bool,
    /// Write the table into docs/benchmarks as well.
    #[arg(long)]
    write: bool,
}

/// Runs a benchmark.
pub fn run(command: &BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Engine(arguments) => engine(arguments),
    }
}

/// Lenses that are synthesised.
const LENSES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
/// A little under 24 layers of Qwen2-0.5B's width: `turret-worker synth` rounds up to whole layers.
const MODEL_BYTES: &str = "970000000";
/// Share of the best probe below which a neighbour of it counts as disturbed.
const UNDISTURBED: f64 = 0.9;

/// Programs and files of a run.
pub(crate) struct Bench {
    /// `turret-worker`.
    pub(crate) worker: PathBuf,
    /// The Python environment's interpreter.
    pub(crate) python: PathBuf,
    /// Folder of the synthesised base, its lenses and the GGUF.
    pub(crate) model: PathBuf,
    pub(crate) threads: usize,
}

impl Bench {
    pub(crate) fn base(&self) -> PathBuf {
        self.model.join("base")
    }

    pub(crate) fn gguf(&self) -> PathBuf {
        self.model.join("base.bf16.gguf")
    }

    pub(crate) fn lens(&self, name: &str) -> PathBuf {
        self.model.join("lenses").join(name)
    }

    /// Bytes per second that the memory gives now.
    fn probe(&self) -> Result<f64> {
        let mut command = Command::new(&self.worker);
        command.arg("bench").arg(self.base()).args(["--probe", "--rounds", "5", "--json"]);
        command.env("TURRET_THREADS", self.threads.to_string());
        let report = json_of(&mut command)?;
        report["bestReadBytesPerSecond"].as_f64().context("the probe reports no bandwidth")
    }
}

/// Runs a program and parses the last line, or all, of what it prints as JSON.
pub(crate) fn json_of(command: &mut Command) -> Result<Value> {
    let program = command.get_program().to_owned();
    let output =
        command.output().with_context(|| format!("failed to run {}", Path::new(&program).display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed nothing");
        bail!("{} failed ({}): {last}", Path::new(&program).display(), output.status);
    }
    serde_json::from_str(&text)
        .or_else(|_| serde_json::from_str(text.lines().last().unwrap_or("")))
        .with_context(|| format!("{} printed no JSON", Path::new(&program).display()))
}

fn engine(arguments: &EngineArguments) -> Result<()> {
    ensure!(arguments.rounds > 0, "--rounds must be at least 1");
    let mut peers = Vec::new();
    for name in &arguments.peers {
        peers.push(Engine::named(name).with_context(|| {
            format!("`{name}` is no engine: choose among {}", Engine::PEERS.map(Engine::name).join(", "))
        })?);
    }
    let threads = arguments.threads.unwrap_or(std::thread::available_parallelism()?.get());
    let worker = stage::run("build turret-worker", |_| build_worker())?;
    let (python, mut missing) = python::environment(&peers)?;
    let model = folders::cache()?.join("bench/qwen2-0.5b");
    let bench = Bench { worker, python, model, threads };
    make_model(&bench)?;

    let sizes = Sizes::default();
    let mut engines = vec![Engine::Turret];
    engines.extend(peers.iter().filter(|peer| missing.iter().all(|(name, _)| name != peer.name())));
    let mut rounds: Vec<Round> = Vec::new();
    for round in 1..=arguments.rounds {
        let mut before = bench.probe()?;
        for engine in engines.clone() {
            let name = engine.name();
            let taken = stage::run(format!("round {round}: {name}"), |_| engine.run(&bench, &sizes));
            let after = bench.probe()?;
            match taken {
                Ok(take) => rounds.push(Round { engine: name, probes: [before, after], take }),
                Err(error) if engine != Engine::Turret => {
                    missing.push((name.into(), format!("{error:#}")));
                    engines.retain(|e| *e != engine);
                }
                Err(error) => return Err(error),
            }
            before = after;
        }
    }
    let table = Table::of(&rounds, &missing, UNDISTURBED, threads);
    match arguments.json {
        true => println!("{}", serde_json::to_string_pretty(&table.json())?),
        false => print!("{}", table.markdown()),
    }
    if arguments.write {
        let folder = folders::repository().join("docs/benchmarks");
        std::fs::create_dir_all(&folder)?;
        let path = folder.join("engine-cpu.md");
        std::fs::write(&path, table.markdown())
            .with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(())
}

fn build_worker() -> Result<PathBuf> {
    let status = folders::cargo()?.args(["build", "--workspace", "--bin", "turret-worker"]).status()?;
    ensure!(status.success(), "cargo build failed");
    Ok(folders::cargo_target()?.join("debug/turret-worker"))
}

/// Synthesises the base, its lenses, and the same weights as GGUF; once.
fn make_model(bench: &Bench) -> Result<()> {
    let done = bench.model.join("complete");
    if done.exists() {
        return Ok(());
    }
    stage::run("synthesise a Qwen2-0.5B-shaped base and lenses", |_| {
        if bench.model.exists() {
            std::fs::remove_dir_all(&bench.model)?;
        }
        let mut synth = Command::new(&bench.worker);
        synth.arg("synth").arg(&bench.model).args(["--bytes", MODEL_BYTES]);
        for lens in LENSES {
            synth.args(["--lens", &format!("{lens}:16")]);
        }
        let output = synth.output()?;
        ensure!(output.status.success(), "turret-worker synth: {}", String::from_utf8_lossy(&output.stderr));
        let mut gguf = python::script(&bench.python, include_str!("engines/gguf_of.py"));
        let output = gguf.arg(bench.base()).arg(bench.gguf()).output()?;
        ensure!(output.status.success(), "gguf_of.py: {}", String::from_utf8_lossy(&output.stderr));
        std::fs::write(&done, "")?;
        anyhow::Ok(())
    })
}
