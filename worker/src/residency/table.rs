//! What is in device memory: bases and lenses, by what they *are* (a key, a digest), not by what they are called. The
//! same files declared in two groups over one base are held once.
//!
//! Invariants, kept by [`super::plan`] and checked there by properties:
//! - What rows use is never chosen to leave, nor what is on its way in or out.
//! - The active base is never chosen to leave while it has rows.
//! - Bytes of everything in the table, on their way included, never exceed the budgets.

use std::collections::BTreeMap;

use turret_crds::document::BaseKey;

/// A lens in memory: the files it was made of, over the base it was checked against.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LensKey {
    /// Its base.
    pub base: BaseKey,
    /// Digest of its files.
    pub digest: String,
}

/// How far something in the table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// On its way in; its bytes are taken.
    Loading,
    /// Usable.
    Resident,
    /// On its way out; its bytes are not free yet.
    Leaving,
}

/// Something in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Held {
    /// Bytes it takes.
    pub bytes: u64,
    /// How far it is.
    pub phase: Phase,
    /// Rows that use it, or were admitted to.
    pub users: u32,
    /// When it was last used: a number that only grows.
    pub last_used: u64,
}

/// What is in device memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Bases.
    pub bases: BTreeMap<BaseKey, Held>,
    /// The active one.
    pub active: Option<BaseKey>,
    /// Lenses.
    pub lenses: BTreeMap<LensKey, Held>,
}

impl Table {
    /// Bytes of all lenses, those on their way included.
    pub fn lens_bytes(&self) -> u64 {
        self.lenses.values().map(|h| h.bytes).sum()
    }

    /// Bytes of all bases, those on their way included.
    pub fn base_bytes(&self) -> u64 {
        self.bases.values().map(|h| h.bytes).sum()
    }

    /// Whether a lens can be used by a row at once.
    pub fn has_lens(&self, key: &LensKey) -> bool {
        self.lenses.get(key).is_some_and(|h| h.phase == Phase::Resident)
    }

    /// Whether a base is in memory, active or parked.
    pub fn has_base(&self, key: &BaseKey) -> bool {
        self.bases.get(key).is_some_and(|h| h.phase == Phase::Resident)
    }

    /// Lenses over a base.
    pub fn lenses_over<'a>(&'a self, base: &'a BaseKey) -> impl Iterator<Item = &'a LensKey> {
        self.lenses.keys().filter(move |key| key.base == *base)
    }
}
