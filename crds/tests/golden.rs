//! The wire formats, pinned: what operator, worker and gateway exchange.
//!
//! `worker_document.json` is what `placement.yaml` compiles to; `state_stream.ndjson` is a state stream of a
//! worker that serves it. After a deliberate change of a format, `TURRET_BLESS=1 cargo test -p turret-crds
//! --test golden` rewrites the document; read the difference before committing it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use turret_crds::alias::{EffectiveAlias, GroupAliases, WeightedLens};
use turret_crds::document::{Previous, WorkerDocument, compile};
use turret_crds::report::{ArtifactState, Change, StateEvent, Tier, WorkerReport, diff};
use turret_crds::token::{PublicKey, Scope};
use turret_crds::{ModelGroup, ModelPlacement};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap()
}

/// The public halves that `placement.yaml` is compiled with.
fn keys() -> Vec<PublicKey> {
    // RFC 8032, test vectors 1 and 2.
    vec![
        PublicKey {
            id: "operator-1".into(),
            scope: Scope::Control,
            x: "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo".into(),
        },
        PublicKey {
            id: "gateway-1".into(),
            scope: Scope::Serve,
            x: "PUAXw-hDiVqStwqnTRt-vJyYLM8uxJaMwM1V8Sr0Zgw".into(),
        },
    ]
}

fn compiled() -> WorkerDocument {
    let mut groups = Vec::new();
    let mut placements: Vec<ModelPlacement> = Vec::new();
    for document in serde_yaml::Deserializer::from_str(&read("placement.yaml")) {
        let value = serde_json::Value::deserialize(document).unwrap();
        match value["kind"].as_str().unwrap() {
            "ModelGroup" => groups.push(serde_json::from_value::<ModelGroup>(value).unwrap()),
            "ModelPlacement" => placements.push(serde_json::from_value(value).unwrap()),
            other => panic!("unexpected kind {other}"),
        }
    }
    let by_name: BTreeMap<_, _> = groups
        .iter()
        .map(|g| ((g.metadata.namespace.clone().unwrap(), g.metadata.name.clone().unwrap()), g))
        .collect();
    let stored = Some((6, "sha256:of the document before".into()));
    let previous = Previous { stored, reported: 6, ..Previous::default() };
    let compiled = compile(&placements[0], &by_name, &BTreeMap::new(), &keys(), &previous);
    assert_eq!(compiled.problems, []);
    compiled.document.unwrap()
}

#[test]
fn aliases_are_told_once_and_when_they_change() {
    let Some(StateEvent::Snapshot(before)) = stream().into_iter().next() else {
        panic!("a snapshot is first")
    };
    let aliases = |lens: &str| -> Arc<GroupAliases> {
        let targets = vec![WeightedLens { lens: lens.into(), weight: 1 }];
        Arc::new([("llama".to_owned(), vec![EffectiveAlias { name: "default".into(), targets }])].into())
    };
    let mut report = *before;
    for now in [aliases("polite"), aliases("terse"), Arc::default()] {
        let mut after = report.clone();
        after.aliases = now.clone();
        let change = diff(&report, &after).expect("they differ");
        assert_eq!(change, Change { aliases: Some(now), ..Change::default() });
        let text = serde_json::to_string(&StateEvent::Change(change)).unwrap();
        let StateEvent::Change(read) = serde_json::from_str(&text).unwrap() else { panic!("{text}") };
        report.apply(read);
        assert_eq!(report, after);
        assert_eq!(diff(&report, &after), None);
    }
}

fn pretty(document: &WorkerDocument) -> String {
    serde_json::to_string_pretty(document).unwrap() + "\n"
}

#[test]
fn a_placement_compiles_to_exactly_this_document() {
    let document = compiled();
    if std::env::var_os("TURRET_BLESS").is_some() {
        std::fs::write(path("worker_document.json"), pretty(&document)).unwrap();
    }
    assert_eq!(pretty(&document), read("worker_document.json"));
    assert_eq!(document.sequence, 7);
}

#[test]
fn the_document_is_read_and_written_without_loss() {
    let text = read("worker_document.json");
    let document: WorkerDocument = serde_json::from_str(&text).unwrap();
    assert_eq!(pretty(&document), text);
    assert_eq!(document.compute_digest(), document.digest);
    assert_eq!(WorkerDocument::from_gzip(&document.to_gzip()).unwrap(), document);
}

fn stream() -> Vec<StateEvent> {
    read("state_stream.ndjson").lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_state_stream_is_read_and_written_without_loss() {
    for (event, line) in stream().iter().zip(read("state_stream.ndjson").lines()) {
        assert_eq!(serde_json::to_string(event).unwrap(), line);
    }
}

#[test]
fn every_line_of_the_stream_is_the_difference_to_the_one_before() {
    let mut reports: Vec<WorkerReport> = Vec::new();
    for event in stream() {
        match event {
            StateEvent::Snapshot(report) => reports.push(*report),
            StateEvent::Change(change) => {
                let before = reports.last().expect("a snapshot comes first");
                let mut after = before.clone();
                after.apply(change.clone());
                assert_eq!(diff(before, &after), Some(change));
                reports.push(after);
            }
            StateEvent::Heartbeat => {}
        }
    }
    let document = compiled();
    let (first, last) = (&reports[0], reports.last().unwrap());
    assert_eq!(first.state.document, None, "the worker has just started");
    assert!(last.serves(document.sequence, &document.digest));
    assert!(last.state.ready);
    // Every artifact of the document is reported, and nothing else.
    let declared: Vec<_> = document
        .groups
        .iter()
        .flat_map(|g| g.lenses.iter().map(|l| (g.name.as_str(), l.name.as_str())))
        .collect();
    let reported: Vec<_> = last.lenses.iter().map(|l| (l.group.as_str(), l.name.as_str())).collect();
    assert_eq!(reported, declared);
    assert_eq!(last.base_of("llama").unwrap().key, document.group("llama").unwrap().base.key);
    assert_eq!(last.lens("llama", "polite").unwrap().tier, Tier::Disk);
    let failed: Vec<_> = last
        .lenses
        .iter()
        .filter(|l| matches!(l.state, ArtifactState::Failed { .. }))
        .map(|l| l.name.as_str())
        .collect();
    assert_eq!(failed, ["terse"]);
}
