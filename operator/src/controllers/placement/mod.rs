//! ModelPlacement: one worker document, one Deployment, one Service, one PodDisruptionBudget; with a class of devices
//! also the template of the claims for them.

pub mod autoscale;
pub mod cache_volume;
pub mod claims;
pub mod controller;
pub mod cutover;
#[cfg(test)]
mod cutover_tests;
pub mod demand;
pub mod nudge;
pub mod pause;
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
