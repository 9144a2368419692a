//! Rows that read from the residual stream and write into it.

use super::*;
use crate::lens::tap::ActivationError;

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
