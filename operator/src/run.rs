//! `turret-operator run`: caches first, then the election, then the controllers.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use futures::StreamExt;
use k8s_openapi::api::{coordination::v1::Lease, core::v1::Secret, discovery::v1::EndpointSlice};
use kube::{
    Api, Client, Config, Resource, ResourceExt,
    core::NamespaceResourceScope,
    runtime::{
        events::{EventType, Recorder, Reporter},
        reflector::Store,
        watcher,
    },
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, watch},
    task::JoinSet,
};
use turret_crds::{
    ModelPlacement,
    host_pattern::{self, HostPattern},
    label,
};

use crate::{
    controllers::{
        cache::{self, Touched},
        context::{self, Caches, Context, Pods, placement_of},
        group,
        placement::{self, plan::shrink_config_map, resources::MANAGED_BY},
        retry::Retries,
        waker::Waker,
        wakes::{Key, Wakes},
    },
    demand::{self, Gateways},
    fleet::{Endpoint, Fleet, Link, Moved},
    health::Health,
    leader::Election,
    metrics::Metrics,
    namespaces,
    optional_apis::OptionalApis,
    rbac, secrets,
    telemetry::LogFilter,
};

/// Finishing what is begun may take this long after SIGTERM.
const GRACE: Duration = Duration::from_secs(10);
/// A connection to the API server on which nothing came for this long is dead.
const API_SILENCE: Duration = Duration::from_secs(150);
/// Pods that change within this time are followed at once.
const POD_COALESCE: Duration = Duration::from_millis(20);
/// What is asked of a placement is judged at most once in this time.
const LOAD_COALESCE: Duration = Duration::from_millis(25);
/// Placements whose load is judged before others get a turn.
const LOADS_AT_ONCE: usize = 1024;

/// What `turret-operator run` is told.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Serve these namespaces only, separated by commas; absent: all. Nothing outside of them and of the operator's own is
    /// asked for.
    #[arg(
        long,
        alias = "namespace",
        env = "TURRET_WATCH_NAMESPACES",
        value_name = "NAMES",
        value_delimiter = ',',
        value_parser = namespaces::name
    )]
    namespaces: Vec<String>,
    /// Namespace of the Lease and of the key Secrets; absent: the operator's own.
    #[arg(long, env = "POD_NAMESPACE")]
    operator_namespace: Option<String>,
    /// Name of this replica in the election and in events.
    #[arg(long, env = "POD_NAME")]
    identity: Option<String>,
    /// Image of workers whose placement names none.
    #[arg(long, env = "TURRET_WORKER_IMAGE")]
    worker_image: String,
    /// Hosts that workers may fetch `https://` and `hf://` sources from, separated by commas; see `turret-worker serve
    /// --help`. A change replaces the workers.
    #[arg(
        long,
        env = "TURRET_ALLOWED_SOURCE_HOSTS",
        value_name = "HOSTS",
        value_delimiter = ',',
        default_value = host_pattern::DEFAULT_SOURCE_HOSTS
    )]
    allowed_source_hosts: Vec<HostPattern>,
    /// Name of the Lease of the election.
    #[arg(long, default_value = rbac::LEASE)]
    lease_name: String,
    /// Name of the Secret with the operator's signing key.
    #[arg(long, default_value = rbac::OPERATOR_KEYS)]
    keys_secret: String,
    /// Name of the Secret with the gateway's signing key.
    #[arg(long, default_value = rbac::GATEWAY_KEYS)]
    gateway_keys_secret: String,
    /// Most objects of each kind that are looked at, and written, at the same time.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=1024))]
    concurrent_reconciles: u16,
    /// Most workers whose first report is read at the same time, as after a start with thousands of them.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..=4096))]
    concurrent_first_reports: u16,
    /// Where /livez, /readyz, /metrics and /loglevel are served.
    #[arg(long, default_value = "0.0.0.0:8080")]
    listen: SocketAddr,
}

