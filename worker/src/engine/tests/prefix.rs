//! What rows share of their beginnings: found where it is the same, to the bit, and nowhere else.

use super::*;
use turret_kernels::attention::BLOCK_TOKENS;

/// Tokens of four blocks and a bit.
const PROMPT: usize = 4 * BLOCK_TOKENS + 5;

fn prompt(seed: u64) -> Vec<u32> {
    let mut noise = Noise(seed);
    (0..PROMPT).map(|_| ((noise.next() + 1.0) * 33.0) as u32).collect()
}

/// A row over a prompt, greedy, that scores nothing of it.
pub(super) fn row(base: BaseId, seed: u64, lenses: &[LensId]) -> RowRequest {
    let lenses = lenses.iter().map(|&lens| RowLens { lens, scale: 1.0 }).collect();
    RowRequest {
        prompt: prompt(seed),
        lenses,
        stop_token_ids: Vec::new(),
        prompt_logprobs: None,
        ..some_ask(seed, vec![], 12).request(base, &[])
    }
}

/// What a row reported and what it found.
async fn run_and_found(engine: &EngineHandle, request: RowRequest) -> (Vec<RowEvent>, u32) {
    let before = settled(engine).await.prefix_cached_tokens_total;
    let events = run(engine, request).await;
    (events, (settled(engine).await.prefix_cached_tokens_total - before) as u32)
}

/// An engine with a base that is active.
async fn engine(layout: &BaseLayout, limits: EngineConfig) -> (EngineHandle, BaseId) {
    let engine = Engine::start(limits).unwrap();
    let base = install(&engine, layout, 7).await;
    engine.activate(base).await.unwrap();
    (engine, base)
}

fn qwen() -> BaseLayout {
    BaseLayout::of(&config("Qwen2ForCausalLM"), Dtype::BF16)
}

#[test]
fn a_prompt_that_comes_again_is_found_but_for_its_last_block() {
    let layout = qwen();
    block_on(async {
        let (engine, base) = engine(&layout, limits(&layout, 32, 4, 8)).await;
        let request = row(base, 1, &[]);
        let (first, found) = run_and_found(&engine, request.clone()).await;
        assert_eq!(found, 0);
        let computed = settled(&engine).await.prompt_tokens_total;
        let mut stream = engine.submit(request.clone()).await.unwrap();
        assert!(stream.next().await.is_some());
        assert_eq!(stream.cached_tokens(), 64);
        drop(stream);
        let (again, found) = run_and_found(&engine, request.clone()).await;
        assert_eq!((&again, found), (&first, 64));
        assert_eq!(settled(&engine).await.prompt_tokens_total, computed + 2 * 5);

        // What was generated is found too: the next turn of a conversation.
        let mut next = request.clone();
        next.prompt.extend(first.iter().filter_map(token));
        next.prompt.push(3);
        let (_, found) = run_and_found(&engine, next).await;
        assert_eq!(found, 80, "sixty-nine tokens and twelve generated ones are five blocks and a bit");

        // The scores of a prompt need its logits.
        let scored = RowRequest { prompt_logprobs: Some(0), ..request.clone() };
        assert_eq!(run_and_found(&engine, scored).await.1, 0);
        let mut ends_with_a_block = request;
        ends_with_a_block.prompt.truncate(64);
        assert_eq!(run_and_found(&engine, ends_with_a_block).await.1, 48, "one token is computed always");
        engine.shutdown().await;
    });
}

