//! Caches: one watch per kind, kept in a store, telling what was touched.
//!
//! An object that cannot be read (an older or broken version of it) is logged and skipped: it never
//! keeps the others from being served. Objects are shrunk to what decisions need before they are
//! kept.

use std::{collections::HashMap, fmt::Debug, sync::Arc};

use futures::{Stream, StreamExt, stream};
use kube::{
    Api, Resource, ResourceExt,
    core::DeserializeGuard,
    runtime::{
        WatchStreamExt,
        reflector::{Lookup, ObjectRef, Store, store, store::Writer},
        watcher::{self, watcher},
    },
};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;

use super::merge::Merge;
use crate::{relisting::relisting, telemetry::chain};

/// Objects that a cache can hold.
pub trait Cached:
    Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static
{
}
impl<K> Cached for K where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + Sync + 'static
{
}

/// How an object was touched: before and after. Both are there when it changed.
pub struct Touched<'a, K> {
    /// As it was; `None` when it is new.
    pub before: Option<&'a K>,
    /// As it is; `None` when it is gone.
    pub after: Option<&'a K>,
}

impl<K> Touched<'_, K> {
    /// Both versions that there are.
    pub fn both(&self) -> impl Iterator<Item = &K> {
        self.before.into_iter().chain(self.after)
    }
}

