//! The gateway: the data path from clients to workers.

/// What `turret-operator gateway` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct GatewayArgs {}

/// Runs the gateway until it is told to stop.
pub async fn run(_args: GatewayArgs) -> anyhow::Result<()> {
    anyhow::bail!("this build has no gateway")
}
