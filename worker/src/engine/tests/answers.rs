//! How rows are run, and what they report.

use super::*;
use crate::lens::tap::Tapped;

/// Everything a row reported, but for what it found in the cache. Its f32 numbers are compared as they are: equal means equal bits
/// here, as none is zero or NaN.
pub(super) async fn run(engine: &EngineHandle, request: RowRequest) -> Vec<RowEvent> {
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
pub(super) async fn at_once(
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
pub(super) async fn settled(engine: &EngineHandle) -> Snapshot {
    // Any command is answered between two steps.
    let _ = engine.remove_lens(LensId(0)).await;
    engine.snapshot()
}

/// The rows in an engine of its own: all at once, or one after the other. With what it looked like at the end.
pub(super) fn answers(
    layout: &BaseLayout,
    limits: EngineConfig,
    asks: &[&Ask],
    together: bool,
) -> (Vec<Vec<RowEvent>>, Snapshot) {
    block_on(async {
        let (engine, base, lenses) = start(layout, limits).await;
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

pub(super) fn token(event: &RowEvent) -> Option<u32> {
    match event {
        RowEvent::Token { id, .. } => Some(*id),
        _ => None,
    }
}

pub(super) fn tapped(events: &[RowEvent]) -> &[Tapped] {
    events
        .iter()
        .find_map(|event| if let RowEvent::Tapped(tapped) = event { Some(&tapped[..]) } else { None })
        .unwrap()
}
