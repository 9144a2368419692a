//! What was found, as it goes into the docs and for machines.

use serde_json::{Value, json};

use super::decisions::Decisions;
use super::estimate::{Served, Side};
use super::stream::Stream;
use super::worker::THREADS;
use super::{path, sets};
use crate::bench::budgets::{Bound, Budget, markdown};
use crate::bench::machine::Machine;
use crate::bench::table::{Spread, short};

/// Everything that one run found.
#[derive(Debug)]
pub(super) struct Page {
    pub(super) command: String,
    pub(super) machine: Machine,
    pub(super) decisions: Decisions,
    pub(super) path: path::Found,
    pub(super) sets: sets::Found,
}

impl Page {
    fn budgets(&self) -> Vec<Budget> {
        let mut budgets = Vec::new();
        let mut add = |what: String, bound, found| budgets.push(Budget::of(what, bound, found));
        for decision in &self.decisions.rows {
            let what = format!("decision by {}, {} needed: p99, µs", decision.policy, decision.needed);
            add(what, Bound::AtMost(10.0), vec![decision.p99_micros]);
        }
        let record = self.decisions.record_bytes as f64;
        add("what is remembered of a lens, bytes".into(), Bound::AtMost(64.0), vec![record]);
        for row in &self.path.rows {
            let what = format!(
                "request path, {}, {} declared, {} in memory: time per request against {} lenses",
                clients(row.clients),
                self.path.declared,
                row.resident,
                path::HOT
            );
            add(what, Bound::AtMost(1.05), row.ratios.clone());
        }
        for stream in Stream::ALL {
            for count in sets::CLIENTS {
                let rows = self.sets.rows.iter().filter(|row| (row.stream, row.clients) == (stream, count));
                let least = rows.map(|row| row.served.share()).min_by(f64::total_cmp);
                let most = sets::FACTORS[sets::FACTORS.len() - 1];
                let what = format!(
                    "working sets of 1 to {most} × the budget, {}, {}: least share of what the bytes moved allow",
                    stream.name(),
                    clients(count)
                );
                add(what, Bound::AtLeast(0.5), least.into_iter().collect());
            }
        }
        budgets
    }

    /// The page as it goes into the docs.
    pub(super) fn markdown(&self) -> String {
        let mut text = format!(
            "# Many lenses on a CPU\n\n\
             Made by `{}`: what it costs to choose the lenses that leave, to have thousands of them declared, and to serve more\n\
             of them than memory holds. Workers are processes of their own, asked over HTTP on connections that stay open, for\n\
             one token at a time; a client asks again as soon as it has its answer.\n\n\
             The budgets come first, each with what was found; behind them every table is told how to read it. Where there are\n\
             rounds, the median of them is shown, in brackets the lowest and the highest, and a budget says in how many it holds.\n",
            self.command
        );
        text += &markdown(&self.budgets());
        text += &self.decisions_markdown();
        text += &self.path_markdown();
        text += &self.sets_markdown();
        text += &format!(
            "\n## Machine\n\n{}. Each worker computes with {THREADS} thread and logs warnings only. The numbers are of\n\
             this machine and its load; compare ratios and shares, and run the command on yours.\n",
            self.machine.describe()
        );
        text
    }

    fn decisions_markdown(&self) -> String {
        let mut text = "\n## Decisions\n\n\
             `turret-worker simulate --decisions`: how long the policy takes to choose who leaves, among 1000 lenses in memory of\n\
             10000 that are declared, when 20 MB or 2 GB are needed. Only here are there 10000: a document declares at most 4096.\n\n\
             | policy | bytes needed | lenses that leave | p50, µs | p99, µs |\n|---|---:|---:|---:|---:|\n"
            .to_owned();
        for row in &self.decisions.rows {
            let [p50, p99] = [row.p50_micros, row.p99_micros].map(short);
            text += &format!("| {} | {} | {} | {p50} | {p99} |\n", row.policy, row.needed, row.victims);
        }
        text
    }

