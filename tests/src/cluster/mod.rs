//! Scenarios on a real cluster: what they share.
//!
//! `cargo xtask test cluster` starts a cluster of the project's own, imports the images and runs
//! `tests/cluster.rs` with the variables of [`environment`]. A scenario works in its own
//! [`space::Space`] (a namespace under Pod Security `restricted` with the demo family on a volume),
//! applies objects with kubectl as a person would, asks through the [`gateway`], and waits with
//! [`eventually`], never with a bare sleep.

pub mod audit;
pub mod crd_rules;
pub mod environment;
pub mod eventually;
pub mod family;
pub mod gateway;
pub mod load;
pub mod objects;
pub mod process;
pub mod recount;
pub mod release;
pub mod scenarios;
pub mod space;
pub mod table;
pub mod tools;
pub mod worker;
pub mod zipf;
