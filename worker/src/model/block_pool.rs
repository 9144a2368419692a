//! Which KV blocks rows hold, which are kept for a prefix that may come again, and which are free. Pure bookkeeping: no bytes.
//!
//! # Nodes
//! A block that is whole (all of its positions are computed) may be *registered* under the node it follows and the
//! tokens it holds. That gives it a node of its own, so blocks form a tree whose roots say what the keys and values depend on
//! besides the tokens: [`Seed`]. Nodes are found by equality of all tokens and of the seed, never by a hash alone, and are never
//! named twice: a wrong hit is impossible, a lost one costs a computation.
//!
//! # Invariants
//! - A block is held by rows, or kept (registered, held by none), or free. `held + kept + free = total`.
//! - Who holds a registered block holds, or holds an equal of, the block before it. Rows give back from their last block
//!   to their first, so whatever is kept went out of use no later than the block before it: taking the longest
//!   unused one first never leaves a node without the one it follows.
//! - Kept blocks count as free: [`BlockPool::take`] forgets one when none is free.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use turret_kernels::attention::BLOCK_TOKENS;

/// Tokens of a whole block.
pub type BlockTokens = [u32; BLOCK_TOKENS];

/// A place in the tree: a seed, or a registered block under the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(u64);

/// What keys and values depend on besides the tokens before them. The base is not in it: a pool belongs to one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Seed {
    /// The row's lenses in order: what names their content, and the bits of their scale.
    pub lenses: Vec<(LensContent, u32)>,
    /// Whether positions are rotated as in a sequence beyond the original context.
    pub long: bool,
    /// What the caller separates its rows from others' with.
    pub salt: Option<Arc<str>>,
}

/// What names the content of a lens, so that another lens under the same name is another one.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LensContent {
    /// The digest of its files.
    Digest(Arc<str>),
    /// The installation, for a lens without a digest.
    Installed(u64),
}

/// Seeds that are remembered at most. Forgetting one only loses what was kept under it.
const MAX_SEEDS: usize = 4096;
/// No block: the end of the list of kept ones.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Default)]
struct Slot {
    holders: u32,
    /// Its node, the node it follows and its tokens, when it is registered.
    entry: Option<(NodeId, Key)>,
    /// Neighbours in the list of kept blocks.
    older: u32,
    newer: u32,
}

type Key = (NodeId, BlockTokens);

/// The blocks of a cache.
#[derive(Debug)]
pub struct BlockPool {
    slots: Vec<Slot>,
    /// Lowest first.
    free: BinaryHeap<Reverse<u32>>,
    by_key: HashMap<Key, u32>,
    seeds: HashMap<Seed, (NodeId, u64)>,
    /// Ends of the list of kept blocks: longest unused first.
    oldest: u32,
    newest: u32,
    kept: u32,
    next_node: u64,
}

impl Default for BlockPool {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: BinaryHeap::new(),
            by_key: HashMap::new(),
            seeds: HashMap::new(),
            oldest: NONE,
            newest: NONE,
            kept: 0,
            next_node: 0,
        }
    }
}

impl BlockPool {
    /// Blocks in all.
    pub fn total(&self) -> u32 {
        self.slots.len() as u32
    }

    /// Blocks no row holds.
    pub fn free(&self) -> u32 {
        self.free.len() as u32 + self.kept
    }

    /// Blocks that rows hold.
    pub fn used(&self) -> u32 {
        self.total() - self.free()
    }

    /// Of the free ones, those that are kept for a prefix.
    pub fn kept(&self) -> u32 {
        self.kept
    }

    /// A node that only its caller knows.
    pub fn private_node(&mut self) -> NodeId {
        self.next_node += 1;
        NodeId(self.next_node)
    }

    /// The root of a seed.
    pub fn root(&mut self, seed: &Seed) -> NodeId {
        let now = self.private_node();
        if let Some((node, used)) = self.seeds.get_mut(seed) {
            *used = now.0;
            return *node;
        }
        if self.seeds.len() >= MAX_SEEDS {
            let oldest = self.seeds.iter().min_by_key(|(_, (_, used))| *used).map(|(seed, _)| seed.clone());
            oldest.and_then(|seed| self.seeds.remove(&seed));
        }
        self.seeds.insert(seed.clone(), (now, now.0));
        now
    }

    /// The block that follows a node with these tokens, and its own node.
    pub fn find(&self, after: NodeId, tokens: &BlockTokens) -> Option<(u32, NodeId)> {
        let block = *self.by_key.get(&(after, *tokens))?;
        let (node, _) = self.slots[block as usize].entry.expect("what is found is registered");
        Some((block, node))
    }

