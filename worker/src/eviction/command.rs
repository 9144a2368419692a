//! `turret-worker simulate`: what each policy would have moved, on a trace of your own or on made-up ones.

use std::fmt::Write as _;
use std::fs::File;
use std::hint::black_box;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::time::Instant;

use turret_crds::placement::EvictionPolicy;
use turret_crds::quantity::ByteQuantity;

use super::history::{Entry, History};
use super::policy::{Ranking, Resident, choose};
use super::simulate::{
    Outcome, Setup, TooLarge, belady_bytes, pfoo_lower_bound_bytes, replay, static_top_bytes,
};
use super::trace::{self, Trace, TraceError};
use super::usage::Usage;
use super::workload::{Popularity, Sizes, Workload, budget_bytes};

/// What to replay.
#[derive(Clone, Debug, clap::Args)]
pub struct SimulateArgs {
    /// A trace, one JSON object a line. Lenses first, if they are declared:
    /// {"lens": "sql", "bytes": 20000000, "priority": 100, "group": "team-a"}; then requests, the oldest first:
    /// {"at": 0.25, "lens": "sql"}, where `at` is in seconds. The first request of a lens that was not declared has its `bytes`.
    #[arg(required_unless_present_any = ["workloads", "decisions"])]
    trace: Option<PathBuf>,
    /// Bytes for lenses, as `spec.memory.lensBudget` has it.
    #[arg(long, value_parser = parse_bytes, required_unless_present_any = ["workloads", "decisions"])]
    budget: Option<u64>,
    /// Bytes per second at which a lens is loaded.
    #[arg(long, value_parser = parse_bytes, default_value = "1G")]
    bandwidth: u64,
    /// `spec.eviction.idleSeconds`.
    #[arg(long, default_value_t = 300)]
    idle_seconds: u32,
    /// Requests that come first and are not counted.
    #[arg(long, default_value_t = 0)]
    warm_up: usize,
    /// Replay made-up traces instead: popular and less popular lenses, of equal and unequal sizes, whose popularity
    /// stays, changes, moves on, or is crossed by scans.
    #[arg(long, conflicts_with_all = ["trace", "budget"])]
    workloads: bool,
    /// Measure how long a decision takes among 1,000 lenses in memory of 10,000 that are declared.
    #[arg(long, conflicts_with_all = ["trace", "budget", "workloads"])]
    decisions: bool,
}

/// Why nothing was replayed.
#[derive(Debug, thiserror::Error)]
pub enum SimulateError {
    /// No such file.
    #[error("failed to read `{path}`")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is no trace.
    #[error("`{path}` is no trace of requests")]
    Trace {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: TraceError,
    },
    /// The budget is too small.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
}

fn parse_bytes(text: &str) -> Result<u64, String> {
    ByteQuantity(text.to_owned()).bytes().map_err(|error| error.to_string())
}

/// Replays, and prints what came of it.
pub fn run(args: &SimulateArgs) -> Result<(), SimulateError> {
    let text = match (&args.trace, args.budget) {
        (Some(path), Some(budget_bytes)) => {
            let setup = Setup {
                budget_bytes,
                bytes_per_second: args.bandwidth.max(1) as f64,
                idle_seconds: f64::from(args.idle_seconds),
                warm_up_requests: args.warm_up,
            };
            trace_table(&read(path)?, &setup)?
        }
        _ if args.decisions => decision_table(),
        _ => workload_table()?,
    };
    print!("{text}");
    Ok(())
}

fn read(path: &Path) -> Result<Trace, SimulateError> {
    let file = File::open(path).map_err(|source| SimulateError::Open { path: path.into(), source })?;
    trace::read(BufReader::new(file)).map_err(|source| SimulateError::Trace { path: path.into(), source })
}

macro_rules! line {
    ($text:expr, $($format:tt)*) => {
        writeln!($text, $($format)*).expect("writing to memory cannot fail")
    };
}

