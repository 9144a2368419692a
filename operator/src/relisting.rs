//! A watch that begins anew when the place where it was is gone.
//!
//! kube's watcher lists again when an open stream says `410 Gone`. When the answer to opening one says so, as proxies in
//! front of API servers and aggregated ones do, it asks for the same place for ever, and the cache never moves again.

use std::time::Duration;

use futures::{Stream, StreamExt};
use kube::runtime::watcher;

/// A new watch begins after this long: a server that says so of every place is not to be asked without a pause.
const PAUSE: Duration = Duration::from_secs(1);

/// What `start`'s watches show, one after another: a new one begins, with a list, where the one before it has no way on.
pub fn relisting<S, T>(
    start: impl Fn() -> S + Send + 'static,
) -> impl Stream<Item = Result<T, watcher::Error>> + Send
where
    S: Stream<Item = Result<T, watcher::Error>> + Send,
    T: Send,
{
    async_stream::stream! {
        loop {
            let mut events = std::pin::pin!(start());
            while let Some(event) = events.next().await {
                let ends = event.as_ref().is_err_and(is_gone);
                yield event;
                if ends {
                    break;
                }
            }
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Whether the watcher would ask for the same place again although there is nothing any more.
fn is_gone(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.code == 410)
}

#[cfg(test)]
mod tests {
    use futures::stream;
    use kube::core::Status;

    use super::*;

    fn failed(code: u16) -> watcher::Error {
        watcher::Error::WatchStartFailed(kube::Error::Api(Status::failure("no", "").with_code(code).boxed()))
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_begins_anew_only_where_its_place_is_gone() {
        let begun = std::sync::atomic::AtomicU32::new(0);
        let events = relisting(move || {
            let number = begun.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            stream::iter([Ok(number), Err(failed(500)), Ok(number), Err(failed(410)), Ok(99)])
        });
        let seen: Vec<_> = events.take(8).map(|event| event.ok()).collect().await;
        assert_eq!(seen, [Some(0), None, Some(0), None, Some(1), None, Some(1), None]);
    }

    #[test]
    fn what_a_stream_says_is_left_to_the_watcher_which_lists_again() {
        let status = Status::failure("too old", "Expired").with_code(410).boxed();
        assert!(!is_gone(&watcher::Error::WatchError(status)));
        assert!(is_gone(&failed(410)) && !is_gone(&failed(404)));
    }
}
