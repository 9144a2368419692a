//! Requests wait for what is about to come, and no longer.

use std::sync::Arc;

use turret_crds::{condition::FailureReason, document::BaseKey, report::ArtifactState};
use turret_operator::gateway::Settings;

use crate::{
    fake_worker::{FakeWorker, Reply, lens, report},
    harness::{Gateway, answered, group, placement, refused},
};

async fn worker(name: &str) -> FakeWorker {
    FakeWorker::start(report(name, &[("north", "n", &["pirate"])])).await
}

#[tokio::test]
async fn a_request_waits_for_a_worker_that_starts() {
    let worker = worker("w").await;
    worker.now(|r| r.state.ready = false);
    let gateway = Gateway::over(&[&worker]).await;
    gateway.caught_up(&worker).await;
    let asking = [gateway.asking("north"), gateway.asking("pirate")];
    gateway.until("turret_gateway_held", 2.0).await;
    assert!(worker.seen().is_empty());
    worker.now(|r| r.state.ready = true);
    for asked in asking {
        assert_eq!(answered(asked.await.unwrap().unwrap()).await.0, "w");
    }
    assert_eq!(gateway.metric("turret_gateway_holds_total{end=\"LetGo\"}").await, 2.0);
    assert_eq!(gateway.metric("turret_gateway_held").await, 0.0);
}

#[tokio::test]
async fn a_request_refused_by_all_for_the_moment_goes_on_when_a_worker_changes() {
    let worker = worker("w").await;
    worker.will([Reply::Refuse(503, Some(3600))]);
    let gateway = Gateway::over(&[&worker]).await;
    let asking = gateway.asking("north");
    gateway.until("turret_gateway_held", 1.0).await;
    // Traffic alone is no reason to ask again ...
    worker.now(|r| r.state.running_rows = 3);
    gateway.caught_up(&worker).await;
    assert_eq!((worker.seen().len(), gateway.metric("turret_gateway_held").await), (1, 1.0));
    // ... a finished switch is.
    worker.now(|r| r.state.active_base = Some(BaseKey("other".into())));
    assert_eq!(answered(asking.await.unwrap().unwrap()).await.0, "w");
    assert_eq!(worker.seen().len(), 2);
}

#[tokio::test]
async fn a_lens_that_is_declared_waits_for_the_workers_to_hear_of_it() {
    let worker = worker("w").await;
    let gateway = Gateway::declared(Settings::default()).await;
    gateway.declare(&[(
        "lab",
        &[group("lab", "north", &["new", "pirate"])],
        &[placement("lab", "p", &["north"], 300)],
    )]);
    gateway.follow(&[("lab", "p", &worker)]).await;
    let asking = gateway.asking("north:new");
    gateway.until("turret_gateway_held", 1.0).await;
    assert_eq!(
        answered(gateway.ask("pirate").send().await.unwrap()).await.1,
        "north:pirate",
        "nobody else waits"
    );
    worker.now(|r| r.lenses.insert(0, lens("north", "new")));
    assert_eq!(answered(asking.await.unwrap().unwrap()).await.1, "north:new");
}

#[tokio::test]
async fn a_lens_that_is_removed_is_gone_at_once_also_for_those_who_wait() {
    let worker = worker("w").await;
    let gateway = Gateway::declared(Settings::default()).await;
    let placements = [placement("lab", "p", &["north"], 300)];
    gateway.declare(&[("lab", &[group("lab", "north", &["new", "pirate"])], &placements)]);
    gateway.follow(&[("lab", "p", &worker)]).await;
    let asking = gateway.asking("north:new");
    gateway.until("turret_gateway_held", 1.0).await;
    gateway.declare(&[("lab", &[group("lab", "north", &[])], &placements)]);
    let (status, _, code, _) = refused(asking.await.unwrap().unwrap()).await;
    assert_eq!((status, code.as_str()), (404, "model_not_found"));
    // The worker still has it, and that does not matter.
    let (status, _, _, message) = refused(gateway.ask("north:pirate").send().await.unwrap()).await;
    assert_eq!(
        (status, message.as_str()),
        (404, "the model `north:pirate` does not exist; `GET /v1/models` lists what is served")
    );
}

#[tokio::test]
async fn a_lens_that_failed_everywhere_is_refused_with_its_reason() {
    let (a, b) = (worker("a").await, worker("b").await);
    let gateway = Gateway::over(&[&a, &b]).await;
    let fail = |worker: &FakeWorker| {
        worker.now(|r| {
            Arc::make_mut(&mut r.lenses[0]).state = ArtifactState::Failed {
                reason: FailureReason::DigestMismatch,
                message: "declared sha256:1, found sha256:2".into(),
                retry_at: None,
            };
        });
    };
    fail(&a);
    gateway.caught_up(&a).await;
    assert_eq!(answered(gateway.ask("pirate").send().await.unwrap()).await.0, "b", "one still has it");
    fail(&b);
    gateway.caught_up(&b).await;
    let (status, retry_after, code, message) = refused(gateway.ask("pirate").send().await.unwrap()).await;
    assert_eq!((status, retry_after, code.as_str()), (503, None, "model_failed"));
    assert_eq!(
        message,
        "`pirate` cannot be answered now: the lens `north:pirate` cannot be served: DigestMismatch: declared sha256:1, found sha256:2"
    );
    assert_eq!(answered(gateway.ask("north").send().await.unwrap()).await.1, "north", "the base is served");
}

