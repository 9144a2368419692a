//! What is to be looked at: a set of object names, so that many reasons make one visit.
//!
//! Watches and worker streams [`wake`](Wakes::wake) objects at any time; the controller takes them
//! from [`stream`](Wakes::stream). The set is bounded by the number of objects that exist, whether
//! somebody takes from it (the leader) or not (a standby).

use std::{collections::BTreeSet, sync::Arc};

use futures::Stream;
use kube::runtime::reflector::{Lookup, ObjectRef};
use parking_lot::Mutex;
use tokio::sync::Notify;

/// Namespace and name of an object.
pub type Key = (String, String);

/// The set of objects to look at.
#[derive(Clone, Default)]
pub struct Wakes(Arc<Inner>);

#[derive(Default)]
struct Inner {
    set: Mutex<BTreeSet<Key>>,
    notify: Notify,
}

impl Wakes {
    /// Asks for a look at an object.
    pub fn wake(&self, namespace: impl Into<String>, name: impl Into<String>) {
        if self.0.set.lock().insert((namespace.into(), name.into())) {
            self.0.notify.notify_one();
        }
    }

    /// What is to be looked at, as it comes. One reader at a time.
    pub fn stream<K>(&self) -> impl Stream<Item = ObjectRef<K>> + Send + use<K>
    where
        K: Lookup<DynamicType = ()> + 'static,
    {
        let inner = self.0.clone();
        async_stream::stream! {
            loop {
                let next = inner.set.lock().pop_first();
                match next {
                    Some((namespace, name)) => yield ObjectRef::new(&name).within(&namespace),
                    None => inner.notify.notified().await,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};
    use turret_crds::ModelGroup;

    use super::*;

    #[tokio::test]
    async fn many_wakes_of_one_object_are_one_visit_and_none_is_lost() {
        let wakes = Wakes::default();
        for _ in 0..3 {
            wakes.wake("n", "a");
        }
        wakes.wake("n", "b");
        let mut stream = std::pin::pin!(wakes.stream::<ModelGroup>());
        assert_eq!(stream.next().await.unwrap().name, "a");
        assert_eq!(stream.next().await.unwrap().name, "b");
        assert!(stream.next().now_or_never().is_none());
        wakes.wake("n", "a");
        assert_eq!(stream.next().await.unwrap().name, "a");
    }
}
