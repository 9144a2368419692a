//! Which lenses leave so that others fit. Pure: the same residents in any order give the same victims.
//!
//! Every policy is a number per resident: the least leaves first. Equals leave least recently used first, then by
//! key. [`EvictionPolicy::Alrfu`] is the default because it moves the fewest bytes (`turret-worker simulate --workloads` prints the table).

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt;

use turret_crds::placement::EvictionPolicy;

use super::shadow::Horizon;
use super::usage::{HALF_LIVES, Rank, UNRATED_MILLI, Usage};

/// How lenses compare at one moment; made by [`super::history::History::ranking`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ranking {
    /// What makes a lens leave.
    pub policy: EvictionPolicy,
    /// Now, on the clock of [`Usage::last_used_seconds`].
    pub now_seconds: f64,
    /// Idle seconds that Hybrid does not tell from more.
    pub idle_seconds: f64,
    /// Number of the latest request for any lens.
    pub requests: u64,
    /// What [`EvictionPolicy::Alrfu`] goes by.
    pub horizon: Horizon,
}

/// A lens in memory.
#[derive(Clone, Copy, Debug)]
pub struct Resident<'a, K> {
    /// Its key.
    pub key: K,
    /// What is remembered of it.
    pub usage: &'a Usage,
    /// Whose requests it shares with others: an index, from 0 without gaps. Only [`EvictionPolicy::Specialization`] asks.
    pub group: u16,
    /// Whether it may leave. Others take part in sums and maxima only.
    pub evictable: bool,
}

/// A lens that leaves, and why.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Victim<K> {
    /// Its key.
    pub key: K,
    /// Bytes that it frees.
    pub bytes: u64,
    /// For the log.
    pub reason: Reason,
}

/// What leaves, least worth first.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice<K> {
    /// Who.
    pub victims: Vec<Victim<K>>,
    /// Bytes that are missing even so. Then the victims are all that may leave.
    pub short_by_bytes: u64,
}

/// Why a lens leaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Reason {
    /// By [`EvictionPolicy::Lru`], or by [`EvictionPolicy::Alrfu`] on its shortest horizon.
    LeastRecentlyUsed {
        /// Seconds since its last use.
        idle_seconds: f64,
    },
    /// By [`EvictionPolicy::Lfu`].
    LeastFrequentlyUsed {
        /// Times it was served.
        serves: u32,
    },
    /// By [`EvictionPolicy::Priority`].
    LowestPriority {
        /// As declared.
        priority: i16,
        /// Seconds since its last use.
        idle_seconds: f64,
    },
    /// By [`EvictionPolicy::Specialization`].
    LeastSpecialized {
        /// Its part of its group's recent requests, 0 to 1.
        share: f64,
        /// What the part counts: 0 to 2, 1 where nobody rated the lens.
        rating: f64,
    },
    /// By [`EvictionPolicy::Hybrid`].
    HighestScore(HybridScore),
    /// By [`EvictionPolicy::Alrfu`].
    LeastWorth {
        /// Its requests, decayed with the half-life.
        recent_requests: f64,
        /// Requests for any lens after which one counts half.
        half_life: f64,
        /// Time to load it again.
        load_seconds: f64,
        /// Bytes that it frees.
        bytes: u64,
    },
}

/// The parts of [`EvictionPolicy::Hybrid`], weighted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HybridScore {
    /// 0 to 0.3: not used for long.
    pub idle: f64,
    /// 0 to 0.2: seldom loaded.
    pub loads: f64,
    /// 0 to 0.4: seldom served.
    pub served: f64,
    /// 0 to 0.1: often failed.
    pub errors: f64,
}

