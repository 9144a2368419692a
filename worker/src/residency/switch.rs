//! When the active base changes. Pure: the rule of DESIGN, with the time handed in.
//!
//! A request over another base waits. The switch comes when the active base has nothing to do, or when it has been
//! active for `minHoldSeconds` and the oldest of those that wait has waited `maxWaitSeconds`. From then on the
//! active base admits nothing and drains; all who wait for the new base are served by the one switch.

use turret_crds::document::{BaseKey, SwitchingRule};

/// Requests that wait for a base that is not active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which base.
    pub base: BaseKey,
    /// When the oldest of them came, milliseconds.
    pub since_ms: u64,
}

/// What the decision depends on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Situation {
    /// The active base, while it is still declared.
    pub active: Option<BaseKey>,
    /// When it became active, milliseconds.
    pub active_since_ms: u64,
    /// Rows over it.
    pub rows: u32,
    /// Requests that wait for it (for a lens, for a place in the batch).
    pub queued: u32,
    /// Of these, requests that waited for this base before it became active, and whose lens is known: the switch was
    /// made for them, so it is not undone before they are served. Without this, two bases with impatient rules would
    /// take turns and serve nobody.
    pub promised: u32,
    /// Who waits for another base, for bases that can be served.
    pub waiting: Vec<Waiting>,
    /// The base to make active when nobody waits and none is.
    pub fallback: Option<BaseKey>,
    /// Now, milliseconds.
    pub now_ms: u64,
    /// The rule.
    pub rule: SwitchingRule,
}

/// What to do about the active base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing, until then at the latest.
    Stay {
        /// When time alone may change the decision, milliseconds.
        until_ms: Option<u64>,
    },
    /// Admit nothing more over the active base.
    Drain {
        /// The base that is next.
        to: BaseKey,
    },
    /// Switch now: nothing runs.
    Switch {
        /// The base that is next.
        to: BaseKey,
    },
}

/// Decides.
pub fn decide(situation: &Situation) -> Decision {
    let first = situation.waiting.iter().min_by_key(|w| (w.since_ms, &w.base));
    let Some(to) = first.map(|w| w.base.clone()).or_else(|| match situation.active {
        Some(_) => None,
        None => situation.fallback.clone(),
    }) else {
        return Decision::Stay { until_ms: None };
    };
    if situation.rows == 0 && (situation.queued == 0 || situation.active.is_none()) {
        return Decision::Switch { to };
    }
    // A base that is no longer declared finishes what runs and admits nothing anyway.
    if situation.active.is_none() {
        return Decision::Drain { to };
    }
    if situation.promised > 0 {
        return Decision::Stay { until_ms: None };
    }
    let seconds = |s: u32| u64::from(s) * 1000;
    let held_until = situation.active_since_ms + seconds(situation.rule.min_hold_seconds);
    let waited_until =
        first.map_or(situation.now_ms, |w| w.since_ms + seconds(situation.rule.max_wait_seconds));
    let at = held_until.max(waited_until);
    if situation.now_ms >= at { Decision::Drain { to } } else { Decision::Stay { until_ms: Some(at) } }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(name: &str) -> BaseKey {
        BaseKey(name.into())
    }

    fn situation(rows: u32, queued: u32, now_s: u64, waiting: &[(&str, u64)]) -> Situation {
        Situation {
            active: Some(key("a")),
            active_since_ms: 100_000,
            rows,
            queued,
            promised: 0,
            waiting: waiting
                .iter()
                .map(|&(base, s)| Waiting { base: key(base), since_ms: s * 1000 })
                .collect(),
            fallback: Some(key("a")),
            now_ms: now_s * 1000,
            rule: SwitchingRule { min_hold_seconds: 30, max_wait_seconds: 120, drain_seconds: 30 },
        }
    }

    #[test]
    fn the_rule_of_the_switch() {
        let to = |name: &str| key(name);
        let stay = |s: Option<u64>| Decision::Stay { until_ms: s.map(|s| s * 1000) };
        for (what, given, expected) in [
            ("nobody waits", situation(3, 0, 200, &[]), stay(None)),
            ("nothing runs", situation(0, 0, 101, &[("b", 101)]), Decision::Switch { to: to("b") }),
            (
                "requests over the active base are queued",
                situation(0, 2, 101, &[("b", 101)]),
                stay(Some(221)),
            ),
            ("not waited long enough", situation(3, 0, 140, &[("b", 101)]), stay(Some(221))),
            (
                "waited long before the base became active: it is held a while",
                situation(3, 0, 110, &[("b", 1)]),
                stay(Some(130)),
            ),
            (
                "held and waited long enough",
                situation(3, 9, 221, &[("b", 101)]),
                Decision::Drain { to: to("b") },
            ),
            (
                "the oldest waiter decides which base is next",
                situation(0, 0, 200, &[("b", 150), ("c", 149)]),
                Decision::Switch { to: to("c") },
            ),
            (
                "ties end on the name",
                situation(0, 0, 200, &[("c", 150), ("b", 150)]),
                Decision::Switch { to: to("b") },
            ),
        ] {
            assert_eq!(decide(&given), expected, "{what}");
        }
    }

    #[test]
    fn a_switch_is_not_undone_before_those_it_was_made_for_are_served() {
        let late = situation(3, 2, 500, &[("b", 1)]);
        assert_eq!(decide(&late), Decision::Drain { to: key("b") });
        assert_eq!(decide(&Situation { promised: 1, ..late }), Decision::Stay { until_ms: None });
    }

    #[test]
    fn without_an_active_base_the_fallback_is_loaded() {
        let none = |rows, waiting: &[_]| Situation { active: None, ..situation(rows, 0, 200, waiting) };
        assert_eq!(decide(&none(0, &[])), Decision::Switch { to: key("a") });
        assert_eq!(decide(&none(0, &[("b", 199)])), Decision::Switch { to: key("b") });
        assert_eq!(
            decide(&none(2, &[])),
            Decision::Drain { to: key("a") },
            "the removed base still has rows"
        );
        let nothing = Situation { fallback: None, ..none(0, &[]) };
        assert_eq!(decide(&nothing), Decision::Stay { until_ms: None });
    }
}
