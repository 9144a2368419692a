//! Properties of the running engine, on small random models made in memory: a batch means nothing, nothing is left behind.

mod cancels;
mod preempted;
mod prefix;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use futures::executor::block_on;
use futures::future::join_all;
use half::{bf16, f16};
use proptest::prelude::*;
use serde_json::json;

use super::handle::*;
use super::row::*;
use super::{Engine, memory};
use crate::lens::FilledLens;
use crate::lens::inject::{Injection, Operation};
use crate::lens::lora::LoraFolder;
use crate::lens::tap::{ActivationError, Activations, Positions, Site, Tap, Tapped};
use crate::model::config::ModelConfig;
use crate::model::tensor_file::tests::write;
use crate::model::weights::{BaseLayout, Dtype, FilledBase, PackedMatrix, Quantization};

const VOCAB: u32 = 67;
const WIDTH: usize = 36;

/// A small architecture whose widths fit no vector, with everything that the published ones have. Windows and long
/// contexts begin inside of what the rows below reach.
fn config(name: &str) -> Arc<ModelConfig> {
    let mut text = json!({
        "architectures": [name], "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10, "vocab_size": VOCAB,
        "max_position_embeddings": 160, "tie_word_embeddings": name != "LlamaForCausalLM",
    });
    let more = match name {
        "MistralForCausalLM" => json!({"sliding_window": 21}),
        "Gemma2ForCausalLM" => json!({"sliding_window": 16, "query_pre_attn_scalar": 7}),
        "Gemma3ForCausalLM" => json!({"sliding_window": 3, "sliding_window_pattern": 2}),
        "Phi3ForCausalLM" => {
            json!({"original_max_position_embeddings": 44, "rope_scaling": {"type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.4, 2.0], "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0]}})
        }
        _ => json!({}),
    };
    let more = more.as_object().unwrap().clone();
    text.as_object_mut().unwrap().extend(more);
    Arc::new(ModelConfig::parse(&text.to_string()).unwrap())
}

/// Numbers between -1 and 1 that follow from a seed.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as f32 / (1u64 << 30) as f32) - 1.0
    }

    fn fill(&mut self, bytes: &mut [u8], dtype: Dtype, scale: f32) {
        for element in bytes.chunks_exact_mut(dtype.bytes()) {
            let x = self.next() * scale;
            match dtype {
                Dtype::F32 => element.copy_from_slice(&x.to_le_bytes()),
                Dtype::BF16 => element.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
                Dtype::F16 => element.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
            }
        }
    }
}

fn limits(layout: &BaseLayout, chunk: u32, rows: u32, spare_blocks: u32) -> EngineConfig {
    limits_to(128, layout, chunk, rows, spare_blocks)
}

/// Tokens of a row that is still far from its end when a test has sent its next few commands.
const LONG: u32 = 1 << 14;

/// A base whose rows may be that long.
fn long_layout() -> BaseLayout {
    let config =
        ModelConfig { max_position_embeddings: LONG as usize, ..(*config("LlamaForCausalLM")).clone() };
    BaseLayout::of(&Arc::new(config), Dtype::F32)
}

fn limits_to(context: u32, layout: &BaseLayout, chunk: u32, rows: u32, spare_blocks: u32) -> EngineConfig {
    let mut limits = EngineConfig {
        device_bytes: 0,
        lens_bytes: 1 << 20,
        max_context_tokens: context,
        max_running_rows: rows,
        prefill_chunk_tokens: chunk,
        max_waiting_rows: 2048,
        prefix_cache: true,
    };
    let needs = memory::BaseNeeds::of(&layout.config, layout.dtype, &limits);
    let blocks = u64::from(needs.min_blocks + spare_blocks) * needs.block_bytes;
    limits.device_bytes = layout.bytes + limits.lens_bytes + needs.workspace_bytes + blocks;
    limits
}

