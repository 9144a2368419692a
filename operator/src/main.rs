//! `turret-operator`: the controllers, the gateway, and what the chart is generated from.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use turret_operator::{gateway, print, run, telemetry, validate};

/// One base, many lenses: serves ModelGroups and ModelPlacements on Kubernetes.
#[derive(Parser)]
#[command(name = "turret-operator", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the controllers.
    Run(Box<run::RunArgs>),
    /// Run the gateway: the data path from clients to workers.
    Gateway(Box<gateway::GatewayArgs>),
    /// Validate files of ModelGroups and ModelPlacements as a cluster would, without one. The exit code is 0 when all is
    /// fine, 1 when an object is invalid, 2 when a file cannot be read.
    Validate(validate::command::ValidateArgs),
    /// Print both CustomResourceDefinitions as YAML.
    Crds,
    /// Print the RBAC rules that the operator and the gateway use, as YAML.
    #[command(hide = true)]
    Rbac,
    /// Print every metric of the operator and the gateway, as they are scraped.
    #[command(hide = true)]
    Metrics,
}

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Command::Run(args) => {
            let log = telemetry::start();
            run::run(*args, log).await?;
        }
        Command::Gateway(args) => {
            let log = telemetry::start();
            gateway::run(*args, log).await?;
        }
        Command::Validate(args) => return validate::command::run(&args),
        Command::Crds => print::crds(std::io::stdout().lock())?,
        Command::Rbac => print::rbac(std::io::stdout().lock())?,
        Command::Metrics => print::metrics(std::io::stdout().lock())?,
    }
    Ok(ExitCode::SUCCESS)
}
