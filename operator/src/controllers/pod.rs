//! What a worker pod says about itself: the few facts that decisions need, and its troubles.

use k8s_openapi::{
    api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod},
    jiff::Timestamp,
};
use kube::ResourceExt;
use turret_crds::{condition::reason, label};

/// Annotation on a worker pod: hash of the template it was made from.
pub const TEMPLATE: &str = "turret.dev/pod-template";
/// Annotation on a pod by which a ReplicaSet chooses: of two pods that are both ready, the one with less leaves first.
pub const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";
/// Its value on a worker that is to leave first.
pub const LEAVES_FIRST: &str = "-1000";
/// Name of the container that runs the worker.
pub const CONTAINER: &str = "worker";

/// Facts of a worker pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PodFacts {
    /// Its name.
    pub name: String,
    /// Its address, once it has one.
    pub ip: Option<String>,
    /// Hash of the template it was made from.
    pub template: Option<String>,
    /// Whether it is being deleted.
    pub leaving: bool,
    /// Whether it has ended for good (evicted, for example) and will not start again.
    pub ended: bool,
    /// Whether Kubernetes sends it requests.
    pub ready: bool,
    /// What keeps it from running.
    pub trouble: Option<Trouble>,
    /// Since when it cannot be scheduled.
    pub unschedulable_since: Option<Timestamp>,
    /// When it was made.
    pub created: Option<Timestamp>,
    /// Whether it is marked as one that leaves first when there are to be fewer.
    pub leaves_first: bool,
}

/// What keeps a pod from running.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// A constant of [`reason`].
    pub reason: &'static str,
    /// For a person. Never holds counts or times, which would move with every attempt.
    pub message: String,
    /// Whether only a change by somebody can help.
    pub needs_change: bool,
}

impl PodFacts {
    /// Reads the facts of a pod.
    pub fn of(pod: &Pod) -> Self {
        let status = pod.status.as_ref();
        let conditions = status.and_then(|s| s.conditions.as_deref()).unwrap_or_default();
        let condition = |type_: &str| conditions.iter().find(|c| c.type_ == type_);
        let phase = status.and_then(|s| s.phase.as_deref());
        let container = status
            .and_then(|s| s.container_statuses.as_deref())
            .and_then(|all| all.iter().find(|c| c.name == CONTAINER));
        let unscheduled = condition("PodScheduled").filter(|c| c.status == "False");
        let unschedulable = unscheduled.map(|c| Trouble {
            reason: reason::UNSCHEDULABLE,
            message: format!(
                "pod {} cannot be scheduled: {}",
                pod.name_any(),
                c.message.as_deref().unwrap_or("the scheduler gives no reason")
            ),
            needs_change: false,
        });
        Self {
            name: pod.name_any(),
            ip: status.and_then(|s| s.pod_ip.clone()).filter(|ip| !ip.is_empty()),
            template: pod.annotations().get(TEMPLATE).cloned(),
            leaving: pod.metadata.deletion_timestamp.is_some(),
            ended: matches!(phase, Some("Failed" | "Succeeded")),
            ready: condition("Ready").is_some_and(|c| c.status == "True"),
            trouble: unschedulable.or_else(|| container.and_then(|c| container_trouble(&pod.name_any(), c))),
            unschedulable_since: unscheduled.and_then(|c| c.last_transition_time.as_ref()).map(|t| t.0),
            created: pod.metadata.creation_timestamp.as_ref().map(|t| t.0),
            leaves_first: pod.annotations().get(DELETION_COST).is_some_and(|cost| cost == LEAVES_FIRST),
        }
    }

    /// Whether it counts among the workers that are there.
    pub fn counts(&self) -> bool {
        !self.leaving && !self.ended
    }
}

/// Drops of a pod what no decision needs: nearly all of it.
pub fn shrink(pod: &mut Pod) {
    pod.spec = None;
    pod.metadata.managed_fields = None;
    pod.metadata.owner_references = None;
}

fn container_trouble(pod: &str, container: &ContainerStatus) -> Option<Trouble> {
    let state = container.state.as_ref();
    let ended = state
        .and_then(|s| s.terminated.as_ref())
        .or_else(|| container.last_state.as_ref().and_then(|s| s.terminated.as_ref()));
    if let Some(waiting) = state.and_then(|s| s.waiting.as_ref()) {
        let said = waiting.message.as_deref().unwrap_or_default();
        match waiting.reason.as_deref().unwrap_or_default() {
            "ErrImagePull"
            | "ImagePullBackOff"
            | "ErrImageNeverPull"
            | "InvalidImageName"
            | "ImageInspectError"
            | "RegistryUnavailable" => {
                return Some(Trouble {
                    reason: reason::IMAGE_UNAVAILABLE,
                    message: format!(
                        "pod {pod} cannot get the image `{}`; check spec.worker.image, the registry and the node's access to it",
                        container.image
                    ),
                    needs_change: false,
                });
            }
            "CreateContainerConfigError" | "CreateContainerError" | "RunContainerError" => {
                return Some(Trouble {
                    reason: reason::CRASHING,
                    message: format!("pod {pod} cannot be started: {said}"),
                    needs_change: false,
                });
            }
            // `ContainerCreating` and `PodInitializing` are the ordinary way up.
            _ => {}
        }
    }
    // A worker that crashes again and again runs for a moment in between: until it is ready, the
    // last crash is what there is to tell.
    let last = ended.filter(|_| !container.ready)?;
    Some(last_words(pod, last))
}

