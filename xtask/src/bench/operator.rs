//! `cargo xtask bench operator`: the operator with thousands of groups and placements, and thousands of simulated workers, on a
//! real API server with nothing else beside it.
//!
//! The program `turret-bench-operator` (`tests/src/scale`) measures; here it is built, given an API server and told what to do.
//! What it [`found`] is held against budgets and shown ([`page`], [`plot`]).

mod found;
mod page;
mod plot;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};

use super::machine::Machine;
use super::scratch::Scratch;
use super::{command, show, write};
use crate::cluster::api_server::ApiServer;
use crate::folders;
use crate::stage::{self, Stage};
use found::Found;
use page::Page;

/// Options of `cargo xtask bench operator`.
#[derive(clap::Args, Debug)]
pub struct OperatorArguments {
    /// Groups.
    #[arg(long, default_value_t = 10_000)]
    groups: usize,
    /// Lenses of each group.
    #[arg(long, default_value_t = 20)]
    lenses: usize,
    /// Placements, each of one group.
    #[arg(long, default_value_t = 10_000)]
    placements: usize,
    /// Simulated workers, one for each of the first placements.
    #[arg(long, default_value_t = 2000)]
    workers: usize,
    /// For a quick look: only this part of the groups, placements and workers.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Cold starts, and rounds of new placements.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Placements that are new at once, in each round.
    #[arg(long, default_value_t = 200)]
    fresh: usize,
    /// How long workers tell what happens to them, seconds.
    #[arg(long, default_value_t = 30)]
    event_seconds: u64,
    /// How long groups and placements are edited, minutes.
    #[arg(long, default_value_t = 2.0)]
    churn_minutes: f64,
    /// Edits per second.
    #[arg(long, default_value_t = 20)]
    churn_per_second: u32,
    /// Print JSON, for machines.
    #[arg(long)]
    json: bool,
    /// Write the table into docs/benchmarks as well.
    #[arg(long)]
    write: bool,
}

/// The operator's user, by which its requests are found in the audit log.
const OPERATOR: &str = "turret-operator";
/// What it logs.
const LOG: &str = "operator.log";
/// What was found.
const FOUND: &str = "found.json";
/// Files that the operator and the workers may have open: each worker's stream is one on either side.
const FILES: u64 = 65_536;
/// For a run, beside its edits and what workers tell.
const LONGEST: Duration = Duration::from_secs(90 * 60);

/// Measures everything, and shows what was found.
pub(super) fn run(arguments: &OperatorArguments) -> Result<()> {
    let order = order(arguments)?;
    allow_files(order["workers"].as_u64().unwrap_or(0))?;
    let (operator, program) = stage::run("build the operator and its workers", |_| build())?;
    let scratch = Scratch::new(folders::cache()?.join("bench/operator-run"))?;
    let server = stage::run("start etcd and the API server", |_| ApiServer::start(&scratch.0))?;
    let order = with_files(order, &server, &operator, &scratch.0)?;
    let limit = LONGEST
        + Duration::from_secs(arguments.event_seconds)
        + Duration::from_secs_f64(arguments.churn_minutes * 60.0);
    let done = stage::run("measure the operator", |stage| carry_out(&program, &order, limit, stage));
    done.with_context(|| kept_log(&scratch.0))?;
    let file = scratch.0.join(FOUND);
    let text = std::fs::read_to_string(&file).context("the program wrote nothing that it found")?;
    let found: Found = serde_json::from_str(&text).context("what the program found cannot be read")?;
    let page = Page { command: command(), machine: Machine::look(), found };
    if arguments.write {
        write("operator.md", &page.markdown())?;
        if let Some(plot) = page.plot() {
            write(page::PLOT, &plot)?;
        }
    }
    show(&page.markdown(), &page.json(), arguments.json)
}

/// What the program is to do, as far as it follows from the options.
fn order(arguments: &OperatorArguments) -> Result<Value> {
    let scale = arguments.scale;
    ensure!(scale > 0.0 && scale <= 1.0, "--scale must be more than 0 and at most 1");
    let part = |all: usize| ((all as f64 * scale).round() as usize).max(1);
    let (groups, placements, workers) =
        (part(arguments.groups), part(arguments.placements), part(arguments.workers));
    ensure!(workers <= placements, "there are more --workers than --placements; each has one at most");
    ensure!(placements <= 50_000, "--placements must be at most 50000: each has a Service with an address");
    ensure!((1..=256).contains(&arguments.lenses), "--lenses must be 1 to 256");
    ensure!(arguments.rounds > 0, "--rounds must be at least 1");
    ensure!((1..=1000).contains(&arguments.fresh), "--fresh must be 1 to 1000");
    ensure!(arguments.event_seconds > 0, "--event-seconds must be at least 1");
    ensure!(arguments.churn_per_second > 0, "--churn-per-second must be at least 1");
    let churn = arguments.churn_minutes * 60.0;
    ensure!((10.0..=86_400.0).contains(&churn), "--churn-minutes must be 10 seconds to a day");
    Ok(json!({
        "groups": groups,
        "lenses": arguments.lenses,
        "placements": placements,
        "workers": workers,
        "rounds": arguments.rounds,
        "fresh": arguments.fresh,
        "eventSeconds": arguments.event_seconds,
        "churnSeconds": churn.round() as u64,
        "churnPerSecond": arguments.churn_per_second,
    }))
}

