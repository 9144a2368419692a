//! `cargo xtask bench`: what Turret takes on this machine. `residency`: [`residency`]. `operator`: [`operator`]. `engine`: its
//! engine and its peers on the same weights, round by round.
//!
//! Every engine is a process of its own that loads the same weights once and then takes what it is asked for ([`asked`]).
//! Rounds go through all takes, and through all engines for each of them, so that what is compared was measured within
//! seconds of each other ([`rounds`]). What is made of it: [`table`], [`budgets`].

mod asked;
mod budgets;
mod engines;
mod machine;
mod operator;
mod python;
mod residency;
mod rounds;
mod scratch;
mod table;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::folders;
use crate::stage;
use engines::{Engine, Sizes};
use machine::Machine;
use rounds::Rounds;
use table::Table;

/// What is measured.
#[derive(clap::Subcommand, Debug)]
pub enum BenchCommand {
    /// Tokens per second of the engine, beside llama.cpp, transformers with PEFT, and openvino-genai
    Engine(EngineArguments),
    /// Many lenses: decisions who leaves, requests past 4096 declared lenses, working sets beyond the memory for lenses
    Residency(residency::ResidencyArguments),
    /// The operator with thousands of groups, placements and simulated workers, on a real API server
    Operator(operator::OperatorArguments),
}

/// Options of `cargo xtask bench engine`.
#[derive(clap::Args, Debug)]
pub struct EngineArguments {
    /// Rounds of all engines.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Steps that are timed per take.
    #[arg(long, default_value_t = 16)]
    steps: u32,
    /// Tokens of the long prompt. 0 leaves out what needs one; less than 4096 leaves its budgets unmeasured.
    #[arg(long, default_value_t = 4096)]
    long: u32,
    /// Engines beside Turret; those that do not run here are left out, and the table says why. Empty for none.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "turret Q8_0,llama.cpp,llama.cpp Q8_0,transformers,transformers F32,openvino-genai"
    )]
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
        BenchCommand::Residency(arguments) => residency::run(arguments),
        BenchCommand::Operator(arguments) => operator::run(arguments),
    }
}

/// Lenses that are synthesised.
const LENSES: [&str; 8] = ["a", "b", "c", "d", "e", "f", "g", "h"];
/// A little under 24 layers of Qwen2-0.5B's width: `turret-worker synth` rounds up to whole layers.
const MODEL_BYTES: &str = "970000000";

/// Programs and files of a run.
pub(crate) struct Bench {
    /// `turret-worker`.
    pub(crate) worker: PathBuf,
    /// The Python environment's interpreter.
    pub(crate) python: PathBuf,
    /// Folder of the synthesised base, its lenses and the GGUFs.
    pub(crate) model: PathBuf,
    /// Folder for what engines print.
    pub(crate) logs: PathBuf,
    pub(crate) threads: usize,
}

impl Bench {
    pub(crate) fn base(&self) -> PathBuf {
        self.model.join("base")
    }

    pub(crate) fn gguf(&self, kind: &str) -> PathBuf {
        self.model.join(format!("base.{kind}.gguf"))
    }

    pub(crate) fn lens(&self, name: &str) -> PathBuf {
        self.model.join("lenses").join(name)
    }
}

