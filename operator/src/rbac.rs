//! The permissions that operator and gateway use, all of them and no others.
//!
//! The chart's roles are generated from here, and the cluster tests compare them with the API
//! server's audit log: nothing is refused, and nothing is granted that is not used.

use k8s_openapi::api::rbac::v1::PolicyRule;
use serde::Serialize;

/// Name of the Lease of the leader election.
pub const LEASE: &str = "turret-operator";
/// Name of the Secret with the operator's signing key.
pub const OPERATOR_KEYS: &str = "turret-operator-keys";
/// Name of the Secret with the gateway's signing key.
pub const GATEWAY_KEYS: &str = "turret-gateway-keys";

/// Who needs which rules.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rules {
    /// The operator's, in every namespace it watches: a ClusterRole, or with `--namespaces` a Role in each.
    pub operator: Vec<PolicyRule>,
    /// The operator's, for what lies in no namespace: in that ClusterRole, and not needed with `--namespace`.
    pub operator_of_cluster: Vec<PolicyRule>,
    /// The operator's, in its own namespace: a Role.
    pub operator_own_namespace: Vec<PolicyRule>,
    /// The gateway's, in every namespace it watches.
    pub gateway: Vec<PolicyRule>,
    /// The gateway's, for what lies in no namespace.
    pub gateway_of_cluster: Vec<PolicyRule>,
    /// The gateway's, in its own namespace: a Role.
    pub gateway_own_namespace: Vec<PolicyRule>,
}

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> PolicyRule {
    let owned = |list: &[&str]| list.iter().map(ToString::to_string).collect::<Vec<_>>();
    PolicyRule {
        api_groups: Some(vec![group.into()]),
        resources: Some(owned(resources)),
        verbs: owned(verbs),
        ..PolicyRule::default()
    }
}

fn named(group: &str, resource: &str, names: &[&str], verbs: &[&str]) -> PolicyRule {
    PolicyRule {
        resource_names: Some(names.iter().map(ToString::to_string).collect()),
        ..rule(group, &[resource], verbs)
    }
}

/// All rules.
///
/// Owned objects are made and changed by server-side apply: the API server asks for `patch`, and
/// for `create` when the object did not exist (in the audit log that is a `patch` answered 201).
/// `get` asks, before an object is first made, whether its name is taken. A pod is patched with an annotation when there are
/// to be fewer workers: the one that loses least is to leave. The slices of the operator's own namespace name the gateways,
/// which are asked what waits.
/// Labels of namespaces say which of them may place a group of another (`allowedPlacements`).
pub fn rules() -> Rules {
    let owned = ["get", "list", "watch", "create", "patch"];
    let of_cluster = vec![rule("", &["namespaces"], &["list", "watch"])];
    Rules {
        operator: vec![
            rule("turret.dev", &["modelgroups", "modelplacements"], &["list", "watch"]),
            rule("turret.dev", &["modelgroups/status", "modelplacements/status"], &["patch"]),
            rule("", &["configmaps", "services"], &owned),
            rule("apps", &["deployments"], &owned),
            rule("policy", &["poddisruptionbudgets"], &owned),
            // Their content never changes, so another one is another object, and the old one is removed.
            rule(
                "resource.k8s.io",
                &["resourceclaimtemplates"],
                &["get", "list", "watch", "create", "patch", "delete"],
            ),
            rule("", &["pods"], &["list", "watch", "patch"]),
            rule("events.k8s.io", &["events"], &["create", "patch"]),
        ],
        operator_of_cluster: of_cluster.clone(),
        operator_own_namespace: vec![
            rule("coordination.k8s.io", &["leases"], &["create"]),
            named("coordination.k8s.io", "leases", &[LEASE], &["get", "update"]),
            named("", "secrets", &[OPERATOR_KEYS, GATEWAY_KEYS], &["list", "watch", "patch"]),
            rule("discovery.k8s.io", &["endpointslices"], &["list", "watch"]),
        ],
        gateway: vec![
            rule("turret.dev", &["modelgroups", "modelplacements"], &["list", "watch"]),
            rule("discovery.k8s.io", &["endpointslices"], &["list", "watch"]),
        ],
        gateway_of_cluster: of_cluster,
        gateway_own_namespace: vec![named("", "secrets", &[GATEWAY_KEYS], &["list", "watch"])],
    }
}
