//! `ModelPlacement`: where groups run, on how many workers, under which budgets.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{EnvVar, ResourceRequirements, Toleration};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{assign, group::never_observed, quantity::ByteQuantity};

pub mod cache;
pub mod topology;

use cache::Cache;
use topology::TopologySpread;

/// Most groups a placement may name.
pub const MAX_GROUPS: usize = 16;

/// Where groups run.
#[derive(Clone, Debug, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "turret.dev",
    version = "v1alpha1",
    kind = "ModelPlacement",
    plural = "modelplacements",
    shortname = "mpl",
    category = "turret",
    namespaced,
    cel,
    status = "ModelPlacementStatus",
    derive = "PartialEq",
    doc = "Which model groups are served where: on how many workers, with which device, under which memory budgets.",
    scale(spec_replicas_path = ".spec.replicas", status_replicas_path = ".status.replicas", label_selector_path = ".status.selector"),
    validation = Rule::new("self.metadata.name.size() <= 52 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("the name of a ModelPlacement names Services and Pods: at most 52 lower-case letters, digits and `-`"),
    printcolumn(name = "Groups", type_ = "string", json_path = ".status.groupSummary", description = "Groups that are served"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".status.desiredReplicas", description = "Wanted workers"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.readyReplicas", description = "Workers that take requests"),
    printcolumn(name = "Updated", type_ = "integer", json_path = ".status.updatedReplicas", description = "Workers that serve exactly the newest document"),
    printcolumn(name = "Active", type_ = "string", json_path = ".status.activeSummary", description = "Active base of each worker, counted; refreshed at most once a minute"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", description = "Why it is or is not ready"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "VRAM", type_ = "string", json_path = ".status.deviceMemorySummary", description = "Device memory used / budget over all workers; refreshed at most once a minute", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.defaultGroupName) || self.groups.exists(g, g.name == self.defaultGroupName)").message("defaultGroupName must be the name of one of the groups"),
    validation = Rule::new("!has(self.switching) || !has(self.switching.activeGroupName) || self.groups.exists(g, g.name == self.switching.activeGroupName)").message("switching.activeGroupName must be the name of one of the groups"),
    validation = Rule::new("!has(self.memory) || !has(self.memory.diskBudget) || !has(self.cache) || ((!has(self.cache.ephemeral) || quantity(string(self.memory.diskBudget)).compareTo(quantity(string(self.cache.ephemeral.size))) <= 0) && (!has(self.cache.emptyDir) || !has(self.cache.emptyDir.sizeLimit) || quantity(string(self.memory.diskBudget)).compareTo(quantity(string(self.cache.emptyDir.sizeLimit))) <= 0))").message("memory.diskBudget is a part of the cache and must not be larger than its size"),
)]
pub struct ModelPlacementSpec {
    /// The groups that every worker of this placement can serve. 1 to 16.
    #[schemars(length(min = 1, max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub groups: Vec<PlacedGroup>,
    /// The group whose base a new worker makes active first, as long as other bases are not asked for more. Absent: the
    /// first group by name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub default_group_name: Option<String>,
    /// Wanted workers. Yours, or an autoscaler's through the scale subresource: the operator
    /// never writes it. Ignored while `autoscaling` is set.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1024))]
    pub replicas: i32,
    /// The device each worker asks for, one per worker. Absent: a worker that computes on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<Accelerator>,
    /// Memory budgets of each worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// How rows are batched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batching: Option<Batching>,
    /// Which lenses leave memory when there is need for room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eviction: Option<Eviction>,
    /// When a worker changes its active base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switching: Option<Switching>,
    /// On how many workers one lens may be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spread: Option<Spread>,
    /// How many requests may wait, and how long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admission: Option<Admission>,
    /// How many workers there are, decided by the operator from what runs and waits. Absent: `replicas`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,
    /// Where workers keep the files they fetch. Absent: a folder on the node's own disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
    /// Volumes that `pvc://NAME/path` sources read, also those of groups of other namespaces: claims are the placement's
    /// own. Mounted read-only into every worker.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub source_volumes: Vec<SourceVolume>,
    /// Secrets of the placement's namespace that `source.secretRef` of the groups' sources may name, whatever namespace a
    /// group is of. Their key `token` is mounted read-only into every worker; one that does not exist (yet) keeps no worker
    /// from starting.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub source_secrets: Vec<SourceSecret>,
    /// How long a new worker whose base is active waits at most for its `Pinned` and `Preloaded` lenses before it is ready,
    /// in seconds. A lens that fails, or finds no room, is not waited for. Once it was ready, loads and switches make it
    /// unready no more. Default 120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub warmup_seconds: Option<i32>,
    /// How long a worker that leaves may finish its running rows, in seconds. Default 120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub termination_drain_seconds: Option<i32>,
    /// Whether a new operator with another default worker image replaces the workers. `Manual`, the default: no, the new
    /// image comes with the next change that replaces them anyway. `Rolling`: yes, at once. Says nothing where
    /// `worker.image` names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub upgrade_policy: Option<UpgradePolicy>,
    /// The worker pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<Worker>,
}

