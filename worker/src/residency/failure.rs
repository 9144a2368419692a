//! Why an artifact cannot be served, and when it is looked at again.

use std::io;
use std::time::Duration;

use turret_crds::condition::FailureReason;

/// Why an artifact cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub struct Failure {
    /// For machines.
    pub reason: FailureReason,
    /// For people: what, where, what to do.
    pub message: String,
}

impl Failure {
    /// A failure.
    pub fn new(reason: FailureReason, message: impl Into<String>) -> Self {
        Self { reason, message: message.into() }
    }
}

/// A failed operation in the worker's own cache folder as a failure of the artifact.
pub fn disk_failure(error: &io::Error) -> Failure {
    let reason = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => FailureReason::DiskFull,
        _ => FailureReason::Internal,
    };
    Failure::new(reason, format!("failed to write to the cache folder: {error}"))
}

const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// How long to wait after the `failures`-th failure in a row (1 is the first). Doubles from one second to thirty: a
/// source that was fixed is served soon, one that stays broken costs little.
pub fn backoff(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    FIRST_RETRY.saturating_mul(1 << doublings).min(LAST_RETRY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_told_from_a_broken_one() {
        let reason = |kind: io::ErrorKind| disk_failure(&kind.into()).reason;
        assert_eq!(reason(io::ErrorKind::StorageFull), FailureReason::DiskFull);
        assert_eq!(reason(io::ErrorKind::QuotaExceeded), FailureReason::DiskFull);
        assert_eq!(reason(io::ErrorKind::PermissionDenied), FailureReason::Internal);
    }

    #[test]
    fn retries_begin_soon_and_never_stop() {
        let seconds: Vec<u64> = [1, 2, 3, 5, 6, 7, u32::MAX].iter().map(|&n| backoff(n).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 16, 30, 30, 30]);
    }
}
