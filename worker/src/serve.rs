//! `turret-worker serve`: puts the parts together, follows the document, leaves in good order.
//!
//! Leaving (SIGTERM): the worker reports itself as draining and `/readyz` fails at once, but requests are still accepted
//! for [`LAG`], because proxies and kube-proxy learn late that a pod leaves; a connection refused in that time would be
//! an error for somebody. Then new requests get 503 with `Connection: close`, those that run and wait are finished
//! within the drain, and the process ends with 0. Ctrl-C skips the lag: nobody routes to a laptop.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use turret_crds::document::Verdict;
use turret_crds::report::WorkerIdentity;

use crate::api::{self, App};
use crate::config::{HubError, ServeArgs, TokenError};
use crate::device::{self, NoDevice};
use crate::document::{DocumentError, DocumentInput};
use crate::engine::handle::{EngineConfig, EngineHandle};
use crate::engine::{Engine, StartError};
use crate::residency::cache::Cache;
use crate::residency::fetch::Fetcher;
use crate::residency::files::Hasher;
use crate::residency::hosts::ClientError;
use crate::residency::resolve::Resolver;
use crate::residency::source::Roots;
use crate::residency::{DEFAULT_DISK_BYTES, Residency, Start};
use crate::telemetry::{LogFilter, chain};

/// How long requests are still accepted after SIGTERM.
const LAG: Duration = Duration::from_secs(2);
/// How long answers that are already computed may take to be sent.
const FLUSH: Duration = Duration::from_secs(5);
/// How often the document's files are looked at.
const POLL: Duration = Duration::from_secs(1);

/// Why a worker does not serve, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It cannot use its device.
    #[error(transparent)]
    Device(#[from] NoDevice),
    /// It has no document.
    #[error("failed to read what to serve")]
    Document(#[source] DocumentError),
    /// Its token cannot be had.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Everybody could use it.
    #[error(
        "{0} can be reached from other machines and there is neither a token nor a signing key; give a token with \
         --token or --token-file, or listen on 127.0.0.1"
    )]
    Open(SocketAddr),
    /// The engine does not start.
    #[error("failed to start the engine")]
    Engine(#[from] StartError),
    /// No certificates.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Its hub cannot be asked.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// An address is taken or not ours.
    #[error("failed to listen on {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Signals cannot be received.
    #[error("failed to wait for signals")]
    Signal(#[source] std::io::Error),
    /// The engine ended while it should serve.
    #[error("the engine stopped unexpectedly")]
    EngineStopped,
}

/// Serves until a signal comes. `log` is what is logged, which somebody may change.
pub async fn serve(args: ServeArgs, log: LogFilter) -> Result<(), ServeError> {
    device::choose(args.device, args.accelerator.as_deref())?;
    let threads = device::threads(args.threads);
    let device = device::describe_cpu(threads);
    let token = args.read_token()?;
    let input = match &args.config {
        Some(path) => DocumentInput::Document(path.clone()),
        None => DocumentInput::Objects(args.files.clone()),
    };
    let version = input.version();
    let document = input.read(None).map_err(ServeError::Document)?;
    let open = token.is_none() && document.public_keys.is_empty();
    if open {
        for address in [args.listen, args.control_listen] {
            if !address.ip().is_loopback() {
                return Err(ServeError::Open(address));
            }
        }
        tracing::warn!("no token was given: everybody on this machine may use this worker");
    }
    let data = listen(args.listen).await?;
    let control = listen(args.control_listen).await?;

    let default_device_bytes = device::default_budget_bytes(device.total_bytes);
    let limits = EngineConfig {
        device_bytes: default_device_bytes,
        lens_bytes: default_device_bytes / 8,
        max_context_tokens: 8192,
        max_running_rows: 64,
        prefill_chunk_tokens: 512,
        max_waiting_rows: 144,
        prefix_cache: true,
    };
    tracing::info!(device = device.name, threads, budget_bytes = default_device_bytes, "starting");
    let engine = Engine::start(limits.clone())?;
    let hasher = Arc::new(Hasher::default());
    let cache = Arc::new(Cache::new(&args.cache_dir, DEFAULT_DISK_BYTES));
    let roots = Roots {
        file_roots: args.file_roots(),
        volumes: args.volumes(),
        volumes_dir: args.volumes_dir.clone(),
    };
    let (hub, hosts) = args.hub()?;
    let resolver = Resolver {
        roots: Arc::new(roots),
        hasher: hasher.clone(),
        fetcher: Fetcher::new(cache, hasher, hosts)?,
        hub,
        tokens: Arc::new(args.tokens()),
    };
    let worker = WorkerIdentity {
        name: args.name.clone().unwrap_or_else(host_name),
        instance: uuid::Uuid::new_v4().to_string(),
        version: env!("CARGO_PKG_VERSION").into(),
        device,
    };
    let residency =
        Residency::start(engine.clone(), Start { worker, default_device_bytes, limits, resolver });
    residency.offer(document.clone()).await;

    let stop = CancellationToken::new();
    let app = App::new(residency.clone(), engine.clone(), token, open, stop.clone());
    let address = |l: &TcpListener| l.local_addr().map_or_else(|_| "?".to_owned(), |a| a.to_string());
    let (data_address, control_address) = (address(&data), address(&control));
    let servers = [
        tokio::spawn(run_server(data, api::data_routes(app.clone()), stop.clone())),
        tokio::spawn(run_server(control, api::control_routes(app, log), stop.clone())),
    ];
    let follow = tokio::spawn(follow(input, version, document, residency.clone()));
    tracing::info!(data = data_address, control = control_address, "listening");
    // For scripts that chose port 0.
    println!("listening data=http://{data_address} control=http://{control_address}");

    let lag = wait_for_end(&engine).await?;
    follow.abort();
    leave(&residency, &engine, lag, Duration::from_secs(args.drain_seconds)).await;
    stop.cancel();
    let flushed = async {
        for server in servers {
            let _ = server.await;
        }
    };
    if tokio::time::timeout(FLUSH, flushed).await.is_err() {
        tracing::warn!("some connections did not take their answers in time");
    }
    let _ = tokio::time::timeout(FLUSH, engine.shutdown()).await;
    tracing::info!("bye");
    Ok(())
}

async fn listen(address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address).await.map_err(|source| ServeError::Listen { address, source })
}

