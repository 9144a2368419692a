//! What fits into the device, and what does not.

use super::*;

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