#[test]
fn rows_of_one_prompt_compute_it_once_together() {
    let layout = qwen();
    block_on(async {
        // Chunks of one block: the second row has its turn when the first is done.
        let (engine, base) = engine(&layout, limits(&layout, 16, 8, 40)).await;
        let rows = (0..6).map(|seed| {
            let sampling = Sampling { temperature: 0.9, seed, ..Sampling::GREEDY };
            RowRequest { sampling, ..row(base, 1, &[]) }
        });
        let rows: Vec<RowRequest> = rows.collect();
        let together = at_once(&engine, rows.iter().cloned()).await;
        let all = settled(&engine).await;
        assert_eq!(all.prefix_cached_tokens_total, 5 * 64);
        assert_eq!(all.prompt_tokens_total, 64 + 6 * 5);
        engine.reconfigure(EngineConfig { prefix_cache: false, ..limits(&layout, 16, 8, 40) }).await.unwrap();
        assert_eq!(settled(&engine).await.kv_blocks_kept, 0);
        for (request, events) in rows.into_iter().zip(together) {
            assert_eq!(run_and_found(&engine, request).await, (events, 0));
        }
        engine.shutdown().await;
    });
}

#[test]
fn lenses_scales_and_salts_share_nothing_with_each_other() {
    let layout = qwen();
    block_on(async {
        let (engine, base) = engine(&layout, limits(&layout, 128, 4, 200)).await;
        let [a, b] = [
            load_lens(&engine, base, &layout.config, 2).await,
            load_lens(&engine, base, &layout.config, 3).await,
        ];
        let scaled = |lenses: &[(LensId, f32)]| RowRequest {
            lenses: lenses.iter().map(|&(lens, scale)| RowLens { lens, scale }).collect(),
            ..row(base, 1, &[])
        };
        let salted = |salt: &str| RowRequest { cache_salt: Some(salt.into()), ..row(base, 1, &[]) };
        let rows = [
            row(base, 1, &[]),
            scaled(&[(a, 1.0)]),
            scaled(&[(b, 1.0)]),
            scaled(&[(a, 0.5)]),
            scaled(&[(a, 1.0), (b, 1.0)]),
            scaled(&[(b, 1.0), (a, 1.0)]),
            salted("one"),
            salted("two"),
        ];
        for request in &rows {
            assert_eq!(run_and_found(&engine, request.clone()).await.1, 0);
        }
        for request in rows {
            assert_eq!(run_and_found(&engine, request).await.1, 64);
        }
        engine.shutdown().await;
    });
}

/// Loads the lens of a seed as residency does, with the digest of its files.
async fn load_named(
    engine: &EngineHandle,
    base: BaseId,
    layout: &BaseLayout,
    seed: u64,
    digest: &str,
) -> LensId {
    let filled = fill_lens(engine, base, &layout.config, seed).await;
    engine.install_lens(base, filled.with_digest(digest)).await.unwrap()
}

#[test]
fn a_replaced_lens_never_reads_the_old_one_s_blocks() {
    let layout = qwen();
    block_on(async {
        let (engine, base) = engine(&layout, limits(&layout, 128, 4, 100)).await;
        // What the second lens answers where nothing was ever kept.
        let apart = Engine::start(limits(&layout, 128, 4, 100)).unwrap();
        let apart_base = install(&apart, &layout, 7).await;
        apart.activate(apart_base).await.unwrap();
        let lens = load_named(&apart, apart_base, &layout, 4, "sha256:four").await;
        let expected = run(&apart, row(apart_base, 1, &[lens])).await;
        apart.shutdown().await;

        let old = load_named(&engine, base, &layout, 3, "sha256:three").await;
        let before = run(&engine, row(base, 1, &[old])).await;
        engine.remove_lens(old).await.unwrap();
        assert!(engine.poison_kept().await >= 4);
        let new = load_named(&engine, base, &layout, 4, "sha256:four").await;
        assert_eq!(run_and_found(&engine, row(base, 1, &[new])).await, (expected, 0));

        // The poison is where the old lens would find it: loaded again, with the same content, it does.
        let again = load_named(&engine, base, &layout, 3, "sha256:three").await;
        let mut poisoned = engine.submit(row(base, 1, &[again])).await.unwrap();
        assert!(matches!(poisoned.next().await, Some(RowEvent::Failed(RowFailure::NotFinite { .. }))));
        let salted = RowRequest { cache_salt: Some("clean".into()), ..row(base, 1, &[again]) };
        assert_eq!(run(&engine, salted.clone()).await, before);
        engine.remove_lens(again).await.unwrap();
        let last = load_named(&engine, base, &layout, 3, "sha256:three").await;
        let salted = RowRequest { lenses: vec![RowLens { lens: last, scale: 1.0 }], ..salted };
        assert_eq!(run_and_found(&engine, salted).await, (before, 64), "evicted and loaded again");
        engine.shutdown().await;
    });
}

