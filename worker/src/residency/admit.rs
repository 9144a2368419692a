//! After every message: who is let in, what is loaded for those who wait, whether the base changes.
//!
//! Requests are looked at in the order they came. One whose lens has to be loaded does not hold up those behind it whose
//! lenses are there, unless it has waited for memory for [`PATIENCE`]: then nobody overtakes it any more.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;
use turret_crds::document::{BaseKey, EvictionRule, SwitchingRule};
use turret_crds::model_name::ModelName;
use turret_crds::placement::GroupResidency;
use turret_crds::report::EvictionReason;

use super::failure::Failure;
use super::orders::epoch_seconds;
use super::owner::{Owner, Permitted, Span, Stage, Standing, Turn, Waiter, Why};
use super::plan::{CannotFit, Inventory, Leaving, Order, Plan, Until, Wanted, can_switch};
use super::resolve::ResolvedLens;
use super::switch::{Decision, Situation, Waiting, decide};
use super::table::{LensKey, Phase};
use super::{Measured, Outcome, Permit, PermittedLens, Refusal};
use crate::engine::handle::EngineConfig;
use crate::engine::memory::BaseNeeds;

/// How long others may overtake a request that waits for lens memory.
const PATIENCE: Duration = Duration::from_secs(2);
/// Lenses that are loaded at a time.
pub(super) const LOADS_AT_ONCE: usize = 2;
/// How soon to look again at what is overdue and could not be done.
const OVERDUE: Duration = Duration::from_millis(50);
/// How far back the rate of admissions is measured.
const RATE_WINDOW: Duration = Duration::from_secs(10);

/// What a request needs, as far as it is known.
enum Needs {
    /// Its base, and its lens once that is found good.
    Base { key: BaseKey, lens: LensNeeds },
    /// Nothing it could be given.
    Refused(Refusal),
}

enum LensNeeds {
    None,
    Resolving,
    /// Its files, which are to be fetched.
    Files,
    Key(LensKey),
}

/// What waiting requests come down to.
#[derive(Default)]
pub(super) struct Demand {
    /// Oldest request over each base that is not active.
    others: BTreeMap<BaseKey, Instant>,
    /// Requests over the active base that could not be let in.
    queued: u32,
    /// Of these, requests that waited before it became active and need nothing that is far away.
    promised: u32,
    /// Lenses that requests wait for.
    pub(super) lenses: BTreeSet<LensKey>,
}

impl Owner {
    /// Does all that can be done now, and tells when time alone may change something.
    pub(super) fn pump(&mut self) -> Option<Instant> {
        let now = Instant::now();
        self.recheck(now);
        self.reconfigure(now);
        self.end_leases(now);
        let demand = self.admit(now);
        self.bring_ahead(&demand, now);
        self.warm_up(&demand, now);
        // What somebody waits for is known by now.
        self.start_resolutions(now);
        let wake = self.turn_base(&demand, now);
        self.tidy();
        self.sweep(now);
        self.next_wake(wake)
    }

    /// Whether nothing runs and nothing waits.
    pub(super) fn is_idle(&self) -> bool {
        self.permits.is_empty() && self.waiters.is_empty()
    }

    fn next_wake(&self, wake: Option<Instant>) -> Option<Instant> {
        let hold = self.hold();
        let given_up = self.waiters.values().next().map(|w| w.since + hold);
        let draining = match &self.turn {
            Turn::Draining { until, .. } => Some(*until),
            _ => None,
        };
        let limits =
            (self.wanted_limits.is_some() && self.reconfiguring.is_none()).then_some(self.reconfigure_at);
        let times = self.resolve_at.into_iter().chain(wake).chain(given_up).chain(draining).chain(limits);
        let lease = self.leases.next_end().map(|end| self.began + end);
        let sweep = self.eviction_rule().sweep.map(|_| self.sweep_at);
        let times = times.chain(lease).chain(sweep).chain(self.warmup_ends());
        let next = times.chain([self.recheck_at]).min()?;
        // A time that has passed and changed nothing waits for something else; it must not make a busy loop.
        let now = Instant::now();
        Some(if next > now { next } else { now + OVERDUE })
    }

