//! Which workers leave when there are to be fewer. Pure.
//!
//! The ReplicaSet removes pods by an order of its own, of which one step is ours to set: the annotation
//! [`DELETION_COST`](crate::controllers::pod::DELETION_COST). The workers that lose least are marked with it before the Deployment is lowered. A mark is
//! taken back when its worker stays after all.

use std::{cmp::Reverse, collections::HashMap};

use k8s_openapi::jiff::Timestamp;
use turret_crds::report::Tier;

use crate::controllers::{assess::ObservedWorker, pod::LEAVES_FIRST};

/// What is to be written on a worker's pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The pod.
    pub pod: String,
    /// The value of its deletion cost; `None` takes it away.
    pub cost: Option<&'static str>,
}

/// What to write on pods, before the Deployment is lowered from `live` to `wanted`.
pub fn marks(workers: &[ObservedWorker], live: Option<i32>, wanted: i32) -> Vec<Mark> {
    let there: Vec<&ObservedWorker> = workers.iter().filter(|w| w.pod.counts()).collect();
    let wanted_count = usize::try_from(wanted).unwrap_or(0);
    let surplus = there.len().saturating_sub(wanted_count);
    // Where all leave there is nothing to choose.
    if wanted_count == 0 {
        return Vec::new();
    }
    let leaving = match surplus {
        0 => Vec::new(),
        _ if live.is_some_and(|live| live > wanted) => victims(&there, surplus),
        // One more than wanted is there while pods are replaced, or the ReplicaSet is about to act on marks.
        _ => return Vec::new(),
    };
    let mark = |worker: &&ObservedWorker| {
        let leaves = leaving.contains(&worker.pod.name.as_str());
        let cost = leaves.then_some(LEAVES_FIRST);
        (leaves != worker.pod.leaves_first).then(|| Mark { pod: worker.pod.name.clone(), cost })
    };
    there.iter().filter_map(mark).collect()
}

/// Something that a worker holds in memory: a lens by group and name, a base by `""` and its key.
type Artifact<'a> = (&'a str, &'a str);

/// What is lost with a worker, in the order in which it counts.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Loss<'a> {
    /// A choice stands once it was made: loads move all the time.
    is_unmarked: bool,
    /// Also the ReplicaSet's first question.
    is_serving: bool,
    rows: u32,
    /// Bytes in memory that no other worker holds: they would have to be loaded again.
    sole_bytes: u64,
    /// The youngest first.
    born: Reverse<Option<Timestamp>>,
    name: &'a str,
}

/// Names of the `count` workers that lose least, one after another: what the first one took with it is
/// held by one worker less.
pub fn victims<'a>(workers: &[&'a ObservedWorker], count: usize) -> Vec<&'a str> {
    let mut holders: HashMap<Artifact<'a>, usize> = HashMap::new();
    for (artifact, _) in workers.iter().copied().flat_map(residents) {
        *holders.entry(artifact).or_default() += 1;
    }
    let mut left = workers.to_vec();
    let mut chosen = Vec::new();
    while chosen.len() < count {
        let least = (0..left.len()).min_by_key(|at| loss(left[*at], &holders));
        let Some(least) = least else { break };
        let worker = left.swap_remove(least);
        for (artifact, _) in residents(worker) {
            if let Some(holders) = holders.get_mut(&artifact) {
                *holders -= 1;
            }
        }
        chosen.push(worker.pod.name.as_str());
    }
    chosen
}

fn loss<'a>(worker: &'a ObservedWorker, holders: &HashMap<Artifact<'a>, usize>) -> Loss<'a> {
    let state = worker.report.as_deref().map(|report| &report.state);
    let is_serving = worker.pod.ready && state.is_none_or(|state| state.ready && !state.draining);
    let rows = match state {
        Some(state) => state.running_rows.saturating_add(state.waiting_rows),
        // It takes requests and does not say how many.
        None if is_serving => u32::MAX,
        None => 0,
    };
    let sole = residents(worker).filter(|(artifact, _)| holders.get(artifact) == Some(&1));
    Loss {
        is_unmarked: !worker.pod.leaves_first,
        is_serving,
        rows,
        sole_bytes: sole.map(|(_, bytes)| bytes).sum(),
        born: Reverse(worker.pod.created),
        name: &worker.pod.name,
    }
}