/// Starts to keep all objects of a kind, of these namespaces or of all in one. `shrink` drops what no
/// decision needs; `touched` hears of every change after the store has it.
pub fn start<K: Cached>(
    tasks: &mut JoinSet<()>,
    apis: Vec<(String, Api<DeserializeGuard<K>>)>,
    config: watcher::Config,
    shrink: fn(&mut K),
    touched: impl Fn(Touched<'_, K>) + Send + Sync + 'static,
) -> Store<K> {
    let (reader, writer) = store::<K>();
    let keeper = Keeper { reader: reader.clone(), writer, listed: None };
    let merge = Merge::of(apis.iter().map(|(namespace, _)| namespace.clone()));
    let watches = apis.into_iter().enumerate().map(|(number, (_, api))| {
        let config = config.clone();
        let events = relisting(move || watcher(api.clone(), config.clone()).default_backoff());
        events.map(move |event| (number, event.map(|event| shrunk(event, shrink)))).boxed()
    });
    tasks.spawn(keep(stream::select_all(watches), merge, keeper, touched));
    reader
}

/// An event whose object is without what no decision needs.
fn shrunk<K>(
    event: watcher::Event<DeserializeGuard<K>>,
    shrink: fn(&mut K),
) -> watcher::Event<DeserializeGuard<K>> {
    use watcher::Event;
    let shrunk = |mut guard: DeserializeGuard<K>| {
        if let Ok(object) = &mut guard.0 {
            shrink(object);
        }
        guard
    };
    match event {
        Event::Apply(guard) => Event::Apply(shrunk(guard)),
        Event::InitApply(guard) => Event::InitApply(shrunk(guard)),
        other => other,
    }
}

async fn keep<K: Cached>(
    mut events: impl Stream<Item = Numbered<K>> + Unpin + Send,
    mut merge: Merge<K>,
    mut keeper: Keeper<K>,
    touched: impl Fn(Touched<'_, K>) + Send + Sync,
) {
    while let Some((number, event)) = events.next().await {
        match event {
            Ok(event) => {
                for event in merge.take(number, event) {
                    keeper.take(event, &touched);
                }
            }
            // The watch retries by itself, with growing pauses.
            Err(error) => {
                tracing::warn!(kind = %K::kind(&()), error = %chain(&error), "watch failed")
            }
        }
    }
}

/// What one of several watches shows, and its number.
type Numbered<K> = (usize, Result<watcher::Event<DeserializeGuard<K>>, watcher::Error>);

struct Keeper<K: Cached> {
    reader: Store<K>,
    writer: Writer<K>,
    /// While a new list comes in: what was there before it. An object that is not in the new list
    /// was deleted while nobody watched.
    listed: Option<HashMap<ObjectRef<K>, Arc<K>>>,
}

impl<K: Cached> Keeper<K> {
    fn take(&mut self, event: watcher::Event<DeserializeGuard<K>>, touched: &impl Fn(Touched<'_, K>)) {
        use watcher::Event;
        match event {
            Event::Init => {
                let before = self.reader.state().into_iter().map(|o| (o.to_object_ref(()), o));
                self.listed = Some(before.collect());
                self.writer.apply_watcher_event(&Event::Init);
            }
            Event::InitApply(guard) => {
                if let Some(object) = self.read(guard) {
                    self.writer.apply_watcher_event(&Event::InitApply(object));
                }
            }
            Event::InitDone => {
                self.writer.apply_watcher_event(&Event::InitDone);
                let mut before = self.listed.take().unwrap_or_default();
                for after in self.reader.state() {
                    let before = before.remove(&after.to_object_ref(()));
                    touched(Touched { before: before.as_deref(), after: Some(&after) });
                }
                for gone in before.into_values() {
                    touched(Touched { before: Some(&gone), after: None });
                }
            }
            Event::Apply(guard) => {
                let Some(object) = self.read(guard) else { return };
                let before = self.reader.get(&object.to_object_ref(()));
                let event = Event::Apply(object);
                self.writer.apply_watcher_event(&event);
                let Event::Apply(after) = event else { unreachable!("made two lines above") };
                touched(Touched { before: before.as_deref(), after: Some(&after) });
            }
            Event::Delete(guard) => {
                // What is gone is named even when it cannot be read.
                let name = guard.name_any();
                let namespace = ResourceExt::namespace(&guard).unwrap_or_default();
                let Some(gone) = self.reader.get(&ObjectRef::new(&name).within(&namespace)) else { return };
                self.writer.apply_watcher_event(&Event::Delete(K::clone(&gone)));
                touched(Touched { before: Some(&gone), after: None });
            }
        }
    }

    fn read(&self, guard: DeserializeGuard<K>) -> Option<K> {
        let (namespace, name) = (ResourceExt::namespace(&guard).unwrap_or_default(), guard.name_any());
        match guard.0 {
            Ok(object) => Some(object),
            Err(error) => {
                tracing::warn!(kind = %K::kind(&()), %namespace, %name, error = %error.error, "skipped an object that cannot be read");
                None
            }
        }
    }
}

/// Keeps of `managedFields` only who wrote the status last and when.
pub fn shrink_metadata<K: Resource>(object: &mut K) {
    let fields = object.meta_mut().managed_fields.take();
    let status = fields.into_iter().flatten().filter(|f| {
        f.subresource.as_deref() == Some("status")
            && f.manager.as_deref() == Some(super::status_write::FIELD_MANAGER)
    });
    let kept: Vec<_> = status
        .map(|mut f| {
            f.fields_v1 = None;
            f
        })
        .collect();
    object.meta_mut().managed_fields = (!kept.is_empty()).then_some(kept);
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use turret_crds::ModelGroup;

    use super::*;

    fn guard(name: &str, spec: serde_json::Value) -> DeserializeGuard<ModelGroup> {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
            "metadata": {"name": name, "namespace": "n"}, "spec": spec,
        }))
        .unwrap()
    }

    fn good(name: &str) -> DeserializeGuard<ModelGroup> {
        guard(name, serde_json::json!({"base": {"source": {"uri": "file:///m"}}}))
    }

    /// Takes events and returns what was told, as `before>after`.
    fn told(events: Vec<watcher::Event<DeserializeGuard<ModelGroup>>>) -> (Vec<String>, Vec<String>) {
        let (reader, writer) = store::<ModelGroup>();
        let mut keeper = Keeper { reader: reader.clone(), writer, listed: None };
        let log = Mutex::new(Vec::new());
        let name = |o: Option<&ModelGroup>| o.map(|o| o.name_any()).unwrap_or_default();
        for event in events {
            keeper.take(event, &|t: Touched<'_, ModelGroup>| {
                log.lock().push(format!("{}>{}", name(t.before), name(t.after)));
            });
        }
        let mut kept: Vec<_> = reader.state().iter().map(|o| o.name_any()).collect();
        kept.sort();
        (log.into_inner(), kept)
    }

    #[test]
    fn an_unreadable_object_is_skipped_and_the_others_are_kept() {
        use watcher::Event::*;
        let (log, kept) = told(vec![
            Init,
            InitApply(good("a")),
            InitApply(guard("broken", serde_json::json!({"base": 7}))),
            InitDone,
            Apply(guard("broken", serde_json::json!([]))),
            Apply(good("b")),
            Delete(guard("broken", serde_json::json!([]))),
        ]);
        assert_eq!((log, kept), (vec![">a".into(), ">b".into()], vec!["a".to_owned(), "b".to_owned()]));
    }

    #[test]
    fn what_vanished_while_nobody_watched_is_told() {
        use watcher::Event::*;
        let (log, kept) = told(vec![
            Init,
            InitApply(good("a")),
            InitApply(good("b")),
            InitDone,
            Init,
            InitApply(good("b")),
            InitDone,
        ]);
        let mut last = log[2..].to_vec();
        last.sort();
        assert_eq!((last, kept), (vec!["a>".to_owned(), "b>b".to_owned()], vec!["b".to_owned()]));
    }
}
