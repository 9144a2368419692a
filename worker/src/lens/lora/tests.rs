//! What is refused, by name; and that what is loaded is what was asked for.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::*;
use crate::lens::LensFailure;
use crate::model::tensor_file::tests::write;

fn config() -> Arc<ModelConfig> {
    let fixture = fixture().join("model/config.json");
    Arc::new(ModelConfig::parse(&std::fs::read_to_string(fixture).unwrap()).unwrap())
}

fn base() -> BaseLayout {
    BaseLayout::of(&config(), Dtype::F32)
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/qwen2")
}

/// A copy of a fixture lens with some keys of its config changed.
fn changed(lens: &str, change: &[(&str, Value)]) -> tempfile::TempDir {
    let (from, dir) = (fixture().join("lenses").join(lens), tempfile::tempdir().unwrap());
    let mut config: Value =
        serde_json::from_str(&std::fs::read_to_string(from.join(CONFIG)).unwrap()).unwrap();
    for (key, value) in change {
        config[*key] = value.clone();
    }
    std::fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
    std::fs::copy(from.join(WEIGHTS), dir.path().join(WEIGHTS)).unwrap();
    dir
}

fn failure(dir: &Path) -> (LensFailure, String) {
    let error = LoraFolder::open(dir, &base()).err().expect("it must be refused");
    (error.failure(), error.to_string())
}

#[test]
fn settings_that_are_not_computed_are_refused_by_name() {
    for (key, value) in [
        ("modules_to_save", json!(["mlp"])),
        ("modules_to_save", json!(["q_proj"])),
        ("modules_to_save", json!([""])),
        ("bias", json!("some")),
        ("fan_in_fan_out", json!(true)),
        ("layer_replication", json!([[0, 2]])),
        ("alora_invocation_tokens", json!([1, 2])),
        ("trainable_token_indices", json!({"q_proj": [3]})),
        ("trainable_token_indices", json!([3, 4, 3])),
        ("trainable_token_indices", json!((0..513).collect::<Vec<_>>())),
        ("target_parameters", json!(["experts"])),
        ("init_lora_weights", json!("pissa")),
        ("peft_type", json!("IA3")),
        ("a_key_of_the_future", json!({"on": true})),
    ] {
        let dir = changed("attn-r4", &[(key, value)]);
        let (failure, message) = failure(dir.path());
        assert_eq!(failure, LensFailure::UnsupportedTensors, "{key}: {message}");
        assert!(message.contains(key), "{message}");
    }
    let dora = ("use_dora", json!(true));
    let dir = changed("attn-r4", &[("target_modules", json!(["q_proj", "v_proj", "lm_head"])), dora]);
    assert!(failure(dir.path()).1.contains("lm_head"));
    let dir = changed("attn-r4", &[]);
    std::fs::write(dir.path().join("oracle.json"), "{}").unwrap();
    assert_eq!(failure(dir.path()).0, LensFailure::UnsupportedTensors);
}

