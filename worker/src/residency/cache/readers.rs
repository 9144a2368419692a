//! Who was given a file by its server.
//!
//! A server is asked with the token of whoever wants the file, and says whether they may have it. While it cannot be asked, what
//! it said before counts, for those to whom it said it: a cache must not be the way around a token.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::residency::token::Token;

/// Stands for all: no Secret is called so.
const ANYBODY: &str = "";

/// Secrets whose tokens a server took, by name. Anybody, where it asked for none or took the worker's own: that is shown for
/// every source that names no Secret.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Readers(BTreeSet<String>);

impl Readers {
    /// Only whoever has this token.
    pub fn of(token: &Token) -> Self {
        let mut readers = Self::default();
        readers.admit(token);
        readers
    }

    /// Whether whoever has this token is one.
    pub fn has(&self, token: &Token) -> bool {
        self.0.contains(ANYBODY) || self.0.contains(token.secret().unwrap_or(ANYBODY))
    }

    /// Adds one; false when it was one before.
    pub fn admit(&mut self, token: &Token) -> bool {
        !self.has(token) && self.0.insert(token.secret().unwrap_or(ANYBODY).to_owned())
    }

    /// Takes one out; false when it was none.
    pub fn expel(&mut self, token: &Token) -> bool {
        // What a token does not open, nobody without one may have either.
        let was_for_anybody = self.0.remove(ANYBODY);
        self.0.remove(token.secret().unwrap_or(ANYBODY)) || was_for_anybody
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_token_opened_is_closed_to_others_and_what_none_opened_is_open() {
        let (own, a, b) = (Token::none("none"), Token::of_secret("a", "1"), Token::of_secret("b", "2"));
        let mut readers = Readers::of(&a);
        assert!(readers.has(&a) && !readers.has(&b) && !readers.has(&own));
        assert!(readers.admit(&b) && !readers.admit(&b) && readers.has(&b));
        assert!(readers.expel(&a) && !readers.expel(&a));
        assert!(!readers.has(&a) && readers.has(&b), "one that is revoked closes nothing to others");
        assert!(readers.admit(&own) && readers.has(&a) && readers.has(&own));
        assert!(readers.expel(&own) && !readers.has(&a) && readers.has(&b));
        assert_eq!(serde_json::to_string(&readers).unwrap(), r#"["b"]"#);
    }
}
