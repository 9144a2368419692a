//! Builders for tests, that read as prose.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::{api::apps::v1::Deployment, jiff::Timestamp};
use serde_json::json;
use turret_crds::{
    ModelGroup, ModelPlacement, WorkerDocument, WorkerReport,
    condition::FailureReason,
    document::BaseKey,
    report::{
        AppliedDocument, ArtifactState, BaseReport, DeviceReport, LensReport, Tier, TierReport,
        WorkerIdentity, WorkerState,
    },
};

use super::{
    assess::ObservedWorker,
    placement::{
        claims::ResourceClaimTemplate,
        demand::Averages,
        plan::{Live, Observed, OwnedKind, Plan, plan, shrink_config_map},
    },
    pod::PodFacts,
};

/// A moment, in seconds.
pub fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("a moment after 1970")
}

/// A group with these lenses.
pub fn group(name: &str, lenses: &[&str]) -> ModelGroup {
    let lenses: Vec<_> = lenses
        .iter()
        .map(|l| json!({"name": l, "source": {"uri": format!("pvc://models/{name}/{l}")}}))
        .collect();
    serde_json::from_value(json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1},
        "spec": {"base": {"source": {"uri": format!("pvc://models/{name}")}}, "lenses": lenses},
    }))
    .expect("a group")
}

/// A placement of these groups with one worker.
pub fn placement(groups: &[&str]) -> ModelPlacement {
    let groups: Vec<_> = groups.iter().map(|g| json!({"name": g})).collect();
    serde_json::from_value(json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement",
        "metadata": {"name": "p", "namespace": "ns", "uid": "uid-p", "generation": 1},
        "spec": {"groups": groups},
    }))
    .expect("a placement")
}

/// A small world: what is in the cluster, and a look at it.
pub struct World {
    pub placement: ModelPlacement,
    pub groups: Vec<ModelGroup>,
    pub namespace_labels: BTreeMap<String, String>,
    /// Names of groups that cannot be read, and why.
    pub unreadable: BTreeMap<(String, String), String>,
    pub live: Live,
    pub workers: Vec<ObservedWorker>,
    pub demand: Averages,
    pub default_image: String,
    /// How many workers `autoscaling` wants.
    pub decided: Option<i32>,
    pub serves_claim_templates: bool,
}

impl World {
    /// One placement of one group with one lens, nothing made yet.
    pub fn new() -> Self {
        Self {
            placement: placement(&["a"]),
            groups: vec![group("a", &["pirate"])],
            namespace_labels: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            live: Live::default(),
            workers: Vec::new(),
            demand: Averages::default(),
            default_image: "worker:1".into(),
            decided: None,
            serves_claim_templates: true,
        }
    }

    /// How many workers are wanted.
    pub fn replicas(&self) -> i32 {
        self.decided.unwrap_or(self.placement.spec.replicas)
    }

    /// What there is to do.
    pub fn plan_at(&self, second: i64) -> Plan {
        let key = |g: &ModelGroup| (g.metadata.namespace.clone().unwrap(), g.metadata.name.clone().unwrap());
        let groups: BTreeMap<_, _> = self.groups.iter().map(|g| (key(g), g)).collect();
        let observed = Observed {
            placement: &self.placement,
            replicas: self.replicas(),
            groups,
            namespace_labels: self.namespace_labels.clone(),
            unreadable: self.unreadable.clone(),
            live: self.live.clone(),
            workers: self.workers.clone(),
            demand: self.demand.clone(),
            public_keys: &[],
            default_image: &self.default_image,
            allowed_source_hosts: None,
            serves_claim_templates: self.serves_claim_templates,
        };
        plan(&observed, at(second))
    }

    pub fn plan(&self) -> Plan {
        self.plan_at(0)
    }

    /// Does what there is to do, as the API server would, and returns what was written.
    pub fn carry_out(&mut self) -> Vec<OwnedKind> {
        self.carry_out_at(0)
    }

