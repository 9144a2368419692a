//! The scenarios on a real cluster, one after another: they share one installed chart, and each
//! has a namespace of its own. Run by `cargo xtask test cluster`.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result};
use libtest_mimic::{Arguments, Failed, Trial};
use tokio::runtime::Runtime;
use turret_tests::cluster::environment::{Environment, KUBECONFIG};
use turret_tests::cluster::objects::SCENARIO;
use turret_tests::cluster::release::{NAMESPACE, Release};
use turret_tests::cluster::scenarios::{
    aliases, answers, deletion, device, faults, leadership, lenses, memory, namespaced, pauses, residency,
    rights, rollouts, scaling, sharing, sources, spread, switches,
};

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    // They count restarts, writes and rights of the whole cluster.
    arguments.test_threads = Some(1);
    let Some(environment) = Environment::read()? else {
        println!(
            "SKIPPED: {KUBECONFIG} is not set; `cargo xtask test cluster` starts a cluster and runs this"
        );
        return Ok(ExitCode::SUCCESS);
    };
    let runtime = Arc::new(Runtime::new()?);
    let release = if arguments.list {
        None
    } else {
        let release =
            runtime.block_on(Release::install(environment)).context("the chart was not installed")?;
        Some(Arc::new(release))
    };
    Ok(libtest_mimic::run(&arguments, scenarios(&runtime, release.as_ref())).exit_code())
}

/// A scenario by the name of its function.
macro_rules! scenario {
    ($runtime:expr, $release:expr, $module:ident::$name:ident) => {{
        let (runtime, release) = (Arc::clone($runtime), $release.cloned());
        Trial::test(stringify!($name), move || {
            let release = release.expect("a chart is installed before scenarios run");
            runtime.block_on(async {
                let tried = $module::$name(&release).await;
                judge(&release, stringify!($name), tried).await
            })
        })
    }};
}

fn scenarios(runtime: &Arc<Runtime>, release: Option<&Arc<Release>>) -> Vec<Trial> {
    vec![
        scenario!(runtime, release, rights::invalid_objects_are_refused_readably),
        // It takes half a minute by itself and is looked at again below.
        scenario!(runtime, release, rollouts::a_rollout_begins_where_there_is_no_room_for_one_more),
        scenario!(runtime, release, answers::every_lens_of_both_groups_answers_what_was_recorded),
        scenario!(runtime, release, answers::two_groups_take_turns_on_one_worker),
        scenario!(runtime, release, lenses::a_lens_is_added_replaced_and_removed_without_a_restart),
        scenario!(runtime, release, lenses::ready_turns_true_only_when_every_worker_reports_the_document),
        scenario!(runtime, release, lenses::a_broken_lens_is_named_with_its_reason_and_heals),
        scenario!(runtime, release, aliases::an_alias_moves_when_every_worker_can_serve_its_new_target),
        scenario!(runtime, release, device::a_worker_without_the_device_it_was_given_says_so),
        scenario!(runtime, release, device::a_worker_claims_a_device_of_a_class),
        scenario!(runtime, release, device::kubectl_scale_changes_the_number_of_workers),
        scenario!(runtime, release, pauses::a_paused_placement_is_left_alone_and_goes_on_afterwards),
        scenario!(runtime, release, scaling::the_worker_that_loses_least_leaves),
        scenario!(runtime, release, scaling::autoscaling_follows_the_load_to_zero_and_back),
        scenario!(runtime, release, faults::service_continues_while_workers_are_killed),
        scenario!(runtime, release, faults::the_operator_is_killed_and_carries_on),
        scenario!(runtime, release, faults::a_worker_restarts_while_the_operator_is_down),
        scenario!(runtime, release, switches::rows_are_preempted_when_the_drain_is_over),
        scenario!(runtime, release, switches::a_failed_switch_goes_back_to_the_old_base),
        scenario!(runtime, release, memory::a_budget_that_cannot_be_met_is_told_and_the_old_one_stays),
        scenario!(
            runtime,
            release,
            memory::a_lens_larger_than_its_budget_is_told_and_what_the_message_asks_for_serves_it
        ),
        scenario!(
            runtime,
            release,
            memory::a_base_larger_than_the_device_is_told_and_the_other_group_is_served
        ),
        scenario!(runtime, release, memory::nothing_is_held_once_the_last_group_is_gone),
        scenario!(
            runtime,
            release,
            residency::a_zipf_load_on_two_groups_with_room_for_a_third_of_their_lenses
        ),
        scenario!(
            runtime,
            release,
            spread::each_lens_is_where_it_is_assigned_and_a_third_worker_takes_its_share
        ),
        scenario!(runtime, release, sources::a_full_disk_is_told_and_what_is_there_is_served),
        scenario!(runtime, release, sources::a_source_that_disappears_is_told_once_it_is_missed_and_heals),
        scenario!(runtime, release, sources::a_revoked_token_is_told_and_a_new_one_is_used_without_a_restart),
        scenario!(runtime, release, sources::a_new_worker_finds_on_a_claim_what_the_one_before_fetched),
        scenario!(runtime, release, sharing::a_group_is_placed_by_another_namespace_while_it_allows_it),
        scenario!(runtime, release, leadership::another_replica_leads_when_the_leader_goes),
        scenario!(runtime, release, rollouts::the_rollout_ends_with_one_worker_less_meanwhile),
        scenario!(runtime, release, deletion::objects_deleted_in_any_order_leave_nothing),
        scenario!(runtime, release, rights::every_pod_runs_under_restricted_pod_security),
        scenario!(runtime, release, rights::the_operator_writes_nothing_in_steady_state),
        // It looks back at all the others. Then rights are taken away for a while, the kinds go and come back, and at last the
        // chart goes.
        scenario!(runtime, release, rights::rights_are_exactly_what_is_used),
        scenario!(runtime, release, namespaced::a_release_of_one_namespace_asks_for_nothing_outside),
        scenario!(runtime, release, deletion::kinds_deleted_first_take_everything_along_and_may_come_back),
        scenario!(runtime, release, deletion::workers_serve_on_after_helm_uninstall),
    ]
}

/// Turns an error into a failure that carries what a person would look at next.
async fn judge(release: &Release, scenario: &str, tried: Result<()>) -> Result<(), Failed> {
    let Err(error) = tried else { return Ok(()) };
    let mut text = format!("{error:#}\n");
    let of_scenarios = ["get", "ns", "-l", SCENARIO, "--field-selector=status.phase=Active", "-o", "name"];
    let spaces = release.tools.kubectl(of_scenarios).await.unwrap_or_default();
    for name in spaces.split_whitespace().map(|space| space.trim_start_matches("namespace/")) {
        text += &release.tools.explain(name).await;
        // What a failed scenario left must not disturb the next.
        let deleted = release.tools.kubectl(["delete", "ns", name, "--wait=false"]).await;
        text += &deleted.err().map(|error| format!("\n{error:#}")).unwrap_or_default();
    }
    text += &release.tools.logs(NAMESPACE).await;
    Err(Failed::from(format!("{scenario}: {text}")))
}
