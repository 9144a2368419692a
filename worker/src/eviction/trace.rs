//! Sequences of requests, as recorded or generated. In a file one JSON object a line:
//!
//! ```text
//! {"lens":"sql","bytes":20000000,"priority":5,"group":"team-a"}     first, optional: lenses
//! {"at":0.25,"lens":"sql"}                                          requests; seconds, not decreasing
//! {"at":0.5,"lens":"french","bytes":1000000}                        a lens that was not declared: its first has bytes
//! ```

use std::collections::HashMap;
use std::io::{BufRead, Write};

use serde::{Deserialize, Serialize};

/// Lenses and the requests for them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trace {
    /// Lenses, in the order in which they were first named.
    pub lenses: Vec<Lens>,
    /// Requests, by time.
    pub requests: Vec<Request>,
}

/// A lens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lens {
    /// Its name.
    pub name: String,
    /// Bytes in device memory.
    pub bytes: u64,
    /// Higher stays longer.
    pub priority: i16,
    /// Whose requests it shares with others; empty for the group of all that name none.
    pub group: String,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Request {
    /// When, seconds.
    pub at_seconds: f64,
    /// Index of the lens.
    pub lens: usize,
}

/// Why a trace cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file ends or breaks.
    #[error("failed to read line {line} of the trace")]
    Read {
        /// From 1.
        line: usize,
        /// What the system says.
        source: std::io::Error,
    },
    /// Not JSON, or not these fields.
    #[error("failed to parse line {line} of the trace")]
    Parse {
        /// From 1.
        line: usize,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// Well formed, but it contradicts itself or what was before.
    #[error("line {line} of the trace: {why}")]
    Invalid {
        /// From 1.
        line: usize,
        /// What is wrong.
        why: String,
    },
}

/// A line of the file: a request if it has a time, otherwise a lens.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<f64>,
    lens: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    priority: Option<i16>,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<String>,
}

/// Reads a trace.
pub fn read(from: impl BufRead) -> Result<Trace, TraceError> {
    let mut reader = Reader::default();
    for (n, text) in from.lines().enumerate() {
        let line = n + 1;
        let text = text.map_err(|source| TraceError::Read { line, source })?;
        let parsed = serde_json::from_str(&text).map_err(|source| TraceError::Parse { line, source })?;
        reader.add(parsed).map_err(|why| TraceError::Invalid { line, why })?;
    }
    Ok(reader.trace)
}

/// Writes a trace so that [`read`] gives it back.
pub fn write(trace: &Trace, mut to: impl Write) -> std::io::Result<()> {
    let mut write_line = |line: &Line| {
        serde_json::to_writer(&mut to, line)?;
        to.write_all(b"\n")
    };
    for Lens { name, bytes, priority, group } in &trace.lenses {
        let group = (!group.is_empty()).then(|| group.clone());
        let (bytes, priority) = (Some(*bytes), Some(*priority));
        write_line(&Line { at: None, lens: name.clone(), bytes, priority, group })?;
    }
    for Request { at_seconds, lens } in &trace.requests {
        let lens = trace.lenses[*lens].name.clone();
        write_line(&Line { at: Some(*at_seconds), lens, bytes: None, priority: None, group: None })?;
    }
    Ok(())
}

#[derive(Default)]
struct Reader {
    trace: Trace,
    by_name: HashMap<String, usize>,
}

impl Reader {
    fn add(&mut self, line: Line) -> Result<(), String> {
        match line.at {
            Some(at_seconds) => self.add_request(at_seconds, line),
            None => self.add_declared(line),
        }
    }

    fn add_declared(&mut self, line: Line) -> Result<(), String> {
        if !self.trace.requests.is_empty() {
            return Err(format!(
                "lens `{}` is declared after the first request, or `at` is missing",
                line.lens
            ));
        }
        if self.by_name.contains_key(&line.lens) {
            return Err(format!("lens `{}` is declared twice", line.lens));
        }
        self.add_lens(line).map(drop)
    }

    fn add_lens(&mut self, line: Line) -> Result<usize, String> {
        let bytes = line.bytes.filter(|b| *b > 0);
        let bytes = bytes.ok_or_else(|| format!("lens `{}` needs `bytes`, more than 0", line.lens))?;
        let lens = self.trace.lenses.len();
        self.by_name.insert(line.lens.clone(), lens);
        self.trace.lenses.push(Lens {
            name: line.lens,
            bytes,
            priority: line.priority.unwrap_or(0),
            group: line.group.unwrap_or_default(),
        });
        Ok(lens)
    }

