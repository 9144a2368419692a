//! Both CRDs without a cluster: their rules against examples, their shape, the conventions they
//! keep, and what the documentation says of their reasons.

mod cel;
mod conventions;
#[path = "../rules/mod.rs"]
mod rules;
mod shape;
mod troubleshooting;
