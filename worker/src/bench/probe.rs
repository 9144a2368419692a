//! How fast this machine reads memory: the limit of a decode step, measured in the same process and with the same threads.

use crate::engine::arena::{Arena, ArenaError, Part, Region};
use turret_threads::Pool;

/// Numbers read at a time by one thread between two looks at what is left.
const CHUNK: usize = 1 << 17;

/// A block of memory as large as a base's weights, from an arena like theirs: in huge pages, where the machine has them.
pub struct Probe {
    memory: Region,
}

impl Probe {
    /// Memory of so many bytes, written once so that it is there.
    pub fn new(bytes: u64) -> Result<Self, ArenaError> {
        let bytes = bytes.next_multiple_of(8);
        let mut memory = Arena::new(bytes)?.reserve(Part::Base, bytes)?;
        memory.bytes_mut().fill(1);
        Ok(Self { memory })
    }

    /// Bytes that one pass reads.
    pub fn bytes(&self) -> u64 {
        self.memory.len() as u64
    }

    /// Reads everything once, on all threads, and gives something that depends on all of it.
    pub fn pass(&self, pool: &Pool) -> u64 {
        use std::sync::atomic::{AtomicU64, Ordering};
        let all = AtomicU64::new(0);
        let numbers: &[u64] = bytemuck::cast_slice(self.memory.bytes());
        pool.share(numbers.len().div_ceil(CHUNK), &|chunks| {
            let last = (chunks.end * CHUNK).min(numbers.len());
            all.fetch_xor(fold(&numbers[chunks.start * CHUNK..last]), Ordering::Relaxed);
        });
        all.into_inner()
    }
}

fn fold(numbers: &[u64]) -> u64 {
    // Several independent sums, so that only memory is waited for.
    let mut lanes = [0_u64; 64];
    let (blocks, rest) = numbers.as_chunks::<64>();
    for block in blocks {
        for (lane, number) in lanes.iter_mut().zip(block) {
            *lane ^= number;
        }
    }
    lanes.iter().chain(rest).fold(0, |all, x| all ^ x)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_reads_everything() {
        let mut probe = Probe::new(3_000_000).unwrap();
        let pool = Pool::new(2);
        let before = probe.pass(&pool);
        for at in [0, 8 * CHUNK, probe.memory.len() - 8] {
            probe.memory.bytes_mut()[at] ^= 4;
            assert_eq!(probe.pass(&pool), before ^ 4, "byte {at}");
            probe.memory.bytes_mut()[at] ^= 4;
        }
    }
}
