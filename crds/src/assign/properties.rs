//! What holds in every situation, and how little moves when a worker comes or goes.

use std::collections::BTreeSet;

use proptest::{collection::vec, option, prelude::*};

use super::{fixtures::*, *};
use crate::hints::Hints;

const BASES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

fn demand() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => Just(0_u64),
        2 => 1..100_u64,
        5 => 100..100_000_u64,
        1 => Just(u64::MAX),
    ]
}

fn bytes() -> impl Strategy<Value = u64> {
    prop_oneof![1 => Just(0_u64), 6 => 1..1000_u64, 1 => Just(u64::MAX)]
}

fn worker_room() -> impl Strategy<Value = WorkerRoom> {
    let leaving = prop_oneof![9 => Just(Availability::Available), 1 => Just(Availability::Leaving)];
    (bytes(), 0..5_u32, leaving, option::of(0..BASES.len())).prop_map(
        |(lens_budget_bytes, weight, availability, active)| WorkerRoom {
            name: String::new(),
            lens_budget_bytes,
            weight,
            availability,
            active_base: active.map(|at| key(BASES[at])),
        },
    )
}

fn lens_demand() -> impl Strategy<Value = LensDemand> {
    let residency = prop_oneof![
        Just(LensResidency::OnDemand),
        Just(LensResidency::Cached),
        Just(LensResidency::Preloaded),
        Just(LensResidency::Pinned),
    ];
    (0..BASES.len(), 0..20_usize, bytes(), residency, 0..3_u32, demand()).prop_map(
        |(base, name, bytes, residency, priority, demand_millirows)| LensDemand {
            bytes,
            residency,
            priority,
            ..asked(BASES[base], &format!("l{name}"), demand_millirows)
        },
    )
}

/// Some bases and lenses are there twice, some lenses are over an undeclared base.
fn situation() -> impl Strategy<Value = Situation> {
    (
        vec((0..BASES.len() - 1, demand()), 0..7),
        vec(lens_demand(), 0..40),
        vec(worker_room(), 0..9),
        option::of(0..BASES.len()),
        (0..4_u32, 0..7_u32),
    )
        .prop_map(|(bases, lenses, mut workers, default, (min_copies, max_copies))| {
            for (n, worker) in workers.iter_mut().enumerate() {
                worker.name = format!("w{n}");
            }
            let base =
                |(at, demand_millirows): (usize, u64)| BaseDemand { key: key(BASES[at]), demand_millirows };
            Situation {
                bases: bases.into_iter().map(base).collect(),
                default_base: default.map(|at| key(BASES[at])),
                lenses,
                workers,
                spread: Spread { min_copies, max_copies },
            }
        })
}

/// What was assigned before: to other workers, for other demands.
fn previous() -> impl Strategy<Value = Assignment> {
    prop_oneof![Just(Assignment::default()), situation().prop_map(|situation| fresh(&situation))]
}

/// The situation as somebody sees it who knows of the demands only what the assignment says.
fn as_published(situation: &Situation, assignment: &Assignment) -> Situation {
    let bases = assignment
        .bases
        .iter()
        .map(|(key, share)| BaseDemand { key: key.clone(), demand_millirows: share.demand_millirows });
    let mut seen = BTreeSet::new();
    let lenses = situation.lenses.iter().map(|lens| {
        let share = assignment.bases.get(&lens.base).map(|base| &base.lenses[&lens.id]);
        // The second entry of a lens adds to the first.
        let published = share.filter(|_| seen.insert((&lens.base, &lens.id)));
        LensDemand { demand_millirows: published.map_or(0, |share| share.demand_millirows), ..lens.clone() }
    });
    Situation { bases: bases.collect(), lenses: lenses.collect(), ..situation.clone() }
}

/// What the lenses of a base load a worker with, and the bound it has. Thousandths of a row.
fn load_and_bound(assignment: &Assignment, base: &BaseShare, worker: &str) -> (u128, u128) {
    let lenses = base.lenses.values();
    let held = lenses.clone().filter(|lens| lens.workers.iter().any(|holder| holder == worker));
    let load: u128 = held.map(copy_millirows).sum();
    let total: u128 = lenses.clone().map(|lens| copy_millirows(lens) * lens.workers.len() as u128).sum();
    let heaviest = lenses.map(copy_millirows).max().unwrap_or(0);
    let weight = |name: &str| u128::from(assignment.workers[name].weight);
    let weights: u128 = base.workers.iter().map(|name| weight(name.as_str())).sum();
    let share = total * weight(worker);
    (load, (share * 5).div_ceil(weights * 4).max(share / weights + heaviest).max(8_000))
}

/// The rows of one copy of a lens.
fn copy_millirows(lens: &LensShare) -> u128 {
    u128::from(lens.demand_millirows).div_ceil(lens.workers.len() as u128)
}

