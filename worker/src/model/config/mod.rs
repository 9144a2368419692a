//! `config.json` → one validated description of the architecture.
//!
//! Everything the decoder depends on is a field of [`ModelConfig`]; everything it cannot do is refused here by the
//! name of the key, so that no setting of a model is ever silently ignored. What a config leaves out has the value that
//! the configuration class of transformers gives it.

mod keys;
mod rope;

use serde_json::Value;
pub use turret_kernels::number::Activation;

use super::excerpt::complaint;
pub use keys::ConfigError;
use keys::Keys;
pub(crate) use keys::parse_token_ids;
pub use rope::{Rope, RopeScaling};

/// Which published architecture a base follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2 and 3.
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen 2 and 2.5: biases on q, k and v.
    Qwen2,
    /// Qwen 3: a norm on every head of q and k.
    Qwen3,
    /// Gemma 2: norms after attention and feed-forward too, soft caps, every other layer sliding.
    Gemma2,
    /// Gemma 3: Gemma 2 with norms on every head of q and k instead of caps, and a rotation of its own in sliding layers.
    Gemma3,
    /// Phi 3 and 4: Llama with q, k, v and gate, up fused in the files.
    Phi3,
}

impl Architecture {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "llama" | "LlamaForCausalLM" => Self::Llama,
            "mistral" | "MistralForCausalLM" => Self::Mistral,
            "qwen2" | "Qwen2ForCausalLM" => Self::Qwen2,
            "qwen3" | "Qwen3ForCausalLM" => Self::Qwen3,
            "gemma2" | "Gemma2ForCausalLM" => Self::Gemma2,
            "gemma3_text" | "Gemma3ForCausalLM" | "gemma3" | WITH_IMAGES => Self::Gemma3,
            "phi3" | "Phi3ForCausalLM" => Self::Phi3,
            _ => return None,
        })
    }

    fn is_gemma(self) -> bool {
        matches!(self, Self::Gemma2 | Self::Gemma3)
    }
}

/// Gemma 3 with an image encoder, whose text model is `text_config`.
const WITH_IMAGES: &str = "Gemma3ForConditionalGeneration";

/// Thirty times those of the deepest published model.
const MAX_LAYERS: usize = 4096;
/// Ten times those of the largest published model, and few enough that no sum of their bytes overflows.
const MAX_WEIGHTS: u128 = 1 << 44;

/// What a layer's attention sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// Everything before.
    Full,
    /// The last [`ModelConfig::sliding_window`] positions.
    Sliding,
}

impl LayerKind {
    fn name(self) -> &'static str {
        match self {
            Self::Full => "full_attention",
            Self::Sliding => "sliding_attention",
        }
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
    /// Norms multiply by one plus what is stored.
    pub norm_plus_one: bool,
    /// Norms on what attention and feed-forward add to the residual stream, too.
    pub sandwich_norms: bool,
    /// Embeddings are multiplied by the square root of the width.
    pub scale_embedding: bool,
    /// The nonlinearity of the feed-forward block.
    pub activation: Activation,
    /// Multiplies the products of q and k.
    pub attention_scale: f32,
    /// Scores of attention become `cap · tanh(score / cap)`.
    pub attention_soft_cap: Option<f32>,
    /// Logits become `cap · tanh(logit / cap)`.
    pub final_soft_cap: Option<f32>,
    /// Rotary embedding.
    pub rope: Rope,
    /// That of sliding layers, where it differs.
    pub sliding_rope: Option<Rope>,
    /// What each layer's attention sees.
    pub layer_kinds: Vec<LayerKind>,
    /// Positions that a sliding layer sees, the token's own included.
    pub sliding_window: Option<u32>,
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
    /// q, k and v are one tensor in the files and one module for lenses, and so are gate and up.
    pub fused_projections: bool,
    /// Numbers stored as, when the config says.
    pub stored_dtype: Option<super::weights::Dtype>,
    /// Tokens that end a text, by `config.json` (`generation_config.json` has precedence).
    pub eos_token_ids: Vec<u32>,
}

