//! Suites that need more than one crate.

pub mod cluster;
pub mod faults;
pub mod numbers;
pub mod parity;
pub mod scale;
pub mod worker;
