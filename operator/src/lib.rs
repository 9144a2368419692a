//! The operator and the gateway of Turret, as a library so that tests can drive them.
//!
//! - [`run`] is `turret-operator run`: caches, leader election, controllers, health and metrics.
//! - [`controllers`] hold one folder per kind, each cut the same way: `observe → plan → apply →
//!   status`, where plan and status are pure functions.
//! - [`fleet`] follows the workers' own state streams; nobody keeps a second list of what a
//!   worker holds. The gateway reads the same streams.
//! - [`keys`] signs the short-lived tokens that workers ask for.
//! - [`gateway`] is `turret-operator gateway`.
//! - [`rbac`] lists exactly the permissions both use; the chart's roles are generated from it.
//! - [`validate`] is `turret-operator validate`: files are judged without a cluster.

pub mod controllers;
pub mod fleet;
pub mod gateway;
pub mod health;
pub mod keys;
pub mod leader;
pub mod log_level;
pub mod metrics;
pub mod namespaces;
pub mod print;
pub mod rbac;
pub mod relisting;
pub mod run;
pub mod secrets;
pub mod telemetry;
pub mod validate;
