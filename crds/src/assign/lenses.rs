//! The second step: the lenses of one base, among the workers that prefer it.

use std::{cmp::Reverse, collections::BTreeMap};

use super::{BaseShare, LensDemand, LensId, LensShare, Spread, WorkerRoom, demand::settle, rendezvous};
use crate::group::LensResidency;

/// Rows that one copy of a lens serves before there is another, thousandths of a row.
const COPY_MILLIROWS: u64 = 16_000;

/// Rows that a worker computes in one step in about the time of one row, thousandths of a row. Below it there is nothing
/// to balance.
const STEP_MILLIROWS: u128 = 8_000;

/// Demand below which a lens that had none still has none, thousandths of a row.
const WAKES_AT_MILLIROWS: u64 = 50;

/// A lens that is to be placed.
pub(super) struct Wanted<'a> {
    id: &'a LensId,
    bytes: u64,
    residency: LensResidency,
    priority: u32,
    demand_millirows: u64,
}

/// What makes a lens come to a worker's budget, the strongest first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Claim {
    Pinned,
    Preloaded,
    Asked,
    None,
}

impl<'a> Wanted<'a> {
    pub(super) fn of(lens: &'a LensDemand) -> Self {
        Self {
            id: &lens.id,
            bytes: lens.bytes,
            residency: lens.residency,
            priority: lens.priority,
            demand_millirows: lens.demand_millirows,
        }
    }

    /// Takes in another entry for the same lens.
    pub(super) fn add(&mut self, lens: &LensDemand) {
        self.bytes = self.bytes.max(lens.bytes);
        self.residency = self.residency.max(lens.residency);
        self.priority = self.priority.max(lens.priority);
        self.demand_millirows = self.demand_millirows.saturating_add(lens.demand_millirows);
    }

    /// Turns the measured demand into the one that the lens is placed for.
    pub(super) fn settle(&mut self, before: Option<&BaseShare>) {
        let before = before.and_then(|base| base.lenses.get(self.id)).map_or(0, |lens| lens.demand_millirows);
        self.demand_millirows = settle(before, self.demand_millirows, WAKES_AT_MILLIROWS);
    }

    fn claim(&self) -> Claim {
        match self.residency {
            LensResidency::Pinned => Claim::Pinned,
            LensResidency::Preloaded => Claim::Preloaded,
            LensResidency::OnDemand | LensResidency::Cached if self.demand_millirows > 0 => Claim::Asked,
            LensResidency::OnDemand | LensResidency::Cached => Claim::None,
        }
    }

    /// Whether its workers preload it.
    fn is_warm(&self) -> bool {
        self.claim() != Claim::None
    }

    /// Smallest first: in this order lenses choose.
    fn turn(&self) -> (Claim, Reverse<u32>, Reverse<u64>, &'a LensId) {
        let claim = self.claim();
        // A priority is declared for what is there ahead of requests; requests speak for themselves.
        let priority = if claim < Claim::Asked { self.priority } else { 0 };
        (claim, Reverse(priority), Reverse(self.demand_millirows), self.id)
    }
}

/// A worker that prefers the base, and what it has been given so far.
pub(super) struct Holder<'a> {
    name: &'a str,
    hash: u64,
    weight: u32,
    bound_millirows: u128,
    load_millirows: u128,
    room_bytes: u64,
    preload: Vec<LensId>,
}

impl<'a> Holder<'a> {
    pub(super) fn new(worker: &'a WorkerRoom) -> Self {
        Self {
            name: &worker.name,
            hash: rendezvous::hash(&worker.name),
            weight: worker.weight(),
            bound_millirows: 0,
            load_millirows: 0,
            room_bytes: worker.lens_budget_bytes,
            preload: Vec::new(),
        }
    }

    pub(super) fn name(&self) -> &'a str {
        self.name
    }

    /// Its name and the lenses to preload, in the order in which they were given.
    pub(super) fn into_preload(self) -> (&'a str, Vec<LensId>) {
        (self.name, self.preload)
    }

    fn has_room(&self, lens: &Wanted<'_>) -> bool {
        lens.bytes <= self.room_bytes
    }

    /// How far a copy would take it above its bound. What is not asked for never does.
    fn excess(&self, copy_millirows: u128) -> u128 {
        if copy_millirows == 0 {
            return 0;
        }
        (self.load_millirows + copy_millirows).saturating_sub(self.bound_millirows)
    }

    fn take(&mut self, lens: &Wanted<'_>, copy_millirows: u128) {
        self.load_millirows += copy_millirows;
        if lens.is_warm() && self.has_room(lens) {
            self.room_bytes -= lens.bytes;
            self.preload.push(lens.id.clone());
        }
    }
}

