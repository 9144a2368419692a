//! What is declared on its way to something that can be loaded: files found, fetched, checked, and looked at again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use turret_crds::document::BaseKey;
use turret_crds::source::{Source, SourceLocation};

use super::declared::{DeclaredLens, LensName};
use super::failure::{Failure, backoff};
use super::owner::{Owner, RECHECK, Stage, base_too_large, lens_too_large};
use super::resolve::{CheckedFiles, ResolvedBase, ResolvedLens, Wish};
use super::source::Listed;
use super::work::Event;

/// Sources of one supplier that are checked at a time. One more is for files that a request waits for.
const OF_ONE_SUPPLIER: usize = 3;
/// The same of all suppliers together.
const OF_ALL_SUPPLIERS: usize = 12;
/// How soon is looked again whether the disk has room for files that a request waits for.
const ROOM_RETRY: Duration = Duration::from_secs(1);

/// Which of the lenses that are due is looked at first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// Somebody waits for its files.
    Waited,
    /// Whether it can be served is not known.
    Open,
    /// Its files are to be here before anybody waits for them.
    Ahead,
}

/// Whose answer a check waits for: a server that does not answer, or a volume that hangs, holds up no others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Supplier {
    /// The worker's own file system.
    Files,
    /// A mounted volume.
    Volume(String),
    /// A server of `https://` sources, or the hub.
    Server(String),
}

impl Supplier {
    fn of(source: &Source) -> Self {
        match source.location() {
            Ok(SourceLocation::Volume { volume, .. }) => Self::Volume(volume.to_owned()),
            Ok(SourceLocation::Https { url }) => {
                Self::Server(url.split('/').nth(2).unwrap_or_default().to_owned())
            }
            Ok(SourceLocation::Hub { .. }) => Self::Server(String::new()),
            // What is nowhere is refused at once.
            Ok(SourceLocation::File { .. }) | Err(_) => Self::Files,
        }
    }
}

/// The checks that run, by the token of what was declared.
#[derive(Debug, Default)]
pub(super) struct Checks(BTreeMap<u64, Supplier>);

impl Checks {
    /// Whether one more may begin there.
    fn has_room_for(&self, supplier: &Supplier, urgency: Urgency) -> bool {
        let more = usize::from(urgency == Urgency::Waited);
        let there = self.0.values().filter(|other| *other == supplier).count();
        there < OF_ONE_SUPPLIER + more && self.0.len() < OF_ALL_SUPPLIERS + more
    }

    /// Whether a file may just have been fetched of which nobody knows yet.
    fn may_have_fetched(&self) -> bool {
        self.0.values().any(|supplier| matches!(supplier, Supplier::Server(_)))
    }
}

