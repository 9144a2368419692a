//! `hf://` sources: the worker's real binary and a hub of the tests that behaves, misbehaves, refuses and goes away.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use safetensors::SafeTensors;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use turret_crds::condition::FailureReason;
use turret_crds::report::{ArtifactState, WorkerReport};
use turret_tests::cluster::family::{self as demo, digest_of};
use turret_tests::worker::document::Family;
use turret_tests::worker::family_hub::{REPO, failure, fixture, hf, hub, is_ready, one_lens, options, sky};
use turret_tests::worker::https::Https;
use turret_tests::worker::hub::{COMMIT, Fault, HubServer, Lie};
use turret_tests::worker::process::{Options, PATIENCE, Worker};

const WEIGHTS: &str = "pirate/adapter_model.safetensors";

fn with_secret(mut source: Value, name: &str) -> Value {
    source["secretRef"] = json!({"name": name});
    source
}

fn write_token(scratch: &Path, secret: &str, token: &str) {
    let folder = scratch.join("secrets").join(secret);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("token"), format!("{token}\n")).unwrap();
}

/// Every file below a folder, with the digest of its content.
fn files_below(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut files = BTreeMap::new();
    let Ok(entries) = std::fs::read_dir(folder) else { return files };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() && !path.is_symlink() {
            files.extend(files_below(&path));
        } else if let Ok(content) = std::fs::read(&path) {
            files.insert(path, hex::encode(Sha256::digest(content)));
        }
    }
    files
}

#[tokio::test]
async fn a_private_repository_is_served_its_commit_reported_and_its_token_stays_with_the_hub() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.ask_for("hf_secret");
    write_token(scratch.path(), "hub", "hf_secret");
    let mut family = Family::default().group_of("a", with_secret(hf("base"), "hub"));
    for (name, folder) in [("pirate", "pirate"), ("terse", "terse"), ("again", "terse")] {
        family = family.lens_of("a", name, with_secret(hf(&format!("lenses/{folder}")), "hub"));
    }
    let mut family = family.cached();
    family.placement["sourceSecrets"] = json!([{"name": "hub"}]);
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    for (lens, name) in [("pirate", "pirate"), ("terse", "terse"), ("again", "terse")] {
        let found = report.lens("a", lens).unwrap();
        assert_eq!(found.state, ArtifactState::Ready, "{lens}");
        assert_eq!(found.digest, Some(digest_of(&fixture(&format!("lenses/{name}"))).unwrap()));
        assert_eq!(found.revision.as_deref(), Some(COMMIT));
        let (messages, answer) = sky(Some(name));
        assert_eq!(worker.chat(&format!("a:{lens}"), &messages).await, Ok(answer));
    }
    let base = report.base_of("a").unwrap();
    assert_eq!(
        (base.revision.as_deref(), &*base.key.0),
        (Some(COMMIT), &*format!("hf://{REPO}/base@{COMMIT}/F32"))
    );

    assert_eq!(hub.served("terse/adapter_model.safetensors").len(), 1, "fetched once for two lenses");
    for unread in ["README.md", "pytorch_model.bin"] {
        assert!(hub.seen(unread).is_empty(), "{unread}");
    }
    for seen in hub.seen("") {
        let expected = (!seen.stored).then(|| "Bearer hf_secret".to_owned());
        assert_eq!(seen.authorization, expected, "{seen:?}");
    }
    assert!(hub.seen("").iter().any(|seen| seen.stored));
    assert!(
        !worker.log().contains("hf_secret") && !worker.log().contains("secret-of-the-url"),
        "{}",
        worker.log()
    );
}

