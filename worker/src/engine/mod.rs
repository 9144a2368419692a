//! The engine: one thread that owns the device, and everything it may not share.
//!
//! - [`handle`]: how everyone else talks to it; start here. [`row`]: what a row is asked and answers.
//! - [`arena`] and [`memory`]: device memory, and the sums that decide what fits.
//! - `chain`: which KV blocks a row shares with others; the tree they form is [`crate::model::block_pool`].
//! - [`schedule`] (pure): which rows compute how many tokens next; `pace` (pure): how many of them may be of prompts. `sequence`: one row's life. `choice`, [`sampler`] and `cut`: logits to tokens.
//! - `step`: one step, from schedule to tokens. This file: the loop around it, and commands between steps.

pub mod arena;
mod chain;
mod choice;
mod cut;
pub mod handle;
pub mod memory;
mod pace;
pub mod row;
pub mod sampler;
pub mod schedule;
mod sequence;
mod step;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use arena::{Arena, ArenaError, ArenaUse, Part, Region};
use chain::{Chain, Private};
use handle::{
    ActivateError, BaseId, COMMANDS, CannotFit, ChangeError, Command, EngineConfig, EngineHandle, LensId,
    Published, RemoveError, Reply, ReserveError, Snapshot, SubmitError,
};
use memory::BaseNeeds;
use row::{RowFailure, RowId, RowRequest, RowStream, row_channel};
use sequence::Sequence;
use step::Active;

use crate::lens::tap::RowShape;
use crate::lens::{Effects, FilledLens};
use crate::model::block_pool::{LensContent, Seed};
use crate::model::kv_cache::BLOCK_TOKENS;
use crate::model::weights::{BaseLayout, FilledBase};
use crate::telemetry::chain;
use turret_threads::{Pool, allowed_threads};

/// Why the engine does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No address space for the arena.
    #[error("failed to make the device arena")]
    Arena(#[from] ArenaError),
    /// No thread.
    #[error("failed to start the engine thread")]
    Thread(#[source] std::io::Error),
}

/// Lenses on one row, at most.
const MAX_ROW_LENSES: usize = 8;
/// Commands handled between two steps, so that they cannot hold up rows.
const COMMANDS_PER_STEP: usize = 256;

/// The engine.
pub struct Engine;

impl Engine {
    /// Starts the engine thread and its compute threads, without any base.
    pub fn start(config: EngineConfig) -> Result<EngineHandle, StartError> {
        let (sender, receiver) = mpsc::channel(COMMANDS);
        let published = Arc::new(Published::default());
        let arena = Arena::new(machine_bytes().max(config.device_bytes))?;
        let core = Core {
            config,
            arena,
            pool: Arc::new(Pool::new(allowed_threads())),
            bases: BTreeMap::new(),
            lenses: BTreeMap::new(),
            active: None,
            running: Vec::new(),
            waiting: Vec::new(),
            next_id: 1,
            seen: ArenaUse::default(),
            totals: Totals::default(),
            shutdown: Vec::new(),
            published: published.clone(),
        };
        std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || core.run(receiver))
            .map_err(StartError::Thread)?;
        Ok(EngineHandle::new(sender, published))
    }
}

/// Memory of this machine, for the size of the address space.
fn machine_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    kib.unwrap_or(64 << 20) * 1024
}

#[derive(Default)]
struct Totals {
    steps: u64,
    prompt_tokens: u64,
    generated_tokens: u64,
    /// Prompt tokens of all new rows that may share blocks, and those of them that were in the cache.
    queried_tokens: u64,
    cached_tokens: u64,
    preemptions: u64,
    step_time: Duration,
    model_time: Duration,
}

struct Lens {
    base: BaseId,
    content: LensContent,
    weights: Arc<FilledLens>,
    /// Who waits for it to be free; new rows with it are refused.
    retiring: Vec<Reply<Result<u64, RemoveError>>>,
}

impl Lens {
    /// Whether any of these rows, or whoever was lent it, still needs it.
    fn is_held(&self, rows: u32) -> bool {
        rows > 0 || Arc::strong_count(&self.weights) > 1
    }
}

