//! What must leave so that something else fits. Pure: the same table gives the same plan.
//!
//! Lenses leave least recently used first; ties end on the key. Parked bases leave the same way, together with
//! the lenses over them. [`CannotFit`] tells how many bytes are missing and whether waiting can help.

use std::collections::BTreeSet;

use turret_crds::document::BaseKey;

use super::table::{Held, LensKey, Phase, Table};

/// Byte budgets of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// Everything.
    pub device_bytes: u64,
    /// The part for lenses.
    pub lens_bytes: u64,
}

/// What should be in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A lens of this many bytes.
    Lens(LensKey, u64),
    /// A base, beside all others that have users and beside the active one.
    Base {
        /// Which.
        key: BaseKey,
        /// Its bytes.
        bytes: u64,
        /// Bytes of workspace and KV cache that some base must have beside it, at least.
        working_bytes: u64,
        /// The active base may leave too if there is no other way: it has no rows and is being switched away from.
        instead_of_active: bool,
    },
    /// Nothing new, but no more than the budgets allow.
    Less {
        /// Bytes of workspace and KV cache that the active base must have, at least.
        working_bytes: u64,
    },
}

/// What to do, in this order, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Lenses that leave.
    pub evict_lenses: Vec<LensKey>,
    /// Bases that leave, after the lenses over them.
    pub evict_bases: Vec<BaseKey>,
    /// Whether what is wanted is to be loaded; false when it is there already.
    pub load: bool,
    /// For the log.
    pub why: String,
}

/// Why something cannot be in memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{short_by_bytes} bytes short: {why}")]
pub struct CannotFit {
    /// Bytes that are missing.
    pub short_by_bytes: u64,
    /// The sum, written out.
    pub why: String,
    /// Whether it fits once running rows have ended. Otherwise only another budget helps.
    pub once_idle: bool,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        !self.load && self.evict_lenses.is_empty() && self.evict_bases.is_empty()
    }
}

/// Plans for one wanted thing. `protected` lenses are wanted by older requests and stay.
pub fn plan(
    wanted: &Wanted,
    table: &Table,
    budgets: &Budgets,
    protected: &BTreeSet<LensKey>,
) -> Result<Plan, CannotFit> {
    match wanted {
        Wanted::Lens(key, bytes) => plan_lens(key, *bytes, table, budgets, protected),
        Wanted::Base { key, bytes, working_bytes, instead_of_active } => {
            plan_base(key, bytes.saturating_add(*working_bytes), *instead_of_active, table, budgets)
        }
        Wanted::Less { working_bytes } => Ok(plan_less(*working_bytes, table, budgets, protected)),
    }
}

fn plan_less(working_bytes: u64, table: &Table, budgets: &Budgets, protected: &BTreeSet<LensKey>) -> Plan {
    let excess = staying_lens_bytes(table).saturating_sub(budgets.lens_bytes);
    let (evict_lenses, _) = oldest_idle(table, protected, excess);
    let room = budgets.device_bytes.saturating_sub(budgets.lens_bytes);
    let base_excess = staying_base_bytes(table).saturating_add(working_bytes).saturating_sub(room);
    let (evict_bases, _) = parked(table, false, base_excess);
    let why = format!("{excess} bytes over the lens budget, {base_excess} over the device budget");
    // Lenses over a base that leaves go with it.
    let evict_lenses = evict_lenses.into_iter().filter(|lens| !evict_bases.contains(&lens.base)).collect();
    Plan { evict_lenses, evict_bases, load: false, why }
}

/// Bytes of bases that are not leaving already.
fn staying_base_bytes(table: &Table) -> u64 {
    table.bases.values().filter(|h| h.phase != Phase::Leaving).map(|h| h.bytes).sum()
}

