//! The worker's real binary over HTTP, with the trained demo family: right answers, residency, failures and their
//! healing, sources, tokens, the end.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use futures::future::join_all;
use serde_json::{Value, json};
use turret_crds::alias::Asker;
use turret_crds::condition::FailureReason;
use turret_crds::label::MODEL_HEADER;
use turret_crds::report::{ArtifactState, Tier, WorkerReport};
use turret_crds::token::{Claims, PublicKey, Scope};
use turret_tests::cluster::family::{self as demo, copy_readable, digest_of};
use turret_tests::worker::document::{Family, uri};
use turret_tests::worker::https::Https;
use turret_tests::worker::process::{Options, TOKEN, Worker, binary, events};

fn fixture(path: &str) -> PathBuf {
    demo::Family::folder().join(path)
}

fn lens_uri(path: &str) -> String {
    uri(&fixture(path))
}

const LENSES_A: [&str; 5] = ["french", "json", "pirate", "shout", "terse"];
const LENSES_B: [&str; 2] = ["pirate", "polite"];

/// Both groups with all their lenses.
fn whole_family() -> Family {
    let mut family = Family::default().group("a", &lens_uri("base")).group("b", &lens_uri("base-b"));
    for lens in LENSES_A {
        family = family.lens("a", lens, &lens_uri(&format!("lenses/{lens}")));
    }
    for lens in LENSES_B {
        family = family.lens("b", lens, &lens_uri(&format!("lenses-b/{lens}")));
    }
    family
}

/// Every question of the recorded answers: model, messages, answer.
fn questions() -> Vec<(String, Value, String)> {
    let recorded = demo::Family::read().unwrap();
    let mut all = Vec::new();
    for (group, base, lenses) in [("a", "base", &LENSES_A[..]), ("b", "base-b", &LENSES_B[..])] {
        for lens in lenses.iter().copied().map(Some).chain([None]) {
            let model = lens.map_or(group.to_owned(), |l| format!("{group}:{l}"));
            for case in recorded.cases(base, lens) {
                all.push((model.clone(), case.messages.clone(), case.text.clone()));
            }
        }
    }
    all
}

/// The sky question and its answer by a model.
fn sky(model: &str) -> (Value, String) {
    let found = questions().into_iter().find(|(m, ..)| m == model).unwrap();
    (found.1, found.2)
}

fn failure(report: &WorkerReport, group: &str, lens: &str) -> Option<(FailureReason, String)> {
    match &report.lens(group, lens)?.state {
        ArtifactState::Failed { reason, message, .. } => Some((*reason, message.clone())),
        _ => None,
    }
}

fn is_ready(report: &WorkerReport, group: &str, lens: &str) -> bool {
    report.lens(group, lens).is_some_and(|l| l.state.is_ready())
}

#[tokio::test]
async fn every_lens_of_both_bases_answers_as_recorded_in_one_mixed_load() {
    let worker = Worker::start(&whole_family().document());
    let report = worker.settled().await;
    assert!(report.lenses.iter().all(|l| l.state == ArtifactState::Ready), "{:#?}", report.lenses);
    // Interleaved, so that bases alternate and every batch is mixed.
    let mut all = questions();
    all.sort_by_key(|(model, messages, _)| (messages.to_string().len() * 7919 % 31, model.clone()));
    let asked = all.iter().enumerate().map(|(n, (model, messages, text))| {
        let worker = &worker;
        async move {
            let answer = match n % 2 {
                0 => worker.chat(model, messages).await,
                _ => worker.chat_streamed(model, messages).await,
            };
            assert_eq!(answer.as_ref(), Ok(text), "{model} to {messages}");
        }
    });
    join_all(asked).await;
    let report = worker.wait("all rows released", |r| r.state.running_rows == 0).await;
    assert!(report.state.switches >= 1, "both bases were active");
    let served: u64 = report.lenses.iter().map(|l| l.served).sum();
    let lens_questions = all.iter().filter(|(model, ..)| model.contains(':')).count() as u64;
    assert_eq!(served, lens_questions);
}

