//! Where a row is in the tree of KV blocks: which of others' blocks it may use, and which of its own others may.

use std::sync::Arc;

use crate::lens::tap::{Activations, Positions};
use crate::model::block_pool::{BlockPool, BlockTokens, NodeId};
use turret_kernels::attention::BLOCK_TOKENS;

/// Two nodes: for a sequence within the original context, and for one beyond it, where positions are rotated otherwise.
pub(crate) type Roots = [NodeId; 2];

/// A row's place in the tree, and the rules of what it may share.
#[derive(Debug)]
pub(crate) struct Chain {
    roots: Roots,
    /// Length of the original context, where a longer sequence is rotated otherwise.
    long_from: Option<u32>,
    private: Option<Private>,
    /// Position of the first token that a tap reads: from there on the row computes everything itself.
    reads_from: u32,
    /// Whether its blocks hold all layers.
    whole: bool,
    /// The last of its blocks that is in the tree.
    node: NodeId,
    /// Its first blocks, so many, are in the tree.
    blocks: usize,
}

/// The blocks that hold what a row writes into the residual stream: only its forks find them.
#[derive(Debug, Clone)]
pub(crate) struct Private {
    /// The first block with a written position.
    pub(crate) first_block: usize,
    /// What that block follows, known to the row and its forks only.
    pub(crate) family: Arc<Roots>,
}

/// What a row would find.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Blocks.
    pub(crate) blocks: u32,
    /// Of these, how many no row holds.
    pub(crate) idle: u32,
}

impl Chain {
    /// The chain of a row that reads and writes this.
    pub(crate) fn new(
        roots: Roots,
        long_from: Option<u32>,
        private: Option<Private>,
        activations: &Activations,
    ) -> Self {
        let reads = activations.taps.iter().filter_map(|tap| first(&tap.positions));
        Self {
            roots,
            long_from,
            private,
            reads_from: reads.min().unwrap_or(u32::MAX),
            whole: activations.stop_layer.is_none(),
            node: roots[0],
            blocks: 0,
        }
    }

    /// Which block of a row is the first that holds a written position.
    pub(crate) fn first_written_block(activations: &Activations) -> Option<usize> {
        let position = activations.injections.iter().filter_map(|i| first(&i.positions)).min()?;
        Some(position as usize / BLOCK_TOKENS)
    }

    /// Begins anew, for a sequence of so many tokens.
    pub(crate) fn restart(&mut self, tokens: usize) {
        self.node = self.roots[self.rotation(tokens)];
        self.blocks = 0;
    }

    fn rotation(&self, tokens: usize) -> usize {
        usize::from(self.long_from.is_some_and(|original| tokens > original as usize))
    }

    /// What the family of its forks is called.
    pub(crate) fn private(&self) -> Option<&Private> {
        self.private.as_ref()
    }

    /// From which block on nobody finds what the row leaves behind.
    pub(crate) fn unfindable_from(&self) -> usize {
        match &self.private {
            Some(private) if Arc::strong_count(&private.family) == 1 => private.first_block,
            _ => usize::MAX,
        }
    }

    /// What a block after the first `blocks` of the row follows in the tree.
    fn after(&self, node: NodeId, blocks: usize, tokens: usize) -> NodeId {
        match &self.private {
            Some(private) if private.first_block == blocks => private.family[self.rotation(tokens)],
            _ => node,
        }
    }

    /// Blocks in a row, from the one after `self.blocks` on, that are in the tree and that the row may use.
    fn find<'a>(
        &'a self,
        tokens: &'a [u32],
        pool: &'a BlockPool,
    ) -> impl Iterator<Item = (u32, NodeId)> + use<'a> {
        // The last token is always computed: its logits are wanted.
        let limit = (self.reads_from as usize).min(tokens.len().saturating_sub(1)) / BLOCK_TOKENS;
        let (mut node, mut blocks) = (self.node, self.blocks);
        std::iter::from_fn(move || {
            if blocks >= limit {
                return None;
            }
            let after = self.after(node, blocks, tokens.len());
            let (block, next) = pool.find(after, block_tokens(tokens, blocks))?;
            (node, blocks) = (next, blocks + 1);
            Some((block, next))
        })
    }

    /// What [`Self::reuse`] would find.
    pub(crate) fn look(&self, tokens: &[u32], pool: &BlockPool) -> Found {
        self.find(tokens, pool).fold(Found::default(), |found, (block, _)| Found {
            blocks: found.blocks + 1,
            idle: found.idle + u32::from(pool.is_idle(block)),
        })
    }

    /// Holds the blocks that others have computed, for a row that has computed just those in the tree. Gives how many.
    pub(crate) fn reuse(&mut self, tokens: &[u32], pool: &mut BlockPool, table: &mut Vec<u32>) -> u32 {
        let had = table.len();
        loop {
            let next = self.find(tokens, pool).next();
            let Some((block, node)) = next else { break };
            pool.hold(block);
            table.push(block);
            (self.node, self.blocks) = (node, self.blocks + 1);
        }
        (table.len() - had) as u32
    }

    /// Whether a row that computed so many tokens stands at the end of its blocks in the tree.
    pub(crate) fn is_at(&self, computed: u32) -> bool {
        computed as usize == self.blocks * BLOCK_TOKENS
    }

    /// Lets others find the blocks that are whole now.
    pub(crate) fn register(
        &mut self,
        tokens: &[u32],
        computed: u32,
        pool: &mut BlockPool,
        table: &mut [u32],
    ) {
        while self.whole && (self.blocks + 1) * BLOCK_TOKENS <= computed as usize {
            let after = self.after(self.node, self.blocks, tokens.len());
            let block = &mut table[self.blocks];
            (*block, self.node) = pool.register(after, block_tokens(tokens, self.blocks), *block);
            self.blocks += 1;
        }
    }
}

fn first(positions: &Positions) -> Option<u32> {
    match positions {
        Positions::From(first) => Some(*first),
        Positions::At(list) => list.first().copied(),
    }
}

fn block_tokens(tokens: &[u32], block: usize) -> &BlockTokens {
    tokens[block * BLOCK_TOKENS..].first_chunk().expect("the block is within the tokens")
}