    fn add_request(&mut self, at_seconds: f64, line: Line) -> Result<(), String> {
        if line.priority.is_some() || line.group.is_some() {
            return Err("a request has no `priority` and no `group`: its lens has".to_owned());
        }
        let before = self.trace.requests.last().map_or(0.0, |r| r.at_seconds);
        if at_seconds < before {
            return Err(format!("`at` is {at_seconds}, earlier than {before} before it"));
        }
        let lens = match self.by_name.get(&line.lens) {
            Some(lens) => self.known(*lens, line.bytes)?,
            None => self.add_lens(line)?,
        };
        self.trace.requests.push(Request { at_seconds, lens });
        Ok(())
    }

    fn known(&self, lens: usize, bytes: Option<u64>) -> Result<usize, String> {
        let Lens { name, bytes: declared, .. } = &self.trace.lenses[lens];
        match bytes {
            Some(bytes) if bytes != *declared => {
                Err(format!("lens `{name}` has {declared} bytes, not {bytes}"))
            }
            _ => Ok(lens),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DECLARED: &str = r#"{"lens":"a","bytes":7,"priority":2,"group":"g"}"#;

    fn read_lines(lines: &[&str]) -> Result<Trace, TraceError> {
        read(lines.join("\n").as_bytes())
    }

    #[test]
    fn lenses_come_from_headers_and_from_first_requests() {
        let trace = read_lines(&[
            DECLARED,
            r#"{"at":0,"lens":"a"}"#,
            r#"{"at":0.5,"lens":"b","bytes":3}"#,
            r#"{"at":0.5,"lens":"b"}"#,
        ])
        .unwrap();
        let lens = |name: &str, bytes, priority, group: &str| Lens {
            name: name.to_owned(),
            bytes,
            priority,
            group: group.to_owned(),
        };
        assert_eq!(trace.lenses, [lens("a", 7, 2, "g"), lens("b", 3, 0, "")]);
        let requests: Vec<_> = trace.requests.iter().map(|r| (r.at_seconds, r.lens)).collect();
        assert_eq!(requests, [(0.0, 0), (0.5, 1), (0.5, 1)]);
    }

    #[test]
    fn errors_name_the_line_and_what_is_wrong() {
        let cases = [
            (r#"{"at":1,"lens":"a","byte":7}"#, "failed to parse line 3 of the trace"),
            (r#"{"at":"now","lens":"a"}"#, "failed to parse line 3 of the trace"),
            ("", "failed to parse line 3 of the trace"),
            (r#"{"at":1,"lens":"new"}"#, "line 3 of the trace: lens `new` needs `bytes`, more than 0"),
            (
                r#"{"at":1,"lens":"new","bytes":0}"#,
                "line 3 of the trace: lens `new` needs `bytes`, more than 0",
            ),
            (r#"{"at":1,"lens":"a","bytes":8}"#, "line 3 of the trace: lens `a` has 7 bytes, not 8"),
            (r#"{"at":0.1,"lens":"a"}"#, "line 3 of the trace: `at` is 0.1, earlier than 0.5 before it"),
            (
                r#"{"at":1,"lens":"a","priority":1}"#,
                "line 3 of the trace: a request has no `priority` and no `group`: its lens has",
            ),
            (
                r#"{"lens":"b","bytes":1}"#,
                "line 3 of the trace: lens `b` is declared after the first request, or `at` is missing",
            ),
        ];
        for (third, expected) in cases {
            let lines = [DECLARED, r#"{"at":0.5,"lens":"a"}"#, third, r#"{"at":9,"lens":"a"}"#];
            assert_eq!(read_lines(&lines).unwrap_err().to_string(), expected, "{third}");
        }
        let twice = read_lines(&[DECLARED, DECLARED]).unwrap_err();
        assert_eq!(twice.to_string(), "line 2 of the trace: lens `a` is declared twice");
        assert!(read_lines(&[r#"{"at":-1,"lens":"a","bytes":1}"#]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(
            lenses in proptest::collection::vec((1u64..u64::MAX, any::<i16>(), "[a-z]{0,2}"), 1..5),
            requests in proptest::collection::vec((0u32..80, 0usize..5), 0..10),
        ) {
            let lens = |(n, (bytes, priority, group))| Lens { name: format!("\"{n}\u{e9}"), bytes, priority, group };
            let lenses: Vec<_> = lenses.into_iter().enumerate().map(lens).collect();
            let mut at_seconds = 0.0;
            let requests = requests.into_iter().map(|(pause, lens)| {
                at_seconds += f64::from(pause) / 8.0;
                Request { at_seconds, lens: lens % lenses.len() }
            }).collect();
            let trace = Trace { lenses, requests };
            let mut file = Vec::new();
            write(&trace, &mut file).unwrap();
            prop_assert_eq!(read(file.as_slice()).unwrap(), trace);
        }
    }
}
