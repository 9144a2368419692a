//! Placeholder replaced below.
use anyhow::Result;
/// Runs it.
pub fn run() -> Result<()> {
    Ok(())
}
