//! One row's life: waiting, computing its tokens, choosing new ones, finished.
//!
//! Prompt and generated tokens are one list, of which the first `computed` are in the cache. Prefill, decode and
//! recomputing after a step back are the same: compute what is not in the cache yet, and when nothing is left, choose
//! the next token.

use std::sync::Arc;

use super::chain::{Chain, Found, Private};
use super::choice::{Answer, Choice, Chosen, Question};
use super::handle::LensId;
use super::row::{FinishReason, RowEvent, RowFailure, RowId, RowRequest, RowSender, TokenLogprobs, Usage};
use super::sampler::NotFinite;
use super::schedule::RowState;
use crate::lens::FilledLens;
use crate::lens::tap::{Activations, Tap, Tapped};
use crate::model::block_pool::BlockPool;
use crate::model::kv_cache::BLOCK_TOKENS;

/// A row in flight. It holds its lenses, so they live as long as it does.
pub(crate) struct Sequence {
    pub(crate) id: RowId,
    pub(crate) lens_ids: Vec<LensId>,
    pub(crate) lenses: Vec<(Arc<FilledLens>, f32)>,
    pub(crate) tokens: Vec<u32>,
    pub(crate) computed: u32,
    pub(crate) blocks: Vec<u32>,
    /// Which blocks it shares with other rows; `None` when it shares none.
    chain: Option<Chain>,
    /// Tokens that were in the cache before the row began to compute.
    cached: u32,
    /// It began to compute once before, and stepped back.
    stepped_back: bool,
    /// What it reads and writes, when it does.
    activations: Option<Arc<Activations>>,
    /// Per tap: the vectors it has read, with room for all.
    tapped: Vec<Vec<f32>>,
    /// Its last event was sent; it leaves the batch at the end of the step.
    pub(crate) ended: bool,
    request: RowRequest,
    prompt_len: u32,
    /// Tokens it had generated when it was submitted, if it was preempted before.
    began_with: u32,
    /// Log-probabilities of the prompt so far; `None` when they are not asked for or were sent.
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
    sender: RowSender,
}

/// Whether a row goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Life {
    GoesOn,
    Ended,
}

impl Sequence {
    pub(crate) fn new(
        mut request: RowRequest,
        lenses: Vec<(Arc<FilledLens>, f32)>,
        (block_capacity, width): (usize, usize),
        (id, sender): (RowId, RowSender),
    ) -> Self {
        let prompt_len = request.prompt.len() as u32;
        let activations = std::mem::take(&mut request.activations);
        let length = prompt_len + request.max_new_tokens;
        let room = |tap: &Tap| vec![0.0; tap.positions.count(length) * width];
        let tapped = activations.taps.iter().map(room).collect();
        // What was reported before is not reported again.
        request.prompt_logprobs = request.prompt_logprobs.filter(|_| request.generated.is_empty());
        let began_with = request.generated.len() as u32;
        let mut tokens = std::mem::take(&mut request.prompt);
        tokens.reserve_exact(request.max_new_tokens as usize);
        tokens.append(&mut request.generated);
        Self {
            id,
            lens_ids: request.lenses.iter().map(|l| l.lens).collect(),
            lenses,
            tokens,
            computed: 0,
            blocks: Vec::with_capacity(block_capacity),
            chain: None,
            cached: 0,
            stepped_back: false,
            activations: (!activations.is_empty()).then(|| Arc::new(activations)),
            tapped,
            ended: false,
            prompt_len,
            began_with,
            prompt_logprobs: request.prompt_logprobs.map(|_| Vec::with_capacity(prompt_len as usize)),
            request,
            sender,
        }
    }

    /// Lets it share blocks with other rows.
    pub(crate) fn sharing(mut self, mut chain: Chain) -> Self {
        chain.restart(self.tokens.len());
        self.chain = Some(chain);
        self
    }

