//! The hot loops, as portable code over sixteen lanes with four ways to run it.
//!
//! # Batch means nothing
//! A number of the result depends on its own row only: every dot product adds its products in the same order,
//! however many rows share the step, however the outputs are split over threads, and whichever tile the row
//! falls into. So a row gives the same bits alone and in any batch. What does change the last bits is the instruction set
//! (fused or separate multiply and add), and a process uses exactly one.
//!
//! # Where what is
//! - [`simd`]: sixteen lanes, per instruction set; [`simd::launch`] is the one place that chooses.
//! - [`number`]: kinds of numbers, and what is done to each.
//! - [`matmul`] and [`finish`], [`rows`], [`attention`], [`vocabulary`]: the loops, over plain slices.
//! - [`ops`]: the same as candle's in-place operations, which is how the decoder calls them on [`buffer`]s.
//!
//! Each runs on all threads of a [`turret_threads::Pool`].
//!
//! This crate, the pool and the worker's arena are the only places with `unsafe`: here vector loads, and several threads writing
//! disjoint parts of one slice.

pub mod attention;
pub mod buffer;
pub mod finish;
pub mod matmul;
pub mod number;
pub mod ops;
pub mod rows;
pub mod simd;
pub mod vocabulary;
