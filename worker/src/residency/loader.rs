//! Carries plans out: files into device memory, bases in and out, the switch from one base to another.
//!
//! Each method is one job, run beside the owner of the table, which hears the outcome as an event. Weights are read on
//! loader threads; the engine only reserves, installs and removes, between two steps.

use std::ops::ControlFlow;
use std::sync::Arc;

use turret_crds::condition::FailureReason;
use turret_crds::document::BaseKey;

use super::cache::Cache;
use super::failure::Failure;
use super::prepared::{Identity, Prepared, PreparedLens, Unusable, layout_digest};
use super::preparing::{Lent, OnPrepared, Preparer, Resident};
use super::resolve::{
    CheckedFiles, ResolvedBase, ResolvedLens, base_failure, lens_failure, on_loader_thread,
};
use super::table::LensKey;
use crate::engine::handle::{ActivateError, BaseId, EngineHandle, LensId, RemoveError, ReserveError};
use crate::lens::FilledLens;
use crate::lens::lora::LoraFolder;
use crate::model::tensor_file::Progress;
use crate::model::weights::{BaseFolder, FilledBase};
use crate::telemetry::chain;

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

/// Loads and frees. Cheap to clone.
#[derive(Clone)]
pub struct Loader {
    engine: EngineHandle,
    preparer: Preparer,
}

impl Loader {
    /// Over an engine, with prepared files in a cache.
    pub fn new(engine: EngineHandle, cache: Arc<Cache>, on_prepared: OnPrepared) -> Self {
        Self { engine, preparer: Preparer::new(cache, on_prepared) }
    }

    /// Loads a lens over an installed base.
    pub async fn load_lens(
        &self,
        (id, base): (BaseId, Arc<ResolvedBase>),
        lens: ResolvedLens,
        on_percent: OnPercent,
    ) -> Result<LensId, LoadError> {
        // Of what was only looked at there is nothing to load.
        let Some(files) = lens.files.here().filter(|files| files.are_unchanged()) else {
            return Err(LoadError::Changed);
        };
        let identity = Identity::of_lens(&files.digest, &base.identity());
        let prepared = match self.open_prepared(&identity).await {
            Some(prepared) => {
                self.prepared_lens((&base, &lens), prepared, &identity, on_percent.clone()).await?
            }
            None => None,
        };
        let is_prepared = prepared.is_some();
        let filled = match prepared {
            Some(filled) => filled,
            None => self.lens_of_files((id, &base), files, on_percent).await?,
        };
        let layout =
            (!is_prepared).then(|| serde_json::to_string(filled.layout()).expect("a layout is JSON"));
        let installed = self.engine.install_lens(id, filled.with_digest(files.digest.as_str())).await;
        let installed = installed.map_err(|e| LoadError::Failed(internal(&e)))?;
        if let Some(layout) = layout
            && let Some(lent) = self.engine.lend_lens(installed).await
        {
            self.preparer.begin(Resident::Lens(installed), Lent::Lens(lent), identity, layout);
        }
        Ok(installed)
    }

    async fn lens_of_files(
        &self,
        (id, base): (BaseId, &ResolvedBase),
        files: &CheckedFiles,
        on_percent: OnPercent,
    ) -> Result<FilledLens, LoadError> {
        let (path, layout) = (files.folder.clone(), base.layout.clone());
        let opened = on_loader_thread(move || LoraFolder::open(&path, &layout).map_err(|e| lens_failure(&e)))
            .await
            .map_err(LoadError::Failed)?;
        let region = self.engine.reserve_lens(opened.layout()).await.map_err(|e| reserve_error(&e))?;
        let lent = self.engine.lend_base(id).await.map_err(|e| LoadError::Failed(internal(&e)))?;
        let filled = on_loader_thread(move || {
            opened.fill(region, &lent, &mut telling(&on_percent)).map_err(|e| lens_failure(&e))
        });
        let filled = filled.await.map_err(LoadError::Failed)?;
        // Checked again: what was hashed is what was read.
        if files.are_unchanged() { Ok(filled) } else { Err(LoadError::Changed) }
    }

    async fn prepared_lens(
        &self,
        (base, lens): (&ResolvedBase, &ResolvedLens),
        prepared: Prepared,
        identity: &Identity,
        on_percent: OnPercent,
    ) -> Result<Option<FilledLens>, LoadError> {
        let is_of_the_files = layout_digest(prepared.layout()) == lens.layout_digest;
        let prepared = match PreparedLens::new(prepared) {
            Ok(prepared) if is_of_the_files => prepared,
            other => {
                let why = other.err().unwrap_or(Unusable::Altered("its layout is another one"));
                self.forget_prepared(identity, why).await;
                return Ok(None);
            }
        };
        let region = self.engine.reserve_lens(prepared.layout()).await.map_err(|e| reserve_error(&e))?;
        let config = base.config.clone();
        Ok(self.read_prepared(identity, move || prepared.fill(config, region, &*on_percent)).await)
    }

