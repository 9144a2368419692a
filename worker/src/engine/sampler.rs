//! Logits and parameters → the next token.
//!
//! A row's random numbers are a function of (seed, token index) alone, so a row that is computed again makes the same
//! choices, and other rows change nothing.

use super::cut::{Cut, Room};
use super::row::{Sampling, TokenLogprobs};
use turret_kernels::vocabulary::{BLOCK, largest, numerators};

/// Room to choose in; reused for every row.
#[derive(Debug, Default)]
pub struct Sampler {
    weights: Vec<f32>,
    room: Room,
}

/// The logits hold something that is not a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotFinite;

impl Sampler {
    /// A sampler that will not grow for vocabularies up to this size.
    pub fn with_vocabulary(vocab: usize) -> Self {
        Self { weights: Vec::with_capacity(vocab), room: Room::with_vocabulary(vocab) }
    }

    /// Makes room for a vocabulary of this size.
    pub fn reserve_vocabulary(&mut self, vocab: usize) {
        self.weights.reserve(vocab.saturating_sub(self.weights.len()));
        self.room.reserve_vocabulary(vocab);
    }

    /// Chooses the token that stands at `index` of the row's generated tokens.
    ///
    /// Top-k, then min-p, then top-p decide what may be chosen, each from what the one before left.
    pub fn choose(&mut self, logits: &[f32], sampling: &Sampling, index: u32) -> Result<u32, NotFinite> {
        let max = largest(logits).filter(|max| max.is_finite()).ok_or(NotFinite)?;
        // Below this, the best token has all the probability that f32 can express.
        if sampling.temperature < 1e-4 {
            let best = logits.iter().position(|logit| *logit == max);
            return Ok(best.expect("the largest number is one of them") as u32);
        }
        let total = self.weigh(logits, max, 1.0 / sampling.temperature);
        let (weights, room) = (&self.weights, &mut self.room);
        // The best token's weight is 1.
        let mut cut = match sampling.top_k {
            0 => Cut::ALL,
            k => Cut::best(weights, k as usize, room),
        };
        cut = cut.at_least(sampling.min_p);
        if sampling.top_p < 1.0 {
            let whole = if cut == Cut::ALL { total } else { cut.mass(weights) };
            cut = cut.until(weights, f64::from(sampling.top_p) * whole, room);
        }
        Ok(cut.pick(weights, uniform(sampling.seed, index), room))
    }

    /// Softmax numerators into `weights`; gives their sum.
    fn weigh(&mut self, logits: &[f32], max: f32, scale: f32) -> f64 {
        self.weights.clear();
        self.weights.resize(logits.len(), 0.0);
        numerators(logits, max, scale, &mut self.weights)
    }

    /// The log-probability of a token by the raw log-softmax, and of the `top` best ones.
    pub fn logprobs(&mut self, logits: &[f32], id: u32, top: u8) -> TokenLogprobs {
        let max = largest(logits).unwrap_or(f32::NAN);
        let log_sum = (f64::from(max) + self.weigh(logits, max, 1.0).ln()) as f32;
        let logprob = |logit: f32| logit - log_sum;
        let top = best(logits, top.into()).into_iter().map(|(id, logit)| (id, logprob(logit))).collect();
        TokenLogprobs { id, logprob: logprob(logits[id as usize]), top }
    }
}

/// The `count` largest numbers and where they are, largest first, the first of equal ones first.
fn best(numbers: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    for (block, numbers) in numbers.chunks(BLOCK).enumerate() {
        let is_better = |best: &[(u32, f32)], x: f32| match best.get(count.wrapping_sub(1)) {
            Some((_, last)) => x > *last,
            None => best.len() < count,
        };
        // Most blocks have none, which one quick pass shows.
        if largest(numbers).is_some_and(|largest| !is_better(&best, largest)) {
            continue;
        }
        for (i, &x) in numbers.iter().enumerate() {
            if is_better(&best, x) {
                best.insert(
                    best.partition_point(|(_, better)| *better >= x),
                    ((block * BLOCK + i) as u32, x),
                );
                best.truncate(count);
            }
        }
    }
    best
}