/// Runs the controllers until SIGTERM or SIGINT, or until the leadership is lost.
pub async fn run(args: RunArgs, log: LogFilter) -> anyhow::Result<()> {
    // Refused only when a provider is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut config =
        Config::infer().await.context("failed to find out how to reach the Kubernetes API server")?;
    // Watches hear a bookmark every minute; what is silent for longer than this is dead.
    config.read_timeout = Some(API_SILENCE);
    let own_namespace = args.operator_namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
    let client = Client::try_from(config).context("failed to set up the Kubernetes client")?;
    let identity =
        args.identity.clone().unwrap_or_else(|| format!("turret-operator-{}", uuid::Uuid::new_v4()));
    let stop = stop_signal()?;

    let health = Health::new(Metrics::default());
    let listener = tokio::net::TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("failed to listen on {} (--listen)", args.listen))?;
    let mut tasks = JoinSet::new();
    let service = health.router(log).into_make_service_with_connect_info::<SocketAddr>();
    tasks.spawn(async move {
        if let Err(error) = axum::serve(listener, service).await {
            tracing::error!(%error, "health endpoints ended");
        }
    });

    let optional = tokio::select! {
        optional = OptionalApis::find(&client) => optional,
        () = stopped(stop.clone()) => return Ok(()),
    };
    let served = namespaces::served(args.namespaces.clone());
    let watched = start_caches(&mut tasks, &client, &served, optional);
    let all = watched.caches.synced();
    tokio::select! {
        () = all => health.caches_are_synced(),
        () = stopped(stop.clone()) => return Ok(()),
    }
    tracing::info!(%identity, namespaces = namespaces::text(&served), "caches are synced");

    let leases = Api::<Lease>::namespaced(client.clone(), &own_namespace);
    let election = Election::new(leases, &args.lease_name, &identity);
    tokio::select! {
        () = election.acquire() => {}
        () = stopped(stop.clone()) => return Ok(()),
    }
    tracing::info!(%identity, "leading");
    health.metrics.leader.set(1);

    let secrets = Api::<Secret>::namespaced(client.clone(), &own_namespace);
    let keys = tokio::select! {
        keys = secrets::start(&mut tasks, secrets, &args.keys_secret, &args.gateway_keys_secret) => keys,
        lost = election.hold() => return Err(lost.into()),
        () = stopped(stop.clone()) => { election.release().await; return Ok(()) }
    };
    let ctx = Arc::new(context(client, &args, identity, &watched, &keys, &health.metrics)?);
    follow_pods(&mut tasks, &ctx, &watched, &keys);
    follow_keys(&mut tasks, &ctx);
    tell_unreadable(&mut tasks, &ctx);
    follow_demand(&mut tasks, &ctx);
    follow_gateways(&mut tasks, &ctx, &own_namespace);
    follow_load(&mut tasks, &ctx);
    let at_once = args.concurrent_reconciles;
    let controllers = async {
        tokio::join!(
            placement::controller::run(ctx.clone(), at_once, stopped(stop.clone())),
            group::controller::run(ctx.clone(), at_once, stopped(stop.clone())),
        )
    };
    tokio::select! {
        _ = controllers => {}
        lost = election.hold() => return Err(lost.into()),
        () = async { stopped(stop.clone()).await; tokio::time::sleep(GRACE).await } => {
            tracing::warn!("what was begun did not end in time");
        }
    }
    health.metrics.leader.set(0);
    election.release().await;
    Ok(())
}

/// Turns true on SIGTERM and SIGINT.
fn stop_signal() -> anyhow::Result<watch::Receiver<bool>> {
    let (sender, receiver) = watch::channel(false);
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        tracing::info!("stopping");
        sender.send_replace(true);
        // A second signal ends the process at once.
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        std::process::exit(1);
    });
    Ok(receiver)
}

