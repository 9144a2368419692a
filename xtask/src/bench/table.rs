//! From takes to medians, and how they are shown.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::budgets::{Bound, budgets};
use super::machine::Machine;

/// One take of one engine.
#[derive(Debug, Clone)]
pub(super) struct Taken {
    pub(super) engine: &'static str,
    /// Bytes per second just before and just after.
    pub(super) probes: [f64; 2],
    /// By what was found.
    pub(super) seconds: BTreeMap<String, f64>,
}

/// The middle of some takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Median {
    /// Of the takes that nothing disturbed, or of all when there is none.
    pub(super) seconds: f64,
    /// Takes that nothing disturbed.
    pub(super) kept: usize,
    pub(super) all: usize,
}

/// What the takes say.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) command: String,
    pub(super) machine: Machine,
    pub(super) threads: usize,
    /// Bytes that a step reads.
    pub(super) step_bytes: u64,
    pub(super) lens_bytes: Vec<u64>,
    /// Median of the probes around the takes that were kept, and the best one: bytes per second.
    pub(super) read_bandwidth: f64,
    pub(super) best_bandwidth: f64,
    /// By engine: its own words.
    pub(super) info: BTreeMap<&'static str, String>,
    /// What could not be had, and why.
    pub(super) missing: Vec<(String, String)>,
    pub(super) medians: BTreeMap<(&'static str, String), Median>,
}

impl Table {
    /// Takes with a probe below `undisturbed` of the best one are left out.
    pub(super) fn of(taken: &[Taken], undisturbed: f64) -> Self {
        let best = taken.iter().flat_map(|take| take.probes).fold(0.0, f64::max);
        let quiet = |take: &Taken| take.probes.iter().all(|probe| *probe >= undisturbed * best);
        let mut seconds: BTreeMap<_, (Vec<f64>, Vec<f64>)> = BTreeMap::new();
        for take in taken {
            for (name, value) in &take.seconds {
                let (kept, all) = seconds.entry((take.engine, name.clone())).or_default();
                all.push(*value);
                kept.extend(quiet(take).then_some(*value));
            }
        }
        let medians = seconds.into_iter().map(|(key, (kept, all))| {
            let counts = (kept.len(), all.len());
            let seconds = median(if kept.is_empty() { all } else { kept });
            (key, Median { seconds, kept: counts.0, all: counts.1 })
        });
        let probes = taken.iter().filter(|take| quiet(take)).flat_map(|take| take.probes).collect();
        Self {
            read_bandwidth: median(probes),
            best_bandwidth: best,
            medians: medians.collect(),
            ..Self::default()
        }
    }

    pub(super) fn median(&self, engine: &str, name: &str) -> Option<Median> {
        self.medians.iter().find(|((e, n), _)| *e == engine && n == name).map(|(_, median)| *median)
    }

    /// The table as it goes into the docs.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!(
            "# The engine on a CPU, beside its peers\n\n\
             Made by `{}`: a Qwen2-0.5B-shaped base of made-up weights, the same for every engine, and rank-16 lenses\n\
             over all its linear layers. Engines take turns, take by take; times are medians of the takes that nothing\n\
             disturbed, by a probe of the memory's bandwidth before and after each.\n",
            self.command
        );
        text += &self.budgets_markdown();
        text += &self.machine_markdown();
        text += &self.times_markdown();
        text
    }

    fn budgets_markdown(&self) -> String {
        let mut text = "\n## Budgets\n\n| | found | budget | |\n|---|---:|---:|---|\n".to_owned();
        for budget in budgets(self) {
            let bound = match budget.bound {
                Bound::AtLeast(bound) => format!("≥ {bound}"),
                Bound::AtMost(bound) => format!("≤ {bound}"),
            };
            let found = budget.found.map_or("–".into(), short);
            text += &format!("| {} | {found} | {bound} | {} |\n", budget.what, budget.verdict());
        }
        text
    }

    fn machine_markdown(&self) -> String {
        let machine = &self.machine;
        let mut text = format!(
            "\n## Machine and engines\n\n{}, {} processors ({}), {:.0} GiB of memory, huge pages: {}. {} threads for every\n\
             engine. Reading memory: {:.1} GB/s (best probe {:.1}). A step of the base reads {:.1} MB, a lens has {:.1} MB.\n",
            machine.processor,
            machine.processors,
            machine.flags.join(" "),
            machine.memory_bytes as f64 / f64::from(1 << 30),
            machine.huge_pages,
            self.threads,
            self.read_bandwidth / 1e9,
            self.best_bandwidth / 1e9,
            self.step_bytes as f64 / 1e6,
            self.lens_bytes.first().copied().unwrap_or(0) as f64 / 1e6,
        );
        text += "\n| engine | in its own words |\n|---|---|\n";
        for (engine, info) in &self.info {
            text += &format!("| {engine} | {} |\n", cell(info));
        }
        if !self.missing.is_empty() {
            text += "\n| not measured | why |\n|---|---|\n";
            for (what, why) in &self.missing {
                text += &format!("| {} | {} |\n", cell(what), cell(why));
            }
        }
        text
    }

    fn times_markdown(&self) -> String {
        let mut text = "\n## Milliseconds\n\nOf a step of all rows together, or of what the line names. In brackets: takes that were kept, when not all were.\n\n| |".to_owned();
        for engine in self.info.keys() {
            text += &format!(" {engine} |");
        }
        text += &format!("\n|---|{}\n", "---:|".repeat(self.info.len()));
        let mut names: Vec<&String> = self.medians.keys().map(|(_, name)| name).collect();
        names.sort_by_key(|name| by_numbers(name));
        names.dedup();
        for name in names {
            text += &format!("| {name} |");
            for engine in self.info.keys() {
                match self.median(engine, name) {
                    Some(Median { seconds, kept, all }) if kept == all => {
                        text += &format!(" {} |", short(seconds * 1e3));
                    }
                    Some(Median { seconds, kept, all }) => {
                        text += &format!(" {} ({kept} of {all}) |", short(seconds * 1e3));
                    }
                    None => text += " |",
                }
            }
            text += "\n";
        }
        text
    }

    /// The same for machines.
    pub(super) fn json(&self) -> Value {
        let engine = |(name, info): (&&str, &String)| {
            let own = self.medians.iter().filter(|((engine, _), _)| engine == name);
            let seconds = own.map(|((_, name), median)| {
                let Median { seconds, kept, all } = median;
                (name, json!({"median": seconds, "kept": kept, "takes": all}))
            });
            json!({"name": name, "info": info, "seconds": seconds.collect::<BTreeMap<_, _>>()})
        };
        let missing = self.missing.iter().map(|(what, why)| json!({"what": what, "why": why}));
        json!({
            "command": self.command,
            "machine": self.machine,
            "threads": self.threads,
            "readBytesPerSecond": self.read_bandwidth,
            "bestReadBytesPerSecond": self.best_bandwidth,
            "stepBytes": self.step_bytes,
            "lensBytes": self.lens_bytes,
            "budgets": budgets(self).iter().map(|budget| budget.json()).collect::<Vec<_>>(),
            "engines": self.info.iter().map(engine).collect::<Vec<_>>(),
            "missing": missing.collect::<Vec<_>>(),
        })
    }
}

