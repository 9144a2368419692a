//! What must leave so that something else fits. Pure: the same table and history give the same plan.
//!
//! Which lenses leave, the policy says ([`crate::eviction`]); that none leaves which is in use, kept or wanted by an
//! older request, is seen to here. Parked bases leave least recently used first, together with the lenses over them.
//! [`CannotFit`] tells how many bytes are missing and what has to happen first.

use std::collections::BTreeSet;

use turret_crds::document::{BaseKey, SweepRule};
use turret_crds::report::EvictionReason;

use super::table::{Held, HeldLens, LensKey, Phase, Table};
use crate::eviction::history::History;
use crate::eviction::policy::{Ranking, Resident, choose};

/// Byte budgets of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// Everything.
    pub device_bytes: u64,
    /// The part for lenses.
    pub lens_bytes: u64,
}

/// By what lenses are put in order.
#[derive(Clone, Copy, Debug)]
pub struct Order<'a> {
    /// What is remembered of them.
    pub history: &'a History,
    /// The policy, and now.
    pub ranking: Ranking,
}

/// What should be in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A lens of this many bytes.
    Lens {
        /// Which.
        key: LensKey,
        /// Its bytes.
        bytes: u64,
        /// Whether others may leave for it.
        instead_of_others: bool,
    },
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
    /// Nothing new, and nothing idle beyond the watermarks.
    Swept(SweepRule),
}

/// A lens that leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaving {
    /// Which.
    pub key: LensKey,
    /// Why, for machines.
    pub reason: EvictionReason,
    /// What made it this one, for people.
    pub message: String,
}

/// What to do, in this order, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Lenses that leave.
    pub evict_lenses: Vec<Leaving>,
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
    /// What helps.
    pub until: Until,
}

/// What has to happen before something fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Until {
    /// Running rows end, or older requests are served.
    Idle,
    /// A lease ends, or something is no longer pinned.
    Released,
    /// Nothing but another budget.
    Never,
}

impl Plan {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        !self.load && self.evict_lenses.is_empty() && self.evict_bases.is_empty()
    }
}

/// What a plan depends on.
#[derive(Clone, Copy, Debug)]
pub struct Inventory<'a> {
    /// What is in memory.
    pub table: &'a Table,
    /// How much of it there may be.
    pub budgets: Budgets,
    /// Who leaves first.
    pub order: Order<'a>,
    /// Lenses that older requests want: they stay.
    pub protected: &'a BTreeSet<LensKey>,
}

