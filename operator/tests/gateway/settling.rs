//! Requests go where the base and the lens already are.

use std::sync::Arc;

use futures::StreamExt;
use turret_crds::report::Tier;

use crate::{
    fake_worker::{FakeWorker, report},
    harness::{Gateway, answered},
};

#[tokio::test]
async fn two_workers_and_two_bases_settle_into_one_base_each() {
    let groups: [(&str, &str, &[&str]); 2] = [("north", "n", &["pirate"]), ("south", "s", &["pirate"])];
    let a = FakeWorker::switching(report("a", &groups)).await;
    let b = FakeWorker::switching(report("b", &groups)).await;
    let gateway = Gateway::over(&[&a, &b]).await;
    let models = ["north", "south:pirate", "south", "north:pirate"];
    // One after the other first: the gateway then knows of a switch only by what workers report.
    for n in 0..40 {
        answered(gateway.ask(models[n % 4]).send().await.unwrap()).await;
        gateway.caught_up(&a).await;
        gateway.caught_up(&b).await;
    }
    let gateway = &gateway;
    futures::stream::iter(0..400)
        .map(|n| async move { answered(gateway.ask(models[n % 4]).send().await.unwrap()).await })
        .buffer_unordered(16)
        .collect::<Vec<_>>()
        .await;
    assert_eq!(a.report().state.switches + b.report().state.switches, 1, "one of them switched, once");
    assert_ne!(a.report().state.active_base, b.report().state.active_base);
    assert!(!a.seen().is_empty() && !b.seen().is_empty());
}

#[tokio::test]
async fn a_burst_over_a_base_that_nobody_has_makes_one_worker_switch() {
    let groups: [(&str, &str, &[&str]); 2] = [("north", "n", &[]), ("south", "s", &[])];
    let a = FakeWorker::switching(report("a", &groups)).await;
    let b = FakeWorker::switching(report("b", &groups)).await;
    let gateway = &Gateway::over(&[&a, &b]).await;
    futures::stream::iter(0..64)
        .map(|_| async move { answered(gateway.ask("south").send().await.unwrap()).await })
        .buffer_unordered(64)
        .collect::<Vec<_>>()
        .await;
    assert_eq!(a.report().state.switches + b.report().state.switches, 1);
}

#[tokio::test]
async fn the_worker_that_holds_the_lens_answers() {
    let groups: [(&str, &str, &[&str]); 1] = [("north", "n", &["pirate", "terse"])];
    let workers =
        [FakeWorker::start(report("a", &groups)).await, FakeWorker::start(report("b", &groups)).await];
    let gateway = Gateway::over(&[&workers[0], &workers[1]]).await;
    for (at, name) in ["a", "b", "a"].iter().enumerate() {
        for worker in &workers {
            worker.now(|r| {
                Arc::make_mut(&mut r.lenses[0]).tier =
                    if worker.name == *name { Tier::Device } else { Tier::Disk }
            });
            gateway.caught_up(worker).await;
        }
        let answer = answered(gateway.ask("pirate").send().await.unwrap()).await;
        assert_eq!(answer.0, *name, "turn {at}");
    }
}
