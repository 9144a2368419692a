//! The declared lenses: by name, and by what their files are. The same files under several names are one content.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use tokio::time::Instant;
use turret_crds::document::{BaseKey, DocumentLens};
use turret_crds::report::{Eviction, Feedback, FetchReport};

use super::Measured;
use super::owner::Stage;
use super::resolve::{CheckedFiles, LensFiles, ResolvedLens, Wish};
use super::table::LensKey;

/// A lens as it is declared: group and name.
pub(super) type LensName = (String, String);

/// A declared lens.
#[derive(Debug)]
pub(super) struct DeclaredLens {
    pub(super) lens: DocumentLens,
    pub(super) base: BaseKey,
    pub(super) stage: Stage<ResolvedLens>,
    /// Which resolution is current; an answer to an older one is dropped.
    pub(super) token: u64,
    pub(super) in_flight: bool,
    pub(super) failures: u32,
    /// How much of it somebody has asked for since its files were last here.
    pub(super) asked: Wish,
    /// When its files are fetched again, after that failed and it is served all the same.
    pub(super) fetch_at: Option<Instant>,
    /// Bytes of its files as far as known, so that small ones are resolved first.
    pub(super) file_bytes: u64,
    /// Its files, while they are on their way.
    pub(super) fetch: Option<FetchReport>,
    pub(super) counts: Counts,
}

/// What happened to a lens under its name, whatever its files were.
#[derive(Clone, Debug, Default)]
pub(super) struct Counts {
    pub(super) active_rows: u32,
    pub(super) waiting_rows: u32,
    pub(super) served: u64,
    pub(super) errors: u64,
    /// Seconds since the epoch.
    pub(super) last_used: Option<u64>,
    /// Times it came to the device, and how long the last time took.
    pub(super) loads: u64,
    pub(super) load_millis: Option<u64>,
    pub(super) last_eviction: Option<Eviction>,
    pub(super) generated_tokens: u64,
    pub(super) time_to_first_token: RecentMean,
    pub(super) time_per_output_token: RecentMean,
    pub(super) feedback: Option<Feedback>,
}

impl Counts {
    /// Counts what a row took.
    pub(super) fn measure(&mut self, measured: &Measured) {
        self.generated_tokens += u64::from(measured.tokens);
        self.time_to_first_token.add(measured.time_to_first_token);
        self.time_per_output_token.add(measured.time_per_output_token);
    }

    /// Counts a score in thousandths.
    pub(super) fn rate(&mut self, score_milli: u32) {
        let score = Feedback { count: 1, mean_milli: score_milli };
        self.feedback = Some(self.feedback.unwrap_or_default().and(score));
    }
}

/// The mean of the last few times, the newest of which counts an eighth.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct RecentMean(Option<Duration>);

impl RecentMean {
    fn add(&mut self, time: Option<Duration>) {
        let mean = |time: Duration, before: Option<Duration>| before.map_or(time, |b| (b * 7 + time) / 8);
        self.0 = time.map(|time| mean(time, self.0)).or(self.0);
    }

    pub(super) fn get(self) -> Option<Duration> {
        self.0
    }
}

impl DeclaredLens {
    pub(super) fn key(&self) -> Option<LensKey> {
        let digest = self.stage.ready()?.files.digest().to_owned();
        Some(LensKey { base: self.base.clone(), digest })
    }

    /// Its files, if they were found good and are on this machine.
    pub(super) fn files_here(&self) -> Option<&CheckedFiles> {
        self.stage.ready()?.files.here()
    }

    /// Whether nobody but the declaration says what its files are.
    pub(super) fn is_claim(&self) -> bool {
        self.stage
            .ready()
            .is_some_and(|ready| matches!(ready.files, LensFiles::Remote { is_claim: true, .. }))
    }

    /// Whether it was found good by a look at its files, which are not here.
    pub(super) fn is_glimpsed(&self) -> bool {
        self.stage.ready().is_some_and(|ready| ready.files.here().is_none())
    }
}

