//! What stays in memory and what leaves it: pins, leases, policies, watermarks, and what is asked by hand. The worker's
//! real binary over HTTP, with the trained demo family.

use std::cell::Cell;
use std::path::Path;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use turret_crds::condition::FailureReason;
use turret_crds::report::{ArtifactState, EvictionReason, Tier, WorkerReport};
use turret_tests::cluster::family as demo;
use turret_tests::worker::document::{Family, uri};
use turret_tests::worker::https::Https;
use turret_tests::worker::process::{Options, TOKEN, Worker};

fn lens_uri(path: &str) -> String {
    uri(&demo::Family::folder().join(path))
}

const LENSES: [&str; 5] = ["french", "json", "pirate", "shout", "terse"];

/// One group with five lenses.
fn five() -> Family {
    let family = Family::default().group("a", &lens_uri("base"));
    LENSES.iter().fold(family, |family, lens| family.lens("a", lens, &lens_uri(&format!("lenses/{lens}"))))
}

fn declare(family: &mut Family, name: &str, more: Value) {
    let mut lens = json!({"name": name, "source": {"uri": lens_uri(&format!("lenses/{name}"))}});
    lens.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    family.set_lens("a", name, lens);
}

/// Lenses in memory, by name.
fn resident(report: &WorkerReport) -> Vec<&str> {
    report.lenses.iter().filter(|l| l.tier == Tier::Device).map(|l| l.name.as_str()).collect()
}

/// The bytes of the larger lenses; one of the five has two thirds of that.
async fn lens_bytes(worker: &Worker) -> u64 {
    let report = worker.settled().await;
    report.lenses.iter().map(|l| l.bytes.unwrap()).max().unwrap()
}

/// Answers right, whatever has to be loaded for it.
async fn ask(worker: &Worker, lens: &str) {
    let family = demo::Family::read().unwrap();
    let case = &family.cases("base", Some(lens))[0];
    assert_eq!(worker.chat(&format!("a:{lens}"), &case.messages).await.as_ref(), Ok(&case.text), "{lens}");
    worker.wait("released", |r| r.state.running_rows == 0).await;
}

/// Asks the control port.
async fn control(worker: &Worker, method: Method, path: &str, body: Option<Value>) -> (u16, Value) {
    let url = format!("{}/control/v1/{path}", worker.control);
    let request = worker.client.request(method, url).bearer_auth(TOKEN);
    let request = match &body {
        Some(body) => request.json(body),
        None => request,
    };
    let response = request.send().await.unwrap();
    let status = response.status().as_u16();
    (status, serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default())
}

async fn post(worker: &Worker, path: &str) -> (u16, Value) {
    control(worker, Method::POST, path, None).await
}

fn message(body: &Value) -> &str {
    body["error"]["message"].as_str().unwrap_or_default()
}

/// A worker whose lens budget holds so many of the five.
async fn with_room_for(lenses: u64, family: &mut Family) -> Worker {
    let worker = Worker::start(&family.document());
    let bytes = lens_bytes(&worker).await;
    family.placement["memory"]["lensBudget"] = json!(bytes * lenses + bytes / 2);
    worker.push(&family.document()).await;
    worker
}

