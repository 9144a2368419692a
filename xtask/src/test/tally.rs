//! Counting: what a suite's tests came to, read from what they print.

use std::fmt;
use std::iter::Sum;
use std::time::Duration;

/// How many tests did what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// They passed.
    pub passed: u32,
    /// They failed.
    pub failed: u32,
    /// They could not run here.
    pub skipped: u32,
}

impl Tally {
    /// One test that passed or failed.
    pub fn one(passed: bool) -> Tally {
        Tally { passed: passed.into(), failed: (!passed).into(), skipped: 0 }
    }

    /// One test that could not run here.
    pub fn one_skipped() -> Tally {
        Tally { skipped: 1, ..Tally::default() }
    }
}

impl Sum for Tally {
    fn sum<I: Iterator<Item = Tally>>(tallies: I) -> Tally {
        tallies.fold(Tally::default(), |sum, next| Tally {
            passed: sum.passed + next.passed,
            failed: sum.failed + next.failed,
            skipped: sum.skipped + next.skipped,
        })
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

/// What the tests of one program came to: its own words, and how it ended.
pub fn judge<'a>(lines: impl IntoIterator<Item = &'a str>, ended_well: bool) -> Tally {
    let mut tally: Tally = lines.into_iter().filter_map(read).sum();
    // A program that crashed or ran too long has no summary, or one that claims too much.
    if !ended_well && tally.failed == 0 {
        tally.failed = 1;
    }
    tally
}

/// Reads the closing line of the test harness, or a line that says that all was skipped.
fn read(line: &str) -> Option<Tally> {
    if line.starts_with("SKIPPED:") {
        return Some(Tally::one_skipped());
    }
    let (_, counts) = line.strip_prefix("test result: ")?.split_once(". ")?;
    let mut tally = Tally::default();
    for count in counts.split(';') {
        let Some((number, what)) = count.trim().split_once(' ') else { continue };
        let Ok(number) = number.parse() else { continue };
        match what {
            "passed" => tally.passed = number,
            "failed" => tally.failed = number,
            "ignored" => tally.skipped = number,
            _ => {}
        }
    }
    Some(tally)
}

/// The table at the end: a line for each suite with its time.
pub fn table(suites: &[(&str, Tally, Duration)]) -> String {
    let mut text = format!("{:<8} {:>7} {:>7} {:>8} {:>9}\n", "suite", "passed", "failed", "skipped", "time");
    for (name, tally, took) in suites {
        let Tally { passed, failed, skipped } = tally;
        let seconds = format!("{:.1} s", took.as_secs_f64());
        text += &format!("{name:<8} {passed:>7} {failed:>7} {skipped:>8} {seconds:>9}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_harness_s_closing_lines_are_summed_up() {
        let lines = [
            "running 3 tests",
            "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.02s",
            "test result: FAILED. 7 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.10s",
        ];
        assert_eq!(judge(lines, false), Tally { passed: 10, failed: 2, skipped: 1 });
    }

    #[test]
    fn a_program_that_crashes_fails_whatever_it_printed() {
        let good = "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(judge([good], false), Tally { passed: 3, failed: 1, skipped: 0 });
        assert_eq!(judge([], false), Tally { passed: 0, failed: 1, skipped: 0 });
    }

    #[test]
    fn what_could_not_run_is_counted_as_skipped() {
        assert_eq!(judge(["SKIPPED: no cluster"], true), Tally::one_skipped());
        assert_eq!(Tally::one_skipped().to_string(), "0 passed, 0 failed, 1 skipped");
    }

    #[test]
    fn the_table_has_a_line_for_each_suite() {
        let table = table(&[("unit", Tally::one(true), Duration::from_millis(1250))]);
        assert_eq!(
            table,
            "suite     passed  failed  skipped      time\nunit           1       0        0     1.2 s\n"
        );
    }
}
