//! LoRA lenses in the PEFT layout: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The config says which modules are adapted (a list of names, a regex, or "all-linear"; perhaps only some layers), with
//! which rank and alpha (perhaps by pattern). The file must hold exactly the tensors that follow from it. Patterns are
//! matched as PEFT matches them.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use fancy_regex::Regex;
use serde::Deserialize;
use serde_json::Value;

use super::{FilledLens, LensError, LensLayout};
use crate::engine::arena::Region;
use crate::model::config::ModelConfig;
use crate::model::lora::{Delta, DeltaLayout, DeltaPart, Module, Site, modules};
use crate::model::tensor_file::{OnProgress, Progress, TensorFile, TensorFileError};
use crate::model::weights::{Dtype, Matrix};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// Files of a LoRA folder that a worker reads: what a digest of the lens covers.
pub const LORA_FILES: [&str; 2] = [CONFIG, WEIGHTS];

/// A LoRA folder with one of these is more than a LoRA, and would answer something else without it.
const OTHER_KINDS: [(&str, &str); 2] =
    [("oracle.json", "an activation oracle"), ("verbalizer.json", "a verbalizer")];

const MAX_CONFIG_BYTES: u64 = 4 << 20;
const MAX_RANK: usize = 4096;
const ALIGNMENT: usize = 64;

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
    "ensure_weight_tying",
    "qalora_group_size",
];

/// An ordered JSON object: PEFT takes the first pattern that matches.
#[derive(Debug, Default, Clone, PartialEq)]
struct Patterns(Vec<(String, f64)>);

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
enum Names {
    Pattern(String),
    List(Vec<String>),
}

/// One number or several.
#[derive(Debug, Clone, Deserialize, PartialEq)]
#[serde(untagged)]
enum Numbers {
    One(u64),
    List(Vec<u64>),
}

/// `adapter_config.json`, as far as it changes what is computed.
#[derive(Debug, Clone, Deserialize)]
struct AdapterConfig {
    peft_type: String,
    r: f64,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: Option<bool>,
    target_modules: Names,
    #[serde(default)]
    exclude_modules: Option<Names>,
    #[serde(default)]
    rank_pattern: Patterns,
    #[serde(default)]
    alpha_pattern: Patterns,
    #[serde(default)]
    layers_to_transform: Option<Numbers>,
    #[serde(default)]
    layers_pattern: Option<Names>,
    #[serde(default)]
    init_lora_weights: Option<Value>,
    #[serde(default)]
    bias: Option<String>,
    /// Everything else must be empty, or be of no consequence.
    #[serde(flatten)]
    rest: serde_json::Map<String, Value>,
}

/// A LoRA folder whose config and header have been checked against a base.
pub struct LoraFolder {
    base: Arc<ModelConfig>,
    layout: LensLayout,
    file: TensorFile,
    moves: Vec<Move>,
}

/// A tensor on its way into the region.
struct Move {
    tensor: String,
    offset: usize,
    rows: usize,
    columns: usize,
    transpose: bool,
}

impl LoraFolder {
    /// Reads the config and the header, and checks both against the base.
    pub fn open(folder: &Path, base: &Arc<ModelConfig>) -> Result<Self, LensError> {
        for (file, kind) in OTHER_KINDS {
            if folder.join(file).exists() {
                return Err(LensError::UnsupportedKind { file, kind });
            }
        }
        let path = folder.join(CONFIG);
        let text = read_config(&path)?;
        let config: AdapterConfig = serde_json::from_str(&text)
            .map_err(|e| LensError::Malformed { path: path.clone(), what: e.to_string() })?;
        refuse_unsupported(&config)?;
        let file = TensorFile::open(&folder.join(WEIGHTS))?;
        refuse_foreign_tensors(&file, base)?;
        let adapted = adapted_modules(&config, base, &path)?;
        let dtype = dtype_of(&file)?;
        let (layout, moves) = plan(&adapted, base, dtype);
        check(&file, &moves)?;
        Ok(Self { base: base.clone(), layout, file, moves })
    }

