//! One case folder: a base and its plain LoRA lenses against recorded numbers.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use safetensors::SafeTensors;
use serde::Deserialize;
use turret_worker::model::chat_template::ChatInput;
use turret_worker::model::single::SingleRow;
use turret_worker::model::weights::{BaseFolder, Dtype};

use super::engine::{greedy, load_base, load_lens, start};
use super::{Line, Outcome, activations, verbalizer};

#[derive(Deserialize)]
struct Expected {
    cases: BTreeMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct Row {
    prompt: String,
    input_ids: Vec<u32>,
    greedy_ids: Vec<u32>,
    greedy_text: String,
    prompt_logprobs: Vec<f32>,
}

/// How far transformers is from its f32 numbers when it computes in bf16.
#[derive(Deserialize)]
pub(super) struct Bound {
    pub(super) root_mean_square: f64,
}

#[derive(Deserialize)]
struct Chat {
    messages: serde_json::Value,
    rendered: String,
    input_ids: Vec<u32>,
}

/// Compares everything a case folder has.
pub async fn check(folder: &Path) -> Result<Vec<Line>> {
    let case = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut lines = Vec::new();
    let model = folder.join("model");
    if let Err(error) = BaseFolder::open(&model, Some(Dtype::F32)) {
        return Ok(vec![Line::unsupported(&case, &error)]);
    }
    let text = std::fs::read_to_string(folder.join("expected.json"))?;
    let mut expected: Expected = serde_json::from_str(&text)?;
    let mut chats = BTreeMap::new();
    for name in expected.cases.keys().cloned().collect::<Vec<_>>() {
        if let Some(lens) = name.strip_suffix("chat") {
            let chat: Chat = serde_json::from_value(expected.cases.remove(&name).context("just seen")?)?;
            chats.insert(lens.trim_end_matches('.').to_owned(), chat);
        }
    }
    anyhow::ensure!(chats.contains_key(""), "no chat");
    let rows: BTreeMap<String, Vec<Row>> = expected
        .cases
        .into_iter()
        .map(|(name, rows)| Ok((name, serde_json::from_value(rows)?)))
        .collect::<Result<_>>()?;
    let numbers = std::fs::read(folder.join("expected.safetensors"))?;
    let numbers = SafeTensors::deserialize(&numbers)?;
    let tensor = |name: &str| -> Option<Vec<f32>> {
        let bytes = numbers.tensor(name).ok()?.data();
        Some(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
    };

    let mut single = SingleRow::open(&model, Some(Dtype::F32), 256)?;
    let engine = start()?;
    let mut base = load_base(&engine, &model, Some(Dtype::F32)).await?;
    engine.activate(base.id).await?;

    let bounds: BTreeMap<String, Bound> = match std::fs::read_to_string(folder.join("bf16.json")) {
        Ok(text) => serde_json::from_str(&text)?,
        Err(_) => BTreeMap::new(),
    };
    let mut rounded = SingleRow::open(&model, Some(Dtype::BF16), 256)?;
    let mut compared = 0;
    let mut served = Vec::new();
    for (name, rows) in &rows {
        let subject = if name == "base" { case.clone() } else { format!("{case}:{name}") };
        let mut lenses = Vec::new();
        if name != "base" {
            let folder = folder.join("lenses").join(name);
            match single.load_lora(&folder) {
                Ok(lens) => lenses.push((lens, 1.0)),
                Err(error) => {
                    lines.push(Line::unsupported(&subject, &error));
                    continue;
                }
            }
            load_lens(&engine, &mut base, name, &folder).await?;
        }
        for (index, row) in rows.iter().enumerate() {
            let lens = (name != "base").then_some(name.as_str());
            let ids = base.tokenizer(lens).encode(&row.prompt, false)?;
            lines.push(Line::same(&subject, "token ids", &ids, &row.input_ids[1..].to_vec()));
            let trace = single.compute(&row.input_ids, &lenses)?;
            if let Some(want) = tensor(&format!("{name}.{index}.logits")) {
                let what = format!("logits of prompt {index}");
                lines.push(Line::close(&subject, &what, &trace.logits, &want));
                if let Some(bound) = bounds.get(&format!("{name}.{index}.logits")) {
                    let got = rounded.compute(&row.input_ids, &lenses)?.logits;
                    let (subject, what) = (format!("{case} in bf16"), format!("{name}: {what}"));
                    lines.push(Line::near(&subject, &what, &got, &want, bound.root_mean_square));
                }
                compared += 1;
            }
            for (layer, hidden) in trace.hidden.iter().enumerate() {
                if let Some(want) = tensor(&format!("{name}.{index}.hidden.{layer}")) {
                    lines.push(Line::close(&subject, &format!("hidden states {layer}"), hidden, &want));
                    compared += 1;
                }
            }
            served.push((name, subject.clone(), row));
        }
    }
    let recorded =
        numbers.names().iter().filter(|n| rows.keys().any(|name| n.starts_with(&format!("{name}.")))).count();
    let skipped = lines.iter().any(|l| matches!(l.outcome, Outcome::Unsupported(_)));
    if !skipped {
        lines.push(Line::same(&case, "recorded tensors compared", &compared, &recorded));
    }

    for (lens, chat) in &chats {
        let (subject, lens) = match lens.as_str() {
            "" => (case.clone(), None),
            lens => (format!("{case}:{lens}"), Some(lens)),
        };
        let input = ChatInput {
            messages: serde_json::from_str(&chat.messages.to_string())?,
            tools: None,
            add_generation_prompt: true,
            variables: BTreeMap::new(),
            now: "2025-01-01T00:00:00[UTC]".parse()?,
        };
        let tokenizer = base.tokenizer(lens);
        let rendered = tokenizer.render_chat(&input)?;
        lines.push(Line::same(&subject, "chat rendering", &rendered, &chat.rendered));
        lines.push(Line::same(&subject, "chat ids", &tokenizer.encode(&rendered, false)?, &chat.input_ids));
    }

    // All rows of the case at once, bare and through every lens.
    let all = served.iter().map(|(name, _, row)| {
        let lens = (name.as_str() != "base").then_some(name.as_str());
        greedy(&engine, &base, lens, &row.input_ids, (&[], row.greedy_ids.len() as u32))
    });
    for ((name, subject, row), answer) in served.iter().zip(futures::future::join_all(all).await) {
        let answer = answer?;
        let lens = (name.as_str() != "base").then_some(name.as_str());
        let alone = greedy(&engine, &base, lens, &row.input_ids, (&[], row.greedy_ids.len() as u32)).await?;
        lines.push(Line::same(subject, "alone and in the batch", &alone, &answer));
        lines.push(Line::same(subject, "greedy ids", &answer.ids, &row.greedy_ids));
        lines.push(Line::same(subject, "streamed text", &answer.pieces.concat(), &row.greedy_text));
        let logprobs: Vec<f32> = answer.prompt_logprobs.iter().map(|l| l.logprob).collect();
        lines.push(Line::close(subject, "prompt logprobs", &logprobs, &row.prompt_logprobs));
    }

    let (more, checked) =
        activations::check(&case, folder, (&engine, &mut base), &mut single, &numbers).await?;
    lines.extend(more);
    let verbalizers = verbalizer::check(&case, folder, (&engine, &base), &mut single, &mut lines).await?;

    for name in lens_folders(folder)? {
        let covered = checked.contains(&name.as_str()) || verbalizers.contains(&name);
        if !rows.contains_key(&name) && !covered {
            let why = "no numbers of a plain LoRA are recorded for it".into();
            let subject = format!("{case}:{name}");
            lines.push(Line { subject, what: "load".into(), outcome: Outcome::Unsupported(why) });
        }
    }
    engine.shutdown().await;
    Ok(lines)
}

fn lens_folders(folder: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = std::fs::read_dir(folder.join("lenses"))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}
