//! Which rows compute how many tokens in the next step: continuous batching with chunked prefill, as a pure function.
//!
//! Rows are ordered by age, oldest first, running and waiting alike. Every running row that only lacks its newest token
//! decodes in every step. One budget of tokens per step is shared by the rows that still have more to compute
//! (prompts, and rows that stepped back), so a long prompt holds nobody up. When blocks run out, the youngest
//! running row steps back; the oldest never does, and the cache holds at least one longest sequence, so it always
//! finishes, and so does every row.

use crate::model::kv_cache::BLOCK_TOKENS;

/// A row as the schedule sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowState {
    /// Tokens known: prompt and generated.
    pub tokens: u32,
    /// Of these, how many are in the cache. A row has always at least one that is not.
    pub computed: u32,
    /// Cache blocks it holds, or will hold as soon as it joins the batch.
    pub blocks: u32,
    /// Of these, how many are counted as free until then.
    pub idle: u32,
}

impl RowState {
    /// Tokens that are not in the cache.
    pub fn pending(&self) -> u32 {
        self.tokens - self.computed
    }

    fn blocks_lacking_for(&self, tokens: u32) -> u32 {
        tokens.div_ceil(BLOCK_TOKENS as u32).saturating_sub(self.blocks)
    }
}

/// What a step may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepBudget {
    /// Rows in the batch.
    pub max_running_rows: u32,
    /// Tokens of rows that have more than one to compute.
    pub prefill_chunk_tokens: u32,
    /// Cache blocks that no row holds.
    pub free_blocks: u32,
}

/// A row's share of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which row: an index into running rows, followed by the admitted ones in order.
    pub row: usize,
    /// Tokens to compute.
    pub tokens: u32,
    /// Blocks to take for them.
    pub new_blocks: u32,
}

/// What the next step does. Reused from step to step.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Running rows from this index on step back: their blocks are freed first. Equal to the number of running rows when none does.
    pub keep_running: usize,
    /// This many of the oldest waiting rows join the batch.
    pub admit: usize,
    /// Who computes what.
    pub shares: Vec<Share>,
}

