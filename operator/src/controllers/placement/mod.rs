//! ModelPlacement: one worker document, one Deployment, one Service, one PodDisruptionBudget.

pub mod controller;
pub mod plan;
pub mod push;
pub mod reconcile;
pub mod resources;
pub mod status;
