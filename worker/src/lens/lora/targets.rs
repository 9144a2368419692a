//! Which modules of a base a config adapts or replaces, and with which rank and scale. Patterns are matched as PEFT
//! matches them.

use std::collections::{BTreeMap, BTreeSet};

use fancy_regex::Regex;
use serde_json::Value;

use super::adapter_config::{AdapterConfig, CONFIG, Names, Numbers, Patterns, unsupported};
use super::patterns::{Compiler, Pattern, cannot_match, is_match, tails};
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
    let mut compiler = Compiler::default();
    let targets = Targets::new(config, &mut compiler).map_err(malformed)?;
    let mut chosen = Vec::new();
    for (key, site) in sites(base) {
        if targets.adapts(&key).map_err(malformed)? {
            chosen.push((key, site));
        }
    }
    // The head's tensors are in the file too, though the config does not name it.
    let is_there = |site: &Site| chosen.iter().any(|(_, other)| other == site);
    let ties = config.ensure_weight_tying == Some(true) && base.tie_word_embeddings;
    if ties && is_there(&Site::Embedding) && !is_there(&Site::Head) {
        chosen.push((HEAD.into(), Site::Head));
    }
    let ranks = first_matches(&config.rank_pattern, &chosen, &mut compiler).map_err(malformed)?;
    let alphas = first_matches(&config.alpha_pattern, &chosen, &mut compiler).map_err(malformed)?;
    let mut adapted = Vec::new();
    for (index, (key, site)) in chosen.into_iter().enumerate() {
        if config.use_dora == Some(true) && !matches!(site, Site::Block(..)) {
            let value = format!("true with `{key}` among `target_modules`");
            return Err(LensError::UnsupportedSetting { key: "use_dora".into(), value });
        }
        // DoRA has no place for it, nor has the embedding; nobody else computes it either.
        if config.lora_bias == Some(true)
            && (config.use_dora == Some(true) || !matches!(site, Site::Block(..)))
        {
            let value = format!("true with `{key}` among `target_modules`, or with `use_dora`");
            return Err(LensError::UnsupportedSetting { key: "lora_bias".into(), value });
        }
        let rank = ranks.get(&index).copied().unwrap_or(config.r);
        let alpha = alphas.get(&index).copied().unwrap_or(config.lora_alpha);
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
    let names: BTreeSet<&str> = config.modules_to_save.iter().flatten().map(String::as_str).collect();
    for name in &names {
        if !replaceable(base).any(|(key, _)| key.ends_with(name)) {
            return Err(unsupported("modules_to_save", &Value::from(*name)));
        }
        let linear = |(key, site): &(String, Site)| matches!(site, Site::Block(..)) && key.ends_with(name);
        if let Some((key, _)) = sites(base).find(linear) {
            let value =
                format!("{name} (which holds `{key}`; norms, the embedding and the head can be saved)");
            return Err(LensError::UnsupportedSetting { key: "modules_to_save".into(), value });
        }
    }
    Ok(replaceable(base).filter(|(key, _)| names.iter().any(|n| key.ends_with(n))).collect())
}

/// Which modules are adapted, as PEFT decides it.
struct Targets<'a> {
    config: &'a AdapterConfig,
    include: Chosen<'a>,
    exclude: Chosen<'a>,
    saved: Vec<Pattern>,
    /// Finds a layer's number in a module's name.
    layers: Vec<Regex>,
    wanted_layers: BTreeSet<u64>,
}

/// What a config chooses modules by.
enum Chosen<'a> {
    Nothing,
    AllLinear,
    Regex(Regex),
    Names(BTreeSet<&'a str>),
}

impl<'a> Chosen<'a> {
    fn by(names: &'a Names, compiler: &mut Compiler) -> Result<Self, String> {
        Ok(match names {
            Names::Pattern(pattern) => Self::Regex(compiler.whole(pattern)?),
            Names::List(names) => Self::Names(names.iter().map(String::as_str).collect()),
        })
    }
}

