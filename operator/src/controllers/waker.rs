//! Which objects are to be looked at when another one changes.

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