    /// What a fork of this row shares with it where it writes into the residual stream; `None` when the fork would compute
    /// something else.
    pub(crate) fn family_for(&self, fork: &RowRequest) -> Option<Private> {
        let private = self.chain.as_ref()?.private()?;
        let own = self.activations.as_ref()?;
        let shared = private.first_block * BLOCK_TOKENS;
        let same_rows = fork.lenses == self.request.lenses && fork.cache_salt == self.request.cache_salt;
        // Where the prompt ends says where such an injection does.
        let same_end = fork.prompt.len() == self.prompt_len as usize
            || own.injections.iter().all(|injection| !injection.prefill_only);
        let same_start = fork.prompt.get(..shared).is_some_and(|start| self.tokens.starts_with(start));
        let same_writes = fork.activations.injections == own.injections;
        (same_rows && same_end && same_start && same_writes).then(|| private.clone())
    }

    /// What it reads and writes, with the length of its prompt.
    pub(crate) fn activations(&self) -> Option<(&Arc<Activations>, u32)> {
        Some((self.activations.as_ref()?, self.prompt_len))
    }

    /// Before which block it leaves the batch.
    pub(crate) fn stop_layer(&self) -> Option<u32> {
        self.activations.as_ref()?.stop_layer
    }

    /// Vectors that it reads of one token, at most.
    pub(crate) fn taps(&self) -> usize {
        self.tapped.len()
    }

    /// Keeps a vector that a tap read.
    pub(crate) fn keep_tapped(&mut self, tap: usize, index: usize, vector: &[f32]) {
        self.tapped[tap][index * vector.len()..][..vector.len()].copy_from_slice(vector);
    }

    pub(crate) fn state(&self) -> RowState {
        RowState {
            tokens: self.tokens.len() as u32,
            computed: self.computed,
            blocks: self.blocks.len() as u32,
            idle: 0,
        }
    }

    /// The same when it joins the batch with the blocks that others have computed.
    pub(crate) fn state_with_found(&self, pool: &BlockPool) -> RowState {
        let found = self.may_reuse().map_or(Found::default(), |chain| chain.look(&self.tokens, pool));
        let state = self.state();
        RowState {
            computed: state.computed + found.blocks * BLOCK_TOKENS as u32,
            blocks: state.blocks + found.blocks,
            idle: found.idle,
            ..state
        }
    }

    /// Its chain, when it stands where others' blocks may follow and their logits are not asked for.
    fn may_reuse(&self) -> Option<&Chain> {
        let pending = self.tokens.len() as u32 - self.computed;
        self.chain
            .as_ref()
            .filter(|chain| pending > 1 && self.prompt_logprobs.is_none() && chain.is_at(self.computed))
    }

    /// Goes on behind the blocks that others have computed, if there are any. Gives how many tokens it need not compute, if
    /// it has not begun before.
    pub(crate) fn reuse(&mut self, pool: &mut BlockPool) -> u32 {
        if self.may_reuse().is_none() {
            return 0;
        }
        let chain = self.chain.as_mut().expect("it may reuse blocks");
        let tokens = chain.reuse(&self.tokens, pool, &mut self.blocks) * BLOCK_TOKENS as u32;
        self.computed += tokens;
        if self.stepped_back {
            return 0;
        }
        self.cached += tokens;
        self.sender.note_cached(self.cached);
        if self.began_with > 0 { 0 } else { tokens }
    }

    /// Lets others find the blocks that it has computed.
    pub(crate) fn register(&mut self, pool: &mut BlockPool) {
        if let Some(chain) = &mut self.chain {
            chain.register(&self.tokens, self.computed, pool, &mut self.blocks);
        }
    }

    /// Tokens it may come to have.
    pub(crate) fn most_tokens(&self) -> u32 {
        self.prompt_len + self.request.max_new_tokens
    }

    pub(crate) fn is_cancelled(&self) -> bool {
        self.sender.is_cancelled()
    }

    /// Whether it goes on and has got no further yet. Sent back again it would never end, where bases take turns faster than
    /// it is computed.
    pub(crate) fn has_gained_nothing(&self) -> bool {
        self.began_with > 0 && self.generated() == self.began_with
    }

    fn generated(&self) -> u32 {
        self.tokens.len() as u32 - self.prompt_len
    }

    /// How many of its next `tokens` are of its prompt.
    pub(crate) fn prompt_tokens_in(&self, tokens: u32) -> u32 {
        self.prompt_len.saturating_sub(self.computed).min(tokens)
    }

    /// Gives its blocks back.
    pub(crate) fn release(&mut self, pool: &mut BlockPool) {
        let unfindable_from = self.chain.as_ref().map_or(0, Chain::unfindable_from);
        pool.give_back(&mut self.blocks, unfindable_from);
    }

