//! What a worker says of itself: its state report and the stream of its changes.
//!
//! `GET /control/v1/state` answers a [`WorkerReport`]; with `?watch=true` it streams
//! newline-delimited JSON of [`StateEvent`]: a full snapshot first, then changes. Operator and
//! gateway both read this stream, and nobody keeps a second list of what a worker holds.
//! [`diff`] and [`WorkerReport::apply`] are inverse: a reader that applies every change has
//! exactly the report the worker has.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{
    alias::{EffectiveAlias, GroupAliases},
    condition::FailureReason,
    document::{BaseKey, EvictionRule},
    placement::EvictionPolicy,
};

/// The state of one worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerReport {
    /// [`crate::document::PROTOCOL`].
    pub protocol: u32,
    /// Who reports. Does not change while a worker lives.
    pub worker: WorkerIdentity,
    /// Everything that moves, in one value.
    pub state: WorkerState,
    /// The bases it knows, sorted by key.
    pub bases: Vec<BaseReport>,
    /// The lenses it knows, sorted by group and name. Shared, because most stay the same from one report to the next.
    pub lenses: Vec<Arc<LensReport>>,
    /// What the aliases of its newest document lead to.
    #[serde(default, skip_serializing_if = "has_none")]
    pub aliases: Arc<GroupAliases>,
}

fn has_none(aliases: &Arc<GroupAliases>) -> bool {
    aliases.is_empty()
}

/// Who reports.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerIdentity {
    /// Name of the pod, or of the host without a cluster.
    pub name: String,
    /// Differs in every life of the process: a reader that sees another one starts afresh.
    pub instance: String,
    /// Version of the worker.
    pub version: String,
    /// The device it computes on.
    pub device: DeviceReport,
}

/// The device of a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DeviceReport {
    /// `cpu` or `cuda`.
    pub kind: String,
    /// Its name, such as `AMD EPYC, 2 threads`.
    pub name: String,
    /// Memory the device has, bytes.
    pub total_bytes: u64,
}

/// The part of a report that moves.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerState {
    /// The document that is applied, in all its parts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub document: Option<AppliedDocument>,
    /// Whether it takes requests: its first base is active, the lenses that it waits for have come, and it is not draining.
    pub ready: bool,
    /// Whether it is leaving: it finishes what runs and takes nothing new.
    pub draining: bool,
    /// The active base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub active_base: Option<BaseKey>,
    /// The base that it is advised to prefer, see [`crate::hints`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preferred_base: Option<BaseKey>,
    /// Version of the hints that it has, 0 before it has any. Absent: a worker of a version that takes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hints_version: Option<u64>,
    /// The switch of base that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<SwitchReport>,
    /// Bytes used and allowed in each tier this worker has.
    pub tiers: Vec<TierReport>,
    /// Rows that are computed.
    pub running_rows: u32,
    /// Requests that wait, for a place in the batch or for their base.
    pub waiting_rows: u32,
    /// Base switches so far.
    pub switches: u64,
    /// Evictions of lenses so far.
    pub evictions: u64,
    /// Why the newest document is not applied in all its parts: its budgets leave too little room. Everything
    /// else of it is carried out, and the budgets before them stay in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cannot_fit: Option<CannotFit>,
}

/// A switch of base that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SwitchReport {
    /// The base that leaves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<BaseKey>,
    /// The base that comes.
    pub to: BaseKey,
    /// How far it is.
    pub phase: SwitchPhase,
    /// How much of the base that comes is in memory, 0 to 100.
    pub percent: u8,
    /// Requests that wait for it.
    pub waiting_requests: u32,
}

/// How far a switch of base is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SwitchPhase {
    /// Rows over the base that leaves go on for a while.
    Draining,
    /// Memory is freed and filled.
    Loading,
}

/// Budgets that are not in force because of what they would have to hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CannotFit {
    /// Sequence of the document that asks for them.
    pub sequence: u64,
    /// Bytes that are needed at least.
    pub needed_bytes: u64,
    /// Bytes that the document allows.
    pub budget_bytes: u64,
    /// Whether it fits once what runs has ended. Otherwise only another document helps.
    pub once_idle: bool,
    /// The sum written out, and what to change. For people.
    pub message: String,
}

