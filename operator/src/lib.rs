//! The operator and the gateway of Turret, as a library so that tests can drive them.
//!
//! - [`run`] is `turret-operator run`: caches, leader election, controllers, health and metrics.
//! - [`controllers`] hold one folder per kind, each cut the same way: `observe → plan → apply →
//!   status`, where plan and status are pure functions.
//! - [`fleet`] follows the workers' own state streams; nobody keeps a second list of what a
//!   worker holds. The gateway reads the same streams.
//! - [`demand`] is what gateways tell the operator of requests that wait, so that a worker comes for them.
//! - [`keys`] signs the short-lived tokens that workers ask for.
//! - [`gateway`] is `turret-operator gateway`.
//! - [`optional_apis`] finds out what the API server serves of what not every one does.
//! - [`rbac`] lists exactly the permissions both use; the chart's roles are generated from it.
//! - [`validate`] is `turret-operator validate`: files are judged without a cluster.

pub mod controllers;
pub mod demand;
pub mod fleet;
pub mod gateway;
pub mod health;
pub mod keys;
pub mod leader;
pub mod log_level;
pub mod metrics;
pub mod namespaces;
pub mod optional_apis;
pub mod print;
pub mod rbac;
pub mod relisting;
pub mod run;
pub mod secrets;
pub mod telemetry;
pub mod validate;
