//! What a base is: its architecture, its weights, and how it computes a ragged batch.

pub mod block_pool;
mod bounded_json;
pub mod chat_template;
pub mod config;
pub mod decoder;
pub(crate) mod excerpt;
pub(crate) mod file;
pub mod kv_cache;
pub mod lora;
pub mod replaced;
pub mod residual;
pub mod rope;
pub mod single;
pub mod tensor_file;
mod tensor_header;
mod tensor_names;
pub mod tokenizer;
mod tokenizer_file;
pub mod weights;