/// Which document is applied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AppliedDocument {
    /// Its sequence.
    pub sequence: u64,
    /// Its digest.
    pub digest: String,
}

/// Where an artifact is held, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Tier {
    /// Only at its source.
    Remote,
    /// On the worker's disk, or on a mounted volume.
    Disk,
    /// In host memory.
    Host,
    /// In device memory (on a CPU worker, memory is the device).
    Device,
}

/// Bytes of a tier.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TierReport {
    /// Which tier.
    pub tier: Tier,
    /// Bytes that bases use.
    pub base_bytes: u64,
    /// Bytes that lenses use.
    pub lens_bytes: u64,
    /// Device: bytes set aside for KV cache and workspace. Disk: bytes of prepared files, which leave when anything else
    /// needs the room.
    pub working_bytes: u64,
    /// Bytes allowed in all.
    pub budget_bytes: u64,
    /// Bytes allowed for lenses.
    pub lens_budget_bytes: u64,
}

/// Files on their way from a server to the worker's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FetchReport {
    /// Bytes that are there.
    pub fetched_bytes: u64,
    /// Of so many, as far as is known: a server tells a file's length when it is asked for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub known_bytes: Option<u64>,
}

/// How far an artifact is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "phase", rename_all_fields = "camelCase")]
pub enum ArtifactState {
    /// Its files are being found and checked.
    Resolving,
    /// It is on its way to the device.
    Loading {
        /// 0 to 100.
        percent: u8,
    },
    /// It can be served at once, or be loaded when a request asks for it, perhaps after its files were fetched.
    Ready,
    /// It cannot be served.
    Failed {
        /// For machines.
        reason: FailureReason,
        /// For people.
        message: String,
        /// Seconds since the epoch when it is tried again; absent: not before something changes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        retry_at: Option<u64>,
    },
}

impl ArtifactState {
    /// Whether it can be served.
    pub fn is_ready(&self) -> bool {
        // A load after the first starts from files that were found good.
        matches!(self, Self::Ready | Self::Loading { .. })
    }
}

/// A base on a worker.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BaseReport {
    /// Its key.
    pub key: BaseKey,
    /// Groups (as clients call them) over it, sorted.
    pub groups: Vec<String>,
    /// How far it is.
    pub state: ArtifactState,
    /// The highest tier that holds it.
    pub tier: Tier,
    /// Digest of its files, once computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The commit of the hub's repository that its files are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Bytes in device memory, once its headers are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Its files, while they are on their way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetch: Option<FetchReport>,
    /// Longest sequence over it in tokens, once its files are checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_context_tokens: Option<u32>,
    /// Rows over it that are computed, with and without a lens.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub running_rows: u32,
    /// Requests that wait to be, for whatever reason.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub waiting_rows: u32,
}

/// A lens on a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LensReport {
    /// Its group, as clients call it.
    pub group: String,
    /// Its name.
    pub name: String,
    /// How far it is.
    pub state: ArtifactState,
    /// The highest tier that holds it.
    pub tier: Tier,
    /// Digest of its files, once computed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The commit of the hub's repository that its files are of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Bytes in device memory, once its headers are read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// Its files, while they are on their way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fetch: Option<FetchReport>,
    /// Rows that use it now.
    pub active_rows: u32,
    /// Requests that wait to be served with it, for whatever reason.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub waiting_rows: u32,
    /// Requests it has answered.
    pub served: u64,
    /// Requests that ended without an answer because of the worker: a failed row, an end of the drain.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub errors: u64,
    /// Times it came to the device.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub loads: u64,
    /// How long the last time took, milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_millis: Option<u64>,
    /// Seconds since the epoch when a request last used it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used: Option<u64>,
    /// Tokens it has generated.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub generated_tokens: u64,
    /// Time from a request's arrival to its first token, milliseconds: the mean of the last few requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_to_first_token_millis: Option<u64>,
    /// Time per output token after the first, microseconds: the mean of the last few requests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_per_output_token_micros: Option<u64>,
    /// What users think of its answers, where somebody reports it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feedback: Option<Feedback>,
    /// Whether it never leaves: by declaration, or by hand until the worker restarts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pinned: bool,
    /// Whether the operator assigned it to this worker: its requests are best sent here, see [`crate::hints`].
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub assigned: bool,
    /// Leases that keep it, see [`LeaseReport`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub leases: u64,
    /// Why it last left the device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_eviction: Option<Eviction>,
}

