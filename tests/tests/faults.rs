//! Faults between the operator and a real API server: crashes after every write, watches that lose, delay, double and reorder
//! events, refusals, resets, silence. Stories of several namespaces go on at the same time. Run by `cargo xtask test faults`.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;
use turret_tests::cluster::environment::{Environment, KUBECONFIG};
use turret_tests::faults::deletion::whatever_is_deleted_and_however_nothing_hangs_and_nothing_is_left;
use turret_tests::faults::malformed::malformed_objects_are_skipped_with_an_event;
use turret_tests::faults::plan::Fault;
use turret_tests::faults::random::random_objects_are_judged_the_same_without_a_cluster;
use turret_tests::faults::real_pods::real_workers_are_told_what_a_killed_operator_had_begun;
use turret_tests::faults::world::World;

/// Tests that go on at the same time; nearly all of each is waiting.
const AT_ONCE: usize = 6;

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert(AT_ONCE);
    let Some(environment) = Environment::read()? else {
        println!(
            "SKIPPED: {KUBECONFIG} is not set; `cargo xtask test faults` starts a cluster and runs this"
        );
        return Ok(ExitCode::SUCCESS);
    };
    let runtime = Arc::new(Runtime::new()?);
    let world = if arguments.list {
        None
    } else {
        let world = runtime.block_on(World::prepare(environment));
        Some(Arc::new(world.context("the cluster was not prepared")?))
    };
    Ok(libtest_mimic::run(&arguments, trials(&runtime, world.as_ref())).exit_code())
}

fn trials(runtime: &Arc<Runtime>, world: Option<&Arc<World>>) -> Vec<Trial> {
    // The longest first.
    let mut trials = vec![
        trial(
            runtime,
            world,
            "every_step_ends_the_same_after_a_crash_behind_every_write",
            async |world: &World| world.crash_after_every_write().await,
        ),
        trial(
            runtime,
            world,
            "real_workers_are_told_what_a_killed_operator_had_begun",
            async |world: &World| real_workers_are_told_what_a_killed_operator_had_begun(world).await,
        ),
        trial(
            runtime,
            world,
            "whatever_is_deleted_and_however_nothing_hangs_and_nothing_is_left",
            async |world: &World| {
                whatever_is_deleted_and_however_nothing_hangs_and_nothing_is_left(world).await
            },
        ),
        trial(
            runtime,
            world,
            "random_objects_are_judged_the_same_without_a_cluster",
            async |world: &World| random_objects_are_judged_the_same_without_a_cluster(world).await,
        ),
        trial(runtime, world, "malformed_objects_are_skipped_with_an_event", async |world: &World| {
            malformed_objects_are_skipped_with_an_event(world).await
        }),
    ];
    trials.extend(Fault::ALL.map(|fault| {
        let name = format!("every_step_ends_the_same_though_{}", fault.slug().replace('-', "_"));
        trial(runtime, world, &name, async move |world: &World| world.endure(fault).await)
    }));
    trials
}

fn trial<T>(runtime: &Arc<Runtime>, world: Option<&Arc<World>>, name: &str, test: T) -> Trial
where
    T: AsyncFnOnce(&World) -> Result<()> + Send + 'static,
{
    let (runtime, world) = (Arc::clone(runtime), world.cloned());
    Trial::test(name, move || {
        let world = world.expect("the world is prepared before tests run");
        runtime.block_on(test(world.as_ref())).map_err(|error| Failed::from(format!("{error:#}")))
    })
}