    fn hold(&self) -> Duration {
        let seconds = self.document.as_ref().map_or(300, |d| d.admission.hold_seconds);
        Duration::from_secs(u64::from(seconds))
    }

    /// Rows that may be admitted: a batch, and a few that are ready to take a place that becomes free.
    fn places(&self) -> usize {
        let rows = self.limits.max_running_rows as usize;
        rows + (rows / 4).max(1)
    }

    /// Lets in whom it can, refuses whom it must, starts loads for the others.
    fn admit(&mut self, now: Instant) -> Demand {
        let mut demand = Demand::default();
        let mut closed = false;
        let numbers: Vec<u64> = self.waiters.keys().copied().collect();
        let hold = self.hold();
        for number in numbers {
            let waiter = &self.waiters[&number];
            if waiter.reply.is_closed() {
                self.waiters.remove(&number);
                continue;
            }
            let (since, again, model) = (waiter.since, waiter.again, waiter.model.clone());
            let (key, lens) = match self.needs(&model, now) {
                // What passes by itself does not end a row that was preempted.
                Needs::Refused(Refusal::Failed { failure, .. }) if again && failure.reason.is_retryable() => {
                    continue;
                }
                Needs::Refused(refusal) => {
                    self.refuse(number, refusal);
                    continue;
                }
                Needs::Base { key, lens } => (key, lens),
            };
            match &lens {
                LensNeeds::Key(lens) => self.count_request(number, lens, now),
                LensNeeds::Files => {
                    let name = (model.group.clone(), model.lens.clone().unwrap_or_default());
                    self.ask_for_files(&name, now);
                }
                LensNeeds::None | LensNeeds::Resolving => {}
            }
            if now >= since + hold && !again {
                let what = match (&self.table.active, &lens) {
                    (Some(active), _) if *active != key => format!("the base of `{}`", model.group),
                    (_, LensNeeds::None) => "a place in the batch".to_owned(),
                    _ => format!("the lens `{model}`"),
                };
                let retry_after = self.retry_after();
                self.refuse(number, Refusal::TimedOut { what, waited: now - since, retry_after });
                continue;
            }
            if self.table.active.as_ref() != Some(&key) {
                let oldest = demand.others.entry(key).or_insert(since);
                *oldest = since.min(*oldest);
                continue;
            }
            let steady = matches!(self.turn, Turn::Steady);
            let admitted = steady
                && !closed
                && self.permits.len() < self.places()
                && self.let_in(number, &key, &lens, &demand.lenses, &mut closed, now);
            if !admitted {
                demand.queued += 1;
                let known = !matches!(lens, LensNeeds::Resolving | LensNeeds::Files);
                demand.promised += u32::from(known && since <= self.active_since);
                if let LensNeeds::Key(lens) = lens {
                    demand.lenses.insert(lens);
                }
            }
        }
        demand
    }

    fn refuse(&mut self, number: u64, refusal: Refusal) {
        if let Some(waiter) = self.waiters.remove(&number) {
            let _ = waiter.reply.send(Err(refusal));
        }
    }

