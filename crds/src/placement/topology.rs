//! How the workers of a placement are spread over nodes, zones and the like.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A rule of how the workers of a placement are spread, as in a Pod. Which pods are counted is not yours to say: always the
/// workers of the placement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.minDomains) || self.whenUnsatisfiable == 'DoNotSchedule'").message("minDomains needs whenUnsatisfiable: DoNotSchedule"),
)]
pub struct TopologySpread {
    /// By how many workers two domains may differ.
    #[schemars(range(min = 1, max = 1024))]
    pub max_skew: i32,
    /// The label of nodes whose values are the domains, such as `topology.kubernetes.io/zone`.
    #[schemars(length(min = 1, max = 317))]
    #[x_kube(validation = Rule::new("self.matches('^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$')").message("topologyKey must be a label of nodes such as topology.kubernetes.io/zone"))]
    pub topology_key: String,
    /// What becomes of a worker for which there is no place by this rule. `DoNotSchedule`: it waits.
    /// `ScheduleAnyway`: it goes where the rule is broken least.
    pub when_unsatisfiable: WhenUnsatisfiable,
    /// With fewer domains than this, no worker may be in a domain that has one more than `maxSkew`. Absent: 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub min_domains: Option<i32>,
}

/// What becomes of a worker for which there is no place by a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum WhenUnsatisfiable {
    /// It waits.
    DoNotSchedule,
    /// It goes where the rule is broken least.
    ScheduleAnyway,
}

impl WhenUnsatisfiable {
    /// As a Pod has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DoNotSchedule => "DoNotSchedule",
            Self::ScheduleAnyway => "ScheduleAnyway",
        }
    }
}