/// Whether a new operator with another default worker image replaces the workers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum UpgradePolicy {
    /// It does not.
    #[default]
    Manual,
    /// It does.
    Rolling,
}

/// A group that a placement serves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlacedGroup {
    /// What clients call the group here. Also the name of the ModelGroup, unless `groupRef` says otherwise.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("a group name is a DNS label: lower-case letters, digits and `-`"))]
    pub name: String,
    /// The ModelGroup, when it is called otherwise than `name` or lives in another namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_ref: Option<GroupRef>,
    /// When its base comes to a worker's device. `OnDemand`, the default: when a request needs it. `Preloaded`: ahead of
    /// requests, while there is room for it beside the active one; a switch to it then takes no time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residency: Option<GroupResidency>,
}

/// When the base of a group comes to a worker's device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum GroupResidency {
    /// When a request needs it.
    #[default]
    OnDemand,
    /// Ahead of requests, into room that is free.
    Preloaded,
}

impl PlacedGroup {
    /// Namespace and name of the ModelGroup, for a placement in `namespace`.
    pub fn target<'a>(&'a self, namespace: &'a str) -> (&'a str, &'a str) {
        match &self.group_ref {
            Some(r) => (r.namespace.as_deref().unwrap_or(namespace), &r.name),
            None => (namespace, &self.name),
        }
    }
}

/// Which ModelGroup is meant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupRef {
    /// Name of the ModelGroup.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("groupRef.name is the name of a ModelGroup: lower-case letters, digits and `-`"))]
    pub name: String,
    /// Its namespace. Absent: the placement's own. A group of another one is served as long as its
    /// `spec.allowedPlacements` allows it; else `Accepted=False`, reason `NotPermitted`, and the others are served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("groupRef.namespace is the name of a namespace: lower-case letters, digits and `-`"))]
    pub namespace: Option<String>,
}

/// The device a worker asks for: exactly one of the two.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.resourceName) != has(self.deviceClassName)").message("accelerator is exactly one of resourceName and deviceClassName"),
)]
pub struct Accelerator {
    /// An extended resource of a device plugin, such as `nvidia.com/gpu`. Each worker gets one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 3, max = 316))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$')").message("resourceName must be an extended resource such as nvidia.com/gpu"))]
    pub resource_name: Option<String>,
    /// A class of devices of a driver of dynamic resource allocation, such as `gpu.nvidia.com`. Each worker gets one, by a
    /// claim of its own. Needs an API server that serves `resource.k8s.io/v1` (Kubernetes 1.34); on another one the
    /// placement is refused with `Accepted=False`, reason `ApiNotServed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')").message("deviceClassName is the name of a DeviceClass: lower-case letters, digits, `-` and `.`"))]
    pub device_class_name: Option<String>,
}

impl Accelerator {
    /// What is asked for, for people.
    pub fn name(&self) -> &str {
        let name = self.resource_name.as_deref().or(self.device_class_name.as_deref());
        name.unwrap_or_default()
    }
}