impl HybridScore {
    /// The sum.
    pub fn total(self) -> f64 {
        self.idle + self.loads + self.served + self.errors
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LeastRecentlyUsed { idle_seconds } => {
                write!(f, "least recently used: idle {idle_seconds:.0} s")
            }
            Self::LeastFrequentlyUsed { serves } => write!(f, "least frequently used: served {serves} times"),
            Self::LowestPriority { priority, idle_seconds } => {
                write!(f, "lowest priority: {priority}, idle {idle_seconds:.0} s")
            }
            Self::LeastSpecialized { share, rating } => {
                write!(f, "least specialized: serves {:.1} % of its group's requests", share * 100.0)?;
                if *rating == 1.0 {
                    Ok(())
                } else {
                    write!(f, ", which count {rating:.2} for how it is rated")
                }
            }
            Self::HighestScore(score) => write!(
                f,
                "highest score: {:.3} = {:.3} idle + {:.3} seldom loaded + {:.3} seldom served + {:.3} errors",
                score.total(),
                score.idle,
                score.loads,
                score.served,
                score.errors
            ),
            Self::LeastWorth { recent_requests, half_life, load_seconds, bytes } => write!(
                f,
                "least worth: {recent_requests:.3} requests (half-life {half_life:.0} requests of all lenses), \
                 {load_seconds:.3} s to load {bytes} bytes again"
            ),
        }
    }
}

/// Chooses what leaves so that `needed_bytes` are freed. The order is by worth, so a large lens of little worth leaves
/// before several of more; what the later victims made unnecessary stays.
pub fn choose<K: Copy + Ord>(
    residents: &[Resident<'_, K>],
    needed_bytes: u64,
    ranking: &Ranking,
) -> Choice<K> {
    let totals = Totals::of(residents, ranking.policy);
    let candidate = |resident| Candidate { worth: ranking.worth(resident, &totals).into(), resident };
    let candidates = residents.iter().filter(|r| r.evictable).map(candidate);
    let (mut leaving, freed) = least_worth(candidates, needed_bytes);
    keep_unnecessary(&mut leaving, freed.saturating_sub(needed_bytes));
    let victim = |c: &Candidate<'_, K>| Victim {
        key: c.resident.key,
        bytes: c.bytes(),
        reason: ranking.reason(c.resident, &totals),
    };
    Choice {
        victims: leaving.iter().map(victim).collect(),
        short_by_bytes: needed_bytes.saturating_sub(freed),
    }
}

/// What may leave; the least leaves first.
struct Candidate<'a, K> {
    worth: Rank,
    resident: &'a Resident<'a, K>,
}

impl<K> Candidate<'_, K> {
    fn bytes(&self) -> u64 {
        self.resident.usage.bytes
    }
}

impl<K: Ord> Ord for Candidate<'_, K> {
    fn cmp(&self, other: &Self) -> Ordering {
        let last_used = |c: &Self| Rank::from(c.resident.usage.last_used_seconds);
        let by_worth = self.worth.cmp(&other.worth);
        // What decides between equals is looked up only then.
        by_worth
            .then_with(|| last_used(self).cmp(&last_used(other)))
            .then_with(|| self.resident.key.cmp(&other.resident.key))
    }
}

impl<K: Ord> PartialOrd for Candidate<'_, K> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<K: Ord> PartialEq for Candidate<'_, K> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<K: Ord> Eq for Candidate<'_, K> {}

/// The first candidates in order, as many as free what is needed, and what they free. One pass, without sorting:
/// most are worth more than all that are to leave so far, and cost one comparison.
fn least_worth<'a, K: Ord>(
    candidates: impl Iterator<Item = Candidate<'a, K>>,
    needed_bytes: u64,
) -> (Vec<Candidate<'a, K>>, u64) {
    let mut leaving = BinaryHeap::new();
    let mut freed = 0u64;
    for candidate in candidates {
        if freed >= needed_bytes && leaving.peek().is_none_or(|most_worth| candidate >= *most_worth) {
            continue;
        }
        freed += candidate.bytes();
        leaving.push(candidate);
        while let Some(most_worth) = leaving.peek()
            && freed - most_worth.bytes() >= needed_bytes
        {
            freed -= most_worth.bytes();
            leaving.pop();
        }
    }
    (leaving.into_sorted_vec(), freed)
}