#[tokio::test]
async fn a_base_in_several_files_is_fetched_by_its_index() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = HubServer::start().await;
    hub.add("demo-org/sharded", "", &fixture("base"));
    let whole = std::fs::read(fixture("base/model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&whole).unwrap();
    let names: Vec<&str> = tensors.names().into_iter().collect();
    let mut weight_map = BTreeMap::new();
    for (part, names) in names.chunks(names.len().div_ceil(2)).enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", part + 1);
        weight_map.extend(names.iter().map(|name| ((*name).to_owned(), file.clone())));
        let views = names.iter().map(|name| (*name, tensors.tensor(name).unwrap()));
        hub.put("demo-org/sharded", &file, safetensors::serialize(views, None).unwrap());
    }
    let index = json!({"metadata": {}, "weight_map": weight_map}).to_string();
    hub.put("demo-org/sharded", "model.safetensors.index.json", index.into_bytes());
    let source = json!({"uri": "hf://demo-org/sharded", "revision": COMMIT});
    let worker = Worker::start_with(
        &Family::default().group_of("a", source).document(),
        options(&hub, scratch.path()),
    );
    worker.settled().await;
    let (messages, answer) = sky(None);
    assert_eq!(worker.chat("a", &messages).await, Ok(answer));
    assert!(hub.seen("/model.safetensors").is_empty(), "only the parts are read");
    assert_eq!(hub.served("-of-00002.safetensors").len(), 2);
}

/// Numbers that look random and are the same in every run.
fn scattered(seed: u64) -> impl Iterator<Item = u64> {
    (1..).map(move |n: u64| {
        let mixed = (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ n).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 29)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 20
    })
}

#[tokio::test]
async fn a_download_that_is_cut_anywhere_goes_on_where_it_was() {
    let files = ["base/model.safetensors", "base/tokenizer.json", WEIGHTS];
    for seed in 0..4 {
        let scratch = tempfile::tempdir().unwrap();
        let hub = hub().await;
        let size = |file: &str| {
            let path = fixture(&file.replace("pirate/", "lenses/pirate/"));
            std::fs::metadata(path).unwrap().len() as usize
        };
        for (number, file) in files.iter().enumerate() {
            let part = size(file) / 4;
            let offsets = scattered(seed * 8 + number as u64).map(|n| 1000 + n as usize % (part - 1000));
            hub.next(file, offsets.take(3).map(Fault::Cut));
        }
        let family = Family::default().group_of("a", hf("base"));
        let mut family = family.lens_of("a", "pirate", hf("lenses/pirate")).cached();
        let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
        let (messages, answer) = sky(Some("pirate"));
        assert_eq!(worker.chat("a:pirate", &messages).await, Ok(answer), "seed {seed}");
        for file in files {
            let served = hub.served(file);
            assert_eq!(served.len(), 4, "{file} was cut three times: {served:#?}");
            let start = |range: &Option<String>| {
                range
                    .as_ref()
                    .map_or(0, |r| r["bytes=".len()..].trim_end_matches('-').parse::<usize>().unwrap())
            };
            let starts: Vec<usize> = served.iter().map(|s| start(&s.range)).collect();
            assert!(starts.is_sorted_by(|a, b| a < b), "{file} in seed {seed} began at {starts:?}");
            // What was on its way when the connection broke may be sent again, and nothing else.
            let twice: usize =
                served.iter().zip(&starts[1..]).map(|(s, next)| start(&s.range) + s.served - next).sum();
            let sent: usize = served.iter().map(|s| s.served).sum();
            assert_eq!(sent, size(file) + twice, "{file} in seed {seed}");
            assert!(
                twice < size(file) / 2,
                "{file} in seed {seed}: {twice} of {} bytes came twice",
                size(file)
            );
        }
    }
}

