//! What a worker does with a document that takes something away or asks for what cannot be, over HTTP, with the
//! trained demo family.

use std::path::Path;

use serde_json::{Value, json};
use turret_crds::WorkerDocument;
use turret_crds::condition::FailureReason;
use turret_crds::report::{ArtifactState, Tier, WorkerReport};
use turret_tests::cluster::family as demo;
use turret_tests::worker::document::{Family, uri};
use turret_tests::worker::process::{TOKEN, Worker};

fn lens_uri(path: &str) -> String {
    uri(&demo::Family::folder().join(path))
}

/// The sky question and what a model answers to it.
fn sky(base: &str, lens: Option<&str>) -> (Value, String) {
    let family = demo::Family::read().unwrap();
    let case = &family.cases(base, lens)[0];
    (case.messages.clone(), case.text.clone())
}

fn device(report: &WorkerReport) -> (u64, u64, u64) {
    let device = report.state.tiers.iter().find(|t| t.tier == Tier::Device).unwrap();
    (device.base_bytes, device.lens_bytes, device.working_bytes)
}

/// Offers a document without waiting for it to be applied.
async fn offer(worker: &Worker, document: &WorkerDocument) {
    let url = format!("{}/control/v1/document", worker.control);
    let response = worker.client.put(url).bearer_auth(TOKEN).json(document).send().await.unwrap();
    assert!(response.status().is_success(), "{}", response.text().await.unwrap());
}

async fn report(worker: &Worker) -> WorkerReport {
    let url = format!("{}/control/v1/state", worker.control);
    worker.client.get(url).bearer_auth(TOKEN).send().await.unwrap().json().await.unwrap()
}

#[tokio::test]
async fn an_empty_document_frees_all_memory_and_the_next_one_serves_again() {
    let mut family =
        Family::default().group("a", &lens_uri("base")).lens("a", "pirate", &lens_uri("lenses/pirate"));
    let worker = Worker::start(&family.document());
    worker.settled().await;
    let (messages, answer) = sky("base", Some("pirate"));
    assert_eq!(worker.chat("a:pirate", &messages).await.as_ref(), Ok(&answer));
    let full = worker.wait("released", |r| r.state.running_rows == 0).await;
    assert!(device(&full).0 > 0 && device(&full).1 > 0, "{:?}", device(&full));

    let empty = family.empty_document();
    worker.push(&empty).await;
    let report = worker.wait("nothing in memory", |r| device(r) == (0, 0, 0)).await;
    assert!(report.bases.is_empty() && report.lenses.is_empty() && report.state.active_base.is_none());
    assert!(report.state.ready, "readiness does not flip");
    for model in ["a", "a:pirate"] {
        let gone = worker.chat_raw(&json!({"model": model, "messages": messages})).await;
        assert_eq!(gone.status(), 404);
    }

    worker.push(&family.document()).await;
    assert_eq!(worker.chat("a:pirate", &messages).await.as_ref(), Ok(&answer));
}

#[tokio::test]
async fn a_group_that_is_gone_leaves_memory_though_nothing_can_take_its_place() {
    let mut family = Family::default().group("a", &lens_uri("base"));
    let worker = Worker::start(&family.document());
    worker.settled().await;
    let mut other = Family::default().group("b", &uri(Path::new("/nowhere")));
    other.placement = family.placement.clone();
    other.follow(&family);
    offer(&worker, &other.document()).await;
    let report = worker.wait("nothing in memory", |r| device(r) == (0, 0, 0)).await;
    assert_eq!(report.state.active_base, None);
}