/// Memory budgets of one worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.deviceBudget) || !has(self.lensBudget) || quantity(string(self.lensBudget)).isLessThan(quantity(string(self.deviceBudget)))").message("lensBudget is a part of deviceBudget and must be smaller"),
)]
pub struct Memory {
    /// Device memory the worker may use for bases, lenses, KV cache and workspace together.
    /// Absent: what the device has, or on a CPU worker 80 % of the container's memory limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_budget: Option<ByteQuantity>,
    /// The part of it that lenses may take; beyond it some are evicted, by `eviction.policy`.
    /// Absent: an eighth of the device budget.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lens_budget: Option<ByteQuantity>,
    /// Disk the worker may use for files it fetched. Absent: what `cache` is declared to hold, or else 64Gi, not set aside.
    /// When given and the cache is on the node's own disk, it is requested as ephemeral storage, so changing it replaces
    /// the pods; with a cache of another kind it does not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_budget: Option<ByteQuantity>,
}

/// How rows are batched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Batching {
    /// Longest sequence, prompt and answer together, in tokens. Absent: what the base allows, at most 8192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 10_485_760))]
    pub max_context_tokens: Option<i32>,
    /// Most rows in one step. Default 64.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub max_running_rows: Option<i32>,
    /// Most prompt tokens computed in one step. While rows decode it is fewer: as many as hold them up little, which the worker learns. Default 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 65_536))]
    pub prefill_chunk_tokens: Option<i32>,
}

/// Which lenses leave memory when there is need for room, and whether idle ones leave before there is. A lens that is in
/// use, pinned or leased never does. May be changed at any time; workers go on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.lowWatermarkPercent) || has(self.highWatermarkPercent)").message("lowWatermarkPercent says where a sweep ends; give highWatermarkPercent, where it begins, as well"),
    validation = Rule::new("!has(self.lowWatermarkPercent) || !has(self.highWatermarkPercent) || self.lowWatermarkPercent <= self.highWatermarkPercent").message("lowWatermarkPercent must not be above highWatermarkPercent"),
)]
pub struct Eviction {
    /// How the lenses are put in order. Absent: `ALRFU`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<EvictionPolicy>,
    /// When more of the lens budget is taken than this, idle lenses leave even though nothing needs their room, down to
    /// `lowWatermarkPercent`. Absent: they stay until there is need.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub high_watermark_percent: Option<i32>,
    /// How much of the lens budget a sweep leaves taken. Absent: five eighths of `highWatermarkPercent`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub low_watermark_percent: Option<i32>,
    /// A lens is idle when nothing used it for so many seconds. Also how soon the policies forget: what happened so long
    /// ago counts half. Default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 604_800))]
    pub idle_seconds: Option<i32>,
    /// How often idle lenses are looked for, in seconds. Default 60.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub sweep_seconds: Option<i32>,
}

/// What makes a lens leave when room is needed. Of equals the least recently used leaves first.
/// `LRU`: the least recently used. `LFU`: the least often served. `Priority`: the lowest `priority` of the lens.
/// `Specialization`: the one that serves the smallest share of what its group is asked, weighted by how users rate it. `Hybrid`: the highest sum of idle time,
/// few loads, few requests served, and errors. `ALRFU` (adaptive LRFU): the least frequently requested, weighted by the time to
/// load it again, over the horizon that has cost least lately; it moves the fewest bytes. `turret-worker simulate` compares them
/// on a trace of your own.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum EvictionPolicy {
    /// The least recently used.
    #[serde(rename = "LRU")]
    Lru,
    /// The least often served, ever.
    #[serde(rename = "LFU")]
    Lfu,
    /// The lowest declared priority.
    Priority,
    /// The one that serves the smallest share of its group's recent requests. A lens that answers most of what its
    /// group is asked stays, even where another group is asked a hundred times more; one of many that share a
    /// group's requests leaves first.
    Specialization,
    /// The highest `0.3·min(1, idle/idleMax) + 0.2·(1 − loads/maxLoads) + 0.4·(1 − served/maxServed) +
    /// 0.1·(errors/maxErrors)`, with counters that decay.
    Hybrid,
    /// The least frequently requested, weighted by the time to load it again per byte, over the horizon that has cost
    /// least lately.
    #[default]
    #[serde(rename = "ALRFU")]
    Alrfu,
}

