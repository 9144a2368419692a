//! The body of an answer on its way from a worker to a client.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{header, response::Parts};

use hyper::body::{Body, Frame, Incoming, SizeHint};

use super::{
    metrics::Trouble,
    proxy::{Sent, innermost},
};

/// Passes a body on untouched. While it lives the request counts as in flight; dropping it (the
/// client left) closes the connection to the worker, which ends the row there.
///
/// When the worker breaks off, the client's connection is broken too, so nobody takes half an
/// answer for a whole one. A client of an event stream is first told why by an `error` event.
pub struct Relay {
    first: Option<Frame<Bytes>>,
    rest: Rest,
    is_event_stream: bool,
    sent: Sent,
}

enum Rest {
    Streaming(Incoming),
    /// The worker broke off: the client is told next.
    Broken(hyper::Error),
    /// It has been told, and is given a moment to receive it.
    Told(hyper::Error),
    Ended,
}

impl Relay {
    /// The body of an answer with these headers, whose first frame is in hand.
    pub fn new(parts: &Parts, first: Option<Frame<Bytes>>, rest: Incoming, sent: Sent) -> Self {
        let content_type = parts.headers.get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok());
        let is_event_stream = content_type.is_some_and(|t| t.starts_with("text/event-stream"));
        Self { first, rest: Rest::Streaming(rest), is_event_stream, sent }
    }

    fn error_event(&self) -> Frame<Bytes> {
        let message = format!("the worker {} broke off in the middle of the answer", self.sent.worker());
        let error = serde_json::json!({"error": {
            "message": message, "type": "server_error", "param": null, "code": "worker_lost",
        }});
        // The worker may have been cut off inside an event: end that first.
        Frame::data(format!("\n\ndata: {error}\n\n").into())
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(first)));
        }
        if let Rest::Streaming(body) = &mut self.rest {
            match std::task::ready!(Pin::new(body).poll_frame(cx)) {
                Some(Err(error)) => {
                    tracing::warn!(
                        worker = self.sent.worker(),
                        cause = innermost(&error),
                        "worker broke off in mid-answer"
                    );
                    self.sent.metrics().upstream_error(Trouble::BrokenMidway);
                    self.rest = Rest::Broken(error);
                }
                frame => return Poll::Ready(frame),
            }
        }
        match std::mem::replace(&mut self.rest, Rest::Ended) {
            Rest::Broken(error) if self.is_event_stream => {
                self.rest = Rest::Told(error);
                Poll::Ready(Some(Ok(self.error_event())))
            }
            Rest::Told(error) => {
                // Waiting once lets the server write the event out before the connection breaks.
                self.rest = Rest::Broken(error);
                self.is_event_stream = false;
                cx.waker().wake_by_ref();
                Poll::Pending
            }
            Rest::Broken(error) => Poll::Ready(Some(Err(error))),
            Rest::Streaming(_) | Rest::Ended => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none()
            && match &self.rest {
                Rest::Streaming(body) => body.is_end_stream(),
                Rest::Ended => true,
                Rest::Broken(_) | Rest::Told(_) => false,
            }
    }

    fn size_hint(&self) -> SizeHint {
        let (Rest::Streaming(body), Some(first)) = (&self.rest, self.first.as_ref()) else {
            return match &self.rest {
                Rest::Streaming(body) if !self.is_event_stream => body.size_hint(),
                _ => SizeHint::default(),
            };
        };
        let length = first.data_ref().map_or(0, |d| d.len() as u64);
        match body.size_hint().exact() {
            Some(rest) if !self.is_event_stream => SizeHint::with_exact(rest + length),
            _ => SizeHint::default(),
        }
    }
}
