//! Workers tell what happens to them. Nearly all of it moves with traffic and concerns no condition; now and then a lens cannot be
//! served any more, or can again, and the statuses of its placement and of its group must say so.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use turret_crds::WorkerReport;
use turret_crds::condition::FailureReason;
use turret_crds::report::ArtifactState;

use super::found::Events;
use super::layout;
use super::numbers::percentile;
use super::scene::Scene;
use crate::cluster::audit::Request;

/// What workers tell, a second.
const PER_SECOND: u32 = 500;
/// One of so many changes conditions.
const FLIP_EVERY: usize = 100;
/// All is written when nothing was for so long.
const QUIET: Duration = Duration::from_millis(1500);

/// A worker told something that changes conditions.
#[derive(Clone, Debug)]
struct Flip {
    placement: String,
    group: String,
    at: Timestamp,
}

/// Measures it with an operator that is quiet.
pub async fn measure(scene: &Scene) -> Result<Events> {
    let order = &scene.order;
    let mut workers = scene.workers();
    workers.retain(|worker| group_of(layout::placement_of(worker.name()), order.groups).is_some());
    ensure!(!workers.is_empty(), "without workers nobody tells anything");
    let seconds = order.event_seconds;
    let mut follow = scene.follow()?;
    let mut ticks = tokio::time::interval(Duration::from_secs(1) / PER_SECOND);
    let mut flips: Vec<Flip> = Vec::new();
    for number in 0..usize::try_from(seconds)? * PER_SECOND as usize {
        ticks.tick().await;
        if number % FLIP_EVERY == 0 {
            let worker = &workers[flips.len() % workers.len()];
            let placement = layout::placement_of(worker.name()).to_owned();
            let group = group_of(&placement, order.groups).context("the worker is of no known group")?;
            flips.push(Flip { placement, group, at: Timestamp::now() });
            worker.change(break_or_mend);
        } else {
            workers[number % workers.len()].change(|report| report.state.running_rows ^= 1);
        }
    }
    let end = Timestamp::now();
    follow.quiet(QUIET, order.patience()).await?;
    let mut found = look(&flips, &follow.seen, end);
    found.latencies.sort_by(f64::total_cmp);
    let millis = |share: f64| percentile(&found.latencies, share).unwrap_or_default() * 1e3;
    let events = Events {
        per_second: PER_SECOND,
        seconds,
        flips: flips.len(),
        unanswered: found.unanswered,
        p50_millis: millis(0.5),
        p90_millis: millis(0.9),
        p99_millis: millis(0.99),
        most_millis: millis(1.0),
        writes: follow.writes().count(),
    };
    for worker in &workers {
        worker.change(mend);
    }
    follow.quiet(QUIET, order.patience()).await?;
    Ok(events)
}

/// The group of one of the many placements.
fn group_of(placement: &str, groups: usize) -> Option<String> {
    let number = placement.strip_prefix("p-")?.parse::<usize>().ok()?;
    Some(layout::group_name(layout::group_of(number, groups)))
}

fn break_or_mend(report: &mut WorkerReport) {
    if let Some(lens) = report.lenses.first_mut() {
        let lens = Arc::make_mut(lens);
        lens.state = match lens.state {
            ArtifactState::Failed { .. } => ArtifactState::Ready,
            _ => ArtifactState::Failed {
                reason: FailureReason::DigestMismatch,
                message: "other files than were declared".into(),
                retry_at: None,
            },
        };
    }
}

fn mend(report: &mut WorkerReport) {
    let is_broken = |report: &WorkerReport| {
        report.lenses.first().is_some_and(|lens| matches!(lens.state, ArtifactState::Failed { .. }))
    };
    if is_broken(report) {
        break_or_mend(report);
    }
}

/// How soon patches followed.
#[derive(Debug, Default, PartialEq)]
struct Followed {
    /// Of each flip and each of both objects, seconds. Of one that was not followed: as long as there was time.
    latencies: Vec<f64>,
    unanswered: usize,
}

