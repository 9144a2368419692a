//! Whatever is opened is there or refused, within the memory and with a sound error.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::error::Error;

use crate::folder::Folder;

/// Counts what this thread holds. Loading a folder is the work of one thread.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    let _ = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _ = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: everything is handed to the system's allocator as it came; counting does not allocate.
#[allow(
    unsafe_code,
    reason = "an allocator is an unsafe trait, and there is no other way to see what is allocated"
)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size as isize - layout.size() as isize);
        // SAFETY: as above.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What opening a folder may hold at once, beside as much as its files: the largest headers and settings that are read
/// need some forty.
const BOUND_BYTES: isize = 64 << 20;
/// A message is for a person, and goes into a status.
const MAX_MESSAGE_BYTES: usize = 2048;

/// Opens something; it must be there or be refused by a sound error, within the memory.
pub(crate) fn sound<T, E: Error>(folder: &Folder, open: impl FnOnce() -> Result<T, E>) -> Option<T> {
    let before = HELD.get();
    MOST.set(before);
    let result = open();
    let peak = MOST.get() - before;
    let bound = BOUND_BYTES + folder.bytes() as isize;
    assert!(peak <= bound, "{peak} bytes were held, {bound} is the bound");
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            let message = message(&error);
            assert!(message.len() <= MAX_MESSAGE_BYTES, "{} bytes: {message:.300}", message.len());
            let names =
                ["`", ".json", ".jinja", "tensor", "chat template"].iter().any(|name| message.contains(name));
            assert!(names, "it says nothing of where: {message}");
            None
        }
    }
}

pub(crate) fn message(error: &dyn Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        message = format!("{message}: {error}");
        source = error.source();
    }
    message
}
