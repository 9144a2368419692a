//! Command line and environment of `turret-worker`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use turret_crds::label;

use crate::device::DeviceChoice;

/// One base in memory, many lenses over it.
#[derive(Debug, Parser)]
#[command(name = "turret-worker", version, about, propagate_version = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What `turret-worker` can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve model groups over HTTP.
    Serve(Box<ServeArgs>),
    /// Measure the engine on this machine, beside the bandwidth of its memory.
    Bench(crate::bench::BenchArgs),
    /// Print what a folder holds: kind, shapes, bytes in memory, files read and their digest.
    Inspect(crate::inspect::InspectArgs),
    /// Replay a trace of requests against every eviction policy.
    Simulate(crate::eviction::command::SimulateArgs),
    /// Write a base with made-up weights, and lenses over it, to measure with.
    Synth(crate::synth::SynthArgs),
    /// Print every metric of a worker, as it is scraped.
    #[command(hide = true)]
    Metrics,
}

/// Options of `serve`.
#[derive(Clone, Debug, Args)]
#[group(skip)]
pub struct ServeArgs {
    /// A worker document (.json, .json.gz, .yaml), or a folder that holds `document.json.gz`, as a mounted ConfigMap
    /// does. Watched for changes.
    #[arg(long, value_name = "PATH", required_unless_present = "files", conflicts_with = "files")]
    pub config: Option<PathBuf>,
    /// YAML with ModelGroups and, if you like, a ModelPlacement: serves them without a cluster. May be repeated.
    /// Without a placement all groups are served.
    #[arg(short = 'f', long = "file", value_name = "FILE")]
    pub files: Vec<PathBuf>,
    /// Address of the OpenAI-compatible API.
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Address of the control API: documents in, state out.
    #[arg(long, default_value = "127.0.0.1:8081")]
    pub control_listen: SocketAddr,
    /// A token that clients must show as `Authorization: Bearer TOKEN`, beside those the document's keys sign.
    #[arg(long, env = "TURRET_TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    pub token: Option<String>,
    /// The same, read from a file.
    #[arg(long, value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Where fetched files are kept.
    #[arg(long, value_name = "FOLDER", default_value_os_t = default_cache_dir())]
    pub cache_dir: PathBuf,
    /// Folder of a source volume: `pvc://NAME/path` is read below it. May be repeated. Volumes that are not named
    /// are looked for in the volumes folder.
    #[arg(long = "volume", value_name = "NAME=FOLDER", value_parser = parse_volume)]
    pub volumes: Vec<(String, PathBuf)>,
    /// Folder with one folder per source volume.
    #[arg(long, value_name = "FOLDER", default_value = label::VOLUMES_DIR)]
    pub volumes_dir: PathBuf,
    /// Folders, separated by `:`, below which `file://` sources may lie. With -f, default: anywhere; else nowhere.
    #[arg(long, value_name = "FOLDERS", env = label::ENV_FILE_ROOTS)]
    pub file_roots: Option<String>,
    /// Where to compute.
    #[arg(long, env = label::ENV_DEVICE, default_value = "auto")]
    pub device: DeviceChoice,
    /// The accelerator this worker was given.
    #[arg(long, env = label::ENV_ACCELERATOR, hide = true)]
    pub accelerator: Option<String>,
    /// Compute threads. Default: the container's CPU limit.
    #[arg(long, env = label::ENV_THREADS)]
    pub threads: Option<usize>,
    /// Name under which this worker reports. Default: the host's name.
    #[arg(long, env = label::ENV_WORKER_NAME)]
    pub name: Option<String>,
    /// How long running rows may go on after SIGTERM, seconds.
    #[arg(long, env = "TURRET_DRAIN_SECONDS", default_value_t = 120)]
    pub drain_seconds: u64,
    /// Log as JSON, one object per line.
    #[arg(long, env = "TURRET_LOG_JSON")]
    pub log_json: bool,
}

impl ServeArgs {
    /// The folders below which `file://` sources may lie.
    pub fn file_roots(&self) -> Vec<PathBuf> {
        match &self.file_roots {
            Some(roots) => roots.split(':').filter(|r| !r.is_empty()).map(PathBuf::from).collect(),
            None if self.config.is_none() => vec![PathBuf::from("/")],
            None => Vec::new(),
        }
    }

    /// Folders of source volumes by name.
    pub fn volumes(&self) -> BTreeMap<String, PathBuf> {
        self.volumes.iter().cloned().collect()
    }

    /// The static token, if one was given.
    pub fn read_token(&self) -> Result<Option<String>, TokenError> {
        let (token, place) = match (&self.token, &self.token_file) {
            (Some(token), _) => (token.clone(), "--token".to_owned()),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path)
                    .map_err(|source| TokenError::Read { path: path.clone(), source })?;
                (text.trim().to_owned(), path.display().to_string())
            }
            (None, None) => return Ok(None),
        };
        if token.is_empty() { Err(TokenError::Empty(place)) } else { Ok(Some(token)) }
    }
}

/// Why there is no static token although one was asked for.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Its file cannot be read.
    #[error("failed to read the token file `{path}`")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is empty, which everybody could guess.
    #[error("the token given by {0} is empty")]
    Empty(String),
}

fn parse_volume(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((name, folder)) if !name.is_empty() && !folder.is_empty() => Ok((name.into(), folder.into())),
        _ => Err("write NAME=FOLDER".into()),
    }
}

fn default_cache_dir() -> PathBuf {
    if let Some(cache) = std::env::var_os("XDG_CACHE_HOME").filter(|c| !c.is_empty()) {
        return PathBuf::from(cache).join("turret");
    }
    match std::env::var_os("HOME").filter(|h| !h.is_empty()) {
        Some(home) => PathBuf::from(home).join(".cache/turret"),
        None => PathBuf::from(label::CACHE_DIR),
    }
}
