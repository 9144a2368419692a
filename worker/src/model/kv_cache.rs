//! The KV cache: blocks of sixteen positions, in a region that can shrink and grow while rows run. Whose they are says the
//! [`BlockPool`]; here are their bytes.

use super::block_pool::BlockPool;
use super::config::ModelConfig;
use super::weights::Dtype;
use crate::engine::arena::Region;
pub use turret_kernels::attention::BLOCK_TOKENS;
use turret_kernels::attention::{CacheBlocks, CacheShape};

/// Blocks that a sequence of this many tokens takes.
pub fn blocks_for(tokens: u32) -> u32 {
    tokens.div_ceil(BLOCK_TOKENS as u32)
}

/// The shape of a base's cache. Keys and values are kept in the dtype of the weights.
pub fn cache_shape(config: &ModelConfig, dtype: Dtype) -> CacheShape {
    CacheShape {
        layers: config.layers,
        kv_heads: config.kv_heads,
        group: config.heads / config.kv_heads,
        head_dim: config.head_dim,
        dtype,
    }
}

/// The blocks of a base, and their bytes.
#[derive(Debug)]
pub struct KvCache {
    shape: CacheShape,
    region: Region,
    /// Who holds which block.
    pub pool: BlockPool,
}

impl KvCache {
    /// A cache without blocks, in a region of reserved addresses. [`Self::resize`] gives it some.
    pub(crate) fn new(shape: CacheShape, region: Region) -> Self {
        Self { shape, region, pool: BlockPool::default() }
    }

    /// The most blocks it can grow to.
    pub(crate) fn limit(&self) -> u32 {
        u32::try_from(self.region.span() / self.shape.block_bytes()).unwrap_or(u32::MAX)
    }

    /// Changes how many blocks there are. When it shrinks, blocks that rows hold beyond the end are moved down and their
    /// tables rewritten; there must be as many as rows hold.
    pub(crate) fn resize<'a>(&mut self, total: u32, tables: impl Iterator<Item = &'a mut Vec<u32>>) {
        assert!(total <= self.limit(), "there is no room for so many blocks");
        let size = self.shape.block_bytes();
        let bytes = u64::from(total) * size as u64;
        if total >= self.pool.total() {
            self.region.set_charged(bytes);
            self.pool.resize(total);
            return;
        }
        let moves = self.pool.resize(total);
        for &(from, to) in &moves {
            let from = from as usize * size;
            self.region.bytes_mut().copy_within(from..from + size, to as usize * size);
        }
        for block in tables.flatten().filter(|block| **block >= total) {
            let moved = moves.binary_search_by_key(block, |(from, _)| *from);
            *block = moves[moved.expect("every held block beyond the end has moved")].1;
        }
        self.region.set_charged(bytes);
    }

    /// Makes every number in a kept block not-a-number, and says how many blocks that are.
    #[cfg(test)]
    pub(crate) fn poison_kept(&mut self) -> u32 {
        let size = self.shape.block_bytes();
        for block in self.pool.kept_blocks() {
            self.region.bytes_mut()[block as usize * size..][..size].fill(0xff);
        }
        self.pool.kept()
    }

    /// The blocks as the kernels take them.
    pub(crate) fn blocks(&mut self) -> CacheBlocks<'_> {
        CacheBlocks::new(self.shape, self.region.bytes_mut())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::arena::{Arena, Part};

    #[test]
    fn a_smaller_cache_keeps_what_rows_hold() {
        let shape = CacheShape { layers: 1, kv_heads: 1, group: 1, head_dim: 8, dtype: Dtype::F32 };
        let size = shape.block_bytes();
        let arena = Arena::new(1 << 28).unwrap();
        let region = arena.reserve_addresses(Part::Kv, 64 * size as u64).unwrap();
        let mut cache = KvCache::new(shape, region);
        cache.resize(20, std::iter::empty());
        let mut rows: Vec<Vec<u32>> =
            (0..5).map(|_| (0..4).map(|_| cache.pool.take().expect("20 blocks")).collect()).collect();
        assert_eq!(cache.pool.take(), None);
        for block in rows.iter().flatten() {
            cache.region.bytes_mut()[*block as usize * size..][..size].fill(*block as u8 + 1);
        }
        let expected: Vec<Vec<u8>> =
            rows.iter().map(|row| row.iter().map(|b| *b as u8 + 1).collect()).collect();
        for row in [1, 0] {
            cache.pool.give_back(&mut rows[row], 0);
        }
        cache.resize(12, rows.iter_mut());
        assert_eq!((cache.pool.total(), cache.pool.free(), arena.used().kv_bytes), (12, 0, 12 * size as u64));
        for (row, expected) in rows.iter().zip(&expected).skip(2) {
            for (block, fill) in row.iter().zip(expected) {
                assert!(*block < 12);
                assert!(cache.region.bytes()[*block as usize * size..][..size].iter().all(|b| b == fill));
            }
        }
        cache.resize(64, rows.iter_mut());
        let mut held: Vec<u32> = rows.into_iter().flatten().collect();
        held.extend(std::iter::from_fn(|| cache.pool.take()));
        held.sort();
        assert_eq!(held, (0..64).collect::<Vec<_>>(), "every block is held once or free once");
    }
}
