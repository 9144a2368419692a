//! Carries plans out: files into device memory, bases in and out, the switch from one base to another.
//!
//! Each function is one job, run beside the owner of the table, which hears the outcome as an event. Weights are read on
//! loader threads; the engine only reserves, installs and removes, between two steps.

use std::ops::ControlFlow;
use std::sync::Arc;

use turret_crds::condition::FailureReason;
use turret_crds::document::BaseKey;

use super::failure::Failure;
use super::resolve::{ResolvedBase, ResolvedLens, base_failure, lens_failure, on_loader_thread};
use super::table::LensKey;
use crate::engine::handle::{ActivateError, BaseId, EngineHandle, LensId, RemoveError, ReserveError};
use crate::lens::lora::LoraFolder;
use crate::model::weights::{BaseFolder, BaseLayout};

/// Told in whole percent how far a load is.
pub type OnPercent = Arc<dyn Fn(u8) + Send + Sync>;

/// How a load ended.
#[derive(Debug)]
pub enum LoadError {
    /// The files are not those that were checked; they are to be checked again.
    Changed,
    /// It cannot be loaded.
    Failed(Failure),
    /// The engine has no room although the plan said so; to be planned again.
    NoRoom(Failure),
}

fn reserve_error(error: &ReserveError) -> LoadError {
    match error {
        ReserveError::ArenaFull(short) => {
            LoadError::NoRoom(Failure::new(FailureReason::DoesNotFit, short.to_string()))
        }
        ReserveError::TooLarge(short) => {
            LoadError::Failed(Failure::new(FailureReason::DoesNotFit, short.to_string()))
        }
        ReserveError::System(_) | ReserveError::Stopped => {
            LoadError::Failed(Failure::new(FailureReason::Internal, error.to_string()))
        }
    }
}

fn internal(error: &dyn std::fmt::Display) -> Failure {
    Failure::new(FailureReason::Internal, error.to_string())
}

/// Loads a lens over an installed base.
pub async fn load_lens(
    engine: EngineHandle,
    base: BaseId,
    layout: Arc<BaseLayout>,
    lens: ResolvedLens,
    on_percent: OnPercent,
) -> Result<LensId, LoadError> {
    if !lens.files.are_unchanged() {
        return Err(LoadError::Changed);
    }
    let path = lens.files.folder.clone();
    let opened = on_loader_thread(move || LoraFolder::open(&path, &layout).map_err(|e| lens_failure(&e)))
        .await
        .map_err(LoadError::Failed)?;
    let region = engine.reserve_lens(opened.layout()).await.map_err(|e| reserve_error(&e))?;
    let lent = engine.lend_base(base).await.map_err(|e| LoadError::Failed(internal(&e)))?;
    let filled = on_loader_thread(move || {
        let mut progress = |p: crate::model::tensor_file::Progress| {
            on_percent(p.percent());
            ControlFlow::Continue(())
        };
        opened.fill(region, &lent, &mut progress).map_err(|e| lens_failure(&e))
    })
    .await
    .map_err(LoadError::Failed)?;
    // Checked again: what was hashed is what was read.
    if !lens.files.are_unchanged() {
        return Err(LoadError::Changed);
    }
    engine
        .install_lens(base, filled.with_digest(lens.files.digest))
        .await
        .map_err(|e| LoadError::Failed(internal(&e)))
}

