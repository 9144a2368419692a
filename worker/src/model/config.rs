//! `config.json` → one validated description of the architecture.
//!
//! Everything the decoder depends on is a field of [`ModelConfig`]; everything it cannot do is refused here by the
//! name of the key, so that no setting of a model is ever silently ignored. Both spellings of rotary
//! settings are read: `rope_theta` + `rope_scaling`, and transformers 5's `rope_parameters`.

use serde_json::{Map, Value};

/// Which published architecture a base follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3.
    Llama,
    /// Qwen 2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen 3: a norm on every head of q and k.
    Qwen3,
}

impl Architecture {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "llama" | "LlamaForCausalLM" => Self::Llama,
            "qwen2" | "Qwen2ForCausalLM" => Self::Qwen2,
            "qwen3" | "Qwen3ForCausalLM" => Self::Qwen3,
            _ => return None,
        })
    }
}

/// A base's architecture, complete.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which published architecture it follows.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Decoder blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Longest sequence the base was made for.
    pub max_position_embeddings: usize,
    /// Epsilon of every RMS norm.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// The head is the embedding.
    pub tie_word_embeddings: bool,
    /// Biases on q, k and v.
    pub qkv_bias: bool,
    /// A bias on o.
    pub o_bias: bool,
    /// Biases on gate, up and down.
    pub mlp_bias: bool,
    /// An RMS norm on every head of q and k.
    pub qk_norm: bool,
    /// Numbers stored as, when the config says.
    pub stored_dtype: Option<super::weights::Dtype>,
    /// Tokens that end a text, by `config.json` (`generation_config.json` has precedence).
    pub eos_token_ids: Vec<u32>,
}

/// Rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// How they are changed for longer contexts.
    pub scaling: RopeScaling,
}

/// A change of the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a smooth step between.
    Llama3 {
        /// By how much low frequencies are divided.
        factor: f64,
        /// Wavelengths longer than `original / low_freq_factor` are low.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original / high_freq_factor` are high.
        high_freq_factor: f64,
        /// Context the base was trained with first.
        original_max_position_embeddings: f64,
    },
}