#[tokio::test]
async fn what_arrives_damaged_is_refused_and_not_kept() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.lie(WEIGHTS, Some(Lie::Content));
    hub.lie("terse/adapter_config.json", Some(Lie::Content));
    let long = std::fs::metadata(fixture("lenses/shout/adapter_model.safetensors")).unwrap().len() as usize;
    hub.lie("shout/adapter_model.safetensors", Some(Lie::Size(long + 1)));
    let family = one_lens(hf("lenses/pirate")).lens_of("a", "terse", hf("lenses/terse"));
    let mut family = family.lens_of("a", "shout", hf("lenses/shout")).cached();
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    for (lens, file) in [("pirate", WEIGHTS), ("terse", "terse/adapter_config.json")] {
        let (reason, message) = failure(&report, lens).unwrap();
        assert_eq!(reason, FailureReason::DigestMismatch, "{message}");
        assert!(message.contains(file) && message.contains("not kept"), "{message}");
    }
    let (reason, message) = failure(&report, "shout").unwrap();
    assert_eq!(reason, FailureReason::SourceUnavailable);
    assert!(message.contains(&long.to_string()) && message.contains(&(long + 1).to_string()), "{message}");
    let kept = files_below(&worker.folder.path().join("cache/blobs"));
    for file in ["lenses/pirate/adapter_model.safetensors", "lenses/terse/adapter_config.json"] {
        let mut damaged = std::fs::read(fixture(file)).unwrap();
        damaged[0] ^= 1;
        let digest = hex::encode(Sha256::digest(damaged));
        assert!(!kept.values().any(|kept| *kept == digest), "{file}");
    }
    let partial = worker.folder.path().join("cache/partial");
    let nothing_waits = async {
        // One may be on its way again at this moment.
        while !files_below(&partial).is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, nothing_waits).await.expect("nothing waits to be continued");
    for file in [WEIGHTS, "terse/adapter_config.json", "shout/adapter_model.safetensors"] {
        hub.lie(file, None);
    }
    worker.wait("healed", |r| ["pirate", "terse", "shout"].iter().all(|lens| is_ready(r, lens))).await;
}

#[tokio::test]
async fn a_token_that_appears_or_changes_counts_without_a_restart() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.ask_for("hf_first");
    let mut family = one_lens(with_secret(hf("lenses/pirate"), "hub"))
        .lens_of("a", "bare", hf("lenses/terse"))
        .lens_of("a", "unlisted", with_secret(hf("lenses/terse"), "other"));
    family.placement["sourceSecrets"] = json!([{"name": "hub"}]);
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    let expected = [
        ("pirate", FailureReason::Unauthorized, ["401", "`hub`", "hub/token"]),
        ("bare", FailureReason::Unauthorized, ["401", "without a token", "no secretRef"]),
        ("unlisted", FailureReason::SecretNotMounted, ["`other`", "spec.sourceSecrets", "does not list"]),
    ];
    for (lens, reason, words) in expected {
        let (found, message) = failure(&report, lens).unwrap();
        assert_eq!(found, reason, "{message}");
        for word in words {
            assert!(message.contains(word), "{lens}: `{word}` is not in: {message}");
        }
    }

    write_token(scratch.path(), "hub", "hf_wrong");
    let told = |r: &WorkerReport| {
        failure(r, "pirate").is_some_and(|f| f.1.contains("with the token of the Secret `hub`"))
    };
    let report = worker.wait("refused with the token", told).await;
    assert!(!format!("{report:?}{}", worker.log()).contains("hf_wrong"));
    write_token(scratch.path(), "hub", "hf_first");
    worker.wait("served", |r| is_ready(r, "pirate")).await;
    let (messages, answer) = sky(Some("pirate"));
    assert_eq!(worker.chat("a:pirate", &messages).await, Ok(answer));

    hub.ask_for("hf_second");
    write_token(scratch.path(), "hub", "hf_second");
    let mut family = family.lens_of("a", "shout", with_secret(hf("lenses/shout"), "hub"));
    worker.push(&family.document()).await;
    worker.wait("served with the new token", |r| is_ready(r, "shout")).await;
}

#[tokio::test]
async fn the_token_of_whoever_runs_the_worker_is_used_where_a_source_names_none() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.ask_for("hf_mine");
    let mut options = options(&hub, scratch.path());
    options.env.push(("HF_TOKEN".into(), "hf_mine".into()));
    let worker = Worker::start_with(&one_lens(hf("lenses/pirate")).document(), options);
    assert!(is_ready(&worker.settled().await, "pirate"));
    assert!(!worker.log().contains("hf_mine"));
}