#[test]
fn what_config_and_file_do_not_agree_on_is_refused() {
    let two = |a: (&'static str, Value)| changed("attn-r4", &[a]);
    for (change, expected, word) in [
        (("target_modules", json!(["q_proj"])), LensFailure::Malformed, "v_proj"),
        (("target_modules", json!(["q_proj", "v_proj", "o_proj"])), LensFailure::Malformed, "o_proj"),
        (
            ("target_modules", json!(["q_proj", "v_proj", "lm_head"])),
            LensFailure::Malformed,
            "lm_head.lora_A",
        ),
        (("use_dora", json!(true)), LensFailure::Malformed, "lora_magnitude_vector"),
        (("lora_bias", json!(true)), LensFailure::Malformed, "lora_B.bias"),
        (("trainable_token_indices", json!([3])), LensFailure::Malformed, "trainable_tokens_delta"),
        (
            ("trainable_token_indices", json!({"lm_head": [3]})),
            LensFailure::Malformed,
            "lm_head.token_adapter",
        ),
        (("trainable_token_indices", json!([512])), LensFailure::BaseMismatch, "token 512"),
        (("trainable_token_indices", json!([-1])), LensFailure::Malformed, "adapter_config.json"),
        (("bias", json!("all")), LensFailure::Malformed, "q_proj.bias"),
        (("modules_to_save", json!(["lm_head"])), LensFailure::Malformed, "lm_head.weight"),
        (("modules_to_save", json!(["norm"])), LensFailure::Malformed, "layernorm.weight"),
        (("modules_to_save", json!(["(unclosed"])), LensFailure::Malformed, "unclosed"),
        (("target_modules", json!(["c_attn"])), LensFailure::BaseMismatch, "match no module"),
        (("target_modules", json!("(unclosed")), LensFailure::Malformed, "regular expression"),
        (("layers_to_transform", json!([0])), LensFailure::Malformed, "layers.1"),
        (("r", json!(8)), LensFailure::BaseMismatch, "shape"),
        (("r", json!(0)), LensFailure::Malformed, "rank"),
        (("rank_pattern", json!({"q_proj": 1000000})), LensFailure::Malformed, "rank"),
        (("lora_alpha", json!(1e300)), LensFailure::Malformed, "alpha"),
        (("lora_alpha", json!("many")), LensFailure::Malformed, "many"),
    ] {
        let key = change.0;
        let dir = two(change);
        let (failure, message) = failure(dir.path());
        assert_eq!(failure, expected, "{key}: {message}");
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn another_bases_lens_and_damaged_files_are_told_apart() {
    let mut smaller = (*config()).clone();
    smaller.layers = 2;
    let layout = |config: ModelConfig| BaseLayout::of(&Arc::new(config), Dtype::F32);
    let lens = fixture().join("lenses/attn-r4");
    let error = LoraFolder::open(&lens, &layout(smaller)).err().unwrap();
    assert_eq!(error.failure(), LensFailure::BaseMismatch, "{error}");
    let mut narrower = (*config()).clone();
    narrower.hidden_size = 32;
    let error = LoraFolder::open(&lens, &layout(narrower)).err().unwrap();
    assert_eq!(error.failure(), LensFailure::BaseMismatch, "{error}");

    let dir = changed("attn-r4", &[]);
    let weights = std::fs::read(dir.path().join(WEIGHTS)).unwrap();
    std::fs::write(dir.path().join(WEIGHTS), &weights[..weights.len() - 1]).unwrap();
    assert_eq!(failure(dir.path()).0, LensFailure::Truncated);
    std::fs::write(dir.path().join(WEIGHTS), b"eight by and more").unwrap();
    assert_eq!(failure(dir.path()).0, LensFailure::Malformed);
    std::fs::remove_file(dir.path().join(WEIGHTS)).unwrap();
    assert_eq!(failure(dir.path()).0, LensFailure::Unreadable);
}

#[test]
fn patterns_choose_modules_as_peft_does() {
    let names = |targets: Value, exclude: Value, layers: Value| {
        let text = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": targets,
            "exclude_modules": exclude, "layers_to_transform": layers});
        let config: AdapterConfig = serde_json::from_str(&text.to_string()).unwrap();
        let adapted = targets::adapted(&config, &self::config(), Path::new("")).unwrap();
        let short = |key: &str| key.strip_prefix("model.layers.").unwrap_or(key).to_owned();
        adapted.iter().map(|a| short(&a.key)).collect::<Vec<_>>()
    };
    let none = Value::Null;
    assert_eq!(names(json!("all-linear"), none.clone(), none.clone()).len(), 28);
    assert_eq!(
        names(json!(["mlp.down_proj"]), none.clone(), json!([1, 3])),
        ["1.mlp.down_proj", "3.mlp.down_proj"]
    );
    assert_eq!(names(json!(["v_proj"]), none.clone(), json!(2)), ["2.self_attn.v_proj"]);
    let regex = json!(r".*\.(0|1)\..*(?<!k)_proj");
    assert_eq!(names(regex.clone(), none.clone(), none.clone()).len(), 12);
    assert_eq!(names(regex, json!(["mlp.up_proj", "gate_proj"]), none.clone()).len(), 8);
    assert_eq!(names(json!("model.layers.3.mlp.up_proj"), none.clone(), none.clone()), ["3.mlp.up_proj"]);
    assert_eq!(names(json!("all-linear"), json!(".*mlp.*"), none).len(), 16);
}

/// A lens of made-up tensors: zeros in f32.
fn made(config: &Value, tensors: &[(&str, &[usize])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut all = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"],
        "layers_to_transform": [1]});
    for (key, value) in config.as_object().unwrap() {
        all[key] = value.clone();
    }
    std::fs::write(dir.path().join(CONFIG), all.to_string()).unwrap();
    let q = "base_model.model.model.layers.1.self_attn.q_proj.lora_";
    let plain = [(format!("{q}A.weight"), vec![2, 64]), (format!("{q}B.weight"), vec![64, 2])];
    let more = tensors.iter().map(|(name, shape)| (format!("base_model.model.{name}"), shape.to_vec()));
    let tensors: BTreeMap<_, _> = plain
        .into_iter()
        .chain(more)
        .map(|(name, shape)| {
            let bytes = vec![0; shape.iter().product::<usize>() * 4];
            (name, (Dtype::F32, shape, bytes))
        })
        .collect();
    write(&dir.path().join(WEIGHTS), &tensors);
    dir
}

