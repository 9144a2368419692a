//! The engine.

pub mod arena;
pub mod handle;
pub mod row;
