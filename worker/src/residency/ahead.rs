//! Lenses that are loaded before a request needs them, and those that leave before somebody needs their room.
//!
//! Ahead of requests come, in this order: what is leased, what is pinned, what somebody asked for by hand, what is
//! declared `Preloaded`. Requests come before all of these; `Preloaded` lenses only take room that is free.
//!
//! Where workers share the lenses ([`super::advice`]), only those that are assigned to this one come ahead, in the order in
//! which they are, and among them what is asked for much though it is `OnDemand`. A pinned lens that is assigned elsewhere
//! is not loaded here; once a request has brought it, it stays.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use turret_crds::condition::FailureReason;
use turret_crds::group::LensResidency;
use turret_crds::report::Feedback;

use super::admit::{Demand, LOADS_AT_ONCE};
use super::declared::{DeclaredLens, LensName};
use super::failure::Failure;
use super::owner::{Owner, Turn};
use super::plan::{Until, Wanted};
use super::table::{LensKey, Phase};
use crate::eviction::history::Entry;
use crate::eviction::usage::rating_milli;

/// Lenses that are loaded ahead at a time: one place is always left for a request.
const AHEAD_AT_ONCE: usize = LOADS_AT_ONCE - 1;
/// What a load is taken to need before one was measured, bytes per second.
const FIRST_GUESS: f64 = 1e9;

impl Owner {
    /// Loads what is to be in memory before a request needs it.
    pub(super) fn bring_ahead(&mut self, demand: &Demand, now: Instant) {
        self.answer_awaited();
        if !self.look_ahead || !matches!(self.turn, Turn::Steady) {
            return;
        }
        let loading = self.table.lenses.values().filter(|held| held.phase == Phase::Loading).count();
        if loading >= AHEAD_AT_ONCE || !demand.lenses.is_empty() {
            // Its end is an event; whoever is served by it comes first.
            return;
        }
        self.look_ahead = false;
        self.ahead_waits = false;
        for (name, instead_of_others) in self.ahead() {
            let Some(lens) = self.lenses.get(&name) else { continue };
            let Some(key) = lens.key() else { continue };
            let is_claim = lens.is_claim();
            if !self.table.has_base(&key.base) || (self.table.lenses.contains_key(&key) && !is_claim) {
                continue;
            }
            let Some(resolved) = self.resolved(&key).cloned() else { continue };
            if is_claim || resolved.files.here().is_none() {
                // Others may be loaded meanwhile; the end of it is an event. What is to stay here is fetched when that is due.
                if self.awaited.contains_key(&name) {
                    self.ask_for_files(&name, now);
                }
                continue;
            }
            let wanted = Wanted::Lens { key: key.clone(), bytes: resolved.bytes, instead_of_others };
            match self.plan(&wanted, &demand.lenses, now) {
                Ok(plan) => {
                    self.carry_out(plan, &key, resolved, AHEAD_AT_ONCE);
                    // One after the other: the next is looked at when this one is there, or its room is.
                    return;
                }
                Err(short) => self.ahead_waits |= short.until != Until::Never,
            }
        }
    }

    /// Lenses to be in memory ahead of requests, and whether others may leave for them.
    pub(super) fn ahead(&self) -> Vec<(LensName, bool)> {
        let share = self.advice.share();
        let mut pinned = Vec::new();
        let mut preloaded = Vec::new();
        for (name, lens) in self.lenses.iter() {
            let rank = Reverse(lens.lens.priority);
            if self.pins.contains(name) || self.is_pinned(name, lens) && self.advice.keeps(name) {
                pinned.push((rank, name));
            } else if lens.lens.residency == LensResidency::Preloaded && share.is_none() {
                preloaded.push((rank, name));
            }
        }
        pinned.sort();
        preloaded.sort();
        // Those of them that are pinned have come before.
        let shared = share.unwrap_or_default().iter();
        let kept = self.leases.lenses().into_iter().chain(pinned.into_iter().map(|(_, name)| name));
        let asked = kept.chain(self.awaited.keys()).map(|name| (name.clone(), true));
        let free = preloaded.into_iter().map(|(_, name)| name).chain(shared);
        asked.chain(free.map(|name| (name.clone(), false))).collect()
    }

    /// Lets idle lenses leave beyond the watermarks, where these are declared.
    pub(super) fn sweep(&mut self, now: Instant) {
        let Some(rule) = self.eviction_rule().sweep.filter(|_| now >= self.sweep_at) else { return };
        self.sweep_at = now + Duration::from_secs(u64::from(rule.every_seconds));
        if matches!(self.turn, Turn::Switching { .. }) {
            return;
        }
        let plan = self.plan(&Wanted::Swept(rule), &BTreeSet::new(), now).unwrap_or_default();
        self.evict_lenses(plan.evict_lenses, &plan.why);
    }

    /// Puts in force what a new document says of eviction.
    pub(super) fn follow_eviction_rule(&mut self) {
        let rule = self.eviction_rule();
        self.history.set_idle_seconds(f64::from(rule.idle_seconds));
        let now = Instant::now();
        let every = rule.sweep.map_or(0, |sweep| sweep.every_seconds);
        self.sweep_at = self.sweep_at.min(now + Duration::from_secs(u64::from(every)));
        self.pins.retain(|name| self.lenses.get(name).is_some());
        let entries: Vec<(LensKey, Entry)> = self.entries.iter().map(|(k, e)| (k.clone(), *e)).collect();
        for (key, entry) in entries {
            self.history.set_priority(entry, self.priority(&key));
            self.history.set_rating_milli(entry, self.rating_milli(&key));
        }
        self.follow_names();
        self.look_ahead = true;
    }

