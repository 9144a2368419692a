//! One step of the active base: plan, take blocks, compute, hand out logits.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use candle_core::Result;

use super::arena::Region;
use super::choice::{Choices, Question};
use super::handle::{BaseId, EngineConfig};
use super::memory::BaseNeeds;
use super::pace::Pace;
use super::row::RowFailure;
use super::schedule::{Plan, RowState, StepBudget, schedule};
use super::sequence::{Life, Sequence};
use super::{MAX_ROW_LENSES, Totals};
use crate::lens::Effects;
use crate::model::block_pool::BlockPool;
use crate::model::config::ModelConfig;
use crate::model::decoder::{Batch, Chunk, Decoder, Workspace};
use crate::model::kv_cache::{KvCache, blocks_for, cache_shape};
use crate::model::weights::FilledBase;
use turret_threads::Pool;

/// The active base: what computing with it needs beside its weights.
pub(super) struct Active {
    pub(super) base: BaseId,
    pub(super) needs: BaseNeeds,
    pub(super) cache: KvCache,
    pub(super) workspace: Workspace,
    decoder: Decoder,
    batch: Batch,
    plan: Plan,
    pace: Pace,
    running_states: Vec<RowState>,
    /// Per share of the plan: where its outputs start in the batch, and the position of the first.
    outputs: Vec<RowOutputs>,
    /// Shares in the order in which their rows are in the batch: those that leave it in mid-step last.
    order: Vec<usize>,
    choices: Choices,
    pool: Arc<Pool>,
}

#[derive(Debug, Clone, Copy)]
struct RowOutputs {
    row: usize,
    start: usize,
    end: usize,
    position: u32,
}

impl Active {
    pub(super) fn new(
        id: BaseId,
        base: &FilledBase,
        needs: BaseNeeds,
        kv: Region,
        pool: Arc<Pool>,
        heartbeat: Arc<AtomicU64>,
        limits: &EngineConfig,
    ) -> Result<Self> {
        let config = &base.layout.config;
        let rows = limits.max_running_rows as usize;
        Ok(Self {
            base: id,
            needs,
            cache: KvCache::new(cache_shape(config, base.layout.dtype), kv),
            workspace: Workspace::new(config, needs.step)?,
            decoder: Decoder::new(config, pool.clone(), heartbeat),
            batch: batch_for(&needs, rows),
            plan: Plan { shares: Vec::with_capacity(rows), ..Plan::default() },
            pace: Pace::default(),
            running_states: Vec::with_capacity(rows),
            outputs: Vec::with_capacity(rows),
            order: Vec::with_capacity(rows),
            choices: Choices::new(needs.step.outputs, config.vocab_size, pool.threads()),
            pool,
        })
    }

    /// Takes new limits between two steps.
    pub(super) fn set_needs(
        &mut self,
        config: &ModelConfig,
        needs: BaseNeeds,
        limits: &EngineConfig,
    ) -> Result<()> {
        if needs.step != self.workspace.size() {
            self.workspace = Workspace::new(config, needs.step)?;
            self.batch = batch_for(&needs, limits.max_running_rows as usize);
            self.choices.reserve_outputs(needs.step.outputs);
        }
        self.needs = needs;
        Ok(())
    }

    /// Makes room for a row whose lenses do this.
    pub(super) fn reserve(&mut self, effects: &Effects) -> Result<()> {
        self.workspace.reserve(effects)?;
        self.choices.reserve_vocabulary(effects.head_tokens);
        Ok(())
    }