fn engine(arguments: &EngineArguments) -> Result<()> {
    ensure!(arguments.rounds > 0, "--rounds must be at least 1");
    ensure!(arguments.steps > 0, "--steps must be at least 1");
    let mut peers = Vec::new();
    for name in arguments.peers.iter().filter(|name| !name.is_empty()) {
        peers.push(Engine::named(name).with_context(|| {
            format!("`{name}` is no engine: choose among {}", Engine::OTHERS.map(Engine::name).join(", "))
        })?);
    }
    let threads = arguments.threads.unwrap_or(std::thread::available_parallelism()?.get());
    let worker = stage::run("build turret-worker", |_| build_worker())?;
    let (python, mut missing) = python::environment(&peers)?;
    let folder = folders::cache()?.join("bench");
    let bench =
        Bench { worker, python, model: folder.join("qwen2-0.5b"), logs: folder.join("logs"), threads };
    std::fs::create_dir_all(&bench.logs)?;
    make_model(&bench)?;
    for kind in peers.iter().filter_map(|peer| peer.gguf()) {
        make_gguf(&bench, kind)?;
    }

    let sizes = Sizes { steps: arguments.steps, long: arguments.long, ..Sizes::default() };
    let mut engines = Vec::new();
    for engine in [Engine::Turret].into_iter().chain(peers) {
        if missing.iter().any(|(name, _)| name == engine.name()) {
            continue;
        }
        match stage::run(format!("start {}", engine.name()), |_| engine.start(&bench, &sizes)) {
            Ok(asked) => engines.push((engine, asked)),
            Err(error) if engine == Engine::Turret => return Err(error.context("turret does not start")),
            Err(error) => missing.push((engine.name().into(), format!("{error:#}"))),
        }
    }
    let about = engines[0].1.about.clone();
    let mut rounds = Rounds::new(engines, missing)?;
    let (machine, info) = (Machine::look(), rounds.info());
    let table = |rounds: &Rounds| Table {
        command: command(),
        machine: machine.clone(),
        threads,
        step_bytes: about["stepBytes"].as_u64().unwrap_or(0),
        lens_bytes: serde_json::from_value(about["lensBytes"].clone()).unwrap_or_default(),
        info: info.clone(),
        missing: rounds.missing.clone(),
        ..Table::of(&rounds.taken)
    };
    for number in 1..=arguments.rounds {
        stage::run(format!("round {number} of {}", arguments.rounds), |stage| rounds.round(number, stage))?;
        // Rounds are minutes; whoever breaks off has those that are done.
        if arguments.write {
            write("engine-cpu.md", &table(&rounds).markdown())?;
        }
    }
    let table = table(&rounds);
    show(&table.markdown(), &table.json(), arguments.json)
}

/// Prints what was found, for people or for machines.
fn show(markdown: &str, json: &Value, as_json: bool) -> Result<()> {
    match as_json {
        true => println!("{}", serde_json::to_string_pretty(json)?),
        false => print!("{markdown}"),
    }
    Ok(())
}

/// Writes a page of docs/benchmarks.
fn write(page: &str, markdown: &str) -> Result<()> {
    let folder = folders::repository().join("docs/benchmarks");
    std::fs::create_dir_all(&folder)?;
    let path = folder.join(page);
    std::fs::write(&path, markdown).with_context(|| format!("failed to write {}", path.display()))
}

/// How this was asked for.
fn command() -> String {
    ["cargo xtask".to_owned()].into_iter().chain(std::env::args().skip(1)).collect::<Vec<_>>().join(" ")
}

fn build_worker() -> Result<PathBuf> {
    let status = folders::cargo()?.args(["build", "--workspace", "--bin", "turret-worker"]).status()?;
    ensure!(status.success(), "cargo build failed");
    Ok(folders::cargo_target()?.join("debug/turret-worker"))
}

/// Synthesises the base and its lenses; once.
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
        run_through(&mut synth)?;
        std::fs::write(&done, "")?;
        anyhow::Ok(())
    })
}

/// Writes the base's weights as GGUF; once.
fn make_gguf(bench: &Bench, kind: &str) -> Result<()> {
    let path = bench.gguf(kind);
    if path.exists() {
        return Ok(());
    }
    stage::run(format!("write the base as GGUF in {kind}"), |_| {
        let part = path.with_extension("part");
        let mut script = python::script(&bench.python, include_str!("engines/gguf_of.py"));
        run_through(script.arg(bench.base()).arg(&part).arg(kind))?;
        std::fs::rename(&part, &path)?;
        anyhow::Ok(())
    })
}

/// Runs a program to its end, which must be a good one.
fn run_through(command: &mut Command) -> Result<()> {
    output_of(command).map(drop)
}

/// The same, for what it prints.
fn output_of(command: &mut Command) -> Result<String> {
    let program = Path::new(command.get_program()).display().to_string();
    let output = command.output().with_context(|| format!("failed to run {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let last = errors.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it printed nothing");
        bail!("{program} failed ({}): {last}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
