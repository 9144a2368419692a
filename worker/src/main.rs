//! `turret-worker`: serves a base and its lenses; asks one by hand; looks into model folders; makes synthetic ones.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use turret_crds::label;
use turret_worker::config::{Cli, Command, ServeArgs};
use turret_worker::serve::{ServeError, serve};
use turret_worker::telemetry::{self, chain};
use turret_worker::{bench, control, eviction, inspect, synth};

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => run(*args),
        Command::Bench(args) => said(bench::run(&args)),
        Command::Control(args) => said(control::run(&args)),
        Command::Inspect(args) => said(inspect::run(&args)),
        Command::Simulate(args) => said(eviction::command::run(&args)),
        Command::Synth(args) => said(synth::run(&args)),
        Command::Metrics => {
            print!("{}", turret_worker::metrics::Metrics::reference());
            ExitCode::SUCCESS
        }
    }
}

/// How long work on the disk may go on when everything else has ended.
const LAST_WORK: Duration = Duration::from_secs(1);

fn run(args: ServeArgs) -> ExitCode {
    let log = telemetry::start(args.log_json);
    // ring is the one TLS provider; this fails only when it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return said(Err(error)),
    };
    let served = runtime.block_on(serve(args, log));
    // Whatever still writes to the disk is not waited for: what it leaves is half and known to be.
    runtime.shutdown_timeout(LAST_WORK);
    match served {
        Ok(()) => ExitCode::SUCCESS,
        // The operator shows the last line of the log, so the reason is one line and comes last.
        Err(error) => {
            tracing::error!("{}", chain(&error));
            match error {
                ServeError::Device(_) => ExitCode::from(label::EXIT_DEVICE as u8),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// A command's end: nothing, or one line that says what went wrong.
fn said<E: std::error::Error>(result: Result<(), E>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}
