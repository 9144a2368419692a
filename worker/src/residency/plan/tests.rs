use proptest::prelude::*;
use turret_crds::placement::EvictionPolicy;

use super::*;

fn base(n: u8) -> BaseKey {
    BaseKey(format!("base-{n}"))
}

fn lens(b: u8, n: u8) -> LensKey {
    LensKey { base: base(b), digest: format!("lens-{n}") }
}

fn held_base(bytes: u64, users: u32, last_used: u64) -> Held {
    Held { bytes, phase: Phase::Resident, users, last_used }
}

const BUDGETS: Budgets = Budgets { device_bytes: 100, lens_bytes: 30 };
/// After everything that was used.
const NOW: f64 = 100.0;

/// A table, and what is remembered of its lenses.
#[derive(Clone, Debug)]
struct Memory {
    table: Table,
    history: History,
    policy: EvictionPolicy,
}

/// A lens: its base and number, bytes, users, and when it was last used.
type Spec = (u8, u8, u64, u32, u64);

impl Memory {
    fn new(bases: &[(u8, u64, u64)], lenses: &[Spec]) -> Self {
        let mut memory =
            Self { table: Table::default(), history: History::new(10.0), policy: EvictionPolicy::Lru };
        for &(n, bytes, last_used) in bases {
            memory.table.bases.insert(base(n), held_base(bytes, 0, last_used));
        }
        let mut in_time = lenses.to_vec();
        in_time.sort_by_key(|spec| spec.4);
        for (b, n, bytes, users, last_used) in in_time {
            memory.hold(lens(b, n), bytes, users, last_used as f64);
        }
        memory
    }

    fn hold(&mut self, key: LensKey, bytes: u64, users: u32, at: f64) {
        let entry = self.history.register(bytes, 1.0, 0);
        self.history.served(entry, at, 30);
        let (phase, percent) = (Phase::Resident, 100);
        let held = HeldLens { bytes, phase, percent, users, kept: false, entry, group: 0, id: None };
        self.table.lenses.insert(key, held);
    }

    fn lens(&mut self, key: &LensKey) -> &mut HeldLens {
        self.table.lenses.get_mut(key).unwrap()
    }

    fn plan(
        &self,
        wanted: &Wanted,
        budgets: &Budgets,
        protected: &BTreeSet<LensKey>,
    ) -> Result<Plan, CannotFit> {
        let order = Order { history: &self.history, ranking: self.history.ranking(self.policy, NOW) };
        Inventory { table: &self.table, budgets: *budgets, order, protected }.plan(wanted)
    }

    fn plan_lens(&self, bytes: u64) -> Result<Plan, CannotFit> {
        self.plan(&wanted_lens(bytes), &BUDGETS, &BTreeSet::new())
    }

    fn plan_base(&self, bytes: u64, instead_of_active: bool) -> Result<Plan, CannotFit> {
        let wanted = Wanted::Base { key: base(9), bytes, working_bytes: 0, instead_of_active };
        self.plan(&wanted, &BUDGETS, &BTreeSet::new())
    }
}

fn wanted_lens(bytes: u64) -> Wanted {
    Wanted::Lens { key: lens(0, 9), bytes, instead_of_others: true }
}

fn gone(plan: &Plan) -> Vec<LensKey> {
    plan.evict_lenses.iter().map(|leaving| leaving.key.clone()).collect()
}

/// The lens that is used is the least recently used one.
fn memory() -> Memory {
    let lenses = [(0, 1, 10, 0, 3), (0, 2, 10, 0, 1), (1, 3, 10, 1, 0)];
    let mut memory = Memory::new(&[(0, 40, 5), (1, 20, 2)], &lenses);
    memory.table.active = Some(base(0));
    memory
}

#[test]
fn the_least_recently_used_lens_leaves_and_one_in_use_never() {
    let memory = memory();
    assert_eq!(gone(&memory.plan_lens(5).unwrap()), [lens(0, 2)]);
    assert_eq!(gone(&memory.plan_lens(20).unwrap()), [lens(0, 2), lens(0, 1)]);
    let busy = memory.plan_lens(25).unwrap_err();
    assert_eq!((busy.short_by_bytes, busy.until), (5, Until::Idle));
    let never = memory.plan_lens(31).unwrap_err();
    assert_eq!((never.short_by_bytes, never.until), (1, Until::Never));
}