/// What users think of a lens's answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Feedback {
    /// How many scores were given.
    pub count: u64,
    /// Their mean, in thousandths: 0 is useless, 1000 is perfect.
    pub mean_milli: u32,
}

impl Feedback {
    /// All scores of both.
    pub fn and(self, other: Self) -> Self {
        let sum = |feedback: Self| u128::from(feedback.count) * u128::from(feedback.mean_milli);
        let count = self.count.saturating_add(other.count);
        let mean = (sum(self) + sum(other)) / u128::from(count.max(1));
        Self { count, mean_milli: u32::try_from(mean).unwrap_or(u32::MAX) }
    }
}

fn is_zero<T: Default + PartialEq>(number: &T) -> bool {
    *number == T::default()
}

/// Why a lens left the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Eviction {
    /// For machines.
    pub reason: EvictionReason,
    /// What made it the one to leave, with the numbers. For people.
    pub message: String,
    /// Seconds since the epoch.
    pub at: u64,
}

/// Why a lens left the device, for machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum EvictionReason {
    /// Another one needed its room, and the policy put it first.
    Room,
    /// It was idle, and more of the budget was taken than the high watermark.
    Idle,
    /// The budget became smaller.
    Budget,
    /// Nothing declares it any more, or not with these files.
    Undeclared,
    /// Its base left.
    Base,
    /// Somebody asked for it.
    Request,
}

impl std::fmt::Display for EvictionReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self, f)
    }
}

/// A lens that a client reserved on a worker: it is not evicted while the lease runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LeaseReport {
    /// Its name, given by the worker.
    pub id: String,
    /// The group, as clients call it.
    pub group: String,
    /// The lens.
    pub lens: String,
    /// Who holds it, in the client's own words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    /// Where leases leave too little room for another one, the higher priority is served first once one of them ends.
    pub priority: u32,
    /// Seconds since the epoch when it ends unless it is renewed.
    pub expires_at: u64,
    /// Whether the lens is in device memory. If not, it is on its way or waits for room.
    pub resident: bool,
}

/// `GET /control/v1/policy`: which lenses leave first when there is need for room, and which before. Called as in
/// `spec.eviction` of the placement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PolicyReport {
    /// How they are put in order.
    pub policy: EvictionPolicy,
    /// When more of the lens budget is taken than this, idle lenses leave. Absent: they stay until there is need for room.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_watermark_percent: Option<u32>,
    /// Until no more of it is taken than this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low_watermark_percent: Option<u32>,
    /// A lens is idle when nothing used it for so long, seconds.
    pub idle_seconds: u32,
    /// How often idle lenses are looked for, seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sweep_seconds: Option<u32>,
}

impl From<EvictionRule> for PolicyReport {
    fn from(rule: EvictionRule) -> Self {
        Self {
            policy: rule.policy,
            high_watermark_percent: rule.sweep.map(|sweep| sweep.high_percent),
            low_watermark_percent: rule.sweep.map(|sweep| sweep.low_percent),
            idle_seconds: rule.idle_seconds,
            sweep_seconds: rule.sweep.map(|sweep| sweep.every_seconds),
        }
    }
}

/// One line of the state stream.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type")]
#[expect(clippy::large_enum_variant, reason = "one exists at a time, on its way to or from a line")]
pub enum StateEvent {
    /// The whole report. First on every stream.
    Snapshot(Box<WorkerReport>),
    /// What changed since the line before.
    Change(Change),
    /// Nothing changed; sent every few seconds so that a dead connection is noticed.
    Heartbeat,
}

/// What changed between two reports of one process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Change {
    /// The new moving part, when it changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<WorkerState>,
    /// New and changed bases.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<BaseReport>,
    /// Bases that are no longer known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed_bases: Vec<BaseKey>,
    /// New and changed lenses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub lenses: Vec<Arc<LensReport>>,
    /// Lenses (group, name) that are no longer known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed_lenses: Vec<(String, String)>,
    /// What all aliases lead to now, when any of it changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub aliases: Option<Arc<GroupAliases>>,
}

