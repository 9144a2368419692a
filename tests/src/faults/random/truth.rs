//! Statuses are watched all the time: no version of one may say what cannot be so.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt as _;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::task::JoinSet;

use super::super::end_state::EndState;

/// Whoever looks at all versions of some objects. Looks until it is dropped.
#[derive(Default)]
pub struct Witness {
    seen: Arc<Mutex<Seen>>,
    tasks: JoinSet<()>,
}

#[derive(Default)]
struct Seen {
    versions: usize,
    lies: Vec<String>,
}

impl Witness {
    /// Looks at the objects of one more kind.
    pub fn watch<K>(&mut self, api: Api<K>)
    where
        K: kube::Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Serialize + Send + 'static,
    {
        let seen = self.seen.clone();
        self.tasks.spawn(async move {
            let mut events = std::pin::pin!(watcher(api, watcher::Config::default()).default_backoff());
            let mut last: BTreeMap<String, Value> = BTreeMap::new();
            while let Some(event) = events.next().await {
                let (object, follows) = match event {
                    Ok(watcher::Event::Apply(object)) => (object, true),
                    // What was between is not known.
                    Ok(watcher::Event::InitApply(object)) => (object, false),
                    Ok(_) | Err(_) => continue,
                };
                let now = serde_json::to_value(&object).expect("an object is JSON");
                let before = last.insert(object.name_any(), now.clone()).filter(|_| follows);
                let mut seen = seen.lock().unwrap_or_else(PoisonError::into_inner);
                seen.versions += 1;
                let lies = lies(before.as_ref(), &now).into_iter();
                seen.lies.extend(lies.map(|lie| format!("{} {}: {lie}", K::kind(&()), object.name_any())));
            }
        });
    }

    /// How many versions were looked at, and what none of them may say.
    pub fn said(&self) -> (usize, Vec<String>) {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        (seen.versions, seen.lies.clone())
    }
}

/// What cannot be so of an object as it is, and as it was in the version before.
fn lies(before: Option<&Value>, now: &Value) -> Vec<String> {
    let mut lies = Vec::new();
    let holds = |type_: &str| condition(now, type_).is_some_and(|c| c["status"] == "True");
    for (one, other) in [("Reconciling", "Stalled"), ("Ready", "Stalled")] {
        if holds(one) && holds(other) {
            lies.push(format!("{one} and {other} are both true"));
        }
    }
    let generation = now["metadata"]["generation"].as_i64();
    let observed = |object: &Value| object["status"]["observedGeneration"].as_i64();
    if observed(now) > generation {
        lies.push(format!("it was observed in generation {:?} of {generation:?}", observed(now)));
    }
    for condition in conditions(now).filter(|c| c["observedGeneration"].as_i64() > generation) {
        lies.push(format!("{condition} is of a generation to come"));
    }
    // One of the same name is another object.
    let Some(before) = before.filter(|before| before["metadata"]["uid"] == now["metadata"]["uid"]) else {
        return lies;
    };
    if observed(now) < observed(before) {
        lies.push(format!(
            "it was observed in generation {:?}, and then {:?}",
            observed(before),
            observed(now)
        ));
    }
    for new in conditions(now) {
        let Some(old) = condition(before, new["type"].as_str().unwrap_or_default()) else { continue };
        let moved = old["lastTransitionTime"] != new["lastTransitionTime"];
        if moved && old["status"] == new["status"] {
            lies.push(format!("it has not changed, but its time has: {old} became {new}"));
        }
    }
    lies
}

fn conditions(object: &Value) -> impl Iterator<Item = &Value> {
    object["status"]["conditions"].as_array().into_iter().flatten()
}

fn condition<'a>(object: &'a Value, type_: &str) -> Option<&'a Value> {
    conditions(object).find(|condition| condition["type"] == type_)
}

/// Whether everything has come to rest: statuses speak of what is declared now and nothing is under way, all pods there are are
/// wanted, and nothing belongs to a placement that is gone. Else what has not.
pub fn rests(state: &EndState) -> Result<(), String> {
    for (name, object) in &state.objects {
        let kind = name.split_once('/').map_or(name.as_str(), |(kind, _)| kind);
        match kind {
            "ModelGroup" | "ModelPlacement" => {
                let is_current = object["status"]["observedGeneration"] == object["metadata"]["generation"];
                let is_busy = condition(object, "Reconciling").is_none_or(|c| c["status"] != "False");
                if !is_current || is_busy {
                    return Err(format!("{name} says {}", object["status"]));
                }
            }
            "Deployment" => {
                let wanted = &object["spec"]["replicas"];
                let mut counts = object["replicas"].as_array().into_iter().flatten();
                if counts.any(|count| count != wanted) {
                    return Err(format!("{name} has {} of {wanted} pods", object["replicas"]));
                }
            }
            // Of the stored document; any other digest has no word.
            "worker" if object["digest"].as_str().is_none_or(|digest| !digest.starts_with('<')) => {
                return Err(format!("{name} has another document: {object}"));
            }
            _ => {}
        }
        let placement = object["metadata"]["labels"][turret_crds::label::PLACEMENT].as_str();
        let is_owned = placement.is_none_or(|of| state.objects.contains_key(&format!("ModelPlacement/{of}")));
        if !is_owned {
            return Err(format!("{name} is left of the placement {placement:?}"));
        }
    }
    let wanted = state.objects.iter().filter(|(name, _)| name.starts_with("Deployment/"));
    let wanted: i64 = wanted.filter_map(|(_, object)| object["spec"]["replicas"].as_i64()).sum();
    let pods = state.count("Pod");
    if usize::try_from(wanted) == Ok(pods) { Ok(()) } else { Err(format!("{pods} pods, wanted {wanted}")) }
}