impl EvictionPolicy {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Lru, Self::Lfu, Self::Priority, Self::Specialization, Self::Hybrid, Self::Alrfu];
}

/// When a worker changes its active base. Requests over another base wait; the switch happens
/// when the active base has no rows, or when it has been active `minHoldSeconds` and the oldest
/// waiter has waited `maxWaitSeconds`. In mode `Manual` it happens when `activeGroupName` changes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("(has(self.mode) && self.mode == 'Manual') == has(self.activeGroupName)").message("activeGroupName belongs to mode Manual: give both or neither"),
)]
pub struct Switching {
    /// Who decides which base is active. `OnDemand`, the default: requests, by the rule below. `Manual`: you, by
    /// `activeGroupName`; requests over another base are refused with 503 and a message that says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<SwitchingMode>,
    /// In mode `Manual`: the group whose base is active on every worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub active_group_name: Option<String>,
    /// How long a base stays active at least while it has rows, in seconds. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub min_hold_seconds: Option<i32>,
    /// How long requests over another base wait at most before the active one is drained, in seconds. Default 120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub max_wait_seconds: Option<i32>,
    /// How long rows of the base that leaves may go on, in seconds; rows that need longer are preempted: their
    /// streams stay open, and they go on where they were when their base is active again. Default 30.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub drain_seconds: Option<i32>,
    /// Which of the lenses that are declared `Preloaded` or `Pinned` a worker brings to its device ahead of requests.
    /// `Assigned`, the default: those that the operator assigned to it, and what is asked for most. `Declared`: all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lens_preload: Option<LensPreload>,
}

/// Which lenses a worker brings to its device ahead of requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum LensPreload {
    /// Those that the operator assigned to it.
    #[default]
    Assigned,
    /// All that are declared so.
    Declared,
}

/// On how many workers one lens may be. A lens that is asked for much is assigned to more of them, up to `maxCopies`; one
/// that is not, to `minCopies`. Any worker serves any lens all the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.minCopies) || !has(self.maxCopies) || self.minCopies <= self.maxCopies").message("minCopies must not be above maxCopies"),
)]
pub struct Spread {
    /// On how many workers a lens is at least, as far as there are workers that prefer its base. Default 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub min_copies: Option<i32>,
    /// On how many workers a lens is at most. Default 4, or `minCopies` where that is more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub max_copies: Option<i32>,
}

/// Who decides which base is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum SwitchingMode {
    /// Requests.
    #[default]
    OnDemand,
    /// The spec.
    Manual,
}

/// How many requests may wait, and how long.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Admission {
    /// Requests that may wait on one worker; more are refused with 429. Default 512.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65_536))]
    pub max_queued_requests: Option<i32>,
    /// How long a request may wait, on a worker or held by the gateway, in seconds. Default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 3600))]
    pub hold_seconds: Option<i32>,
}

/// How many workers there are, by the requests that they compute and those that wait. Decisions go to
/// `status.desiredReplicas`, never to `replicas`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.minReplicas <= self.maxReplicas").message("autoscaling.minReplicas must not be above maxReplicas"),
    validation = Rule::new("!has(self.scaleToZeroAfterSeconds) || self.minReplicas == 0").message("scaleToZeroAfterSeconds belongs to minReplicas 0: with more, a worker always stays"),
)]
pub struct Autoscaling {
    /// Fewest workers. With 0 none is left while nobody asks; the gateway then holds a request until the worker that it
    /// wakes can answer it, at most `admission.holdSeconds`.
    #[schemars(range(min = 0, max = 1000))]
    pub min_replicas: i32,
    /// Most workers.
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: i32,
    /// Requests, running or waiting, that one worker is there for: there are as many workers as it takes for no more
    /// than this on each. Default 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub target_running_per_replica: Option<i32>,
    /// The last worker leaves when nobody has asked for so many seconds. Only with `minReplicas: 0`. Default 600.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 604_800))]
    pub scale_to_zero_after_seconds: Option<i32>,
    /// Workers leave when fewer were enough for so many seconds without a break. Workers are added at once. Default 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86_400))]
    pub scale_down_delay_seconds: Option<i32>,
}