/// Takes victims back as far as more is freed than needed, the most worth first.
fn keep_unnecessary<K>(leaving: &mut Vec<Candidate<'_, K>>, mut spare_bytes: u64) {
    for n in (0..leaving.len()).rev() {
        let bytes = leaving[n].bytes();
        if bytes <= spare_bytes {
            spare_bytes -= bytes;
            leaving.remove(n);
        }
    }
}

/// What residents are compared with. Inverses, because there is one to multiply with per resident.
#[derive(Default)]
struct Totals {
    per_max_served: f64,
    per_max_loads: f64,
    per_max_errors: f64,
    /// Of the sum of [`Self::served_parts`].
    per_served_by_group: Vec<f64>,
}

impl Totals {
    fn of<K>(residents: &[Resident<'_, K>], policy: EvictionPolicy) -> Self {
        let mut totals = Self::default();
        if matches!(policy, EvictionPolicy::Hybrid | EvictionPolicy::Specialization) {
            totals.add_maxima(residents);
        }
        if policy == EvictionPolicy::Specialization {
            totals.add_groups(residents);
        }
        totals
    }

    fn add_maxima<K>(&mut self, residents: &[Resident<'_, K>]) {
        let (mut served, mut loads, mut errors) = (0f32, 0f32, 0f32);
        for Resident { usage, .. } in residents {
            served = served.max(usage.served);
            loads = loads.max(usage.loads);
            errors = errors.max(usage.errors);
        }
        [self.per_max_served, self.per_max_loads, self.per_max_errors] =
            [served, loads, errors].map(|max| inverse(max.into()));
    }

    fn add_groups<K>(&mut self, residents: &[Resident<'_, K>]) {
        let groups = residents.iter().map(|r| usize::from(r.group) + 1).max().unwrap_or(0);
        let mut served = vec![0u64; groups];
        for resident in residents {
            served[usize::from(resident.group)] += u64::from(self.served_parts(resident.usage));
        }
        self.per_served_by_group = served.into_iter().map(|parts| inverse(parts as f64)).collect();
    }

    /// In 2^-31 of the most served: a sum of integers does not depend on the order of the residents.
    fn served_parts(&self, usage: &Usage) -> u32 {
        (f64::from(usage.served) * self.per_max_served * f64::from(1u32 << 31)) as u32
    }

    /// Part of its group's requests that it serves, 0 to 1.
    fn share<K>(&self, resident: &Resident<'_, K>) -> f64 {
        f64::from(self.served_parts(resident.usage)) * self.per_served_by_group[usize::from(resident.group)]
    }
}

/// What a request for the lens counts, 1 where nobody rated it.
fn rating(usage: &Usage) -> f64 {
    f64::from(usage.rating_milli) / f64::from(UNRATED_MILLI)
}

/// Of nothing, nothing: all parts of it are 0.
fn inverse(whole: f64) -> f64 {
    if whole > 0.0 { whole.recip() } else { 0.0 }
}

impl Ranking {
    /// The least leaves first.
    fn worth<K>(&self, resident: &Resident<'_, K>, totals: &Totals) -> f64 {
        let usage = resident.usage;
        match self.policy {
            EvictionPolicy::Lru => usage.last_used_seconds,
            EvictionPolicy::Lfu => f64::from(usage.serves),
            EvictionPolicy::Priority => f64::from(usage.priority),
            EvictionPolicy::Specialization => totals.share(resident) * rating(usage),
            EvictionPolicy::Hybrid => -self.hybrid(usage, totals).total(),
            EvictionPolicy::Alrfu => self.horizon.worth(usage),
        }
    }

    fn reason<K>(&self, resident: &Resident<'_, K>, totals: &Totals) -> Reason {
        let usage = resident.usage;
        let idle_seconds = self.idle_seconds_of(usage);
        match (self.policy, self.horizon) {
            (EvictionPolicy::Lru, _) | (EvictionPolicy::Alrfu, Horizon::LastUse) => {
                Reason::LeastRecentlyUsed { idle_seconds }
            }
            (EvictionPolicy::Lfu, _) => Reason::LeastFrequentlyUsed { serves: usage.serves },
            (EvictionPolicy::Priority, _) => {
                Reason::LowestPriority { priority: usage.priority, idle_seconds }
            }
            (EvictionPolicy::Specialization, _) => {
                Reason::LeastSpecialized { share: totals.share(resident), rating: rating(usage) }
            }
            (EvictionPolicy::Hybrid, _) => Reason::HighestScore(self.hybrid(usage, totals)),
            (EvictionPolicy::Alrfu, Horizon::Frequency(n)) => Reason::LeastWorth {
                recent_requests: usage.recent_requests(n, self.requests),
                half_life: HALF_LIVES[n],
                load_seconds: usage.load_seconds(),
                bytes: usage.bytes,
            },
        }
    }

    fn hybrid(&self, usage: &Usage, totals: &Totals) -> HybridScore {
        HybridScore {
            idle: 0.3 * (self.idle_seconds_of(usage) / self.idle_seconds).min(1.0),
            loads: 0.2 * (1.0 - f64::from(usage.loads) * totals.per_max_loads),
            served: 0.4 * (1.0 - f64::from(usage.served) * totals.per_max_served),
            errors: 0.1 * f64::from(usage.errors) * totals.per_max_errors,
        }
    }

    /// Whether nothing has used it for the idle seconds.
    pub fn is_idle(&self, usage: &Usage) -> bool {
        self.idle_seconds_of(usage) >= self.idle_seconds
    }

    fn idle_seconds_of(&self, usage: &Usage) -> f64 {
        (self.now_seconds - usage.last_used_seconds).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A lens of 10 bytes that was last used at 0.
    fn lens() -> Usage {
        Usage { last_used_seconds: 0.0, ..Usage::new(10, 1.0, 0) }
    }

    fn residents(usages: &[Usage]) -> Vec<Resident<'_, usize>> {
        let resident = |(key, usage)| Resident { key, usage, group: 0, evictable: true };
        usages.iter().enumerate().map(resident).collect()
    }

    fn ranking(policy: EvictionPolicy) -> Ranking {
        Ranking {
            policy,
            now_seconds: 100.0,
            idle_seconds: 50.0,
            requests: 1_000,
            horizon: Horizon::Frequency(0),
        }
    }

    fn keys(choice: &Choice<usize>) -> Vec<usize> {
        choice.victims.iter().map(|v| v.key).collect()
    }

    fn first_to_leave(policy: EvictionPolicy, usages: &[Usage]) -> (usize, String) {
        let choice = choose(&residents(usages), 1, &ranking(policy));
        (choice.victims[0].key, choice.victims[0].reason.to_string())
    }

    #[test]
    fn the_least_recently_used_leaves() {
        let usages =
            [Usage { last_used_seconds: 40.0, ..lens() }, Usage { last_used_seconds: 30.0, ..lens() }];
        let expected = (1, "least recently used: idle 70 s".to_owned());
        assert_eq!(first_to_leave(EvictionPolicy::Lru, &usages), expected);
        let shortest = Ranking { horizon: Horizon::LastUse, ..ranking(EvictionPolicy::Alrfu) };
        assert_eq!(choose(&residents(&usages), 1, &shortest).victims[0].reason.to_string(), expected.1);
    }

    #[test]
    fn the_least_frequently_used_leaves_however_recent() {
        let usages = [Usage { serves: 9, ..lens() }, Usage { serves: 2, last_used_seconds: 99.0, ..lens() }];
        let reason = "least frequently used: served 2 times".to_owned();
        assert_eq!(first_to_leave(EvictionPolicy::Lfu, &usages), (1, reason));
    }

    #[test]
    fn the_lowest_priority_leaves_and_of_equals_the_least_recently_used() {
        let used_at = |priority, last_used_seconds| Usage { priority, last_used_seconds, ..lens() };
        let usages = [used_at(5, 10.0), used_at(-1, 90.0), used_at(-1, 80.0)];
        assert_eq!(
            first_to_leave(EvictionPolicy::Priority, &usages),
            (2, "lowest priority: -1, idle 20 s".to_owned())
        );
    }

    #[test]
    fn what_a_small_group_is_specialized_in_outlives_one_of_many_of_a_busy_group() {
        let served = |served| Usage { served, ..lens() };
        let usages = [served(40.0), served(60.0), served(3.0), served(1.0)];
        let mut residents = residents(&usages);
        residents[2].group = 1;
        residents[3].group = 1;
        let choice = choose(&residents, 40, &ranking(EvictionPolicy::Specialization));
        assert_eq!(keys(&choice), [3, 0, 1, 2]);
        let reason = choice.victims[0].reason.to_string();
        assert_eq!(reason, "least specialized: serves 25.0 % of its group's requests");
    }

    #[test]
    fn what_users_find_useless_leaves_before_what_is_asked_less() {
        let rated = |served, rating_milli| Usage { served, rating_milli, ..lens() };
        let usages = [rated(60.0, 500), rated(40.0, UNRATED_MILLI)];
        let reason =
            "least specialized: serves 60.0 % of its group's requests, which count 0.50 for how it is rated";
        assert_eq!(first_to_leave(EvictionPolicy::Specialization, &usages), (0, reason.to_owned()));
    }

    #[test]
    fn the_published_score_decides_hybrid() {
        let usages = [
            Usage { last_used_seconds: 75.0, loads: 1.0, served: 4.0, errors: 2.0, ..lens() },
            Usage { last_used_seconds: 0.0, loads: 4.0, served: 8.0, ..lens() },
        ];
        // 0.3 · 25/50 + 0.2 · 3/4 + 0.4 · 1/2 + 0.1 against 0.3.
        let reason =
            "highest score: 0.600 = 0.150 idle + 0.150 seldom loaded + 0.200 seldom served + 0.100 errors";
        assert_eq!(first_to_leave(EvictionPolicy::Hybrid, &usages), (0, reason.to_owned()));
    }

    #[test]
    fn maxima_are_over_all_residents_also_those_that_stay() {
        let usages = [
            Usage { served: 1.0, ..lens() },
            Usage { served: 0.0, errors: 0.0, last_used_seconds: 60.0, ..lens() },
            Usage { served: 100.0, errors: 9.0, ..lens() },
        ];
        let mut residents = residents(&usages);
        assert_eq!(
            keys(&choose(&residents[..2], 1, &ranking(EvictionPolicy::Hybrid))),
            [1],
            "0.46 less idle: 0.64"
        );
        residents[2].evictable = false;
        assert_eq!(
            keys(&choose(&residents, 1, &ranking(EvictionPolicy::Hybrid))),
            [0],
            "served 0.01 of the most"
        );
    }

    #[test]
    fn by_worth_the_slow_to_load_stays_and_size_cancels_out() {
        let requested = |bytes, load_seconds, numbers: &[u64]| {
            let mut usage = Usage { last_used_seconds: 0.0, ..Usage::new(bytes, load_seconds, 0) };
            numbers.iter().for_each(|n| usage.count_request(*n));
            usage
        };
        let usages = [
            requested(1_000, 2.0, &[100, 900]),
            requested(1_000, 8.0, &[100, 900]),
            requested(4_000, 8.0, &[700, 901]),
            requested(10, 0.02, &[100]),
        ];
        let choice = choose(&residents(&usages), u64::MAX, &ranking(EvictionPolicy::Alrfu));
        assert_eq!(keys(&choice), [3, 0, 2, 1]);
        let reason = "least worth: 0.087 requests (half-life 256 requests of all lenses), 0.020 s to load 10 bytes again";
        assert_eq!(choice.victims[0].reason.to_string(), reason);
    }

    #[test]
    fn what_a_later_victim_made_unnecessary_stays() {
        let sized = |bytes, last_used_seconds| Usage { bytes, last_used_seconds, ..lens() };
        let usages = [sized(3, 1.0), sized(2, 2.0), sized(20, 3.0), sized(1, 4.0)];
        assert_eq!(keys(&choose(&residents(&usages), 21, &ranking(EvictionPolicy::Lru))), [0, 2]);
        assert_eq!(keys(&choose(&residents(&usages), 20, &ranking(EvictionPolicy::Lru))), [2]);
        assert_eq!(keys(&choose(&residents(&usages), 0, &ranking(EvictionPolicy::Lru))), [] as [usize; 0]);
        let all = choose(&residents(&usages), 30, &ranking(EvictionPolicy::Lru));
        assert_eq!((keys(&all), all.short_by_bytes), (vec![0, 1, 2, 3], 4));
    }

    #[test]
    fn policies_are_spelled_as_in_the_spec() {
        let spelled = serde_json::to_string(&EvictionPolicy::ALL).unwrap();
        assert_eq!(spelled, r#"["LRU","LFU","Priority","Specialization","Hybrid","ALRFU"]"#);
    }

    fn any_usage() -> impl Strategy<Value = Usage> {
        let counters = (0u32..4, 0u8..4, 0u8..4, 0u8..3);
        (1u64..50, 0u8..5, counters, -1i16..2, 0u64..3).prop_map(
            |(bytes, used, counters, priority, seconds)| {
                let (serves, served, loads, errors) = counters;
                let mut usage = Usage::new(bytes, seconds as f64, priority);
                (0..u64::from(serves)).for_each(|n| usage.count_request(n * 100));
                usage.last_used_seconds = if used == 0 { f64::NEG_INFINITY } else { f64::from(used) };
                (usage.served, usage.loads, usage.errors) = (served.into(), loads.into(), errors.into());
                usage
            },
        )
    }

    fn any_policy() -> impl Strategy<Value = EvictionPolicy> {
        proptest::sample::select(&EvictionPolicy::ALL)
    }

    proptest! {
        #[test]
        fn enough_leaves_or_everything_that_may_and_nothing_in_vain(
            usages in proptest::collection::vec((any_usage(), any::<bool>(), 0u16..3), 0..12),
            needed in 0u64..300, policy in any_policy(), last_use in any::<bool>(),
        ) {
            let horizon = if last_use { Horizon::LastUse } else { Horizon::Frequency(1) };
            let ranking = Ranking { horizon, ..ranking(policy) };
            let residents: Vec<_> = usages.iter().enumerate()
                .map(|(key, (usage, evictable, group))| Resident { key, usage, group: *group, evictable: *evictable })
                .collect();
            let choice = choose(&residents, needed, &ranking);
            let chosen = keys(&choice);
            prop_assert!(chosen.iter().all(|key| residents[*key].evictable));
            let mut distinct = chosen.clone();
            distinct.sort_unstable();
            distinct.dedup();
            prop_assert_eq!(distinct.len(), chosen.len());

            let freed: u64 = choice.victims.iter().map(|v| v.bytes).sum();
            prop_assert_eq!(choice.short_by_bytes, needed.saturating_sub(freed));
            let may_leave = residents.iter().filter(|r| r.evictable).count();
            prop_assert!(choice.short_by_bytes == 0 || chosen.len() == may_leave);
            let in_vain = choice.victims.iter().find(|v| freed - v.bytes >= needed);
            prop_assert!(in_vain.is_none() , "{in_vain:?}");
            prop_assert!(choice.victims.iter().all(|v| !v.reason.to_string().contains("NaN")));

            let reversed: Vec<_> = residents.iter().rev().copied().collect();
            prop_assert_eq!(choose(&reversed, needed, &ranking), choice);
        }
    }
}
