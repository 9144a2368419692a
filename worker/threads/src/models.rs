//! What must hold in every order in which threads can take turns.
#![allow(unsafe_code)]

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use loom::cell::UnsafeCell;
use loom::thread;

use crate::Pool;
use crate::events::{self, Receiver, Sender};
use crate::sync::{Condvar, Mutex};

/// Tries every order, or those in which threads are held up at most so many times where nothing makes them wait: all orders
/// are too many where threads spin, and few errors need more than two.
fn in_every_order(preemptions: Option<usize>, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = preemptions;
    builder.check(model);
}

/// Memory that is lent to the tasks of one job, a number for each. loom fails where two threads come to a number without
/// anything that orders them.
struct Lent(Vec<UnsafeCell<u32>>);

// SAFETY: loom watches every access.
unsafe impl Send for Lent {}
// SAFETY: as above.
unsafe impl Sync for Lent {}

/// What no number of tasks makes of one.
const TAKEN_BACK: u32 = 1000;

impl Lent {
    fn to(tasks: usize) -> Self {
        Self((0..tasks).map(|_| UnsafeCell::new(0)).collect())
    }

    /// A task's work.
    fn use_by(&self, task: usize) {
        // SAFETY: loom would have failed if anybody else were here.
        self.0[task].with_mut(|number| unsafe { *number += 1 });
    }

    /// The lender's: reads how often each was used, and has the memory for itself from now on.
    fn take_back(&self) -> Vec<u32> {
        // SAFETY: as above.
        self.0.iter().map(|number| number.with_mut(|number| unsafe { number.replace(TAKEN_BACK) })).collect()
    }

    /// Nobody came to it afterwards, not even in good order.
    fn was_left_alone(&self) -> bool {
        // SAFETY: as above.
        self.0.iter().all(|number| number.with(|number| unsafe { *number } == TAKEN_BACK))
    }
}

/// Runs jobs of so many tasks one after another.
fn jobs_in_a_row(threads: usize, jobs: &[usize], run: impl Fn(&Pool, usize, &Lent)) {
    let pool = Pool::new(threads);
    let all: Vec<_> = jobs.iter().map(|&tasks| (tasks, Lent::to(tasks))).collect();
    for (tasks, lent) in &all {
        run(&pool, *tasks, lent);
        assert!(lent.take_back().iter().all(|times| *times == 1));
    }
    drop(pool);
    assert!(all.iter().all(|(_, lent)| lent.was_left_alone()));
}

fn run(pool: &Pool, tasks: usize, lent: &Lent) {
    pool.run(tasks, &|task| lent.use_by(task));
}

fn share(pool: &Pool, tasks: usize, lent: &Lent) {
    pool.share(tasks, &|range| range.for_each(|task| lent.use_by(task)));
}

#[test]
fn every_task_of_two_threads_runs_once_and_none_after_run_has_returned() {
    in_every_order(Some(3), || jobs_in_a_row(2, &[2, 3], run));
}

#[test]
fn every_task_of_three_threads_runs_once_and_none_after_run_has_returned() {
    in_every_order(Some(2), || jobs_in_a_row(3, &[3, 2], run));
}

#[test]
fn ranges_are_each_task_once() {
    in_every_order(Some(3), || jobs_in_a_row(2, &[5, 4], share));
}

/// A place where so many meet.
struct Meeting {
    expected: usize,
    here: Mutex<usize>,
    all: Condvar,
}

impl Meeting {
    fn of(expected: usize) -> Self {
        Self { expected, here: Mutex::new(0), all: Condvar::default() }
    }

    fn wait(&self) {
        let mut here = self.here.lock();
        *here += 1;
        self.all.notify_all();
        while *here < self.expected {
            self.all.wait(&mut here);
        }
    }
}

/// Tasks that wait for each other end only when every helper has come, so one that sleeps through a job makes a deadlock.
fn all_come(threads: usize, jobs: usize) {
    let pool = Pool::new(threads);
    for _ in 0..jobs {
        let meeting = Meeting::of(threads);
        pool.run(threads, &|_| meeting.wait());
    }
}

#[test]
fn a_helper_that_sleeps_wakes_up_for_each_job() {
    in_every_order(Some(3), || all_come(2, 2));
}

