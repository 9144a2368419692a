//! Builders for the tests.

use super::*;

pub(super) const MIB: u64 = 1 << 20;

pub(super) fn key(name: &str) -> BaseKey {
    BaseKey(name.into())
}

/// A base with so many rows.
pub(super) fn base(name: &str, rows: u64) -> BaseDemand {
    BaseDemand { key: key(name), demand_millirows: rows * 1000 }
}

/// A lens that comes with the first request and is not asked for, of a group that is called as its base is.
pub(super) fn lens(base: &str, name: &str) -> LensDemand {
    LensDemand {
        id: LensId::of(base, name),
        base: key(base),
        bytes: 20 * MIB,
        residency: LensResidency::OnDemand,
        priority: 100,
        demand_millirows: 0,
    }
}

/// A lens with so many thousandths of a row.
pub(super) fn asked(base: &str, name: &str, demand_millirows: u64) -> LensDemand {
    LensDemand { demand_millirows, ..lens(base, name) }
}

/// A lens that is declared so, and is not asked for.
pub(super) fn declared(base: &str, name: &str, residency: LensResidency) -> LensDemand {
    LensDemand { residency, ..lens(base, name) }
}

/// A worker with room for fifty lenses.
pub(super) fn worker(name: &str) -> WorkerRoom {
    WorkerRoom {
        name: name.into(),
        lens_budget_bytes: 1000 * MIB,
        weight: 1,
        availability: Availability::Available,
        active_base: None,
    }
}

/// Workers `w0`, `w1`, … with room for everything.
pub(super) fn workers(count: usize) -> Vec<WorkerRoom> {
    let roomy = |n: usize| WorkerRoom { lens_budget_bytes: u64::MAX, ..worker(&format!("w{n}")) };
    (0..count).map(roomy).collect()
}

/// The first answer there is.
pub(super) fn fresh(situation: &Situation) -> Assignment {
    assign(situation, &Assignment::default())
}

impl Assignment {
    /// The base that a worker prefers.
    pub(super) fn preference(&self, worker: &str) -> Option<&str> {
        self.workers[worker].base.as_ref().map(|base| base.0.as_str())
    }

    /// How many workers prefer a base.
    pub(super) fn preferring(&self, base: &str) -> usize {
        self.bases[&key(base)].workers.len()
    }

    /// The workers of a lens, the first choice first.
    pub(super) fn holders(&self, base: &str, name: &str) -> &[String] {
        &self.bases[&key(base)].lenses[&LensId::of(base, name)].workers
    }

    /// The workers that preload a lens, sorted.
    pub(super) fn preloading(&self, base: &str, name: &str) -> Vec<&str> {
        let id = LensId::of(base, name);
        let preloading = self.workers.iter().filter(|(_, share)| share.preload.contains(&id));
        preloading.map(|(name, _)| name.as_str()).collect()
    }
}
