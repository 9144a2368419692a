//! Streams of requests. The same seed gives the same stream.

/// How often each lens of a working set is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stream {
    /// All equally often.
    Uniform,
    /// The n-th one `1/n` times as often as the first.
    Zipf,
}

impl Stream {
    pub(super) const ALL: [Self; 2] = [Self::Uniform, Self::Zipf];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "Zipf 1.0",
        }
    }

    /// Which of `lenses` each of so many requests is for.
    pub(super) fn requests(self, lenses: usize, requests: usize, seed: u64) -> Vec<usize> {
        let weight = |place: usize| match self {
            Self::Uniform => 1.0,
            Self::Zipf => 1.0 / place as f64,
        };
        let mut sum = 0.0;
        let reach = (1..=lenses).map(|place| {
            sum += weight(place);
            sum
        });
        let reach: Vec<f64> = reach.collect();
        let lens = |request: usize| {
            let point = unit(scattered(seed, request as u64)) * sum;
            // Rounding may leave the last one a little below the sum.
            reach.partition_point(|reach| *reach <= point).min(lenses.saturating_sub(1))
        };
        (0..requests).map(lens).collect()
    }
}

/// A number in [0, 1).
fn unit(number: u64) -> f64 {
    (number >> 11) as f64 / (1_u64 << 53) as f64
}

/// Numbers that look random: each is a function of the seed and its place alone (SplitMix64).
fn scattered(seed: u64, place: u64) -> u64 {
    let mut mixed = seed.wrapping_add((place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(stream: Stream, lenses: usize) -> Vec<f64> {
        let mut counts = vec![0.0; lenses];
        for lens in stream.requests(lenses, 100_000, 1) {
            counts[lens] += 1.0;
        }
        counts
    }

    #[test]
    fn uniform_is_uniform() {
        let counts = counts(Stream::Uniform, 20);
        assert!(counts.iter().all(|count| (4500.0..5500.0).contains(count)), "{counts:?}");
    }

    #[test]
    fn zipf_asks_in_inverse_proportion_to_the_place() {
        let counts = counts(Stream::Zipf, 20);
        for place in [2_usize, 5, 20] {
            let share = counts[0] / counts[place - 1] / place as f64;
            assert!((0.9..1.1).contains(&share), "{place}: {counts:?}");
        }
    }

    #[test]
    fn a_seed_gives_one_stream() {
        let stream = |seed| Stream::Zipf.requests(160, 100, seed);
        assert_eq!(stream(1), stream(1));
        assert_ne!(stream(1), stream(2));
        assert_eq!(stream(1)[..50], Stream::Zipf.requests(160, 50, 1));
    }
}
