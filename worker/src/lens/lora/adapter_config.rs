//! `adapter_config.json`: what it may say, and what of it changes what is computed.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::lens::LensError;
use crate::model::excerpt::{complaint, excerpt};
use crate::model::file::read_text;

/// Name of the config in a LoRA folder.
pub(super) const CONFIG: &str = "adapter_config.json";
/// A parsed config takes up to forty times its text.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Keys that say nothing about what is computed with the trained tensors.
const IGNORED_KEYS: &[&str] = &[
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "lora_dropout",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "task_type",
    "runtime_config",
    "qalora_group_size",
];

/// An ordered JSON object: PEFT takes the first pattern that matches.
#[derive(Debug, Default, Clone, PartialEq)]
pub(super) struct Patterns(pub(super) Vec<(String, f64)>);

impl<'de> Deserialize<'de> for Patterns {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> serde::de::Visitor<'de> for InOrder {
            type Value = Patterns;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of numbers")
            }
            fn visit_map<A: serde::de::MapAccess<'de>>(self, mut map: A) -> Result<Patterns, A::Error> {
                let mut patterns = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    patterns.push(entry);
                }
                Ok(Patterns(patterns))
            }
            fn visit_unit<E>(self) -> Result<Patterns, E> {
                Ok(Patterns::default())
            }
        }
        deserializer.deserialize_any(InOrder)
    }
}

/// One string or several.
#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(untagged)]
pub(super) enum Names {
    Pattern(String),
    List(Vec<String>),
}

/// One number or several.
#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(untagged)]
pub(super) enum Numbers {
    One(u64),
    List(Vec<u64>),
}

/// Tokens whose rows are trained: of the embedding, or by module.
#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(untagged)]
pub(super) enum TokenIndices {
    Embedding(Vec<u32>),
    Modules(BTreeMap<String, Vec<u32>>),
}

/// Which biases are saved with a LoRA.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Biases {
    /// None.
    #[default]
    None,
    /// Those of all modules.
    All,
    /// Those of adapted modules.
    LoraOnly,
}

/// `adapter_config.json`, as far as it changes what is computed.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct AdapterConfig {
    peft_type: String,
    pub(super) r: f64,
    pub(super) lora_alpha: f64,
    #[serde(default)]
    pub(super) use_rslora: Option<bool>,
    #[serde(default)]
    pub(super) use_dora: Option<bool>,
    pub(super) target_modules: Names,
    #[serde(default)]
    pub(super) exclude_modules: Option<Names>,
    #[serde(default)]
    pub(super) modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    pub(super) rank_pattern: Patterns,
    #[serde(default)]
    pub(super) alpha_pattern: Patterns,
    #[serde(default)]
    pub(super) layers_to_transform: Option<Numbers>,
    #[serde(default)]
    pub(super) layers_pattern: Option<Names>,
    #[serde(default)]
    pub(super) trainable_token_indices: Option<TokenIndices>,
    /// Every delta has a bias of its own.
    #[serde(default)]
    pub(super) lora_bias: Option<bool>,
    /// What is done to an embedding is done to a head that is the same.
    #[serde(default)]
    pub(super) ensure_weight_tying: Option<bool>,
    #[serde(default)]
    init_lora_weights: Option<Value>,
    #[serde(default)]
    bias: Option<Value>,
    /// Everything else must be empty, or be of no consequence.
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

impl AdapterConfig {
    /// Reads the config of a LoRA folder and refuses by name what is not computed.
    pub(super) fn read(folder: &Path) -> Result<Self, LensError> {
        let path = folder.join(CONFIG);
        let malformed = |what| LensError::Malformed { path: path.clone(), what };
        let text = read_text(&path, MAX_CONFIG_BYTES)
            .map_err(|source| LensError::Io { path: path.clone(), source })?
            .map_err(malformed)?;
        let config: Self = serde_json::from_str(&text).map_err(|e| malformed(complaint(&e)))?;
        config.refuse_unsupported()?;
        Ok(config)
    }

    /// Which biases are saved.
    pub(super) fn biases(&self) -> Biases {
        let biases = self.bias.as_ref().map(Biases::deserialize);
        biases.and_then(Result::ok).unwrap_or_default()
    }

    fn refuse_unsupported(&self) -> Result<(), LensError> {
        if self.peft_type != "LORA" {
            return Err(unsupported("peft_type", &Value::from(self.peft_type.as_str())));
        }
        if let Some(bias) = &self.bias
            && !bias.is_null()
            && Biases::deserialize(bias).is_err()
        {
            return Err(unsupported("bias", bias));
        }
        // Other starts (pissa, olora, loftq ...) also change the base's own weights.
        if let Some(init) = &self.init_lora_weights
            && !matches!(init, Value::Bool(_) | Value::Null)
            && !matches!(init.as_str(), Some("gaussian" | "eva" | "orthogonal"))
        {
            return Err(unsupported("init_lora_weights", init));
        }
        for (key, value) in &self.rest {
            if !is_empty(value) && !IGNORED_KEYS.contains(&key.as_str()) {
                return Err(unsupported(key, value));
            }
        }
        Ok(())
    }
}

/// A setting that is not computed.
pub(super) fn unsupported(key: &str, value: &Value) -> LensError {
    LensError::UnsupportedSetting { key: excerpt(key, 80), value: brief(value) }
}

fn brief(value: &Value) -> String {
    excerpt(&value.to_string(), 80)
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(keys) => keys.is_empty(),
        _ => false,
    }
}
