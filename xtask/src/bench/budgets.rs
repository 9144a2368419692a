//! Budgets, what was found against each, and those of an engine on a CPU.

use serde_json::{Value, json};

use super::table::{Round, Spread, Table};

const TURRET: &str = "turret";
const TURRET_Q8: &str = "turret Q8_0";
const LLAMA: &str = "llama.cpp";
const LLAMA_Q8: &str = "llama.cpp Q8_0";
const TORCH: &str = "transformers";
const TORCH_F32: &str = "transformers F32";
const OPENVINO: &str = "openvino-genai";

/// What is promised.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Bound {
    AtLeast(f64),
    AtMost(f64),
}

/// A ratio of things found in one run, and what is promised of it.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Budget {
    pub(super) what: String,
    pub(super) bound: Bound,
    /// Of the rounds. Nothing when something of it was not measured.
    pub(super) found: Option<Spread>,
    /// In how many rounds it holds, of how many.
    holds: usize,
    rounds: usize,
}

impl Budget {
    /// Of what the rounds found.
    pub(super) fn of(what: String, bound: Bound, found: Vec<f64>) -> Self {
        let holds = |found: &&f64| match bound {
            Bound::AtLeast(bound) => **found >= bound,
            Bound::AtMost(bound) => **found <= bound,
        };
        let (holds, rounds) = (found.iter().filter(holds).count(), found.len());
        Self { what, bound, found: Spread::of(found), holds, rounds }
    }

    pub(super) fn verdict(&self) -> String {
        match (self.holds, self.rounds) {
            (_, 0) => "not measured".into(),
            (0, _) => "missed".into(),
            (holds, rounds) if holds == rounds => "holds".into(),
            (holds, rounds) => format!("holds in {holds} of {rounds} rounds"),
        }
    }

    pub(super) fn json(&self) -> Value {
        let (bound, value) = match self.bound {
            Bound::AtLeast(bound) => ("atLeast", bound),
            Bound::AtMost(bound) => ("atMost", bound),
        };
        let found = self.found.map(|found| found.json());
        json!({"what": self.what, "found": found, bound: value, "holds": self.holds, "rounds": self.rounds})
    }
}

/// Budgets as a table.
pub(super) fn markdown(budgets: &[Budget]) -> String {
    let mut text = "\n## Budgets\n\n| | found | budget | |\n|---|---:|---:|---|\n".to_owned();
    for budget in budgets {
        let bound = match budget.bound {
            Bound::AtLeast(bound) => format!("≥ {bound}"),
            Bound::AtMost(bound) => format!("≤ {bound}"),
        };
        let found = budget.found.map_or("–".into(), |found| found.show());
        text += &format!("| {} | {found} | {bound} | {} |\n", budget.what, budget.verdict());
    }
    text
}

/// Looks up what one round found.
struct Look<'a> {
    table: &'a Table,
    round: usize,
}

impl Look<'_> {
    /// What was not taken in this round, since it takes long, is what the other rounds say.
    fn at(&self, engine: &str, name: &str) -> Option<Round> {
        let rounds = self.table.rounds(engine, name);
        rounds.iter().find(|round| round.number == self.round).or(rounds.first()).copied()
    }

    /// Seconds.
    fn of(&self, engine: &str, name: &str) -> Option<f64> {
        Some(self.at(engine, name)?.seconds)
    }

    /// Seconds to read so many bytes when this was taken.
    fn reading(&self, bytes: u64, name: &str) -> Option<f64> {
        Some(bytes as f64 / self.at(TURRET, name)?.bandwidth)
    }

    fn own(&self, name: &str) -> Option<f64> {
        self.of(TURRET, name)
    }

    /// How many times faster Turret is.
    fn against(&self, engine: &str, name: &str) -> Option<f64> {
        Some(self.of(engine, name)? / self.own(name)?)
    }

    /// How many times one row's tokens come of so many together.
    fn rows(&self, rows: u32) -> Option<f64> {
        Some(f64::from(rows) * self.own("decode, 1 row")? / self.own(&format!("decode, {rows} rows"))?)
    }

    /// A step against the same without lenses and the time to read the lenses' bytes.
    fn lenses(&self, name: &str, count: usize) -> Option<f64> {
        let bytes: u64 = self.table.lens_bytes.get(..count)?.iter().sum();
        Some(self.own(name)? / (self.own("decode, 8 rows")? + self.reading(bytes, name)?))
    }
}

