//! From takes to medians, and how they are shown.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::budgets::{budgets, markdown};
use super::machine::Machine;

/// One take of one engine.
#[derive(Debug, Clone)]
pub(super) struct Taken {
    pub(super) engine: &'static str,
    pub(super) round: usize,
    /// Bytes per second just before and just after.
    pub(super) probes: [f64; 2],
    /// By what was found.
    pub(super) seconds: BTreeMap<String, f64>,
}

/// What a round found: its take between the best probes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Round {
    pub(super) number: usize,
    pub(super) seconds: f64,
    /// Bytes per second that the memory gave around the take: the mean of its probes.
    pub(super) bandwidth: f64,
}

/// The middle of some numbers, and their ends.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Spread {
    /// Nothing of nothing.
    pub(super) fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (low, high) = (*values.first()?, *values.last()?);
        let n = values.len();
        Some(Self { median: (values[(n - 1) / 2] + values[n / 2]) / 2.0, low, high })
    }

    fn times(&self, factor: f64) -> Self {
        let Self { median, low, high } = *self;
        Self { median: median * factor, low: low * factor, high: high * factor }
    }

    /// The median, with the ends where they are others.
    pub(super) fn show(&self) -> String {
        let [median, low, high] = [self.median, self.low, self.high].map(short);
        if low == high { median } else { format!("{median} ({low}–{high})") }
    }

    pub(super) fn json(&self) -> Value {
        json!({"median": self.median, "low": self.low, "high": self.high})
    }
}

/// What the takes say.
///
/// On a machine that others use too, bandwidth changes from second to second; so nothing is compared across rounds. A
/// round gives one number for each thing, ratios are of one round's, and what is shown is the median of the rounds' ratios
/// with their spread.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) command: String,
    pub(super) machine: Machine,
    pub(super) threads: usize,
    /// Bytes that a step reads.
    pub(super) step_bytes: u64,
    pub(super) lens_bytes: Vec<u64>,
    /// Of the probes around the takes that count: bytes per second.
    pub(super) bandwidth: Option<Spread>,
    /// By engine: its own words.
    pub(super) info: BTreeMap<&'static str, String>,
    /// What could not be had, and why.
    pub(super) missing: Vec<(String, String)>,
    /// By engine and by what was found.
    pub(super) found: BTreeMap<(&'static str, String), Vec<Round>>,
}

impl Table {
    pub(super) fn of(taken: &[Taken]) -> Self {
        let mut best: BTreeMap<_, BTreeMap<usize, (f64, Round)>> = BTreeMap::new();
        for take in taken {
            let [before, after] = take.probes;
            for (name, &seconds) in &take.seconds {
                let round = Round { number: take.round, seconds, bandwidth: (before + after) / 2.0 };
                let rounds = best.entry((take.engine, name.clone())).or_default();
                let known = rounds.entry(take.round).or_insert((before.min(after), round));
                if before.min(after) > known.0 {
                    *known = (before.min(after), round);
                }
            }
        }
        let rounds = |rounds: BTreeMap<usize, (f64, Round)>| rounds.into_values().map(|(_, round)| round);
        let found: BTreeMap<_, Vec<Round>> =
            best.into_iter().map(|(key, of)| (key, rounds(of).collect())).collect();
        let bandwidths = found.values().flatten().map(|round| round.bandwidth).collect();
        Self { bandwidth: Spread::of(bandwidths), found, ..Self::default() }
    }

    /// What the rounds found.
    pub(super) fn rounds(&self, engine: &str, name: &str) -> &[Round] {
        let own = self.found.iter().find(|((e, n), _)| *e == engine && n == name);
        own.map_or(&[], |(_, rounds)| rounds)
    }

    /// Every round that found anything.
    pub(super) fn numbers(&self) -> BTreeSet<usize> {
        self.found.values().flatten().map(|round| round.number).collect()
    }

    /// Seconds.
    fn seconds(&self, engine: &str, name: &str) -> Option<Spread> {
        Spread::of(self.rounds(engine, name).iter().map(|round| round.seconds).collect())
    }

