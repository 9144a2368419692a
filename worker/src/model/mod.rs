//! What a base is: its architecture, its weights, and how it computes a ragged batch.

pub mod block_pool;
pub mod chat_template;
pub mod config;
pub mod decoder;
pub mod kv_cache;
pub mod lora;
pub mod replaced;
pub mod residual;
pub mod rope;
pub mod single;
pub mod tensor_file;
mod tensor_names;
pub mod tokenizer;
pub mod weights;
