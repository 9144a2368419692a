//! Parity: what this engine computes against what independent implementations computed.
//!
//! A case folder has a base (`model/`), lenses over it (`lenses/<name>/`), and what transformers and PEFT compute with
//! them (`expected.json`, `expected.safetensors`). Everything recorded is compared: token ids and chat text, the
//! logits of every position and the residual stream at every block (one sequence at a time), greedy tokens and
//! prompt log-probabilities (through the engine, all rows of a case in one batch).
//!
//! Chat templates have a folder of their own, with published ones and what transformers renders with them.
//!
//! Computed in f32. In bf16, as most bases are served, a tiny model's logits are off by a percent or more whoever computes
//! them, so the bound is what transformers does itself: where a case has `bf16.json`, the logits in bf16 may be no
//! further from the f32 ones (root of the mean square) than those of transformers in bf16 are. [`quantized`] says how a Q8_0 base
//! is checked.

pub mod activations;
pub mod case;
pub mod demo;
pub mod engine;
pub mod quantized;
pub mod templates;
pub mod verbalizer;

use std::path::{Path, PathBuf};

/// A number may differ by this share of the largest absolute value of its tensor.
pub const TOLERANCE: f32 = 1e-4;

/// The repository's own fixtures.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

/// What came of one check.
#[derive(Debug, Clone)]
pub struct Line {
    /// Case and lens.
    pub subject: String,
    /// What was compared.
    pub what: String,
    /// The result.
    pub outcome: Outcome,
}

/// The result of a check.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Equal; with the worst error as a share of the largest absolute value where numbers were compared.
    Equal(Option<f32>),
    /// Different, and how.
    Different(String),
    /// The engine refuses it, and says why.
    Unsupported(String),
}

impl Line {
    /// Two things that must be equal.
    pub fn same<T: PartialEq + std::fmt::Debug>(subject: &str, what: &str, got: &T, want: &T) -> Self {
        let outcome = if got == want {
            Outcome::Equal(None)
        } else {
            Outcome::Different(format!("got {got:?}, expected {want:?}"))
        };
        Self { subject: subject.into(), what: what.into(), outcome }
    }

    /// Numbers whose differences may have at most this root of the mean square, as a share of the largest absolute value.
    pub fn near(subject: &str, what: &str, got: &[f32], want: &[f32], bound: f64) -> Self {
        let largest = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let square = |(a, b): (&f32, &f32)| f64::from((a - b) / largest).powi(2);
        let root = (got.iter().zip(want).map(square).sum::<f64>() / want.len() as f64).sqrt();
        let outcome = match got.len() == want.len() && root <= bound {
            true => Outcome::Equal(Some(root as f32)),
            false => {
                Outcome::Different(format!("off by {root:.1e} in the mean, transformers by {bound:.1e}"))
            }
        };
        Self { subject: subject.into(), what: what.into(), outcome }
    }

    /// Numbers that must be close.
    pub fn close(subject: &str, what: &str, got: &[f32], want: &[f32]) -> Self {
        let largest = want.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
        let outcome = if got.len() != want.len() {
            Outcome::Different(format!("{} numbers, expected {}", got.len(), want.len()))
        } else {
            let differences = got.iter().zip(want).map(|(a, b)| (a - b).abs() / largest);
            let worst =
                differences.fold(0.0_f32, |max, x| if x.is_nan() { f32::INFINITY } else { max.max(x) });
            match worst <= TOLERANCE {
                true => Outcome::Equal(Some(worst)),
                false => Outcome::Different(format!("off by {worst:.1e} of the largest value")),
            }
        };
        Self { subject: subject.into(), what: what.into(), outcome }
    }

    /// Something the engine refuses.
    pub fn unsupported(subject: &str, error: &dyn std::error::Error) -> Self {
        let mut text = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            text = format!("{text}: {error}");
            source = error.source();
        }
        Self { subject: subject.into(), what: "load".into(), outcome: Outcome::Unsupported(text) }
    }
}

/// Prints a table, one row per subject, and gives the number of failures. What is unsupported counts as a failure unless
/// `foreign`.
pub fn report(lines: &[Line], foreign: bool) -> usize {
    let mut failures = 0;
    let mut subjects: Vec<&str> = Vec::new();
    for line in lines {
        if !subjects.contains(&line.subject.as_str()) {
            subjects.push(&line.subject);
        }
    }
    println!("{:<32} {:>7} {:>12}  worst of", "case", "checks", "worst error");
    for subject in subjects {
        let own: Vec<_> = lines.iter().filter(|l| l.subject == subject).collect();
        let mut worst = (0.0_f32, "-");
        let mut bad = Vec::new();
        for line in &own {
            match &line.outcome {
                Outcome::Equal(Some(error)) if *error >= worst.0 => worst = (*error, &line.what),
                Outcome::Equal(_) => {}
                Outcome::Different(how) => bad.push(format!("    FAILED {}: {how}", line.what)),
                Outcome::Unsupported(why) if foreign => bad.push(format!("    not supported yet: {why}")),
                Outcome::Unsupported(why) => bad.push(format!("    FAILED {}: {why}", line.what)),
            }
        }
        println!("{subject:<32} {:>7} {:>12.1e}  {}", own.len(), worst.0, worst.1);
        failures += bad.iter().filter(|text| text.contains("FAILED")).count();
        bad.iter().for_each(|text| println!("{text}"));
    }
    failures
}

/// The folders below `folder` that hold a case, sorted.
pub fn case_folders(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut cases: Vec<PathBuf> =
        std::fs::read_dir(folder)?.filter_map(|entry| Some(entry.ok()?.path())).collect();
    cases.retain(|path| path.join("expected.json").exists());
    cases.sort();
    Ok(cases)
}