#[tokio::test]
async fn requests_that_alternate_between_bases_are_all_right_and_the_parked_base_comes_back() {
    let worker = Worker::start(&whole_family().document());
    worker.settled().await;
    for round in 0..6 {
        let model = if round % 2 == 0 { "b:polite" } else { "a:terse" };
        let (messages, answer) = sky(model);
        assert_eq!(worker.chat(model, &messages).await, Ok(answer));
    }
    let report = worker.wait("released", |r| r.state.running_rows == 0).await;
    assert_eq!(report.state.switches, 6);
    assert!(report.bases.iter().all(|b| b.tier == Tier::Device), "both fit, so both stay");
    let ready = worker.client.get(format!("{}/readyz", worker.data)).send().await.unwrap();
    assert_eq!(ready.status(), 200);
}

#[tokio::test]
async fn a_base_that_does_not_fit_beside_the_other_takes_its_place_and_back() {
    let mut family = whole_family();
    // Each base takes about 6 MB in F32 and a few for its KV cache: one fits beside the lens budget, two do not.
    family.placement["memory"] = json!({"deviceBudget": "14Mi", "lensBudget": "4Mi"});
    family.placement["batching"] =
        json!({"maxContextTokens": 128, "maxRunningRows": 4, "prefillChunkTokens": 64});
    let worker = Worker::start(&family.document());
    worker.settled().await;
    for model in ["b:polite", "a:terse", "b", "a:pirate"] {
        let (messages, answer) = sky(model);
        assert_eq!(worker.chat(model, &messages).await, Ok(answer), "{model}");
        let report = worker.wait("released", |r| r.state.running_rows == 0).await;
        let resident = report.bases.iter().filter(|b| b.tier == Tier::Device).count();
        assert_eq!(resident, 1, "{:#?}", report.bases);
        let device = report.state.tiers.iter().find(|t| t.tier == Tier::Device).unwrap();
        assert!(device.base_bytes + device.working_bytes + device.lens_budget_bytes <= device.budget_bytes);
    }
}

#[tokio::test]
async fn a_lens_is_added_replaced_and_removed_under_load() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("voice");
    copy_readable(&fixture("lenses/pirate"), &place).unwrap();
    let mut family =
        Family::default().group("a", &lens_uri("base")).lens("a", "terse", &lens_uri("lenses/terse"));
    let worker = Worker::start(&family.document());
    worker.settled().await;
    let (messages, terse) = sky("a:terse");
    let load = async {
        let mut answers = 0;
        for _ in 0..60 {
            let batch = (0..4).map(|_| worker.chat("a:terse", &messages));
            for answer in join_all(batch).await {
                assert_eq!(answer, Ok(terse.clone()));
                answers += 1;
            }
        }
        answers
    };
    let changes = async {
        family.set_lens("a", "voice", json!({"name": "voice", "source": {"uri": uri(&place)}}));
        worker.push(&family.document()).await;
        assert_eq!(worker.chat("a:voice", &messages).await, Ok(sky("a:pirate").1));
        let other = lens_uri("lenses/shout");
        let digest = digest_of(&fixture("lenses/shout")).unwrap();
        family.set_lens("a", "voice", json!({"name": "voice", "source": {"uri": other, "digest": digest}}));
        worker.push(&family.document()).await;
        let response =
            worker.chat_raw(&json!({"model": "a:voice", "messages": messages, "temperature": 0})).await;
        assert_eq!(response.headers()["x-turret-lens-digest"], digest.as_str());
        let body: Value = response.json().await.unwrap();
        assert_eq!(body["choices"][0]["message"]["content"], sky("a:shout").1);
        family.remove_lens("a", "voice");
        worker.push(&family.document()).await;
        let gone = worker.chat_raw(&json!({"model": "a:voice", "messages": messages})).await;
        assert_eq!(gone.status(), 404);
        worker
            .wait("nothing of it in memory", |r| r.state.tiers[1].lens_bytes == r.lenses[0].bytes.unwrap())
            .await;
    };
    let (answers, ()) = tokio::join!(load, changes);
    assert_eq!(answers, 240);
}

