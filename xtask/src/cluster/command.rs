//! `cargo xtask cluster …`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use super::lifecycle::{self, Request};
use super::state::{State, check_name};
use super::{Cluster, DEFAULT_NAME, Options, Status, flag, guard, node, self_test};
use crate::stage;

/// What to do with the local Kubernetes.
#[derive(Subcommand)]
pub enum ClusterCommand {
    /// Start it (about 5 s once its programs are built, which takes some minutes)
    Up {
        #[command(flatten)]
        name: Name,
        /// How many made-up nvidia.com/gpu its node offers
        #[arg(long, default_value_t = 4)]
        gpus: u32,
    },
    /// Stop it and remove all of it, its volumes too
    Down(Name),
    /// Tell how it fares, and where its files are
    Status {
        #[command(flatten)]
        name: Name,
        /// Answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the path of its kubeconfig
    Kubeconfig(Name),
    /// Load image archives into its node
    Load {
        #[command(flatten)]
        name: Name,
        /// Archives, as `cargo xtask image` writes them
        #[arg(required = true)]
        archives: Vec<PathBuf>,
    },
    /// Prove on a cluster of its own that starting, running pods and vanishing work
    SelfTest,
    /// Start as root; `up` calls it
    #[command(hide = true)]
    Start {
        #[command(flatten)]
        name: Name,
        #[arg(long)]
        gpus: u32,
        #[arg(long)]
        bin: PathBuf,
        #[arg(long, value_parser = parse_owner)]
        owner: (u32, u32),
    },
    /// Stop as root; `down` calls it
    #[command(hide = true)]
    Stop(Name),
    /// The process that watches a node
    #[command(hide = true)]
    Guard {
        #[arg(long)]
        state: PathBuf,
    },
    /// The first process of a node
    #[command(hide = true)]
    Node {
        #[arg(long)]
        state: PathBuf,
    },
}

/// Which cluster is meant.
#[derive(Args)]
pub struct Name {
    /// The cluster's name; several can run side by side
    #[arg(long, default_value = DEFAULT_NAME, value_parser = check_name)]
    name: String,
}

/// Does what was asked.
pub fn run(command: ClusterCommand) -> Result<()> {
    match command {
        ClusterCommand::Up { name: Name { name }, gpus } => {
            let cluster = super::up(&Options { name, gpus })?;
            stage::say(lifecycle::next_steps(&cluster));
            Ok(())
        }
        ClusterCommand::Down(Name { name }) => super::down(&name),
        ClusterCommand::Status { name: Name { name }, json } => print_status(&name, json),
        ClusterCommand::Kubeconfig(Name { name }) => {
            println!("{}", super::find(&name)?.kubeconfig.display());
            Ok(())
        }
        ClusterCommand::Load { name: Name { name }, archives } => load(&super::find(&name)?, &archives),
        ClusterCommand::SelfTest => self_test::run(),
        ClusterCommand::Start { name: Name { name }, gpus, bin, owner } => {
            lifecycle::start(&Request { name, bin, gpus, owner })
        }
        ClusterCommand::Stop(Name { name }) => lifecycle::stop(&name),
        ClusterCommand::Guard { state } => guard::run(&State::at(state)),
        ClusterCommand::Node { state } => node::run(&State::at(state)),
    }
}

fn load(cluster: &Cluster, archives: &[PathBuf]) -> Result<()> {
    for archive in archives {
        stage::run(format!("loading {}", archive.display()), |_| cluster.load(archive))?;
    }
    Ok(())
}

fn print_status(name: &str, json: bool) -> Result<()> {
    let status = super::status(name);
    if json {
        let value = match &status {
            Some(status) => serde_json::to_value(status)?,
            None => serde_json::json!({"name": name, "running": false}),
        };
        println!("{value:#}");
        return Ok(());
    }
    match status {
        Some(status) => print!("{}", describe(&status)),
        None => println!("cluster `{name}` is down; start it: cargo xtask cluster up{}", flag(name)),
    }
    Ok(())
}

fn describe(status: &Status) -> String {
    let cluster = &status.cluster;
    let ended = status.components.iter().filter(|component| component.ended.is_some()).count();
    let verdict = match (status.running, ended) {
        (true, _) => "is up".to_owned(),
        (false, 0) => "is starting or was ended while it was".to_owned(),
        (false, ended) if ended == status.components.len() => {
            format!("was ended; start it again: cargo xtask cluster up{}", flag(&cluster.name))
        }
        (false, _) => {
            format!("is broken; replace it: cargo xtask cluster up{}", flag(&cluster.name))
        }
    };
    let mut text = format!("cluster `{}` {verdict}\n", cluster.name);
    for component in &status.components {
        let fares = match &component.ended {
            None => "runs".to_owned(),
            Some(how) => format!("ended ({how}); see {}", component.log.display()),
        };
        text += &format!("  {:<20} {fares}\n", component.name);
    }
    let gpus = format!("{} (made up)", cluster.gpus);
    let rows = [
        ("nodes", cluster.nodes.join(" ")),
        ("nvidia.com/gpu", gpus),
        ("server", cluster.server.clone()),
        ("kubeconfig", cluster.kubeconfig.display().to_string()),
        ("programs", cluster.bin.display().to_string()),
        ("volumes", cluster.volumes.display().to_string()),
        ("logs", cluster.logs.display().to_string()),
        ("audit log", cluster.audit_log.display().to_string()),
    ];
    for (name, value) in rows {
        text += &format!("{name:<16} {value}\n");
    }
    text
}

fn parse_owner(text: &str) -> Result<(u32, u32)> {
    let (user, group) = text.split_once(':').context("expected USER:GROUP as numbers")?;
    Ok((user.parse()?, group.parse()?))
}