impl Inventory<'_> {
    /// Plans for one wanted thing.
    pub fn plan(&self, wanted: &Wanted) -> Result<Plan, CannotFit> {
        match wanted {
            Wanted::Lens { key, bytes, instead_of_others } => self.lens(key, *bytes, *instead_of_others),
            Wanted::Base { key, bytes, working_bytes, instead_of_active } => {
                self.base(key, bytes.saturating_add(*working_bytes), *instead_of_active)
            }
            Wanted::Less { working_bytes } => Ok(self.less(*working_bytes)),
            Wanted::Swept(rule) => Ok(self.swept(*rule)),
        }
    }

    fn less(&self, working_bytes: u64) -> Plan {
        let excess = staying_lens_bytes(self.table).saturating_sub(self.budgets.lens_bytes);
        let may_leave = |key: &LensKey, held: &HeldLens| self.may_leave(key, held);
        let (mut evict_lenses, freed) = self.leaving(EvictionReason::Budget, excess, may_leave);
        if freed < excess {
            // A smaller budget is stronger than a lease or a pin.
            let kept = |_: &LensKey, held: &HeldLens| held.kept && held.is_idle();
            evict_lenses.extend(self.leaving(EvictionReason::Budget, excess - freed, kept).0);
        }
        let room = self.budgets.device_bytes.saturating_sub(self.budgets.lens_bytes);
        let base_excess = staying_base_bytes(self.table).saturating_add(working_bytes).saturating_sub(room);
        let (evict_bases, _) = parked(self.table, false, base_excess);
        let why = format!("{excess} bytes over the lens budget, {base_excess} over the device budget");
        // Lenses over a base that leaves go with it.
        evict_lenses.retain(|lens| !evict_bases.contains(&lens.key.base));
        Plan { evict_lenses, evict_bases, load: false, why }
    }

    fn swept(&self, rule: SweepRule) -> Plan {
        let part = |percent: u32| (u128::from(self.budgets.lens_bytes) * u128::from(percent) / 100) as u64;
        let staying = staying_lens_bytes(self.table);
        if staying <= part(rule.high_percent) {
            return Plan::default();
        }
        let is_idle = |key: &LensKey, held: &HeldLens| {
            self.may_leave(key, held) && self.order.ranking.is_idle(self.order.history.usage(held.entry))
        };
        let excess = staying.saturating_sub(part(rule.low_percent));
        let (evict_lenses, _) = self.leaving(EvictionReason::Idle, excess, is_idle);
        let why = format!(
            "lenses take {staying} bytes, more than {} % of {}",
            rule.high_percent, self.budgets.lens_bytes
        );
        Plan { evict_lenses, why, ..Plan::default() }
    }

    fn may_leave(&self, key: &LensKey, held: &HeldLens) -> bool {
        held.is_idle() && !held.kept && !self.protected.contains(key)
    }

    /// Lenses that may leave, by policy, until `excess` bytes are freed; and how many they free.
    fn leaving(
        &self,
        reason: EvictionReason,
        excess: u64,
        may_leave: impl Fn(&LensKey, &HeldLens) -> bool,
    ) -> (Vec<Leaving>, u64) {
        if excess == 0 {
            return (Vec::new(), 0);
        }
        let residents: Vec<Resident<'_, &LensKey>> = self
            .table
            .lenses
            .iter()
            .map(|(key, held)| Resident {
                key,
                usage: self.order.history.usage(held.entry),
                group: held.group,
                evictable: may_leave(key, held),
            })
            .collect();
        let chosen = choose(&residents, excess, &self.order.ranking);
        let freed = chosen.victims.iter().map(|victim| victim.bytes).sum();
        let leaves = |victim: &crate::eviction::policy::Victim<&LensKey>| Leaving {
            key: victim.key.clone(),
            reason,
            message: victim.reason.to_string(),
        };
        (chosen.victims.iter().map(leaves).collect(), freed)
    }

    fn lens(&self, key: &LensKey, bytes: u64, instead_of_others: bool) -> Result<Plan, CannotFit> {
        if self.table.lenses.contains_key(key) {
            return Ok(Plan::default());
        }
        let budget = self.budgets.lens_bytes;
        let never = |why| CannotFit { short_by_bytes: bytes - budget, why, until: Until::Never };
        if bytes > budget {
            return Err(never(format!("the lens takes {bytes} bytes, of a lens budget of {budget}")));
        }
        let staying = staying_lens_bytes(self.table);
        let excess = staying.saturating_add(bytes).saturating_sub(budget);
        let may_leave = |key: &LensKey, held: &HeldLens| instead_of_others && self.may_leave(key, held);
        let (evict_lenses, freed) = self.leaving(EvictionReason::Room, excess, may_leave);
        if freed >= excess {
            let why = format!("lenses take {staying} bytes, {bytes} more are wanted, {budget} allowed");
            return Ok(Plan { evict_lenses, load: true, why, ..Plan::default() });
        }
        let kept: u64 = self.table.lenses.values().filter(|h| h.kept).map(|h| h.bytes).sum();
        let short_by_bytes = excess - freed;
        Err(match kept.saturating_add(bytes) > budget {
            true => CannotFit {
                short_by_bytes: kept.saturating_add(bytes) - budget,
                why: format!(
                    "the lens takes {bytes} bytes and lenses that are leased or pinned {kept}, of a lens budget of {budget}"
                ),
                until: Until::Released,
            },
            false => CannotFit {
                short_by_bytes,
                why: format!(
                    "the lens takes {bytes} bytes and lenses that are in use, kept or wanted {}, of a lens budget of {budget}",
                    staying - freed
                ),
                until: Until::Idle,
            },
        })
    }

    fn base(&self, key: &BaseKey, bytes: u64, instead_of_active: bool) -> Result<Plan, CannotFit> {
        if self.table.bases.contains_key(key) {
            return Ok(Plan::default());
        }
        let room = self.budgets.device_bytes.saturating_sub(self.budgets.lens_bytes);
        if bytes > room {
            return Err(CannotFit {
                short_by_bytes: bytes - room,
                why: format!(
                    "the base with its least workspace and KV cache takes {bytes} bytes and the lens budget {}, of a \
                     device budget of {}",
                    self.budgets.lens_bytes, self.budgets.device_bytes
                ),
                until: Until::Never,
            });
        }
        // The active one is the last to go: it may be wanted again at once.
        let staying = staying_base_bytes(self.table);
        let excess = staying.saturating_add(bytes).saturating_sub(room);
        let (evict_bases, freed) = parked(self.table, instead_of_active, excess);
        let over = self.table.lenses.keys().filter(|lens| evict_bases.contains(&lens.base));
        let evict_lenses: Vec<Leaving> = over
            .map(|lens| Leaving {
                key: lens.clone(),
                reason: EvictionReason::Base,
                message: format!("its base left for {key}"),
            })
            .collect();
        if freed < excess {
            return Err(CannotFit {
                short_by_bytes: excess - freed,
                why: format!(
                    "the base with its least workspace and KV cache takes {bytes} bytes, bases that stay {} and the lens \
                     budget {}, of a device budget of {}",
                    staying - freed,
                    self.budgets.lens_bytes,
                    self.budgets.device_bytes
                ),
                until: Until::Idle,
            });
        }
        let why = format!("bases take {staying} bytes, {bytes} more are wanted, {room} allowed");
        Ok(Plan { evict_lenses, evict_bases, load: true, why })
    }
}