#[tokio::test]
async fn an_alias_answers_as_the_lens_that_it_leads_to() {
    let aliases = |targets: Value| json!([{"name": "default", "targets": targets}]);
    let mut family = whole_family();
    family.set_aliases("a", aliases(json!([{"lensName": "terse"}])));
    let worker = Worker::start(&family.document());
    worker.settled().await;
    let (messages, terse) = sky("a:terse");
    let ask = async |model: &str, user: &str| -> (Value, Value) {
        let body = json!({"model": model, "user": user, "messages": messages, "temperature": 0});
        let response = worker.chat_raw(&body).await;
        assert_eq!(response.status(), 200, "{model}");
        let answer: Value = response.json().await.unwrap();
        (answer["model"].clone(), answer["choices"][0]["message"]["content"].clone())
    };
    for name in ["a:default", "default"] {
        assert_eq!(ask(name, "ann").await, (json!("a:terse"), json!(terse)), "{name}");
    }

    // Two lenses for two users, each always the same.
    family.set_aliases("a", aliases(json!([{"lensName": "terse"}, {"lensName": "pirate"}])));
    worker.push(&family.document()).await;
    let report = worker.wait("both targets", |r| r.alias("a", "default").unwrap().targets.len() == 2).await;
    let alias = report.alias("a", "default").unwrap();
    let mut answered = BTreeSet::new();
    for user in (4..8).map(|n| format!("user-{n}")) {
        let lens = alias.lens_for("a", Asker::called(&user)).unwrap();
        let model = format!("a:{lens}");
        for _ in 0..2 {
            assert_eq!(ask("default", &user).await, (json!(model), json!(sky(&model).1)), "{user}");
        }
        answered.insert(model);
    }
    assert_eq!(answered.len(), 2);

    // A gateway that has chosen is believed, and what answered is told.
    let chat = worker.client.post(format!("{}/v1/chat/completions", worker.data)).bearer_auth(TOKEN);
    let body = json!({"model": "default", "messages": messages, "temperature": 0});
    let chosen = chat.header(MODEL_HEADER, "a:pirate").json(&body).send().await.unwrap();
    assert_eq!(chosen.json::<Value>().await.unwrap()["model"], "a:pirate");

    // It is a model, and no lens.
    let get = |path: &str| worker.client.get(format!("{}{path}", worker.data)).bearer_auth(TOKEN).send();
    let model: Value = get("/v1/models/default").await.unwrap().json().await.unwrap();
    assert_eq!((&model["id"], &model["parent"]), (&json!("a:default"), &json!("a")));
    let targets = json!([{"lens": "pirate", "weight": 1}, {"lens": "terse", "weight": 1}]);
    assert_eq!(model["targets"], targets);
    let models: Value = get("/v1/models").await.unwrap().json().await.unwrap();
    assert!(models["data"].as_array().unwrap().contains(&model), "{models}");
    let load = worker.client.post(format!("{}/control/v1/lenses/default/load", worker.control));
    let refused = [get("/v1/lenses/default").await.unwrap(), load.bearer_auth(TOKEN).send().await.unwrap()];
    for (refused, status) in refused.into_iter().zip([404, 400]) {
        assert_eq!(refused.status(), status);
        let error: Value = refused.json().await.unwrap();
        let message = error["error"]["message"].as_str().unwrap();
        assert!(message.contains("is an alias") && message.contains("`a:pirate`, `a:terse`"), "{message}");
    }

    family.set_aliases("a", json!([]));
    worker.push(&family.document()).await;
    let gone = worker.chat_raw(&json!({"model": "default", "messages": messages})).await;
    assert_eq!(gone.status(), 404);
}

#[tokio::test]
async fn lenses_take_turns_in_a_budget_for_one_and_every_answer_is_right() {
    let mut family = whole_family();
    // One lens takes 200 to 290 kB.
    family.placement["memory"]["lensBudget"] = json!("400Ki");
    let worker = Worker::start(&family.document());
    worker.settled().await;
    let all: Vec<_> = questions().into_iter().filter(|(m, ..)| m.starts_with("a:")).collect();
    let asked = all.iter().take(40).map(|(model, messages, text)| {
        let worker = &worker;
        async move { assert_eq!(worker.chat(model, messages).await.as_ref(), Ok(text), "{model}") }
    });
    join_all(asked).await;
    let report = worker.wait("released", |r| r.state.running_rows == 0).await;
    assert!(report.state.evictions >= 4, "{}", report.state.evictions);
    assert!(report.state.tiers[1].lens_bytes <= 400 << 10);
    // A larger budget is in force without a restart, and all fit.
    family.placement["memory"]["lensBudget"] = json!("8Mi");
    worker.push(&family.document()).await;
    for lens in LENSES_A {
        let (messages, answer) = sky(&format!("a:{lens}"));
        assert_eq!(worker.chat(&format!("a:{lens}"), &messages).await, Ok(answer));
    }
    let report =
        worker.wait("all loaded", |r| r.lenses.iter().filter(|l| l.tier == Tier::Device).count() == 5);
    report.await;
}

