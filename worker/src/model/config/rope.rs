//! The rotary settings of a `config.json`, in both spellings: `rope_theta` + `rope_scaling`, and transformers 5's
//! `rope_parameters` (which Gemma 3 has per kind of layer).

use serde_json::Map;

use super::keys::{ConfigError, Keys, SANE};
use super::{Architecture, LayerKind};

/// Rotary embedding of the layers of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Leading dimensions of a head that are rotated; the others stay as they are.
    pub rotary_dim: usize,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
    /// Multiplies cosines and sines, and so scales what q and k have in common.
    pub attention_factor: f64,
}

/// A change of the rotary frequencies.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// By how much.
        factor: f64,
    },
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
    /// YaRN (<https://arxiv.org/abs/2309.00071>): frequencies that turn often in the original context are kept, those
    /// that turn seldom divided by `factor`, a linear ramp over the dimensions between.
    Yarn {
        /// By how much low frequencies are divided.
        factor: f64,
        /// Frequencies with more turns than this are kept.
        beta_fast: f64,
        /// Frequencies with fewer turns than this are divided.
        beta_slow: f64,
        /// Whether the ends of the ramp are whole dimensions.
        truncate: bool,
        /// Context the base was trained with first.
        original_max_position_embeddings: f64,
    },
    /// LongRoPE (<https://arxiv.org/abs/2402.13753>): a divisor for every frequency, one set for sequences up to the
    /// original context and another one for longer sequences.
    LongRope {
        /// Divisors in the original context.
        short: Vec<f64>,
        /// Divisors beyond.
        long: Vec<f64>,
        /// Longest sequence that takes the short ones.
        original_max_position_embeddings: u32,
    },
}

/// What the rotary settings depend on beside themselves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Around {
    pub(super) architecture: Architecture,
    pub(super) head_dim: usize,
    pub(super) max_position_embeddings: usize,
}

/// The settings of all layers, and those of sliding layers when they have their own.
pub(super) fn ropes(keys: &Keys<'_>, around: Around) -> Result<(Rope, Option<Rope>), ConfigError> {
    let (parameters, scaling) = (keys.object("rope_parameters")?, keys.object("rope_scaling")?);
    if parameters.is_some() && scaling.is_some() {
        return Err(keys.invalid("rope_scaling", "only one of rope_parameters and rope_scaling"));
    }
    let empty = Map::new();
    let nothing = Keys::top(&empty);
    if around.architecture != Architecture::Gemma3 {
        let settings = parameters.or(scaling).unwrap_or(nothing);
        let theta = keys.number("rope_theta")?.unwrap_or(10_000.0);
        return Ok((rope(keys, &settings, theta, around)?, None));
    }
    // Scaling is the global layers'; sliding ones never need it.
    let global_theta = keys.number("rope_theta")?.unwrap_or(1_000_000.0);
    let local_theta = keys.number("rope_local_base_freq")?.unwrap_or(10_000.0);
    let (global, local) = match parameters {
        None => (scaling, None),
        Some(both) => {
            if let Some(other) =
                both.names().find(|n| !["full_attention", "sliding_attention"].contains(&n.as_str()))
            {
                return Err(both.invalid(other, "only full_attention and sliding_attention"));
            }
            (both.object(LayerKind::Full.name())?, both.object(LayerKind::Sliding.name())?)
        }
    };
    let global = rope(keys, &global.unwrap_or(nothing.clone()), global_theta, around)?;
    let local = rope(keys, &local.unwrap_or(nothing), local_theta, around)?;
    Ok((global, Some(local)))
}

/// The keys that each kind of scaling has, beside those that all have.
fn known_keys(kind: &str) -> &'static [&'static str] {
    match kind {
        "linear" | "dynamic" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        "yarn" => &[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ],
        "longrope" => {
            &["factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"]
        }
        _ => &[],
    }
}

