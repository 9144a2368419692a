//! Lenses that are fetched when somebody needs them: the worker's real binary and a hub of the tests that counts what it
//! sends.

use std::collections::BTreeSet;
use std::path::Path;

use futures::future::join_all;
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use turret_crds::condition::FailureReason;
use turret_crds::report::{Tier, WorkerReport};
use turret_tests::cluster::family::{Family as Demo, digest_of};
use turret_tests::worker::document::{Family, uri};
use turret_tests::worker::family_hub::{REPO, failure, fixture, hf, hub, is_ready, one_lens, options, sky};
use turret_tests::worker::https::Https;
use turret_tests::worker::hub::{HubServer, Lie};
use turret_tests::worker::process::{Options, TOKEN, Worker};

/// What is asked for of a file that is only looked at.
const GLIMPSE: &str = "bytes=0-65535";
const GLIMPSE_BYTES: usize = 64 << 10;
const LENSES: [&str; 5] = ["french", "json", "pirate", "shout", "terse"];

fn weights(lens: &str) -> String {
    format!("{lens}/adapter_model.safetensors")
}

fn size_of(lens: &str) -> usize {
    std::fs::metadata(fixture("lenses").join(weights(lens))).unwrap().len() as usize
}

fn tier(report: &WorkerReport, lens: &str) -> Tier {
    report.lens("a", lens).unwrap().tier
}

/// Answers right, whatever has to be fetched for it.
async fn ask(worker: &Worker, lens: &str) {
    let (messages, answer) = sky(Some(lens));
    assert_eq!(worker.chat(&format!("a:{lens}"), &messages).await, Ok(answer), "{lens}");
}

async fn control(worker: &Worker, method: Method, path: &str, body: Value) -> u16 {
    let url = format!("{}/control/v1/{path}", worker.control);
    let request = worker.client.request(method, url).bearer_auth(TOKEN).json(&body);
    request.send().await.unwrap().status().as_u16()
}

/// Names of the files that are whole on the disk.
fn blobs(cache: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(cache.join("blobs")).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

fn is_on_disk(cache: &Path, lens: &str) -> bool {
    let content = std::fs::read(fixture("lenses").join(weights(lens))).unwrap();
    blobs(cache).contains(&hex::encode(Sha256::digest(content)))
}

/// What counts towards the disk budget.
fn disk_bytes(cache: &Path) -> u64 {
    let folders = ["blobs", "partial", "prepared", "glimpses"].map(|folder| cache.join(folder));
    let entries = folders.iter().flat_map(|folder| std::fs::read_dir(folder).into_iter().flatten().flatten());
    entries.filter_map(|entry| Some(entry.metadata().ok()?.len())).sum()
}

/// Looks that were taken at a lens's weights, and times that they were sent.
fn sent(hub: &HubServer, lens: &str) -> (usize, usize) {
    let (looks, fetches): (Vec<_>, Vec<_>) =
        hub.served(&weights(lens)).into_iter().partition(|seen| seen.range.as_deref() == Some(GLIMPSE));
    assert!(looks.iter().all(|seen| seen.served <= GLIMPSE_BYTES), "{looks:?}");
    (looks.len(), fetches.len())
}

#[tokio::test]
async fn an_on_demand_lens_costs_its_header_until_somebody_asks_for_it() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    let disk = scratch.path().join("disk");
    let start = |family: &mut Family| {
        let options = Options { cache: Some(disk.clone()), ..options(&hub, scratch.path()) };
        Worker::start_with(&family.document(), options)
    };
    let family = one_lens(hf("lenses/terse")).cached();
    // `one_lens` calls it so.
    let mut family =
        family.lens_of("a", "asked", hf("lenses/pirate")).lens_of("a", "other", hf("lenses/shout"));
    let worker = start(&mut family);
    let report = worker.settled().await;
    for lens in ["pirate", "asked", "other"] {
        assert!(is_ready(&report, lens), "{:?}", failure(&report, lens));
        assert!(report.lens("a", lens).unwrap().bytes.is_some_and(|bytes| bytes > 0));
    }
    let digest = digest_of(&fixture("lenses/pirate")).unwrap();
    assert_eq!(report.lens("a", "asked").unwrap().digest.as_ref(), Some(&digest), "known before it is here");
    assert_eq!((tier(&report, "pirate"), tier(&report, "asked")), (Tier::Disk, Tier::Remote));
    assert_eq!((sent(&hub, "terse"), sent(&hub, "pirate"), sent(&hub, "shout")), ((0, 1), (1, 0), (1, 0)));
    assert!(is_on_disk(&disk, "terse") && !is_on_disk(&disk, "pirate"));

    let (messages, answer) = sky(Some("pirate"));
    assert_eq!(worker.chat("a:asked", &messages).await.as_ref(), Ok(&answer));
    let report = worker.settled().await;
    assert_eq!(tier(&report, "asked"), Tier::Device);
    assert_eq!(report.lens("a", "asked").unwrap().digest.as_ref(), Some(&digest), "it is what was seen");
    assert_eq!(sent(&hub, "pirate"), (1, 1));
    assert_eq!(hub.served(&weights("pirate"))[1].served, size_of("pirate"));
    assert!(is_on_disk(&disk, "pirate") && !is_on_disk(&disk, "shout"));
    drop(worker);

    // What is here is found here, and what was seen is not sent again.
    let worker = start(&mut family);
    let report = worker.settled().await;
    let tiers = ["pirate", "asked", "other"].map(|lens| tier(&report, lens));
    assert_eq!(tiers, [Tier::Disk, Tier::Disk, Tier::Remote]);
    assert_eq!(worker.chat("a:asked", &messages).await, Ok(answer));
    assert_eq!((sent(&hub, "pirate"), sent(&hub, "shout")), ((1, 1), (1, 0)));

    // Without the hub, whoever waits is told.
    hub.switch_off();
    let refused = worker.chat("a:other", &messages).await.unwrap_err();
    assert!(refused.starts_with("503") && refused.contains("SourceUnavailable"), "{refused}");
}

