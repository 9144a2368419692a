//! Tables: one situation each, and what is to come of it.

use super::{fixtures::*, *};

/// Bases `a`, `b`, … with so many rows each, and so many workers.
fn bases(rows: &[u64], count: usize) -> Situation {
    let names = ["a", "b", "c", "d"];
    Situation {
        bases: names.iter().zip(rows).map(|(name, rows)| base(name, *rows)).collect(),
        workers: workers(count),
        ..Situation::default()
    }
}

/// One base `a` without demand, with these lenses.
fn lenses(lenses: Vec<LensDemand>, count: usize) -> Situation {
    Situation { lenses, ..bases(&[0], count) }
}

/// How many workers prefer each of the bases `a`, `b`, ….
fn counts(assignment: &Assignment) -> Vec<usize> {
    assignment.bases.values().map(|share| share.workers.len()).collect()
}

/// How many workers prefer another base than before.
fn changes(before: &Assignment, after: &Assignment) -> usize {
    before.workers.iter().filter(|(name, share)| after.workers[*name].base != share.base).count()
}

#[test]
fn where_there_is_nothing_nothing_is_assigned() {
    assert_eq!(fresh(&Situation::default()), Assignment::default());

    let idle = fresh(&bases(&[], 2));
    assert_eq!(idle.preference("w0"), None);
    assert_eq!(idle.order(&key("a"), None).len(), 2, "a request may go anywhere");

    let deserted = fresh(&lenses(vec![asked("a", "l", 9_000), lens("undeclared", "l")], 0));
    assert_eq!(deserted.turns().collect::<Vec<_>>(), [&key("a")]);
    assert!(deserted.holders("a", "l").is_empty());
    assert!(deserted.order(&key("a"), Some(&LensId::of("a", "l"))).is_empty());
    assert!(!deserted.bases.contains_key(&key("undeclared")));
}

#[test]
fn without_demand_every_worker_prefers_the_default_base() {
    let mut situation = bases(&[0, 0, 0], 3);
    assert_eq!(counts(&fresh(&situation)), [3, 0, 0], "the first by key, if none is the default");
    situation.default_base = Some(key("b"));
    assert_eq!(counts(&fresh(&situation)), [0, 3, 0]);
    situation.default_base = Some(key("undeclared"));
    assert_eq!(counts(&fresh(&situation)), [3, 0, 0]);
}

#[test]
fn hot_bases_get_more_workers_and_every_asked_one_gets_one() {
    let cases: [(&[u64], usize, &[usize]); 5] = [
        (&[30, 10, 1], 6, &[4, 1, 1]),
        (&[30, 10, 1], 3, &[1, 1, 1]),
        (&[10, 10], 4, &[2, 2]),
        (&[10, 0, 10], 5, &[3, 0, 2]),
        (&[1000, 1], 8, &[7, 1]),
    ];
    for (rows, workers, expected) in cases {
        assert_eq!(counts(&fresh(&bases(rows, workers))), expected, "{rows:?} on {workers}");
    }
}

#[test]
fn a_worker_changes_for_a_lasting_wave_and_for_no_other() {
    let even = fresh(&bases(&[16, 16], 4));
    assert_eq!(counts(&even), [2, 2]);

    for ripple in [[20, 13], [13, 20], [22, 14]] {
        let after = assign(&bases(&ripple, 4), &even);
        assert_eq!(changes(&even, &after), 0, "{ripple:?}: not worth a switch");
    }

    let wave = assign(&bases(&[48, 8], 4), &even);
    assert_eq!(counts(&wave), [3, 1]);
    assert_eq!(changes(&even, &wave), 1, "no more than needed");

    for ripple in [[36, 10], [27, 20], [30, 22]] {
        assert_eq!(changes(&wave, &assign(&bases(&ripple, 4), &wave)), 0, "{ripple:?}: nor is the way back");
    }
    assert_eq!(counts(&assign(&bases(&[16, 16], 4), &wave)), [2, 2], "but it is once it is over");
}

#[test]
fn an_idle_base_gives_its_workers_only_to_one_that_needs_them() {
    let idle = fresh(&bases(&[0, 0], 4));
    assert_eq!(counts(&idle), [4, 0]);
    let asked = assign(&bases(&[0, 1], 4), &idle);
    assert_eq!(counts(&asked), [3, 1], "one request is no reason for more than one worker");
    let hot = assign(&bases(&[0, 40], 4), &asked);
    assert_eq!(counts(&hot), [0, 4]);
    let other = assign(&bases(&[1, 40], 4), &hot);
    assert_eq!(counts(&other), [1, 3], "whoever asks gets one back at once");
    assert_eq!(assign(&bases(&[0, 40], 4), &other).preferring("b"), 4);
}