    /// Loads a base; it is resident then, not active.
    pub async fn load_base(
        &self,
        base: Arc<ResolvedBase>,
        on_percent: OnPercent,
    ) -> Result<BaseId, LoadError> {
        if !base.files.are_unchanged() {
            return Err(LoadError::Changed);
        }
        let (identity, layout) = (base.identity(), base.layout.fingerprint());
        let prepared = match self.open_prepared(&identity).await {
            Some(prepared) if prepared.layout() == layout && prepared.bytes() == base.layout.bytes => {
                let mut region =
                    self.engine.reserve_base(&base.layout).await.map_err(|e| reserve_error(&e))?;
                let on_percent = on_percent.clone();
                let read = move || prepared.read(region.bytes_mut(), &*on_percent).map(|()| region);
                self.read_prepared(&identity, read).await
            }
            Some(_) => {
                self.forget_prepared(&identity, Unusable::Altered("its layout is another one")).await;
                None
            }
            None => None,
        };
        let is_prepared = prepared.is_some();
        let filled = match prepared {
            Some(region) => FilledBase::new((*base.layout).clone(), region),
            None => self.base_of_files(&base, on_percent).await?,
        };
        let id = self.engine.install_base(filled).await.map_err(|e| LoadError::Failed(internal(&e)))?;
        if !is_prepared && let Ok(lent) = self.engine.lend_base(id).await {
            self.preparer.begin(Resident::Base(id), Lent::Base(lent), identity, layout);
        }
        Ok(id)
    }

    async fn base_of_files(
        &self,
        base: &ResolvedBase,
        on_percent: OnPercent,
    ) -> Result<FilledBase, LoadError> {
        let (path, dtype, quantization) = (base.files.folder.clone(), base.dtype, base.layout.quantization);
        let opened = on_loader_thread(move || BaseFolder::open(&path, dtype).map_err(|e| base_failure(&e)))
            .await
            .map_err(LoadError::Failed)?
            .quantized(quantization);
        let region = self.engine.reserve_base(opened.layout()).await.map_err(|e| reserve_error(&e))?;
        let filled = on_loader_thread(move || {
            opened.fill(region, &mut telling(&on_percent)).map_err(|e| base_failure(&e))
        });
        let filled = filled.await.map_err(LoadError::Failed)?;
        if base.files.are_unchanged() { Ok(filled) } else { Err(LoadError::Changed) }
    }

    async fn open_prepared(&self, identity: &Identity) -> Option<Prepared> {
        let path = self.preparer.cache().prepared(&identity.file_name());
        let (at, of) = (path, identity.clone());
        match tokio::task::spawn_blocking(move || Prepared::open(&at, &of)).await.ok()? {
            Ok(prepared) => prepared,
            Err(unusable) => {
                self.forget_prepared(identity, unusable).await;
                None
            }
        }
    }

    /// Fills a region. `None` when the prepared file is damaged; it is gone then.
    /// What reading a prepared file gives, on a thread where it may take its time; `None` when the file is of no use.
    async fn read_prepared<T: Send + 'static>(
        &self,
        identity: &Identity,
        read: impl FnOnce() -> Result<T, Unusable> + Send + 'static,
    ) -> Option<T> {
        match tokio::task::spawn_blocking(read).await.ok()? {
            Ok(filled) => Some(filled),
            Err(unusable) => {
                self.forget_prepared(identity, unusable).await;
                None
            }
        }
    }

    /// Removes a prepared file that is damaged: the next load from the files makes it anew.
    async fn forget_prepared(&self, identity: &Identity, why: Unusable) {
        let path = self.preparer.cache().prepared(&identity.file_name());
        let error = chain(&why);
        if !why.is_damage() {
            tracing::warn!(path = %path.display(), error, "failed to read a prepared file, the files it was made of are read");
            return;
        }
        tracing::warn!(path = %path.display(), error, "a prepared file is of no use and is made anew");
        let at = path.clone();
        if let Ok(Err(error)) = tokio::task::spawn_blocking(move || std::fs::remove_file(at)).await {
            tracing::warn!(path = %path.display(), %error, "failed to remove a prepared file");
        }
    }

    /// Frees a lens. What is not there any more is as good as freed.
    pub async fn remove_lens(&self, id: LensId) -> Result<(), Failure> {
        self.preparer.stop(Resident::Lens(id)).await;
        match self.engine.retire_lens(id).await {
            Ok(_) | Err(RemoveError::Unknown) => Ok(()),
            Err(error) => Err(internal(&error)),
        }
    }
}

