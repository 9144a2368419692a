//! The worker document: all that a worker is told, and how it is made.
//!
//! [`compile`] is pure: one placement, the groups it names, the public keys and what is known of
//! earlier documents go in; a document, or the reasons why there is none, comes out. The document
//! has a **digest** over everything that matters to a worker and a **sequence** number that only
//! grows, so that a late message never undoes a newer one.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    alias::{Alias, EffectiveAlias, GroupAliases, effective},
    allowed_placements::not_permitted,
    condition::reason,
    group::{Base, DEFAULT_PRIORITY, Dtype, LensKind, LensResidency, ModelGroup, Quantization},
    hints::Hints,
    placement::{
        EvictionPolicy, GroupResidency, LensPreload, ModelPlacement, ModelPlacementSpec, PlacedGroup,
        SwitchingMode, cache::bytes_for_files,
    },
    quantity::{ByteQuantity, InvalidQuantity},
    source::Source,
    token::PublicKey,
};

/// Version of the document and of the control protocol. A worker refuses a document of a protocol
/// that it does not know.
pub const PROTOCOL: u32 = 1;

/// What a worker is told. Travels as JSON: compressed in a ConfigMap, plain in `PUT /control/v1/document`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerDocument {
    /// [`PROTOCOL`].
    pub protocol: u32,
    /// The placement it was made for.
    pub placement: PlacementIdentity,
    /// Grows with every change; a worker ignores a smaller one and refuses the same one with
    /// another digest.
    pub sequence: u64,
    /// `sha256:…` over everything else in the document but its hints, see [`WorkerDocument::compute_digest`].
    pub digest: String,
    /// The groups to serve, sorted by name. Empty once the last group is gone: then nothing is served,
    /// and what was in memory leaves it.
    pub groups: Vec<DocumentGroup>,
    /// Name of the group whose base a new worker makes active first; absent when there is no group.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub default_group: Option<String>,
    /// Memory budgets.
    pub memory: MemoryBudgets,
    /// Batching limits.
    pub batching: BatchingLimits,
    /// Rule of base switches.
    pub switching: SwitchingRule,
    /// The group whose base is active, when requests do not decide it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_group: Option<String>,
    /// Which lenses a worker brings to its device ahead of requests.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lens_preload: LensPreload,
    /// Which lenses leave when there is need for room.
    #[serde(default, skip_serializing_if = "is_default")]
    pub eviction: EvictionRule,
    /// Limits of what waits.
    pub admission: AdmissionLimits,
    /// How long a new worker whose base is active waits at most for its lenses before it is ready, seconds.
    #[serde(default = "default_warmup_seconds", skip_serializing_if = "is_default_warmup_seconds")]
    pub warmup_seconds: u32,
    /// Names of the volumes mounted below the worker's volumes folder, sorted.
    pub source_volumes: Vec<String>,
    /// Names of the Secrets whose tokens are below the worker's folder of Secrets, sorted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub source_secrets: Vec<String>,
    /// By Secret: the servers of `https://` sources that its token is shown to.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub source_secret_hosts: BTreeMap<String, Vec<String>>,
    /// Keys whose tokens are accepted, sorted. Empty without a cluster.
    pub public_keys: Vec<PublicKey>,
    /// What the operator advises: not part of what is declared, and so not of the digest. Absent without an operator. In a
    /// ConfigMap they are beside the document, under a key of their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hints: Option<Hints>,
}

/// Which placement a document belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PlacementIdentity {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID: scopes the sequence and is the audience of tokens.
    pub uid: String,
}

/// A group as a worker sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DocumentGroup {
    /// What clients call it.
    pub name: String,
    /// Name of the ModelGroup.
    pub object_name: String,
    /// Namespace of the ModelGroup.
    pub namespace: String,
    /// UID of the ModelGroup.
    pub uid: String,
    /// Generation of the ModelGroup that this is.
    pub generation: i64,
    /// The base.
    pub base: DocumentBase,
    /// When the base comes to the device.
    #[serde(default, skip_serializing_if = "is_default")]
    pub residency: GroupResidency,
    /// The lenses, sorted by name.
    pub lenses: Vec<DocumentLens>,
    /// What its aliases lead to at the moment, sorted by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<EffectiveAlias>,
}

impl DocumentGroup {
    /// The alias of this name.
    pub fn alias(&self, name: &str) -> Option<&EffectiveAlias> {
        self.aliases.iter().find(|alias| alias.name == name)
    }
}