    /// Where everything will be, and how many bytes that takes.
    pub fn layout(&self) -> &LensLayout {
        &self.layout
    }

    /// Reads all tensors into a region of `layout().bytes`.
    pub fn fill(&self, mut region: Region, on_progress: OnProgress<'_>) -> Result<FilledLens, LensError> {
        assert_eq!(region.len() as u64, self.layout.bytes, "the region was reserved for this layout");
        let total_bytes = self.layout.bytes;
        let mut done_bytes = 0;
        let mut written = |bytes| {
            done_bytes += bytes;
            on_progress(Progress { done_bytes, total_bytes })
        };
        let mut scratch = Vec::new();
        for m in &self.moves {
            let dtype = self.file.dtype(&m.tensor)?;
            let to_dtype = dtype_in(&self.layout, dtype);
            let bytes = m.rows * m.columns * to_dtype.bytes();
            let to = &mut region.bytes_mut()[m.offset..m.offset + bytes];
            if m.transpose {
                scratch.resize(bytes, 0);
                self.file.read(&m.tensor, to_dtype, &mut scratch, &mut written)?;
                match to_dtype.bytes() {
                    2 => transpose::<2>(&scratch, to, m.rows, m.columns),
                    _ => transpose::<4>(&scratch, to, m.rows, m.columns),
                }
            } else {
                self.file.read(&m.tensor, to_dtype, to, &mut written)?;
            }
        }
        Ok(FilledLens { base: self.base.clone(), layout: self.layout.clone(), region })
    }
}

/// All matrices of a lens have one dtype; a lens without any keeps what it has.
fn dtype_in(layout: &LensLayout, stored: Dtype) -> Dtype {
    layout.deltas.layers.iter().flatten().flatten().map(|d| d.a.dtype).next().unwrap_or(stored)
}

/// `[rows, columns]` → `[columns, rows]`, in squares that stay in the cache.
fn transpose<const N: usize>(from: &[u8], to: &mut [u8], rows: usize, columns: usize) {
    const SQUARE: usize = 32;
    let (from, to) = (from.as_chunks::<N>().0, to.as_chunks_mut::<N>().0);
    for row in (0..rows).step_by(SQUARE) {
        for column in (0..columns).step_by(SQUARE) {
            for r in row..rows.min(row + SQUARE) {
                for c in column..columns.min(column + SQUARE) {
                    to[c * rows + r] = from[r * columns + c];
                }
            }
        }
    }
}

fn read_config(path: &Path) -> Result<String, LensError> {
    use std::io::Read;
    let io = |source| LensError::Io { path: path.into(), source };
    let mut text = String::new();
    std::fs::File::open(path)
        .map_err(io)?
        .take(MAX_CONFIG_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(io)?;
    if text.len() as u64 > MAX_CONFIG_BYTES {
        let what = format!("it is larger than {MAX_CONFIG_BYTES} bytes");
        return Err(LensError::Malformed { path: path.into(), what });
    }
    Ok(text)
}

fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(keys) => keys.is_empty(),
        _ => false,
    }
}

fn refuse_unsupported(config: &AdapterConfig) -> Result<(), LensError> {
    let unsupported = |key: &str, value: &Value| {
        Err(LensError::UnsupportedSetting { key: key.into(), value: brief(value) })
    };
    if config.peft_type != "LORA" {
        return unsupported("peft_type", &Value::from(config.peft_type.as_str()));
    }
    if let Some(bias) = &config.bias
        && bias != "none"
    {
        return unsupported("bias", &Value::from(bias.as_str()));
    }
    // Other starts (pissa, olora, loftq ...) also change the base's own weights.
    if let Some(init) = &config.init_lora_weights
        && !matches!(init, Value::Bool(_) | Value::Null)
        && !matches!(init.as_str(), Some("gaussian" | "eva" | "orthogonal"))
    {
        return unsupported("init_lora_weights", init);
    }
    for (key, value) in &config.rest {
        if !is_empty(value) && !IGNORED_KEYS.contains(&key.as_str()) {
            return unsupported(key, value);
        }
    }
    Ok(())
}

