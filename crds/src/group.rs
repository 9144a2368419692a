//! `ModelGroup`: a base with its lenses.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{alias::Alias, allowed_placements::AllowedPlacements, condition::FailureReason, source::Source};

/// Most lenses a group may have. CRD rules are checked at this size; beyond it, make several
/// groups over one base: groups with an equal base share it on a worker.
pub const MAX_LENSES: usize = 256;

/// Most failed lenses named in a status.
pub const MAX_FAILED_IN_STATUS: usize = 16;

/// A base model and the lenses over it.
///
/// One team owns a group: the base it uses and the small checkpoints (lenses) it trained over it.
/// A `ModelPlacement` of the same namespace serves it, or one of a namespace that `allowedPlacements`
/// allows. Adding, changing or removing a lens never restarts a pod.
#[derive(Clone, Debug, PartialEq, CustomResource, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "turret.dev",
    version = "v1alpha1",
    kind = "ModelGroup",
    plural = "modelgroups",
    shortname = "mg",
    category = "turret",
    namespaced,
    cel,
    status = "ModelGroupStatus",
    derive = "PartialEq",
    doc = "A base model and the lenses (small checkpoints) that are served over it.",
    validation = Rule::new("self.metadata.name.size() <= 63 && self.metadata.name.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("the name of a ModelGroup is part of what clients write in `model`: at most 63 lower-case letters, digits and `-`"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status", description = "Every placement serves exactly this group"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason", description = "Why it is or is not ready"),
    printcolumn(name = "Lenses", type_ = "string", json_path = ".status.lensSummary", description = "Lenses ready / declared"),
    printcolumn(name = "Base", type_ = "string", json_path = ".spec.base.source.uri", description = "Where the base comes from"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Size", type_ = "string", json_path = ".status.baseSize", description = "Bytes of the base in device memory", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1)
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.aliases) || !has(self.lenses) || self.aliases.all(a, !self.lenses.exists(l, l.name == a.name))").message("an alias must not have the name of a lens of the group: clients could not tell them apart"),
    validation = Rule::new("!has(self.aliases) || self.aliases.all(a, a.targets.all(t, has(self.lenses) && self.lenses.exists(l, l.name == t.lensName)))").message("every target of an alias must be the name of one of the lenses"),
)]
pub struct ModelGroupSpec {
    /// The model whose weights all lenses of the group share.
    pub base: Base,
    /// The lenses over the base, each chosen per request as `GROUP:LENS`. At most 256.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 256))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub lenses: Vec<Lens>,
    /// Names that stay while the lenses behind them change, asked for as `GROUP:ALIAS`. At most 32.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub aliases: Vec<Alias>,
    /// Which placements may serve the group. Absent: those of its own namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_placements: Option<AllowedPlacements>,
}

/// The full model of a group.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Base {
    /// A folder in the ordinary Hugging Face layout: `config.json`, safetensors (one file or
    /// sharded with an index), `tokenizer.json`, optionally `tokenizer_config.json`,
    /// `chat_template.jinja`, `generation_config.json`.
    pub source: Source,
    /// Number format of the weights in memory. Absent: as stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// How the matrices of the base are held. Absent: `None`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<Quantization>,
}

/// Number format of the weights in device memory. Absent: as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum Dtype {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    BF16,
}

/// How the matrices of the base are held, made from its files while they are loaded. `Q8_0`: eight
/// bits for each number and a 16-bit scale for every 32, as in GGUF; about half the bytes of BF16 to
/// hold and to read for each token. `dtype` is then that of the KV cache and of what is not a matrix
/// product. Lenses are applied on top and stay exact. Absent: `None`.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum Quantization {
    /// Not at all.
    #[default]
    None,
    /// ggml's format of that name: eight bits, and a scale for every 32 inputs of an output.
    Q8_0,
}

