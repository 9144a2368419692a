//! A batch means nothing: rows are the same in any.

use proptest::prelude::*;

use super::*;
use crate::model::weights::Quantization;

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
    check(&strategy, |(asks, order, chunk, rows, spare)| {
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
    });
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

#[test]
fn rows_that_share_a_prompt_step_back_until_there_is_room() {
    let layout = BaseLayout::of(&config("LlamaForCausalLM"), Dtype::F32);
    let mut preemptions = 0;
    // Who steps back frees only what no other row holds, which is the lesser part of these.
    let prompt = some_ask(1, vec![], 0).prompt.repeat(3);
    let ask =
        |seed| Ask { prompt: prompt.clone(), temperature: 0.9, scores: false, ..some_ask(seed, vec![], 50) };
    let asks: Vec<Ask> = (0..8).map(ask).collect();
    let asks: Vec<&Ask> = asks.iter().collect();
    let (alone, _) = answers(&layout, limits(&layout, 128, 1, 0), &asks, false);
    for (rows, spare) in (3..9).flat_map(|rows| (0..9).map(move |spare| (rows, spare))) {
        let (together, end) = answers(&layout, limits(&layout, 40, rows, spare), &asks, true);
        assert_eq!(together, alone, "{rows} rows, {spare} blocks to spare");
        preemptions += end.preemptions_total;
    }
    assert!(preemptions > 0, "no row stepped back");
}
