//! The order of things: fill an empty cluster, start cold again and again, and measure with the last of these operators.

use std::time::Duration;

use anyhow::{Context, Result};

use super::found::{Fill, Found};
use super::operator::Operator;
use super::order::Order;
use super::scene::Scene;
use super::writes::span_seconds;
use super::{churn, cold, events, fresh, noop, wide};

/// All is written when nothing was for so long.
const QUIET: Duration = Duration::from_secs(3);
/// For what takes a moment.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures everything. What cannot be measured is told in the end; without objects, or without an operator, there is nothing
/// to measure.
pub async fn run(order: Order) -> Result<Found> {
    say("preparing the API server");
    let mut found = Found {
        groups: order.groups,
        lenses: order.lenses,
        placements: order.placements,
        workers: order.workers,
        ..Found::default()
    };
    let scene = Scene::prepare(order).await?;
    fill(&scene, &mut found).await.context("the cluster could not be filled")?;
    let mut operator = cold_starts(&scene, &mut found).await.context("cold start")?;
    // What the process remembers from its start on says something else than what it needs later.
    found.synced_bytes = operator.usage()?.resident_bytes;

    let mut missing = Vec::new();
    say("looks that change nothing");
    found.noop = keep("looks that change nothing", noop::measure(&scene, &mut operator).await, &mut missing);
    say("what workers tell");
    found.events = keep("what workers tell", events::measure(&scene).await, &mut missing);
    say("a lens more in a large group");
    found.wide = keep("a lens more in a large group", wide::measure(&scene).await, &mut missing);
    for round in 1..=scene.order.rounds {
        say(&format!("new placements, round {round}"));
        let measured = fresh::measure(&scene, &operator, round).await;
        found.fresh.extend(keep("new placements", measured, &mut missing));
    }
    say("edits");
    found.churn = keep("edits", churn::measure(&scene, &operator).await, &mut missing);
    found.peak_bytes = operator.usage().context("the operator has ended")?.peak_bytes;
    found.complaints = scene.complaints();
    found.missing = missing;
    operator.stop().await?;
    Ok(found)
}

async fn fill(scene: &Scene, found: &mut Found) -> Result<()> {
    let patience = scene.order.patience();
    let mut operator = Operator::start(&scene.order)?;
    operator.synced(PATIENCE).await?;
    operator.until("it leads", PATIENCE, |scrape| scrape.leads()).await?;
    let mut follow = scene.follow()?;
    follow.quiet(QUIET, PATIENCE).await?;
    found.idle_bytes = operator.usage()?.resident_bytes;
    say("declaring groups and placements");
    let mut follow = scene.follow()?;
    scene.declare().await?;
    say("the operator makes what they ask for");
    follow.quiet(QUIET, patience).await?;
    let seconds = span_seconds(follow.writes()).context("the operator wrote nothing")?;
    found.fill = Fill { writes: follow.writes().count(), seconds };
    say("making pods");
    scene.make_pods().await?;
    follow.quiet(QUIET, patience).await?;
    let workers = scene.order.workers as u64;
    operator.until("it follows all workers", PATIENCE, |scrape| scrape.streams() >= workers).await?;
    scene.all_ready().await?;
    operator.stop().await
}

/// The last operator goes on.
async fn cold_starts(scene: &Scene, found: &mut Found) -> Result<Operator> {
    let mut last: Option<Operator> = None;
    for round in 1..=scene.order.rounds.max(1) {
        if let Some(before) = last.take() {
            before.stop().await?;
        }
        say(&format!("cold start, round {round}"));
        let (operator, cold) = cold::measure(scene).await?;
        found.cold.push(cold);
        last = Some(operator);
    }
    last.context("there was no round")
}

fn keep<T>(what: &str, measured: Result<T>, missing: &mut Vec<(String, String)>) -> Option<T> {
    measured.map_err(|error| missing.push((what.to_owned(), format!("{error:#}")))).ok()
}

/// What is going on, for whoever reads this program's lines.
fn say(what: &str) {
    println!("{what}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_is_told_and_does_not_keep_the_rest_from_being_measured() {
        let mut missing = Vec::new();
        assert_eq!(keep("one", Ok(1), &mut missing), Some(1));
        assert_eq!(keep::<u8>("two", Err(anyhow::anyhow!("no").context("why")), &mut missing), None);
        assert_eq!(missing, [("two".to_owned(), "why: no".to_owned())]);
    }
}