    fn needs(&self, model: &ModelName, now: Instant) -> Needs {
        let failed = |what: String, failure: &Failure, retry_at: Option<Instant>| {
            let retry_after = retry_at.map_or(RETRY_AFTER_FAILURE, |at| at.saturating_duration_since(now));
            let retry_after = retry_after.max(Duration::from_secs(1));
            Needs::Refused(Refusal::Failed { what, failure: failure.clone(), retry_after })
        };
        let base = self.bases.iter().find(|(_, b)| b.groups.contains(&model.group));
        let Some((key, base)) = base else {
            return match self.document {
                Some(_) => Needs::Refused(Refusal::Unknown(model.to_string())),
                // Nothing is known yet; the document is on its way.
                None => Needs::Refused(Refusal::Draining),
            };
        };
        // What is active goes on until the declared base can take over.
        if let Some((active, declared)) = self.declared_active()
            && declared != key
            && (self.is_servable(declared) || self.table.active.as_ref() != Some(key))
        {
            let (group, active) = (model.group.clone(), active.to_owned());
            return Needs::Refused(Refusal::NotActive { group, active });
        }
        let lens = match &model.lens {
            None => LensNeeds::None,
            Some(name) => match self.lenses.get(&(model.group.clone(), name.clone())) {
                None => return Needs::Refused(Refusal::Unknown(model.to_string())),
                Some(declared) => match declared.stage.standing() {
                    Standing::Failed { failure, retry_at } => {
                        return failed(model.to_string(), failure, retry_at);
                    }
                    Standing::Open => LensNeeds::Resolving,
                    Standing::Ready(_) => {
                        let key = declared.key().expect("it is ready");
                        let is_here = self.table.lenses.contains_key(&key) || self.has_files(&key);
                        match is_here && !declared.is_claim() {
                            true => LensNeeds::Key(key),
                            false => LensNeeds::Files,
                        }
                    }
                },
            },
        };
        match base.stage.standing() {
            Standing::Failed { failure, retry_at } => failed(model.group.clone(), failure, retry_at),
            Standing::Open => Needs::Base { key: key.clone(), lens: LensNeeds::Resolving },
            Standing::Ready(_) => Needs::Base { key: key.clone(), lens },
        }
    }

    /// Gives a permit if everything is there; otherwise sees to it that it comes.
    fn let_in(
        &mut self,
        number: u64,
        base: &BaseKey,
        lens: &LensNeeds,
        protected: &BTreeSet<LensKey>,
        closed: &mut bool,
        now: Instant,
    ) -> bool {
        let lens = match lens {
            LensNeeds::Resolving | LensNeeds::Files => return false,
            LensNeeds::None => None,
            LensNeeds::Key(key) if self.table.has_lens(key) => Some(key.clone()),
            LensNeeds::Key(key) => {
                let since = self.waiters[&number].since;
                if !self.fetch_lens(number, key, protected, now) && now >= since + PATIENCE {
                    *closed = true;
                }
                return false;
            }
        };
        let waiter = self.waiters.remove(&number).expect("the caller found it");
        self.grant(number, waiter, base, lens, now);
        true
    }

    /// Starts loading a lens, or what must leave before. False when it must wait for rows to end.
    fn fetch_lens(
        &mut self,
        number: u64,
        key: &LensKey,
        protected: &BTreeSet<LensKey>,
        now: Instant,
    ) -> bool {
        let Some(resolved) = self.resolved(key).cloned() else { return true };
        if let Some(held) = self.table.lenses.get(key) {
            return held.phase != Phase::Leaving;
        }
        let wanted = Wanted::Lens { key: key.clone(), bytes: resolved.bytes, instead_of_others: true };
        let short = match self.plan(&wanted, protected, now) {
            Ok(plan) => {
                self.carry_out(plan, key, resolved, LOADS_AT_ONCE);
                return true;
            }
            Err(short) => short,
        };
        let retry_after = match short.until {
            Until::Idle => return false,
            Until::Released => self.next_release(now).unwrap_or(RETRY_AFTER_FAILURE),
            Until::Never => RETRY_AFTER_FAILURE,
        };
        let failure = Failure::new(turret_crds::condition::FailureReason::DoesNotFit, short.to_string());
        let what = self.waiters[&number].model.to_string();
        self.refuse(number, Refusal::Failed { what, failure, retry_after });
        true
    }

    /// Lets leave who must, and loads the lens if there is room for it already, and not too much on its way.
    pub(super) fn carry_out(&mut self, plan: Plan, key: &LensKey, resolved: ResolvedLens, at_once: usize) {
        self.evict_lenses(plan.evict_lenses, &plan.why);
        let loading = self.table.lenses.values().filter(|h| h.phase == Phase::Loading).count();
        let fits = self.table.lens_bytes() + resolved.bytes <= self.budgets().lens_bytes;
        if plan.load && fits && loading < at_once {
            self.load_lens(key.clone(), resolved);
        }
    }