/// A base as a worker sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DocumentBase {
    /// Groups with equal keys share the base in memory and never switch for each other.
    pub key: BaseKey,
    /// Where its files are.
    pub source: Source,
    /// Number format in memory; absent: as stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dtype: Option<Dtype>,
    /// What is done to its matrices; absent: nothing.
    #[serde(default, skip_serializing_if = "is_default")]
    pub quantization: Quantization,
}

/// Identity of what is active on a worker: which weights, in which number format, quantized or not.
///
/// Written `IDENTITY/DTYPE`, where IDENTITY is the declared digest, or the URI where none is
/// declared (then two spellings of one place count as two bases; `@COMMIT` follows a hub's), and DTYPE
/// `stored` when absent.
/// `/Q8_0` follows when it is quantized.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BaseKey(pub String);

impl BaseKey {
    /// The key of a base.
    pub fn of(base: &Base) -> Self {
        let source = &base.source;
        let identity = source.digest.clone().unwrap_or_else(|| source.identity());
        let dtype = base.dtype.map_or("stored".into(), |dtype| format!("{dtype:?}"));
        match base.quantization.unwrap_or_default() {
            Quantization::None => Self(format!("{identity}/{dtype}")),
            quantization => Self(format!("{identity}/{dtype}/{quantization:?}")),
        }
    }
}

impl std::fmt::Display for BaseKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A lens as a worker sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DocumentLens {
    /// Its name in the group.
    pub name: String,
    /// What it is; absent: detected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kind: Option<LensKind>,
    /// Where its files are.
    pub source: Source,
    /// A name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub display_name: Option<String>,
    /// Strength, thousandths.
    pub scale_milli: i32,
    /// When it comes to the device, and whether it may leave.
    #[serde(default, skip_serializing_if = "is_default")]
    pub residency: LensResidency,
    /// Those with the lowest leave first, by the policy of that name.
    #[serde(default = "default_priority", skip_serializing_if = "is_default_priority")]
    pub priority: u32,
}

fn default_priority() -> u32 {
    DEFAULT_PRIORITY
}

fn is_default_priority(priority: &u32) -> bool {
    *priority == DEFAULT_PRIORITY
}

/// How long a new worker waits for its lenses where nothing is said, seconds.
pub const DEFAULT_WARMUP_SECONDS: u32 = 120;

fn default_warmup_seconds() -> u32 {
    DEFAULT_WARMUP_SECONDS
}

fn is_default_warmup_seconds(seconds: &u32) -> bool {
    *seconds == DEFAULT_WARMUP_SECONDS
}

/// What says nothing new is not written, so that a worker of the version before computes the same digest.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// Memory budgets in bytes. Absent: the worker's own default.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct MemoryBudgets {
    /// All device memory the worker may use.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_bytes: Option<u64>,
    /// The part of it for lenses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lens_bytes: Option<u64>,
    /// Disk for fetched files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_bytes: Option<u64>,
}

/// Limits of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BatchingLimits {
    /// Longest sequence in tokens; absent: what the base allows, at most 8192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_context_tokens: Option<u32>,
    /// Most rows in a step.
    pub max_running_rows: u32,
    /// Most prompt tokens in a step.
    pub prefill_chunk_tokens: u32,
}

/// Rule of base switches, seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SwitchingRule {
    /// A base with rows stays at least this long.
    pub min_hold_seconds: u32,
    /// A request over another base waits at most this long before the active one is drained.
    pub max_wait_seconds: u32,
    /// Rows of the leaving base may go on this long.
    pub drain_seconds: u32,
}

/// Which lenses leave when there is need for room, and which before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvictionRule {
    /// How they are put in order.
    pub policy: EvictionPolicy,
    /// A lens is idle when nothing used it for so long, seconds; also the half-life of what policies count.
    pub idle_seconds: u32,
    /// Absent: idle lenses stay until there is need for room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweep: Option<SweepRule>,
}

/// When idle lenses leave although nothing needs their room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SweepRule {
    /// When more of the lens budget is taken than this, percent.
    pub high_percent: u32,
    /// Until no more is taken than this, percent.
    pub low_percent: u32,
    /// How often that is looked at, seconds.
    pub every_seconds: u32,
}

/// Limits of what waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AdmissionLimits {
    /// Requests that may wait on a worker.
    pub max_queued_requests: u32,
    /// How long one may wait, seconds.
    pub hold_seconds: u32,
}

