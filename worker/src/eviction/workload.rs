//! Generated traces: what popularity does over time, and how large lenses are. The same seed gives the same trace.

use super::trace::{Lens, Request, Trace};

/// What to generate.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Workload {
    /// Number of lenses.
    pub lenses: usize,
    /// How large they are.
    pub sizes: Sizes,
    /// Of Zipf's law: the n-th most popular lens is requested `n^-exponent` times as often as the first.
    pub exponent: f64,
    /// What happens over time.
    pub popularity: Popularity,
    /// Number of requests.
    pub requests: usize,
    /// Time between two.
    pub seconds_per_request: f64,
    /// Of everything random.
    pub seed: u64,
}

/// How large lenses are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sizes {
    /// 150 MB each.
    Equal,
    /// Lognormal around 150 MB, from 1 MB to 2 GB, σ = 1.2: a third is below 90 or above 250 MB.
    Lognormal,
}

/// What happens to popularity over time.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Popularity {
    /// Nothing.
    Stationary,
    /// Every so many requests the lenses change their ranks with each other at random.
    Permuted {
        /// Requests.
        every: usize,
    },
    /// Only some lenses are requested at all, and every so many requests others.
    WorkingSet {
        /// Requests.
        every: usize,
        /// Part of all bytes that these take, at most.
        share: f64,
    },
    /// Every so many requests each lens is requested once, by turns, beside a stationary popularity.
    Scanned {
        /// Requests.
        every: usize,
    },
}

impl Workload {
    /// Generates the trace.
    pub fn generate(&self) -> Trace {
        let mut random = SplitMix64(self.seed);
        let lenses: Vec<Lens> = (0..self.lenses).map(|n| self.lens(n, &mut random)).collect();
        let mut ranks: Vec<usize> = (0..self.lenses).collect();
        random.shuffle(&mut ranks);
        let zipf = Zipf::new(self.lenses, self.exponent);
        let mut active = self.lenses;
        let request = |n: usize| {
            match self.popularity {
                Popularity::Permuted { every } if n.is_multiple_of(every) => random.shuffle(&mut ranks),
                Popularity::WorkingSet { every, share } if n.is_multiple_of(every) => {
                    random.shuffle(&mut ranks);
                    active = fitting(&lenses, &ranks, budget_bytes(&lenses, share));
                }
                Popularity::Scanned { every } if n % every < self.lenses => {
                    return self.request(n, n % every);
                }
                _ => {}
            }
            self.request(n, ranks[zipf.sample(active, &mut random)])
        };
        let requests = (0..self.requests).map(request).collect();
        Trace { lenses, requests }
    }

    fn request(&self, n: usize, lens: usize) -> Request {
        Request { at_seconds: n as f64 * self.seconds_per_request, lens }
    }

    fn lens(&self, n: usize, random: &mut SplitMix64) -> Lens {
        let megabytes = match self.sizes {
            Sizes::Equal => 150.0,
            Sizes::Lognormal => (150.0 * (1.2 * random.normal()).exp()).clamp(1.0, 2_000.0),
        };
        Lens {
            name: format!("lens-{n}"),
            bytes: (megabytes * 1e6) as u64,
            // Not related to popularity: what a user declared without knowing it.
            priority: (n % 3) as i16,
            group: format!("group-{}", n % 4),
        }
    }
}

/// Part of the bytes of all lenses; at least the largest of them, which could not be served otherwise.
pub fn budget_bytes(lenses: &[Lens], share: f64) -> u64 {
    let all: u64 = lenses.iter().map(|l| l.bytes).sum();
    let largest = lenses.iter().map(|l| l.bytes).max().unwrap_or(0);
    ((all as f64 * share) as u64).max(largest)
}

/// How many of these, from the first, fit into the budget.
fn fitting(lenses: &[Lens], ranks: &[usize], budget_bytes: u64) -> usize {
    let mut bytes = 0;
    let fits = |rank: &&usize| {
        bytes += lenses[**rank].bytes;
        bytes <= budget_bytes
    };
    ranks.iter().take_while(fits).count().max(1)
}

/// Ranks by Zipf's law.
struct Zipf {
    /// Sums of weights up to each rank.
    cumulative: Vec<f64>,
}

impl Zipf {
    fn new(ranks: usize, exponent: f64) -> Self {
        let mut sum = 0.0;
        let add = |rank: usize| {
            sum += (rank as f64).powf(-exponent);
            sum
        };
        Self { cumulative: (1..=ranks).map(add).collect() }
    }

    /// One of the first `ranks`, from 0.
    fn sample(&self, ranks: usize, random: &mut SplitMix64) -> usize {
        let cumulative = &self.cumulative[..ranks];
        let point = random.unit() * cumulative[ranks - 1];
        cumulative.partition_point(|sum| *sum <= point).min(ranks - 1)
    }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014).
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 * (-53f64).exp2()
    }

    /// Standard normal (Box and Muller, 1958).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }

    /// Fisher and Yates.
    fn shuffle(&mut self, items: &mut [usize]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.unit() * (last + 1) as f64) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const STATIONARY: Workload = Workload {
        lenses: 50,
        sizes: Sizes::Equal,
        exponent: 1.0,
        popularity: Popularity::Stationary,
        requests: 20_000,
        seconds_per_request: 0.5,
        seed: 1,
    };

    fn counts(requests: &[Request]) -> Vec<usize> {
        let mut counts = vec![0; 50];
        requests.iter().for_each(|r| counts[r.lens] += 1);
        counts.sort_unstable_by(|a, b| b.cmp(a));
        counts
    }

    #[test]
    fn splitmix64_gives_the_published_numbers() {
        let mut random = SplitMix64(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
    }

    #[test]
    fn the_second_lens_is_requested_half_as_often_as_the_first() {
        let trace = STATIONARY.generate();
        assert_eq!(trace, STATIONARY.generate());
        assert_ne!(trace, Workload { seed: 2, ..STATIONARY }.generate());
        let counts = counts(&trace.requests);
        assert!((counts[0] as f64 / counts[1] as f64 - 2.0).abs() < 0.1, "{counts:?}");
        assert_eq!(trace.requests[9].at_seconds, 4.5);
    }

    #[test]
    fn a_working_set_fits_and_moves() {
        let popularity = Popularity::WorkingSet { every: 500, share: 0.25 };
        let trace = Workload { sizes: Sizes::Lognormal, popularity, ..STATIONARY }.generate();
        let budget = budget_bytes(&trace.lenses, 0.25);
        let set = |n: usize| trace.requests[n * 500..][..500].iter().map(|r| r.lens).collect::<BTreeSet<_>>();
        for n in 0..40 {
            assert!(set(n).iter().map(|l| trace.lenses[*l].bytes).sum::<u64>() <= budget);
        }
        assert_ne!(set(0), set(1));
    }

    #[test]
    fn a_scan_asks_for_every_lens_once() {
        let trace = Workload { popularity: Popularity::Scanned { every: 1_000 }, ..STATIONARY }.generate();
        let scanned: Vec<_> = trace.requests[3_000..3_050].iter().map(|r| r.lens).collect();
        assert_eq!(scanned, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn permuted_lenses_change_their_ranks() {
        let trace = Workload { popularity: Popularity::Permuted { every: 10_000 }, ..STATIONARY }.generate();
        let all = counts(&trace.requests);
        let half = counts(&trace.requests[..10_000]);
        assert!(all[0] < 2 * half[0] * 3 / 4, "the first of one half is not the first of the other");
    }
}
