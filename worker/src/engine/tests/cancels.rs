//! Rows whose readers go away: they leave within a step, and leave nothing behind.

use futures::FutureExt;

use super::*;

const CANCELS: u32 = 10_000;

/// Random choices that follow from a seed.
struct Dice(Noise);

impl Dice {
    fn below(&mut self, count: usize) -> usize {
        (((self.0.next() + 1.0) / 2.0 * count as f32) as usize).min(count - 1)
    }

    fn ask(&mut self) -> Ask {
        let lenses = [vec![], vec![(0, 1.0)], vec![(1, 0.5)], vec![(0, -0.75), (1, 1.0)]];
        let touches = [
            Touch::Nothing,
            Touch::Nothing,
            Touch::Reads,
            Touch::Leaves,
            Touch::Writes(Operation::Add { scale: 0.7 }),
        ];
        let length = 1 + self.below(70);
        Ask {
            prompt: (0..length).map(|_| self.below(VOCAB as usize) as u32).collect(),
            lenses: lenses[self.below(lenses.len())].clone(),
            new: 1 + self.below(58) as u32,
            temperature: [0.0, 0.9][self.below(2)],
            seed: self.below(1000) as u64,
            scores: self.below(3) == 0,
            touch: touches[self.below(touches.len())],
        }
    }
}

/// Whether a row has come to its end by itself, as far as can be seen now.
fn has_ended(row: &mut RowStream) -> bool {
    while let Some(event) = row.next().now_or_never() {
        if matches!(event, None | Some(RowEvent::Finished { .. } | RowEvent::Failed(_))) {
            return true;
        }
    }
    false
}

#[test]
fn ten_thousand_random_cancels_leave_nothing_behind() {
    let layout = BaseLayout::of(&config("Qwen2ForCausalLM"), Dtype::BF16);
    block_on(async {
        let engine = Engine::start(limits(&layout, 16, 6, 10)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let lenses = [
            load_lens(&engine, base, &layout.config, 2).await,
            load_lens(&engine, base, &layout.config, 3).await,
        ];
        let witness = some_ask(1, vec![(0, 1.0), (1, -0.5)], 20).request(base, &lenses);
        let answer = run(&engine, witness.clone()).await;
        let before = engine.snapshot();

        let mut dice = Dice(Noise(11));
        let mut open: Vec<RowStream> = Vec::new();
        let mut cancels = 0;
        while cancels < CANCELS {
            let submit = engine.submit(dice.ask().request(base, &lenses));
            if dice.below(8) == 0 {
                // Who goes away before the engine's answer.
                cancels += u32::from(submit.now_or_never().is_none());
                continue;
            }
            open.push(submit.await.unwrap());
            if dice.below(2) == 0 {
                // Some rows get on before others go.
                let row = dice.below(open.len());
                open[row].next().await;
            }
            while open.len() > 12 || (!open.is_empty() && dice.below(3) == 0) {
                let mut row = open.swap_remove(dice.below(open.len()));
                cancels += u32::from(!has_ended(&mut row));
            }
        }
        drop(open);

        // A removal would be refused if any row still held the lens.
        for lens in lenses {
            assert!(engine.remove_lens(lens).await.unwrap() > 0);
        }
        let after = engine.snapshot();
        assert_eq!((after.running_rows, after.waiting_rows), (0, 0));
        assert_eq!(
            (after.kv_blocks_free, after.kv_blocks_total),
            (before.kv_blocks_total, before.kv_blocks_total)
        );
        assert_eq!(
            (after.arena.base_bytes, after.arena.kv_bytes),
            (before.arena.base_bytes, before.arena.kv_bytes)
        );
        assert_eq!((after.arena.lens_bytes, after.workspace_bytes), (0, before.workspace_bytes));
        assert!(after.preemptions_total > 0, "rows were cancelled before and after stepping back, too");

        let lenses = [
            load_lens(&engine, base, &layout.config, 2).await,
            load_lens(&engine, base, &layout.config, 3).await,
        ];
        assert_eq!(engine.snapshot().arena, before.arena);
        let again = some_ask(1, vec![(0, 1.0), (1, -0.5)], 20).request(base, &lenses);
        assert_eq!(run(&engine, again).await, answer);
        engine.shutdown().await;
    });
}

#[test]
fn a_cancelled_row_is_in_one_more_step_at_most() {
    let layout = long_layout();
    block_on(async {
        let engine = Engine::start(limits_to(LONG, &layout, 32, 2, 200)).unwrap();
        let base = install(&engine, &layout, 1).await;
        engine.activate(base).await.unwrap();
        let long = RowRequest {
            stop_token_ids: vec![],
            logprobs: None,
            prompt_logprobs: None,
            ..some_ask(1, vec![], LONG - 64).request(base, &[])
        };
        for round in 0..20 {
            let mut stays = engine.submit(long.clone()).await.unwrap();
            // The one runs, the other waits for a place.
            let mut runs = engine.submit(long.clone()).await.unwrap();
            let waits = engine.submit(long.clone()).await.unwrap();
            for _ in 0..round {
                runs.next().await;
            }
            if round % 2 == 0 {
                drop((waits, runs));
            } else {
                drop((runs, waits));
            }
            let seen = engine.snapshot();
            let mut now = seen;
            // No command is sent meanwhile. The step after the one that was going on is without them.
            while now.steps_total < seen.steps_total + 2 {
                assert!(token(&stays.next().await.unwrap()).is_some(), "it is far from its end");
                now = engine.snapshot();
            }
            assert_eq!((now.running_rows, now.waiting_rows), (1, 0), "round {round}");
            let (steps, tokens) = (
                now.steps_total - seen.steps_total,
                now.generated_tokens_total - seen.generated_tokens_total,
            );
            assert!(tokens <= steps + 1, "round {round}: {tokens} tokens of one row in {steps} steps");
        }
        engine.shutdown().await;
    });
}
