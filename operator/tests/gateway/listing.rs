//! What `/v1/models` and `/v1/lenses` show.

use std::sync::Arc;

use serde_json::{Value, json};
use turret_crds::{
    condition::FailureReason,
    report::{ArtifactState, Tier},
};
use turret_operator::gateway::Settings;

use crate::{
    fake_worker::{FakeWorker, report},
    harness::{Gateway, group, placement},
};

fn ids(list: &Value) -> Vec<&str> {
    list["data"].as_array().unwrap().iter().map(|e| e["id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn models_and_lenses_are_merged_over_what_is_declared_and_what_workers_say() {
    let a = FakeWorker::start(report("a", &[("north", "n", &["broken", "pirate"])])).await;
    let b = FakeWorker::start(report("b", &[("north", "n", &["broken", "pirate"])])).await;
    for worker in [&a, &b] {
        worker.now(|r| {
            Arc::make_mut(&mut r.lenses[0]).state = ArtifactState::Failed {
                reason: FailureReason::SourceNotFound,
                message: "nothing at pvc://m/broken".into(),
                retry_at: Some(1),
            };
        });
    }
    // Whatever worker answers, a prompt that is announced to fit does.
    a.now(|r| r.bases[0].max_context_tokens = Some(8192));
    b.now(|r| {
        r.bases[0].max_context_tokens = Some(4096);
        Arc::make_mut(&mut r.lenses[1]).tier = Tier::Device;
        Arc::make_mut(&mut r.lenses[1]).bytes = Some(4096);
        Arc::make_mut(&mut r.lenses[1]).digest = Some("sha256:1".into());
    });
    let gateway = Gateway::declared(Settings::default()).await;
    gateway.declare(&[(
        "lab",
        &[group("lab", "north", &["broken", "new", "pirate"])],
        &[placement("lab", "p", &["north"], 300)],
    )]);
    gateway.follow(&[("lab", "p", &a), ("lab", "p", &b)]).await;
    gateway.caught_up(&a).await;
    gateway.caught_up(&b).await;

    let (status, models) = gateway.get("/v1/models").await;
    assert_eq!((status, &models["object"]), (200, &json!("list")));
    assert_eq!(ids(&models), ["north", "north:new", "north:pirate"], "what failed everywhere is not offered");
    assert_eq!(ids(&gateway.get("/ns/lab/v1/models").await.1), ids(&models));
    assert_eq!(ids(&gateway.get("/ns/prod/v1/models").await.1), [""; 0]);
    let (status, model) = gateway.get("/v1/models/pirate").await;
    assert_eq!(status, 200);
    assert_eq!(
        model,
        json!({"id": "north:pirate", "object": "model", "created": 1_767_323_045, "owned_by": "turret",
            "root": "pvc://m/north", "parent": "north", "max_model_len": 4096, "namespace": "lab"})
    );
    assert_eq!(gateway.get("/ns/lab/v1/models/north:pirate").await.1, model);
    let (status, error) = gateway.get("/v1/models/north:broken").await;
    assert_eq!((status, &error["error"]["code"]), (503, &json!("model_failed")));
    assert_eq!(gateway.get("/v1/models/absent").await.0, 404);

    let (_, lenses) = gateway.get("/v1/lenses").await;
    assert_eq!(ids(&lenses), ["north:broken", "north:new", "north:pirate"]);
    let states: Vec<_> =
        lenses["data"].as_array().unwrap().iter().map(|l| l["state"]["phase"].clone()).collect();
    assert_eq!(states, [json!("Failed"), Value::Null, json!("Ready")]);
    let (_, lens) = gateway.get("/v1/lenses/north:pirate").await;
    assert_eq!(lens["displayName"], "PIRATE");
    assert_eq!(
        lens["workers"],
        json!([
            {"worker": "a", "state": {"phase": "Ready"}, "tier": "Disk", "activeRows": 0, "served": 0},
            {"worker": "b", "state": {"phase": "Ready"}, "tier": "Device", "digest": "sha256:1", "bytes": 4096,
                "activeRows": 0, "served": 0},
        ])
    );
    let (status, error) = gateway.get("/v1/lenses/north").await;
    assert_eq!((status, &error["error"]["code"]), (404, &json!("lens_not_found")));
}
