//! `turret-worker bench`: the engine's own speed on this machine, beside the machine's limit.
//!
//! Rounds of all takes, with a probe of the memory's bandwidth before and after each. A take between two probes of
//! which one is much slower than the best was disturbed by something else on the machine, and is left out.
//!
//! With `--ask` it takes what it is asked for on its standard input instead, so that another program can take turns
//! with other engines.

mod ask;
mod engine;
mod probe;
mod report;
mod takes;

use std::path::PathBuf;
use std::time::Instant;

use crate::engine::StartError;
use crate::engine::arena::ArenaError;
use crate::engine::handle::{ActivateError, ChangeError, RemoveError, ReserveError, SubmitError};
use crate::engine::row::RowFailure;
use crate::lens::LensError;
use crate::model::weights::{BaseError, BaseFolder, Quantization};
use crate::residency::prepared::Unusable;
use engine::Loaded;
use probe::Probe;
use report::median;
pub use report::{Measure, Report};
use takes::{Found, Take};
use turret_kernels::simd::InstructionSet;
use turret_threads::{Pool, allowed_threads};

/// What to measure.
#[derive(Clone, Debug, clap::Args)]
pub struct BenchArgs {
    /// Folder of a base, such as `turret-worker synth` writes.
    pub base: PathBuf,
    /// Folder of a lens over it. May be repeated; with several, rows of a batch take turns among them.
    #[arg(long = "lens", value_name = "FOLDER")]
    pub lenses: Vec<PathBuf>,
    /// What is done to the base's matrices while they are loaded: None or Q8_0.
    #[arg(long, default_value = "None", value_parser = parse_quantization)]
    pub quantization: Quantization,
    /// Rounds of all measurements.
    #[arg(long, default_value_t = 7)]
    pub rounds: usize,
    /// Tokens decoded per measurement.
    #[arg(long, default_value_t = 24)]
    pub tokens: u32,
    /// Rows that decode together, one measurement each.
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    pub rows: Vec<u32>,
    /// Tokens of the prompt whose prefill is measured.
    #[arg(long, default_value_t = 512)]
    pub prompt: u32,
    /// Tokens of the prompt that is computed twice. 0 leaves it out.
    #[arg(long, default_value_t = 2000)]
    pub prefix: u32,
    /// Tokens of the long prompt that rows decode beside, and context of the steps after it. 0 leaves it out.
    #[arg(long, default_value_t = 4096)]
    pub context: u32,
    /// Prompt tokens computed in one step.
    #[arg(long, default_value_t = 512)]
    pub chunk: u32,
    /// Measure the bandwidth of the memory only, with as many bytes as the base has.
    #[arg(long)]
    pub probe: bool,
    /// Say what can be measured, then measure what is named on standard input, a line each; JSON both ways.
    #[arg(long, conflicts_with_all = ["probe", "json"])]
    pub ask: bool,
    /// Print JSON, for machines.
    #[arg(long)]
    pub json: bool,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The base cannot be loaded.
    #[error("failed to load the base")]
    Base(#[from] BaseError),
    /// A lens cannot be loaded.
    #[error("failed to load the lens in `{path}`")]
    Lens {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: LensError,
    },
    /// A prepared file cannot be written.
    #[error("failed to write the prepared file of a lens")]
    Prepare(#[source] std::io::Error),
    /// A prepared file cannot be read.
    #[error("failed to read the prepared file of a lens")]
    Prepared(#[from] Unusable),
    /// The engine does not start.
    #[error("failed to start the engine")]
    Start(#[from] StartError),
    /// No memory to read.
    #[error("failed to reserve memory to read")]
    Memory(#[from] ArenaError),
    /// No memory for weights.
    #[error("failed to reserve memory for weights")]
    Reserve(#[from] ReserveError),
    /// The engine refused the base or a lens.
    #[error("failed to install")]
    Install(#[from] ChangeError),
    /// The base cannot be active.
    #[error("failed to activate the base")]
    Activate(#[from] ActivateError),
    /// A lens cannot be removed.
    #[error("failed to remove a lens")]
    Remove(#[from] RemoveError),
    /// A row was refused.
    #[error("a row was refused")]
    Submit(#[from] SubmitError),
    /// A row failed.
    #[error("a row failed")]
    Row(#[from] RowFailure),
    /// Whoever asks is not understood, or is gone.
    #[error("failed to read what is asked, or to answer")]
    Asked(#[from] std::io::Error),
    /// An argument makes no sense.
    #[error("--{argument} {value}: {why}")]
    Argument {
        /// Which.
        argument: &'static str,
        /// What it is.
        value: u32,
        /// What it must be.
        why: &'static str,
    },
}

fn parse_quantization(text: &str) -> Result<Quantization, String> {
    match text.to_ascii_lowercase().as_str() {
        "none" => Ok(Quantization::None),
        "q8_0" => Ok(Quantization::Q8_0),
        _ => Err(format!("`{text}` is none of None, Q8_0")),
    }
}

/// Share of the best round's bandwidth below which a round counts as disturbed.
const UNDISTURBED: f64 = 0.9;

/// Measures, and prints the result.
pub fn run(args: &BenchArgs) -> Result<(), BenchError> {
    for rows in &args.rows {
        check("rows", *rows, (1..=1024).contains(rows), "must be from 1 to 1024")?;
    }
    check("tokens", args.tokens, args.tokens > 0, "must be at least 1")?;
    check("prompt", args.prompt, args.prompt > 0, "must be at least 1")?;
    check("chunk", args.chunk, args.chunk > 0, "must be at least 1")?;
    check("rounds", args.rounds as u32, args.rounds > 0, "must be at least 1")?;
    if args.ask {
        return futures::executor::block_on(ask::answer(args, std::io::stdin().lock(), std::io::stdout()));
    }
    let report = match args.probe {
        true => measure_reads(args)?,
        false => futures::executor::block_on(measure(args))?,
    };
    match args.json {
        true => println!("{}", serde_json::to_string_pretty(&report).expect("numbers and strings")),
        false => print!("{}", report.table()),
    }
    Ok(())
}

fn check(argument: &'static str, value: u32, ok: bool, why: &'static str) -> Result<(), BenchError> {
    if ok { Ok(()) } else { Err(BenchError::Argument { argument, value, why }) }
}

/// What a round found: bandwidths before, between and after its takes, and what each take found.
type Round = (Vec<f64>, Vec<Vec<Found>>);

async fn measure(args: &BenchArgs) -> Result<Report, BenchError> {
    let loaded = Loaded::load(args).await?;
    let probe = Probe::new(loaded.step_bytes)?;
    let pool = Pool::new(allowed_threads());
    let takes = Take::all(args);
    // The first round warms up and is not kept.
    let mut rounds: Vec<Round> = Vec::new();
    for round in 0..=args.rounds {
        let mut found = Vec::new();
        let mut reads = vec![read(&probe, &pool)];
        for take in &takes {
            found.push(loaded.take(*take).await?);
            reads.push(read(&probe, &pool));
        }
        if round > 0 {
            rounds.push((reads, found));
        }
    }
    let report = report(loaded.step_bytes, &rounds);
    loaded.shutdown().await;
    Ok(report)
}

fn measure_reads(args: &BenchArgs) -> Result<Report, BenchError> {
    let bytes = BaseFolder::open(&args.base, None)?.quantized(args.quantization).layout().bytes;
    let probe = Probe::new(bytes)?;
    let pool = Pool::new(allowed_threads());
    probe.pass(&pool);
    let rounds: Vec<Round> = (0..args.rounds).map(|_| (vec![read(&probe, &pool)], Vec::new())).collect();
    Ok(report(bytes, &rounds))
}

/// Bytes per second of one pass.
fn read(probe: &Probe, pool: &Pool) -> f64 {
    let start = Instant::now();
    std::hint::black_box(probe.pass(pool));
    probe.bytes() as f64 / start.elapsed().as_secs_f64()
}

fn report(step_bytes: u64, rounds: &[Round]) -> Report {
    let reads = || rounds.iter().flat_map(|(reads, _)| reads).copied();
    let best = reads().fold(0.0, f64::max);
    let undisturbed = |read: &f64| *read >= UNDISTURBED * best;
    let mut measures: Vec<Measure> = Vec::new();
    for (reads, takes) in rounds {
        for (around, take) in reads.windows(2).zip(takes) {
            // A take is kept when the probes on both sides of it say that nobody else was there.
            let kept = around.iter().all(undisturbed);
            for Found { name, tokens, bytes, seconds } in take {
                let at = measures.iter().position(|m| m.name == *name).unwrap_or_else(|| {
                    measures.push(Measure::new(name.clone(), *tokens, *bytes));
                    measures.len() - 1
                });
                let of = &mut measures[at];
                let list = if kept { &mut of.seconds } else { &mut of.disturbed_seconds };
                list.push(*seconds);
            }
        }
    }
    Report {
        instruction_set: format!("{:?}", InstructionSet::get()),
        threads: allowed_threads(),
        step_bytes,
        read_bytes_per_second: median(&reads().filter(undisturbed).collect::<Vec<_>>()),
        best_read_bytes_per_second: best,
        rounds: rounds.len(),
        measures,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_take_between_two_good_probes_is_kept() {
        let found = |one, two| vec![vec![Found::time("one", one)], vec![Found::time("two", two)]];
        let rounds = [(vec![100.0, 99.0, 50.0], found(1.0, 2.0)), (vec![40.0, 98.0, 97.0], found(3.0, 4.0))];
        let report = report(100, &rounds);
        let seconds = |i: usize| (&report.measures[i].seconds[..], &report.measures[i].disturbed_seconds[..]);
        assert_eq!(seconds(0), (&[1.0][..], &[3.0][..]));
        assert_eq!(seconds(1), (&[4.0][..], &[2.0][..]));
        assert_eq!((report.best_read_bytes_per_second, report.read_bytes_per_second), (100.0, 98.5));
    }
}
