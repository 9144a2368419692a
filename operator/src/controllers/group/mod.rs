//! ModelGroup: owns nothing; its status says how far the placements that serve it are.

pub mod aliases;
pub mod controller;
pub mod naming;
pub mod reconcile;
pub mod status;
#[cfg(test)]
mod status_tests;
