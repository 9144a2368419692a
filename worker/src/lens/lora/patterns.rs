//! The patterns of an adapter config, matched against names of modules as PEFT matches them: as regular expressions of
//! Python, whatever they look like.
//!
//! Most are plain names, of which there may be hundreds; those are compared. Other expressions are somebody else's
//! programs: few, short, and stopped after some steps.

use fancy_regex::{Regex, RegexBuilder};

use crate::model::excerpt::{complaint, excerpt};

/// Expressions that one config may have.
const MAX_REGEXES: usize = 64;
const MAX_PATTERN_BYTES: usize = 4096;
/// Steps back in one match. Names are short; published patterns take a few dozen.
const BACKTRACK_LIMIT: usize = 10_000;
/// Bytes of a compiled expression.
const MAX_COMPILED_BYTES: usize = 1 << 20;

/// One pattern, ready to match.
#[derive(Debug)]
pub(super) enum Pattern {
    /// A name.
    Plain(Plain),
    /// Anything else.
    Regex(Regex),
}

/// A pattern that is a name, as most are.
#[derive(Debug)]
pub(super) struct Plain {
    /// Its characters; none is any.
    name: Vec<Option<u8>>,
    /// Nothing may come before it.
    is_anchored: bool,
    /// More names may follow below it.
    is_inside: bool,
}

impl Plain {
    /// The pattern `text`, if it is a name: perhaps after `^`, with dots for any character or escaped.
    fn of(text: &str, is_inside: bool) -> Option<Self> {
        let (name, is_anchored) = text.strip_prefix('^').map_or((text, false), |name| (name, true));
        let mut bytes = name.bytes();
        let mut name = Vec::new();
        while let Some(byte) = bytes.next() {
            name.push(match byte {
                b'.' => None,
                b'\\' if bytes.next() == Some(b'.') => Some(b'.'),
                b'_' | b'-' => Some(byte),
                _ if byte.is_ascii_alphanumeric() => Some(byte),
                _ => return None,
            });
        }
        (!name.is_empty()).then_some(Self { name, is_anchored, is_inside })
    }

    fn is_match(&self, key: &str) -> bool {
        let starts = if self.is_anchored { 1 } else { usize::MAX };
        tails(key).take(starts).any(|tail| {
            let (tail, len) = (tail.as_bytes(), self.name.len());
            tail.len() >= len
                && tail
                    .iter()
                    .zip(&self.name)
                    .all(|(byte, wanted)| wanted.is_none_or(|wanted| wanted == *byte))
                && (tail.len() == len || self.is_inside && tail[len] == b'.')
        })
    }
}

impl Pattern {
    /// Whether a module of this name is meant.
    pub(super) fn is_match(&self, key: &str) -> Result<bool, String> {
        match self {
            Self::Plain(plain) => Ok(plain.is_match(key)),
            Self::Regex(regex) => is_match(regex, key),
        }
    }
}

/// Compiles the patterns of one config.
#[derive(Debug, Default)]
pub(super) struct Compiler {
    regexes: usize,
}

impl Compiler {
    /// `rank_pattern` and `alpha_pattern`: the end of a name.
    pub(super) fn at_end(&mut self, pattern: &str) -> Result<Pattern, String> {
        self.pattern(pattern, false, || format!(r"^(?:(.*\.)?({pattern}))$"))
    }

    /// `modules_to_save`: a module, and everything below it.
    pub(super) fn inside(&mut self, pattern: &str) -> Result<Pattern, String> {
        self.pattern(pattern, true, || format!(r"^(?:(^|.*\.){pattern}($|\..*))"))
    }

    /// `target_modules` and `exclude_modules`: Python's `re.fullmatch`.
    pub(super) fn whole(&mut self, pattern: &str) -> Result<Regex, String> {
        self.regex(pattern, &format!("^(?:{pattern})$"))
    }

    /// `layers_pattern`: what comes before the number of a layer, which is found as `idx`.
    pub(super) fn before_index(&mut self, pattern: &str) -> Result<Regex, String> {
        self.regex(pattern, &format!(r"^(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."))
    }

    /// The number of a layer when there is no `layers_pattern`.
    pub(super) fn any_index(&mut self) -> Result<Regex, String> {
        self.regex("", r"^.*?\.[^.]*\.(?P<idx>\d+)\.")
    }