#[tokio::test]
async fn pinned_and_preloaded_lenses_come_before_any_request_and_only_pinned_ones_stay() {
    let mut family = five();
    declare(&mut family, "pirate", json!({"residency": "Pinned"}));
    declare(&mut family, "terse", json!({"residency": "Preloaded"}));
    let worker = with_room_for(2, &mut family).await;
    worker.wait("loaded ahead", |r| resident(r) == ["pirate", "terse"]).await;
    for lens in ["french", "json", "shout"] {
        ask(&worker, lens).await;
    }
    let report = worker.wait("settled", |r| resident(r).contains(&"shout")).await;
    assert_eq!(resident(&report), ["pirate", "shout"]);
    assert!(report.lens("a", "pirate").unwrap().pinned);
    let gone = report.lens("a", "terse").unwrap().last_eviction.clone().unwrap();
    assert_eq!(gone.reason, EvictionReason::Room);
    let (status, body) = post(&worker, "lenses/a:pirate/evict").await;
    assert_eq!(status, 409, "{body}");
    let (status, body) = control(&worker, Method::DELETE, "lenses/a:pirate/pin", None).await;
    assert!(status == 409 && message(&body).contains("ModelGroup"), "{body}");

    // One pinned lens too many is refused by name, the others are served.
    for lens in ["french", "json"] {
        declare(&mut family, lens, json!({"residency": "Pinned", "priority": 50}));
    }
    worker.push(&family.document()).await;
    let report = worker
        .wait("one too many", |r| r.lenses.iter().any(|l| matches!(l.state, ArtifactState::Failed { .. })))
        .await;
    let ArtifactState::Failed { reason, message, .. } = &report.lens("a", "json").unwrap().state else {
        panic!("{:#?}", report.lenses)
    };
    assert_eq!(*reason, FailureReason::DoesNotFit);
    assert!(message.contains("raise spec.memory.lensBudget, or pin fewer"), "{message}");
    worker.wait("the other one", |r| resident(r) == ["french", "pirate"]).await;
    // Pins that are taken back are no longer in the way.
    for lens in ["french", "json"] {
        declare(&mut family, lens, json!({}));
    }
    worker.push(&family.document()).await;
    worker.settled().await;
    ask(&worker, "json").await;
}

#[tokio::test]
async fn a_new_worker_is_ready_with_what_comes_ahead_and_waits_for_nothing_that_cannot_come() {
    let mut family = five();
    declare(&mut family, "pirate", json!({"residency": "Pinned"}));
    declare(&mut family, "terse", json!({"residency": "Preloaded"}));
    let gone = json!({"uri": lens_uri("lenses/none")});
    family.set_lens("a", "shout", json!({"name": "shout", "source": gone, "residency": "Preloaded"}));
    let worker = Worker::start(&family.document());
    let report = worker.wait("ready", |r| r.state.ready).await;
    assert_eq!(resident(&report), ["pirate", "terse"]);
    assert!(matches!(report.lens("a", "shout").unwrap().state, ArtifactState::Failed { .. }), "{report:#?}");

    // Once it is, nothing that is declared later makes it unready.
    declare(&mut family, "french", json!({"residency": "Pinned"}));
    worker.push(&family.document()).await;
    let unready = Cell::new(false);
    // A change of readiness would be in the stream before the lens that comes.
    worker
        .wait("the other one", |r| {
            unready.set(unready.get() || !r.state.ready);
            resident(r).contains(&"french")
        })
        .await;
    assert!(!unready.get(), "it was unready while a lens came");
}

#[tokio::test]
async fn a_new_worker_with_room_for_half_of_what_is_preloaded_is_ready_with_that_half() {
    let mut family = five();
    let bytes = lens_bytes(&Worker::start(&family.document())).await;
    for lens in LENSES {
        declare(&mut family, lens, json!({"residency": "Preloaded"}));
    }
    family.placement["memory"]["lensBudget"] = json!(bytes * 2 + bytes / 2);
    let worker = Worker::start(&family.document());
    let report = worker.wait("ready", |r| r.state.ready).await;
    let (count, all) = (resident(&report).len(), LENSES.len());
    assert!((2..all).contains(&count), "{:?}", resident(&report));
}