#[test]
fn with_fewer_workers_than_bases_the_hottest_are_preferred_and_the_others_take_turns() {
    let mut situation = bases(&[30, 20, 5], 2);
    situation.lenses = vec![asked("c", "one", 3_000), asked("c", "two", 2_000)];
    let before = fresh(&situation);
    assert_eq!(counts(&before), [1, 1, 0]);
    assert_eq!(before.turns().collect::<Vec<_>>(), [&key("c")]);

    let [one, two] = ["one", "two"].map(|name| before.order(&key("c"), Some(&LensId::of("c", name))));
    assert_eq!(one, two, "one switch serves both");
    assert_eq!(one.len(), 2);
    assert!(before.preloading("c", "one").is_empty(), "it would have to be loaded after the switch again");

    situation.bases[2] = base("c", 24);
    assert_eq!(changes(&before, &assign(&situation, &before)), 0, "24 rows instead of 20 are not worth it");
    situation.bases[2] = base("c", 40);
    let after = assign(&situation, &before);
    assert_eq!(counts(&after), [1, 0, 1], "the coldest one gives up its worker");
    assert_eq!(changes(&before, &after), 1);
}

#[test]
fn what_is_active_is_preferred_where_nothing_was_assigned() {
    let mut situation = bases(&[10, 10], 4);
    for (worker, active) in situation.workers.iter_mut().zip(["b", "b", "a", "a"]) {
        worker.active_base = Some(key(active));
    }
    let found = fresh(&situation);
    assert_eq!(["w0", "w1", "w2", "w3"].map(|name| found.preference(name).unwrap()), ["b", "b", "a", "a"]);

    situation.bases.remove(1);
    assert_eq!(counts(&assign(&situation, &found)), [4], "what is not declared is not preferred");
}

#[test]
fn the_worker_that_changes_is_one_that_has_the_base_active() {
    let idle = fresh(&bases(&[0, 0], 8));
    for active in ["w1", "w4", "w6"] {
        let mut situation = bases(&[0, 1], 8);
        for worker in &mut situation.workers {
            worker.active_base = Some(key(if worker.name == active { "b" } else { "a" }));
        }
        assert_eq!(assign(&situation, &idle).bases[&key("b")].workers, [active]);
    }
}

#[test]
fn a_leaving_worker_holds_nothing() {
    let mut situation = lenses((0..20).map(|n| lens("a", &format!("l{n}"))).collect(), 3);
    let before = fresh(&situation);
    situation.workers[1].availability = Availability::Leaving;
    let after = assign(&situation, &before);
    assert_eq!(after.bases[&key("a")].workers, ["w0", "w2"]);
    assert!(!after.workers.contains_key("w1"));
    for n in 0..20 {
        let name = format!("l{n}");
        let (was, is) = (before.holders("a", &name), after.holders("a", &name));
        assert_eq!(was == ["w1"], was != is, "{name}: only what it held goes elsewhere");
        assert_eq!(after.order(&key("a"), Some(&LensId::of("a", &name))).len(), 2);
    }
    situation.workers.remove(1);
    assert_eq!(assign(&situation, &before), after, "as if it were gone");
}

#[test]
fn residency_decides_what_is_warm_without_demand() {
    use LensResidency::{Cached, OnDemand, Pinned, Preloaded};
    let residencies =
        [("pinned", Pinned), ("preloaded", Preloaded), ("cached", Cached), ("on-demand", OnDemand)];
    let mut situation =
        lenses(residencies.iter().map(|(name, residency)| declared("a", name, *residency)).collect(), 3);
    for copies in [1, 2, 9] {
        situation.spread.min_copies = copies;
        let assignment = fresh(&situation);
        for (name, residency) in residencies {
            let holders = assignment.holders("a", name);
            assert_eq!(holders.len(), copies.min(3) as usize, "{name}");
            let mut warm: Vec<&str> = holders.iter().map(String::as_str).collect();
            warm.sort_unstable();
            warm.retain(|_| residency >= Preloaded);
            assert_eq!(assignment.preloading("a", name), warm, "{name}");
            let order = assignment.order(&key("a"), Some(&LensId::of("a", name)));
            assert_eq!(order[..holders.len()], *holders, "{name}: they come first");
            assert_eq!(order.len(), 3, "{name}: and all the others after them");
        }
    }
}

#[test]
fn copies_follow_the_demand_between_the_bounds_and_not_its_noise() {
    let mut before = Assignment::default();
    for (rows, copies) in [
        (0, 1),
        (1, 1),
        (16, 1),
        (20, 1),
        (21, 2),
        (17, 2),
        (33, 3),
        (30, 3),
        (24, 2),
        (1000, 4),
        (900, 4),
        (32, 2),
        (1, 1),
        (0, 1),
    ] {
        let assignment = assign(&lenses(vec![asked("a", "l", rows * 1000)], 8), &before);
        let holders = assignment.holders("a", "l");
        assert_eq!(holders.len(), copies, "{rows} rows");
        let was = before.bases.get(&key("a")).map_or(0, |_| before.holders("a", "l").len());
        if was > 0 {
            let kept = was.min(copies);
            assert_eq!(holders[..kept], before.holders("a", "l")[..kept], "{rows} rows: no copy moves");
        }
        assert_eq!(assignment.preloading("a", "l").len(), if rows == 0 { 0 } else { copies });
        before = assignment;
    }
}

