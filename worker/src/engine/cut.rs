//! Which tokens of a vocabulary remain in the choice: the best k, or the smallest set of best ones with enough mass.
//!
//! Sorting a vocabulary takes longer than the rest of a step. What remains is always the tokens above a value, and the
//! first few by id of those equal to it; so the value is searched in an interval that a sample of the weights suggests
//! and that is then halved, each time with one pass at the speed of the cache over what still lies inside, until that is
//! little enough to be sorted.

use turret_kernels::simd::LANES;
use turret_kernels::vocabulary::{BLOCK, at_least, between};

/// Numbers that are sorted rather than searched further.
const FEW: usize = 256;
/// One of so many weights is in the sample. Odd, so that no pattern of a power of two decides what is in it.
const STRIDE: usize = 61;
/// Least number of weights of which a sample is worth taking.
const SAMPLED: usize = 128 * STRIDE;
/// Share by which the sample may be wrong without the interval missing the value; if it is, that costs time only.
const DOUBT: f64 = 1.0 / 16.0;

/// The tokens that remain, as a set over weights that are zero or more.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cut {
    /// Tokens with a larger weight remain.
    value: f32,
    /// Of those with this very weight, the first ones by id remain.
    ties: usize,
}

/// Room for sums and for the weights inside of an interval; reused.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// By turns: those inside before and after the interval was halved.
    near: [Vec<f32>; 2],
    blocks: Vec<f64>,
}

impl Room {
    pub(super) fn with_vocabulary(vocab: usize) -> Self {
        let mut room = Self::default();
        room.reserve_vocabulary(vocab);
        room
    }

    pub(super) fn reserve_vocabulary(&mut self, vocab: usize) {
        // They are copied once half of them are left, or at the end: all of them, if all weigh the same.
        for near in &mut self.near {
            near.reserve((vocab + LANES).saturating_sub(near.len()));
        }
        self.blocks.reserve(vocab.div_ceil(BLOCK).saturating_sub(self.blocks.len()));
    }
}

/// How many weights, or how much of their sum, lie above a value.
#[derive(Debug, Clone, Copy, Default)]
struct Above {
    count: usize,
    mass: f64,
}

impl Cut {
    /// All tokens.
    pub(super) const ALL: Self = Self { value: 0.0, ties: usize::MAX };

    /// Without the tokens that weigh less than this.
    pub(super) fn at_least(self, value: f32) -> Self {
        if value > self.value { Self { value, ties: usize::MAX } } else { self }
    }

    /// The best `count`, at least one; ties by id.
    pub(super) fn best(weights: &[f32], count: usize, room: &mut Room) -> Self {
        if count >= weights.len() {
            return Self::ALL;
        }
        let count = count.max(1);
        match search(weights, 0.0, room, |above| above.count >= count) {
            Some(Found { value, above, equal }) => Self::with_ties(value, count - above.count, equal),
            None => Self::ALL,
        }
    }

    /// The best tokens of this cut until they weigh `mass` together: the fewest that do.
    pub(super) fn until(self, weights: &[f32], mass: f64, room: &mut Room) -> Self {
        let Some(Found { value, above, equal }) =
            search(weights, self.value, room, |above| above.mass >= mass)
        else {
            return self;
        };
        let lacking = (mass - above.mass) / f64::from(value);
        // Of equal ones as many as are needed; those that weigh nothing all remain.
        let ties = if lacking.is_finite() { (lacking.ceil() as usize).max(1) } else { usize::MAX };
        Self::with_ties(value, if value == self.value { ties.min(self.ties) } else { ties }, equal)
    }

    /// Of `equal` tokens with this very weight the first `ties` remain. To know that all do saves a look for the last one.
    fn with_ties(value: f32, ties: usize, equal: usize) -> Self {
        Self { value, ties: if ties >= equal { usize::MAX } else { ties } }
    }

    /// The sum of the weights that remain.
    pub(super) fn mass(&self, weights: &[f32]) -> f64 {
        let (count, mass) = at_least(weights, self.value);
        let (above, _) = at_least(weights, self.value.next_up());
        mass - f64::from(self.value) * (count - above).saturating_sub(self.ties) as f64
    }