    /// All names may be others now.
    pub(super) fn follow_names(&mut self) {
        let held: Vec<LensKey> = self.table.lenses.keys().cloned().collect();
        held.iter().for_each(|key| self.follow_names_of(key));
    }

    /// What is in memory is pinned, leased and grouped by its names: these have changed, or what is said of them.
    pub(super) fn follow_names_of(&mut self, key: &LensKey) {
        let (kept, group) = (self.is_kept(key), self.group_index(key));
        if let Some(held) = self.table.lenses.get_mut(key) {
            (held.kept, held.group) = (kept, group);
        }
    }

    /// Where the history of these files is, once they are declared.
    pub(super) fn entry(&mut self, key: &LensKey) -> Option<Entry> {
        if let Some(entry) = self.entries.get(key) {
            return Some(*entry);
        }
        let bytes = self.resolved(key)?.bytes;
        let entry = self.history.register(bytes, bytes as f64 / FIRST_GUESS, self.priority(key));
        self.history.set_rating_milli(entry, self.rating_milli(key));
        self.entries.insert(key.clone(), entry);
        Some(entry)
    }

    /// Forgets files that are neither declared nor in memory.
    pub(super) fn forget_entries(&mut self) {
        let (lenses, table, history) = (&self.lenses, &self.table, &mut self.history);
        self.entries.retain(|key, entry| {
            let known = lenses.declares(key) || table.lenses.contains_key(key);
            if !known {
                history.forget(*entry);
            }
            known
        });
    }

    /// The highest priority that these files have under any name.
    fn priority(&self, key: &LensKey) -> i16 {
        let priorities = self.lenses.names(key).filter_map(|name| Some(self.lenses.get(name)?.lens.priority));
        priorities.max().map_or(0, |priority| i16::try_from(priority).unwrap_or(i16::MAX))
    }

    /// What users think of these files under all of their names.
    fn rating_milli(&self, key: &LensKey) -> u16 {
        let feedback = self.lenses.names(key).filter_map(|name| self.lenses.get(name)?.counts.feedback);
        let together = feedback.fold(Feedback::default(), Feedback::and);
        rating_milli(together.count, together.mean_milli)
    }

    /// Somebody rated a lens.
    pub(super) fn follow_rating(&mut self, name: &LensName) {
        let Some(key) = self.lenses.get(name).and_then(DeclaredLens::key) else { return };
        if let Some(entry) = self.entry(&key) {
            self.history.set_rating_milli(entry, self.rating_milli(&key));
        }
    }

    /// The place in the document of the first group that declares these files.
    fn group_index(&self, key: &LensKey) -> u16 {
        let name = self.lenses.names(key).next();
        let groups = self.document.iter().flat_map(|document| &document.groups);
        let at = name.and_then(|name| groups.map(|group| &group.name).position(|group| *group == name.0));
        at.and_then(|at| u16::try_from(at).ok()).unwrap_or(0)
    }

    /// What is declared `Pinned` beyond what there is room for can never be in memory beside the others. Where workers share,
    /// each is assigned no more than it has room for, and what is declared may be more than one of them holds.
    pub(super) fn refuse_what_cannot_be_pinned(&mut self) {
        if self.advice.share().is_some() {
            return;
        }
        let budget = self.coming_limits().lens_bytes;
        let mut pinned: Vec<(Reverse<u32>, &LensName, &DeclaredLens)> = self
            .lenses
            .iter()
            .filter(|(_, lens)| lens.lens.residency == LensResidency::Pinned)
            .map(|(name, lens)| (Reverse(lens.lens.priority), name, lens))
            .collect();
        pinned.sort_by_key(|(rank, name, _)| (*rank, *name));
        let mut counted = BTreeSet::new();
        let mut taken = 0u64;
        let mut refused = Vec::new();
        for (_, name, lens) in pinned {
            let (Some(key), Some(ready)) = (lens.key(), lens.stage.ready()) else { continue };
            if counted.contains(&key) {
                continue;
            }
            match taken.checked_add(ready.bytes).filter(|sum| *sum <= budget) {
                Some(sum) => {
                    taken = sum;
                    counted.insert(key);
                }
                None => refused.push((name.clone(), ready.bytes)),
            }
        }
        for (name, bytes) in refused {
            let message = format!(
                "the lens takes {bytes} bytes, and pinned lenses of the same or a higher priority {taken}, of a lens \
                 budget of {budget}; raise spec.memory.lensBudget, or pin fewer"
            );
            let failure = Failure::new(FailureReason::DoesNotFit, message);
            tracing::warn!(
                group = name.0,
                lens = name.1,
                error = failure.message,
                "a pinned lens does not fit"
            );
            self.lenses.update(&name, |lens| lens.stage = Self::failed(failure, 1));
        }
    }

    pub(super) fn seconds(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.began).as_secs_f64()
    }
}
