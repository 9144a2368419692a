//! A pool that runs one loop at a time on all threads, without allocating.
//!
//! A forward pass is hundreds of short loops in a row, so threads spin for a moment before they sleep.
//! The caller takes part; a helper that has not woken up when the work is done is not waited for.
#![allow(unsafe_code)]

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::Ordering;

use crate::sync::{Arc, AtomicBool, AtomicUsize, Condvar, Mutex, SPINS, spin_loop, thread};

/// How many threads a process may use: `TURRET_THREADS`, or else what affinity and the container's CPU
/// quota allow.
pub fn allowed_threads() -> usize {
    let asked = std::env::var("TURRET_THREADS").ok().and_then(|n| n.parse().ok()).filter(|&n: &usize| n > 0);
    // The standard library reads the affinity mask and the quotas of cgroup v1 and v2.
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)).min(1024)
}

#[derive(Clone, Copy)]
struct Job {
    call: *const (dyn Fn(Range<usize>) + Sync),
    tasks: usize,
    /// Tasks are taken one at a time, or else a share of those that are left.
    single: bool,
    threads: usize,
}

// SAFETY: the closure is `Sync`, and `Pool::start` does not return before every helper has let go of it.
unsafe impl Send for Job {}

#[derive(Default)]
struct State {
    job: Option<Job>,
    /// Helpers that hold the job.
    active: usize,
    /// Grows with every job, so that a helper takes each once.
    epoch: usize,
    stop: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// A copy of the one in `state`, to spin on. Only a hint: what it announces is read under the lock.
    epoch: AtomicUsize,
    /// A copy of the one in `state`, to spin on. Written with `Release` by who lets go of a job and read with `Acquire` by the
    /// caller, which so sees what all tasks wrote: who let go before did so under the same lock.
    active: AtomicUsize,
    /// Next task of the job. Relaxed, since it orders nothing but itself: it is set back under the lock under which helpers take
    /// the job, when all have let go of the one before.
    next: AtomicUsize,
    /// A helper's share of the job panicked. Ordered by `active`.
    panicked: AtomicBool,
}

/// The pool. One loop runs at a time.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<thread::JoinHandle<()>>,
    running: Mutex<()>,
}

impl Pool {
    /// A pool of this many threads, the caller's included.
    pub fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared::default());
        let helpers = (1..threads)
            .map_while(|index| {
                let shared = shared.clone();
                // A container that refuses another thread still computes, with fewer.
                thread::Builder::new().name(format!("compute-{index}")).spawn(move || help(&shared)).ok()
            })
            .collect();
        Self { shared, helpers, running: Mutex::new(()) }
    }

    /// How many threads take part.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `call(0)`, …, `call(tasks - 1)`, each once, on all threads, and returns when all are done.
    ///
    /// Panics when one of them does, once no thread uses `call` any more. Which of the others ran is open then.
    pub fn run(&self, tasks: usize, call: &(dyn Fn(usize) + Sync)) {
        self.start(tasks, true, &|range| range.for_each(call));
    }

    /// Calls `call` for ranges that together are `0..tasks`, on all threads, and returns when all are done. Ranges are long
    /// at first, which is good for reading memory in order, and short at the end, so that threads finish together.
    pub fn share(&self, tasks: usize, call: &(dyn Fn(Range<usize>) + Sync)) {
        self.start(tasks, false, call);
    }

    fn start(&self, tasks: usize, single: bool, call: &(dyn Fn(Range<usize>) + Sync)) {
        if tasks <= 1 || self.helpers.is_empty() {
            if tasks > 0 {
                call(0..tasks);
            }
            return;
        }
        let one_at_a_time = self.running.lock();
        // SAFETY: only the lifetime is erased. The job is taken back below, and nothing before that unwinds.
        let call: &'static (dyn Fn(Range<usize>) + Sync) = unsafe { std::mem::transmute(call) };
        let job = Job { call, tasks, single, threads: self.threads() };
        {
            let mut state = self.shared.state.lock();
            state.job = Some(job);
            state.epoch += 1;
            self.shared.next.store(0, Ordering::Relaxed);
            // What panicked before was another job.
            self.shared.panicked.store(false, Ordering::Relaxed);
            self.shared.epoch.store(state.epoch, Ordering::Relaxed);
        }
        self.shared.wake.notify_all();
        // The job must be taken back even when the caller's share panics.
        let own = catch_unwind(AssertUnwindSafe(|| work(&self.shared, job)));
        self.shared.take_back();
        let helper_panicked = self.shared.panicked.load(Ordering::Relaxed);
        drop(one_at_a_time);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        assert!(!helper_panicked, "a compute thread panicked");
    }
}

impl Shared {
    /// Gives the job to no further helper, and waits for those that hold it.
    fn take_back(&self) {
        self.state.lock().job = None;
        let mut spins = 0;
        while self.active.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { spin_loop() } else { thread::yield_now() }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.state.lock().stop = true;
        self.shared.epoch.fetch_add(1, Ordering::Relaxed);
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // What panicked in a helper was its job's, and the helper went on.
            let _ = helper.join();
        }
    }
}

fn work(shared: &Shared, job: Job) {
    while let Some(range) = take(&shared.next, job) {
        // SAFETY: `start` keeps the closure alive while any helper is active.
        unsafe { (*job.call)(range) };
    }
}

fn take(next: &AtomicUsize, job: Job) -> Option<Range<usize>> {
    let size = |first: usize| match job.single {
        true => 1,
        false => ((job.tasks - first) / (2 * job.threads)).max(1),
    };
    let more = |first: usize| (first < job.tasks).then(|| first + size(first));
    let first = next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
    Some(first..first + size(first))
}

fn help(shared: &Shared) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.epoch.load(Ordering::Relaxed) == seen && spins < SPINS {
            spins += 1;
            spin_loop();
        }
        let job = {
            let mut state = shared.state.lock();
            while state.epoch == seen && !state.stop {
                shared.wake.wait(&mut state);
            }
            if state.stop {
                return;
            }
            seen = state.epoch;
            if state.job.is_some() {
                state.active += 1;
                shared.active.store(state.active, Ordering::Release);
            }
            state.job
        };
        let Some(job) = job else { continue };
        if catch_unwind(AssertUnwindSafe(|| work(shared, job))).is_err() {
            shared.panicked.store(true, Ordering::Relaxed);
        }
        let mut state = shared.state.lock();
        state.active -= 1;
        shared.active.store(state.active, Ordering::Release);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(3);
        for tasks in [0, 1, 2, 7, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..50 {
                pool.run(tasks, &|task| {
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
            }
            for _ in 0..50 {
                pool.share(tasks, &|range| {
                    range.for_each(|task| {
                        counts[task].fetch_add(1, Ordering::Relaxed);
                    })
                });
            }
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 100));
        }
    }
}
