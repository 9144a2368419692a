//! `turret-worker control` against a running worker: what it prints, and what came of it. Both are the real binary.

use std::process::Stdio;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use turret_crds::report::{StateEvent, Tier, WorkerReport};
use turret_tests::cluster::family as demo;
use turret_tests::worker::document::{Family, uri};
use turret_tests::worker::process::{PATIENCE, TOKEN, Worker, binary};

fn lens_uri(path: &str) -> String {
    uri(&demo::Family::folder().join(path))
}

/// Two groups over two bases, with three lenses.
fn family() -> Family {
    Family::default()
        .group("a", &lens_uri("base"))
        .lens("a", "french", &lens_uri("lenses/french"))
        .lens("a", "pirate", &lens_uri("lenses/pirate"))
        .group("b", &lens_uri("base-b"))
        .lens("b", "polite", &lens_uri("lenses-b/polite"))
}

fn command(url: &str, words: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.arg("control").args(words).args(["--url", url]).env("TURRET_TOKEN", TOKEN);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

/// What a command said at its end.
struct Said {
    code: Option<i32>,
    out: String,
    err: String,
}

async fn run(mut command: Command) -> Said {
    let output = tokio::time::timeout(PATIENCE, command.output()).await.expect("the command ends").unwrap();
    Said {
        code: output.status.code(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// What a command prints that does what was asked.
async fn done(worker: &Worker, words: &[&str]) -> String {
    let Said { code, out, err } = run(command(&worker.control, words)).await;
    assert!(code == Some(0) && err.is_empty(), "{words:?}: {code:?} {out} {err}");
    out
}

async fn json_of(worker: &Worker, words: &[&str]) -> Value {
    let words: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
    serde_json::from_str(&done(worker, &words).await).unwrap()
}

/// The one line that says why something is not done.
async fn refused(worker: &Worker, words: &[&str]) -> String {
    why(run(command(&worker.control, words)).await)
}

fn why(Said { code, out, err }: Said) -> String {
    assert!(code == Some(1) && out.is_empty() && err.lines().count() == 1, "{code:?} {out} {err}");
    err.strip_prefix("error: ").expect("it begins with what it is").trim_end().to_owned()
}

/// The row of a lens in the state: its cells.
fn row<'a>(state: &'a str, lens: &str) -> Vec<&'a str> {
    let line = state.lines().find(|line| line.split_whitespace().next() == Some(lens));
    let line = line.unwrap_or_else(|| panic!("{lens} is missing in\n{state}"));
    line.split("   ").map(str::trim).filter(|cell| !cell.is_empty()).collect()
}

fn is_resident(report: &WorkerReport, lens: &str) -> bool {
    report.lens("a", lens).unwrap().tier == Tier::Device
}

#[tokio::test]
async fn lenses_are_loaded_kept_and_evicted_by_hand() {
    let worker = Worker::start(&family().document());
    worker.settled().await;
    assert_eq!(row(&done(&worker, &["state"]).await, "a:pirate")[1], "Disk");
    assert_eq!(done(&worker, &["load", "a:pirate"]).await, "`a:pirate` is in memory\n");
    worker.wait("loaded", |r| is_resident(r, "pirate")).await;
    let state = done(&worker, &["state"]).await;
    let cells = row(&state, "a:pirate");
    assert!(
        cells[1] == "Device" && cells[2].ends_with("iB") && cells[3..] == ["-", "0", "-", "-"],
        "{state}"
    );
    assert!(state.lines().any(|line| line.split_whitespace().eq(["active", "a"])), "{state}");

    done(&worker, &["pin", "a:pirate"]).await;
    worker.wait("pinned", |r| r.lens("a", "pirate").unwrap().pinned).await;
    assert_eq!(row(&done(&worker, &["state"]).await, "a:pirate")[3], "pinned");
    let kept = "`a:pirate` is pinned or leased; unpin it, or release its leases, first";
    assert_eq!(refused(&worker, &["evict", "a:pirate"]).await, kept);
    done(&worker, &["unpin", "a:pirate"]).await;
    assert_eq!(done(&worker, &["evict", "a:pirate"]).await, "`a:pirate` leaves memory\n");
    worker.wait("evicted", |r| !is_resident(r, "pirate")).await;

    // Under the other names that people know, and for machines.
    assert_eq!(json_of(&worker, &["preload", "pirate"]).await, json!({"outcome": "Done"}));
    worker.wait("loaded", |r| is_resident(r, "pirate")).await;
    assert_eq!(json_of(&worker, &["unload", "pirate"]).await, json!({"outcome": "Accepted"}));
    worker.wait("evicted", |r| !is_resident(r, "pirate")).await;

    let both = done(&worker, &["load", "a:pirate", "french"]).await;
    assert_eq!(both, "`a:pirate`, `french` are in memory\n");
    worker.wait("both loaded", |r| is_resident(r, "pirate") && is_resident(r, "french")).await;
    let one_missing = refused(&worker, &["load", "a:french", "a:none"]).await;
    assert!(one_missing.contains("a:none"), "{one_missing}");

    assert!(refused(&worker, &["load", "a:none"]).await.contains("a:none"));
    assert!(refused(&worker, &["pin", "a"]).await.contains("GROUP:LENS"));
    assert!(refused(&worker, &["load", "b:polite"]).await.contains("switch to it first"));
    assert_eq!(done(&worker, &["switch", "b"]).await, "the base of `b` is active\n");
    let report: WorkerReport = serde_json::from_value(json_of(&worker, &["state"]).await).unwrap();
    assert_eq!(report.state.active_base.as_ref(), report.base_of("b").map(|base| &base.key));
    assert_eq!(done(&worker, &["load", "b:polite"]).await, "`b:polite` is in memory\n");
    assert!(refused(&worker, &["switch", "c"]).await.starts_with("`c` is not declared"));
}

#[tokio::test]
async fn a_lease_is_acquired_renewed_listed_and_released() {
    let worker = Worker::start(&family().document());
    worker.settled().await;
    assert_eq!(done(&worker, &["lease", "list"]).await, "no lease is running\n");
    let words = ["lease", "acquire", "a:french", "--ttl", "600", "--priority", "3", "--holder", "the tests"];
    let lease = json_of(&worker, &words).await;
    let id = lease["id"].as_str().unwrap();
    assert_eq!((&lease["lens"], &lease["priority"]), (&json!("french"), &json!(3)));
    worker.wait("loaded for its lease", |r| is_resident(r, "french")).await;

    let said = done(&worker, &["lease", "renew", id, "--ttl", "7200"]).await;
    assert!(said.contains(id) && said.contains("`a:french`"), "{said}");
    let list = done(&worker, &["lease", "list"]).await;
    let cells = row(&list, id);
    assert_eq!(cells[1..4], ["a:french", "the tests", "3"], "{list}");
    assert_eq!(cells[5], "yes", "{list}");
    assert_eq!(row(&done(&worker, &["state"]).await, "a:french")[3], "leased");
    let renewed = json_of(&worker, &["lease", "list"]).await;
    assert!(renewed["leases"][0]["expiresAt"].as_u64() > lease["expiresAt"].as_u64(), "{renewed}");

    assert_eq!(done(&worker, &["lease", "release", id]).await, format!("lease {id} has ended\n"));
    assert!(refused(&worker, &["lease", "release", id]).await.contains("there is no such lease"));
    let long = ["lease", "acquire", "a:french", "--ttl", "100000"];
    assert!(refused(&worker, &long).await.contains("86400"));
}

#[tokio::test]
async fn the_policy_in_force_is_told() {
    let mut family = family();
    let worker = Worker::start(&family.document());
    worker.settled().await;
    let said = done(&worker, &["policy"]).await;
    assert!(said.contains("ALRFU") && said.contains("idle lenses stay"), "{said}");
    assert_eq!(json_of(&worker, &["policy"]).await, json!({"policy": "ALRFU", "idleSeconds": 300}));

    family.placement["eviction"] = json!({"policy": "LRU", "highWatermarkPercent": 80, "idleSeconds": 30});
    worker.push(&family.document()).await;
    let wanted = json!({"policy": "LRU", "highWatermarkPercent": 80, "lowWatermarkPercent": 50, "idleSeconds": 30,
                        "sweepSeconds": 60});
    assert_eq!(json_of(&worker, &["policy"]).await, wanted);
}

#[tokio::test]
async fn a_drained_worker_takes_requests_again_when_that_is_undone() {
    let worker = Worker::start(&family().document());
    worker.settled().await;
    let asked = json!({"model": "a", "messages": [{"role": "user", "content": "?"}], "max_tokens": 1});
    let is_ready = async || {
        worker.client.get(format!("{}/readyz", worker.data)).send().await.unwrap().status() == StatusCode::OK
    };
    assert!(done(&worker, &["drain"]).await.contains("drain --undo"));
    worker.wait("draining", |r| r.state.draining && !r.state.ready).await;
    assert!(!is_ready().await);
    assert!(done(&worker, &["state"]).await.contains("no, it is draining"));
    let refused = worker.chat_raw(&asked).await;
    assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert!(refused.headers().contains_key("retry-after"));

    assert_eq!(done(&worker, &["drain", "--undo"]).await, "the worker takes requests\n");
    worker.wait("ready again", |r| r.state.ready && !r.state.draining).await;
    assert!(is_ready().await);
    assert_eq!(worker.chat_raw(&asked).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn what_changes_is_told_until_the_worker_ends() {
    let worker = Worker::start(&family().document());
    worker.settled().await;
    let mut watching = command(&worker.control, &["state", "--watch"]).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let mut line = async || tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap();
    // The table is there before anything is asked for.
    while line().await.expect("the state").split_whitespace().next() != Some("b:polite") {}
    done(&worker, &["load", "a:pirate"]).await;
    loop {
        let said = line().await.expect("the change");
        if said.starts_with("a:pirate: ") && said.contains("Disk → Device") {
            break;
        }
    }
    let url = worker.control.clone();
    // The end of the value is a SIGKILL.
    drop(worker);
    while line().await.is_some() {}
    drop(lines);
    let output = tokio::time::timeout(PATIENCE, watching.wait_with_output()).await.unwrap().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.code() == Some(1) && err.contains(&url), "{err}");
}

#[tokio::test]
async fn the_stream_is_passed_on_for_machines() {
    let worker = Worker::start(&family().document());
    worker.settled().await;
    let mut watching = command(&worker.control, &["state", "--watch", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(watching.stdout.take().unwrap()).lines();
    let first = tokio::time::timeout(PATIENCE, lines.next_line()).await.unwrap().unwrap().unwrap();
    assert!(matches!(serde_json::from_str(&first).unwrap(), StateEvent::Snapshot(_)), "{first}");
}

#[tokio::test]
async fn who_is_not_allowed_or_not_there_is_said_with_what_to_do() {
    let worker = Worker::start(&family().document());
    worker.settled().await;
    let mut wrong = command(&worker.control, &["state"]);
    wrong.env("TURRET_TOKEN", "another");
    let mut none = command(&worker.control, &["state"]);
    none.env_remove("TURRET_TOKEN");
    for command in [wrong, none] {
        let said = why(run(command).await);
        assert!(said.contains(&worker.control) && said.contains("--token-file"), "{said}");
    }
    // A file that is named goes before a variable that is set.
    let file = worker.folder.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let mut named = command(&worker.control, &["state", "--token-file", file.to_str().unwrap()]);
    named.env("TURRET_TOKEN", "another");
    assert_eq!(run(named).await.code, Some(0));

    let said = why(run(command(&worker.data, &["state"])).await);
    assert!(said.contains("not its data port"), "{said}");

    let url = worker.control.clone();
    drop(worker);
    let said = why(run(command(&url, &["load", "a:pirate"])).await);
    assert!(said.starts_with(&format!("nobody answers at {url}; check that the worker runs")), "{said}");
    assert!(said.contains("Connection refused"), "{said}");
}
