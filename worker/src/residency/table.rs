//! What is in device memory: bases and lenses, by what they *are* (a key, a digest), not by what they are called. The
//! same files declared in two groups over one base are held once.
//!
//! Invariants, kept by [`super::plan`] and checked there by properties:
//! - What rows use is never chosen to leave, nor what is pinned or leased, nor what is on its way in or out.
//! - The active base is never chosen to leave while it has rows.
//! - Bytes of everything in the table, on their way included, never exceed the budgets.

use std::collections::BTreeMap;

use turret_crds::document::BaseKey;

use crate::engine::handle::LensId;
use crate::eviction::history::Entry;

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

/// A base in the table.
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

/// A lens in the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldLens {
    /// Bytes it takes.
    pub bytes: u64,
    /// How far it is.
    pub phase: Phase,
    /// How much of it is there while it is on its way in, percent.
    pub percent: u8,
    /// Rows that use it, or were admitted to.
    pub users: u32,
    /// Whether it is pinned or leased.
    pub kept: bool,
    /// Where its history is.
    pub entry: Entry,
    /// The group whose requests it serves: its place in the document.
    pub group: u16,
    /// As the engine knows it, once it is there.
    pub id: Option<LensId>,
}

impl HeldLens {
    /// Whether nothing uses it and nothing moves it.
    pub fn is_idle(&self) -> bool {
        self.users == 0 && self.phase == Phase::Resident
    }
}

/// What is in device memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Bases.
    pub bases: BTreeMap<BaseKey, Held>,
    /// The active one.
    pub active: Option<BaseKey>,
    /// Lenses.
    pub lenses: BTreeMap<LensKey, HeldLens>,
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

    /// How far everything in it is.
    pub fn phases(&self) -> impl Iterator<Item = Phase> {
        self.bases.values().map(|held| held.phase).chain(self.lenses.values().map(|held| held.phase))
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
        self.lenses_held_over(base).map(|(key, _)| key)
    }

    /// The same, with how they are.
    pub fn lenses_held_over<'a>(
        &'a self,
        base: &'a BaseKey,
    ) -> impl Iterator<Item = (&'a LensKey, &'a HeldLens)> {
        self.lenses.iter().filter(move |(key, _)| key.base == *base)
    }
}
