//! Where threads of the worker meet in shared memory and wait for each other by hand.
//!
//! - [`Pool`]: runs a loop on all threads without allocating.
//!
//! Nothing here depends on the rest of the worker, so that all of it can be built with loom's threads, locks and atomics in place
//! of the real ones (`sync.rs`).

mod pool;
mod sync;

pub use pool::{Pool, allowed_threads};