impl Default for BatchingLimits {
    fn default() -> Self {
        Self { max_context_tokens: None, max_running_rows: 64, prefill_chunk_tokens: 512 }
    }
}

impl Default for SwitchingRule {
    fn default() -> Self {
        Self { min_hold_seconds: 30, max_wait_seconds: 120, drain_seconds: 30 }
    }
}

impl Default for EvictionRule {
    fn default() -> Self {
        Self { policy: EvictionPolicy::default(), idle_seconds: 300, sweep: None }
    }
}

impl Default for AdmissionLimits {
    fn default() -> Self {
        Self { max_queued_requests: 512, hold_seconds: 300 }
    }
}

impl WorkerDocument {
    /// The digest the document should carry: SHA-256 of its JSON with `sequence` 0, `digest` empty and without `hints`.
    pub fn compute_digest(&self) -> String {
        let bare = Self { sequence: 0, digest: String::new(), hints: None, ..self.clone() };
        let json = serde_json::to_vec(&bare).expect("a document of strings and numbers is JSON");
        format!("sha256:{}", hex::encode(Sha256::digest(json)))
    }

    /// Reads a document as gzip of JSON, the form it has in a ConfigMap.
    pub fn from_gzip(bytes: &[u8]) -> Result<Self, std::io::Error> {
        let limited = std::io::Read::take(flate2::read::GzDecoder::new(bytes), MAX_JSON_BYTES);
        Ok(serde_json::from_reader(limited)?)
    }

    /// Writes it as gzip of JSON. The same document always gives the same bytes.
    pub fn to_gzip(&self) -> Vec<u8> {
        let mut encoder = flate2::GzBuilder::new().mtime(0).write(Vec::new(), flate2::Compression::new(6));
        serde_json::to_writer(&mut encoder, self).expect("writing to memory cannot fail");
        encoder.finish().expect("writing to memory cannot fail")
    }

    /// The group that clients call `name`.
    pub fn group(&self, name: &str) -> Option<&DocumentGroup> {
        self.groups.iter().find(|g| g.name == name)
    }

    /// What the aliases of all groups lead to.
    pub fn aliases(&self) -> GroupAliases {
        let with_some = self.groups.iter().filter(|group| !group.aliases.is_empty());
        with_some.map(|group| (group.name.clone(), group.aliases.clone())).collect()
    }

    /// The group whose base a new worker makes active first, if there is any group.
    pub fn default_group(&self) -> Option<&DocumentGroup> {
        self.group(self.default_group.as_deref()?)
    }
}

/// Largest document a worker reads, uncompressed: guards against a decompression bomb. 16 groups
/// of 256 lenses with the longest fields stay below half of it.
pub const MAX_JSON_BYTES: u64 = 16 << 20;

/// What is known of earlier documents of the same placement.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Previous {
    /// Sequence and digest of the document that is stored.
    pub stored: Option<(u64, String)>,
    /// Largest sequence that any worker of the placement reports.
    pub reported: u64,
    /// What aliases led to. One that is not here is new, and leads at once to what is declared.
    pub aliases: GroupAliases,
    /// Declared targets of aliases, by group and lens, that every worker can serve.
    pub ready_targets: BTreeSet<(String, String)>,
}

/// Something about a placement that keeps it, or one of its groups, from being served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// A constant of [`reason`].
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

impl Problem {
    /// Whether nothing is carried out before it is mended. Otherwise the rest of the placement is.
    pub fn stops_everything(&self) -> bool {
        matches!(self.reason, reason::INVALID | reason::API_NOT_SERVED)
    }
}

/// What compiling gave.
#[derive(Clone, Debug, PartialEq)]
pub struct Compiled {
    /// The document, over all groups that can be served. `None` when a value cannot be used, and when
    /// there is no group and never was: then no worker has anything to be told of.
    pub document: Option<WorkerDocument>,
    /// What is wrong with the placement; empty when all of it can be carried out.
    pub problems: Vec<Problem>,
}