/// Why a `config.json` is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not JSON, or not an object.
    #[error("config.json is not a JSON object: {0}")]
    Malformed(String),
    /// A key that must be there is not.
    #[error("config.json has no `{0}`")]
    Missing(&'static str),
    /// A key has a value of the wrong type or outside its range.
    #[error("config.json: `{key}` is {value}, expected {expected}")]
    Invalid {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A valid setting that this engine does not compute.
    #[error("config.json: `{key}` = {value} is not supported; {supported}")]
    Unsupported {
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is.
        supported: &'static str,
    },
}

/// Larger numbers than any published model has, and small enough that no product of two of them overflows.
const LIMIT: u64 = 1 << 24;

/// Keys that change what a Llama-like decoder computes and that this one does not have. A value other than the
/// no-op beside it is refused.
const NO_OPS: &[(&str, &[&str])] = &[
    ("attn_logit_softcapping", &[]),
    ("final_logit_softcapping", &[]),
    ("query_pre_attn_scalar", &[]),
    ("embedding_multiplier", &["1", "1.0"]),
    ("residual_multiplier", &["1", "1.0"]),
    ("attention_multiplier", &[]),
    ("logits_scaling", &["1", "1.0"]),
    ("logit_scale", &["1", "1.0"]),
    ("partial_rotary_factor", &["1", "1.0"]),
    ("quantization_config", &[]),
    ("num_local_experts", &["0", "1"]),
    ("num_experts", &["0", "1"]),
    ("use_parallel_residual", &["false"]),
    ("no_rope_layers", &["[]"]),
    ("attention_chunk_size", &[]),
    ("text_config", &[]),
];

impl ModelConfig {
    /// Reads and checks the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_str(text).map_err(|e| ConfigError::Malformed(e.to_string()))?;
        let Value::Object(keys) = value else {
            return Err(ConfigError::Malformed("the top level is not an object".into()));
        };
        let keys = Keys(&keys);
        let architecture = architecture(&keys)?;
        for (key, allowed) in NO_OPS {
            keys.refuse_unless(key, allowed)?;
        }
        keys.expect_text("hidden_act", "silu", "only `silu` is")?;
        refuse_sliding_window(&keys)?;

        let hidden_size = keys.count("hidden_size")?;
        let heads = keys.count("num_attention_heads")?;
        let kv_heads = keys.optional_count("num_key_value_heads")?.unwrap_or(heads);
        if kv_heads > heads || heads % kv_heads != 0 {
            return Err(keys.invalid("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        let head_dim = match keys.optional_count("head_dim")? {
            Some(head_dim) => head_dim,
            None if hidden_size % heads == 0 => hidden_size / heads,
            None => return Err(keys.invalid("hidden_size", "a multiple of num_attention_heads")),
        };
        if head_dim % 2 != 0 {
            return Err(keys.invalid("head_dim", "an even number"));
        }
        if head_dim > 1024 {
            return Err(keys.invalid("head_dim", "at most 1024"));
        }
        let eps = keys.number("rms_norm_eps")?.unwrap_or(1e-6);
        if !(eps > 0.0 && eps < 1.0) {
            return Err(keys.invalid("rms_norm_eps", "a number between 0 and 1"));
        }
        let attention_bias = keys.flag("attention_bias")?.unwrap_or(false);
        let is_llama = architecture == Architecture::Llama;
        Ok(Self {
            architecture,
            hidden_size,
            intermediate_size: keys.count("intermediate_size")?,
            layers: keys.count("num_hidden_layers")?,
            heads,
            kv_heads,
            head_dim,
            vocab_size: keys.count("vocab_size")?,
            max_position_embeddings: keys.count("max_position_embeddings")?,
            rms_norm_eps: eps as f32,
            rope: rope(&keys)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
            qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
            o_bias: architecture != Architecture::Qwen2 && attention_bias,
            mlp_bias: is_llama && keys.flag("mlp_bias")?.unwrap_or(false),
            qk_norm: architecture == Architecture::Qwen3,
            stored_dtype: stored_dtype(&keys)?,
            eos_token_ids: token_ids(&keys, "eos_token_id")?,
        })
    }

    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together, and of all value heads.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

fn architecture(keys: &Keys<'_>) -> Result<Architecture, ConfigError> {
    const SUPPORTED: &str = "LlamaForCausalLM, Qwen2ForCausalLM and Qwen3ForCausalLM are";
    let (key, value) = match keys.0.get("architectures") {
        Some(Value::Array(names)) if names.len() == 1 => ("architectures", &names[0]),
        None | Some(Value::Null) => {
            ("model_type", keys.get("model_type").ok_or(ConfigError::Missing("architectures"))?)
        }
        Some(_) => return Err(keys.invalid("architectures", "a list with one name")),
    };
    value.as_str().and_then(Architecture::named).ok_or_else(|| ConfigError::Unsupported {
        key: key.into(),
        value: brief(value),
        supported: SUPPORTED,
    })
}

/// Qwen configs carry a window that `use_sliding_window` turns off; newer ones also list a type per layer.
fn refuse_sliding_window(keys: &Keys<'_>) -> Result<(), ConfigError> {
    const SUPPORTED: &str = "only full attention is";
    let unsupported = |key: &str, value: &Value| {
        Err(ConfigError::Unsupported { key: key.into(), value: brief(value), supported: SUPPORTED })
    };
    if let Some(Value::Array(types)) = keys.get("layer_types")
        && let Some(other) = types.iter().find(|t| t.as_str() != Some("full_attention"))
    {
        return unsupported("layer_types", other);
    }
    match (keys.flag("use_sliding_window")?, keys.get("sliding_window")) {
        (Some(true), Some(window)) => unsupported("sliding_window", window),
        (None, Some(window)) if keys.get("layer_types").is_none() => unsupported("sliding_window", window),
        _ => Ok(()),
    }
}

fn rope(keys: &Keys<'_>) -> Result<Rope, ConfigError> {
    // transformers 5 keeps everything in `rope_parameters`; before, theta was a key of its own.
    let (prefix, settings) = match (keys.get("rope_parameters"), keys.get("rope_scaling")) {
        (Some(parameters), _) => ("rope_parameters", Some(parameters)),
        (None, scaling) => ("rope_scaling", scaling),
    };
    let empty = Map::new();
    let settings = match settings {
        Some(Value::Object(settings)) => Keys(settings),
        Some(_) => return Err(keys.invalid(prefix, "an object")),
        None => Keys(&empty),
    };
    let inside = |error: ConfigError| match error {
        ConfigError::Invalid { key, value, expected } => {
            ConfigError::Invalid { key: format!("{prefix}.{key}"), value, expected }
        }
        other => other,
    };
    let theta = match settings.number("rope_theta").map_err(inside)? {
        Some(theta) => theta,
        None => keys.number("rope_theta")?.unwrap_or(10000.0),
    };
    if !(theta > 1.0 && theta.is_finite()) {
        return Err(keys.invalid("rope_theta", "a number above 1"));
    }
    settings.refuse_unless("partial_rotary_factor", &["1", "1.0"]).map_err(inside)?;
    let kind = settings.get("rope_type").or_else(|| settings.get("type"));
    let scaling = match kind.map(|k| k.as_str().unwrap_or("")) {
        None if settings.get("factor").is_some() => {
            return Err(ConfigError::Missing("rope_scaling.rope_type"));
        }
        None | Some("default") => RopeScaling::Default,
        Some("llama3") => {
            let need = |key: &'static str| {
                let number = settings.number(key).map_err(inside)?.ok_or(ConfigError::Missing(key))?;
                if number > 0.0 && number.is_finite() {
                    Ok(number)
                } else {
                    Err(inside(settings.invalid(key, "a number above 0")))
                }
            };
            let scaling = RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: need("original_max_position_embeddings")?,
            };
            if need("low_freq_factor")? >= need("high_freq_factor")? {
                return Err(inside(settings.invalid("low_freq_factor", "less than high_freq_factor")));
            }
            scaling
        }
        Some(_) => {
            return Err(ConfigError::Unsupported {
                key: format!("{prefix}.rope_type"),
                value: brief(kind.expect("matched above")),
                supported: "`default` and `llama3` are",
            });
        }
    };
    Ok(Rope { theta, scaling })
}

fn stored_dtype(keys: &Keys<'_>) -> Result<Option<super::weights::Dtype>, ConfigError> {
    let Some((key, value)) = ["dtype", "torch_dtype"].iter().find_map(|k| Some((*k, keys.get(k)?))) else {
        return Ok(None);
    };
    match value.as_str() {
        Some("float32") => Ok(Some(super::weights::Dtype::F32)),
        Some("bfloat16") => Ok(Some(super::weights::Dtype::BF16)),
        Some("float16") => Ok(Some(super::weights::Dtype::F16)),
        Some("auto") => Ok(None),
        _ => Err(ConfigError::Unsupported {
            key: key.into(),
            value: brief(value),
            supported: "float32, bfloat16 and float16 are",
        }),
    }
}

fn token_ids(keys: &Keys<'_>, key: &'static str) -> Result<Vec<u32>, ConfigError> {
    parse_token_ids(keys.get(key)).ok_or_else(|| keys.invalid(key, "a token id or a list of token ids"))
}

/// A token id, a list of them, or nothing.
pub(crate) fn parse_token_ids(value: Option<&Value>) -> Option<Vec<u32>> {
    let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(ids)) => ids.iter().map(one).collect(),
        Some(id) => Some(vec![one(id)?]),
    }
}