/// A volume that `pvc://NAME/path` sources read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SourceVolume {
    /// The NAME in `pvc://NAME/path`.
    #[schemars(length(min = 1, max = 50))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("a volume name is a DNS label: lower-case letters, digits and `-`"))]
    pub name: String,
    /// The claim that holds the files.
    pub persistent_volume_claim: ClaimRef,
}

/// A PersistentVolumeClaim of the placement's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')").message("claimName is the name of a PersistentVolumeClaim: lower-case letters, digits, `-` and `.`"))]
    pub claim_name: String,
}

/// A Secret of the placement's namespace that sources may name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SourceSecret {
    /// Its name. Its key `token` is what the servers of sources are shown.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')").message("sourceSecrets names Secrets: lower-case letters, digits, `-` and `.`"))]
    pub name: String,
    /// Servers of `https://` sources that its token is shown to: by name (`models.example.org`), below one
    /// (`*.example.org`), or by address (`10.1.0.0/16`). Absent: none; only the hub is shown it, for `hf://` sources.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(length(min = 1, max = 253)))]
    #[x_kube(merge_strategy = ListMerge::Set, validation = Rule::new("self.all(h, h.matches('^([*][.])?[A-Za-z0-9.:-]+(/[0-9]+)?$'))").message("hosts are names (models.example.org), names below one (*.example.org), or addresses (10.1.0.0/16), without scheme and port"))]
    pub hosts: Vec<String>,
}

/// The worker pods. A change here replaces them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Worker {
    /// Image. Absent: the operator's default for its own version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9][-a-zA-Z0-9._/:@]*$')").message("image is an image reference such as registry.example.org/turret/worker:1.0, without spaces"))]
    pub image: Option<String>,
    /// CPU and memory. The memory limit is the wall; the budgets in `memory` move inside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resources: Option<Resources>,
    /// Labels a node must have.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,
    /// Taints that are tolerated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Atomic)]
    pub tolerations: Vec<Toleration>,
    /// How the workers are spread over nodes, zones and the like. Absent: over nodes, as far as there is room.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 4))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["topologyKey".into()]))]
    pub topology_spread_constraints: Vec<TopologySpread>,
    /// Priority class of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')").message("priorityClassName is the name of a PriorityClass: lower-case letters, digits, `-` and `.`"))]
    pub priority_class_name: Option<String>,
    /// Service account of the pods. Workers need none: absent, the namespace's default without a token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')").message("serviceAccountName is the name of a ServiceAccount: lower-case letters, digits, `-` and `.`"))]
    pub service_account_name: Option<String>,
    /// Runtime class of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')").message("runtimeClassName is the name of a RuntimeClass: lower-case letters, digits, `-` and `.`"))]
    pub runtime_class_name: Option<String>,
    /// Further environment variables, such as `TURRET_DEVICE`, `TURRET_THREADS`, `RUST_LOG`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub env: Vec<Env>,
    /// Further labels of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    #[x_kube(validation = Rule::new("self.all(k, !k.startsWith('turret.dev/') && !k.startsWith('app.kubernetes.io/'))").message("podLabels must not set turret.dev/ or app.kubernetes.io/ labels: the operator selects its pods by them"))]
    pub pod_labels: BTreeMap<String, String>,
    /// Further annotations of the pods.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub pod_annotations: BTreeMap<String, String>,
}

/// CPU and memory of a worker, as in a Pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.requests) || !has(self.limits) || self.requests.all(k, !(k in self.limits) || quantity(string(self.requests[k])).compareTo(quantity(string(self.limits[k]))) <= 0)").message("a request must not be larger than the limit of the same resource"),
)]
pub struct Resources {
    /// What the scheduler sets aside.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub requests: BTreeMap<String, CpuOrBytes>,
    /// What is never exceeded.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 16))]
    pub limits: BTreeMap<String, CpuOrBytes>,
}

/// A quantity of any resource, as a Pod takes it.
pub type CpuOrBytes = k8s_openapi::apimachinery::pkg::api::resource::Quantity;

