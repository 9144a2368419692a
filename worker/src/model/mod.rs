//! What a base is: its architecture, its weights, and how it computes a ragged batch.

pub mod config;
pub mod lora;
pub mod tensor_file;
pub mod weights;
