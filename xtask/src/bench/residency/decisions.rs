//! How long it takes to choose who leaves, as `turret-worker simulate --decisions` times it: without any worker around it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::bench::output_of;

/// What the program found.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Decisions {
    /// Bytes of what is remembered of a lens.
    pub(super) record_bytes: u64,
    pub(super) rows: Vec<Decision>,
}

/// Decisions of one kind.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Decision {
    pub(super) policy: String,
    /// Bytes that are needed, as the program writes them.
    pub(super) needed: String,
    /// Lenses that leave.
    pub(super) victims: u64,
    pub(super) p50_micros: f64,
    pub(super) p99_micros: f64,
}

/// Has the program decide, some seconds long.
pub(super) fn measure(program: &Path) -> Result<Decisions> {
    let said = output_of(Command::new(program).args(["simulate", "--decisions"]))?;
    read(&said).with_context(|| format!("`turret-worker simulate --decisions` says something else: {said}"))
}

/// Reads what the program prints.
fn read(said: &str) -> Option<Decisions> {
    let record = said.lines().find_map(|line| line.strip_prefix("What is remembered of a lens takes "))?;
    let record_bytes = record.strip_suffix(" bytes.")?.parse().ok()?;
    // The heading and the line below it hold no numbers.
    let rows: Vec<Decision> = said.lines().filter_map(row).collect();
    (!rows.is_empty()).then_some(Decisions { record_bytes, rows })
}

fn row(line: &str) -> Option<Decision> {
    let cells: Vec<&str> = line.strip_prefix('|')?.strip_suffix('|')?.split('|').map(str::trim).collect();
    let [policy, needed, victims, p50, p99] = cells[..] else { return None };
    let micros = |cell: &str| -> Option<f64> { cell.strip_suffix(" µs")?.parse().ok() };
    Some(Decision {
        policy: policy.to_owned(),
        needed: needed.to_owned(),
        victims: victims.parse().ok()?,
        p50_micros: micros(p50)?,
        p99_micros: micros(p99)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "\
What is remembered of a lens takes 64 bytes.
A request is counted in 0.21 µs on average.

| policy | bytes needed | lenses that leave | p50 | p99 |
|---|---|---|---|---|
| LRU | 20 MB | 1 | 2.1 µs | 3.4 µs |
| ALRFU | 2000 MB | 14 | 7.0 µs | 9.9 µs |
";

    #[test]
    fn what_the_program_prints_is_read() {
        let Decisions { record_bytes, rows } = read(SAID).unwrap();
        assert_eq!((record_bytes, rows.len()), (64, 2));
        let last = Decision {
            policy: "ALRFU".into(),
            needed: "2000 MB".into(),
            victims: 14,
            p50_micros: 7.0,
            p99_micros: 9.9,
        };
        assert_eq!(rows[1], last);
    }

    #[test]
    fn another_program_is_not_taken_for_it() {
        assert_eq!(read("What is remembered of a lens takes 64 bytes.\n| a | b |\n"), None);
        assert_eq!(read(SAID.trim_start_matches("What")), None);
    }
}
