//! Reading and writing the residual stream: the recorded hidden states through taps, and the mathematics of control
//! vectors and activation oracles (`LENS_KINDS.md` beside the reference data) through injections.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use safetensors::SafeTensors;
use serde::Deserialize;
use turret_worker::engine::handle::EngineHandle;
use turret_worker::lens::FilledLens;
use turret_worker::lens::inject::{Injection, Operation};
use turret_worker::lens::tap::{Activations, Positions, Site, Tap};
use turret_worker::model::single::SingleRow;

use super::Line;
use super::engine::{Loaded, greedy_with, load_lens};

#[derive(Deserialize)]
struct Expected {
    input_ids: Vec<u32>,
    kinds: Kinds,
}

#[derive(Deserialize)]
struct Kinds {
    control: Control,
    oracle: Oracle,
}

#[derive(Deserialize)]
struct Control {
    runs: Vec<ControlRun>,
}

#[derive(Deserialize)]
struct ControlRun {
    name: String,
    coefficient: f32,
    normalize: bool,
    greedy_ids: Vec<u32>,
}

#[derive(Deserialize)]
struct Oracle {
    runs: Vec<OracleRun>,
}

#[derive(Deserialize)]
struct OracleRun {
    target_input_ids: Vec<u32>,
    activations: String,
    donor: Option<String>,
    layer: u32,
    positions: Vec<u32>,
    prompt_ids: Vec<u32>,
    slot_positions: Vec<u32>,
    greedy_ids: Vec<u32>,
}

/// Compares what a case has recorded, and says which of its lens folders that covers.
pub async fn check(
    case: &str,
    folder: &Path,
    (engine, base): (&EngineHandle, &mut Loaded),
    single: &mut SingleRow,
    numbers: &SafeTensors<'_>,
) -> Result<(Vec<Line>, &'static [&'static str])> {
    let text = std::fs::read_to_string(folder.join("expected.json"))?;
    let recorded: serde_json::Value = serde_json::from_str(&text)?;
    let mut lines = Vec::new();
    for (index, row) in
        recorded["cases"]["base"].as_array().context("no rows of the base")?.iter().enumerate()
    {
        let ids: Vec<u32> = serde_json::from_value(row["input_ids"].clone())?;
        let name = |layer: usize| format!("base.{index}.hidden.{layer}");
        let layers: Vec<usize> =
            (0..base.config.layers).filter(|l| numbers.tensor(&name(*l)).is_ok()).collect();
        let taps =
            layers.iter().map(|&l| Tap { site: Site::In(l as u32), positions: Positions::ALL }).collect();
        let asked = Activations { taps, ..Activations::default() };
        let answer = greedy_with(engine, base, None, &ids, (&[], 0), asked).await?;
        for (layer, tapped) in layers.iter().zip(&answer.tapped) {
            let want = numbers_of(numbers, &name(*layer))?;
            lines.push(Line::close(case, &format!("tap at layer {layer}"), &tapped.vectors, &want));
        }
    }
    let kinds = folder.join("expected-lens-kinds.json");
    if !kinds.exists() {
        return Ok((lines, &[]));
    }
    let expected: Expected = serde_json::from_str(&std::fs::read_to_string(kinds)?)?;
    let bytes = std::fs::read(folder.join("expected-lens-kinds.safetensors"))?;
    let numbers = SafeTensors::deserialize(&bytes)?;
    control(case, folder, (engine, base), single, (&expected, &numbers), &mut lines).await?;
    oracle(case, folder, (engine, base), single, (&expected, &numbers), &mut lines).await?;
    Ok((lines, &["control", "oracle"]))
}