/// Everything the engine thread owns.
struct Core {
    config: EngineConfig,
    arena: Arena,
    pool: Arc<Pool>,
    /// Shared only with who was lent one, for as long as a lens over it is being filled.
    bases: BTreeMap<BaseId, Arc<FilledBase>>,
    lenses: BTreeMap<LensId, Lens>,
    active: Option<Active>,
    /// Rows in the batch, oldest first.
    running: Vec<Sequence>,
    /// Rows that are not, oldest first; all younger than those that run.
    waiting: Vec<Sequence>,
    /// For bases and lenses alike; never used twice.
    next_id: u64,
    /// Memory use at the last look, to notice when others freed some.
    seen: ArenaUse,
    totals: Totals,
    /// Who waits for the end; not empty means that no new row is taken.
    shutdown: Vec<Reply<()>>,
    published: Arc<Published>,
}

impl Core {
    fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut connected = true;
        loop {
            let idle = self.running.is_empty() && self.waiting.is_empty();
            if idle && (!connected || !self.shutdown.is_empty()) {
                break;
            }
            if idle {
                match commands.blocking_recv() {
                    Some(command) => self.handle(command),
                    None => connected = false,
                }
            }
            let began = Instant::now();
            for _ in 0..COMMANDS_PER_STEP {
                match commands.try_recv() {
                    Ok(command) => self.handle(command),
                    Err(TryRecvError::Empty) => break,
                    Err(TryRecvError::Disconnected) => {
                        connected = false;
                        break;
                    }
                }
            }
            self.drop_cancelled();
            self.grow_cache();
            if let Some(active) = &mut self.active
                && !(self.running.is_empty() && self.waiting.is_empty())
            {
                let base = &self.bases[&active.base];
                let (running, waiting) = (&mut self.running, &mut self.waiting);
                let beside = active.step(base, running, waiting, &self.config, &mut self.totals);
                // With the commands before it: that is how long a reader waits from one token to the next.
                let time = began.elapsed();
                self.totals.step_time += time;
                if let Some(prompt_tokens) = beside {
                    active.took(prompt_tokens, time);
                }
            }
            self.answer_retired();
            self.publish();
        }
        let Self { bases, lenses, active, shutdown, running, waiting, arena, .. } = self;
        drop((running, waiting, active, lenses, bases, arena));
        // Whoever waits for the end sees the channel close after this.
        drop(commands);
        for reply in shutdown {
            let _ = reply.send(());
        }
    }

    fn handle(&mut self, command: Command) {
        self.published.heartbeat.fetch_add(1, Ordering::Relaxed);
        // Who went away before this command was sent no longer counts.
        self.drop_cancelled();
        match command {
            // A region that nobody receives is dropped by `answer`, which frees it.
            Command::ReserveBase { layout, reply } => {
                let region = self.reserve_base(&layout);
                self.answer(reply, region);
            }
            Command::ReserveLens { bytes, reply } => {
                let region = self.reserve_lens(bytes);
                self.answer(reply, region);
            }
            Command::InstallBase { base, reply } => {
                let id = BaseId(self.new_id());
                self.bases.insert(id, Arc::from(base));
                if self.answer(reply, id).is_some() {
                    self.bases.remove(&id);
                }
            }
            Command::LendBase { base, reply } => {
                let base = self.bases.get(&base).cloned();
                self.answer(reply, base);
            }
            Command::LendLens { lens, reply } => {
                let lens = self.lenses.get(&lens).map(|lens| lens.weights.clone());
                self.answer(reply, lens);
            }
            Command::InstallLens { base, lens, reply } => {
                let installed = self.install_lens(base, *lens);
                if let Some(Ok(id)) = self.answer(reply, installed) {
                    self.lenses.remove(&id);
                }
            }
            Command::Activate { base, reply } => {
                let done = self.activate(base);
                self.answer(reply, done);
            }
            Command::RemoveBase { base, reply } => {
                let bytes = self.remove_base(base);
                self.answer(reply, bytes);
            }
            Command::RemoveLens { lens, when_idle, reply } => self.remove_lens(lens, when_idle, reply),
            Command::Submit { row, reply } => {
                let stream = self.submit(*row);
                self.answer(reply, stream);
            }
            Command::EndRows { failure, reply } => {
                let rows = self.end_rows(&failure);
                self.answer(reply, rows);
            }
            Command::Reconfigure { config, reply } => {
                let done = self.reconfigure(config);
                self.answer(reply, done);
            }
            Command::Shutdown { reply } => self.shutdown.push(reply),
            #[cfg(test)]
            Command::Test(handle::TestCommand::Hold(until)) => drop(until.recv()),
            #[cfg(test)]
            Command::Test(handle::TestCommand::PoisonKept(reply)) => {
                let blocks = self.active.as_mut().map_or(0, |active| active.cache.poison_kept());
                self.answer(reply, blocks);
            }
        }
    }

    /// Answers a command; gives the answer back when nobody waits for it any more. Whoever has the answer finds
    /// it in the snapshot too.
    fn answer<T>(&self, reply: Reply<T>, answer: T) -> Option<T> {
        self.publish();
        reply.send(answer).err()
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn rows(&self) -> impl Iterator<Item = &Sequence> {
        self.running.iter().chain(&self.waiting)
    }

    fn rows_in_flight(&self) -> u32 {
        (self.running.len() + self.waiting.len()) as u32
    }

    fn reserve_base(&mut self, layout: &BaseLayout) -> Result<Region, ReserveError> {
        memory::fits_alone(layout, &self.config).map_err(ReserveError::TooLarge)?;
        let base_bytes = self.arena.used().base_bytes + layout.bytes;
        match &self.active {
            None => memory::fits_inactive(base_bytes, &self.config).map_err(ReserveError::ArenaFull)?,
            Some(active) => {
                let blocks = active.needs.min_blocks.max(active.cache.pool.used());
                memory::fits(base_bytes, &active.needs, blocks, &self.config)
                    .map_err(ReserveError::ArenaFull)?;
            }
        }
        let used = ArenaUse { base_bytes, ..self.arena.used() };
        self.resize_cache(&used);
        self.arena.reserve(Part::Base, layout.bytes).map_err(system)
    }

    fn reserve_lens(&mut self, bytes: u64) -> Result<Region, ReserveError> {
        memory::lenses_fit(bytes, &self.config).map_err(ReserveError::TooLarge)?;
        let lens_bytes = self.arena.used().lens_bytes + bytes;
        memory::lenses_fit(lens_bytes, &self.config).map_err(ReserveError::ArenaFull)?;
        self.arena.reserve(Part::Lens, bytes).map_err(system)
    }

    /// Gives the cache what is left when `used` is charged, but never less than rows hold.
    fn resize_cache(&mut self, used: &ArenaUse) {
        let Some(active) = &mut self.active else { return };
        let blocks = memory::kv_blocks(used, &active.needs, &self.config);
        let blocks =
            blocks.max(active.cache.pool.used()).max(active.needs.min_blocks).min(active.cache.limit());
        if blocks != active.cache.pool.total() {
            let tables = self.running.iter_mut().map(|row| &mut row.blocks);
            active.cache.resize(blocks, tables);
        }
    }

    /// Regions are dropped by other threads too; what they free goes to the cache.
    fn grow_cache(&mut self) {
        let used = self.arena.used();
        if used != self.seen {
            self.resize_cache(&used);
            self.seen = self.arena.used();
        }
    }

    fn install_lens(&mut self, base: BaseId, lens: FilledLens) -> Result<LensId, ChangeError> {
        let installed = self.bases.get(&base).ok_or(ChangeError::UnknownBase)?;
        if *lens.base != *installed.layout.config {
            let what = "their config.json differ".into();
            return Err(ChangeError::BaseMismatch(what));
        }
        let id = LensId(self.new_id());
        let content = lens.digest.clone().map_or(LensContent::Installed(id.0), LensContent::Digest);
        self.lenses.insert(id, Lens { base, content, weights: Arc::new(lens), retiring: Vec::new() });
        Ok(id)
    }

    fn activate(&mut self, id: BaseId) -> Result<(), ActivateError> {
        let base = self.bases.get(&id).ok_or(ActivateError::Unknown)?;
        if self.active.as_ref().is_some_and(|active| active.base == id) {
            return Ok(());
        }
        match self.rows_in_flight() {
            0 => {}
            rows => return Err(ActivateError::RowsInFlight { rows }),
        }
        let needs = BaseNeeds::of(&base.layout.config, base.layout.dtype, &self.config);
        memory::fits(self.arena.used().base_bytes, &needs, needs.min_blocks, &self.config)?;
        // The old one's workspace goes before the new one's comes: the budget counts one. No row needs it.
        let old = self.active.take().map(|active| active.base);
        match self.make_active(id, needs) {
            Ok(()) => Ok(()),
            Err(error) => {
                if let Some(old) = old {
                    let base = &self.bases[&old];
                    let needs = BaseNeeds::of(&base.layout.config, base.layout.dtype, &self.config);
                    // It was there a moment ago, in the same memory.
                    let _ = self.make_active(old, needs);
                }
                Err(error)
            }
        }
    }

    fn make_active(&mut self, id: BaseId, needs: BaseNeeds) -> Result<(), ActivateError> {
        let base = &self.bases[&id];
        // Addresses cost nothing, so that the cache can grow with the budget.
        let span = machine_bytes().max(self.config.device_bytes);
        let region =
            self.arena.reserve_addresses(Part::Kv, span).map_err(|e| ActivateError::System(chain(&e)))?;
        let heartbeat = self.published.heartbeat.clone();
        let active = Active::new(id, base, needs, region, self.pool.clone(), heartbeat, &self.config)
            .map_err(|e| ActivateError::System(e.to_string()))?;
        self.active = Some(active);
        let used = self.arena.used();
        self.resize_cache(&used);
        Ok(())
    }

    fn remove_base(&mut self, id: BaseId) -> Result<u64, RemoveError> {
        let base = self.bases.get(&id).ok_or(RemoveError::Unknown)?;
        let bytes = base.layout.bytes;
        // Who has been lent it is filling a lens over it.
        let lent = Arc::strong_count(base) - 1;
        match self.lenses.values().filter(|lens| lens.base == id).count() + lent {
            0 => {}
            lenses => return Err(RemoveError::HasLenses { lenses: lenses as u32 }),
        }
        if self.active.as_ref().is_some_and(|active| active.base == id) {
            match self.rows_in_flight() {
                0 => self.active = None,
                rows => return Err(RemoveError::InUse { rows }),
            }
        }
        self.bases.remove(&id);
        Ok(bytes)
    }

    fn rows_with(&self, lens: LensId) -> u32 {
        self.rows().filter(|row| row.lens_ids.contains(&lens)).count() as u32
    }

    fn remove_lens(&mut self, id: LensId, when_idle: bool, reply: Reply<Result<u64, RemoveError>>) {
        let rows = self.rows_with(id);
        let answer = match self.lenses.get_mut(&id) {
            None => Err(RemoveError::Unknown),
            Some(lens) if lens.is_held(rows) && when_idle => {
                lens.retiring.push(reply);
                return;
            }
            Some(lens) if lens.is_held(rows) => Err(RemoveError::InUse { rows }),
            Some(_) => Ok(self.drop_lens(id)),
        };
        self.answer(reply, answer);
    }

    /// Frees a lens that no row holds.
    fn drop_lens(&mut self, id: LensId) -> u64 {
        let lens = self.lenses.remove(&id).expect("the caller found it");
        let bytes = lens.weights.layout.bytes;
        let weights = Arc::into_inner(lens.weights).expect("no row and no batch holds the lens");
        drop(weights);
        for reply in lens.retiring {
            self.answer(reply, Ok(bytes));
        }
        bytes
    }

    fn answer_retired(&mut self) {
        let retired = |core: &Self| {
            let mut retiring = core.lenses.iter().filter(|(_, lens)| !lens.retiring.is_empty());
            retiring.find(|(id, lens)| !lens.is_held(core.rows_with(**id))).map(|(id, _)| *id)
        };
        while let Some(id) = retired(self) {
            self.drop_lens(id);
        }
    }

    fn submit(&mut self, row: RowRequest) -> Result<RowStream, SubmitError> {
        if !self.shutdown.is_empty() {
            return Err(SubmitError::ShuttingDown);
        }
        let waiting = self.waiting.len() as u32;
        if waiting >= self.config.max_waiting_rows {
            return Err(SubmitError::QueueFull { waiting, limit: self.config.max_waiting_rows });
        }
        let Some(active) = self.active.as_mut().filter(|active| active.base == row.base) else {
            return Err(SubmitError::BaseNotActive);
        };
        let mut lenses: Vec<(Arc<FilledLens>, f32)> = Vec::with_capacity(row.lenses.len());
        let mut effects = Effects::default();
        for wanted in &row.lenses {
            let lens = self.lenses.get(&wanted.lens).filter(|lens| lens.retiring.is_empty());
            let lens = lens.ok_or(SubmitError::UnknownLens(wanted.lens))?;
            if lens.base != row.base {
                return Err(SubmitError::LensOfOtherBase(wanted.lens));
            }
            if let Some(what) =
                lenses.iter().find_map(|(other, _)| other.layout.conflict(&lens.weights.layout))
            {
                return Err(SubmitError::LensesConflict { lens: wanted.lens, what });
            }
            effects = effects.beside(&lens.weights.effects);
            lenses.push((lens.weights.clone(), wanted.scale));
        }
        let vocab = lenses.iter().find_map(|(lens, _)| lens.layout.replaced.vocab_size());
        let vocab = vocab.unwrap_or(self.bases[&row.base].layout.config.vocab_size);
        check_row(&row, active.needs.context_tokens, &self.bases[&row.base], vocab as u32)?;
        active.reserve(&effects).map_err(|e| SubmitError::System(e.to_string()))?;
        let chain = self.config.prefix_cache.then(|| self.chain(&row));
        let id = RowId(self.new_id());
        let (sender, stream) = row_channel(id, row.max_new_tokens);
        let active = self.active.as_ref().expect("the row is over the active base");
        let blocks = active.needs.min_blocks as usize;
        let width = self.bases[&row.base].layout.config.hidden_size;
        // A row that goes on was counted when it first came.
        let queried = if row.generated.is_empty() { row.prompt.len() as u64 } else { 0 };
        let mut sequence = Sequence::new(row, lenses, (blocks, width), (id, sender));
        if let Some(chain) = chain {
            self.totals.queried_tokens += queried;
            sequence = sequence.sharing(chain);
        }
        self.waiting.push(sequence);
        Ok(stream)
    }

    /// Where a checked row begins in the tree of KV blocks.
    fn chain(&mut self, row: &RowRequest) -> Chain {
        let long_from = self.bases[&row.base].layout.config.long_rope_from();
        let lenses =
            row.lenses.iter().map(|one| (self.lenses[&one.lens].content.clone(), one.scale.to_bits()));
        let mut seed = Seed { lenses: lenses.collect(), long: false, salt: row.cache_salt.clone() };
        let parent = row.parent.and_then(|parent| self.rows().find(|other| other.id == parent));
        let family = parent.and_then(|parent| parent.family_for(row));
        let pool = &mut self.active.as_mut().expect("the row is over the active base").cache.pool;
        let within = pool.root(&seed);
        seed.long = true;
        let roots = [within, if long_from.is_some() { pool.root(&seed) } else { within }];
        let private = Chain::first_written_block(&row.activations).map(|first_block| {
            let new =
                || Private { first_block, family: Arc::new([pool.private_node(), pool.private_node()]) };
            family.unwrap_or_else(new)
        });
        Chain::new(roots, long_from, private, &row.activations)
    }

    /// Rows that are preempted end once they have got further than when they came.
    fn end_rows(&mut self, failure: &RowFailure) -> u32 {
        let stays = |row: &mut Sequence| *failure == RowFailure::Preempted && row.has_gained_nothing();
        let mut ended: Vec<Sequence> = self.running.extract_if(.., |row| !stays(row)).collect();
        // Those that wait have not begun.
        ended.append(&mut self.waiting);
        for row in &mut ended {
            if let Some(active) = &mut self.active {
                row.release(&mut active.cache.pool);
            }
            row.fail(failure.clone());
        }
        let rows = ended.len() as u32;
        drop(ended);
        self.answer_retired();
        rows
    }

    fn drop_cancelled(&mut self) {
        let Some(active) = &mut self.active else { return };
        self.waiting.retain(|row| !row.is_cancelled());
        self.running.retain_mut(|row| {
            // Asked once: its reader may leave at any moment, and a row that goes gives its blocks back.
            let is_cancelled = row.is_cancelled();
            if is_cancelled {
                row.release(&mut active.cache.pool);
            }
            !is_cancelled
        });
    }

    fn reconfigure(&mut self, config: EngineConfig) -> Result<(), ChangeError> {
        let used = self.arena.used();
        memory::lenses_fit(used.lens_bytes, &config)?;
        let Some(active) = &mut self.active else {
            memory::fits_inactive(used.base_bytes, &config)?;
            self.config = config;
            return Ok(());
        };
        let layout = &self.bases[&active.base].layout;
        let mut needs = BaseNeeds::of(&layout.config, layout.dtype, &config);
        // Rows in flight keep what they were promised.
        let longest = self.running.iter().chain(&self.waiting).map(Sequence::most_tokens).max().unwrap_or(0);
        needs.min_blocks = needs.min_blocks.max(crate::model::kv_cache::blocks_for(longest));
        let blocks = needs.min_blocks.max(active.cache.pool.used());
        memory::fits(used.base_bytes, &needs, blocks, &config)?;
        if needs.min_blocks > active.cache.limit() {
            let short_by_bytes = u64::from(needs.min_blocks - active.cache.limit()) * needs.block_bytes;
            let why = "the KV cache would outgrow the machine's memory at the worker's start".into();
            return Err(CannotFit { short_by_bytes, why }.into());
        }
        let system = |e: candle_core::Error| ChangeError::BaseMismatch(e.to_string());
        active.set_needs(&layout.config, needs, &config).map_err(system)?;
        if !config.prefix_cache {
            active.cache.pool.forget_kept();
        }
        self.config = config;
        self.resize_cache(&used);
        Ok(())
    }

    fn publish(&self) {
        let active = self.active.as_ref();
        let snapshot = Snapshot {
            active_base: active.map(|a| a.base),
            max_context_tokens: active.map_or(0, |a| a.needs.context_tokens),
            running_rows: self.running.len() as u32,
            waiting_rows: self.waiting.len() as u32,
            kv_blocks_total: active.map_or(0, |a| a.cache.pool.total()),
            kv_blocks_free: active.map_or(0, |a| a.cache.pool.free()),
            kv_blocks_kept: active.map_or(0, |a| a.cache.pool.kept()),
            kv_block_tokens: BLOCK_TOKENS as u32,
            arena: self.arena.used(),
            workspace_bytes: active.map_or(0, |a| a.needs.workspace_bytes),
            steps_total: self.totals.steps,
            prompt_tokens_total: self.totals.prompt_tokens,
            generated_tokens_total: self.totals.generated_tokens,
            prefix_queried_tokens_total: self.totals.queried_tokens,
            prefix_cached_tokens_total: self.totals.cached_tokens,
            preemptions_total: self.totals.preemptions,
            step_nanoseconds_total: self.totals.step_time.as_nanos() as u64,
            model_nanoseconds_total: self.totals.model_time.as_nanos() as u64,
        };
        *self.published.snapshot.lock() = snapshot;
    }
}