/// Each flip with the first patches of both statuses after it. Pure.
fn look(flips: &[Flip], requests: &[Request], end: Timestamp) -> Followed {
    let mut patched: BTreeMap<(&str, &str), BTreeSet<Timestamp>> = BTreeMap::new();
    for request in requests.iter().filter(|r| r.is_write() && r.object_ref.subresource == "status") {
        let key = (request.object_ref.resource.as_str(), request.object_ref.name.as_str());
        patched
            .entry(key)
            .or_default()
            .extend(request.request_received_timestamp.as_ref().map(|time| time.0));
    }
    let mut followed = Followed::default();
    for (number, flip) in flips.iter().enumerate() {
        // What comes after the next one of the same worker is no answer to this one.
        let next = flips[number + 1..].iter().find(|other| other.placement == flip.placement);
        let objects = [("modelplacements", flip.placement.as_str()), ("modelgroups", flip.group.as_str())];
        for key in objects {
            let first = patched.get(&key).and_then(|times| times.range(flip.at..).next());
            let in_time = first.filter(|first| next.is_none_or(|next| **first < next.at));
            followed.unanswered += usize::from(in_time.is_none());
            let until = in_time.copied().unwrap_or_else(|| next.map_or(end, |next| next.at));
            followed.latencies.push(until.duration_since(flip.at).as_secs_f64());
        }
    }
    followed
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millisecond(1_700_000_000_000 + millis).unwrap()
    }

    fn patch(resource: &str, name: &str, millis: i64) -> Request {
        serde_json::from_value(json!({
            "verb": "patch",
            "objectRef": {"resource": resource, "subresource": "status", "name": name},
            "requestReceivedTimestamp": at(millis).to_string(),
        }))
        .unwrap()
    }

    fn flip(placement: &str, group: &str, millis: i64) -> Flip {
        Flip { placement: placement.into(), group: group.into(), at: at(millis) }
    }

    #[test]
    fn a_flip_is_answered_by_the_first_patch_of_each_object_after_it() {
        let requests = [
            patch("modelplacements", "p", 5),
            patch("modelplacements", "p", 14),
            patch("modelplacements", "p", 18),
            patch("modelgroups", "g", 20),
            patch("modelgroups", "other", 11),
        ];
        let followed = look(&[flip("p", "g", 10)], &requests, at(500));
        assert_eq!(followed, Followed { latencies: vec![0.004, 0.010], unanswered: 0 });
    }

    #[test]
    fn what_is_not_answered_counts_as_long_as_there_was_time() {
        let requests = [patch("modelplacements", "p", 14), patch("modelgroups", "g", 14)];
        let flips = [flip("p", "g", 10), flip("q", "h", 20), flip("p", "g", 60)];
        let followed = look(&flips, &requests, at(100));
        assert_eq!(followed.unanswered, 4);
        assert_eq!(followed.latencies, [0.004, 0.004, 0.080, 0.080, 0.040, 0.040]);
        // A patch after the next flip is no answer to the first.
        let late = [patch("modelplacements", "p", 70), patch("modelgroups", "g", 30)];
        let followed = look(&[flip("p", "g", 10), flip("p", "g", 60)], &late, at(100));
        assert_eq!((followed.latencies[0], followed.latencies[1]), (0.050, 0.020));
        assert_eq!(followed.unanswered, 2);
    }

    #[test]
    fn a_lens_breaks_and_is_mended() {
        use crate::faults::worker::report;
        use crate::worker::document::Family;
        let mut family = Family::default().group("g", "file:///base").lens("g", "a", "file:///a");
        let first = report("w", &family.document());
        let mut now = first.clone();
        break_or_mend(&mut now);
        assert!(!now.lenses[0].state.is_ready());
        mend(&mut now);
        assert_eq!(now, first);
        mend(&mut now);
        assert_eq!(now, first);
        assert_eq!(group_of("p-00013", 10).as_deref(), Some("g-00003"));
        assert_eq!(group_of("wide", 10), None);
    }
}
