//! The way of a request past declared lenses: the same ten lenses, in memory, are asked for at a worker that has only these and at
//! one that has thousands, take by take.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::At;
use super::clients::{Loop, closed_loop, touch};
use super::estimate::{Side, ratios};
use super::family::{Family, MOST_LENSES, Shape};
use super::worker::Worker;
use crate::stage::Stage;

/// A base of a megabyte and lenses of about 20 KB: a request is hardly anything but its way.
pub(super) const SHAPE: Shape = Shape { base_bytes: "1Mi", rank: 1, lenses: MOST_LENSES };
/// Lenses that are asked for. The last of all, which whoever goes through a list finds last.
pub(super) const HOT: usize = 10;
/// Lenses that there is room for.
pub(super) const ROOM: usize = 1000;
/// Clients at a time.
const CLIENTS: [usize; 2] = [1, 8];
/// Requests before each take, not counted: the worker has waited while the other one was asked.
const WARM_UP: usize = 64;

/// How much is measured.
pub(super) struct Effort {
    pub(super) pairs: usize,
    /// Of each take.
    pub(super) take: Duration,
}

/// What was found.
#[derive(Debug)]
pub(super) struct Found {
    /// Lenses that the larger document declares.
    pub(super) declared: usize,
    pub(super) lens_bytes: u64,
    pub(super) pairs: usize,
    /// Of each take.
    pub(super) take: Duration,
    pub(super) rows: Vec<Row>,
}

/// Pairs of takes.
#[derive(Debug)]
pub(super) struct Row {
    /// Lenses in memory of the worker that has thousands.
    pub(super) resident: usize,
    pub(super) clients: usize,
    /// The worker that has only the hot ones.
    pub(super) few: Side,
    /// The worker that has thousands.
    pub(super) many: Side,
    /// Of each pair: time per request of many, against few.
    pub(super) ratios: Vec<f64>,
}

/// Measures with both workers alive, first while only the hot lenses are in memory of the larger one, then while it is full.
pub(super) fn measure(at: &At<'_>, family: &Family, effort: &Effort, stage: &Stage) -> Result<Found> {
    let first_hot = family.lenses - HOT;
    let budget = ROOM as u64 * family.lens_bytes;
    stage.note("starting workers");
    let few = family.document(first_hot..family.lenses, budget)?;
    let few = Worker::start(at, "few", &few, HOT)?;
    let many = family.document(0..family.lenses, budget)?;
    let many = Worker::start(at, "many", &many, family.lenses)?;
    let hot = Family::models(first_hot..family.lenses);
    for worker in [&few, &many] {
        touch(&worker.client(), &hot)?;
        // The base has a prepared file too.
        worker.wait(HOT, HOT + 1)?;
    }
    let mut rows = Vec::new();
    for resident in [HOT, ROOM] {
        stage.note(format!("bringing {resident} lenses to memory"));
        touch(&many.client(), &Family::models(0..resident - HOT))?;
        many.wait(resident, resident + 1)?;
        // What was written is not on its way to the disk while something is timed.
        rustix::fs::sync();
        for clients in CLIENTS {
            stage.note(format!("{resident} lenses in memory, clients: {clients}"));
            let [few, many] = take_in_turn([&few, &many], &hot, clients, effort)?;
            let ratios = ratios(&few, &many);
            let [few, many] = [few, many].map(|takes| Side::of(&takes).expect("every take has answers"));
            rows.push(Row { resident, clients, few, many, ratios });
        }
    }
    let (declared, lens_bytes) = (family.lenses, family.lens_bytes);
    Ok(Found { declared, lens_bytes, pairs: effort.pairs, take: effort.take, rows })
}

/// Takes of both workers, pair by pair.
fn take_in_turn(
    workers: [&Worker; 2],
    models: &[String],
    clients: usize,
    effort: &Effort,
) -> Result<[Vec<Loop>; 2]> {
    let clients = workers.map(|worker| worker.clients(clients));
    let mut takes = [Vec::new(), Vec::new()];
    for pair in 0..effort.pairs {
        // Whoever is first in one pair is second in the next: a machine that slows down favours nobody.
        let order = if pair.is_multiple_of(2) { [0, 1] } else { [1, 0] };
        for side in order {
            closed_loop(&clients[side], models, &|number| number < WARM_UP)?;
            let end = Instant::now() + effort.take;
            let take = closed_loop(&clients[side], models, &|_| Instant::now() < end)?;
            ensure!(!take.answers.is_empty(), "a take had no answer: give it more --take-seconds");
            ensure!(take.hits() == take.answers.len(), "a lens that is asked for all the time was evicted");
            takes[side].push(take);
        }
    }
    Ok(takes)
}