impl Owner {
    /// Starts what can be resolved now: bases first, the default group's before all, then lenses that somebody waits for, then
    /// small ones.
    pub(super) fn start_resolutions(&mut self, now: Instant) {
        if self.resolve_at.is_none_or(|at| now < at) {
            return;
        }
        let Some(document) = self.document.clone() else { return };
        // The end of a resolution, or a new document, is a reason to look again; otherwise only time is.
        self.resolve_at = None;
        let listed = Arc::new(Listed::of(&document));
        let default = document.default_group().map(|g| g.base.key.clone());
        let due = |in_flight: bool, resolving: bool, retry_at: Option<Instant>| {
            !in_flight && (resolving || retry_at.is_some_and(|at| at <= now))
        };
        let mut bases: Vec<BaseKey> = self
            .bases
            .iter()
            .filter(|(_, b)| due(b.in_flight, matches!(b.stage, Stage::Resolving), b.stage.retry_at()))
            .map(|(key, _)| key.clone())
            .collect();
        bases.sort_by_key(|key| (Some(key) != default.as_ref(), key.clone()));
        for key in bases {
            let declared = self.bases.get_mut(&key).expect("it was just listed");
            let supplier = Supplier::of(&declared.base.source);
            if !self.checks.has_room_for(&supplier, Urgency::Open) {
                continue;
            }
            self.checks.0.insert(declared.token, supplier);
            declared.in_flight = true;
            let (base, token, resolver, listed) =
                (declared.base.clone(), declared.token, self.start.resolver.clone(), listed.clone());
            let at = key.clone();
            let on_fetch = self.on_fetch(move |fetch| Event::BaseFetched { key: at.clone(), token, fetch });
            self.spawn(async move {
                Event::BaseResolved { key, token, result: resolver.base(base, listed, on_fetch).await }
            });
        }
        // What must be fetched whole comes after what only has to be looked at.
        let mut lenses: Vec<(Urgency, u64, Wish, LensName)> = self
            .lenses
            .iter()
            .filter(|(_, l)| self.bases.get(&l.base).is_some_and(|b| b.stage.ready().is_some()))
            .filter_map(|(name, l)| {
                Some((self.urgency(name, l, now)?, l.file_bytes, self.wish(name, l), name.clone()))
            })
            .collect();
        lenses.sort();
        for (urgency, _, _, name) in lenses {
            let Some(supplier) = self.lenses.get(&name).map(|lens| Supplier::of(&lens.lens.source)) else {
                continue;
            };
            if self.checks.has_room_for(&supplier, urgency) {
                self.resolve_lens(name, listed.clone());
            }
        }
        let bases = self.bases.values().filter(|b| !b.in_flight).filter_map(|b| b.stage.retry_at());
        let lenses = self.lenses.iter().map(|(_, l)| l).filter(|l| !l.in_flight);
        let lenses = lenses.filter_map(|l| l.stage.retry_at().or(l.fetch_at));
        // What is due waits for its base, whose end is a reason too.
        self.resolve_at = bases.chain(lenses).filter(|at| *at > now).min();
    }

    /// How urgent it is to look at a lens or to fetch its files; `None` when there is nothing to do for it now.
    fn urgency(&self, name: &LensName, lens: &DeclaredLens, now: Instant) -> Option<Urgency> {
        if lens.in_flight {
            return None;
        }
        match &lens.stage {
            Stage::Resolving => Some(Urgency::Open),
            Stage::Failed { retry_at, .. } => retry_at.is_some_and(|at| at <= now).then_some(Urgency::Open),
            Stage::Ready(_) => {
                let is_missed = lens.is_glimpsed() && self.wish(name, lens) == Wish::Whole;
                let is_due = is_missed && lens.fetch_at.is_none_or(|at| at <= now);
                is_due.then_some(if lens.asked == Wish::Whole { Urgency::Waited } else { Urgency::Ahead })
            }
        }
    }

    fn resolve_lens(&mut self, name: LensName, listed: Arc<Listed>) {
        let Some(declared) = self.lenses.get(&name) else { return };
        let Some(base) = self.bases.get(&declared.base).and_then(|b| b.stage.ready()).cloned() else {
            return;
        };
        let (token, resolver) = (declared.token, self.start.resolver.clone());
        let lens = (declared.lens.clone(), self.wish(&name, declared));
        self.checks.0.insert(token, Supplier::of(&lens.0.source));
        self.lenses.update(&name, |declared| declared.in_flight = true);
        let at = name.clone();
        let on_fetch = self.on_fetch(move |fetch| Event::LensFetched { name: at.clone(), token, fetch });
        self.spawn(async move {
            let result = resolver.lens(lens, listed, base, on_fetch).await;
            Event::LensResolved { name, token, result }
        });
    }

    /// Checks a lens again that was found good, while it goes on being served.
    pub(super) fn resolve_again(&mut self, name: &LensName) {
        let Some(document) = &self.document else { return };
        let listed = Arc::new(Listed::of(document));
        let Some(lens) = self.lenses.get(name).filter(|l| !l.in_flight && l.files_here().is_some()) else {
            return;
        };
        // Those for which there is no room now are found again by the next look.
        if self.checks.has_room_for(&Supplier::of(&lens.lens.source), Urgency::Ahead) {
            self.resolve_lens(name.clone(), listed);
        }
    }

