//! Weights come back from prepared files. The worker's real binary over HTTP, with the trained demo family.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use serde_json::json;
use turret_crds::WorkerReport;
use turret_crds::report::Tier;
use turret_tests::cluster::family as demo;
use turret_tests::worker::document::{Family, uri};
use turret_tests::worker::process::{Options, TOKEN, Worker};

const LENSES: [&str; 2] = ["pirate", "shout"];

fn family() -> Family {
    let at = |path: &str| uri(&demo::Family::folder().join(path));
    let family = Family::default().group("a", &at("base"));
    LENSES.iter().fold(family, |family, lens| family.lens("a", lens, &at(&format!("lenses/{lens}"))))
}

async fn ask(worker: &Worker, lens: &str) {
    let family = demo::Family::read().unwrap();
    let case = &family.cases("base", Some(lens))[0];
    assert_eq!(worker.chat(&format!("a:{lens}"), &case.messages).await.as_ref(), Ok(&case.text), "{lens}");
}

/// Prepared files, with when they were last read.
fn prepared(cache: &Path) -> BTreeMap<PathBuf, SystemTime> {
    let entries = std::fs::read_dir(cache.join("prepared")).into_iter().flatten().flatten();
    let whole = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "prepared");
    let paths = entries.map(|entry| entry.path()).filter(whole);
    paths.map(|path| (path.clone(), path.metadata().unwrap().modified().unwrap())).collect()
}

/// Bytes of prepared files, by the report.
fn reported(report: &WorkerReport) -> u64 {
    let disk = report.state.tiers.iter().find(|tier| tier.tier == Tier::Disk);
    disk.map_or(0, |tier| tier.working_bytes)
}

/// Bytes of prepared files, by a recount.
fn recount(cache: &Path) -> u64 {
    prepared(cache).keys().map(|path| path.metadata().unwrap().len()).sum()
}

fn on(cache: &Path) -> Options {
    Options { cache: Some(cache.into()), ..Options::default() }
}

#[tokio::test]
async fn what_was_in_memory_comes_back_from_prepared_files_and_damaged_ones_are_made_anew() {
    let disk = tempfile::tempdir().unwrap();
    let cache = disk.path().join("cache");
    let document = family().document();
    let all_prepared = |r: &WorkerReport| prepared(&cache).len() == 3 && reported(r) == recount(&cache);
    let first = Worker::start_with(&document, on(&cache));
    for lens in LENSES {
        ask(&first, lens).await;
    }
    first.wait("all prepared", all_prepared).await;
    drop(first);
    let written = prepared(&cache);

    let second = Worker::start_with(&document, on(&cache));
    second.wait("counted", |r| reported(r) == recount(&cache)).await;
    ask(&second, LENSES[0]).await;
    let read = prepared(&cache);
    let unread = written.iter().filter(|(path, at)| read[*path] == **at).count();
    assert_eq!(unread, 1, "the base and one lens came from them, the other lens was not asked for");
    assert!(!second.log().contains("of no use"));
    drop(second);

    // One bit of each, somewhere in the weights.
    for path in written.keys() {
        let mut bytes = std::fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }
    let third = Worker::start_with(&document, on(&cache));
    for lens in LENSES {
        ask(&third, lens).await;
    }
    third.wait("made anew", all_prepared).await;
    assert_eq!(third.log().matches("a prepared file is of no use").count(), 3, "{}", third.log());
    drop(third);
    let fourth = Worker::start_with(&document, on(&cache));
    for lens in LENSES {
        ask(&fourth, lens).await;
    }
    assert!(!fourth.log().contains("of no use"));
}

#[tokio::test]
async fn without_room_on_the_disk_nothing_is_prepared_and_everything_is_served() {
    let disk = tempfile::tempdir().unwrap();
    let cache = disk.path().join("cache");
    let mut family = family();
    family.placement["memory"]["diskBudget"] = json!("1Ki");
    let worker = Worker::start_with(&family.document(), on(&cache));
    for _ in 0..2 {
        ask(&worker, "pirate").await;
        worker.wait("released", |r| r.state.running_rows == 0).await;
        let url = format!("{}/control/v1/lenses/a:pirate/evict", worker.control);
        let evicted = worker.client.post(url).bearer_auth(TOKEN).send().await.unwrap();
        assert_eq!(evicted.status(), 202);
        worker.wait("gone", |r| r.lens("a", "pirate").unwrap().tier != Tier::Device).await;
    }
    assert_eq!(recount(&cache), 0);
}

/// Two bases that do not fit beside each other, so that every turn of the requests reads one.
fn in_turn() -> Family {
    let at = |path: &str| uri(&demo::Family::folder().join(path));
    let mut family = family().group("b", &at("base-b"));
    family.placement["memory"] = json!({"deviceBudget": "14Mi", "lensBudget": "4Mi"});
    family.placement["batching"] =
        json!({"maxContextTokens": 128, "maxRunningRows": 4, "prefillChunkTokens": 64});
    family
}

#[tokio::test]
async fn a_worker_that_is_killed_while_it_prepares_and_switches_leaves_nothing_half() {
    let disk = tempfile::tempdir().unwrap();
    let cache = disk.path().join("cache");
    let document = in_turn().document();
    let answers = demo::Family::read().unwrap();
    let b = &answers.cases("base-b", None)[0];
    for after_ms in [0, 5, 12, 25, 40, 60, 90, 130, 200, 300] {
        let worker = Worker::start_with(&document, on(&cache));
        let requests = async {
            for lens in LENSES.iter().cycle() {
                ask(&worker, lens).await;
                assert_eq!(worker.chat("b", &b.messages).await.as_ref(), Ok(&b.text));
            }
        };
        // Until it is killed: the end of the value is a SIGKILL.
        let _ = tokio::time::timeout(Duration::from_millis(after_ms), requests).await;
        assert!(!worker.log().contains("of no use"), "{}", worker.log());
        drop(worker);
    }
    let worker = Worker::start_with(&document, on(&cache));
    for lens in LENSES {
        ask(&worker, lens).await;
        assert_eq!(worker.chat("b", &b.messages).await.as_ref(), Ok(&b.text));
    }
    assert!(!worker.log().contains("of no use"), "{}", worker.log());
    let all = |r: &WorkerReport| prepared(&cache).len() == 4 && reported(r) == recount(&cache);
    let report = worker.wait("all prepared", all).await;
    assert!(report.state.switches >= 3, "the bases did not take turns: {report:#?}");
    let left = std::fs::read_dir(cache.join("prepared")).unwrap().count();
    assert_eq!(left, 4, "what was half written was written anew");
}