#[tokio::test]
async fn an_https_source_is_shown_the_token_of_its_secret() {
    let scratch = tempfile::tempdir().unwrap();
    let server = Https::serve(&demo::Family::folder(), scratch.path()).await;
    write_token(scratch.path(), "models", "the models' token");
    let source = json!({"uri": format!("{}/lenses/pirate", server.url)});
    let mut family = one_lens(with_secret(source.clone(), "models")).lens_of("a", "bare", source);
    family.placement["sourceSecrets"] = json!([{"name": "models", "hosts": ["localhost"]}]);
    let options = Options {
        args: vec![
            "--allowed-source-hosts=localhost".into(),
            format!("--secrets-dir={}", scratch.path().join("secrets").display()),
        ],
        env: vec![
            ("SSL_CERT_FILE".into(), server.ca.to_str().unwrap().into()),
            ("HF_TOKEN".into(), "for the hub only".into()),
        ],
        ..Options::default()
    };
    let worker = Worker::start_with(&family.document(), options);
    let report = worker.settled().await;
    assert!(is_ready(&report, "pirate") && is_ready(&report, "bare"));
    let shown = server.authorizations("/lenses/pirate/adapter_config.json");
    assert!(shown.contains(&Some("Bearer the models' token".into())) && shown.contains(&None), "{shown:?}");
    assert_eq!(shown.len(), 2, "{shown:?}");
}

#[tokio::test]
async fn what_the_hub_does_not_have_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.put("demo-org/empty", "README.md", b"nothing".to_vec());
    let other = "f".repeat(40);
    let at = |uri: &str, revision: &str| json!({"uri": uri, "revision": revision});
    let mut family = one_lens(at("hf://demo-org/none", COMMIT))
        .lens_of("a", "revision", at(&format!("hf://{REPO}/lenses/pirate"), &other))
        .lens_of("a", "folder", hf("lenses/none"))
        .lens_of("a", "file", at("hf://demo-org/empty", COMMIT));
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    for (lens, words) in [
        ("pirate", ["demo-org/none", "no repository", "source.uri"]),
        ("revision", [REPO, &other, "source.revision"]),
        ("folder", [REPO, "no folder", "`lenses/none`"]),
        ("file", ["demo-org/empty", COMMIT, "adapter_config.json"]),
    ] {
        let (reason, message) = failure(&report, lens).unwrap();
        assert_eq!(reason, FailureReason::SourceNotFound, "{message}");
        for word in words {
            assert!(message.contains(word), "{lens}: `{word}` is not in: {message}");
        }
    }
}

#[tokio::test]
async fn a_hub_that_is_busy_broken_or_forgetful_is_asked_again() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.next(&format!("/revision/{COMMIT}"), [Fault::Status(429, Some(1)), Fault::Status(503, None)]);
    hub.next("pirate/adapter_config.json", [Fault::Status(500, None), Fault::Status(502, None)]);
    // Cut, and what is asked for then is not there any more.
    hub.next(WEIGHTS, [Fault::Cut(50_000), Fault::Status(416, None), Fault::Status(429, Some(1))]);
    let mut family = one_lens(hf("lenses/pirate")).cached();
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    assert!(is_ready(&report, "pirate"), "{:?}", failure(&report, "pirate"));
    assert_eq!(
        report.lens("a", "pirate").unwrap().digest,
        Some(digest_of(&fixture("lenses/pirate")).unwrap())
    );
    let asked = hub.seen(&format!("/revision/{COMMIT}"));
    assert_eq!(asked.len(), 3);
    assert!(asked[1].at - asked[0].at >= Duration::from_secs(1), "the hub asked for a second");
    let ranges: Vec<_> = hub.seen(WEIGHTS).iter().filter(|s| !s.stored).map(|s| s.range.is_some()).collect();
    assert_eq!(ranges, [false, true, false, false], "from the beginning after 416");
}

