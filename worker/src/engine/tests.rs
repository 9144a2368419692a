//! Properties of the running engine, on small random models made in memory: a batch means nothing, nothing is left behind.
//!
//! `models`, `ask` and `answers` are what the tests are made with: what computes, what is asked, what comes back.

mod activations;
mod answers;
mod ask;
mod batches;
mod cancels;
mod lenses;
mod models;
mod preempted;
mod prefix;
mod queue;
mod room;

use futures::executor::block_on;
use futures::future::join_all;

use super::Engine;
use super::handle::*;
use super::row::*;
use crate::lens::inject::{Injection, Operation};
use crate::lens::tap::{Activations, Positions, Site, Tap};
use crate::model::weights::{BaseLayout, Dtype};
use answers::*;
use ask::*;
use models::*;