    /// The token at which the running sum of the remaining weights, by id, passes this share of their sum.
    pub(super) fn pick(&self, weights: &[f32], share: f64, room: &mut Room) -> u32 {
        // Of the ids with the very value, the last that remains.
        let equal = weights.iter().enumerate().filter(|(_, weight)| **weight == self.value);
        let last = match self.ties {
            usize::MAX => usize::MAX,
            0 => 0,
            ties => equal.map(|(id, _)| id).nth(ties - 1).unwrap_or(usize::MAX),
        };
        let remains = |id: usize, weight: f32| {
            weight > self.value || (weight == self.value && self.ties > 0 && id <= last)
        };
        room.blocks.clear();
        for (block, weights) in weights.chunks(BLOCK).enumerate() {
            let (first, end) = (block * BLOCK, block * BLOCK + weights.len());
            let mass = if self.ties > 0 && end <= last.saturating_add(1) {
                at_least(weights, self.value).1
            } else if self.ties == 0 || first > last {
                at_least(weights, self.value.next_up()).1
            } else {
                let kept = weights.iter().enumerate().filter(|(i, weight)| remains(first + i, **weight));
                kept.map(|(_, weight)| f64::from(*weight)).sum()
            };
            room.blocks.push(mass);
        }
        let target = share * room.blocks.iter().sum::<f64>();
        let (mut sum, mut picked) = (0.0, 0);
        for (block, mass) in room.blocks.iter().enumerate() {
            if *mass == 0.0 {
                continue;
            }
            let first = block * BLOCK;
            if sum + mass <= target {
                sum += mass;
                // Rounding may leave the target behind the last block; then its last token is picked.
                if room.blocks[block + 1..].iter().any(|mass| *mass > 0.0) {
                    continue;
                }
            }
            for (i, &weight) in weights[first..].iter().take(BLOCK).enumerate() {
                if weight > 0.0 && remains(first + i, weight) {
                    sum += f64::from(weight);
                    picked = first + i;
                    if sum > target {
                        break;
                    }
                }
            }
            break;
        }
        picked as u32
    }
}

/// What [`search`] finds.
struct Found {
    value: f32,
    above: Above,
    /// How many weigh as much as the value.
    equal: usize,
}

/// Between which bits the value lies, and what is known of the weights on both sides. Floats of zero and more are ordered as
/// their bits are.
#[derive(Debug, Clone, Copy)]
struct Interval {
    low: u32,
    /// Not inside.
    high: u32,
    /// From `high` on.
    above: Above,
    /// How many weights are inside.
    inside: usize,
}

impl Interval {
    fn of(weights: &[f32], lowest: f32) -> Self {
        // The largest weight is 1.
        let (low, high) = (lowest.to_bits(), 1.0_f32.to_bits() + 1);
        Self { low, high, above: Above::default(), inside: weights.len() }
    }

    /// What lies inside is `from..below`.
    fn ends(&self) -> (f32, f32) {
        (f32::from_bits(self.low), f32::from_bits(self.high))
    }

    fn middle(&self) -> u32 {
        self.low + (self.high - self.low) / 2
    }

    /// Cuts it at these bits, if they are inside, by one pass over the weights, which lie below `outside`.
    fn cut(&mut self, bits: u32, weights: &[f32], outside: Above, enough: impl Fn(Above) -> bool) {
        if bits <= self.low || bits >= self.high {
            return;
        }
        let (count, mass) = at_least(weights, f32::from_bits(bits));
        let here = Above { count: outside.count + count, mass: outside.mass + mass };
        if enough(here) {
            self.inside = here.count - self.above.count;
            self.low = bits;
        } else {
            self.inside -= here.count - self.above.count;
            (self.high, self.above) = (bits, here);
        }
    }
}

/// The largest weight from `lowest` on for which the weights that are at least as large are `enough`. `None` when they
/// never are.
fn search(weights: &[f32], lowest: f32, room: &mut Room, enough: impl Fn(Above) -> bool) -> Option<Found> {
    let [near, next] = &mut room.near;
    let mut interval = Interval::of(weights, lowest);
    if lowest > 0.0 {
        interval.inside = at_least(weights, lowest).0;
    }
    if weights.len() >= SAMPLED {
        near.clear();
        near.extend(weights.iter().copied().step_by(STRIDE));
        for times in [1.0 - DOUBT, 1.0 + DOUBT].map(|doubt| doubt * STRIDE as f64) {
            let guess = guess(near, lowest, |above| {
                enough(Above { count: (above.count as f64 * times) as usize, mass: above.mass * times })
            });
            interval.cut(guess, weights, Above::default(), &enough);
        }
    }
    // Whether the weights inside were copied, and what lies above those that were.
    let (mut copied, mut outside) = (false, Above::default());
    loop {
        let among = if copied { near.as_slice() } else { weights };
        let is_last = interval.high - interval.low <= 1 || interval.inside <= FEW;
        if is_last || 2 * interval.inside <= among.len() {
            let (from, below) = interval.ends();
            between(among, from, below, interval.inside, next);
            std::mem::swap(near, next);
            interval.inside = near.len();
            (copied, outside) = (true, interval.above);
        }
        if is_last {
            break;
        }
        let among = if copied { near.as_slice() } else { weights };
        interval.cut(interval.middle(), among, outside, &enough);
    }
    near.sort_unstable_by(|a, b| b.total_cmp(a));
    let (mut above, mut last) = (interval.above, None);
    for equal in near.chunk_by(|a, b| a == b) {
        let here = equal
            .iter()
            .fold(above, |sum, weight| Above { count: sum.count + 1, mass: sum.mass + f64::from(*weight) });
        last = Some(Found { value: equal[0], above, equal: equal.len() });
        if enough(here) {
            return last;
        }
        above = here;
    }
    // A pass over all of them has found enough where this sum, rounded otherwise, falls short by a hair.
    let value = f32::from_bits(interval.low);
    let found = last.unwrap_or(Found { value, above: interval.above, equal: 0 });
    (interval.low > lowest.to_bits()).then_some(found)
}