#[test]
fn a_lens_that_is_kept_stays_and_who_needs_its_room_is_told_so() {
    let mut memory = memory();
    memory.lens(&lens(0, 2)).kept = true;
    assert_eq!(gone(&memory.plan_lens(5).unwrap()), [lens(0, 1)]);
    memory.lens(&lens(1, 3)).kept = true;
    let released = memory.plan_lens(11).unwrap_err();
    assert_eq!((released.short_by_bytes, released.until), (1, Until::Released));
    let ahead = Wanted::Lens { key: lens(0, 9), bytes: 5, instead_of_others: false };
    assert_eq!(memory.plan(&ahead, &BUDGETS, &BTreeSet::new()).unwrap_err().until, Until::Idle);
}

#[test]
fn a_lens_that_an_older_request_waits_for_stays() {
    let plan = memory().plan(&wanted_lens(5), &BUDGETS, &[lens(0, 2)].into()).unwrap();
    assert_eq!(gone(&plan), [lens(0, 1)]);
}

#[test]
fn who_leaves_is_told_why() {
    let plan = memory().plan_lens(5).unwrap();
    let leaving = &plan.evict_lenses[0];
    assert_eq!(leaving.reason, EvictionReason::Room);
    assert_eq!(leaving.message, "least recently used: idle 99 s");
}

#[test]
fn a_sweep_leaves_what_was_just_used_and_ends_at_the_low_watermark() {
    let sweep = |high_percent, low_percent| {
        let rule = SweepRule { high_percent, low_percent, every_seconds: 60 };
        // Lens 3 is in use, lens 4 was used 5 s ago; 10 s make idle.
        let lenses = [(0, 1, 10, 0, 3), (0, 2, 10, 0, 1), (1, 3, 5, 1, 0), (0, 4, 5, 0, 95)];
        let plan = Memory::new(&[], &lenses).plan(&Wanted::Swept(rule), &BUDGETS, &BTreeSet::new()).unwrap();
        assert!(plan.evict_lenses.iter().all(|leaving| leaving.reason == EvictionReason::Idle));
        gone(&plan)
    };
    assert_eq!(sweep(100, 0), [], "no more is taken than the high watermark");
    assert_eq!(sweep(90, 80), [lens(0, 2)]);
    assert_eq!(sweep(90, 0), [lens(0, 2), lens(0, 1)]);
}

#[test]
fn smaller_budgets_send_parked_bases_away_and_never_the_active_one() {
    let mut memory = memory();
    memory.lens(&lens(1, 3)).users = 0;
    let less = |device_bytes| {
        let budgets = Budgets { device_bytes, ..BUDGETS };
        memory.plan(&Wanted::Less { working_bytes: 5 }, &budgets, &BTreeSet::new()).unwrap()
    };
    assert!(less(95).is_empty(), "60 of bases, 30 for lenses, 5 to work with");
    assert_eq!(less(94).evict_bases, [base(1)]);
    assert_eq!(less(10).evict_bases, [base(1)]);
}

#[test]
fn ties_end_on_the_key() {
    let memory = Memory::new(&[], &[(0, 2, 10, 0, 7), (0, 1, 10, 0, 7), (1, 3, 10, 0, 7)]);
    assert_eq!(gone(&memory.plan_lens(1).unwrap()), [lens(0, 1)]);
}

#[test]
fn parked_bases_leave_before_the_active_one_and_only_idle() {
    let mut memory = memory();
    assert_eq!(memory.plan_base(10, false).unwrap().evict_bases, [] as [BaseKey; 0]);
    let parked_in_use = memory.plan_base(20, false).unwrap_err();
    assert_eq!(parked_in_use.until, Until::Idle, "a lens over the parked base has a user");
    memory.lens(&lens(1, 3)).users = 0;
    let plan = memory.plan_base(20, true).unwrap();
    assert_eq!((&plan.evict_bases[..], gone(&plan)), (&[base(1)][..], vec![lens(1, 3)]));
    assert_eq!(memory.plan_base(60, true).unwrap().evict_bases, [base(1), base(0)]);
    assert_eq!(memory.plan_base(60, false).unwrap_err().until, Until::Idle);
    assert_eq!(memory.plan_base(71, true).unwrap_err().until, Until::Never);
}

#[test]
fn a_parked_base_with_a_lens_that_is_kept_leaves_after_the_others() {
    let mut memory = Memory::new(&[(0, 20, 5), (1, 20, 2), (2, 20, 3)], &[(1, 3, 10, 0, 0)]);
    memory.table.active = Some(base(0));
    memory.lens(&lens(1, 3)).kept = true;
    assert_eq!(memory.plan_base(30, false).unwrap().evict_bases, [base(2)]);
    assert_eq!(memory.plan_base(50, false).unwrap().evict_bases, [base(2), base(1)]);
}

