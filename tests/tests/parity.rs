//! `cargo xtask test parity [--cases DIR]`: prints one line per base and lens with its worst error.
//!
//! Without `TURRET_PARITY_CASES` it checks the repository's own fixtures, where everything must be supported.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use turret_tests::parity::{case, case_folders, demo, fixtures, quantized, report, templates};
use turret_worker::model::weights::{Dtype, Quantization};

fn main() -> Result<ExitCode> {
    // Test runners ask a binary for its list of tests; this one is a single table.
    if std::env::args().any(|arg| arg == "--list") {
        println!("parity: test");
        return Ok(ExitCode::SUCCESS);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let foreign = std::env::var_os("TURRET_PARITY_CASES").map(PathBuf::from);
    let folder = foreign.clone().unwrap_or_else(|| fixtures().join("parity"));
    let mut lines = Vec::new();
    let cases = case_folders(&folder)?;
    anyhow::ensure!(!cases.is_empty(), "no folder below {} has an expected.json", folder.display());
    for folder in cases {
        lines.extend(runtime.block_on(case::check(&folder))?);
        lines.extend(quantized::check(&folder)?);
    }
    if foreign.is_none() {
        lines.extend(templates::check(&fixtures().join("chat_templates"))?);
        let plain = Quantization::None;
        for numbers in [(Some(Dtype::F32), plain), (None, plain), (None, Quantization::Q8_0)] {
            lines.extend(runtime.block_on(demo::check(&fixtures().join("demo"), numbers))?);
        }
    }
    let failed = report(&lines, foreign.is_some());
    // The closing line of the usual harness, which is how `cargo xtask test` counts.
    let (verdict, passed) = (if failed == 0 { "ok" } else { "FAILED" }, lines.len() - failed);
    println!("test result: {verdict}. {passed} passed; {failed} failed");
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
