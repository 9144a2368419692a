//! One watch made of several, each of a namespace of its own. Pure.
//!
//! A store is filled by one list and then changed, so the first lists of all namespaces become one. A later list of one of them
//! tells only of that namespace: what it does not name was deleted there while nobody watched.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::{
    Resource, ResourceExt,
    core::{DeserializeGuard, error_boundary::InvalidObject},
    runtime::watcher::Event,
};

/// Makes one watch of several.
pub struct Merge<K> {
    parts: Vec<Part<K>>,
    /// Whether the first lists of all have ended.
    begun: bool,
}

/// The watch of one namespace.
struct Part<K> {
    namespace: String,
    /// What a list that comes in has named so far.
    listing: Option<BTreeMap<String, DeserializeGuard<K>>>,
    /// What was listed while others have yet to be.
    waiting: Option<BTreeMap<String, DeserializeGuard<K>>>,
    /// What is there, once all have been listed.
    names: BTreeSet<String>,
}

impl<K: Resource<DynamicType = ()>> Merge<K> {
    /// Of the watches of these namespaces. A single one is passed on as it is.
    pub fn of(namespaces: impl IntoIterator<Item = String>) -> Self {
        let parts = namespaces.into_iter().map(|namespace| Part {
            namespace,
            listing: None,
            waiting: None,
            names: BTreeSet::new(),
        });
        Self { parts: parts.collect(), begun: false }
    }

    /// What the one watch shows when the watch with this number does.
    pub fn take(
        &mut self,
        number: usize,
        event: Event<DeserializeGuard<K>>,
    ) -> Vec<Event<DeserializeGuard<K>>> {
        if self.parts.len() == 1 {
            return vec![event];
        }
        let begun = self.begun;
        let Some(part) = self.parts.get_mut(number) else { return Vec::new() };
        match event {
            Event::Init => {
                part.listing = Some(BTreeMap::new());
                Vec::new()
            }
            Event::InitApply(object) => {
                part.listing.get_or_insert_default().insert(object.name_any(), object);
                Vec::new()
            }
            Event::InitDone if begun => part.relisted(),
            Event::InitDone => {
                part.waiting = Some(part.listing.take().unwrap_or_default());
                self.begin()
            }
            Event::Apply(object) if begun => {
                part.names.insert(object.name_any());
                vec![Event::Apply(object)]
            }
            Event::Apply(object) => {
                if let Some(waiting) = &mut part.waiting {
                    waiting.insert(object.name_any(), object);
                }
                Vec::new()
            }
            Event::Delete(object) if begun => {
                part.names.remove(&object.name_any());
                vec![Event::Delete(object)]
            }
            Event::Delete(object) => {
                if let Some(waiting) = &mut part.waiting {
                    waiting.remove(&object.name_any());
                }
                Vec::new()
            }
        }
    }

    /// One list of all, once every namespace has been listed.
    fn begin(&mut self) -> Vec<Event<DeserializeGuard<K>>> {
        if self.parts.iter().any(|part| part.waiting.is_none()) {
            return Vec::new();
        }
        self.begun = true;
        let mut events = vec![Event::Init];
        for part in &mut self.parts {
            for (name, object) in part.waiting.take().unwrap_or_default() {
                part.names.insert(name);
                events.push(Event::InitApply(object));
            }
        }
        events.push(Event::InitDone);
        events
    }
}

impl<K> Part<K> {
    fn relisted(&mut self) -> Vec<Event<DeserializeGuard<K>>> {
        let listed = self.listing.take().unwrap_or_default();
        let names: BTreeSet<String> = listed.keys().cloned().collect();
        let gone = self.names.difference(&names).map(|name| Event::Delete(gone(&self.namespace, name)));
        let events = gone.chain(listed.into_values().map(Event::Apply)).collect();
        self.names = names;
        events
    }
}

/// An object of which only the name is known.
fn gone<K>(namespace: &str, name: &str) -> DeserializeGuard<K> {
    let metadata = ObjectMeta {
        name: Some(name.to_owned()),
        namespace: Some(namespace.to_owned()),
        ..ObjectMeta::default()
    };
    DeserializeGuard(Err(InvalidObject { error: "it was deleted while nobody watched".into(), metadata }))
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use turret_crds::ModelGroup;

    use super::*;

    fn object(namespace: &str, name: &str) -> DeserializeGuard<ModelGroup> {
        serde_json::from_value(json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"base": {"source": {"uri": "file:///m"}}},
        }))
        .unwrap()
    }

    /// What the one watch showed, as text.
    fn shown(
        merge: &mut Merge<ModelGroup>,
        number: usize,
        event: Event<DeserializeGuard<ModelGroup>>,
    ) -> Vec<String> {
        let name = |o: &DeserializeGuard<ModelGroup>| {
            format!("{}/{}", ResourceExt::namespace(o).unwrap_or_default(), o.name_any())
        };
        let events = merge.take(number, event).into_iter().map(|event| match event {
            Event::Init => "init".to_owned(),
            Event::InitApply(o) => format!("listed {}", name(&o)),
            Event::InitDone => "done".to_owned(),
            Event::Apply(o) => format!("applied {}", name(&o)),
            Event::Delete(o) => format!("deleted {}", name(&o)),
        });
        events.collect()
    }

    #[test]
    fn the_first_lists_become_one_and_a_later_one_tells_of_its_namespace_only() {
        use Event::*;
        let mut merge = Merge::of(["a".to_owned(), "b".to_owned()]);
        let mut take = |number, event| shown(&mut merge, number, event);
        for event in [Init, InitApply(object("a", "x")), InitApply(object("a", "y")), InitDone] {
            assert_eq!(take(0, event), [""; 0]);
        }
        // While the other one is being listed.
        assert_eq!(take(0, Apply(object("a", "z"))), [""; 0]);
        assert_eq!(take(0, Delete(object("a", "y"))), [""; 0]);
        for event in [Init, InitApply(object("b", "x"))] {
            assert_eq!(take(1, event), [""; 0]);
        }
        assert_eq!(take(1, InitDone), ["init", "listed a/x", "listed a/z", "listed b/x", "done"]);
        assert_eq!(take(1, Apply(object("b", "new"))), ["applied b/new"]);
        assert_eq!(take(0, Delete(object("a", "z"))), ["deleted a/z"]);
        for event in [Init, InitApply(object("b", "x"))] {
            assert_eq!(take(1, event), [""; 0]);
        }
        assert_eq!(take(1, InitDone), ["deleted b/new", "applied b/x"], "nothing of the other namespace");
    }

    #[test]
    fn a_single_watch_is_passed_on_as_it_is() {
        use Event::*;
        let mut merge = Merge::of([String::new()]);
        for (event, expected) in
            [(Init, "init"), (InitApply(object("a", "x")), "listed a/x"), (InitDone, "done")]
        {
            assert_eq!(shown(&mut merge, 0, event), [expected]);
        }
    }
}
