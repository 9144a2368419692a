//! The namespaces that operator and gateway serve, as they are told.

/// Reads one name of `--namespaces`. An empty one names none, so that an empty variable means all.
pub fn name(text: &str) -> Result<String, String> {
    let name = text.trim();
    let of_label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let is_label =
        name.len() <= 63 && name.chars().all(of_label) && !name.starts_with('-') && !name.ends_with('-');
    if is_label { Ok(name.to_owned()) } else { Err("this is not the name of a namespace".into()) }
}

/// Each of them once, sorted; none is all.
pub fn served(mut names: Vec<String>) -> Vec<String> {
    names.retain(|name| !name.is_empty());
    names.sort();
    names.dedup();
    names
}

/// For people.
pub fn text(names: &[String]) -> String {
    if names.is_empty() { "all".into() } else { names.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_told_once_each_and_none_is_all() {
        let read = |text: &str| text.split(',').map(name).collect::<Result<Vec<_>, _>>().map(served);
        assert_eq!(read("b,a, b"), Ok(vec!["a".into(), "b".into()]));
        assert_eq!(read(""), Ok(vec![]));
        for wrong in ["A", "a_b", "-a", "a-", "a/b", &"a".repeat(64)] {
            assert!(read(wrong).is_err(), "{wrong}");
        }
        assert_eq!((text(&[]), text(&["a".into(), "b".into()])), ("all".into(), "a,b".into()));
    }
}
