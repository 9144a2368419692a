//! Which namespace and which model a request means.

use std::sync::Arc;

use serde_json::json;
use turret_crds::{
    ModelGroup,
    alias::{EffectiveAlias, WeightedLens},
};
use turret_operator::gateway::Settings;

use crate::{
    fake_worker::{FakeWorker, report},
    harness::{Gateway, answered, group, placement, refused},
};

const LENSES: &[&str] = &["new", "old"];

/// The group `north` with an alias to some of its lenses.
fn aliased(targets: &[&str]) -> ModelGroup {
    let targets: Vec<_> = targets.iter().map(|lens| json!({"lensName": lens})).collect();
    let mut declared = group("lab", "north", LENSES);
    declared.spec.aliases =
        serde_json::from_value(json!([{"name": "default", "targets": targets}])).expect("an alias");
    declared
}

/// Has a worker say that the alias leads to a lens, and waits until the gateway knows.
async fn leads_to(gateway: &Gateway, worker: &FakeWorker, lens: &str) {
    let targets = vec![WeightedLens { lens: lens.into(), weight: 1 }];
    let alias = EffectiveAlias { name: "default".into(), targets };
    worker.now(|r| r.aliases = Arc::new([("north".to_owned(), vec![alias])].into()));
    gateway.caught_up(worker).await;
}

#[tokio::test]
async fn an_alias_leads_where_workers_say_until_all_of_them_say_what_is_declared() {
    let workers = [
        FakeWorker::start(report("a", &[("north", "n", LENSES)])).await,
        FakeWorker::start(report("b", &[("north", "n", LENSES)])).await,
    ];
    let gateway = Gateway::declared(Settings::default()).await;
    let declare = |lens: &str| {
        gateway.declare(&[("lab", &[aliased(&[lens])], &[placement("lab", "p", &["north"], 300)])]);
    };
    declare("old");
    gateway.follow(&[("lab", "p", &workers[0]), ("lab", "p", &workers[1])]).await;
    let model_of = async |name: &str| answered(gateway.ask(name).send().await.unwrap()).await.1;
    assert_eq!(model_of("default").await, "north:old", "no worker has heard of it");
    leads_to(&gateway, &workers[0], "old").await;
    leads_to(&gateway, &workers[1], "old").await;
    declare("new");
    assert_eq!(model_of("default").await, "north:old");
    leads_to(&gateway, &workers[0], "new").await;
    assert_eq!(model_of("north:default").await, "north:old", "one worker has yet to hear of it");
    leads_to(&gateway, &workers[1], "new").await;
    assert_eq!(model_of("default").await, "north:new");

    let (_, models) = gateway.get("/v1/models").await;
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|m| m["id"].clone()).collect();
    assert_eq!(ids, ["north", "north:default", "north:new", "north:old"]);
    let (status, model) = gateway.get("/v1/models/default").await;
    assert_eq!((status, &model["id"], &model["parent"]), (200, &json!("north:default"), &json!("north")));
    assert_eq!(model["targets"], json!([{"lens": "new", "weight": 1}]));
    let (status, error) = gateway.get("/v1/lenses/default").await;
    assert_eq!((status, &error["error"]["code"]), (404, &json!("lens_not_found")));
    let message = "`north:default` is an alias, not a lens; it leads to north:new";
    assert_eq!(error["error"]["message"], message);
}