/// The same, with what it is done to.
fn with_files(mut order: Value, server: &ApiServer, operator: &Path, folder: &Path) -> Result<Value> {
    order["kubeconfig"] = json!(server.kubeconfig("turret-bench")?);
    order["operatorKubeconfig"] = json!(server.kubeconfig(OPERATOR)?);
    order["operatorUser"] = json!(OPERATOR);
    order["auditLog"] = json!(server.audit_log());
    order["operator"] = json!(operator);
    order["operatorLog"] = json!(folder.join(LOG));
    order["found"] = json!(folder.join(FOUND));
    Ok(order)
}

/// Saves what the operator logged from the end of the run, and says where it is.
fn kept_log(folder: &Path) -> String {
    let kept = || -> Result<PathBuf> {
        let logs = folders::cache()?.join("bench/logs");
        std::fs::create_dir_all(&logs)?;
        let path = logs.join(LOG);
        std::fs::copy(folder.join(LOG), &path)?;
        Ok(path)
    };
    match kept() {
        Ok(path) => format!("the operator could not be measured; what it logged is in {}", path.display()),
        Err(_) => "the operator could not be measured, and it logged nothing".into(),
    }
}

/// The operator, and the program that measures it.
fn build() -> Result<(PathBuf, PathBuf)> {
    let (operator, program) = ("turret-operator", "turret-bench-operator");
    let status =
        folders::cargo()?.args(["build", "--workspace", "--bin", operator, "--bin", program]).status()?;
    ensure!(status.success(), "cargo build failed");
    let built = folders::cargo_target()?.join("debug");
    Ok((built.join(operator), built.join(program)))
}

/// Raises the limit for this process and those that it starts.
fn allow_files(workers: u64) -> Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let most = limit.maximum.map_or(FILES, |most| most.min(FILES));
    if limit.current.is_some_and(|now| now < most) {
        setrlimit(Resource::Nofile, Rlimit { current: Some(most), ..limit })
            .context("failed to raise the limit of open files")?;
    }
    let needed = 2 * workers + 1000;
    ensure!(
        most >= needed,
        "a process may have {most} files open here, and {needed} are needed: raise `ulimit -Hn`"
    );
    Ok(())
}

/// A process that is killed when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // The operator and the workers go with it.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the program to its end, which must be a good one and come in time.
fn carry_out(program: &Path, order: &Value, limit: Duration, stage: &Stage) -> Result<()> {
    let mut command = Command::new(program);
    // Its complaints are for whoever waits.
    command.arg(order.to_string()).stdin(Stdio::null()).stdout(Stdio::piped());
    let child = command.spawn().with_context(|| format!("failed to run {}", program.display()))?;
    let mut running = Running(child);
    let lines = BufReader::new(running.0.stdout.take().expect("it is piped")).lines();
    let (sender, said) = channel();
    std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
    let began = Instant::now();
    loop {
        match said.recv_timeout(limit.saturating_sub(began.elapsed())) {
            Ok(line) => stage.note(line),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => bail!("it has not ended after {} s", limit.as_secs()),
        }
    }
    let status = running.0.wait()?;
    ensure!(status.success(), "it failed ({status}) for the reason above");
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        arguments: OperatorArguments,
    }

    fn order_of(line: &[&str]) -> Result<Value> {
        let words = std::iter::once("x").chain(line.iter().copied());
        order(&Line::try_parse_from(words).unwrap().arguments)
    }

    #[test]
    fn a_part_is_a_part_of_all_that_is_many() {
        let whole = order_of(&[]).unwrap();
        assert_eq!(
            [&whole["groups"], &whole["placements"], &whole["workers"]],
            [&json!(10_000), &json!(10_000), &json!(2000)]
        );
        let part = order_of(&["--scale", "0.1", "--churn-minutes", "0.5"]).unwrap();
        assert_eq!(
            [&part["groups"], &part["placements"], &part["workers"]],
            [&json!(1000), &json!(1000), &json!(200)]
        );
        assert_eq!((&part["lenses"], &part["churnSeconds"]), (&json!(20), &json!(30)));
    }

    #[test]
    fn what_cannot_be_measured_is_refused() {
        for line in [
            ["--scale", "0"],
            ["--scale", "2"],
            ["--workers", "10001"],
            ["--lenses", "257"],
            ["--rounds", "0"],
            ["--fresh", "0"],
            ["--event-seconds", "0"],
            ["--churn-minutes", "0"],
            ["--churn-per-second", "0"],
        ] {
            assert!(order_of(&line).is_err(), "{line:?}");
        }
    }

    fn shell(script: &str, limit: Duration) -> Result<()> {
        // The order is the first thing that the script is told, and it needs none.
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("program");
        std::fs::write(&file, format!("#!/bin/sh\n{script}\n"))?;
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
        loop {
            let done = stage::run("trying", |stage| carry_out(&file, &json!({}), limit, stage));
            // Another test may have begun a process while the script was open for writing.
            let is_busy = |error: &anyhow::Error| {
                let cause = error.root_cause().downcast_ref::<std::io::Error>();
                cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::ExecutableFileBusy)
            };
            match done {
                Err(error) if is_busy(&error) => std::thread::yield_now(),
                done => return done,
            }
        }
    }

    #[test]
    fn a_program_must_end_well_and_in_time() {
        let long = Duration::from_secs(20);
        assert!(shell("echo one; echo two", long).is_ok());
        assert!(shell("exit 3", long).unwrap_err().to_string().contains("exit status: 3"));
        assert!(shell("exec tail -f /dev/null", Duration::from_millis(50)).is_err());
    }
}
