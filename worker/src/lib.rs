//! The worker: one process, one device, one active base, many lenses.
//!
//! - [`engine`]: the thread that owns the device; rows go in, tokens come out. Start at [`engine::handle`].
//! - [`model`]: what a base is and how it computes.
//! - [`turret_kernels`]: the hot loops. [`turret_threads`]: where threads wait for each other.
//! - [`lens`]: what a lens is, one file per kind.
//! - [`residency`]: which bases and lenses are in memory, and who may use them.
//! - [`api`]: HTTP. [`serve`]: puts it all together. [`control`]: asks the control port, by hand.
//! - [`document`]: what the worker is told to serve; [`config`]: how it was started.

pub mod api;
pub mod bench;
pub mod config;
pub mod control;
pub mod device;
pub mod document;
pub mod engine;
pub mod eviction;
pub mod inspect;
pub mod lens;
pub mod metrics;
pub mod model;
pub mod residency;
pub mod serve;
pub mod synth;
pub mod telemetry;