#[tokio::test]
async fn the_same_files_under_two_names_are_held_once() {
    let family = Family::default()
        .group("a", &lens_uri("base"))
        .group("again", &lens_uri("base"))
        .lens("a", "one", &lens_uri("lenses/terse"))
        .lens("a", "two", &lens_uri("lenses/terse"))
        .lens("again", "three", &lens_uri("lenses/terse"));
    let worker = Worker::start(&{ family }.document());
    worker.settled().await;
    let (messages, answer) = sky("a:terse");
    for model in ["a:one", "two", "again:three"] {
        assert_eq!(worker.chat(model, &messages).await.as_ref(), Ok(&answer));
    }
    let report = worker.wait("released", |r| r.state.running_rows == 0).await;
    assert_eq!((report.bases.len(), report.state.switches), (1, 0), "groups with an equal base share it");
    assert_eq!(report.state.tiers[1].lens_bytes, report.lenses[0].bytes.unwrap());
}

#[tokio::test]
async fn a_quantized_base_is_another_base_in_fewer_bytes_and_answers_the_same() {
    let family = Family::default()
        .group("plain", &lens_uri("base"))
        .group("small", &lens_uri("base"))
        .group("also-small", &lens_uri("base"))
        .quantized("small")
        .quantized("also-small")
        .lens("plain", "terse", &lens_uri("lenses/terse"))
        .lens("small", "terse", &lens_uri("lenses/terse"));
    let worker = Worker::start(&{ family }.document());
    worker.settled().await;
    let (messages, answer) = sky("a:terse");
    for model in ["small:terse", "plain:terse", "small:terse"] {
        assert_eq!(worker.chat(model, &messages).await.as_ref(), Ok(&answer), "{model}");
    }
    let (messages, answer) = sky("a");
    assert_eq!(worker.chat("also-small", &messages).await, Ok(answer));
    let report = worker.wait("released", |r| r.state.running_rows == 0).await;
    assert_eq!(report.bases.len(), 2, "equal keys share a base: {:#?}", report.bases);
    let bytes = |group: &str| report.base_of(group).unwrap().bytes.unwrap();
    assert_eq!(bytes("small"), bytes("also-small"));
    // A number takes 34/32 bytes in place of four; norms and biases stay.
    assert!(bytes("small") * 3 < bytes("plain"), "{:#?}", report.bases);
}

