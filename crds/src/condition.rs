//! Condition types and reasons, used by both kinds.

use std::fmt;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Every wanted worker reports, itself, that it serves exactly what is declared.
pub const READY: &str = "Ready";
/// The base serves on at least one worker.
pub const AVAILABLE: &str = "Available";
/// Work is under way towards what is declared. Never true together with [`STALLED`].
pub const RECONCILING: &str = "Reconciling";
/// Only a change by somebody can help.
pub const STALLED: &str = "Stalled";
/// The declaration itself can be carried out.
pub const ACCEPTED: &str = "Accepted";
/// All files of a group were found and are what was declared. Groups only.
pub const RESOLVED: &str = "Resolved";

/// The operator was told to leave the object as it is. Only there while somebody asks for it.
pub const PAUSED: &str = "Paused";

/// Why a condition has the status it has: the `reason` of a condition.
pub mod reason {
    /// Everything declared is served.
    pub const SERVING: &str = "Serving";
    /// The placement wants no worker.
    pub const SCALED_TO_ZERO: &str = "ScaledToZero";
    /// No placement that the group allows names it.
    pub const NOT_PLACED: &str = "NotPlaced";
    /// The declaration can be carried out.
    pub const VALID: &str = "Valid";
    /// A named group does not exist.
    pub const GROUP_NOT_FOUND: &str = "GroupNotFound";
    /// A named group exists and cannot be read; the message says why.
    pub const GROUP_UNREADABLE: &str = "GroupUnreadable";
    /// A named group of another namespace does not exist, or does not allow the placement.
    pub const NOT_PERMITTED: &str = "NotPermitted";
    /// A declared value cannot be used; the message says which.
    pub const INVALID: &str = "Invalid";
    /// A memory budget is larger than what the container may use; the message has the numbers.
    pub const BUDGET_EXCEEDS_LIMIT: &str = "BudgetExceedsLimit";
    /// What is declared needs an API that this cluster's API server does not serve; the message says which.
    pub const API_NOT_SERVED: &str = "ApiNotServed";
    /// An object with the name the operator needs exists and belongs to somebody else.
    pub const NAME_TAKEN: &str = "NameTaken";
    /// Workers are being started, replaced or removed.
    pub const ROLLING_OUT: &str = "RollingOut";
    /// Workers have yet to take the newest document.
    pub const UPDATING: &str = "Updating";
    /// Workers fetch and check files.
    pub const LOADING: &str = "Loading";
    /// A pod cannot be scheduled.
    pub const UNSCHEDULABLE: &str = "Unschedulable";
    /// A worker ends again and again; the message carries its last words.
    pub const CRASHING: &str = "Crashing";
    /// A node cannot get the workers' image.
    pub const IMAGE_UNAVAILABLE: &str = "ImageUnavailable";
    /// A worker was given an accelerator and finds none.
    pub const DEVICE_NOT_FOUND: &str = "DeviceNotFound";
    /// The memory budgets are too small for what is served; the message has the numbers. The budgets before them
    /// stay in force.
    pub const DOES_NOT_FIT: &str = "DoesNotFit";
    /// A worker does not answer.
    pub const UNREACHABLE: &str = "Unreachable";
    /// An alias goes on to lead to its old targets, since workers cannot serve all of the new ones yet.
    pub const ALIAS_PENDING: &str = "AliasPending";
    /// Some lenses cannot be served; `failedLenses` names them.
    pub const LENSES_FAILED: &str = "LensesFailed";
    /// A base cannot be served.
    pub const BASE_FAILED: &str = "BaseFailed";
    /// The placement is paused; while something that is declared is held back by that, everything says so.
    pub const PAUSED: &str = "Paused";
    /// A group has the annotation that pauses placements, which does nothing there.
    pub const NOT_PAUSED: &str = "NotPaused";
    /// Nothing is left to do.
    pub const DONE: &str = "Done";
    /// Nothing stands in the way.
    pub const NOT_STALLED: &str = "Progressing";
}

