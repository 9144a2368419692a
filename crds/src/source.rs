//! Where the files of a base or a lens come from, and how they are identified.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Where the files of a base or a lens are, and what they must be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!self.uri.startsWith('hf://') || has(self.revision)").message("an hf:// source needs a `revision`, the 40 hex digits of a commit, so that all workers hold the same weights"),
    validation = Rule::new("!has(self.revision) || self.uri.startsWith('hf://')").message("only an hf:// source has a `revision`; give a `digest` to pin the files of another source"),
    validation = Rule::new("!has(self.secretRef) || self.uri.startsWith('hf://') || self.uri.startsWith('https://')").message("only hf:// and https:// sources take a secretRef: volumes and folders need no token"),
)]
pub struct Source {
    /// Where the folder of files is. One of
    /// `pvc://NAME/path` (a folder on a volume that the placement lists in `sourceVolumes`),
    /// `hf://ORG/REPO` or `hf://ORG/REPO/path` (a model repository on the Hugging Face hub, or a folder in it, at `revision`),
    /// `https://host/path` (a folder whose files are fetched by name, resumed when interrupted),
    /// `file:///path` (a folder in the worker's own file system, below a root the worker was given).
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.matches('^(file:///|pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/|$)|https://[^/]|hf://[A-Za-z0-9_]([-A-Za-z0-9_.]*[A-Za-z0-9_])?/[A-Za-z0-9_]([-A-Za-z0-9_.]*[A-Za-z0-9_])?(/|$))')").message("uri must begin with pvc://NAME/, hf://ORG/REPO, https://host/ or file:///"),
        validation = Rule::new("!self.matches('(^|/)[.][.](/|$)')").message("uri must not contain `..`: a source cannot leave its root"),
        validation = Rule::new("!self.matches('[?#\\\\s]')").message("uri must not contain spaces, `?` or `#`"),
    )]
    pub uri: String,
    /// `sha256:` and 64 hex digits: the digest of the files the loader reads, as
    /// `turret-worker inspect` prints it. When given, files with another digest are refused
    /// (`DigestMismatch`); give it wherever two workers must hold the same weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 71))]
    #[x_kube(
        validation = Rule::new("self.matches('^sha256:[0-9a-f]{64}$')").message("digest must be `sha256:` followed by 64 lower-case hex digits; `turret-worker inspect FOLDER` prints it"),
    )]
    pub digest: Option<String>,
    /// The commit of an `hf://` source: 40 hex digits. Required there, since a branch or a tag can move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 40))]
    #[x_kube(
        validation = Rule::new("self.matches('^[0-9a-f]{40}$')").message("revision must be a commit: 40 lower-case hex digits; the repository's page shows it, and `git ls-remote URL` prints it"),
    )]
    pub revision: Option<String>,
    /// The Secret whose key `token` the server of an `hf://` or `https://` source asks for: one of the placement's
    /// namespace, never of the group's where that is another. The placement must list it in `sourceSecrets`. Read
    /// whenever it is needed, so a new token takes effect without a restart.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretRef>,
}

/// A Secret of the placement's namespace.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')").message("secretRef.name is the name of a Secret: lower-case letters, digits, `-` and `.`"))]
    pub name: String,
}

/// A source's URI, taken apart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceLocation<'a> {
    /// An absolute path in the worker's file system.
    File {
        /// Begins with `/`.
        path: &'a str,
    },
    /// A path on a mounted source volume.
    Volume {
        /// Name of the entry in `sourceVolumes`.
        volume: &'a str,
        /// Relative path on it, possibly empty.
        path: &'a str,
    },
    /// A folder on an HTTPS server.
    Https {
        /// The whole URL, without a trailing slash.
        url: &'a str,
    },
    /// A folder of a model repository on a hub, at a commit.
    Hub {
        /// Who owns the repository.
        org: &'a str,
        /// Its name.
        repo: &'a str,
        /// Relative path in it, possibly empty.
        path: &'a str,
        /// The commit.
        revision: &'a str,
    },
}