/// Plans the next step. Both lists are in order of age; of those who wait only as many are looked at as may join.
///
/// `freed_by` tells how many blocks come free when a running row steps back, once all younger ones have: fewer than it holds
/// where an older one holds some of them too. It is asked from the youngest on, and only when blocks run out.
pub fn schedule(
    running: &[RowState],
    freed_by: impl Fn(usize) -> u32,
    waiting: impl IntoIterator<Item = RowState>,
    budget: StepBudget,
    plan: &mut Plan,
) {
    plan.shares.clear();
    plan.admit = 0;
    plan.keep_running = running.len();
    let mut free = budget.free_blocks;
    let mut prefill = budget.prefill_chunk_tokens.max(1);
    let mut index = 0;
    while index < plan.keep_running {
        let row = running[index];
        let mut tokens = if row.pending() == 1 { 1 } else { row.pending().min(prefill) };
        // A row that has no part in this step's prefill budget waits for the next.
        if tokens > 0 {
            while row.blocks_lacking_for(row.computed + tokens) > free && plan.keep_running > index + 1 {
                plan.keep_running -= 1;
                free += freed_by(plan.keep_running);
            }
            let room = (row.blocks + free) * BLOCK_TOKENS as u32 - row.computed;
            tokens = tokens.min(room);
            if tokens == 0 {
                // The youngest row, and the older ones hold everything.
                plan.keep_running = index;
                break;
            }
            let new_blocks = row.blocks_lacking_for(row.computed + tokens);
            free -= new_blocks;
            if row.pending() > 1 {
                prefill -= tokens;
            }
            plan.shares.push(Share { row: index, tokens, new_blocks });
        }
        index += 1;
    }
    if plan.keep_running < running.len() {
        return;
    }

    // Blocks that running rows still need for what they know already are spoken for.
    let mut promised: u32 = 0;
    for (index, row) in running.iter().enumerate() {
        let share = plan.shares.iter().find(|s| s.row == index).map_or(0, |s| s.new_blocks);
        promised += row.blocks_lacking_for(row.tokens) - share.min(row.blocks_lacking_for(row.tokens));
    }
    let mut waiting = waiting.into_iter();
    loop {
        let rows = plan.keep_running + plan.admit;
        if rows >= budget.max_running_rows as usize || prefill == 0 {
            break;
        }
        let Some(row) = waiting.next() else { break };
        // With its next token, so that a row is not admitted only to step back at once.
        let needed = row.blocks_lacking_for(row.tokens + 1);
        let alone = rows == 0;
        if row.idle + needed > free.saturating_sub(promised) && !(alone && free > row.idle) {
            break;
        }
        free -= row.idle;
        let room = (row.blocks + free) * BLOCK_TOKENS as u32 - row.computed;
        let tokens = row.pending().min(prefill).min(room);
        let new_blocks = row.blocks_lacking_for(row.computed + tokens);
        free -= new_blocks;
        promised += needed.saturating_sub(new_blocks);
        prefill -= tokens;
        plan.shares.push(Share { row: rows, tokens, new_blocks });
        plan.admit += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn plan(running: &[RowState], waiting: &[RowState], budget: StepBudget) -> Plan {
        plan_with_shared(running, |row| running[row].blocks, waiting, budget)
    }

    fn plan_with_shared(
        running: &[RowState],
        freed_by: impl Fn(usize) -> u32,
        waiting: &[RowState],
        budget: StepBudget,
    ) -> Plan {
        let mut plan = Plan::default();
        schedule(running, freed_by, waiting.iter().copied(), budget, &mut plan);
        plan
    }

    fn row(tokens: u32, computed: u32) -> RowState {
        RowState { tokens, computed, blocks: computed.div_ceil(BLOCK_TOKENS as u32), idle: 0 }
    }

    const BUDGET: StepBudget = StepBudget { max_running_rows: 4, prefill_chunk_tokens: 32, free_blocks: 100 };

    #[test]
    fn decoding_rows_run_beside_a_chunk_of_a_long_prompt() {
        let plan = plan(&[row(10, 9), row(500, 64), row(17, 16)], &[row(5, 0)], BUDGET);
        let tokens: Vec<_> = plan.shares.iter().map(|s| (s.row, s.tokens, s.new_blocks)).collect();
        assert_eq!(tokens, [(0, 1, 0), (1, 32, 2), (2, 1, 1)]);
        assert_eq!((plan.admit, plan.keep_running), (0, 3));
    }

    #[test]
    fn short_prompts_share_a_step() {
        let plan = plan(&[row(3, 2)], &[row(10, 0), row(15, 0), row(20, 0), row(1, 0)], BUDGET);
        let tokens: Vec<_> = plan.shares.iter().map(|s| (s.row, s.tokens)).collect();
        assert_eq!(tokens, [(0, 1), (1, 10), (2, 15), (3, 7)]);
        assert_eq!(plan.admit, 3, "four rows is the limit");
    }

    #[test]
    fn the_youngest_steps_back_when_blocks_run_out() {
        let full = BLOCK_TOKENS as u32;
        let plan = plan(
            &[row(full + 1, full), row(full + 1, full)],
            &[row(1, 0)],
            StepBudget { free_blocks: 0, ..BUDGET },
        );
        assert_eq!(plan.keep_running, 1);
        assert_eq!(plan.shares, [Share { row: 0, tokens: 1, new_blocks: 1 }]);
        assert_eq!(plan.admit, 0, "who stepped back comes before who is new");
    }

    #[test]
    fn who_steps_back_frees_only_what_no_older_row_holds() {
        let full = BLOCK_TOKENS as u32;
        // All begin with the same two blocks, and the youngest holds nothing else.
        let running = [row(3 * full + 1, 3 * full), row(3 * full + 1, 3 * full), row(2 * full + 1, 2 * full)];
        let budget = StepBudget { free_blocks: 0, ..BUDGET };
        let plan = plan_with_shared(&running, |row| [3, 1, 0][row], &[], budget);
        assert_eq!(plan.keep_running, 1, "the youngest alone would free nothing");
        assert_eq!(plan.shares, [Share { row: 0, tokens: 1, new_blocks: 1 }]);
    }

    #[test]
    fn blocks_that_are_kept_for_a_prefix_are_not_counted_twice() {
        let found = RowState { tokens: 64, computed: 48, blocks: 3, idle: 3 };
        let with = |free_blocks| plan(&[row(5, 4)], &[found], StepBudget { free_blocks, ..BUDGET });
        assert_eq!(with(4).admit, 0, "three of the four are the row's own, and it needs two more");
        assert_eq!(with(5).shares[1], Share { row: 1, tokens: 16, new_blocks: 1 });
        let shared = RowState { idle: 0, ..found };
        let plan = plan(&[row(5, 4)], &[shared], StepBudget { free_blocks: 2, ..BUDGET });
        assert_eq!(plan.admit, 1, "a running row holds them already");
    }

    #[test]
    fn nobody_is_admitted_into_blocks_that_a_running_prompt_needs() {
        let budget = StepBudget { max_running_rows: 4, prefill_chunk_tokens: 40, free_blocks: 4 };
        let plan = plan(&[row(64, 0)], &[row(20, 0)], budget);
        assert_eq!(plan.admit, 0);
    }

    proptest! {
        /// Runs random arrivals to the end on a small cache. Checks every step's sums, that the oldest row always gets on, and that
        /// everybody finishes.
        #[test]
        fn budgets_hold_and_everybody_finishes(
            arrivals in prop::collection::vec((0u32..40, 1u32..90, 0u32..60), 1..40),
            max_running_rows in 1u32..7,
            prefill_chunk_tokens in 1u32..80,
            extra_blocks in 0u32..12,
        ) {
            let total_blocks = 150u32.div_ceil(BLOCK_TOKENS as u32) + extra_blocks;
            struct Row { id: usize, at: u32, state: RowState, ends: u32 }
            let mut coming: Vec<Row> = arrivals
                .iter()
                .enumerate()
                .map(|(id, &(at, prompt, new))| Row { id, at, state: row(prompt, 0), ends: prompt + new })
                .collect();
            let (mut running, mut waiting): (Vec<Row>, Vec<Row>) = (Vec::new(), Vec::new());
            let mut step = 0u32;
            while !(coming.is_empty() && running.is_empty() && waiting.is_empty()) {
                let (now, later) = coming.into_iter().partition(|r| r.at <= step);
                coming = later;
                waiting.extend::<Vec<Row>>(now);
                waiting.sort_by_key(|r| r.id);
                let used: u32 = running.iter().map(|r| r.state.blocks).sum();
                let budget = StepBudget { max_running_rows, prefill_chunk_tokens, free_blocks: total_blocks - used };
                let states = |rows: &[Row]| rows.iter().map(|r| r.state).collect::<Vec<_>>();
                let plan = plan(&states(&running), &states(&waiting), budget);

                let mut back = running.split_off(plan.keep_running);
                back.iter_mut().for_each(|r| (r.state.computed, r.state.blocks) = (0, 0));
                prop_assert!(plan.admit == 0 || back.is_empty());
                running.extend(waiting.drain(..plan.admit));
                waiting.extend(back);
                waiting.sort_by_key(|r| r.id);
                prop_assert!(running.len() <= max_running_rows as usize);
                let mut prefilled = 0;
                for share in &plan.shares {
                    let r = &mut running[share.row].state;
                    prop_assert!(share.tokens >= 1 && r.computed + share.tokens <= r.tokens);
                    if r.pending() > 1 { prefilled += share.tokens; }
                    r.computed += share.tokens;
                    r.blocks += share.new_blocks;
                    prop_assert_eq!(r.blocks, r.computed.div_ceil(BLOCK_TOKENS as u32).max(r.blocks));
                    prop_assert!(r.blocks * BLOCK_TOKENS as u32 >= r.computed);
                    if r.computed == r.tokens { r.tokens += 1; }
                }
                prop_assert!(prefilled <= prefill_chunk_tokens + max_running_rows);
                if let Some(oldest) = running.first() {
                    prop_assert!(plan.shares.iter().any(|s| s.row == 0), "row {} stands still", oldest.id);
                }
                let used: u32 = running.iter().map(|r| r.state.blocks).sum();
                prop_assert!(used <= total_blocks);
                running.retain(|r| r.state.tokens <= r.ends);
                step += 1;
                prop_assert!(step < 20_000, "rows never finish");
            }
        }
    }
}