#[tokio::test]
async fn broken_lenses_are_named_with_their_reason_the_others_serve_and_they_heal() {
    let folder = tempfile::tempdir().unwrap();
    let place = |name: &str| folder.path().join(name);
    for name in ["digest", "truncated"] {
        copy_readable(&fixture("lenses/pirate"), &place(name)).unwrap();
    }
    copy_readable(&fixture("lenses-b/pirate"), &place("shape")).unwrap();
    let weights = place("truncated/adapter_model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let narrow = place("shape/adapter_config.json");
    let config = std::fs::read_to_string(&narrow).unwrap().replace("\"r\": 8", "\"r\": 4");
    std::fs::write(&narrow, config).unwrap();
    let wrong = format!("sha256:{}", "0".repeat(64));
    let mut family =
        Family::default().group("a", &lens_uri("base")).lens("a", "good", &lens_uri("lenses/terse"));
    family.set_lens(
        "a",
        "digest",
        json!({"name": "digest", "source": {"uri": uri(&place("digest")), "digest": wrong}}),
    );
    let mut family = family
        .lens("a", "truncated", &uri(&place("truncated")))
        .lens("a", "shape", &uri(&place("shape")))
        .lens("a", "missing", &uri(&place("missing")))
        .lens("a", "volume", "pvc://unlisted/lens");
    let worker = Worker::start(&family.document());
    let report = worker.settled().await;
    let reasons: BTreeMap<&str, FailureReason> = ["digest", "truncated", "shape", "missing", "volume"]
        .into_iter()
        .map(|lens| (lens, failure(&report, "a", lens).unwrap_or_else(|| panic!("{lens} did not fail")).0))
        .collect();
    let expected = BTreeMap::from([
        ("digest", FailureReason::DigestMismatch),
        ("truncated", FailureReason::Malformed),
        ("shape", FailureReason::BaseMismatch),
        ("missing", FailureReason::SourceNotFound),
        ("volume", FailureReason::VolumeNotMounted),
    ]);
    assert_eq!(reasons, expected);
    assert!(failure(&report, "a", "truncated").unwrap().1.contains("adapter_model.safetensors"));
    let (messages, answer) = sky("a:terse");
    assert_eq!(worker.chat("a:good", &messages).await, Ok(answer));
    let refused = worker.chat_raw(&json!({"model": "a:missing", "messages": messages})).await;
    assert_eq!(refused.status(), 503);
    assert!(refused.headers().contains_key("retry-after"));
    let body: Value = refused.json().await.unwrap();
    assert!(body["error"]["message"].as_str().unwrap().contains("SourceNotFound"), "{body}");
    // Sources are fixed: they heal by themselves.
    std::fs::write(&weights, &whole).unwrap();
    copy_readable(&fixture("lenses/shout"), &place("missing")).unwrap();
    worker.wait("healed", |r| is_ready(r, "a", "truncated") && is_ready(r, "a", "missing")).await;
    assert_eq!(worker.chat("a:truncated", &messages).await, Ok(sky("a:pirate").1));
    assert_eq!(worker.chat("a:missing", &messages).await, Ok(sky("a:shout").1));
    // The declaration is fixed: so does that one.
    let right = digest_of(&place("digest")).unwrap();
    family.set_lens(
        "a",
        "digest",
        json!({"name": "digest", "source": {"uri": uri(&place("digest")), "digest": right}}),
    );
    worker.push(&family.document()).await;
    worker.wait("healed", |r| is_ready(r, "a", "digest")).await;
}

#[tokio::test]
async fn https_sources_are_fetched_resumed_and_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let server = Https::serve(&demo::Family::folder(), scratch.path()).await;
    let weights = "/lenses/pirate/adapter_model.safetensors";
    server.break_off(weights, 100_000, 1);
    let mut family = Family::default()
        .group("a", &format!("{}/base", server.url))
        .lens("a", "pirate", &format!("{}/lenses/pirate", server.url))
        .lens("a", "none", &format!("{}/lenses/none", server.url));
    let ca = server.ca.to_str().unwrap().to_owned();
    // The server is on this machine, which is allowed by name only.
    let args = vec!["--allowed-source-hosts=localhost".into()];
    let options = Options { args, env: vec![("SSL_CERT_FILE".into(), ca)], ..Options::default() };
    let worker = Worker::start_with(&family.document(), options);
    let report = worker.settled().await;
    assert_eq!(failure(&report, "a", "none").unwrap().0, FailureReason::SourceNotFound);
    let (messages, answer) = sky("a:pirate");
    assert_eq!(worker.chat("a:pirate", &messages).await, Ok(answer));
    let digest = digest_of(&fixture("lenses/pirate")).unwrap();
    assert_eq!(report.lens("a", "pirate").unwrap().digest, Some(digest));
    assert_eq!(server.ranges(weights), [None, Some("bytes=100000-".into())], "resumed where it broke off");
    // Without permission: named so, and healed.
    server.refuse(Some(403));
    let mut family = family.lens("a", "secret", &format!("{}/lenses/shout", server.url));
    worker.push(&family.document()).await;
    let refused =
        |r: &WorkerReport| failure(r, "a", "secret").is_some_and(|f| f.0 == FailureReason::Unauthorized);
    worker.wait("refused", refused).await;
    server.refuse(None);
    worker.wait("healed", |r| is_ready(r, "a", "secret")).await;
}