/// Names the first tensor that no LoRA of these modules has, and why it cannot be used.
fn refuse_foreign_tensors(file: &TensorFile, base: &ModelConfig) -> Result<(), LensError> {
    for tensor in file.names() {
        let unsupported = |why| Err(LensError::UnsupportedTensor { tensor: tensor.clone(), why });
        if tensor.contains("lora_magnitude_vector") {
            return unsupported("DoRA is not");
        }
        if tensor.contains("lora_embedding_") || tensor.contains("embed_tokens") {
            return unsupported("deltas of embeddings are not");
        }
        if tensor.contains("lm_head") {
            return unsupported("deltas of the head are not");
        }
        let Some(module) =
            tensor.strip_suffix(".lora_A.weight").or_else(|| tensor.strip_suffix(".lora_B.weight"))
        else {
            return unsupported("only lora_A and lora_B weights are");
        };
        let parsed =
            module.strip_prefix("base_model.model.model.layers.").and_then(|rest| rest.split_once('.'));
        let Some((layer, name)) = parsed else {
            return unsupported("only modules of decoder blocks can be adapted");
        };
        if !modules(base).iter().any(|m| m.name == name) {
            return unsupported("this base has no such module");
        }
        match layer.parse::<usize>() {
            Ok(n) if n < base.layers && n.to_string() == layer => {}
            _ => {
                return Err(LensError::BaseMismatch {
                    what: format!("tensor `{tensor}` is for layer {layer}, the base has {}", base.layers),
                });
            }
        }
    }
    Ok(())
}

/// A module of one layer with its rank and scale.
struct Adapted {
    layer: usize,
    module: Module,
    rank: usize,
    scale: f32,
}

impl Adapted {
    fn tensor(&self, matrix: char) -> String {
        format!("base_model.model.model.layers.{}.{}.lora_{matrix}.weight", self.layer, self.module.name)
    }
}

fn adapted_modules(
    config: &AdapterConfig,
    base: &ModelConfig,
    path: &Path,
) -> Result<Vec<Adapted>, LensError> {
    let malformed = |what: String| LensError::Malformed { path: path.into(), what };
    let targets = Targets::new(config).map_err(malformed)?;
    let ranks = compile(&config.rank_pattern).map_err(malformed)?;
    let alphas = compile(&config.alpha_pattern).map_err(malformed)?;
    for key in ["lm_head", "model.embed_tokens"] {
        if targets.adapts(key).map_err(malformed)? {
            let value = format!("{key} (deltas of embeddings and of the head are not)");
            return Err(LensError::UnsupportedSetting { key: "target_modules".into(), value });
        }
    }
    let mut adapted = Vec::new();
    for layer in 0..base.layers {
        for module in modules(base) {
            let key = format!("model.layers.{layer}.{}", module.name);
            if !targets.adapts(&key).map_err(malformed)? {
                continue;
            }
            let rank = first_match(&ranks, &key).map_err(malformed)?.unwrap_or(config.r);
            let alpha = first_match(&alphas, &key).map_err(malformed)?.unwrap_or(config.lora_alpha);
            if rank.fract() != 0.0 || !(1.0..=MAX_RANK as f64).contains(&rank) {
                return Err(malformed(format!("the rank of `{key}` is {rank}; 1 to {MAX_RANK} is possible")));
            }
            let scale = if config.use_rslora == Some(true) { alpha / rank.sqrt() } else { alpha / rank };
            if !(scale as f32).is_finite() {
                return Err(malformed(format!("alpha of `{key}` is {alpha}")));
            }
            adapted.push(Adapted { layer, module, rank: rank as usize, scale: scale as f32 });
        }
    }
    if adapted.is_empty() {
        let what = "its `target_modules` and `layers_to_transform` match no module".into();
        return Err(LensError::BaseMismatch { what });
    }
    Ok(adapted)
}

/// Which modules are adapted, as PEFT decides it.
struct Targets<'a> {
    config: &'a AdapterConfig,
    include: Option<Regex>,
    exclude: Option<Regex>,
}

