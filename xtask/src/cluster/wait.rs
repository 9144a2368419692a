//! Waiting for other processes, which send no event when they are ready.

use std::time::{Duration, Instant};

/// How long to wait between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// Looks until `probe` finds something, at most for `limit`.
pub fn until<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let began = Instant::now();
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if began.elapsed() >= limit {
            return None;
        }
        #[expect(clippy::disallowed_methods, reason = "other programs send no event to wait for")]
        std::thread::sleep(BETWEEN_LOOKS);
    }
}