impl LensReport {
    /// A lens that nobody has used yet.
    pub fn new(group: impl Into<String>, name: impl Into<String>, state: ArtifactState, tier: Tier) -> Self {
        Self {
            group: group.into(),
            name: name.into(),
            state,
            tier,
            digest: None,
            revision: None,
            bytes: None,
            fetch: None,
            active_rows: 0,
            waiting_rows: 0,
            served: 0,
            errors: 0,
            loads: 0,
            load_millis: None,
            last_used: None,
            generated_tokens: 0,
            time_to_first_token_millis: None,
            time_per_output_token_micros: None,
            feedback: None,
            pinned: false,
            assigned: false,
            leases: 0,
            last_eviction: None,
        }
    }

    fn id(&self) -> (&str, &str) {
        (&self.group, &self.name)
    }
}

/// What turns `old` into `new`; `None` when nothing does. Both are of one process and sorted.
pub fn diff(old: &WorkerReport, new: &WorkerReport) -> Option<Change> {
    let change = Change {
        state: (old.state != new.state).then(|| new.state.clone()),
        bases: new.bases.iter().filter(|b| !old.bases.contains(b)).cloned().collect(),
        removed_bases: old
            .bases
            .iter()
            .filter(|b| !new.bases.iter().any(|n| n.key == b.key))
            .map(|b| b.key.clone())
            .collect(),
        lenses: new
            .lenses
            .iter()
            .enumerate()
            // Nearly always what stood in this place before.
            .filter(|(at, l)| !old.lenses.get(*at).is_some_and(|o| Arc::ptr_eq(o, l)))
            .map(|(_, l)| l)
            .filter(|l| match old.lenses.binary_search_by(|o| o.id().cmp(&l.id())) {
                Ok(at) => old.lenses[at] != **l,
                Err(_) => true,
            })
            .cloned()
            .collect(),
        removed_lenses: old
            .lenses
            .iter()
            .enumerate()
            .filter(|(at, l)| !new.lenses.get(*at).is_some_and(|n| Arc::ptr_eq(n, l)))
            .map(|(_, l)| l)
            .filter(|l| new.lenses.binary_search_by(|n| n.id().cmp(&l.id())).is_err())
            .map(|l| (l.group.clone(), l.name.clone()))
            .collect(),
        aliases: (old.aliases != new.aliases).then(|| new.aliases.clone()),
    };
    (change != Change::default()).then_some(change)
}

impl WorkerReport {
    /// Applies a change as its stream gives it.
    pub fn apply(&mut self, change: Change) {
        if let Some(state) = change.state {
            self.state = state;
        }
        self.bases.retain(|b| !change.removed_bases.contains(&b.key));
        for base in change.bases {
            match self.bases.binary_search_by(|b| b.key.cmp(&base.key)) {
                Ok(at) => self.bases[at] = base,
                Err(at) => self.bases.insert(at, base),
            }
        }
        self.lenses.retain(|l| !change.removed_lenses.iter().any(|(g, n)| *g == l.group && *n == l.name));
        for lens in change.lenses {
            match self.lenses.binary_search_by(|l| l.id().cmp(&lens.id())) {
                Ok(at) => self.lenses[at] = lens,
                Err(at) => self.lenses.insert(at, lens),
            }
        }
        if let Some(aliases) = change.aliases {
            self.aliases = aliases;
        }
    }

    /// The alias of a group, by name.
    pub fn alias(&self, group: &str, name: &str) -> Option<&EffectiveAlias> {
        self.aliases.get(group)?.iter().find(|alias| alias.name == name)
    }

    /// The lens of a group, by name.
    pub fn lens(&self, group: &str, name: &str) -> Option<&LensReport> {
        let at = self.lenses.binary_search_by(|l| l.id().cmp(&(group, name))).ok()?;
        Some(&self.lenses[at])
    }

    /// The base under a group.
    pub fn base_of(&self, group: &str) -> Option<&BaseReport> {
        self.bases.iter().find(|b| b.groups.iter().any(|g| g == group))
    }

    /// Whether it serves exactly the document with this sequence and digest.
    pub fn serves(&self, sequence: u64, digest: &str) -> bool {
        self.state.document.as_ref().is_some_and(|d| d.sequence == sequence && d.digest == digest)
    }
}
