//! Writes prepared files of what is in memory, beside the serving: one at a time, and until it is to leave.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::cache::Cache;
use super::prepared::{Identity, file_bytes, write};
use crate::engine::handle::{BaseId, LensId};
use crate::lens::FilledLens;
use crate::model::weights::FilledBase;
use crate::telemetry::chain;

/// What is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Resident {
    /// A base.
    Base(BaseId),
    /// A lens.
    Lens(LensId),
}

/// Its weights, lent by the engine.
#[derive(Debug)]
pub enum Lent {
    /// Of a base.
    Base(Arc<FilledBase>),
    /// Of a lens.
    Lens(Arc<FilledLens>),
}

impl Lent {
    fn region(&self) -> &[u8] {
        match self {
            Self::Base(base) => base.bytes(),
            Self::Lens(lens) => lens.bytes(),
        }
    }
}

#[derive(Debug)]
struct Writing {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// Told when there is one prepared file more.
pub type OnPrepared = Arc<dyn Fn() + Send + Sync>;

/// Writes prepared files. Cheap to clone.
#[derive(Clone)]
pub struct Preparer {
    cache: Arc<Cache>,
    on_prepared: OnPrepared,
    writing: Arc<Mutex<BTreeMap<Resident, Writing>>>,
    turn: Arc<Semaphore>,
}

impl Preparer {
    /// Prepared files in this cache.
    pub fn new(cache: Arc<Cache>, on_prepared: OnPrepared) -> Self {
        Self { cache, on_prepared, writing: Arc::default(), turn: Arc::new(Semaphore::new(1)) }
    }

    /// Where they are.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// Begins to write the prepared file of what has just come to memory. `layout` is where everything is in it.
    pub fn begin(&self, resident: Resident, lent: Lent, identity: Identity, layout: String) {
        let stop = CancellationToken::new();
        let (cache, turn, stopped) = (self.cache.clone(), self.turn.clone(), stop.clone());
        let on_prepared = self.on_prepared.clone();
        let task = tokio::spawn(async move {
            let _turn = tokio::select! {
                biased;
                () = stopped.cancelled() => return,
                turn = turn.acquire() => turn,
            };
            let prepare = move || prepare(&cache, &lent, &identity, layout, &stopped);
            if tokio::task::spawn_blocking(prepare).await.is_ok_and(|is_there| is_there) {
                on_prepared();
            }
        });
        self.writing.lock().insert(resident, Writing { stop, task });
    }

    /// Gives back what was lent of something that is to leave memory: what was not written by now is not.
    pub async fn stop(&self, resident: Resident) {
        let writing = self.writing.lock().remove(&resident);
        if let Some(Writing { stop, task }) = writing {
            stop.cancel();
            let _ = task.await;
        }
    }
}

/// Tells whether there is one prepared file more.
fn prepare(
    cache: &Arc<Cache>,
    lent: &Lent,
    identity: &Identity,
    layout: String,
    stop: &CancellationToken,
) -> bool {
    let region = lent.region();
    let bytes = file_bytes(region.len() as u64, &layout);
    let written = || -> io::Result<bool> {
        if stop.is_cancelled() {
            return Ok(false);
        }
        // It is there, or there is no room that something fetched would not need more.
        let Some(place) = cache.place_for_prepared(&identity.file_name(), bytes)? else { return Ok(false) };
        let is_whole = write(File::create(place.path())?, identity, layout, region, stop)?;
        if is_whole {
            place.keep()?;
        }
        Ok(is_whole)
    };
    written().unwrap_or_else(|error| {
        let error = chain(&error);
        tracing::warn!(bytes, error, "failed to write a prepared file; the next load reads the files again");
        false
    })
}