/// What a worker holds in memory, with its bytes.
fn residents(worker: &ObservedWorker) -> impl Iterator<Item = (Artifact<'_>, u64)> {
    let report = worker.report.as_deref();
    let bases = report.into_iter().flat_map(|report| &report.bases).filter(|base| base.tier >= Tier::Host);
    let lenses = report.into_iter().flat_map(|report| &report.lenses).filter(|lens| lens.tier >= Tier::Host);
    let bases = bases.map(|base| (("", base.key.0.as_str()), base.bytes.unwrap_or(0)));
    bases.chain(lenses.map(|lens| ((lens.group.as_str(), lens.name.as_str()), lens.bytes.unwrap_or(0))))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::controllers::fixtures::{World, at, group};

    /// A worker with so many rows that holds these of three lenses, the n-th of n MiB.
    fn worker(name: &str, rows: u32, lenses: &[usize]) -> ObservedWorker {
        let mut world = World::new();
        world.groups = vec![group("a", &["l1", "l2", "l3"])];
        let mut worker = world.serving(name).reporting(|report| {
            report.state.running_rows = rows;
            for lens in lenses {
                let lens_report = Arc::make_mut(&mut report.lenses[lens - 1]);
                lens_report.tier = Tier::Device;
                lens_report.bytes = u64::try_from(lens << 20).ok();
            }
        });
        worker.pod.created = Some(at(100));
        worker
    }

    fn chosen(workers: &[ObservedWorker], count: usize) -> Vec<&str> {
        victims(&workers.iter().collect::<Vec<_>>(), count)
    }

    fn mark(pod: &str, cost: Option<&'static str>) -> Mark {
        Mark { pod: pod.into(), cost }
    }

    #[test]
    fn who_does_not_serve_leaves_first_then_who_has_fewest_rows() {
        let mut starting = worker("starting", 9, &[1, 2, 3]);
        starting.pod.ready = false;
        let draining = worker("draining", 8, &[]).reporting(|report| report.state.draining = true);
        let mut silent = worker("silent", 0, &[]);
        silent.report = None;
        let workers = [worker("busy", 3, &[]), silent, worker("idle", 2, &[3]), draining, starting];
        assert_eq!(chosen(&workers, 5), ["draining", "starting", "idle", "busy", "silent"]);
    }

    #[test]
    fn of_equally_busy_ones_that_leaves_whose_memory_others_hold_too() {
        let workers = [worker("a", 1, &[1, 3]), worker("b", 1, &[3]), worker("c", 1, &[2])];
        // b holds nothing alone; once it is gone, a holds 4 MiB alone and c 2.
        assert_eq!(chosen(&workers, 2), ["b", "c"]);
        let first_and_last = [worker("a", 0, &[3]), worker("b", 0, &[3])];
        assert_eq!(chosen(&first_and_last, 2), ["a", "b"], "the name is the last question");
        let mut young = worker("z", 0, &[]);
        young.pod.created = Some(at(200));
        assert_eq!(chosen(&[worker("a", 0, &[]), young], 1), ["z"]);
    }

    #[test]
    fn pods_are_marked_before_the_deployment_is_lowered_and_a_choice_stands() {
        let mut workers = vec![worker("a", 1, &[]), worker("b", 0, &[])];
        assert_eq!(marks(&workers, Some(2), 2), []);
        assert_eq!(marks(&workers, Some(2), 1), [mark("b", Some(LEAVES_FIRST))]);
        workers[1].pod.leaves_first = true;
        assert_eq!(marks(&workers, Some(2), 1), [], "it is marked");
        let mut busier = workers.clone();
        busier[1] = busier[1].clone().reporting(|report| report.state.running_rows = 9);
        assert_eq!(marks(&busier, Some(2), 1), [], "and stays so");
        assert_eq!(marks(&workers, Some(1), 1), [], "the ReplicaSet is about to act");
        assert_eq!(marks(&workers, Some(1), 2), [mark("b", None)], "it stays after all");
        assert_eq!(marks(&workers, Some(2), 0), [], "where all leave there is no choice");
    }

    #[test]
    fn a_rollout_marks_nobody() {
        let workers = [worker("new", 0, &[]), worker("old", 1, &[])];
        assert_eq!(marks(&workers, Some(1), 1), []);
    }

    #[test]
    fn of_two_that_were_marked_one_stays() {
        let mut workers = [worker("a", 5, &[]), worker("b", 3, &[]), worker("c", 1, &[])];
        workers[0].pod.leaves_first = true;
        workers[1].pod.leaves_first = true;
        assert_eq!(marks(&workers, Some(3), 2), [mark("a", None)]);
    }

    proptest! {
        /// As many as asked for, none twice, whatever the order they are listed in; and once the marks are written
        /// there is nothing more to write.
        #[test]
        fn the_choice_does_not_depend_on_the_order(
            rows in proptest::collection::vec(0..3u32, 1..5), wanted in 1..5i32, live in 1..6i32,
        ) {
            let name = |at: usize| format!("w{at}");
            let mut workers: Vec<_> =
                rows.iter().enumerate().map(|(at, rows)| worker(&name(at), *rows, &[at % 3 + 1])).collect();
            let count = workers.len() / 2;
            let mut reversed = workers.clone();
            reversed.reverse();
            prop_assert_eq!(chosen(&workers, count), chosen(&reversed, count));
            let first = marks(&workers, Some(live), wanted);
            for worker in &mut workers {
                let mark = first.iter().find(|mark| mark.pod == worker.pod.name);
                worker.pod.leaves_first = mark.map_or(worker.pod.leaves_first, |mark| mark.cost.is_some());
            }
            prop_assert_eq!(marks(&workers, Some(live), wanted), vec![]);
        }
    }
}
