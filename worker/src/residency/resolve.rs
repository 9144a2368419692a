//! From a declared source to something that can be loaded: files found, allowed, hashed, their headers checked.
//!
//! Runs on loader threads; reads headers and digests, never weights into memory.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reqwest::Url;
use turret_crds::condition::FailureReason;
use turret_crds::document::{DocumentBase, DocumentLens};
use turret_crds::group;
use turret_crds::source::{Source, files_digest};

use super::cache::{Cache, Draft};
use super::failure::{Failure, disk_failure};
use super::fetch::{Broken, Fetcher, OnFetch};
use super::files::{FileIdentity, Hasher};
use super::hub::{Hub, HubFolder, Mode};
use super::prepared::{Identity, layout_digest};
use super::remote::{Remote, not_here};
use super::source::{Folder, Listed, Place, Roots, io_failure};
use super::token::{Audience, Token, Tokens};
use crate::lens::lora::{LENS_SIDE_FILES, LORA_FILES, LoraFolder, files_of_other_kinds, lora_files};
use crate::lens::{LensError, LensFailure};
use crate::model::config::ModelConfig;
use crate::model::tensor_file::TensorFileError;
use crate::model::tokenizer::Tokenizer;
use crate::model::weights::{
    BASE_SIDE_FILES, BaseError, BaseFolder, BaseLayout, Dtype, Quantization, base_files,
};
use crate::telemetry::chain;

/// A blob that was removed before it was linked is fetched again, unless that goes on.
const LINK_ATTEMPTS: usize = 3;

/// What is needed to find sources.
#[derive(Clone, Debug)]
pub struct Resolver {
    /// Where sources may lie.
    pub roots: Arc<Roots>,
    /// Remembers digests.
    pub hasher: Arc<Hasher>,
    /// Fetches files from servers.
    pub fetcher: Fetcher,
    /// Knows what a hub has.
    pub hub: Hub,
    /// What servers are shown.
    pub tokens: Arc<Tokens>,
}

/// Files as they were when they were checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckedFiles {
    /// The folder.
    pub folder: PathBuf,
    /// `sha256:…` over the files.
    pub digest: String,
    /// Bytes of the files.
    pub bytes: u64,
    files: Vec<(String, FileIdentity)>,
}

impl CheckedFiles {
    /// Whether the files are still those that were checked.
    pub fn are_unchanged(&self) -> bool {
        self.files.iter().all(|(name, identity)| {
            FileIdentity::at(&self.folder.join(name)).is_ok_and(|now| now == *identity)
        })
    }
}

/// A base that can be loaded.
#[derive(Clone, Debug)]
pub struct ResolvedBase {
    /// Its files.
    pub files: CheckedFiles,
    /// Its architecture.
    pub config: Arc<ModelConfig>,
    /// Where everything of it will be in memory.
    pub layout: Arc<BaseLayout>,
    /// Its tokenizer and chat template.
    pub tokenizer: Tokenizer,
    /// Number format in memory, when one is declared.
    pub dtype: Option<Dtype>,
}

impl ResolvedBase {
    /// What its weights are prepared as.
    pub fn identity(&self) -> Identity {
        Identity::of_base(&self.files.digest, self.layout.dtype, self.layout.quantization)
    }

    /// Longest sequence over it where `limit` is configured.
    pub fn context_tokens(&self, limit: u32) -> u32 {
        limit.min(u32::try_from(self.config.max_position_embeddings).unwrap_or(u32::MAX))
    }
}

/// A lens that can be loaded.
#[derive(Clone, Debug)]
pub struct ResolvedLens {
    /// Its files.
    pub files: CheckedFiles,
    /// Bytes in device memory.
    pub bytes: u64,
    /// Digest of where everything of it will be in memory.
    pub layout_digest: String,
    /// The tokenizer and chat template that it brings in place of the base's.
    pub tokenizer: Option<Tokenizer>,
}

#[cfg(test)]
impl ResolvedLens {
    /// One that only has a digest.
    pub(super) fn of_digest(digest: &str) -> Self {
        let files =
            CheckedFiles { folder: PathBuf::from("/"), digest: digest.into(), bytes: 1, files: Vec::new() };
        Self { files, bytes: 1, layout_digest: String::new(), tokenizer: None }
    }
}

/// The declared number format as the engine calls it.
pub fn engine_dtype(dtype: group::Dtype) -> Dtype {
    match dtype {
        group::Dtype::F32 => Dtype::F32,
        group::Dtype::F16 => Dtype::F16,
        group::Dtype::BF16 => Dtype::BF16,
    }
}