#[tokio::test]
async fn whoever_keeps_a_lens_has_it_fetched() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    let mut family = one_lens(hf("lenses/pirate")).lens_of("a", "terse", hf("lenses/terse")).lens_of(
        "a",
        "shout",
        hf("lenses/shout"),
    );
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    assert!(
        ["pirate", "terse", "shout"].iter().all(|lens| tier(&report, lens) == Tier::Remote),
        "{report:#?}"
    );
    assert_eq!(control(&worker, Method::POST, "lenses/a:pirate/load", json!({})).await, 204);
    assert_eq!(tier(&worker.settled().await, "pirate"), Tier::Device);
    let lease = json!({"lens": "a:terse", "ttlSeconds": 600});
    assert_eq!(control(&worker, Method::POST, "leases", lease).await, 201);
    worker.wait("loaded for its lease", |r| tier(r, "terse") == Tier::Device).await;
    assert_eq!(tier(&worker.settled().await, "shout"), Tier::Remote, "nobody has asked for it");

    let mut family = family.cached();
    worker.push(&family.document()).await;
    worker.wait("on the disk as is declared", |r| tier(r, "shout") == Tier::Disk).await;
    for lens in ["pirate", "terse", "shout"] {
        ask(&worker, lens).await;
        assert_eq!(sent(&hub, lens), (1, 1), "{lens}");
    }
}

#[tokio::test]
async fn what_its_header_tells_is_told_before_it_is_fetched() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    let config = std::fs::read_to_string(fixture("lenses/pirate/adapter_config.json")).unwrap();
    let narrow = config.replace("\"r\": 8", "\"r\": 4");
    assert_ne!(narrow, config);
    let whole = std::fs::read(fixture("lenses/pirate/adapter_model.safetensors")).unwrap();
    for (folder, config, weights) in
        [("narrow", narrow.as_str(), &whole[..]), ("short", config.as_str(), &whole[..whole.len() - 1])]
    {
        hub.put(REPO, &format!("lenses/{folder}/adapter_config.json"), config.as_bytes().to_vec());
        hub.put(REPO, &format!("lenses/{folder}/adapter_model.safetensors"), weights.to_vec());
    }
    let mut other = hf("lenses/terse");
    other["digest"] = json!(format!("sha256:{}", "0".repeat(64)));
    let mut family = one_lens(hf("lenses/pirate"))
        .lens_of("a", "narrow", hf("lenses/narrow"))
        .lens_of("a", "short", hf("lenses/short"))
        .lens_of("a", "terse", other);
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let report = worker.settled().await;
    assert!(is_ready(&report, "pirate"));
    for (lens, reason) in [
        ("narrow", FailureReason::BaseMismatch),
        ("short", FailureReason::Malformed),
        ("terse", FailureReason::DigestMismatch),
    ] {
        let (found, message) = failure(&report, lens).unwrap();
        assert_eq!(found, reason, "{lens}: {message}");
        assert_eq!(sent(&hub, lens).1, 0, "{lens} was fetched");
    }
}

#[tokio::test]
async fn what_turns_out_to_be_something_else_is_told_to_whoever_waits_and_heals() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.lie(&weights("pirate"), Some(Lie::End));
    let worker = Worker::start_with(&one_lens(hf("lenses/pirate")).document(), options(&hub, scratch.path()));
    assert!(is_ready(&worker.settled().await, "pirate"), "its header is right");
    let (messages, _) = sky(Some("pirate"));
    let refused = worker.chat("a:pirate", &messages).await.unwrap_err();
    for word in ["503", "DigestMismatch", "adapter_model.safetensors", "not kept"] {
        assert!(refused.contains(word), "`{word}` is not in: {refused}");
    }
    hub.lie(&weights("pirate"), None);
    worker.wait("healed", |r| is_ready(r, "pirate")).await;
    ask(&worker, "pirate").await;
}