async fn install(engine: &EngineHandle, layout: &BaseLayout, seed: u64) -> BaseId {
    let mut region = engine.reserve_base(layout).await.unwrap();
    let mut noise = Noise(seed);
    // All as matrices of the layout's dtype first, then the vectors in f32.
    noise.fill(region.bytes_mut(), layout.dtype, 0.35);
    if layout.quantization == Quantization::Q8_0 {
        let matrices = layout.layers.iter().flat_map(|l| [l.qkv, l.o, l.gate_up, l.down]);
        for PackedMatrix { offset, shape } in matrices.chain([layout.head]) {
            let mut rows = vec![0; shape.outputs * shape.inputs * shape.row_dtype().bytes()];
            noise.fill(&mut rows, shape.row_dtype(), 0.35);
            shape.pack(0, &rows, &mut region.bytes_mut()[offset..][..shape.bytes()]);
        }
    }
    let vectors = layout.layers.iter().flat_map(|l| {
        let norms =
            [Some(l.attention_norm), Some(l.mlp_norm), l.qkv_bias, l.o_bias, l.down_bias, l.gate_up_bias];
        let outer = [l.post_attention_norm, l.post_mlp_norm];
        norms.into_iter().chain(outer).flatten().chain(l.qk_norm.into_iter().flat_map(|(q, k)| [q, k]))
    });
    for vector in vectors.chain([layout.final_norm]) {
        noise.fill(&mut region.bytes_mut()[vector.offset..][..vector.len * 4], Dtype::F32, 1.0);
    }
    engine.install_base(FilledBase::new(layout.clone(), region)).await.unwrap()
}