/// A value as it may stand in a message: short, whatever the file holds.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

struct Keys<'a>(&'a Map<String, Value>);

impl<'a> Keys<'a> {
    /// A key's value; null is as good as absent.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|v| !v.is_null())
    }

    fn invalid(&self, key: &str, expected: &'static str) -> ConfigError {
        let value = self.get(key).map_or_else(|| "absent".to_owned(), brief);
        ConfigError::Invalid { key: key.into(), value, expected }
    }

    fn optional_count(&self, key: &'static str) -> Result<Option<usize>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if (1..=LIMIT).contains(&n) => Ok(Some(n as usize)),
                _ => Err(self.invalid(key, "a whole number between 1 and 16777216")),
            },
        }
    }

    fn count(&self, key: &'static str) -> Result<usize, ConfigError> {
        self.optional_count(key)?.ok_or(ConfigError::Missing(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| self.invalid(key, "a number")),
        }
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_bool().map(Some).ok_or_else(|| self.invalid(key, "true or false")),
        }
    }

    fn expect_text(&self, key: &str, wanted: &str, supported: &'static str) -> Result<(), ConfigError> {
        match self.get(key) {
            Some(value) if value.as_str() != Some(wanted) => {
                Err(ConfigError::Unsupported { key: key.into(), value: brief(value), supported })
            }
            _ => Ok(()),
        }
    }

    fn refuse_unless(&self, key: &str, allowed: &[&str]) -> Result<(), ConfigError> {
        match self.get(key) {
            Some(value) if !allowed.contains(&value.to_string().as_str()) => Err(ConfigError::Unsupported {
                key: key.into(),
                value: brief(value),
                supported: "models without it are",
            }),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
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

    fn parse_with(key: &str, value: Value) -> Result<ModelConfig, ConfigError> {
        let mut config = qwen2();
        config[key] = value;
        ModelConfig::parse(&config.to_string())
    }

    #[test]
    fn both_spellings_of_rope_give_the_same_model() {
        let old = ModelConfig::parse(&qwen2().to_string()).unwrap();
        let new =
            parse_with("rope_parameters", json!({"rope_type": "default", "rope_theta": 1000000.0})).unwrap();
        assert_eq!(old, new);
        assert!(old.qkv_bias && !old.o_bias && old.head_dim == 16 && old.eos_token_ids == [2, 3]);
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
    fn what_is_not_computed_is_refused_by_name() {
        for (key, value) in [
            ("hidden_act", json!("gelu")),
            ("rope_scaling", json!({"type": "yarn", "factor": 4.0})),
            ("use_sliding_window", json!(true)),
            ("layer_types", json!(["full_attention", "sliding_attention"])),
            ("architectures", json!(["MambaForCausalLM"])),
            ("final_logit_softcapping", json!(30.0)),
            ("quantization_config", json!({"bits": 4})),
            ("num_experts", json!(64)),
            ("torch_dtype", json!("float8_e4m3fn")),
        ] {
            let error = parse_with(key, value).unwrap_err();
            assert!(matches!(error, ConfigError::Unsupported { .. }), "{key}: {error}");
            let word = if key == "use_sliding_window" { "sliding_window" } else { key };
            assert!(error.to_string().contains(word), "{error}");
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
            ("eos_token_id", json!(-1)),
            ("tie_word_embeddings", json!("yes")),
        ] {
            let error = parse_with(key, value).unwrap_err();
            assert!(matches!(&error, ConfigError::Invalid { key: k, .. } if k == key), "{key}: {error}");
        }
        let error = parse_with("hidden_act", json!("x".repeat(100_000))).unwrap_err();
        assert!(error.to_string().len() < 200, "a hostile value does not fill the log");
    }
}