/// Keys that change what a decoder computes and that this one does not have. A value other than the no-op beside
/// it is refused.
const NO_OPS: &[(&str, &[&str])] = &[
    ("embedding_multiplier", &["1", "1.0"]),
    ("residual_multiplier", &["1", "1.0"]),
    ("attention_multiplier", &[]),
    ("logits_scaling", &["1", "1.0"]),
    ("logit_scale", &["1", "1.0"]),
    ("quantization_config", &[]),
    ("num_local_experts", &["0", "1"]),
    ("num_experts", &["0", "1"]),
    ("use_parallel_residual", &["false"]),
    ("no_rope_layers", &["[]"]),
    ("attention_chunk_size", &[]),
    ("use_bidirectional_attention", &["false"]),
];

/// What a config that leaves a key out means by it; the `*Config` classes of transformers.
#[derive(Debug, Clone, Copy, Default)]
struct Defaults {
    hidden_size: Option<usize>,
    intermediate_size: Option<usize>,
    layers: Option<usize>,
    heads: Option<usize>,
    /// Absent here: as many as query heads.
    kv_heads: Option<usize>,
    /// Absent here: width / heads.
    head_dim: Option<usize>,
    vocab_size: Option<usize>,
    max_position_embeddings: Option<usize>,
    sliding_window: Option<u32>,
}

impl Defaults {
    fn of(architecture: Architecture) -> Self {
        let none = Self::default();
        match architecture {
            Architecture::Llama | Architecture::Phi3 => none,
            Architecture::Mistral => Self { kv_heads: Some(8), sliding_window: Some(4096), ..none },
            Architecture::Qwen2 => Self { kv_heads: Some(32), sliding_window: Some(4096), ..none },
            Architecture::Qwen3 => {
                Self { kv_heads: Some(32), head_dim: Some(128), sliding_window: Some(4096), ..none }
            }
            Architecture::Gemma2 => {
                Self { kv_heads: Some(4), head_dim: Some(256), sliding_window: Some(4096), ..none }
            }
            // The published `text_config`s say only what differs from these.
            Architecture::Gemma3 => Self {
                hidden_size: Some(2304),
                intermediate_size: Some(9216),
                layers: Some(26),
                heads: Some(8),
                kv_heads: Some(4),
                head_dim: Some(256),
                vocab_size: Some(262_208),
                max_position_embeddings: Some(131_072),
                sliding_window: Some(4096),
            },
        }
    }
}

impl ModelConfig {
    /// Reads and checks the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        let value: Value = serde_json::from_str(text).map_err(|e| ConfigError::Malformed(complaint(&e)))?;
        let Value::Object(map) = value else {
            return Err(ConfigError::Malformed("the top level is not an object".into()));
        };
        let outer = Keys::top(&map);
        let (architecture, has_images) = architecture(&outer)?;
        refuse_no_ops(&outer)?;
        let keys = match has_images {
            true => outer.object("text_config")?.ok_or_else(|| outer.missing("text_config"))?,
            false => outer.clone(),
        };
        match has_images {
            true => refuse_no_ops(&keys)?,
            false => outer.refuse_unless("text_config", &[])?,
        }
        let default = Defaults::of(architecture);
        let gemma = architecture.is_gemma();