/// Every budget, in the order of the table.
pub(super) fn budgets(table: &Table) -> Vec<Budget> {
    use Bound::{AtLeast, AtMost};
    let numbers = table.numbers();
    let looks: Vec<Look<'_>> = numbers.into_iter().map(|round| Look { table, round }).collect();
    let mut budgets = Vec::new();
    let mut add = |what: &str, bound: Bound, found: &dyn Fn(&Look<'_>) -> Option<f64>| {
        budgets.push(Budget::of(what.into(), bound, looks.iter().filter_map(found).collect()));
    };
    let one = "decode, 1 row";
    add("decode, 1 row: share of the read bandwidth", AtLeast(0.93), &|look| {
        Some(look.reading(table.step_bytes, one)? / look.own(one)?)
    });
    add("decode, 1 row, against llama.cpp in bf16", AtLeast(1.25), &|look| look.against(LLAMA, one));
    add("decode, 1 row, against transformers in bf16", AtLeast(1.5), &|look| look.against(TORCH, one));
    add("decode, 1 row, against transformers in f32", AtLeast(1.5), &|look| look.against(TORCH_F32, one));
    add("decode, 1 row, against openvino-genai", AtLeast(1.0), &|look| look.against(OPENVINO, one));
    add("decode, 8 rows: tokens/s against one row", AtLeast(7.0), &|look| look.rows(8));
    add("decode, 32 rows: tokens/s against one row", AtLeast(20.0), &|look| look.rows(32));
    let prefill = "prefill, 512 tokens";
    add("prefill of 512 tokens against torch in bf16", AtLeast(1.0), &|look| look.against(TORCH, prefill));
    add("prefill of 512 tokens against torch in f32", AtLeast(1.0), &|look| look.against(TORCH_F32, prefill));
    add("decode at 4096 tokens of context: tokens/s against 128", AtLeast(0.8), &|look| {
        Some(look.own(one)? / look.own("decode, 1 row, context 4096")?)
    });
    add("8 rows of 8 lenses: step against one without and the lenses' bytes", AtMost(1.05), &|look| {
        look.lenses("decode, 8 rows, 8 lenses", 8)
    });
    add("8 rows of one lens: the same", AtMost(1.05), &|look| look.lenses("decode, 8 rows with a lens", 1));
    add("requests of two resident lenses in turn: requests/s against one lens", AtLeast(0.98), &|look| {
        Some(look.own("request, the same lens")? / look.own("request, two lenses in turn")?)
    });
    add("switch between resident lenses, against PEFT's set_adapter", AtLeast(100.0), &|look| {
        Some(look.of(TORCH, "set_adapter")? / look.own("lens, switched")?)
    });
    add("load of an evicted lens, against PEFT's load_adapter", AtLeast(20.0), &|look| {
        Some(look.of(TORCH, "load_adapter")? / look.own("lens, loaded")?)
    });
    add("evicted lens: added to the first token, against bytes/(0.9 R) + 1 ms", AtMost(1.0), &|look| {
        let evicted = "first token, lens evicted";
        let added = look.own(evicted)? - look.own("first token, lens resident")?;
        Some(added / (look.reading(*table.lens_bytes.last()?, evicted)? / 0.9 + 1e-3))
    });
    add("prefix hit on 2000 tokens: first token against cold", AtMost(0.05), &|look| {
        Some(
            look.own("first token after 2000 tokens, again")?
                / look.own("first token after 2000 tokens, cold")?,
        )
    });
    let quantized = |look: &Look<'_>, name: &str| Some(look.of(LLAMA_Q8, one)? / look.of(TURRET_Q8, name)?);
    add("Q8_0 base: decode, 1 row, against llama.cpp in Q8_0", AtLeast(1.0), &|look| quantized(look, one));
    add("Q8_0 base with a lens unmerged on top, against llama.cpp in Q8_0 without", AtLeast(1.0), &|look| {
        quantized(look, "decode, 1 row with a lens")
    });
    add("32 rows sampled by top-p of 151936: share of a step outside of the model", AtMost(0.05), &|look| {
        let sampled = "decode, 32 rows, sampled";
        Some(look.own(&format!("{sampled}, outside of the model"))? / look.own(sampled)?)
    });
    add("p99 between tokens of 4 rows, beside a prompt of 4096 tokens against alone", AtMost(2.0), &|look| {
        let alone = "between tokens, 4 rows";
        Some(look.own(&format!("{alone} beside a prompt of 4096"))? / look.own(alone)?)
    });
    add("p99 between tokens of 4 rows, beside lenses that load again and again", AtMost(1.1), &|look| {
        let between = "between tokens, 4 rows,";
        Some(
            look.own(&format!("{between} beside lenses that load"))?
                / look.own(&format!("{between} nothing else"))?,
        )
    });
    budgets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::table::Taken;

    /// A table of one round, on a machine that reads 10 GB/s and a base of 1 GB.
    fn table(found: &[(&'static str, &str, f64)]) -> Table {
        let taken = found.iter().map(|&(engine, name, seconds)| Taken {
            engine,
            round: 1,
            probes: [10e9, 10e9],
            seconds: [(name.to_owned(), seconds)].into(),
        });
        let taken: Vec<_> = taken.collect();
        Table { step_bytes: 1_000_000_000, lens_bytes: vec![20_000_000; 8], ..Table::of(&taken) }
    }

    fn found(table: &Table, what: &str) -> Budget {
        budgets(table).into_iter().find(|b| b.what.starts_with(what)).unwrap()
    }

    #[test]
    fn ratios_say_how_many_times_faster_turret_is() {
        let takes = [
            (TURRET, "decode, 1 row", 0.1),
            (TURRET, "decode, 8 rows", 0.16),
            (TURRET, "decode, 8 rows, 8 lenses", 0.18),
            (LLAMA, "decode, 1 row", 0.12),
            (TURRET, "lens, loaded", 0.01),
            (TORCH, "load_adapter", 0.3),
        ];
        let table = table(&takes);
        let is = |what: &str, ratio: f64, verdict: &str| {
            let budget = found(&table, what);
            assert!((budget.found.unwrap().median - ratio).abs() < 1e-9, "{budget:?}");
            assert_eq!(budget.verdict(), verdict, "{what}");
        };
        is("decode, 1 row: share", 1.0, "holds");
        is("decode, 1 row, against llama.cpp", 1.2, "missed");
        is("decode, 8 rows", 5.0, "missed");
        // 0.16 s and 160 MB at 10 GB/s.
        is("8 rows of 8 lenses", 0.18 / 0.176, "holds");
        is("load of an evicted lens", 30.0, "holds");
        assert_eq!(found(&table, "decode, 32 rows").verdict(), "not measured");
    }

    #[test]
    fn what_takes_too_long_for_every_round_is_compared_with_all() {
        let take = |engine, round, seconds| Taken {
            engine,
            round,
            probes: [10e9, 10e9],
            seconds: [("decode, 1 row".to_owned(), seconds)].into(),
        };
        let table = Table::of(&[take(TURRET, 1, 0.1), take(TORCH, 1, 0.2), take(TURRET, 2, 0.2)]);
        let against = found(&table, "decode, 1 row, against transformers in bf16").found.unwrap();
        assert_eq!((against.low, against.high), (1.0, 2.0));
    }
}