impl From<Resources> for ResourceRequirements {
    fn from(value: Resources) -> Self {
        let some = |map: BTreeMap<_, _>| (!map.is_empty()).then_some(map);
        Self { requests: some(value.requests), limits: some(value.limits), ..Self::default() }
    }
}

/// One environment variable with a literal value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Env {
    /// Its name.
    #[schemars(length(min = 1, max = 128))]
    #[x_kube(
        validation = Rule::new("self.matches('^[A-Za-z_][A-Za-z0-9_]*$')").message("an environment variable's name has letters, digits and `_` only"),
        validation = Rule::new("!(self in ['TURRET_NAMESPACE', 'TURRET_WORKER_NAME', 'TURRET_ACCELERATOR'])").message("TURRET_NAMESPACE, TURRET_WORKER_NAME and TURRET_ACCELERATOR are set by the operator"),
    )]
    pub name: String,
    /// Its value.
    #[serde(default)]
    #[schemars(length(max = 4096))]
    pub value: String,
}

impl From<Env> for EnvVar {
    fn from(value: Env) -> Self {
        Self { name: value.name, value: Some(value.value), value_from: None }
    }
}

/// What the operator observed of a placement.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelPlacementStatus {
    /// `Ready`, `Available`, `Reconciling`, `Stalled`, `Accepted`; and `Paused`, while it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Generation of the spec that this status speaks of; -1 before the operator has seen it.
    #[serde(default = "never_observed")]
    pub observed_generation: i64,
    /// Wanted workers: `spec.replicas`, or what was decided last by `spec.autoscaling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub desired_replicas: Option<i32>,
    /// Worker pods that exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Workers that take requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,
    /// Workers that report that they serve exactly the newest document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_replicas: Option<i32>,
    /// Label selector of the worker pods, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Names of the groups that are served, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_summary: Option<String>,
    /// Active base of each worker, counted, for people: `gemma2-9b×2`. Refreshed at most once a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_summary: Option<String>,
    /// Device memory used / budget over all workers, for people. Refreshed at most once a minute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_memory_summary: Option<String>,
    /// Image of the workers, as resolved when the placement was last changed: a newer operator
    /// with another default does not replace running pods, unless `upgradePolicy` is `Rolling`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker_image: Option<String>,
    /// Sequence number of the newest worker document.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document_sequence: Option<i64>,
    /// When the summaries that move with traffic were last refreshed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub summarized_at: Option<k8s_openapi::apimachinery::pkg::apis::meta::v1::Time>,
    /// The value of the annotation `turret.dev/reconcile-requested-at` that was handled last, its first 256 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handled_reconcile_at: Option<String>,
}

fn one() -> i32 {
    1
}

impl Autoscaling {
    /// Requests that one worker is there for.
    pub fn target_running_per_replica(&self) -> i32 {
        self.target_running_per_replica.unwrap_or(16)
    }

    /// The last worker leaves when nobody has asked for so long, seconds.
    pub fn scale_to_zero_after_seconds(&self) -> i32 {
        self.scale_to_zero_after_seconds.unwrap_or(600)
    }

    /// Workers leave when fewer were enough for so long, seconds.
    pub fn scale_down_delay_seconds(&self) -> i32 {
        self.scale_down_delay_seconds.unwrap_or(300)
    }
}

impl ModelPlacementSpec {
    /// How long a leaving worker may finish its rows, seconds.
    pub fn termination_drain_seconds(&self) -> i32 {
        self.termination_drain_seconds.unwrap_or(120)
    }

    /// How long a new worker waits at most for its lenses before it is ready, seconds.
    pub fn warmup_seconds(&self) -> i32 {
        self.warmup_seconds.unwrap_or(120)
    }

    /// On how many workers one lens may be, defaults filled in.
    pub fn spread(&self) -> assign::Spread {
        let default = assign::Spread::default();
        let given = self.spread.unwrap_or_default();
        let count =
            |given: Option<i32>, default| given.and_then(|n| u32::try_from(n).ok()).unwrap_or(default);
        assign::Spread {
            min_copies: count(given.min_copies, default.min_copies),
            max_copies: count(given.max_copies, default.max_copies),
        }
    }
}
