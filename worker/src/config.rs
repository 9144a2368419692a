//! Command line and environment of `turret-worker`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use clap::builder::FalseyValueParser;
use clap::{Args, Parser, Subcommand};
use reqwest::Url;
use turret_crds::host_pattern::{DEFAULT_SOURCE_HOSTS, HostPattern};
use turret_crds::label;

use crate::device::DeviceChoice;
use crate::residency::hosts::{ClientError, Hosts};
use crate::residency::hub::{DEFAULT_ENDPOINT, Hub, Mode};
use crate::residency::token::{Own, Tokens};

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
    /// Ask a worker what it holds, and have it load, keep, evict, switch or drain by hand.
    Control(crate::control::ControlArgs),
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
    /// Folder with one folder per Secret that a source's `secretRef` names, each with a file `token`. Read whenever a
    /// token is needed.
    #[arg(long, value_name = "FOLDER", default_value = label::SECRETS_DIR)]
    pub secrets_dir: PathBuf,
    /// File with the token of a Secret, which then need not be listed in `sourceSecrets`. May be repeated.
    #[arg(long = "secret", value_name = "NAME=FILE", value_parser = parse_secret)]
    pub secrets: Vec<(String, PathBuf)>,
    /// Hosts that `https://` and `hf://` sources may be fetched from, separated by commas: a name
    /// (`models.example.org`), names below one (`*.example.org`), an address or network (`10.1.0.0/16`), `hub` for the hub
    /// and the hosts it stores files on, `public` for every name with a public address. What only `hub` or `public`
    /// allows never leads to a private, link-local or loopback address.
    #[arg(long, value_name = "HOSTS", value_delimiter = ',', default_value = DEFAULT_SOURCE_HOSTS)]
    pub allowed_source_hosts: Vec<HostPattern>,
    /// The hub of `hf://` sources. One that is given may have a private address. Default: https://huggingface.co
    #[arg(long, value_name = "URL", env = "HF_ENDPOINT")]
    pub hub_endpoint: Option<String>,
    /// Never ask the hub: `hf://` sources are served from the Hugging Face cache and from what was fetched before.
    #[arg(long, env = "HF_HUB_OFFLINE", value_parser = FalseyValueParser::new())]
    pub hub_offline: bool,
    /// A cache of Hugging Face's own tools, used in place and never written to. Default: `hub` below `HF_HOME`, which is
    /// `~/.cache/huggingface`
    #[arg(long, value_name = "FOLDER", env = "HF_HUB_CACHE")]
    pub hub_cache: Option<PathBuf>,
    /// Token for the hub where a source names no Secret. Default: that of `hf auth login`
    #[arg(long, value_name = "TOKEN", env = "HF_TOKEN", hide_env_values = true)]
    pub hub_token: Option<String>,
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

    /// Where tokens of sources are.
    pub fn tokens(&self) -> Tokens {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let file = || match variable("HF_TOKEN_PATH") {
            Some(path) => path.into(),
            None => hf_hub::hf_home().join("token"),
        };
        let own = match variable("HF_HUB_DISABLE_IMPLICIT_TOKEN") {
            Some(_) => Own::default(),
            None => Own { given: self.hub_token.clone(), file: Some(file()) },
        };
        Tokens { secrets_dir: self.secrets_dir.clone(), files: self.secrets.iter().cloned().collect(), own }
    }

    /// The hub of `hf://` sources, and which hosts may be asked for files.
    pub fn hub(&self) -> Result<(Hub, Hosts), HubError> {
        let given = self.hub_endpoint.as_deref().map(str::trim).filter(|e| !e.is_empty());
        let text = given.unwrap_or(DEFAULT_ENDPOINT);
        let endpoint = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
        let endpoint = endpoint.ok_or_else(|| HubError::Endpoint(text.into()))?;
        let hosts = Hosts::new(self.allowed_source_hosts.clone(), endpoint.clone(), given.is_some());
        let mode = if self.hub_offline { Mode::Offline } else { Mode::Online };
        let cache = self.hub_cache.clone().filter(|cache| !cache.as_os_str().is_empty());
        Ok((Hub::new(endpoint, mode, cache, hosts.clone())?, hosts))
    }

    /// The static token, if one was given.
    pub fn read_token(&self) -> Result<Option<String>, TokenError> {
        static_token(self.token.as_deref(), self.token_file.as_deref())
    }
}

/// A static token that was given as it is, or in a file.
///
/// # Errors
/// When the file cannot be read, or there is nothing in it.
pub fn static_token(token: Option<&str>, file: Option<&Path>) -> Result<Option<String>, TokenError> {
    let (token, place) = match (token, file) {
        (Some(token), _) => (token.to_owned(), "--token".to_owned()),
        (None, Some(path)) => {
            let text = std::fs::read_to_string(path)
                .map_err(|source| TokenError::Read { path: path.into(), source })?;
            (text.trim().to_owned(), path.display().to_string())
        }
        (None, None) => return Ok(None),
    };
    if token.is_empty() { Err(TokenError::Empty(place)) } else { Ok(Some(token)) }
}

/// Why there is no way to a hub.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// Its address is none.
    #[error("the hub's endpoint `{0}` (HF_ENDPOINT) is no URL that begins with https:// or http://")]
    Endpoint(String),
    /// There are no certificates.
    #[error(transparent)]
    Client(#[from] ClientError),
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
    parse_named(text).ok_or_else(|| "write NAME=FOLDER".into())
}

fn parse_secret(text: &str) -> Result<(String, PathBuf), String> {
    parse_named(text).ok_or_else(|| "write NAME=FILE".into())
}

fn parse_named(text: &str) -> Option<(String, PathBuf)> {
    let (name, path) = text.split_once('=').filter(|(name, path)| !name.is_empty() && !path.is_empty())?;
    Some((name.into(), path.into()))
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
