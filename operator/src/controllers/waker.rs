//! Which objects are to be looked at when another one changes.

use k8s_openapi::api::core::v1::Namespace;
use kube::{ResourceExt, runtime::reflector::Store};
use turret_crds::{ModelGroup, ModelPlacement};

use super::{
    cache::Touched,
    context,
    wakes::{Key, Wakes},
};

/// Wakes placements and groups.
#[derive(Clone, Default)]
pub struct Waker {
    /// Placements to look at.
    pub placements: Wakes,
    /// Groups to look at.
    pub groups: Wakes,
}

impl Waker {
    /// A placement changed: it, the groups it names and those it named before.
    pub fn placement_changed(&self, touched: &Touched<'_, ModelPlacement>) {
        for placement in touched.both() {
            self.placements.wake(placement.namespace().unwrap_or_default(), placement.name_any());
            self.groups_of(placement);
        }
    }

    /// A group changed, or cannot be read: it, and the placements that name it.
    pub fn group_changed(&self, touched: &Touched<'_, ModelGroup>, placements: &Store<ModelPlacement>) {
        let (namespace, name) = touched.key.clone();
        self.groups.wake(&namespace, &name);
        // A write of the status alone changes nothing for a placement.
        let is_status_only = matches!((touched.before, touched.after), (Some(before), Some(after))
            if before.metadata.generation == after.metadata.generation
                && before.metadata.uid == after.metadata.uid
                && before.metadata.deletion_timestamp == after.metadata.deletion_timestamp);
        if is_status_only {
            return;
        }
        let naming = placements.state_filter(|p| {
            let own = p.metadata.namespace.as_deref().unwrap_or_default();
            p.spec.groups.iter().any(|g| g.target(own) == (&namespace, &name))
        });
        for placement in naming {
            self.placements.wake(placement.namespace().unwrap_or_default(), placement.name_any());
        }
    }

    /// A namespace changed: when its labels did, those of its placements that name groups of other namespaces, which may
    /// choose by labels who places them, and these groups.
    pub fn namespace_changed(&self, touched: &Touched<'_, Namespace>, placements: &Store<ModelPlacement>) {
        let labels = |namespace: Option<&Namespace>| namespace.map(|n| n.labels().clone());
        if labels(touched.before) == labels(touched.after) {
            return;
        }
        let Some(name) = touched.both().next().map(|namespace| namespace.name_any()) else { return };
        let reaching_out = placements.state_filter(|p| {
            p.metadata.namespace.as_ref() == Some(&name)
                && p.spec.groups.iter().any(|g| g.target(&name).0 != name)
        });
        for placement in reaching_out {
            self.placements.wake(&name, placement.name_any());
            self.groups_of(&placement);
        }
    }

    /// Something that belongs to a placement changed: the placement and its groups.
    pub fn placement_and_groups(&self, key: &Key, placements: &Store<ModelPlacement>) {
        self.placements.wake(&key.0, &key.1);
        if let Some(placement) = context::get(placements, &key.0, &key.1) {
            self.groups_of(&placement);
        }
    }

    fn groups_of(&self, placement: &ModelPlacement) {
        let own = placement.namespace().unwrap_or_default();
        for (namespace, name) in placement.spec.groups.iter().map(|g| g.target(&own)) {
            self.groups.wake(namespace, name);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt, StreamExt};
    use kube::runtime::{reflector::store, watcher::Event};
    use serde_json::json;

    use super::*;
    use crate::controllers::fixtures::{group, placement};

    /// What was woken, as `namespace/name`.
    fn woken(wakes: &Wakes) -> Vec<String> {
        let mut stream = std::pin::pin!(wakes.stream::<ModelGroup>());
        let mut names = Vec::new();
        while let Some(Some(object)) = stream.next().now_or_never() {
            names.push(format!("{}/{}", object.namespace.unwrap_or_default(), object.name));
        }
        names
    }

    /// Placements of the namespace `ns`: `p` names a group of its own, `q` one of the namespace `far` as well.
    fn placements() -> Store<ModelPlacement> {
        let (reader, mut writer) = store();
        let mut q = placement(&["a", "b"]);
        q.metadata.name = Some("q".into());
        q.spec.groups[1].group_ref =
            serde_json::from_value(json!({"name": "shared", "namespace": "far"})).unwrap();
        for placement in [placement(&["a"]), q] {
            writer.apply_watcher_event(&Event::Apply(placement));
        }
        reader
    }

    fn namespace(name: &str, team: &str) -> Namespace {
        serde_json::from_value(json!({"metadata": {"name": name, "labels": {"team": team}}})).unwrap()
    }

    #[test]
    fn labels_of_a_namespace_wake_what_reaches_out_of_it_and_nothing_else_does() {
        let (waker, placements) = (Waker::default(), placements());
        let (before, after, far) = (namespace("ns", "x"), namespace("ns", "y"), namespace("far", "x"));
        let key = Key::default();
        let touch =
            |before, after| waker.namespace_changed(&Touched { key: &key, before, after }, &placements);
        touch(Some(&before), Some(&before));
        touch(None, Some(&far));
        assert_eq!((woken(&waker.placements), woken(&waker.groups)), (vec![], vec![]));
        touch(Some(&before), Some(&after));
        assert_eq!(woken(&waker.placements), ["ns/q"]);
        assert_eq!(woken(&waker.groups), ["far/shared", "ns/a"]);
    }

    #[test]
    fn a_group_whose_consent_changes_wakes_the_placements_of_other_namespaces_that_name_it() {
        let (waker, placements) = (Waker::default(), placements());
        let mut before = group("shared", &[]);
        before.metadata.namespace = Some("far".into());
        let mut after = before.clone();
        after.metadata.generation = Some(2);
        let key = ("far".to_owned(), "shared".to_owned());
        let touched = Touched { key: &key, before: Some(&before), after: Some(&after) };
        waker.group_changed(&touched, &placements);
        assert_eq!(
            (woken(&waker.placements), woken(&waker.groups)),
            (vec!["ns/q".to_owned()], vec!["far/shared".to_owned()])
        );
    }
}
