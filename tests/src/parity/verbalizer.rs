//! The decoder of verbalizers, as a row: a prompt of embeddings, and projections of one read vector over its marked position,
//! one per block. Recorded from the original research code.
//!
//! The logits after the prompt and the first token are compared. What was recorded of later tokens follows from the first
//! one alone, whatever was read: the original code goes on without the prompt's keys and values there.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use futures::future::join_all;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use turret_worker::engine::handle::EngineHandle;
use turret_worker::lens::inject::{Injection, Operation, Projection};
use turret_worker::lens::tap::{Activations, Positions, Site, Tap};
use turret_worker::model::single::SingleRow;

use super::Line;
use super::engine::{Loaded, greedy_with};

#[derive(Deserialize)]
struct Expected {
    input_ids: Vec<u32>,
    lenses: BTreeMap<String, Vec<Row>>,
}

#[derive(Deserialize)]
struct Row {
    position: u32,
    explanation_ids: Vec<u32>,
    first_logits_head: Vec<f32>,
}

/// `verbalizer.json` of a lens.
#[derive(Deserialize)]
struct Config {
    /// The block after which vectors are read.
    layer: u32,
    decoder: Decoder,
}

#[derive(Deserialize)]
struct Decoder {
    /// Which of the projections is the first block's.
    projection_offset: usize,
}

/// Compares every recorded explanation of every verbalizer of a case, and names the lenses.
pub async fn check(
    case: &str,
    folder: &Path,
    (engine, base): (&EngineHandle, &Loaded),
    single: &mut SingleRow,
    lines: &mut Vec<Line>,
) -> Result<Vec<String>> {
    let Ok(text) = std::fs::read_to_string(folder.join("verbalizer.json")) else { return Ok(Vec::new()) };
    let expected: Expected = serde_json::from_str(&text)?;
    let mut names = Vec::new();
    for (lens, rows) in &expected.lenses {
        let name = format!("verbalizer-{lens}");
        let lens = folder.join("lenses").join(&name);
        let config: Config = serde_json::from_str(&std::fs::read_to_string(lens.join("verbalizer.json"))?)?;
        let bytes = std::fs::read(lens.join("verbalizer.safetensors"))?;
        let tensors = SafeTensors::deserialize(&bytes)?;
        let read = read_vectors(engine, base, &expected.input_ids, config.layer).await?;
        let width = base.config.hidden_size;
        let subject = format!("{case}:{name}");
        let mut prompts = Vec::new();
        for row in rows {
            let vector = &read[row.position as usize * width..][..width];
            let prompt = prompt(base, &config, &tensors, vector)?;
            let logits = single.compute_with(&prompt.0, &[], &prompt.1)?.logits;
            let last = &logits[logits.len() - base.config.vocab_size..][..row.first_logits_head.len()];
            // The original code reads the head before its soft cap.
            let cap = |x: &f32| base.config.final_soft_cap.map_or(*x, |cap| cap * (x / cap).tanh());
            let want: Vec<f32> = row.first_logits_head.iter().map(cap).collect();
            lines.push(Line::close(&subject, &format!("logits at position {}", row.position), last, &want));
            prompts.push(prompt);
        }
        let answers = join_all(prompts.into_iter().zip(rows).map(|((ids, asked), row)| async move {
            anyhow::ensure!(!row.explanation_ids.is_empty(), "nothing is recorded of {}", row.position);
            greedy_with(engine, base, None, &ids, (&[], 1), asked).await
        }));
        for (answer, row) in answers.await.into_iter().zip(rows) {
            let what = format!("first token at position {}", row.position);
            lines.push(Line::same(&subject, &what, &answer?.ids.first(), &row.explanation_ids.first()));
        }
        names.push(name);
    }
    Ok(names)
}

async fn read_vectors(engine: &EngineHandle, base: &Loaded, ids: &[u32], layer: u32) -> Result<Vec<f32>> {
    let tap = Tap { site: Site::Out(layer), positions: Positions::ALL };
    let stop_layer = Some(layer + 1).filter(|&layer| (layer as usize) < base.config.layers);
    let asked = Activations { taps: vec![tap], injections: vec![], stop_layer };
    Ok(greedy_with(engine, base, None, ids, (&[], 0), asked).await?.tapped.remove(0).vectors)
}

/// Placeholders for the prompt's tokens, and what is written over them: the embeddings beside the marked position, and there
/// what each patched block reads.
fn prompt(
    base: &Loaded,
    config: &Config,
    tensors: &SafeTensors<'_>,
    vector: &[f32],
) -> Result<(Vec<u32>, Activations)> {
    let width = base.config.hidden_size;
    let [left, right, weights, biases] = ["prompt_left_emb", "prompt_right_emb", "proj_weight", "proj_bias"]
        .map(|name| numbers(tensors, name));
    let (left, right, weights, biases) = (left?, right?, weights?, biases?);
    // Embeddings are scaled where the architecture scales them; what is written to a block is not.
    let scale = if base.config.scale_embedding { (width as f32).sqrt() } else { 1.0 };
    let marked = (left.len() / width) as u32;
    let length = marked + 1 + (right.len() / width) as u32;
    let written = |site, positions, vectors| Injection {
        site,
        positions,
        operation: Operation::Replace,
        vectors,
        prefill_only: true,
    };
    let beside = (0..length).filter(|&position| position != marked).collect();
    let embeddings = left.iter().chain(&right).map(|x| x * scale).collect();
    let mut injections = vec![written(Site::In(0), Positions::At(beside), embeddings)];
    let projections = weights.chunks_exact(width * width).zip(biases.chunks_exact(width));
    for (layer, (weight, bias)) in projections.skip(config.decoder.projection_offset).enumerate() {
        let projected = Projection { weight, bias: Some(bias) }.of(vector);
        injections.push(written(Site::In(layer as u32), Positions::At(vec![marked]), projected));
    }
    Ok((vec![0; length as usize], Activations { injections, ..Activations::default() }))
}

fn numbers(tensors: &SafeTensors<'_>, name: &str) -> Result<Vec<f32>> {
    let tensor = tensors.tensor(&format!("decoder.{name}")).with_context(|| format!("no tensor {name}"))?;
    anyhow::ensure!(tensor.dtype() == Dtype::BF16, "{name} is {:?}", tensor.dtype());
    Ok(tensor.data().as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect())
}
