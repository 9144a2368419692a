//! Small random bases and lenses, made in memory.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use serde_json::json;

use super::*;
use crate::engine::memory;
use crate::lens::FilledLens;
use crate::lens::lora::LoraFolder;
use crate::model::config::ModelConfig;
use crate::model::tensor_file::tests::write;
use crate::model::weights::{FilledBase, PackedMatrix, Quantization};

pub(super) const VOCAB: u32 = 67;
pub(super) const WIDTH: usize = 36;

/// A small architecture whose widths fit no vector, with everything that the published ones have. Windows and long
/// contexts begin inside of what the rows below reach.
pub(super) fn config(name: &str) -> Arc<ModelConfig> {
    let mut text = json!({
        "architectures": [name], "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "vocab_size": VOCAB,
        "max_position_embeddings": 160, "tie_word_embeddings": name != "LlamaForCausalLM",
    });
    let more = match name {
        "MistralForCausalLM" => json!({"sliding_window": 21}),
        "Gemma2ForCausalLM" => json!({"sliding_window": 16, "query_pre_attn_scalar": 7}),
        "Gemma3ForCausalLM" => json!({"sliding_window": 3, "sliding_window_pattern": 2}),
        "Phi3ForCausalLM" => {
            json!({"original_max_position_embeddings": 44, "rope_scaling": {"type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.4, 2.0], "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0]}})
        }
        _ => json!({}),
    };
    let more = more.as_object().unwrap().clone();
    text.as_object_mut().unwrap().extend(more);
    Arc::new(ModelConfig::parse(&text.to_string()).unwrap())
}

/// Numbers between -1 and 1 that follow from a seed.
pub(super) struct Noise(pub(super) u64);

impl Noise {
    pub(super) fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as f32 / (1u64 << 30) as f32) - 1.0
    }

    fn fill(&mut self, bytes: &mut [u8], dtype: Dtype, scale: f32) {
        for element in bytes.chunks_exact_mut(dtype.bytes()) {
            let x = self.next() * scale;
            match dtype {
                Dtype::F32 => element.copy_from_slice(&x.to_le_bytes()),
                Dtype::BF16 => element.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
                Dtype::F16 => element.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            }
        }
    }
}

pub(super) fn limits(layout: &BaseLayout, chunk: u32, rows: u32, spare_blocks: u32) -> EngineConfig {
    limits_to(128, layout, chunk, rows, spare_blocks)
}

/// Tokens of a row that is still far from its end when a test has sent its next few commands.
pub(super) const LONG: u32 = 1 << 14;

/// A base whose rows may be that long.
pub(super) fn long_layout() -> BaseLayout {
    let config =
        ModelConfig { max_position_embeddings: LONG as usize, ..(*config("LlamaForCausalLM")).clone() };
    BaseLayout::of(&Arc::new(config), Dtype::F32)
}

pub(super) fn limits_to(
    context: u32,
    layout: &BaseLayout,
    chunk: u32,
    rows: u32,
    spare_blocks: u32,
) -> EngineConfig {
    let mut limits = EngineConfig {
        device_bytes: 0,
        lens_bytes: 1 << 20,
        max_context_tokens: context,
        max_running_rows: rows,
        prefill_chunk_tokens: chunk,
        max_waiting_rows: 2048,
        prefix_cache: true,
    };
    let needs = memory::BaseNeeds::of(&layout.config, layout.dtype, &limits);
    let blocks = u64::from(needs.min_blocks + spare_blocks) * needs.block_bytes;
    limits.device_bytes = layout.bytes + limits.lens_bytes + needs.workspace_bytes + blocks;
    limits
}