/// All declared lenses. Every change goes through here, so that who looks a content up by its key finds its names, and
/// who publishes finds what changed.
#[derive(Debug, Default)]
pub(super) struct Lenses {
    by_name: BTreeMap<LensName, DeclaredLens>,
    by_key: BTreeMap<LensKey, BTreeSet<LensName>>,
    /// Those that somebody waited for when that was last counted.
    waited_for: BTreeSet<LensName>,
    changed: Changed,
}

/// What was published of these names may be no longer true.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Changed {
    These(BTreeSet<LensName>),
    /// Names came or went.
    All,
}

impl Default for Changed {
    fn default() -> Self {
        Self::These(BTreeSet::new())
    }
}

impl Lenses {
    /// Takes a new declaration in place of the old one, which is given to the function that makes it.
    pub(super) fn declare(
        &mut self,
        make: impl FnOnce(BTreeMap<LensName, DeclaredLens>) -> BTreeMap<LensName, DeclaredLens>,
    ) {
        self.by_name = make(std::mem::take(&mut self.by_name));
        self.by_key.clear();
        for (name, lens) in &self.by_name {
            if let Some(key) = lens.key() {
                self.by_key.entry(key).or_default().insert(name.clone());
            }
        }
        self.changed = Changed::All;
    }

    pub(super) fn get(&self, name: &LensName) -> Option<&DeclaredLens> {
        self.by_name.get(name)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&LensName, &DeclaredLens)> {
        self.by_name.iter()
    }

    /// Names under which these files are declared.
    pub(super) fn names(&self, key: &LensKey) -> impl Iterator<Item = &LensName> {
        self.by_key.get(key).into_iter().flatten()
    }

    pub(super) fn declares(&self, key: &LensKey) -> bool {
        self.by_key.contains_key(key)
    }

    /// Changes a lens, which may become other files by it.
    pub(super) fn update<T>(
        &mut self,
        name: &LensName,
        change: impl FnOnce(&mut DeclaredLens) -> T,
    ) -> Option<T> {
        let lens = self.by_name.get_mut(name)?;
        let before = lens.key();
        let result = change(lens);
        let after = lens.key();
        if before != after {
            if let Some(before) = before
                && let Some(names) = self.by_key.get_mut(&before)
            {
                names.remove(name);
                if names.is_empty() {
                    self.by_key.remove(&before);
                }
            }
            if let Some(after) = after {
                self.by_key.entry(after).or_default().insert(name.clone());
            }
        }
        self.mark(name);
        Some(result)
    }

    /// Counts something of a lens.
    pub(super) fn count(&mut self, name: &LensName, change: impl FnOnce(&mut Counts)) {
        if let Some(lens) = self.by_name.get_mut(name) {
            change(&mut lens.counts);
            self.mark(name);
        }
    }

    /// Takes in how many wait for each lens; for those that are not named, nobody does.
    pub(super) fn count_waiting(&mut self, waiting: BTreeMap<LensName, u32>) {
        let before = std::mem::take(&mut self.waited_for);
        for name in before.iter().filter(|name| !waiting.contains_key(*name)) {
            self.count(name, |counts| counts.waiting_rows = 0);
        }
        for (name, rows) in &waiting {
            if self.get(name).is_some_and(|lens| lens.counts.waiting_rows != *rows) {
                self.count(name, |counts| counts.waiting_rows = *rows);
            }
        }
        self.waited_for = waiting.into_keys().collect();
    }

    /// Notes that something is to be published of these files, such as where they are.
    pub(super) fn mark_key(&mut self, key: &LensKey) {
        if let (Changed::These(changed), Some(names)) = (&mut self.changed, self.by_key.get(key)) {
            changed.extend(names.iter().cloned());
        }
    }

    fn mark(&mut self, name: &LensName) {
        if let Changed::These(changed) = &mut self.changed
            && !changed.contains(name)
        {
            changed.insert(name.clone());
        }
    }