    /// Plans with the policy that is in force.
    pub(super) fn plan(
        &self,
        wanted: &Wanted,
        protected: &BTreeSet<LensKey>,
        now: Instant,
    ) -> Result<Plan, CannotFit> {
        let policy = self.eviction_rule().policy;
        let order =
            Order { history: &self.history, ranking: self.history.ranking(policy, self.seconds(now)) };
        Inventory { table: &self.table, budgets: self.budgets(), order, protected }.plan(wanted)
    }

    pub(super) fn eviction_rule(&self) -> EvictionRule {
        self.document.as_ref().map_or_else(EvictionRule::default, |document| document.eviction)
    }

    /// Remembers the request for what the policies go by; once, and before anything leaves for it.
    fn count_request(&mut self, number: u64, key: &LensKey, now: Instant) {
        let Some(waiter) = self.waiters.get_mut(&number).filter(|waiter| !waiter.counted) else { return };
        waiter.counted = true;
        if let Some(entry) = self.entry(key) {
            let (seconds, budget) = (self.seconds(now), self.budgets().lens_bytes);
            self.history.served(entry, seconds, budget);
        }
    }

    /// A content that is declared; by a name under which its files are here, if there is one.
    pub(super) fn resolved(&self, key: &LensKey) -> Option<&ResolvedLens> {
        let mut known = self.lenses.names(key).filter_map(|name| self.lenses.get(name)?.stage.ready());
        let first = known.next()?;
        let is_here = |lens: &ResolvedLens| lens.files.here().is_some();
        if is_here(first) { Some(first) } else { known.find(|lens| is_here(lens)).or(Some(first)) }
    }

    /// Whether the files of a content are on this machine.
    pub(super) fn has_files(&self, key: &LensKey) -> bool {
        self.resolved(key).is_some_and(|lens| lens.files.here().is_some())
    }

    fn grant(&mut self, number: u64, waiter: Waiter, base: &BaseKey, lens: Option<LensKey>, now: Instant) {
        let Some(resolved) = self.bases.get(base).and_then(|b| b.stage.ready()) else { return };
        let base_digest = resolved.files.digest.clone();
        let model = waiter.model;
        // Told only to those who waited for it.
        let waited = |span: Option<&Span>| {
            span.filter(|(_, end)| *end >= waiter.since).map(|(start, end)| *end - *start)
        };
        let switched = self.last_switch.as_ref().filter(|(to, _)| to == base).map(|(_, span)| span);
        let switched_in = waited(switched);
        let loaded_in = lens.as_ref().and_then(|key| waited(self.last_loads.get(key)));
        let permitted_lens = lens.as_ref().map(|key| {
            let name = (model.group.clone(), model.lens.clone().unwrap_or_default());
            let scale = self.lenses.get(&name).map_or(1000, |l| l.lens.scale_milli);
            PermittedLens {
                id: self.table.lenses[key].id.expect("it is resident"),
                scale: scale as f32 / 1000.0,
                digest: key.digest.clone(),
            }
        });
        self.uses += 1;
        if let Some(held) = self.table.bases.get_mut(base) {
            (held.users, held.last_used) = (held.users + 1, self.uses);
        }
        if let Some(held) = lens.as_ref().and_then(|key| self.table.lenses.get_mut(key)) {
            held.users += 1;
        }
        if let Some(name) = &model.lens {
            self.lenses.count(&(model.group.clone(), name.clone()), |counts| {
                counts.active_rows += 1;
                counts.last_used = Some(epoch_seconds());
            });
        }
        self.permits.insert(number, Permitted { model, base: base.clone(), lens });
        self.grants.push_back(now);
        while self.grants.front().is_some_and(|&first| first + RATE_WINDOW < now) || self.grants.len() > 1024
        {
            self.grants.pop_front();
        }
        let permit = Permit {
            base: self.base_ids[base],
            base_key: base.clone(),
            base_digest,
            lens: permitted_lens,
            loaded_in,
            switched_in,
            number: Some(number),
            outcome: Outcome::Cancelled,
            measured: Measured::default(),
            owner: self.messages.clone(),
        };
        // Whoever went away in the meantime drops the permit, which releases it.
        let _ = waiter.reply.send(Ok(permit));
    }