impl<'a> Targets<'a> {
    fn new(config: &'a AdapterConfig) -> Result<Self, String> {
        let include = match &config.target_modules {
            Names::Pattern(pattern) if pattern != "all-linear" => Some(full_match(pattern)?),
            _ => None,
        };
        let exclude = match &config.exclude_modules {
            Some(Names::Pattern(pattern)) => Some(full_match(pattern)?),
            _ => None,
        };
        if include.is_some() && config.layers_to_transform.is_some() {
            return Err("`layers_to_transform` cannot be combined with a regex in `target_modules`".into());
        }
        let pattern_is_layers = match &config.layers_pattern {
            None => true,
            Some(Names::Pattern(pattern)) => pattern.is_empty() || pattern == "layers",
            Some(Names::List(patterns)) => patterns.is_empty() || patterns.iter().any(|p| p == "layers"),
        };
        if !pattern_is_layers {
            return Err("`layers_pattern` does not name `layers`, where this base's blocks are".into());
        }
        Ok(Self { config, include, exclude })
    }

    fn adapts(&self, key: &str) -> Result<bool, String> {
        let excluded = match (&self.exclude, &self.config.exclude_modules) {
            (Some(regex), _) => is_match(regex, key)?,
            (None, Some(Names::List(names))) => is_named(names, key),
            _ => false,
        };
        if excluded {
            return Ok(false);
        }
        match (&self.include, &self.config.target_modules) {
            (Some(regex), _) => is_match(regex, key),
            (None, Names::List(names)) if names.iter().any(|name| name == key) => Ok(true),
            (None, Names::List(names)) => Ok(is_named(names, key) && self.has_layer(key)),
            // "all-linear" leaves the head out.
            (None, Names::Pattern(_)) => Ok(key.starts_with("model.layers.") && self.has_layer(key)),
        }
    }

    fn has_layer(&self, key: &str) -> bool {
        let Some(layers) = &self.config.layers_to_transform else { return true };
        let layer = key.strip_prefix("model.layers.").and_then(|k| k.split('.').next()?.parse().ok());
        match (layers, layer) {
            (Numbers::List(layers), _) if layers.is_empty() => true,
            (Numbers::One(n), Some(layer)) => *n == layer,
            (Numbers::List(layers), Some(layer)) => layers.contains(&layer),
            (_, None) => false,
        }
    }
}