/// A source that names no place Turret can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidSource {
    /// The scheme is not one of ours.
    #[error("`{0}` must begin with pvc://NAME/, hf://ORG/REPO, https://host/ or file:///")]
    Scheme(String),
    /// The path climbs out of its root.
    #[error("`{0}` must not contain `..`: a source cannot leave its root")]
    Escapes(String),
    /// A character that would be read differently in different places.
    #[error("`{0}` must not contain spaces, `?` or `#`")]
    Character(String),
    /// Two workers could hold different weights.
    #[error("`{0}` needs a `revision`: the 40 lower-case hex digits of a commit")]
    Revision(String),
    /// It would pin nothing.
    #[error("`{0}` has a `revision`, which only hf:// sources have; give a `digest`")]
    UnusedRevision(String),
    /// It would not be used.
    #[error("`{0}` has a secretRef, which only hf:// and https:// sources take")]
    UnusedSecret(String),
    /// The Secret's name is none, and could lead out of the folder of Secrets.
    #[error("`{0}` is no name of a Secret: lower-case letters, digits, `-` and `.`")]
    SecretName(String),
}

impl Source {
    /// Takes the URI apart. Accepts exactly what the CRD's rules accept.
    pub fn location(&self) -> Result<SourceLocation<'_>, InvalidSource> {
        let location = self.place()?;
        let uri = || self.uri.clone();
        if self.revision.is_some() && !matches!(location, SourceLocation::Hub { .. }) {
            return Err(InvalidSource::UnusedRevision(uri()));
        }
        if let Some(secret) = &self.secret_ref {
            if !matches!(location, SourceLocation::Hub { .. } | SourceLocation::Https { .. }) {
                return Err(InvalidSource::UnusedSecret(uri()));
            }
            if !secret.name.split('.').all(is_dns_label) {
                return Err(InvalidSource::SecretName(secret.name.clone()));
            }
        }
        Ok(location)
    }

    /// What tells it from other sources: the URI, with the commit where there is one.
    pub fn identity(&self) -> String {
        let uri = self.uri.trim_end_matches('/');
        match &self.revision {
            Some(revision) => format!("{uri}@{revision}"),
            None => uri.to_owned(),
        }
    }

    fn place(&self) -> Result<SourceLocation<'_>, InvalidSource> {
        let uri = self.uri.as_str();
        if uri.split('/').any(|segment| segment == "..") {
            return Err(InvalidSource::Escapes(uri.into()));
        }
        if uri.contains(|c: char| c.is_ascii_whitespace() || c == '?' || c == '#') {
            return Err(InvalidSource::Character(uri.into()));
        }
        if let Some(path) = uri.strip_prefix("file://")
            && path.starts_with('/')
        {
            return Ok(SourceLocation::File { path });
        }
        if let Some(rest) = uri.strip_prefix("pvc://") {
            let (volume, path) = rest.split_once('/').unwrap_or((rest, ""));
            if is_dns_label(volume) {
                return Ok(SourceLocation::Volume { volume, path: path.trim_matches('/') });
            }
        }
        if let Some(rest) = uri.strip_prefix("https://")
            && !rest.is_empty()
            && !rest.starts_with('/')
        {
            return Ok(SourceLocation::Https { url: uri.trim_end_matches('/') });
        }
        if let Some(rest) = uri.strip_prefix("hf://")
            && let Some((org, rest)) = rest.split_once('/')
            && let (repo, path) = rest.split_once('/').unwrap_or((rest, ""))
            && is_hub_name(org)
            && is_hub_name(repo)
        {
            let revision = self.revision.as_deref().filter(|r| is_commit(r));
            let revision = revision.ok_or_else(|| InvalidSource::Revision(uri.into()))?;
            return Ok(SourceLocation::Hub { org, repo, path: path.trim_matches('/'), revision });
        }
        Err(InvalidSource::Scheme(uri.into()))
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Of a user, an organisation or a repository on a hub.
fn is_hub_name(text: &str) -> bool {
    let end = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = text.as_bytes();
    bytes.iter().all(|&b| end(b) || b == b'-' || b == b'.')
        && bytes.first().is_some_and(|&b| end(b))
        && bytes.last().is_some_and(|&b| end(b))
}

fn is_dns_label(text: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    !text.is_empty() && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-')
}

