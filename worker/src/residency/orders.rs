//! What somebody asks by hand, over the control port: load, evict, pin, lease, switch, drain. What the document declares may
//! be carried out sooner than by itself, not contradicted.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;
use tokio::time::Instant;
use turret_crds::group::LensResidency;
use turret_crds::report::{EvictionReason, LeaseReport};

use super::declared::{DeclaredLens, LensName};
use super::failure::Failure;
use super::lease::{Lease, LeaseError};
use super::owner::{Owner, Stage, Standing};
use super::plan::Leaving;
use super::table::{LensKey, Phase};

/// What somebody asks.
#[derive(Clone, Debug)]
pub enum Order {
    /// That a lens is in memory, before a request needs it.
    Load {
        /// Group and name.
        lens: LensName,
    },
    /// That a lens leaves memory.
    Evict {
        /// Group and name.
        lens: LensName,
    },
    /// That a lens stays in memory until the worker restarts, or no longer does.
    Pin {
        /// Group and name.
        lens: LensName,
        /// Whether it does.
        pinned: bool,
    },
    /// That a lens stays in memory for some time.
    AcquireLease {
        /// Group and name.
        lens: LensName,
        /// Who asks, in their own words.
        holder: Option<String>,
        /// Higher comes first where there is no room for all.
        priority: u32,
        /// How long.
        ttl: Duration,
    },
    /// That it stays longer.
    RenewLease {
        /// Number of the lease.
        id: u64,
        /// How long from now.
        ttl: Duration,
    },
    /// That it need not stay any more.
    ReleaseLease {
        /// Number of the lease.
        id: u64,
    },
    /// That what users think of a lens's answer counts.
    Rate {
        /// Group and name.
        lens: LensName,
        /// From 0, useless, to 1000, perfect.
        score_milli: u32,
    },
    /// That the base of a group becomes the active one.
    Switch {
        /// As clients call it.
        group: String,
    },
    /// That what failed is looked at again at once, and pauses begin anew.
    Retry,
    /// That no new requests are taken until the worker restarts, or that they are again.
    Drain {
        /// Whether they are not.
        drained: bool,
    },
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obeyed {
    /// It is so, or begins to be.
    Done,
    /// The lease.
    Lease(LeaseReport),
}

/// Why it was not done. The texts are meant for whoever asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OrderError {
    /// No such lens or group is declared.
    #[error("`{0}` is not declared; `GET /control/v1/state` lists what is")]
    Unknown(String),
    /// No such lease runs, or it cannot be had.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// It contradicts what is declared, or what others need.
    #[error("{0}")]
    Conflict(String),
    /// It cannot be loaded.
    #[error("`{lens}` cannot be loaded: {failure}")]
    Failed {
        /// Group and name.
        lens: String,
        /// Why.
        failure: Failure,
    },
    /// The worker is leaving.
    #[error("this worker is shutting down")]
    Stopped,
}

impl Owner {
    pub(super) fn obey(&mut self, order: Order, reply: oneshot::Sender<Result<Obeyed, OrderError>>) {
        let now = Instant::now();
        let result = match order {
            Order::Load { lens } => match self.lenses.get(&lens) {
                Some(_) => {
                    self.awaited.entry(lens).or_default().push(reply);
                    self.look_ahead = true;
                    return;
                }
                None => Err(unknown(&lens)),
            },
            Order::Evict { lens } => self.evict_by_hand(&lens),
            Order::Pin { lens, pinned } => self.pin(&lens, pinned),
            Order::Rate { lens, score_milli } => match self.lenses.get(&lens) {
                Some(_) => {
                    self.lenses.count(&lens, |counts| counts.rate(score_milli));
                    self.follow_rating(&lens);
                    Ok(Obeyed::Done)
                }
                None => Err(unknown(&lens)),
            },
            Order::AcquireLease { lens, holder, priority, ttl } => {
                self.acquire_lease(lens, holder, priority, ttl, now)
            }
            Order::RenewLease { id, ttl } => {
                let since_start = now - self.began;
                let renewed = self.leases.renew(id, ttl, since_start).cloned();
                renewed.map_err(OrderError::from).map(|lease| {
                    self.leases_changed = true;
                    Obeyed::Lease(self.lease_report(id, &lease))
                })
            }
            Order::ReleaseLease { id } => self.leases.release(id).map_err(OrderError::from).map(|lease| {
                self.follow_lease(&lease.lens);
                Obeyed::Done
            }),
            Order::Switch { group } => self.switch_by_hand(&group),
            Order::Retry => Ok(self.retry(now)),
            Order::Drain { drained } => self.drain_by_hand(drained),
        };
        let _ = reply.send(result);
    }