/// A number in [0, 1) for this place of this row.
fn uniform(seed: u64, index: u32) -> f64 {
    let bits = mix(mix(seed) ^ mix(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(u64::from(index) + 1)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// SplitMix64's finaliser.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [0.0, 3.0, 1.0, 3.0, -2.0, 2.0];

    fn with(temperature: f32, top_p: f32, top_k: u32, min_p: f32) -> Sampling {
        Sampling { temperature, top_p, top_k, min_p, seed: 7 }
    }

    fn support(sampling: &Sampling) -> Vec<u32> {
        let mut sampler = Sampler::default();
        let mut seen: Vec<u32> = (0..4000).map(|i| sampler.choose(&LOGITS, sampling, i).unwrap()).collect();
        seen.sort();
        seen.dedup();
        seen
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_ids() {
        assert_eq!(Sampler::default().choose(&LOGITS, &Sampling::GREEDY, 0), Ok(1));
    }

    #[test]
    fn filters_keep_what_they_say() {
        assert_eq!(support(&with(1.0, 1.0, 0, 0.0)), [0, 1, 2, 3, 4, 5]);
        assert_eq!(support(&with(1.0, 1.0, 1, 0.0)), [1]);
        assert_eq!(support(&with(1.0, 1.0, 3, 0.0)), [1, 3, 5]);
        // Probabilities are about .019 .384 .052 .384 .003 .141 of the whole.
        assert_eq!(support(&with(1.0, 0.7, 0, 0.0)), [1, 3]);
        assert_eq!(support(&with(1.0, 0.8, 0, 0.0)), [1, 3, 5]);
        assert_eq!(support(&with(1.0, 1.0, 0, 0.1)), [1, 2, 3, 5]);
        assert_eq!(support(&with(1.0, 0.5, 2, 0.0)), [1]);
        assert_eq!(support(&with(1e-6, 0.9, 0, 0.0)), [1]);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let mut sampler = Sampler::default();
        let sampling = with(1.0, 1.0, 0, 0.0);
        let mut counts = [0u32; 6];
        for index in 0..60_000 {
            counts[sampler.choose(&LOGITS, &sampling, index).unwrap() as usize] += 1;
        }
        let total: f32 = LOGITS.iter().map(|x| x.exp()).sum();
        for (count, logit) in counts.iter().zip(LOGITS) {
            let (got, want) = (*count as f32 / 60_000.0, logit.exp() / total);
            assert!((got - want).abs() < 0.01, "{got} {want}");
        }
    }

    #[test]
    fn a_choice_depends_on_seed_and_place_only() {
        let sampling = with(1.0, 0.95, 0, 0.0);
        let fresh = || Sampler::default().choose(&LOGITS, &sampling, 17);
        assert_eq!(fresh(), fresh());
        let mut used = Sampler::default();
        (0..17).for_each(|i| assert!(used.choose(&LOGITS, &sampling, i).is_ok()));
        assert_eq!(used.choose(&LOGITS, &sampling, 17), fresh());
    }

    #[test]
    fn logprobs_are_of_the_raw_softmax() {
        let got = Sampler::default().logprobs(&LOGITS, 5, 2);
        let log_sum = LOGITS.iter().map(|x| x.exp()).sum::<f32>().ln();
        assert!((got.logprob - (2.0 - log_sum)).abs() < 1e-5);
        assert_eq!(got.top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn the_best_are_those_that_sorting_puts_first() {
        let numbers: Vec<f32> = (0..5000).map(|i| ((i * 7919) % 257) as f32).collect();
        let mut sorted: Vec<(u32, f32)> = (0..).zip(numbers.iter().copied()).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        for count in [0, 1, 20, 300] {
            assert_eq!(best(&numbers, count), sorted[..count], "{count}");
        }
        assert_eq!(best(&numbers[..3], 5).len(), 3);
    }

    #[test]
    fn logits_that_are_not_numbers_are_refused() {
        let mut logits = LOGITS;
        logits[2] = f32::NAN;
        assert_eq!(Sampler::default().choose(&logits, &Sampling::GREEDY, 0), Err(NotFinite));
    }
}