#[tokio::test]
async fn a_new_worker_waits_no_longer_than_its_warm_up_for_a_server_that_does_not_answer() {
    // It takes connections, and says nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let scratch = tempfile::tempdir().unwrap();
    let mut family = five();
    let source = json!({"uri": "hf://demo-org/family/pirate", "revision": "0".repeat(40)});
    family.set_lens("a", "pirate", json!({"name": "pirate", "source": source, "residency": "Pinned"}));
    family.placement["warmupSeconds"] = json!(1);
    let env = [
        ("HF_ENDPOINT", endpoint),
        ("HF_HOME", scratch.path().display().to_string()),
        ("HF_TOKEN", String::new()),
        ("NO_PROXY", "*".to_owned()),
    ];
    let env = env.map(|(name, value)| (name.to_owned(), value)).into();
    let worker = Worker::start_with(&family.document(), Options { env, ..Options::default() });
    let report = worker.wait("ready", |r| r.state.ready).await;
    let pirate = report.lens("a", "pirate").unwrap();
    assert!(matches!(pirate.state, ArtifactState::Resolving), "{pirate:#?}");
    ask(&worker, "french").await;
}

#[tokio::test]
async fn a_lease_keeps_a_lens_until_it_ends() {
    let mut family = five();
    let worker = with_room_for(2, &mut family).await;
    let lease = json!({"lens": "a:french", "ttlSeconds": 600, "holder": "the tests", "priority": 3});
    let (status, first) = control(&worker, Method::POST, "leases", Some(lease)).await;
    assert_eq!((status, &first["holder"]), (201, &json!("the tests")), "{first}");
    worker.wait("loaded for its lease", |r| resident(r) == ["french"]).await;
    for lens in ["json", "pirate", "shout"] {
        ask(&worker, lens).await;
        let report = worker.wait("loaded", |r| resident(r).contains(&lens)).await;
        assert!(resident(&report).contains(&"french"), "{lens}: {:?}", resident(&report));
    }
    // A second one takes the rest; a third has no room, ever.
    let lease = json!({"lens": "a:terse", "ttlSeconds": 600});
    let (status, second) = control(&worker, Method::POST, "leases", Some(lease)).await;
    assert_eq!(status, 201, "{second}");
    worker.wait("loaded for its lease", |r| resident(r) == ["french", "terse"]).await;
    let lease = json!({"lens": "a:json", "ttlSeconds": 600});
    let (status, refused) = control(&worker, Method::POST, "leases", Some(lease)).await;
    assert!(status == 409 && message(&refused).contains("lens budget"), "{refused}");
    // A request that needs their room is told when to come again, at once.
    let asked = json!({"model": "a:json", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1});
    let refused = worker.chat_raw(&asked).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    let body = refused.text().await.unwrap();
    assert!(body.contains("leased or pinned"), "{body}");

    let listed = control(&worker, Method::GET, "leases", None).await.1;
    let lenses: Vec<&str> =
        listed["leases"].as_array().unwrap().iter().map(|l| l["lens"].as_str().unwrap()).collect();
    assert_eq!(lenses, ["french", "terse"]);
    assert!(listed["leases"].as_array().unwrap().iter().all(|l| l["resident"] == true), "{listed}");

    let path = |lease: &Value| format!("leases/{}", lease["id"].as_str().unwrap());
    let (status, _) = control(&worker, Method::DELETE, &path(&second), None).await;
    assert_eq!(status, 204);
    ask(&worker, "json").await;
    // A lease that is not renewed ends by itself.
    let (status, renewed) =
        control(&worker, Method::PUT, &path(&first), Some(json!({"ttlSeconds": 1}))).await;
    assert_eq!(status, 200, "{renewed}");
    worker.wait("its end", |r| r.lens("a", "french").unwrap().leases == 0).await;
    let (status, gone) = control(&worker, Method::PUT, &path(&first), Some(json!({"ttlSeconds": 1}))).await;
    assert!(status == 404 && message(&gone).contains("acquire another one"), "{gone}");
    for lens in ["pirate", "shout"] {
        ask(&worker, lens).await;
    }
    let report = worker.wait("evicted", |r| !resident(r).contains(&"french")).await;
    assert_eq!(resident(&report), ["pirate", "shout"]);
}