    /// Decides about the base, and acts on it.
    fn turn_base(&mut self, demand: &Demand, now: Instant) -> Option<Instant> {
        match &self.turn {
            Turn::Switching { .. } => return None,
            Turn::Draining { to, until, why } => {
                let (to, until, why) = (to.clone(), *until, *why);
                if !self.is_servable(&to) {
                    self.turn = Turn::Steady;
                    return Some(now);
                } else if !self.is_still_wanted(&to, why, demand) {
                    tracing::info!(to = %to, ?why, "the other base is not wanted any more, the active one stays");
                    self.turn = Turn::Steady;
                    self.look_ahead = true;
                    // Nobody was let in while it drained.
                    return Some(now);
                } else if self.permits.is_empty() {
                    self.start_switch(&to);
                } else if now >= until {
                    self.preempt_rows(now);
                }
                return None;
            }
            Turn::Steady => {}
        }
        if let Some(to) = self.asked_base.take().filter(|to| self.table.active.as_ref() != Some(to)) {
            self.drain_for(to, Why::Asked, now);
            return None;
        }
        let declared = self.declared_active().map(|(_, key)| key.clone());
        if let Some(to) = declared.filter(|to| self.is_servable(to) && self.table.active.as_ref() != Some(to))
        {
            self.drain_for(to, Why::Declared, now);
            return None;
        }
        let situation = Situation {
            active: self.table.active.clone().filter(|key| self.bases.contains_key(key)),
            active_since_ms: self.ms(self.active_since),
            rows: self.permits.len() as u32,
            queued: demand.queued,
            promised: demand.promised,
            waiting: demand
                .others
                .iter()
                .filter(|(base, _)| self.is_servable(base))
                .map(|(base, since)| Waiting { base: base.clone(), since_ms: self.ms(*since) })
                .collect(),
            fallback: self.fallback(),
            now_ms: self.ms(now),
            rule: self.document.as_ref()?.switching,
        };
        match decide(&situation) {
            Decision::Stay { until_ms } => {
                self.drop_undeclared_active();
                let first = situation.waiting.iter().min_by_key(|w| (w.since_ms, &w.base));
                if let Some(next) = first.map(|w| w.base.clone()).or_else(|| self.preloaded_base()) {
                    self.bring_beside(&next);
                }
                until_ms.map(|ms| self.began + Duration::from_millis(ms))
            }
            Decision::Drain { to } => {
                let why = if situation.active.is_some() { Why::Waiters } else { Why::Undeclared };
                self.drain_for(to, why, now);
                None
            }
            Decision::Switch { to } => {
                self.start_switch(&to);
                None
            }
        }
    }

    fn is_servable(&self, key: &BaseKey) -> bool {
        self.bases.get(key).is_some_and(|base| base.stage.ready().is_some())
    }

    fn is_still_wanted(&self, to: &BaseKey, why: Why, demand: &Demand) -> bool {
        match (why, self.declared_active()) {
            // What the document says is stronger than who waits, and than what was asked before it.
            (_, Some((_, declared))) => declared == to,
            (Why::Waiters, None) => demand.others.contains_key(to),
            (Why::Declared, None) => false,
            (Why::Asked, None) => true,
            (Why::Undeclared, None) => {
                self.table.active.as_ref().is_none_or(|active| !self.bases.contains_key(active))
            }
        }
    }

    /// The group whose base the document wants active, and the base; `None` where requests decide.
    pub(super) fn declared_active(&self) -> Option<(&str, &BaseKey)> {
        let document = self.document.as_ref()?;
        let group = document.group(document.active_group.as_deref()?)?;
        Some((&group.name, &group.base.key))
    }

