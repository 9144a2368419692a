//! Which modules of a base a config adapts or replaces, and with which rank and scale. Patterns are matched as PEFT
//! matches them.

use fancy_regex::Regex;
use serde_json::Value;

use super::adapter_config::{AdapterConfig, CONFIG, Names, Numbers, Patterns, unsupported};
use crate::lens::LensError;
use crate::model::config::ModelConfig;
use crate::model::lora::{Module, Norm, modules, norms};

const MAX_RANK: usize = 4096;

/// Name of the embedding below the model's top.
pub(super) const EMBEDDING: &str = "model.embed_tokens";
/// Name of the head.
pub(super) const HEAD: &str = "lm_head";

/// A linear map or a table that a low-rank delta can be added to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Site {
    /// One of a block's linear maps.
    Block(usize, Module),
    /// The embedding.
    Embedding,
    /// The head.
    Head,
}

/// A module with a delta.
#[derive(Debug, Clone)]
pub(super) struct Adapted {
    /// Its name in the base.
    pub(super) key: String,
    pub(super) site: Site,
    pub(super) rank: usize,
    pub(super) scale: f32,
}

/// A module that a lens may bring whole.
#[derive(Debug, Clone)]
pub(super) enum Whole {
    /// A norm of a block.
    Norm(usize, Norm),
    /// The norm before the head.
    FinalNorm,
    /// The embedding.
    Embedding,
    /// The head.
    Head,
}

/// Names of all modules that can have a delta.
pub(super) fn sites(base: &ModelConfig) -> impl Iterator<Item = (String, Site)> {
    let blocks = (0..base.layers).flat_map(move |layer| {
        let name = move |m: Module| (format!("model.layers.{layer}.{}", m.name), Site::Block(layer, m));
        modules(base).into_iter().map(name)
    });
    blocks.chain([(EMBEDDING.into(), Site::Embedding), (HEAD.into(), Site::Head)])
}

/// Names of all modules that can be replaced.
pub(super) fn replaceable(base: &ModelConfig) -> impl Iterator<Item = (String, Whole)> {
    let blocks = (0..base.layers).flat_map(move |layer| {
        let name = move |n: Norm| (format!("model.layers.{layer}.{}", n.name), Whole::Norm(layer, n));
        norms(base).into_iter().map(name)
    });
    blocks.chain([
        ("model.norm".into(), Whole::FinalNorm),
        (EMBEDDING.into(), Whole::Embedding),
        (HEAD.into(), Whole::Head),
    ])
}

/// All modules that the config adapts.
pub(super) fn adapted(
    config: &AdapterConfig,
    base: &ModelConfig,
    folder: &std::path::Path,
) -> Result<Vec<Adapted>, LensError> {
    let malformed = |what: String| LensError::Malformed { path: folder.join(CONFIG), what };
    let targets = Targets::new(config).map_err(malformed)?;
    let ranks = compile(&config.rank_pattern).map_err(malformed)?;
    let alphas = compile(&config.alpha_pattern).map_err(malformed)?;
    let mut adapted = Vec::new();
    for (key, site) in sites(base) {
        if !targets.adapts(&key).map_err(malformed)? {
            continue;
        }
        if config.use_dora == Some(true) && !matches!(site, Site::Block(..)) {
            let value = format!("true with `{key}` among `target_modules`");
            return Err(LensError::UnsupportedSetting { key: "use_dora".into(), value });
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
        adapted.push(Adapted { key, site, rank: rank as usize, scale: scale as f32 });
    }
    if adapted.is_empty() {
        let what = "its `target_modules` and `layers_to_transform` match no module".into();
        return Err(LensError::BaseMismatch { what });
    }
    Ok(adapted)
}

/// All modules that `modules_to_save` names. PEFT takes every module whose name ends so.
pub(super) fn saved(config: &AdapterConfig, base: &ModelConfig) -> Result<Vec<(String, Whole)>, LensError> {
    let names = config.modules_to_save.as_deref().unwrap_or_default();
    for name in names {
        if !replaceable(base).any(|(key, _)| key.ends_with(name.as_str())) {
            return Err(unsupported("modules_to_save", &Value::from(name.as_str())));
        }
        let linear =
            |(key, site): &(String, Site)| matches!(site, Site::Block(..)) && key.ends_with(name.as_str());
        if let Some((key, _)) = sites(base).find(linear) {
            let value =
                format!("{name} (which holds `{key}`; norms, the embedding and the head can be saved)");
            return Err(LensError::UnsupportedSetting { key: "modules_to_save".into(), value });
        }
    }
    Ok(replaceable(base).filter(|(key, _)| names.iter().any(|n| key.ends_with(n.as_str()))).collect())
}

/// Which modules are adapted, as PEFT decides it.
struct Targets<'a> {
    config: &'a AdapterConfig,
    include: Option<Regex>,
    exclude: Option<Regex>,
    saved: Vec<Regex>,
    /// Finds a layer's number in a module's name.
    layers: Vec<Regex>,
}