#[tokio::test]
async fn a_hub_that_only_ever_answers_with_errors_fails_the_lens_and_heals_it() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.next("pirate/adapter_config.json", std::iter::repeat_n(Fault::Status(503, None), 5));
    let mut family = one_lens(hf("lenses/pirate")).lens_of("a", "terse", hf("lenses/terse"));
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let failed = worker.wait("failed", |r| failure(r, "pirate").is_some()).await;
    let (reason, message) = failure(&failed, "pirate").unwrap();
    assert_eq!(reason, FailureReason::SourceUnavailable);
    assert!(message.contains("503") && message.contains("adapter_config.json"), "{message}");
    worker.wait("healed", |r| is_ready(r, "pirate") && is_ready(r, "terse")).await;
}

/// Lays a folder of the repository out as Hugging Face's tools do: links to blobs.
fn lay_out(cache: &Path, path: &str, folder: &Path) {
    let root = cache.join(format!("models--{}", REPO.replace('/', "--")));
    let (blobs, snapshot) = (root.join("blobs"), root.join("snapshots").join(COMMIT).join(path));
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let content = std::fs::read(entry.path()).unwrap();
        let blob = blobs.join(hex::encode(Sha256::digest(&content)));
        std::fs::write(&blob, content).unwrap();
        let up = "../".repeat(2 + path.split('/').count());
        let target = format!("{up}blobs/{}", blob.file_name().unwrap().to_str().unwrap());
        symlink(target, snapshot.join(entry.file_name())).unwrap();
    }
}

#[tokio::test]
async fn a_cache_of_hugging_face_s_tools_is_used_in_place_with_the_hub_gone() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.switch_off();
    let cache = scratch.path().join("huggingface/hub");
    lay_out(&cache, "base", &fixture("base"));
    lay_out(&cache, "lenses/pirate", &fixture("lenses/pirate"));
    let before = files_below(&cache);
    let digest = digest_of(&fixture("lenses/pirate")).unwrap();
    let mut source = hf("lenses/pirate");
    source["digest"] = json!(digest);
    let mut family = Family::default().group_of("a", hf("base")).lens_of("a", "pirate", source);
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    assert_eq!(report.lens("a", "pirate").unwrap().digest, Some(digest));
    let (messages, answer) = sky(Some("pirate"));
    assert_eq!(worker.chat("a:pirate", &messages).await, Ok(answer));
    assert!(hub.seen("").is_empty());
    assert_eq!(files_below(&cache), before, "it is read and not written to");
    assert!(files_below(&worker.folder.path().join("cache/blobs")).is_empty(), "nothing is copied");
}

#[tokio::test]
async fn offline_nothing_is_asked_and_what_was_fetched_before_is_served() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    let disk = scratch.path().join("disk");
    let start = |family: &mut Family, offline: bool| {
        let mut options = Options { cache: Some(disk.clone()), ..options(&hub, scratch.path()) };
        if offline {
            options.env.push(("HF_HUB_OFFLINE".into(), "1".into()));
        }
        Worker::start_with(&family.document(), options)
    };
    let mut family = one_lens(hf("lenses/pirate")).cached();
    {
        let worker = start(&mut family, false);
        assert!(is_ready(&worker.settled().await, "pirate"));
    }
    let asked = hub.seen("").len();
    let mut family = family.lens_of("a", "terse", hf("lenses/terse"));
    {
        let worker = start(&mut family, true);
        let report = worker.settled().await;
        assert!(is_ready(&report, "pirate"));
        let (reason, message) = failure(&report, "terse").unwrap();
        assert_eq!(reason, FailureReason::SourceUnavailable);
        assert!(message.contains("HF_HUB_OFFLINE") && message.contains("lenses/terse"), "{message}");
        assert_eq!(hub.seen("").len(), asked, "the hub was not asked");
    }
    // The same when the hub cannot be reached.
    hub.switch_off();
    let worker = start(&mut family, false);
    let report = worker.settled().await;
    assert!(is_ready(&report, "pirate"), "{:?}", failure(&report, "pirate"));
    assert_eq!(failure(&report, "terse").unwrap().0, FailureReason::SourceUnavailable);
}