proptest! {
    #[test]
    fn the_order_of_the_input_does_not_matter(situation in situation(), previous in previous(), turn in 0..40_usize) {
        let mut turned = situation.clone();
        turned.bases.reverse();
        turned.workers.reverse();
        turned.lenses.reverse();
        let by = turn % turned.lenses.len().max(1);
        turned.lenses.rotate_left(by);
        prop_assert_eq!(assign(&turned, &previous), assign(&situation, &previous));
    }

    #[test]
    fn what_is_assigned_stays_while_nothing_changes(situation in situation(), previous in previous()) {
        let assignment = assign(&situation, &previous);
        prop_assert_eq!(&assign(&situation, &assignment), &assignment);
        // A gateway that knows the demands only from what the operator published.
        prop_assert_eq!(&assign(&as_published(&situation, &assignment), &assignment), &assignment);
    }

    /// Its previous answer is all that an operator remembers, and of that only the hints.
    #[test]
    fn hints_carry_all_of_an_answer_that_the_next_one_depends_on(
        situation in situation(), previous in previous(),
    ) {
        let hints = Hints::of(previous.clone(), 1, 0);
        let assignment = assign(&situation, &hints.previous());
        prop_assert_eq!(&assignment, &assign(&situation, &previous));
        prop_assert!(hints.says_the_same(&Hints::of(hints.previous(), 2, 60)));
    }

    #[test]
    fn every_base_that_is_asked_for_is_preferred_while_there_are_enough_workers(
        situation in situation(), previous in previous(),
    ) {
        let assignment = assign(&situation, &previous);
        let asked: BTreeSet<&BaseKey> =
            situation.bases.iter().filter(|base| base.demand_millirows > 0).map(|base| &base.key).collect();
        let preferred = asked.iter().filter(|key| !assignment.bases[**key].workers.is_empty()).count();
        prop_assert_eq!(preferred, asked.len().min(assignment.workers.len()));
        for (name, share) in &assignment.workers {
            prop_assert_eq!(share.base.is_some(), !situation.bases.is_empty());
            for (key, base) in &assignment.bases {
                prop_assert_eq!(base.workers.contains(name), share.base.as_ref() == Some(key));
            }
        }
    }

    #[test]
    fn copies_and_budgets_stay_within_their_bounds(situation in situation(), previous in previous()) {
        let assignment = assign(&situation, &previous);
        let least = situation.spread.min_copies.max(1) as usize;
        let most = (situation.spread.max_copies as usize).max(least);
        for (key, base) in &assignment.bases {
            for (id, lens) in &base.lenses {
                let holders: BTreeSet<&String> = lens.workers.iter().collect();
                prop_assert_eq!(holders.len(), lens.workers.len(), "no worker holds {:?} twice", id);
                prop_assert!(holders.len() >= least.min(base.workers.len()) && holders.len() <= most);
                prop_assert!(holders.iter().all(|name| base.workers.contains(name)));
                let order = assignment.order(key, Some(id));
                prop_assert_eq!(&order[..holders.len()], &lens.workers[..]);
                let all: BTreeSet<&str> = order.iter().copied().collect();
                prop_assert_eq!((all.len(), order.len()), (assignment.workers.len(), assignment.workers.len()));
            }
        }
        for (name, share) in &assignment.workers {
            let room = situation.workers.iter().find(|worker| worker.name == *name).unwrap().lens_budget_bytes;
            let mut taken = 0_u128;
            for id in &share.preload {
                let entries = situation.lenses.iter().filter(|lens| lens.id == *id);
                taken += u128::from(entries.map(|lens| lens.bytes).max().unwrap());
                let base = &assignment.bases[share.base.as_ref().unwrap()];
                prop_assert!(base.lenses[id].workers.contains(name), "only what it holds");
            }
            prop_assert!(taken <= u128::from(room));
        }
    }

    #[test]
    fn no_worker_is_above_its_bound_when_a_lens_has_one_copy(mut situation in situation(), previous in previous()) {
        situation.spread = Spread { min_copies: 1, max_copies: 1 };
        let assignment = assign(&situation, &previous);
        for base in assignment.bases.values() {
            for worker in &base.workers {
                let (load, bound) = load_and_bound(&assignment, base, worker);
                prop_assert!(load <= bound, "{} of {} on {}", load, bound, worker);
            }
        }
    }

    #[test]
    fn a_worker_is_above_its_bound_only_with_a_lens_that_no_other_has_room_for(
        situation in situation(), previous in previous(),
    ) {
        let assignment = assign(&situation, &previous);
        for base in assignment.bases.values() {
            let loads: BTreeMap<&String, (u128, u128)> =
                base.workers.iter().map(|name| (name, load_and_bound(&assignment, base, name))).collect();
            for (worker, _) in loads.iter().filter(|(_, (load, bound))| load > bound) {
                let nowhere_else = base.lenses.values().filter(|lens| lens.workers.contains(worker)).any(|lens| {
                    let mut others = loads.iter().filter(|(name, _)| !lens.workers.contains(name));
                    others.all(|(_, (load, bound))| load + copy_millirows(lens) > *bound)
                });
                prop_assert!(nowhere_else, "{}", worker);
            }
        }
    }

    #[test]
    fn noise_of_a_tenth_changes_nothing(situation in situation(), percents in vec(90..=110_u64, 47)) {
        let assignment = fresh(&situation);
        let mut noisy = situation;
        let of_bases = noisy.bases.iter_mut().map(|base| &mut base.demand_millirows);
        let of_lenses = noisy.lenses.iter_mut().map(|lens| &mut lens.demand_millirows);
        for (demand, percent) in of_bases.chain(of_lenses).zip(percents) {
            // A tenth of hardly anything may be all of it, and that is news.
            if *demand >= 100 {
                *demand = u64::try_from(u128::from(*demand) * u128::from(percent) / 100).unwrap_or(u64::MAX);
            }
        }
        prop_assert_eq!(&assign(&noisy, &assignment), &assignment);
    }
}