fn rope(keys: &Keys<'_>, settings: &Keys<'_>, theta: f64, around: Around) -> Result<Rope, ConfigError> {
    let theta = settings.number("rope_theta")?.unwrap_or(theta);
    if !(theta > 1.0 && theta.is_finite()) {
        let from = if settings.has("rope_theta") { settings } else { keys };
        return Err(from.invalid("rope_theta", "a number above 1"));
    }
    let kind_key = if settings.get("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = match settings.get(kind_key) {
        None if settings.get("factor").is_some() => return Err(settings.missing("rope_type")),
        None => "default",
        Some(kind) => match (kind.as_str().unwrap_or(""), around.architecture) {
            // Phi-3 was published with its own names for it.
            ("su" | "yarn", Architecture::Phi3) => "longrope",
            (kind @ ("default" | "linear" | "dynamic" | "llama3" | "yarn" | "longrope"), _) => kind,
            _ => {
                let supported = "`default`, `linear`, `dynamic`, `llama3`, `yarn` and `longrope` are";
                return Err(settings.unsupported(kind_key, kind, supported));
            }
        },
    };
    for name in settings.names() {
        let known = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        if let Some(value) = settings.get(name)
            && !known.contains(&name.as_str())
            && !known_keys(kind).contains(&name.as_str())
        {
            return Err(settings.unsupported(name, value, "rope settings without it are"));
        }
    }
    let rotary_dim = rotary_dim(keys, settings, around)?;
    let original = || original_context(keys, settings, around);
    let need = |key: &str| settings.positive(key)?.ok_or_else(|| settings.missing(key));
    let mut attention_factor = 1.0;
    let scaling = match kind {
        "linear" => RopeScaling::Linear { factor: need("factor")? },
        // NTK scaling by the sequence's length begins beyond max_position_embeddings, which is the longest
        // sequence there is.
        "dynamic" => {
            need("factor")?;
            RopeScaling::Default
        }
        "llama3" => {
            let (low_freq_factor, high_freq_factor) = (need("low_freq_factor")?, need("high_freq_factor")?);
            if low_freq_factor >= high_freq_factor {
                return Err(settings.invalid("low_freq_factor", "less than high_freq_factor"));
            }
            RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original()?,
            }
        }
        "yarn" => {
            let original = original()?;
            let factor = match settings.positive("factor")? {
                Some(factor) => factor,
                None => around.max_position_embeddings as f64 / original,
            };
            attention_factor = yarn_attention_factor(settings, factor)?;
            RopeScaling::Yarn {
                factor,
                beta_fast: settings.positive("beta_fast")?.unwrap_or(32.0),
                beta_slow: settings.positive("beta_slow")?.unwrap_or(1.0),
                truncate: settings.flag("truncate")?.unwrap_or(true),
                original_max_position_embeddings: original,
            }
        }
        "longrope" => {
            let original = original()?;
            let factor = match settings.positive("factor")? {
                Some(factor) => factor,
                None => around.max_position_embeddings as f64 / original,
            };
            attention_factor = match settings.positive("attention_factor")? {
                Some(factor) => factor,
                None if factor <= 1.0 => 1.0,
                None => (1.0 + factor.ln() / original.ln()).sqrt(),
            };
            let divisors = |key: &str| {
                let list = settings.positive_list(key)?.ok_or_else(|| settings.missing(key))?;
                match list.len() == rotary_dim / 2 {
                    true => Ok(list),
                    false => {
                        Err(settings.invalid(key, "one number for every two rotated dimensions of a head"))
                    }
                }
            };
            RopeScaling::LongRope {
                short: divisors("short_factor")?,
                long: divisors("long_factor")?,
                original_max_position_embeddings: original as u32,
            }
        }
        _ => RopeScaling::Default,
    };
    // What follows from other settings may be a division by nothing.
    match SANE.contains(&attention_factor) {
        true => Ok(Rope { theta, rotary_dim, scaling, attention_factor }),
        false => Err(settings.invalid("attention_factor", "settings from which a factor above 0 follows")),
    }
}

/// The share of a head that is rotated. Only Phi-3 has one.
fn rotary_dim(keys: &Keys<'_>, settings: &Keys<'_>, around: Around) -> Result<usize, ConfigError> {
    let from = if settings.get("partial_rotary_factor").is_some() { settings } else { keys };
    let share = from.positive("partial_rotary_factor")?.unwrap_or(1.0);
    if around.architecture != Architecture::Phi3 {
        from.refuse_unless("partial_rotary_factor", &["1", "1.0"])?;
    }
    let dim = (around.head_dim as f64 * share) as usize;
    match dim.is_multiple_of(2) && (2..=around.head_dim).contains(&dim) {
        true => Ok(dim),
        false => {
            Err(from
                .invalid("partial_rotary_factor", "a share that is an even number of a head's dimensions"))
        }
    }
}

/// A key of the config itself comes before the one in the settings, as in transformers; without either it is the
/// context as it is.
fn original_context(keys: &Keys<'_>, settings: &Keys<'_>, around: Around) -> Result<f64, ConfigError> {
    const KEY: &str = "original_max_position_embeddings";
    let original = match keys.optional_count(KEY)? {
        Some(original) => Some(original),
        // Absent from the config, its class has this one.
        None if around.architecture == Architecture::Phi3 && !settings.has(KEY) => Some(4096),
        None => settings.optional_count(KEY)?,
    };
    Ok(original.unwrap_or(around.max_position_embeddings) as f64)
}

fn yarn_attention_factor(settings: &Keys<'_>, factor: f64) -> Result<f64, ConfigError> {
    let of = |scale: f64, mscale: f64| if scale <= 1.0 { 1.0 } else { 0.1 * mscale * scale.ln() + 1.0 };
    Ok(
        match (
            settings.positive("attention_factor")?,
            settings.number("mscale")?,
            settings.number("mscale_all_dim")?,
        ) {
            (Some(factor), _, _) => factor,
            (None, Some(one), Some(all)) if one != 0.0 && all != 0.0 => of(factor, one) / of(factor, all),
            _ => of(factor, 1.0),
        },
    )
}
