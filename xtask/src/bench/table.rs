//! From rounds to medians, and from medians to ratios against the budgets.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::engines::Take;

/// One run of one engine.
pub(super) struct Round {
    pub(super) engine: &'static str,
    /// Bytes per second just before and just after.
    pub(super) probes: [f64; 2],
    pub(super) take: Take,
}

/// What the rounds say.
pub(super) struct Table {
    threads: usize,
    best_probe: f64,
    /// By engine: its own words, rounds kept, rounds in all.
    engines: BTreeMap<&'static str, (String, usize, usize)>,
    /// Median seconds by engine and measure.
    medians: BTreeMap<(&'static str, String), f64>,
    missing: Vec<(String, String)>,
}

/// A ratio that has a budget.
#[derive(Debug, PartialEq)]
struct Ratio {
    what: String,
    found: f64,
    budget: f64,
    /// Whether the budget is the least, or the most.
    at_least: bool,
}

impl Ratio {
    fn holds(&self) -> bool {
        if self.at_least { self.found >= self.budget } else { self.found <= self.budget }
    }
}

const TURRET: &str = "turret";

impl Table {
    /// Rounds whose probes are below `undisturbed` of the best one are left out.
    pub(super) fn of(
        rounds: &[Round],
        missing: &[(String, String)],
        undisturbed: f64,
        threads: usize,
    ) -> Self {
        let best_probe = rounds.iter().flat_map(|r| r.probes).fold(0.0, f64::max);
        let mut engines = BTreeMap::new();
        let mut seconds: BTreeMap<_, Vec<f64>> = BTreeMap::new();
        for round in rounds {
            let quiet = round.probes.iter().all(|probe| *probe >= undisturbed * best_probe);
            let entry = engines.entry(round.engine).or_insert((round.take.info.clone(), 0, 0));
            entry.1 += usize::from(quiet);
            entry.2 += 1;
            for (name, value) in round.take.seconds.iter().filter(|_| quiet) {
                seconds.entry((round.engine, name.clone())).or_default().push(*value);
            }
        }
        let medians = seconds.into_iter().map(|(key, values)| (key, median(values))).collect();
        Self { threads, best_probe, engines, medians, missing: missing.to_vec() }
    }

    fn seconds(&self, engine: &str, name: &str) -> Option<f64> {
        self.medians.iter().find(|((e, n), _)| *e == engine && n == name).map(|(_, seconds)| *seconds)
    }

    /// How many times faster Turret is.
    fn against(&self, engine: &str, name: &str) -> Option<f64> {
        Some(self.seconds(engine, name)? / self.seconds(TURRET, name)?)
    }

    fn ratios(&self) -> Vec<Ratio> {
        let own = |name: &str| self.seconds(TURRET, name);
        let mut ratios = Vec::new();
        let mut add = |what: &str, found: Option<f64>, budget: f64, at_least: bool| {
            ratios.extend(found.map(|found| Ratio { what: what.into(), found, budget, at_least }));
        };
        let over = |a: Option<f64>, b: Option<f64>| Some(a? / b?);
        add("decode, 1 row: share of the read bandwidth", over(own("read"), own("decode 1")), 0.93, true);
        add("decode, 1 row, against llama.cpp", self.against("llama.cpp", "decode 1"), 1.25, true);
        add("decode, 1 row, against transformers", self.against("transformers", "decode 1"), 1.5, true);
        add("decode, 1 row, against openvino-genai", self.against("openvino-genai", "decode 1"), 1.0, true);
        let rows = |n: f64, name: &str| Some(n * own("decode 1")? / own(name)?);
        add("decode, 8 rows: tokens/s against one row", rows(8.0, "decode 8"), 7.0, true);
        add("decode, 32 rows: tokens/s against one row", rows(32.0, "decode 32"), 20.0, true);
        add("prefill against transformers", self.against("transformers", "prefill"), 1.0, true);
        let deep = over(own("decode 1"), own("decode, 1 row, context 4096"));
        add("decode at 4096 tokens of context against 128", deep, 0.8, true);
        let turn = over(own("request, the same lens"), own("request, lenses in turn"));
        add("requests with lenses in turn against one lens", turn, 0.98, true);
        ratios
    }

