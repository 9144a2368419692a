//! What a file says, as it may stand in a message: short, whatever the file holds.

/// The beginning of a text, at most this many characters, with a mark where more follows.
pub(crate) fn excerpt(text: &str, max_chars: usize) -> String {
    match text.char_indices().nth(max_chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// What a parser says about a text, parts of which it may repeat. The place comes last, so the end stays too.
pub(crate) fn complaint(error: &dyn std::fmt::Display) -> String {
    const ENDS: usize = 150;
    let text = error.to_string();
    let tail = text.char_indices().rev().nth(ENDS - 1).map_or(0, |(start, _)| start);
    match text.char_indices().nth(ENDS) {
        Some((head, _)) if head < tail => format!("{}…{}", &text[..head], &text[tail..]),
        _ => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(excerpt("äöü", 3), "äöü");
        assert_eq!(excerpt("äöü", 2), "äö…");
        assert_eq!(complaint(&"short"), "short");
        let long = complaint(&format!("{}at line 7", "ä".repeat(1000)));
        assert!(long.starts_with('ä') && long.ends_with("at line 7") && long.chars().count() == 301);
    }
}
