//! What was measured, as a table or as JSON.

use serde::Serialize;

/// One thing that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Measure {
    /// What.
    pub name: String,
    /// Tokens that one take of it computes.
    pub tokens: u32,
    /// Seconds of each round that was kept.
    pub seconds: Vec<f64>,
    /// Seconds of each round that something else on the machine disturbed.
    pub disturbed_seconds: Vec<f64>,
    /// Bytes of weights that must be read for it; 0 where that says nothing.
    pub bytes: u64,
}

impl Measure {
    pub(super) fn new(name: String, tokens: u32, bytes: u64) -> Self {
        Self { name, tokens, bytes, seconds: Vec::new(), disturbed_seconds: Vec::new() }
    }

    /// The median of the rounds.
    pub fn median_seconds(&self) -> f64 {
        median(&self.seconds)
    }
}

/// All of it.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// Instruction set of the kernels.
    pub instruction_set: String,
    /// Compute threads.
    pub threads: usize,
    /// Bytes of weights that a step of the bare base reads.
    pub step_bytes: u64,
    /// Bytes per second that the probe read, median of the rounds that were kept.
    pub read_bytes_per_second: f64,
    /// The same, of the best round.
    pub best_read_bytes_per_second: f64,
    /// Rounds.
    pub rounds: usize,
    /// The measurements.
    pub measures: Vec<Measure>,
}

impl Report {
    /// Lines for people.
    pub fn table(&self) -> String {
        let mut text = format!(
            "{}, {} threads, {} bytes of weights per step, {:.1} GB/s read (best {:.1}), {} rounds\n\n",
            self.instruction_set,
            self.threads,
            self.step_bytes,
            self.read_bytes_per_second / 1e9,
            self.best_read_bytes_per_second / 1e9,
            self.rounds,
        );
        let columns = ["ms", "tokens/s", "read limit", "rounds kept"];
        text += &format!("{:<58}", "");
        columns.iter().for_each(|column| text += &format!("{column:>12}"));
        text += "\n";
        for measure in &self.measures {
            let seconds = measure.median_seconds();
            let limit = measure.bytes as f64 / self.read_bytes_per_second / seconds;
            let ms = seconds * 1e3;
            let kept = measure.seconds.len();
            let [rate, limit] = match measure.bytes {
                0 => [String::new(), String::new()],
                _ => [format!("{:.1}", f64::from(measure.tokens) / seconds), format!("{limit:.2}")],
            };
            text += &format!("{:<58}{ms:>12.3}{rate:>12}{limit:>12}{kept:>12}\n", measure.name);
        }
        text
    }
}

/// The middle of some numbers; not-a-number of none.
pub(super) fn median(numbers: &[f64]) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

/// The smallest of some numbers that this share of them does not exceed; not-a-number of none.
pub(super) fn nearest_rank(numbers: &[f64], share: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn a_rank_is_the_nearest_above() {
        let hundred: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(nearest_rank(&hundred, 0.99), 99.0);
        assert_eq!(nearest_rank(&hundred[..50], 0.99), 100.0, "of few, the largest");
        assert_eq!(nearest_rank(&[7.0], 0.0), 7.0);
        assert!(nearest_rank(&[], 0.99).is_nan());
    }
}
