//! `turret-worker inspect`: what a folder holds, before anybody is asked to serve it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::engine::handle::EngineConfig;
use crate::engine::memory::BaseNeeds;
use crate::lens::LensError;
use crate::lens::lora::{LoraFolder, lora_files};
use crate::model::config::ModelConfig;
use crate::model::kv_cache::BLOCK_TOKENS;
use crate::model::weights::{BaseError, BaseFolder, BaseLayout, Dtype, Quantization, base_files};
use crate::residency::resolve::{HashedFile, digest_of};

/// What to look at.
#[derive(Clone, Debug, clap::Args)]
pub struct InspectArgs {
    /// A base or a lens folder.
    pub folder: PathBuf,
    /// For a lens: the folder of its base, to check that they fit and to tell the bytes in memory.
    #[arg(long, value_name = "FOLDER")]
    pub base: Option<PathBuf>,
    /// For a base: `spec.batching.maxContextTokens`, to tell what it needs beside its weights.
    #[arg(long, default_value_t = 8192)]
    pub max_context_tokens: u32,
    /// For a base: `spec.batching.maxRunningRows`.
    #[arg(long, default_value_t = 64)]
    pub max_running_rows: u32,
    /// For a base: `spec.batching.prefillChunkTokens`.
    #[arg(long, default_value_t = 512)]
    pub prefill_chunk_tokens: u32,
}

/// Why a folder cannot be told about.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// It holds neither.
    #[error("`{0}` holds neither a base (config.json) nor a lens (adapter_config.json)")]
    Neither(PathBuf),
    /// The base is not usable.
    #[error("the base in `{path}` cannot be served")]
    Base {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: BaseError,
    },
    /// The lens is not usable.
    #[error("the lens in `{path}` cannot be served")]
    Lens {
        /// Its folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: LensError,
    },
    /// A file cannot be read.
    #[error("failed to read the files in `{path}`")]
    Read {
        /// The folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
}

/// Prints what a folder holds.
pub fn run(args: &InspectArgs) -> Result<(), InspectError> {
    let path = &args.folder;
    let names = if path.join("adapter_config.json").exists() {
        inspect_lens(path, args.base.as_deref())?;
        lora_files(path)
    } else if path.join("config.json").exists() {
        inspect_base(path, args)?;
        base_files(path).map_err(|source| InspectError::Base { path: path.clone(), source })?
    } else {
        return Err(InspectError::Neither(path.clone()));
    };
    let (digest, files) =
        digest_of(path, &names).map_err(|source| InspectError::Read { path: path.clone(), source })?;
    println!("files:");
    for HashedFile { name, bytes, sha256 } in files {
        println!("  {sha256}  {bytes:>12}  {name}");
    }
    println!("digest: {digest}");
    Ok(())
}

fn open_base(path: &Path) -> Result<BaseFolder, InspectError> {
    BaseFolder::open(path, None).map_err(|source| InspectError::Base { path: path.into(), source })
}

fn inspect_base(path: &Path, args: &InspectArgs) -> Result<(), InspectError> {
    let base = open_base(path)?;
    let config = base.config();
    println!("kind: base ({:?})", config.architecture);
    print_shape(config);
    println!("stored as: {}", base.layout().dtype);
    println!("bytes in memory:");
    for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
        println!("  {dtype}: {}", BaseLayout::of(config, dtype).bytes);
    }
    println!("  Q8_0: {}", base.layout().quantized(Quantization::Q8_0).bytes);
    print_needs(base.layout(), args);
    Ok(())
}

/// What serving takes beside the weights, and the least device budget, as stored.
fn print_needs(layout: &BaseLayout, args: &InspectArgs) {
    let limits = EngineConfig {
        device_bytes: 0,
        lens_bytes: 0,
        max_context_tokens: args.max_context_tokens,
        max_running_rows: args.max_running_rows,
        prefill_chunk_tokens: args.prefill_chunk_tokens,
        max_waiting_rows: 0,
        prefix_cache: true,
    };
    let needs = BaseNeeds::of(&layout.config, layout.dtype, &limits);
    let sequence = u64::from(needs.min_blocks) * needs.block_bytes;
    let rows = u64::from(args.max_running_rows);
    let least = layout.bytes + needs.workspace_bytes + sequence;
    println!(
        "beside them, for sequences of {} tokens, {rows} rows and {} prompt tokens in a step:",
        needs.context_tokens, args.prefill_chunk_tokens
    );
    println!("  workspace: {}", needs.workspace_bytes);
    println!("  KV cache of a token: {}", needs.block_bytes / BLOCK_TOKENS as u64);
    println!("  KV cache of one sequence: {sequence}");
    println!("  KV cache of {rows}: {}", sequence.saturating_mul(rows));
    println!("device budget, beside the lens budget:");
    println!("  least, for one sequence: {least}");
    println!(
        "  for all rows at full length: {}",
        least.saturating_add(sequence.saturating_mul(rows - rows.min(1)))
    );
}

fn print_shape(config: &Arc<ModelConfig>) {
    println!(
        "shape: {} layers, hidden {}, intermediate {}, {} heads of {} ({} for keys and values), vocabulary {}, context {}",
        config.layers,
        config.hidden_size,
        config.intermediate_size,
        config.heads,
        config.head_dim,
        config.kv_heads,
        config.vocab_size,
        config.max_position_embeddings
    );
}

fn inspect_lens(path: &Path, base: Option<&Path>) -> Result<(), InspectError> {
    println!("kind: lens (LoRA)");
    let Some(base) = base else {
        println!("bytes in memory: known with --base FOLDER");
        return Ok(());
    };
    let base = open_base(base)?;
    let lens = LoraFolder::open(path, base.layout())
        .map_err(|source| InspectError::Lens { path: path.into(), source })?;
    println!("fits the base: yes");
    println!("bytes in memory: {}", lens.layout().bytes);
    Ok(())
}