#[tokio::test]
async fn a_server_that_sends_every_file_whole_will_do() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = hub().await;
    hub.send_whole();
    let worker = Worker::start_with(&one_lens(hf("lenses/pirate")).document(), options(&hub, scratch.path()));
    assert_eq!(tier(&worker.settled().await, "pirate"), Tier::Remote);
    assert!(!is_on_disk(&worker.folder.path().join("cache"), "pirate"));
    ask(&worker, "pirate").await;
    assert!(is_on_disk(&worker.folder.path().join("cache"), "pirate"));
}

#[tokio::test]
async fn of_an_https_source_that_says_its_digest_a_look_is_enough() {
    let scratch = tempfile::tempdir().unwrap();
    let server = Https::serve(&Demo::folder(), scratch.path()).await;
    let source =
        |lens: &str, digest: &str| json!({"uri": format!("{}/lenses/{lens}", server.url), "digest": digest});
    let digest = digest_of(&fixture("lenses/pirate")).unwrap();
    let wrong = format!("sha256:{}", "0".repeat(64));
    let plain = json!({"uri": format!("{}/lenses/shout", server.url)});
    let mut family = one_lens(source("pirate", &digest))
        .lens_of("a", "terse", source("terse", &wrong))
        .lens_of("a", "shout", plain);
    let options = Options {
        args: vec!["--allowed-source-hosts=localhost".into()],
        env: vec![("SSL_CERT_FILE".into(), server.ca.to_str().unwrap().into())],
        ..Options::default()
    };
    let worker = Worker::start_with(&family.document(), options);
    let report = worker.settled().await;
    assert!(["pirate", "terse", "shout"].iter().all(|lens| is_ready(&report, lens)), "{report:#?}");
    assert_eq!(report.lens("a", "pirate").unwrap().digest.as_ref(), Some(&digest));
    let tiers = ["pirate", "terse", "shout"].map(|lens| tier(&report, lens));
    assert_eq!(tiers, [Tier::Remote, Tier::Remote, Tier::Disk]);
    let ranges = |lens: &str| server.ranges(&format!("/lenses/{}", weights(lens)));
    assert_eq!((ranges("pirate"), ranges("shout")), (vec![Some(GLIMPSE.to_owned())], vec![None]));

    ask(&worker, "pirate").await;
    assert_eq!(ranges("pirate"), [Some(GLIMPSE.to_owned()), None]);
    let (messages, _) = sky(Some("terse"));
    let refused = worker.chat("a:terse", &messages).await.unwrap_err();
    for word in ["503", "DigestMismatch", wrong.as_str(), "spec.lenses[terse].source.digest"] {
        assert!(refused.contains(word), "`{word}` is not in: {refused}");
    }
}

#[tokio::test]
async fn lenses_of_three_times_the_disk_are_all_served_in_turn_and_again() {
    let scratch = tempfile::tempdir().unwrap();
    let hub = HubServer::start().await;
    let mut family = Family::default().group("a", &uri(&fixture("base")));
    for lens in LENSES {
        hub.add(REPO, &format!("lenses/{lens}/"), &fixture("lenses").join(lens));
        family = family.lens_of("a", lens, hf(&format!("lenses/{lens}")));
    }
    // Any one of them fits, and no two.
    let budget = LENSES.iter().map(|lens| size_of(lens)).sum::<usize>() / 3;
    family.placement["memory"]["diskBudget"] = json!(budget);
    let worker = Worker::start_with(&family.document(), options(&hub, scratch.path()));
    let cache = worker.folder.path().join("cache");
    let report = worker.settled().await;
    assert!(LENSES.iter().all(|lens| is_ready(&report, lens)), "{report:#?}");
    // Nor does memory hold two, so that each comes back from where it was fetched.
    let bytes = report.lenses.iter().map(|lens| lens.bytes.unwrap()).max().unwrap();
    family.placement["memory"]["lensBudget"] = json!(bytes);
    worker.push(&family.document()).await;
    for _ in 0..2 {
        for lens in LENSES {
            ask(&worker, lens).await;
            let taken = disk_bytes(&cache);
            assert!(taken <= budget as u64, "{lens}: {taken} of {budget} bytes");
            worker.wait("released", |r| r.state.running_rows == 0).await;
        }
    }
    let fetches: Vec<usize> = LENSES.iter().map(|lens| sent(&hub, lens).1).collect();
    assert_eq!(fetches, [2; 5], "each was fetched for each of its requests");
    let report = worker.settled().await;
    assert!(report.lenses.iter().all(|lens| lens.state.is_ready()), "{report:#?}");
    let at_home = LENSES.iter().filter(|lens| tier(&report, lens) == Tier::Remote).count();
    assert!(at_home >= 3, "{report:#?}");

    // All at once: each waits for its turn on the disk.
    join_all(LENSES.iter().map(|lens| ask(&worker, lens))).await;
    let taken = disk_bytes(&cache);
    assert!(taken <= budget as u64, "{taken} of {budget} bytes");
}