/// The same without what says how often something was changed, and on which way it came to be so.
pub fn wherever_it_came_from(state: &EndState) -> EndState {
    let mut objects = BTreeMap::new();
    let mut unnamed: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for (name, object) in &state.objects {
        let mut object = object.clone();
        forget_generations(&mut object);
        match name.split_once('/') {
            // How many templates there were.
            Some(("ReplicaSet", _)) => {}
            Some(("worker", _)) => {
                // Its word is known for one placement of a namespace only; its digest is known for each.
                if let Value::Object(fields) = &mut object {
                    fields.remove("sequence");
                }
                unnamed.entry("worker").or_default().push(object);
            }
            Some(("Pod", _)) => unnamed.entry("Pod").or_default().push(object),
            _ => drop(objects.insert(name.clone(), object)),
        }
    }
    for (kind, mut all) in unnamed {
        all.sort_by_key(Value::to_string);
        objects.extend((1..).zip(all).map(|(number, object)| (format!("{kind}/{number}"), object)));
    }
    EndState { objects, ..EndState::default() }
}

/// What has a generation in it.
const GENERATIONS: [&str; 3] = ["generation", "observedGeneration", "turret.dev/document-groups"];

fn forget_generations(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|field, _| !GENERATIONS.contains(&field.as_str()));
            fields.values_mut().for_each(forget_generations);
        }
        Value::Array(items) => items.iter_mut().for_each(forget_generations),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn object(generation: i64, observed: i64, conditions: &[(&str, &str, &str)]) -> Value {
        let conditions: Vec<_> = conditions
            .iter()
            .map(|(type_, status, time)| {
                json!({"type": type_, "status": status, "lastTransitionTime": time, "observedGeneration": observed})
            })
            .collect();
        json!({
            "metadata": {"uid": "u", "generation": generation},
            "status": {"observedGeneration": observed, "conditions": conditions},
        })
    }

    #[test]
    fn a_status_that_may_be_is_no_lie() {
        let before = object(1, -1, &[("Ready", "False", "1"), ("Reconciling", "True", "1")]);
        let now =
            object(2, 1, &[("Ready", "True", "5"), ("Reconciling", "False", "5"), ("Stalled", "False", "5")]);
        assert_eq!(lies(Some(&before), &now), [""; 0]);
        assert_eq!(lies(None, &object(1, 1, &[])), [""; 0]);
    }

    #[test]
    fn each_lie_is_named() {
        let both = object(1, 1, &[("Stalled", "True", "1"), ("Reconciling", "True", "1")]);
        assert_eq!(lies(None, &both), ["Reconciling and Stalled are both true"]);
        let ready = object(1, 1, &[("Ready", "True", "1")]);
        let moved = object(1, 1, &[("Ready", "True", "2")]);
        assert!(lies(Some(&ready), &moved)[0].starts_with("it has not changed, but its time has"));
        assert_eq!(lies(None, &object(1, 2, &[("Ready", "True", "1")])).len(), 2);
        let back = lies(Some(&object(3, 3, &[])), &object(3, 2, &[]));
        assert_eq!(back, ["it was observed in generation Some(3), and then Some(2)"]);
        let mut another = moved.clone();
        another["metadata"]["uid"] = json!("v");
        assert_eq!(lies(Some(&ready), &another), [""; 0]);
    }

    #[test]
    fn what_is_under_way_or_left_over_does_not_rest() {
        let state = |objects: Value| {
            let objects = objects.as_object().unwrap();
            let objects = objects.iter().map(|(name, object)| (name.clone(), object.clone()));
            EndState { objects: objects.collect(), ..EndState::default() }
        };
        let placement = object(2, 2, &[("Reconciling", "False", "1")]);
        let of_it = json!({
            "metadata": {"labels": {(turret_crds::label::PLACEMENT): "p"}},
            "spec": {"replicas": 1}, "replicas": [1, 1, 1, 1],
        });
        let whole = json!({"ModelPlacement/p": placement, "Deployment/turret-p": of_it, "Pod/1": {}});
        assert_eq!(rests(&state(whole.clone())), Ok(()));
        for (place, value, why) in [
            ("/ModelPlacement~1p/status/observedGeneration", json!(1), "ModelPlacement/p says"),
            ("/ModelPlacement~1p/status/conditions/0/status", json!("True"), "ModelPlacement/p says"),
            ("/Deployment~1turret-p/replicas/3", json!(null), "has [1,1,1,null] of 1 pods"),
            ("/Deployment~1turret-p/metadata/labels/turret.dev~1placement", json!("q"), "is left of"),
        ] {
            let mut state_of = whole.clone();
            *state_of.pointer_mut(place).unwrap() = value;
            let said = rests(&state(state_of)).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }
}
