//! What was found, as it goes into the docs and for machines.

use serde_json::{Value, json};

use super::found::{Churn, Events, Found, Noop, Wide};
use super::plot;
use crate::bench::budgets::{Bound, Budget, markdown};
use crate::bench::machine::Machine;
use crate::bench::table::{Spread, short};

/// The picture beside the page.
pub(super) const PLOT: &str = "operator-memory.svg";
const MIB: f64 = 1_048_576.0;

/// Everything that one run found.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) command: String,
    pub(super) machine: Machine,
    pub(super) found: Found,
}

impl Page {
    fn budgets(&self) -> Vec<Budget> {
        use Bound::{AtLeast, AtMost};
        let found = &self.found;
        let mut budgets = Vec::new();
        let mut add = |what: &str, bound: Bound, rounds: Vec<f64>| {
            budgets.push(Budget::of(what.to_owned(), bound, rounds));
        };
        let cold = found.cold.iter().map(|cold| cold.quiet_seconds / cold.list_seconds).collect();
        add(
            "cold start until it is quiet, against a bare list of the same, in pages of 500",
            AtMost(1.3),
            cold,
        );

        let noop = found.noop.as_ref();
        let bursts = noop.map(|noop| noop.bursts.as_slice()).unwrap_or_default();
        let rates = bursts.iter().map(|burst| burst.looks as f64 / burst.seconds).collect();
        add("looks that change nothing, a second", AtLeast(2000.0), rates);
        let requests = noop.map(|noop| noop.requests.len() as f64).into_iter().collect();
        add("requests to the API server for all of them", AtMost(0.0), requests);

        let rates = found.fresh.iter().map(|fresh| fresh.bare_seconds / fresh.seconds).collect();
        add("new placements: writes a second, against a bare loop of the same", AtLeast(0.9), rates);
        let cpu = found.fresh.iter().map(|fresh| fresh.cpu_seconds * 1e3 / fresh.count()).collect();
        add("new placements: the operator's own CPU for a write, ms", AtMost(1.0), cpu);

        add("resident memory at its most, MiB", AtMost(400.0), vec![found.peak_bytes as f64 / MIB]);
        let growth = found.churn.as_ref().and_then(Churn::growth).map(|share| share * 100.0);
        add("growth of resident memory over all edits, %", AtMost(5.0), growth.into_iter().collect());

        let p99 = found.events.as_ref().map(|events| events.p99_millis).into_iter().collect();
        add("what a worker tells, until the patch of a condition arrives: p99, ms", AtMost(50.0), p99);

        let wide = |of: fn(&Wide) -> f64| found.wide.iter().map(of).collect::<Vec<_>>();
        let calls = wide(|wide| wide.worker_calls as f64);
        add("a lens more in a group of 256: documents that its worker is given", AtMost(1.0), calls);
        let of_group = wide(|wide| wide.group_status_writes as f64);
        add("the same: writes of the group's status", AtMost(1.0), of_group);
        let of_placement = wide(|wide| wide.placement_status_writes as f64);
        add("the same: writes of the placement's status", AtMost(1.0), of_placement);
        budgets
    }

    /// The picture of memory, if there were edits.
    pub(super) fn plot(&self) -> Option<String> {
        plot::memory(&self.found.churn.as_ref()?.samples)
    }

    /// The page as it goes into the docs.
    pub(super) fn markdown(&self) -> String {
        let Found { groups, lenses, placements, workers, .. } = &self.found;
        let mut text = format!(
            "# The operator with thousands of objects\n\n\
             Made by `{}`: {groups} groups of {lenses} lenses, {placements} placements, {workers} workers. etcd and the API server\n\
             are real, and nothing else of Kubernetes runs: pods are bound and said to run by the benchmark, whose one process is also\n\
             every worker, each on an address of its own. The operator is a process with its usual log level and a user of its own; its\n\
             requests are counted in the API server's audit log, CPU and memory are the kernel's numbers.\n\n\
             Operator, API server, etcd and all workers share the processors named below, and so wait for each other: what takes\n\
             long here may be somebody else's work. Ratios are of one round, of two things that were measured one after the other.\n",
            self.command
        );
        text += &markdown(&self.budgets());
        text += &self.cold_markdown();
        if let Some(noop) = &self.found.noop {
            text += &noop_markdown(noop);
        }
        text += &self.fresh_markdown();
        text += &self.memory_markdown();
        if let Some(events) = &self.found.events {
            text += &events_markdown(events);
        }
        if let Some(wide) = &self.found.wide {
            text += &wide_markdown(wide);
        }
        text += &self.missing_markdown();
        text += &format!("\n## Machine\n\n{}.\n", self.machine.describe());
        text
    }

