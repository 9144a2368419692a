//! Both CRDs without a cluster: their rules against examples, and their shape.

mod cel;
#[path = "../rules/mod.rs"]
mod rules;
mod shape;