/// The digest of a set of files: SHA-256 over the sorted lines `"<sha256 hex>  <path>\n"`,
/// paths relative to the folder, as `sha256sum * | LC_ALL=C sort -k2 | sha256sum` prints it.
///
/// Sorted by path, so the order in which files are found does not matter.
pub fn files_digest<'a>(files: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut files: Vec<(&str, &str)> = files.into_iter().collect();
    files.sort_unstable();
    let mut hasher = Sha256::new();
    for (path, sha256_hex) in files {
        hasher.update(format!("{sha256_hex}  {path}\n"));
    }
    format!("sha256:{}", hex::encode(hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str) -> Source {
        Source { uri: uri.into(), ..Source::default() }
    }

    fn at(uri: &str, revision: &str) -> Source {
        Source { revision: Some(revision.into()), ..source(uri) }
    }

    fn with_secret(source: Source, name: &str) -> Source {
        Source { secret_ref: Some(SecretRef { name: name.into() }), ..source }
    }

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn uris_are_taken_apart() {
        assert_eq!(source("file:///models/a").location(), Ok(SourceLocation::File { path: "/models/a" }));
        assert_eq!(
            source("pvc://lenses/talkative/l30/").location(),
            Ok(SourceLocation::Volume { volume: "lenses", path: "talkative/l30" })
        );
        assert_eq!(
            source("pvc://lenses").location(),
            Ok(SourceLocation::Volume { volume: "lenses", path: "" })
        );
        assert_eq!(
            with_secret(source("https://example.org/a/"), "a.b-c").location(),
            Ok(SourceLocation::Https { url: "https://example.org/a" })
        );
        let hub = |org, repo, path| Ok(SourceLocation::Hub { org, repo, path, revision: COMMIT });
        assert_eq!(at("hf://google/gemma-2-9b-it", COMMIT).location(), hub("google", "gemma-2-9b-it", ""));
        let inside = with_secret(at("hf://a_1/B.c/lenses/pirate/", COMMIT), "hub");
        assert_eq!(inside.location(), hub("a_1", "B.c", "lenses/pirate"));
    }

    #[test]
    fn uris_that_name_nothing_or_climb_are_refused() {
        for uri in [
            "models/a",
            "file://models",
            "pvc:///a",
            "pvc://A/b",
            "https:///a",
            "http://a/b",
            "ftp://a",
            "",
            "hf://",
            "hf://a",
            "hf:///b",
            "hf://a/",
            "hf://-a/b",
            "hf://a/b.",
            "hf://a/b@main",
        ] {
            assert!(matches!(at(uri, COMMIT).location(), Err(InvalidSource::Scheme(_))), "{uri}");
        }
        for uri in ["file:///a/../b", "pvc://v/..", "https://h/../x", "hf://a/b/../c", "hf://../b"] {
            assert!(matches!(source(uri).location(), Err(InvalidSource::Escapes(_))), "{uri}");
        }
        for uri in ["file:///a b", "https://h/x?y", "pvc://v/a#b"] {
            assert!(matches!(source(uri).location(), Err(InvalidSource::Character(_))), "{uri}");
        }
    }

    #[test]
    fn a_hub_source_is_pinned_to_a_commit_and_no_other_is() {
        for revision in [None, Some("main"), Some("0123abc"), Some(&*COMMIT.to_uppercase())] {
            let source = Source { revision: revision.map(Into::into), ..source("hf://a/b") };
            assert_eq!(source.location(), Err(InvalidSource::Revision("hf://a/b".into())), "{revision:?}");
        }
        let unused = at("https://h/x", COMMIT);
        assert_eq!(unused.location(), Err(InvalidSource::UnusedRevision("https://h/x".into())));
        assert_eq!(at("hf://a/b/", COMMIT).identity(), format!("hf://a/b@{COMMIT}"));
        assert_eq!(source("pvc://v/x/").identity(), "pvc://v/x");
    }

    #[test]
    fn a_secret_is_named_where_it_is_used_and_leads_nowhere_else() {
        let unused = with_secret(source("pvc://v/x"), "a");
        assert_eq!(unused.location(), Err(InvalidSource::UnusedSecret("pvc://v/x".into())));
        for name in ["", "..", "a/b", "../a", "A", "a."] {
            let location = with_secret(source("https://h/x"), name);
            assert_eq!(location.location(), Err(InvalidSource::SecretName(name.into())));
        }
    }

    #[test]
    fn digest_does_not_depend_on_the_order_of_files() {
        let a = files_digest([("a", "11"), ("b", "22")]);
        assert_eq!(a, files_digest([("b", "22"), ("a", "11")]));
        assert_ne!(a, files_digest([("a", "22"), ("b", "11")]));
    }
}
