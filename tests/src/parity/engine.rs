//! A running engine with one folder's base and lenses, for tests.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use turret_worker::engine::Engine;
use turret_worker::engine::handle::{BaseId, EngineConfig, EngineHandle, LensId};
use turret_worker::engine::row::{FinishReason, RowEvent, RowLens, RowRequest, Sampling, TokenLogprobs};
use turret_worker::lens::lora::LoraFolder;
use turret_worker::lens::tap::{Activations, Tapped};
use turret_worker::model::config::ModelConfig;
use turret_worker::model::tokenizer::Tokenizer;
use turret_worker::model::weights::{BaseFolder, Dtype};

/// A base in an engine.
pub struct Loaded {
    /// Its id.
    pub id: BaseId,
    /// Its architecture.
    pub config: Arc<ModelConfig>,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Lenses over it, by name.
    pub lenses: BTreeMap<String, LensId>,
    /// Tokenizers that lenses bring.
    pub tokenizers: BTreeMap<String, Tokenizer>,
}

impl Loaded {
    /// What a row with this lens is spoken to through.
    pub fn tokenizer(&self, lens: Option<&str>) -> &Tokenizer {
        lens.and_then(|lens| self.tokenizers.get(lens)).unwrap_or(&self.tokenizer)
    }
}

/// What a row gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Answer {
    /// Tokens, with the stop token if one ended the row.
    pub ids: Vec<u32>,
    /// Text, piece by piece as it would have been streamed.
    pub pieces: Vec<String>,
    /// Log-probabilities of the prompt.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// What its taps read.
    pub tapped: Vec<Tapped>,
}

/// Starts an engine for the tiny models of the fixtures.
pub fn start() -> Result<EngineHandle> {
    let config = EngineConfig {
        device_bytes: 256 << 20,
        lens_bytes: 32 << 20,
        max_context_tokens: 512,
        max_running_rows: 16,
        prefill_chunk_tokens: 32,
        max_waiting_rows: 1024,
        prefix_cache: true,
    };
    Ok(Engine::start(config)?)
}

/// Loads a base, not yet active.
pub async fn load_base(engine: &EngineHandle, folder: &Path, dtype: Option<Dtype>) -> Result<Loaded> {
    load_opened(engine, folder, BaseFolder::open(folder, dtype)?).await
}

/// The same for a folder that is open.
pub async fn load_opened(engine: &EngineHandle, folder: &Path, files: BaseFolder) -> Result<Loaded> {
    let tokenizer = Tokenizer::open(folder, files.config())?;
    let region = engine.reserve_base(files.layout()).await?;
    let filled = files.fill(region, &mut |_| ControlFlow::Continue(()))?;
    let id = engine.install_base(filled).await?;
    Ok(Loaded {
        id,
        config: files.config().clone(),
        tokenizer,
        lenses: BTreeMap::new(),
        tokenizers: BTreeMap::new(),
    })
}

/// Loads a LoRA lens over a base.
pub async fn load_lens(engine: &EngineHandle, base: &mut Loaded, name: &str, folder: &Path) -> Result<()> {
    let lent = engine.lend_base(base.id).await?;
    let files = LoraFolder::open(folder, lent.layout()).with_context(|| format!("lens {name}"))?;
    let region = engine.reserve_lens(files.layout()).await?;
    if let Some(own) = files.tokenizer(&base.tokenizer)? {
        base.tokenizers.insert(name.into(), own);
    }
    let filled = files.fill(region, &lent, &mut |_| ControlFlow::Continue(()))?;
    drop(lent);
    base.lenses.insert(name.into(), engine.install_lens(base.id, filled).await?);
    Ok(())
}

/// A greedy row, optionally with a lens, to its end.
pub async fn greedy(
    engine: &EngineHandle,
    base: &Loaded,
    lens: Option<&str>,
    prompt: &[u32],
    (stop, new_tokens): (&[u32], u32),
) -> Result<Answer> {
    greedy_with(engine, base, lens, prompt, (stop, new_tokens), Activations::default()).await
}

/// The same, reading from and writing into the residual stream.
pub async fn greedy_with(
    engine: &EngineHandle,
    base: &Loaded,
    lens: Option<&str>,
    prompt: &[u32],
    (stop, new_tokens): (&[u32], u32),
    activations: Activations,
) -> Result<Answer> {
    let lenses = match lens {
        Some(name) => vec![RowLens { lens: *base.lenses.get(name).context("no such lens")?, scale: 1.0 }],
        None => Vec::new(),
    };
    let request = RowRequest {
        base: base.id,
        prompt: prompt.to_vec(),
        generated: Vec::new(),
        lenses,
        sampling: Sampling::GREEDY,
        stop_token_ids: stop.to_vec(),
        max_new_tokens: new_tokens,
        logprobs: None,
        prompt_logprobs: activations.stop_layer.is_none().then_some(0),
        activations,
        cache_salt: None,
        parent: None,
    };
    let mut stream = engine.submit(request).await?;
    let mut answer = Answer::default();
    let mut text = base.tokenizer(lens).text_stream(!stop.is_empty());
    while let Some(event) = stream.next().await {
        match event {
            RowEvent::Prompt(logprobs) => answer.prompt_logprobs = logprobs,
            RowEvent::Tapped(tapped) => answer.tapped = tapped,
            RowEvent::Token { id, .. } => {
                answer.ids.push(id);
                answer.pieces.push(text.push(id)?);
            }
            RowEvent::Finished { reason, usage } => {
                if let FinishReason::Stop { token } = reason {
                    answer.ids.push(token);
                }
                if usage.generated_tokens as usize != answer.ids.len()
                    || usage.prompt_tokens as usize != prompt.len()
                {
                    bail!("usage is {usage:?} for {} and {} tokens", prompt.len(), answer.ids.len());
                }
            }
            RowEvent::Failed(failure) => bail!("the row failed: {failure}"),
        }
    }
    answer.pieces.push(text.finish()?);
    Ok(answer)
}
