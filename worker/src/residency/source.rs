//! Where a source may lie: below a root for `file://`, on a listed and mounted volume for `pvc://`, on a server or a hub.
//! Nothing, not even a symbolic link, leads out of its root.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use turret_crds::WorkerDocument;
use turret_crds::condition::FailureReason;
use turret_crds::host_pattern::HostPattern;
use turret_crds::source::{Source, SourceLocation};

use super::failure::Failure;
use super::hub::HubFolder;

/// What the placement lists.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// Volumes.
    pub volumes: Vec<String>,
    /// Secrets.
    pub secrets: Vec<String>,
    /// By Secret: the servers of `https://` sources that its token is shown to.
    pub secret_hosts: BTreeMap<String, Vec<HostPattern>>,
}

impl Listed {
    /// What a document's placement lists.
    pub fn of(document: &WorkerDocument) -> Self {
        let hosts = |hosts: &Vec<String>| hosts.iter().filter_map(|host| host.parse().ok()).collect();
        let by_secret = document.source_secret_hosts.iter();
        Self {
            volumes: document.source_volumes.clone(),
            secrets: document.source_secrets.clone(),
            // What is no pattern names no host, and so opens nothing.
            secret_hosts: by_secret.map(|(name, named)| (name.clone(), hosts(named))).collect(),
        }
    }
}

/// What this worker may read.
#[derive(Clone, Debug, Default)]
pub struct Roots {
    /// Folders below which `file://` sources may lie.
    pub file_roots: Vec<PathBuf>,
    /// Folders of volumes that were given by name.
    pub volumes: BTreeMap<String, PathBuf>,
    /// Folder with one folder per other volume.
    pub volumes_dir: PathBuf,
}

/// Where a source's files are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a folder of the file system.
    Folder(Folder),
    /// On an HTTPS server, as a URL without trailing slash.
    Https(String),
    /// In a repository on a hub.
    Hub(HubFolder),
}

/// A folder and the root that its files may not leave. Both without symbolic links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    /// The folder.
    pub path: PathBuf,
    /// The root.
    pub root: PathBuf,
}

impl Roots {
    /// Finds the place of a source. `listed` are the volumes that the document lists.
    pub fn locate(&self, source: &Source, listed: &[String]) -> Result<Place, Failure> {
        let location =
            source.location().map_err(|e| Failure::new(FailureReason::NotAllowed, e.to_string()))?;
        match location {
            SourceLocation::Https { url } => Ok(Place::Https(url.to_owned())),
            SourceLocation::Hub { org, repo, path, revision } => {
                let [org, repo, path, revision] = [org, repo, path, revision].map(str::to_owned);
                Ok(Place::Hub(HubFolder { org, repo, path, revision }))
            }
            SourceLocation::File { path } => self.file(source, Path::new(path)),
            SourceLocation::Volume { volume, path } => self.volume(source, volume, path, listed),
        }
    }

    fn file(&self, source: &Source, path: &Path) -> Result<Place, Failure> {
        let Some(root) = self.file_roots.iter().find(|root| path.starts_with(root)) else {
            let allowed: Vec<String> = self.file_roots.iter().map(|r| r.display().to_string()).collect();
            let message = match allowed.is_empty() {
                true => format!(
                    "`{}` is refused: this worker reads no file:// sources; use a volume, or give it roots with \
                     TURRET_FILE_ROOTS",
                    source.uri
                ),
                false => format!(
                    "`{}` is refused: file:// sources must lie below {}",
                    source.uri,
                    allowed.join(" or ")
                ),
            };
            return Err(Failure::new(FailureReason::NotAllowed, message));
        };
        folder_below(root, path, &source.uri)
    }

    fn volume(&self, source: &Source, volume: &str, path: &str, listed: &[String]) -> Result<Place, Failure> {
        let given = self.volumes.get(volume);
        if given.is_none() && !listed.iter().any(|l| l == volume) {
            let message = format!(
                "`{}` is on the volume `{volume}`, which the placement does not list; add it to spec.sourceVolumes",
                source.uri
            );
            return Err(Failure::new(FailureReason::VolumeNotMounted, message));
        }
        let root = given.cloned().unwrap_or_else(|| self.volumes_dir.join(volume));
        if !root.is_dir() {
            let message = format!("the volume `{volume}` of `{}` is not mounted in this worker", source.uri);
            return Err(Failure::new(FailureReason::VolumeNotMounted, message));
        }
        folder_below(&root, &root.join(path), &source.uri)
    }
}