/// Loads a base; it is resident then, not active.
pub async fn load_base(
    engine: EngineHandle,
    base: Arc<ResolvedBase>,
    on_percent: OnPercent,
) -> Result<BaseId, LoadError> {
    if !base.files.are_unchanged() {
        return Err(LoadError::Changed);
    }
    let (path, dtype, quantization) = (base.files.folder.clone(), base.dtype, base.layout.quantization);
    let opened = on_loader_thread(move || BaseFolder::open(&path, dtype).map_err(|e| base_failure(&e)))
        .await
        .map_err(LoadError::Failed)?
        .quantized(quantization);
    let region = engine.reserve_base(opened.layout()).await.map_err(|e| reserve_error(&e))?;
    let filled = on_loader_thread(move || {
        let mut progress = |p: crate::model::tensor_file::Progress| {
            on_percent(p.percent());
            ControlFlow::Continue(())
        };
        opened.fill(region, &mut progress).map_err(|e| base_failure(&e))
    })
    .await
    .map_err(LoadError::Failed)?;
    if !base.files.are_unchanged() {
        return Err(LoadError::Changed);
    }
    engine.install_base(filled).await.map_err(|e| LoadError::Failed(internal(&e)))
}

/// Frees a lens. What is not there any more is as good as freed.
pub async fn remove_lens(engine: &EngineHandle, id: LensId) -> Result<(), Failure> {
    match engine.retire_lens(id).await {
        Ok(_) | Err(RemoveError::Unknown) => Ok(()),
        Err(error) => Err(internal(&error)),
    }
}

/// Something resident, with the lenses over it, that may leave.
#[derive(Clone, Debug)]
pub struct Victim {
    /// The base.
    pub key: BaseKey,
    /// As the engine knows it.
    pub id: BaseId,
    /// Lenses over it.
    pub lenses: Vec<(LensKey, LensId)>,
    /// To load it again.
    pub base: Option<Arc<ResolvedBase>>,
}

/// What the switch job is to do.
pub struct SwitchOrder {
    /// The base that becomes active.
    pub to: BaseKey,
    /// Its files.
    pub base: Arc<ResolvedBase>,
    /// Set when it is parked in memory.
    pub resident: Option<BaseId>,
    /// The base that is active now.
    pub from: Option<Victim>,
    /// Bases that must leave before the new one is loaded, in this order, by plan.
    pub free_first: Vec<Victim>,
    /// Further parked bases that may leave if the engine asks for more room.
    pub parked: Vec<Victim>,
}

/// What a switch job did.
#[derive(Debug, Default)]
pub struct SwitchOutcome {
    /// Lenses that left.
    pub removed_lenses: Vec<LensKey>,
    /// Bases that left.
    pub removed_bases: Vec<BaseKey>,
    /// Bases that came, the target or the old one again.
    pub installed: Vec<(BaseKey, BaseId)>,
    /// The base that is active now.
    pub active: Option<BaseKey>,
    /// Why it is not the target.
    pub error: Option<LoadFailure>,
    /// Whether weights had to be read.
    pub loaded: bool,
}

/// Why a switch did not happen.
#[derive(Debug)]
pub enum LoadFailure {
    /// The files changed since they were checked.
    Changed,
    /// It cannot be loaded or activated.
    Failed(Failure),
}

impl From<LoadError> for LoadFailure {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Changed => Self::Changed,
            LoadError::Failed(failure) | LoadError::NoRoom(failure) => Self::Failed(failure),
        }
    }
}

/// Carries out a switch: parked bases are activated, others loaded first, beside the old one when both fit, instead of it
/// otherwise. When the new one cannot be had, the old one is active again.
pub async fn switch(engine: EngineHandle, order: SwitchOrder, on_percent: OnPercent) -> SwitchOutcome {
    let mut outcome =
        SwitchOutcome { active: order.from.as_ref().map(|f| f.key.clone()), ..SwitchOutcome::default() };
    let result = forward(&engine, &order, on_percent.clone(), &mut outcome).await;
    let Err(failure) = result else {
        outcome.active = Some(order.to);
        return outcome;
    };
    if let Some(from) = order.from
        && outcome.removed_bases.contains(&from.key)
        && let Err(again) = restore(&engine, &from, on_percent, &mut outcome).await
    {
        outcome.active = None;
        tracing::error!(base = %from.key, error = ?again, "failed to load the old base again after a failed switch");
    }
    outcome.error = Some(failure);
    outcome
}

