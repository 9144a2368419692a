//! The steps of a story, and when each is done. Pure.

use serde_json::json;

use super::end_state::EndState;

/// The group.
pub const GROUP: &str = "g";
/// The placement.
pub const PLACEMENT: &str = "p";

/// What a user does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Starts the operator, with nothing to do.
    Start,
    /// Declares the group with one lens, and the placement on one worker.
    Create,
    /// Adds a lens.
    AddLens,
    /// Asks for a second worker.
    ScaleUp,
    /// And not any more.
    ScaleDown,
    /// Gives the second lens other files.
    ChangeLens,
    /// Removes it.
    RemoveLens,
    /// Deletes the placement.
    DeletePlacement,
    /// Deletes the group.
    DeleteGroup,
}

impl Step {
    /// All of them, in order.
    pub const ALL: [Self; 9] = [
        Self::Start,
        Self::Create,
        Self::AddLens,
        Self::ScaleUp,
        Self::ScaleDown,
        Self::ChangeLens,
        Self::RemoveLens,
        Self::DeletePlacement,
        Self::DeleteGroup,
    ];

    /// Whether the pods must be the same ones afterwards.
    pub fn keeps_pods(self) -> bool {
        matches!(self, Self::AddLens | Self::ChangeLens | Self::RemoveLens)
    }

    /// Whether what the step asks for is there, as the statuses tell it; else what is missing.
    pub fn is_reached(self, state: &EndState) -> Result<(), String> {
        let (workers, lenses) = match self {
            Self::Start => return has_keys(state),
            Self::DeletePlacement => {
                nothing_of_the_placement(state)?;
                return says(state, &format!("ModelGroup/{GROUP}"), "NotPlaced");
            }
            Self::DeleteGroup => {
                nothing_of_the_placement(state)?;
                let is_gone = state.count("ModelGroup") == 0;
                return is_gone.then_some(()).ok_or_else(|| "the group is there".to_owned());
            }
            Self::Create | Self::RemoveLens => (1, 1),
            Self::AddLens | Self::ScaleDown | Self::ChangeLens => (1, 2),
            Self::ScaleUp => (2, 2),
        };
        serves(state, GROUP, PLACEMENT, workers)?;
        let said = &state.objects[&format!("ModelGroup/{GROUP}")]["status"]["readyLenses"];
        if *said == json!(lenses) { Ok(()) } else { Err(format!("{said} of {lenses} lenses are ready")) }
    }
}

fn has_keys(state: &EndState) -> Result<(), String> {
    for name in ["turret-operator-keys", "turret-gateway-keys"] {
        let fields = state.objects.get(&format!("Secret/{name}")).map(|secret| &secret["fields"]);
        if fields != Some(&json!(["key.pem"])) {
            return Err(format!("the Secret {name} has {fields:?}"));
        }
    }
    if state.count("Lease") == 1 { Ok(()) } else { Err(format!("{} Leases", state.count("Lease"))) }
}

fn nothing_of_the_placement(state: &EndState) -> Result<(), String> {
    let kinds =
        ["ModelPlacement", "ConfigMap", "Service", "PodDisruptionBudget", "Deployment", "ReplicaSet", "Pod"];
    let left =
        state.objects.keys().filter(|name| kinds.iter().any(|kind| name.starts_with(&format!("{kind}/"))));
    let left: Vec<_> = left.map(String::as_str).collect();
    if left.is_empty() { Ok(()) } else { Err(format!("left: {left:?}")) }
}

/// Whether group and placement are ready with so many pods, for what is declared now.
pub fn serves(state: &EndState, group: &str, placement: &str, workers: usize) -> Result<(), String> {
    let (group, placement) = (format!("ModelGroup/{group}"), format!("ModelPlacement/{placement}"));
    for name in [&group, &placement] {
        says(state, name, "Serving")?;
    }
    let of_status = &state.objects[&placement]["status"];
    for count in ["replicas", "readyReplicas", "updatedReplicas"] {
        if of_status[count] != json!(workers) {
            return Err(format!("{placement} has {count} {}", of_status[count]));
        }
    }
    let pods = state.count("Pod");
    if pods == workers { Ok(()) } else { Err(format!("there are {pods} pods")) }
}

/// Whether an object is ready for this reason, of the generation that it has.
fn says(state: &EndState, name: &str, reason: &str) -> Result<(), String> {
    let Some(object) = state.objects.get(name) else { return Err(format!("there is no {name}")) };
    let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
    let ready = conditions.into_iter().find(|condition| condition["type"] == "Ready");
    let Some(ready) = ready else { return Err(format!("{name} says nothing")) };
    let is_so = ready["status"] == "True"
        && ready["reason"] == reason
        && ready["observedGeneration"] == object["metadata"]["generation"];
    if is_so { Ok(()) } else { Err(format!("{name} of {}: {ready}", object["metadata"]["generation"])) }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn state(objects: Value) -> EndState {
        let objects =
            objects.as_object().unwrap().iter().map(|(name, object)| (name.clone(), object.clone()));
        EndState { objects: objects.collect(), ..EndState::default() }
    }

    fn ready(generation: i64, reason: &str) -> Value {
        json!({
            "metadata": {"generation": 2},
            "status": {
                "replicas": 1, "readyReplicas": 1, "updatedReplicas": 1, "readyLenses": 1,
                "conditions": [
                    {"type": "Ready", "status": "True", "reason": reason, "observedGeneration": generation},
                ],
            },
        })
    }

    #[test]
    fn a_step_is_reached_only_when_all_that_it_asks_for_is_there() {
        let of = |group: Value, placement: Value| {
            let mut all = json!({"ModelGroup/g": group, "Pod/1": {}});
            if placement != Value::Null {
                all["ModelPlacement/p"] = placement;
            }
            state(all)
        };
        let all = of(ready(2, "Serving"), ready(2, "Serving"));
        assert_eq!(Step::Create.is_reached(&all), Ok(()));
        assert!(Step::AddLens.is_reached(&all).unwrap_err().contains("1 of 2 lenses"));
        assert!(Step::ScaleUp.is_reached(&all).is_err());
        assert!(Step::DeletePlacement.is_reached(&all).unwrap_err().contains("left"));
        let stale = of(ready(2, "Serving"), ready(1, "Serving"));
        assert!(Step::Create.is_reached(&stale).is_err(), "it speaks of an older generation");
        let gone = of(ready(2, "Serving"), Value::Null);
        assert!(Step::Create.is_reached(&gone).unwrap_err().contains("no ModelPlacement/p"));
    }

    #[test]
    fn the_end_is_reached_when_nothing_is_left() {
        let alone = state(json!({"ModelGroup/g": ready(2, "NotPlaced")}));
        assert_eq!(Step::DeletePlacement.is_reached(&alone), Ok(()));
        assert!(Step::DeleteGroup.is_reached(&alone).is_err());
        let keys = json!({"fields": ["key.pem"]});
        let nothing = state(json!({
            "Secret/turret-operator-keys": keys, "Secret/turret-gateway-keys": keys, "Lease/l": {},
        }));
        assert_eq!(Step::DeleteGroup.is_reached(&nothing), Ok(()));
        assert_eq!(Step::Start.is_reached(&nothing), Ok(()));
        assert!(Step::Start.is_reached(&state(json!({"Lease/l": {}}))).is_err());
    }
}
