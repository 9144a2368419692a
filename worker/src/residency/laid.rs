//! Sources as ordinary folders: found on this machine, or fetched and laid out there. Of a lens that nobody waits for, a
//! look at its weights will do.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use reqwest::Url;
use turret_crds::condition::FailureReason;
use turret_crds::source::Source;

use super::cache::{Cache, Draft};
use super::failure::{Failure, disk_failure};
use super::fetch::{Broken, OnFetch};
use super::hub::{HubFolder, Mode};
use super::remote::{Remote, not_here};
use super::resolve::{Resolver, Wish, base_failure, on_loader_thread};
use super::source::{Folder, Listed, Place};
use super::token::{Audience, Token};
use crate::lens::lora::{LENS_SIDE_FILES, LORA_FILES, files_of_other_kinds};
use crate::model::weights::{BASE_SIDE_FILES, base_files};

/// A blob that was removed before it was linked is fetched again, unless that goes on.
const LINK_ATTEMPTS: usize = 3;

/// A source as an ordinary folder.
pub(super) struct Laid {
    pub(super) folder: Folder,
    /// The folder goes with it, when it is only to be looked at: some of its files are sketches.
    pub(super) sketched: Option<Arc<Draft>>,
}

impl Resolver {
    /// The folder of a source.
    pub(super) async fn lay_out(
        &self,
        source: &Source,
        listed: &Arc<Listed>,
        kind: Kind,
        on_fetch: &OnFetch,
    ) -> Result<Laid, Failure> {
        let (resolver, sought, listed) = (self.clone(), source.clone(), listed.clone());
        // A volume whose server is away makes whoever looks at it wait.
        match on_loader_thread(move || resolver.find(&sought, &listed, kind)).await? {
            Found::Here(folder) => Ok(Laid { folder, sketched: None }),
            Found::Https { url, token } => {
                // Without a digest nobody knows what it is before all of it is here.
                let kind = if source.digest.is_none() { kind.whole() } else { kind };
                self.fetch(&Remote::Https { url, token, on_fetch }, kind).await
            }
            Found::Hub { folder, token } => {
                let names = self.names(&folder, &token).await?;
                self.fetch(&Remote::Hub { hub: &self.hub, folder, names, token, on_fetch }, kind).await
            }
        }
    }

    /// Where a source is: on this machine, perhaps because Hugging Face's own tools left it there, or on a server.
    fn find(&self, source: &Source, listed: &Listed, kind: Kind) -> Result<Found, Failure> {
        let token = |audience: Audience<'_>| self.tokens.find(source.secret_ref.as_ref(), listed, audience);
        match self.roots.locate(source, &listed.volumes)? {
            Place::Folder(folder) => Ok(Found::Here(folder)),
            Place::Https(url) => {
                let host = Url::parse(&url).ok().and_then(|url| url.host_str().map(str::to_owned));
                let token = token(Audience::Server(&host.unwrap_or_default()))?;
                Ok(Found::Https { url, token })
            }
            Place::Hub(folder) => {
                let token = token(Audience::Hub)?;
                match self.hub.cached(&folder).filter(|cached| kind.is_whole(&cached.path)) {
                    Some(cached) => {
                        tracing::debug!(source = %folder, path = %cached.path.display(), "used in place from the Hugging Face cache");
                        Ok(Found::Here(cached))
                    }
                    None => Ok(Found::Hub { folder, token }),
                }
            }
        }
    }

    /// Names of the files of a hub's folder. The hub is asked each time, since the answer also says who may see them;
    /// what it said before counts while it cannot be asked, for those whom it told.
    async fn names(&self, folder: &HubFolder, token: &Token) -> Result<BTreeSet<String>, Failure> {
        let key = folder.to_string();
        if self.hub.mode() == Mode::Offline {
            return self.listed_before(&key, token).await?.ok_or_else(|| not_here(folder, token));
        }
        match self.hub.list(folder, token).await {
            Ok(names) => {
                self.on_cache(token, move |cache, token| {
                    cache.note_listing(&key, &names, token).map_err(|e| disk_failure(&e))?;
                    Ok(names)
                })
                .await
            }
            Err(Broken::Final(failure)) => {
                if failure.reason == FailureReason::Unauthorized {
                    let close = move |cache: &Cache, token: &Token| {
                        cache.close_listing(&key, token).map_err(|e| disk_failure(&e))
                    };
                    if let Err(error) = self.on_cache(token, close).await {
                        tracing::warn!(source = %folder, %error, "failed to note who may not see a folder any more");
                    }
                }
                Err(failure)
            }
            Err(Broken::Network { failure, .. }) => {
                let known = self.listed_before(&key, token).await?.ok_or_else(|| failure.clone())?;
                tracing::warn!(
                    source = key,
                    error = failure.message,
                    "hub not reachable, using what it listed before"
                );
                Ok(known)
            }
        }
    }

    async fn listed_before(&self, key: &str, token: &Token) -> Result<Option<BTreeSet<String>>, Failure> {
        let key = key.to_owned();
        self.on_cache(token, move |cache, token| Ok(cache.listing(&key, token))).await
    }

