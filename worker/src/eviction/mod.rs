//! Which lenses leave device memory: the policies, what they remember, and a simulator that tells how good they are.
//!
//! - [`usage`] is what is remembered of one lens; [`history`] of all of them.
//! - [`policy`] chooses victims: a pure function of values.
//! - [`shadow`] replays every request against caches of names only, one per horizon, so that ALRFU knows which horizon
//!   would move the least right now.
//! - [`trace`] and [`workload`] give sequences of requests, [`simulate`] replays them; [`command`] is `turret-worker simulate`.

pub mod command;
pub mod history;
pub mod policy;
pub mod shadow;
pub mod simulate;
pub mod trace;
pub mod usage;
pub mod workload;
