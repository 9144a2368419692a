//! Looks that change nothing: every worker tells at the same moment that the digest of a lens is known, or is not. No status
//! shows that, so every placement with workers and its group are looked at, and nothing is written.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use turret_crds::WorkerReport;

use super::found::{Burst, Noop};
use super::operator::Operator;
use super::scene::Scene;

/// Bursts, one after another.
const BURSTS: usize = 9;
/// For one of them.
const PATIENCE: Duration = Duration::from_secs(60);

/// Measures it with an operator that is quiet.
pub async fn measure(scene: &Scene, operator: &mut Operator) -> Result<Noop> {
    let workers = scene.workers();
    ensure!(!workers.is_empty(), "without workers nobody tells anything");
    let groups = scene.order.groups.min(workers.len());
    let expected = (workers.len() + groups) as u64;
    let mut follow = scene.follow()?;
    let mut bursts = Vec::new();
    for _ in 0..BURSTS {
        let (before, used) = (operator.scrape().await?.looks(), operator.usage()?.cpu_seconds);
        let began = Instant::now();
        for worker in &workers {
            worker.change(know_or_forget);
        }
        let what = format!("{expected} looks follow what workers tell");
        let after = operator.until(&what, PATIENCE, |scrape| scrape.looks() >= before + expected).await?;
        bursts.push(Burst {
            looks: after.looks() - before,
            seconds: began.elapsed().as_secs_f64(),
            cpu_seconds: operator.usage()?.cpu_seconds - used,
        });
    }
    follow.look()?;
    Ok(Noop { bursts, requests: follow.seen.iter().map(ToString::to_string).collect() })
}

fn know_or_forget(report: &mut WorkerReport) {
    if let Some(lens) = report.lenses.first_mut() {
        let lens = Arc::make_mut(lens);
        lens.digest = match lens.digest {
            None => Some("sha256:known".into()),
            Some(_) => None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::faults::worker::report;
    use crate::worker::document::Family;

    #[test]
    fn a_digest_comes_and_goes_and_nothing_else_changes() {
        let mut family = Family::default().group("g", "file:///base").lens("g", "a", "file:///a");
        let first = report("w", &family.document());
        let mut now = first.clone();
        know_or_forget(&mut now);
        assert_eq!(now.lenses[0].digest.as_deref(), Some("sha256:known"));
        know_or_forget(&mut now);
        assert_eq!(now, first);
    }
}
