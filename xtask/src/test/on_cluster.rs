//! The suites `cluster` and `faults`: each on a cluster of its own, with the images of what was just built.

use std::time::Duration;

use anyhow::{Context, Result};

use super::program::{self, Built, Manner, TestProgram};
use super::tally::Tally;
use crate::cluster::command::ClusterCommand;
use crate::cluster::{self, Options};
use crate::privilege::{self, Privilege};
use crate::{folders, image, packages, stage};

/// The cluster of a suite.
#[derive(clap::Args)]
pub struct ClusterArguments {
    /// Name of the cluster of the suites `cluster` and `faults`: not the one a person may be using. With another one, two
    /// runs do not disturb each other
    #[arg(long = "cluster", value_name = "NAME", default_value = "test", value_parser = cluster::check_name)]
    name: String,
    /// Leave the cluster of the suite running; with two suites, that of the last
    #[arg(long)]
    keep: bool,
}

/// How long the scenario with the Zipf load asks, and what random objects are made from: see
/// `tests/src/cluster/environment.rs`.
const PASSED_ON: [&str; 3] = ["TURRET_ZIPF_SECONDS", "TURRET_RANDOM_SEED", "TURRET_RANDOM_CASES"];
/// Enough for every scenario that asks for some at the same time.
const ACCELERATORS: u32 = 8;

/// Runs the scenarios of a suite on a fresh cluster. The suite `cluster` proves the cluster itself before.
pub fn run(
    scenarios: &TestProgram,
    built: &Built,
    mut manner: Manner,
    ClusterArguments { name, keep }: &ClusterArguments,
) -> Result<Tally> {
    if privilege::of_this_process() == Privilege::None {
        println!(
            "SKIPPED: the suite {} needs root for the node of its cluster; run it as root, or install sudo",
            scenarios.name
        );
        return Ok(Tally::one_skipped());
    }
    let mut tallies = Vec::new();
    if manner.arguments.is_empty() && scenarios.name == "cluster" {
        let proved =
            stage::run("proving the local cluster", |_| cluster::command::run(ClusterCommand::SelfTest));
        if let Err(error) = &proved {
            println!("FAILED: the local cluster: {error:#}");
        }
        tallies.push(Tally::one(proved.is_ok()));
    }
    let images = images(built)?;
    // Whatever an earlier run left: the audit log must begin with this one.
    cluster::down(name)?;
    let cluster = cluster::up(&Options { name: name.into(), gpus: ACCELERATORS })?;
    for image in &images {
        stage::run(format!("loading {}", image.reference()), |_| cluster.load(&image.path))?;
    }
    manner.variables.extend([
        ("TURRET_TEST_KUBECONFIG", cluster.kubeconfig.clone().into()),
        ("TURRET_TEST_PROGRAMS", cluster.bin.clone().into()),
        ("TURRET_TEST_VOLUMES", cluster.volumes.clone().into()),
        ("TURRET_TEST_AUDIT_LOG", cluster.audit_log.clone().into()),
        ("TURRET_TEST_REPOSITORY", folders::repository().into()),
        ("TURRET_TEST_OPERATOR_IMAGE", images[0].reference().into()),
        ("TURRET_TEST_WORKER_IMAGE", images[1].reference().into()),
    ]);
    // sudo would keep them to itself.
    for variable in PASSED_ON {
        manner.variables.extend(std::env::var_os(variable).map(|value| (variable, value)));
    }
    // They stop and kill processes of pods, which belong to other users. Ten minutes of a Zipf load fit in beside the others.
    let manner = Manner { as_root: true, shown: true, limit: Duration::from_secs(45 * 60), ..manner };
    let tried = program::run(scenarios, &manner);
    if *keep {
        let kubeconfig = cluster.kubeconfig.display();
        stage::say(format!(
            "the cluster is kept: export KUBECONFIG={kubeconfig}; end it: cargo xtask cluster down --name {name}"
        ));
    } else {
        cluster::down(name)?;
    }
    tallies.push(tried?);
    Ok(tallies.into_iter().sum())
}

/// Images of the operator and of the worker, in this order, from the programs as they were built.
fn images(built: &Built) -> Result<Vec<image::Image>> {
    packages::ensure(&image::NEEDS)?;
    let folder = folders::cargo_target()?.join("images");
    let names = ["turret-operator", "turret-worker"];
    let images = names.iter().map(|name| {
        let program =
            built.products.get(*name).with_context(|| format!("cargo built no program `{name}`"))?;
        stage::run(format!("writing the image of {name}"), |_| {
            image::write(&format!("turret.local/{name}"), name, program, &folder)
        })
    });
    images.collect()
}
