//! How long to wait before an object that failed is looked at again.

use std::{collections::HashMap, time::Duration};

use parking_lot::Mutex;

use super::wakes::Key;

/// Failures in a row, per object.
#[derive(Default)]
pub struct Failures(Mutex<HashMap<Key, u32>>);

/// First and longest pause.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(60));

impl Failures {
    /// Notes one more failure; returns the pause, which doubles with each.
    pub fn failed(&self, key: Key) -> Duration {
        let mut failures = self.0.lock();
        let count = failures.entry(key).or_default();
        *count = count.saturating_add(1);
        pause(*count)
    }

    /// Notes a success.
    pub fn succeeded(&self, key: &Key) {
        self.0.lock().remove(key);
    }
}

fn pause(failures: u32) -> Duration {
    PAUSE.0.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(PAUSE.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_minute_and_start_afresh_after_a_success() {
        let (failures, key) = (Failures::default(), ("n".to_owned(), "a".to_owned()));
        assert_eq!(failures.failed(key.clone()), Duration::from_millis(200));
        assert_eq!(failures.failed(key.clone()), Duration::from_millis(400));
        assert_eq!(failures.failed(("n".into(), "b".into())), Duration::from_millis(200));
        failures.succeeded(&key);
        assert_eq!(failures.failed(key), Duration::from_millis(200));
        assert_eq!(pause(u32::MAX), Duration::from_secs(60));
    }
}