#[test]
fn all_helpers_wake_up() {
    in_every_order(Some(1), || all_come(3, 1));
}

#[test]
fn helpers_end_with_the_pool_whether_they_have_begun_or_not() {
    in_every_order(Some(3), || drop(Pool::new(3)));
}

#[test]
fn two_callers_take_turns() {
    in_every_order(Some(2), || {
        let pool = loom::sync::Arc::new(Pool::new(2));
        let other = pool.clone();
        let caller = thread::spawn(move || {
            let lent = Lent::to(2);
            run(&other, 2, &lent);
            assert_eq!(lent.take_back(), [1, 1]);
        });
        let lent = Lent::to(2);
        run(&pool, 2, &lent);
        assert_eq!(lent.take_back(), [1, 1]);
        caller.join().unwrap();
    });
}

/// Who panics in a job of two threads.
#[derive(Clone, Copy)]
struct Panics {
    caller: bool,
    helper: bool,
}

/// Runs a job whose tasks panic; whether it failed, and whether one did panic.
fn panicking_job(pool: &Pool, panics: Panics, lent: &Lent) -> (bool, bool) {
    let caller = thread::current().id();
    let panicked = AtomicBool::new(false);
    let ended = catch_unwind(AssertUnwindSafe(|| {
        pool.run(2, &|task| {
            lent.use_by(task);
            let panics = if thread::current().id() == caller { panics.caller } else { panics.helper };
            if panics {
                panicked.store(true, Ordering::Relaxed);
                // Without a word on the terminal: this happens thousands of times.
                resume_unwind(Box::new(()));
            }
        });
    }));
    (ended.is_err(), panicked.into_inner())
}

#[test]
fn a_panic_is_its_job_s_and_no_other_s() {
    for (caller, helper) in [(true, false), (false, true), (true, true)] {
        in_every_order(Some(3), move || {
            let pool = Pool::new(2);
            let lent = Lent::to(2);
            let (failed, panicked) = panicking_job(&pool, Panics { caller, helper }, &lent);
            assert_eq!(failed, panicked);
            assert!(lent.take_back().iter().all(|times| *times <= 1));
            let next = Lent::to(2);
            run(&pool, 2, &next);
            assert_eq!(next.take_back(), [1, 1]);
            drop(pool);
            assert!(lent.was_left_alone() && next.was_left_alone());
        });
    }
}

struct Unpark(thread::Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The next event. A reader that nobody wakes makes a deadlock.
fn next(receiver: &mut Receiver<u32>) -> Option<u32> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    loop {
        match receiver.poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(event) => return event,
            Poll::Pending => thread::park(),
        }
    }
}

/// A thread that sends these and is gone.
fn sending(sender: Sender<u32>, events: &'static [u32]) -> thread::JoinHandle<()> {
    thread::spawn(move || events.iter().for_each(|event| sender.send(*event)))
}

#[test]
fn a_reader_gets_every_event_in_order_and_then_the_end() {
    in_every_order(None, || {
        let (sender, mut receiver) = events::channel(3);
        let sending = sending(sender, &[1, 2, 3]);
        let read: Vec<_> = std::iter::from_fn(|| next(&mut receiver)).collect();
        assert_eq!(read, [1, 2, 3]);
        sending.join().unwrap();
    });
}

#[test]
fn the_task_that_looked_last_is_woken() {
    in_every_order(None, || {
        let (sender, mut receiver) = events::channel(1);
        let sending = sending(sender, &[1]);
        let before = receiver.poll(&mut Context::from_waker(Waker::noop()));
        let read = if let Poll::Ready(event) = before { event } else { next(&mut receiver) };
        assert_eq!(read, Some(1));
        assert_eq!(next(&mut receiver), None);
        sending.join().unwrap();
    });
}

#[test]
fn a_reader_that_goes_is_noticed_and_what_it_left_is_freed() {
    in_every_order(None, || {
        let (sender, mut receiver) = events::channel(2);
        let reader = thread::spawn(move || {
            let _ = receiver.poll(&mut Context::from_waker(Waker::noop()));
        });
        // The event counts itself among loom's, which sees whether it is ever dropped.
        sender.send(loom::sync::Arc::new(()));
        reader.join().unwrap();
        assert!(sender.is_abandoned());
        sender.send(loom::sync::Arc::new(()));
    });
}
