//! What `kubectl get` prints, read as a person reads it: by the heads of its columns.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

/// One object's line of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row(BTreeMap<String, String>);

impl Row {
    /// The only line of a table below its heads.
    pub fn only(table: &str) -> Result<Self> {
        let lines: Vec<&str> = table.lines().collect();
        let [heads, row] = lines[..] else { bail!("this is no table of one object:\n{table}") };
        let (heads, row) = (columns(heads), row.chars().collect::<Vec<char>>());
        let mut cells = BTreeMap::new();
        for (number, (start, head)) in heads.iter().enumerate() {
            let end = heads.get(number + 1).map_or(row.len(), |(next, _)| *next).min(row.len());
            let cell: String = row[(*start).min(end)..end].iter().collect();
            cells.insert(head.clone(), cell.trim().to_owned());
        }
        Ok(Self(cells))
    }

    /// What it says in a column.
    pub fn cell(&self, head: &str) -> Result<&str> {
        let cell = self.0.get(head).map(String::as_str);
        cell.with_context(|| format!("kubectl prints no column {head}: {self:?}"))
    }
}

/// The heads, each with the place at which its column begins. No head of ours has a space.
fn columns(heads: &str) -> Vec<(usize, String)> {
    let mut columns: Vec<(usize, String)> = Vec::new();
    let mut before = ' ';
    for (place, letter) in heads.chars().enumerate() {
        if letter != ' ' && before == ' ' {
            columns.push((place, String::new()));
        }
        if let Some((_, head)) = columns.last_mut().filter(|_| letter != ' ') {
            head.push(letter);
        }
        before = letter;
    }
    columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_found_by_their_heads_also_empty_ones_and_those_with_spaces() {
        let table = "NAME   READY   REASON    ACTIVE   MESSAGE\n\
                     a      False   Failed             placement `p`: all of it\n";
        let row = Row::only(table).unwrap();
        assert_eq!((row.cell("READY").unwrap(), row.cell("REASON").unwrap()), ("False", "Failed"));
        assert_eq!((row.cell("ACTIVE").unwrap(), row.cell("NAME").unwrap()), ("", "a"));
        assert_eq!(row.cell("MESSAGE").unwrap(), "placement `p`: all of it");
        assert!(row.cell("AGE").is_err());
    }

    #[test]
    fn a_short_line_has_empty_cells_at_its_end_and_two_objects_are_no_row() {
        assert_eq!(Row::only("NAME   READY\na\n").unwrap().cell("READY").unwrap(), "");
        assert!(Row::only("NAME\na\nb\n").is_err());
        assert!(Row::only("").is_err());
    }
}
