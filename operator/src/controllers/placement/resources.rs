//! What a placement owns, from its spec alone. Pure.
//!
//! **The pod template depends on nothing but the pod-shaped part of the spec**: image, `worker`,
//! `accelerator`, `cache`, `sourceVolumes`, `sourceSecrets`, `memory.diskBudget` and `terminationDrainSeconds`, and
//! the operator's own [`Settings`]. Groups, lenses, policies and budgets travel in the worker document, so
//! changing them replaces no pod.

use std::collections::BTreeMap;

use k8s_openapi::{
    ByteString,
    api::{
        apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment},
        core::v1::{
            Capabilities, ConfigMap, ConfigMapVolumeSource, Container, ContainerPort, EmptyDirVolumeSource,
            EnvVar, EnvVarSource, HTTPGetAction, KeyToPath, ObjectFieldSelector,
            PersistentVolumeClaimVolumeSource, PodSecurityContext, PodSpec, PodTemplateSpec, Probe,
            ProjectedVolumeSource, ResourceFieldSelector, ResourceRequirements, SeccompProfile,
            SecretProjection, SecurityContext, Service, ServicePort, ServiceSpec, Toleration,
            TopologySpreadConstraint, Volume, VolumeMount, VolumeProjection,
        },
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec},
    },
    apimachinery::pkg::{
        api::resource::Quantity,
        apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference},
        util::intstr::IntOrString,
    },
};
use kube::{Resource, ResourceExt};
use serde_json::json;
use turret_crds::{
    ModelPlacement, WorkerDocument,
    hints::Hints,
    label,
    placement::{Worker, topology::TopologySpread},
};

use super::{cache_volume, claims};
use crate::controllers::{
    assess::{DocumentRef, GroupVersion},
    live,
    pod::{CONTAINER, TEMPLATE},
};

/// Annotation on the ConfigMap: which version of which ModelGroup the document holds, as JSON.
pub const DOCUMENT_GROUPS: &str = "turret.dev/document-groups";
/// Key in the ConfigMap's `data`: what aliases lead to in the document, as JSON; for the operator alone, which must not
/// forget it. Absent when there is no alias.
pub const ALIASES_KEY: &str = "aliases.json";
/// Annotation on the Deployment: hash of the pod-shaped part of the spec.
pub const POD_SHAPE: &str = "turret.dev/pod-shape";
/// Value of [`label::APP_MANAGED_BY`] on all that the operator makes.
pub const MANAGED_BY: &str = "turret-operator";
/// Value of [`label::APP_NAME`].
const APP: &str = "turret";
/// Value of [`label::APP_COMPONENT`].
const COMPONENT: &str = "worker";
/// User and group of a worker.
const NON_ROOT: i64 = 65532;
/// A leaving worker gets this much longer than its drain before it is killed, seconds.
const GRACE_MARGIN_SECONDS: i64 = 30;
/// Pods leave a node that is lost after this long, seconds.
const NODE_LOST_SECONDS: i64 = 30;
/// A rollout that makes no progress for so long, beside the warm-up of a worker, is told as stuck, seconds.
const PROGRESS_SECONDS: i32 = 600;

/// What the operator's own settings bring into worker pods.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// The resolved image.
    pub image: &'a str,
    /// Hosts that sources may be fetched from, where they are not the worker's default.
    pub allowed_source_hosts: Option<&'a str>,
}

/// Name of the volume with the tokens of sources.
const SECRETS: &str = "secrets";
/// Tokens are read by the worker's group only.
const SECRET_MODE: i32 = 0o440;

/// How pods are replaced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rollout {
    /// A new pod first, then an old one goes: no capacity is missed.
    Surge,
    /// An old pod goes first: where there is no room for one more.
    InPlace,
}

/// The labels by which a placement's pods are selected. They never change.
pub fn selector(placement: &ModelPlacement) -> BTreeMap<String, String> {
    BTreeMap::from([
        (label::APP_NAME.into(), APP.into()),
        (label::APP_COMPONENT.into(), COMPONENT.into()),
        (label::PLACEMENT.into(), placement.name_any()),
    ])
}

/// The selector as text, for the scale subresource.
pub fn selector_text(placement: &ModelPlacement) -> String {
    let pairs: Vec<_> = selector(placement).into_iter().map(|(k, v)| format!("{k}={v}")).collect();
    pairs.join(",")
}

