//! What goes through goes through unchanged, and a client that leaves is noticed.

use bytes::Bytes;
use futures::StreamExt;
use turret_operator::gateway::Settings;

use crate::{
    fake_worker::{FakeWorker, Reply, TOKEN, report},
    harness::{Gateway, PATIENCE, answered, refused},
};

async fn worker() -> FakeWorker {
    FakeWorker::start(report("w", &[("north", "n", &["pirate"])])).await
}

#[tokio::test]
async fn a_request_arrives_to_the_byte_under_the_gateways_name() {
    let worker = worker().await;
    let gateway = Gateway::over(&[&worker]).await;
    let body = format!(
        "{{ \"x\" : \"\\u00e9 {}\",\n\t\"model\":\"pirate\", \"n\": 1.0e2 }} \n",
        "long ".repeat(100_000)
    );
    let response = gateway
        .post("/v1/completions", body.clone())
        .header("x-request-id", "mine-7")
        .header("x-turret-model", "north:stolen")
        .header("traceparent", "00-11-22-01")
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-turret-worker"], "w");
    assert_eq!(response.headers()["x-request-id"], "mine-7");
    assert_eq!(answered(response).await, ("w".into(), "north:pirate".into()));
    let seen = worker.seen().remove(0);
    assert_eq!((seen.path.as_str(), &seen.body[..]), ("/v1/completions", body.as_bytes()));
    assert_eq!(seen.headers["authorization"], format!("Bearer {TOKEN}"));
    assert_eq!(seen.headers["x-turret-model"], "north:pirate");
    assert_eq!(seen.headers["x-request-id"], "mine-7");
    assert_eq!(seen.headers["traceparent"], "00-11-22-01");
    let unnamed = gateway.ask("north").send().await.unwrap();
    assert_eq!(unnamed.headers()["x-request-id"].len(), 36);
}

#[tokio::test]
async fn a_stream_passes_through_untouched_and_at_once() {
    let worker = worker().await;
    let gateway = Gateway::over(&[&worker]).await;
    let sender = worker.will_stream();
    let asking = gateway.asking("north");
    worker.arrival().await;
    let events = ["data: {\"a\":1}\n\n", ": comment\r\n\r\ndata: par", "tly\n\n", "data: [DONE]\n\n"];
    sender.send(Ok(Bytes::from(events[0]))).await.unwrap();
    let response = asking.await.unwrap().unwrap();
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    assert!(!response.headers().contains_key("keep-alive"), "a header of the other connection");
    let mut body = response.bytes_stream();
    // Each event is there before the next one is made.
    assert_eq!(body.next().await.unwrap().unwrap(), events[0]);
    for event in &events[1..] {
        sender.send(Ok(Bytes::from(*event))).await.unwrap();
        assert_eq!(body.next().await.unwrap().unwrap(), *event);
    }
    drop(sender);
    assert!(body.next().await.is_none());
    gateway.until("turret_gateway_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_before_the_answer_cancels_the_work() {
    let worker = worker().await;
    let gateway = Gateway::over(&[&worker]).await;
    worker.will([Reply::Hang]);
    let asking = gateway.asking("north");
    worker.arrival().await;
    assert_eq!(gateway.metric("turret_gateway_in_flight").await, 1.0);
    asking.abort();
    tokio::time::timeout(PATIENCE, worker.cancellation()).await.expect("the worker notices");
    gateway.until("turret_gateway_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_client_that_leaves_in_mid_stream_cancels_the_work() {
    let worker = worker().await;
    let gateway = Gateway::over(&[&worker]).await;
    let sender = worker.will_stream();
    let asking = gateway.asking("north");
    worker.arrival().await;
    sender.send(Ok(Bytes::from("data: 1\n\n"))).await.unwrap();
    drop(asking.await.unwrap().unwrap());
    tokio::time::timeout(PATIENCE, worker.cancellation()).await.expect("the worker notices");
    gateway.until("turret_gateway_in_flight", 0.0).await;
}

#[tokio::test]
async fn a_thousand_requests_leave_nothing_behind() {
    let workers = [
        FakeWorker::start(report("a", &[("north", "n", &["pirate", "terse"])])).await,
        FakeWorker::start(report("b", &[("north", "n", &["pirate", "terse"])])).await,
    ];
    let gateway = Gateway::over(&[&workers[0], &workers[1]]).await;
    let models = ["north", "north:pirate", "terse"];
    for n in 0..200 {
        answered(gateway.ask(models[n % 3]).send().await.unwrap()).await;
    }
    let (client, url) = (&gateway.client, &gateway.url);
    let done = futures::stream::iter(0..800)
        .map(|n| async move {
            let model = models[n % 3];
            let body = format!(r#"{{"model":"{model}"}}"#);
            let response = client.post(format!("{url}/v1/chat/completions")).body(body).send().await.unwrap();
            assert!(answered(response).await.1.contains(model));
        })
        .buffer_unordered(32)
        .count()
        .await;
    assert_eq!(done, 800);
    assert_eq!(workers[0].seen().len() + workers[1].seen().len(), 1000);
    assert_eq!(gateway.metric("turret_gateway_requests_total{code=\"2xx\"}").await, 1000.0);
    assert_eq!(gateway.metric("turret_gateway_retries_total").await, 0.0);
    gateway.until("turret_gateway_in_flight", 0.0).await;
    assert_eq!(gateway.metric("turret_gateway_held").await, 0.0);
}

#[tokio::test]
async fn what_is_not_a_request_is_refused_in_openais_words() {
    let worker = worker().await;
    let settings = Settings { max_body_bytes: 1000, ..Settings::default() };
    let gateway = Gateway::over_with(&[&worker], settings).await;
    let long = format!(r#"{{"model":"north","x":"{}"}}"#, "x".repeat(1000));
    let chunked = reqwest::Body::wrap_stream(futures::stream::iter([Ok::<_, std::io::Error>(long.clone())]));
    for (body, status, code) in [
        ("{".into(), 400, "invalid_json"),
        ("[]".into(), 400, "invalid_json"),
        (r#"{"model": 7}"#.into(), 400, "invalid_json"),
        (reqwest::Body::from(long), 413, "body_too_large"),
        (chunked, 413, "body_too_large"),
    ] {
        let (got, _, got_code, message) =
            refused(gateway.post("/v1/chat/completions", body).send().await.unwrap()).await;
        assert_eq!((got, got_code.as_str()), (status, code), "{message}");
    }
    let (status, _, code, message) =
        refused(gateway.post("/v1/embeddings", "{}").send().await.unwrap()).await;
    assert_eq!((status, code.as_str()), (404, "unknown_path"), "{message}");
    let get = gateway.client.get(format!("{}/v1/completions", gateway.url)).send().await.unwrap();
    let (status, _, code, message) = refused(get).await;
    assert_eq!((status, code.as_str()), (405, "method_not_allowed"), "{message}");
    assert!(worker.seen().is_empty());
}
