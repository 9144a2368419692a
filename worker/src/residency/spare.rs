//! The disk as a cache of what can be fetched again: which lenses' files are to be here, and which leave when others need the
//! room.
//!
//! Files are needed by those who wait for the lens and while it is loaded, and always when it is declared to be here, pinned or
//! leased. Others stay as long as nobody needs the room. What was found out about them stays when they leave.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use tokio::time::Instant;
use turret_crds::condition::FailureReason;
use turret_crds::group::LensResidency;

use super::declared::{DeclaredLens, LensName};
use super::failure::Failure;
use super::owner::{Owner, Stage};
use super::resolve::{LensFiles, Wish};
use super::table::{LensKey, Phase};

/// Who needs files that were fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Need {
    Nobody,
    /// Those who wait for the lens: until it is loaded.
    Passing,
    /// The document, a pin or a lease.
    Lasting,
}

/// A folder of files that were fetched.
#[derive(Clone, Debug, PartialEq)]
struct Fetched {
    folder: PathBuf,
    /// The lenses whose files these are.
    names: Vec<LensName>,
    bytes: u64,
    need: Need,
    /// Seconds since the worker's start; before all others where it never was.
    last_used: f64,
}

/// What leaves so that so many bytes do: of what nobody needs that which was not used for longest. Nothing when all of it
/// would not do.
fn choose(mut fetched: Vec<Fetched>, bytes: u64) -> Vec<Fetched> {
    fetched.retain(|one| one.need == Need::Nobody);
    if fetched.iter().map(|one| one.bytes).sum::<u64>() < bytes {
        return Vec::new();
    }
    fetched.sort_by(|a, b| a.last_used.total_cmp(&b.last_used).then_with(|| a.names.cmp(&b.names)));
    let mut leaving = 0;
    let is_enough = |one: &Fetched| {
        let before = leaving;
        leaving += one.bytes;
        before < bytes
    };
    fetched.into_iter().take_while(is_enough).collect()
}

impl Owner {
    /// How much of a lens is to be on this machine.
    pub(super) fn wish(&self, name: &LensName, lens: &DeclaredLens) -> Wish {
        if self.stays_here(name, lens) { Wish::Whole } else { lens.asked }
    }

    fn stays_here(&self, name: &LensName, lens: &DeclaredLens) -> bool {
        lens.lens.residency != LensResidency::OnDemand
            || self.is_pinned(name, lens)
            || self.leases.on(name) > 0
            || self.advice.share().is_some() && self.advice.assigns(name)
    }

    /// Has the files of a lens fetched that was only looked at, since somebody waits for it.
    pub(super) fn ask_for_files(&mut self, name: &LensName, now: Instant) {
        if self.lenses.get(name).is_some_and(|lens| lens.asked == Wish::Glimpse) {
            self.lenses.update(name, |lens| (lens.asked, lens.fetch_at) = (Wish::Whole, None));
            self.resolve_at = Some(now);
        }
    }

    /// Whether a request waits for a lens, or somebody who asked by hand.
    pub(super) fn is_waited_for(&self, name: &LensName) -> bool {
        let is_it = |group: &str, lens: Option<&str>| group == name.0 && lens == Some(name.1.as_str());
        self.awaited.contains_key(name)
            || self.waiters.values().any(|w| is_it(&w.model.group, w.model.lens.as_deref()))
    }

    /// Whether files that found no room find some without anybody's doing: others are only on their way through the disk, or
    /// have been needed until now.
    pub(super) fn may_get_room(&self, name: &LensName, failure: &Failure) -> bool {
        let Some(LensFiles::Remote { bytes, .. }) =
            self.lenses.get(name).and_then(|lens| Some(&lens.stage.ready()?.files))
        else {
            return false;
        };
        let is_coming = |(other, lens): (&LensName, &DeclaredLens)| {
            other != name && lens.in_flight && lens.asked == Wish::Whole
        };
        let frees = || {
            let fetched = self.fetched();
            fetched.iter().any(|one| one.need == Need::Passing) || !choose(fetched, *bytes).is_empty()
        };
        failure.reason == FailureReason::DiskFull && (self.lenses.iter().any(is_coming) || frees())
    }

