//! The operator at scale: thousands of objects and of simulated workers, on a real API server.
//!
//! `cargo xtask bench operator` starts etcd and the API server, without a kubelet, a scheduler or any controller, and runs the
//! program `turret-bench-operator`, which does what an [`order`] says and writes what it [`found`]. [`bench`] is the order of
//! things; each thing that is measured has a file: [`cold`], [`noop`], [`fresh`] beside [`bare`], [`events`], [`wide`],
//! [`churn`]. Pods are bound by hand to the node of the faults suite, whose workers are all of this one process.
//!
//! What is said of an operator is read from outside: its process ([`process`]), its metrics ([`scrape`]) and the API server's
//! audit log ([`writes`]). Only the command line in [`operator`] and the names of its metrics are Turret's; the audit log and
//! the process can be read of any operator.

pub mod bare;
pub mod bench;
pub mod churn;
pub mod client;
pub mod cold;
pub mod events;
pub mod found;
pub mod fresh;
pub mod layout;
pub mod noop;
pub mod numbers;
pub mod operator;
pub mod order;
pub mod process;
pub mod scene;
pub mod scrape;
pub mod wide;
pub mod writes;
