//! Files that somebody else wrote, and did so badly or on purpose: whatever a folder holds, it is loaded or refused with
//! a short error that says where; nothing panics, hangs, or takes more memory than a stated bound.
//!
//! Folders of the fixtures are taken and changed at random, by seeds that are always the same; what random changes do not
//! find is written out below.

mod adapters;
mod bound;
mod change;
mod configs;
mod damage;
mod folder;
mod open;
mod tensors;
mod tokenizers;