#[test]
fn tensors_that_are_not_computed_are_refused_by_name() {
    use LensFailure::{BaseMismatch, Malformed, UnsupportedTensors};
    let q = "model.layers.1.self_attn.q_proj";
    for (config, tensor, shape, expected, word) in [
        (json!({}), format!("{q}.weight"), vec![64, 64], UnsupportedTensors, "q_proj.weight"),
        (
            json!({"modules_to_save": ["q_proj"]}),
            format!("{q}.weight"),
            vec![64, 64],
            UnsupportedTensors,
            "q_proj.weight",
        ),
        (json!({}), format!("{q}.lora_B.bias"), vec![64], Malformed, "lora_B.bias"),
        (json!({"lora_bias": true}), format!("{q}.lora_B.bias"), vec![63], BaseMismatch, "lora_B.bias"),
        (json!({}), "lm_head.lora_B.bias".into(), vec![512], UnsupportedTensors, "lm_head.lora_B.bias"),
        (
            json!({"lora_bias": true, "use_dora": true}),
            format!("{q}.lora_B.bias"),
            vec![64],
            UnsupportedTensors,
            "lora_bias",
        ),
        (json!({}), format!("{q}.lora_C.weight"), vec![2, 2], UnsupportedTensors, "lora_C"),
        (json!({}), format!("{q}.bias"), vec![64], Malformed, "q_proj.bias"),
        (
            json!({"bias": "all"}),
            "model.layers.1.self_attn.o_proj.bias".into(),
            vec![64],
            UnsupportedTensors,
            "o_proj.bias",
        ),
        (json!({}), format!("{q}.lora_magnitude_vector"), vec![64], Malformed, "magnitude"),
        (
            json!({"use_dora": true}),
            format!("{q}.lora_magnitude_vector"),
            vec![63],
            BaseMismatch,
            "magnitude",
        ),
        (json!({}), "lm_head.lora_magnitude_vector".into(), vec![512], UnsupportedTensors, "lm_head"),
        (
            json!({}),
            "model.embed_tokens.token_adapter.trainable_tokens_delta".into(),
            vec![2, 64],
            Malformed,
            "token_adapter",
        ),
        (
            json!({"trainable_token_indices": [7]}),
            "model.embed_tokens.token_adapter.trainable_tokens_delta".into(),
            vec![2, 64],
            BaseMismatch,
            "token_adapter",
        ),
        (
            json!({"trainable_token_indices": [7], "modules_to_save": ["embed_tokens"]}),
            "model.embed_tokens.token_adapter.trainable_tokens_delta".into(),
            vec![1, 64],
            UnsupportedTensors,
            "modules_to_save",
        ),
        (
            json!({"trainable_token_indices": [7]}),
            "model.embed_tokens.token_adapter.base_layer.weight".into(),
            vec![520, 64],
            UnsupportedTensors,
            "save the whole embedding",
        ),
        (json!({}), "lm_head.original_module.weight".into(), vec![512, 64], Malformed, "original_module"),
        (
            json!({}),
            format!("{q}.original_module.weight"),
            vec![64, 64],
            UnsupportedTensors,
            "original_module",
        ),
        (
            json!({}),
            "model.embed_tokens.lora_A.weight".into(),
            vec![2, 64],
            UnsupportedTensors,
            "embed_tokens",
        ),
        (
            json!({}),
            "model.embed_tokens.lora_embedding_A".into(),
            vec![2, 512],
            Malformed,
            "lora_embedding_A",
        ),
        (json!({}), "model.embed_tokens.weight".into(), vec![520, 64], BaseMismatch, "520"),
        (json!({}), "model.embed_tokens.weight".into(), vec![512, 32], BaseMismatch, "embed_tokens"),
        (json!({}), "lm_head.weight".into(), vec![1 << 16], BaseMismatch, "lm_head"),
        (json!({}), "model.norm.weight".into(), vec![64], Malformed, "model.norm"),
        (json!({}), "model.layers.4.input_layernorm.weight".into(), vec![64], BaseMismatch, "layer 4"),
        (json!({}), "score.weight".into(), vec![2, 64], UnsupportedTensors, "score"),
        (
            json!({"modules_to_save": ["score"]}),
            "score.weight".into(),
            vec![2, 64],
            UnsupportedTensors,
            "score",
        ),
    ] {
        let dir = made(&config, &[(tensor.as_str(), &shape)]);
        let (failure, message) = failure(dir.path());
        assert_eq!(failure, expected, "{config} {tensor}: {message}");
        assert!(message.contains(word) && message.len() < 500, "{tensor}: {message}");
    }
    let dir = made(&json!({"modules_to_save": ["norm"], "target_modules": ["q_proj", "embed_tokens"]}), &[]);
    assert_eq!(failure(dir.path()).0, Malformed);
}

