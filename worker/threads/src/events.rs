//! Events from a thread that never waits to a task that does.
//!
//! The sender allocates nothing and holds the lock for a moment only. What arrives, that the sender is gone and who is to be
//! woken are under one lock, so that between a look at the events and going to sleep nothing can come unseen.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, Waker};

use crate::sync::{Arc, AtomicBool, Mutex};

struct Inbox<E> {
    events: VecDeque<E>,
    /// The sender is gone.
    closed: bool,
    /// Who waits for the next event.
    waker: Option<Waker>,
}

struct Shared<E> {
    inbox: Mutex<Inbox<E>>,
    /// The receiver is gone. Beside the lock, since the sender looks often.
    abandoned: AtomicBool,
}

/// The sender's end. Dropping it ends the events.
pub struct Sender<E>(Arc<Shared<E>>);

/// The receiver's end. Dropping it tells the sender to stop.
pub struct Receiver<E>(Arc<Shared<E>>);

/// Both ends. So many events may be on their way before the sender has to allocate.
pub fn channel<E>(capacity: usize) -> (Sender<E>, Receiver<E>) {
    let inbox = Inbox { events: VecDeque::with_capacity(capacity), closed: false, waker: None };
    let shared = Arc::new(Shared { inbox: Mutex::new(inbox), abandoned: AtomicBool::new(false) });
    (Sender(shared.clone()), Receiver(shared))
}

impl<E> Sender<E> {
    /// Hands an event over; never waits for the receiver.
    pub fn send(&self, event: E) {
        self.tell(|inbox| inbox.events.push_back(event));
    }

    /// Whether the receiver is gone.
    pub fn is_abandoned(&self) -> bool {
        self.0.abandoned.load(Ordering::Acquire)
    }

    fn tell(&self, change: impl FnOnce(&mut Inbox<E>)) {
        let waker = {
            let mut inbox = self.0.inbox.lock();
            change(&mut inbox);
            inbox.waker.take()
        };
        // Not under the lock, which the woken task wants at once.
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl<E> Drop for Sender<E> {
    fn drop(&mut self) {
        self.tell(|inbox| inbox.closed = true);
    }
}

impl<E> Receiver<E> {
    /// The next event; `None` when all have been read and the sender is gone.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<E>> {
        let mut inbox = self.0.inbox.lock();
        match inbox.events.pop_front() {
            Some(event) => Poll::Ready(Some(event)),
            None if inbox.closed => Poll::Ready(None),
            None => {
                // The task may be another one than the last time.
                inbox.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<E> Drop for Receiver<E> {
    fn drop(&mut self) {
        self.0.abandoned.store(true, Ordering::Release);
    }
}