    /// What is to be published again; once.
    pub(super) fn take_changed(&mut self) -> Changed {
        std::mem::take(&mut self.changed)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(n: u8) -> LensName {
        ("group".into(), format!("lens-{n}"))
    }

    fn lens(digest: Option<u8>) -> DeclaredLens {
        DeclaredLens {
            lens: serde_json::from_value(serde_json::json!({
                "name": "lens", "source": {"uri": "file:///lens"}, "scaleMilli": 1000
            }))
            .unwrap(),
            base: BaseKey("base".into()),
            stage: stage(digest),
            token: 0,
            in_flight: false,
            failures: 0,
            asked: Wish::Glimpse,
            fetch_at: None,
            file_bytes: 0,
            fetch: None,
            counts: Counts::default(),
        }
    }

    fn stage(digest: Option<u8>) -> Stage<ResolvedLens> {
        digest.map_or(Stage::Resolving, |n| Stage::Ready(ResolvedLens::of_digest(&format!("digest-{n}"))))
    }

    #[derive(Clone, Debug)]
    enum Step {
        Declare(Vec<(u8, Option<u8>)>),
        Change(u8, Option<u8>),
        Count(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let digest = || proptest::option::of(0u8..4);
        prop_oneof![
            1 => proptest::collection::vec((0u8..6, digest()), 0..6).prop_map(Step::Declare),
            4 => (0u8..6, digest()).prop_map(|(n, d)| Step::Change(n, d)),
            1 => (0u8..6).prop_map(Step::Count),
        ]
    }

    #[test]
    fn who_waits_is_counted_anew_and_only_what_changed_is_published() {
        let mut lenses = Lenses::default();
        lenses.declare(|_| (0..3).map(|n| (name(n), lens(None))).collect());
        let mut count = |waiting: &[(u8, u32)]| {
            lenses.take_changed();
            lenses.count_waiting(waiting.iter().map(|&(n, rows)| (name(n), rows)).collect());
            let rows: Vec<u32> = lenses.iter().map(|(_, lens)| lens.counts.waiting_rows).collect();
            (rows, lenses.take_changed())
        };
        let these = |names: &[u8]| Changed::These(names.iter().map(|&n| name(n)).collect());
        // One that is not declared is refused soon.
        assert_eq!(count(&[(0, 2), (1, 1), (9, 4)]), (vec![2, 1, 0], these(&[0, 1])));
        assert_eq!(count(&[(0, 2), (1, 3)]), (vec![2, 3, 0], these(&[1])));
        assert_eq!(count(&[(1, 3)]), (vec![0, 3, 0], these(&[0])));
        assert_eq!(count(&[]), (vec![0, 0, 0], these(&[1])));
        assert_eq!(count(&[]), (vec![0, 0, 0], these(&[])));
    }

    proptest! {
        #[test]
        fn names_and_contents_agree_and_no_change_goes_unnoticed(steps in proptest::collection::vec(step(), 1..30)) {
            let mut lenses = Lenses::default();
            for step in steps {
                lenses.take_changed();
                let before: BTreeMap<LensName, Option<LensKey>> =
                    lenses.iter().map(|(name, lens)| (name.clone(), lens.key())).collect();
                match step {
                    Step::Declare(all) => lenses.declare(|_| all.iter().map(|&(n, d)| (name(n), lens(d))).collect()),
                    Step::Change(n, digest) => {
                        lenses.update(&name(n), |lens| lens.stage = stage(digest));
                    }
                    Step::Count(n) => lenses.count(&name(n), |counts| counts.served += 1),
                }
                let mut found: BTreeMap<LensKey, BTreeSet<LensName>> = BTreeMap::new();
                for (name, lens) in lenses.iter() {
                    if let Some(key) = lens.key() {
                        found.entry(key).or_default().insert(name.clone());
                    }
                }
                prop_assert_eq!(&found, &lenses.by_key);
                let changed = lenses.take_changed();
                for (name, lens) in lenses.iter() {
                    let same = before.get(name) == Some(&lens.key());
                    let noticed = match &changed {
                        Changed::All => true,
                        Changed::These(names) => names.contains(name),
                    };
                    prop_assert!(same || noticed, "{name:?}");
                }
            }
        }
    }
}
