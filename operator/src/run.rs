//! `turret-operator run`.

/// What `turret-operator run` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {}

/// Runs the controllers until told to stop.
pub async fn run(_args: RunArgs) -> anyhow::Result<()> {
    Ok(())
}