    fn path_markdown(&self) -> String {
        let path::Found { declared, lens_bytes, pairs, take, rows } = &self.path;
        let mut text = format!(
            "\n## The way of a request past declared lenses\n\n\
             Two workers are alive: one has {hot} lenses, the other one {declared}, which is the most that a document declares\n\
             (16 groups of 256). All are of distinct content and take {kilobytes:.0} KB; there is room for {room}. Both are asked for the same\n\
             {hot} lenses, in memory, the last of the last group; of the larger worker first only these are in memory, then {room}. Weights are so\n\
             small that a request is hardly anything but its way. A round is a pair of takes of {seconds} s, one of each\n\
             worker, and every other round begins with the other worker; there are {pairs}. The ratio is of the time per request within a\n\
             round, so a machine that is slower for a while changes none. Requests/s are medians of the takes, latencies are of all\n\
             takes together.\n\n\
             | clients | in memory | requests/s: {hot} | {declared} | p50, ms: {hot} | {declared} | p99, ms: {hot} | {declared} | ratio |\n\
             |---:|---:|---:|---:|---:|---:|---:|---:|---:|\n",
            hot = path::HOT,
            room = path::ROOM,
            kilobytes = *lens_bytes as f64 / 1e3,
            seconds = take.as_secs_f64(),
        );
        for row in rows {
            let rates = [row.few, row.many].map(|side| short(side.requests_per_second.median)).join(" | ");
            let millis = |seconds: fn(&Side) -> f64| {
                [row.few, row.many].map(|side| short(seconds(&side) * 1e3)).join(" | ")
            };
            let (p50, p99) = (millis(|side| side.p50_seconds), millis(|side| side.p99_seconds));
            let ratio = Spread::of(row.ratios.clone()).map_or("–".into(), |ratio| ratio.show());
            text += &format!("| {} | {} | {rates} | {p50} | {p99} | {ratio} |\n", row.clients, row.resident);
        }
        text
    }

    fn sets_markdown(&self) -> String {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        let mut text = format!(
            "\n## Working sets beyond the budget\n\n\
             There is room for {room} lenses of {lens:.1} MB each, {budget:.0} MB. The stream asks for as many lenses as the line says, equally\n\
             often or by Zipf's law, the same ones in every run; prepared files are in the system's page cache. Every line has a worker that\n\
             knows nothing of the others. Just before, with other lenses, it is measured what a request takes while\n\
             everything is in memory, by as many clients, and how fast a lens is loaded while nothing else runs. The bytes moved\n\
             allow as many requests/s as there were if that were all, one after the other: requests × the first + bytes moved / the\n\
             second, in seconds. The share is what was served of it. It would fall from line to line if there were a cliff: lenses that are\n\
             evicted before they served, loads that wait for each other. It is above 1 where several clients are served while lenses are\n\
             loaded for others.\n\n\
             | working set | stream | clients | hit rate | moved, MB | in memory, ms | loads, GB/s | requests/s | allowed | share |\n\
             |---:|---|---:|---:|---:|---:|---:|---:|---:|---:|\n",
            room = sets::ROOM,
            lens = megabytes(self.sets.lens_bytes),
            budget = megabytes(self.sets.lens_bytes * sets::ROOM as u64),
        );
        for sets::Row { factor, stream, clients, served } in &self.sets.rows {
            let cells = [
                served.hit_rate(),
                megabytes(served.moved_bytes),
                served.resident_seconds * 1e3,
                served.bytes_per_second / 1e9,
                served.requests_per_second(),
                served.allowed_per_second(),
                served.share(),
            ];
            let cells = cells.map(short).join(" | ");
            text += &format!("| {factor} × | {} | {clients} | {cells} |\n", stream.name());
        }
        text
    }

    /// The same for machines.
    pub(super) fn json(&self) -> Value {
        let decisions = self.decisions.rows.iter().map(|row| {
            json!({
                "policy": row.policy,
                "needed": row.needed,
                "victims": row.victims,
                "p50Micros": row.p50_micros,
                "p99Micros": row.p99_micros,
            })
        });
        let side = |side: &Side| {
            json!({
                "requestsPerSecond": side.requests_per_second.json(),
                "p50Seconds": side.p50_seconds,
                "p99Seconds": side.p99_seconds,
            })
        };
        let path = self.path.rows.iter().map(|row| {
            json!({
                "clients": row.clients,
                "resident": row.resident,
                "few": side(&row.few),
                "many": side(&row.many),
                "ratios": row.ratios,
            })
        });
        let served = |served: &Served| {
            json!({
                "requests": served.requests,
                "hits": served.hits,
                "seconds": served.seconds,
                "movedBytes": served.moved_bytes,
                "residentSeconds": served.resident_seconds,
                "loadBytesPerSecond": served.bytes_per_second,
                "allowedPerSecond": served.allowed_per_second(),
                "share": served.share(),
            })
        };
        let sets = self.sets.rows.iter().map(|row| {
            json!({
                "budgets": row.factor,
                "stream": row.stream.name(),
                "clients": row.clients,
                "served": served(&row.served),
            })
        });
        json!({
            "command": self.command,
            "machine": self.machine,
            "threads": THREADS,
            "budgets": self.budgets().iter().map(Budget::json).collect::<Vec<_>>(),
            "recordBytes": self.decisions.record_bytes,
            "decisions": decisions.collect::<Vec<_>>(),
            "path": {
                "declared": self.path.declared,
                "lensBytes": self.path.lens_bytes,
                "takeSeconds": self.path.take.as_secs_f64(),
                "rows": path.collect::<Vec<_>>(),
            },
            "sets": {
                "lensBytes": self.sets.lens_bytes,
                "budgetBytes": self.sets.lens_bytes * sets::ROOM as u64,
                "rows": sets.collect::<Vec<_>>(),
            },
        })
    }
}