    /// Computes one step for the rows of the batch. Gives the prompt tokens of it when rows decoded beside them: whoever has
    /// the clock tells [`Active::took`].
    pub(super) fn step(
        &mut self,
        base: &FilledBase,
        running: &mut Vec<Sequence>,
        waiting: &mut Vec<Sequence>,
        limits: &EngineConfig,
        totals: &mut Totals,
    ) -> Option<u32> {
        // Rows of one prompt take turns at the prefill budget, so the younger find what the older have computed.
        let pool = &mut self.cache.pool;
        totals.cached_tokens += running.iter_mut().map(|row| u64::from(row.reuse(pool))).sum::<u64>();
        self.running_states.clear();
        self.running_states.extend(running.iter().map(Sequence::state));
        let rows_decode = self.running_states.iter().any(|row| row.pending() == 1);
        let budget = StepBudget {
            max_running_rows: limits.max_running_rows.max(1),
            prefill_chunk_tokens: self.pace.prompt_tokens(rows_decode, limits.prefill_chunk_tokens),
            free_blocks: pool.free(),
        };
        let waiting_states = waiting.iter().map(|row| row.state_with_found(pool));
        let freed_by = |row: usize| freed_by(&running[row..], pool);
        schedule(&self.running_states, freed_by, waiting_states, budget, &mut self.plan);

        // Who steps back is younger than who runs, and older than who waits.
        for mut row in running.drain(self.plan.keep_running..).rev() {
            row.step_back(pool);
            waiting.insert(0, row);
            totals.preemptions += 1;
        }
        // Found blocks are held before any block is taken, so that they are still there.
        for mut row in waiting.drain(..self.plan.admit) {
            totals.cached_tokens += u64::from(row.reuse(pool));
            running.push(row);
        }
        // What rows come to need while they decode is there from the step in which they join.
        self.batch.reserve_blocks(running.iter().map(|row| blocks_for(row.most_tokens()) as usize).sum());
        self.workspace.reserve_captures(running.iter().map(Sequence::taps).sum());

        let computed = self.compute(base, running);
        let of_prompts = self.plan.shares.iter().map(|share| share.tokens).filter(|&tokens| tokens > 1);
        let beside = rows_decode.then(|| of_prompts.sum());
        self.batch.clear();
        totals.steps += 1;
        match computed {
            Ok(counts) => {
                totals.prompt_tokens += counts.prompt_tokens;
                totals.generated_tokens += counts.generated_tokens;
                totals.model_time += counts.model_time;
            }
            Err(error) => {
                // Every row of the step may be wrong.
                for share in &self.plan.shares {
                    running[share.row].fail(RowFailure::Device(error.to_string()));
                    running[share.row].ended = true;
                }
            }
        }
        let pool = &mut self.cache.pool;
        running.retain_mut(|row| {
            if row.ended {
                row.release(pool);
            }
            !row.ended
        });
        beside
    }

    /// Learns from a step with so many prompt tokens beside rows that decoded.
    pub(super) fn took(&mut self, prompt_tokens: u32, time: Duration) {
        self.pace.learn(prompt_tokens, time.as_secs_f64());
    }