#[tokio::test]
async fn private_addresses_are_refused_also_behind_names_and_redirects() {
    let scratch = tempfile::tempdir().unwrap();
    let server = Https::serve(&demo::Family::folder(), scratch.path()).await;
    let hub = hub().await;
    let elsewhere = [
        (WEIGHTS, "http://169.254.169.254/latest/meta-data/".to_owned(), "169.254.169.254"),
        ("terse/adapter_model.safetensors", "https://10.0.0.1/a".to_owned(), "10.0.0.1"),
        (
            "shout/adapter_model.safetensors",
            format!("{}/lenses/shout/adapter_model.safetensors", server.url),
            "127.0.0.1",
        ),
    ];
    for (file, at, _) in &elsewhere {
        hub.lie(file, Some(Lie::Elsewhere(at.clone())));
    }
    let mut family = one_lens(hf("lenses/pirate"))
        .lens_of("a", "terse", hf("lenses/terse"))
        .lens_of("a", "shout", hf("lenses/shout"))
        .lens("a", "literal", "https://169.254.169.254/latest")
        .lens("a", "odd", "https://0x0a000001/a")
        .lens("a", "name", &format!("{}/lenses/shout", server.url));
    let mut options = options(&hub, scratch.path());
    options.env.push(("SSL_CERT_FILE".into(), server.ca.to_str().unwrap().into()));
    let worker = Worker::start_with(&family.document(), options);
    let report = worker.settled().await;
    let lenses =
        ["pirate", "terse", "shout"].into_iter().zip(elsewhere.iter().map(|(_, _, address)| *address));
    for (lens, word) in
        lenses.chain([("literal", "169.254.169.254"), ("odd", "10.0.0.1"), ("name", "localhost")])
    {
        let (reason, message) = failure(&report, lens).unwrap();
        assert_eq!(reason, FailureReason::NotAllowed, "{lens}: {message}");
        for word in [word, "--allowed-source-hosts"] {
            assert!(message.contains(word), "{lens}: `{word}` is not in: {message}");
        }
    }
    assert!(server.ranges("/lenses/shout/adapter_model.safetensors").is_empty(), "it was not asked");
}

#[tokio::test]
async fn what_one_token_opened_stays_closed_to_others() {
    for how in ["fetched", "only looked at"] {
        let kept = |family: Family| if how == "fetched" { family.cached() } else { family };
        let scratch = tempfile::tempdir().unwrap();
        let hub = hub().await;
        hub.gate(&["hf_one", "hf_two"]);
        write_token(scratch.path(), "one", "hf_one");
        write_token(scratch.path(), "two", "hf_two");
        let disk = scratch.path().join("disk");
        let start = |family: &mut Family| {
            let options = Options { cache: Some(disk.clone()), ..options(&hub, scratch.path()) };
            Worker::start_with(&family.document(), options)
        };
        let mut family = kept(one_lens(with_secret(hf("lenses/pirate"), "one")));
        family.placement["sourceSecrets"] = json!([{"name": "one"}, {"name": "two"}]);
        let worker = start(&mut family);
        assert!(is_ready(&worker.settled().await, "pirate"));
        // The names of files are for everybody; that they are on this disk opens them to nobody.
        let family = family.lens_of("a", "bare", hf("lenses/pirate"));
        let mut family = kept(family.lens_of("a", "two", with_secret(hf("lenses/pirate"), "two")));
        worker.push(&family.document()).await;
        let report = worker.settled().await;
        assert_eq!(failure(&report, "bare").unwrap().0, FailureReason::Unauthorized, "{how}");
        assert!(is_ready(&report, "pirate") && is_ready(&report, "two"), "{how}: {report:#?}");
        assert_eq!(hub.served(WEIGHTS).len(), 1, "{how}: whoever may have it has what is here");
        drop(worker);

        // Nor does it when the hub cannot be asked.
        hub.switch_off();
        let worker = start(&mut family);
        let report = worker.settled().await;
        assert!(is_ready(&report, "pirate") && is_ready(&report, "two"), "{how}: {report:#?}");
        assert_eq!(failure(&report, "bare").unwrap().0, FailureReason::SourceUnavailable, "{how}");
    }
}

