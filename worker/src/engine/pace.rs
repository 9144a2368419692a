//! How many prompt tokens a step computes while rows decode, so that these hardly notice: pure, from what steps took.
//!
//! A step that decodes reads every weight once, and some prompt tokens beside cost little; how many depends on the machine, the
//! base and the rows. So it is learned: a step with prompt tokens may take [`SLOWDOWN`] times as long as one without. While nobody
//! decodes, the limit that was configured holds alone.

/// How much longer a step may take for its prompt tokens. A reader of a stream sees twice the usual time between tokens at most,
/// with some room for what a machine's speed varies by itself.
const SLOWDOWN: f64 = 1.7;
/// Prompt tokens of a step before anything was learned.
const FIRST: f64 = 32.0;
/// Fewest prompt tokens of a step: a prompt always gets on.
const LEAST: f64 = 8.0;

/// Most, so that it comes back from there.
const MOST: f64 = 65_536.0;

/// What was learned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Seconds of a step that only decodes.
    decode_seconds: Option<f64>,
    /// Prompt tokens that may join it.
    tokens: f64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { decode_seconds: None, tokens: FIRST }
    }
}

impl Pace {
    /// Prompt tokens of the next step, of at most `limit`.
    pub fn prompt_tokens(&self, rows_decode: bool, limit: u32) -> u32 {
        let limit = limit.max(1);
        if rows_decode { limit.min(self.tokens as u32) } else { limit }
    }

    /// Learns from a step in which rows decoded: its prompt tokens, and what it took.
    pub fn learn(&mut self, prompt_tokens: u32, seconds: f64) {
        if prompt_tokens == 0 {
            // What is slow for once was disturbed; what is fast was not.
            let weight = |known: f64| if seconds < known { 0.5 } else { 0.1 };
            let known = self.decode_seconds.unwrap_or(seconds);
            self.decode_seconds = Some(known + weight(known) * (seconds - known));
            return;
        }
        let Some(decode) = self.decode_seconds else { return };
        let fitting = match seconds - decode {
            extra if extra > 0.0 => f64::from(prompt_tokens) * (SLOWDOWN - 1.0) * decode / extra,
            _ => f64::INFINITY,
        };
        // A step that had no more to compute says nothing against more.
        let had_all = f64::from(prompt_tokens) + 1.0 >= self.tokens;
        if fitting < self.tokens || had_all {
            // By a part of the way only: beyond the tokens that cost nothing a few more cost much, and it would swing.
            let change = fitting.clamp(self.tokens / 2.0, self.tokens * 2.0) - self.tokens;
            self.tokens = (self.tokens + 0.3 * change).clamp(LEAST, MOST);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Milliseconds of a step on a machine that reads weights in 40 ms and computes a token in 5.
    fn step(decoding: u32, prompt: u32) -> f64 {
        f64::from(5 * (decoding + prompt)).max(40.0)
    }

    #[test]
    fn steps_with_prompt_tokens_take_no_more_than_twice_as_long() {
        for decoding in [1, 4, 16] {
            let mut pace = Pace::default();
            for round in 0..40 {
                pace.learn(0, step(decoding, 0));
                let prompt = pace.prompt_tokens(true, 512);
                let took = step(decoding, prompt);
                pace.learn(prompt, took);
                if round > 10 {
                    let slowdown = took / step(decoding, 0);
                    assert!((1.5..=2.0).contains(&slowdown), "{decoding} rows: {slowdown}");
                }
            }
        }
    }

    #[test]
    fn a_prompt_gets_on_whatever_was_learned_and_alone_it_has_all() {
        let mut pace = Pace::default();
        pace.learn(0, 1.0);
        for _ in 0..100 {
            pace.learn(8, 1000.0);
        }
        assert_eq!(pace.prompt_tokens(true, 512), 8);
        assert_eq!((pace.prompt_tokens(false, 512), pace.prompt_tokens(false, 0)), (512, 1));
        assert_eq!(pace.prompt_tokens(true, 4), 4);
    }

    #[test]
    fn a_machine_that_does_not_notice_prompts_gets_the_limit() {
        let mut pace = Pace::default();
        pace.learn(0, 1.0);
        for _ in 0..20 {
            pace.learn(pace.prompt_tokens(true, 512), 1.0);
        }
        assert_eq!(pace.prompt_tokens(true, 512), 512);
    }

    #[test]
    fn one_disturbed_step_is_soon_forgotten() {
        let mut pace = Pace::default();
        pace.learn(0, 40.0);
        for _ in 0..10 {
            pace.learn(pace.prompt_tokens(true, 512), step(1, pace.prompt_tokens(true, 512)));
        }
        let before = pace;
        pace.learn(0, 4000.0);
        pace.learn(pace.prompt_tokens(true, 512), 4000.0);
        for _ in 0..12 {
            pace.learn(0, 40.0);
            pace.learn(pace.prompt_tokens(true, 512), step(1, pace.prompt_tokens(true, 512)));
        }
        let difference =
            i64::from(pace.prompt_tokens(true, 512)) - i64::from(before.prompt_tokens(true, 512));
        assert!(difference.abs() <= 1, "{before:?} {pace:?}");
    }
}