/// Writes a LoRA lens with random tensors.
fn write_lens(dir: &Path, config: &ModelConfig, seed: u64) {
    let rank = 3 + (seed % 5) as usize;
    let targets =
        if seed.is_multiple_of(2) { json!(["q_proj", "v_proj", "down_proj"]) } else { json!("all-linear") };
    let adapter = json!({"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets});
    std::fs::write(dir.join("adapter_config.json"), adapter.to_string()).unwrap();
    let dtype = if seed.is_multiple_of(3) { Dtype::BF16 } else { Dtype::F32 };
    let mut noise = Noise(seed);
    let mut tensors = BTreeMap::new();
    for layer in 0..config.layers {
        for module in crate::model::lora::modules(config) {
            let short = module.name.rsplit('.').next().unwrap();
            if seed.is_multiple_of(2) && !["q_proj", "v_proj", "down_proj"].contains(&short) {
                continue;
            }
            for (matrix, rows, columns) in [('A', rank, module.inputs), ('B', module.outputs, rank)] {
                let name =
                    format!("base_model.model.model.layers.{layer}.{}.lora_{matrix}.weight", module.name);
                let mut bytes = vec![0; rows * columns * dtype.bytes()];
                noise.fill(&mut bytes, dtype, 0.4);
                tensors.insert(name, (dtype, vec![rows, columns], bytes));
            }
        }
    }
    write(&dir.join("adapter_model.safetensors"), &tensors);
}

/// Writes and loads such a lens.
async fn load_lens(engine: &EngineHandle, base: BaseId, config: &ModelConfig, seed: u64) -> LensId {
    let filled = fill_lens(engine, base, config, seed).await;
    engine.install_lens(base, filled).await.unwrap()
}

async fn fill_lens(engine: &EngineHandle, base: BaseId, config: &ModelConfig, seed: u64) -> FilledLens {
    let dir = tempfile::tempdir().unwrap();
    write_lens(dir.path(), config, seed);
    let lent = engine.lend_base(base).await.unwrap();
    let folder = LoraFolder::open(dir.path(), lent.layout()).unwrap();
    let region = engine.reserve_lens(folder.layout()).await.unwrap();
    folder.fill(region, &lent, &mut |_| ControlFlow::Continue(())).unwrap()
}

/// A row before it is known which ids its base and lenses have.
#[derive(Debug, Clone)]
struct Ask {
    prompt: Vec<u32>,
    lenses: Vec<(usize, f32)>,
    new: u32,
    temperature: f32,
    seed: u64,
    /// Whether the log-probabilities of its prompt are asked for.
    scores: bool,
    touch: Touch,
}

/// What a row does to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Touch {
    Nothing,
    Reads,
    Writes(Operation),
    /// Reads after one of the two blocks and leaves.
    Leaves,
}

impl Touch {
    fn activations(self, prompt: usize, seed: u64) -> Activations {
        let some = Positions::At((0..prompt as u32).step_by(3).collect());
        let tap = |site, positions| Tap { site, positions };
        let taps = vec![tap(Site::In(0), Positions::ALL), tap(Site::Out(0), some.clone())];
        match self {
            Self::Nothing => Activations::default(),
            Self::Reads => {
                let last = tap(Site::Out(1), Positions::From(prompt as u32 / 2));
                Activations { taps: [taps, vec![last]].concat(), ..Activations::default() }
            }
            Self::Writes(operation) => {
                let mut noise = Noise(seed);
                let mut vectors = |count: usize| (0..count * WIDTH).map(|_| noise.next()).collect::<Vec<_>>();
                let injection = |site, positions, vectors, prefill_only| Injection {
                    site,
                    positions,
                    operation,
                    vectors,
                    prefill_only,
                };
                let each = vectors(prompt.div_ceil(3));
                let injections = vec![
                    injection(Site::In(0), Positions::ALL, vectors(1), true),
                    injection(Site::Out(0), some, each, false),
                    injection(Site::Out(1), Positions::From(prompt as u32 - 1), vectors(1), false),
                ];
                Activations { taps, injections, stop_layer: None }
            }
            Self::Leaves => Activations { taps, injections: vec![], stop_layer: Some(1) },
        }
    }
}

impl Ask {
    fn request(&self, base: BaseId, lenses: &[LensId]) -> RowRequest {
        // A row that leaves has no logits.
        let leaves = self.touch == Touch::Leaves;
        RowRequest {
            base,
            prompt: self.prompt.clone(),
            generated: Vec::new(),
            lenses: self.lenses.iter().map(|&(i, scale)| RowLens { lens: lenses[i], scale }).collect(),
            sampling: Sampling {
                temperature: self.temperature,
                seed: self.seed,
                top_p: 0.95,
                ..Sampling::GREEDY
            },
            stop_token_ids: vec![5],
            max_new_tokens: if leaves { 0 } else { self.new },
            logprobs: Some(2),
            prompt_logprobs: (self.scores && !leaves).then_some(1),
            activations: self.touch.activations(self.prompt.len(), self.seed),
            cache_salt: None,
            parent: None,
        }
    }
}

fn ask() -> impl Strategy<Value = Ask> {
    let lenses =
        prop::sample::select(vec![vec![], vec![(0, 1.0)], vec![(1, 0.5)], vec![(0, -0.75), (1, 1.0)]]);
    // Many begin alike, for some blocks.
    let stem = (prop::sample::select(vec![1, 2]), 0usize..60);
    let rest = prop::collection::vec(0..VOCAB, 1..30);
    let prompt = (stem, rest).prop_map(|((stem, length), rest)| {
        let mut noise = Noise(stem);
        let stem = (0..length).map(|_| ((noise.next() + 1.0) * 33.0) as u32);
        stem.chain(rest).take(69).collect::<Vec<_>>()
    });
    let touches = vec![
        Touch::Nothing,
        Touch::Nothing,
        Touch::Nothing,
        Touch::Nothing,
        Touch::Nothing,
        Touch::Reads,
        Touch::Leaves,
        Touch::Writes(Operation::Replace),
        Touch::Writes(Operation::Add { scale: 0.7 }),
        Touch::Writes(Operation::AddNormMatched { scale: -0.5 }),
        Touch::Writes(Operation::AddKeepingNorm { scale: 2.0 }),
    ];
    let touch = prop::sample::select(touches);
    let temperature = prop::sample::select(vec![0.0, 0.9]);
    (prompt, lenses, 0u32..40, temperature, any::<u64>(), prop::bool::weighted(0.3), touch).prop_map(
        |(prompt, lenses, new, temperature, seed, scores, touch)| Ask {
            prompt,
            lenses,
            new,
            temperature,
            seed,
            scores,
            touch,
        },
    )
}

/// Everything a row reported, but for what it found in the cache. Its f32 numbers are compared as they are: equal means equal bits
/// here, as none is zero or NaN.
async fn run(engine: &EngineHandle, request: RowRequest) -> Vec<RowEvent> {
    let mut stream = engine.submit(request).await.unwrap();
    let mut events = Vec::new();
    while let Some(event) = stream.next().await {
        events.push(event);
    }
    match events.last_mut() {
        Some(RowEvent::Finished { usage, .. }) => usage.cached_tokens = 0,
        other => panic!("the row did not finish: {other:?}"),
    }
    events
}

/// What rows report that come in the same moment, before any of them is computed.
async fn at_once(
    engine: &EngineHandle,
    requests: impl IntoIterator<Item = RowRequest>,
) -> Vec<Vec<RowEvent>> {
    let hold = engine.hold().await;
    let mut all = join_all(requests.into_iter().map(|request| run(engine, request)));
    assert!(futures::poll!(&mut all).is_pending());
    drop(hold);
    all.await
}

/// The engine after the step that is being computed.
async fn settled(engine: &EngineHandle) -> Snapshot {
    // Any command is answered between two steps.
    let _ = engine.remove_lens(LensId(0)).await;
    engine.snapshot()
}

/// The rows in an engine of its own: all at once, or one after the other. With what it looked like at the end.
fn answers(
    layout: &BaseLayout,
    limits: EngineConfig,
    asks: &[&Ask],
    together: bool,
) -> (Vec<Vec<RowEvent>>, Snapshot) {
    block_on(async {
        let engine = Engine::start(limits).unwrap();
        let base = install(&engine, layout, 7).await;
        engine.activate(base).await.unwrap();
        let lenses = [
            load_lens(&engine, base, &layout.config, 2).await,
            load_lens(&engine, base, &layout.config, 3).await,
        ];
        let requests = asks.iter().map(|ask| ask.request(base, &lenses));
        let answers = if together {
            let first = at_once(&engine, requests.clone()).await;
            // Again, with what is kept of the first time.
            assert_eq!(at_once(&engine, requests).await, first);
            first
        } else {
            let mut answers = Vec::new();
            for request in requests {
                answers.push(run(&engine, request).await);
            }
            answers
        };
        let end = settled(&engine).await;
        assert_eq!(end.kv_blocks_free, end.kv_blocks_total);
        engine.shutdown().await;
        (answers, end)
    })
}

fn rows_are_the_same_in_any_batch(name: &str, dtype: Dtype) {
    rows_over_a_base_are_the_same(&BaseLayout::of(&config(name), dtype));
}

fn rows_over_a_base_are_the_same(layout: &BaseLayout) {
    let strategy = (
        prop::collection::vec(ask(), 2..9),
        any::<u64>(),
        prop::sample::select(vec![1u32, 3, 16, 40, 128]),
        2u32..9,
        0u32..12,
    );
    let (preemptions, cached) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let mut runner =
        proptest::test_runner::TestRunner::new(ProptestConfig { cases: 24, ..Default::default() });
    runner
        .run(&strategy, |(asks, order, chunk, rows, spare)| {
            // Alone a row computes everything itself.
            let alone = EngineConfig { prefix_cache: false, ..limits(layout, 128, 1, 0) };
            let (alone, _) = answers(layout, alone, &asks.iter().collect::<Vec<_>>(), false);
            let mut mixed: Vec<usize> = (0..asks.len()).collect();
            mixed.sort_by_key(|&i| order.rotate_left(i as u32 * 7) ^ i as u64);
            let shuffled: Vec<&Ask> = mixed.iter().map(|&i| &asks[i]).collect();
            let (together, end) = answers(layout, limits(layout, chunk, rows, spare), &shuffled, true);
            preemptions.set(preemptions.get() + end.preemptions_total);
            cached.set(cached.get() + end.prefix_cached_tokens_total);
            for (answer, &i) in together.iter().zip(&mixed) {
                prop_assert_eq!(answer, &alone[i]);
            }
            Ok(())
        })
        .unwrap();
    assert!(preemptions.get() > 0, "the schedules were so easy that no row stepped back");
    assert!(cached.get() > 0, "no row found anything of another's");
}

#[test]
fn rows_are_the_same_in_any_batch_in_f32() {
    rows_are_the_same_in_any_batch("LlamaForCausalLM", Dtype::F32);
}

#[test]
fn rows_are_the_same_in_any_batch_in_bf16() {
    rows_are_the_same_in_any_batch("Qwen2ForCausalLM", Dtype::BF16);
}

#[test]
fn rows_are_the_same_in_any_batch_in_f16() {
    rows_are_the_same_in_any_batch("Qwen3ForCausalLM", Dtype::F16);
}

#[test]
fn rows_are_the_same_in_any_batch_over_a_quantized_base() {
    // With an embedding of its own, and one that is read out of the quantized head.
    for (name, dtype) in [("LlamaForCausalLM", Dtype::BF16), ("Gemma2ForCausalLM", Dtype::F32)] {
        rows_over_a_base_are_the_same(&BaseLayout::of(&config(name), dtype).quantized(Quantization::Q8_0));
    }
}

#[test]
fn rows_are_the_same_in_any_batch_through_sliding_windows() {
    rows_are_the_same_in_any_batch("MistralForCausalLM", Dtype::F32);
    rows_are_the_same_in_any_batch("Gemma2ForCausalLM", Dtype::BF16);
    rows_are_the_same_in_any_batch("Gemma3ForCausalLM", Dtype::F32);
}

#[test]
fn rows_are_the_same_in_any_batch_while_they_grow_beyond_the_original_context() {
    rows_are_the_same_in_any_batch("Phi3ForCausalLM", Dtype::F32);
}

#[test]
fn a_row_that_outgrows_the_original_context_is_rotated_anew() {
    let layout = BaseLayout::of(&config("Phi3ForCausalLM"), Dtype::F32);
    block_on(async {
        let engine = Engine::start(limits(&layout, 16, 4, 8)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let mut request = some_ask(4, vec![], 40).request(base, &[]);
        request.stop_token_ids.clear();
        let events = run(&engine, request.clone()).await;
        let ids: Vec<u32> = events.iter().filter_map(token).collect();
        // What was generated beyond 44 tokens is what a prompt of the same tokens goes on with.
        for known in [23, 24, 25, 26, 39] {
            let mut prompt = request.prompt.clone();
            prompt.extend(&ids[..known]);
            let again = RowRequest { prompt, max_new_tokens: 1, ..request.clone() };
            let again = run(&engine, again).await;
            assert_eq!(again.iter().find_map(token), Some(ids[known]), "after {known} tokens");
            let with_logprobs = |events: &[RowEvent], index: usize| {
                events.iter().filter(|e| token(e).is_some()).nth(index).cloned().unwrap()
            };
            assert_eq!(with_logprobs(&again, 0), with_logprobs(&events, known));
        }
        engine.shutdown().await;
    });
}

fn token(event: &RowEvent) -> Option<u32> {
    match event {
        RowEvent::Token { id, .. } => Some(*id),
        _ => None,
    }
}

fn some_ask(seed: u64, lenses: Vec<(usize, f32)>, new: u32) -> Ask {
    let mut noise = Noise(seed);
    let prompt = (0..20).map(|_| ((noise.next() + 1.0) * 30.0) as u32 + 6).collect();
    Ask { prompt, lenses, new, temperature: 0.0, seed, scores: true, touch: Touch::Nothing }
}

fn tapped(events: &[RowEvent]) -> &[Tapped] {
    events
        .iter()
        .find_map(|event| if let RowEvent::Tapped(tapped) = event { Some(&tapped[..]) } else { None })
        .unwrap()
}

#[test]
fn what_was_read_and_is_written_back_changes_nothing() {
    let layout = BaseLayout::of(&config("Gemma2ForCausalLM"), Dtype::BF16);
    block_on(async {
        let engine = Engine::start(limits(&layout, 7, 4, 8)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let lens = load_lens(&engine, base, &layout.config, 3).await;
        let mut plain = some_ask(9, vec![(0, 1.0)], 20).request(base, &[lens]);
        plain.stop_token_ids.clear();
        let sites = [Site::In(0), Site::Out(0), Site::Out(1)];
        let taps: Vec<Tap> = sites.map(|site| Tap { site, positions: Positions::ALL }).to_vec();
        let reads =
            RowRequest { activations: Activations { taps, ..Activations::default() }, ..plain.clone() };
        let before = run(&engine, plain.clone()).await;
        let mut read = run(&engine, reads).await;
        let vectors = tapped(&read).to_vec();
        read.retain(|event| !matches!(event, RowEvent::Tapped(_)));
        assert_eq!(read, before, "reading changes nothing");
        // Twenty tokens of the prompt and nineteen generated ones were computed.
        assert!(
            vectors
                .iter()
                .all(|t| t.positions == (0..39).collect::<Vec<_>>() && t.vectors.len() == 39 * WIDTH)
        );

        let back = |positions: std::ops::Range<u32>, change: f32| {
            let injections = sites.into_iter().zip(&vectors).map(|(site, read)| Injection {
                site,
                positions: Positions::At(positions.clone().collect()),
                operation: Operation::Replace,
                vectors: read.vectors[positions.start as usize * WIDTH..positions.end as usize * WIDTH]
                    .iter()
                    .map(|x| x + change)
                    .collect(),
                prefill_only: false,
            });
            Activations { injections: injections.collect(), ..Activations::default() }
        };
        for positions in [0..39, 3..5, 38..39] {
            let same = RowRequest { activations: back(positions.clone(), 0.0), ..plain.clone() };
            assert_eq!(run(&engine, same).await, before, "{positions:?}");
            let other = RowRequest { activations: back(positions.clone(), 0.5), ..plain.clone() };
            assert_ne!(run(&engine, other).await, before, "{positions:?}");
        }
        // Embeddings as input: which tokens stand in their places says nothing.
        let mut embedded = RowRequest { activations: back(0..20, 0.0), ..plain.clone() };
        embedded.activations.injections.truncate(1);
        embedded.prompt = vec![1; 20];
        embedded.prompt_logprobs = None;
        let answer: Vec<_> = run(&engine, embedded).await.iter().filter_map(token).collect();
        assert_eq!(answer, before.iter().filter_map(token).collect::<Vec<_>>());
        engine.shutdown().await;
    });
}

#[test]
fn a_row_that_leaves_early_has_read_what_it_would_have_read() {
    let layout = BaseLayout::of(&config("LlamaForCausalLM"), Dtype::F32);
    block_on(async {
        let engine = Engine::start(limits(&layout, 64, 4, 8)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let taps = vec![Tap { site: Site::Out(0), positions: Positions::At(vec![2, 19]) }];
        let whole = RowRequest {
            max_new_tokens: 0,
            prompt_logprobs: None,
            activations: Activations { taps, ..Activations::default() },
            ..some_ask(5, vec![], 0).request(base, &[])
        };
        let mut early = whole.clone();
        early.activations.stop_layer = Some(1);
        let beside = some_ask(6, vec![], 5).request(base, &[]);
        let mut beats = Vec::new();
        for request in [&early, &whole] {
            settled(&engine).await;
            let before = engine.heartbeat();
            run(&engine, request.clone()).await;
            settled(&engine).await;
            beats.push(engine.heartbeat() - before);
        }
        assert_eq!(beats[0] + 1, beats[1], "one of two blocks was computed, after the same commands");
        let alone = run(&engine, early.clone()).await;
        let mixed = join_all([&early, &beside, &whole, &early].map(|row| run(&engine, row.clone()))).await;
        assert_eq!((&mixed[0], &mixed[3]), (&alone, &alone));
        assert_eq!(tapped(&mixed[2]), tapped(&alone));
        assert_eq!(mixed[1], run(&engine, beside.clone()).await);
        assert_eq!(tapped(&alone)[0].positions, [2, 19]);

        early.max_new_tokens = 1;
        let refused = engine.submit(early).await.unwrap_err();
        assert_eq!(refused, SubmitError::Activations(ActivationError::NoLogits));
        engine.shutdown().await;
    });
}

#[test]
fn a_lens_loaded_again_gives_the_same_bits() {
    let layout = BaseLayout::of(&config("Qwen2ForCausalLM"), Dtype::BF16);
    block_on(async {
        let engine = Engine::start(limits(&layout, 32, 4, 8)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let ask = some_ask(9, vec![(0, 1.0)], 20);
        let first = load_lens(&engine, base, &layout.config, 3).await;
        let before = run(&engine, ask.request(base, &[first])).await;
        let other = load_lens(&engine, base, &layout.config, 4).await;
        assert!(engine.remove_lens(first).await.unwrap() > 0);
        assert_ne!(run(&engine, ask.request(base, &[other])).await, before, "the lens does something");
        assert_eq!(
            engine.submit(ask.request(base, &[first])).await.unwrap_err(),
            SubmitError::UnknownLens(first)
        );
        let again = load_lens(&engine, base, &layout.config, 3).await;
        assert_eq!(run(&engine, ask.request(base, &[again])).await, before);
        engine.shutdown().await;
    });
}

#[test]
fn a_lens_in_use_stays_until_its_last_row_ends() {
    let layout = long_layout();
    block_on(async {
        let engine = Engine::start(limits_to(LONG, &layout, 32, 4, 8)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let lens = load_lens(&engine, base, &layout.config, 3).await;
        let bytes = engine.snapshot().arena.lens_bytes;
        let mut request = some_ask(3, vec![(0, 1.0)], LONG - 64).request(base, &[lens]);
        request.stop_token_ids.clear();
        let row = engine.submit(request.clone()).await.unwrap();
        match engine.remove_lens(lens).await {
            Err(RemoveError::InUse { rows: 1 }) => {}
            other => panic!("{other:?}"),
        }
        let retired = engine.retire_lens(lens);
        futures::pin_mut!(retired);
        assert!(futures::poll!(retired.as_mut()).is_pending());
        drop(row);
        assert_eq!(retired.await, Ok(bytes));
        assert_eq!(engine.snapshot().arena.lens_bytes, 0);
        assert!(matches!(engine.submit(request).await, Err(SubmitError::UnknownLens(_))));
        engine.shutdown().await;
    });
}

#[test]
fn a_second_base_takes_cache_that_running_rows_do_not_need() {
    let layout = BaseLayout::of(&config("LlamaForCausalLM"), Dtype::F32);
    block_on(async {
        // Room for a second base only where the cache is now; the rows below hold twenty blocks at most.
        let mut limits = limits(&layout, 32, 6, 12);
        limits.device_bytes += layout.bytes + 4096;
        let engine = Engine::start(limits.clone()).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let asks: Vec<Ask> = (0..4).map(|seed| some_ask(seed, vec![], 60)).collect();
        let quiet = join_all(asks.iter().map(|ask| run(&engine, ask.request(base, &[])))).await;
        let full = engine.snapshot().kv_blocks_total;

        // Two rows take the lowest blocks first and go, so that the others hold blocks beyond the cache that is left.
        let mut early = Vec::new();
        for seed in 0..2 {
            let prompt = vec![seed; 100];
            let request = RowRequest {
                prompt,
                stop_token_ids: vec![],
                max_new_tokens: 28,
                ..asks[0].request(base, &[])
            };
            early.push(engine.submit(request).await.unwrap());
        }
        let mut running = Vec::new();
        for ask in &asks {
            running.push(engine.submit(ask.request(base, &[])).await.unwrap());
        }
        let first = running[3].next().await.unwrap();
        drop(early);
        let other = install(&engine, &layout, 2).await;
        let shrunk = engine.snapshot();
        assert!(shrunk.kv_blocks_total < full);
        assert!(
            shrunk.arena.base_bytes + shrunk.arena.kv_bytes + shrunk.workspace_bytes + limits.lens_bytes
                <= limits.device_bytes
        );
        let mut disturbed: Vec<Vec<RowEvent>> = Vec::new();
        for (index, mut row) in running.into_iter().enumerate() {
            let mut events = if index == 3 { vec![first.clone()] } else { vec![] };
            while let Some(event) = row.next().await {
                events.push(event);
            }
            disturbed.push(events);
        }
        assert_eq!(disturbed, quiet);

        // A third does not fit, and says by how much; the second is a pointer change away, and back.
        let ReserveError::ArenaFull(short) = engine.reserve_base(&layout).await.unwrap_err() else {
            panic!()
        };
        assert!(short.short_by_bytes > 0 && short.short_by_bytes <= layout.bytes);
        engine.activate(other).await.unwrap();
        assert_eq!(engine.submit(asks[0].request(base, &[])).await.unwrap_err(), SubmitError::BaseNotActive);
        assert_ne!(run(&engine, asks[0].request(other, &[])).await, quiet[0]);
        engine.activate(base).await.unwrap();
        assert_eq!(run(&engine, asks[0].request(base, &[])).await, quiet[0]);
        assert_eq!(engine.remove_base(other).await, Ok(layout.bytes));
        assert_eq!(run(&engine, asks[0].request(base, &[])).await, quiet[0]);
        assert_eq!(engine.snapshot().kv_blocks_total, full, "what was freed is cache again");
        engine.shutdown().await;
    });
}

#[test]
fn what_does_not_fit_is_refused_with_numbers() {
    let layout = BaseLayout::of(&config("LlamaForCausalLM"), Dtype::F32);
    block_on(async {
        let fitting = limits(&layout, 32, 4, 0);
        let short = EngineConfig { device_bytes: fitting.device_bytes - 100, ..fitting.clone() };
        let engine = Engine::start(short).unwrap();
        let ReserveError::TooLarge(error) = engine.reserve_base(&layout).await.unwrap_err() else { panic!() };
        assert_eq!(error.short_by_bytes, 100);
        assert!(error.why.contains("128 tokens"), "{error}");
        // More memory, live.
        engine.reconfigure(fitting.clone()).await.unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let less = EngineConfig { device_bytes: fitting.device_bytes - 1, ..fitting.clone() };
        assert!(
            matches!(engine.reconfigure(less).await, Err(ChangeError::CannotFit(e)) if e.short_by_bytes == 1)
        );
        let lens = load_lens(&engine, base, &layout.config, 3).await;
        let none = EngineConfig { lens_bytes: 0, ..fitting.clone() };
        assert!(matches!(engine.reconfigure(none).await, Err(ChangeError::CannotFit(_))));
        assert_eq!(engine.remove_base(base).await, Err(RemoveError::HasLenses { lenses: 1 }));
        engine.remove_lens(lens).await.unwrap();

        let request = some_ask(1, vec![], 10).request(base, &[]);
        let long = RowRequest { max_new_tokens: 109, ..request.clone() };
        let overflow = SubmitError::ContextOverflow { prompt: 20, new: 109, limit: 128 };
        assert_eq!(engine.submit(long).await.unwrap_err(), overflow);
        let strange = RowRequest { prompt: vec![1, VOCAB], ..request.clone() };
        let unknown = SubmitError::UnknownToken { id: VOCAB, position: 1, vocab: VOCAB };
        assert_eq!(engine.submit(strange).await.unwrap_err(), unknown);
        let empty = RowRequest { prompt: vec![], ..request };
        assert_eq!(engine.submit(empty).await.unwrap_err(), SubmitError::EmptyPrompt);
        engine.shutdown().await;
    });
}

#[test]
fn a_queue_has_an_end_and_a_shutdown_finishes_what_runs() {
    let layout = long_layout();
    block_on(async {
        let limits = EngineConfig { max_waiting_rows: 3, ..limits_to(LONG, &layout, 32, 1, 0) };
        let engine = Engine::start(limits).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let mut request = some_ask(1, vec![], 100).request(base, &[]);
        request.stop_token_ids.clear();
        let long = RowRequest { max_new_tokens: LONG - 64, ..request.clone() };
        let mut rows = Vec::new();
        let refused = loop {
            match engine.submit(long.clone()).await {
                Ok(row) => rows.push(row),
                Err(error) => break error,
            }
        };
        assert_eq!(refused, SubmitError::QueueFull { waiting: 3, limit: 3 });
        assert!(refused.is_retryable() && rows.len() >= 3);
        assert!(matches!(engine.activate(base).await, Ok(())), "it is active already");
        assert!(matches!(engine.remove_base(base).await, Err(RemoveError::InUse { .. })));
        let rows_in_flight = engine.abort_rows().await;
        // Rows go on meanwhile, so some may have ended by themselves; the others, and no more, were aborted.
        let mut aborted = 0;
        for row in rows {
            match futures::StreamExt::collect::<Vec<_>>(row).await.pop() {
                Some(RowEvent::Failed(RowFailure::Aborted)) => aborted += 1,
                Some(RowEvent::Finished { .. }) => {}
                other => panic!("a row ends, or is aborted: {other:?}"),
            }
        }
        assert_eq!(aborted, rows_in_flight);
        assert!(aborted > 0, "who waited in the full queue had not begun");
        let kept = engine.submit(request.clone()).await.unwrap();
        let end = engine.shutdown();
        futures::pin_mut!(end);
        assert!(futures::poll!(end.as_mut()).is_pending());
        end.await;
        let events: Vec<_> = futures::StreamExt::collect(kept).await;
        assert_eq!(events.len(), 102, "prompt scores, a hundred tokens, and the end");
        assert_eq!(engine.submit(request).await.unwrap_err(), SubmitError::Stopped);
        assert!(!engine.is_running());
    });
}