#[tokio::test]
async fn workers_that_share_a_disk_fetch_once_and_take_nothing_from_each_other() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    let disk = scratch.path().join("disk");
    let start = |family: &mut Family| {
        let options = Options { cache: Some(disk.clone()), ..options(&hub, scratch.path()) };
        Worker::start_with(&family.document(), options)
    };
    let family = Family::default().group_of("a", hf("base"));
    let mut family = family.lens_of("a", "pirate", hf("lenses/pirate")).cached();
    let (one, other) = (start(&mut family), start(&mut family));
    for worker in [&one, &other] {
        assert!(is_ready(&worker.settled().await, "pirate"));
    }
    for file in ["base/model.safetensors", WEIGHTS] {
        assert_eq!(hub.served(file).len(), 1, "{file}");
    }
    // What one needs no more, and has no room for, the other still has.
    family.remove_lens("a", "pirate");
    family.placement["memory"]["diskBudget"] = "1Ki".into();
    let mut family = family.lens_of("a", "terse", hf("lenses/terse"));
    one.push(&family.document()).await;
    one.wait("without room", |r| failure(r, "terse").is_some()).await;
    let (messages, answer) = sky(Some("pirate"));
    assert_eq!(other.chat("a:pirate", &messages).await, Ok(answer));
    drop(one);
    assert_eq!(other.chat("a:pirate", &messages).await.map(|_| ()), Ok(()));
}

#[tokio::test]
async fn a_file_that_is_damaged_on_the_disk_is_fetched_again() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    let mut family = one_lens(hf("lenses/pirate")).lens_of("a", "terse", hf("lenses/terse")).cached();
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    let blob = |lens: &str| {
        let content = std::fs::read(fixture(&format!("lenses/{lens}/adapter_model.safetensors"))).unwrap();
        let path = worker.folder.path().join("cache/blobs").join(hex::encode(Sha256::digest(&content)));
        (path, content)
    };
    let (path, mut content) = blob("pirate");
    *content.last_mut().unwrap() ^= 1;
    std::fs::write(path, content).unwrap();
    let (path, content) = blob("terse");
    std::fs::write(path, &content[..content.len() / 2]).unwrap();
    for lens in ["pirate", "terse"] {
        let (messages, answer) = sky(Some(lens));
        assert_eq!(worker.chat(&format!("a:{lens}"), &messages).await, Ok(answer));
        let (path, content) = blob(lens);
        assert!(std::fs::read(path).unwrap() == content, "{lens} is whole again");
        assert_eq!(hub.served(&format!("{lens}/adapter_model.safetensors")).len(), 2);
    }
    let again = worker.settled().await;
    assert_eq!(again.lens("a", "pirate").unwrap().digest, report.lens("a", "pirate").unwrap().digest);
}

#[tokio::test]
async fn what_is_larger_than_the_disk_budget_is_refused_with_numbers_and_comes_when_it_is_raised() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    let mut family = one_lens(hf("lenses/pirate"));
    family.placement["memory"]["diskBudget"] = "64Ki".into();
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let (reason, message) = failure(&worker.settled().await, "pirate").unwrap();
    assert_eq!(reason, FailureReason::DoesNotFit, "{message}");
    for word in ["adapter_model.safetensors", "65536", "spec.memory.diskBudget"] {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    family.placement["memory"]["diskBudget"] = "64Mi".into();
    worker.push(&family.document()).await;
    worker.wait("served", |r| is_ready(r, "pirate")).await;
}