    /// The next base that is to be in memory before a request needs it, and is not.
    fn preloaded_base(&self) -> Option<BaseKey> {
        let groups = self.document.iter().flat_map(|document| &document.groups);
        let mut preloaded = groups.filter(|group| group.residency == GroupResidency::Preloaded);
        let wanted = |key: &BaseKey| {
            self.is_servable(key) && !self.table.bases.contains_key(key) && !self.not_beside.contains(key)
        };
        preloaded.find(|group| wanted(&group.base.key)).map(|group| group.base.key.clone())
    }

    /// Admits nothing more over the active base, and switches when what runs has ended.
    fn drain_for(&mut self, to: BaseKey, why: Why, now: Instant) {
        let rule = self.document.as_ref().map_or_else(SwitchingRule::default, |document| document.switching);
        tracing::info!(to = %to, ?why, rows = self.permits.len(), "draining for a switch of base");
        let until = now + Duration::from_secs(u64::from(rule.drain_seconds));
        self.turn = Turn::Draining { to: to.clone(), until, why };
        if self.permits.is_empty() {
            self.start_switch(&to);
        }
    }

    /// The active base leaves as soon as nothing declares it and nothing runs over it. It could only be of use
    /// to a document that does not exist.
    fn drop_undeclared_active(&mut self) {
        let Some(key) = self.table.active.clone().filter(|key| !self.bases.contains_key(key)) else { return };
        let is_idle = self.permits.is_empty() && self.table.bases.get(&key).is_some_and(|h| h.users == 0);
        if is_idle
            && self.table.has_base(&key)
            && self.table.lenses_over(&key).all(|l| self.table.has_lens(l))
        {
            // From now on it is a parked base that leaves; whoever declares it again waits until it is back.
            self.table.active = None;
            self.drop_base(key, "no longer declared");
        }
    }

    /// The base to make active when none is and nobody asks: the one that it is advised to prefer, the default group's, or
    /// while that one fails the next.
    fn fallback(&self) -> Option<BaseKey> {
        let document = self.document.as_ref()?;
        if let Some((_, declared)) = self.declared_active() {
            return self.is_servable(declared).then(|| declared.clone());
        }
        let default = &document.default_group()?.base.key;
        if let Some(preferred) = self.advice.base().filter(|key| self.is_servable(key)) {
            return Some(preferred.clone());
        }
        match &self.bases.get(default)?.stage {
            Stage::Ready(_) => Some(default.clone()),
            Stage::Resolving => None,
            Stage::Failed { .. } => {
                self.bases.iter().find(|(_, b)| b.stage.ready().is_some()).map(|(key, _)| key.clone())
            }
        }
    }

    /// Preempts rows that did not end within the drain; they come back as waiters. Some may have been admitted in this very
    /// moment, so it is repeated.
    fn preempt_rows(&mut self, now: Instant) {
        tracing::info!(rows = self.permits.len(), "rows did not end within the drain and are preempted");
        if let Turn::Draining { until, .. } = &mut self.turn {
            *until = now + Duration::from_millis(200);
        }
        let engine = self.engine.clone();
        tokio::spawn(async move { engine.preempt_rows().await });
    }

    fn working_bytes(&self, key: &BaseKey, limits: &EngineConfig) -> u64 {
        let Some(base) = self.bases.get(key).and_then(|b| b.stage.ready()) else { return 0 };
        let needs = BaseNeeds::of(&base.config, base.layout.dtype, limits);
        needs.workspace_bytes + u64::from(needs.min_blocks) * needs.block_bytes
    }

