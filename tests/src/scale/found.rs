//! What was found, as `cargo xtask bench operator` reads it.

use std::collections::BTreeMap;

use serde::Serialize;

/// Everything that one run found.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Found {
    /// Groups there were.
    pub groups: usize,
    /// Lenses of each.
    pub lenses: usize,
    /// Placements there were.
    pub placements: usize,
    /// Workers there were.
    pub workers: usize,
    /// What it wrote when all of them were new.
    pub fill: Fill,
    /// Resident memory of an operator that has nothing to do, bytes.
    pub idle_bytes: u64,
    /// Resident memory just after the last cold start, bytes.
    pub synced_bytes: u64,
    /// The most resident memory that the last operator ever had, bytes.
    pub peak_bytes: u64,
    /// Cold starts.
    pub cold: Vec<Cold>,
    /// Looks that change nothing.
    pub noop: Option<Noop>,
    /// Placements that are new.
    pub fresh: Vec<Fresh>,
    /// What workers tell.
    pub events: Option<Events>,
    /// A lens more in a large group.
    pub wide: Option<Wide>,
    /// Edits for a while.
    pub churn: Option<Churn>,
    /// What could not be measured, and why.
    pub missing: Vec<(String, String)>,
    /// What workers were sent that no operator should send.
    pub complaints: Vec<String>,
}

/// What was written when all objects were new.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fill {
    /// Requests that write.
    pub writes: usize,
    /// From the first to the last.
    pub seconds: f64,
}

/// One cold start, and the list that it is compared with.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Cold {
    /// Objects that both read.
    pub objects: usize,
    /// The bare list.
    pub list_seconds: f64,
    /// From the start of the process until its caches hold all.
    pub synced_seconds: f64,
    /// Until it has looked at all, follows all workers, and is quiet.
    pub quiet_seconds: f64,
    /// CPU that it used for that.
    pub cpu_seconds: f64,
}

/// Looks that change nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Noop {
    /// One burst each.
    pub bursts: Vec<Burst>,
    /// Requests to the API server meanwhile, but for the Lease and watches that are renewed.
    pub requests: Vec<String>,
}

/// All workers at once tell something that no status shows.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Burst {
    /// Looks that followed.
    pub looks: u64,
    /// Until the last of them.
    pub seconds: f64,
    /// CPU that the operator used.
    pub cpu_seconds: f64,
}

/// Placements that are new, and a bare loop of what is written for them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Fresh {
    /// Placements, with a group each.
    pub placements: usize,
    /// Requests that write, by what they write.
    pub writes: BTreeMap<String, usize>,
    /// From the first to the last.
    pub seconds: f64,
    /// CPU that the operator used.
    pub cpu_seconds: f64,
    /// The bare loop of as many.
    pub bare_seconds: f64,
}

/// What workers tell.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Events {
    /// How many a second.
    pub per_second: u32,
    /// For so long.
    pub seconds: u64,
    /// Of them, those that change conditions: of a placement and of a group.
    pub flips: usize,
    /// Patches that should have followed and did not before the next such event of the worker, or the end.
    pub unanswered: usize,
    /// From such an event to the API server's receipt of the patch, milliseconds: half of them, nine of ten, 99 of a hundred, the longest.
    pub p50_millis: f64,
    /// See `p50_millis`.
    pub p90_millis: f64,
    /// See `p50_millis`.
    pub p99_millis: f64,
    /// See `p50_millis`.
    pub most_millis: f64,
    /// Requests that wrote meanwhile.
    pub writes: usize,
}

/// A lens more in a large group.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Wide {
    /// Lenses of the group, with the new one.
    pub lenses: usize,
    /// Documents that its worker was offered for it.
    pub worker_calls: u64,
    /// Writes of the group's status.
    pub group_status_writes: usize,
    /// Writes of the placement's status.
    pub placement_status_writes: usize,
}

/// Edits for a while.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Churn {
    /// Edits.
    pub edits: usize,
    /// For so long.
    pub seconds: f64,
    /// Requests with which the operator wrote.
    pub writes: usize,
    /// CPU that it used.
    pub cpu_seconds: f64,
    /// By how much the memory grows, by the line through all samples but those of the first quarter: bytes a second.
    pub slope_bytes_per_second: f64,
    /// Seconds since the first edit, and resident bytes.
    pub samples: Vec<(f64, u64)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_as_its_reader_expects_it() {
        let found = Found {
            groups: 10_000,
            lenses: 20,
            placements: 10_000,
            workers: 2000,
            fill: Fill { writes: 80_000, seconds: 100.0 },
            idle_bytes: 30 << 20,
            synced_bytes: 330 << 20,
            peak_bytes: 390 << 20,
            cold: vec![Cold {
                objects: 62_000,
                list_seconds: 5.0,
                synced_seconds: 5.5,
                quiet_seconds: 6.0,
                cpu_seconds: 7.5,
            }],
            noop: Some(Noop {
                bursts: vec![Burst { looks: 4000, seconds: 1.25, cpu_seconds: 1.5 }],
                requests: vec!["get services bench/x → 200".into()],
            }),
            fresh: vec![Fresh {
                placements: 200,
                writes: [("configmaps".to_owned(), 200), ("modelplacements/status".to_owned(), 400)].into(),
                seconds: 0.75,
                cpu_seconds: 0.5,
                bare_seconds: 0.5,
            }],
            events: Some(Events {
                per_second: 500,
                seconds: 30,
                flips: 150,
                unanswered: 1,
                p50_millis: 4.0,
                p90_millis: 8.0,
                p99_millis: 20.0,
                most_millis: 62.5,
                writes: 600,
            }),
            wide: Some(Wide {
                lenses: 256,
                worker_calls: 1,
                group_status_writes: 1,
                placement_status_writes: 2,
            }),
            churn: Some(Churn {
                edits: 3,
                seconds: 2.0,
                writes: 9,
                cpu_seconds: 0.25,
                slope_bytes_per_second: 1024.0,
                samples: vec![(0.0, 1 << 20), (1.0, 2 << 20)],
            }),
            missing: vec![("a thing".into(), "it broke".into())],
            complaints: vec!["w: its state: there is no token".into()],
        };
        let text = include_str!("../../fixtures/bench/operator.json");
        let expected: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(found).unwrap(), expected);
    }
}
