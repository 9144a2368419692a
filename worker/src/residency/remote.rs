//! A folder of files on a server: which there are, and where each is asked for.

use std::collections::BTreeSet;
use std::fmt;

use reqwest::Url;
use turret_crds::condition::FailureReason;

use super::cache::{Glimpse, UrlRecord};
use super::failure::Failure;
use super::fetch::{Content, Fetcher, OnFetch, Wanted};
use super::hub::{Hub, HubFolder, Mode};
use super::token::Token;

/// A folder on a server.
pub enum Remote<'a> {
    /// Below a URL; which files there are is found out by asking for them.
    Https {
        /// Without trailing slash.
        url: String,
        /// What its server is shown.
        token: Token,
        /// Told how far its files are.
        on_fetch: &'a OnFetch,
    },
    /// Of a hub's repository.
    Hub {
        /// The hub.
        hub: &'a Hub,
        /// The folder.
        folder: HubFolder,
        /// What is in it.
        names: BTreeSet<String>,
        /// What the hub is shown.
        token: Token,
        /// Told how far its files are.
        on_fetch: &'a OnFetch,
    },
}

impl fmt::Display for Remote<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Https { url, .. } => f.write_str(url),
            Self::Hub { folder, .. } => write!(f, "{folder}"),
        }
    }
}

impl Remote<'_> {
    /// A file of the folder; `None` when there is none of that name. `beside` are the bytes that are there of the others.
    pub async fn file(
        &self,
        fetcher: &Fetcher,
        name: &str,
        beside: u64,
    ) -> Result<Option<UrlRecord>, Failure> {
        match self {
            Self::Https { .. } => fetcher.file(&self.wanted(name, beside)?).await,
            Self::Hub { names, .. } if !names.contains(name) => Ok(None),
            Self::Hub { hub, folder, token, .. } if hub.mode() == Mode::Offline => {
                let known = fetcher.known(&folder.key(name)).await?;
                let known = known.filter(|known| known.readers.has(token));
                known.map(Some).ok_or_else(|| not_here(folder, token))
            }
            Self::Hub { .. } => {
                let found = fetcher.file(&self.wanted(name, beside)?).await?;
                // What is listed is there, or the hub contradicts itself.
                found.map(Some).ok_or_else(|| self.missing(name))
            }
        }
    }

    /// A look at a safetensors file of the folder; `None` when it is to be had whole.
    pub async fn glimpse(
        &self,
        fetcher: &Fetcher,
        name: &str,
        beside: u64,
    ) -> Result<Option<Glimpse>, Failure> {
        match self {
            Self::Hub { hub, names, .. } if hub.mode() == Mode::Offline || !names.contains(name) => Ok(None),
            _ => fetcher.glimpse(&self.wanted(name, beside)?).await,
        }
    }

    fn wanted<'b>(&'b self, name: &'b str, beside: u64) -> Result<Wanted<'b>, Failure> {
        match self {
            Self::Https { url, token, on_fetch } => {
                let key = format!("{url}/{name}");
                let url = Url::parse(&key).map_err(|error| {
                    Failure::new(FailureReason::NotAllowed, format!("`{key}` is no URL: {error}"))
                })?;
                if !url.username().is_empty() || url.password().is_some() {
                    // What a source's URI says is shown to everybody.
                    let host = url.host_str().unwrap_or_default();
                    let message =
                        format!("the source at {host} has a user or a password in its uri; use secretRef");
                    return Err(Failure::new(FailureReason::NotAllowed, message));
                }
                Ok(Wanted { key, url, name, token, content: Content::Changing, beside, on_fetch })
            }
            Self::Hub { hub, folder, token, on_fetch, .. } => {
                let (key, url) = (folder.key(name), hub.url(folder, name));
                let content = Content::OfCommit(&folder.revision);
                Ok(Wanted { key, url, name, token, content, beside, on_fetch })
            }
        }
    }

    /// A file that is needed is not there.
    pub fn missing(&self, name: &str) -> Failure {
        let message = match self {
            Self::Https { url, .. } => format!("`{url}` has no `{name}` (404)"),
            Self::Hub { folder, names, .. } if names.is_empty() && !folder.path.is_empty() => {
                let HubFolder { org, repo, path, revision } = folder;
                format!("the hub's repository `{org}/{repo}` has no folder `{path}` at the commit {revision}")
            }
            Self::Hub { folder, .. } => format!("`{folder}` has no `{name}`"),
        };
        Failure::new(FailureReason::SourceNotFound, message)
    }
}

/// The hub may not be asked, and what is needed is not on this machine.
pub fn not_here(folder: &HubFolder, token: &Token) -> Failure {
    let message = format!(
        "`{folder}` is not on this machine whole, neither in the Hugging Face cache nor, for those who ask {}, in the \
         worker's, and HF_HUB_OFFLINE keeps the hub from being asked",
        token.origin()
    );
    Failure::new(FailureReason::SourceUnavailable, message)
}
