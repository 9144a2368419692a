//! Lenses that come and go.

use super::*;

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