fn is_named(names: &[String], key: &str) -> bool {
    names
        .iter()
        .any(|name| key == name || key.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.')))
}

/// Python's `re.fullmatch`.
fn full_match(pattern: &str) -> Result<Regex, String> {
    Regex::new(&format!("^(?:{pattern})$")).map_err(|e| format!("`{pattern}` is no regular expression: {e}"))
}

fn is_match(regex: &Regex, key: &str) -> Result<bool, String> {
    regex.is_match(key).map_err(|e| format!("`{}` cannot be matched: {e}", regex.as_str()))
}

fn compile(patterns: &Patterns) -> Result<Vec<(Regex, f64)>, String> {
    patterns
        .0
        .iter()
        .map(|(pattern, value)| Ok((full_match(&format!(r"(.*\.)?({pattern})"))?, *value)))
        .collect()
}

fn first_match(patterns: &[(Regex, f64)], key: &str) -> Result<Option<f64>, String> {
    for (pattern, value) in patterns {
        if is_match(pattern, key)? {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// The dtype that holds every tensor exactly.
fn dtype_of(file: &TensorFile) -> Result<Dtype, LensError> {
    let mut all = None;
    for tensor in file.names() {
        let dtype = file.dtype(&tensor)?;
        all = match all {
            None => Some(dtype),
            Some(other) if other == dtype => all,
            Some(_) => Some(Dtype::F32),
        };
    }
    Ok(all.unwrap_or(Dtype::F32))
}

fn plan(adapted: &[Adapted], base: &ModelConfig, dtype: Dtype) -> (LensLayout, Vec<Move>) {
    let mut moves = Vec::new();
    let mut end = 0usize;
    let mut place = |elements: usize| {
        let offset = end.next_multiple_of(ALIGNMENT);
        end = offset + elements * dtype.bytes();
        offset
    };
    let layers = (0..base.layers)
        .map(|layer| {
            Site::ALL.map(|site| {
                let here: Vec<_> =
                    adapted.iter().filter(|a| a.layer == layer && a.module.site == site).collect();
                let inputs = here.first()?.module.inputs;
                let ranks: usize = here.iter().map(|a| a.rank).sum();
                let a = Matrix { offset: place(ranks * inputs), outputs: ranks, inputs, dtype };
                let mut rank_start = 0;
                let parts = here
                    .iter()
                    .map(|m| {
                        let (rank, outputs) = (m.rank, m.module.outputs);
                        moves.push(Move {
                            tensor: m.tensor('A'),
                            offset: a.offset + rank_start * inputs * dtype.bytes(),
                            rows: rank,
                            columns: inputs,
                            transpose: false,
                        });
                        let b =
                            Matrix { offset: place(rank * outputs), outputs: rank, inputs: outputs, dtype };
                        moves.push(Move {
                            tensor: m.tensor('B'),
                            offset: b.offset,
                            rows: outputs,
                            columns: rank,
                            transpose: true,
                        });
                        let part =
                            DeltaPart { rank_start, output_start: m.module.output_start, b, scale: m.scale };
                        rank_start += rank;
                        part
                    })
                    .collect();
                Some(Delta { a, parts })
            })
        })
        .collect();
    let bytes = end.next_multiple_of(ALIGNMENT) as u64;
    (LensLayout { bytes, deltas: DeltaLayout { layers } }, moves)
}

/// Every tensor of the plan is in the file with its shape, and the file has no other.
fn check(file: &TensorFile, moves: &[Move]) -> Result<(), LensError> {
    for m in moves {
        let found = file.shape(&m.tensor).ok_or_else(|| {
            let what = format!("tensor `{}`, which {CONFIG} implies, is missing", m.tensor);
            LensError::File(TensorFileError::Malformed { path: file.path().into(), what })
        })?;
        if found != [m.rows, m.columns] {
            let what =
                format!("tensor `{}` has shape {found:?}, expected [{}, {}]", m.tensor, m.rows, m.columns);
            return Err(LensError::BaseMismatch { what });
        }
    }
    let known: HashSet<&str> = moves.iter().map(|m| m.tensor.as_str()).collect();
    for tensor in file.names() {
        if !known.contains(tensor.as_str()) {
            let what = format!("{CONFIG} does not imply tensor `{tensor}`");
            return Err(LensError::File(TensorFileError::Malformed { path: file.path().into(), what }));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lens::LensFailure;
    use serde_json::json;
    use std::path::PathBuf;

    fn base() -> Arc<ModelConfig> {
        let fixture = fixture().join("model/config.json");
        Arc::new(ModelConfig::parse(&std::fs::read_to_string(fixture).unwrap()).unwrap())
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
            ("use_dora", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("bias", json!("lora_only")),
            ("lora_bias", json!(true)),
            ("fan_in_fan_out", json!(true)),
            ("layer_replication", json!([[0, 2]])),
            ("alora_invocation_tokens", json!([1, 2])),
            ("trainable_token_indices", json!([3])),
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
        let dir = changed("attn-r4", &[("target_modules", json!(["q_proj", "v_proj", "lm_head"]))]);
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
        let mut smaller = (*base()).clone();
        smaller.layers = 2;
        let lens = fixture().join("lenses/attn-r4");
        let error = LoraFolder::open(&lens, &Arc::new(smaller)).err().unwrap();
        assert_eq!(error.failure(), LensFailure::BaseMismatch, "{error}");
        let mut narrower = (*base()).clone();
        narrower.hidden_size = 32;
        let error = LoraFolder::open(&lens, &Arc::new(narrower)).err().unwrap();
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
            let adapted = adapted_modules(&config, &base(), Path::new("")).unwrap();
            adapted.iter().map(|a| format!("{}.{}", a.layer, a.module.name)).collect::<Vec<_>>()
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
}