/// One trace.
fn trace_table(trace: &Trace, setup: &Setup) -> Result<String, TooLarge> {
    let mut text = String::new();
    line!(text, "| policy | hit rate | bytes moved | evictions | waited in all | waited, p99 |");
    line!(text, "|---|---|---|---|---|---|");
    for policy in EvictionPolicy::ALL {
        let outcome = replay(trace, policy, setup)?;
        let Outcome { bytes_moved, evictions, wait_seconds, p99_wait_seconds, .. } = outcome;
        let (name, hit_rate) = (written(policy), outcome.hit_rate());
        line!(
            text,
            "| {name} | {hit_rate:.4} | {bytes_moved} | {evictions} | {wait_seconds:.1} s | {p99_wait_seconds:.3} s |"
        );
    }
    line!(text, "| the most popular, told beforehand | | {} | | | |", static_top_bytes(trace, setup));
    let belady = belady_bytes(trace, setup);
    match trace.lenses.windows(2).all(|pair| pair[0].bytes == pair[1].bytes) {
        true => line!(text, "| Belady: no policy moves less | | {belady} | | | |"),
        // Farthest next use first is the optimum for equal sizes only.
        false => {
            line!(text, "| Belady, of which unequal sizes make an estimate | | {belady} | | | |");
            let least = pfoo_lower_bound_bytes(trace, setup);
            line!(text, "| PFOO-L: no policy moves less | | {least} | | | |");
        }
    }
    Ok(text)
}

/// A policy's name, as it is declared.
pub(crate) fn written(policy: EvictionPolicy) -> String {
    serde_json::to_value(policy).ok().and_then(|name| Some(name.as_str()?.to_owned())).unwrap_or_default()
}

const SECONDS_PER_REQUEST: f64 = 0.5;

/// Made-up traces.
fn workload_table() -> Result<String, TooLarge> {
    let mut text = String::new();
    line!(text, "Bytes moved, per byte of the most popular ones told beforehand / per byte of LRU.\n");
    let names: Vec<String> = EvictionPolicy::ALL.into_iter().map(written).collect();
    line!(text, "| popularity | lenses | sizes | budget | {} | Belady | PFOO-L |", names.join(" | "));
    line!(text, "|{}", "---|".repeat(4 + names.len() + 2));
    for (name, popularity, exponent) in [
        ("stationary, Zipf 0.8", Popularity::Stationary, 0.8),
        ("stationary, Zipf 1.0", Popularity::Stationary, 1.0),
        ("stationary, Zipf 1.2", Popularity::Stationary, 1.2),
        ("permuted every 2,000, Zipf 1.0", Popularity::Permuted { every: 2_000 }, 1.0),
        ("working set of every 500, uniform", Popularity::WorkingSet { every: 500, share: 0.0 }, 0.0),
        ("working set of every 500, Zipf 1.0", Popularity::WorkingSet { every: 500, share: 0.0 }, 1.0),
        ("scanned every 5,000, Zipf 1.0", Popularity::Scanned { every: 5_000 }, 1.0),
    ] {
        for lenses in [50, 200, 1_000] {
            for sizes in [Sizes::Equal, Sizes::Lognormal] {
                for share in [0.1, 0.25, 0.5] {
                    let row = workload_row(&workload(lenses, sizes, popularity, exponent, share), share)?;
                    let sizes = format!("{sizes:?}").to_lowercase();
                    line!(text, "| {name} | {lenses} | {sizes} | {:.0} % | {row} |", share * 100.0);
                }
            }
        }
    }
    Ok(text)
}

fn workload(lenses: usize, sizes: Sizes, popularity: Popularity, exponent: f64, budget: f64) -> Workload {
    let (popularity, requests) = match popularity {
        Popularity::WorkingSet { every, .. } => (Popularity::WorkingSet { every, share: budget }, 20_000),
        Popularity::Permuted { .. } => (popularity, 20_000),
        Popularity::Stationary | Popularity::Scanned { .. } => (popularity, 200 * lenses.max(100)),
    };
    let seconds_per_request = SECONDS_PER_REQUEST;
    Workload { lenses, sizes, exponent, popularity, requests, seconds_per_request, seed: 1 }
}

/// The first half of what can be learnt is not counted; of what changes, everything is.
fn workload_row(workload: &Workload, share: f64) -> Result<String, TooLarge> {
    let trace = workload.generate();
    let warm_up_requests = match workload.popularity {
        Popularity::Stationary | Popularity::Scanned { .. } => workload.requests / 2,
        Popularity::Permuted { .. } | Popularity::WorkingSet { .. } => 0,
    };
    let budget_bytes = budget_bytes(&trace.lenses, share);
    let setup = Setup { budget_bytes, bytes_per_second: 1e9, idle_seconds: 300.0, warm_up_requests };
    let mut moved = Vec::new();
    for policy in EvictionPolicy::ALL {
        moved.push(replay(&trace, policy, &setup)?.bytes_moved);
    }
    moved.extend([belady_bytes(&trace, &setup), pfoo_lower_bound_bytes(&trace, &setup)]);
    let [top, lru] = [static_top_bytes(&trace, &setup), moved[0]].map(|bytes| bytes as f64);
    let cells = moved.iter().map(|&bytes| format!("{:.2} / {:.2}", bytes as f64 / top, bytes as f64 / lru));
    Ok(cells.collect::<Vec<_>>().join(" | "))
}

