//! What people ask of the operator by annotations, without a change of the spec. Pure.

use kube::{Resource, ResourceExt};
use turret_crds::label;

/// Longest value of a request that a status keeps, characters.
const LONGEST: usize = 256;

/// Whether the object is to be left as it is. Any value but `false` asks for that: who mistypes it finds nothing changed,
/// and the condition `Paused` in the status.
pub fn is_paused(object: &impl Resource) -> bool {
    let value = object.annotations().get(label::PAUSED);
    value.is_some_and(|value| !value.trim().eq_ignore_ascii_case("false"))
}

/// What the status says of the request to be looked at once it is handled: the request's value, or what it said before when
/// there is none.
pub fn handled(object: &impl Resource, before: Option<&String>) -> Option<String> {
    let value = object.annotations().get(label::RECONCILE_REQUESTED_AT);
    value.map(|value| value.chars().take(LONGEST).collect()).or_else(|| before.cloned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controllers::fixtures::placement;

    #[test]
    fn an_object_is_paused_by_any_value_but_false() {
        let mut object = placement(&["a"]);
        assert!(!is_paused(&object));
        for (value, paused) in
            [("true", true), ("", true), ("yes", true), ("false", false), (" False", false)]
        {
            object.annotations_mut().insert(label::PAUSED.into(), value.into());
            assert_eq!(is_paused(&object), paused, "`{value}`");
        }
    }

    #[test]
    fn a_request_is_noted_shortened_and_not_forgotten_with_its_annotation() {
        let mut object = placement(&["a"]);
        assert_eq!(handled(&object, None), None);
        let before = Some("monday".to_owned());
        assert_eq!(handled(&object, before.as_ref()), before);
        object.annotations_mut().insert(label::RECONCILE_REQUESTED_AT.into(), "é".repeat(300));
        assert_eq!(handled(&object, before.as_ref()), Some("é".repeat(256)));
    }
}
