//! What an operator asked of the API server, by the audit log. Of any operator: only its user must be known.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use k8s_openapi::jiff::Timestamp;

use crate::cluster::audit::{AuditLog, Mark, Request};

/// How long to wait between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// Reads on in the log, and keeps what counts of one user's requests.
pub struct Follow {
    log: AuditLog,
    user: String,
    mark: Mark,
    /// What counts, in the order of the log.
    pub seen: Vec<Request>,
}

impl Follow {
    /// From the end of the log on.
    pub fn begin(log: &AuditLog, user: &str) -> Result<Self> {
        Ok(Self { log: log.clone(), user: user.into(), mark: log.mark()?, seen: Vec::new() })
    }

    /// Reads on; returns how much that counts is new.
    pub fn look(&mut self) -> Result<usize> {
        let new = self.log.read_on(&self.user, &mut self.mark)?;
        let before = self.seen.len();
        self.seen.extend(new.into_iter().filter(counts));
        Ok(self.seen.len() - before)
    }

    /// Waits until nothing that counts was asked for so long.
    pub async fn quiet(&mut self, quiet: Duration, within: Duration) -> Result<()> {
        let (began, mut last) = (Instant::now(), Instant::now());
        while last.elapsed() < quiet {
            ensure!(began.elapsed() < within, "it goes on asking after {} s", within.as_secs());
            tokio::time::sleep(BETWEEN_LOOKS).await;
            if self.look()? > 0 {
                last = Instant::now();
            }
        }
        Ok(())
    }

    /// Those that write.
    pub fn writes(&self) -> impl Iterator<Item = &Request> {
        self.seen.iter().filter(|request| request.is_write())
    }
}

/// Whether a request is for the sake of objects: not for the Lease of the election, which goes on for ever, and not a watch,
/// which ends after some minutes and is opened again.
pub fn counts(request: &Request) -> bool {
    request.object_ref.resource != "leases" && request.verb != "watch"
}

/// Whether a request writes the status of this object.
pub fn is_status_of(request: &Request, resource: &str, name: &str) -> bool {
    let object = &request.object_ref;
    request.is_write() && object.subresource == "status" && object.resource == resource && object.name == name
}

/// From the receipt of the first to the answer to the last, seconds. Nothing of nothing.
pub fn span_seconds<'a>(requests: impl IntoIterator<Item = &'a Request>) -> Option<f64> {
    let (mut first, mut last): (Option<Timestamp>, Option<Timestamp>) = (None, None);
    for request in requests {
        let came = request.request_received_timestamp.as_ref().map(|time| time.0);
        let answered = request.stage_timestamp.as_ref().map(|time| time.0);
        first = first.into_iter().chain(came).min();
        last = last.into_iter().chain(answered).max();
    }
    Some(last?.duration_since(first?).as_secs_f64())
}

/// Counted by what they ask for, as RBAC writes it.
pub fn by_resource<'a>(requests: impl IntoIterator<Item = &'a Request>) -> BTreeMap<String, usize> {
    let mut counted = BTreeMap::new();
    for request in requests {
        *counted.entry(request.rbac_resource()).or_default() += 1;
    }
    counted
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request(verb: &str, resource: &str, sub: &str, millis: u64) -> Request {
        let time = |millis: u64| format!("2026-01-02T03:04:05.{millis:03}000Z");
        serde_json::from_value(json!({
            "verb": verb,
            "user": {"username": "o"},
            "objectRef": {"resource": resource, "subresource": sub, "namespace": "n", "name": "x"},
            "requestReceivedTimestamp": time(millis),
            "stageTimestamp": time(millis + 2),
        }))
        .unwrap()
    }

    #[test]
    fn a_span_goes_from_the_first_receipt_to_the_last_answer() {
        let requests = [request("patch", "services", "", 40), request("patch", "services", "", 10)];
        assert_eq!(span_seconds(&requests), Some(0.032));
        assert_eq!(span_seconds(&[]), None);
    }

    #[test]
    fn the_election_and_watches_do_not_count() {
        let all = [("update", "leases"), ("watch", "pods"), ("list", "pods"), ("patch", "services")];
        let counted = all.map(|(verb, resource)| counts(&request(verb, resource, "", 0)));
        assert_eq!(counted, [false, false, true, true]);
    }

    #[test]
    fn writes_are_counted_by_what_they_write() {
        let requests = [request("patch", "modelgroups", "status", 0), request("create", "events", "", 0)];
        let expected = [("events".to_owned(), 1), ("modelgroups/status".to_owned(), 1)];
        assert_eq!(by_resource(&requests), expected.into());
        assert!(is_status_of(&requests[0], "modelgroups", "x"));
        assert!(!is_status_of(&requests[0], "modelgroups", "y"));
        assert!(!is_status_of(&requests[0], "modelplacements", "x"));
    }

    #[tokio::test]
    async fn a_log_is_followed_from_where_it_ended() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("log");
        let line = |verb: &str| format!("{{\"verb\":\"{verb}\",\"user\":{{\"username\":\"o\"}}}}\n");
        std::fs::write(&file, line("get")).unwrap();
        let mut follow = Follow::begin(&AuditLog::at(&file), "o").unwrap();
        std::fs::write(&file, line("get") + &line("patch") + &line("watch")).unwrap();
        assert_eq!(follow.look().unwrap(), 1);
        assert_eq!(follow.writes().count(), 1);
        assert_eq!(follow.look().unwrap(), 0);
        assert!(follow.quiet(Duration::ZERO, Duration::ZERO).await.is_ok());
        assert!(follow.quiet(Duration::from_secs(1), Duration::ZERO).await.is_err());
    }
}