    /// The table as it goes into the docs.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!(
            "# The engine on a CPU, beside its peers\n\n\
             Made by `{}`: a Qwen2-0.5B-shaped base of made-up weights, the same for every engine, and rank-16 lenses\n\
             over all its linear layers. Engines take turns, take by take, with a probe of the memory's bandwidth before and\n\
             after each. Of a round the take between the best probes counts; ratios are of one round's takes, so that they were\n\
             measured within seconds of each other. Shown is the median of the rounds, with the lowest and the highest.\n",
            self.command
        );
        text += &markdown(&budgets(self));
        text += &self.machine_markdown();
        text += &self.times_markdown();
        text
    }

    fn machine_markdown(&self) -> String {
        let mut text = format!(
            "\n## Machine and engines\n\n{}. {} threads for every\n\
             engine. Reading memory: {} GB/s. A step of the base reads {:.1} MB, a lens has {:.1} MB.\n",
            self.machine.describe(),
            self.threads,
            self.bandwidth.map_or("?".into(), |bandwidth| bandwidth.times(1e-9).show()),
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
        let mut text =
            "\n## Milliseconds\n\nOf a step of all rows together, or of what the line names.\n\n| |"
                .to_owned();
        for engine in self.info.keys() {
            text += &format!(" {engine} |");
        }
        text += &format!("\n|---|{}\n", "---:|".repeat(self.info.len()));
        let mut names: Vec<&String> = self.found.keys().map(|(_, name)| name).collect();
        names.sort_by_key(|name| by_numbers(name));
        names.dedup();
        for name in names {
            text += &format!("| {name} |");
            for engine in self.info.keys() {
                match self.seconds(engine, name) {
                    Some(seconds) => text += &format!(" {} |", seconds.times(1e3).show()),
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
            let own = self.found.iter().filter(|((engine, _), _)| engine == name);
            let seconds = own.map(|((_, name), rounds)| {
                let round = |round: &Round| json!({"round": round.number, "seconds": round.seconds, "bytesPerSecond": round.bandwidth});
                (name, rounds.iter().map(round).collect::<Vec<_>>())
            });
            json!({"name": name, "info": info, "rounds": seconds.collect::<BTreeMap<_, _>>()})
        };
        let missing = self.missing.iter().map(|(what, why)| json!({"what": what, "why": why}));
        json!({
            "command": self.command,
            "machine": self.machine,
            "threads": self.threads,
            "readBytesPerSecond": self.bandwidth.map(|bandwidth| bandwidth.json()),
            "stepBytes": self.step_bytes,
            "lensBytes": self.lens_bytes,
            "budgets": budgets(self).iter().map(|budget| budget.json()).collect::<Vec<_>>(),
            "engines": self.info.iter().map(engine).collect::<Vec<_>>(),
            "missing": missing.collect::<Vec<_>>(),
        })
    }
}

/// Three or four digits that count.
pub(super) fn short(number: f64) -> String {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(engine: &'static str, round: usize, probes: [f64; 2], name: &str, seconds: f64) -> Taken {
        Taken { engine, round, probes, seconds: [(name.to_owned(), seconds)].into() }
    }

    #[test]
    fn of_a_round_the_quietest_take_counts() {
        let takes = [
            taken("turret", 1, [96.0, 20.0], "decode, 1 row", 9.0),
            taken("turret", 1, [90.0, 80.0], "decode, 1 row", 1.0),
            taken("turret", 1, [99.0, 70.0], "decode, 1 row", 3.0),
            taken("turret", 2, [60.0, 50.0], "decode, 1 row", 2.0),
        ];
        let table = Table::of(&takes);
        let round = |number, seconds, bandwidth| Round { number, seconds, bandwidth };
        assert_eq!(table.rounds("turret", "decode, 1 row"), [round(1, 1.0, 85.0), round(2, 2.0, 55.0)]);
        assert_eq!(table.rounds("turret", "decode, 8 rows"), []);
        assert_eq!(table.bandwidth, Some(Spread { median: 70.0, low: 55.0, high: 85.0 }));
    }

    #[test]
    fn ratios_are_of_one_round_and_show_their_spread() {
        // The machine is half as fast in the second round, which changes no ratio; nor the share of its bandwidth.
        let takes = [
            taken("turret", 1, [100.0, 100.0], "decode, 1 row", 1.0),
            taken("llama.cpp", 1, [100.0, 100.0], "decode, 1 row", 1.3),
            taken("turret", 2, [50.0, 50.0], "decode, 1 row", 2.0),
            taken("llama.cpp", 2, [50.0, 50.0], "decode, 1 row", 2.4),
        ];
        let info = [("turret", "info".to_owned())].into();
        let table = Table { info, step_bytes: 60, ..Table::of(&takes) };
        let text = table.markdown();
        assert!(text.contains("| decode, 1 row | 1500 (1000–2000) |"), "{text}");
        assert!(
            text.contains("| decode, 1 row: share of the read bandwidth | 0.600 | ≥ 0.93 | missed |"),
            "{text}"
        );
        let against = "| decode, 1 row, against llama.cpp in bf16 | 1.25 (1.20–1.30) | ≥ 1.25 | holds in 1 of 2 rounds |";
        assert!(text.contains(against), "{text}");
        let budget = &table.json()["budgets"][1];
        assert_eq!((&budget["holds"], &budget["found"]["low"]), (&json!(1), &json!(1.2)));
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