/// Tells in percent how far reading files is.
fn telling(on_percent: &OnPercent) -> impl FnMut(Progress) -> ControlFlow<()> {
    let on_percent = on_percent.clone();
    move |progress| {
        on_percent(progress.percent());
        ControlFlow::Continue(())
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

impl Loader {
    /// Carries out a switch: parked bases are activated, others loaded first, beside the old one when both fit, instead of it
    /// otherwise. When the new one cannot be had, the old one is active again.
    pub async fn switch(&self, order: SwitchOrder, on_percent: OnPercent) -> SwitchOutcome {
        let mut outcome =
            SwitchOutcome { active: order.from.as_ref().map(|f| f.key.clone()), ..SwitchOutcome::default() };
        let result = self.forward(&order, on_percent.clone(), &mut outcome).await;
        let Err(failure) = result else {
            outcome.active = Some(order.to);
            return outcome;
        };
        if let Some(from) = order.from
            && outcome.removed_bases.contains(&from.key)
            && let Err(again) = self.restore(&from, on_percent, &mut outcome).await
        {
            outcome.active = None;
            tracing::error!(base = %from.key, error = ?again, "failed to load the old base again after a failed switch");
        }
        outcome.error = Some(failure);
        outcome
    }

    async fn forward(
        &self,
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
                    self.free(victim, outcome).await.map_err(LoadFailure::Failed)?;
                }
                if let Some(from) = &order.from {
                    reserves.insert(0, from);
                }
                outcome.loaded = true;
                loop {
                    match self.load_base(order.base.clone(), on_percent.clone()).await {
                        Ok(id) => break id,
                        Err(LoadError::NoRoom(failure)) => {
                            reserves.retain(|v| !outcome.removed_bases.contains(&v.key));
                            let Some(victim) = reserves.pop() else {
                                return Err(LoadFailure::Failed(failure));
                            };
                            self.free(victim, outcome).await.map_err(LoadFailure::Failed)?;
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
            match self.engine.activate(id).await {
                Ok(()) => return Ok(()),
                Err(ActivateError::CannotFit(short)) => {
                    reserves.retain(|v| !outcome.removed_bases.contains(&v.key));
                    let Some(victim) = reserves.pop() else {
                        return Err(LoadFailure::Failed(Failure::new(
                            FailureReason::DoesNotFit,
                            short.to_string(),
                        )));
                    };
                    self.free(victim, outcome).await.map_err(LoadFailure::Failed)?;
                }
                Err(error) => return Err(LoadFailure::Failed(internal(&error))),
            }
        }
    }

    async fn free(&self, victim: &Victim, outcome: &mut SwitchOutcome) -> Result<(), Failure> {
        for (key, id) in &victim.lenses {
            self.remove_lens(*id).await?;
            outcome.removed_lenses.push(key.clone());
        }
        self.preparer.stop(Resident::Base(victim.id)).await;
        match self.engine.remove_base(victim.id).await {
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
        &self,
        from: &Victim,
        on_percent: OnPercent,
        outcome: &mut SwitchOutcome,
    ) -> Result<(), LoadFailure> {
        let base = from.base.clone().ok_or(LoadFailure::Changed)?;
        // What came in place of it and could not be activated makes room again.
        for (key, id) in std::mem::take(&mut outcome.installed) {
            let half = Victim { key, id, lenses: Vec::new(), base: None };
            self.free(&half, outcome).await.map_err(LoadFailure::Failed)?;
        }
        let id = self.load_base(base, on_percent).await?;
        self.engine.activate(id).await.map_err(|e| LoadFailure::Failed(internal(&e)))?;
        outcome.removed_bases.retain(|key| *key != from.key);
        outcome.installed.push((from.key.clone(), id));
        outcome.active = Some(from.key.clone());
        Ok(())
    }

    /// Frees a parked base that is no longer declared.
    pub async fn remove_base(&self, victim: Victim) -> (SwitchOutcome, Option<Failure>) {
        let mut outcome = SwitchOutcome::default();
        let failure = self.free(&victim, &mut outcome).await.err();
        (outcome, failure)
    }
}