    /// Gives its blocks back and forgets what was computed.
    pub(crate) fn step_back(&mut self, pool: &mut BlockPool) {
        self.release(pool);
        self.computed = 0;
        self.stepped_back = true;
        if let Some(chain) = &mut self.chain {
            chain.restart(self.tokens.len());
        }
        if let Some(logprobs) = &mut self.prompt_logprobs {
            logprobs.clear();
        }
    }

    /// From which token of the next `tokens` on it needs logits.
    pub(crate) fn outputs_from(&self, tokens: u32) -> usize {
        let completes = self.computed + tokens == self.tokens.len() as u32;
        if self.prompt_logprobs.is_some() && self.computed < self.prompt_len {
            // The logits of a prompt token score the one after it.
            0
        } else if completes && self.request.max_new_tokens > self.generated() {
            tokens as usize - 1
        } else {
            tokens as usize
        }
    }

    /// What it asks of the logits of the token at `position`.
    pub(crate) fn question(&self, position: u32) -> Question {
        let score = self.request.prompt_logprobs.filter(|_| self.prompt_logprobs.is_some()).and_then(|top| {
            let next = self.tokens[..self.prompt_len as usize].get(position as usize + 1)?;
            Some((*next, top))
        });
        let chooses = position + 1 == self.tokens.len() as u32 && self.request.max_new_tokens > 0;
        let choice = chooses.then(|| Choice {
            sampling: self.request.sampling,
            index: self.generated(),
            logprobs: self.request.logprobs,
        });
        Question { score, choice }
    }

    /// Takes the answer, in order of positions.
    pub(crate) fn take_answer(&mut self, position: u32, answer: Result<Answer, NotFinite>) -> Life {
        let Ok(Answer { scored, chosen }) = answer else {
            return self.fail(RowFailure::NotFinite { position });
        };
        if let Some(collected) = &mut self.prompt_logprobs {
            collected.extend(scored);
        }
        let Some(Chosen { id, logprobs }) = chosen else {
            return Life::GoesOn;
        };
        self.send_prompt_logprobs();
        self.tokens.push(id);
        if self.request.stop_token_ids.contains(&id) {
            return self.finish(FinishReason::Stop { token: id });
        }
        self.sender.send(RowEvent::Token { id, logprobs });
        if self.generated() >= self.request.max_new_tokens {
            return self.finish(FinishReason::Length);
        }
        Life::GoesOn
    }

    /// After its last chunk of a step was computed: a row that only scores its prompt ends here.
    pub(crate) fn after_step(&mut self) -> Life {
        if self.request.max_new_tokens == 0 && self.computed == self.prompt_len {
            self.send_prompt_logprobs();
            return self.finish(FinishReason::Length);
        }
        Life::GoesOn
    }

    fn send_prompt_logprobs(&mut self) {
        if let Some(logprobs) = self.prompt_logprobs.take() {
            self.sender.send(RowEvent::Prompt(logprobs));
        }
    }

    fn finish(&mut self, reason: FinishReason) -> Life {
        if let Some(activations) = self.activations.clone().filter(|a| !a.taps.is_empty()) {
            let (length, computed) = (self.most_tokens(), self.computed);
            let read = |(tap, mut vectors): (&Tap, Vec<f32>)| {
                let all = tap.positions.count(length);
                // The last token is never computed, nor is what could have come after it.
                let positions = tap.positions.up_to(computed);
                vectors.truncate(vectors.len() / all.max(1) * positions.len());
                Tapped { positions, vectors }
            };
            let vectors = std::mem::take(&mut self.tapped);
            let tapped = activations.taps.iter().zip(vectors).map(read).collect();
            self.sender.send(RowEvent::Tapped(tapped));
        }
        let usage = Usage {
            prompt_tokens: self.prompt_len,
            cached_tokens: self.cached,
            generated_tokens: self.generated(),
        };
        self.sender.send(RowEvent::Finished { reason, usage });
        Life::Ended
    }

    /// Tells the reader that it is over.
    pub(crate) fn fail(&mut self, failure: RowFailure) -> Life {
        self.sender.send(RowEvent::Failed(failure));
        Life::Ended
    }
}
