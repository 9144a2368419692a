//! What rows ask of the logits of a step, answered on all threads.

use parking_lot::Mutex;

use super::row::{Sampling, TokenLogprobs};
use super::sampler::{NotFinite, Sampler};
use crate::model::decoder::Logits;
use turret_threads::Pool;

/// What a row asks of the logits at one of its positions. The answer depends on nothing else of the row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Question {
    /// A token to be scored, with so many of the best ones beside it.
    pub(super) score: Option<(u32, u8)>,
    pub(super) choice: Option<Choice>,
}

/// How to choose the next token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Choice {
    pub(super) sampling: Sampling,
    /// Its place among the row's generated tokens.
    pub(super) index: u32,
    /// Its log-probability is asked for, with so many of the best ones beside it.
    pub(super) logprobs: Option<u8>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Answer {
    pub(super) scored: Option<TokenLogprobs>,
    pub(super) chosen: Option<Chosen>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Chosen {
    pub(super) id: u32,
    pub(super) logprobs: Option<TokenLogprobs>,
}

impl Question {
    fn answer(&self, logits: &[f32], sampler: &mut Sampler) -> Result<Answer, NotFinite> {
        let scored = self.score.map(|(id, top)| sampler.logprobs(logits, id, top));
        if scored.as_ref().is_some_and(|scored| !scored.logprob.is_finite()) {
            return Err(NotFinite);
        }
        let mut choose = |choice: Choice| {
            let id = sampler.choose(logits, &choice.sampling, choice.index)?;
            Ok(Chosen { id, logprobs: choice.logprobs.map(|top| sampler.logprobs(logits, id, top)) })
        };
        Ok(Answer { scored, chosen: self.choice.map(&mut choose).transpose()? })
    }
}

/// Room for the questions of a group of outputs and for their answers; reused.
pub(super) struct Choices {
    /// One per thread.
    samplers: Vec<Mutex<Sampler>>,
    questions: Vec<Question>,
    /// By output, as the questions.
    answers: Vec<Mutex<Result<Answer, NotFinite>>>,
}

impl Choices {
    /// Room for so many outputs at once over a vocabulary of this size.
    pub(super) fn new(outputs: usize, vocabulary: usize, threads: usize) -> Self {
        let sampler = || Mutex::new(Sampler::with_vocabulary(vocabulary));
        let mut choices = Self {
            samplers: (0..threads).map(|_| sampler()).collect(),
            questions: Vec::new(),
            answers: Vec::new(),
        };
        choices.reserve_outputs(outputs);
        choices
    }

    /// Makes room for so many outputs.
    pub(super) fn reserve_outputs(&mut self, outputs: usize) {
        self.questions.reserve(outputs.saturating_sub(self.questions.len()));
        let more = outputs.saturating_sub(self.answers.len());
        self.answers.extend((0..more).map(|_| Mutex::new(Ok(Answer::default()))));
    }

    /// Makes room for a vocabulary of this size.
    pub(super) fn reserve_vocabulary(&mut self, vocabulary: usize) {
        self.samplers.iter_mut().for_each(|sampler| sampler.get_mut().reserve_vocabulary(vocabulary));
    }

    /// Answers one question for each output; [`Self::answers`] gives them.
    pub(super) fn answer(
        &mut self,
        pool: &Pool,
        logits: Logits<'_>,
        questions: impl Iterator<Item = Question>,
    ) {
        self.questions.clear();
        self.questions.extend(questions);
        let (samplers, questions) = (&self.samplers, &self.questions);
        // Whoever is free takes the next row: one that is sampled takes longer than one that is not.
        let rows = Mutex::new(logits.rows().zip(questions.iter().zip(&self.answers)));
        pool.run(samplers.len().min(questions.len()), &|thread| {
            let mut sampler = samplers[thread].lock();
            loop {
                let next = rows.lock().next();
                let Some((logits, (question, answer))) = next else { break };
                *answer.lock() = question.answer(logits, &mut sampler);
            }
        });
    }

    /// The answers to the last questions, in their order.
    pub(super) fn answers(&mut self) -> impl Iterator<Item = Result<Answer, NotFinite>> {
        let answers = self.answers[..self.questions.len()].iter_mut();
        answers.map(|answer| std::mem::replace(answer.get_mut(), Ok(Answer::default())))
    }
}
