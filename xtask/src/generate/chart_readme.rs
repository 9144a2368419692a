//! `charts/turret/README.md`: the chart's values with their comments and defaults.

use std::fmt::Write as _;

use anyhow::{Result, bail};

use super::{NOTICE, cell};

/// The page, from the text of `values.yaml`.
pub fn page(values: &str) -> Result<String> {
    let mut page = format!(
        "<!-- {NOTICE} -->\n\n# Chart `turret`\n\n\
         Installs Turret's operator and gateway, their permissions, and (by the chart `turret-crds`, a dependency)\n\
         the CustomResourceDefinitions. [docs/install.md](../../docs/install.md) tells how to use it.\n\n\
         ```sh\nhelm upgrade --install turret charts/turret --namespace turret-system --create-namespace\n```\n\n\
         Values outside this table are refused.\n\n| value | default | what |\n|---|---|---|\n"
    );
    for entry in entries(values)? {
        writeln!(page, "| `{}` | `{}` | {} |", entry.path, cell(&entry.default), cell(&entry.comment))?;
    }
    Ok(page)
}

/// One value of the chart.
#[derive(Debug, PartialEq, Eq)]
struct Entry {
    path: String,
    default: String,
    comment: String,
}

/// Reads the values of a `values.yaml` that keeps to one `key: value` a line, each commented.
fn entries(values: &str) -> Result<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut parents: Vec<(usize, String)> = Vec::new();
    let mut comment: Vec<&str> = Vec::new();
    for line in values.lines() {
        let text = line.trim_start();
        if text.is_empty() {
            comment.clear();
            continue;
        }
        if let Some(words) = text.strip_prefix('#') {
            comment.push(words.trim());
            continue;
        }
        let Some((key, default)) = text.split_once(':') else {
            bail!("values.yaml: `{line}` is no `key: value`")
        };
        let indent = line.len() - text.len();
        parents.retain(|(depth, _)| *depth < indent);
        let names = parents.iter().map(|(_, name)| name.as_str()).chain([key]);
        let path = names.collect::<Vec<_>>().join(".");
        if default.trim().is_empty() {
            parents.push((indent, key.to_owned()));
        } else {
            if comment.is_empty() {
                bail!("values.yaml: `{path}` has no comment; say above it what it is for");
            }
            entries.push(Entry { path, default: default.trim().to_owned(), comment: comment.join(" ") });
        }
        comment.clear();
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_listed_with_path_default_and_comment() {
        let values =
            "# About\n\na:\n  # What b is,\n  # at length.\n  b: 1\n  c:\n    # D.\n    d: {}\n# E.\ne: []\n";
        let entry = |path: &str, default: &str, comment: &str| Entry {
            path: path.into(),
            default: default.into(),
            comment: comment.into(),
        };
        let expected =
            [entry("a.b", "1", "What b is, at length."), entry("a.c.d", "{}", "D."), entry("e", "[]", "E.")];
        assert_eq!(entries(values).unwrap(), expected);
    }

    #[test]
    fn a_value_without_a_comment_is_refused() {
        let error = entries("a:\n  b: 1\n").unwrap_err().to_string();
        assert!(error.contains("`a.b` has no comment"), "{error}");
    }
}
