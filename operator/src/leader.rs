//! Leader election by a Lease, as Kubernetes' own controllers do it: one replica acts, the others
//! stand by with warm caches.
//!
//! A lease of somebody else counts as over when it was not renewed for its whole duration *by our
//! own clock*, so clocks need not agree. A holder that cannot renew in time stops acting before
//! anybody else may start.

use std::time::Duration;

use k8s_openapi::{
    api::coordination::v1::{Lease, LeaseSpec},
    apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta},
    jiff::Timestamp,
};
use kube::{Api, api::PostParams};
use tokio::time::{Instant, sleep, timeout};

/// How long a lease is valid without being renewed.
const DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for this long gives up.
const RENEW_DEADLINE: Duration = Duration::from_secs(12);
/// Pause between looks at the lease.
const PERIOD: Duration = Duration::from_secs(2);
/// Longest time one request may take.
const REQUEST: Duration = Duration::from_secs(3);

/// One replica's part in the election.
pub struct Election {
    api: Api<Lease>,
    name: String,
    identity: String,
}

/// What to do about a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Take,
    Renew,
    Wait,
}

/// The lease is not ours any more, or could not be renewed in time.
#[derive(Debug, thiserror::Error)]
#[error("lost the leadership: {0}")]
pub struct Lost(String);

#[derive(Debug, thiserror::Error)]
enum RoundError {
    #[error("the lease is held by {0}")]
    HeldBy(String),
    #[error("failed to read or write the lease: {0}")]
    Request(#[from] Box<kube::Error>),
    #[error("the API server did not answer in time")]
    Timeout,
}

/// What was last seen of a lease, and since when by our own clock.
#[derive(Debug)]
struct Seen {
    renewed: Option<MicroTime>,
    holder: Option<String>,
    since: Instant,
}

impl Election {
    /// Takes part as `identity`, for the Lease with this name.
    pub fn new(api: Api<Lease>, name: impl Into<String>, identity: impl Into<String>) -> Self {
        Self { api, name: name.into(), identity: identity.into() }
    }

    /// Waits until this replica is the leader.
    pub async fn acquire(&self) {
        let mut seen = None;
        loop {
            match self.round(&mut seen).await {
                Ok(()) => return,
                Err(RoundError::HeldBy(holder)) => tracing::debug!(%holder, "standing by"),
                Err(error) => tracing::warn!(%error, "election"),
            }
            sleep(PERIOD).await;
        }
    }

    /// Keeps the lease; returns when it is lost.
    pub async fn hold(&self) -> Lost {
        let mut renewed = Instant::now();
        let mut seen = None;
        loop {
            sleep(PERIOD).await;
            match self.round(&mut seen).await {
                Ok(()) => renewed = Instant::now(),
                Err(RoundError::HeldBy(holder)) => return Lost(format!("the lease was taken by {holder}")),
                // One more round may take this long; it must not end after the deadline.
                Err(error) if renewed.elapsed() + PERIOD + REQUEST > RENEW_DEADLINE => {
                    return Lost(error.to_string());
                }
                Err(error) => tracing::warn!(%error, "failed to renew the lease, trying again"),
            }
        }
    }

    /// Gives the lease back, so that another replica need not wait for it to run out.
    pub async fn release(&self) {
        let release = async {
            let lease = self.api.get(&self.name).await?;
            if lease.spec.as_ref().and_then(|s| s.holder_identity.as_deref()) != Some(&self.identity) {
                return Ok(());
            }
            let spec = LeaseSpec {
                holder_identity: Some(String::new()),
                lease_duration_seconds: Some(1),
                renew_time: Some(MicroTime(Timestamp::now())),
                ..lease.spec.unwrap_or_default()
            };
            let lease = Lease { metadata: lease.metadata, spec: Some(spec) };
            self.api.replace(&self.name, &PostParams::default(), &lease).await.map(drop)
        };
        match timeout(REQUEST, release).await {
            Ok(Ok(())) => tracing::info!("gave the leadership back"),
            Ok(Err(error)) => tracing::warn!(%error, "failed to give the leadership back"),
            Err(_) => tracing::warn!("failed to give the leadership back in time"),
        }
    }

