//! Which base is active: by requests, by the spec, by hand. The worker's real binary over HTTP, with the trained demo family.

use serde_json::json;
use turret_crds::WorkerReport;
use turret_crds::report::Tier;
use turret_tests::cluster::family as demo;
use turret_tests::worker::document::{Family, uri};
use turret_tests::worker::https::Https;
use turret_tests::worker::process::{Options, TOKEN, Worker, events};

/// Two groups over two bases, both of which fit.
fn two() -> Family {
    let at = |path: &str| uri(&demo::Family::folder().join(path));
    Family::default().group("a", &at("base")).group("b", &at("base-b"))
}

/// Whether the base of a group is the active one.
fn is_active(report: &WorkerReport, group: &str) -> bool {
    let key = report.base_of(group).map(|base| base.key.clone());
    report.state.switch.is_none() && key.is_some() && report.state.active_base == key
}

/// Answers right, or says what the worker said.
async fn ask(worker: &Worker, group: &str) -> Result<(), String> {
    let family = demo::Family::read().unwrap();
    let base = if group == "a" { "base" } else { "base-b" };
    let case = &family.cases(base, None)[0];
    let answer = worker.chat(group, &case.messages).await?;
    assert_eq!(answer, case.text, "{group}");
    Ok(())
}

#[tokio::test]
async fn in_manual_mode_the_spec_decides_and_nothing_else() {
    let mut family = two();
    family.placement["switching"] = json!({"mode": "Manual", "activeGroupName": "b"});
    let worker = Worker::start(&family.document());
    worker.wait("the declared base", |r| is_active(r, "b")).await;
    ask(&worker, "b").await.unwrap();
    let refused = ask(&worker, "a").await.unwrap_err();
    assert!(refused.starts_with("503") && refused.contains("`b` is the active group"), "{refused}");
    assert!(refused.contains("base_not_active") && refused.contains("activeGroupName"), "{refused}");
    let url = format!("{}/control/v1/groups/a/activate", worker.control);
    let by_hand = worker.client.post(url).bearer_auth(TOKEN).send().await.unwrap();
    assert_eq!(by_hand.status(), 409);

    family.placement["switching"]["activeGroupName"] = json!("a");
    worker.push(&family.document()).await;
    worker.wait("the other one", |r| is_active(r, "a")).await;
    ask(&worker, "a").await.unwrap();
    assert!(ask(&worker, "b").await.unwrap_err().starts_with("503"));

    family.placement["switching"] = json!({"minHoldSeconds": 0, "maxWaitSeconds": 0});
    worker.push(&family.document()).await;
    ask(&worker, "b").await.unwrap();
    ask(&worker, "a").await.unwrap();
}

#[tokio::test]
async fn a_preloaded_base_waits_in_memory_and_one_on_demand_does_not() {
    let mut family = two().placed("b", json!({"residency": "Preloaded"}));
    let worker = Worker::start(&family.document());
    let held = |r: &WorkerReport, group: &str| r.base_of(group).is_some_and(|base| base.tier == Tier::Device);
    let report = worker.wait("both in memory", |r| held(r, "a") && held(r, "b")).await;
    assert!(is_active(&report, "a"));
    ask(&worker, "b").await.unwrap();

    let worker = Worker::start(&two().document());
    worker.wait("ready", |r| r.state.ready).await;
    ask(&worker, "a").await.unwrap();
    let report = worker.wait("idle", |r| r.state.running_rows == 0).await;
    assert!(!held(&report, "b"));
}

#[tokio::test]
async fn who_waits_for_a_stream_is_told_for_what() {
    let scratch = tempfile::tempdir().unwrap();
    let server = Https::serve(&demo::Family::folder(), scratch.path()).await;
    let mut family = Family::default().group("b", &format!("{}/base-b", server.url));
    let options = Options {
        args: vec!["--allowed-source-hosts=localhost".into()],
        env: vec![("SSL_CERT_FILE".into(), server.ca.to_str().unwrap().to_owned())],
        ..Options::default()
    };
    server.pace(32);
    let worker = Worker::start_with(&family.document(), options);
    let trained = demo::Family::read().unwrap();
    let case = &trained.cases("base-b", None)[0];
    let asked = |progress: bool| {
        json!({"model": "b", "messages": case.messages, "temperature": 0, "max_tokens": 64, "stream": true,
               "stream_options": {"include_progress": progress}})
    };
    let mut response = worker.chat_raw(&asked(true)).await;
    assert_eq!(response.status(), 200);
    let mut text = String::new();
    while !text.contains("fetchedBytes") {
        text += std::str::from_utf8(&response.chunk().await.unwrap().expect("it is not over")).unwrap();
    }
    assert!(text.starts_with(": turret {\"base\":"), "{text}");
    assert!(!text.contains("data:"), "no answer yet: {text}");
    server.pace(usize::MAX);
    text += &response.text().await.unwrap();
    let answer: String =
        events(&text).iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(answer, case.text, "{text}");
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");

    // Who is served at once, or did not ask, sees none of it; a refusal that comes at once has its status.
    for progress in [true, false] {
        let text = worker.chat_raw(&asked(progress)).await.text().await.unwrap();
        assert!(!text.contains(": turret"), "{text}");
    }
    let unknown = json!({"model": "c", "messages": case.messages, "stream": true, "stream_options": {"include_progress": true}});
    assert_eq!(worker.chat_raw(&unknown).await.status(), 404);
}

#[tokio::test]
async fn what_users_think_and_what_answers_took_is_in_the_state() {
    let at = |path: &str| uri(&demo::Family::folder().join(path));
    let mut family = two().lens("a", "pirate", &at("lenses/pirate"));
    let worker = Worker::start(&family.document());
    let rate = async |score: serde_json::Value| {
        let url = format!("{}/control/v1/lenses/a:pirate/feedback", worker.control);
        let request = worker.client.post(url).bearer_auth(TOKEN).json(&json!({"score": score}));
        request.send().await.unwrap().status().as_u16()
    };
    worker.settled().await;
    assert_eq!([rate(json!(1)).await, rate(json!(0.5)).await], [204, 204]);
    assert_eq!([rate(json!(1.5)).await, rate(json!("good")).await], [400, 400]);
    let family = demo::Family::read().unwrap();
    let case = &family.cases("base", Some("pirate"))[0];
    worker.chat("a:pirate", &case.messages).await.unwrap();
    let report = worker.wait("counted", |r| r.lens("a", "pirate").unwrap().served == 1).await;
    let lens = report.lens("a", "pirate").unwrap();
    let feedback = lens.feedback.unwrap();
    assert_eq!((feedback.count, feedback.mean_milli), (2, 750));
    assert!(lens.generated_tokens > 1, "{lens:?}");
    assert!(lens.time_to_first_token_millis.is_some() && lens.time_per_output_token_micros.is_some());
}
