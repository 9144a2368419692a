//! The admin port: what each worker holds, for people and tools, and the log level.

use std::net::SocketAddr;

use serde_json::{Value, json};
use tokio::net::TcpListener;
use turret_operator::{
    gateway::{Settings, routes::admin},
    telemetry,
};

use crate::{
    fake_worker::{FakeWorker, report},
    harness::Gateway,
};

#[tokio::test]
async fn the_fleet_is_shown_on_a_port_of_its_own() {
    let a = FakeWorker::start(report("a", &[("north", "n", &["pirate", "terse"])])).await;
    let b = FakeWorker::start(report("b", &[("south", "s", &["polite"])])).await;
    let gateway = Gateway::declared(Settings::default()).await;
    gateway.follow(&[("lab", "p", &a), ("prod", "q", &b)]).await;
    gateway.caught_up(&a).await;
    gateway.caught_up(&b).await;

    let (_layer, log) = telemetry::filter("info");
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let routes = admin::router(gateway.directory.clone(), log);
    let service = routes.into_make_service_with_connect_info::<SocketAddr>();
    let served = tokio::spawn(async move { axum::serve(listener, service).await });

    let get = |path: &str| gateway.client.get(format!("{url}{path}"));
    let all: Value = get("/fleet").send().await.unwrap().json().await.unwrap();
    assert_eq!((&all["totalWorkers"], &all["workers"][1]["id"]), (&json!(2), &json!("prod/b")));
    let found: Value = get("/fleet?lens=north:pirate&lenses=1").send().await.unwrap().json().await.unwrap();
    assert_eq!(found["totalWorkers"], 1);
    let worker = &found["workers"][0];
    assert_eq!((&worker["placement"], &worker["link"]), (&json!("p"), &json!("Open")));
    let said = &worker["report"];
    assert_eq!(said["state"]["activeBase"], "n");
    assert_eq!(said["lensCounts"], json!({"total": 2, "failed": 0, "byTier": {"Disk": 2}}));
    assert_eq!(
        said["lenses"],
        json!([{"group": "north", "name": "pirate", "state": {"phase": "Ready"}, "tier": "Disk",
            "activeRows": 0, "served": 0}])
    );

    let page = get("/fleet?namespace=lab").header("accept", "text/html,*/*;q=0.8").send().await.unwrap();
    assert!(page.headers()["content-type"].to_str().unwrap().starts_with("text/html"));
    assert_eq!(page.headers()["cache-control"], "no-store");
    let html = page.text().await.unwrap();
    assert!(html.contains("<h2>lab/a</h2>") && !html.contains("prod/b"), "{html}");
    let mistyped = get("/fleet?lense=pirate").send().await.unwrap();
    assert_eq!(mistyped.status(), 400, "what is not understood is not ignored");

    let changed = gateway.client.put(format!("{url}/loglevel")).body("debug").send().await.unwrap();
    assert_eq!((changed.status().as_u16(), changed.text().await.unwrap()), (200, "debug\n".into()));

    for path in ["/fleet", "/loglevel"] {
        assert_eq!(gateway.get(path).await.0, 404, "clients do not see {path}");
    }
    served.abort();
}
