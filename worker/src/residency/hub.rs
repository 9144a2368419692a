//! The Hugging Face hub, or another one at `HF_ENDPOINT`: which files a repository has at a commit, where they are asked
//! for, and what this machine has of it already.
//!
//! hf-hub asks for the listing: it knows the API's paths, answers and errors. It does not help with the files. Its
//! metadata of one file (`get_file_metadata`) follows the redirect to where a large file is stored and then misses the
//! headers that name it, its listing of a tree loses the SHA-256 of large files, and its downloads neither resume nor
//! verify; [`super::fetch`] does, from the answer that redirects.

use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{HFClient, HFError};
use reqwest::{Client, StatusCode, Url};
use turret_crds::condition::FailureReason;

use super::fetch::{Broken, failed, not_allowed, persist};
use super::hosts::{ClientError, Hosts, Redirects};
use super::source::Folder;
use super::token::Token;
use crate::model::excerpt::excerpt;
use crate::telemetry::chain;

/// Where the hub is when nobody says otherwise.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// A listing takes no longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// Of what the hub says, this much is told.
const MAX_SAID_CHARS: usize = 200;

/// A folder of a repository at a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubFolder {
    /// Who owns the repository.
    pub org: String,
    /// Its name.
    pub repo: String,
    /// Path in it, possibly empty.
    pub path: String,
    /// The commit.
    pub revision: String,
}

/// The way to a hub, and to its cache on this machine.
#[derive(Clone, Debug)]
pub struct Hub {
    endpoint: Url,
    mode: Mode,
    cache: PathBuf,
    client: Client,
    hosts: Hosts,
}

/// Whether the hub may be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Yes.
    Online,
    /// No: what is on this machine must do.
    Offline,
}

impl fmt::Display for HubFolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { org, repo, path, revision } = self;
        let slash = if path.is_empty() { "" } else { "/" };
        write!(f, "hf://{org}/{repo}{slash}{path}@{revision}")
    }
}

impl HubFolder {
    /// What a file of it is called in the cache and in messages.
    pub fn key(&self, name: &str) -> String {
        let slash = if self.path.is_empty() { "" } else { "/" };
        let file = Self { path: format!("{}{slash}{name}", self.path), ..self.clone() };
        file.to_string()
    }
}

impl Hub {
    /// The hub at an endpoint. `cache` is its cache on this machine; absent: where Hugging Face's own tools have it.
    pub fn new(endpoint: Url, mode: Mode, cache: Option<PathBuf>, hosts: Hosts) -> Result<Self, ClientError> {
        let client = hosts.client(Redirects::Followed)?;
        let cache = cache.unwrap_or_else(hf_hub::resolve_cache_dir);
        Ok(Self { endpoint, mode, cache, client, hosts })
    }

    /// Whether it may be asked.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Where a file is asked for.
    pub fn url(&self, folder: &HubFolder, name: &str) -> Url {
        let mut url = self.endpoint.clone();
        let HubFolder { org, repo, path, revision } = folder;
        let inside = path.split('/').filter(|segment| !segment.is_empty());
        let segments = [org.as_str(), repo.as_str(), "resolve", revision.as_str()]
            .into_iter()
            .chain(inside)
            .chain([name]);
        url.path_segments_mut().expect("an endpoint begins with http").pop_if_empty().extend(segments);
        url
    }

    /// Names of the files in a folder, relative to it.
    pub async fn list(&self, folder: &HubFolder, token: &Token) -> Result<BTreeSet<String>, Broken> {
        let prefix = if folder.path.is_empty() { String::new() } else { format!("{}/", folder.path) };
        let all = persist(&folder.to_string(), || self.ask(folder, token)).await?;
        Ok(all.iter().filter_map(|name| name.strip_prefix(&prefix)).map(str::to_owned).collect())
    }

    async fn ask(&self, folder: &HubFolder, token: &Token) -> Result<Vec<String>, Broken> {
        self.hosts.check(&self.endpoint).map_err(|refused| not_allowed(&folder.to_string(), &refused))?;
        let client = self.metadata(token.value()).map_err(|e| {
            Broken::last(FailureReason::Internal, format!("failed to ask for `{folder}`: {}", chain(&e)))
        })?;
        let repository = client.model(&folder.org, &folder.repo);
        let asked = repository.info().revision(folder.revision.clone()).send();
        let info = match tokio::time::timeout(PATIENCE, asked).await {
            Ok(answer) => answer.map_err(|error| refused(folder, token, error))?,
            Err(_) => return Err(Broken::network(format!("`{folder}`: the hub did not answer in time"))),
        };
        if let Some(sha) = info.sha.filter(|sha| *sha != folder.revision) {
            let message = format!("`{folder}`: the hub answered with the commit {sha}");
            return Err(Broken::last(FailureReason::SourceUnavailable, message));
        }
        Ok(info.siblings.unwrap_or_default().into_iter().map(|file| file.rfilename).collect())
    }

    /// A client of hf-hub that sends its requests through ours, once each: how often to try is decided here.
    fn metadata(&self, token: Option<&str>) -> Result<HFClient, HFError> {
        let mut builder = HFClient::builder()
            .endpoint(self.endpoint.as_str())
            .client(self.client.clone())
            .cache_enabled(false)
            .retry_max_attempts(0);
        if let Some(token) = token {
            builder = builder.token(token);
        }
        builder.build()
    }