async fn run_server(listener: TcpListener, routes: axum::Router, stop: CancellationToken) {
    let service = routes.into_make_service_with_connect_info::<SocketAddr>();
    let served = axum::serve(listener, service).with_graceful_shutdown(stop.cancelled_owned()).await;
    if let Err(error) = served {
        tracing::error!(%error, "server ended");
    }
}

fn host_name() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname").map_or_else(|_| "worker".into(), |n| n.trim().into())
}

/// Waits for a signal, and tells how long requests are still to be accepted.
async fn wait_for_end(engine: &EngineHandle) -> Result<Duration, ServeError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(ServeError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(ServeError::Signal)?;
    let mut alive = tokio::time::interval(POLL);
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(LAG),
            _ = interrupt.recv() => return Ok(Duration::ZERO),
            _ = alive.tick() => if !engine.is_running() {
                return Err(ServeError::EngineStopped);
            },
        }
    }
}

async fn leave(residency: &Residency, engine: &EngineHandle, lag: Duration, drain: Duration) {
    let rows = residency.view().report.state.running_rows;
    tracing::info!(rows, drain_seconds = drain.as_secs(), "leaving");
    let end = tokio::time::Instant::now() + drain;
    residency.leave(false);
    tokio::time::sleep(lag.min(drain)).await;
    residency.leave(true);
    if tokio::time::timeout_at(end, residency.idle()).await.is_err() {
        let rows = engine.abort_rows().await;
        residency.end();
        tracing::warn!(rows, "rows did not end within the drain and are ended");
        let _ = tokio::time::timeout(FLUSH, residency.idle()).await;
    }
}

/// Offers the document again whenever its files change.
async fn follow(
    input: DocumentInput,
    mut version: crate::document::InputVersion,
    document: turret_crds::WorkerDocument,
    residency: Residency,
) {
    let mut previous = (document.sequence, document.digest);
    loop {
        tokio::time::sleep(POLL).await;
        let now = input.version();
        if now == version {
            continue;
        }
        match input.read(Some(previous.clone())) {
            Ok(document) => {
                version = now;
                let (sequence, digest) = (document.sequence, document.digest.clone());
                let verdict = residency.offer(document).await;
                if verdict == Verdict::Conflict {
                    tracing::warn!(
                        sequence,
                        digest,
                        "the document's file has the sequence of another document"
                    );
                }
                previous = (sequence, digest);
            }
            Err(error) => {
                // Perhaps half written: looked at again when it changes, and once more next time.
                tracing::warn!(
                    error = chain(&error),
                    "the changed document cannot be read, going on with the old one"
                );
                version = now;
            }
        }
    }
}