/// The bits of the value as these weights alone have it.
fn guess(sample: &[f32], lowest: f32, enough: impl Fn(Above) -> bool) -> u32 {
    let mut interval = Interval::of(sample, lowest);
    // Beyond twelve bits it would be a guess at the sample's own noise.
    while interval.high - interval.low > 1 << 12 {
        interval.cut(interval.middle(), sample, Above::default(), &enough);
    }
    interval.low
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Ids that remain, by sorting.
    fn sorted(weights: &[f32], ids: &[usize], enough: impl Fn(usize, f64) -> bool) -> Vec<usize> {
        let mut order = ids.to_vec();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        let mut mass = 0.0;
        let until = order.iter().enumerate().position(|(i, &id)| {
            mass += f64::from(weights[id]);
            enough(i + 1, mass)
        });
        order.truncate(until.map_or(order.len(), |i| i + 1));
        order.sort_unstable();
        order
    }

    fn remaining(cut: &Cut, weights: &[f32]) -> Vec<usize> {
        let mut left = cut.ties;
        let keeps = |weight: f32| {
            weight > cut.value
                || (weight == cut.value && left > 0 && {
                    left -= 1;
                    true
                })
        };
        let mut keeps = keeps;
        (0..weights.len()).filter(|&id| keeps(weights[id])).collect()
    }

    /// Weights of few bits, so that sums are exact and many are equal; the largest is 1. Few or enough for a sample, flat
    /// or, with a few large ones among many small ones, of a kind whose sample says little.
    fn weights() -> impl Strategy<Value = Vec<f32>> {
        let few = proptest::collection::vec(0u8..64, 1..3000);
        let many = proptest::collection::vec(0u8..64, SAMPLED..2 * SAMPLED);
        (prop_oneof![few, many], prop_oneof![Just(1), Just(64)]).prop_map(|(numbers, rare)| {
            let weight = |(i, n): (usize, u8)| match i % rare {
                0 => f32::from(n) / 64.0,
                _ => f32::from(n) / 65536.0,
            };
            let mut weights: Vec<f32> = numbers.into_iter().enumerate().map(weight).collect();
            weights[0] = 1.0;
            weights
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_remains_is_what_sorting_keeps(
            weights in weights(), count in prop_oneof![1usize..100, 1usize..30_000], part in 0.0f64..1.0, floor in 0u8..64
        ) {
            let mut room = Room::default();
            let all: Vec<usize> = (0..weights.len()).collect();
            let best = Cut::best(&weights, count, &mut room);
            let by_count = sorted(&weights, &all, |n, _| n >= count);
            prop_assert_eq!(remaining(&best, &weights), by_count.clone());

            let floored = best.at_least(f32::from(floor) / 64.0);
            let above: Vec<usize> =
                by_count.into_iter().filter(|&id| weights[id] >= f32::from(floor) / 64.0).collect();
            prop_assert_eq!(remaining(&floored, &weights), above.clone());
            let whole: f64 = above.iter().map(|&id| f64::from(weights[id])).sum();
            prop_assert_eq!(floored.mass(&weights), whole);

            let mass = part * whole;
            let kept = sorted(&weights, &above, |_, sum| sum >= mass);
            let until = floored.until(&weights, mass, &mut room);
            prop_assert_eq!(remaining(&until, &weights), kept.clone());

            // Walking by id through what remains.
            let sum: f64 = kept.iter().map(|&id| f64::from(weights[id])).sum();
            let mut running = 0.0;
            let at = kept.iter().copied().find(|&id| {
                running += f64::from(weights[id]);
                running > part * sum
            });
            prop_assert_eq!(Some(until.pick(&weights, part, &mut room) as usize), at);
        }
    }
}
