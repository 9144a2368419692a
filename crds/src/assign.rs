//! Who holds what: which base each worker prefers, and which workers keep which lens warm.
//!
//! [`assign()`] is pure and uses integers only. The same input gives the same answer on any machine and in any order
//! of its lists, so operator and gateways agree without talking. It is advice: any worker can serve any lens of its
//! groups by loading it, and a caller that has an older answer is slower, never wrong.
//!
//! **First bases.** Each worker prefers one. Every base with demand gets a worker while there are enough; further ones
//! go where the rows per worker are most (D'Hondt). A worker changes only when the base it goes to would still, with
//! it, have a quarter and one row more per worker than the base it leaves. Where bases are more than workers, the
//! hottest are preferred and the others take turns ([`Assignment::turns`]) by the switch rule of the workers.
//!
//! **Then lenses**, among the workers that prefer their base: weighted rendezvous hashing with bounded load. A lens goes
//! to the workers with the highest hash of lens and worker that stay below their bound: 5/4 of the mean load, or the
//! mean and the heaviest copy where that is more, or the eight rows that a step computes in about the time of one. A
//! lens has a copy for every 16 rows of its demand, within `spread`. What is to be warm (pinned, preloaded, or
//! asked for) is preloaded as long as the worker's lens budget has room: pinned lenses first, then preloaded ones by
//! priority, then the most asked for.
//!
//! **Hysteresis.** An assignment is made for a demand, and carries it. A measured demand within a quarter and half a
//! row of it counts as it, so noise changes nothing at all. Of what was before, only these demands and the workers'
//! bases count; where the lenses are follows from them. Whoever passes an assignment as `previous`, with the demands
//! that it carries, gets the same assignment back.
//!
//! # How a caller fills a [`Situation`]
//!
//! One situation is one placement. Entries with equal keys are added up, so groups over one base need no care.
//!
//! | field | from |
//! |---|---|
//! | `bases` | `groups` of the worker document: `base.key`. In switching mode `Manual` only that of `active_group` |
//! | `default_base` | `base.key` of the document's `default_group()` |
//! | `lenses` | `lenses` of those groups: [`LensId::of`] group and name, `residency`, `priority` |
//! | `lenses`: `bytes` | the most that any report has for it, 0 before one has |
//! | `workers` | reports: `worker.name`, `state.active_base`, `lens_budget_bytes` of the device's tier |
//! | `workers`: `availability` | leaving when `state.draining`, or when the pod is being deleted |
//! | `spread` | `spec.spread` of the placement |
//! | demands | rows that run or wait, averaged over a minute or so: of a base, with and without a lens; of a lens |
//!
//! A worker whose stream is down for a moment stays in the list with what it last said, or its lenses move twice.
//!
//! The *operator* measures, calls with what it published last as `previous`, and publishes the answer as
//! [`crate::hints`]: [`WorkerShare::preload`] is what a worker is told to preload, and it says so in its report. A
//! *gateway* reads there who is assigned what, keeps no list of its own, and goes by [`affinity`] otherwise, which is what
//! decides here where no bound is reached. [`Assignment::order`] is the same for somebody who has the whole answer: the
//! order in which to try workers that are otherwise equal.

mod bases;
mod demand;
#[cfg(test)]
mod fixtures;
mod lenses;
#[cfg(test)]
mod properties;
mod rendezvous;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use self::{
    bases::Seat,
    demand::settle,
    lenses::{Holder, Wanted},
};
use crate::{document::BaseKey, group::LensResidency};

/// One placement as it is now: what may be held, by whom, and how much it is asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Situation {
    /// The bases. The demands of entries with the same key are added up.
    pub bases: Vec<BaseDemand>,
    /// What workers prefer while nothing is asked for.
    pub default_base: Option<BaseKey>,
    /// The lenses. Those over a base that is not in `bases` are passed over; the demands of entries with the same base
    /// and id are added up, and the nearest residency counts.
    pub lenses: Vec<LensDemand>,
    /// The workers, each named once.
    pub workers: Vec<WorkerRoom>,
    /// On how many workers one lens may be.
    pub spread: Spread,
}

/// A base and how much it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseDemand {
    /// Its key.
    pub key: BaseKey,
    /// Rows over it that run or wait, with and without a lens, thousandths of a row.
    pub demand_millirows: u64,
}

