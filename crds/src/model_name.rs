//! How clients name what should answer: `group`, `group:lens` or `group:alias`.

use std::fmt;

/// A name as a client gives it in `model`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelName {
    /// The group, as the placement calls it.
    pub group: String,
    /// The lens, or the alias that leads to one; `None` is the bare base.
    pub lens: Option<String>,
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.lens {
            Some(lens) => write!(f, "{}:{lens}", self.group),
            None => f.write_str(&self.group),
        }
    }
}

/// Why a name was not resolved. The text is meant for the client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownModel {
    /// Nothing is called so.
    #[error("the model `{name}` does not exist; `GET /v1/models` lists what is served")]
    NotFound {
        /// What was asked for.
        name: String,
    },
    /// A bare name that lenses or aliases of several groups have.
    #[error("`{name}` is a lens or an alias of several groups; write one of {}", .candidates.join(", "))]
    Ambiguous {
        /// What was asked for.
        name: String,
        /// The full names it could mean.
        candidates: Vec<String>,
    },
}

/// Resolves a client's `model` among what is served: a group's name, then `group:lens`, then a
/// lens name that only one group has. An alias is named as a lens is; which lens it leads to is not decided here.
///
/// `groups` is what there is: group names with the names of their lenses and aliases.
pub fn resolve<'a, L>(
    name: &str,
    groups: impl IntoIterator<Item = (&'a str, L)>,
) -> Result<ModelName, UnknownModel>
where
    L: IntoIterator<Item = &'a str>,
{
    let split = name.split_once(':');
    let mut bare = Vec::new();
    for (group, lenses) in groups {
        if group == name {
            return Ok(ModelName { group: group.into(), lens: None });
        }
        // Neither name has a colon.
        if split.is_some_and(|(named, _)| named != group) {
            continue;
        }
        for lens in lenses {
            if split == Some((group, lens)) {
                return Ok(ModelName { group: group.into(), lens: Some(lens.into()) });
            }
            if lens == name {
                bare.push(ModelName { group: group.into(), lens: Some(lens.into()) });
            }
        }
    }
    match bare.len() {
        1 => Ok(bare.remove(0)),
        0 => Err(UnknownModel::NotFound { name: name.into() }),
        _ => {
            let mut candidates: Vec<String> = bare.iter().map(ToString::to_string).collect();
            candidates.sort();
            Err(UnknownModel::Ambiguous { name: name.into(), candidates })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROUPS: [(&str, &[&str]); 3] =
        [("a", &["pirate", "terse"]), ("b", &["pirate", "c"]), ("c", &["polite"])];

    fn find(name: &str) -> Result<String, UnknownModel> {
        resolve(name, GROUPS.map(|(g, l)| (g, l.iter().copied()))).map(|m| m.to_string())
    }

    #[test]
    fn names_resolve_to_one_thing_or_say_why_not() {
        assert_eq!(find("a").unwrap(), "a");
        assert_eq!(find("b:pirate").unwrap(), "b:pirate");
        assert_eq!(find("terse").unwrap(), "a:terse");
        assert_eq!(find("c").unwrap(), "c", "a group's name goes before a lens's");
        assert_eq!(
            find("pirate"),
            Err(UnknownModel::Ambiguous {
                name: "pirate".into(),
                candidates: vec!["a:pirate".into(), "b:pirate".into()]
            })
        );
        for name in ["", "a:", ":terse", "a:polite", "A", "a:pirate:x"] {
            assert!(matches!(find(name), Err(UnknownModel::NotFound { .. })), "{name}");
        }
    }
}
