//! Hints: what [`assign()`](crate::assign::assign) answered last, on its way from the operator to the workers.
//!
//! They are advice. They lie beside the worker document and not in it: they move with demand, no digest counts them, and
//! `Ready` does not wait for them. Of an answer they carry what the workers are to hold, and what the next answer depends
//! on ([`Hints::previous`]); where the lenses are without demand follows from these. A worker takes those with a greater
//! version and says so in its report ([`crate::report::WorkerState::hints_version`]), together with which lenses it was
//! assigned: there the gateway reads it.

use std::{collections::BTreeMap, io};

use serde::{Deserialize, Serialize};

use crate::{
    assign::{Assignment, BaseShare, LensId, LensShare, WorkerShare},
    document::BaseKey,
};

/// Largest hints that are published, bytes of gzip: the ConfigMap has room for them beside the largest document.
/// About ten thousand assigned lenses with names of the usual length.
pub const MAX_GZIP_BYTES: usize = 192 << 10;
/// Largest hints that are read, uncompressed: guards against a decompression bomb.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// What the operator advises the workers of one placement.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hints {
    /// Grows with every other answer; from 1. Scoped, as the document's sequence, by the placement's UID.
    pub version: u64,
    /// Seconds since the epoch when they were published.
    pub published_at: u64,
    /// The workers, by name. One that is not here is new, and will be.
    pub workers: BTreeMap<String, WorkerShare>,
    /// What was asked for when the answer was made: only what was asked for at all.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub demands: BTreeMap<BaseKey, BaseDemands>,
}

/// How much a base and its lenses are asked for, thousandths of a row.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BaseDemands {
    /// With and without a lens.
    pub demand_millirows: u64,
    /// With each lens.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub lenses: BTreeMap<LensId, u64>,
}

impl Hints {
    /// An answer with a version, made at `published_at` seconds since the epoch.
    pub fn of(assignment: Assignment, version: u64, published_at: u64) -> Self {
        let mut demands = BTreeMap::new();
        for (key, share) in assignment.bases {
            let lenses = share.lenses.into_iter().map(|(id, lens)| (id, lens.demand_millirows));
            let lenses: BTreeMap<LensId, u64> = lenses.filter(|(_, millirows)| *millirows > 0).collect();
            if share.demand_millirows > 0 || !lenses.is_empty() {
                demands.insert(key, BaseDemands { demand_millirows: share.demand_millirows, lenses });
            }
        }
        Self { version, published_at, workers: assignment.workers, demands }
    }

    /// What [`assign()`](crate::assign::assign) takes for its last answer: it gives the same as for the whole of it.
    pub fn previous(&self) -> Assignment {
        let lens = |(id, millirows): (&LensId, &u64)| {
            (id.clone(), LensShare { demand_millirows: *millirows, workers: Vec::new() })
        };
        let base = |(key, base): (&BaseKey, &BaseDemands)| {
            let lenses = base.lenses.iter().map(lens).collect();
            let share = BaseShare { demand_millirows: base.demand_millirows, workers: Vec::new(), lenses };
            (key.clone(), share)
        };
        Assignment { workers: self.workers.clone(), bases: self.demands.iter().map(base).collect() }
    }

    /// Whether both advise the same and were made for the same.
    pub fn says_the_same(&self, other: &Self) -> bool {
        (&self.workers, &self.demands) == (&other.workers, &other.demands)
    }

    /// Reads hints as gzip of JSON, the form they have in a ConfigMap.
    ///
    /// # Errors
    /// When the bytes are something else, or more than is read.
    pub fn from_gzip(bytes: &[u8]) -> Result<Self, io::Error> {
        let limited = io::Read::take(flate2::read::GzDecoder::new(bytes), MAX_JSON_BYTES);
        Ok(serde_json::from_reader(limited)?)
    }

    /// Writes them as gzip of JSON. The same hints always give the same bytes.
    pub fn to_gzip(&self) -> Vec<u8> {
        let mut encoder = flate2::GzBuilder::new().mtime(0).write(Vec::new(), flate2::Compression::new(6));
        serde_json::to_writer(&mut encoder, self).expect("writing to memory cannot fail");
        encoder.finish().expect("writing to memory cannot fail")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hints(millirows: u64) -> Hints {
        let share = WorkerShare { base: Some(BaseKey("b".into())), weight: 1, preload: Vec::new() };
        let lens = |name: &str, demand_millirows| {
            (LensId::of("g", name), LensShare { demand_millirows, workers: vec!["w".into()] })
        };
        let lenses = [lens("idle", 0), lens("asked", millirows)].into();
        let base = BaseShare { demand_millirows: millirows, workers: vec!["w".into()], lenses };
        let bases = [(BaseKey("b".into()), base)].into();
        Hints::of(Assignment { workers: [("w".into(), share)].into(), bases }, 3, 7)
    }

    #[test]
    fn hints_are_read_and_written_without_loss_and_say_nothing_of_what_nobody_asks_for() {
        let asked = hints(1500);
        assert_eq!(Hints::from_gzip(&asked.to_gzip()).unwrap(), asked);
        assert_eq!(
            serde_json::to_string(&asked).unwrap(),
            r#"{"version":3,"publishedAt":7,"workers":{"w":{"base":"b","weight":1}},"#.to_owned()
                + r#""demands":{"b":{"demandMillirows":1500,"lenses":{"g:asked":1500}}}}"#
        );
        assert_eq!(hints(0).demands, BTreeMap::new());
        assert!(Hints::from_gzip(b"other").is_err());
    }

    #[test]
    fn another_version_says_the_same_and_another_demand_does_not() {
        let later = Hints { version: 4, published_at: 99, ..hints(1500) };
        assert!(hints(1500).says_the_same(&later));
        assert!(!hints(1500).says_the_same(&hints(1501)));
    }
}