/// The same for what is done to the matrices.
pub fn engine_quantization(quantization: group::Quantization) -> Quantization {
    match quantization {
        group::Quantization::None => Quantization::None,
        group::Quantization::Q8_0 => Quantization::Q8_0,
    }
}

impl Resolver {
    /// Resolves a base.
    pub async fn base(
        &self,
        base: DocumentBase,
        listed: Arc<Listed>,
        on_fetch: OnFetch,
    ) -> Result<ResolvedBase, Failure> {
        let folder = self.folder(&base.source, &listed, Kind::Base, &on_fetch).await?;
        let resolver = self.clone();
        on_loader_thread(move || resolver.check_base(&base, &folder)).await
    }

    /// Resolves a lens over a base.
    pub async fn lens(
        &self,
        lens: DocumentLens,
        listed: Arc<Listed>,
        base: Arc<ResolvedBase>,
        on_fetch: OnFetch,
    ) -> Result<ResolvedLens, Failure> {
        let folder = self.folder(&lens.source, &listed, Kind::Lens, &on_fetch).await?;
        let resolver = self.clone();
        on_loader_thread(move || resolver.check_lens(&lens, &folder, &base)).await
    }

    async fn folder(
        &self,
        source: &Source,
        listed: &Arc<Listed>,
        kind: Kind,
        on_fetch: &OnFetch,
    ) -> Result<Folder, Failure> {
        let (resolver, source, listed) = (self.clone(), source.clone(), listed.clone());
        // A volume whose server is away makes whoever looks at it wait.
        match on_loader_thread(move || resolver.find(&source, &listed, kind)).await? {
            Found::Here(folder) => Ok(folder),
            Found::Https { url, token } => self.fetch(&Remote::Https { url, token, on_fetch }, kind).await,
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

    /// Fetches what a loader reads, and makes it an ordinary folder.
    async fn fetch(&self, remote: &Remote<'_>, kind: Kind) -> Result<Folder, Failure> {
        let cache = self.fetcher.cache().clone();
        let draft = on_loader_thread(move || cache.draft().map_err(|e| disk_failure(&e))).await?;
        let draft = Arc::new(draft);
        match kind {
            Kind::Lens => {
                for name in LORA_FILES {
                    self.needed(remote, name, &draft).await?;
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
            let made = || -> std::io::Result<Folder> {
                let root = cache.root()?;
                let path = std::fs::canonicalize(draft.finish(&source)?)?;
                Ok(Folder { path, root })
            };
            made().map_err(|e| disk_failure(&e))
        })
        .await
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

    fn check_base(&self, base: &DocumentBase, folder: &Folder) -> Result<ResolvedBase, Failure> {
        let names = base_files(&folder.path).map_err(|e| base_failure(&e))?;
        let dtype = base.dtype.map(engine_dtype);
        folder.file("config.json")?;
        let opened = BaseFolder::open(&folder.path, dtype)
            .map_err(|e| base_failure(&e))?
            .quantized(engine_quantization(base.quantization));
        let tokenizer = Tokenizer::open(&folder.path, opened.config())
            .map_err(|e| Failure::new(FailureReason::Malformed, chain(&e)))?;
        let files = self.check_files(folder, names, &base.source, "spec.base.source.digest")?;
        let (config, layout) = (opened.config().clone(), Arc::new(opened.layout().clone()));
        Ok(ResolvedBase { files, config, layout, tokenizer, dtype })
    }

    fn check_lens(
        &self,
        lens: &DocumentLens,
        folder: &Folder,
        base: &ResolvedBase,
    ) -> Result<ResolvedLens, Failure> {
        let names = lora_files(&folder.path);
        for name in &names {
            folder.file(name)?;
        }
        let declared = format!("spec.lenses[{}].source.digest", lens.name);
        // A truncated file has another digest too; what is wrong with it is the more helpful answer.
        let opened = LoraFolder::open(&folder.path, &base.layout).map_err(|e| lens_failure(&e))?;
        let tokenizer = opened.tokenizer(&base.tokenizer).map_err(|e| lens_failure(&e))?;
        let files = self.check_files(folder, names, &lens.source, &declared)?;
        let layout = serde_json::to_string(opened.layout()).expect("a layout is JSON");
        Ok(ResolvedLens {
            files,
            bytes: opened.layout().bytes,
            layout_digest: layout_digest(&layout),
            tokenizer,
        })
    }

    fn check_files(
        &self,
        folder: &Folder,
        names: Vec<String>,
        source: &Source,
        field: &str,
    ) -> Result<CheckedFiles, Failure> {
        let mut files = Vec::new();
        let mut digests = Vec::new();
        for name in names {
            let path = folder.file(&name)?;
            let (identity, digest) = self
                .hasher
                .sha256(&path)
                .map_err(|e| io_failure(&e, &format!("failed to read `{}`", path.display())))?;
            files.push((name.clone(), identity));
            digests.push((name, digest));
        }
        let digest = files_digest(digests.iter().map(|(n, d)| (n.as_str(), d.as_str())));
        if let Some(declared) = &source.digest
            && *declared != digest
        {
            let message = format!(
                "the files in `{}` have digest {digest}, declared is {declared}; correct {field} or the files",
                source.uri
            );
            return Err(Failure::new(FailureReason::DigestMismatch, message));
        }
        let bytes = files.iter().map(|(_, identity)| identity.size).sum();
        Ok(CheckedFiles { folder: folder.path.clone(), digest, bytes, files })
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

#[derive(Clone, Copy)]
enum Kind {
    Base,
    Lens,
}

impl Kind {
    /// Whether all that is needed of it is in a folder.
    fn is_whole(self, folder: &Path) -> bool {
        let is_there = |name: &str| folder.join(name).is_file();
        match self {
            Self::Lens => LORA_FILES.into_iter().all(is_there),
            Self::Base => {
                BASE_NEEDED.into_iter().all(is_there)
                    && base_files(folder).is_ok_and(|names| names.iter().all(|name| is_there(name)))
            }
        }
    }
}

/// A file as `inspect` tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HashedFile {
    /// Its name in the folder.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// SHA-256 of its content, hex.
    pub sha256: String,
}

/// Digest and files of a folder, for `inspect`.
pub fn digest_of(folder: &Path, names: &[String]) -> std::io::Result<(String, Vec<HashedFile>)> {
    let hasher = Hasher::default();
    let mut files = Vec::new();
    for name in names {
        let (identity, sha256) = hasher.sha256(&folder.join(name))?;
        files.push(HashedFile { name: name.clone(), bytes: identity.size, sha256 });
    }
    let digest = files_digest(files.iter().map(|f| (f.name.as_str(), f.sha256.as_str())));
    Ok((digest, files))
}

/// Runs blocking work where it may block, and turns a panic of it into a failure.
pub async fn on_loader_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => {
            Err(Failure::new(FailureReason::Internal, format!("a loader thread ended early: {error}")))
        }
    }
}

/// Why a base cannot be used, in the words of the contract.
pub fn base_failure(error: &BaseError) -> Failure {
    let reason = match error {
        BaseError::Io { source, .. } => return io_failure(source, &error.to_string()),
        BaseError::File(file) => tensor_file_reason(file),
        BaseError::Config(crate::model::config::ConfigError::Unsupported { .. })
        | BaseError::UnexpectedTensor(_)
        | BaseError::TooLarge { .. } => FailureReason::UnsupportedTensors,
        BaseError::Config(_)
        | BaseError::Index { .. }
        | BaseError::MissingTensor(_)
        | BaseError::Shape { .. } => FailureReason::Malformed,
    };
    Failure::new(reason, chain(error))
}

fn tensor_file_reason(error: &TensorFileError) -> FailureReason {
    match error {
        TensorFileError::Io { source, .. } => io_failure(source, "").reason,
        TensorFileError::Dtype { .. } => FailureReason::UnsupportedTensors,
        TensorFileError::Truncated { .. }
        | TensorFileError::Malformed { .. }
        | TensorFileError::NotFinite { .. } => FailureReason::Malformed,
        TensorFileError::Cancelled => FailureReason::Internal,
    }
}

/// Why a lens cannot be used, in the words of the contract.
pub fn lens_failure(error: &LensError) -> Failure {
    let reason = match error.failure() {
        LensFailure::BaseMismatch => FailureReason::BaseMismatch,
        LensFailure::UnsupportedTensors => FailureReason::UnsupportedTensors,
        LensFailure::Truncated | LensFailure::Malformed => FailureReason::Malformed,
        LensFailure::Unreadable => match error {
            LensError::Io { source, .. } | LensError::File(TensorFileError::Io { source, .. }) => {
                io_failure(source, "").reason
            }
            _ => FailureReason::SourceUnavailable,
        },
        LensFailure::Cancelled => FailureReason::Internal,
    };
    Failure::new(reason, chain(error))
}
