//! Measures the operator at scale, as `cargo xtask bench operator` tells it: one argument, an order as JSON.

use std::process::ExitCode;

use anyhow::{Context, Result};
use turret_tests::scale::bench;
use turret_tests::scale::order::Order;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let text = std::env::args().nth(1).context("there is no order; run `cargo xtask bench operator`")?;
    let order: Order = serde_json::from_str(&text).context("the order cannot be read")?;
    // Refused only when a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let file = order.found.clone();
    let found = tokio::runtime::Runtime::new()?.block_on(bench::run(order))?;
    let json = serde_json::to_string(&found)?;
    std::fs::write(&file, json).with_context(|| format!("failed to write {}", file.display()))
}
