//! The demo family: every answer of both bases and all their lenses, to the last character.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;
use turret_worker::model::chat_template::ChatInput;
use turret_worker::model::weights::{BaseFolder, Dtype, Quantization};

use super::Line;
use super::engine::{greedy, load_lens, load_opened, start};

#[derive(Deserialize)]
struct Expected {
    bases: BTreeMap<String, Model>,
}

#[derive(Deserialize)]
struct Model {
    path: String,
    cases: Vec<Case>,
    #[serde(default)]
    lenses: BTreeMap<String, Model>,
}

#[derive(Deserialize)]
struct Case {
    messages: serde_json::Value,
    prompt: String,
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    text: String,
}

/// Asks both bases and every lens everything that is recorded: per base in one mixed batch, and both bases in one engine, one
/// after the other active. Their answers are sure enough (the margins of their tokens are) to be the same when the bases are
/// quantized.
pub async fn check(folder: &Path, (dtype, quantization): (Option<Dtype>, Quantization)) -> Result<Vec<Line>> {
    let expected: Expected = serde_json::from_str(&std::fs::read_to_string(folder.join("expected.json"))?)?;
    let kind = match quantization {
        Quantization::None => dtype.map_or("stored".into(), |d| d.to_string()),
        Quantization::Q8_0 => "Q8_0".into(),
    };
    let engine = start()?;
    let mut bases = BTreeMap::new();
    for (name, model) in &expected.bases {
        let path = folder.join(&model.path);
        let files = BaseFolder::open(&path, dtype)?.quantized(quantization);
        let mut base = load_opened(&engine, &path, files).await?;
        for (lens, lens_model) in &model.lenses {
            load_lens(&engine, &mut base, lens, &folder.join(&lens_model.path)).await?;
        }
        bases.insert(name, base);
    }
    let mut lines = Vec::new();
    // Twice, so that the first base is active again after the second.
    for name in expected.bases.keys().chain(expected.bases.keys()) {
        let (model, base) = (&expected.bases[name], &bases[name]);
        engine.activate(base.id).await?;
        let voices =
            std::iter::once((None, model)).chain(model.lenses.iter().map(|(n, m)| (Some(n.as_str()), m)));
        let mut asked = Vec::new();
        for (lens, voice) in voices {
            let subject = format!("demo {kind} {name}{}", lens.map_or(String::new(), |l| format!(":{l}")));
            for case in &voice.cases {
                let input = ChatInput {
                    messages: serde_json::from_str(&case.messages.to_string())?,
                    tools: None,
                    add_generation_prompt: true,
                    variables: BTreeMap::new(),
                    now: "2025-01-01T00:00:00[UTC]".parse()?,
                };
                let prompt = base.tokenizer.render_chat(&input)?;
                let ids = base.tokenizer.encode(&prompt, false)?;
                lines.push(Line::same(&subject, "prompt", &prompt, &case.prompt));
                lines.push(Line::same(&subject, "prompt ids", &ids, &case.prompt_ids));
                asked.push((subject.clone(), lens, case));
            }
        }
        let stop = base.tokenizer.stop_token_ids();
        let all =
            asked.iter().map(|(_, lens, case)| greedy(&engine, base, *lens, &case.prompt_ids, (stop, 64)));
        for ((subject, _, case), answer) in asked.iter().zip(futures::future::join_all(all).await) {
            let answer = answer?;
            lines.push(Line::same(subject, "output ids", &answer.ids, &case.output_ids));
            lines.push(Line::same(subject, "text", &answer.pieces.concat(), &case.text));
        }
    }
    engine.shutdown().await;
    Ok(lines)
}