impl<'a> Targets<'a> {
    fn new(config: &'a AdapterConfig) -> Result<Self, String> {
        let include = match &config.target_modules {
            Names::Pattern(pattern) if !is_all_linear(pattern) => Some(full_match(pattern)?),
            _ => None,
        };
        let exclude = match &config.exclude_modules {
            Some(Names::Pattern(pattern)) if !pattern.is_empty() => Some(full_match(pattern)?),
            _ => None,
        };
        if include.is_some() && config.layers_to_transform.is_some() {
            return Err("`layers_to_transform` cannot be combined with a regex in `target_modules`".into());
        }
        let saved = config.modules_to_save.iter().flatten();
        let saved =
            saved.map(|name| regex(&format!(r"^(?:(^|.*\.){name}($|\..*))"))).collect::<Result<_, _>>()?;
        let patterns = match &config.layers_pattern {
            None => Vec::new(),
            Some(Names::Pattern(pattern)) if pattern.is_empty() => Vec::new(),
            Some(Names::Pattern(pattern)) => vec![pattern.as_str()],
            Some(Names::List(patterns)) => patterns.iter().map(String::as_str).collect(),
        };
        let layers = match patterns.is_empty() {
            true => vec![regex(r"^.*?\.[^.]*\.(?P<idx>\d+)\.")?],
            false => patterns
                .iter()
                .map(|pattern| regex(&format!(r"^(?:^|.*?\.){pattern}\.(?P<idx>\d+)\.")))
                .collect::<Result<_, _>>()?,
        };
        Ok(Self { config, include, exclude, saved, layers })
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
        for saved in &self.saved {
            if is_match(saved, key)? {
                return Ok(false);
            }
        }
        match (&self.include, &self.config.target_modules) {
            (Some(regex), _) => is_match(regex, key),
            (None, Names::List(names)) if names.iter().any(|name| name == key) => Ok(true),
            (None, Names::List(names)) => Ok(is_named(names, key) && self.has_layer(key)?),
            // "all-linear" leaves the head out, and an embedding is not linear.
            (None, Names::Pattern(_)) => Ok(key.starts_with("model.layers.") && self.has_layer(key)?),
        }
    }

    fn has_layer(&self, key: &str) -> Result<bool, String> {
        let wanted = match &self.config.layers_to_transform {
            None => return Ok(true),
            Some(Numbers::List(layers)) if layers.is_empty() => return Ok(true),
            Some(Numbers::List(layers)) => layers.as_slice(),
            Some(Numbers::One(layer)) => std::slice::from_ref(layer),
        };
        for pattern in &self.layers {
            let found =
                pattern.captures(key).map_err(|e| format!("`layers_pattern` cannot be matched: {e}"))?;
            if let Some(index) = found.and_then(|found| found.name("idx")?.as_str().parse().ok()) {
                return Ok(wanted.contains(&index));
            }
        }
        Ok(false)
    }
}

fn is_all_linear(pattern: &str) -> bool {
    pattern.eq_ignore_ascii_case("all-linear")
}

fn is_named(names: &[String], key: &str) -> bool {
    names
        .iter()
        .any(|name| key == name || key.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.')))
}

fn regex(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|e| format!("`{pattern}` is no regular expression: {e}"))
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