    /// The table as it goes into the docs.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!(
            "# The engine on a CPU, beside its peers\n\nMade by `cargo xtask bench engine --write`: a Qwen2-0.5B-shaped base in bf16 with made-up weights, the\nsame for every engine. {} threads; the memory reads {:.1} GB/s (best probe). Medians of the rounds that nothing\ndisturbed.\n\n## Engines\n\n| engine | rounds kept | in its own words |\n|---|---|---|\n",
            self.threads,
            self.best_probe / 1e9
        );
        for (engine, (info, kept, all)) in &self.engines {
            text += &format!("| {engine} | {kept} of {all} | {} |\n", info.replace('|', "/").trim());
        }
        for (engine, why) in &self.missing {
            text += &format!("| {engine} | 0 | does not run here: {} |\n", why.replace(['|', '\n'], " "));
        }
        text += "\n## Milliseconds\n\n| |";
        for engine in self.engines.keys() {
            text += &format!(" {engine} |");
        }
        text += &format!("\n|---|{}\n", "---:|".repeat(self.engines.len()));
        let mut names: Vec<&String> = self.medians.keys().map(|(_, name)| name).collect();
        names.sort();
        names.dedup();
        for name in names {
            text += &format!("| {name} |");
            for engine in self.engines.keys() {
                match self.seconds(engine, name) {
                    Some(seconds) => text += &format!(" {:.2} |", seconds * 1e3),
                    None => text += " |",
                }
            }
            text += "\n";
        }
        text += "\n## Ratios\n\n| | found | budget | |\n|---|---:|---:|---|\n";
        for ratio in self.ratios() {
            let (sign, holds) = (if ratio.at_least { '≥' } else { '≤' }, ratio.holds());
            let verdict = if holds { "holds" } else { "missed" };
            text +=
                &format!("| {} | {:.2} | {sign} {} | {verdict} |\n", ratio.what, ratio.found, ratio.budget);
        }
        text
    }

    /// The same for machines.
    pub(super) fn json(&self) -> Value {
        let engine = |(name, (info, kept, all)): (&&str, &(String, usize, usize))| {
            let own = self.medians.iter().filter(|((engine, _), _)| engine == name);
            let seconds: BTreeMap<_, _> = own.map(|((_, name), seconds)| (name, seconds)).collect();
            json!({"name": name, "info": info, "roundsKept": kept, "rounds": all, "seconds": seconds})
        };
        let ratio = |r: &Ratio| {
            let bound = if r.at_least { "atLeast" } else { "atMost" };
            json!({"what": r.what, "found": r.found, bound: r.budget, "holds": r.holds()})
        };
        let missing = self.missing.iter().map(|(name, why)| json!({"name": name, "why": why}));
        json!({
            "threads": self.threads,
            "readBytesPerSecond": self.best_probe,
            "engines": self.engines.iter().map(engine).collect::<Vec<_>>(),
            "missing": missing.collect::<Vec<_>>(),
            "ratios": self.ratios().iter().map(ratio).collect::<Vec<_>>(),
        })
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(engine: &'static str, probes: [f64; 2], seconds: &[(&str, f64)]) -> Round {
        let seconds = seconds.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
        Round { engine, probes, take: Take { info: "info".into(), seconds } }
    }

    #[test]
    fn disturbed_rounds_count_for_nothing() {
        let rounds = [
            round(TURRET, [100.0, 95.0], &[("decode 1", 1.0), ("read", 0.95)]),
            round("llama.cpp", [95.0, 96.0], &[("decode 1", 1.5)]),
            round(TURRET, [96.0, 20.0], &[("decode 1", 9.0), ("read", 5.0)]),
            round("llama.cpp", [20.0, 99.0], &[("decode 1", 0.1)]),
        ];
        let table = Table::of(&rounds, &[], 0.9, 2);
        assert_eq!(table.seconds(TURRET, "decode 1"), Some(1.0));
        assert_eq!(table.against("llama.cpp", "decode 1"), Some(1.5));
        assert_eq!(table.engines[TURRET], ("info".into(), 1, 2));
        let ratios = table.ratios();
        assert_eq!(ratios.len(), 2, "what was not measured has no ratio");
        assert!(ratios.iter().all(Ratio::holds));
        assert!(table.markdown().contains("| decode, 1 row, against llama.cpp | 1.50 | ≥ 1.25 | holds |"));
    }
}
