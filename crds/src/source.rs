//! Where the files of a base or a lens come from, and how they are identified.

use kube::KubeSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Where the files of a base or a lens are, and what they must be.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Source {
    /// Where the folder of files is. One of
    /// `pvc://NAME/path` (a folder on a volume that the placement lists in `sourceVolumes`),
    /// `https://host/path` (a folder whose files are fetched by name, resumed when interrupted),
    /// `file:///path` (a folder in the worker's own file system, below a root the worker was given).
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.matches('^(file:///|pvc://[a-z0-9]([-a-z0-9]*[a-z0-9])?(/|$)|https://[^/])')").message("uri must begin with pvc://NAME/, https://host/ or file:///"),
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
}

/// A URI that names no place Turret can read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidUri {
    /// The scheme is not one of ours.
    #[error("`{0}` must begin with pvc://NAME/, https://host/ or file:///")]
    Scheme(String),
    /// The path climbs out of its root.
    #[error("`{0}` must not contain `..`: a source cannot leave its root")]
    Escapes(String),
    /// A character that would be read differently in different places.
    #[error("`{0}` must not contain spaces, `?` or `#`")]
    Character(String),
}

impl Source {
    /// Takes the URI apart. Accepts exactly what the CRD's rules accept.
    pub fn location(&self) -> Result<SourceLocation<'_>, InvalidUri> {
        let uri = self.uri.as_str();
        if uri.split('/').any(|segment| segment == "..") {
            return Err(InvalidUri::Escapes(uri.into()));
        }
        if uri.contains(|c: char| c.is_ascii_whitespace() || c == '?' || c == '#') {
            return Err(InvalidUri::Character(uri.into()));
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
        Err(InvalidUri::Scheme(uri.into()))
    }
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
        Source { uri: uri.into(), digest: None }
    }

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
            source("https://example.org/a/").location(),
            Ok(SourceLocation::Https { url: "https://example.org/a" })
        );
    }

    #[test]
    fn uris_that_name_nothing_or_climb_are_refused() {
        for uri in
            ["models/a", "file://models", "pvc:///a", "pvc://A/b", "https:///a", "http://a/b", "ftp://a", ""]
        {
            assert!(matches!(source(uri).location(), Err(InvalidUri::Scheme(_))), "{uri}");
        }
        for uri in ["file:///a/../b", "pvc://v/..", "https://h/../x"] {
            assert!(matches!(source(uri).location(), Err(InvalidUri::Escapes(_))), "{uri}");
        }
        for uri in ["file:///a b", "https://h/x?y", "pvc://v/a#b"] {
            assert!(matches!(source(uri).location(), Err(InvalidUri::Character(_))), "{uri}");
        }
    }

    #[test]
    fn digest_does_not_depend_on_the_order_of_files() {
        let a = files_digest([("a", "11"), ("b", "22")]);
        assert_eq!(a, files_digest([("b", "22"), ("a", "11")]));
        assert_ne!(a, files_digest([("a", "22"), ("b", "11")]));
    }
}
