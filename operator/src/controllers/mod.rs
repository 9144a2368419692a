//! The controllers: one folder per kind.
//!
//! Each is `observe → plan → apply → status`: `reconcile.rs` reads the caches and acts, `plan.rs`,
//! `resources.rs` and `status.rs` decide and are pure. What both kinds share lies here: what the
//! pods and the workers' reports say ([`pod`], [`assess`]), what people ask for by annotations
//! ([`asked`]), whether a live object already is as wanted ([`live`]), the caches ([`cache`], [`merge`]), and the
//! queue of what is to be looked at ([`wakes`]).

pub mod asked;
pub mod assess;
pub mod cache;
pub mod context;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod group;
pub mod live;
pub mod merge;
pub mod placement;
pub mod pod;
pub mod retry;
pub mod status_write;
pub mod unreadable;
pub mod waker;
pub mod wakes;