    /// The same at a later time.
    pub fn carry_out_at(&mut self, second: i64) -> Vec<OwnedKind> {
        let plan = self.plan_at(second);
        for write in &plan.writes {
            let object = write.object.clone();
            let read = "what is applied can be read";
            match write.kind {
                OwnedKind::ConfigMap => {
                    let mut config_map = serde_json::from_value(object).expect(read);
                    shrink_config_map(&mut config_map);
                    self.live.config_map = Some(Arc::new(config_map));
                }
                OwnedKind::Service => {
                    self.live.service = Some(Arc::new(serde_json::from_value(object).expect(read)))
                }
                OwnedKind::PodDisruptionBudget => {
                    self.live.disruption_budget = Some(Arc::new(serde_json::from_value(object).expect(read)));
                }
                OwnedKind::ResourceClaimTemplate => {
                    let template: ResourceClaimTemplate = serde_json::from_value(object).expect(read);
                    let templates = &mut self.live.claim_templates;
                    templates.retain(|there| there.metadata.name != template.metadata.name);
                    templates.push(Arc::new(template));
                }
                OwnedKind::Deployment => {
                    self.live.deployment = Some(Arc::new(serde_json::from_value(object).expect(read)))
                }
            }
        }
        self.live.claim_templates.retain(|template| !plan.stale_claim_templates.contains(template));
        plan.writes.iter().map(|w| w.kind).collect()
    }

    /// Edits the live Deployment by hand.
    pub fn edit_deployment(&mut self, edit: impl FnOnce(&mut Deployment)) {
        let mut deployment = Deployment::clone(self.live.deployment.as_ref().expect("a Deployment"));
        edit(&mut deployment);
        self.live.deployment = Some(Arc::new(deployment));
    }

    /// A pod of the newest template that serves the newest document.
    pub fn serving(&self, name: &str) -> ObservedWorker {
        let plan = self.plan();
        let report = report(plan.compiled.document.as_ref().expect("a document"), name);
        ObservedWorker {
            pod: pod(name, plan.template.as_deref()),
            report: Some(Arc::new(report)),
            lost: None,
        }
    }
}

/// A pod that runs and takes requests.
pub fn pod(name: &str, template: Option<&str>) -> PodFacts {
    PodFacts {
        name: name.into(),
        ip: Some("10.0.0.1".into()),
        template: template.map(Into::into),
        ready: true,
        ..PodFacts::default()
    }
}

/// The report of a worker that serves all of a document.
pub fn report(document: &WorkerDocument, name: &str) -> WorkerReport {
    let mut bases: BTreeMap<BaseKey, Vec<String>> = BTreeMap::new();
    for group in &document.groups {
        bases.entry(group.base.key.clone()).or_default().push(group.name.clone());
    }
    let active_base = bases.keys().next().cloned();
    let lenses = document.groups.iter().flat_map(|g| g.lenses.iter().map(move |l| (g, l)));
    WorkerReport {
        protocol: document.protocol,
        worker: WorkerIdentity {
            name: name.into(),
            instance: "1".into(),
            version: "0".into(),
            device: DeviceReport { kind: "cpu".into(), name: "cpu".into(), total_bytes: 1 << 30 },
        },
        state: WorkerState {
            document: Some(AppliedDocument { sequence: document.sequence, digest: document.digest.clone() }),
            ready: true,
            active_base,
            tiers: vec![TierReport {
                tier: Tier::Device,
                base_bytes: 1 << 20,
                lens_bytes: 0,
                working_bytes: 0,
                budget_bytes: 1 << 30,
                lens_budget_bytes: 1 << 20,
            }],
            ..WorkerState::default()
        },
        bases: bases
            .into_iter()
            .map(|(key, groups)| BaseReport {
                digest: Some("sha256:base".into()),
                revision: None,
                bytes: Some(1 << 20),
                fetch: None,
                max_context_tokens: Some(512),
                running_rows: 0,
                waiting_rows: 0,
                key,
                groups,
                state: ArtifactState::Ready,
                tier: Tier::Device,
            })
            .collect(),
        lenses: lenses
            .map(|(g, l)| {
                LensReport::new(g.name.clone(), l.name.clone(), ArtifactState::Ready, Tier::Disk).into()
            })
            .collect(),
        aliases: Arc::new(document.aliases()),
    }
}

/// A failure of an artifact.
pub fn failed(reason: FailureReason) -> ArtifactState {
    ArtifactState::Failed { reason, message: format!("says {reason}"), retry_at: None }
}

impl ObservedWorker {
    /// Changes what the worker reports.
    pub fn reporting(mut self, change: impl FnOnce(&mut WorkerReport)) -> Self {
        change(Arc::make_mut(self.report.as_mut().expect("a worker that reports")));
        self
    }
}
