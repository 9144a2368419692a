//! Cold start: from the start of the process until it knows all, has looked at all, and is quiet.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use super::found::Cold;
use super::numbers::settled;
use super::operator::Operator;
use super::order::Order;
use super::scene::Scene;

/// Quiet is what stays so for this long, seconds.
const QUIET_SECONDS: f64 = 1.0;
/// Placements are looked at once in so many seconds although nothing happens.
const PLACEMENTS_EVERY: f64 = 60.0;
/// Groups too.
const GROUPS_EVERY: f64 = 300.0;
/// How long to wait between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(20);

/// Lists everything, and starts an operator just after. It goes on.
pub async fn measure(scene: &Scene) -> Result<(Operator, Cold)> {
    let order = &scene.order;
    let (objects, list_seconds) = scene.list_all().await?;
    let began = Instant::now();
    let mut operator = Operator::start(order)?;
    operator.synced(order.patience()).await?;
    let synced_seconds = began.elapsed().as_secs_f64();
    let mut samples = Vec::new();
    let mut all_since = None;
    let quiet_seconds = loop {
        let scrape = operator.scrape().await?;
        let at = began.elapsed().as_secs_f64();
        samples.push((at, scrape.looks()));
        let has_all = scrape.looks_at_groups() >= order.groups as u64
            && scrape.looks_at_placements() >= order.placements as u64
            && scrape.streams() >= order.workers as u64;
        if has_all {
            let since: f64 = *all_since.get_or_insert(at);
            if let Some(quiet) = settled(&samples, regular_looks_per_second(order), QUIET_SECONDS) {
                break quiet.max(since);
            }
        }
        ensure!(
            began.elapsed() < order.patience(),
            "a cold start is not quiet after {} s: {} looks, {} of {} streams",
            began.elapsed().as_secs(),
            scrape.looks(),
            scrape.streams(),
            order.workers
        );
        tokio::time::sleep(BETWEEN_LOOKS).await;
    };
    let cpu_seconds = operator.usage()?.cpu_seconds;
    Ok((operator, Cold { objects, list_seconds, synced_seconds, quiet_seconds, cpu_seconds }))
}

/// What it looks at anyway, and half as much again.
fn regular_looks_per_second(order: &Order) -> f64 {
    let regular = order.placements as f64 / PLACEMENTS_EVERY + order.groups as f64 / GROUPS_EVERY;
    (1.5 * regular).max(5.0)
}