/// Makes the worker document of a placement.
///
/// `groups` holds what exists, by namespace and name; `namespace_labels` are those of the placement's namespace. A
/// group that is missing or being deleted, or is of another namespace and does not allow the placement's, is left out
/// and named in `problems`; the others are served. When none is left,
/// workers that have a document are given an empty one, since nothing undeclared is to be served; a placement
/// that never had a document gets none, so that no worker is started for nothing. An unusable
/// value in the placement itself gives no document, so that workers go on with the one they have.
///
/// The sequence stays as stored while the digest does, and no worker reports a larger one;
/// otherwise it is one more than the largest known.
pub fn compile(
    placement: &ModelPlacement,
    groups: &BTreeMap<(String, String), &ModelGroup>,
    namespace_labels: &BTreeMap<String, String>,
    public_keys: &[PublicKey],
    previous: &Previous,
) -> Compiled {
    let namespace = placement.metadata.namespace.as_deref().unwrap_or_default();
    let mut problems = Vec::new();
    let mut served = Vec::new();
    for placed in &placement.spec.groups {
        let (group_namespace, name) = placed.target(namespace);
        let group = groups.get(&(group_namespace.to_owned(), name.to_owned())).copied();
        match group.filter(|group| group.metadata.deletion_timestamp.is_none()) {
            Some(group) if group.may_be_placed_in(namespace, namespace_labels) => {
                served.push(document_group(placed, group, previous));
            }
            _ if group_namespace != namespace => problems.push(not_permitted(placed, namespace)),
            _ => problems.push(Problem {
                reason: reason::GROUP_NOT_FOUND,
                message: format!(
                    "there is no ModelGroup `{name}` in namespace `{group_namespace}`; create it, or remove it from spec.groups"
                ),
            }),
        }
    }
    served.sort_by(|a, b| a.name.cmp(&b.name));
    let too_large = beyond_limit(&placement.spec);
    // What is served already goes on, and with it new keys and lenses: that is worth more than the budget is wrong.
    let is_new = previous.stored.is_none() && previous.reported == 0;
    let document = match assemble(placement, served, public_keys, previous) {
        Ok(_) if is_new && too_large.is_some() => None,
        Ok(document) => document,
        Err(problem) => {
            problems.push(problem);
            None
        }
    };
    problems.extend(too_large);
    Compiled { document, problems }
}

fn assemble(
    placement: &ModelPlacement,
    groups: Vec<DocumentGroup>,
    public_keys: &[PublicKey],
    previous: &Previous,
) -> Result<Option<WorkerDocument>, Problem> {
    let spec = &placement.spec;
    let memory = memory(spec)?;
    if groups.is_empty() && previous.stored.is_none() && previous.reported == 0 {
        return Ok(None);
    }
    let default_group = match &spec.default_group_name {
        Some(name) if groups.iter().any(|g| g.name == *name) => Some(name.clone()),
        _ => groups.first().map(|g| g.name.clone()),
    };
    let mut source_volumes: Vec<String> = spec.source_volumes.iter().map(|v| v.name.clone()).collect();
    source_volumes.sort();
    let mut source_secrets: Vec<String> = spec.source_secrets.iter().map(|s| s.name.clone()).collect();
    source_secrets.sort();
    let with_hosts = spec.source_secrets.iter().filter(|secret| !secret.hosts.is_empty());
    let source_secret_hosts = with_hosts.map(|secret| (secret.name.clone(), secret.hosts.clone())).collect();
    let mut public_keys = public_keys.to_vec();
    public_keys.sort();
    let mut document = WorkerDocument {
        protocol: PROTOCOL,
        placement: PlacementIdentity {
            namespace: placement.metadata.namespace.clone().unwrap_or_default(),
            name: placement.metadata.name.clone().unwrap_or_default(),
            uid: placement.metadata.uid.clone().unwrap_or_default(),
        },
        sequence: 0,
        digest: String::new(),
        groups,
        default_group,
        memory,
        batching: batching(spec),
        switching: switching(spec),
        active_group: active_group(spec),
        lens_preload: spec.switching.as_ref().and_then(|s| s.lens_preload).unwrap_or_default(),
        eviction: eviction(spec),
        admission: admission(spec),
        warmup_seconds: count(Some(spec.warmup_seconds()), DEFAULT_WARMUP_SECONDS),
        source_volumes,
        source_secrets,
        source_secret_hosts,
        public_keys,
        hints: None,
    };
    document.digest = document.compute_digest();
    document.sequence = match &previous.stored {
        Some((sequence, digest)) if *digest == document.digest && *sequence >= previous.reported => *sequence,
        stored => 1 + previous.reported.max(stored.as_ref().map_or(0, |s| s.0)),
    };
    Ok(Some(document))
}

