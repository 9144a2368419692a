//! The contract between the parts of Turret: types and pure functions, nothing async.
//!
//! Two kinds are what people write: a [`ModelGroup`] is a base model with its lenses, a
//! [`ModelPlacement`] says where groups run, on how many workers and under which budgets.
//! [`compile`](document::compile) turns one placement and its groups into a
//! [`WorkerDocument`], the only thing a worker is told; the worker answers with a
//! [`WorkerReport`], the only thing anybody believes about what it holds. [`assign`](assign::assign) says which
//! workers should hold what, so that operator and gateways pull in one direction; the operator's answer travels as
//! [`hints`].
//!
//! [`validate`] says what the API server would say of an object, without an API server.
//!
//! Start with [`group`] and [`placement`] (what `kubectl explain` shows), then
//! [`document`] and [`report`] (what travels between operator, worker and gateway).

pub mod alias;
pub mod allowed_placements;
pub mod assign;
pub mod condition;
pub mod document;
pub mod group;
pub mod hints;
pub mod host_pattern;
pub mod label;
pub mod model_name;
pub mod placement;
pub mod quantity;
pub mod report;
mod schema;
pub mod source;
pub mod token;
pub mod validate;

pub use assign::{Assignment, assign};
pub use document::{Compiled, WorkerDocument, compile};
pub use group::{ModelGroup, ModelGroupSpec, ModelGroupStatus};
pub use model_name::ModelName;
pub use placement::{ModelPlacement, ModelPlacementSpec, ModelPlacementStatus};
pub use quantity::ByteQuantity;
pub use report::WorkerReport;

/// API group of both kinds.
pub const GROUP: &str = "turret.dev";
/// API version of both kinds.
pub const VERSION: &str = "v1alpha1";

/// Both CustomResourceDefinitions, ready to be applied.
pub fn crds()
-> Vec<k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition> {
    use kube::CustomResourceExt;
    vec![schema::finish(ModelGroup::crd()), schema::finish(ModelPlacement::crd())]
}