/// What can be said about a row by itself.
fn check_row(row: &RowRequest, limit: u32, base: &FilledBase, vocab: u32) -> Result<(), SubmitError> {
    if row.prompt.is_empty() {
        return Err(SubmitError::EmptyPrompt);
    }
    if !row.generated.is_empty() && row.generated.len() >= row.max_new_tokens as usize {
        return Err(SubmitError::NothingLeft { generated: row.generated.len(), new: row.max_new_tokens });
    }
    let prompt = u32::try_from(row.prompt.len()).unwrap_or(u32::MAX);
    if prompt.saturating_add(row.max_new_tokens) > limit {
        return Err(SubmitError::ContextOverflow { prompt, new: row.max_new_tokens, limit });
    }
    let config = &base.layout.config;
    row.activations.check(RowShape {
        layers: config.layers as u32,
        width: config.hidden_size,
        prompt,
        new: row.max_new_tokens,
        scores_prompt: row.prompt_logprobs.is_some(),
    })?;
    let mut tokens = row.prompt.iter().chain(&row.generated).enumerate();
    if let Some((position, &id)) = tokens.find(|(_, id)| **id >= vocab) {
        return Err(SubmitError::UnknownToken { id, position, vocab });
    }
    let check = |field, value: f32, ok: bool, range| match ok {
        true => Ok(()),
        false => Err(SubmitError::OutOfRange { field, value, range }),
    };
    let s = &row.sampling;
    check("temperature", s.temperature, s.temperature.is_finite() && s.temperature >= 0.0, "0 and above")?;
    check("top_p", s.top_p, s.top_p > 0.0 && s.top_p <= 1.0, "above 0, up to 1")?;
    check("min_p", s.min_p, (0.0..=1.0).contains(&s.min_p), "0 to 1")?;
    check("lenses", row.lenses.len() as f32, row.lenses.len() <= MAX_ROW_LENSES, "at most 8 on one row")?;
    row.lenses
        .iter()
        .try_for_each(|lens| check("scale", lens.scale, lens.scale.is_finite(), "finite numbers"))
}

fn system(error: ArenaError) -> ReserveError {
    ReserveError::System(chain(&error))
}
