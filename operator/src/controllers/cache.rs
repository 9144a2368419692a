//! Caches: one watch per kind, kept in a store, telling what was touched.
//!
//! An object that cannot be read (an older or broken version of it) is logged and skipped: it never
//! keeps the others from being served. What it was before is forgotten, as after a restart. Objects are
//! shrunk to what decisions need before they are kept.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Debug,
    sync::Arc,
};

use futures::{Stream, StreamExt, stream};
use k8s_openapi::{api::core::v1::Namespace, apimachinery::pkg::apis::meta::v1::ObjectMeta};
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

use super::{
    merge::Merge,
    unreadable::{Fault, Unreadable},
    wakes::Key,
};
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

/// How an object was touched: before and after. Both are there when it changed; neither when it cannot be read, or could not
/// be until now.
pub struct Touched<'a, K> {
    /// Its namespace and name.
    pub key: &'a Key,
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

/// Starts to keep all objects of a kind, of these namespaces or of all in one, and which of them cannot be read. `shrink`
/// drops what no decision needs; `touched` hears of every change after the store has it.
pub fn start<K: Cached>(
    tasks: &mut JoinSet<()>,
    apis: Vec<(String, Api<DeserializeGuard<K>>)>,
    config: watcher::Config,
    shrink: fn(&mut K),
    touched: impl Fn(Touched<'_, K>) + Send + Sync + 'static,
) -> (Store<K>, Unreadable) {
    let (reader, writer) = store::<K>();
    let unreadable = Unreadable::default();
    let keeper = Keeper::new(reader.clone(), writer, unreadable.clone());
    let merge = Merge::of(apis.iter().map(|(namespace, _)| namespace.clone()));
    let watches = apis.into_iter().enumerate().map(|(number, (_, api))| {
        let config = config.clone();
        let events = relisting(move || watcher(api.clone(), config.clone()).default_backoff());
        events.map(move |event| (number, event.map(|event| shrunk(event, shrink)))).boxed()
    });
    tasks.spawn(keep(stream::select_all(watches), merge, keeper, touched));
    (reader, unreadable)
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
    unreadable: Unreadable,
    /// While a new list comes in: what was there before it. An object that is not in the new list
    /// was deleted while nobody watched.
    listed: Option<HashMap<ObjectRef<K>, Arc<K>>>,
    /// While a new list comes in: what of it cannot be read.
    faults: BTreeMap<Key, Fault>,
}

/// An object that cannot be read.
struct Skipped {
    key: Key,
    fault: Fault,
}

fn key_of<K: Resource>(object: &K) -> Key {
    (ResourceExt::namespace(object).unwrap_or_default(), object.name_any())
}

impl<K: Cached> Keeper<K> {
    fn new(reader: Store<K>, writer: Writer<K>, unreadable: Unreadable) -> Self {
        Self { reader, writer, unreadable, listed: None, faults: BTreeMap::new() }
    }

    fn take(&mut self, event: watcher::Event<DeserializeGuard<K>>, touched: &impl Fn(Touched<'_, K>)) {
        use watcher::Event;
        match event {
            Event::Init => {
                let before = self.reader.state().into_iter().map(|o| (o.to_object_ref(()), o));
                self.listed = Some(before.collect());
                self.faults.clear();
                self.writer.apply_watcher_event(&Event::Init);
            }
            Event::InitApply(guard) => match Self::read(guard) {
                Ok(object) => self.writer.apply_watcher_event(&Event::InitApply(object)),
                Err(skipped) => {
                    let Skipped { key, fault } = *skipped;
                    self.faults.insert(key, fault);
                }
            },
            Event::InitDone => {
                self.writer.apply_watcher_event(&Event::InitDone);
                let unreadable = self.unreadable.replace(std::mem::take(&mut self.faults));
                let mut before = self.listed.take().unwrap_or_default();
                for after in self.reader.state() {
                    let before = before.remove(&after.to_object_ref(()));
                    let key = key_of(&*after);
                    touched(Touched { key: &key, before: before.as_deref(), after: Some(&after) });
                }
                for gone in before.into_values() {
                    let key = key_of(&*gone);
                    touched(Touched { key: &key, before: Some(&gone), after: None });
                }
                for key in unreadable {
                    touched(Touched { key: &key, before: None, after: None });
                }
            }
            Event::Apply(guard) => match Self::read(guard) {
                Ok(object) => {
                    let key = key_of(&object);
                    self.unreadable.remove(&key);
                    let before = self.reader.get(&object.to_object_ref(()));
                    let event = Event::Apply(object);
                    self.writer.apply_watcher_event(&event);
                    let Event::Apply(after) = event else { unreachable!("made two lines above") };
                    touched(Touched { key: &key, before: before.as_deref(), after: Some(&after) });
                }
                Err(skipped) => {
                    let Skipped { key, fault } = *skipped;
                    self.unreadable.insert(key.clone(), fault);
                    let before = self.forget(&key);
                    touched(Touched { key: &key, before: before.as_deref(), after: None });
                }
            },
            Event::Delete(guard) => {
                // What is gone is named even when it cannot be read.
                let key = key_of(&guard);
                let was_unreadable = self.unreadable.remove(&key);
                let gone = self.forget(&key);
                if gone.is_some() || was_unreadable {
                    touched(Touched { key: &key, before: gone.as_deref(), after: None });
                }
            }
        }
    }

    /// Drops an object from the store, and answers it if it was there.
    fn forget(&mut self, key: &Key) -> Option<Arc<K>> {
        let mut named = ObjectRef::<K>::new(&key.1);
        named.namespace = (!key.0.is_empty()).then(|| key.0.clone());
        let gone = self.reader.get(&named)?;
        self.writer.apply_watcher_event(&watcher::Event::Delete(K::clone(&gone)));
        Some(gone)
    }

    fn read(guard: DeserializeGuard<K>) -> Result<K, Box<Skipped>> {
        let invalid = match guard.0 {
            Ok(object) => return Ok(object),
            Err(invalid) => invalid,
        };
        let error = invalid.error.clone();
        let skipped = DeserializeGuard::<K>(Err(invalid));
        let key = key_of(&skipped);
        tracing::warn!(kind = %K::kind(&()), namespace = key.0, name = key.1, error, "skipped an object that cannot be read");
        let reference = Resource::object_ref(&skipped, &());
        let version = ResourceExt::resource_version(&skipped);
        Err(Box::new(Skipped { key, fault: Fault { reference, version, error } }))
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

/// Keeps of a namespace its name and its labels.
pub fn shrink_namespace(namespace: &mut Namespace) {
    let metadata = std::mem::take(&mut namespace.metadata);
    *namespace = Namespace {
        metadata: ObjectMeta { name: metadata.name, labels: metadata.labels, ..ObjectMeta::default() },
        ..Namespace::default()
    };
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;
    use turret_crds::ModelGroup;

    use super::*;

    fn guard_in(namespace: &str, name: &str, spec: serde_json::Value) -> DeserializeGuard<ModelGroup> {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
            "metadata": {"name": name, "namespace": namespace}, "spec": spec,
        }))
        .unwrap()
    }

    fn guard(name: &str, spec: serde_json::Value) -> DeserializeGuard<ModelGroup> {
        guard_in("n", name, spec)
    }

    fn good(name: &str) -> DeserializeGuard<ModelGroup> {
        guard(name, serde_json::json!({"base": {"source": {"uri": "file:///m"}}}))
    }

    /// Takes events and returns what was told, as `before>after`, or as `name?` where there is neither.
    fn told(events: Vec<watcher::Event<DeserializeGuard<ModelGroup>>>) -> (Vec<String>, Vec<String>) {
        let (reader, writer) = store::<ModelGroup>();
        let mut keeper = Keeper::new(reader.clone(), writer, Unreadable::default());
        let log = Mutex::new(Vec::new());
        let name = |o: Option<&ModelGroup>| o.map(|o| o.name_any()).unwrap_or_default();
        for event in events {
            keeper.take(event, &|t: Touched<'_, ModelGroup>| {
                log.lock().push(match (t.before, t.after) {
                    (None, None) => format!("{}?", t.key.1),
                    (before, after) => format!("{}>{}", name(before), name(after)),
                });
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
        assert_eq!(log, [">a", "broken?", "broken?", ">b", "broken?"]);
        assert_eq!(kept, ["a", "b"]);
    }

    #[test]
    fn an_object_that_cannot_be_read_any_more_is_forgotten_until_it_can_be() {
        use watcher::Event::*;
        let broken = || guard("a", serde_json::json!({"base": {"source": null}}));
        let (log, kept) = told(vec![Init, InitApply(good("a")), InitDone, Apply(broken())]);
        assert_eq!((log, kept), (vec![">a".to_owned(), "a>".into()], Vec::<String>::new()));
        let (log, kept) = told(vec![Init, InitApply(broken()), InitDone, Apply(good("a"))]);
        assert_eq!((log, kept), (vec!["a?".to_owned(), ">a".into()], vec!["a".to_owned()]));
        let (log, kept) = told(vec![Init, InitApply(broken()), InitDone, Init, InitDone]);
        assert_eq!((log, kept), (vec!["a?".to_owned(), "a?".into()], Vec::<String>::new()));
    }

    #[test]
    fn an_object_that_lies_in_no_namespace_is_kept_and_forgotten_like_any_other() {
        use watcher::Event::*;
        let (reader, writer) = store::<Namespace>();
        let mut keeper = Keeper::new(reader.clone(), writer, Unreadable::default());
        let namespace = |name: &str| -> DeserializeGuard<Namespace> {
            let metadata =
                serde_json::json!({"name": name, "labels": {"team": name}, "annotations": {"a": "b"}});
            serde_json::from_value(serde_json::json!({"metadata": metadata, "status": {"phase": "Active"}}))
                .unwrap()
        };
        let gone = Mutex::new(Vec::new());
        for event in [Apply(namespace("a")), Apply(namespace("b")), Delete(namespace("a"))] {
            keeper.take(shrunk(event, shrink_namespace), &|t: Touched<'_, Namespace>| {
                gone.lock().extend(t.before.map(|before| before.name_any()));
            });
        }
        assert_eq!(gone.into_inner(), ["a"]);
        let kept = reader.get(&ObjectRef::new("b")).expect("it is there");
        assert_eq!((kept.labels()["team"].as_str(), kept.annotations().len()), ("b", 0));
        assert_eq!(reader.len(), 1);
    }

    #[test]
    fn a_list_of_one_namespace_forgets_what_cannot_be_read_there_and_nothing_else() {
        use watcher::Event::*;
        let broken = |namespace: &str| guard_in(namespace, "broken", serde_json::json!({"base": 7}));
        let (reader, writer) = store::<ModelGroup>();
        let unreadable = Unreadable::default();
        let mut keeper = Keeper::new(reader, writer, unreadable.clone());
        let mut merge = Merge::of(["m".to_owned(), "n".to_owned()]);
        let mut take = |number, event| {
            let mut told = Vec::new();
            for event in merge.take(number, event) {
                let log = Mutex::new(Vec::new());
                keeper.take(event, &|t: Touched<'_, ModelGroup>| log.lock().push(t.key.clone()));
                told.append(&mut log.into_inner());
            }
            told
        };
        let (in_m, in_n) = (("m".to_owned(), "broken".to_owned()), ("n".to_owned(), "broken".to_owned()));
        for (number, namespace) in [(0, "m"), (1, "n")] {
            assert!(take(number, Init).is_empty());
            assert!(take(number, InitApply(broken(namespace))).is_empty());
            if number == 0 {
                assert!(take(number, InitDone).is_empty(), "the other one has yet to be listed");
            }
        }
        assert_eq!(take(1, InitDone), [in_m.clone(), in_n.clone()]);
        assert!(unreadable.why(&in_m).is_some() && unreadable.why(&in_n).is_some());
        take(0, Init);
        assert_eq!(take(0, InitDone), std::slice::from_ref(&in_m));
        assert!(unreadable.why(&in_m).is_none() && unreadable.why(&in_n).is_some());
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
