//! Which namespace and which model a request means.

use turret_operator::gateway::Settings;

use crate::{
    fake_worker::{FakeWorker, report},
    harness::{Gateway, answered, group, placement, refused},
};

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