/// Lenses over one base, each with so many thousandths of a row.
fn many(count: u64, demand: impl Fn(u64) -> u64, workers: Vec<WorkerRoom>) -> Situation {
    Situation {
        bases: vec![base("a", 1)],
        lenses: (0..count).map(|n| asked("a", &format!("l{n}"), demand(n))).collect(),
        workers,
        ..Situation::default()
    }
}

/// The lenses and the workers that they are newly on.
fn moves<'a>(before: &'a Assignment, after: &'a Assignment) -> Vec<(&'a LensId, &'a str)> {
    let (before, after) = (&before.bases[&key("a")].lenses, &after.bases[&key("a")].lenses);
    let new = after.iter().flat_map(|(id, lens)| lens.workers.iter().map(move |worker| (id, worker)));
    new.filter(|(id, worker)| !before[*id].workers.contains(worker))
        .map(|(id, worker)| (id, worker.as_str()))
        .collect()
}

fn placements(assignment: &Assignment) -> usize {
    assignment.bases[&key("a")].lenses.values().map(|lens| lens.workers.len()).sum()
}

/// Demands of 3000 lenses, thousandths of a row: none, all the same, any, and a few that most ask for.
const DEMANDS: [fn(u64) -> u64; 4] = [|_| 0, |_| 1000, |n| n * 7919 % 4000, |n| 200_000 / (n + 1)];

#[test]
fn a_worker_that_comes_takes_its_share_of_the_lenses_and_gives_it_back_when_it_goes() {
    for (demands, demand) in DEMANDS.into_iter().enumerate() {
        for count in [3, 4, 10, 16, 32] {
            let before = fresh(&many(3000, demand, workers(count)));
            let after = assign(&many(3000, demand, workers(count + 1)), &before);
            let moved = moves(&before, &after);
            // Of n workers' lenses, 1/n moves, and a fluctuation. Where load is bounded, some move between the
            // others as well, since the bound falls for all of them: all in all at most half as many again.
            let most = placements(&after) * 3 / (2 * (count + 1));
            let case = format!("demands {demands}, {count} workers: {} moved", moved.len());
            assert!(moved.len() <= most, "{case}, at most {most}");
            assert!(moved.len() >= placements(&after) / (2 * (count + 1)), "{case}");
            let new = format!("w{count}");
            if demands == 0 {
                assert!(moved.iter().all(|(_, worker)| *worker == new), "{case}, some between the others");
            }

            let again = assign(&many(3000, demand, workers(count)), &after);
            assert!(again.bases == before.bases, "{case}, and not all back");
        }
    }
}

#[test]
fn a_worker_that_goes_gives_up_its_lenses_and_the_others_keep_theirs() {
    for (demands, demand) in DEMANDS.into_iter().enumerate() {
        for count in [4, 10, 32] {
            let before = fresh(&many(3000, demand, workers(count)));
            let mut left = workers(count);
            left.remove(1);
            let after = assign(&many(3000, demand, left), &before);
            let moved = moves(&before, &after);
            let most = placements(&before) * 3 / (2 * count);
            assert!(moved.len() <= most, "demands {demands}, {count} workers: {} moved", moved.len());
            if demands == 0 {
                let lenses = &before.bases[&key("a")].lenses;
                assert!(moved.iter().all(|(id, _)| lenses[*id].workers == ["w1"]), "{count} workers");
            }
        }
    }
}

#[test]
fn one_lens_that_is_asked_for_more_moves_few_others() {
    for (demands, demand) in DEMANDS.into_iter().enumerate() {
        let before = fresh(&many(3000, demand, workers(10)));
        for hot in [5, 50, 500] {
            let after =
                assign(&many(3000, |n| demand(n) + u64::from(n == hot) * 8_000, workers(10)), &before);
            let moved = moves(&before, &after).len();
            assert!(moved <= 100, "demands {demands}, lens {hot}: {moved} moved");
        }
    }
}
