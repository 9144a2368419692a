//! The gateway over real sockets: fake workers that speak the real state stream on one side, an
//! ordinary HTTP client on the other.

mod fake_worker;
mod harness;

mod demand;
mod fleet;
mod holding;
mod listing;
mod names;
mod passing;
mod retrying;
mod settling;
mod stopping;