    /// Looks how large the files of unresolved lenses are, where that is cheap.
    pub(super) fn measure_lenses(&self) {
        let Some(document) = &self.document else { return };
        let volumes = document.source_volumes.clone();
        let roots = self.start.resolver.roots.clone();
        let wanted: Vec<_> = self
            .lenses
            .iter()
            .filter(|(_, l)| matches!(l.stage, Stage::Resolving))
            .map(|(name, l)| (name.clone(), l.token, l.lens.source.clone()))
            .collect();
        self.spawn(async move {
            let measure = move || {
                let size = |source: &turret_crds::source::Source| match roots.locate(source, &volumes) {
                    Ok(super::source::Place::Folder(folder)) => crate::lens::lora::lora_files(&folder.path)
                        .iter()
                        .filter_map(|f| std::fs::metadata(folder.path.join(f)).ok())
                        .map(|m| m.len())
                        .sum(),
                    // What must be fetched comes after what is there.
                    _ => u64::MAX,
                };
                wanted
                    .iter()
                    .map(|(name, token, source)| (name.clone(), *token, size(source)))
                    .collect::<Vec<_>>()
            };
            Event::Measured(tokio::task::spawn_blocking(measure).await.unwrap_or_default())
        });
    }

    /// Every now and then looks whether files that were found good are still the same. Those of a volume that hangs are not
    /// looked at again before that is over; others are.
    pub(super) fn recheck(&mut self, now: Instant) {
        if now < self.recheck_at {
            return;
        }
        self.recheck_at = now + RECHECK;
        let mut by_supplier: Vec<(Supplier, Vec<(LensName, CheckedFiles)>)> = Vec::new();
        for (name, lens) in self.lenses.iter() {
            let Some(files) = lens.files_here() else { continue };
            let (supplier, one) = (Supplier::of(&lens.lens.source), (name.clone(), files.clone()));
            match by_supplier.iter_mut().find(|(other, _)| *other == supplier) {
                Some((_, checked)) => checked.push(one),
                None => by_supplier.push((supplier, vec![one])),
            }
        }
        for (supplier, checked) in by_supplier {
            if self.rechecking.contains(&supplier) {
                continue;
            }
            self.rechecking.push(supplier.clone());
            self.spawn(async move {
                let changed = move || {
                    checked.into_iter().filter(|(_, f)| !f.are_unchanged()).map(|(name, _)| name).collect()
                };
                let lenses = tokio::task::spawn_blocking(changed).await.unwrap_or_default();
                Event::Rechecked { supplier, lenses }
            });
        }
    }

    pub(super) fn on_base_resolved(
        &mut self,
        key: &BaseKey,
        token: u64,
        result: Result<ResolvedBase, Failure>,
    ) {
        self.checks.0.remove(&token);
        self.resolve_at = Some(Instant::now());
        let limits = self.coming_limits().clone();
        let Some(declared) = self.bases.get_mut(key).filter(|b| b.token == token) else {
            // What it found has a folder that nobody needs.
            return self.retain_folders();
        };
        (declared.in_flight, declared.fetch) = (false, None);
        let result = result.and_then(|base| base_too_large(&base.layout, &limits).map_or(Ok(base), Err));
        declared.stage = match result {
            Ok(base) => {
                tracing::info!(
                    base = %key,
                    digest = base.files.digest,
                    bytes = base.layout.bytes,
                    architecture = ?base.config.architecture,
                    "base resolved"
                );
                Stage::Ready(Arc::new(base))
            }
            Err(failure) => {
                declared.failures += 1;
                tracing::warn!(base = %key, reason = %failure.reason, error = failure.message, "base failed");
                Self::failed(failure, declared.failures)
            }
        };
        self.retain_folders();
    }

