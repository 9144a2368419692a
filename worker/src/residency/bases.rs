//! Bases that come and go, and the switch from one to another.

use std::sync::Arc;

use tokio::time::Instant;
use turret_crds::document::BaseKey;
use turret_crds::report::EvictionReason;

use super::loader::{LoadError, LoadFailure, OnPercent, SwitchOrder, SwitchOutcome, Victim};
use super::owner::{Owner, Span, Stage, Turn};
use super::resolve::ResolvedBase;
use super::table::{Held, Phase};
use super::work::Event;
use crate::engine::handle::BaseId;

impl Owner {
    fn on_base_percent(&self, key: &BaseKey) -> OnPercent {
        let key = key.clone();
        self.on_percent(move |percent| Event::BasePercent { key: key.clone(), percent })
    }

    fn hold_base(&mut self, key: &BaseKey, bytes: u64) {
        self.uses += 1;
        let held = Held { bytes, phase: Phase::Loading, users: 0, last_used: self.uses };
        self.table.bases.insert(key.clone(), held);
        if let Some(base) = self.bases.get_mut(key) {
            base.percent = 0;
        }
    }

    /// Loads a base beside the active one, ahead of the switch.
    pub(super) fn preload_base(&mut self, key: BaseKey, base: Arc<ResolvedBase>) {
        tracing::info!(base = %key, bytes = base.layout.bytes, "loading a base beside the active one");
        self.hold_base(&key, base.layout.bytes);
        let loader = self.loader.clone();
        let on_percent = self.on_base_percent(&key);
        self.spawn(async move {
            let result = loader.load_base(base, on_percent).await;
            Event::BaseLoaded { key, result }
        });
    }

    pub(super) fn on_base_loaded(&mut self, key: &BaseKey, result: Result<BaseId, LoadError>) {
        match result {
            Ok(id) => {
                self.base_ids.insert(key.clone(), id);
                if let Some(held) = self.table.bases.get_mut(key) {
                    held.phase = Phase::Resident;
                }
            }
            Err(LoadError::NoRoom(short)) => {
                tracing::info!(base = %key, error = short.message, "no room beside the active base");
                self.table.bases.remove(key);
                self.not_beside.insert(key.clone());
            }
            Err(error) => {
                self.table.bases.remove(key);
                self.base_load_failed(key, error.into());
            }
        }
    }

    fn base_load_failed(&mut self, key: &BaseKey, error: LoadFailure) {
        let Some(base) = self.bases.get_mut(key) else { return };
        self.next_token += 1;
        self.resolve_at = Some(Instant::now());
        base.token = self.next_token;
        base.in_flight = false;
        base.stage = match error {
            LoadFailure::Changed => Stage::Resolving,
            LoadFailure::Failed(failure) => {
                base.failures += 1;
                tracing::warn!(base = %key, reason = %failure.reason, error = failure.message, "base failed to load");
                Self::failed(failure, base.failures)
            }
        };
    }

    fn victim(&self, key: &BaseKey) -> Option<Victim> {
        let id = *self.base_ids.get(key)?;
        let lenses = self
            .table
            .lenses_over(key)
            .filter_map(|lens| Some((lens.clone(), self.table.lenses.get(lens)?.id?)))
            .collect();
        let base = self.bases.get(key).and_then(|b| b.stage.ready()).cloned();
        Some(Victim { key: key.clone(), id, lenses, base })
    }

    /// Frees a parked base.
    pub(super) fn drop_base(&mut self, key: BaseKey, why: &str) {
        let Some(victim) = self.victim(&key) else { return };
        tracing::info!(base = %key, why, "base leaves");
        self.leaves(&key);
        let loader = self.loader.clone();
        self.spawn(async move {
            let (outcome, failure) = loader.remove_base(victim).await;
            Event::BaseGone { key, outcome, failure }
        });
    }

    fn leaves(&mut self, key: &BaseKey) {
        if let Some(held) = self.table.bases.get_mut(key) {
            held.phase = Phase::Leaving;
        }
        for (lens, held) in &mut self.table.lenses {
            if lens.base == *key {
                held.phase = Phase::Leaving;
                self.lenses.mark_key(lens);
            }
        }
    }

    /// Starts the switch to a base. Nothing runs, nothing leaves, and no lens is on its way; other bases may be.
    pub(super) fn switch_to(&mut self, to: BaseKey, base: Arc<ResolvedBase>, free_first: &[BaseKey]) {
        let active = self.table.active.clone();
        let mut parked: Vec<(u64, BaseKey)> = self
            .table
            .bases
            .iter()
            .filter(|(k, h)| **k != to && Some(*k) != active.as_ref() && h.phase == Phase::Resident)
            .filter(|(k, _)| !free_first.contains(k))
            .map(|(k, h)| (h.last_used, k.clone()))
            .collect();
        parked.sort();
        let order = SwitchOrder {
            resident: self.base_ids.get(&to).copied().filter(|_| self.table.has_base(&to)),
            from: active.as_ref().and_then(|k| self.victim(k)),
            free_first: free_first.iter().filter_map(|k| self.victim(k)).collect(),
            parked: parked.iter().filter_map(|(_, k)| self.victim(k)).collect(),
            base: base.clone(),
            to: to.clone(),
        };
        tracing::info!(to = %to, from = ?active.as_ref().map(ToString::to_string), parked = order.resident.is_some(), "switching base");
        if order.resident.is_none() {
            self.hold_base(&to, base.layout.bytes);
        }
        self.turn = Turn::Switching { to: to.clone(), since: Instant::now() };
        let loader = self.loader.clone();
        let on_percent = self.on_base_percent(&to);
        self.spawn(async move { Event::Switched(loader.switch(order, on_percent).await) });
    }

    /// Takes what left out of the table.
    pub(super) fn remove(&mut self, outcome: &SwitchOutcome) {
        for key in &outcome.removed_lenses {
            self.note_eviction(key, EvictionReason::Base, "its base left the device".into());
            self.lens_gone(key);
        }
        for key in &outcome.removed_bases {
            self.table.bases.remove(key);
            self.base_ids.remove(key);
        }
    }

    pub(super) fn on_switched(&mut self, outcome: SwitchOutcome) {
        let Turn::Switching { to, since } = std::mem::replace(&mut self.turn, Turn::Steady) else { return };
        self.remove(&outcome);
        for (key, id) in &outcome.installed {
            self.base_ids.insert(key.clone(), *id);
            if let Some(held) = self.table.bases.get_mut(key) {
                held.phase = Phase::Resident;
            } else if let Some(base) = self.bases.get(key).and_then(|b| b.stage.ready()).cloned() {
                self.hold_base(key, base.layout.bytes);
                self.table.bases.get_mut(key).expect("just held").phase = Phase::Resident;
            }
        }
        // It was on its way and did not come. Others that are may still.
        self.table.bases.retain(|key, held| *key != to || held.phase != Phase::Loading);
        let before = std::mem::replace(&mut self.table.active, outcome.active);
        let now = Instant::now();
        self.active_since = now;
        self.not_beside.clear();
        match outcome.error {
            None => {
                let ms = (now - since).as_millis() as u64;
                tracing::info!(base = %to, ms, loaded = outcome.loaded, "base is active");
                self.switches += u64::from(before.is_some());
                if before.is_some() {
                    self.last_switch = Some((to.clone(), (since, now) as Span));
                }
                self.begin_warmup(now);
                if let Some(base) = self.bases.get_mut(&to) {
                    base.failures = 0;
                }
            }
            Some(failure) => self.base_load_failed(&to, failure),
        }
    }
}