    /// Lets files leave the disk that can be fetched again, at least so many bytes if there are. Tells how many leave.
    pub(super) fn make_way(&mut self, bytes: u64) -> u64 {
        let mut left = 0;
        for Fetched { folder, names, bytes, .. } in choose(self.fetched(), bytes) {
            for name in &names {
                tracing::info!(
                    group = name.0,
                    lens = name.1,
                    bytes,
                    "the files of a lens leave the disk, others need the room"
                );
                self.lenses.update(name, |lens| {
                    lens.asked = Wish::Glimpse;
                    if let Stage::Ready(ready) = &mut lens.stage {
                        let digest = ready.files.digest().to_owned();
                        ready.files = LensFiles::Remote { digest, bytes, is_claim: false };
                    }
                });
                if let Some(key) = self.lenses.get(name).and_then(DeclaredLens::key) {
                    self.lenses.mark_key(&key);
                }
            }
            self.start.resolver.fetcher.cache().forget(&folder);
            left += bytes;
        }
        if left > 0 {
            self.measure_disk();
        }
        left
    }

    /// All that was fetched for lenses, by folder.
    fn fetched(&self) -> Vec<Fetched> {
        let cache = self.start.resolver.fetcher.cache();
        let requests =
            self.waiters.values().filter_map(|w| Some((w.model.group.clone(), w.model.lens.clone()?)));
        let waited: BTreeSet<LensKey> = requests
            .chain(self.awaited.keys().cloned())
            .filter_map(|name| self.lenses.get(&name)?.key())
            .collect();
        // What is being checked may be found to be in the same folder.
        let in_flight = self.lenses.iter().filter(|(_, lens)| lens.in_flight);
        let checked: BTreeSet<&str> = in_flight.map(|(_, lens)| lens.lens.source.uri.as_str()).collect();
        let is_passing = |key: &LensKey, lens: &DeclaredLens| {
            (waited.contains(key) && !self.table.has_lens(key))
                || self.table.lenses.get(key).is_some_and(|held| held.phase == Phase::Loading)
                || checked.contains(lens.lens.source.uri.as_str())
        };
        let mut fetched: BTreeMap<PathBuf, Fetched> = BTreeMap::new();
        for (name, lens) in self.lenses.iter() {
            let (Some(key), Some(files)) = (lens.key(), lens.files_here()) else { continue };
            if !cache.holds(&files.folder) {
                continue;
            }
            let need = if self.stays_here(name, lens) {
                Need::Lasting
            } else if is_passing(&key, lens) {
                Need::Passing
            } else {
                Need::Nobody
            };
            let used = self.entries.get(&key).map(|entry| self.history.usage(*entry).last_used_seconds);
            let folder = files.folder.clone();
            let one = fetched.entry(folder.clone()).or_insert(Fetched {
                folder,
                names: Vec::new(),
                bytes: files.bytes,
                need,
                last_used: f64::NEG_INFINITY,
            });
            one.need = one.need.max(need);
            one.last_used = one.last_used.max(used.unwrap_or(f64::NEG_INFINITY));
            one.names.push(name.clone());
        }
        fetched.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn any_fetched() -> impl Strategy<Value = Vec<Fetched>> {
        let need = prop_oneof![
            4 => Just(Need::Nobody),
            1 => Just(Need::Passing),
            1 => Just(Need::Lasting),
        ];
        let one = (1u64..20, need, proptest::option::of(0u8..4));
        proptest::collection::vec(one, 0..8).prop_map(|all| {
            let numbered = all.into_iter().enumerate();
            numbered
                .map(|(n, (bytes, need, used))| Fetched {
                    folder: PathBuf::from(n.to_string()),
                    names: vec![("group".into(), format!("lens-{n}"))],
                    bytes,
                    need,
                    last_used: used.map_or(f64::NEG_INFINITY, f64::from),
                })
                .collect()
        })
    }

    proptest! {
        #[test]
        fn what_leaves_is_needed_by_nobody_and_enough_and_no_more(all in any_fetched(), bytes in 0u64..60) {
            let sum = |some: &[Fetched]| some.iter().map(|one| one.bytes).sum::<u64>();
            let leaving = choose(all.clone(), bytes);
            prop_assert!(leaving.iter().all(|one| one.need == Need::Nobody));
            let spare: Vec<Fetched> = all.into_iter().filter(|one| one.need == Need::Nobody).collect();
            if sum(&spare) < bytes {
                prop_assert!(leaving.is_empty(), "what would not help stays");
                return Ok(());
            }
            prop_assert!(sum(&leaving) >= bytes);
            if let Some((_, before)) = leaving.split_last() {
                prop_assert!(sum(before) < bytes);
            }
            let latest = leaving.iter().map(|one| one.last_used).fold(f64::NEG_INFINITY, f64::max);
            let mut staying = spare.iter().filter(|one| !leaving.contains(one));
            prop_assert!(leaving.is_empty() || staying.all(|one| one.last_used >= latest));
        }
    }
}