    fn pattern(
        &mut self,
        pattern: &str,
        is_inside: bool,
        whole: impl Fn() -> String,
    ) -> Result<Pattern, String> {
        match Plain::of(pattern, is_inside) {
            Some(plain) => Ok(Pattern::Plain(plain)),
            None => self.regex(pattern, &whole()).map(Pattern::Regex),
        }
    }

    fn regex(&mut self, pattern: &str, whole: &str) -> Result<Regex, String> {
        let refused = |what: &str| format!("`{}` {what}", excerpt(pattern, 80));
        self.regexes += 1;
        if self.regexes > MAX_REGEXES {
            return Err(refused(&format!("is one regular expression more than {MAX_REGEXES}")));
        }
        if pattern.len() > MAX_PATTERN_BYTES {
            return Err(refused(&format!("is longer than {MAX_PATTERN_BYTES} bytes")));
        }
        let mut builder = RegexBuilder::new(whole);
        builder.backtrack_limit(BACKTRACK_LIMIT).delegate_size_limit(MAX_COMPILED_BYTES);
        builder.delegate_dfa_size_limit(MAX_COMPILED_BYTES);
        builder.build().map_err(|e| refused(&format!("is no regular expression: {}", complaint(&e))))
    }
}

/// Whether an expression finds something in a name, within its steps.
pub(super) fn is_match(regex: &Regex, key: &str) -> Result<bool, String> {
    regex.is_match(key).map_err(|e| cannot_match(regex, &e))
}

/// Why an expression gave up.
pub(super) fn cannot_match(regex: &Regex, error: &fancy_regex::Error) -> String {
    format!("`{}` cannot be matched: {}", excerpt(regex.as_str(), 80), complaint(error))
}

/// A name, and what follows each of its dots.
pub(super) fn tails(key: &str) -> impl Iterator<Item = &str> {
    std::iter::once(key).chain(key.match_indices('.').map(|(dot, _)| &key[dot + 1..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same pattern as a regular expression, which it is for PEFT.
    fn both(pattern: &str, key: &str) -> [bool; 2] {
        let regex = |whole: String| Regex::new(&whole).unwrap().is_match(key).unwrap();
        let mut compiler = Compiler::default();
        let [end, inside] = [compiler.at_end(pattern).unwrap(), compiler.inside(pattern).unwrap()];
        assert!(matches!((&end, &inside), (Pattern::Plain(_), Pattern::Plain(_))));
        let plain = [end.is_match(key).unwrap(), inside.is_match(key).unwrap()];
        let expected =
            [regex(format!(r"^(?:(.*\.)?({pattern}))$")), regex(format!(r"^(?:(^|.*\.){pattern}($|\..*))"))];
        assert_eq!(plain, expected, "{pattern} on {key}");
        plain
    }

    #[test]
    fn plain_names_match_as_the_expressions_that_they_are() {
        let key = "model.layers.1.self_attn.q_proj";
        assert_eq!(both("q_proj", key), [true, true]);
        assert_eq!(both("self_attn", key), [false, true]);
        assert_eq!(both("1.self_attn.q_proj", key), [true, true]);
        assert_eq!(both("self.attn.q.proj", key), [true, true], "a dot is any character");
        assert_eq!(both("layers.1", key), [false, true]);
        assert_eq!(both(key, key), [true, true]);
        assert_eq!(both("^model.layers.1", key), [false, true]);
        assert_eq!(both("^q_proj", key), [false, false]);
        assert_eq!(both(r"1\.self_attn\.q_proj", key), [true, true]);
        assert_eq!(both(r"self\.attn", key), [false, false]);
        for other in ["proj", "attn.q_proj", "q_pro", "model.layers.11.self_attn.q_proj", "model.", ".q_proj"]
        {
            both(other, key);
        }
    }

    #[test]
    fn expressions_are_few_short_and_stopped() {
        let mut compiler = Compiler::default();
        let slow = compiler.whole(r"((?=.)(.|.)*)*(?!.)x").unwrap();
        assert!(
            is_match(&slow, "model.layers.1.self_attn.q_proj").unwrap_err().contains("cannot be matched")
        );
        assert!(compiler.whole(&"x".repeat(5000)).unwrap_err().contains("longer"));
        assert!(compiler.whole(r"\w{1000}{1000}").unwrap_err().contains("no regular expression"));
        assert!(compiler.at_end("(").unwrap_err().len() < 400);
        let many = (0..MAX_REGEXES).find_map(|_| compiler.at_end("q_proj|x").err());
        assert!(many.unwrap().contains("more than 64"));
    }
}
