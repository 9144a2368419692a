//! Asks workers to look again, at once, at what failed: `POST /control/v1/retry`.
//!
//! They do that by themselves with growing pauses, so one that is not reached is only later.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream};
use http::StatusCode;
use turret_crds::{WorkerReport, report::ArtifactState};

use super::push::PushError;
use crate::{controllers::wakes::Key, fleet::Endpoint, telemetry::chain};

/// Longest time that asking one may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Workers that are asked at the same time.
const AT_ONCE: usize = 32;

/// Whether there is anything for a worker to look at again.
pub fn has_failures(report: &WorkerReport) -> bool {
    let failed = |state: &ArtifactState| matches!(state, ArtifactState::Failed { .. });
    report.bases.iter().any(|base| failed(&base.state))
        || report.lenses.iter().any(|lens| failed(&lens.state))
}

/// Asks all of these workers.
pub async fn nudge(http: &reqwest::Client, workers: Vec<Arc<Endpoint<Key>>>) {
    let asked = stream::iter(workers).map(|worker| async move {
        match ask(http, &worker).await {
            Ok(()) => tracing::info!(worker = %worker.id, "asked to look again at what failed"),
            Err(error) => {
                tracing::warn!(worker = %worker.id, error = %chain(&error), "could not be asked to look again at what failed");
            }
        }
    });
    asked.buffer_unordered(AT_ONCE).for_each(|()| async {}).await;
}

async fn ask(http: &reqwest::Client, worker: &Endpoint<Key>) -> Result<(), PushError> {
    let mut request = http.post(format!("{}/control/v1/retry", worker.control_url)).timeout(TIMEOUT);
    if let Some(token) = worker.token.bearer()? {
        request = request.bearer_auth(token);
    }
    let status = request.send().await.map_err(PushError::Connection)?.status();
    // A worker of an older version does not know it.
    if status.is_success() || status == StatusCode::NOT_FOUND {
        return Ok(());
    }
    Err(PushError::Refused(status, String::new()))
}

#[cfg(test)]
mod tests {
    use turret_crds::condition::FailureReason;

    use super::*;
    use crate::controllers::fixtures::{World, failed};

    #[test]
    fn only_a_worker_with_a_failure_has_something_to_look_at_again() {
        let mut world = World::new();
        world.carry_out();
        let worker = world.serving("w");
        let has = |worker: &crate::controllers::assess::ObservedWorker| {
            has_failures(worker.report.as_ref().expect("it reports"))
        };
        assert!(!has(&worker));
        let base = worker.clone().reporting(|r| r.bases[0].state = failed(FailureReason::SourceUnavailable));
        assert!(has(&base));
        let lens = worker.reporting(|r| {
            Arc::make_mut(&mut r.lenses[0]).state = failed(FailureReason::DigestMismatch);
        });
        assert!(has(&lens));
    }
}