#[test]
fn a_base_that_comes_back_finds_nothing_of_before() {
    let layout = qwen();
    block_on(async {
        let mut limits = limits(&layout, 128, 4, 20);
        limits.device_bytes += layout.bytes + 4096;
        let (engine, base) = engine(&layout, limits).await;
        let before = run(&engine, row(base, 1, &[])).await;
        let other = install(&engine, &layout, 8).await;
        engine.activate(other).await.unwrap();
        assert_eq!(run_and_found(&engine, row(other, 1, &[])).await.1, 0);
        engine.activate(base).await.unwrap();
        assert_eq!(run_and_found(&engine, row(base, 1, &[])).await, (before, 0));
        engine.shutdown().await;
    });
}

#[test]
fn what_is_tapped_is_computed_and_what_comes_before_is_found() {
    let layout = qwen();
    block_on(async {
        let (engine, base) = engine(&layout, limits(&layout, 128, 4, 40)).await;
        let tap = |first| Tap { site: Site::Out(0), positions: Positions::From(first) };
        let reads = |first| {
            let activations = Activations { taps: vec![tap(first)], ..Activations::default() };
            RowRequest { activations, ..row(base, 1, &[]) }
        };
        let (cold, found) = run_and_found(&engine, reads(40)).await;
        assert_eq!(found, 0);
        assert_eq!(run_and_found(&engine, reads(40)).await, (cold, 32), "two blocks lie before position 40");
        assert_eq!(run_and_found(&engine, reads(0)).await.1, 0);
        assert_eq!(run_and_found(&engine, row(base, 1, &[])).await.1, 64, "reading changes nothing");

        // A row that leaves after the first block has keys and values of that one only: nobody may find them.
        let mut leaves = RowRequest { max_new_tokens: 0, ..reads(60) };
        leaves.prompt = prompt(2);
        leaves.activations.stop_layer = Some(1);
        run(&engine, leaves.clone()).await;
        assert_eq!(run_and_found(&engine, row(base, 2, &[])).await.1, 0);
        assert_eq!(run_and_found(&engine, leaves).await.1, 48, "but it may use whole ones");
        engine.shutdown().await;
    });
}

/// A row that writes from a position on.
fn writes(base: BaseId, first: u32, value: f32, prefill_only: bool) -> RowRequest {
    let injection = Injection {
        site: Site::In(1),
        positions: Positions::From(first),
        operation: Operation::Add { scale: 1.0 },
        vectors: vec![value; WIDTH],
        prefill_only,
    };
    let activations = Activations { injections: vec![injection], ..Activations::default() };
    RowRequest { activations, ..row(base, 1, &[]) }
}