fn labels(placement: &ModelPlacement) -> BTreeMap<String, String> {
    let mut labels = selector(placement);
    labels.insert(label::APP_MANAGED_BY.into(), MANAGED_BY.into());
    labels.insert(label::PLACEMENT_UID.into(), placement.uid().unwrap_or_default());
    labels
}

/// Metadata of an object that a placement owns.
pub fn metadata(placement: &ModelPlacement, annotations: BTreeMap<String, String>) -> ObjectMeta {
    ObjectMeta {
        name: Some(label::owned_name(&placement.name_any())),
        namespace: placement.namespace(),
        labels: Some(labels(placement)),
        annotations: Some(annotations),
        owner_references: Some(vec![OwnerReference {
            api_version: ModelPlacement::api_version(&()).into(),
            kind: ModelPlacement::kind(&()).into(),
            name: placement.name_any(),
            uid: placement.uid().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: None,
        }]),
        ..ObjectMeta::default()
    }
}

/// What a ConfigMap says of the document in it.
pub fn document_ref(config_map: &ConfigMap) -> Option<DocumentRef> {
    let annotations = config_map.annotations();
    let aliases = config_map.data.as_ref().and_then(|data| data.get(ALIASES_KEY));
    Some(DocumentRef {
        sequence: annotations.get(label::DOCUMENT_SEQUENCE)?.parse().ok()?,
        digest: annotations.get(label::DOCUMENT_DIGEST)?.clone(),
        groups: serde_json::from_str(annotations.get(DOCUMENT_GROUPS)?).ok()?,
        aliases: aliases.and_then(|json| serde_json::from_str(json).ok()).unwrap_or_default(),
    })
}

/// The same of a document that is about to be written.
pub fn reference(document: &WorkerDocument) -> DocumentRef {
    let version = |g: &turret_crds::document::DocumentGroup| GroupVersion {
        uid: g.uid.clone(),
        generation: g.generation,
    };
    DocumentRef {
        sequence: document.sequence,
        digest: document.digest.clone(),
        groups: document.groups.iter().map(|g| (g.name.clone(), version(g))).collect(),
        aliases: document.aliases(),
    }
}

/// The hints in a ConfigMap, and their bytes as they are stored.
pub fn stored_hints(config_map: &ConfigMap) -> Option<(Hints, &[u8])> {
    let gzip = config_map.binary_data.as_ref()?.get(label::HINTS_KEY)?.0.as_slice();
    Some((Hints::from_gzip(gzip).ok()?, gzip))
}

/// The ConfigMap with the worker document, given as [`WorkerDocument::to_gzip`] writes it, and with hints beside it, as
/// [`Hints::to_gzip`] does.
pub fn config_map(
    placement: &ModelPlacement,
    document: &DocumentRef,
    gzip: Vec<u8>,
    hints: Option<Vec<u8>>,
) -> ConfigMap {
    let annotations = BTreeMap::from([
        (label::DOCUMENT_SEQUENCE.into(), document.sequence.to_string()),
        (label::DOCUMENT_DIGEST.into(), document.digest.clone()),
        (DOCUMENT_GROUPS.into(), json!(document.groups).to_string()),
    ]);
    let hints = hints.map(|hints| (label::HINTS_KEY.to_owned(), ByteString(hints)));
    let aliases = (!document.aliases.is_empty())
        .then(|| BTreeMap::from([(ALIASES_KEY.to_owned(), json!(document.aliases).to_string())]));
    let document = (label::DOCUMENT_KEY.to_owned(), ByteString(gzip));
    ConfigMap {
        metadata: metadata(placement, annotations),
        data: aliases,
        binary_data: Some(hints.into_iter().chain([document]).collect()),
        ..ConfigMap::default()
    }
}

/// The Service in front of the workers. Its labels reach the EndpointSlices, by which the gateway
/// finds the workers.
pub fn service(placement: &ModelPlacement) -> Service {
    let port = |name: &str, number: u16| ServicePort {
        name: Some(name.into()),
        port: number.into(),
        target_port: Some(IntOrString::String(name.into())),
        protocol: Some("TCP".into()),
        ..ServicePort::default()
    };
    Service {
        metadata: metadata(placement, BTreeMap::new()),
        spec: Some(ServiceSpec {
            type_: Some("ClusterIP".into()),
            selector: Some(selector(placement)),
            ports: Some(vec![
                port(label::DATA_PORT_NAME, label::DATA_PORT),
                port(label::CONTROL_PORT_NAME, label::CONTROL_PORT),
            ]),
            ..ServiceSpec::default()
        }),
        status: None,
    }
}

