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
    /// Bytes of weights that it must read.
    pub bytes: u64,
}

impl Measure {
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
        text += &format!("{:<42}", "");
        columns.iter().for_each(|column| text += &format!("{column:>12}"));
        text += "\n";
        for measure in &self.measures {
            let seconds = measure.median_seconds();
            let limit = measure.bytes as f64 / self.read_bytes_per_second / seconds;
            let ms = seconds * 1e3;
            let rate = f64::from(measure.tokens) / seconds;
            let kept = measure.seconds.len();
            text += &format!("{:<42}{ms:>12.2}{rate:>12.1}{limit:>12.2}{kept:>12}\n", measure.name);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