    fn compute(&mut self, base: &FilledBase, running: &mut [Sequence]) -> Result<Counts> {
        self.outputs.clear();
        let mut counts = Counts::default();
        self.order.clear();
        self.order.extend(0..self.plan.shares.len());
        let leaves = |share: usize| running[self.plan.shares[share].row].stop_layer().unwrap_or(u32::MAX);
        self.order.sort_unstable_by_key(|&share| (Reverse(leaves(share)), share));
        for &share in &self.order {
            let share = &self.plan.shares[share];
            let row = &mut running[share.row];
            for _ in 0..share.new_blocks {
                row.blocks.push(self.cache.pool.take().expect("the plan counted the free blocks"));
            }
            let (start, tokens) = (row.computed, share.tokens);
            let from = row.outputs_from(tokens);
            let outputs = self.batch.push(Chunk {
                tokens: &row.tokens[start as usize..(start + tokens) as usize],
                start,
                length: row.tokens.len() as u32,
                blocks: &row.blocks,
                lenses: &row.lenses,
                activations: row.activations(),
                outputs_from: from,
            });
            let position = start + from as u32;
            self.outputs.push(RowOutputs {
                row: share.row,
                start: outputs.start,
                end: outputs.end,
                position,
            });
            counts.prompt_tokens += u64::from(row.prompt_tokens_in(tokens));
        }
        let width = base.layout.config.hidden_size;
        let began = Instant::now();
        self.decoder.forward(base, &mut self.cache, &self.batch, &mut self.workspace, None)?;
        counts.model_time += began.elapsed();
        for (share, _) in self.plan.shares.iter().zip(&self.outputs) {
            let row = &mut running[share.row];
            row.computed += share.tokens;
            row.register(&mut self.cache.pool);
        }
        self.workspace.with_captured(|captured| {
            let mut active = self.batch.active().iter();
            for at in &self.outputs {
                let row = &mut running[at.row];
                if row.activations().is_some() {
                    let read = active.next().expect("the batch has every row that reads");
                    read.captured(captured, width, |tap, index, vector| row.keep_tapped(tap, index, vector));
                }
            }
        });

        let long_from = base.layout.config.long_rope_from();
        let group = self.workspace.size().outputs;
        for start in (0..self.batch.outputs()).step_by(group) {
            let end = (start + group).min(self.batch.outputs());
            let (outputs, choices, threads) = (&self.outputs, &mut self.choices, &self.pool);
            let blocks = &mut self.cache.pool;
            let began = Instant::now();
            let choosing =
                self.decoder.logits(base, &self.batch, &self.workspace, start..end, |_, logits| {
                    let began = Instant::now();
                    let of = |output: usize| {
                        let at = outputs[outputs.partition_point(|at| at.end <= output)];
                        (at.row, at.position + (output - at.start) as u32)
                    };
                    let questions = (start..end).map(|output| {
                        let (row, position) = of(output);
                        if running[row].ended { Question::default() } else { running[row].question(position) }
                    });
                    choices.answer(threads, logits, questions);
                    for (output, answer) in (start..end).zip(choices.answers()) {
                        let (row, position) = of(output);
                        let row = &mut running[row];
                        if row.ended {
                            continue;
                        }
                        let known = row.tokens.len();
                        row.ended = row.take_answer(position, answer) == Life::Ended;
                        counts.generated_tokens += (row.tokens.len() - known) as u64;
                        if long_from == Some(known as u32) && row.tokens.len() > known {
                            // A longer sequence is rotated otherwise, all of it.
                            row.step_back(blocks);
                        }
                    }
                    began.elapsed()
                })?;
            counts.model_time += began.elapsed().saturating_sub(choosing);
        }
        for at in &self.outputs {
            let row = &mut running[at.row];
            if !row.ended {
                row.ended = row.after_step() == Life::Ended;
            }
        }
        Ok(counts)
    }
}

/// Blocks that nobody holds any more when the first of these rows steps back after the others: all of the batch from it on.
fn freed_by(rows: &[Sequence], pool: &BlockPool) -> u32 {
    let (first, younger) = rows.split_first().expect("a row steps back");
    let is_freed = |(index, block): (usize, &u32)| {
        let holders = pool.holders(*block);
        // What rows share is the start of both, so it stands at the same place in both.
        let held_by = |row: &&Sequence| row.blocks.get(index) == Some(block);
        holders == 1 || holders as usize == 1 + younger.iter().filter(held_by).count()
    };
    first.blocks.iter().enumerate().filter(|&held| is_freed(held)).count() as u32
}

#[derive(Default)]
struct Counts {
    prompt_tokens: u64,
    generated_tokens: u64,
    /// Forward pass and logits, without what chooses among them.
    model_time: Duration,
}

fn batch_for(needs: &BaseNeeds, rows: usize) -> Batch {
    // Tables of rows that are all as long as can be would be much; they grow as such rows join, and stay so.
    let blocks = (needs.min_blocks as usize * rows).min(1 << 16);
    Batch::with_capacity(needs.step.tokens, blocks, rows * MAX_ROW_LENSES)
}
