//! What is to be measured, and with what: `cargo xtask bench operator` says it.

use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

/// One run.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Order {
    /// Kubeconfig of this program's own user.
    pub kubeconfig: PathBuf,
    /// Kubeconfig of the operator's user.
    pub operator_kubeconfig: PathBuf,
    /// The operator's user, as the audit log calls it.
    pub operator_user: String,
    /// The API server's audit log.
    pub audit_log: PathBuf,
    /// The operator's program.
    pub operator: PathBuf,
    /// Where what the operator logs is written.
    pub operator_log: PathBuf,
    /// Where what was found is written.
    pub found: PathBuf,
    /// Groups.
    pub groups: usize,
    /// Lenses of each group.
    pub lenses: usize,
    /// Placements. Each names one group.
    pub placements: usize,
    /// Workers: one for each of the first placements.
    pub workers: usize,
    /// How often the cold start and the fresh objects are measured.
    pub rounds: usize,
    /// Placements that are new at once, with a group each.
    pub fresh: usize,
    /// How long workers tell what happens to them, seconds.
    pub event_seconds: u64,
    /// How long groups and placements are edited, seconds.
    pub churn_seconds: u64,
    /// Edits per second.
    pub churn_per_second: u32,
}

impl Order {
    /// How long making so many objects may take, and what the operator makes of them.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(120)
            + Duration::from_millis(100) * u32::try_from(self.objects()).unwrap_or(u32::MAX)
    }

    /// Groups and placements.
    pub fn objects(&self) -> usize {
        self.groups + self.placements
    }
}
