//! Working sets of one to ten times the memory for lenses: what is served of what the bytes that move allow.
//!
//! Every line has a worker of its own, which knows nothing of earlier requests, over files that were prepared before. Beside its
//! working set it has a few other lenses: with these is measured, just before, what a request takes while everything is in memory,
//! and how fast lenses are loaded while nothing else runs.

use anyhow::{Context, Result, ensure};

use super::At;
use super::clients::{Client, closed_loop, touch};
use super::estimate::{Served, loading_rate};
use super::family::{Family, Shape};
use super::stream::Stream;
use super::worker::{Worker, moved_bytes};
use crate::stage::Stage;

/// Lenses that there is room for.
pub(super) const ROOM: usize = 16;
/// Sizes of working sets, in budgets.
pub(super) const FACTORS: [usize; 5] = [1, 2, 3, 5, 10];
/// Clients at a time.
pub(super) const CLIENTS: [usize; 2] = [1, 8];
/// Lenses beside the working set. They fit into the budget together.
const PROBES: usize = 8;
/// The largest working set, and the probes behind it.
const LENSES: usize = FACTORS[FACTORS.len() - 1] * ROOM + PROBES;
/// A base of 32 MB and lenses of 8 MB: a request takes no longer than loading a lens.
pub(super) const SHAPE: Shape = Shape { base_bytes: "32Mi", rank: 48, lenses: LENSES };
/// Times that each probe is loaded.
const PROBE_LOADS: usize = 2;
/// Requests for probes in memory.
const RESIDENT_REQUESTS: usize = 400;
/// Requests of a stream that come first and are not counted: until then the policy knows little.
const WARM_UP: usize = 200;
/// Of the streams.
const SEED: u64 = 1;

/// What was found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) lens_bytes: u64,
    pub(super) rows: Vec<Row>,
}

/// A working set that was served.
#[derive(Debug)]
pub(super) struct Row {
    /// Its size, in budgets.
    pub(super) factor: usize,
    pub(super) stream: Stream,
    pub(super) clients: usize,
    pub(super) served: Served,
}

/// Serves `requests` of every stream over every working set.
pub(super) fn measure(at: &At<'_>, family: &Family, requests: usize, stage: &Stage) -> Result<Found> {
    stage.note("preparing lenses");
    prepare(at, family)?;
    let mut rows = Vec::new();
    for factor in FACTORS {
        for stream in Stream::ALL {
            for clients in CLIENTS {
                stage.note(format!("{factor} × the budget, {}, clients: {clients}", stream.name()));
                let served = serve(at, family, &Asked { factor, stream, clients, requests })?;
                rows.push(Row { factor, stream, clients, served });
            }
        }
    }
    Ok(Found { lens_bytes: family.lens_bytes, rows })
}

/// Name of the workers, which come one after the other and share what is prepared.
const NAME: &str = "sets";

/// Has a worker with room for all of them write the prepared file of every lens: one that leaves soon after it came may never get
/// one.
fn prepare(at: &At<'_>, family: &Family) -> Result<()> {
    let budget = family.lenses as u64 * family.lens_bytes;
    let worker = Worker::start(at, NAME, &family.document(0..family.lenses, budget)?, family.lenses)?;
    touch(&worker.client(), &Family::models(0..family.lenses))?;
    // The base has a prepared file too.
    worker.wait(family.lenses, family.lenses + 1)?;
    // What was written is not on its way to the disk while something is timed.
    rustix::fs::sync();
    Ok(())
}

/// What is asked of one worker.
struct Asked {
    factor: usize,
    stream: Stream,
    clients: usize,
    requests: usize,
}

fn serve(at: &At<'_>, family: &Family, asked: &Asked) -> Result<Served> {
    let set = asked.factor * ROOM;
    let probes = family.lenses - PROBES..family.lenses;
    let document = family.document((0..set).chain(probes.clone()), ROOM as u64 * family.lens_bytes)?;
    let worker = Worker::start(at, NAME, &document, set + PROBES)?;
    let clients = worker.clients(asked.clients);
    let (resident_seconds, bytes_per_second) =
        probe(&worker, &clients, &Family::models(probes), family.lens_bytes)?;

    touch(&clients[0], &Family::models(0..set))?;
    let stream = Family::models(asked.stream.requests(set, WARM_UP + asked.requests, SEED));
    let (warm_up, counted) = stream.split_at(WARM_UP);
    closed_loop(&clients, warm_up, &|number| number < warm_up.len())?;
    let before = moved_bytes(&worker.report()?);
    let found = closed_loop(&clients, counted, &|number| number < counted.len())?;
    let moved_bytes = moved_bytes(&worker.report()?) - before;
    Ok(Served {
        requests: found.answers.len(),
        hits: found.hits(),
        seconds: found.seconds,
        moved_bytes,
        resident_seconds,
        bytes_per_second,
    })
}

/// Seconds per request while all lenses are in memory, and bytes per second of a load. Nothing of it stays in memory.
fn probe(worker: &Worker, clients: &[Client], probes: &[String], lens_bytes: u64) -> Result<(f64, f64)> {
    touch(&clients[0], probes)?;
    let mut loads = Vec::new();
    for model in probes.iter().cycle().take(probes.len() * PROBE_LOADS) {
        worker.evict(model)?;
        let answer = clients[0].ask(model)?;
        loads.push(answer.load_seconds.with_context(|| format!("`{model}` was evicted and not loaded"))?);
    }
    let bytes_per_second = loading_rate(lens_bytes, loads).context("loads took no time")?;
    let resident = closed_loop(clients, probes, &|number| number < RESIDENT_REQUESTS)?;
    ensure!(resident.hits() == resident.answers.len(), "a probe was evicted although there is room for all");
    probes.iter().try_for_each(|model| worker.evict(model))?;
    Ok((resident.seconds_per_request(), bytes_per_second))
}
