//! Rotary position embedding: the frequencies of a base, and the angles of a step's positions.

use std::f64::consts::TAU;

use super::config::{Rope, RopeScaling};

/// One frequency per rotated pair of a head's dimensions.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies {
    frequencies: Vec<f32>,
    /// Those of sequences with more tokens than this, where they differ.
    long: Option<(u32, Vec<f32>)>,
    attention_factor: f32,
}

impl Frequencies {
    /// The frequencies of a rotation, computed in f32 as the reference implementation does
    /// (`modeling_rope_utils.py` of transformers).
    pub fn of(rope: &Rope) -> Self {
        let dim = rope.rotary_dim;
        // theta^(2i/d): how many positions make one radian.
        let periods: Vec<f32> = (0..dim / 2)
            .map(|i| {
                let exponent = (2 * i) as f32 / dim as f32;
                rope.theta.powf(f64::from(exponent)) as f32
            })
            .collect();
        let plain = periods.iter().map(|period| 1.0 / period);
        let divided =
            |divisors: &[f64]| periods.iter().zip(divisors).map(|(p, d)| 1.0 / (*d as f32 * p)).collect();
        let mut long = None;
        let frequencies = match &rope.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|frequency| frequency / *factor as f32).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => plain
                .map(|frequency| {
                    let wavelength = TAU / f64::from(frequency);
                    let low = frequency / *factor as f32;
                    if wavelength > original / low_freq_factor {
                        low
                    } else if wavelength < original / high_freq_factor {
                        frequency
                    } else {
                        let high_share =
                            (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - high_share as f32) * low + high_share as f32 * frequency
                    }
                })
                .collect(),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings: original,
            } => {
                // The dimension whose frequency makes this many turns in the original context.
                let dimension =
                    |turns: f64| dim as f64 * (original / (turns * TAU)).ln() / (2.0 * rope.theta.ln());
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0) as f32, high.min(dim as f64 - 1.0) as f32);
                if low == high {
                    high += 0.001;
                }
                let mix = |(i, period): (usize, &f32)| {
                    let kept = 1.0 - ((i as f32 - low) / (high - low)).clamp(0.0, 1.0);
                    1.0 / (*factor as f32 * period) * (1.0 - kept) + 1.0 / period * kept
                };
                periods.iter().enumerate().map(mix).collect()
            }
            RopeScaling::LongRope { short, long: divisors, original_max_position_embeddings } => {
                long = Some((*original_max_position_embeddings, divided(divisors)));
                divided(short)
            }
        };
        Self { frequencies, long, attention_factor: rope.attention_factor as f32 }
    }

    /// Appends the cosines and sines of one position of a sequence that has `length` tokens now.
    pub fn angles(&self, position: u32, length: u32, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        let frequencies = match &self.long {
            Some((original, long)) if length > *original => long,
            _ => &self.frequencies,
        };
        for frequency in frequencies {
            // The product is rounded to f32, as in the reference; its sine is then exact to f32.
            let (s, c) = f64::from(position as f32 * frequency).sin_cos();
            cos.push(c as f32 * self.attention_factor);
            sin.push(s as f32 * self.attention_factor);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::config::ModelConfig;
    use serde_json::{Value, json};

    /// A head of sixteen dimensions with some rotary settings.
    fn rope(name: &str, more: Value) -> Rope {
        let mut config = json!({"architectures": [name], "hidden_size": 64, "intermediate_size": 96, "vocab_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512});
        config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        ModelConfig::parse(&config.to_string()).unwrap().rope
    }

    /// Numbers of `ROPE_INIT_FUNCTIONS` of transformers 5.23.0.
    #[test]
    fn scaled_frequencies_are_those_of_transformers() {
        let llama = |theta: f64, scaling: Value| {
            rope("LlamaForCausalLM", json!({"rope_theta": theta, "rope_scaling": scaling}))
        };
        let close = |got: &[f32], want: &[f64]| {
            assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(want) {
                assert!((f64::from(*got) - want).abs() <= 2e-7 * want, "{got}, expected {want}");
            }
        };
        let linear = llama(1e4, json!({"rope_type": "linear", "factor": 8.0}));
        let want = [
            0.125,
            0.0395284705,
            0.0125000002,
            0.00395284733,
            0.00124999997,
            0.000395284733,
            0.000125000006,
            3.95284733e-05,
        ];
        close(&Frequencies::of(&linear).frequencies, &want);

        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128});
        let yarn = llama(1e6, yarn);
        let want = [
            1.0,
            0.111142464,
            0.00790569466,
            0.00140585331,
            0.000250000012,
            4.44569851e-05,
            7.90569356e-06,
            1.40585337e-06,
        ];
        close(&Frequencies::of(&yarn).frequencies, &want);
        assert_eq!(yarn.attention_factor, 1.138629436111989);

        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 8,
            "beta_slow": 2, "truncate": false, "mscale": 0.7, "mscale_all_dim": 1.0});
        let yarn = llama(1e4, yarn);
        let want = [
            1.0,
            0.279174536,
            0.0259965975,
            0.00790569466,
            0.00249999994,
            0.000790569466,
            0.000250000012,
            7.90569466e-05,
        ];
        close(&Frequencies::of(&yarn).frequencies, &want);
        assert!((yarn.attention_factor - 0.9634746568860826).abs() < 1e-15);

        let long = json!({"original_max_position_embeddings": 64, "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.9],
                "long_factor": [1.0, 2.5, 4.5, 9.0]}});
        let rope = rope("Phi3ForCausalLM", long);
        let frequencies = Frequencies::of(&rope);
        close(&frequencies.frequencies, &[1.0, 0.0909090936, 0.0076923077, 0.000526315765]);
        close(&frequencies.long.as_ref().unwrap().1, &[1.0, 0.0399999991, 0.00222222228, 0.000111111112]);
        assert_eq!((rope.rotary_dim, rope.attention_factor), (8, 1.224744871391589));
        let angle = |length| {
            let (mut cos, mut sin) = (Vec::new(), Vec::new());
            frequencies.angles(10, length, &mut cos, &mut sin);
            sin[1] / cos[1]
        };
        assert!((angle(64) - 0.909_090_9_f32.tan()).abs() < 1e-5, "the original context");
        assert!((angle(65) - 0.4_f32.tan()).abs() < 1e-5, "one token more");
    }
}
