//! `cargo xtask bench residency`: what many lenses cost. Choosing who leaves, the way of a request past thousands of declared
//! lenses, and working sets larger than the memory for lenses.
//!
//! Lenses are synthesised once ([`family`]). They are served by real processes ([`worker`]) and asked for over HTTP
//! ([`clients`]): see [`path`] and [`sets`]. Decisions are timed by the worker's own program ([`decisions`]). What is made of
//! all answers is pure ([`estimate`]), and [`page`] shows it.

mod clients;
mod decisions;
mod estimate;
mod family;
mod page;
mod path;
mod sets;
mod stream;
mod worker;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::machine::Machine;
use super::scratch::Scratch;
use super::{build_worker, command, show, write};
use crate::folders;
use crate::stage;
use family::Family;
use page::Page;

/// Options of `cargo xtask bench residency`.
#[derive(clap::Args, Debug)]
pub struct ResidencyArguments {
    /// Pairs of takes of the request path, for each line of it.
    #[arg(long, default_value_t = 9)]
    pairs: usize,
    /// How long a take of the request path lasts, seconds.
    #[arg(long, default_value_t = 2.0)]
    take_seconds: f64,
    /// Requests that are counted of each working set.
    #[arg(long, default_value_t = 1000)]
    requests: usize,
    /// Print JSON, for machines.
    #[arg(long)]
    json: bool,
    /// Write the table into docs/benchmarks as well.
    #[arg(long)]
    write: bool,
}

/// Measures everything, and shows what was found.
pub(super) fn run(arguments: &ResidencyArguments) -> Result<()> {
    ensure!(arguments.pairs > 0, "--pairs must be at least 1");
    ensure!(arguments.requests > 0, "--requests must be at least 1");
    let take = Duration::try_from_secs_f64(arguments.take_seconds).context("--take-seconds is no time")?;
    ensure!(!take.is_zero(), "--take-seconds must be more than 0");
    let program = stage::run("build turret-worker", |_| build_worker())?;
    let folder = folders::cache()?.join("bench");
    let small = Family::make(&program, &folder, &path::SHAPE)?;
    let large = Family::make(&program, &folder, &sets::SHAPE)?;
    let scratch = Scratch::new(folder.join("residency-run"))?;

    let decisions = stage::run("time decisions", |_| decisions::measure(&program))?;
    let at = At { program: &program, folder: &scratch.0 };
    let path = stage::run("time requests past declared lenses", |stage| {
        path::measure(&at, &small, &path::Effort { pairs: arguments.pairs, take }, stage)
    })?;
    let sets =
        stage::run("serve working sets", |stage| sets::measure(&at, &large, arguments.requests, stage))?;
    let page = Page { command: command(), machine: Machine::look(), decisions, path, sets };
    if arguments.write {
        write("residency-cpu.md", &page.markdown())?;
    }
    show(&page.markdown(), &page.json(), arguments.json)
}

/// What workers are started from, and where.
struct At<'a> {
    /// `turret-worker`.
    program: &'a Path,
    /// Each worker has a folder of its own below.
    folder: &'a Path,
}