#[test]
fn a_switch_waits_for_what_it_needs_and_for_what_leaves_it_no_room() {
    let mut memory = Memory::new(&[(0, 20, 1), (1, 30, 2)], &[(0, 1, 10, 0, 0)]);
    memory.table.active = Some(base(0));
    let can = |memory: &Memory, to: u8, bytes: u64| can_switch(&memory.table, 70, &base(to), bytes);
    assert!(can(&memory, 9, 1000), "the engine says by how much");
    memory.table.bases.get_mut(&base(1)).unwrap().phase = Phase::Loading;
    assert!(can(&memory, 9, 40), "the active one may leave");
    assert!(!can(&memory, 9, 41));
    assert!(!can(&memory, 1, 30), "it is on its way already");
    memory.lens(&lens(0, 1)).phase = Phase::Loading;
    assert!(!can(&memory, 9, 40));
    memory.lens(&lens(0, 1)).phase = Phase::Resident;
    memory.table.bases.get_mut(&base(1)).unwrap().phase = Phase::Leaving;
    assert!(!can(&memory, 9, 1));
}

fn any_phase() -> impl Strategy<Value = Phase> {
    prop_oneof![3 => Just(Phase::Resident), 1 => Just(Phase::Loading), 1 => Just(Phase::Leaving)]
}

fn any_policy() -> impl Strategy<Value = EvictionPolicy> {
    proptest::sample::select(&EvictionPolicy::ALL)
}

fn any_memory() -> impl Strategy<Value = (Memory, Budgets)> {
    let lens_spec = (0u8..3, 0u8..12, 1u64..20, any_phase(), 0u32..3, 0u64..6, proptest::bool::weighted(0.2));
    let lenses = proptest::collection::vec(lens_spec, 0..12);
    let bases = proptest::collection::vec((0u8..4, 1u64..40, any_phase(), 0u32..2, 0u64..6), 0..4);
    let active = proptest::option::of(0u8..4);
    (bases, lenses, 0u64..40, 0u64..60, active, any_policy()).prop_map(
        |(bases, lenses, lens_room, base_room, active, policy)| {
            let specs: Vec<Spec> = lenses.iter().map(|l| (l.0, l.1, l.2, l.4, l.5)).collect();
            let mut memory = Memory { policy, ..Memory::new(&[], &specs) };
            for (n, bytes, phase, users, last_used) in bases {
                let users = if phase == Phase::Resident { users } else { 0 };
                memory.table.bases.insert(base(n), Held { bytes, phase, users, last_used });
            }
            for (b, n, _, phase, _, _, kept) in lenses {
                let held = memory.lens(&lens(b, n));
                held.users = if phase == Phase::Resident { held.users } else { 0 };
                (held.phase, held.kept) = (phase, kept);
            }
            let table = &mut memory.table;
            table.active = active.map(base).filter(|k| table.has_base(k));
            // Budgets that the table respects, as it always does.
            let lens_bytes = table.lens_bytes() + lens_room;
            let device_bytes = lens_bytes + table.base_bytes() + base_room;
            (memory, Budgets { device_bytes, lens_bytes })
        },
    )
}

/// Memory when the plan is carried out.
fn carried_out(plan: &Plan, wanted: &Wanted, mut memory: Memory) -> Memory {
    let gone = gone(plan);
    let table = &mut memory.table;
    let leaves = |k: &LensKey| gone.contains(k) || plan.evict_bases.contains(&k.base);
    table.lenses.retain(|k, h| h.phase != Phase::Leaving && !leaves(k));
    table.bases.retain(|k, h| h.phase != Phase::Leaving && !plan.evict_bases.contains(k));
    match wanted {
        Wanted::Lens { key, bytes, .. } if plan.load => memory.hold(key.clone(), *bytes, 0, 9.0),
        Wanted::Base { key, bytes, .. } if plan.load => {
            memory.table.bases.insert(key.clone(), held_base(*bytes, 0, 9));
        }
        _ => {}
    }
    memory
}

