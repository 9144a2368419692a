//! Where threads of the worker meet in shared memory and wait for each other by hand.
//!
//! - [`Pool`]: runs a loop on all threads without allocating.
//! - [`events`]: what the engine's thread tells whoever reads a row, without ever waiting for them.
//!
//! Nothing here depends on the rest of the worker, so that all of it can be built with loom's threads, locks and atomics in place
//! of the real ones (`sync.rs`). The tests in `models.rs` then run in every order that threads can take, up to a number of
//! preemptions, and see old values where an atomic's ordering allows them: `cargo xtask test unit` does that. Everywhere else
//! threads exchange messages, or share what one lock guards and nobody waits for.

pub mod events;
#[cfg(all(test, loom))]
mod models;
mod pool;
mod sync;

pub use pool::{Pool, allowed_threads};
