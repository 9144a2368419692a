//! Rounds: every take of every engine in turn, with a probe of the memory's bandwidth before and after each.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};

use super::asked::Asked;
use super::engines::Engine;
use super::table::Taken;
use crate::stage::Stage;

/// Share of the best probe below which a neighbour of it counts as disturbed.
const UNDISTURBED: f64 = 0.9;
/// A disturbed take is taken so many times more, if it is short: another round says more than another take.
const AGAIN: usize = 1;
/// What is short, in seconds.
const SHORT: f64 = 4.0;
/// A peer's take that lasts longer than this many seconds is taken once in all.
const LONG: f64 = 15.0;
/// Passes of one probe, of which the best counts: a single one is disturbed by nearly nothing.
const PASSES: usize = 3;
/// Probes before the first round, to know what is good.
const FIRST_PROBES: usize = 10;

/// The engines that run, and what they found so far.
pub(super) struct Rounds {
    engines: Vec<(Engine, Asked)>,
    /// Bytes that a step of Turret's engine reads, and a probe.
    step_bytes: f64,
    best_probe: f64,
    pub(super) taken: Vec<Taken>,
    /// What could not be had, and why.
    pub(super) missing: Vec<(String, String)>,
}

impl Rounds {
    /// The first engine is Turret, whose probe is everybody's.
    pub(super) fn new(engines: Vec<(Engine, Asked)>, missing: Vec<(String, String)>) -> Result<Self> {
        let step_bytes =
            engines[0].1.about["stepBytes"].as_f64().context("no bytes of a step are reported")?;
        let mut rounds = Self { engines, step_bytes, best_probe: 0.0, taken: Vec::new(), missing };
        for _ in 0..FIRST_PROBES {
            rounds.probe()?;
        }
        Ok(rounds)
    }

    /// What each engine says of itself.
    pub(super) fn info(&self) -> BTreeMap<&'static str, String> {
        self.engines.iter().map(|(engine, asked)| (engine.name(), asked.info.clone())).collect()
    }

    /// Takes everything once.
    pub(super) fn round(&mut self, number: usize, stage: &Stage) -> Result<()> {
        let wanted = self
            .engines
            .iter()
            .map(|(engine, asked)| asked.takes.iter().filter(|name| engine.wants(name)).cloned().collect());
        let takes: Vec<Vec<String>> = wanted.collect();
        let mut before = self.probe()?;
        for (name, engines) in in_turn(&takes, number.is_multiple_of(2)) {
            for engine in engines {
                if !self.engines[engine].1.takes.contains(&name) {
                    continue;
                }
                stage.note(format!("{}: {name}", self.engines[engine].0.name()));
                before = self.take(engine, &name, number, before)?;
            }
        }
        self.engines.retain_mut(|(_, asked)| !asked.takes.is_empty());
        Ok(())
    }

    /// Gives the probe after it.
    fn take(&mut self, engine: usize, name: &str, round: usize, mut before: f64) -> Result<f64> {
        for _ in 0..=AGAIN {
            let (kind, asked) = &mut self.engines[engine];
            let kind = *kind;
            let start = Instant::now();
            let found = asked.take(name);
            let lasted = start.elapsed().as_secs_f64();
            let seconds = match found {
                Ok(seconds) => seconds,
                Err(error) if kind != Engine::Turret => {
                    let (what, left) = match asked.is_there() {
                        true => (format!("{}: {name}", kind.name()), Some(name)),
                        false => (format!("{}, from `{name}` on", kind.name()), None),
                    };
                    self.missing.push((what, format!("{error:#}")));
                    asked.takes.retain(|take| left.is_some_and(|left| take != left));
                    return self.probe();
                }
                Err(error) => return Err(error.context(format!("turret: {name}"))),
            };
            if kind != Engine::Turret && lasted > LONG {
                asked.takes.retain(|take| take != name);
            }
            let after = self.probe()?;
            let probes = [before, after];
            self.taken.push(Taken { engine: kind.name(), round, probes, seconds });
            before = after;
            let disturbed = probes.iter().any(|probe| *probe < UNDISTURBED * self.best_probe);
            if !disturbed || lasted > SHORT {
                break;
            }
        }
        Ok(before)
    }

    /// Bytes per second that the memory gives now.
    fn probe(&mut self) -> Result<f64> {
        let mut best = 0.0_f64;
        for _ in 0..PASSES {
            let read = self.engines[0].1.take("read")?;
            best = best.max(self.step_bytes / read.get("read").context("the probe says nothing")?);
        }
        self.best_probe = self.best_probe.max(best);
        Ok(best)
    }
}

/// Every name, in the order in which it is first found, with who has it.
fn in_turn(takes: &[Vec<String>], backwards: bool) -> Vec<(String, Vec<usize>)> {
    let mut turns: Vec<(String, Vec<usize>)> = Vec::new();
    for (engine, names) in takes.iter().enumerate() {
        for name in names {
            match turns.iter_mut().find(|(known, _)| known == name) {
                Some((_, engines)) => engines.push(engine),
                None => turns.push((name.clone(), vec![engine])),
            }
        }
    }
    if backwards {
        turns.iter_mut().for_each(|(_, engines)| engines.reverse());
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn engines_take_turns_name_by_name() {
        let takes = [vec!["one".to_owned(), "two".into()], vec!["two".into(), "three".into()]];
        let turn = |name: &str, engines: &[usize]| (name.to_owned(), engines.to_vec());
        let forth = in_turn(&takes, false);
        assert_eq!(forth, [turn("one", &[0]), turn("two", &[0, 1]), turn("three", &[1])]);
        assert_eq!(in_turn(&takes, true)[1], turn("two", &[1, 0]));
    }
}
