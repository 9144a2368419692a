//! `turret-operator validate`: what the API server, and after it the operator, would say of files, without a cluster.
//!
//! [`files`] finds and reads them, [`yaml`] takes them apart as kubectl does. [`objects`] judges each object of our
//! kinds by its CRD's rules ([`turret_crds::validate`]), [`together`] what only shows when a placement is compiled
//! with its groups, and [`consent`] whether a group of another namespace may be. [`report`] is what came of it, [`command`] the command line.

pub mod command;
pub mod consent;
pub mod files;
pub mod objects;
pub mod report;
pub mod together;
pub mod yaml;
