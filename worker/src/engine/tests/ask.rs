//! What is asked of rows, at random or not.

use proptest::prelude::*;

use super::*;

/// A row before it is known which ids its base and lenses have.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    pub(super) prompt: Vec<u32>,
    pub(super) lenses: Vec<(usize, f32)>,
    pub(super) new: u32,
    pub(super) temperature: f32,
    pub(super) seed: u64,
    /// Whether the log-probabilities of its prompt are asked for.
    pub(super) scores: bool,
    pub(super) touch: Touch,
}

/// What a row does to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Touch {
    Nothing,
    Reads,
    Writes(Operation),
    /// Reads after one of the two blocks and leaves.
    Leaves,
}

impl Touch {
    fn activations(self, prompt: usize, seed: u64) -> Activations {
        let some = Positions::At((0..prompt as u32).step_by(3).collect());
        let tap = |site, positions| Tap { site, positions };
        let taps = vec![tap(Site::In(0), Positions::ALL), tap(Site::Out(0), some.clone())];
        match self {
            Self::Nothing => Activations::default(),
            Self::Reads => {
                let last = tap(Site::Out(1), Positions::From(prompt as u32 / 2));
                Activations { taps: [taps, vec![last]].concat(), ..Activations::default() }
            }
            Self::Writes(operation) => {
                let mut noise = Noise(seed);
                let mut vectors = |count: usize| (0..count * WIDTH).map(|_| noise.next()).collect::<Vec<_>>();
                let injection = |site, positions, vectors, prefill_only| Injection {
                    site,
                    positions,
                    operation,
                    vectors,
                    prefill_only,
                };
                let each = vectors(prompt.div_ceil(3));
                let injections = vec![
                    injection(Site::In(0), Positions::ALL, vectors(1), true),
                    injection(Site::Out(0), some, each, false),
                    injection(Site::Out(1), Positions::From(prompt as u32 - 1), vectors(1), false),
                ];
                Activations { taps, injections, stop_layer: None }
            }
            Self::Leaves => Activations { taps, injections: vec![], stop_layer: Some(1) },
        }
    }
}

impl Ask {
    pub(super) fn request(&self, base: BaseId, lenses: &[LensId]) -> RowRequest {
        // A row that leaves has no logits.
        let leaves = self.touch == Touch::Leaves;
        RowRequest {
            base,
            prompt: self.prompt.clone(),
            generated: Vec::new(),
            lenses: self.lenses.iter().map(|&(i, scale)| RowLens { lens: lenses[i], scale }).collect(),
            sampling: Sampling {
                temperature: self.temperature,
                seed: self.seed,
                top_p: 0.95,
                ..Sampling::GREEDY
            },
            stop_token_ids: vec![5],
            max_new_tokens: if leaves { 0 } else { self.new },
            logprobs: Some(2),
            prompt_logprobs: (self.scores && !leaves).then_some(1),
            activations: self.touch.activations(self.prompt.len(), self.seed),
            cache_salt: None,
            parent: None,
        }
    }
}

pub(super) fn ask() -> impl Strategy<Value = Ask> {
    let lenses =
        prop::sample::select(vec![vec![], vec![(0, 1.0)], vec![(1, 0.5)], vec![(0, -0.75), (1, 1.0)]]);
    // Many begin alike, for some blocks.
    let stem = (prop::sample::select(vec![1, 2]), 0usize..60);
    let rest = prop::collection::vec(0..VOCAB, 1..30);
    let prompt = (stem, rest).prop_map(|((stem, length), rest)| {
        let mut noise = Noise(stem);
        let stem = (0..length).map(|_| ((noise.next() + 1.0) * 33.0) as u32);
        stem.chain(rest).take(69).collect::<Vec<_>>()
    });
    let touches = vec![
        Touch::Nothing,
        Touch::Nothing,
        Touch::Nothing,
        Touch::Nothing,
        Touch::Nothing,
        Touch::Reads,
        Touch::Leaves,
        Touch::Writes(Operation::Replace),
        Touch::Writes(Operation::Add { scale: 0.7 }),
        Touch::Writes(Operation::AddNormMatched { scale: -0.5 }),
        Touch::Writes(Operation::AddKeepingNorm { scale: 2.0 }),
    ];
    let touch = prop::sample::select(touches);
    let temperature = prop::sample::select(vec![0.0, 0.9]);
    (prompt, lenses, 0u32..40, temperature, any::<u64>(), prop::bool::weighted(0.3), touch).prop_map(
        |(prompt, lenses, new, temperature, seed, scores, touch)| Ask {
            prompt,
            lenses,
            new,
            temperature,
            seed,
            scores,
            touch,
        },
    )
}

/// Tries whether something holds for whatever is asked: less often than usual, since each case starts engines.
pub(super) fn check<S: Strategy>(strategy: &S, holds: impl Fn(S::Value) -> Result<(), TestCaseError>) {
    let config = ProptestConfig { cases: 64, ..Default::default() };
    proptest::test_runner::TestRunner::new(config).run(strategy, holds).unwrap();
}

pub(super) fn some_ask(seed: u64, lenses: Vec<(usize, f32)>, new: u32) -> Ask {
    let mut noise = Noise(seed);
    let prompt = (0..20).map(|_| ((noise.next() + 1.0) * 30.0) as u32 + 6).collect();
    Ask { prompt, lenses, new, temperature: 0.0, seed, scores: true, touch: Touch::Nothing }
}