/// Whether a switch to a base can begin that takes so many bytes, those of its least workspace and KV cache included. `room`
/// is what there is for bases and what serving one takes.
///
/// Rows have ended by then, so what is in memory may leave. What is on its way cannot, and is not waited for if there is
/// room beside it: whoever waits for the switch comes before a base that nobody has asked for yet.
pub fn can_switch(table: &Table, room: u64, to: &BaseKey, bytes: u64) -> bool {
    // For as long as a lens moves, the base below it cannot leave.
    if table.lenses.values().any(|held| held.phase != Phase::Resident) {
        return false;
    }
    let mut loading = 0u64;
    for (key, held) in &table.bases {
        match held.phase {
            Phase::Resident => {}
            Phase::Loading if key != to => loading = loading.saturating_add(held.bytes),
            // It comes by itself, or makes room soon.
            Phase::Loading | Phase::Leaving => return false,
        }
    }
    // With nothing beside it, it is tried in any case: the engine says exactly by how much it is too large.
    loading == 0 || loading.saturating_add(bytes) <= room
}

/// Bytes of bases that are not leaving already.
fn staying_base_bytes(table: &Table) -> u64 {
    table.bases.values().filter(|h| h.phase != Phase::Leaving).map(|h| h.bytes).sum()
}

/// Idle bases, least recently used first, until `excess` bytes are freed; and how many they free. Those with lenses that
/// are kept come after the others. The active one is the last to go, and only if it may.
fn parked(table: &Table, with_active: bool, excess: u64) -> (Vec<BaseKey>, u64) {
    let is_active = |k: &BaseKey| table.active.as_ref() == Some(k);
    let is_idle = |k: &BaseKey, held: &Held| {
        let idle = held.phase == Phase::Resident && held.users == 0;
        idle && table.lenses_held_over(k).all(|(_, lens)| lens.is_idle())
    };
    // Lenses that are kept are kept in memory for as long as their base is.
    let keeps = |k: &BaseKey| table.lenses_held_over(k).any(|(_, lens)| lens.kept);
    let mut idle: Vec<(&BaseKey, &Held)> =
        table.bases.iter().filter(|(k, held)| is_idle(k, held) && (with_active || !is_active(k))).collect();
    idle.sort_by_key(|(k, held)| (is_active(k), keeps(k), held.last_used, *k));
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

#[cfg(test)]
mod tests;
