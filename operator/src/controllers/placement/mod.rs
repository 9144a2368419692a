//! ModelPlacement: one worker document, one Deployment, one Service, one PodDisruptionBudget.

pub mod autoscale;
pub mod controller;
pub mod demand;
pub mod plan;
#[cfg(test)]
mod plan_tests;
pub mod push;
pub mod reconcile;
pub mod resources;
#[cfg(test)]
mod resources_tests;
pub mod scaling;
pub mod spread;
#[cfg(test)]
mod spread_tests;
pub mod status;
#[cfg(test)]
mod status_tests;
pub mod victims;
