//! Rows that are preempted for another base and go on when theirs is back.

use proptest::prelude::*;

use super::*;

/// Runs rows together, preempts all of them once one has reported so much, and lets them go on.
async fn preempted(
    engine: &EngineHandle,
    requests: Vec<RowRequest>,
    after_events: usize,
) -> (Vec<Vec<RowEvent>>, u32) {
    let hold = engine.hold().await;
    let submitted = join_all(requests.iter().map(|request| engine.submit(request.clone())));
    futures::pin_mut!(submitted);
    assert!(futures::poll!(&mut submitted).is_pending());
    drop(hold);
    let mut rows: Vec<RowStream> = submitted.await.into_iter().map(Result::unwrap).collect();
    let mut first = Vec::new();
    while first.len() < after_events
        && let Some(event) = rows[0].next().await
    {
        first.push(event);
    }
    let count = engine.preempt_rows().await;
    let mut heads = vec![first];
    heads.resize(rows.len(), Vec::new());
    for (head, row) in heads.iter_mut().zip(rows) {
        head.extend(futures::StreamExt::collect::<Vec<_>>(row).await);
    }
    let tails = heads.iter_mut().zip(&requests).map(async |(head, request)| {
        if head.last() != Some(&RowEvent::Failed(RowFailure::Preempted)) {
            let Some(RowEvent::Finished { usage, .. }) = head.last_mut() else {
                panic!("the row ended with {:?}", head.last())
            };
            usage.cached_tokens = 0;
            return Vec::new();
        }
        head.pop();
        let generated = head.iter().filter_map(|event| match event {
            RowEvent::Token { id, .. } => Some(*id),
            _ => None,
        });
        run(engine, RowRequest { generated: generated.collect(), ..request.clone() }).await
    });
    let tails = join_all(tails).await;
    (heads.into_iter().zip(tails).map(|(head, tail)| [head, tail].concat()).collect(), count)
}

fn preempted_rows_go_on_as_if_nothing_had_been(name: &str, dtype: Dtype) {
    let layout = BaseLayout::of(&config(name), dtype);
    let strategy = (prop::collection::vec(ask(), 1..6), 0usize..30);
    let seen = std::cell::Cell::new(0);
    check(&strategy, |(asks, after_events)| {
        let (alone, _) =
            answers(&layout, limits(&layout, 128, 4, 40), &asks.iter().collect::<Vec<_>>(), false);
        block_on(async {
            let (engine, base, lenses) = start(&layout, limits(&layout, 16, 4, 40)).await;
            let requests = asks.iter().map(|ask| ask.request(base, &lenses)).collect();
            let (answers, count) = preempted(&engine, requests, after_events).await;
            seen.set(seen.get() + count);
            let end = settled(&engine).await;
            engine.shutdown().await;
            prop_assert_eq!(answers, alone);
            prop_assert_eq!(end.kv_blocks_free, end.kv_blocks_total);
            Ok(())
        })
    });
    assert!(seen.get() > 0, "every row had ended before");
}

#[test]
fn preempted_rows_go_on_as_if_nothing_had_been_in_bf16() {
    preempted_rows_go_on_as_if_nothing_had_been("Gemma2ForCausalLM", Dtype::BF16);
}

#[test]
fn preempted_rows_go_on_as_if_nothing_had_been_beyond_the_original_context() {
    preempted_rows_go_on_as_if_nothing_had_been("Phi3ForCausalLM", Dtype::F32);
}

#[test]
fn the_prompt_of_a_row_that_goes_on_is_counted_once() {
    let layout = BaseLayout::of(&config("LlamaForCausalLM"), Dtype::F32);
    block_on(async {
        let engine = Engine::start(limits(&layout, 16, 4, 8)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let row = prefix::row(base, 1, &[]);
        let events = run(&engine, row.clone()).await;
        let before = settled(&engine).await;
        assert_eq!(before.prefix_queried_tokens_total, row.prompt.len() as u64);
        let generated = events.iter().filter_map(token).take(3).collect();
        run(&engine, RowRequest { generated, ..row }).await;
        let after = settled(&engine).await;
        assert_eq!(after.prompt_tokens_total, before.prompt_tokens_total + 5, "four blocks were found");
        let counted = |s: Snapshot| (s.prefix_queried_tokens_total, s.prefix_cached_tokens_total);
        assert_eq!(counted(after), counted(before));
        engine.shutdown().await;
    });
}

#[test]
fn what_was_generated_cannot_be_all_that_was_asked_for() {
    let layout = BaseLayout::of(&config("LlamaForCausalLM"), Dtype::F32);
    block_on(async {
        let engine = Engine::start(limits(&layout, 16, 4, 8)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let row = RowRequest { generated: vec![1, 2], max_new_tokens: 2, ..prefix::row(base, 1, &[]) };
        let refused = engine.submit(row).await.unwrap_err();
        assert_eq!(refused, SubmitError::NothingLeft { generated: 2, new: 2 });
        engine.shutdown().await;
    });
}