impl<'a> Targets<'a> {
    fn new(config: &'a AdapterConfig, compiler: &mut Compiler) -> Result<Self, String> {
        let include = match &config.target_modules {
            Names::Pattern(pattern) if is_all_linear(pattern) => Chosen::AllLinear,
            names => Chosen::by(names, compiler)?,
        };
        let exclude = match &config.exclude_modules {
            None => Chosen::Nothing,
            Some(Names::Pattern(pattern)) if pattern.is_empty() => Chosen::Nothing,
            Some(names) => Chosen::by(names, compiler)?,
        };
        if matches!(include, Chosen::Regex(_)) && config.layers_to_transform.is_some() {
            return Err("`layers_to_transform` cannot be combined with a regex in `target_modules`".into());
        }
        let saved: BTreeSet<_> = config.modules_to_save.iter().flatten().collect();
        let saved = saved.into_iter().map(|name| compiler.inside(name)).collect::<Result<_, _>>()?;
        let patterns = match &config.layers_pattern {
            None => &[][..],
            Some(Names::Pattern(pattern)) if pattern.is_empty() => &[],
            Some(Names::Pattern(pattern)) => std::slice::from_ref(pattern),
            Some(Names::List(patterns)) => patterns.as_slice(),
        };
        let layers = match patterns.is_empty() {
            true => vec![compiler.any_index()?],
            false => patterns.iter().map(|p| compiler.before_index(p)).collect::<Result<_, _>>()?,
        };
        let wanted_layers = match &config.layers_to_transform {
            None => BTreeSet::new(),
            Some(Numbers::One(layer)) => BTreeSet::from([*layer]),
            Some(Numbers::List(layers)) => layers.iter().copied().collect(),
        };
        Ok(Self { config, include, exclude, saved, layers, wanted_layers })
    }

    fn adapts(&self, key: &str) -> Result<bool, String> {
        let excluded = match &self.exclude {
            Chosen::Regex(regex) => is_match(regex, key)?,
            Chosen::Names(names) => is_named(names, key),
            Chosen::Nothing | Chosen::AllLinear => false,
        };
        if excluded {
            return Ok(false);
        }
        for saved in &self.saved {
            if saved.is_match(key)? {
                return Ok(false);
            }
        }
        match &self.include {
            Chosen::Regex(regex) => is_match(regex, key),
            Chosen::Names(names) if names.contains(key) => Ok(true),
            Chosen::Names(names) => Ok(is_named(names, key) && self.has_layer(key)?),
            // "all-linear" leaves the head out, and an embedding is not linear.
            Chosen::AllLinear => Ok(key.starts_with("model.layers.") && self.has_layer(key)?),
            Chosen::Nothing => Ok(false),
        }
    }

    fn has_layer(&self, key: &str) -> Result<bool, String> {
        match &self.config.layers_to_transform {
            None => return Ok(true),
            Some(Numbers::List(layers)) if layers.is_empty() => return Ok(true),
            Some(_) => {}
        }
        for pattern in &self.layers {
            let found = pattern.captures(key).map_err(|e| cannot_match(pattern, &e))?;
            if let Some(index) = found.and_then(|found| found.name("idx")?.as_str().parse().ok()) {
                return Ok(self.wanted_layers.contains(&index));
            }
        }
        Ok(false)
    }
}

fn is_all_linear(pattern: &str) -> bool {
    pattern.eq_ignore_ascii_case("all-linear")
}

fn is_named(names: &BTreeSet<&str>, key: &str) -> bool {
    tails(key).any(|tail| names.contains(tail))
}

/// For each module, by its place in the list, the number of the first pattern that means it. One pattern is compiled at
/// a time.
fn first_matches(
    patterns: &Patterns,
    modules: &[(String, Site)],
    compiler: &mut Compiler,
) -> Result<BTreeMap<usize, f64>, String> {
    let mut found = BTreeMap::new();
    for (pattern, number) in &patterns.0 {
        let pattern = compiler.at_end(pattern)?;
        for (index, (key, _)) in modules.iter().enumerate() {
            if !found.contains_key(&index) && pattern.is_match(key)? {
                found.insert(index, *number);
            }
        }
    }
    Ok(found)
}