pub(super) async fn install(engine: &EngineHandle, layout: &BaseLayout, seed: u64) -> BaseId {
    let mut region = engine.reserve_base(layout).await.unwrap();
    let mut noise = Noise(seed);
    // All as matrices of the layout's dtype first, then the vectors in f32.
    noise.fill(region.bytes_mut(), layout.dtype, 0.35);
    if layout.quantization == Quantization::Q8_0 {
        let matrices = layout.layers.iter().flat_map(|l| [l.qkv, l.o, l.gate_up, l.down]);
        for PackedMatrix { offset, shape } in matrices.chain([layout.head]) {
            let mut rows = vec![0; shape.outputs * shape.inputs * shape.row_dtype().bytes()];
            noise.fill(&mut rows, shape.row_dtype(), 0.35);
            shape.pack(0, &rows, &mut region.bytes_mut()[offset..][..shape.bytes()]);
        }
    }
    let vectors = layout.layers.iter().flat_map(|l| {
        let norms =
            [Some(l.attention_norm), Some(l.mlp_norm), l.qkv_bias, l.o_bias, l.down_bias, l.gate_up_bias];
        let outer = [l.post_attention_norm, l.post_mlp_norm];
        norms.into_iter().chain(outer).flatten().chain(l.qk_norm.into_iter().flat_map(|(q, k)| [q, k]))
    });
    for vector in vectors.chain([layout.final_norm]) {
        noise.fill(&mut region.bytes_mut()[vector.offset..][..vector.len * 4], Dtype::F32, 1.0);
    }
    engine.install_base(FilledBase::new(layout.clone(), region)).await.unwrap()
}

/// Writes a LoRA lens with random tensors.
fn write_lens(dir: &Path, config: &ModelConfig, seed: u64) {
    let rank = 3 + (seed % 5) as usize;
    let targets =
        if seed.is_multiple_of(2) { json!(["q_proj", "v_proj", "down_proj"]) } else { json!("all-linear") };
    let adapter = json!({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets});
    std::fs::write(dir.join("adapter_config.json"), adapter.to_string()).unwrap();
    let dtype = if seed.is_multiple_of(3) { Dtype::BF16 } else { Dtype::F32 };
    let mut noise = Noise(seed);
    let mut tensors = BTreeMap::new();
    for layer in 0..config.layers {
        for module in crate::model::lora::modules(config) {
            let short = module.name.rsplit('.').next().unwrap();
            if seed.is_multiple_of(2) && !["q_proj", "v_proj", "down_proj"].contains(&short) {
                continue;
            }
            for (matrix, rows, columns) in [('A', rank, module.inputs), ('B', module.outputs, rank)] {
                let name =
                    format!("base_model.model.model.layers.{layer}.{}.lora_{matrix}.weight", module.name);
                let mut bytes = vec![0; rows * columns * dtype.bytes()];
                noise.fill(&mut bytes, dtype, 0.4);
                tensors.insert(name, (dtype, vec![rows, columns], bytes));
            }
        }
    }
    write(&dir.join("adapter_model.safetensors"), &tensors);
}

/// Writes and loads such a lens.
pub(super) async fn load_lens(
    engine: &EngineHandle,
    base: BaseId,
    config: &ModelConfig,
    seed: u64,
) -> LensId {
    let filled = fill_lens(engine, base, config, seed).await;
    engine.install_lens(base, filled).await.unwrap()
}

pub(super) async fn fill_lens(
    engine: &EngineHandle,
    base: BaseId,
    config: &ModelConfig,
    seed: u64,
) -> FilledLens {
    let dir = tempfile::tempdir().unwrap();
    write_lens(dir.path(), config, seed);
    let lent = engine.lend_base(base).await.unwrap();
    let folder = LoraFolder::open(dir.path(), lent.layout()).unwrap();
    let region = engine.reserve_lens(folder.layout()).await.unwrap();
    folder.fill(region, &lent, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// An engine with an active base, and the two lenses over it that an [`Ask`] may name.
pub(super) async fn start(layout: &BaseLayout, limits: EngineConfig) -> (EngineHandle, BaseId, [LensId; 2]) {
    let engine = Engine::start(limits).unwrap();
    let base = install(&engine, layout, 7).await;
    engine.activate(base).await.unwrap();
    let lenses = [
        load_lens(&engine, base, &layout.config, 2).await,
        load_lens(&engine, base, &layout.config, 3).await,
    ];
    (engine, base, lenses)
}