fn document_group(placed: &PlacedGroup, group: &ModelGroup, previous: &Previous) -> DocumentGroup {
    let mut lenses: Vec<DocumentLens> = group
        .spec
        .lenses
        .iter()
        .map(|lens| DocumentLens {
            name: lens.name.clone(),
            kind: lens.kind,
            source: lens.source.clone(),
            display_name: lens.display_name.clone(),
            scale_milli: lens.scale_milli(),
            residency: lens.residency.unwrap_or_default(),
            priority: lens.priority(),
        })
        .collect();
    lenses.sort_by(|a, b| a.name.cmp(&b.name));
    let base = &group.spec.base;
    DocumentGroup {
        name: placed.name.clone(),
        object_name: group.metadata.name.clone().unwrap_or_default(),
        namespace: group.metadata.namespace.clone().unwrap_or_default(),
        uid: group.metadata.uid.clone().unwrap_or_default(),
        generation: group.metadata.generation.unwrap_or_default(),
        base: DocumentBase {
            key: BaseKey::of(base),
            source: base.source.clone(),
            dtype: base.dtype,
            quantization: base.quantization.unwrap_or_default(),
        },
        residency: placed.residency.unwrap_or_default(),
        lenses,
        aliases: effective_aliases(placed, group, previous),
    }
}

fn effective_aliases(placed: &PlacedGroup, group: &ModelGroup, previous: &Previous) -> Vec<EffectiveAlias> {
    let before = previous.aliases.get(&placed.name).map(Vec::as_slice).unwrap_or_default();
    let exists = |lens: &str| group.spec.lenses.iter().any(|l| l.name == lens);
    let is_ready = |lens: &str| previous.ready_targets.contains(&(placed.name.clone(), lens.to_owned()));
    let decide = |alias: &Alias| {
        let before = before.iter().find(|b| b.name == alias.name).map(|b| b.targets.as_slice());
        let targets = effective(&alias.declared(), before, exists, is_ready);
        EffectiveAlias { name: alias.name.clone(), targets }
    };
    let mut aliases: Vec<EffectiveAlias> = group.spec.aliases.iter().map(decide).collect();
    aliases.sort_by(|a, b| a.name.cmp(&b.name));
    aliases
}

fn memory(spec: &ModelPlacementSpec) -> Result<MemoryBudgets, Problem> {
    let read = |field: &str, quantity: Option<&ByteQuantity>| {
        quantity.map(ByteQuantity::bytes).transpose().map_err(|e: InvalidQuantity| Problem {
            reason: reason::INVALID,
            message: format!("spec.memory.{field}: {e}"),
        })
    };
    let memory = spec.memory.as_ref();
    let budgets = MemoryBudgets {
        device_bytes: read("deviceBudget", memory.and_then(|m| m.device_budget.as_ref()))?,
        lens_bytes: read("lensBudget", memory.and_then(|m| m.lens_budget.as_ref()))?,
        disk_bytes: disk_bytes(spec, read("diskBudget", memory.and_then(|m| m.disk_budget.as_ref()))?)?,
    };
    if let (Some(device), Some(lens)) = (budgets.device_bytes, budgets.lens_bytes)
        && lens >= device
    {
        return Err(Problem {
            reason: reason::INVALID,
            message: format!(
                "spec.memory.lensBudget ({lens} bytes) is a part of deviceBudget ({device} bytes) and must be smaller"
            ),
        });
    }
    let device_bytes = budgets.device_bytes.filter(|_| beyond_limit(spec).is_none());
    Ok(MemoryBudgets { device_bytes, ..budgets })
}

/// Disk for fetched files: what is declared, or else what the cache is declared to hold.
fn disk_bytes(spec: &ModelPlacementSpec, declared: Option<u64>) -> Result<Option<u64>, Problem> {
    let Some((field, size)) = spec.cache.as_ref().and_then(|cache| cache.declared_size()) else {
        return Ok(declared);
    };
    let invalid = |message: String| Problem { reason: reason::INVALID, message };
    let unreadable = |e: InvalidQuantity| invalid(format!("spec.cache.{field}: {e}"));
    let bytes = size.bytes().map_err(unreadable)?;
    match declared {
        Some(budget) if budget > bytes => Err(invalid(format!(
            "spec.memory.diskBudget ({budget} bytes) is a part of the cache and must not be larger than spec.cache.{field} \
             ({bytes} bytes)"
        ))),
        // What is not a file needs room too, whatever is declared: a full folder ends with the pod being evicted.
        declared => {
            let room = bytes_for_files(size).map_err(unreadable)?;
            Ok(Some(declared.unwrap_or(room).min(room)))
        }
    }
}

