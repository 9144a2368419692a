//! What is tried, one file for each thing a user relies on.

pub mod answers;
pub mod deletion;
pub mod device;
pub mod faults;
pub mod leadership;
pub mod lenses;
pub mod memory;
pub mod rights;
pub mod rollouts;
pub mod switches;

use super::family::{Case, Family};
use super::gateway::Mode;
use super::load::Question;
use super::objects::{Group, group};

/// The group over the Qwen base of the demo family, with all its lenses.
pub const QWEN: &str = "demo-qwen";
/// The group over the Llama base of the demo family, with all its lenses.
pub const LLAMA: &str = "demo-llama";

/// Folder of the base of a group.
fn base_of(group: &str) -> &'static str {
    match group {
        QWEN => "base",
        LLAMA => "base-b",
        other => panic!("the demo family has no group `{other}`"),
    }
}

/// A group with all its recorded lenses.
fn whole_group(family: &Family, name: &str) -> Group {
    let base = &family.bases[base_of(name)];
    base.lenses
        .iter()
        .fold(group(name, &base.path), |group, (lens, recorded)| group.lens(lens, &recorded.path))
}

/// What clients call a group or one of its lenses.
fn model(group: &str, lens: Option<&str>) -> String {
    lens.map_or_else(|| group.to_owned(), |lens| format!("{group}:{lens}"))
}

/// The first recorded case of a base or lens.
fn case<'f>(family: &'f Family, group: &str, lens: Option<&str>) -> &'f Case {
    &family.cases(base_of(group), lens)[0]
}

/// Every recorded question to a group's base and to each of its lenses, streamed in turns with whole.
fn all_questions(family: &Family, group: &str) -> Vec<Question> {
    let base = base_of(group);
    let lenses = family.bases[base].lenses.keys().map(|lens| Some(lens.as_str()));
    let mut questions = Vec::new();
    for lens in lenses.chain([None]) {
        for case in family.cases(base, lens) {
            let mode = if questions.len() % 2 == 0 { Mode::Whole } else { Mode::Streamed };
            questions.push(Question { model: model(group, lens), case: case.clone(), mode });
        }
    }
    questions
}

/// Two lists dealt into one, taking from each in turn.
fn interleave<T>(one: Vec<T>, other: Vec<T>) -> Vec<T> {
    let (mut one, mut other) = (one.into_iter(), other.into_iter());
    let mut dealt = Vec::new();
    loop {
        let pair = [one.next(), other.next()];
        if pair.iter().all(Option::is_none) {
            return dealt;
        }
        dealt.extend(pair.into_iter().flatten());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_recorded_case_is_asked_in_both_modes_of_each_group() {
        let family = Family::read().unwrap();
        let questions = all_questions(&family, QWEN);
        assert_eq!(questions.len(), 6 * 9);
        assert!(questions.iter().any(|q| q.mode == Mode::Streamed && q.model == "demo-qwen:pirate"));
        assert!(questions.iter().any(|q| q.mode == Mode::Whole && q.model == "demo-qwen:pirate"));
        assert_eq!(interleave(vec![1, 3, 4], vec![2]), [1, 2, 3, 4]);
    }
}