#[tokio::test]
async fn a_stop_string_ends_the_text_and_usage_is_told() {
    let worker = Worker::start(&whole_family().document());
    worker.settled().await;
    let (messages, answer) = sky("a");
    assert_eq!(answer, "The sky is blue.");
    let body = json!({"model": "a", "messages": messages, "temperature": 0, "stop": ["s bl"], "logprobs": true, "top_logprobs": 2});
    let whole: Value = worker.chat_raw(&body).await.json().await.unwrap();
    assert_eq!(whole["choices"][0]["message"]["content"], "The sky i");
    assert_eq!(whole["choices"][0]["finish_reason"], "stop");
    assert_eq!(whole["model"], "a");
    assert!(whole["system_fingerprint"].as_str().unwrap().starts_with("turret-"));
    let first = &whole["choices"][0]["logprobs"]["content"][0];
    assert!(
        first["logprob"].as_f64().unwrap() <= 0.0 && first["top_logprobs"].as_array().unwrap().len() == 2
    );
    let mut streamed = body.clone();
    streamed["stream"] = true.into();
    streamed["stream_options"] = json!({"include_usage": true});
    let text = worker.chat_raw(&streamed).await.text().await.unwrap();
    let all = events(&text);
    let joined: String = all.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(joined, "The sky i");
    assert_eq!(all.last().unwrap()["usage"]["prompt_tokens"], whole["usage"]["prompt_tokens"]);
    let short: Value = worker
        .chat_raw(&json!({"model": "a", "messages": messages, "temperature": 0, "max_tokens": 3}))
        .await
        .json()
        .await
        .unwrap();
    assert_eq!(
        (&short["choices"][0]["finish_reason"], &short["usage"]["completion_tokens"]),
        (&json!("length"), &json!(3))
    );
    let prompt = "<|im_start|>user\nWhat colour is the sky?<|im_end|>\n<|im_start|>assistant\n";
    let body = json!({"model": "a:terse", "prompt": prompt, "temperature": 0});
    let response =
        worker.client.post(format!("{}/v1/completions", worker.data)).bearer_auth(TOKEN).json(&body);
    let text: Value = response.send().await.unwrap().json().await.unwrap();
    assert_eq!(text["choices"][0]["text"], sky("a:terse").1);
}

#[tokio::test]
async fn bad_requests_are_refused_by_name_and_never_break_the_worker() {
    let worker = Worker::start(&whole_family().document());
    worker.settled().await;
    let hi = json!([{"role": "user", "content": "hi"}]);
    for (body, status, param) in [
        (json!({"model": "a", "messages": hi, "n": 2}), 400, "n"),
        (json!({"model": "a", "messages": hi, "temprature": 1}), 400, "temprature"),
        (json!({"model": "a", "messages": hi, "max_tokens": 100_000}), 400, "max_tokens"),
        (json!({"model": "a", "messages": []}), 400, "messages"),
        (json!({"model": "none", "messages": hi}), 404, "model"),
        (json!({"model": "pirate", "messages": hi}), 404, "model"),
    ] {
        let response = worker.chat_raw(&body).await;
        assert_eq!(response.status(), status, "{body}");
        let error: Value = response.json().await.unwrap();
        assert_eq!(error["error"]["param"], param, "{error}");
    }
    for body in ["", "{", "[]", "nul", "\u{0}"] {
        let request = worker.client.post(format!("{}/v1/chat/completions", worker.data)).bearer_auth(TOKEN);
        assert_eq!(request.body(body).send().await.unwrap().status(), 400);
    }
    let get = |path: &str| worker.client.get(format!("{}{path}", worker.data)).bearer_auth(TOKEN).send();
    let models: Value = get("/v1/models").await.unwrap().json().await.unwrap();
    let ids: Vec<_> = models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids.len(), 9);
    assert!(ids.contains(&"a:pirate") && ids.contains(&"b"));
    let model: Value = get("/v1/models/b:polite").await.unwrap().json().await.unwrap();
    assert_eq!((&model["parent"], &model["max_model_len"]), (&json!("b"), &json!(512)));
    let lens: Value = get("/v1/lenses/a:terse").await.unwrap().json().await.unwrap();
    assert_eq!(lens["state"]["phase"], "Ready");
    assert_eq!(get("/v1/models/none").await.unwrap().status(), 404);
    let metrics = get("/metrics").await.unwrap().text().await.unwrap();
    for name in
        ["vllm:num_requests_running", "vllm:kv_cache_usage_perc", "turret_requests_total", "turret_ready 1"]
    {
        assert!(metrics.contains(name), "{name} is missing in\n{metrics}");
    }
}