    fn cold_markdown(&self) -> String {
        let mut text = "\n## Cold start\n\n\
             Just before each start all objects are listed by a client of the same library: all seven kinds at the same time, pages of\n\
             500, read into the same types and dropped. Then the operator starts. It is synced when `/readyz` says so, and quiet since\n\
             it has looked at every group and placement, follows every worker, and looks at no more than it would anyway.\n\n\
             | objects | list, s | synced, s | quiet, s | CPU, s |\n|---:|---:|---:|---:|---:|\n"
            .to_owned();
        for cold in &self.found.cold {
            let cells = [cold.list_seconds, cold.synced_seconds, cold.quiet_seconds, cold.cpu_seconds];
            text += &format!("| {} | {} |\n", cold.objects, cells.map(short).join(" | "));
        }
        text
    }

    fn fresh_markdown(&self) -> String {
        let fill = &self.found.fill;
        let mut text = format!(
            "\n## New placements\n\n\
             They are made, each with a group of its own and no workers, while the operator is stopped by a signal; it goes on, and\n\
             finds all of them. Counted is what it writes, from the API server's receipt of the first write to its answer to the last;\n\
             before an object is first made the operator asks whether the name is taken, which takes time and is no write. The bare\n\
             loop applies what was written in another namespace, as the API server keeps it, 32 requests at the same time,\n\
             while the operator does nothing. When the cluster was filled, {writes} writes took {seconds} s.\n\n\
             | placements | writes | of them | writes/s | bare loop | CPU for a write, ms |\n|---:|---:|---|---:|---:|---:|\n",
            writes = fill.writes,
            seconds = short(fill.seconds),
        );
        for fresh in &self.found.fresh {
            let of_them: Vec<_> =
                fresh.writes.iter().map(|(what, count)| format!("{count} {what}")).collect();
            let count = fresh.count();
            let cells = [count / fresh.seconds, count / fresh.bare_seconds, fresh.cpu_seconds * 1e3 / count];
            text += &format!(
                "| {} | {count} | {} | {} |\n",
                fresh.placements,
                of_them.join(", "),
                cells.map(short).join(" | ")
            );
        }
        text
    }

    fn memory_markdown(&self) -> String {
        let found = &self.found;
        let lenses = (found.groups * found.lenses).max(1);
        let of_objects = found.synced_bytes.saturating_sub(found.idle_bytes);
        let mib = |bytes: u64| short(bytes as f64 / MIB);
        let mut text = format!(
            "\n## Memory\n\n\
             | | |\n|---|---:|\n\
             | resident without any object, MiB | {} |\n\
             | resident after the last cold start, MiB | {} |\n\
             | the difference, bytes for each lens, all else included | {} |\n\
             | the most until the end, MiB | {} |\n",
            mib(found.idle_bytes),
            mib(found.synced_bytes),
            of_objects / lenses as u64,
            mib(found.peak_bytes),
        );
        if let Some(churn) = &found.churn {
            let rate = churn.edits as f64 / churn.seconds;
            text += &format!(
                "| over {} s of edits, a line through it: MiB an hour | {} |\n\n\
                 {} edits of random groups and placements, {} a second, made the operator write {} times and took {} s of its CPU. The\n\
                 line is through all samples, one a second, but those of the first quarter.\n\n\
                 ![Resident memory of the operator over the edits]({PLOT})\n",
                short(churn.seconds),
                short(churn.slope_bytes_per_second * 3600.0 / MIB),
                churn.edits,
                short(rate),
                churn.writes,
                short(churn.cpu_seconds),
            );
        }
        text
    }

    fn missing_markdown(&self) -> String {
        let mut text = String::new();
        if !self.found.missing.is_empty() {
            text += "\n| not measured | why |\n|---|---|\n";
            for (what, why) in &self.found.missing {
                text += &format!("| {what} | {} |\n", why.replace(['|', '\n'], " "));
            }
        }
        if let Some(first) = self.found.complaints.first() {
            text += &format!(
                "\nWorkers were sent {} things that no operator should send; the first: {first}\n",
                self.found.complaints.len()
            );
        }
        text += "\nNo other operator is beside it: those that serve lenses on Kubernetes are Go programs of many modules, with\n\
                 objects of other kinds. The audit log, CPU and memory of any operator can be read in the same way: its user and its\n\
                 process are all that must be known.\n";
        text
    }

    /// The same for machines.
    pub(super) fn json(&self) -> Value {
        json!({
            "command": self.command,
            "machine": self.machine,
            "budgets": self.budgets().iter().map(Budget::json).collect::<Vec<_>>(),
            "found": self.found,
        })
    }
}

