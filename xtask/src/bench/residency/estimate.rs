//! From answers to what is shown. Pure.

use super::clients::{Answer, Loop};
use crate::bench::table::Spread;

/// How one worker answered, in all its takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Side {
    /// Of the takes.
    pub(super) requests_per_second: Spread,
    /// Half of all answers took no longer, seconds.
    pub(super) p50_seconds: f64,
    /// All but one in a hundred took no longer, seconds.
    pub(super) p99_seconds: f64,
}

impl Side {
    /// Nothing of nothing.
    pub(super) fn of(takes: &[Loop]) -> Option<Self> {
        let seconds = |answer: &Answer| answer.seconds;
        let mut latencies: Vec<f64> = takes.iter().flat_map(|take| &take.answers).map(seconds).collect();
        latencies.sort_by(f64::total_cmp);
        let rates = takes.iter().map(|take| 1.0 / take.seconds_per_request()).collect();
        Some(Self {
            requests_per_second: Spread::of(rates)?,
            p50_seconds: percentile(&latencies, 0.5)?,
            p99_seconds: percentile(&latencies, 0.99)?,
        })
    }
}

/// The least of sorted values that so large a share of them does not exceed (the nearest rank). Nothing of nothing.
fn percentile(sorted: &[f64], share: f64) -> Option<f64> {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// Time per request in the second take of each pair, against the first.
pub(super) fn ratios(first: &[Loop], second: &[Loop]) -> Vec<f64> {
    let pairs = first.iter().zip(second);
    pairs.map(|(first, second)| second.seconds_per_request() / first.seconds_per_request()).collect()
}

/// Bytes per second at which lenses of one size are loaded, by the median of the loads. Nothing without loads that took time.
pub(super) fn loading_rate(lens_bytes: u64, load_seconds: Vec<f64>) -> Option<f64> {
    let seconds = Spread::of(load_seconds)?.median;
    (seconds > 0.0).then(|| lens_bytes as f64 / seconds)
}

/// A stream of requests that was served, and what was measured just before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Served {
    pub(super) requests: usize,
    /// Of these, for lenses that were in memory.
    pub(super) hits: usize,
    /// From the first request to the last answer.
    pub(super) seconds: f64,
    /// Of lenses that were loaded.
    pub(super) moved_bytes: u64,
    /// Seconds per request by as many clients when every lens is in memory.
    pub(super) resident_seconds: f64,
    /// At which lenses are loaded while nothing else runs.
    pub(super) bytes_per_second: f64,
}

impl Served {
    pub(super) fn requests_per_second(&self) -> f64 {
        self.requests as f64 / self.seconds
    }

    /// Hits per request.
    pub(super) fn hit_rate(&self) -> f64 {
        self.hits as f64 / self.requests as f64
    }

    /// Requests per second when every lens is in memory, but for the time to move the bytes: one thing after the other.
    pub(super) fn allowed_per_second(&self) -> f64 {
        let serving = self.requests as f64 * self.resident_seconds;
        let loading = self.moved_bytes as f64 / self.bytes_per_second;
        self.requests as f64 / (serving + loading)
    }

    /// Of what is allowed, what was served. More than 1 where loads and requests went on at the same time.
    pub(super) fn share(&self) -> f64 {
        self.requests_per_second() / self.allowed_per_second()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A take of so many seconds whose answers took so many.
    fn take(seconds: f64, answers: &[f64]) -> Loop {
        let answer = |seconds: &f64| Answer { seconds: *seconds, load_seconds: None };
        Loop { seconds, answers: answers.iter().map(answer).collect() }
    }

    #[test]
    fn rates_are_of_takes_and_latencies_of_all_answers() {
        let takes = [take(1.0, &[0.5, 0.5]), take(1.0, &[0.1; 10]), take(2.0, &[0.2; 8])];
        let side = Side::of(&takes).unwrap();
        assert_eq!(side.requests_per_second, Spread { median: 4.0, low: 2.0, high: 10.0 });
        assert_eq!((side.p50_seconds, side.p99_seconds), (0.1, 0.5));
        assert_eq!(Side::of(&[]), None);
    }

    #[test]
    fn a_percentile_is_one_of_the_values() {
        let hundred: Vec<f64> = (1..=100).map(f64::from).collect();
        let of_hundred = [0.5, 0.99, 1.0, 0.0].map(|share| percentile(&hundred, share));
        assert_eq!(of_hundred, [Some(50.0), Some(99.0), Some(100.0), Some(1.0)]);
        assert_eq!(percentile(&[7.0], 0.5), Some(7.0));
        assert_eq!(percentile(&[], 0.5), None);
    }

    #[test]
    fn ratios_are_of_pairs_so_a_machine_that_slows_down_changes_none() {
        let first = [take(1.0, &[0.1; 10]), take(1.0, &[0.2; 5])];
        let second = [take(1.0, &[0.125; 8]), take(1.0, &[0.25; 4])];
        assert_eq!(ratios(&first, &second), [1.25, 1.25]);
    }

    #[test]
    fn a_slow_load_among_many_changes_no_rate() {
        assert_eq!(loading_rate(8_000_000, vec![0.002, 0.9, 0.002]), Some(4e9));
        assert_eq!(loading_rate(8_000_000, vec![]), None);
        assert_eq!(loading_rate(8_000_000, vec![0.0]), None);
    }

    #[test]
    fn bytes_that_move_allow_less() {
        // 100 requests of 10 ms, and 2 GB at 2 GB/s: 2 s.
        let served = Served {
            requests: 100,
            hits: 75,
            seconds: 2.5,
            moved_bytes: 2_000_000_000,
            resident_seconds: 0.01,
            bytes_per_second: 2e9,
        };
        assert_eq!((served.hit_rate(), served.requests_per_second()), (0.75, 40.0));
        assert_eq!((served.allowed_per_second(), served.share()), (50.0, 0.8));
        let resident = Served { moved_bytes: 0, hits: 100, seconds: 1.0, ..served };
        assert_eq!((resident.allowed_per_second(), resident.share()), (100.0, 1.0));
    }
}
