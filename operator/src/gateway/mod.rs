//! The gateway: the data path from clients to workers.
//!
//! A request's way: [`routes`] read its namespace and `model`, [`catalog`] says what that means,
//! [`pick`] orders the workers that can answer, [`proxy`] sends it to the best and streams the
//! answer back ([`relay`]). When no worker can answer now but one may soon, [`hold`] keeps it, and
//! [`waiting`] lets it go when something changes.
//!
//! What it knows comes from two places, joined in [`directory`]: what is *declared*, from the
//! Kubernetes API ([`kubernetes`]), and what each worker *says* on its own state stream
//! ([`crate::fleet`]). It has no state of its own that a restart would lose, so any number of
//! replicas can run side by side. [`demand`] counts what is asked of
//! placements that scale by it. [`aliases`], [`catalog`], [`endpoint`], [`pick`], [`hold`], [`headers`], [`listing`] and
//! [`fleet_view`] are pure.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::Context;
use clap::ValueEnum;
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinSet,
};

use self::{
    directory::{Directory, Place, STATIC_PLACEMENT},
    kubernetes::Watched,
    metrics::Metrics,
    proxy::Proxy,
    routes::App,
    waiting::Clock,
};
use crate::{
    fleet::{Endpoint, WorkerId},
    keys::{Signer, TokenSource},
    namespaces, rbac,
    telemetry::LogFilter,
};

pub mod aliases;
pub mod catalog;
pub mod demand;
pub mod directory;
pub mod endpoint;
pub mod fleet_view;
pub mod headers;
pub mod hold;
pub mod kubernetes;
pub mod listing;
pub mod metrics;
pub mod pick;
pub mod proxy;
mod relay;
pub mod routes;
mod server;
pub mod static_worker;
pub mod waiting;

pub use static_worker::StaticWorker;

/// The namespace of workers that are given by URL.
const STATIC_NAMESPACE: &str = "default";
/// Memory for the bodies of all requests that wait or are on their way, KiB.
const BODY_MEMORY_KIB: usize = 512 << 10;
/// How long a gateway that has been told to stop goes on taking connections: the time in which
/// Services and proxies learn that it is leaving.
const LEAVE_TIME: Duration = Duration::from_secs(3);

/// How long, after that, held requests may go on waiting; well below the pod's grace period.
const LAST_WAIT: Duration = Duration::from_secs(60);

/// Who may send requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum Auth {
    /// Anybody who can reach the port.
    None,
}

/// What `turret-operator gateway` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct GatewayArgs {
    /// Send requests to this worker, and look at no cluster: URL[,CONTROL_URL]. May be repeated.
    /// The control port is the port after the URL's when it is not given.
    #[arg(long = "worker", value_name = "URL[,CONTROL_URL]")]
    workers: Vec<StaticWorker>,
    /// The static token that workers given by --worker ask for.
    #[arg(long, env = "TURRET_WORKER_TOKEN", hide_env_values = true, requires = "workers")]
    worker_token: Option<String>,
    /// Address to listen on.
    #[arg(long, env = "TURRET_GATEWAY_LISTEN", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
    /// Address of the admin port, with /fleet (what each worker holds and why) and /loglevel. It asks nobody who they are and
    /// shows all namespaces: 127.0.0.1 is reached by `kubectl port-forward` only. Absent: there is none.
    #[arg(long, env = "TURRET_GATEWAY_ADMIN_LISTEN", value_name = "ADDRESS")]
    admin_listen: Option<SocketAddr>,
    /// Serve what is declared in these namespaces only, separated by commas. Absent: in all namespaces.
    #[arg(
        long,
        alias = "namespace",
        env = "TURRET_WATCH_NAMESPACES",
        value_name = "NAMES",
        value_delimiter = ',',
        value_parser = namespaces::name,
        conflicts_with = "workers"
    )]
    namespaces: Vec<String>,
    /// Namespace of requests that name none by X-Turret-Namespace or /ns/NAMESPACE. Absent: the
    /// one namespace that has the model. With --worker: the namespace that the workers are in.
    #[arg(long, env = "TURRET_GATEWAY_DEFAULT_NAMESPACE")]
    default_namespace: Option<String>,
    /// Namespace the gateway itself runs in, where the Secret with its signing key is. Absent: the
    /// namespace of its service account.
    #[arg(long, env = "POD_NAMESPACE")]
    own_namespace: Option<String>,
    /// Name of the Secret with the gateway's signing key.
    #[arg(long, default_value = rbac::GATEWAY_KEYS, conflicts_with = "workers")]
    keys_secret: String,
    /// Who may send requests.
    #[arg(long, env = "TURRET_GATEWAY_AUTH", value_enum, default_value_t = Auth::None)]
    auth: Auth,
    /// Most requests that are held while no worker can answer them.
    #[arg(long, env = "TURRET_GATEWAY_MAX_HELD", default_value_t = 1024)]
    max_held: usize,
    /// Longest request body, bytes.
    #[arg(long, env = "TURRET_GATEWAY_MAX_BODY_BYTES", default_value_t = 4 << 20)]
    max_body_bytes: usize,
}