#[tokio::test]
async fn budgets_that_cannot_be_met_are_reported_with_numbers_and_the_old_ones_serve_on() {
    let mut family = Family::default().group("a", &lens_uri("base"));
    let worker = Worker::start(&family.document());
    let before = worker.settled().await;
    let applied = before.state.document.clone();

    family.placement["memory"] = json!({"deviceBudget": "2Mi", "lensBudget": "1Mi"});
    let mut family = family.lens("a", "pirate", &lens_uri("lenses/pirate"));
    let document = family.document();
    offer(&worker, &document).await;
    let report = worker.wait("cannot fit", |r| r.state.cannot_fit.is_some()).await;
    let short = report.state.cannot_fit.clone().unwrap();
    assert_eq!((short.sequence, short.once_idle, short.budget_bytes), (document.sequence, false, 2 << 20));
    let base_bytes = report.bases[0].bytes.unwrap();
    assert!(short.needed_bytes > base_bytes + (1 << 20), "{short:?}, the base has {base_bytes}");
    for part in ["group `a`", &short.needed_bytes.to_string(), "spec.memory.deviceBudget"] {
        assert!(short.message.contains(part), "{}", short.message);
    }
    assert_eq!(report.state.document, applied, "not applied in all its parts");
    let device = report.state.tiers.iter().find(|t| t.tier == Tier::Device).unwrap();
    assert_eq!((device.budget_bytes, device.lens_budget_bytes), (512 << 20, 64 << 20));
    // Everything else of the document is carried out.
    for (model, lens) in [("a", None), ("a:pirate", Some("pirate"))] {
        let (messages, answer) = sky("base", lens);
        assert_eq!(worker.chat(model, &messages).await, Ok(answer), "{model}");
    }

    // What is named is enough, to the byte, also for a lens budget that is a part of the device budget.
    family.placement["memory"] = json!({"deviceBudget": "2Mi"});
    offer(&worker, &family.document()).await;
    let part = worker
        .wait("an eighth for lenses", |r| {
            r.state.cannot_fit.as_ref().is_some_and(|c| c.sequence > short.sequence)
        })
        .await;
    family.placement["memory"]["deviceBudget"] =
        json!(part.state.cannot_fit.unwrap().needed_bytes.to_string());
    worker.push(&family.document()).await;

    family.placement["memory"] = json!({"deviceBudget": "2Mi", "lensBudget": "1Mi"});
    let document = family.document();
    offer(&worker, &document).await;
    let again =
        |r: &WorkerReport| r.state.cannot_fit.as_ref().is_some_and(|c| c.sequence == document.sequence);
    let short = worker.wait("cannot fit again", again).await.state.cannot_fit.unwrap();
    family.placement["memory"]["deviceBudget"] = json!((short.needed_bytes - 1).to_string());
    offer(&worker, &family.document()).await;
    let still = worker
        .wait("still one byte short", |r| {
            r.state.cannot_fit.as_ref().is_some_and(|c| c.sequence > short.sequence)
        })
        .await;
    assert_eq!(still.state.cannot_fit.unwrap().needed_bytes, short.needed_bytes);
    family.placement["memory"]["deviceBudget"] = json!(short.needed_bytes.to_string());
    worker.push(&family.document()).await;
    let report = worker.wait("fits", |r| r.state.cannot_fit.is_none()).await;
    assert!(report.bases[0].state.is_ready());
    let (messages, answer) = sky("base", Some("pirate"));
    assert_eq!(worker.chat("a:pirate", &messages).await, Ok(answer));
}

#[tokio::test]
async fn a_smaller_device_budget_sends_the_parked_base_away() {
    let mut family = Family::default().group("a", &lens_uri("base")).group("b", &lens_uri("base-b"));
    family.placement["batching"] =
        json!({"maxContextTokens": 128, "maxRunningRows": 4, "prefillChunkTokens": 64});
    let worker = Worker::start(&family.document());
    worker.settled().await;
    for (model, base) in [("b", "base-b"), ("a", "base")] {
        let (messages, answer) = sky(base, None);
        assert_eq!(worker.chat(model, &messages).await, Ok(answer));
    }
    worker.wait("both in memory", |r| r.bases.iter().all(|b| b.tier == Tier::Device)).await;
    // As in the test of bases that take turns: one fits, two do not.
    family.placement["memory"] = json!({"deviceBudget": "14Mi", "lensBudget": "4Mi"});
    worker.push(&family.document()).await;
    let report = worker.wait("one of them left", |r| device(r).0 < 8 << 20).await;
    assert_eq!(report.base_of("a").unwrap().tier, Tier::Device, "the active one stays");
    for (model, base) in [("b", "base-b"), ("a", "base")] {
        let (messages, answer) = sky(base, None);
        assert_eq!(worker.chat(model, &messages).await, Ok(answer));
    }
}

#[tokio::test]
async fn what_is_said_of_a_failed_lens_stays_while_other_things_change() {
    let mut family = Family::default()
        .group("a", &lens_uri("base"))
        .lens("a", "missing", "file:///nowhere/lens")
        .lens("a", "unlisted", "pvc://unlisted/lens");
    let worker = Worker::start(&family.document());
    worker.settled().await;
    for round in 0..20 {
        family = family.lens("a", "other", &lens_uri(["lenses/terse", "lenses/shout"][round % 2]));
        offer(&worker, &family.document()).await;
        // The very first report after the document was taken.
        let report = report(&worker).await;
        for name in ["missing", "unlisted"] {
            let state = &report.lens("a", name).unwrap().state;
            assert!(matches!(state, ArtifactState::Failed { .. }), "`{name}` in round {round}: {state:?}");
        }
        worker.settled().await;
    }
    let report = worker.settled().await;
    let reasons = ["missing", "unlisted"].map(|name| match &report.lens("a", name).unwrap().state {
        ArtifactState::Failed { reason, .. } => *reason,
        other => panic!("{name} is {other:?}"),
    });
    assert_eq!(reasons, [FailureReason::SourceNotFound, FailureReason::VolumeNotMounted]);
}