    async fn on_cache<T: Send + 'static>(
        &self,
        token: &Token,
        work: impl FnOnce(&Cache, &Token) -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let (cache, token) = (self.fetcher.cache().clone(), token.clone());
        on_loader_thread(move || work(&cache, &token)).await
    }

    /// Fetches what a loader reads, or what is enough to check it, and makes it an ordinary folder.
    async fn fetch(&self, remote: &Remote<'_>, kind: Kind) -> Result<Laid, Failure> {
        let cache = self.fetcher.cache().clone();
        let draft = on_loader_thread(move || cache.draft().map_err(|e| disk_failure(&e))).await?;
        let draft = Arc::new(draft);
        match kind {
            Kind::Lens(wish) => {
                for name in LORA_FILES {
                    let is_sketched = wish == Wish::Glimpse
                        && name.ends_with(".safetensors")
                        && self.sketch(remote, name, &draft).await?;
                    if !is_sketched {
                        self.needed(remote, name, &draft).await?;
                    }
                }
                // What makes it more than a LoRA is fetched too, so that it is not taken for one.
                for name in LENS_SIDE_FILES.into_iter().chain(files_of_other_kinds()) {
                    self.take(remote, name, &draft).await?;
                }
            }
            Kind::Base => {
                for name in BASE_SIDE_FILES {
                    if BASE_NEEDED.contains(name) {
                        self.needed(remote, name, &draft).await?;
                    } else {
                        self.take(remote, name, &draft).await?;
                    }
                }
                for name in self.fetch_shard_names(remote, &draft).await? {
                    self.needed(remote, &name, &draft).await?;
                }
            }
        }
        let (cache, source) = (self.fetcher.cache().clone(), remote.to_string());
        on_loader_thread(move || {
            let made = || -> std::io::Result<Laid> {
                let root = cache.root()?;
                let is_whole = draft.sketches().is_empty();
                let path = if is_whole { draft.finish(&source)? } else { draft.path().to_owned() };
                let folder = Folder { path: std::fs::canonicalize(path)?, root };
                Ok(Laid { folder, sketched: (!is_whole).then_some(draft) })
            };
            made().map_err(|e| disk_failure(&e))
        })
        .await
    }

    /// Has a look at a file in the draft of its folder; false when it is to be had whole.
    async fn sketch(&self, remote: &Remote<'_>, name: &str, draft: &Arc<Draft>) -> Result<bool, Failure> {
        let Some(glimpse) = remote.glimpse(&self.fetcher, name, draft.bytes()).await? else {
            return Ok(false);
        };
        let (draft, name) = (draft.clone(), name.to_owned());
        on_loader_thread(move || draft.sketch(&name, &glimpse).map_err(|e| disk_failure(&e))).await?;
        Ok(true)
    }

    /// Has a file of a folder in the draft of it; false when there is none of that name.
    async fn take(&self, remote: &Remote<'_>, name: &str, draft: &Arc<Draft>) -> Result<bool, Failure> {
        for _ in 0..LINK_ATTEMPTS {
            let Some(record) = remote.file(&self.fetcher, name, draft.bytes()).await? else {
                return Ok(false);
            };
            let (draft, name) = (draft.clone(), name.to_owned());
            let linked = on_loader_thread(move || draft.link(&name, &record).map_err(|e| disk_failure(&e)));
            if linked.await? {
                return Ok(true);
            }
        }
        let message = format!(
            "`{name}` of `{remote}` was removed from the disk {LINK_ATTEMPTS} times as soon as it was there, to make room for \
             others; raise spec.memory.diskBudget"
        );
        Err(Failure::new(FailureReason::DiskFull, message))
    }

    async fn needed(&self, remote: &Remote<'_>, name: &str, draft: &Arc<Draft>) -> Result<(), Failure> {
        match self.take(remote, name, draft).await? {
            true => Ok(()),
            false => Err(remote.missing(name)),
        }
    }

    async fn fetch_shard_names(
        &self,
        remote: &Remote<'_>,
        draft: &Arc<Draft>,
    ) -> Result<Vec<String>, Failure> {
        if !self.take(remote, "model.safetensors.index.json", draft).await? {
            return Ok(vec!["model.safetensors".to_owned()]);
        }
        // The index is read by the same code that reads it from a folder.
        let draft = draft.clone();
        let known = on_loader_thread(move || base_files(draft.path()).map_err(|e| base_failure(&e))).await?;
        Ok(known.into_iter().filter(|name| name.ends_with(".safetensors")).collect())
    }
}

/// Files without which there is no base.
const BASE_NEEDED: [&str; 2] = ["config.json", "tokenizer.json"];

/// Where a source was found.
enum Found {
    Here(Folder),
    Https { url: String, token: Token },
    Hub { folder: HubFolder, token: Token },
}

/// What a source is of.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Base,
    Lens(Wish),
}

impl Kind {
    /// The same with all of its files.
    fn whole(self) -> Self {
        match self {
            Self::Base => Self::Base,
            Self::Lens(_) => Self::Lens(Wish::Whole),
        }
    }

    /// Whether all that is needed of it is in a folder.
    fn is_whole(self, folder: &Path) -> bool {
        let is_there = |name: &str| folder.join(name).is_file();
        match self {
            Self::Lens(_) => LORA_FILES.into_iter().all(is_there),
            Self::Base => {
                BASE_NEEDED.into_iter().all(is_there)
                    && base_files(folder).is_ok_and(|names| names.iter().all(|name| is_there(name)))
            }
        }
    }
}