#[test]
fn the_budget_goes_to_the_strongest_claim_first() {
    let sized = |lens: LensDemand, priority: u32| LensDemand { bytes: 400 * MIB, priority, ..lens };
    let situation = Situation {
        workers: vec![worker("w")],
        ..lenses(
            vec![
                sized(asked("a", "hot", 90_000), 900),
                sized(declared("a", "low", LensResidency::Preloaded), 1),
                sized(declared("a", "high", LensResidency::Preloaded), 2),
                sized(declared("a", "pinned", LensResidency::Pinned), 0),
                LensDemand { bytes: 150 * MIB, ..asked("a", "warm", 2_000) },
                LensDemand { bytes: 100 * MIB, ..asked("a", "hotter", 3_000) },
            ],
            0,
        )
    };
    let assignment = fresh(&situation);
    let preload: Vec<&str> = assignment.workers["w"].preload.iter().map(|id| id.0.as_str()).collect();
    assert_eq!(preload, ["a:pinned", "a:high", "a:hotter"], "and what no longer fits is passed over");
    for name in ["hot", "low", "warm"] {
        assert_eq!(assignment.holders("a", name), ["w"], "{name}: its requests go there all the same");
    }
}

#[test]
fn a_lens_goes_where_there_is_room_for_it() {
    let mut situation = lenses((0..40).map(|n| asked("a", &format!("l{n}"), 1_000)).collect(), 0);
    situation.workers = vec![worker("full"), worker("roomy")];
    situation.workers[0].lens_budget_bytes = 100 * MIB;
    let assignment = fresh(&situation);
    assert_eq!(assignment.workers["full"].preload.len(), 5);
    assert_eq!(assignment.workers["roomy"].preload.len(), 25, "5/4 of the mean of 20 rows");
}

#[test]
fn entries_of_one_lens_and_of_one_base_are_added_up() {
    let mut situation = bases(&[10, 25], 3);
    situation.bases.push(base("a", 30));
    situation.lenses = vec![
        asked("a", "l", 10_000),
        asked("a", "l", 10_000),
        declared("b", "l", LensResidency::Pinned),
        lens("b", "l"),
    ];
    let assignment = fresh(&situation);
    assert_eq!(counts(&assignment), [2, 1]);
    assert_eq!(assignment.holders("a", "l").len(), 2);
    assert_eq!(assignment.preloading("b", "l").len(), 1);
}

#[test]
fn an_assignment_survives_json() {
    let mut situation = bases(&[30, 20, 5], 2);
    situation.lenses =
        vec![asked("a", "l", 40_000), declared("b", "l", LensResidency::Pinned), lens("c", "l")];
    let assignment = fresh(&situation);
    let json = serde_json::to_string(&assignment).unwrap();
    assert_eq!(serde_json::from_str::<Assignment>(&json).unwrap(), assignment);
}

#[test]
fn the_answer_is_the_same_on_every_machine_and_in_every_release() {
    let mut situation = bases(&[30, 20], 5);
    situation.lenses = vec![
        asked("a", "l0", 20_000),
        asked("a", "l1", 5_000),
        lens("a", "l2"),
        asked("a", "l3", 1_000),
        asked("b", "l0", 9_000),
        lens("b", "l1"),
    ];
    let assignment = fresh(&situation);
    let workers: Vec<String> = assignment
        .workers
        .iter()
        .map(|(name, share)| {
            let preload: Vec<&str> = share.preload.iter().map(|id| id.0.as_str()).collect();
            format!("{name} prefers {}: {}", share.base.as_ref().unwrap(), preload.join(" "))
        })
        .collect();
    assert_eq!(
        workers,
        [
            "w0 prefers a: a:l1",
            "w1 prefers b: b:l0",
            "w2 prefers a: a:l0",
            "w3 prefers a: a:l0 a:l3",
            "w4 prefers b: "
        ]
    );
    for (base, name, order) in [
        ("a", "l0", "w2 w3 w0 w4 w1"),
        ("a", "l1", "w0 w3 w2 w4 w1"),
        ("a", "l2", "w2 w0 w3 w4 w1"),
        ("a", "l3", "w3 w2 w0 w4 w1"),
        ("b", "l0", "w1 w4 w0 w3 w2"),
        ("b", "l1", "w1 w4 w0 w3 w2"),
    ] {
        assert_eq!(
            assignment.order(&key(base), Some(&LensId::of(base, name))).join(" "),
            order,
            "{base}:{name}"
        );
    }
}
