//! Faults between operator and API server.
//!
//! `cargo xtask test faults` starts a cluster without the chart. Each [`story`] goes through the same [`step`]s in a namespace of
//! its own, with an operator that is a process of this machine, and a [`proxy`] between it and the API server; [`plan`] says what
//! goes wrong there, and when the operator dies. A [`node`] without a kubelet runs pods whose [`worker`]s hold nothing, so that a
//! story takes seconds; one story has real pods.
//!
//! What there is in the end ([`end_state`]) must be what there is without any fault, and when everything is deleted, nothing may
//! be left. [`world`] tells all stories.
//!
//! Without faults, the same world tries what users do: [`random`] objects, objects that are [`malformed`], and every way of
//! [`deletion`].

pub mod deletion;
pub mod end_state;
pub mod lines;
pub mod malformed;
pub mod node;
pub mod operator;
pub mod plan;
pub mod proxy;
pub mod random;
pub mod real_pods;
pub mod record;
pub mod step;
pub mod story;
pub mod tls;
pub mod worker;
pub mod world;
