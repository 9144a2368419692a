//! `config.json` of a base.

use proptest::prelude::*;
use serde_json::json;

use crate::change::{any_changes, changed, check, with_keys};
use crate::folder::{Folder, json_of};
use crate::open::{BASE, base_refused, open_base};

const CONFIG_KEYS: &[&str] = &[
    "rope_scaling",
    "rope_theta",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "head_dim",
    "text_config",
    "sliding_window_pattern",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "eos_token_id",
    "dtype",
    "torch_dtype",
    "num_key_value_heads",
    "quantization_config",
    "hidden_activation",
    "num_hidden_layers",
    "vocab_size",
];

#[test]
fn any_config_is_read_or_refused() {
    const MODELS: &[&str] =
        &["features-llama/model", "features-qwen3/model", "gemma2/model", "gemma3/model", "phi3/model"];
    check(500, (prop::sample::select(MODELS), any_changes(CONFIG_KEYS)), |(model, changes)| {
        let config = changed(json_of(&format!("{model}/config.json")), &changes);
        open_base(&Folder::of(model).with("config.json", config));
    });
}

#[test]
fn what_a_config_claims_is_not_laid_out_before_it_is_there() {
    let with =
        |keys| Folder::of(BASE).with("config.json", with_keys(json_of(&format!("{BASE}/config.json")), keys));
    for (keys, why) in [
        (json!({"num_hidden_layers": 65536, "layer_types": null}), "num_hidden_layers"),
        (json!({"num_hidden_layers": 4096, "layer_types": null}), "model.layers.2.input_layernorm.weight"),
        (
            json!({"hidden_size": 1 << 24, "head_dim": 12, "intermediate_size": 1 << 24}),
            "17592186044416 weights",
        ),
        (json!({"vocab_size": 1 << 24}), "embed_tokens"),
        (
            json!({"hidden_size": 4096, "head_dim": 1024, "num_attention_heads": 1 << 24, "num_key_value_heads": 1 << 24}),
            "weights",
        ),
        (json!({"rms_norm_eps": 1e-50}), "rms_norm_eps"),
        (
            json!({"rope_parameters": null, "rope_theta": 1e300, "rope_scaling": {"type": "linear", "factor": 1e-40}}),
            "factor",
        ),
        (
            json!({"rope_parameters": {"rope_type": "yarn", "factor": 4, "mscale": -3.0, "mscale_all_dim": -7.213475204444817}}),
            "attention_factor",
        ),
    ] {
        let error = base_refused(&with(keys));
        assert!(error.contains(why), "{error}");
    }
    let large = format!("{{\"x\": [{}0]}}", "0,".repeat(5 << 20));
    assert!(base_refused(&Folder::of(BASE).with("config.json", large)).contains("larger than"));
    let full = format!("{{\"x\": [{}0]}}", "0,".repeat(500_000));
    assert!(base_refused(&Folder::of(BASE).with("config.json", full)).contains("architectures"));
}
