//! `docs/troubleshooting.md` has a row for every reason there is.

use std::path::Path;

use crate::rules::kinds;

fn page() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/troubleshooting.md");
    std::fs::read_to_string(path).unwrap()
}

fn has_row(page: &str, reason: &str) -> bool {
    let row = |line: &str| line.starts_with(&format!("| `{reason}` |"));
    // Meaning and remedy: a row has three filled cells.
    page.lines().filter(|line| row(line)).any(|line| line.matches(" | ").count() == 2)
}

/// The constants of `condition::reason`, read from its source: constants cannot be listed otherwise.
fn condition_reasons() -> Vec<&'static str> {
    let source = include_str!("../../src/condition.rs");
    let (_, module) = source.split_once("pub mod reason {").unwrap();
    let (module, _) = module.split_once("\n}").unwrap();
    let constants = module.lines().filter_map(|line| line.trim().strip_prefix("pub const "));
    constants.filter_map(|line| line.split('"').nth(1)).collect()
}

#[test]
fn every_reason_of_a_condition_is_explained() {
    let (page, reasons) = (page(), condition_reasons());
    assert!(reasons.len() >= 15 && reasons.contains(&turret_crds::condition::reason::SERVING), "{reasons:?}");
    let missing: Vec<_> = reasons.into_iter().filter(|reason| !has_row(&page, reason)).collect();
    assert!(missing.is_empty(), "docs/troubleshooting.md says nothing about {missing:?}");
}

#[test]
fn every_reason_of_a_failed_lens_is_explained() {
    let page = page();
    let schema = kinds()[0].schema();
    let reason =
        &schema["properties"]["status"]["properties"]["failedLenses"]["items"]["properties"]["reason"];
    let reasons = reason["enum"].as_array().expect("an enum of reasons");
    let names = reasons.iter().filter_map(|r| r.as_str());
    let missing: Vec<_> = names.filter(|reason| !has_row(&page, reason)).collect();
    assert!(missing.is_empty(), "docs/troubleshooting.md says nothing about {missing:?}");
}
