//! From a declared source to something that can be loaded: files found, allowed, hashed, their headers checked.
//!
//! Runs on loader threads; reads headers and digests, never weights into memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use turret_crds::condition::FailureReason;
use turret_crds::document::{DocumentBase, DocumentLens};
use turret_crds::group;
use turret_crds::source::{Source, files_digest};

use super::failure::Failure;
use super::fetch::{Fetcher, OnFetch};
use super::files::{FileIdentity, Hasher};
use super::hub::Hub;
use super::laid::{Kind, Laid};
use super::prepared::{Identity, layout_digest};
use super::source::{Folder, Listed, Roots, io_failure};
use super::token::Tokens;
use crate::lens::lora::{LoraFolder, lora_files};
use crate::lens::{LensError, LensFailure};
use crate::model::config::ModelConfig;
use crate::model::tensor_file::TensorFileError;
use crate::model::tokenizer::Tokenizer;
use crate::model::weights::{BaseError, BaseFolder, BaseLayout, Dtype, Quantization, base_files};
use crate::telemetry::chain;

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

/// How much of a lens is wanted on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Wish {
    /// Enough to know that it can be served.
    Glimpse,
    /// All of its files.
    Whole,
}

/// Where the files of a lens are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LensFiles {
    /// On this machine.
    Here(CheckedFiles),
    /// At their source. What is known of them was read from their headers, or when they were here.
    Remote {
        /// `sha256:…` over the files.
        digest: String,
        /// Bytes of the files.
        bytes: u64,
        /// Whether only the declaration says what they are. Whoever declares somebody else's digest must not be given that
        /// one's files: these are not taken for any others before they were fetched.
        is_claim: bool,
    },
}

impl LensFiles {
    /// `sha256:…` over the files.
    pub fn digest(&self) -> &str {
        match self {
            Self::Here(files) => &files.digest,
            Self::Remote { digest, .. } => digest,
        }
    }

    /// The files, if they are on this machine.
    pub fn here(&self) -> Option<&CheckedFiles> {
        match self {
            Self::Here(files) => Some(files),
            Self::Remote { .. } => None,
        }
    }
}

/// A lens that can be served: loaded, perhaps after its files were fetched.
#[derive(Clone, Debug)]
pub struct ResolvedLens {
    /// Its files.
    pub files: LensFiles,
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
        Self { files: LensFiles::Here(files), bytes: 1, layout_digest: String::new(), tokenizer: None }
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
        let laid = self.lay_out(&base.source, &listed, Kind::Base, &on_fetch).await?;
        let resolver = self.clone();
        on_loader_thread(move || resolver.check_base(&base, &laid.folder)).await
    }

    /// Resolves a lens over a base. Its files may be here even if no more than a glimpse was wished for.
    pub async fn lens(
        &self,
        (lens, wish): (DocumentLens, Wish),
        listed: Arc<Listed>,
        base: Arc<ResolvedBase>,
        on_fetch: OnFetch,
    ) -> Result<ResolvedLens, Failure> {
        let laid = self.lay_out(&lens.source, &listed, Kind::Lens(wish), &on_fetch).await?;
        let resolver = self.clone();
        on_loader_thread(move || resolver.check_lens(&lens, &laid, &base)).await
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
        Laid { folder, sketched }: &Laid,
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
        let files = match sketched {
            None => LensFiles::Here(self.check_files(folder, names, &lens.source, &declared)?),
            Some(draft) => {
                let (digest, bytes) = self.hash_sketches(folder, &names, &draft.sketches())?;
                // Where nobody names a file, what is declared is compared with it when it is here.
                let is_claim = digest.is_none();
                let digest = digest.or_else(|| lens.source.digest.clone());
                let digest = digest.expect("a file that nobody names is fetched where no digest is declared");
                check_digest(&digest, &lens.source, &declared)?;
                LensFiles::Remote { digest, bytes, is_claim }
            }
        };
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
            let (identity, digest) = self.hash(folder, &name)?;
            files.push((name.clone(), identity));
            digests.push((name, digest));
        }
        let digest = files_digest(digests.iter().map(|(n, d)| (n.as_str(), d.as_str())));
        check_digest(&digest, source, field)?;
        let bytes = files.iter().map(|(_, identity)| identity.size).sum();
        Ok(CheckedFiles { folder: folder.path.clone(), digest, bytes, files })
    }

    /// Digest and bytes of files of which some are not here, by what their servers say of those. No digest when they say too
    /// little.
    fn hash_sketches(
        &self,
        folder: &Folder,
        names: &[String],
        sketches: &BTreeMap<String, Option<String>>,
    ) -> Result<(Option<String>, u64), Failure> {
        let mut bytes = 0;
        let mut digests = Vec::new();
        for name in names {
            let (identity, digest) = match sketches.get(name) {
                Some(named) => (self.identity(folder, name)?, named.clone()),
                None => self.hash(folder, name).map(|(identity, digest)| (identity, Some(digest)))?,
            };
            // A sketch is as long as its file.
            bytes += identity.size;
            digests.extend(digest.map(|digest| (name.as_str(), digest)));
        }
        let digest = files_digest(digests.iter().map(|(name, digest)| (*name, digest.as_str())));
        Ok(((digests.len() == names.len()).then_some(digest), bytes))
    }

    fn identity(&self, folder: &Folder, name: &str) -> Result<FileIdentity, Failure> {
        let path = folder.file(name)?;
        let found = FileIdentity::at(&path);
        found.map_err(|e| io_failure(&e, &format!("failed to read `{}`", path.display())))
    }

    fn hash(&self, folder: &Folder, name: &str) -> Result<(FileIdentity, String), Failure> {
        let path = folder.file(name)?;
        let hashed = self.hasher.sha256(&path);
        hashed.map_err(|e| io_failure(&e, &format!("failed to read `{}`", path.display())))
    }
}

/// Refuses files that are not those which are declared.
fn check_digest(digest: &str, source: &Source, field: &str) -> Result<(), Failure> {
    match &source.digest {
        Some(declared) if declared != digest => {
            let message = format!(
                "the files in `{}` have digest {digest}, declared is {declared}; correct {field} or the files",
                source.uri
            );
            Err(Failure::new(FailureReason::DigestMismatch, message))
        }
        _ => Ok(()),
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