fn clients(count: usize) -> String {
    if count == 1 { "1 client".into() } else { format!("{count} clients") }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::decisions::Decision;
    use super::*;

    /// 1000 requests of 1 ms, which took `seconds`; half of them loaded 8 MB at 8 GB/s.
    fn row(factor: usize, seconds: f64) -> sets::Row {
        let served = Served {
            requests: 1000,
            hits: 500,
            seconds,
            moved_bytes: 500 * 8_000_000,
            resident_seconds: 0.001,
            bytes_per_second: 8e9,
        };
        sets::Row { factor, stream: Stream::Uniform, clients: 1, served }
    }

    fn page() -> Page {
        let decision = Decision {
            policy: "LRU".into(),
            needed: "20 MB".into(),
            victims: 1,
            p50_micros: 2.0,
            p99_micros: 12.5,
        };
        let side = |rate: f64| Side {
            requests_per_second: Spread { median: rate, low: rate, high: rate },
            p50_seconds: 0.0002,
            p99_seconds: 0.0015,
        };
        let ratios = vec![1.04, 1.06, 1.02];
        let (few, many) = (side(5200.0), side(5000.0));
        let row_of_path = path::Row { resident: 1000, clients: 8, few, many, ratios };
        Page {
            command: "cargo xtask bench residency".into(),
            machine: Machine::default(),
            decisions: Decisions { record_bytes: 64, rows: vec![decision] },
            path: path::Found {
                declared: 4096,
                lens_bytes: 20608,
                pairs: 3,
                take: Duration::from_secs(2),
                rows: vec![row_of_path],
            },
            sets: sets::Found { lens_bytes: 8_000_000, rows: vec![row(1, 1.5), row(10, 3.75)] },
        }
    }

    #[test]
    fn budgets_are_held_against_what_was_found() {
        let text = page().markdown();
        for line in [
            "| decision by LRU, 20 MB needed: p99, µs | 12.50 | ≤ 10 | missed |",
            "| what is remembered of a lens, bytes | 64.00 | ≤ 64 | holds |",
            "| request path, 8 clients, 4096 declared, 1000 in memory: time per request against 10 lenses | 1.04 (1.02–1.06) \
             | ≤ 1.05 | holds in 2 of 3 rounds |",
            "| working sets of 1 to 10 × the budget, uniform, 1 client: least share of what the bytes moved allow | 0.400 \
             | ≥ 0.5 | missed |",
            "| working sets of 1 to 10 × the budget, Zipf 1.0, 8 clients: least share of what the bytes moved allow | – \
             | ≥ 0.5 | not measured |",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }

    #[test]
    fn every_row_is_in_its_table() {
        let text = page().markdown();
        for line in [
            "| LRU | 20 MB | 1 | 2.00 | 12.50 |",
            "| 8 | 1000 | 5200 | 5000 | 0.200 | 0.200 | 1.50 | 1.50 | 1.04 (1.02–1.06) |",
            "| 1 × | uniform | 1 | 0.500 | 4000 | 1.00 | 8.00 | 666.7 | 666.7 | 1.00 |",
            "| 10 × | uniform | 1 | 0.500 | 4000 | 1.00 | 8.00 | 266.7 | 666.7 | 0.400 |",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        let json = page().json();
        assert_eq!(json["sets"]["rows"][0]["served"]["share"], 1.0);
        assert_eq!(json["path"]["rows"][0]["ratios"][1], 1.06);
        assert_eq!(json["sets"]["budgetBytes"], 128_000_000);
    }
}