#[test]
fn a_delta_without_a_direction_and_half_a_tokenizer_are_refused() {
    // Zeros and a base of zeros: nothing to divide by.
    let q = "model.layers.1.self_attn.q_proj.lora_magnitude_vector";
    let dir = made(&json!({"use_dora": true}), &[(q, &[64])]);
    let layout = base();
    let lens = LoraFolder::open(dir.path(), &layout).unwrap();
    let arena = crate::engine::arena::Arena::new(1 << 30).unwrap();
    let part = crate::engine::arena::Part::Lens;
    let zeros = FilledBase::new(layout.clone(), arena.reserve(part, layout.bytes).unwrap());
    let region = arena.reserve(part, lens.layout().bytes).unwrap();
    let error = lens.fill(region, &zeros, &mut |_| std::ops::ControlFlow::Continue(())).unwrap_err();
    assert!(error.to_string().contains(q), "{error}");

    let dir = changed("attn-r4", &[]);
    let spoken = Tokenizer::open(&fixture().join("model"), &config()).unwrap();
    let tokenizer = |dir: &Path| LoraFolder::open(dir, &base()).unwrap().tokenizer(&spoken);
    assert!(tokenizer(dir.path()).unwrap().is_none());
    std::fs::write(dir.path().join("chat_template.jinja"), "{{ 1 }}").unwrap();
    let error = tokenizer(dir.path()).unwrap_err();
    assert!(error.to_string().contains("chat_template.jinja"), "{error}");
    assert_eq!(
        lora_files(dir.path()),
        ["adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"]
    );
    std::fs::write(dir.path().join("tokenizer.json"), "{").unwrap();
    assert_eq!(tokenizer(dir.path()).unwrap_err().failure(), LensFailure::Malformed);
    std::fs::copy(fixture().join("model/tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
    let own = tokenizer(dir.path()).unwrap().unwrap();
    assert!(own.has_chat_template());
    assert!(spoken.stop_token_ids().iter().all(|id| own.stop_token_ids().contains(id)));
}

#[test]
fn deltas_trained_tokens_and_their_biases_follow_the_scale_of_a_request() {
    use crate::model::single::SingleRow;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/parity/features-tied");
    let mut row = SingleRow::open(&folder.join("model"), Some(Dtype::F32), 16).unwrap();
    // All five trained tokens, and some others.
    let ids = [1, 326, 4, 273, 311, 7, 90];
    let base = row.compute(&ids, &[]).unwrap();
    for lens in ["trained-tokens", "lora-bias", "lora-embedding-tied"] {
        let lens = row.load_lora(&folder.join("lenses").join(lens)).unwrap();
        let mut logits = |scale| row.compute(&ids, &[(lens.clone(), scale)]).unwrap().logits;
        assert_eq!(logits(0.0), base.logits, "nothing of a lens is the base");
        assert_ne!(logits(0.5), logits(1.0));
    }
}

#[test]
fn deltas_of_tokens_and_a_vocabulary_without_them_exclude_each_other() {
    let over = |case: &str| {
        let folder = fixture().join("..").join(case);
        let text = std::fs::read_to_string(folder.join("model/config.json")).unwrap();
        let base = BaseLayout::of(&Arc::new(ModelConfig::parse(&text).unwrap()), Dtype::F32);
        move |lens: &str| LoraFolder::open(&folder.join("lenses").join(lens), &base).unwrap().layout().clone()
    };
    let tied = over("features-tied");
    let (deltas, resized) = (tied("lora-embedding-tied"), tied("save-resized"));
    assert!(deltas.conflict(&resized).is_some() && resized.conflict(&deltas).is_some());
    let (some, none) = (over("features-untied")("trained-tokens"), over("features-untied")("save-resized"));
    assert_eq!(some.conflict(&none), None, "its last token is the 342nd of 344");
    assert!(!some.deltas.fits_vocabulary(341));
    assert_eq!(tied("trained-tokens").conflict(&tied("lora-bias")), None);
}