#[tokio::test]
async fn what_is_asked_by_hand_is_done_or_refused_with_a_reason() {
    let mut family = five().group("b", &lens_uri("base-b")).lens("b", "polite", &lens_uri("lenses-b/polite"));
    let worker = with_room_for(2, &mut family).await;
    assert_eq!(post(&worker, "lenses/shout/load").await, (204, Value::Null));
    let report = worker.wait("loaded", |r| resident(r) == ["shout"]).await;
    let shout = report.lens("a", "shout").unwrap();
    assert!(shout.loads == 1 && shout.served == 0 && shout.load_millis.is_some(), "{shout:?}");
    assert_eq!(post(&worker, "lenses/a:shout/pin").await.0, 204);
    for lens in ["french", "json", "pirate"] {
        ask(&worker, lens).await;
    }
    let report = worker.wait("pinned", |r| resident(r).contains(&"shout")).await;
    assert!(report.lens("a", "shout").unwrap().pinned);
    assert_eq!(post(&worker, "lenses/a:shout/evict").await.0, 409);
    assert_eq!(control(&worker, Method::DELETE, "lenses/a:shout/pin", None).await.0, 204);
    assert_eq!(post(&worker, "lenses/a:shout/evict").await.0, 202);
    let report = worker.wait("evicted", |r| !resident(r).contains(&"shout")).await;
    let gone = report.lens("a", "shout").unwrap().last_eviction.clone().unwrap();
    assert_eq!(gone.reason, EvictionReason::Request);
    assert_eq!(post(&worker, "lenses/a:shout/evict").await.0, 202, "it is gone, which is what was asked for");

    let (status, body) = post(&worker, "lenses/a:none/load").await;
    assert!(status == 404, "{body}");
    let (status, body) = post(&worker, "lenses/a/load").await;
    assert!(status == 400 && message(&body).contains("GROUP:LENS"), "{body}");
    let (status, body) = post(&worker, "lenses/b:polite/load").await;
    assert!(status == 409 && message(&body).contains("switch to it first"), "{body}");
    assert_eq!(post(&worker, "groups/b/activate").await.0, 202);
    worker.wait("switched", |r| r.state.active_base == r.base_of("b").map(|b| b.key.clone())).await;
    assert_eq!(post(&worker, "lenses/b:polite/load").await.0, 204);
    assert_eq!(post(&worker, "groups/c/activate").await.0, 404);

    let metrics =
        worker.client.get(format!("{}/metrics", worker.data)).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("turret_lens_evictions_total{reason=\"Request\"} 1"), "{metrics}");
    assert!(metrics.contains("turret_lens_evictions_total{reason=\"Room\"}"), "{metrics}");
    for wrong in [json!({"lens": "a:json", "ttlSeconds": 0}), json!({"lens": "a:json"}), json!([])] {
        let (status, body) = control(&worker, Method::POST, "leases", Some(wrong.clone())).await;
        assert_eq!(status, 400, "{wrong}: {body}");
    }
}

#[tokio::test]
async fn a_policy_changes_who_leaves_without_a_restart() {
    let mut family = five();
    family.placement["eviction"] = json!({"policy": "LRU"});
    let worker = with_room_for(2, &mut family).await;
    // French is asked often, and not lately.
    for lens in ["french", "french", "french", "json"] {
        ask(&worker, lens).await;
    }
    ask(&worker, "pirate").await;
    let report = worker.wait("by LRU", |r| resident(r) == ["json", "pirate"]).await;
    let why =
        |report: &WorkerReport, lens: &str| report.lens("a", lens).unwrap().last_eviction.clone().unwrap();
    assert!(
        why(&report, "french").message.starts_with("least recently used"),
        "{:?}",
        why(&report, "french")
    );
    let instance = report.worker.instance.clone();

    family.placement["eviction"] = json!({"policy": "LFU"});
    worker.push(&family.document()).await;
    ask(&worker, "french").await;
    ask(&worker, "json").await;
    ask(&worker, "shout").await;
    let report = worker.wait("by LFU", |r| resident(r) == ["french", "shout"]).await;
    assert!(why(&report, "json").message.starts_with("least frequently used"), "{:?}", why(&report, "json"));

    family.placement["eviction"] = json!({"policy": "Priority"});
    declare(&mut family, "shout", json!({"priority": 900}));
    worker.push(&family.document()).await;
    ask(&worker, "terse").await;
    let report = worker.wait("by priority", |r| resident(r) == ["shout", "terse"]).await;
    assert!(
        why(&report, "french").message.starts_with("lowest priority: 100"),
        "{:?}",
        why(&report, "french")
    );
    for policy in ["Hybrid", "Specialization", "ALRFU"] {
        family.placement["eviction"] = json!({"policy": policy});
        worker.push(&family.document()).await;
        for lens in LENSES {
            ask(&worker, lens).await;
        }
    }
    assert_eq!(worker.settled().await.worker.instance, instance, "one process did all of it");
}