    fn evict_by_hand(&mut self, name: &LensName) -> Result<Obeyed, OrderError> {
        let lens = self.lenses.get(name).ok_or_else(|| unknown(name))?;
        let Some((key, held)) = lens.key().and_then(|key| Some((key.clone(), self.table.lenses.get(&key)?)))
        else {
            return Ok(Obeyed::Done);
        };
        let conflict = |what: &str| Err(OrderError::Conflict(format!("`{}` {what}", written(name))));
        if held.kept {
            return conflict("is pinned or leased; unpin it, or release its leases, first");
        }
        if held.phase == Phase::Leaving {
            return Ok(Obeyed::Done);
        }
        if !held.is_idle() {
            return conflict("is in use, or on its way in; ask again when its rows have ended");
        }
        let message = "asked for over the control port".into();
        self.evict_lens(Leaving { key, reason: EvictionReason::Request, message }, "");
        Ok(Obeyed::Done)
    }

    fn pin(&mut self, name: &LensName, pinned: bool) -> Result<Obeyed, OrderError> {
        let lens = self.lenses.get(name).ok_or_else(|| unknown(name))?;
        if pinned {
            if let Stage::Ready(ready) = &lens.stage {
                self.check_room(name, ready.bytes)?;
            }
            self.pins.insert(name.clone());
        } else if lens.lens.residency == LensResidency::Pinned {
            let what =
                format!("`{}` is declared `residency: Pinned`; change it in its ModelGroup", written(name));
            return Err(OrderError::Conflict(what));
        } else {
            self.pins.remove(name);
        }
        self.follow_lease(&name.clone());
        Ok(Obeyed::Done)
    }

    fn acquire_lease(
        &mut self,
        lens: LensName,
        holder: Option<String>,
        priority: u32,
        ttl: Duration,
        now: Instant,
    ) -> Result<Obeyed, OrderError> {
        let declared = self.lenses.get(&lens).ok_or_else(|| unknown(&lens))?;
        match declared.stage.standing() {
            Standing::Failed { failure, .. } => {
                return Err(OrderError::Failed { lens: written(&lens), failure: failure.clone() });
            }
            Standing::Ready(ready) => self.check_room(&lens, ready.bytes)?,
            Standing::Open => {}
        }
        let id = self.leases.acquire(lens.clone(), holder, priority, ttl, now - self.began)?;
        self.follow_lease(&lens);
        let lease = self.leases.get(id).expect("it was just acquired");
        Ok(Obeyed::Lease(self.lease_report(id, lease)))
    }

    /// Refuses to keep more than there can be: who waits for room then would wait for ever.
    fn check_room(&self, name: &LensName, bytes: u64) -> Result<(), OrderError> {
        let key = self.lenses.get(name).and_then(DeclaredLens::key);
        let budget = self.coming_limits().lens_bytes;
        let kept: u64 = self
            .kept_contents()
            .filter(|(other, _)| Some(other) != key.as_ref())
            .map(|(_, bytes)| bytes)
            .sum();
        if kept.saturating_add(bytes) <= budget {
            return Ok(());
        }
        Err(OrderError::Conflict(format!(
            "`{}` takes {bytes} bytes and what is leased or pinned {kept}, of a lens budget of {budget}; release a \
             lease, or raise spec.memory.lensBudget",
            written(name)
        )))
    }

