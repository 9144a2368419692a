//! ModelPlacement: one worker document, one Deployment, one Service, one PodDisruptionBudget.

pub mod controller;
pub mod cutover;
#[cfg(test)]
mod cutover_tests;
pub mod plan;
#[cfg(test)]
mod plan_tests;
pub mod push;
pub mod reconcile;
pub mod resources;
#[cfg(test)]
mod resources_tests;
pub mod status;
#[cfg(test)]
mod status_tests;