fn noop_markdown(noop: &Noop) -> String {
    let spread = |of: Vec<f64>| Spread::of(of).map_or("–".into(), |spread| spread.show());
    let looks = noop.bursts.first().map_or(0, |burst| burst.looks);
    let seconds = noop.bursts.iter().map(|burst| burst.seconds).collect();
    let cpu = noop.bursts.iter().map(|burst| burst.cpu_seconds * 1e6 / burst.looks as f64).collect();
    let mut text = format!(
        "\n## Looks that change nothing\n\n\
         Every worker tells at the same moment that it knows the digest of a lens, or does not any more; no status shows that. Each\n\
         placement with a worker and its group are looked at, about {looks} looks in {} s, {} µs of the operator's CPU each, reading what\n\
         workers tell included; {} times, one after another. Requests are counted but for the Lease of the election and for watches\n\
         that are opened again.\n",
        spread(seconds),
        spread(cpu),
        noop.bursts.len(),
    );
    if let Some(first) = noop.requests.first() {
        text += &format!("There were {} requests; the first: `{first}`.\n", noop.requests.len());
    }
    text
}

fn events_markdown(events: &Events) -> String {
    format!(
        "\n## From a worker to a condition\n\n\
         For {} s workers tell {} things a second. {} of all change the conditions of a placement and of a group: a lens fails, or is\n\
         well again. Time goes from the moment the worker says so to the API server's receipt of the patch, for either object.\n\
         {} of the patches did not come before the same worker said something else; those count as long as there was time. In all,\n\
         the operator wrote {} times.\n\n\
         | p50, ms | p90, ms | p99, ms | longest, ms |\n|---:|---:|---:|---:|\n| {} |\n",
        events.seconds,
        events.per_second,
        events.flips,
        events.unanswered,
        events.writes,
        [events.p50_millis, events.p90_millis, events.p99_millis, events.most_millis].map(short).join(" | "),
    )
}

fn wide_markdown(wide: &Wide) -> String {
    format!(
        "\n## A lens more\n\n\
         A group with {} lenses on one worker is given one more: its worker is offered {} documents, and {} writes of the group's\n\
         status and {} of the placement's follow.\n",
        wide.lenses - 1,
        wide.worker_calls,
        wide.group_status_writes,
        wide.placement_status_writes
    )
}

#[cfg(test)]
mod tests {
    use super::super::found::sample;
    use super::*;

    fn page(found: Found) -> Page {
        Page { command: "cargo xtask bench operator".into(), machine: Machine::default(), found }
    }

    #[test]
    fn budgets_are_held_against_what_was_found() {
        let text = page(sample()).markdown();
        for line in [
            "| cold start until it is quiet, against a bare list of the same, in pages of 500 | 1.20 | ≤ 1.3 | holds |",
            "| looks that change nothing, a second | 3200 | ≥ 2000 | holds |",
            "| requests to the API server for all of them | 1.00 | ≤ 0 | missed |",
            "| new placements: writes a second, against a bare loop of the same | 0.667 | ≥ 0.9 | missed |",
            "| new placements: the operator's own CPU for a write, ms | 0.833 | ≤ 1 | holds |",
            "| resident memory at its most, MiB | 390.0 | ≤ 400 | holds |",
            "| what a worker tells, until the patch of a condition arrives: p99, ms | 20.00 | ≤ 50 | holds |",
            "| the same: writes of the group's status | 1.00 | ≤ 1 | holds |",
            "| the same: writes of the placement's status | 2.00 | ≤ 1 | missed |",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(
            text.contains("| growth of resident memory over all edits, % | 0.098 | ≤ 5 | holds |"),
            "{text}"
        );
    }

    #[test]
    fn what_was_found_is_told_and_what_was_not_too() {
        let text = page(sample()).markdown();
        for line in [
            "| 62000 | 5.00 | 5.50 | 6.00 | 7.50 |",
            "| 200 | 600 | 200 configmaps, 400 modelplacements/status | 800.0 | 1200 | 0.833 |",
            // 300 MiB for 200,000 lenses.
            "| the difference, bytes for each lens, all else included | 1572 |",
            "There were 1 requests; the first: `get services bench/x → 200`.",
            "| 4.00 | 8.00 | 20.00 | 62.50 |",
            "| a thing | it broke |",
            "the first: w: its state: there is no token",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(page(sample()).plot().is_some());
    }

    #[test]
    fn every_budget_is_in_the_table_measured_or_not() {
        let nothing = Found {
            cold: Vec::new(),
            noop: None,
            fresh: Vec::new(),
            events: None,
            wide: None,
            churn: None,
            ..sample()
        };
        let page = page(nothing);
        let rows = page.markdown().lines().filter(|line| line.ends_with("| not measured |")).count();
        // Memory at its most is known of every run that ends.
        assert_eq!(rows, page.budgets().len() - 1);
        assert_eq!((page.budgets().len(), page.plot()), (11, None));
        assert_eq!(page.json()["found"]["groups"], 10_000);
    }
}