#[test]
fn what_a_row_writes_is_its_own_and_its_forks_only() {
    let layout = long_layout();
    block_on(async {
        let (engine, base) = engine(&layout, limits_to(LONG, &layout, 16, 8, 100)).await;
        let still_runs = |row: &RowRequest| RowRequest { max_new_tokens: LONG - 128, ..row.clone() };
        let plain = run(&engine, row(base, 1, &[])).await;
        let parent = writes(base, 20, 0.5, false);
        let (alone, found) = run_and_found(&engine, parent.clone()).await;
        assert_eq!(found, 16, "position 20 is in the second block");
        assert_ne!(alone, plain);
        assert_eq!(
            run_and_found(&engine, parent.clone()).await,
            (alone.clone(), 16),
            "only forks find the rest"
        );
        assert_eq!(run_and_found(&engine, row(base, 1, &[])).await, (plain, 64));

        // Forks of a row in flight: the same start, other random numbers; and one that says something else at the end.
        let sampled = |seed, parent_id| RowRequest {
            sampling: Sampling { temperature: 0.8, seed, ..Sampling::GREEDY },
            parent: parent_id,
            ..parent.clone()
        };
        let stream = engine.submit(still_runs(&parent)).await.unwrap();
        let id = stream.id();
        let mut longer = sampled(3, Some(id));
        longer.prompt.extend([1, 2, 3]);
        let forks = [sampled(1, Some(id)), sampled(2, Some(id)), longer.clone()];
        let before = settled(&engine).await.prefix_cached_tokens_total;
        let together = at_once(&engine, forks.iter().cloned()).await;
        let found = settled(&engine).await.prefix_cached_tokens_total - before;
        assert!(
            (3 * 64..=3 * 64 + 16).contains(&found),
            "three forks, and what the parent found itself: {found}"
        );
        drop(stream);
        for (fork, events) in forks.iter().zip(together) {
            let unforked = RowRequest { parent: None, ..fork.clone() };
            assert_eq!(run(&engine, unforked).await, events);
        }

        // Who writes something else, or has another end of its prompt where that matters, is no such fork.
        let parent = writes(base, 20, 0.25, true);
        let mut stream = engine.submit(still_runs(&parent)).await.unwrap();
        assert!(stream.next().await.is_some());
        let mut other = RowRequest { parent: Some(stream.id()), ..writes(base, 20, 0.75, true) };
        assert_eq!(run_and_found(&engine, other.clone()).await.1, 16);
        other.activations = parent.activations.clone();
        other.prompt.push(1);
        assert_eq!(run_and_found(&engine, other.clone()).await.1, 16);
        other.prompt.pop();
        other.prompt[3] += 1;
        assert_eq!(run_and_found(&engine, other.clone()).await.1, 0);
        other.prompt[3] -= 1;
        assert_eq!(run_and_found(&engine, other).await.1, 64);
        drop(stream);
        run(&engine, row(base, 5, &[])).await;
        let end = settled(&engine).await;
        assert_eq!(end.kv_blocks_free, end.kv_blocks_total);
        engine.shutdown().await;
    });
}

#[test]
fn steering_from_the_first_generated_token_on_shares_the_prompt() {
    let layout = qwen();
    block_on(async {
        let (engine, base) = engine(&layout, limits(&layout, 128, 4, 40)).await;
        run(&engine, row(base, 1, &[])).await;
        let steered = writes(base, PROMPT as u32, 0.5, false);
        assert_eq!(run_and_found(&engine, steered).await.1, 64);
        engine.shutdown().await;
    });
}

#[test]
fn a_row_that_stepped_back_finds_what_it_had_computed() {
    let layout = qwen();
    block_on(async {
        // Nine blocks: two rows that begin with three and end with seven do not fit beside each other to their end.
        let (engine, base) = engine(&layout, limits(&layout, 128, 4, 1)).await;
        let rows = [1, 2].map(|seed| {
            let mut row = RowRequest { max_new_tokens: 60, ..row(base, seed, &[]) };
            row.prompt.truncate(40);
            row
        });
        let together = at_once(&engine, rows.iter().cloned()).await;
        let end = settled(&engine).await;
        assert!(end.preemptions_total > 0);
        // Seven blocks of the older one leave the first two of the younger one where they are.
        assert_eq!(end.prompt_tokens_total, 2 * 40 + 8 * end.preemptions_total);
        for (request, events) in rows.into_iter().zip(together) {
            assert_eq!(run(&engine, request).await, events);
        }
        engine.shutdown().await;
    });
}