    /// Contents that are pinned or leased, in memory or not, and their bytes.
    fn kept_contents(&self) -> impl Iterator<Item = (LensKey, u64)> {
        let kept =
            self.lenses.iter().filter(|(name, lens)| self.is_pinned(name, lens) || self.leases.on(name) > 0);
        let contents: std::collections::BTreeMap<LensKey, u64> =
            kept.filter_map(|(_, lens)| Some((lens.key()?, lens.stage.ready()?.bytes))).collect();
        contents.into_iter()
    }

    fn switch_by_hand(&mut self, group: &str) -> Result<Obeyed, OrderError> {
        let base = self.bases.iter().find(|(_, base)| base.groups.iter().any(|g| g == group));
        let (key, base) = base.ok_or_else(|| OrderError::Unknown(group.to_owned()))?;
        if let Some((active, declared)) = self.declared_active().filter(|(_, declared)| *declared != key) {
            return Err(OrderError::Conflict(format!(
                "spec.switching.mode is Manual and declares the base of `{active}`, {declared}; change \
                 spec.switching.activeGroupName"
            )));
        }
        match base.stage.standing() {
            Standing::Ready(_) => {
                self.asked_base = Some(key.clone());
                Ok(Obeyed::Done)
            }
            Standing::Open => {
                Err(OrderError::Conflict(format!("the base of `{group}` is still being checked; ask again")))
            }
            Standing::Failed { failure, .. } => {
                Err(OrderError::Failed { lens: group.to_owned(), failure: failure.clone() })
            }
        }
    }

    fn retry(&mut self, now: Instant) -> Obeyed {
        let mut again = 0;
        for base in self.bases.values_mut().filter(|base| base.stage.has_failed()) {
            base.failures = 0;
            base.stage = std::mem::replace(&mut base.stage, Stage::Resolving).looked_at_again();
            again += 1;
        }
        // Also those that are served while their files cannot be fetched.
        let late = self.lenses.iter().filter(|(_, lens)| lens.stage.has_failed() || lens.fetch_at.is_some());
        let late: Vec<LensName> = late.map(|(name, _)| name.clone()).collect();
        again += late.len();
        for name in late {
            self.lenses.update(&name, |lens| {
                lens.failures = 0;
                lens.fetch_at = lens.fetch_at.map(|_| now);
                lens.stage = std::mem::replace(&mut lens.stage, Stage::Resolving).looked_at_again();
            });
        }
        tracing::info!(again, "what failed is looked at again, as was asked for over the control port");
        self.resolve_at = Some(now);
        Obeyed::Done
    }

    fn drain_by_hand(&mut self, drained: bool) -> Result<Obeyed, OrderError> {
        // A process that ends does not take requests again.
        if !drained && self.leaving {
            return Err(OrderError::Stopped);
        }
        if self.drained != drained {
            tracing::info!(drained, rows = self.permits.len(), "asked for over the control port");
        }
        self.drained = drained;
        Ok(Obeyed::Done)
    }

    /// Ends leases whose time is over.
    pub(super) fn end_leases(&mut self, now: Instant) {
        if self.leases.next_end().is_none_or(|end| now < self.began + end) && !self.untidy {
            return;
        }
        let lenses = &self.lenses;
        for lease in self.leases.expire(now - self.began, |name| lenses.get(name).is_some()) {
            tracing::info!(lens = written(&lease.lens), holder = lease.holder, "a lease ended");
            self.follow_lease(&lease.lens);
        }
    }

    /// When the next lease ends, so that something may fit that does not now.
    pub(super) fn next_release(&self, now: Instant) -> Option<Duration> {
        let end = self.began + self.leases.next_end()?;
        Some(end.saturating_duration_since(now).max(Duration::from_secs(1)))
    }

    /// A lens was reserved or released, pinned or not.
    fn follow_lease(&mut self, name: &LensName) {
        self.leases_changed = true;
        self.look_ahead = true;
        // Its files are wanted now, or may leave the disk.
        self.resolve_at = Some(Instant::now());
        if let Some(key) = self.lenses.get(name).and_then(DeclaredLens::key) {
            self.follow_names_of(&key);
        }
        self.lenses.count(name, |_| {});
    }

