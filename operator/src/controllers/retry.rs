//! How long to wait before an object that could not be carried out is looked at again.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;

use super::wakes::Key;

/// Objects whose rows are kept; beyond it they begin afresh. Some are never looked at again because they are gone.
const MOST_ROWS: usize = 4096;

/// What went wrong with the objects of one kind, in a row.
pub struct Retries {
    failures: Rows,
    stale_views: Rows,
}

impl Default for Retries {
    fn default() -> Self {
        Self {
            failures: Rows::new(Duration::from_millis(200), Duration::from_secs(60)),
            // Caches are nearly always behind by less than the first pause, and wake the object when they catch up. When the
            // API server is slow to tell them, it is not to be asked in vain twenty times a second.
            stale_views: Rows::new(Duration::from_millis(50), Duration::from_secs(5)),
        }
    }
}

impl Retries {
    /// Notes one more failure; returns the pause.
    pub fn failed(&self, key: Key) -> Duration {
        self.failures.one_more(key)
    }

    /// Notes that the object was not any more as it was seen; returns the pause.
    pub fn was_stale(&self, key: Key) -> Duration {
        self.stale_views.one_more(key)
    }

    /// Notes a success.
    pub fn succeeded(&self, key: &Key) {
        self.failures.end(key);
        self.stale_views.end(key);
    }
}

/// How often in a row something happened to each object.
struct Rows {
    first: Duration,
    longest: Duration,
    counts: Mutex<HashMap<Key, u32>>,
}

impl Rows {
    fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, counts: Mutex::default() }
    }

    /// Returns the pause, which doubles with each.
    fn one_more(&self, key: Key) -> Duration {
        let mut counts = self.counts.lock();
        if counts.len() >= MOST_ROWS
            && !counts.contains_key(&key)
            // One that never came back is as good as any.
            && let Some(other) = counts.keys().next().cloned()
        {
            counts.remove(&other);
        }
        let count = counts.entry(key).or_default();
        *count = count.saturating_add(1);
        self.first.saturating_mul(1 << count.saturating_sub(1).min(16)).min(self.longest)
    }

    fn end(&self, key: &Key) {
        self.counts.lock().remove(key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> Key {
        ("n".into(), name.into())
    }

    #[test]
    fn pauses_double_up_to_a_minute_and_start_afresh_after_a_success() {
        let retries = Retries::default();
        assert_eq!(retries.failed(key("a")), Duration::from_millis(200));
        assert_eq!(retries.failed(key("a")), Duration::from_millis(400));
        assert_eq!(retries.failed(key("b")), Duration::from_millis(200));
        retries.succeeded(&key("a"));
        assert_eq!(retries.failed(key("a")), Duration::from_millis(200));
        let longest = (0..40).map(|_| retries.failed(key("a"))).last();
        assert_eq!(longest, Some(Duration::from_secs(60)));
    }

    #[test]
    fn a_view_that_stays_stale_is_looked_at_ever_more_rarely() {
        let retries = Retries::default();
        let pauses: Vec<_> = (0..9).map(|_| retries.was_stale(key("a")).as_millis()).collect();
        assert_eq!(pauses, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(retries.failed(key("a")), Duration::from_millis(200), "a failure is another thing");
        retries.succeeded(&key("a"));
        assert_eq!(retries.was_stale(key("a")), Duration::from_millis(50));
    }

    #[test]
    fn objects_that_are_gone_are_not_kept_for_ever() {
        let rows = Rows::new(Duration::from_millis(1), Duration::from_secs(1));
        for number in 0..=MOST_ROWS {
            rows.one_more(key(&number.to_string()));
        }
        assert!(rows.counts.lock().len() <= MOST_ROWS);
    }
}