    /// Loads the next base while the active one goes on, where both fit.
    fn bring_beside(&mut self, next: &BaseKey) {
        if self.table.bases.contains_key(next) || self.not_beside.contains(next) {
            return;
        }
        let Some(base) = self.bases.get(next).and_then(|b| b.stage.ready()).cloned() else { return };
        let active = self.table.active.as_ref().map_or(0, |a| self.working_bytes(a, &self.limits));
        let wanted = Wanted::Base {
            key: next.clone(),
            bytes: base.layout.bytes,
            working_bytes: active.max(self.working_bytes(next, &self.limits)),
            instead_of_active: false,
        };
        match self.plan(&wanted, &BTreeSet::new(), Instant::now()) {
            Ok(plan) if plan.evict_bases.is_empty() => self.preload_base(next.clone(), base),
            // Parked bases leave at the switch, not before.
            _ => {
                self.not_beside.insert(next.clone());
            }
        }
    }

    fn start_switch(&mut self, to: &BaseKey) {
        let Some(base) = self.bases.get(to).and_then(|b| b.stage.ready()).cloned() else { return };
        let (bytes, working_bytes) = (base.layout.bytes, self.working_bytes(to, &self.limits));
        // As the engine has it.
        let room = self.limits.device_bytes.saturating_sub(self.limits.lens_bytes);
        let can_switch = can_switch(&self.table, room, to, bytes.saturating_add(working_bytes));
        if !can_switch || self.reconfiguring.is_some() {
            // The end of what is in the way is a message, and this is looked at again.
            return;
        }
        let wanted = Wanted::Base { key: to.clone(), bytes, working_bytes, instead_of_active: true };
        let free_first = match self.plan(&wanted, &BTreeSet::new(), Instant::now()) {
            Ok(plan) => plan.evict_bases,
            // The engine says exactly by how much.
            Err(_) => Vec::new(),
        };
        self.switch_to(to.clone(), base, &free_first);
    }

    /// What leaves so that budgets which became smaller are met.
    pub(super) fn shed(&self) -> Plan {
        let working_bytes = match &self.table.active {
            Some(active) => self.working_bytes(active, self.coming_limits()),
            None => 0,
        };
        self.plan(&Wanted::Less { working_bytes }, &BTreeSet::new(), Instant::now()).unwrap_or_default()
    }

    /// What nothing declared refers to leaves, and what is too much after a smaller budget.
    fn tidy(&mut self) {
        if !self.untidy || matches!(self.turn, Turn::Switching { .. }) {
            return;
        }
        self.untidy = false;
        let shed = self.shed();
        self.evict_lenses(shed.evict_lenses, &shed.why);
        for key in shed.evict_bases {
            self.drop_base(key, &shed.why);
        }
        let resolving: BTreeSet<&BaseKey> = self
            .lenses
            .iter()
            .filter(|(_, l)| matches!(l.stage.standing(), Standing::Open))
            .map(|(_, l)| &l.base)
            .collect();
        let orphans: Vec<LensKey> = self
            .table
            .lenses
            .iter()
            .filter(|(key, held)| {
                held.users == 0 && held.phase == Phase::Resident && !self.lenses.declares(key)
            })
            // What is being resolved may turn out to be the same files.
            .filter(|(key, _)| !resolving.contains(&key.base))
            .map(|(key, _)| key.clone())
            .collect();
        for key in orphans {
            let message = "no longer declared, or not with these files".into();
            self.evict_lens(Leaving { key, reason: EvictionReason::Undeclared, message }, "");
        }
        self.forget_entries();
        self.refuse_what_cannot_be_pinned();
        let unwanted: Vec<BaseKey> = self
            .table
            .bases
            .iter()
            .filter(|(key, held)| {
                held.phase == Phase::Resident
                    && held.users == 0
                    && self.table.active.as_ref() != Some(key)
                    && !self.bases.contains_key(key)
                    && self.table.lenses_over(key).all(|l| self.table.has_lens(l))
            })
            .map(|(key, _)| key.clone())
            .collect();
        for key in unwanted {
            self.drop_base(key, "no longer declared");
        }
    }
}

/// When to come again after a failure that time alone does not heal.
const RETRY_AFTER_FAILURE: Duration = Duration::from_secs(30);
