//! A base in Q8_0 against the same base in f32 whose weights were rounded to Q8_0 beforehand, here and plainly.
//!
//! Both have the same weights, so what differs is that products of the first are made from inputs that were quantized as
//! well. An input is rounded to 1/127 of its block's largest, which moves it by 1/440 of that largest in the mean
//! (a step's twelfth root), where rounding to bf16 moves a number by 1/890 of itself; and of thirty-two inputs the
//! largest is about 2.2 times the root of their mean square. So errors may be [`STEPS`] times those of bf16. How far bf16 is
//! from f32 in a case is recorded as transformers does it (`bf16.json`).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Result, ensure};
use half::{bf16, f16};
use safetensors::tensor::{Dtype as Stored, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde::Deserialize;
use turret_worker::model::single::SingleRow;
use turret_worker::model::weights::{BaseFolder, Dtype, Quantization};

use super::Line;
use super::case::Bound;

/// How much coarser a step of Q8_0 is than one of bf16: 890 / 440 · 2.2.
const STEPS: f64 = 4.5;

#[derive(Deserialize)]
struct Expected {
    cases: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct Prompt {
    input_ids: Vec<u32>,
}

/// Compares the logits of the base and of every lens, for all prompts whose error in bf16 is recorded, and for the first prompt
/// of lenses of which none is: those may be as far off as the worst of the case.
pub fn check(folder: &Path) -> Result<Vec<Line>> {
    let model = folder.join("model");
    let Ok(text) = std::fs::read_to_string(folder.join("bf16.json")) else { return Ok(Vec::new()) };
    // What is wrong with a base is told where it is compared in f32.
    let Ok(files) = BaseFolder::open(&model, Some(Dtype::F32)) else { return Ok(Vec::new()) };
    let recorded: BTreeMap<String, Bound> = serde_json::from_str(&text)?;
    let worst = recorded.values().map(|bound| bound.root_mean_square).fold(0.0, f64::max);
    let expected: Expected = serde_json::from_str(&std::fs::read_to_string(folder.join("expected.json"))?)?;
    let case = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let subject = format!("{case} in Q8_0");
    let rounded = tempfile::tempdir()?;
    round_weights(&model, files.config().tie_word_embeddings, rounded.path())?;
    let mut quantized = SingleRow::load(files.quantized(Quantization::Q8_0), 256)?;
    let mut plain = SingleRow::open(rounded.path(), Some(Dtype::F32), 256)?;
    let mut lines = Vec::new();
    for (lens, prompts) in expected.cases.iter().filter(|(name, _)| !name.ends_with("chat")) {
        let bound = |prompt| recorded.get(&format!("{lens}.{prompt}.logits"));
        let prompts: Vec<Prompt> = serde_json::from_value(prompts.clone())?;
        let none = (0..prompts.len()).all(|prompt| bound(prompt).is_none());
        for (index, prompt) in prompts.iter().enumerate() {
            let bound = match bound(index) {
                Some(bound) => bound.root_mean_square,
                None if none && index == 0 => worst,
                None => continue,
            };
            let mut logits = Vec::new();
            for base in [&mut quantized, &mut plain] {
                let lenses = match lens.as_str() {
                    "base" => Vec::new(),
                    lens => vec![(base.load_lora(&folder.join("lenses").join(lens))?, 1.0)],
                };
                logits.push(base.compute(&prompt.input_ids, &lenses)?.logits);
            }
            let what = format!("{lens}: logits of prompt {index}");
            lines.push(Line::near(&subject, &what, &logits[0], &logits[1], STEPS * bound));
        }
    }
    Ok(lines)
}

/// Copies a model folder with every matrix that is multiplied rounded to Q8_0, as F32.
fn round_weights(model: &Path, tied: bool, to: &Path) -> Result<()> {
    std::fs::copy(model.join("config.json"), to.join("config.json"))?;
    let bytes = std::fs::read(model.join("model.safetensors"))?;
    let mut tensors = Vec::new();
    for (name, tensor) in SafeTensors::deserialize(&bytes)?.tensors() {
        ensure!(tensor.dtype() == Stored::BF16, "`{name}` is not in bf16");
        let pairs = tensor.data().as_chunks().0.iter();
        let mut numbers: Vec<f32> = pairs.map(|b| bf16::from_le_bytes(*b).to_f32()).collect();
        let multiplied = tied || !name.ends_with("embed_tokens.weight");
        if let ([_, inputs], true) = (tensor.shape(), multiplied) {
            numbers.chunks_mut(*inputs).flat_map(|row| row.chunks_mut(32)).for_each(round);
        }
        let numbers: Vec<u8> = numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        tensors.push((name, tensor.shape().to_vec(), numbers));
    }
    let views = tensors
        .iter()
        .map(|(name, shape, numbers)| Ok((name, TensorView::new(Stored::F32, shape.clone(), numbers)?)));
    let views: HashMap<_, _> = views.collect::<Result<_>>()?;
    Ok(serialize_to_file(views, None, &to.join("model.safetensors"))?)
}

/// Rounds a block: its largest is 127 steps, and a step is then kept as f16.
fn round(block: &mut [f32]) {
    let step = block.iter().fold(0.0, |largest: f32, x| largest.max(x.abs())) / 127.0;
    let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
    block.iter_mut().for_each(|x| *x = (*x * inverse).round() * f16::from_f32(step).to_f32());
}