/// On a CPU worker memory is the device: a budget that the container's limit does not hold ends with the process being killed
/// in the middle of an answer. A new placement is not begun with it; workers that run take a part of the limit instead.
fn beyond_limit(spec: &ModelPlacementSpec) -> Option<Problem> {
    let device = spec.memory.as_ref()?.device_budget.as_ref()?.bytes().ok()?;
    let resources = spec.worker.as_ref()?.resources.as_ref()?;
    // What the API server took as a quantity and is no number of bytes, such as `500m`, limits nothing that could run, and 0
    // is no limit to the kubelet.
    let limit = ByteQuantity(resources.limits.get("memory")?.0.clone()).bytes().ok()?;
    (spec.accelerator.is_none() && limit > 0 && device >= limit).then(|| Problem {
        reason: reason::BUDGET_EXCEEDS_LIMIT,
        message: format!(
            "spec.memory.deviceBudget ({device} bytes) must be smaller than worker.resources.limits.memory ({limit} bytes): a \
             CPU worker's device is its memory, and the process needs some of it beside; workers that run take 80 % of the \
             limit, as without a deviceBudget"
        ),
    })
}

/// A CRD integer that its schema keeps from being negative.
fn count(value: Option<i32>, default: u32) -> u32 {
    value.map_or(default, |v| u32::try_from(v).unwrap_or(default))
}

fn batching(spec: &ModelPlacementSpec) -> BatchingLimits {
    let default = BatchingLimits::default();
    let Some(given) = &spec.batching else { return default };
    BatchingLimits {
        max_context_tokens: given.max_context_tokens.and_then(|v| u32::try_from(v).ok()),
        max_running_rows: count(given.max_running_rows, default.max_running_rows),
        prefill_chunk_tokens: count(given.prefill_chunk_tokens, default.prefill_chunk_tokens),
    }
}

fn switching(spec: &ModelPlacementSpec) -> SwitchingRule {
    let default = SwitchingRule::default();
    let Some(given) = &spec.switching else { return default };
    SwitchingRule {
        min_hold_seconds: count(given.min_hold_seconds, default.min_hold_seconds),
        max_wait_seconds: count(given.max_wait_seconds, default.max_wait_seconds),
        drain_seconds: count(given.drain_seconds, default.drain_seconds),
    }
}

/// The schema has the name if and only if the mode is `Manual`.
fn active_group(spec: &ModelPlacementSpec) -> Option<String> {
    let given = spec.switching.as_ref()?;
    given.active_group_name.clone().filter(|_| given.mode == Some(SwitchingMode::Manual))
}

fn eviction(spec: &ModelPlacementSpec) -> EvictionRule {
    let default = EvictionRule::default();
    let Some(given) = &spec.eviction else { return default };
    let sweep = given.high_watermark_percent.map(|high| SweepRule {
        high_percent: count(Some(high), 0),
        low_percent: count(given.low_watermark_percent, count(Some(high * 5 / 8), 0)),
        every_seconds: count(given.sweep_seconds, 60),
    });
    EvictionRule {
        policy: given.policy.unwrap_or_default(),
        idle_seconds: count(given.idle_seconds, default.idle_seconds),
        sweep,
    }
}

fn admission(spec: &ModelPlacementSpec) -> AdmissionLimits {
    let default = AdmissionLimits::default();
    let Some(given) = &spec.admission else { return default };
    AdmissionLimits {
        max_queued_requests: count(given.max_queued_requests, default.max_queued_requests),
        hold_seconds: count(given.hold_seconds, default.hold_seconds),
    }
}

/// What a worker does with a document it is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Newer than what it has: take it.
    Take,
    /// What it already has, but for its hints: those are taken when they are newer.
    Same,
    /// Older than what it has: ignore it.
    Stale,
    /// The same sequence with other content: somebody else writes documents too. Refuse (409).
    Conflict,
}

/// Judges an offered document against the one that is applied.
pub fn judge(applied: Option<(u64, &str)>, offered: (u64, &str)) -> Verdict {
    match applied {
        None => Verdict::Take,
        Some((sequence, digest)) => match offered.0.cmp(&sequence) {
            std::cmp::Ordering::Greater => Verdict::Take,
            std::cmp::Ordering::Less => Verdict::Stale,
            std::cmp::Ordering::Equal if offered.1 == digest => Verdict::Same,
            std::cmp::Ordering::Equal => Verdict::Conflict,
        },
    }
}