/// How a gateway serves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Namespace of requests that name none.
    pub default_namespace: Option<String>,
    /// Most requests that are held.
    pub max_held: usize,
    /// Longest request body, bytes.
    pub max_body_bytes: usize,
    /// How long connections are taken after it has been told to stop.
    pub leave_time: Duration,
    /// How long, after that, held requests may go on waiting.
    pub last_wait: Duration,
    /// The gateway's signer, once its key is read. Who shows a token of the same key is told what waits.
    pub signer: Arc<OnceLock<Arc<Signer>>>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            default_namespace: None,
            max_held: 1024,
            max_body_bytes: 4 << 20,
            leave_time: Duration::ZERO,
            last_wait: Duration::ZERO,
            signer: Arc::default(),
        }
    }
}

/// Runs the gateway until it is told to stop.
pub async fn run(args: GatewayArgs, log: LogFilter) -> anyhow::Result<()> {
    // Another part of the process may have chosen it already; there is only one to choose.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let listener = TcpListener::bind(args.listen).await.with_context(|| {
        format!("failed to listen on {}; choose another address with --listen", args.listen)
    })?;
    let admin = match args.admin_listen {
        Some(address) => Some(TcpListener::bind(address).await.with_context(|| {
            format!("failed to listen on {address}; choose another address with --admin-listen")
        })?),
        None => None,
    };
    let serve_admin = |directory: &Arc<Directory>| {
        let routes = routes::admin::router(directory.clone(), log);
        // Ends with the value that is returned.
        let mut task = JoinSet::new();
        if let Some(listener) = admin {
            task.spawn(server::serve_admin(listener, routes));
        }
        task
    };
    match args.auth {
        Auth::None => tracing::warn!(
            listen = %args.listen,
            "authentication is off (--auth None): whoever can reach this address can use every model of every namespace it serves"
        ),
    }
    let stop = stop_signal()?;
    let http = fleet_client()?;
    let mut settings = Settings {
        default_namespace: args.default_namespace,
        max_held: args.max_held,
        max_body_bytes: args.max_body_bytes,
        ..Settings::default()
    };
    if args.workers.is_empty() {
        let client = kube::Client::try_default().await.context(
            "failed to find a Kubernetes cluster; set KUBECONFIG, or name workers with --worker URL",
        )?;
        let own_namespace = args.own_namespace.unwrap_or_else(|| client.default_namespace().to_owned());
        let namespaces = namespaces::served(args.namespaces);
        let watched = Watched { client, namespaces, own_namespace, keys_secret: args.keys_secret };
        let directory = Arc::new(Directory::declared(http));
        (settings.leave_time, settings.last_wait) = (LEAVE_TIME, LAST_WAIT);
        let _admin = serve_admin(&directory);
        let (followed, read) = (directory.clone(), settings.signer.clone());
        let following = tokio::spawn(async move {
            let signer = kubernetes::signer(&watched).await;
            // Nobody else sets it.
            let _ = read.set(signer.clone());
            kubernetes::follow(watched, signer, followed).await;
        });
        serve(settings, directory, listener, stop).await;
        following.abort();
    } else {
        let namespace = settings.default_namespace.clone().unwrap_or_else(|| STATIC_NAMESPACE.into());
        let directory = static_directory(http, &namespace, &args.workers, args.worker_token.as_deref());
        let _admin = serve_admin(&directory);
        serve(settings, directory, listener, stop).await;
    }
    tracing::info!("stopped");
    Ok(())
}

/// A directory of workers given by URL.
pub fn static_directory(
    http: reqwest::Client,
    namespace: &str,
    workers: &[StaticWorker],
    token: Option<&str>,
) -> Arc<Directory> {
    let directory = Arc::new(Directory::reported(http, namespace));
    let token = token.map_or(TokenSource::Open, |token| TokenSource::Static(token.into()));
    directory.follow(workers.iter().map(|worker| Endpoint {
        id: WorkerId(worker.data_url.as_str().into()),
        control_url: worker.control_url.as_str().into(),
        token: token.clone(),
        attached: Place {
            namespace: namespace.into(),
            placement: STATIC_PLACEMENT.into(),
            data_url: worker.data_url.as_str().into(),
        },
    }));
    directory
}

/// The client that reads state streams: no limit of time, since streams have no end.
pub fn fleet_client() -> anyhow::Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(2))
        .tcp_nodelay(true)
        .build()
        .context("failed to set up the HTTP client")
}

/// Serves until `stop`, then ends as a good neighbour: not ready, then no new connections, then,
/// when the last answer has gone out, done.
pub async fn serve(
    settings: Settings,
    directory: Arc<Directory>,
    listener: TcpListener,
    stop: impl Future<Output = ()>,
) {
    let (stopping, is_stopping) = watch::channel(false);
    let (closing, is_closing) = watch::channel(false);
    let proxy = Proxy::new(directory, Arc::new(Metrics::new()), Clock::start(), settings.max_held);
    let app = Arc::new(App {
        proxy: proxy.clone(),
        default_namespace: settings.default_namespace,
        max_body_bytes: settings.max_body_bytes,
        body_memory: Arc::new(Semaphore::new(BODY_MEMORY_KIB)),
        stopping: is_stopping,
        signer: settings.signer,
    });
    if let Ok(address) = listener.local_addr() {
        tracing::info!(%address, "gateway listens");
    }
    let leave = async {
        stop.await;
        tracing::info!("told to stop: not ready from now on, running answers are finished");
        stopping.send_replace(true);
        tokio::time::sleep(settings.leave_time).await;
        closing.send_replace(true);
        tokio::time::sleep(settings.last_wait).await;
        proxy.send_away();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = server::serve(listener, routes::router(app), is_closing) => {}
        () = leave => {}
        () = proxy.let_go() => {}
    }
}

fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    Ok(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    })
}