#[tokio::test]
async fn the_same_user_gets_the_same_lens_of_an_alias() {
    let worker = FakeWorker::start(report("a", &[("north", "n", LENSES)])).await;
    let gateway = Gateway::declared(Settings::default()).await;
    let placements = [placement("lab", "p", &["north"], 300)];
    gateway.declare(&[("lab", &[aliased(LENSES)], &placements)]);
    gateway.follow(&[("lab", "p", &worker)]).await;
    let mut found = Vec::new();
    for n in 0..8 {
        let asked = async |field: &str| {
            let body = format!(r#"{{"model":"default","messages":[],"{field}":"user-{n}"}}"#);
            answered(gateway.post("/v1/chat/completions", body).send().await.unwrap()).await.1
        };
        let first = asked("user").await;
        for field in ["user", "safety_identifier", "prompt_cache_key"] {
            assert_eq!(asked(field).await, first);
        }
        let by_id = gateway.ask("default").header("x-request-id", format!("user-{n}"));
        assert_eq!(answered(by_id.send().await.unwrap()).await.1, first);
        found.push(first);
    }
    assert!(found.iter().any(|m| m == "north:new") && found.iter().any(|m| m == "north:old"), "{found:?}");
}

#[tokio::test]
async fn without_a_cluster_aliases_are_what_workers_report() {
    let worker = FakeWorker::start(report("w", &[("north", "n", LENSES)])).await;
    let gateway = Gateway::over(&[&worker]).await;
    assert_eq!(refused(gateway.ask("default").send().await.unwrap()).await.0, 404);
    for lens in ["old", "new"] {
        leads_to(&gateway, &worker, lens).await;
        let asked = gateway.ask("default").send().await.unwrap();
        assert_eq!(answered(asked).await.1, format!("north:{lens}"));
    }
}

async fn two_namespaces(settings: Settings) -> (Gateway, [FakeWorker; 2]) {
    let workers = [
        FakeWorker::start(report("lab-0", &[("north", "n", &["pirate"]), ("south", "s", &[])])).await,
        FakeWorker::start(report("prod-0", &[("north", "n", &["pirate"])])).await,
    ];
    let gateway = Gateway::declared(settings).await;
    gateway.declare(&[
        (
            "lab",
            &[group("lab", "north", &["pirate"]), group("lab", "south", &[])],
            &[placement("lab", "p", &["north", "south"], 300)],
        ),
        ("prod", &[group("prod", "north", &["pirate"])], &[placement("prod", "p", &["north"], 300)]),
    ]);
    gateway.follow(&[("lab", "p", &workers[0]), ("prod", "p", &workers[1])]).await;
    (gateway, workers)
}

#[tokio::test]
async fn a_namespace_is_named_by_path_or_header_or_follows_from_the_model() {
    let (gateway, _workers) = two_namespaces(Settings::default()).await;
    let in_path = gateway.post("/ns/prod/v1/chat/completions", r#"{"model":"pirate"}"#).send().await.unwrap();
    assert_eq!(answered(in_path).await, ("prod-0".into(), "north:pirate".into()));
    let in_header = gateway.ask("north").header("x-turret-namespace", "lab").send().await.unwrap();
    assert_eq!(answered(in_header).await, ("lab-0".into(), "north".into()));
    assert_eq!(answered(gateway.ask("south").send().await.unwrap()).await.0, "lab-0", "only there");
    let (status, _, code, message) = refused(gateway.ask("north").send().await.unwrap()).await;
    assert_eq!((status, code.as_str()), (400, "ambiguous_model"));
    assert!(message.contains("lab, prod") && message.contains("X-Turret-Namespace"), "{message}");
    let both = gateway.post("/ns/prod/v1/completions", "{}").header("x-turret-namespace", "lab");
    assert_eq!(refused(both.send().await.unwrap()).await.0, 400);
    let unknown = gateway.post("/ns/test/v1/completions", r#"{"model":"north"}"#).send().await.unwrap();
    let (status, _, code, message) = refused(unknown).await;
    assert_eq!(
        (status, code.as_str(), message.as_str()),
        (404, "namespace_not_found", "nothing is served in the namespace `test`")
    );
}

#[tokio::test]
async fn a_default_namespace_decides_where_none_is_named() {
    let settings = Settings { default_namespace: Some("prod".into()), ..Settings::default() };
    let (gateway, _workers) = two_namespaces(settings).await;
    assert_eq!(answered(gateway.ask("north").send().await.unwrap()).await.0, "prod-0");
    assert_eq!(refused(gateway.ask("south").send().await.unwrap()).await.0, 404);
    let named = gateway.ask("south").header("x-turret-namespace", "lab").send().await.unwrap();
    assert_eq!(answered(named).await.0, "lab-0");
}

#[tokio::test]
async fn a_missing_model_is_the_only_group_or_the_placements_default() {
    let (gateway, _workers) = two_namespaces(Settings::default()).await;
    let ask = async |path: &str| gateway.post(path, r#"{"messages":[]}"#).send().await.unwrap();
    assert_eq!(answered(ask("/ns/prod/v1/completions").await).await.1, "north");
    assert_eq!(answered(ask("/ns/lab/v1/completions").await).await.1, "north", "the first by name");
    assert_eq!(refused(ask("/v1/completions").await).await.0, 400);
    let worker = FakeWorker::start(report("w", &[("east", "e", &[]), ("west", "w", &[])])).await;
    let gateway = Gateway::over(&[&worker]).await;
    let (status, _, code, message) =
        refused(gateway.post("/v1/completions", "{}").send().await.unwrap()).await;
    assert_eq!((status, code.as_str()), (400, "model_required"));
    assert_eq!(message, "the request names no `model`; it must be one of east, west");
}

#[tokio::test]
async fn without_a_cluster_what_workers_report_is_what_there_is() {
    let worker = FakeWorker::start(report("w", &[("north", "n", &["pirate"])])).await;
    let gateway = Gateway::over(&[&worker]).await;
    assert_eq!(answered(gateway.ask("pirate").send().await.unwrap()).await.1, "north:pirate");
    assert_eq!(refused(gateway.ask("east").send().await.unwrap()).await.0, 404, "all workers have spoken");
    worker.now(|r| r.bases[0].groups.push("zoo".into()));
    gateway.caught_up(&worker).await;
    assert_eq!(answered(gateway.ask("zoo").send().await.unwrap()).await.1, "zoo");
    worker.now(|r| r.lenses.clear());
    gateway.caught_up(&worker).await;
    assert_eq!(refused(gateway.ask("north:pirate").send().await.unwrap()).await.0, 404);
}