    /// The folder in the cache that Hugging Face's own tools share, if it is there.
    pub fn cached(&self, folder: &HubFolder) -> Option<Folder> {
        let HubFolder { org, repo, path, revision } = folder;
        let root = self.cache.join(format!("models--{org}--{repo}"));
        let (root, at) = (real(&root)?, real(&root.join("snapshots").join(revision).join(path))?);
        (at.starts_with(&root) && at.is_dir()).then_some(Folder { path: at, root })
    }
}

fn real(path: &Path) -> Option<PathBuf> {
    std::fs::canonicalize(path).ok()
}

/// What is told of a hub's refusal.
fn refused(folder: &HubFolder, token: &Token, error: HFError) -> Broken {
    let HubFolder { org, repo, revision, .. } = folder;
    match error {
        HFError::AuthRequired { context } | HFError::Forbidden { context } => {
            let code = context.error_code.as_deref();
            let hint = match code {
                Some("GatedRepo") => {
                    "; somebody must accept its conditions on its page, with the account of the token"
                }
                Some("RepoNotFound") => "; it is private, or does not exist",
                _ => "",
            };
            let said = context
                .server_message
                .as_deref()
                .map_or_else(String::new, |said| format!(" ({})", excerpt(said, MAX_SAID_CHARS)));
            let message = format!(
                "the hub answered {} for `{org}/{repo}`{said}, asked {}{hint}",
                context.status,
                token.origin()
            );
            Broken::last(FailureReason::Unauthorized, message)
        }
        HFError::RevisionNotFound { context, .. } | HFError::RepoNotFound { context, .. } => {
            let code = context.as_ref().and_then(|c| c.error_code.as_deref());
            let message = match code {
                Some("RevisionNotFound") => format!(
                    "the hub's repository `{org}/{repo}` has no commit {revision} (404); correct source.revision"
                ),
                Some("RepoNotFound") => format!(
                    "the hub has no repository `{org}/{repo}` (404), asked {}; correct source.uri",
                    token.origin()
                ),
                _ => format!(
                    "the hub has no repository `{org}/{repo}` with the commit {revision} (404), asked {}; correct \
                     source.uri or source.revision",
                    token.origin()
                ),
            };
            Broken::last(FailureReason::SourceNotFound, message)
        }
        HFError::RateLimited { retry_after, .. } => {
            let message =
                format!("`{folder}`: the hub answered 429: too many requests, asked {}", token.origin());
            match Broken::network(message) {
                Broken::Network { failure, arrived, .. } => Broken::Network { failure, retry_after, arrived },
                last => last,
            }
        }
        HFError::Http { context } => {
            let message = format!("`{folder}`: the hub answered {}", context.status);
            match context.status {
                s if s.is_server_error() || s == StatusCode::REQUEST_TIMEOUT => Broken::network(message),
                _ => Broken::last(FailureReason::SourceUnavailable, message),
            }
        }
        HFError::Request { source, .. } => failed(&folder.to_string(), source),
        other => Broken::last(FailureReason::SourceUnavailable, format!("`{folder}`: {}", chain(&other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(endpoint: &str, cache: &Path) -> Hub {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let endpoint = Url::parse(endpoint).unwrap();
        let hosts = Hosts::new(Vec::new(), endpoint.clone(), true);
        Hub::new(endpoint, Mode::Online, Some(cache.into()), hosts).unwrap()
    }

    fn folder(path: &str) -> HubFolder {
        let [org, repo, revision] = ["a", "b.c", "0123"].map(str::to_owned);
        HubFolder { org, repo, path: path.into(), revision }
    }

    #[test]
    fn a_file_has_one_address_and_one_name() {
        let scratch = tempfile::tempdir().unwrap();
        let (plain, mirror) =
            (hub("https://huggingface.co", scratch.path()), hub("https://mirror.corp/hub/", scratch.path()));
        let url = |hub: &Hub, path: &str| hub.url(&folder(path), "config.json").to_string();
        assert_eq!(url(&plain, ""), "https://huggingface.co/a/b.c/resolve/0123/config.json");
        assert_eq!(
            url(&mirror, "x/y z%"),
            "https://mirror.corp/hub/a/b.c/resolve/0123/x/y%20z%25/config.json"
        );
        assert_eq!(folder("").key("config.json"), "hf://a/b.c/config.json@0123");
        assert_eq!(folder("x").key("config.json"), "hf://a/b.c/x/config.json@0123");
    }

    #[test]
    fn a_cache_is_used_where_it_is_and_not_left() {
        use std::os::unix::fs::symlink;
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("models--a--b.c");
        let snapshot = root.join("snapshots/0123/x");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::create_dir_all(root.join("blobs")).unwrap();
        std::fs::write(root.join("blobs/1"), "{}").unwrap();
        symlink("../../../blobs/1", snapshot.join("config.json")).unwrap();
        symlink(scratch.path(), root.join("snapshots/0123/out")).unwrap();
        let hub = hub("https://huggingface.co", scratch.path());
        let found = hub.cached(&folder("x")).unwrap();
        assert_eq!(found.file("config.json"), Ok(real(&root).unwrap().join("blobs/1")));
        assert_eq!(hub.cached(&folder("out")), None);
        assert_eq!(hub.cached(&folder("none")), None);
    }
}
