//! Rotary position embedding: the frequencies of a base, and the angles of a step's positions.

use super::config::{ModelConfig, RopeScaling};

/// One frequency per pair of a head's dimensions.
#[derive(Debug, Clone, PartialEq)]
pub struct Frequencies(Vec<f32>);

impl Frequencies {
    /// The frequencies of a base, computed in f32 as the reference implementations do.
    pub fn of(config: &ModelConfig) -> Self {
        let d = config.head_dim;
        let plain = (0..d / 2).map(|i| {
            let exponent = (2 * i) as f32 / d as f32;
            1.0 / (config.rope.theta.powf(f64::from(exponent)) as f32)
        });
        Self(match config.rope.scaling {
            RopeScaling::Default => plain.collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let original = original_max_position_embeddings;
                plain
                    .map(|frequency| {
                        let wavelength = std::f64::consts::TAU / f64::from(frequency);
                        let low = frequency / factor as f32;
                        if wavelength > original / low_freq_factor {
                            low
                        } else if wavelength < original / high_freq_factor {
                            frequency
                        } else {
                            let high_share = (original / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - high_share as f32) * low + high_share as f32 * frequency
                        }
                    })
                    .collect()
            }
        })
    }

    /// Appends the cosines and sines of one position.
    pub fn angles(&self, position: u32, cos: &mut Vec<f32>, sin: &mut Vec<f32>) {
        for frequency in &self.0 {
            // The product is rounded to f32, as in the reference; its sine is then exact to f32.
            let (s, c) = f64::from(position as f32 * frequency).sin_cos();
            cos.push(c as f32);
            sin.push(s as f32);
        }
    }
}
