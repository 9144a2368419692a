use super::*;
use serde_json::json;

fn qwen2() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512,
        "rope_theta": 1000000.0, "sliding_window": 4096, "use_sliding_window": false, "hidden_act": "silu",
        "torch_dtype": "bfloat16", "eos_token_id": [2, 3],
    })
}

/// As small as Qwen above, with nothing that its class has a default for.
fn bare(name: &str) -> Value {
    json!({
        "architectures": [name], "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4,
        "num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": 512,
    })
}

fn parse(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::parse(&config.to_string())
}

fn with(mut config: Value, changes: &[(&str, Value)]) -> Value {
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    config
}

fn parse_with(key: &str, value: Value) -> Result<ModelConfig, ConfigError> {
    parse(&with(qwen2(), &[(key, value)]))
}

#[test]
fn both_spellings_of_rope_give_the_same_model() {
    let old = parse(&qwen2()).unwrap();
    let new =
        parse_with("rope_parameters", json!({"rope_type": "default", "rope_theta": 1000000.0})).unwrap();
    assert_eq!(old, new);
    assert!(old.qkv_bias && !old.o_bias && old.head_dim == 16 && old.eos_token_ids == [2, 3]);
    let both = with(qwen2(), &[("rope_parameters", json!({})), ("rope_scaling", json!({"type": "default"}))]);
    assert!(matches!(parse(&both), Err(ConfigError::Invalid { key, .. }) if key == "rope_scaling"));
}