    /// Blocks that are kept for a prefix.
    #[cfg(test)]
    pub(crate) fn kept_blocks(&self) -> Vec<u32> {
        let kept = |block: &u32| self.is_idle(*block) && self.slots[*block as usize].entry.is_some();
        (0..self.total()).filter(kept).collect()
    }

    /// Whether no row holds a block.
    pub fn is_idle(&self, block: u32) -> bool {
        self.slots[block as usize].holders == 0
    }

    /// How many rows hold a block.
    pub fn holders(&self, block: u32) -> u32 {
        self.slots[block as usize].holders
    }

    /// Holds a block that was found.
    pub fn hold(&mut self, block: u32) {
        if self.is_idle(block) {
            self.unlink(block);
        }
        self.slots[block as usize].holders += 1;
    }

    /// Takes the lowest free block, or forgets the kept one that was unused for longest.
    pub fn take(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(Reverse(block)) => block,
            None if self.kept > 0 => {
                self.forget_oldest();
                self.free.pop().map(|Reverse(block)| block)?
            }
            None => return None,
        };
        self.slots[block as usize].holders = 1;
        Some(block)
    }

    /// Makes a held, whole block findable. Gives the block to hold in its place, which is another one when an equal block was
    /// registered before, and its node.
    pub fn register(&mut self, after: NodeId, tokens: &BlockTokens, block: u32) -> (u32, NodeId) {
        if let Some((equal, node)) = self.find(after, tokens) {
            if equal != block {
                self.hold(equal);
                self.give_back_one(block);
            }
            return (equal, node);
        }
        let node = self.private_node();
        self.slots[block as usize].entry = Some((node, (after, *tokens)));
        self.by_key.insert((after, *tokens), block);
        (block, node)
    }

    /// Gives a row's blocks back, the last one first. What is registered is kept, but for blocks from `unfindable_from` on.
    pub fn give_back(&mut self, blocks: &mut Vec<u32>, unfindable_from: usize) {
        while let Some(block) = blocks.pop() {
            let last = self.slots[block as usize].holders == 1;
            if last && blocks.len() >= unfindable_from {
                self.unregister(block);
            }
            self.give_back_one(block);
        }
    }

    fn give_back_one(&mut self, block: u32) {
        let slot = &mut self.slots[block as usize];
        slot.holders -= 1;
        if slot.holders > 0 {
            return;
        }
        match slot.entry {
            Some(_) => self.link(block),
            None => self.free.push(Reverse(block)),
        }
    }

    /// Forgets every kept block.
    pub fn forget_kept(&mut self) {
        while self.kept > 0 {
            self.forget_oldest();
        }
    }

    /// Changes how many blocks there are; not fewer than rows hold. Gives the moves `(from, to)` of held and kept blocks that
    /// lay beyond the new end, in order of their sources. No move's source is another's target.
    pub(crate) fn resize(&mut self, total: u32) -> Vec<(u32, u32)> {
        assert!(total >= self.used(), "rows hold more blocks");
        let had = self.total();
        if total >= had {
            self.slots.resize_with(total as usize, Slot::default);
            self.free.extend((had..total).map(Reverse));
            self.reserve();
            return Vec::new();
        }
        while self.used() + self.kept > total {
            self.forget_oldest();
        }
        self.free.retain(|Reverse(block)| *block < total);
        let mut moves = Vec::new();
        for from in total..had {
            if !(self.is_idle(from) && self.slots[from as usize].entry.is_none()) {
                let Reverse(to) = self.free.pop().expect("what is held and kept fits");
                self.rename(from, to);
                moves.push((from, to));
            }
        }
        self.slots.truncate(total as usize);
        moves
    }

    /// Gives a held or kept block another number.
    fn rename(&mut self, from: u32, to: u32) {
        let slot = std::mem::take(&mut self.slots[from as usize]);
        if let Some((_, key)) = slot.entry {
            self.by_key.insert(key, to);
        }
        if slot.holders == 0 {
            *self.after(slot.older) = to;
            *self.before(slot.newer) = to;
        }
        self.slots[to as usize] = slot;
    }

    /// Makes room for every block, so that no step allocates. Twice: a table that is at most half full clears its
    /// leavings in place.
    fn reserve(&mut self) {
        let total = self.slots.len();
        self.free.reserve(total - self.free.len());
        self.by_key.reserve(2 * total - self.by_key.len());
    }

    fn unregister(&mut self, block: u32) {
        if let Some((_, key)) = self.slots[block as usize].entry.take() {
            self.by_key.remove(&key);
        }
    }

    /// Frees the kept block that was unused for longest.
    fn forget_oldest(&mut self) {
        let block = self.oldest;
        self.unlink(block);
        self.unregister(block);
        self.free.push(Reverse(block));
    }

    /// Puts a block at the end of the list of kept ones.
    fn link(&mut self, block: u32) {
        let older = self.newest;
        (self.slots[block as usize].older, self.slots[block as usize].newer) = (older, NONE);
        *self.after(older) = block;
        self.newest = block;
        self.kept += 1;
    }

    fn unlink(&mut self, block: u32) {
        let Slot { older, newer, .. } = self.slots[block as usize];
        *self.after(older) = newer;
        *self.before(newer) = older;
        self.kept -= 1;
    }

    /// Where the list says what is newer than a block; than none, the oldest.
    fn after(&mut self, block: u32) -> &mut u32 {
        match block {
            NONE => &mut self.oldest,
            block => &mut self.slots[block as usize].newer,
        }
    }

    /// Where the list says what is older than a block; than none, the newest.
    fn before(&mut self, block: u32) -> &mut u32 {
        match block {
            NONE => &mut self.newest,
            block => &mut self.slots[block as usize].older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn seed(lens: u64) -> Seed {
        Seed { lenses: vec![(LensContent::Installed(lens), 0)], long: false, salt: None }
    }

    fn pool(total: u32) -> BlockPool {
        let mut pool = BlockPool::default();
        pool.resize(total);
        pool
    }

    /// Takes and registers blocks with these fills, and gives the blocks.
    fn row(pool: &mut BlockPool, root: NodeId, fills: &[u32]) -> Vec<u32> {
        let mut node = root;
        let mut blocks = Vec::new();
        for fill in fills {
            let taken = pool.take().unwrap();
            let (block, next) = pool.register(node, &[*fill; BLOCK_TOKENS], taken);
            blocks.push(block);
            node = next;
        }
        blocks
    }

    #[test]
    fn a_prefix_is_found_after_its_row_went_and_only_under_its_seed() {
        let mut pool = pool(8);
        let root = pool.root(&seed(1));
        let mut blocks = row(&mut pool, root, &[1, 2]);
        let other = pool.root(&seed(2));
        pool.give_back(&mut blocks, usize::MAX);
        assert_eq!((pool.free(), pool.kept(), pool.used()), (8, 2, 0));
        let (first, node) = pool.find(root, &[1; BLOCK_TOKENS]).unwrap();
        assert!(pool.find(node, &[2; BLOCK_TOKENS]).is_some());
        assert_eq!(pool.find(other, &[1; BLOCK_TOKENS]), None);
        assert_eq!(pool.find(root, &[2; BLOCK_TOKENS]), None, "the second block follows the first only");
        assert_eq!(pool.root(&seed(1)), root);
        pool.hold(first);
        assert_eq!((pool.free(), pool.kept(), pool.used()), (7, 1, 1));
    }

    #[test]
    fn equal_blocks_become_one() {
        let mut pool = pool(8);
        let root = pool.root(&seed(1));
        let mut one = row(&mut pool, root, &[1, 2]);
        let mut two = row(&mut pool, root, &[1, 2, 3]);
        assert_eq!((&one[..], pool.used()), (&two[..2], 3));
        pool.give_back(&mut one, usize::MAX);
        assert_eq!(pool.used(), 3);
        pool.give_back(&mut two, usize::MAX);
        assert_eq!((pool.used(), pool.kept()), (0, 3));
    }

    #[test]
    fn the_longest_unused_end_of_a_prefix_is_forgotten_first() {
        let mut pool = pool(4);
        let root = pool.root(&seed(1));
        let mut one = row(&mut pool, root, &[1, 2]);
        let mut two = row(&mut pool, root, &[1, 3]);
        pool.give_back(&mut one, usize::MAX);
        pool.give_back(&mut two, usize::MAX);
        let (_, first) = pool.find(root, &[1; BLOCK_TOKENS]).unwrap();
        let mut taken = vec![pool.take().unwrap(), pool.take().unwrap()];
        assert_eq!(pool.find(first, &[2; BLOCK_TOKENS]), None);
        assert!(pool.find(first, &[3; BLOCK_TOKENS]).is_some());
        taken.push(pool.take().unwrap());
        assert_eq!(pool.find(first, &[3; BLOCK_TOKENS]), None);
        assert!(pool.find(root, &[1; BLOCK_TOKENS]).is_some(), "the first block goes last");
        taken.push(pool.take().unwrap());
        assert_eq!((pool.take(), pool.free(), pool.by_key.len()), (None, 0, 0));
    }

    #[test]
    fn what_nobody_can_find_is_free_at_once() {
        let mut pool = pool(4);
        let root = pool.root(&seed(1));
        let mut blocks = row(&mut pool, root, &[1, 2, 3]);
        pool.give_back(&mut blocks, 1);
        assert_eq!((pool.kept(), pool.free(), pool.by_key.len()), (1, 4, 1));
    }

    #[test]
    fn seeds_are_forgotten_when_there_are_too_many() {
        let mut pool = pool(1);
        let first = pool.root(&seed(0));
        for lens in 1..=MAX_SEEDS as u64 {
            pool.root(&seed(lens));
        }
        assert_eq!(pool.seeds.len(), MAX_SEEDS);
        assert_ne!(pool.root(&seed(0)), first, "never the same node again");
    }

    proptest! {
        /// Rows come, find, compute, fork and go, and the pool grows and shrinks. A model keeps what every block holds.
        #[test]
        fn every_block_holds_what_its_row_computed(steps in prop::collection::vec((0u8..5, any::<u16>()), 1..200)) {
            let mut pool = pool(24);
            // What is in each block: the fills from the root to here.
            let mut bytes: Vec<Vec<u32>> = vec![Vec::new(); 64];
            let mut rows: Vec<(Vec<u32>, Vec<u32>, NodeId)> = Vec::new();
            for (what, random) in steps {
                match what {
                    // A new row of up to four blocks with few different fills, which finds what it can.
                    0 | 1 => {
                        let seed = u32::from(random % 2);
                        let fills: Vec<u32> = (0..1 + random % 4).map(|i| 2 + u32::from(random >> (4 + 2 * i)) % 2).collect();
                        let mut node = pool.root(&self::seed(u64::from(seed)));
                        let (mut blocks, mut path) = (Vec::new(), vec![seed]);
                        for fill in fills {
                            let tokens = [fill; BLOCK_TOKENS];
                            path.push(fill);
                            if let Some((block, next)) = pool.find(node, &tokens) {
                                prop_assert_eq!(&bytes[block as usize], &path);
                                pool.hold(block);
                                (node, _) = (next, blocks.push(block));
                                continue;
                            }
                            let Some(taken) = pool.take() else { path.pop(); break };
                            bytes[taken as usize] = path.clone();
                            let (block, next) = pool.register(node, &tokens, taken);
                            (node, _) = (next, blocks.push(block));
                        }
                        rows.push((blocks, path, node));
                    }
                    2 | 3 if !rows.is_empty() => {
                        let (mut blocks, ..) = rows.swap_remove(random as usize % rows.len());
                        pool.give_back(&mut blocks, usize::MAX);
                    }
                    _ => {
                        let total = (8 + u32::from(random) % 40).max(pool.used());
                        for (from, to) in pool.resize(total) {
                            bytes[to as usize] = bytes[from as usize].clone();
                            for block in rows.iter_mut().flat_map(|(blocks, ..)| blocks).filter(|b| **b == from) {
                                *block = to;
                            }
                        }
                    }
                }
                let mut held: Vec<u32> = rows.iter().flat_map(|(blocks, ..)| blocks.clone()).collect();
                for (blocks, path, _) in &rows {
                    for (index, block) in blocks.iter().enumerate() {
                        prop_assert_eq!(&bytes[*block as usize][..], &path[..index + 2]);
                    }
                }
                held.sort();
                held.dedup();
                prop_assert_eq!(held.len() as u32, pool.used());
                prop_assert!(held.iter().all(|block| *block < pool.total()));
                // Every registered block is reached from its root.
                for slot in &pool.slots {
                    if let Some((_, (after, _))) = slot.entry {
                        let known = pool.seeds.values().any(|(root, _)| *root == after)
                            || pool.slots.iter().any(|s| s.entry.is_some_and(|(node, _)| node == after));
                        prop_assert!(known, "a block was left without the one it follows");
                    }
                }
            }
            for (mut blocks, ..) in rows {
                pool.give_back(&mut blocks, usize::MAX);
            }
            prop_assert_eq!(pool.free(), pool.total());
            pool.forget_kept();
            prop_assert!(pool.by_key.is_empty() && pool.kept == 0 && pool.free.len() as u32 == pool.total());
        }
    }
}