/// Into how many copies a lens is divided.
#[derive(Clone, Copy)]
struct Copies {
    count: usize,
    /// Rows that each of them serves.
    each_millirows: u128,
}

impl Copies {
    fn of(demand_millirows: u64, spread: Spread, workers: usize) -> Self {
        let least = spread.min_copies.max(1);
        let most = spread.max_copies.max(least);
        let wanted = demand_millirows.div_ceil(COPY_MILLIROWS).clamp(least.into(), most.into());
        let count = usize::try_from(wanted).map_or(workers, |wanted| wanted.min(workers));
        let each_millirows = u128::from(demand_millirows).div_ceil(count.max(1) as u128);
        Self { count, each_millirows }
    }
}

/// How well a worker suits a lens; the largest is best, and the order of the fields is the order of what matters.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Suit {
    /// Rows above its bound: as few as can be, where none can be had.
    excess: Reverse<u128>,
    /// Whether the lens fits in its budget, if it is to be warm.
    fits: bool,
    affinity: u64,
    /// Its place among the holders.
    at: Reverse<usize>,
}

/// Places the lenses of a base, and fills the holders with what they preload.
pub(super) fn place(
    mut lenses: Vec<Wanted<'_>>,
    holders: &mut [Holder<'_>],
    spread: Spread,
) -> BTreeMap<LensId, LensShare> {
    lenses.sort_unstable_by_key(|lens| lens.turn());
    let copies: Vec<Copies> =
        lenses.iter().map(|lens| Copies::of(lens.demand_millirows, spread, holders.len())).collect();
    bound(holders, &copies);
    let mut shares = BTreeMap::new();
    for (lens, copies) in lenses.iter().zip(copies) {
        let chosen = choose(lens, copies, holders);
        for &at in &chosen {
            holders[at].take(lens, copies.each_millirows);
        }
        let workers = chosen.into_iter().map(|at| holders[at].name.to_owned()).collect();
        shares.insert(lens.id.clone(), LensShare { demand_millirows: lens.demand_millirows, workers });
    }
    shares
}

/// Says how much each worker may be given: 5/4 of its share of the whole, or its share and the heaviest copy where that
/// is more. So there is always a worker with room for one more copy: one has no more than its share. That one may hold
/// another copy of the same lens; then the one that goes least above its bound takes this.
fn bound(holders: &mut [Holder<'_>], copies: &[Copies]) {
    let total: u128 = copies.iter().map(|copies| copies.each_millirows * copies.count as u128).sum();
    let heaviest = copies.iter().map(|copies| copies.each_millirows).max().unwrap_or(0);
    let weights: u128 = holders.iter().map(|holder| u128::from(holder.weight)).sum();
    for holder in holders {
        let share = total * u128::from(holder.weight);
        let balanced = (5 * share).div_ceil(4 * weights);
        holder.bound_millirows = balanced.max(share / weights + heaviest).max(STEP_MILLIROWS);
    }
}

/// The workers for the copies of a lens, the best first.
fn choose(lens: &Wanted<'_>, copies: Copies, holders: &[Holder<'_>]) -> Vec<usize> {
    let hash = rendezvous::hash(&lens.id.0);
    let mut suits: Vec<Suit> = holders
        .iter()
        .enumerate()
        .map(|(at, holder)| Suit {
            excess: Reverse(holder.excess(copies.each_millirows)),
            fits: !lens.is_warm() || holder.has_room(lens),
            affinity: rendezvous::affinity(hash, holder.hash, holder.weight),
            at: Reverse(at),
        })
        .collect();
    if copies.count < suits.len() {
        // Sorting them all would cost more than the hashing.
        suits.select_nth_unstable_by(copies.count, |a, b| b.cmp(a));
        suits.truncate(copies.count);
    }
    suits.sort_unstable_by(|a, b| b.cmp(a));
    suits.into_iter().map(|suit| suit.at.0).collect()
}
