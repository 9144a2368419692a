//! Both CRDs without a cluster: their rules against examples, their shape, and
//! what the documentation says of their reasons.

mod cel;
#[path = "../rules/mod.rs"]
mod rules;
mod shape;
mod troubleshooting;