        let hidden_size = keys.count("hidden_size", default.hidden_size)?;
        let layers = keys.count("num_hidden_layers", default.layers)?;
        if layers > MAX_LAYERS {
            return Err(keys.invalid("num_hidden_layers", "at most 4096"));
        }
        let heads = keys.count("num_attention_heads", default.heads)?;
        let absent_kv_heads = default.kv_heads.filter(|_| !keys.has("num_key_value_heads"));
        let kv_heads = keys.optional_count("num_key_value_heads")?.or(absent_kv_heads).unwrap_or(heads);
        if kv_heads > heads || heads % kv_heads != 0 {
            return Err(keys.invalid("num_key_value_heads", "a divisor of num_attention_heads"));
        }
        let head_dim = match keys.optional_count("head_dim")?.or(default.head_dim) {
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
        let default_eps = if architecture == Architecture::Phi3 { 1e-5 } else { 1e-6 };
        let eps = keys.number("rms_norm_eps")?.unwrap_or(default_eps);
        // Of zeros, a norm is zeros over the root of it.
        if !(1e-30..1.0).contains(&eps) {
            return Err(keys.invalid("rms_norm_eps", "a number above 1e-30 and below 1"));
        }
        let max_position_embeddings =
            keys.count("max_position_embeddings", default.max_position_embeddings)?;
        let around = rope::Around { architecture, head_dim, max_position_embeddings };
        let (rope, sliding_rope) = rope::ropes(&keys, around)?;
        let (layer_kinds, sliding_window) = attention_pattern(&keys, architecture, layers, default)?;
        let (attention_soft_cap, final_soft_cap) = soft_caps(&keys, architecture)?;
        let pre_attention_scalar = match (keys.positive("query_pre_attn_scalar")?, gemma) {
            (scalar, true) => scalar.unwrap_or(256.0),
            (None, false) => head_dim as f64,
            (Some(_), false) => return Err(refused(&keys, "query_pre_attn_scalar")),
        };
        let biases = biases(&keys, architecture)?;
        // The outer config of a model with images has the last word.
        let tied = outer.flag("tie_word_embeddings")?.or(keys.flag("tie_word_embeddings")?);
        let eos = if outer.get("eos_token_id").is_some() { &outer } else { &keys };
        let config = Self {
            architecture,
            hidden_size,
            intermediate_size: keys.count("intermediate_size", default.intermediate_size)?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab_size: keys.count("vocab_size", default.vocab_size)?,
            max_position_embeddings,
            rms_norm_eps: eps as f32,
            norm_plus_one: gemma,
            sandwich_norms: gemma,
            scale_embedding: gemma,
            activation: activation(&keys, gemma)?,
            attention_scale: (1.0 / pre_attention_scalar.sqrt()) as f32,
            attention_soft_cap,
            final_soft_cap,
            rope,
            sliding_rope,
            layer_kinds,
            sliding_window,
            tie_word_embeddings: tied.unwrap_or(gemma),
            qkv_bias: biases.qkv,
            o_bias: biases.o,
            mlp_bias: biases.mlp,
            qk_norm: matches!(architecture, Architecture::Qwen3 | Architecture::Gemma3),
            fused_projections: architecture == Architecture::Phi3,
            stored_dtype: stored_dtype(&outer)?.or(stored_dtype(&keys)?),
            eos_token_ids: parse_token_ids(eos.get("eos_token_id"))
                .ok_or_else(|| eos.invalid("eos_token_id", "a token id or a list of token ids"))?,
        };
        match config.weights() <= MAX_WEIGHTS {
            true => Ok(config),
            false => Err(ConfigError::TooLarge),
        }
    }

    /// Numbers of all matrices.
    fn weights(&self) -> u128 {
        let wide = |n: usize| n as u128;
        let outputs = 2 * self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim;
        let block = wide(self.hidden_size) * wide(outputs + 3 * self.intermediate_size);
        wide(self.layers) * block + 2 * wide(self.vocab_size) * wide(self.hidden_size)
    }

