//! Waiting for a cluster: look again until it is so, and when it never is, say what was seen last.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long anything in a local cluster may take, pulling and scheduling included.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// How long to wait between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Looks until `probe` answers `Ok(Ok(value))`. `Ok(Err(seen))` is "not yet, and this is what I see";
/// an error ends the wait at once.
pub async fn eventually<T>(
    deadline: Duration,
    what: &str,
    mut probe: impl AsyncFnMut() -> Result<Result<T, String>>,
) -> Result<T> {
    let began = Instant::now();
    loop {
        let seen = match probe().await? {
            Ok(value) => return Ok(value),
            Err(seen) => seen,
        };
        if began.elapsed() >= deadline {
            bail!("waited {} s until {what}; last seen: {seen}", deadline.as_secs());
        }
        tokio::time::sleep(BETWEEN_LOOKS).await;
    }
}

/// `Ok(())` when `holds`, else what was seen.
pub fn when(holds: bool, seen: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(seen()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_that_fails_tells_what_was_seen_last() {
        let waited =
            eventually(Duration::ZERO, "the pod runs", async || Ok(Err::<(), _>("Pending".into()))).await;
        assert_eq!(waited.unwrap_err().to_string(), "waited 0 s until the pod runs; last seen: Pending");
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_first_look_that_succeeds() {
        let mut looks = 0;
        let found = eventually(PATIENCE, "three looks", || {
            looks += 1;
            let now = looks;
            async move { Ok(if now == 3 { Ok(now) } else { Err(format!("{now} looks")) }) }
        })
        .await;
        assert_eq!(found.unwrap(), 3);
    }
}