/// At most one worker at a time is evicted; one that does not serve may always be.
pub fn disruption_budget(placement: &ModelPlacement) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: metadata(placement, BTreeMap::new()),
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            selector: Some(LabelSelector {
                match_labels: Some(selector(placement)),
                ..LabelSelector::default()
            }),
            ..PodDisruptionBudgetSpec::default()
        }),
        status: None,
    }
}

/// Hash of the pod-shaped part of the spec: a change of it, and nothing else, replaces pods.
pub fn pod_shape(placement: &ModelPlacement) -> String {
    // Which image a placement without one gets is decided by this hash, so it cannot be part of it; nor can
    // other settings, since a new image is not to come along with them.
    let given = placement.spec.worker.as_ref().and_then(|w| w.image.as_deref()).unwrap_or_default();
    let template = template(placement, Settings { image: given, allowed_source_hosts: None });
    live::hash(&serde_json::to_value(template).expect("a pod template is JSON"))
}

/// How many workers are wanted as far as objects say: with `autoscaling`, what was decided last stands in the
/// Deployment. A new placement begins with a worker, even where it may have none: so it is tried whether it can be served.
pub fn replicas(placement: &ModelPlacement, deployment: Option<&Deployment>) -> i32 {
    let Some(autoscaling) = &placement.spec.autoscaling else { return placement.spec.replicas };
    let live = deployment.and_then(live_replicas).unwrap_or(1);
    live.max(autoscaling.min_replicas).min(autoscaling.max_replicas)
}

/// How many pods a Deployment is to have.
pub fn live_replicas(deployment: &Deployment) -> Option<i32> {
    deployment.spec.as_ref()?.replicas
}

/// The Deployment of so many workers.
pub fn deployment(
    placement: &ModelPlacement,
    settings: Settings<'_>,
    rollout: Rollout,
    replicas: i32,
) -> Deployment {
    let mut template = template(placement, settings);
    let hash = live::hash(&serde_json::to_value(&template).expect("a pod template is JSON"));
    template
        .metadata
        .get_or_insert_default()
        .annotations
        .get_or_insert_default()
        .insert(TEMPLATE.into(), hash);
    let (surge, unavailable) = match rollout {
        Rollout::Surge => (1, 0),
        Rollout::InPlace => (0, 1),
    };
    Deployment {
        metadata: metadata(placement, BTreeMap::from([(POD_SHAPE.into(), pod_shape(placement))])),
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            progress_deadline_seconds: Some(PROGRESS_SECONDS + placement.spec.warmup_seconds()),
            revision_history_limit: Some(2),
            selector: LabelSelector { match_labels: Some(selector(placement)), ..LabelSelector::default() },
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(surge)),
                    max_unavailable: Some(IntOrString::Int(unavailable)),
                }),
            }),
            template,
            ..DeploymentSpec::default()
        }),
        status: None,
    }
}

/// Hash of the pod template a Deployment makes pods from, as its own annotation says.
pub fn template_hash(deployment: &Deployment) -> Option<&str> {
    let template = &deployment.spec.as_ref()?.template;
    Some(template.metadata.as_ref()?.annotations.as_ref()?.get(TEMPLATE)?.as_str())
}

fn template(placement: &ModelPlacement, settings: Settings<'_>) -> PodTemplateSpec {
    let worker = placement.spec.worker.clone().unwrap_or_default();
    let drain = i64::from(placement.spec.termination_drain_seconds());
    let mut pod_labels = worker.pod_labels.clone();
    pod_labels.extend(labels(placement));
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: Some(pod_labels),
            annotations: (!worker.pod_annotations.is_empty()).then(|| worker.pod_annotations.clone()),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            automount_service_account_token: Some(false),
            enable_service_links: Some(false),
            containers: vec![container(placement, &worker, settings, drain)],
            node_selector: (!worker.node_selector.is_empty()).then(|| worker.node_selector.clone()),
            priority_class_name: worker.priority_class_name.clone(),
            resource_claims: claims::of_pod(placement),
            runtime_class_name: worker.runtime_class_name.clone(),
            service_account_name: worker.service_account_name.clone(),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(NON_ROOT),
                run_as_group: Some(NON_ROOT),
                fs_group: Some(NON_ROOT),
                fs_group_change_policy: Some("OnRootMismatch".into()),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".into(),
                    ..SeccompProfile::default()
                }),
                ..PodSecurityContext::default()
            }),
            termination_grace_period_seconds: Some(drain + GRACE_MARGIN_SECONDS),
            tolerations: Some(tolerations(&worker)),
            topology_spread_constraints: Some(spread(placement, &worker)),
            volumes: Some(volumes(placement)),
            ..PodSpec::default()
        }),
    }
}