#[tokio::test]
async fn who_has_waited_long_enough_is_told_why() {
    let gateway = Gateway::declared(Settings::default()).await;
    let placements = [placement("lab", "p", &["north"], 1)];
    gateway.declare(&[("lab", &[group("lab", "north", &[])], &placements)]);
    let (status, retry_after, code, message) = refused(gateway.ask("north").send().await.unwrap()).await;
    assert_eq!((status, retry_after, code.as_str()), (503, Some(30), "no_worker"));
    assert_eq!(message, "`north` cannot be answered now: no worker is running for it yet (waited 1 s)");
    assert_eq!(gateway.metric("turret_gateway_holds_total{end=\"Expired\"}").await, 1.0);
    let mut none = placement("lab", "p", &["north"], 300);
    none.spec.replicas = 0;
    gateway.declare(&[("lab", &[group("lab", "north", &[])], &[none])]);
    let (status, _, code, message) = refused(gateway.ask("north").send().await.unwrap()).await;
    assert_eq!((status, code.as_str()), (503, "scaled_to_zero"), "{message}");
}

#[tokio::test]
async fn only_so_many_wait_and_who_leaves_makes_room() {
    let worker = worker("w").await;
    worker.now(|r| r.state.ready = false);
    let settings = Settings { max_held: 2, ..Settings::default() };
    let gateway = Gateway::over_with(&[&worker], settings).await;
    gateway.caught_up(&worker).await;
    let (first, second) = (gateway.asking("north"), gateway.asking("north"));
    gateway.until("turret_gateway_held", 2.0).await;
    let (status, retry_after, code, message) = refused(gateway.ask("north").send().await.unwrap()).await;
    assert_eq!((status, retry_after, code.as_str()), (429, Some(5), "gateway_full"), "{message}");
    first.abort();
    gateway.until("turret_gateway_held", 1.0).await;
    assert_eq!(gateway.metric("turret_gateway_holds_total{end=\"Cancelled\"}").await, 1.0);
    let third = gateway.asking("north");
    gateway.until("turret_gateway_held", 2.0).await;
    worker.now(|r| r.state.ready = true);
    for asked in [second, third] {
        answered(asked.await.unwrap().unwrap()).await;
    }
    assert_eq!(worker.seen().len(), 2);
}

#[tokio::test]
async fn those_who_waited_are_let_go_as_a_worker_has_room() {
    let worker = worker("w").await;
    worker.now(|r| r.state.ready = false);
    let gateway = Gateway::declared(Settings::default()).await;
    let mut narrow = placement("lab", "p", &["north"], 300);
    narrow.spec.admission.as_mut().unwrap().max_queued_requests = Some(1);
    gateway.declare(&[("lab", &[group("lab", "north", &[])], &[narrow])]);
    gateway.follow(&[("lab", "p", &worker)]).await;
    worker.will([Reply::Hang]);
    let asking = [gateway.asking("north"), gateway.asking("north"), gateway.asking("north")];
    gateway.until("turret_gateway_held", 3.0).await;
    worker.now(|r| r.state.ready = true);
    worker.arrival().await;
    gateway.caught_up(&worker).await;
    assert_eq!((worker.seen().len(), gateway.metric("turret_gateway_held").await), (1, 2.0));
    // The one that hangs is given up, and its place is taken by the next, and so on.
    let mut answers = 0;
    asking[0].abort();
    asking[1].abort();
    for asked in asking {
        if let Ok(response) = asked.await {
            answered(response.unwrap()).await;
            answers += 1;
        }
    }
    assert_eq!(answers, 1);
    assert_eq!(gateway.metric("turret_gateway_held").await, 0.0);
}

#[tokio::test]
async fn a_worker_that_does_not_take_the_token_is_not_the_clients_fault() {
    let worker = worker("w").await;
    worker.will([Reply::Refuse(401, None)]);
    let gateway = Gateway::declared(Settings::default()).await;
    gateway.declare(&[("lab", &[group("lab", "north", &[])], &[placement("lab", "p", &["north"], 300)])]);
    gateway.follow(&[("lab", "p", &worker)]).await;
    let asking = gateway.asking("north");
    gateway.until("turret_gateway_upstream_errors_total{kind=\"Token\"}", 1.0).await;
    assert_eq!(answered(asking.await.unwrap().unwrap()).await.0, "w", "a second later it is asked again");
}