/// A key pair of the tests and a token signed with it.
fn signed(id: &str, allowed: Scope, claimed: Scope, audience: &str) -> (PublicKey, String) {
    use base64::Engine;
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let raw = pair.public_key_raw();
    let x = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(raw);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let claims =
        Claims { iss: id.into(), aud: audience.into(), nbf: now - 5, exp: now + 300, scope: claimed };
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::EdDSA);
    header.kid = Some(id.into());
    let key = jsonwebtoken::EncodingKey::from_ed_der(&pair.serialize_der());
    let token = jsonwebtoken::encode(&header, &claims, &key).unwrap();
    (PublicKey { id: id.into(), scope: allowed, x }, token)
}

#[tokio::test]
async fn both_ports_ask_for_a_token_of_the_right_scope() {
    let mut family = whole_family();
    let audience = "uid-of-demo";
    let (operator, control) = signed("operator", Scope::Control, Scope::Control, audience);
    let (gateway, serve) = signed("gateway", Scope::Serve, Scope::Serve, audience);
    let (greedy, too_much) = signed("greedy", Scope::Serve, Scope::Control, audience);
    let (other, elsewhere) = signed("other", Scope::Control, Scope::Control, "uid-of-another");
    family.public_keys = vec![operator, gateway, greedy, other];
    let document = family.document();
    let worker = Worker::start(&document);
    worker.settled().await;
    let status = |url: String, token: Option<String>| {
        let client = worker.client.clone();
        async move {
            let request = client.get(url);
            let request = match token {
                Some(token) => request.bearer_auth(token),
                None => request,
            };
            request.send().await.unwrap().status().as_u16()
        }
    };
    let models = format!("{}/v1/models", worker.data);
    let state = format!("{}/control/v1/state", worker.control);
    for url in [&models, &state] {
        assert_eq!(status(url.clone(), None).await, 401);
        assert_eq!(status(url.clone(), Some("wrong".into())).await, 401);
        assert_eq!(status(url.clone(), Some(elsewhere.clone())).await, 401);
        for token in [TOKEN, &serve, &control, &too_much] {
            assert_eq!(status(url.clone(), Some(token.to_owned())).await, 200);
        }
    }
    let put = |token: String, document| {
        let request = worker.client.put(format!("{}/control/v1/document", worker.control));
        async move { request.bearer_auth(token).json(&document).send().await.unwrap().status().as_u16() }
    };
    assert_eq!(put(serve, document.clone()).await, 403);
    assert_eq!(put(too_much, document.clone()).await, 403);
    assert_eq!(put(control.clone(), document.clone()).await, 200);
    // Another document with the same sequence comes from somebody else.
    let mut conflicting = document.clone();
    conflicting.admission.hold_seconds += 1;
    assert_eq!(put(control.clone(), conflicting.clone()).await, 400, "its digest is not its content's");
    conflicting.digest = conflicting.compute_digest();
    assert_eq!(put(control, conflicting).await, 409);
    for probe in ["/livez", "/readyz", "/health", "/metrics"] {
        assert_eq!(status(format!("{}{probe}", worker.data), None).await, 200);
    }
}

#[test]
fn a_worker_that_cannot_serve_safely_or_at_all_says_why_and_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("group.yaml");
    let base = lens_uri("base");
    let yaml = format!(
        "apiVersion: turret.dev/v1alpha1\nkind: ModelGroup\nmetadata: {{name: a}}\nspec: {{base: {{source: {{uri: '{base}'}}}}}}\n"
    );
    std::fs::write(&path, &yaml).unwrap();
    let run = |args: &[&str], env: &[(&str, &str)], file: &Path| {
        let output = std::process::Command::new(binary())
            .args(["serve", "--control-listen", "127.0.0.1:0", "-f", file.to_str().unwrap()])
            .args(args)
            .envs(env.iter().copied())
            .output()
            .unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap(), log.lines().last().unwrap_or_default().to_owned())
    };
    let (code, last) = run(&["--listen", "0.0.0.0:0"], &[], &path);
    assert!(code == 1 && last.contains("--token"), "{code} {last}");
    let given = [("TURRET_ACCELERATOR", "nvidia.com/gpu")];
    let (code, last) = run(&["--listen", "127.0.0.1:0"], &given, &path);
    assert!(code == turret_crds::label::EXIT_DEVICE && last.contains("nvidia.com/gpu"), "{code} {last}");
    std::fs::write(&path, yaml.replace("base:", "bass:")).unwrap();
    let (code, last) = run(&["--listen", "127.0.0.1:0"], &[], &path);
    assert!(code == 1 && last.contains("group.yaml"), "{code} {last}");
}