async fn stopped(mut stop: watch::Receiver<bool>) {
    // The sender lives in a task that ends only with the process.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// The caches, and what their changes wake.
struct Watched {
    caches: Caches,
    placement_wakes: Wakes,
    group_wakes: Wakes,
    pods_changed: Arc<Notify>,
}

fn start_caches(
    tasks: &mut JoinSet<()>,
    client: &Client,
    namespaces: &[String],
    optional: OptionalApis,
) -> Watched {
    let (placement_wakes, group_wakes) = (Wakes::default(), Wakes::default());
    let pods_changed = Arc::new(Notify::new());
    let everything = watcher::Config::default();
    let owned = watcher::Config::default().labels(&format!("{}={MANAGED_BY}", label::APP_MANAGED_BY));

    let waker = Waker { placements: placement_wakes.clone(), groups: group_wakes.clone() };
    let wake = waker.clone();
    let (placements, unreadable_placements) =
        cache::start(tasks, apis(client, namespaces), everything.clone(), cache::shrink_metadata, move |t| {
            wake.placement_changed(&t);
        });
    // Roles say nothing of namespaces, so where only some are served their labels are not known.
    let (wake, all_placements) = (waker.clone(), placements.clone());
    let labelled = namespaces.is_empty().then(|| {
        let all = vec![(String::new(), Api::all(client.clone()))];
        cache::start(tasks, all, everything.clone(), cache::shrink_namespace, move |t| {
            wake.namespace_changed(&t, &all_placements);
        })
        .0
    });
    let (wake, all_placements) = (waker.clone(), placements.clone());
    let (groups, unreadable_groups) =
        cache::start(tasks, apis(client, namespaces), everything, cache::shrink_metadata, move |t| {
            wake.group_changed(&t, &all_placements);
        });
    // What a placement owns wakes the placement, and its groups through the placement's cache.
    let (wake, all_placements) = (waker, placements.clone());
    let owned_changed = move |key: Option<Key>| {
        if let Some(key) = key {
            wake.placement_and_groups(&key, &all_placements);
        }
    };
    let touch = owned_changed.clone();
    let (config_maps, _) = cache::start(
        tasks,
        apis(client, namespaces),
        owned.clone(),
        |c: &mut k8s_openapi::api::core::v1::ConfigMap| {
            cache::shrink_metadata(c);
            shrink_config_map(c);
        },
        move |t| touch(t.both().next().and_then(placement_of)),
    );
    let touch = owned_changed.clone();
    let (services, _) =
        cache::start(tasks, apis(client, namespaces), owned.clone(), cache::shrink_metadata, move |t| {
            touch(t.both().next().and_then(placement_of));
        });
    let touch = owned_changed.clone();
    let (disruption_budgets, _) =
        cache::start(tasks, apis(client, namespaces), owned.clone(), cache::shrink_metadata, move |t| {
            touch(t.both().next().and_then(placement_of));
        });
    let touch = owned_changed.clone();
    let (deployments, _) =
        cache::start(tasks, apis(client, namespaces), owned.clone(), cache::shrink_metadata, move |t| {
            touch(t.both().next().and_then(placement_of));
        });
    let touch = owned_changed.clone();
    let claim_templates = optional.resource_claim_templates.then(|| {
        let (claim_templates, _) =
            cache::start(tasks, apis(client, namespaces), owned.clone(), cache::shrink_metadata, move |t| {
                touch(t.both().next().and_then(placement_of));
            });
        claim_templates
    });
    let pods = Pods::default();
    let (index, notify) = (pods.clone(), pods_changed.clone());
    let (pod_store, _) = cache::start(
        tasks,
        apis(client, namespaces),
        owned,
        crate::controllers::pod::shrink,
        move |t: Touched<'_, k8s_openapi::api::core::v1::Pod>| {
            match (t.before, t.after) {
                (_, Some(pod)) => index.set(pod),
                (Some(pod), None) => index.remove(pod),
                (None, None) => {}
            }
            owned_changed(t.both().next().and_then(placement_of));
            notify.notify_one();
        },
    );
    let caches = Caches {
        groups,
        unreadable_groups,
        placements,
        namespaces: labelled,
        unreadable_placements,
        config_maps,
        services,
        disruption_budgets,
        deployments,
        claim_templates,
        pods,
        pod_store,
    };
    Watched { caches, placement_wakes, group_wakes, pods_changed }
}

fn context(
    client: Client,
    args: &RunArgs,
    identity: String,
    watched: &Watched,
    keys: &secrets::Keys,
    metrics: &Metrics,
) -> anyhow::Result<Context> {
    // Worker streams last for hours, so there is no timeout over all; each use has its own.
    let http = reqwest::Client::builder()
        .no_proxy()
        .connect_timeout(Duration::from_secs(3))
        .tcp_keepalive(Duration::from_secs(15))
        .build()
        .context("failed to set up the HTTP client for workers")?;
    let waker = Waker { placements: watched.placement_wakes.clone(), groups: watched.group_wakes.clone() };
    let placements = watched.caches.placements.clone();
    let links_changed = watched.pods_changed.clone();
    let load_wakes = Wakes::default();
    let (traffic, asked) = (load_wakes.clone(), load_wakes.clone());
    let changed = move |endpoint: &Endpoint<Key>, moved: Moved| {
        let (namespace, name) = &endpoint.attached;
        if moved > Moved::Traffic {
            waker.placement_and_groups(&endpoint.attached, &placements);
        } else if is_autoscaled(&placements, namespace, name) {
            traffic.wake(namespace, name);
        }
        // What else moves with traffic is looked at once a minute anyway.
        if moved == Moved::Link {
            links_changed.notify_one();
        }
    };
    let gateways = Gateways::new(
        http.clone(),
        keys.gateway_signer.clone(),
        metrics.gateway_streams.clone(),
        move |(namespace, name)| asked.wake(namespace, name),
    );
    let reporter = Reporter { controller: "turret-operator".into(), instance: Some(identity) };
    Ok(Context {
        recorder: Recorder::new(client.clone(), reporter),
        client,
        caches: watched.caches.clone(),
        fleet: Fleet::new(http.clone(), changed).reading_at_once(args.concurrent_first_reports.into()),
        public_keys: keys.public.clone(),
        worker_image: args.worker_image.clone(),
        // What workers do anyway is not written into their pods: a new operator is not to replace them.
        allowed_source_hosts: Some(host_pattern::join(&args.allowed_source_hosts))
            .filter(|hosts| hosts != host_pattern::DEFAULT_SOURCE_HOSTS),
        metrics: metrics.clone(),
        placement_retries: Retries::default(),
        group_retries: Retries::default(),
        http,
        pushes: Default::default(),
        demands: Default::default(),
        placement_wakes: watched.placement_wakes.clone(),
        group_wakes: watched.group_wakes.clone(),
        gateways,
        scaling: Default::default(),
        load_wakes,
    })
}

