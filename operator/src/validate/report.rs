//! What came of it: problems, each with where it was found, and how they are printed.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};

use serde::Serialize;

use super::files::Unreadable;

/// Which object of which file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Origin {
    /// The file, `-` for standard input.
    pub file: String,
    /// The document in it; the first is 1.
    pub document: usize,
    /// `ModelGroup` or `ModelPlacement`.
    pub kind: String,
    /// The object's namespace, or the one that was given for objects without.
    pub namespace: String,
    /// The object's name; empty when it has none.
    pub name: String,
}

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// It is refused, or could never be served.
    Error,
    /// It is accepted, but a part of it could not be served.
    Warning,
    /// Nothing is wrong as far as these files show.
    Note,
}

/// One thing about an object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// The object.
    #[serde(flatten)]
    pub origin: Origin,
    /// How bad it is.
    pub severity: Severity,
    /// Where in the object; empty when it is about the whole of it.
    pub path: String,
    /// What is wrong.
    pub message: String,
}

/// What came of all files.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Report {
    /// How many objects of our kinds there are.
    pub objects: usize,
    /// How many of other kinds there are, by `apiVersion` and kind. They are not looked at, but for labels of namespaces.
    pub skipped: BTreeMap<String, usize>,
    /// What is wrong, or worth knowing.
    pub problems: Vec<Problem>,
    /// Files that could not be read.
    pub unreadable: Vec<Unreadable>,
}

/// Exit code when an object is invalid.
pub const INVALID: u8 = 1;
/// Exit code when a file could not be read.
pub const UNREADABLE: u8 = 2;

impl Report {
    /// 0 when all is fine, warnings and notes aside; [`UNREADABLE`], and else [`INVALID`], when it is not.
    pub fn exit_code(&self) -> u8 {
        if !self.unreadable.is_empty() {
            UNREADABLE
        } else if self.count(Severity::Error) > 0 {
            INVALID
        } else {
            0
        }
    }

    /// Writes a line for each problem and each file that could not be read.
    pub fn write_lines(&self, mut out: impl Write) -> io::Result<()> {
        for Unreadable { file, message } in &self.unreadable {
            writeln!(out, "{file}: cannot be read: {}", on_one_line(message))?;
        }
        for problem in &self.problems {
            writeln!(out, "{problem}")?;
        }
        Ok(())
    }

    /// Writes everything as one JSON object.
    pub fn write_json(&self, mut out: impl Write) -> anyhow::Result<()> {
        #[derive(Serialize)]
        struct Printed<'a> {
            valid: bool,
            #[serde(flatten)]
            report: &'a Report,
        }
        serde_json::to_writer_pretty(&mut out, &Printed { valid: self.exit_code() == 0, report: self })?;
        Ok(writeln!(out)?)
    }

    /// One sentence for a person.
    pub fn summary(&self) -> String {
        let counted = |count: usize, what: &str| match count {
            1 => format!("1 {what}"),
            count => format!("{count} {what}s"),
        };
        let mut summary = format!(
            "checked {}: {}, {}, {}",
            counted(self.objects, "object"),
            counted(self.count(Severity::Error), "error"),
            counted(self.count(Severity::Warning), "warning"),
            counted(self.count(Severity::Note), "note"),
        );
        if !self.skipped.is_empty() {
            let kinds: Vec<String> =
                self.skipped.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            summary += &format!("; not looked at: {}", kinds.join(", "));
        }
        if !self.unreadable.is_empty() {
            summary += &format!("; {} could not be read", counted(self.unreadable.len(), "file"));
        }
        summary
    }

    fn count(&self, severity: Severity) -> usize {
        self.problems.iter().filter(|problem| problem.severity == severity).count()
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { file, document, kind, namespace, name } = self;
        write!(f, "{file}:{document} {kind}/{namespace}/{name}")
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.origin)?;
        match self.severity {
            Severity::Error => {}
            Severity::Warning => f.write_str("warning: ")?,
            Severity::Note => f.write_str("note: ")?,
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&on_one_line(&self.message))
    }
}

fn on_one_line(text: &str) -> String {
    text.split('\n').map(str::trim).collect::<Vec<_>>().join(" ")
}