fn folder_below(root: &Path, path: &Path, uri: &str) -> Result<Place, Failure> {
    let real = |path: &Path| {
        std::fs::canonicalize(path).map_err(|e| io_failure(&e, &format!("failed to find `{uri}`")))
    };
    let (root, path) = (real(root)?, real(path)?);
    if !path.starts_with(&root) {
        return Err(escapes(uri));
    }
    if !path.is_dir() {
        let message = format!("`{uri}` is a file; a source is the folder that holds the files");
        return Err(Failure::new(FailureReason::SourceNotFound, message));
    }
    Ok(Place::Folder(Folder { path, root }))
}

fn escapes(what: &str) -> Failure {
    Failure::new(FailureReason::NotAllowed, format!("`{what}` leads out of its root by a symbolic link"))
}

impl Folder {
    /// The real path of a file in the folder, if it is there; refused when a link leads out of the root.
    pub fn file(&self, name: &str) -> Result<PathBuf, Failure> {
        let path = self.path.join(name);
        let real = std::fs::canonicalize(&path)
            .map_err(|e| io_failure(&e, &format!("failed to find `{}`", path.display())))?;
        if !real.starts_with(&self.root) {
            return Err(escapes(&path.display().to_string()));
        }
        Ok(real)
    }
}

/// A failed file operation as a failure of the artifact.
pub fn io_failure(error: &io::Error, what: &str) -> Failure {
    let reason = match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory => {
            FailureReason::SourceNotFound
        }
        io::ErrorKind::PermissionDenied => FailureReason::Unauthorized,
        _ => FailureReason::SourceUnavailable,
    };
    Failure::new(reason, format!("{what}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn source(uri: &str) -> Source {
        Source { uri: uri.into(), ..Source::default() }
    }

    #[test]
    fn nothing_leaves_its_root() {
        let base = tempfile::tempdir().unwrap();
        let path = |p: &str| base.path().canonicalize().unwrap().join(p);
        for folder in ["root/a", "volumes/v/x", "secret"] {
            std::fs::create_dir_all(path(folder)).unwrap();
        }
        std::fs::write(path("secret/config.json"), "{}").unwrap();
        std::fs::write(path("root/a/own"), "{}").unwrap();
        symlink(path("secret"), path("root/out")).unwrap();
        symlink(path("secret/config.json"), path("root/a/config.json")).unwrap();
        symlink(path("root/a"), path("root/inside")).unwrap();
        let roots =
            Roots { file_roots: vec![path("root")], volumes: BTreeMap::new(), volumes_dir: path("volumes") };
        let listed = ["v".to_owned(), "w".to_owned()];
        let reason = |uri: &str| roots.locate(&source(uri), &listed).map_err(|f| f.reason);
        let uri = |p: &str| format!("file://{}", path(p).display());
        let at = |p: &str, root: &str| Ok(Place::Folder(Folder { path: path(p), root: path(root) }));
        assert_eq!(reason(&uri("root/a")), at("root/a", "root"));
        assert_eq!(reason(&uri("root/inside")), at("root/a", "root"));
        assert_eq!(reason("pvc://v/x"), at("volumes/v/x", "volumes/v"));
        assert_eq!(reason(&uri("root/out")), Err(FailureReason::NotAllowed));
        assert_eq!(reason(&uri("secret")), Err(FailureReason::NotAllowed));
        assert_eq!(reason(&uri("root/missing")), Err(FailureReason::SourceNotFound));
        assert_eq!(reason("pvc://w/x"), Err(FailureReason::VolumeNotMounted), "listed, but not mounted");
        assert_eq!(reason("pvc://unlisted/x"), Err(FailureReason::VolumeNotMounted));
        let folder = Folder { path: path("root/a"), root: path("root") };
        assert_eq!(folder.file("own"), Ok(path("root/a/own")));
        assert_eq!(folder.file("config.json").unwrap_err().reason, FailureReason::NotAllowed);
        assert_eq!(folder.file("none").unwrap_err().reason, FailureReason::SourceNotFound);
    }
}