const REGISTERED: usize = 10_000;
const RESIDENT: usize = 1_000;
const DECISIONS: usize = 20_000;

fn decision_table() -> String {
    let mut text = String::new();
    let (history, seconds_per_request) = history_after_requests();
    line!(text, "What is remembered of a lens takes {} bytes.", size_of::<Usage>());
    line!(text, "A request is counted in {:.2} µs on average.\n", seconds_per_request * 1e6);
    let residents: Vec<_> = (0..RESIDENT).map(|n| resident(&history, n * (REGISTERED / RESIDENT))).collect();
    line!(text, "| policy | bytes needed | lenses that leave | p50 | p99 |\n|---|---|---|---|---|");
    for policy in EvictionPolicy::ALL {
        let ranking = history.ranking(policy, 1e6);
        for needed_bytes in [20_000_000, 2_000_000_000] {
            let victims = choose(&residents, needed_bytes, &ranking).victims.len();
            let [p50, p99] = percentiles_micros(&residents, needed_bytes, &ranking);
            let (name, megabytes) = (written(policy), needed_bytes / 1_000_000);
            line!(text, "| {name} | {megabytes} MB | {victims} | {p50:.1} µs | {p99:.1} µs |");
        }
    }
    text
}

/// And the seconds that one request took.
fn history_after_requests() -> (History, f64) {
    let workload = Workload {
        lenses: REGISTERED,
        sizes: Sizes::Lognormal,
        exponent: 1.0,
        popularity: Popularity::Stationary,
        requests: 200_000,
        seconds_per_request: 0.1,
        seed: 1,
    };
    let trace = workload.generate();
    let mut history = History::new(300.0);
    for lens in &trace.lenses {
        history.register(lens.bytes, lens.bytes as f64 / 1e9, lens.priority);
    }
    let budget_bytes = trace.lenses.iter().map(|l| l.bytes).sum::<u64>() / 10;
    let start = Instant::now();
    for request in &trace.requests {
        history.served(Entry(request.lens as u32), request.at_seconds, budget_bytes);
    }
    (history, start.elapsed().as_secs_f64() / trace.requests.len() as f64)
}

fn resident(history: &History, lens: usize) -> Resident<'_, usize> {
    let usage = history.usage(Entry(lens as u32));
    Resident { key: lens, usage, group: (lens % 8) as u16, evictable: !lens.is_multiple_of(16) }
}

fn percentiles_micros(residents: &[Resident<'_, usize>], needed_bytes: u64, ranking: &Ranking) -> [f64; 2] {
    let mut micros: Vec<f64> = (0..DECISIONS)
        .map(|_| {
            let start = Instant::now();
            black_box(choose(black_box(residents), needed_bytes, ranking));
            start.elapsed().as_secs_f64() * 1e6
        })
        .collect();
    micros.sort_by(f64::total_cmp);
    [micros[DECISIONS / 2], micros[DECISIONS * 99 / 100]]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_replayed_against_every_policy_and_the_optimum() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.jsonl");
        let requests = (0..40).map(|n| format!("{{\"at\": {n}, \"lens\": \"l{}\", \"bytes\": 10}}\n", n % 3));
        std::fs::write(&path, requests.collect::<String>()).unwrap();
        let setup =
            Setup { budget_bytes: 20, bytes_per_second: 10.0, idle_seconds: 300.0, warm_up_requests: 0 };
        let table = trace_table(&read(&path).unwrap(), &setup).unwrap();
        // Three by turns in room for two: LRU never hits.
        assert!(table.contains("| LRU | 0.0000 | 400 |"), "{table}");
        assert!(table.contains("| ALRFU |") && table.contains("Belady: no policy moves less"), "{table}");
        let small = Setup { budget_bytes: 9, ..setup };
        assert!(
            trace_table(&read(&path).unwrap(), &small)
                .unwrap_err()
                .to_string()
                .contains("`l0` takes 10 bytes")
        );
        std::fs::write(&path, "{\"at\": 0, \"lens\": \"a\"}\n").unwrap();
        let error = crate::telemetry::chain(&read(&path).unwrap_err());
        assert!(error.contains("line 1"), "{error}");
    }
}