/// A small checkpoint over the base.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lens {
    /// A DNS label, unique in the group. Clients write `GROUP:NAME`, or `NAME` alone where only
    /// one group has it.
    #[schemars(length(min = 1, max = 63))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')").message("a lens name is a DNS label: lower-case letters, digits and `-`, beginning and ending with a letter or digit"))]
    pub name: String,
    /// What the checkpoint is. Absent: detected from its files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<LensKind>,
    /// The checkpoint's folder.
    pub source: Source,
    /// A name for people, shown where lenses are listed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 128))]
    pub display_name: Option<String>,
    /// Strength of the lens in thousandths: 1000 applies it as trained (the default), 0 not at all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -16000, max = 16000))]
    pub scale_milli: Option<i32>,
    /// When workers bring the lens to the device, and whether it may leave again. Absent: `OnDemand`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub residency: Option<LensResidency>,
    /// How long the lens stays when room is needed and the placement's `eviction.policy` is `Priority`: those with
    /// the lowest leave first. Also which of those that are `Preloaded` come first. Default 100.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub priority: Option<i32>,
}

impl Lens {
    /// The declared strength, thousandths.
    pub fn scale_milli(&self) -> i32 {
        self.scale_milli.unwrap_or(1000)
    }

    /// The declared priority.
    pub fn priority(&self) -> u32 {
        self.priority.and_then(|p| u32::try_from(p).ok()).unwrap_or(DEFAULT_PRIORITY)
    }
}

/// Priority of a lens that declares none.
pub const DEFAULT_PRIORITY: u32 = 100;

/// How near the device workers bring a lens before a request asks for it, and whether it may leave again.
/// `OnDemand`: it is checked where it is; its weights come with the first request, and may leave the worker's disk again
/// when others need the room. `Cached`: its weights are on the worker's disk and stay there. `Preloaded`: in the background
/// it comes to the device as soon as its base is in memory and while the lens budget has room; it may leave the device again.
/// `Pinned`: in the background it comes to the device, making room for it, and it never leaves.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
pub enum LensResidency {
    /// With the first request.
    #[default]
    OnDemand,
    /// On the disk ahead of requests.
    Cached,
    /// On the device ahead of requests, where there is room.
    Preloaded,
    /// On the device ahead of requests, and for good.
    Pinned,
}

/// What the checkpoint is. Absent: detected from its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
pub enum LensKind {
    /// A low-rank adapter as PEFT writes it: `adapter_config.json` and `adapter_model.safetensors`.
    LoRA,
}

/// What the operator observed of a group.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelGroupStatus {
    /// `Ready`, `Available`, `Reconciling`, `Stalled`, `Accepted`, `Resolved`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
    /// Generation of the spec that this status speaks of; -1 before the operator has seen the
    /// group, so that a new object is never taken for a finished one.
    #[serde(default = "never_observed")]
    pub observed_generation: i64,
    /// Lenses ready / declared, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lens_summary: Option<String>,
    /// Lenses that every wanted worker can serve.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_lenses: Option<i32>,
    /// Lenses that are declared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_lenses: Option<i32>,
    /// Lenses that cannot be served, and why; at most 16 are named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["name".into()]))]
    pub failed_lenses: Vec<FailedLens>,
    /// Digest of the base's files, as a worker computed it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_digest: Option<String>,
    /// Size of the base in device memory, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_size: Option<String>,
    /// Placements that the group allows and that name it: `NAME`, or `NAMESPACE/NAME` of another namespace.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub placements: Vec<String>,
    /// The value of the annotation `turret.dev/reconcile-requested-at` that was handled last, its first 256 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_handled_reconcile_at: Option<String>,
}

/// A lens that cannot be served.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct FailedLens {
    /// Its name in the group.
    pub name: String,
    /// What is wrong, for machines.
    pub reason: FailureReason,
    /// What is wrong and where, for people.
    pub message: String,
}

pub(crate) fn never_observed() -> i64 {
    -1
}