/// Control vectors: `out_N + c · v_N` at every position, with or without the length of `out_N` kept.
async fn control(
    case: &str,
    folder: &Path,
    (engine, base): (&EngineHandle, &Loaded),
    single: &mut SingleRow,
    (expected, numbers): (&Expected, &SafeTensors<'_>),
    lines: &mut Vec<Line>,
) -> Result<()> {
    let subject = format!("{case}: control vector");
    let bytes = std::fs::read(folder.join("lenses/control/control.safetensors"))?;
    let directions = SafeTensors::deserialize(&bytes)?;
    for run in &expected.kinds.control.runs {
        let scale = run.coefficient;
        let operation =
            if run.normalize { Operation::AddKeepingNorm { scale } } else { Operation::Add { scale } };
        let mut injections = Vec::new();
        for name in directions.names() {
            let layer = name.strip_prefix("direction.").context("an unknown tensor")?.parse()?;
            let (site, vectors) = (Site::Out(layer), numbers_of(&directions, name)?);
            let positions = Positions::ALL;
            injections.push(Injection { site, positions, operation, vectors, prefill_only: false });
        }
        let asked = Activations { injections, ..Activations::default() };
        let logits = single.compute_with(&expected.input_ids, &[], &asked)?.logits;
        let want = numbers_of(numbers, &format!("control.logits.{}", run.name))?;
        let last = &logits[logits.len() - want.len()..];
        lines.push(Line::close(&subject, &format!("logits of {}", run.name), last, &want));
        let new = run.greedy_ids.len() as u32;
        let answer = greedy_with(engine, base, None, &expected.input_ids, (&[], new), asked).await?;
        lines.push(Line::same(
            &subject,
            &format!("greedy ids of {}", run.name),
            &answer.ids,
            &run.greedy_ids,
        ));
    }
    Ok(())
}

/// Activation oracles: vectors read from one row, added to marked positions of another one.
async fn oracle(
    case: &str,
    folder: &Path,
    (engine, base): (&EngineHandle, &mut Loaded),
    single: &mut SingleRow,
    (expected, numbers): (&Expected, &SafeTensors<'_>),
    lines: &mut Vec<Line>,
) -> Result<()> {
    let subject = format!("{case}: oracle");
    // Without its description it is the plain LoRA that it is trained as.
    let plain = tempfile::tempdir()?;
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        std::fs::copy(folder.join("lenses/oracle").join(file), plain.path().join(file))?;
    }
    load_lens(engine, base, "oracle", plain.path()).await?;
    let lens: Vec<(Arc<FilledLens>, f32)> = vec![(single.load_lora(plain.path())?, 1.0)];
    for (index, run) in expected.kinds.oracle.runs.iter().enumerate() {
        let collect = async |lens: Option<&str>| -> Result<Vec<f32>> {
            let tap = Tap { site: Site::Out(run.layer), positions: Positions::At(run.positions.clone()) };
            let stop_layer = Some(run.layer + 1).filter(|&layer| (layer as usize) < base.config.layers);
            let asked = Activations { taps: vec![tap], injections: vec![], stop_layer };
            let ids = &run.target_input_ids;
            Ok(greedy_with(engine, base, lens, ids, (&[], 0), asked).await?.tapped.remove(0).vectors)
        };
        let vectors = match run.activations.as_str() {
            "orig" => collect(None).await?,
            "lora" => collect(run.donor.as_deref()).await?,
            _ => {
                let (with, without) = (collect(run.donor.as_deref()).await?, collect(None).await?);
                with.iter().zip(&without).map(|(a, b)| a - b).collect()
            }
        };
        let want = numbers_of(numbers, &format!("oracle.{index}.vectors"))?;
        lines.push(Line::close(&subject, &format!("vectors of run {index}"), &vectors, &want));

        let injection = Injection {
            site: Site::Out(1),
            positions: Positions::At(run.slot_positions.clone()),
            operation: Operation::AddNormMatched { scale: 1.0 },
            vectors,
            prefill_only: true,
        };
        let asked = Activations { injections: vec![injection], ..Activations::default() };
        let logits = single.compute_with(&run.prompt_ids, &lens, &asked)?.logits;
        let vocab = base.config.vocab_size;
        let last_slot = *run.slot_positions.last().context("no slots")? as usize;
        for (name, position) in [("first_logits", run.prompt_ids.len() - 1), ("last_slot_logits", last_slot)]
        {
            let want = numbers_of(numbers, &format!("oracle.{index}.{name}"))?;
            let got = &logits[position * vocab..(position + 1) * vocab];
            lines.push(Line::close(&subject, &format!("{name} of run {index}"), got, &want));
        }
        let new = run.greedy_ids.len() as u32;
        let answer = greedy_with(engine, base, Some("oracle"), &run.prompt_ids, (&[], new), asked).await?;
        lines.push(Line::same(&subject, &format!("greedy ids of run {index}"), &answer.ids, &run.greedy_ids));
    }
    Ok(())
}

fn numbers_of(file: &SafeTensors<'_>, name: &str) -> Result<Vec<f32>> {
    let tensor = file.tensor(name).with_context(|| format!("no tensor {name}"))?;
    Ok(tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}