#[tokio::test]
async fn beyond_the_high_watermark_idle_lenses_leave_by_themselves() {
    let mut family = five();
    let worker = with_room_for(4, &mut family).await;
    for lens in ["french", "json", "pirate", "shout"] {
        ask(&worker, lens).await;
    }
    worker.wait("all four", |r| resident(r).len() == 4).await;
    // Room for 4.5: at most 45 % are two.
    family.placement["eviction"] =
        json!({"highWatermarkPercent": 50, "lowWatermarkPercent": 45, "idleSeconds": 1, "sweepSeconds": 1});
    worker.push(&family.document()).await;
    let report = worker.wait("swept", |r| resident(r).len() == 2).await;
    let idle = report.lenses.iter().filter_map(|l| l.last_eviction.as_ref());
    assert!(
        idle.clone().count() == 2 && idle.clone().all(|e| e.reason == EvictionReason::Idle),
        "{:#?}",
        report.lenses
    );
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert_eq!(resident(&worker.settled().await).len(), 2, "no more than the watermark says");
}

/// Every blob in the cache folder has the content that its name says.
fn assert_whole(cache: &Path) {
    let Ok(blobs) = std::fs::read_dir(cache.join("blobs")) else { return };
    for blob in blobs {
        let blob = blob.unwrap();
        let digest = hex::encode(Sha256::digest(std::fs::read(blob.path()).unwrap()));
        assert_eq!(blob.file_name().to_str(), Some(digest.as_str()));
    }
}

#[tokio::test]
async fn a_worker_that_is_killed_at_any_moment_leaves_whole_files_and_the_next_one_goes_on() {
    let scratch = tempfile::tempdir().unwrap();
    let server = Https::serve(&demo::Family::folder(), scratch.path()).await;
    let mut family = Family::default().group("a", &format!("{}/base", server.url));
    for lens in ["pirate", "shout"] {
        family = family.lens("a", lens, &format!("{}/lenses/{lens}", server.url));
    }
    let document = family.document();
    let cache = scratch.path().join("cache");
    let ca = server.ca.to_str().unwrap().to_owned();
    let options = || Options {
        args: vec!["--allowed-source-hosts=localhost".into()],
        env: vec![("SSL_CERT_FILE".into(), ca.clone())],
        cache: Some(cache.clone()),
        ..Options::default()
    };
    // Slow enough that most of these end in the middle of a file.
    server.pace(4 << 10);
    for after_ms in [0, 20, 50, 90, 150, 10, 250, 400, 70, 120] {
        let worker = Worker::start_with(&document, options());
        tokio::time::sleep(Duration::from_millis(after_ms)).await;
        // The end of the value is a SIGKILL.
        drop(worker);
        assert_whole(&cache);
    }
    let weights = server.ranges("/base/model.safetensors");
    assert!(weights.iter().any(Option::is_some), "what had arrived was not asked for again: {weights:?}");
    server.pace(usize::MAX);
    let worker = Worker::start_with(&document, options());
    let report = worker.settled().await;
    assert!(report.lenses.iter().all(|lens| lens.state.is_ready()), "{report:#?}");
    for lens in ["pirate", "shout"] {
        ask(&worker, lens).await;
    }
    assert_whole(&cache);
}