fn is_autoscaled(placements: &Store<ModelPlacement>, namespace: &str, name: &str) -> bool {
    context::get(placements, namespace, name).is_some_and(|placement| placement.spec.autoscaling.is_some())
}

/// Follows the state streams of all worker pods that there are.
fn follow_pods(tasks: &mut JoinSet<()>, ctx: &Arc<Context>, watched: &Watched, keys: &secrets::Keys) {
    let (ctx, changed, signer) = (ctx.clone(), watched.pods_changed.clone(), keys.signer.clone());
    tasks.spawn(async move {
        loop {
            ctx.fleet.follow_exactly(ctx.caches.pods.endpoints(&signer));
            let open = ctx.fleet.snapshot().values().filter(|w| w.link == Link::Open).count();
            ctx.metrics.worker_streams.set(i64::try_from(open).unwrap_or(i64::MAX));
            changed.notified().await;
            tokio::time::sleep(POD_COALESCE).await;
        }
    });
}

/// Looks every few seconds how much is asked for.
fn follow_demand(tasks: &mut JoinSet<()>, ctx: &Arc<Context>) {
    let ctx = ctx.clone();
    tasks.spawn(async move {
        loop {
            tokio::time::sleep(placement::demand::EVERY).await;
            ctx.observe_demand();
        }
    });
}

/// Follows what waits at all gateways that there are.
fn follow_gateways(tasks: &mut JoinSet<()>, ctx: &Arc<Context>, own_namespace: &str) {
    let changed = Arc::new(Notify::new());
    let notify = changed.clone();
    let (slices, _) = cache::start(
        tasks,
        apis(&ctx.client, &[own_namespace.to_owned()]),
        watcher::Config::default().labels(&demand::endpoint::selector()),
        cache::shrink_metadata,
        move |_: Touched<'_, EndpointSlice>| notify.notify_one(),
    );
    let ctx = ctx.clone();
    tasks.spawn(async move {
        loop {
            changed.notified().await;
            let slices = slices.state();
            ctx.gateways.follow_exactly(demand::endpoint::gateways(slices.iter().map(|slice| &**slice)));
            tokio::time::sleep(POD_COALESCE).await;
        }
    });
}

/// Looks at placements whose load asks for another number of workers.
fn follow_load(tasks: &mut JoinSet<()>, ctx: &Arc<Context>) {
    let ctx = ctx.clone();
    tasks.spawn(async move {
        let moved = ctx.load_wakes.stream::<ModelPlacement>().ready_chunks(LOADS_AT_ONCE);
        let mut moved = std::pin::pin!(moved);
        while let Some(placements) = moved.next().await {
            for placement in placements {
                let key: Key = (placement.namespace.unwrap_or_default(), placement.name);
                if ctx.is_to_be_rescaled(&key) {
                    ctx.placement_wakes.wake(key.0, key.1);
                }
            }
            tokio::time::sleep(LOAD_COALESCE).await;
        }
    });
}

/// New keys go into all documents.
fn follow_keys(tasks: &mut JoinSet<()>, ctx: &Arc<Context>) {
    let (ctx, mut keys) = (ctx.clone(), ctx.public_keys.clone());
    tasks.spawn(async move {
        while keys.changed().await.is_ok() {
            for placement in ctx.caches.placements.state() {
                ctx.placement_wakes.wake(placement.namespace().unwrap_or_default(), placement.name_any());
            }
        }
    });
}

/// Whoever looks at an object that cannot be read finds an event there, one for each version of it.
fn tell_unreadable(tasks: &mut JoinSet<()>, ctx: &Arc<Context>) {
    for unreadable in [&ctx.caches.unreadable_groups, &ctx.caches.unreadable_placements] {
        let (ctx, unreadable) = (ctx.clone(), unreadable.clone());
        tasks.spawn(async move {
            loop {
                for fault in unreadable.untold().await {
                    let note = format!("skipped, since it cannot be read: {}", fault.error);
                    ctx.tell_of(&fault.reference, EventType::Warning, "Unreadable", "Read", note).await;
                }
            }
        });
    }
}

/// One for each of these namespaces, with its name; none is all of them.
fn apis<K>(client: &Client, namespaces: &[String]) -> Vec<(String, Api<K>)>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    if namespaces.is_empty() {
        return vec![(String::new(), Api::all(client.clone()))];
    }
    namespaces.iter().map(|name| (name.clone(), Api::namespaced(client.clone(), name))).collect()
}