    async fn round(&self, seen: &mut Option<Seen>) -> Result<(), RoundError> {
        timeout(REQUEST, self.look(seen)).await.map_err(|_| RoundError::Timeout)?
    }

    async fn look(&self, seen: &mut Option<Seen>) -> Result<(), RoundError> {
        let lease = self.api.get_opt(&self.name).await.map_err(Box::new)?;
        let now = Instant::now();
        let Some(lease) = lease else {
            let spec = taken(None, &self.identity);
            let metadata = ObjectMeta { name: Some(self.name.clone()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(spec) };
            self.api.create(&PostParams::default(), &lease).await.map_err(Box::new)?;
            return Ok(());
        };
        let spec = lease.spec.unwrap_or_default();
        note(seen, &spec, now);
        let since = seen.as_ref().map_or(now, |s| s.since);
        let next = match decide(&spec, &self.identity, now.duration_since(since)) {
            Step::Wait => return Err(RoundError::HeldBy(spec.holder_identity.unwrap_or_default())),
            Step::Renew => LeaseSpec { renew_time: Some(MicroTime(Timestamp::now())), ..spec },
            Step::Take => taken(Some(&spec), &self.identity),
        };
        // The resource version makes it fail if somebody else was faster.
        let lease = Lease { metadata: lease.metadata, spec: Some(next) };
        self.api.replace(&self.name, &PostParams::default(), &lease).await.map_err(Box::new)?;
        Ok(())
    }
}

/// Notes when the lease was last seen to move.
fn note(seen: &mut Option<Seen>, spec: &LeaseSpec, now: Instant) {
    let is_same =
        seen.as_ref().is_some_and(|s| s.renewed == spec.renew_time && s.holder == spec.holder_identity);
    if !is_same {
        *seen =
            Some(Seen { renewed: spec.renew_time.clone(), holder: spec.holder_identity.clone(), since: now });
    }
}

fn decide(spec: &LeaseSpec, identity: &str, unmoved: Duration) -> Step {
    match spec.holder_identity.as_deref() {
        Some(holder) if holder == identity => Step::Renew,
        None | Some("") => Step::Take,
        Some(_) => {
            let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok());
            let duration = seconds.map_or(DURATION, Duration::from_secs);
            if unmoved >= duration { Step::Take } else { Step::Wait }
        }
    }
}

fn taken(before: Option<&LeaseSpec>, identity: &str) -> LeaseSpec {
    let now = MicroTime(Timestamp::now());
    LeaseSpec {
        holder_identity: Some(identity.into()),
        lease_duration_seconds: i32::try_from(DURATION.as_secs()).ok(),
        acquire_time: Some(now.clone()),
        renew_time: Some(now),
        lease_transitions: Some(before.and_then(|s| s.lease_transitions).map_or(0, |n| n + 1)),
        ..LeaseSpec::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str) -> LeaseSpec {
        taken(None, holder)
    }

    #[test]
    fn a_lease_is_renewed_by_its_holder_and_taken_only_when_free_or_over() {
        let seconds = Duration::from_secs;
        for (spec, unmoved, step) in [
            (held_by("me"), seconds(0), Step::Renew),
            (held_by("me"), seconds(99), Step::Renew),
            (held_by(""), seconds(0), Step::Take),
            (LeaseSpec::default(), seconds(0), Step::Take),
            (held_by("other"), seconds(14), Step::Wait),
            (held_by("other"), seconds(15), Step::Take),
        ] {
            assert_eq!(decide(&spec, "me", unmoved), step, "{spec:?} {unmoved:?}");
        }
    }

    #[test]
    fn a_lease_counts_from_when_we_saw_it_move_not_from_what_its_clock_says() {
        let mut seen = None;
        let mut spec = held_by("other");
        let start = Instant::now();
        note(&mut seen, &spec, start);
        note(&mut seen, &spec, start + DURATION);
        assert_eq!(seen.as_ref().unwrap().since, start);
        spec.renew_time = Some(MicroTime(Timestamp::from_second(1).unwrap()));
        note(&mut seen, &spec, start + DURATION);
        assert_eq!(seen.as_ref().unwrap().since, start + DURATION);
    }

    #[test]
    fn a_holder_gives_up_before_its_lease_is_over_for_others() {
        assert!(RENEW_DEADLINE < DURATION);
    }
}