/// Idle bases, least recently used first, until `excess` bytes are freed; and how many they free. The active one is the
/// last to go, and only if it may.
fn parked(table: &Table, with_active: bool, excess: u64) -> (Vec<BaseKey>, u64) {
    let is_active = |k: &BaseKey| table.active.as_ref() == Some(k);
    let is_idle = |k: &BaseKey, held: &Held| {
        let mut over = table.lenses.iter().filter(|(l, _)| l.base == *k);
        held.phase == Phase::Resident
            && held.users == 0
            && over.all(|(_, lens)| lens.users == 0 && lens.phase == Phase::Resident)
    };
    let mut idle: Vec<(&BaseKey, &Held)> =
        table.bases.iter().filter(|(k, held)| is_idle(k, held) && (with_active || !is_active(k))).collect();
    idle.sort_by_key(|(k, held)| (is_active(k), held.last_used, *k));
    let mut freed = 0;
    let mut leaving = Vec::new();
    for (key, held) in idle {
        if freed >= excess {
            break;
        }
        freed += held.bytes;
        leaving.push(key.clone());
    }
    (leaving, freed)
}

/// Bytes of lenses that are not leaving already.
fn staying_lens_bytes(table: &Table) -> u64 {
    table.lenses.values().filter(|h| h.phase != Phase::Leaving).map(|h| h.bytes).sum()
}

fn plan_lens(
    key: &LensKey,
    bytes: u64,
    table: &Table,
    budgets: &Budgets,
    protected: &BTreeSet<LensKey>,
) -> Result<Plan, CannotFit> {
    if table.lenses.contains_key(key) {
        return Ok(Plan::default());
    }
    if bytes > budgets.lens_bytes {
        return Err(CannotFit {
            short_by_bytes: bytes - budgets.lens_bytes,
            why: format!("the lens takes {bytes} bytes, of a lens budget of {}", budgets.lens_bytes),
            once_idle: false,
        });
    }
    let staying = staying_lens_bytes(table);
    let excess = staying.saturating_add(bytes).saturating_sub(budgets.lens_bytes);
    let (evict_lenses, freed) = oldest_idle(table, protected, excess);
    if freed < excess {
        return Err(CannotFit {
            short_by_bytes: excess - freed,
            why: format!(
                "the lens takes {bytes} bytes and lenses that are in use or wanted {}, of a lens budget of {}",
                staying - freed,
                budgets.lens_bytes
            ),
            once_idle: true,
        });
    }
    let why = format!("lenses take {staying} bytes, {bytes} more are wanted, {} allowed", budgets.lens_bytes);
    Ok(Plan { evict_lenses, load: true, why, ..Plan::default() })
}

/// Idle lenses, least recently used first, until `excess` bytes are freed; and how many they free.
fn oldest_idle(table: &Table, protected: &BTreeSet<LensKey>, excess: u64) -> (Vec<LensKey>, u64) {
    let mut idle: Vec<(&LensKey, &Held)> = table
        .lenses
        .iter()
        .filter(|(key, held)| held.phase == Phase::Resident && held.users == 0 && !protected.contains(*key))
        .collect();
    idle.sort_by_key(|(key, held)| (held.last_used, *key));
    let mut freed = 0;
    let mut leaving = Vec::new();
    for (key, held) in idle {
        if freed >= excess {
            break;
        }
        freed += held.bytes;
        leaving.push(key.clone());
    }
    (leaving, freed)
}