    pub(super) fn on_lens_resolved(
        &mut self,
        name: &LensName,
        token: u64,
        result: Result<ResolvedLens, Failure>,
    ) {
        self.checks.0.remove(&token);
        self.resolve_at = Some(Instant::now());
        let lens_budget = self.coming_limits().lens_bytes;
        let Some(declared) = self.lenses.get(name).filter(|l| l.token == token) else {
            return self.retain_folders();
        };
        let result = result.and_then(|lens| lens_too_large(lens.bytes, lens_budget).map_or(Ok(lens), Err));
        let known = declared.stage.ready().map(|r| r.files.digest().to_owned());
        let resident = declared.key().is_some_and(|key| self.table.has_lens(&key));
        // What was looked at and found good goes on as that, where its files are only late.
        let later = match &result {
            Err(_) if declared.is_glimpsed() && resident => Some(backoff(declared.failures + 1)),
            Err(failure) if declared.is_glimpsed() && self.may_get_room(name, failure) => Some(ROOM_RETRY),
            _ => None,
        };
        let is_waited = self.is_waited_for(name);
        let (group, lens) = name;
        match &result {
            Ok(resolved) if known.as_deref() == Some(resolved.files.digest()) => {}
            Ok(resolved) => {
                let digest = resolved.files.digest();
                tracing::info!(group, lens, digest, bytes = resolved.bytes, "lens resolved");
            }
            Err(failure) if later.is_some() => {
                tracing::info!(group, lens, reason = %failure.reason, error = failure.message, "the files of a lens are not here yet");
            }
            // What is in memory was good when it came; the files are missed when they are needed again.
            Err(failure) if resident => {
                tracing::warn!(group, lens, reason = %failure.reason, error = failure.message, "the source of a loaded lens is no longer good");
            }
            Err(failure) => {
                tracing::warn!(group, lens, reason = %failure.reason, error = failure.message, "lens failed");
            }
        }
        self.lenses.update(name, |declared| {
            (declared.in_flight, declared.fetch) = (false, None);
            match result {
                Ok(resolved) => {
                    (declared.failures, declared.fetch_at) = (0, None);
                    declared.stage = Stage::Ready(resolved);
                }
                Err(_) if later.is_some() => {
                    declared.failures += 1;
                    declared.fetch_at = later.map(|pause| Instant::now() + pause);
                    if !is_waited {
                        declared.asked = Wish::Glimpse;
                    }
                }
                Err(_) if resident => {}
                Err(failure) => {
                    declared.failures += 1;
                    declared.stage = Self::failed(failure, declared.failures);
                }
            }
        });
        // Its files may be here now for all of its names.
        if let Some(key) = self.lenses.get(name).and_then(DeclaredLens::key) {
            self.lenses.mark_key(&key);
        }
        // It may be other files now, which are in memory under another name already.
        self.follow_names();
        self.retain_folders();
    }

    /// Lets the disk tier forget folders that nothing declared refers to.
    pub(super) fn retain_folders(&mut self) {
        self.measure_disk();
        if self.checks.may_have_fetched() {
            return;
        }
        let bases = self.bases.values().filter_map(|b| Some(b.stage.ready()?.files.folder.clone()));
        let lenses = self.lenses.iter().filter_map(|(_, l)| Some(l.files_here()?.folder.clone()));
        let folders: BTreeSet<PathBuf> = bases.chain(lenses).collect();
        self.start.resolver.fetcher.cache().retain(&folders);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supplier(uri: &str) -> Supplier {
        let revision = uri.starts_with("hf").then(|| "0".repeat(40));
        Supplier::of(&Source { uri: uri.into(), revision, ..Source::default() })
    }

    #[test]
    fn what_hangs_holds_up_its_own_only() {
        let uris = ["pvc://a/x", "pvc://b/x", "https://h:1/x", "https://i/x", "hf://o/r", "file:///x"];
        let suppliers = uris.map(supplier);
        for (n, one) in suppliers.iter().enumerate() {
            assert!(suppliers[n + 1..].iter().all(|other| other != one), "{one:?}");
        }
        assert_eq!(supplier("https://h:1/y/z"), suppliers[2]);
        let mut checks = Checks::default();
        let has_room = |checks: &Checks, n: usize| checks.has_room_for(&suppliers[n], Urgency::Open);
        for token in 0..OF_ONE_SUPPLIER as u64 {
            assert!(has_room(&checks, 0));
            checks.0.insert(token, suppliers[0].clone());
        }
        assert!(!has_room(&checks, 0) && has_room(&checks, 1));
        assert!(checks.has_room_for(&suppliers[0], Urgency::Waited), "one more for who waits");
        assert!(!checks.may_have_fetched());
        for token in 10..10 + (OF_ALL_SUPPLIERS - OF_ONE_SUPPLIER) as u64 {
            checks.0.insert(token, Supplier::Server(token.to_string()));
        }
        assert!(!has_room(&checks, 1) && checks.may_have_fetched());
    }
}
