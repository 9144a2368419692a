//! Which tokens of a vocabulary remain in the choice: the best k, or the smallest set of best ones with enough mass.
//!
//! Sorting a vocabulary takes longer than the rest of a step. What remains is always the tokens above a value, and the
//! first few by id of those equal to it; so the value is searched by halving an interval, each time with one pass at
//! the speed of the cache, until few enough lie inside to sort them.

use crate::kernels::vocabulary::{BLOCK, at_least};

/// Numbers that are sorted rather than searched further.
const FEW: usize = 512;

/// The tokens that remain, as a set over weights that are zero or more.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Cut {
    /// Tokens with a larger weight remain.
    value: f32,
    /// Of those with this very weight, the first ones by id remain.
    ties: usize,
}

/// Room for sums and sorting; reused.
#[derive(Debug, Default)]
pub(super) struct Room {
    near: Vec<f32>,
    blocks: Vec<f64>,
}

impl Room {
    pub(super) fn with_vocabulary(vocab: usize) -> Self {
        Self { near: Vec::with_capacity(FEW), blocks: Vec::with_capacity(vocab.div_ceil(BLOCK)) }
    }

    pub(super) fn reserve_vocabulary(&mut self, vocab: usize) {
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
        let (value, above) = search(weights, 0.0, room, |above| above.count >= count);
        Self { value, ties: count - above.count }
    }

    /// The best tokens of this cut until they weigh `mass` together: the fewest that do.
    pub(super) fn until(self, weights: &[f32], mass: f64, room: &mut Room) -> Self {
        let (value, above) = search(weights, self.value, room, |above| above.mass >= mass);
        let lacking = (mass - above.mass) / f64::from(value);
        // Of equal ones as many as are needed; a sum that rounding keeps from being reached takes them all.
        let ties = if lacking.is_finite() { (lacking.ceil() as usize).max(1) } else { usize::MAX };
        Self { value, ties: if value == self.value { ties.min(self.ties) } else { ties } }
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

/// The largest weight from `lowest` on for which the weights that are at least as large are `enough`, and what lies
/// above it. `lowest` when they never are.
fn search(weights: &[f32], lowest: f32, room: &mut Room, enough: impl Fn(Above) -> bool) -> (f32, Above) {
    // Floats of zero and more are ordered as their bits are.
    let (mut low, mut high) = (lowest.to_bits(), 1.0_f32.to_bits() + 1);
    let mut above = Above::default();
    let mut inside = weights.len();
    while high - low > 1 && inside > FEW {
        let middle = low + (high - low) / 2;
        let (count, mass) = at_least(weights, f32::from_bits(middle));
        let here = Above { count, mass };
        if enough(here) {
            inside = count - above.count;
            low = middle;
        } else {
            inside -= count - above.count;
            (high, above) = (middle, here);
        }
    }
    if high - low == 1 {
        return (f32::from_bits(low), above);
    }
    let (from, to) = (f32::from_bits(low), f32::from_bits(high));
    room.near.clear();
    room.near.extend(weights.iter().copied().filter(|weight| (from..to).contains(weight)));
    room.near.sort_unstable_by(|a, b| b.total_cmp(a));
    let mut here = above;
    for (i, &weight) in room.near.iter().enumerate() {
        if i > 0 && weight < room.near[i - 1] {
            above = here;
        }
        here = Above { count: here.count + 1, mass: here.mass + f64::from(weight) };
        if enough(here) {
            return (weight, above);
        }
    }
    match room.near.last() {
        Some(&last) if from > lowest => (last, above),
        _ => (lowest, here),
    }
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

    /// Weights in quarters, so that sums are exact and many are equal; the largest is 1.
    fn weights() -> impl Strategy<Value = Vec<f32>> {
        proptest::collection::vec(0u8..64, 1..3000).prop_map(|quarters| {
            let mut weights: Vec<f32> = quarters.into_iter().map(|q| f32::from(q) / 64.0).collect();
            weights[0] = 1.0;
            weights
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_remains_is_what_sorting_keeps(
            weights in weights(), count in 1usize..3000, part in 0.0f64..1.0, floor in 0u8..64
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