fn plan_base(
    key: &BaseKey,
    bytes: u64,
    instead_of_active: bool,
    table: &Table,
    budgets: &Budgets,
) -> Result<Plan, CannotFit> {
    if table.bases.contains_key(key) {
        return Ok(Plan::default());
    }
    let room = budgets.device_bytes.saturating_sub(budgets.lens_bytes);
    if bytes > room {
        return Err(CannotFit {
            short_by_bytes: bytes - room,
            why: format!(
                "the base with its least workspace and KV cache takes {bytes} bytes and the lens budget {}, of a \
                 device budget of {}",
                budgets.lens_bytes, budgets.device_bytes
            ),
            once_idle: false,
        });
    }
    // The active one is the last to go: it may be wanted again at once.
    let staying = staying_base_bytes(table);
    let excess = staying.saturating_add(bytes).saturating_sub(room);
    let (evict_bases, freed) = parked(table, instead_of_active, excess);
    let over = |lens: &&LensKey| evict_bases.contains(&lens.base);
    let evict_lenses: Vec<LensKey> = table.lenses.keys().filter(over).cloned().collect();
    if freed < excess {
        return Err(CannotFit {
            short_by_bytes: excess - freed,
            why: format!(
                "the base with its least workspace and KV cache takes {bytes} bytes, bases that stay {} and the lens \
                 budget {}, of a device budget of {}",
                staying - freed,
                budgets.lens_bytes,
                budgets.device_bytes
            ),
            once_idle: true,
        });
    }
    let why = format!("bases take {staying} bytes, {bytes} more are wanted, {room} allowed");
    Ok(Plan { evict_lenses, evict_bases, load: true, why })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn base(n: u8) -> BaseKey {
        BaseKey(format!("base-{n}"))
    }

    fn lens(b: u8, n: u8) -> LensKey {
        LensKey { base: base(b), digest: format!("lens-{n}") }
    }

    fn held(bytes: u64, users: u32, last_used: u64) -> Held {
        Held { bytes, phase: Phase::Resident, users, last_used }
    }

    const BUDGETS: Budgets = Budgets { device_bytes: 100, lens_bytes: 30 };

    fn table() -> Table {
        Table {
            bases: [(base(0), held(40, 0, 5)), (base(1), held(20, 0, 2))].into(),
            active: Some(base(0)),
            lenses: [
                (lens(0, 1), held(10, 0, 3)),
                (lens(0, 2), held(10, 0, 1)),
                (lens(1, 3), held(10, 1, 0)),
            ]
            .into(),
        }
    }

    fn lens_plan(bytes: u64, table: &Table) -> Result<Plan, CannotFit> {
        plan(&Wanted::Lens(lens(0, 9), bytes), table, &BUDGETS, &BTreeSet::new())
    }

    #[test]
    fn the_least_recently_used_lens_leaves_and_one_in_use_never() {
        assert_eq!(lens_plan(5, &table()).unwrap().evict_lenses, [lens(0, 2)]);
        assert_eq!(lens_plan(20, &table()).unwrap().evict_lenses, [lens(0, 2), lens(0, 1)]);
        let busy = lens_plan(25, &table()).unwrap_err();
        assert_eq!((busy.short_by_bytes, busy.once_idle), (5, true));
        let never = lens_plan(31, &table()).unwrap_err();
        assert_eq!((never.short_by_bytes, never.once_idle), (1, false));
    }

    #[test]
    fn a_lens_that_an_older_request_waits_for_stays() {
        let protected = [lens(0, 2)].into();
        let plan = plan(&Wanted::Lens(lens(0, 9), 5), &table(), &BUDGETS, &protected).unwrap();
        assert_eq!(plan.evict_lenses, [lens(0, 1)]);
    }

    #[test]
    fn smaller_budgets_send_parked_bases_away_and_never_the_active_one() {
        let mut table = table();
        table.lenses.get_mut(&lens(1, 3)).unwrap().users = 0;
        let less = |device_bytes| {
            let budgets = Budgets { device_bytes, ..BUDGETS };
            plan(&Wanted::Less { working_bytes: 5 }, &table, &budgets, &BTreeSet::new()).unwrap()
        };
        assert!(less(95).is_empty(), "60 of bases, 30 for lenses, 5 to work with");
        assert_eq!(less(94).evict_bases, [base(1)]);
        assert_eq!(less(10).evict_bases, [base(1)]);
    }

    #[test]
    fn ties_end_on_the_key() {
        let mut table = table();
        for held in table.lenses.values_mut() {
            (held.last_used, held.users) = (7, 0);
        }
        assert_eq!(lens_plan(1, &table).unwrap().evict_lenses, [lens(0, 1)]);
    }

    fn base_plan(bytes: u64, instead_of_active: bool, table: &Table) -> Result<Plan, CannotFit> {
        let wanted = Wanted::Base { key: base(9), bytes, working_bytes: 0, instead_of_active };
        plan(&wanted, table, &BUDGETS, &BTreeSet::new())
    }

    #[test]
    fn parked_bases_leave_before_the_active_one_and_only_idle() {
        assert_eq!(base_plan(10, false, &table()).unwrap().evict_bases, [] as [BaseKey; 0]);
        let parked_in_use = base_plan(20, false, &table()).unwrap_err();
        assert!(parked_in_use.once_idle, "a lens over the parked base has a user");
        let mut idle = table();
        idle.lenses.get_mut(&lens(1, 3)).unwrap().users = 0;
        let plan = base_plan(20, true, &idle).unwrap();
        assert_eq!((plan.evict_bases, plan.evict_lenses), (vec![base(1)], vec![lens(1, 3)]));
        assert_eq!(base_plan(60, true, &idle).unwrap().evict_bases, [base(1), base(0)]);
        assert!(base_plan(60, false, &idle).unwrap_err().once_idle);
        assert!(!base_plan(71, true, &idle).unwrap_err().once_idle);
    }

    fn any_phase() -> impl Strategy<Value = Phase> {
        prop_oneof![3 => Just(Phase::Resident), 1 => Just(Phase::Loading), 1 => Just(Phase::Leaving)]
    }

    fn any_table() -> impl Strategy<Value = (Table, Budgets)> {
        let lenses =
            proptest::collection::vec((0u8..3, 0u8..12, 1u64..20, any_phase(), 0u32..3, 0u64..6), 0..12);
        let bases = proptest::collection::vec((0u8..4, 1u64..40, any_phase(), 0u32..2, 0u64..6), 0..4);
        (bases, lenses, 0u64..40, 0u64..60, proptest::option::of(0u8..4)).prop_map(
            |(bases, lenses, lens_room, base_room, active)| {
                let mut table = Table::default();
                for (n, bytes, phase, users, last_used) in bases {
                    let users = if phase == Phase::Resident { users } else { 0 };
                    table.bases.insert(base(n), Held { bytes, phase, users, last_used });
                }
                for (b, n, bytes, phase, users, last_used) in lenses {
                    let users = if phase == Phase::Resident { users } else { 0 };
                    table.lenses.insert(lens(b, n), Held { bytes, phase, users, last_used });
                }
                table.active = active.map(base).filter(|k| table.has_base(k));
                // Budgets that the table respects, as it always does.
                let lens_bytes = table.lens_bytes() + lens_room;
                let device_bytes = lens_bytes + table.base_bytes() + base_room;
                (table, Budgets { device_bytes, lens_bytes })
            },
        )
    }

    /// The table when the plan is carried out.
    fn carried_out(plan: &Plan, wanted: &Wanted, mut table: Table) -> Table {
        let leaves = |k: &LensKey| plan.evict_lenses.contains(k) || plan.evict_bases.contains(&k.base);
        table.lenses.retain(|k, h| h.phase != Phase::Leaving && !leaves(k));
        table.bases.retain(|k, h| h.phase != Phase::Leaving && !plan.evict_bases.contains(k));
        match wanted {
            Wanted::Lens(key, bytes) if plan.load => {
                table.lenses.insert(key.clone(), held(*bytes, 0, 9));
            }
            Wanted::Base { key, bytes, .. } if plan.load => {
                table.bases.insert(key.clone(), held(*bytes, 0, 9));
            }
            _ => {}
        }
        table
    }

    proptest! {
        #[test]
        fn what_is_used_or_moving_stays_and_budgets_hold(
            (table, budgets) in any_table(),
            wants_lens in any::<bool>(), bytes in 1u64..60, working_bytes in 0u64..5, instead in any::<bool>(),
            protect in 0u8..12,
        ) {
            let protected: BTreeSet<LensKey> = (0..3).map(|b| lens(b, protect)).collect();
            let wanted = if wants_lens {
                Wanted::Lens(lens(0, 99), bytes)
            } else {
                Wanted::Base { key: base(99), bytes, working_bytes, instead_of_active: instead }
            };
            match plan(&wanted, &table, &budgets, &protected) {
                Ok(done) => {
                    for key in &done.evict_lenses {
                        let held = &table.lenses[key];
                        prop_assert!(held.users == 0 && held.phase == Phase::Resident);
                        prop_assert!(!wants_lens || !protected.contains(key));
                    }
                    for key in &done.evict_bases {
                        let held = &table.bases[key];
                        prop_assert!(held.users == 0 && held.phase == Phase::Resident);
                        prop_assert!(instead || table.active.as_ref() != Some(key));
                        let orphans = table.lenses_over(key).filter(|l| !done.evict_lenses.contains(l)).count();
                        prop_assert_eq!(orphans, 0, "lenses leave before their base");
                    }
                    let after = carried_out(&done, &wanted, table.clone());
                    prop_assert!(after.lens_bytes() <= budgets.lens_bytes);
                    let working = if wants_lens { 0 } else { working_bytes };
                    prop_assert!(after.base_bytes() + working + budgets.lens_bytes <= budgets.device_bytes);
                    let again = plan(&wanted, &after, &budgets, &protected).unwrap();
                    prop_assert!(again.is_empty(), "a plan on the planned state is empty: {again:?}");
                }
                Err(short) => {
                    prop_assert!(short.short_by_bytes > 0);
                    // With a budget larger by what is missing, it fits.
                    let more = Budgets {
                        device_bytes: budgets.device_bytes + short.short_by_bytes,
                        lens_bytes: budgets.lens_bytes + if wants_lens { short.short_by_bytes } else { 0 },
                    };
                    let retried = plan(&wanted, &table, &more, &protected);
                    prop_assert!(retried.is_ok() || !short.once_idle && retried.unwrap_err().once_idle);
                }
            }
        }

        #[test]
        fn smaller_budgets_are_met_as_far_as_what_is_idle_goes(
            (table, budgets) in any_table(), cut in 0u64..50, device_cut in 0u64..80, working_bytes in 0u64..5,
        ) {
            let less = Budgets {
                lens_bytes: budgets.lens_bytes.saturating_sub(cut),
                device_bytes: budgets.device_bytes.saturating_sub(device_cut),
            };
            let active = table.active.clone();
            // A base may go once the lenses over it are gone: that takes another look.
            let settled = table.lenses.values().all(|h| h.phase != Phase::Leaving);
            let wanted = Wanted::Less { working_bytes };
            let done = plan(&wanted, &table, &less, &BTreeSet::new()).unwrap();
            let after = carried_out(&done, &wanted, table);
            let idle = after.lenses.values().filter(|h| h.users == 0 && h.phase == Phase::Resident).count();
            prop_assert!(after.lens_bytes() <= less.lens_bytes || idle == 0);
            prop_assert!(active.is_none_or(|key| after.bases.contains_key(&key) || !done.evict_bases.contains(&key)));
            let fits = after.base_bytes() + working_bytes + less.lens_bytes <= less.device_bytes;
            let (can_leave, _) = parked(&after, false, u64::MAX);
            prop_assert!(fits || can_leave.is_empty() || !settled, "{can_leave:?} could leave");
            let again = plan(&wanted, &after, &less, &BTreeSet::new()).unwrap();
            prop_assert!(again.is_empty() || !settled, "{again:?}");
        }
    }
}