fn last_words(pod: &str, ended: &ContainerStateTerminated) -> Trouble {
    let said = ended.message.as_deref().map(str::trim).filter(|m| !m.is_empty());
    if ended.exit_code == label::EXIT_DEVICE {
        return Trouble {
            reason: reason::DEVICE_NOT_FOUND,
            message: format!(
                "pod {pod} cannot use the device it was given: {}",
                shorten(said.unwrap_or("it gives no reason; see its log"))
            ),
            needs_change: true,
        };
    }
    let how = match (ended.reason.as_deref(), ended.exit_code) {
        (Some("OOMKilled"), _) => {
            "was killed because it used more memory than worker.resources.limits.memory".to_owned()
        }
        (_, code) => format!("ended with exit code {code}"),
    };
    let said = said.map(|s| format!(": {}", shorten(s))).unwrap_or_default();
    Trouble { reason: reason::CRASHING, message: format!("pod {pod} {how}{said}"), needs_change: false }
}

/// The last words of a process, short enough for a status, and the same each time it ends in the
/// same way: without colours, times and what it logged before all was lost.
fn shorten(text: &str) -> String {
    const MOST: usize = 400;
    let lines: Vec<String> = text.lines().filter_map(meaning).collect();
    let text = lines.join(" ");
    let from = text.char_indices().rev().nth(MOST - 1).map_or(0, |(at, _)| at);
    let cut = if from > 0 { "…" } else { "" };
    format!("{cut}{}", &text[from..])
}

/// What a line says; `None` when it says nothing about an end.
fn meaning(line: &str) -> Option<String> {
    let mut plain = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, escape)) = rest.split_once('\u{1b}') {
        plain.push_str(before);
        rest = escape.find(|c: char| c.is_ascii_alphabetic()).map_or("", |end| &escape[end + 1..]);
    }
    plain.push_str(rest);
    let mut words: Vec<&str> = plain.split_whitespace().collect();
    let is_time =
        |w: &str| w.len() > 10 && w.as_bytes()[0].is_ascii_digit() && w.contains('T') && w.contains(':');
    if words.first().is_some_and(|w| is_time(w)) {
        words.remove(0);
    }
    let is_chatter =
        matches!(words.first(), Some(&"INFO" | &"DEBUG" | &"TRACE")) || plain.starts_with("note: run with");
    (!is_chatter && !words.is_empty()).then(|| words.join(" "))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn facts(status: serde_json::Value) -> PodFacts {
        let pod = json!({"metadata": {"name": "p", "namespace": "n"}, "status": status});
        PodFacts::of(&serde_json::from_value(pod).unwrap())
    }

    fn container(state: serde_json::Value, last: serde_json::Value) -> serde_json::Value {
        json!({"containerStatuses": [{
            "name": "worker", "image": "reg/worker:1", "imageID": "", "ready": false, "restartCount": 3,
            "state": state, "lastState": last,
        }]})
    }

    #[test]
    fn troubles_name_their_reason_and_what_to_do() {
        let back_off =
            json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting"}});
        let ended = |code: i32, reason: &str, message: &str| json!({"terminated": {"exitCode": code, "reason": reason, "message": message}});
        let cases = [
            (
                json!({"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                       "message": "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."}]}),
                reason::UNSCHEDULABLE,
                "Insufficient nvidia.com/gpu",
                false,
            ),
            (
                container(back_off.clone(), ended(78, "Error", "no CUDA device")),
                reason::DEVICE_NOT_FOUND,
                "no CUDA device",
                true,
            ),
            (
                container(back_off.clone(), ended(1, "Error", "bad flag")),
                reason::CRASHING,
                "exit code 1: bad flag",
                false,
            ),
            (container(back_off, ended(137, "OOMKilled", "")), reason::CRASHING, "limits.memory", false),
            (
                container(
                    json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off 20s"}}),
                    json!({}),
                ),
                reason::IMAGE_UNAVAILABLE,
                "reg/worker:1",
                false,
            ),
            (
                container(
                    json!({"waiting": {"reason": "CreateContainerConfigError", "message": "no user"}}),
                    json!({}),
                ),
                reason::CRASHING,
                "no user",
                false,
            ),
        ];
        for (status, reason, says, needs_change) in cases {
            let trouble = facts(status).trouble.unwrap_or_else(|| panic!("{reason} is seen"));
            assert_eq!((trouble.reason, trouble.needs_change), (reason, needs_change));
            assert!(trouble.message.contains(says), "{}", trouble.message);
            assert!(!trouble.message.contains("0s"), "a moving time in `{}`", trouble.message);
        }
    }

    #[test]
    fn a_pod_that_starts_has_no_trouble() {
        for state in [json!({"waiting": {"reason": "ContainerCreating"}}), json!({"running": {}})] {
            assert_eq!(facts(container(state, json!({}))).trouble, None);
        }
    }

    #[test]
    fn a_crash_is_told_until_the_worker_is_ready_again() {
        let ended = json!({"terminated": {"exitCode": 1}});
        let mut status = container(json!({"running": {}}), ended);
        assert_eq!(facts(status.clone()).trouble.unwrap().reason, reason::CRASHING);
        status["containerStatuses"][0]["ready"] = true.into();
        assert_eq!(facts(status).trouble, None);
    }

    #[test]
    fn last_words_are_the_same_each_time_and_without_chatter() {
        let log = "\u{1b}[2m2026-11-21T09:01:56.278019Z\u{1b}[0m \u{1b}[32m INFO\u{1b}[0m lens resolved\n\
                   2026-11-21T09:01:57Z ERROR no device\nallocation failed\nnote: run with `RUST_BACKTRACE=1`\n";
        assert_eq!(shorten(log), "ERROR no device allocation failed");
    }

    #[test]
    fn long_last_words_keep_their_end() {
        let words = format!("{} the end", "é".repeat(1000));
        let short = shorten(&words);
        assert!(short.starts_with('…') && short.ends_with("the end") && short.chars().count() == 401);
    }
}
