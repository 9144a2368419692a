//! Writing a status: only when it differs, and never from a stale view.

use std::time::Duration;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::{
    Api, Resource, ResourceExt,
    api::{Patch, PatchParams},
};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::json;
use turret_crds::condition;

/// Field manager of everything the operator applies.
pub const FIELD_MANAGER: &str = "turret-operator";

/// While work is under way, a status that says only that in other words is written at most this
/// often.
const PASSING: SignedDuration = SignedDuration::from_secs(5);

/// Writes the status of an object, on the condition that nobody changed the object since it was
/// read: a stale view ends in a conflict, and the object is looked at again.
pub async fn write<K, S>(api: &Api<K>, object: &K, status: &S) -> kube::Result<()>
where
    K: Resource<DynamicType = ()> + DeserializeOwned,
    S: Serialize,
{
    let patch = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": {"name": object.name_any(), "resourceVersion": object.resource_version()},
        "status": status,
    });
    let params = PatchParams::apply(FIELD_MANAGER).force();
    api.patch_status(&object.name_any(), &params, &Patch::Apply(patch)).await.map(drop)
}

/// When the operator last wrote the status of an object.
pub fn last_written<K: Resource>(object: &K) -> Option<Timestamp> {
    let fields = object.meta().managed_fields.as_deref().unwrap_or_default();
    fields
        .iter()
        .filter(|f| f.manager.as_deref() == Some(FIELD_MANAGER) && f.subresource.as_deref() == Some("status"))
        .filter_map(|f| f.time.as_ref().map(|t| t.0))
        .max()
}

/// What the status says on the whole: what people and machines act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gist {
    generation: i64,
    /// `Ready`, `Available`, `Stalled`, `Accepted`, `Reconciling`.
    truths: [bool; 5],
}

impl Gist {
    /// The gist of a status.
    pub fn of(
        generation: i64,
        conditions: &[k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition],
    ) -> Self {
        let types = [
            condition::READY,
            condition::AVAILABLE,
            condition::STALLED,
            condition::ACCEPTED,
            condition::RECONCILING,
        ];
        Self { generation, truths: types.map(|t| condition::is_true(conditions, t)) }
    }

    fn is_reconciling(self) -> bool {
        self.truths[4]
    }
}

/// Whether a status that differs from the written one may wait, and how long: one that says only
/// in other words that work is under way.
///
/// When it was written is by the API server's clock. One that is further ahead than what a status may wait says nothing:
/// waiting for it would be to go on saying what is not so.
pub fn may_wait(old: Gist, new: Gist, last_written: Option<Timestamp>, now: Timestamp) -> Option<Duration> {
    let last = last_written.filter(|last| last.duration_since(now) <= PASSING)?;
    let due = last.checked_add(PASSING).ok()?;
    let passing = old == new && new.is_reconciling();
    (passing && due > now).then(|| due.duration_since(now).unsigned_abs())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};

    use super::*;

    fn gist(generation: i64, truths: &[&str]) -> Gist {
        let conditions: Vec<_> = truths
            .iter()
            .map(|t| Condition {
                type_: (*t).into(),
                status: "True".into(),
                reason: String::new(),
                message: String::new(),
                observed_generation: None,
                last_transition_time: Time(Timestamp::UNIX_EPOCH),
            })
            .collect();
        Gist::of(generation, &conditions)
    }

    #[test]
    fn only_other_words_for_work_under_way_wait() {
        let at = |s: i64| Timestamp::from_second(s).unwrap();
        let (busy, busier, ready) =
            (gist(1, &["Reconciling"]), gist(2, &["Reconciling"]), gist(1, &["Ready"]));
        assert_eq!(may_wait(busy, busy, Some(at(10)), at(12)), Some(Duration::from_secs(3)));
        assert_eq!(
            may_wait(busy, busy, Some(at(10)), at(8)),
            Some(Duration::from_secs(7)),
            "clocks differ a bit"
        );
        for (old, new, written, now) in [
            (busy, busy, Some(at(10)), at(15)),
            (busy, busy, Some(at(3600)), at(12)),
            (busy, busy, None, at(12)),
            (busy, busier, Some(at(10)), at(12)),
            (busy, ready, Some(at(10)), at(12)),
            (ready, busy, Some(at(10)), at(12)),
            (ready, ready, Some(at(10)), at(12)),
        ] {
            assert_eq!(may_wait(old, new, written, now), None, "{old:?} {new:?}");
        }
    }
}
