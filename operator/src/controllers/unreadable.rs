//! Objects that are in the cluster and cannot be read: of an older version or a newer one, or stored while there was no schema.
//! They are skipped, never a reason to end, and whoever looks at one is told why.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use k8s_openapi::api::core::v1::ObjectReference;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::wakes::Key;

/// Why an object cannot be read.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    /// The object, as events name it.
    pub reference: ObjectReference,
    /// Its `resourceVersion`: of another one is told again.
    pub version: Option<String>,
    /// What stands in the way.
    pub error: String,
}

/// The objects of one kind that cannot be read. Cheap to clone.
#[derive(Clone, Default)]
pub struct Unreadable(Arc<Inner>);

#[derive(Default)]
struct Inner {
    rows: Mutex<BTreeMap<Key, Row>>,
    changed: Notify,
}

struct Row {
    fault: Fault,
    is_told: bool,
}

impl Unreadable {
    /// Why an object cannot be read, if it cannot.
    pub fn why(&self, key: &Key) -> Option<String> {
        self.0.rows.lock().get(key).map(|row| row.fault.error.clone())
    }

    /// Takes note of one.
    pub fn insert(&self, key: Key, fault: Fault) {
        let mut rows = self.0.rows.lock();
        let is_told = rows.get(&key).is_some_and(|row| row.is_told && row.fault == fault);
        rows.insert(key, Row { fault, is_told });
        self.0.changed.notify_one();
    }

    /// Takes note that an object is gone, or can be read. Answers whether it could not.
    pub fn remove(&self, key: &Key) -> bool {
        self.0.rows.lock().remove(key).is_some()
    }

    /// Takes what a whole list has shown in place of all that was known. Answers the names of both.
    pub fn replace(&self, faults: BTreeMap<Key, Fault>) -> BTreeSet<Key> {
        let mut rows = self.0.rows.lock();
        let mut before = std::mem::take(&mut *rows);
        let mut names: BTreeSet<Key> = before.keys().cloned().collect();
        for (key, fault) in faults {
            let is_told = before.remove(&key).is_some_and(|row| row.is_told && row.fault == fault);
            names.insert(key.clone());
            rows.insert(key, Row { fault, is_told });
        }
        self.0.changed.notify_one();
        names
    }

    /// Waits for some that nobody was told of, and takes them for told. One reader at a time.
    pub async fn untold(&self) -> Vec<Fault> {
        loop {
            let found = self.take_untold();
            if !found.is_empty() {
                return found;
            }
            self.0.changed.notified().await;
        }
    }

    fn take_untold(&self) -> Vec<Fault> {
        let mut rows = self.0.rows.lock();
        let untold = rows.values_mut().filter(|row| !row.is_told);
        let told = untold.map(|row| {
            row.is_told = true;
            row.fault.clone()
        });
        told.collect()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn fault(version: &str) -> Fault {
        Fault { reference: ObjectReference::default(), version: Some(version.into()), error: "no".into() }
    }

    fn key(name: &str) -> Key {
        ("n".into(), name.into())
    }

    #[tokio::test]
    async fn each_version_is_told_once() {
        let unreadable = Unreadable::default();
        unreadable.insert(key("a"), fault("1"));
        assert_eq!(unreadable.untold().await, [fault("1")]);
        unreadable.insert(key("a"), fault("1"));
        let names = unreadable.replace([(key("a"), fault("1")), (key("b"), fault("7"))].into());
        assert_eq!(names, [key("a"), key("b")].into());
        assert_eq!(unreadable.untold().await, [fault("7")]);
        unreadable.insert(key("a"), fault("2"));
        assert_eq!(unreadable.untold().await, [fault("2")]);
        assert!(unreadable.untold().now_or_never().is_none());
    }

    #[test]
    fn what_a_list_does_not_show_any_more_is_forgotten_and_named() {
        let unreadable = Unreadable::default();
        unreadable.insert(key("a"), fault("1"));
        assert_eq!(unreadable.replace([(key("b"), fault("1"))].into()), [key("a"), key("b")].into());
        assert_eq!((unreadable.why(&key("a")), unreadable.why(&key("b"))), (None, Some("no".into())));
        assert!(unreadable.remove(&key("b")) && !unreadable.remove(&key("b")));
    }
}
