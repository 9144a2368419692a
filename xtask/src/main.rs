//! `cargo xtask`: everything that is done with this repository, one command each.

mod bench;
mod cluster;
mod demo;
mod folders;
mod generate;
mod image;
mod packages;
mod privilege;
mod stage;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Builds, runs and tests Turret")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The whole way on a real Kubernetes: build, install, apply the samples, ask every lens
    Demo(demo::Args),
    /// Run the tests: lint, unit, parity, api, cluster, faults
    Test(test::TestArguments),
    /// Measure: engine (beside peers), residency, operator
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// A local Kubernetes, built from source: up, down, status, kubeconfig
    #[command(subcommand)]
    Cluster(cluster::command::ClusterCommand),
    /// Write OCI images of the programs, without Docker
    Image(image::command::ImageArguments),
    /// Write the CRDs, rules, manifests and reference pages that are made from the programs
    Generate(generate::GenerateArguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The chain on one line: where it was found is of no use to who runs a command.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Test(arguments) => test::run(&arguments),
        Command::Bench(command) => bench::run(&command),
        Command::Cluster(command) => cluster::command::run(command),
        Command::Image(arguments) => image::command::run(&arguments),
        Command::Generate(arguments) => generate::run(&arguments),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        super::Arguments::command().debug_assert();
    }
}