fn container(placement: &ModelPlacement, worker: &Worker, settings: Settings<'_>, drain: i64) -> Container {
    let port = |name: &str, number: u16| ContainerPort {
        name: Some(name.into()),
        container_port: number.into(),
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    };
    let probe = |path: &str, period: i32, failures: i32, timeout: i32| Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.into()),
            port: IntOrString::String(label::DATA_PORT_NAME.into()),
            scheme: Some("HTTP".into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period),
        failure_threshold: Some(failures),
        timeout_seconds: Some(timeout),
        ..Probe::default()
    };
    let mut args = vec![
        "serve".into(),
        format!("--config={}", label::DOCUMENT_DIR),
        format!("--listen=0.0.0.0:{}", label::DATA_PORT),
        format!("--control-listen=0.0.0.0:{}", label::CONTROL_PORT),
        format!("--cache-dir={}", label::CACHE_DIR),
        format!("--volumes-dir={}", label::VOLUMES_DIR),
        format!("--drain-seconds={drain}"),
    ];
    args.extend(settings.allowed_source_hosts.map(|hosts| format!("--allowed-source-hosts={hosts}")));
    Container {
        name: CONTAINER.into(),
        image: Some(settings.image.into()),
        image_pull_policy: Some("IfNotPresent".into()),
        args: Some(args),
        env: Some(environment(placement, worker)),
        ports: Some(vec![
            port(label::DATA_PORT_NAME, label::DATA_PORT),
            port(label::CONTROL_PORT_NAME, label::CONTROL_PORT),
        ]),
        // It listens at once and loads afterwards: starting up is short, being ready may take long.
        startup_probe: Some(probe("/livez", 1, 120, 2)),
        liveness_probe: Some(probe("/livez", 10, 6, 5)),
        readiness_probe: Some(probe("/readyz", 2, 2, 2)),
        resources: Some(resources(placement, worker)),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities { drop: Some(vec!["ALL".into()]), add: None }),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        // What a worker says last is why it ended.
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        volume_mounts: Some(mounts(placement)),
        ..Container::default()
    }
}

fn environment(placement: &ModelPlacement, worker: &Worker) -> Vec<EnvVar> {
    let field = |name: &str, path: &str| EnvVar {
        name: name.into(),
        value: None,
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector { field_path: path.into(), api_version: Some("v1".into()) }),
            ..EnvVarSource::default()
        }),
    };
    let mut env = vec![
        field(label::ENV_NAMESPACE, "metadata.namespace"),
        field(label::ENV_WORKER_NAME, "metadata.name"),
    ];
    if let Some(accelerator) = &placement.spec.accelerator {
        let value = Some(accelerator.name().to_owned());
        env.push(EnvVar { name: label::ENV_ACCELERATOR.into(), value, value_from: None });
    }
    if worker.resources.as_ref().is_some_and(|r| r.limits.contains_key("cpu")) {
        // Rounded up to whole CPUs by the kubelet.
        env.push(EnvVar {
            name: label::ENV_THREADS.into(),
            value: None,
            value_from: Some(EnvVarSource {
                resource_field_ref: Some(ResourceFieldSelector {
                    container_name: Some(CONTAINER.into()),
                    resource: "limits.cpu".into(),
                    divisor: None,
                }),
                ..EnvVarSource::default()
            }),
        });
    }
    // What the user sets goes before what we derive.
    env.retain(|ours| !worker.env.iter().any(|theirs| theirs.name == ours.name));
    env.extend(worker.env.iter().cloned().map(EnvVar::from));
    env
}

fn resources(placement: &ModelPlacement, worker: &Worker) -> ResourceRequirements {
    let mut resources = ResourceRequirements::from(worker.resources.clone().unwrap_or_default());
    if let Some(resource) = placement.spec.accelerator.as_ref().and_then(|a| a.resource_name.clone()) {
        resources.limits.get_or_insert_default().insert(resource, Quantity("1".into()));
    }
    resources.claims = claims::of_container(placement);
    if let Some(bytes) = cache_volume::ephemeral_storage(placement) {
        let requests = resources.requests.get_or_insert_default();
        requests.entry("ephemeral-storage".into()).or_insert_with(|| Quantity(bytes.to_string()));
    }
    resources
}