/// Three or four digits that count.
fn short(number: f64) -> String {
    match number.abs() {
        n if n >= 1000.0 => format!("{number:.0}"),
        n if n >= 100.0 => format!("{number:.1}"),
        n if n >= 1.0 => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}

/// Text that breaks no table.
fn cell(text: &str) -> String {
    text.replace(['|', '\n'], " ").trim().to_owned()
}

/// A key by which `8 rows` comes before `32 rows`.
fn by_numbers(name: &str) -> Vec<(String, u64)> {
    let mut key = vec![(String::new(), 0)];
    let mut in_number = false;
    for c in name.chars() {
        let last = key.last_mut().expect("it has one from the start");
        match c.to_digit(10) {
            Some(digit) => last.1 = last.1 * 10 + u64::from(digit),
            None if in_number => key.push((c.to_string(), 0)),
            None => last.0.push(c),
        }
        in_number = c.is_ascii_digit();
    }
    key
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n => (values[(n - 1) / 2] + values[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(engine: &'static str, probes: [f64; 2], name: &str, seconds: f64) -> Taken {
        Taken { engine, probes, seconds: [(name.to_owned(), seconds)].into() }
    }

    #[test]
    fn disturbed_takes_count_for_nothing() {
        let takes = [
            taken("turret", [100.0, 95.0], "decode, 1 row", 1.0),
            taken("llama.cpp", [95.0, 96.0], "decode, 1 row", 1.5),
            taken("turret", [96.0, 20.0], "decode, 1 row", 9.0),
            taken("llama.cpp", [20.0, 99.0], "decode, 1 row", 0.1),
            taken("turret", [99.0, 91.0], "decode, 1 row", 2.0),
        ];
        let table = Table::of(&takes, 0.9);
        let own = table.median("turret", "decode, 1 row");
        assert_eq!(own, Some(Median { seconds: 1.5, kept: 2, all: 3 }));
        let peer = table.median("llama.cpp", "decode, 1 row");
        assert_eq!(peer, Some(Median { seconds: 1.5, kept: 1, all: 2 }));
        assert_eq!((table.best_bandwidth, table.read_bandwidth), (100.0, 95.5));
        assert_eq!(table.median("turret", "decode, 8 rows"), None);
    }

    #[test]
    fn where_all_takes_were_disturbed_they_are_shown_as_such() {
        let takes = [
            taken("turret", [100.0, 99.0], "prefill", 1.0),
            taken("turret", [99.0, 50.0], "decode, 1 row", 3.0),
        ];
        let table =
            Table { info: [("turret", "info".to_owned())].into(), step_bytes: 60, ..Table::of(&takes, 0.9) };
        assert_eq!(table.median("turret", "decode, 1 row"), Some(Median { seconds: 3.0, kept: 0, all: 1 }));
        let text = table.markdown();
        assert!(text.contains("| decode, 1 row | 3000 (0 of 1) |"), "{text}");
        assert!(
            text.contains(
                "| decode, 1 row: share of the read bandwidth | 0.201 | ≥ 0.93 | missed, disturbed |"
            )
        );
        let first = &table.json()["budgets"][0];
        assert_eq!((&first["holds"], &first["disturbed"]), (&json!(false), &json!(true)));
    }

    #[test]
    fn every_budget_is_in_the_table_measured_or_not() {
        let text = Table::default().markdown();
        let rows = text.lines().filter(|line| line.ends_with("| not measured |")).count();
        assert_eq!(rows, budgets(&Table::default()).len());
        assert!(rows > 15);
    }

    #[test]
    fn lines_are_in_the_order_of_their_numbers() {
        let mut names = ["decode, 32 rows", "decode, 8 rows", "prefill", "decode, 1 row"];
        names.sort_by_key(|name| by_numbers(name));
        assert_eq!(names, ["decode, 1 row", "decode, 8 rows", "decode, 32 rows", "prefill"]);
    }
}
