//! Device memory: one reservation of address space, handed out as regions against a byte budget.
//!
//! On a CPU worker the device is plain memory, and its pages are the processor's own: the arena reserves far
//! more *addresses* than it may ever fill, and memory is only used where a region has been written. So lenses
//! of a megabyte and of two gigabytes can come and go without moving one another: with `M` bytes live and
//! sizes between `s` and `S`, first fit never needs more than about `M * log2(S / s)` addresses (Robson), and the
//! arena reserves [`ADDRESS_FACTOR`] times the machine's memory.
//!
//! Invariants:
//! - A [`Region`] is the only way to the bytes it covers; addresses outside of regions are not mapped, so a
//!   stale reference faults instead of reading another lens.
//! - A region's bytes are zero when it is handed out, and given back to the operating system when it is dropped,
//!   before `drop` returns.
//! - What is charged never exceeds what the engine allowed: only the engine thread reserves, any thread may free.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;

/// Reserved addresses per byte of machine memory.
pub const ADDRESS_FACTOR: usize = 24;
const PAGE: usize = 4096;
const HUGE_PAGE: usize = 2 << 20;

/// What a region is for. Each part has its own line in the budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Weights of a base.
    Base,
    /// Weights of a lens.
    Lens,
    /// The KV cache.
    Kv,
}

/// Bytes charged per part.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ArenaUse {
    /// Bases.
    pub base_bytes: u64,
    /// Lenses.
    pub lens_bytes: u64,
    /// KV cache.
    pub kv_bytes: u64,
}

/// Why the arena cannot be made or a region cannot be had from it.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// The operating system refused.
    #[error(
        "failed to {attempt} {bytes} bytes of address space (check `ulimit -v` and vm.overcommit_memory)"
    )]
    System {
        /// What was tried.
        attempt: &'static str,
        /// How much.
        bytes: usize,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No stretch of free addresses is long enough.
    #[error("no {0} free bytes of address space in one piece")]
    Addresses(usize),
}

struct State {
    /// Free address ranges: offset to length. Neighbours are always joined.
    free: BTreeMap<usize, usize>,
    used: ArenaUse,
}

struct Inner {
    mapping: *mut u8,
    mapping_len: usize,
    /// The first huge-page boundary inside the mapping; offsets count from here.
    start: *mut u8,
    state: Mutex<State>,
}

// SAFETY: these are only addresses; every access goes through a `Region`, which owns its range exclusively.
unsafe impl Send for Inner {}
// SAFETY: as above; the bookkeeping is behind a mutex.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `Arena::new` with this start and length, and no region outlives it
        // (each holds an `Arc` of this).
        unsafe { libc::munmap(self.mapping.cast(), self.mapping_len) };
    }
}

/// The reservation. Cheap to clone.
#[derive(Clone)]
pub struct Arena(Arc<Inner>);

impl Arena {
    /// Reserves addresses for a machine with `machine_bytes` of memory.
    pub fn new(machine_bytes: u64) -> Result<Self, ArenaError> {
        let len = (machine_bytes as usize).saturating_mul(ADDRESS_FACTOR).next_multiple_of(HUGE_PAGE);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh anonymous mapping at an address the kernel chooses touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(system("reserve", len));
        }
        let skip = (start as usize).next_multiple_of(HUGE_PAGE) - start as usize;
        let state = State { free: BTreeMap::from([(0, len - skip)]), used: ArenaUse::default() };
        let mapping: *mut u8 = start.cast();
        let start = mapping.wrapping_add(skip);
        Ok(Self(Arc::new(Inner { mapping, mapping_len: len, start, state: Mutex::new(state) })))
    }

    /// Bytes charged now.
    pub fn used(&self) -> ArenaUse {
        self.0.state.lock().used
    }

    /// A zeroed region of `bytes`, charged to `part`. The caller has checked the budget.
    pub(crate) fn reserve(&self, part: Part, bytes: u64) -> Result<Region, ArenaError> {
        let mut region = self.reserve_addresses(part, bytes)?;
        region.set_charged(bytes);
        Ok(region)
    }

    /// A region that may grow up to `span_bytes` and is charged for nothing yet.
    pub(crate) fn reserve_addresses(&self, part: Part, span_bytes: u64) -> Result<Region, ArenaError> {
        let len = (span_bytes as usize).max(1).next_multiple_of(PAGE);
        // Small regions share huge-page slots, large ones start at one.
        let align = if len >= HUGE_PAGE { HUGE_PAGE } else { PAGE };
        let offset = self.0.take(len, align).ok_or(ArenaError::Addresses(len))?;
        // SAFETY: the range was just taken from the free list, so it is ours alone and inside the mapping.
        let start = unsafe { self.0.start.add(offset) };
        let region = Region { arena: self.0.clone(), part, start, offset, len, charged: 0 };
        // SAFETY: as above.
        if unsafe { libc::mprotect(start.cast(), len, libc::PROT_READ | libc::PROT_WRITE) } != 0 {
            return Err(system("map", len));
        }
        if len >= HUGE_PAGE {
            // Only advice: without transparent huge pages everything still works. The tail that is no whole
            // huge page stays in small pages, so a region never uses more than it is charged for.
            // SAFETY: as above.
            unsafe { libc::madvise(start.cast(), len / HUGE_PAGE * HUGE_PAGE, libc::MADV_HUGEPAGE) };
        }
        Ok(region)
    }
}

