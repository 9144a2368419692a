//! The worker's binary as a process of the test, spoken to over HTTP.

pub mod document;
pub mod family_hub;
pub mod https;
pub mod hub;
pub mod process;