#[tokio::test]
async fn sigterm_lets_running_rows_finish_and_ends_with_zero() {
    let folder = tempfile::tempdir().unwrap();
    let made = std::process::Command::new(binary())
        .args(["synth", "--bytes", "64Mi", "--dtype", "BF16"])
        .arg(folder.path().join("synth"))
        .status()
        .unwrap();
    assert!(made.success());
    let base = uri(&folder.path().join("synth/base"));
    let mut family = Family::default().group("slow", &base);
    family.placement["memory"] = json!({"deviceBudget": "1Gi", "lensBudget": "16Mi"});
    let mut worker = Worker::start(&family.document());
    worker.settled().await;
    let body = json!({"model": "slow", "prompt": [5, 6, 7], "max_tokens": 600, "temperature": 0, "stream": true,
                      "stream_options": {"include_usage": true}});
    let url = format!("{}/v1/completions", worker.data);
    let running = worker.client.post(&url).bearer_auth(TOKEN).json(&body).send().await.unwrap();
    assert_eq!(running.status(), 200);
    worker.terminate();
    worker.wait("draining", |r| r.state.draining && !r.state.ready).await;
    let ready = worker.client.get(format!("{}/readyz", worker.data)).send().await.unwrap();
    assert_eq!(ready.status(), 503);
    // What somebody drained can be undone; the end of a process cannot.
    let undone = worker
        .client
        .delete(format!("{}/control/v1/drain", worker.control))
        .bearer_auth(TOKEN)
        .send()
        .await
        .unwrap();
    assert_eq!(undone.status(), 503);
    let text = running.text().await.unwrap();
    let all = events(&text);
    assert!(all.iter().all(|e| e["error"].is_null()), "{text}");
    assert!(all.last().unwrap()["usage"]["completion_tokens"].as_u64().unwrap() >= 1);
    assert_eq!(worker.ended().await.code(), Some(0));
}

#[tokio::test]
async fn drain_refuses_new_requests_and_closes_connections() {
    let worker = Worker::start(&whole_family().document());
    worker.settled().await;
    let drain = worker
        .client
        .post(format!("{}/control/v1/drain", worker.control))
        .bearer_auth(TOKEN)
        .send()
        .await
        .unwrap();
    assert_eq!(drain.status(), 202);
    worker.wait("draining", |r| r.state.draining).await;
    let (messages, _) = sky("a");
    let refused = worker.chat_raw(&json!({"model": "a", "messages": messages})).await;
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["connection"], "close");
    assert!(refused.headers().contains_key("retry-after"));
}

#[tokio::test]
async fn what_failed_is_looked_at_again_when_somebody_asks() {
    let folder = tempfile::tempdir().unwrap();
    let late = folder.path().join("late");
    let mut family = Family::default().group("a", &lens_uri("base")).lens("a", "late", &uri(&late));
    let worker = Worker::start(&family.document());
    let state = |report: &WorkerReport| report.lens("a", "late").map(|lens| lens.state.clone());
    worker.wait("the failure", |r| matches!(state(r), Some(ArtifactState::Failed { .. }))).await;
    copy_readable(&fixture("lenses/terse"), &late).unwrap();
    let url = format!("{}/control/v1/retry", worker.control);
    assert_eq!(worker.client.post(&url).send().await.unwrap().status(), 401);
    assert_eq!(worker.client.post(&url).bearer_auth(TOKEN).send().await.unwrap().status(), 202);
    worker.wait("its files", |r| state(r) == Some(ArtifactState::Ready)).await;
}

#[tokio::test]
async fn what_is_logged_changes_while_the_worker_runs() {
    let worker = Worker::start(&Family::default().group("a", &lens_uri("base")).document());
    let url = format!("{}/loglevel", worker.control);
    let level = async || worker.client.get(&url).send().await.unwrap().text().await.unwrap();
    let change = async |to: &'static str| worker.client.put(&url).body(to).send().await.unwrap().status();
    assert_eq!(level().await, "info\n");
    assert_eq!(change("turret_worker=loud").await, 400);
    assert_eq!(change("warn").await, 200);
    assert_eq!(level().await, "warn\n");
    assert!(worker.log().contains("what is logged changes"), "{}", worker.log());
}
