//! What threads meet through: the real thing, or in a build with `--cfg loom` loom's types in its place.

#[cfg(not(loom))]
pub(crate) use self::real::*;
#[cfg(loom)]
pub(crate) use self::tried::*;

#[cfg(not(loom))]
mod real {
    pub(crate) use std::hint::spin_loop;
    pub(crate) use std::sync::Arc;
    pub(crate) use std::sync::atomic::{AtomicBool, AtomicUsize};
    pub(crate) use std::thread;

    pub(crate) use parking_lot::{Condvar, Mutex};

    /// Spins before a waiting thread sleeps; some tens of microseconds.
    pub(crate) const SPINS: u32 = 4000;
}

/// parking_lot's interface, over what loom has of the standard library's.
#[cfg(loom)]
mod tried {
    use std::ops::{Deref, DerefMut};

    pub(crate) use loom::hint::spin_loop;
    pub(crate) use loom::sync::Arc;
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicUsize};
    pub(crate) use loom::thread;

    /// Each is one more place where threads may take turns: one that is spun and then slept is all there is to see.
    pub(crate) const SPINS: u32 = 1;

    const UNPOISONED: &str = "nothing panics while it holds a lock";

    #[derive(Default)]
    pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

    /// Empty only while its thread waits.
    pub(crate) struct MutexGuard<'a, T>(Option<loom::sync::MutexGuard<'a, T>>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(loom::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            MutexGuard(Some(self.0.lock().expect(UNPOISONED)))
        }
    }

    impl<T> Deref for MutexGuard<'_, T> {
        type Target = T;

        fn deref(&self) -> &T {
            self.0.as_ref().expect("its thread does not wait")
        }
    }

    impl<T> DerefMut for MutexGuard<'_, T> {
        fn deref_mut(&mut self) -> &mut T {
            self.0.as_mut().expect("its thread does not wait")
        }
    }

    #[derive(Default)]
    pub(crate) struct Condvar(loom::sync::Condvar);

    impl Condvar {
        pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let held = guard.0.take().expect("its thread does not wait");
            guard.0 = Some(self.0.wait(held).expect(UNPOISONED));
        }

        pub(crate) fn notify_all(&self) {
            self.0.notify_all();
        }
    }
}