/// A lens and how much it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LensDemand {
    /// Its name for good.
    pub id: LensId,
    /// The base it is for.
    pub base: BaseKey,
    /// Bytes in device memory; 0 while nobody knows.
    pub bytes: u64,
    /// What is declared. `Pinned` and `Preloaded` lenses are warm without demand as well.
    pub residency: LensResidency,
    /// Of `Pinned` and of `Preloaded` lenses, the higher comes first to the workers' budgets.
    pub priority: u32,
    /// Rows with it that run or wait, thousandths of a row.
    pub demand_millirows: u64,
}

/// A worker and the room that it has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WorkerRoom {
    /// Its name: that of the pod.
    pub name: String,
    /// Bytes of device memory for lenses; 0 before it has said.
    pub lens_budget_bytes: u64,
    /// How many lenses it gets for one of a worker of weight 1, which is the usual weight. Below 1 counts as 1, above 64
    /// as 64. For bases all workers count the same.
    pub weight: u32,
    /// Whether it takes requests for long enough to be worth anything.
    pub availability: Availability,
    /// The base that is active on it: what it prefers as long as no earlier assignment says otherwise.
    pub active_base: Option<BaseKey>,
}

impl WorkerRoom {
    fn weight(&self) -> u32 {
        self.weight.clamp(1, rendezvous::MAX_WEIGHT)
    }
}

/// Whether a worker is here to stay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Availability {
    /// It is.
    #[default]
    Available,
    /// It finishes what runs: nothing is assigned to it.
    Leaving,
}

/// On how many workers one lens may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spread {
    /// At least, as far as there are workers that prefer its base. 0 counts as 1.
    pub min_copies: u32,
    /// At most. Below `min_copies` it counts as that.
    pub max_copies: u32,
}

impl Default for Spread {
    fn default() -> Self {
        Self { min_copies: 1, max_copies: 4 }
    }
}

/// A lens of a placement, by a name that stays when its files change: `GROUP:NAME`, as clients write it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LensId(pub String);

impl LensId {
    /// The id of a lens, of its group as clients call it and its name.
    pub fn of(group: &str, name: &str) -> Self {
        Self(format!("{group}:{name}"))
    }

    /// Its group as clients call it and its name; `None` for what is no id.
    pub fn parts(&self) -> Option<(&str, &str)> {
        self.0.split_once(':')
    }
}

/// Who holds what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Assignment {
    /// The available workers, by name.
    pub workers: BTreeMap<String, WorkerShare>,
    /// The bases with their lenses.
    pub bases: BTreeMap<BaseKey, BaseShare>,
}

/// What one worker holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerShare {
    /// The base it prefers; absent when there is no base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<BaseKey>,
    /// Its weight, 1 to 64.
    pub weight: u32,
    /// The lenses to preload, the most important first. Together they fit its lens budget.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub preload: Vec<LensId>,
}

/// Who holds a base and its lenses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BaseShare {
    /// The demand that this is made for, thousandths of a row.
    pub demand_millirows: u64,
    /// The workers that prefer it, sorted by name. None: it takes turns.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<String>,
    /// Its lenses.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub lenses: BTreeMap<LensId, LensShare>,
}

/// Who holds a lens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LensShare {
    /// The demand that this is made for, thousandths of a row.
    pub demand_millirows: u64,
    /// The workers that its requests should go to, the first choice first: one for each copy. Those that also
    /// preload it have it in [`WorkerShare::preload`]. None where no worker prefers the base.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub workers: Vec<String>,
}

impl Assignment {
    /// All available workers, in the order in which a request over `base`, with `lens` or none, should try them: those
    /// that hold the lens, the others that prefer its base, and all the rest. The rest are in one order for all lenses
    /// of a base, so that one switch serves them all.
    pub fn order(&self, base: &BaseKey, lens: Option<&LensId>) -> Vec<&str> {
        let share = self.bases.get(base).zip(lens).and_then(|(share, lens)| share.lenses.get(lens));
        let holders: &[String] = share.map(|share| share.workers.as_slice()).unwrap_or_default();
        let base_hash = rendezvous::hash(&base.0);
        let own_hash = lens.map_or(base_hash, |lens| rendezvous::hash(&lens.0));
        let mut others: Vec<(bool, u64, &str)> = self
            .workers
            .iter()
            .filter(|(name, _)| !holders.contains(name))
            .map(|(name, worker)| {
                let prefers = worker.base.as_ref() == Some(base);
                let key = if prefers { own_hash } else { base_hash };
                (prefers, rendezvous::affinity(key, rendezvous::hash(name), worker.weight), name.as_str())
            })
            .collect();
        others.sort_unstable_by(|a, b| b.cmp(a));
        holders.iter().map(String::as_str).chain(others.into_iter().map(|(_, _, name)| name)).collect()
    }

