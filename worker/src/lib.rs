//! The worker: one process, one device, one active base, many lenses.
//!
//! - [`engine`]: the thread that owns the device; rows go in, tokens come out. Start at [`engine::handle`].
//! - [`model`]: what a base is and how it computes.
//! - [`kernels`]: the hot loops.
//! - [`lens`]: what a lens is, one file per kind.

pub mod engine;
pub mod kernels;
pub mod lens;
pub mod model;
pub mod synth;
