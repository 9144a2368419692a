//! What can be measured, under names that other engines' measurements have too.

use super::BenchArgs;
use super::engine::{ROWS, SHORT};

/// One measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Take {
    /// Rows that decode together; with several lenses they take turns among them.
    Decode { rows: u32, lenses: usize },
    /// Rows that decode together, each choosing by temperature and top-p: what a step does outside of the model.
    Sampled { rows: u32 },
    /// A prompt, computed.
    Prefill { tokens: u32, lens: bool },
    /// A prompt, and the same again.
    Prefix { tokens: u32 },
    /// Short requests one after the other, of one lens and of two in turn.
    Requests,
    /// A lens that comes, and one that is there.
    Lens,
    /// Rows that decode while lenses come and go.
    Loads,
    /// A long prompt beside rows that decode, and a row that decodes after it.
    LongPrompt { tokens: u32 },
}

/// What a take found; a take may find several things.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Found {
    pub(super) name: String,
    /// Tokens that come of it.
    pub(super) tokens: u32,
    /// Bytes of weights that must be read for it; 0 where that says nothing.
    pub(super) bytes: u64,
    pub(super) seconds: f64,
}

impl Found {
    /// Something of which only the time counts.
    pub(super) fn time(name: impl Into<String>, seconds: f64) -> Self {
        Self { name: name.into(), tokens: 1, bytes: 0, seconds }
    }
}

impl Take {
    /// All that these arguments ask for.
    pub(super) fn all(args: &BenchArgs) -> Vec<Self> {
        let lenses = args.lenses.len();
        let mut takes: Vec<Self> = args.rows.iter().map(|&rows| Self::Decode { rows, lenses: 0 }).collect();
        takes.push(Self::Prefill { tokens: args.prompt, lens: false });
        if lenses > 0 {
            takes.push(Self::Decode { rows: 1, lenses: 1 });
            takes.push(Self::Prefill { tokens: args.prompt, lens: true });
        }
        // As many rows as there may be lenses, or the fewest above.
        if let Some(&rows) = args.rows.iter().filter(|&&rows| rows > 1 && lenses > 1).min() {
            takes.push(Self::Decode { rows, lenses: 1 });
            takes.push(Self::Decode { rows, lenses: lenses.min(rows as usize) });
        }
        if lenses > 1 {
            takes.push(Self::Requests);
        }
        if lenses > 0 {
            takes.extend([Self::Lens, Self::Loads]);
        }
        takes.push(Self::Sampled { rows: ROWS });
        if args.prefix > 0 {
            takes.push(Self::Prefix { tokens: args.prefix });
        }
        if args.context > SHORT {
            takes.push(Self::LongPrompt { tokens: args.context });
        }
        takes
    }

    /// What it is called.
    pub(super) fn name(self) -> String {
        match self {
            Self::Decode { rows, lenses: 0 } => format!("decode, {}", rows_text(rows)),
            Self::Decode { rows, lenses: 1 } => format!("decode, {} with a lens", rows_text(rows)),
            Self::Decode { rows, lenses } => format!("decode, {}, {lenses} lenses", rows_text(rows)),
            Self::Sampled { rows } => format!("decode, {}, sampled", rows_text(rows)),
            Self::Prefill { tokens, lens: false } => format!("prefill, {tokens} tokens"),
            Self::Prefill { tokens, lens: true } => format!("prefill, {tokens} tokens with a lens"),
            Self::Prefix { tokens } => format!("prefix, {tokens} tokens"),
            Self::Requests => "requests".into(),
            Self::Lens => "lens".into(),
            Self::Loads => "loads".into(),
            Self::LongPrompt { tokens } => format!("long prompt, {tokens} tokens"),
        }
    }
}

fn rows_text(rows: u32) -> String {
    format!("{rows} row{}", if rows == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn names(lenses: usize, more: &[&str]) -> Vec<String> {
        let lenses = (0..lenses).flat_map(|_| ["--lens", "LENS"]);
        let args = ["bench", "BASE"].into_iter().chain(lenses).chain(more.iter().copied());
        let args = Cli::parse_from(args).bench;
        Take::all(&args).into_iter().map(Take::name).collect()
    }

    #[test]
    fn what_is_measured_depends_on_the_lenses_that_there_are() {
        let bare = names(0, &["--context", "0"]);
        assert_eq!(bare[..3], ["decode, 1 row", "decode, 8 rows", "decode, 32 rows"]);
        assert_eq!(bare[3..], ["prefill, 512 tokens", "decode, 32 rows, sampled", "prefix, 2000 tokens"]);
        let one = names(1, &[]);
        assert!(one.contains(&"decode, 1 row with a lens".into()) && one.contains(&"lens".into()));
        assert!(!one.contains(&"requests".into()), "there is nothing to take turns with");
        let eight = names(8, &[]);
        for name in ["decode, 8 rows with a lens", "decode, 8 rows, 8 lenses", "requests", "lens"] {
            assert!(eight.contains(&name.into()), "{name}");
        }
        assert_eq!(eight.last().unwrap(), "long prompt, 4096 tokens");
    }
}