    /// Whether it never leaves.
    pub(super) fn is_pinned(&self, name: &LensName, lens: &DeclaredLens) -> bool {
        lens.lens.residency == LensResidency::Pinned || self.pins.contains(name)
    }

    /// Whether some name of these files is pinned or leased.
    pub(super) fn is_kept(&self, key: &LensKey) -> bool {
        self.lenses.names(key).any(|name| {
            self.leases.on(name) > 0 || self.lenses.get(name).is_some_and(|lens| self.is_pinned(name, lens))
        })
    }

    pub(super) fn lease_reports(&self) -> Vec<LeaseReport> {
        self.leases.iter().map(|(id, lease)| self.lease_report(id, lease)).collect()
    }

    fn lease_report(&self, id: u64, lease: &Lease) -> LeaseReport {
        let key = self.lenses.get(&lease.lens).and_then(DeclaredLens::key);
        let left = (self.began + lease.ends).saturating_duration_since(Instant::now());
        LeaseReport {
            id: self.lease_id(id),
            group: lease.lens.0.clone(),
            lens: lease.lens.1.clone(),
            holder: lease.holder.clone(),
            priority: lease.priority,
            expires_at: epoch_seconds() + left.as_secs(),
            resident: key.is_some_and(|key| self.table.has_lens(&key)),
        }
    }

    /// A lease's name. It says which life of the worker gave it, so that it means nothing to the next one.
    fn lease_id(&self, id: u64) -> String {
        format!("{}-{id}", self.start.worker.instance)
    }

    /// Answers who waits for lenses without requests.
    pub(super) fn answer_awaited(&mut self) {
        if self.awaited.is_empty() {
            return;
        }
        for (name, mut replies) in std::mem::take(&mut self.awaited) {
            replies.retain(|reply| !reply.is_closed());
            match self.how_far(&name) {
                Some(result) => replies.into_iter().for_each(|reply| drop(reply.send(result.clone()))),
                None if replies.is_empty() => {}
                None => drop(self.awaited.insert(name, replies)),
            }
        }
    }

    /// What to tell who waits for a lens; nothing while it is on its way.
    fn how_far(&self, name: &LensName) -> Option<Result<Obeyed, OrderError>> {
        let Some(lens) = self.lenses.get(name) else { return Some(Err(unknown(name))) };
        match lens.stage.standing() {
            Standing::Failed { failure, .. } => {
                Some(Err(OrderError::Failed { lens: written(name), failure: failure.clone() }))
            }
            // Nobody looks at a lens whose base has failed.
            Standing::Open => match self.bases.get(&lens.base).map(|base| base.stage.standing()) {
                Some(Standing::Failed { failure, .. }) => {
                    Some(Err(OrderError::Failed { lens: written(name), failure: failure.clone() }))
                }
                _ => None,
            },
            Standing::Ready(_)
                if !lens.is_claim() && lens.key().is_some_and(|key| self.table.has_lens(&key)) =>
            {
                Some(Ok(Obeyed::Done))
            }
            Standing::Ready(_) => match self.table.has_base(&lens.base) {
                true => None,
                false => Some(Err(OrderError::Conflict(format!(
                    "the base of `{}` is not in memory; switch to it first",
                    written(name)
                )))),
            },
        }
    }
}

/// The number in a lease's name, if this life of the worker gave it.
///
/// # Errors
/// When it did not.
pub fn lease_number(name: &str, instance: &str) -> Result<u64, LeaseError> {
    let number = name.strip_prefix(instance).and_then(|rest| rest.strip_prefix('-'));
    number.and_then(|number| number.parse().ok()).ok_or(LeaseError::Unknown)
}

/// Seconds since the epoch.
pub(crate) fn epoch_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

fn written(name: &LensName) -> String {
    format!("{}:{}", name.0, name.1)
}

fn unknown(name: &LensName) -> OrderError {
    OrderError::Unknown(written(name))
}
