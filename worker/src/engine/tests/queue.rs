//! Rows that wait, and the end of the engine.

use super::*;

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