    /// The bases that no worker prefers, sorted: a worker turns to one when its requests have waited long enough.
    pub fn turns(&self) -> impl Iterator<Item = &BaseKey> {
        self.bases.iter().filter(|(_, share)| share.workers.is_empty()).map(|(key, _)| key)
    }
}

/// How much a lens (by its [`LensId`]) or a base (by its key) is drawn to a worker of weight 1; the highest is its first
/// choice.
pub fn affinity(key: &str, worker: &str) -> u64 {
    rendezvous::affinity(rendezvous::hash(key), rendezvous::hash(worker), 1)
}

/// Decides who holds what, see the module. `previous` is the last answer, [`Assignment::default`] if there is none.
///
/// Takes time in proportion to lenses × workers.
pub fn assign(situation: &Situation, previous: &Assignment) -> Assignment {
    let workers = available(&situation.workers);
    let demand = base_demand(&situation.bases, previous);
    let mut seats: Vec<Seat<'_>> = workers
        .iter()
        .map(|worker| {
            let before = previous.workers.get(&worker.name).and_then(|share| share.base.as_ref());
            let active = worker.active_base.as_ref();
            let base = before.filter(|base| demand.contains_key(base)).or(active);
            Seat { name: &worker.name, active, base }
        })
        .collect();
    bases::prefer(&demand, situation.default_base.as_ref(), &mut seats);

    let mut lenses = wanted(&situation.lenses);
    let mut preload: BTreeMap<&str, Vec<LensId>> = BTreeMap::new();
    let mut bases = BTreeMap::new();
    for (key, demand_millirows) in demand {
        let mut holders: Vec<Holder<'_>> = workers
            .iter()
            .zip(&seats)
            .filter(|(_, seat)| seat.base == Some(key))
            .map(|(worker, _)| Holder::new(worker))
            .collect();
        let before = previous.bases.get(key);
        let mut of_base: Vec<Wanted<'_>> = lenses.remove(key).unwrap_or_default().into_values().collect();
        for lens in &mut of_base {
            lens.settle(before);
        }
        let lenses = lenses::place(of_base, &mut holders, situation.spread);
        let workers = holders.iter().map(|holder| holder.name().to_owned()).collect();
        bases.insert(key.clone(), BaseShare { demand_millirows, workers, lenses });
        preload.extend(holders.into_iter().map(Holder::into_preload));
    }
    let shares = workers.iter().zip(seats).map(|(worker, seat)| {
        let share = WorkerShare {
            base: seat.base.cloned(),
            weight: worker.weight(),
            preload: preload.remove(seat.name).unwrap_or_default(),
        };
        (worker.name.clone(), share)
    });
    Assignment { workers: shares.collect(), bases }
}

/// The workers that something may be assigned to, sorted by name.
fn available(workers: &[WorkerRoom]) -> Vec<&WorkerRoom> {
    let mut available: Vec<&WorkerRoom> =
        workers.iter().filter(|worker| worker.availability == Availability::Available).collect();
    available.sort_unstable();
    available.dedup_by(|a, b| a.name == b.name);
    available
}

/// The demand of each base that the assignment is made for.
fn base_demand<'a>(bases: &'a [BaseDemand], previous: &Assignment) -> BTreeMap<&'a BaseKey, u64> {
    let mut demand: BTreeMap<&BaseKey, u64> = BTreeMap::new();
    for base in bases {
        let sum = demand.entry(&base.key).or_default();
        *sum = sum.saturating_add(base.demand_millirows);
    }
    for (key, sum) in &mut demand {
        let before = previous.bases.get(*key).map_or(0, |share| share.demand_millirows);
        // One request is enough for a base to be given a worker.
        *sum = settle(before, *sum, 1);
    }
    demand
}

/// The lenses of each base, each once.
fn wanted(lenses: &[LensDemand]) -> BTreeMap<&BaseKey, BTreeMap<&LensId, Wanted<'_>>> {
    let mut wanted: BTreeMap<&BaseKey, BTreeMap<&LensId, Wanted<'_>>> = BTreeMap::new();
    for lens in lenses {
        let of_base = wanted.entry(&lens.base).or_default();
        of_base.entry(&lens.id).and_modify(|known| known.add(lens)).or_insert_with(|| Wanted::of(lens));
    }
    wanted
}
