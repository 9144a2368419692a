//! Another worker answers, but only while the client has seen nothing yet.

use bytes::Bytes;
use futures::StreamExt;

use crate::{
    fake_worker::{FakeWorker, Reply, report},
    harness::{Gateway, answered, refused},
};

async fn workers(count: usize) -> Vec<FakeWorker> {
    let mut workers = Vec::new();
    for n in 0..count {
        workers.push(FakeWorker::start(report(&format!("w{n}"), &[("north", "n", &[])])).await);
    }
    workers
}

/// Gives every worker the same script; exactly one answers in the end.
fn all_but_one_will(workers: &[FakeWorker], reply: fn() -> Reply) {
    for worker in workers {
        worker.will([reply()]);
    }
}

#[tokio::test]
async fn a_worker_that_cannot_be_reached_is_passed_over() {
    let deaf = FakeWorker::without_data_port(report("deaf", &[("north", "n", &[])])).await;
    // Busy, so that the deaf one is asked first.
    let good = FakeWorker::start(report("good", &[("north", "n", &[])])).await;
    good.now(|r| r.state.running_rows = 5);
    let gateway = Gateway::over(&[&deaf, &good]).await;
    gateway.caught_up(&good).await;
    let response = gateway.ask("north").send().await.unwrap();
    assert_eq!(answered(response).await.0, "good");
    assert_eq!(gateway.metric("turret_gateway_retries_total").await, 1.0);
    assert_eq!(gateway.metric("turret_gateway_upstream_errors_total{kind=\"Unreachable\"}").await, 1.0);
}

#[tokio::test]
async fn a_worker_that_refuses_is_passed_over() {
    for reply in [
        || Reply::Refuse(503, Some(30)),
        || Reply::Refuse(503, None),
        || Reply::Refuse(429, Some(1)),
        || Reply::Break,
    ] {
        let workers = workers(2).await;
        // The one that is asked first refuses; the other has an empty script when its turn comes.
        workers[0].will([reply()]);
        workers[1].now(|r| r.state.running_rows = 5);
        let gateway = Gateway::over(&[&workers[0], &workers[1]]).await;
        gateway.caught_up(&workers[1]).await;
        let response = gateway.ask("north").send().await.unwrap();
        assert_eq!(answered(response).await.0, "w1");
        assert_eq!(workers[0].seen().len(), 1);
        assert_eq!(workers[0].seen()[0].body, workers[1].seen()[0].body);
        gateway.until("turret_gateway_in_flight", 0.0).await;
    }
}

#[tokio::test]
async fn nothing_is_sent_again_after_the_first_byte() {
    let workers = workers(2).await;
    let senders = [workers[0].will_stream(), workers[1].will_stream()];
    let gateway = Gateway::over(&[&workers[0], &workers[1]]).await;
    let asking = gateway.asking("north");
    let (first, at) = tokio::select! {
        () = workers[0].arrival() => (&senders[0], 0),
        () = workers[1].arrival() => (&senders[1], 1),
    };
    first.send(Ok(Bytes::from("data: {\"half\":"))).await.unwrap();
    let response = asking.await.unwrap().unwrap();
    let mut body = response.bytes_stream();
    assert_eq!(body.next().await.unwrap().unwrap(), "data: {\"half\":");
    first.send(Err(std::io::Error::other("gone"))).await.unwrap();
    let told = body.next().await.unwrap().unwrap();
    let told = std::str::from_utf8(&told).unwrap();
    assert!(told.starts_with("\n\ndata: {\"error\":{"), "{told}");
    assert!(told.contains("broke off in the middle") && told.ends_with("\n\n"), "{told}");
    assert!(body.next().await.unwrap().is_err(), "half an answer must not look whole");
    assert!(workers[1 - at].seen().is_empty());
    assert_eq!(gateway.metric("turret_gateway_upstream_errors_total{kind=\"BrokenMidway\"}").await, 1.0);
    gateway.until("turret_gateway_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_request_that_breaks_workers_does_not_meet_all_of_them() {
    let workers = workers(5).await;
    all_but_one_will(&workers, || Reply::Break);
    let gateway = Gateway::over(&workers.iter().collect::<Vec<_>>()).await;
    let (status, _, code, message) = refused(gateway.ask("north").send().await.unwrap()).await;
    assert_eq!((status, code.as_str()), (502, "worker_lost"), "{message}");
    assert_eq!(workers.iter().map(|w| w.seen().len()).sum::<usize>(), 3);
}

#[tokio::test]
async fn full_queues_everywhere_are_told_to_the_client_in_the_workers_words() {
    let workers = workers(2).await;
    all_but_one_will(&workers, || Reply::Refuse(429, Some(7)));
    let gateway = Gateway::over(&[&workers[0], &workers[1]]).await;
    let response = gateway.ask("north").send().await.unwrap();
    assert_eq!(
        (response.status().as_u16(), &response.headers()["retry-after"]),
        (429, &"7".parse().unwrap())
    );
    assert!(response.text().await.unwrap().contains("says no"));
    assert_eq!(workers[0].seen().len() + workers[1].seen().len(), 2, "each was asked once");
}

#[tokio::test]
async fn a_refusal_for_good_is_passed_on() {
    let workers = workers(1).await;
    workers[0].will([Reply::Refuse(503, None), Reply::Refuse(400, None), Reply::Refuse(500, None)]);
    let gateway = Gateway::over(&[&workers[0]]).await;
    for status in [503, 400, 500] {
        let response = gateway.ask("north").send().await.unwrap();
        assert_eq!(response.status().as_u16(), status);
        assert!(response.text().await.unwrap().contains("w0 says no"));
    }
}