#[test]
fn llama3_scaling_is_read_in_both_spellings() {
    let scaling = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let old = parse_with("rope_scaling", scaling.clone()).unwrap();
    let mut parameters = scaling;
    parameters["rope_theta"] = json!(1000000.0);
    assert_eq!(old, parse_with("rope_parameters", parameters).unwrap());
    assert!(matches!(old.rope.scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
}

#[test]
fn what_a_config_leaves_out_is_as_in_transformers() {
    let mistral = parse(&bare("MistralForCausalLM")).unwrap();
    assert_eq!((mistral.kv_heads, mistral.window(0)), (8, Some(4096)));
    let no_window = with(bare("MistralForCausalLM"), &[("sliding_window", Value::Null)]);
    assert_eq!(parse(&no_window).unwrap().window(0), None);
    assert_eq!(parse(&bare("LlamaForCausalLM")).unwrap().kv_heads, 8);
    let gemma = parse(&bare("Gemma2ForCausalLM")).unwrap();
    assert_eq!((gemma.attention_soft_cap, gemma.final_soft_cap), (Some(50.0), Some(30.0)));
    assert_eq!((gemma.head_dim, gemma.attention_scale, gemma.tie_word_embeddings), (256, 1.0 / 16.0, true));
    let windows: Vec<_> = (0..4).map(|layer| gemma.window(layer)).collect();
    assert_eq!(windows, [Some(4096), None, Some(4096), None]);
    let uncapped = with(bare("Gemma2ForCausalLM"), &[("attn_logit_softcapping", Value::Null)]);
    assert_eq!(parse(&uncapped).unwrap().attention_soft_cap, None);
    assert_eq!(parse(&bare("Phi3ForCausalLM")).unwrap().rms_norm_eps, 1e-5);
}

#[test]
fn the_published_gemma_3_with_images_is_its_text_model() {
    // What google/gemma-3-4b-it has, vision encoder shortened.
    let config = json!({
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
        "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
        "model_type": "gemma3", "torch_dtype": "bfloat16",
        "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
        "vision_config": {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model"},
    });
    let gemma = parse(&config).unwrap();
    assert_eq!((gemma.hidden_size, gemma.heads, gemma.kv_heads, gemma.head_dim), (2560, 8, 4, 256));
    assert_eq!((gemma.vocab_size, gemma.max_position_embeddings), (262_208, 131_072));
    assert_eq!((gemma.rope.theta, gemma.rope.scaling.clone()), (1e6, RopeScaling::Linear { factor: 8.0 }));
    let sliding = gemma.sliding_rope.clone().unwrap();
    assert_eq!((sliding.theta, sliding.scaling), (1e4, RopeScaling::Default));
    let windows: Vec<_> = (0..12).filter(|&layer| gemma.window(layer).is_none()).collect();
    assert_eq!(windows, [5, 11]);
    assert_eq!((gemma.eos_token_ids.as_slice(), gemma.tie_word_embeddings), (&[1, 106][..], true));
    let new = json!({"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}});
    let mut rewritten = config.clone();
    rewritten["text_config"]["rope_scaling"] = Value::Null;
    rewritten["text_config"]["rope_parameters"] = new;
    assert_eq!(parse(&rewritten).unwrap(), gemma);

    let mut quantized = config.clone();
    quantized["quantization_config"] = json!({"bits": 4});
    assert!(
        matches!(parse(&quantized), Err(ConfigError::Unsupported { key, .. }) if key == "quantization_config")
    );
    let mut capped = config;
    capped["text_config"]["attn_logit_softcapping"] = json!(50.0);
    let error = parse(&capped).unwrap_err().to_string();
    assert!(error.contains("text_config.attn_logit_softcapping"), "{error}");
}

#[test]
fn phi_3_long_contexts_are_read_under_all_their_names() {
    let long = |kind: &str, factors: usize| {
        with(
            bare("Phi3ForCausalLM"),
            &[
                ("max_position_embeddings", json!(131072)),
                ("original_max_position_embeddings", json!(4096)),
                ("partial_rotary_factor", json!(0.5)),
                (
                    "rope_scaling",
                    json!({"type": kind, "short_factor": vec![1.5; factors], "long_factor": vec![4; factors]}),
                ),
            ],
        )
    };
    for kind in ["su", "yarn", "longrope"] {
        let phi = parse(&long(kind, 2)).unwrap();
        assert_eq!((phi.rope.rotary_dim, phi.long_rope_from()), (4, Some(4096)));
        let expected = (1.0 + 32f64.ln() / 4096f64.ln()).sqrt();
        assert_eq!(phi.rope.attention_factor, expected);
    }
    let error = parse(&long("longrope", 3)).unwrap_err();
    assert!(
        matches!(&error, ConfigError::Invalid { key, .. } if key == "rope_scaling.short_factor"),
        "{error}"
    );
}

#[test]
fn windows_follow_the_pattern_of_each_architecture() {
    let windows = |config: &Value| {
        let config = parse(config).unwrap();
        (0..4).map(|layer| config.window(layer)).collect::<Vec<_>>()
    };
    let sliding =
        [("use_sliding_window", json!(true)), ("max_window_layers", json!(3)), ("sliding_window", json!(7))];
    assert_eq!(windows(&with(qwen2(), &sliding)), [None, None, None, Some(7)]);
    assert_eq!(windows(&qwen2()), [None; 4]);
    let kinds = json!(["full_attention", "sliding_attention", "sliding_attention", "full_attention"]);
    let listed =
        with(bare("Gemma2ForCausalLM"), &[("layer_types", kinds.clone()), ("sliding_window", json!(9))]);
    assert_eq!(windows(&listed), [None, Some(9), Some(9), None]);
    let ignored = with(bare("MistralForCausalLM"), &[("layer_types", kinds)]);
    assert!(parse(&ignored).unwrap_err().to_string().contains("layer_types"));
    let every_second = with(bare("Gemma3ForCausalLM"), &[("sliding_window_pattern", json!(2))]);
    assert_eq!(windows(&every_second), [Some(4096), None, Some(4096), None]);
}

#[test]
fn what_is_not_computed_is_refused_by_name() {
    for (key, value) in [
        ("hidden_act", json!("gelu")),
        ("rope_scaling", json!({"type": "mrope", "mrope_section": [16, 24, 24]})),
        ("rope_scaling", json!({"type": "linear", "factor": 2.0, "mrope_section": [16, 24, 24]})),
        ("layer_types", json!(["full_attention", "chunked_attention", "full_attention", "full_attention"])),
        ("architectures", json!(["MambaForCausalLM"])),
        ("final_logit_softcapping", json!(30.0)),
        ("query_pre_attn_scalar", json!(64)),
        ("quantization_config", json!({"bits": 4})),
        ("num_experts", json!(64)),
        ("torch_dtype", json!("float8_e4m3fn")),
        ("partial_rotary_factor", json!(0.5)),
        ("use_bidirectional_attention", json!(true)),
        ("text_config", json!({})),
    ] {
        let error = parse_with(key, value).unwrap_err();
        assert!(matches!(error, ConfigError::Unsupported { .. }), "{key}: {error}");
        assert!(error.to_string().contains(key), "{error}");
    }
}

#[test]
fn numbers_outside_their_range_are_refused_by_name() {
    for (key, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-3)),
        ("hidden_size", json!(1.5)),
        ("hidden_size", json!(u64::MAX)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(15)),
        ("rms_norm_eps", json!(0.0)),
        ("rope_theta", json!("ten")),
        ("rope_theta", json!(0)),
        ("rope_scaling", json!([1])),
        ("layer_types", json!(["full_attention"])),
        ("eos_token_id", json!(-1)),
        ("tie_word_embeddings", json!("yes")),
    ] {
        let error = parse_with(key, value).unwrap_err();
        assert!(matches!(&error, ConfigError::Invalid { key: k, .. } if k == key), "{key}: {error}");
    }
    let error = parse_with("hidden_act", json!("x".repeat(100_000))).unwrap_err();
    assert!(error.to_string().len() < 200, "a hostile value does not fill the log");
    let error = parse_with("rope_scaling", json!({"type": "linear", "factor": 0})).unwrap_err();
    assert!(matches!(&error, ConfigError::Invalid { key, .. } if key == "rope_scaling.factor"), "{error}");
}