proptest! {
    #[test]
    fn what_is_used_kept_or_moving_stays_and_budgets_hold(
        (memory, budgets) in any_memory(),
        wants_lens in any::<bool>(), bytes in 1u64..60, working_bytes in 0u64..5, instead in any::<bool>(),
        protect in 0u8..12,
    ) {
        let protected: BTreeSet<LensKey> = (0..3).map(|b| lens(b, protect)).collect();
        let wanted = if wants_lens {
            Wanted::Lens { key: lens(0, 99), bytes, instead_of_others: instead }
        } else {
            Wanted::Base { key: base(99), bytes, working_bytes, instead_of_active: instead }
        };
        let table = &memory.table;
        match memory.plan(&wanted, &budgets, &protected) {
            Ok(done) => {
                let gone = gone(&done);
                for key in &gone {
                    let held = &table.lenses[key];
                    prop_assert!(held.is_idle());
                    prop_assert!(!wants_lens || instead && !held.kept && !protected.contains(key));
                }
                for key in &done.evict_bases {
                    let held = &table.bases[key];
                    prop_assert!(held.users == 0 && held.phase == Phase::Resident);
                    prop_assert!(instead || table.active.as_ref() != Some(key));
                    let orphans = table.lenses_over(key).filter(|l| !gone.contains(l)).count();
                    prop_assert_eq!(orphans, 0, "lenses leave before their base");
                }
                let after = carried_out(&done, &wanted, memory.clone());
                prop_assert!(after.table.lens_bytes() <= budgets.lens_bytes);
                let working = if wants_lens { 0 } else { working_bytes };
                prop_assert!(after.table.base_bytes() + working + budgets.lens_bytes <= budgets.device_bytes);
                let again = after.plan(&wanted, &budgets, &protected).unwrap();
                prop_assert!(again.is_empty(), "a plan on the planned state is empty: {again:?}");
            }
            Err(short) => {
                prop_assert!(short.short_by_bytes > 0);
                // With a budget larger by what is missing, it fits, or something else is missing.
                let more = Budgets {
                    device_bytes: budgets.device_bytes + short.short_by_bytes,
                    lens_bytes: budgets.lens_bytes + if wants_lens { short.short_by_bytes } else { 0 },
                };
                let retried = memory.plan(&wanted, &more, &protected);
                prop_assert!(retried.is_ok() || short.until != Until::Idle && retried.unwrap_err().until != short.until);
                if short.until == Until::Idle && instead {
                    // It is true: once nothing runs, nothing moves and nobody is before it, it fits.
                    let mut idle = memory.clone();
                    idle.table.lenses.values_mut().for_each(|h| (h.users, h.phase) = (0, Phase::Resident));
                    idle.table.bases.values_mut().for_each(|h| (h.users, h.phase) = (0, Phase::Resident));
                    prop_assert!(idle.plan(&wanted, &budgets, &BTreeSet::new()).is_ok());
                }
            }
        }
    }

    #[test]
    fn a_switch_that_begins_beside_a_load_has_a_plan(
        (mut memory, budgets) in any_memory(), loading in 1u64..20, bytes in 1u64..60,
    ) {
        // By then no row runs, and no lens moves.
        memory.table.bases.values_mut().for_each(|held| held.users = 0);
        memory.table.lenses.values_mut().for_each(|held| (held.users, held.phase) = (0, Phase::Resident));
        memory.table.bases.insert(base(50), Held { phase: Phase::Loading, ..held_base(loading, 0, 9) });
        let room = budgets.device_bytes - budgets.lens_bytes;
        if can_switch(&memory.table, room, &base(99), bytes) {
            let wanted = Wanted::Base { key: base(99), bytes, working_bytes: 0, instead_of_active: true };
            prop_assert!(memory.plan(&wanted, &budgets, &BTreeSet::new()).is_ok());
        }
    }

    #[test]
    fn smaller_budgets_are_met_as_far_as_what_is_idle_goes(
        (memory, budgets) in any_memory(), cut in 0u64..50, device_cut in 0u64..80, working_bytes in 0u64..5,
    ) {
        let less = Budgets {
            lens_bytes: budgets.lens_bytes.saturating_sub(cut),
            device_bytes: budgets.device_bytes.saturating_sub(device_cut),
        };
        let active = memory.table.active.clone();
        // A base may go once the lenses over it are gone: that takes another look.
        let settled = memory.table.lenses.values().all(|h| h.phase != Phase::Leaving);
        let wanted = Wanted::Less { working_bytes };
        let done = memory.plan(&wanted, &less, &BTreeSet::new()).unwrap();
        let after = carried_out(&done, &wanted, memory);
        let idle = after.table.lenses.values().filter(|h| h.is_idle()).count();
        prop_assert!(after.table.lens_bytes() <= less.lens_bytes || idle == 0);
        prop_assert!(
            active.is_none_or(|key| after.table.bases.contains_key(&key) || !done.evict_bases.contains(&key))
        );
        let fits = after.table.base_bytes() + working_bytes + less.lens_bytes <= less.device_bytes;
        let (can_leave, _) = parked(&after.table, false, u64::MAX);
        prop_assert!(fits || can_leave.is_empty() || !settled, "{can_leave:?} could leave");
        let again = after.plan(&wanted, &less, &BTreeSet::new()).unwrap();
        prop_assert!(again.is_empty() || !settled, "{again:?}");
    }
}
