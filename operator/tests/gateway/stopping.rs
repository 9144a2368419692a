//! The end of a gateway breaks nothing.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use turret_operator::gateway::Settings;

use crate::{
    fake_worker::{FakeWorker, report},
    harness::{Gateway, PATIENCE, refused},
};

#[tokio::test]
async fn a_gateway_is_ready_when_it_has_read_what_is_declared() {
    let gateway = Gateway::declared(Settings::default()).await;
    assert_eq!((gateway.get("/livez").await.0, gateway.get("/readyz").await.0), (200, 503));
    gateway.declare(&[]);
    assert_eq!(gateway.get("/readyz").await.0, 200);
}

#[tokio::test]
async fn told_to_stop_it_is_unready_first_and_ends_when_the_last_stream_has() {
    let worker = FakeWorker::start(report("w", &[("north", "n", &[])])).await;
    let settings = Settings { leave_time: Duration::from_millis(300), ..Settings::default() };
    let mut gateway = Gateway::over_with(&[&worker], settings).await;
    let sender = worker.will_stream();
    let asking = gateway.asking("north");
    worker.arrival().await;
    sender.send(Ok(Bytes::from("data: 1\n\n"))).await.unwrap();
    let mut body = asking.await.unwrap().unwrap().bytes_stream();
    assert_eq!(body.next().await.unwrap().unwrap(), "data: 1\n\n");
    // A connection that is opened in advance, as proxies do, must not keep the gateway.
    let address = gateway.url.strip_prefix("http://").unwrap().to_owned();
    let unused = tokio::net::TcpStream::connect(address).await.unwrap();

    gateway.stop();
    let unready = async {
        while gateway.get("/readyz").await.0 != 503 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, unready).await.expect("readiness is off while requests are still taken");
    let closed = async {
        while gateway
            .client
            .get(format!("{}/livez", gateway.url))
            .header("connection", "close")
            .send()
            .await
            .is_ok()
        {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, closed).await.expect("no new connections are taken");

    sender.send(Ok(Bytes::from("data: 2\n\n"))).await.unwrap();
    assert_eq!(body.next().await.unwrap().unwrap(), "data: 2\n\n");
    drop(sender);
    assert!(body.next().await.is_none(), "the stream ends as it should");
    gateway.ended().await;
    drop(unused);
}

#[tokio::test]
async fn told_to_stop_it_sends_those_away_who_still_wait() {
    let worker = FakeWorker::start(report("w", &[("north", "n", &[])])).await;
    worker.now(|r| r.state.ready = false);
    let mut gateway = Gateway::over(&[&worker]).await;
    let asking = gateway.asking("north");
    gateway.until("turret_gateway_held", 1.0).await;
    gateway.stop();
    let (status, retry_after, code, message) = refused(asking.await.unwrap().unwrap()).await;
    assert_eq!((status, retry_after, code.as_str()), (503, Some(1), "gateway_stopping"), "{message}");
    gateway.ended().await;
}