    /// Width of all query heads together.
    pub fn q_size(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key heads together, and of all value heads.
    pub fn kv_size(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Positions that a layer's attention sees, the token's own included; `None` for all.
    pub fn window(&self, layer: usize) -> Option<u32> {
        self.sliding_window.filter(|_| self.layer_kinds[layer] == LayerKind::Sliding)
    }

    /// Sequences longer than this many tokens are rotated otherwise, from their first token on.
    pub fn long_rope_from(&self) -> Option<u32> {
        match self.rope.scaling {
            RopeScaling::LongRope { original_max_position_embeddings, .. } => {
                Some(original_max_position_embeddings)
            }
            _ => None,
        }
    }
}

/// The architecture, and whether it is the text part of a model with images.
fn architecture(keys: &Keys<'_>) -> Result<(Architecture, bool), ConfigError> {
    const SUPPORTED: &str = "Llama, Mistral, Qwen2, Qwen3, Gemma2, Gemma3 and Phi3 (each ForCausalLM) and \
                             Gemma3ForConditionalGeneration are";
    let (key, value) = match keys.get("architectures") {
        Some(Value::Array(names)) if names.len() == 1 => ("architectures", &names[0]),
        None => ("model_type", keys.get("model_type").ok_or_else(|| keys.missing("architectures"))?),
        Some(_) => return Err(keys.invalid("architectures", "a list with one name")),
    };
    let name = value.as_str().unwrap_or("");
    match Architecture::named(name) {
        Some(architecture) => Ok((architecture, name == WITH_IMAGES || name == "gemma3")),
        None => Err(keys.unsupported(key, value, SUPPORTED)),
    }
}

fn refuse_no_ops(keys: &Keys<'_>) -> Result<(), ConfigError> {
    NO_OPS.iter().try_for_each(|(key, allowed)| keys.refuse_unless(key, allowed))
}

fn refused(keys: &Keys<'_>, key: &str) -> ConfigError {
    keys.unsupported(key, keys.get(key).unwrap_or(&Value::Null), "this architecture is computed without it")
}

/// Which layers slide, and how wide their window is.
fn attention_pattern(
    keys: &Keys<'_>,
    architecture: Architecture,
    layers: usize,
    default: Defaults,
) -> Result<(Vec<LayerKind>, Option<u32>), ConfigError> {
    let kind = |sliding: bool| if sliding { LayerKind::Sliding } else { LayerKind::Full };
    let mut window = keys.optional_count("sliding_window")?.map(|n| n as u32);
    if !keys.has("sliding_window") {
        window = default.sliding_window;
    }
    let used = match (architecture, keys.flag("use_sliding_window")?) {
        (Architecture::Qwen2 | Architecture::Qwen3, used) => used.unwrap_or(false),
        (_, Some(false)) if window.is_some() => return Err(refused(keys, "use_sliding_window")),
        _ => true,
    };
    let window = window.filter(|_| used);
    let implied: Vec<LayerKind> = match architecture {
        Architecture::Llama => match window {
            None => vec![LayerKind::Full; layers],
            Some(_) => return Err(refused(keys, "sliding_window")),
        },
        Architecture::Mistral | Architecture::Phi3 => vec![kind(window.is_some()); layers],
        Architecture::Qwen2 | Architecture::Qwen3 => {
            let full = match keys.get("max_window_layers").map(Value::as_u64) {
                None => 28,
                Some(Some(layers)) => layers,
                Some(None) => return Err(keys.invalid("max_window_layers", "a whole number")),
            };
            (0..layers as u64).map(|i| kind(window.is_some() && i >= full)).collect()
        }
        Architecture::Gemma2 => (0..layers).map(|i| kind((i + 1) % 2 != 0)).collect(),
        Architecture::Gemma3 => {
            let pattern = keys.optional_count("sliding_window_pattern")?.unwrap_or(6);
            (0..layers).map(|i| kind((i + 1) % pattern != 0)).collect()
        }
    };
    let listed = listed_kinds(keys, layers)?;
    let kinds = match (listed, architecture) {
        (None, _) => implied,
        // Their decoders do not look at the list.
        (Some(listed), Architecture::Llama | Architecture::Mistral | Architecture::Phi3)
            if listed != implied =>
        {
            return Err(refused(keys, "layer_types"));
        }
        (Some(listed), _) => listed,
    };
    if window.is_none() && kinds.contains(&LayerKind::Sliding) {
        return Err(keys.invalid("sliding_window", "a width, since some layers slide"));
    }
    let slides = kinds.contains(&LayerKind::Sliding);
    Ok((kinds, window.filter(|_| slides)))
}

fn listed_kinds(keys: &Keys<'_>, layers: usize) -> Result<Option<Vec<LayerKind>>, ConfigError> {
    let Some(types) = keys.get("layer_types") else { return Ok(None) };
    let types = types.as_array().filter(|types| types.len() == layers);
    let types = types.ok_or_else(|| keys.invalid("layer_types", "a list with one kind per layer"))?;
    let kinds = [LayerKind::Full, LayerKind::Sliding];
    let kind = |value: &Value| {
        kinds.into_iter().find(|kind| value.as_str() == Some(kind.name())).ok_or_else(|| {
            keys.unsupported("layer_types", value, "`full_attention` and `sliding_attention` are")
        })
    };
    types.iter().map(kind).collect::<Result<_, _>>().map(Some)
}

/// Of attention scores, and of logits.
fn soft_caps(keys: &Keys<'_>, architecture: Architecture) -> Result<(Option<f32>, Option<f32>), ConfigError> {
    let cap = |key: &str, default: Option<f64>| -> Result<Option<f32>, ConfigError> {
        let cap = keys.positive(key)?;
        Ok(if keys.has(key) { cap } else { default }.map(|cap| cap as f32))
    };
    let (attention, logits) = ("attn_logit_softcapping", "final_logit_softcapping");
    match architecture {
        Architecture::Gemma2 => Ok((cap(attention, Some(50.0))?, cap(logits, Some(30.0))?)),
        // Its attention has no cap, whatever the config says.
        Architecture::Gemma3 if keys.get(attention).is_some() => Err(refused(keys, attention)),
        Architecture::Gemma3 => Ok((None, cap(logits, None)?)),
        _ => match [attention, logits].into_iter().find(|key| keys.get(key).is_some()) {
            Some(key) => Err(refused(keys, key)),
            None => Ok((None, None)),
        },
    }
}

struct Biases {
    qkv: bool,
    o: bool,
    mlp: bool,
}

fn biases(keys: &Keys<'_>, architecture: Architecture) -> Result<Biases, ConfigError> {
    let attention = keys.flag("attention_bias")?.unwrap_or(false);
    let mlp = keys.flag("mlp_bias")?.unwrap_or(false);
    if mlp && architecture != Architecture::Llama {
        return Err(refused(keys, "mlp_bias"));
    }
    match architecture {
        Architecture::Qwen2 => Ok(Biases { qkv: true, o: false, mlp }),
        Architecture::Mistral | Architecture::Phi3 if attention => Err(refused(keys, "attention_bias")),
        _ => Ok(Biases { qkv: attention, o: attention, mlp }),
    }
}

/// Gemma's class reads another key than the others'; its published configs have both.
fn activation(keys: &Keys<'_>, gemma: bool) -> Result<Activation, ConfigError> {
    let named = |key: &str| match keys.get(key) {
        None => Ok(None),
        Some(value) => match value.as_str() {
            Some("silu" | "swish") => Ok(Some(Activation::Silu)),
            Some("gelu_pytorch_tanh") => Ok(Some(Activation::GeluTanh)),
            _ => Err(keys.unsupported(key, value, "`silu` and `gelu_pytorch_tanh` are")),
        },
    };
    let (act, activation) = (named("hidden_act")?, named("hidden_activation")?);
    match gemma {
        true if act.is_some() && act != Some(activation.unwrap_or(Activation::GeluTanh)) => {
            Err(keys.invalid("hidden_act", "the same as hidden_activation"))
        }
        true => Ok(activation.unwrap_or(Activation::GeluTanh)),
        false if activation.is_some() => Err(refused(keys, "hidden_activation")),
        false => Ok(act.unwrap_or(Activation::Silu)),
    }
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
        _ => Err(keys.unsupported(key, value, "float32, bfloat16 and float16 are")),
    }
}

#[cfg(test)]
mod tests;