impl Inner {
    fn take(&self, len: usize, align: usize) -> Option<usize> {
        let mut state = self.state.lock();
        let (offset, length, at) = state.free.iter().find_map(|(&offset, &length)| {
            let at = offset.next_multiple_of(align);
            (at + len <= offset + length).then_some((offset, length, at))
        })?;
        state.free.remove(&offset);
        if at > offset {
            state.free.insert(offset, at - offset);
        }
        if offset + length > at + len {
            state.free.insert(at + len, offset + length - at - len);
        }
        Some(at)
    }

    fn give_back(&self, mut offset: usize, mut len: usize) {
        let mut state = self.state.lock();
        if let Some((&before, &length)) = state.free.range(..offset).next_back()
            && before + length == offset
        {
            state.free.remove(&before);
            (offset, len) = (before, length + len);
        }
        if let Some(after) = state.free.remove(&(offset + len)) {
            len += after;
        }
        state.free.insert(offset, len);
    }
}

/// Exclusive bytes of the arena. Loader threads fill one on their own while the engine keeps stepping;
/// dropping it gives its memory back.
pub struct Region {
    arena: Arc<Inner>,
    part: Part,
    start: *mut u8,
    offset: usize,
    len: usize,
    charged: u64,
}

// SAFETY: a region owns its bytes exclusively; `&Region` only reads them and `&mut Region` is needed to write.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// How many bytes may be used.
    pub fn len(&self) -> usize {
        self.charged as usize
    }

    /// Whether nothing may be used.
    pub fn is_empty(&self) -> bool {
        self.charged == 0
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `charged <= len`, the range is mapped readable, initialised (zero or written), and no `&mut`
        // exists while `self` is borrowed.
        unsafe { std::slice::from_raw_parts(self.start, self.charged as usize) }
    }

    /// The bytes, to fill.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.charged as usize) }
    }

    /// Addresses this region may grow to.
    pub(crate) fn span(&self) -> usize {
        self.len
    }

    /// Changes how many bytes are used. What is cut off is given back to the system at once.
    pub(crate) fn set_charged(&mut self, bytes: u64) {
        assert!(bytes as usize <= self.len, "a region cannot outgrow its addresses");
        let keep = (bytes as usize).next_multiple_of(PAGE);
        let had = (self.charged as usize).next_multiple_of(PAGE);
        if keep < had {
            // SAFETY: the tail is inside our own range; after this it reads as zeros again.
            unsafe { libc::madvise(self.start.add(keep).cast(), had - keep, libc::MADV_DONTNEED) };
        }
        let used = &mut self.arena.state.lock().used;
        let line = match self.part {
            Part::Base => &mut used.base_bytes,
            Part::Lens => &mut used.lens_bytes,
            Part::Kv => &mut used.kv_bytes,
        };
        *line = *line - self.charged + bytes;
        self.charged = bytes;
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: our own range. Order matters: the memory is given back, then made unreachable, then charged
        // off, and only then may another region have these addresses.
        unsafe {
            libc::madvise(self.start.cast(), self.len, libc::MADV_DONTNEED);
            libc::mprotect(self.start.cast(), self.len, libc::PROT_NONE);
        }
        self.set_charged(0);
        self.arena.give_back(self.offset, self.len);
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region")
            .field("part", &self.part)
            .field("bytes", &self.charged)
            .finish_non_exhaustive()
    }
}

fn system(attempt: &'static str, bytes: usize) -> ArenaError {
    ArenaError::System { attempt, bytes, source: std::io::Error::last_os_error() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn resident_bytes() -> usize {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() * PAGE
    }

    #[test]
    fn what_is_dropped_is_given_back_to_the_system() {
        let arena = Arena::new(1 << 30).unwrap();
        let mut region = arena.reserve(Part::Lens, 256 * MIB).unwrap();
        region.bytes_mut().fill(1);
        let filled = resident_bytes();
        assert_eq!(arena.used().lens_bytes, 256 * MIB);
        drop(region);
        assert!(
            resident_bytes() + 200 * MIB as usize <= filled,
            "other tests run beside, hence not all of it"
        );
        assert_eq!(arena.used(), ArenaUse::default());
    }

    #[test]
    fn a_region_shrinks_and_grows_and_reads_zero_where_it_was_cut() {
        let arena = Arena::new(1 << 30).unwrap();
        let mut region = arena.reserve_addresses(Part::Kv, 16 * MIB).unwrap();
        region.set_charged(8 * MIB);
        region.bytes_mut().fill(7);
        region.set_charged(MIB);
        region.set_charged(4 * MIB);
        assert_eq!(arena.used().kv_bytes, 4 * MIB);
        assert!(region.bytes()[..MIB as usize].iter().all(|b| *b == 7));
        assert!(region.bytes()[MIB as usize..].iter().all(|b| *b == 0));
    }

    #[test]
    fn lenses_of_all_sizes_come_and_go_without_fragmenting_it() {
        // Sixty megabytes live at most, in a space made for sixty-four: only addresses could run out.
        let arena = Arena::new(64 * MIB).unwrap();
        let mut live: Vec<Region> = Vec::new();
        let mut random = 1_u64;
        for _ in 0..20_000 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let bytes = 1 + (1 << ((random >> 40) % 25)) + (random >> 50);
            while arena.used().lens_bytes + bytes > 60 * MIB {
                let index = (random >> 20) as usize % live.len();
                live.swap_remove(index);
            }
            let mut region = arena.reserve(Part::Lens, bytes).unwrap();
            assert_eq!((region.bytes()[0], region.len() as u64), (0, bytes));
            region.bytes_mut()[0] = 1;
            live.push(region);
        }
        live.clear();
        assert_eq!(arena.used(), ArenaUse::default());
        assert_eq!(arena.0.state.lock().free.len(), 1, "neighbours are joined again");
    }
}
