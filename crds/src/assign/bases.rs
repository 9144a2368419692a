//! The first step: which base each worker prefers.

use std::{cmp::Ordering, collections::BTreeMap};

use super::rendezvous;
use crate::document::BaseKey;

/// Rows per worker that a change of base must gain beyond a quarter, thousandths of a row: below it nobody waits.
const WORTH_MILLIROWS: u128 = 1_000;

/// A worker's place in the first step.
pub(super) struct Seat<'a> {
    /// The worker.
    pub(super) name: &'a str,
    /// The base that is active on it.
    pub(super) active: Option<&'a BaseKey>,
    /// The base it prefers: so far, and from then on.
    pub(super) base: Option<&'a BaseKey>,
}

/// A base, and how many workers prefer it so far.
struct Held<'a> {
    key: &'a BaseKey,
    demand_millirows: u128,
    workers: u128,
    is_default: bool,
}

impl Held<'_> {
    /// Whether it is asked for and no worker prefers it.
    fn starves(&self) -> bool {
        self.demand_millirows > 0 && self.workers == 0
    }

    /// Whether it would starve with one worker fewer.
    fn would_starve(&self) -> bool {
        self.demand_millirows > 0 && self.workers == 1
    }

    /// Compares the rows per worker, were there `more` workers on each side.
    fn cmp_rows(&self, other: &Self, more: u128) -> Ordering {
        let (own, others) = (self.workers + more, other.workers + more);
        (self.demand_millirows * others).cmp(&(other.demand_millirows * own))
    }
}

/// Gives every seat a base of `demand`, if there is one.
///
/// Seats with a base keep it unless a change is worth it; the others go where they help most. It ends, since each
/// worker changes at most once: from one change to the next, the rows per worker of the base that gives only grow, and
/// those of the base that gains only fall.
pub(super) fn prefer<'a>(
    demand: &BTreeMap<&'a BaseKey, u64>,
    default: Option<&BaseKey>,
    seats: &mut [Seat<'a>],
) {
    let mut bases: Vec<Held<'a>> = demand
        .iter()
        .map(|(&key, &demand)| Held {
            key,
            demand_millirows: u128::from(demand),
            workers: 0,
            is_default: Some(key) == default,
        })
        .collect();
    for seat in seats.iter_mut() {
        match bases.iter().position(|base| Some(base.key) == seat.base) {
            Some(at) => bases[at].workers += 1,
            None => seat.base = None,
        }
    }
    for seat in seats.iter_mut().filter(|seat| seat.base.is_none()) {
        let Some(at) = neediest(&bases) else { return };
        bases[at].workers += 1;
        seat.base = Some(bases[at].key);
    }
    while let Some((from, to)) = change(&bases) {
        let (left, taken) = (bases[from].key, bases[to].key);
        let hash = rendezvous::hash(&taken.0);
        let mover = seats
            .iter_mut()
            .filter(|seat| seat.base == Some(left))
            .max_by_key(|seat| {
                let affinity = rendezvous::affinity(hash, rendezvous::hash(seat.name), 1);
                (seat.active == Some(taken), affinity, seat.name)
            })
            .expect("a base with a worker is some seat's base");
        mover.base = Some(taken);
        bases[from].workers -= 1;
        bases[to].workers += 1;
    }
}

/// The base that one more worker helps most: the hottest that has none, otherwise the one with the most rows per worker
/// after it; of equals the default, then the first by key.
fn neediest(bases: &[Held<'_>]) -> Option<usize> {
    (0..bases.len()).max_by(|&a, &b| {
        let (a, b) = (&bases[a], &bases[b]);
        a.starves()
            .cmp(&b.starves())
            .then_with(|| a.cmp_rows(b, 1))
            .then_with(|| a.is_default.cmp(&b.is_default))
            .then_with(|| b.key.cmp(a.key))
    })
}

/// The next change of a worker from one base to another, if there is one that is worth it.
fn change(bases: &[Held<'_>]) -> Option<(usize, usize)> {
    let to = neediest(bases)?;
    let gains = &bases[to];
    let from = (0..bases.len()).filter(|&at| at != to && bases[at].workers > 0).min_by(|&a, &b| {
        let (a, b) = (&bases[a], &bases[b]);
        a.would_starve()
            .cmp(&b.would_starve())
            .then_with(|| a.cmp_rows(b, 0))
            .then_with(|| a.is_default.cmp(&b.is_default))
            .then_with(|| a.key.cmp(b.key))
    })?;
    let gives = &bases[from];
    let is_worth_it = match (gains.starves(), gives.would_starve()) {
        (true, false) => true,
        // Every base with a worker to give has only the one.
        (false, true) => false,
        (true, true) | (false, false) => {
            // gains.rows / (workers + 1) ≥ 5/4 · gives.rows / workers + WORTH
            let gained = 4 * gains.demand_millirows * gives.workers;
            let given = 5 * gives.demand_millirows + 4 * WORTH_MILLIROWS * gives.workers;
            gained >= given * (gains.workers + 1)
        }
    };
    is_worth_it.then_some((from, to))
}
