//! `turret-worker bench`: the engine's own speed on this machine, beside the machine's limit.
//!
//! Rounds of all measurements, each round with a probe of the memory's bandwidth before and after it. A round
//! whose probe is much slower than the best one was disturbed by something else on the machine, and is left out.

mod engine;
mod probe;
mod report;

use std::path::PathBuf;
use std::time::Instant;

use crate::engine::StartError;
use crate::engine::arena::ArenaError;
use crate::engine::handle::LensId;
use crate::engine::handle::{ActivateError, ChangeError, ReserveError, SubmitError};
use crate::engine::row::RowFailure;
use crate::kernels::simd::InstructionSet;
use crate::kernels::threads::{Pool, allowed_threads};
use crate::lens::LensError;
use crate::model::weights::{BaseError, BaseFolder, Quantization};
use engine::{Decode, Loaded, SHORT};
use probe::Probe;
use report::median;
pub use report::{Measure, Report};

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
    /// Context of the decode steps that are compared with short ones. 0 leaves them out.
    #[arg(long, default_value_t = 4096)]
    pub context: u32,
    /// Measure the bandwidth of the memory only, with as many bytes as the base has.
    #[arg(long)]
    pub probe: bool,
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
    /// A row was refused.
    #[error("a row was refused")]
    Submit(#[from] SubmitError),
    /// A row failed.
    #[error("a row failed")]
    Row(#[from] RowFailure),
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
    check("rounds", args.rounds as u32, args.rounds > 0, "must be at least 1")?;
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

/// One measurement of a round.
enum Take {
    Decode { rows: u32, context: u32, lenses: Vec<LensId> },
    Prefill { lens: Option<LensId> },
    Requests { lenses: Vec<LensId> },
}

/// Requests of one lens after the other, per take.
const REQUESTS: u32 = 12;

/// What a round consists of: name, tokens, bytes that must be read, and how to take it.
fn takes(args: &BenchArgs, loaded: &Loaded) -> Vec<(String, u32, u64, Take)> {
    let step = loaded.step_bytes;
    let mut takes = Vec::new();
    for &rows in &args.rows {
        let take = Take::Decode { rows, context: SHORT, lenses: Vec::new() };
        takes.push((format!("decode, {rows} rows"), rows, step, take));
    }
    if args.context > 0 {
        let take = Take::Decode { rows: 1, context: args.context, lenses: Vec::new() };
        takes.push((format!("decode, 1 row, context {}", args.context), 1, step, take));
    }
    let name = format!("prefill, {} tokens", args.prompt);
    takes.push((name, args.prompt, step, Take::Prefill { lens: None }));
    let Some((&first, &first_bytes)) = loaded.lenses.first().zip(loaded.lens_bytes.first()) else {
        return takes;
    };
    takes.push((
        "decode, 1 row with a lens".into(),
        1,
        step + first_bytes,
        Take::Decode { rows: 1, context: SHORT, lenses: vec![first] },
    ));
    takes.push((
        format!("prefill, {} tokens with a lens", args.prompt),
        args.prompt,
        step + first_bytes,
        Take::Prefill { lens: Some(first) },
    ));
    if loaded.lenses.len() > 1 {
        let all = &loaded.lenses;
        for &rows in args.rows.iter().filter(|rows| **rows > 1) {
            let used = loaded.lens_bytes.iter().take(rows as usize).sum::<u64>();
            let take = Take::Decode { rows, context: SHORT, lenses: all.clone() };
            let count = all.len().min(rows as usize);
            takes.push((format!("decode, {rows} rows, {count} lenses"), rows, step + used, take));
        }
        // Each request is a prefill of few tokens and three steps more.
        let bytes = 4 * (step + first_bytes);
        takes.push(("request, the same lens".into(), 4, bytes, Take::Requests { lenses: vec![first] }));
        takes.push(("request, lenses in turn".into(), 4, bytes, Take::Requests { lenses: all.clone() }));
    }
    takes
}

/// What a round found: bandwidths before, between and after its takes, and the takes' seconds.
type Round = (Vec<f64>, Vec<f64>);

async fn measure(args: &BenchArgs) -> Result<Report, BenchError> {
    let loaded = Loaded::load(args).await?;
    let probe = Probe::new(loaded.step_bytes)?;
    let pool = Pool::new(allowed_threads());
    let takes = takes(args, &loaded);
    // The first round warms up and is not kept.
    let mut rounds: Vec<Round> = Vec::new();
    for round in 0..=args.rounds {
        let mut seconds = Vec::new();
        let mut reads = vec![read(&probe, &pool)];
        for (.., take) in &takes {
            seconds.push(match take {
                Take::Decode { rows, context, lenses } => {
                    let steps = args.tokens;
                    loaded.decode(&Decode { rows: *rows, context: *context, lenses, steps }).await?
                }
                Take::Prefill { lens } => loaded.prefill(args.prompt, *lens).await?,
                Take::Requests { lenses } => loaded.requests(lenses, REQUESTS).await?,
            });
            reads.push(read(&probe, &pool));
        }
        if round > 0 {
            rounds.push((reads, seconds));
        }
    }
    let report = report(loaded.step_bytes, &takes, &rounds);
    loaded.shutdown().await;
    Ok(report)
}

fn measure_reads(args: &BenchArgs) -> Result<Report, BenchError> {
    let bytes = BaseFolder::open(&args.base, None)?.quantized(args.quantization).layout().bytes;
    let probe = Probe::new(bytes)?;
    let pool = Pool::new(allowed_threads());
    probe.pass(&pool);
    let rounds: Vec<Round> = (0..args.rounds).map(|_| (vec![read(&probe, &pool)], Vec::new())).collect();
    Ok(report(bytes, &[], &rounds))
}

/// Bytes per second of one pass.
fn read(probe: &Probe, pool: &Pool) -> f64 {
    let start = Instant::now();
    std::hint::black_box(probe.pass(pool));
    probe.bytes() as f64 / start.elapsed().as_secs_f64()
}

fn report(step_bytes: u64, takes: &[(String, u32, u64, Take)], rounds: &[Round]) -> Report {
    let reads = || rounds.iter().flat_map(|(reads, _)| reads).copied();
    let best = reads().fold(0.0, f64::max);
    let undisturbed = |read: &f64| *read >= UNDISTURBED * best;
    let measures = takes.iter().enumerate().map(|(i, (name, tokens, bytes, _))| {
        // A take is kept when the probes on both sides of it say that nobody else was there.
        let (kept, disturbed): (Vec<&Round>, Vec<&Round>) =
            rounds.iter().partition(|(reads, _)| reads[i..i + 2].iter().all(undisturbed));
        let of = |rounds: Vec<&Round>| rounds.iter().map(|(_, seconds)| seconds[i]).collect();
        Measure {
            name: name.clone(),
            tokens: *tokens,
            seconds: of(kept),
            disturbed_seconds: of(disturbed),
            bytes: *bytes,
        }
    });
    Report {
        instruction_set: format!("{:?}", InstructionSet::get()),
        threads: allowed_threads(),
        step_bytes,
        read_bytes_per_second: median(&reads().filter(undisturbed).collect::<Vec<_>>()),
        best_read_bytes_per_second: best,
        rounds: rounds.len(),
        measures: measures.collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_take_between_two_good_probes_is_kept() {
        let take = |name: &str| (name.to_owned(), 1, 100, Take::Prefill { lens: None });
        let rounds = [(vec![100.0, 99.0, 50.0], vec![1.0, 2.0]), (vec![40.0, 98.0, 97.0], vec![3.0, 4.0])];
        let report = report(100, &[take("one"), take("two")], &rounds);
        let seconds = |i: usize| (&report.measures[i].seconds[..], &report.measures[i].disturbed_seconds[..]);
        assert_eq!(seconds(0), (&[1.0][..], &[3.0][..]));
        assert_eq!(seconds(1), (&[4.0][..], &[2.0][..]));
        assert_eq!((report.best_read_bytes_per_second, report.read_bytes_per_second), (100.0, 98.5));
    }
}
