//! The budgets of an engine on a CPU, and what was found against each.

use std::cell::Cell;

use serde_json::{Value, json};

use super::table::Table;

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
    /// Nothing when something of it was not measured.
    pub(super) found: Option<f64>,
    /// Whether some part of it was only measured while something else used the machine.
    pub(super) disturbed: bool,
}

impl Budget {
    pub(super) fn holds(&self) -> Option<bool> {
        self.found.map(|found| match self.bound {
            Bound::AtLeast(bound) => found >= bound,
            Bound::AtMost(bound) => found <= bound,
        })
    }

    pub(super) fn verdict(&self) -> String {
        let verdict = match self.holds() {
            None => return "not measured".into(),
            Some(true) => "holds",
            Some(false) => "missed",
        };
        format!("{verdict}{}", if self.disturbed { ", disturbed" } else { "" })
    }

    pub(super) fn json(&self) -> Value {
        let (bound, value) = match self.bound {
            Bound::AtLeast(bound) => ("atLeast", bound),
            Bound::AtMost(bound) => ("atMost", bound),
        };
        json!({"what": self.what, "found": self.found, bound: value, "holds": self.holds(),
               "disturbed": self.disturbed})
    }
}

/// Looks things up, and notices what was disturbed.
struct Look<'a> {
    table: &'a Table,
    disturbed: Cell<bool>,
}

impl Look<'_> {
    /// Seconds.
    fn of(&self, engine: &str, name: &str) -> Option<f64> {
        let median = self.table.median(engine, name)?;
        self.disturbed.set(self.disturbed.get() || median.kept == 0);
        Some(median.seconds)
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
        Some(self.own(name)? / (self.own("decode, 8 rows")? + bytes as f64 / self.table.read_bandwidth))
    }
}

/// Every budget, in the order of the table.
pub(super) fn budgets(table: &Table) -> Vec<Budget> {
    use Bound::{AtLeast, AtMost};
    let look = Look { table, disturbed: Cell::new(false) };
    let mut budgets = Vec::new();
    let mut add = |what: &str, bound: Bound, found: Option<f64>| {
        let disturbed = look.disturbed.replace(false) && found.is_some();
        budgets.push(Budget { what: what.into(), bound, found, disturbed });
    };
    let one = "decode, 1 row";
    let read = table.step_bytes as f64 / table.read_bandwidth;
    add("decode, 1 row: share of the read bandwidth", AtLeast(0.93), look.own(one).map(|own| read / own));
    add("decode, 1 row, against llama.cpp in bf16", AtLeast(1.25), look.against(LLAMA, one));
    add("decode, 1 row, against transformers in bf16", AtLeast(1.5), look.against(TORCH, one));
    add("decode, 1 row, against transformers in f32", AtLeast(1.5), look.against(TORCH_F32, one));
    add("decode, 1 row, against openvino-genai", AtLeast(1.0), look.against(OPENVINO, one));
    add("decode, 8 rows: tokens/s against one row", AtLeast(7.0), look.rows(8));
    add("decode, 32 rows: tokens/s against one row", AtLeast(20.0), look.rows(32));
    add(
        "prefill of 512 tokens against torch in bf16",
        AtLeast(1.0),
        look.against(TORCH, "prefill, 512 tokens"),
    );
    let wide = look.against(TORCH_F32, "prefill, 512 tokens");
    add("prefill of 512 tokens against torch in f32", AtLeast(1.0), wide);
    let deep = || Some(look.own(one)? / look.own("decode, 1 row, context 4096")?);
    add("decode at 4096 tokens of context: tokens/s against 128", AtLeast(0.8), deep());
    let mixed = look.lenses("decode, 8 rows, 8 lenses", 8);
    add("8 rows of 8 lenses: step against one without and the lenses' bytes", AtMost(1.05), mixed);
    let shared = look.lenses("decode, 8 rows with a lens", 1);
    add("8 rows of one lens: the same", AtMost(1.05), shared);
    let turns = || Some(look.own("request, the same lens")? / look.own("request, two lenses in turn")?);
    add("requests of two resident lenses in turn: requests/s against one lens", AtLeast(0.98), turns());
    let switch = || Some(look.of(TORCH, "set_adapter")? / look.own("lens, switched")?);
    add("switch between resident lenses, against PEFT's set_adapter", AtLeast(100.0), switch());
    let load = || Some(look.of(TORCH, "load_adapter")? / look.own("lens, loaded")?);
    add("load of an evicted lens, against PEFT's load_adapter", AtLeast(20.0), load());
    let added = || {
        let bytes = *table.lens_bytes.last()? as f64;
        let added = look.own("first token, lens evicted")? - look.own("first token, lens resident")?;
        Some(added / (bytes / (0.9 * table.read_bandwidth) + 1e-3))
    };
    add("evicted lens: added to the first token, against bytes/(0.9 R) + 1 ms", AtMost(1.0), added());
    let (cold, again) = ("first token after 2000 tokens, cold", "first token after 2000 tokens, again");
    let prefix = || Some(look.own(again)? / look.own(cold)?);
    add("prefix hit on 2000 tokens: first token against cold", AtMost(0.05), prefix());
    let quantized = |name: &str| Some(look.of(LLAMA_Q8, one)? / look.of(TURRET_Q8, name)?);
    add("Q8_0 base: decode, 1 row, against llama.cpp in Q8_0", AtLeast(1.0), quantized(one));
    let over = quantized("decode, 1 row with a lens");
    add("Q8_0 base with a lens unmerged on top, against llama.cpp in Q8_0 without", AtLeast(1.0), over);
    let outside = || {
        let sampled = "decode, 32 rows, sampled";
        Some(look.own(&format!("{sampled}, outside of the model"))? / look.own(sampled)?)
    };
    add("32 rows sampled by top-p of 151936: share of a step outside of the model", AtMost(0.05), outside());
    let beside = || {
        Some(
            look.own("between tokens, 4 rows beside a prompt of 4096")?
                / look.own("between tokens, 4 rows")?,
        )
    };
    add("p99 between tokens of 4 rows, beside a prompt of 4096 tokens against alone", AtMost(2.0), beside());
    budgets
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::table::Taken;

    /// A table of takes that nothing disturbed, on a machine that reads 10 GB/s and a base of 1 GB.
    fn table(found: &[(&'static str, &str, f64)], probe: f64) -> Table {
        let taken = found.iter().map(|&(engine, name, seconds)| Taken {
            engine,
            probes: [probe, probe],
            seconds: [(name.to_owned(), seconds)].into(),
        });
        let quiet = Taken { engine: TURRET, probes: [10e9, 10e9], seconds: [("x".into(), 1.0)].into() };
        let taken: Vec<_> = taken.chain([quiet]).collect();
        Table { step_bytes: 1_000_000_000, lens_bytes: vec![20_000_000; 8], ..Table::of(&taken, 0.9) }
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
        let table = table(&takes, 10e9);
        let is = |what: &str, ratio: f64, verdict: &str| {
            let budget = found(&table, what);
            assert!((budget.found.unwrap() - ratio).abs() < 1e-9, "{budget:?}");
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
    fn a_budget_says_when_it_rests_on_disturbed_takes() {
        let takes = [(TURRET, "decode, 1 row", 0.1), (LLAMA, "decode, 1 row", 0.2)];
        assert_eq!(
            found(&table(&takes, 5e9), "decode, 1 row, against llama.cpp").verdict(),
            "holds, disturbed"
        );
        assert!(!found(&table(&takes, 5e9), "prefill").disturbed, "nothing was found");
    }
}