async fn forward(
    engine: &EngineHandle,
    order: &SwitchOrder,
    on_percent: OnPercent,
    outcome: &mut SwitchOutcome,
) -> Result<(), LoadFailure> {
    let mut reserves: Vec<&Victim> = order.parked.iter().collect();
    // Popped from the end: parked ones in their order, the active one last.
    reserves.reverse();
    let id = match order.resident {
        Some(id) => id,
        None => {
            for victim in &order.free_first {
                free(engine, victim, outcome).await.map_err(LoadFailure::Failed)?;
            }
            if let Some(from) = &order.from {
                reserves.insert(0, from);
            }
            outcome.loaded = true;
            loop {
                match load_base(engine.clone(), order.base.clone(), on_percent.clone()).await {
                    Ok(id) => break id,
                    Err(LoadError::NoRoom(failure)) => {
                        reserves.retain(|v| !outcome.removed_bases.contains(&v.key));
                        let Some(victim) = reserves.pop() else {
                            return Err(LoadFailure::Failed(failure));
                        };
                        free(engine, victim, outcome).await.map_err(LoadFailure::Failed)?;
                    }
                    Err(error) => return Err(error.into()),
                }
            }
        }
    };
    if order.resident.is_none() {
        outcome.installed.push((order.to.clone(), id));
    } else if let Some(from) = &order.from {
        reserves.insert(0, from);
    }
    loop {
        match engine.activate(id).await {
            Ok(()) => return Ok(()),
            Err(ActivateError::CannotFit(short)) => {
                reserves.retain(|v| !outcome.removed_bases.contains(&v.key));
                let Some(victim) = reserves.pop() else {
                    return Err(LoadFailure::Failed(Failure::new(
                        FailureReason::DoesNotFit,
                        short.to_string(),
                    )));
                };
                free(engine, victim, outcome).await.map_err(LoadFailure::Failed)?;
            }
            Err(error) => return Err(LoadFailure::Failed(internal(&error))),
        }
    }
}

async fn free(engine: &EngineHandle, victim: &Victim, outcome: &mut SwitchOutcome) -> Result<(), Failure> {
    for (key, id) in &victim.lenses {
        remove_lens(engine, *id).await?;
        outcome.removed_lenses.push(key.clone());
    }
    match engine.remove_base(victim.id).await {
        Ok(_) | Err(RemoveError::Unknown) => {
            if outcome.active.as_ref() == Some(&victim.key) {
                outcome.active = None;
            }
            outcome.removed_bases.push(victim.key.clone());
            Ok(())
        }
        Err(error) => Err(internal(&error)),
    }
}

/// Loads the old base again and makes it active.
async fn restore(
    engine: &EngineHandle,
    from: &Victim,
    on_percent: OnPercent,
    outcome: &mut SwitchOutcome,
) -> Result<(), LoadFailure> {
    let base = from.base.clone().ok_or(LoadFailure::Changed)?;
    // What came in place of it and could not be activated makes room again.
    for (key, id) in std::mem::take(&mut outcome.installed) {
        let half = Victim { key, id, lenses: Vec::new(), base: None };
        free(engine, &half, outcome).await.map_err(LoadFailure::Failed)?;
    }
    let id = load_base(engine.clone(), base, on_percent).await?;
    engine.activate(id).await.map_err(|e| LoadFailure::Failed(internal(&e)))?;
    outcome.removed_bases.retain(|key| *key != from.key);
    outcome.installed.push((from.key.clone(), id));
    outcome.active = Some(from.key.clone());
    Ok(())
}

/// Frees a parked base that is no longer declared.
pub async fn remove_base(engine: EngineHandle, victim: Victim) -> (SwitchOutcome, Option<Failure>) {
    let mut outcome = SwitchOutcome::default();
    let failure = free(&engine, &victim, &mut outcome).await.err();
    (outcome, failure)
}
