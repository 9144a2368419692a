//! What the program found, as it writes it: see `tests/src/scale/found.rs`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Everything that one run found.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Found {
    pub(super) groups: usize,
    pub(super) lenses: usize,
    pub(super) placements: usize,
    pub(super) workers: usize,
    pub(super) fill: Fill,
    pub(super) idle_bytes: u64,
    pub(super) synced_bytes: u64,
    pub(super) peak_bytes: u64,
    pub(super) cold: Vec<Cold>,
    pub(super) noop: Option<Noop>,
    pub(super) fresh: Vec<Fresh>,
    pub(super) events: Option<Events>,
    pub(super) wide: Option<Wide>,
    pub(super) churn: Option<Churn>,
    pub(super) missing: Vec<(String, String)>,
    pub(super) complaints: Vec<String>,
}

/// What was written when all objects were new.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Fill {
    pub(super) writes: usize,
    pub(super) seconds: f64,
}

/// One cold start, and the list just before it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Cold {
    pub(super) objects: usize,
    pub(super) list_seconds: f64,
    pub(super) synced_seconds: f64,
    pub(super) quiet_seconds: f64,
    pub(super) cpu_seconds: f64,
}

/// Looks that change nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Noop {
    pub(super) bursts: Vec<Burst>,
    pub(super) requests: Vec<String>,
}

/// All workers at once told something that no status shows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Burst {
    pub(super) looks: u64,
    pub(super) seconds: f64,
    pub(super) cpu_seconds: f64,
}

/// Placements that were new, and a bare loop of the same writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Fresh {
    pub(super) placements: usize,
    pub(super) writes: BTreeMap<String, usize>,
    pub(super) seconds: f64,
    pub(super) cpu_seconds: f64,
    pub(super) bare_seconds: f64,
}

impl Fresh {
    /// Requests that wrote.
    pub(super) fn count(&self) -> f64 {
        self.writes.values().sum::<usize>() as f64
    }
}

/// What workers told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Events {
    pub(super) per_second: u32,
    pub(super) seconds: u64,
    pub(super) flips: usize,
    pub(super) unanswered: usize,
    pub(super) p50_millis: f64,
    pub(super) p90_millis: f64,
    pub(super) p99_millis: f64,
    pub(super) most_millis: f64,
    pub(super) writes: usize,
}

/// A lens more in a large group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Wide {
    pub(super) lenses: usize,
    pub(super) worker_calls: u64,
    pub(super) group_status_writes: usize,
    pub(super) placement_status_writes: usize,
}

/// Edits for a while.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub(super) struct Churn {
    pub(super) edits: usize,
    pub(super) seconds: f64,
    pub(super) writes: usize,
    pub(super) cpu_seconds: f64,
    pub(super) slope_bytes_per_second: f64,
    pub(super) samples: Vec<(f64, u64)>,
}

impl Churn {
    /// By how much memory would have grown over all of it, against what it was at the end.
    pub(super) fn growth(&self) -> Option<f64> {
        let (_, last) = self.samples.last()?;
        Some(self.slope_bytes_per_second * self.seconds / *last as f64)
    }
}

#[cfg(test)]
pub(super) fn sample() -> Found {
    let text = include_str!("../../../../tests/fixtures/bench/operator.json");
    serde_json::from_str(text).expect("the program's own test writes the same")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_program_writes_is_read_and_nothing_of_it_is_lost() {
        let text = include_str!("../../../../tests/fixtures/bench/operator.json");
        let written: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(sample()).unwrap(), written);
        assert_eq!(sample().fresh[0].count(), 600.0);
        assert_eq!(sample().churn.unwrap().growth(), Some(2048.0 / f64::from(2 << 20)));
    }
}