/// How workers are spread: as declared, or else over nodes as far as there is room.
fn spread(placement: &ModelPlacement, worker: &Worker) -> Vec<TopologySpreadConstraint> {
    let over = |key: &str, when: &str| TopologySpreadConstraint {
        label_selector: Some(LabelSelector {
            match_labels: Some(selector(placement)),
            ..LabelSelector::default()
        }),
        max_skew: 1,
        topology_key: key.into(),
        when_unsatisfiable: when.into(),
        ..TopologySpreadConstraint::default()
    };
    let declared = &worker.topology_spread_constraints;
    if declared.is_empty() {
        return vec![over("kubernetes.io/hostname", "ScheduleAnyway")];
    }
    let constraint = |rule: &TopologySpread| TopologySpreadConstraint {
        max_skew: rule.max_skew,
        min_domains: rule.min_domains,
        ..over(&rule.topology_key, rule.when_unsatisfiable.name())
    };
    declared.iter().map(constraint).collect()
}

fn tolerations(worker: &Worker) -> Vec<Toleration> {
    let lost = |key: &str| Toleration {
        key: Some(key.into()),
        operator: Some("Exists".into()),
        effect: Some("NoExecute".into()),
        toleration_seconds: Some(NODE_LOST_SECONDS),
        value: None,
    };
    let ours = ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"].map(lost);
    let theirs = &worker.tolerations;
    let ours = ours.into_iter().filter(|o| !theirs.iter().any(|t| t.key == o.key));
    theirs.iter().cloned().chain(ours).collect()
}

fn volumes(placement: &ModelPlacement) -> Vec<Volume> {
    let empty = |name: &str, bytes: u64| Volume {
        name: name.into(),
        empty_dir: Some(EmptyDirVolumeSource { size_limit: Some(Quantity(bytes.to_string())), medium: None }),
        ..Volume::default()
    };
    let mut volumes = vec![
        Volume {
            name: "document".into(),
            config_map: Some(ConfigMapVolumeSource {
                name: label::owned_name(&placement.name_any()),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        },
        cache_volume::volume(placement),
        empty("tmp", 1 << 30),
    ];
    volumes.extend(placement.spec.source_volumes.iter().map(|source| Volume {
        name: source_volume_name(&source.name),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: source.persistent_volume_claim.claim_name.clone(),
            read_only: Some(true),
        }),
        ..Volume::default()
    }));
    volumes.extend(secrets(placement));
    volumes
}

/// The tokens of the listed Secrets as `NAME/token`: nothing else of them, and those that there are. The kubelet
/// replaces them when a Secret changes, so a new token replaces no pod.
fn secrets(placement: &ModelPlacement) -> Option<Volume> {
    let listed = &placement.spec.source_secrets;
    let project = |name: &str| VolumeProjection {
        secret: Some(SecretProjection {
            name: name.into(),
            items: Some(vec![KeyToPath {
                key: label::SECRET_KEY.into(),
                path: format!("{name}/{}", label::SECRET_KEY),
                mode: None,
            }]),
            optional: Some(true),
        }),
        ..VolumeProjection::default()
    };
    (!listed.is_empty()).then(|| Volume {
        name: SECRETS.into(),
        projected: Some(ProjectedVolumeSource {
            default_mode: Some(SECRET_MODE),
            sources: Some(listed.iter().map(|secret| project(&secret.name)).collect()),
        }),
        ..Volume::default()
    })
}

/// Volume names of the user cannot meet ours.
fn source_volume_name(name: &str) -> String {
    format!("source-{name}")
}

fn mounts(placement: &ModelPlacement) -> Vec<VolumeMount> {
    let mount = |name: &str, path: &str, read_only: bool| VolumeMount {
        name: name.into(),
        mount_path: path.into(),
        read_only: read_only.then_some(true),
        ..VolumeMount::default()
    };
    let mut mounts = vec![
        mount("document", label::DOCUMENT_DIR, true),
        mount(cache_volume::NAME, label::CACHE_DIR, false),
        mount("tmp", "/tmp", false),
    ];
    mounts.extend(placement.spec.source_volumes.iter().map(|source| {
        mount(&source_volume_name(&source.name), &format!("{}/{}", label::VOLUMES_DIR, source.name), true)
    }));
    if !placement.spec.source_secrets.is_empty() {
        mounts.push(mount(SECRETS, label::SECRETS_DIR, true));
    }
    mounts
}