/// Why an artifact (a base or a lens) cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, JsonSchema)]
pub enum FailureReason {
    /// The files are not those of the declared digest.
    DigestMismatch,
    /// Nothing is at the source, or a needed file is missing there.
    SourceNotFound,
    /// The source cannot be reached at the moment.
    SourceUnavailable,
    /// The source asks for credentials it was not given.
    Unauthorized,
    /// The source lies outside what the worker may read.
    NotAllowed,
    /// The source is on a volume that the placement does not list.
    VolumeNotMounted,
    /// The source names a Secret that the placement does not list.
    SecretNotMounted,
    /// A file is cut short or is not what its name says.
    Malformed,
    /// The lens was made for another base: shapes, layers or modules do not match.
    BaseMismatch,
    /// The files hold something this version cannot honour; the message names it.
    UnsupportedTensors,
    /// It does not fit the budget, even alone.
    DoesNotFit,
    /// The worker's disk, or the disk budget, has no room for its files at the moment.
    DiskFull,
    /// The worker failed in a way that is its own fault.
    Internal,
}

impl FailureReason {
    /// Whether waiting can help. Sources change and come back, so most failures are looked at
    /// again; what is wrong in the declaration itself is not.
    pub fn is_retryable(self) -> bool {
        !matches!(self, Self::NotAllowed | Self::VolumeNotMounted | Self::SecretNotMounted | Self::DoesNotFit)
    }

    /// Whether only a change by somebody can help, which makes a group `Stalled`.
    pub fn needs_change(self) -> bool {
        !matches!(self, Self::SourceUnavailable | Self::DiskFull | Self::Internal)
    }
}

impl fmt::Display for FailureReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A condition as it should be, before `lastTransitionTime` is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// One of the constants of this module.
    pub type_: &'static str,
    /// `Some(true)`, `Some(false)`, or `None` for `Unknown`.
    pub status: Option<bool>,
    /// CamelCase; one of [`reason`].
    pub reason: String,
    /// For a person.
    pub message: String,
}

/// Brings `current` to `wanted`: `lastTransitionTime` moves only when the status does, conditions
/// that are not ours stay, the order is stable.
pub fn merge(current: &[Condition], wanted: Vec<Wanted>, generation: i64, now: Time) -> Vec<Condition> {
    let mut merged = current.to_vec();
    for want in wanted {
        let status = match want.status {
            Some(true) => "True",
            Some(false) => "False",
            None => "Unknown",
        };
        let existing = merged.iter_mut().find(|c| c.type_ == want.type_);
        let since = match &existing {
            Some(old) if old.status == status => old.last_transition_time.clone(),
            _ => now.clone(),
        };
        let condition = Condition {
            type_: want.type_.into(),
            status: status.into(),
            reason: want.reason,
            message: want.message,
            observed_generation: Some(generation),
            last_transition_time: since,
        };
        match existing {
            Some(old) => *old = condition,
            None => merged.push(condition),
        }
    }
    merged
}

/// Whether a condition of this type is `True`.
pub fn is_true(conditions: &[Condition], type_: &str) -> bool {
    conditions.iter().any(|c| c.type_ == type_ && c.status == "True")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Time {
        Time(k8s_openapi::jiff::Timestamp::from_second(second).unwrap())
    }

    fn want(status: bool, reason: &str) -> Vec<Wanted> {
        vec![Wanted { type_: READY, status: Some(status), reason: reason.into(), message: String::new() }]
    }

    #[test]
    fn transition_time_moves_only_with_the_status() {
        let first = merge(&[], want(false, "A"), 1, at(10));
        let same = merge(&first, want(false, "B"), 2, at(20));
        assert_eq!((&same[0].last_transition_time, same[0].observed_generation), (&at(10), Some(2)));
        let other = merge(&same, want(true, "C"), 2, at(30));
        assert_eq!(other[0].last_transition_time, at(30));
    }

    #[test]
    fn conditions_of_others_are_kept() {
        let foreign = Condition {
            type_: "Audited".into(),
            status: "True".into(),
            reason: "Yes".into(),
            message: String::new(),
            observed_generation: None,
            last_transition_time: at(1),
        };
        let merged = merge(std::slice::from_ref(&foreign), want(true, "A"), 1, at(2));
        assert_eq!(merged[0], foreign);
        assert_eq!(merged.len(), 2);
    }
}
