//! Sends a request to a worker and its answer back: picks, holds, tries again, streams.
//!
//! Invariants: nothing is sent a second time once a byte of an answer has gone to the client; a
//! client that leaves cancels what a worker does for it; a body is passed on to the byte.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use parking_lot::Mutex;
use tokio::sync::watch;
use turret_crds::{document::BaseKey, label};

use super::{
    catalog::{ResolveError, Target},
    demand::{Demands, Sends, demands},
    directory::{Directory, NEWS_GRACE, Place, View},
    headers,
    metrics::{Metrics, Trouble},
    pick::{InFlight, Moment, Refusals, Unserved},
    relay::Relay,
    waiting::{Ask, Clock, Outcome, Waiting, is_hopeless},
};
use crate::fleet::Worker;

/// A worker that cannot be reached, or refuses without saying for how long, is left alone this long.
const PAUSE: Duration = Duration::from_secs(1);
/// Longest pause that a worker can ask for.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Attempts of one request that a worker may break off. A request that makes workers crash must not meet
/// all of them.
const MOST_BROKEN: u32 = 3;
/// Longest refusal that is kept.
const REFUSAL_BYTES: usize = 64 << 10;
/// How long a worker may take to finish a refusal.
const REFUSAL_TIME: Duration = Duration::from_secs(5);
/// How long connecting to a worker may take.
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// A worker's machine that says nothing to TCP for this long is dead.
const DEAD_PEER_TIME: Duration = Duration::from_secs(20);

/// A request to be sent to a worker.
pub struct Inference {
    /// What it asks for.
    pub ask: Ask,
    /// The worker's path.
    pub path: &'static str,
    /// The headers that the worker sees, without those that come with each attempt.
    pub headers: HeaderMap,
    /// The body, as it came.
    pub body: Bytes,
    /// When it came.
    pub arrived: Moment,
}

/// Why a request got no answer from a worker.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// What it asks for cannot be found.
    #[error(transparent)]
    Resolve(#[from] ResolveError),
    /// No worker could take it.
    #[error("`{model}` cannot be answered now: {why}{}", after(*.waited))]
    Unserved {
        /// What it asked for.
        model: String,
        /// Why not.
        why: Unserved,
        /// How long it was held.
        waited: Duration,
        /// Seconds after which trying again makes sense.
        retry_after: Option<u64>,
    },
    /// Too many requests wait already.
    #[error(
        "`{model}` cannot be answered now ({why}), and too many requests wait already; send it again later"
    )]
    TooManyHeld {
        /// What it asked for.
        model: String,
        /// Why it would have had to wait.
        why: Unserved,
    },
    /// The gateway stops, and cannot wait any longer.
    #[error("`{model}` waited for a worker ({why}) and this gateway is stopping; send it again")]
    Stopping {
        /// What it asked for.
        model: String,
        /// What it waited for.
        why: Unserved,
    },
    /// Several workers broke off before the first byte.
    #[error(
        "`{model}`: {MOST_BROKEN} workers in turn broke off before the first byte of an answer; the last one: {cause}"
    )]
    Broken {
        /// What it asked for.
        model: String,
        /// What happened to the last connection.
        cause: String,
    },
}

fn after(waited: Duration) -> String {
    match waited.as_secs() {
        0 => String::new(),
        seconds => format!(" (waited {seconds} s)"),
    }
}

/// Why a worker did not answer.
enum Refused {
    /// It could not be reached.
    Unreachable(String),
    /// It broke off before the first byte.
    Broken(String),
    /// It says no.
    Answer(Refusal),
}

struct Refusal {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Refused {
    fn trouble(&self) -> Trouble {
        match self {
            Self::Unreachable(_) => Trouble::Unreachable,
            Self::Broken(_) => Trouble::BrokenEarly,
            Self::Answer(Refusal { status, .. }) => match *status {
                StatusCode::TOO_MANY_REQUESTS => Trouble::Full,
                StatusCode::NOT_FOUND => Trouble::UnknownModel,
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => Trouble::Token,
                _ => Trouble::Unavailable,
            },
        }
    }

    /// How long the worker is not asked again for this request.
    fn pause(&self) -> Duration {
        match self {
            Self::Unreachable(_) | Self::Broken(_) => PAUSE,
            Self::Answer(refusal) => {
                let asked = headers::retry_after(&refusal.headers).map(Duration::from_secs);
                asked.unwrap_or(PAUSE).clamp(PAUSE, LONGEST_PAUSE)
            }
        }
    }

    /// Whether it may be different later, so that the request is held when nobody else takes it.
    /// A full queue (429) is the client's to wait for, and is passed on.
    fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Broken(_) => true,
            Self::Answer(refusal) => match self.trouble() {
                Trouble::Token => true,
                Trouble::Unavailable => headers::retry_after(&refusal.headers).is_some(),
                _ => false,
            },
        }
    }
}

/// Forwards requests.
pub struct Proxy {
    client: Client<HttpConnector, Full<Bytes>>,
    directory: Arc<Directory>,
    waiting: Waiting,
    in_flight: Mutex<InFlight>,
    sends: Sends,
    metrics: Arc<Metrics>,
    clock: Clock,
    own: Weak<Self>,
}

/// A request that is on its way to a worker, until it is dropped.
pub struct Sent {
    proxy: Arc<Proxy>,
    worker: Worker<Place>,
    base: BaseKey,
    target: Target,
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.proxy.in_flight.lock().remove(&self.worker.endpoint.id, &self.base, &self.target.model);
        self.proxy.metrics.in_flight.dec();
        self.proxy.waiting.place_freed();
    }
}

impl Sent {
    /// Name of the worker.
    pub fn worker(&self) -> &str {
        self.worker.report.as_ref().map_or(&*self.worker.endpoint.id.0, |r| &r.worker.name)
    }

    /// The metrics to count in.
    pub fn metrics(&self) -> &Metrics {
        &self.proxy.metrics
    }
}

impl Proxy {
    /// A proxy over a directory that may hold `max_held` requests.
    pub fn new(directory: Arc<Directory>, metrics: Arc<Metrics>, clock: Clock, max_held: usize) -> Arc<Self> {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIME));
        connector.set_nodelay(true);
        connector.set_keepalive(Some(DEAD_PEER_TIME / 2));
        connector.set_keepalive_interval(Some(DEAD_PEER_TIME / 4));
        connector.set_keepalive_retries(Some(2));
        #[cfg(target_os = "linux")]
        connector.set_tcp_user_timeout(Some(DEAD_PEER_TIME));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(Duration::from_secs(60))
            .pool_max_idle_per_host(64)
            .build(connector);
        let waiting = Waiting::new(max_held, clock, metrics.clone());
        Arc::new_cyclic(|own| Self {
            client,
            directory,
            waiting,
            in_flight: Mutex::default(),
            sends: Sends::default(),
            metrics,
            clock,
            own: own.clone(),
        })
    }

    /// Lets held requests go, for as long as the gateway lives.
    pub async fn let_go(&self) {
        self.waiting.run(&self.directory, &self.in_flight).await;
    }

    /// Sends away the requests that still wait.
    pub fn send_away(&self) {
        self.waiting.send_away();
    }

    /// What is declared and what the workers say.
    pub fn directory(&self) -> &Directory {
        &self.directory
    }

    /// What is asked of each placement with autoscaling.
    pub fn demands(&self) -> Demands {
        demands(&self.directory.view().catalog, &self.waiting.lengths(), |namespace, placement| {
            self.sends.of(namespace, placement)
        })
    }

    /// Wake when what is asked may have changed: other requests wait, or one was sent.
    pub fn demand_changes(&self) -> [watch::Receiver<u64>; 2] {
        [self.waiting.changes(), self.sends.changes()]
    }

    /// The metrics.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// The gateway's clock.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Answers a request by the best worker that takes it.
    pub async fn forward(&self, request: &Inference) -> Result<Response<Body>, ForwardError> {
        let mut refusals = Refusals::default();
        let mut last: Option<Refusal> = None;
        // Whether one of those that refused in this round may take it later.
        let mut is_passing = false;
        let mut broken = 0;
        let mut attempts = 0;
        loop {
            let seen = self.directory.version();
            let view = self.directory.view();
            let now = self.clock.now();
            let target = match request.ask.resolve(&view) {
                Ok(target) => Some(target),
                Err(error) if view.catalog.complete => return Err(error.into()),
                Err(_) => None,
            };
            let picked = match &target {
                Some(target) => self.send_to_best(&view, target, (&refusals, now)),
                None => Err(Unserved::Unread),
            };
            let why = match picked {
                Ok(sent) => {
                    attempts += 1;
                    if attempts > 1 {
                        self.metrics.retries.inc();
                    }
                    let worker = sent.worker.clone();
                    let refused = match self.attempt(request, sent).await {
                        Ok(answer) => return Ok(answer),
                        Err(refused) => refused,
                    };
                    self.metrics.upstream_error(refused.trouble());
                    log_refusal(&worker, request, &refused);
                    refusals.add(&worker, self.clock.now() + refused.pause());
                    is_passing |= refused.is_passing();
                    match refused {
                        Refused::Answer(refusal) => last = Some(refusal),
                        Refused::Broken(cause) => {
                            broken += 1;
                            if broken == MOST_BROKEN {
                                return Err(ForwardError::Broken { model: model_name(request), cause });
                            }
                        }
                        Refused::Unreachable(_) => {}
                    }
                    continue;
                }
                Err(why) => why,
            };
            if why == Unserved::Refused
                && !is_passing
                && let Some(refusal) = last.take()
            {
                return Ok(pass_on(refusal, request));
            }
            let limit = limit(&view, target.as_ref(), &why, request.arrived);
            if is_hopeless(&why) || now >= limit {
                return Err(self.give_up(request, why, &refusals, now));
            }
            let line = match target {
                Some(target) => (target.namespace, target.model.group),
                None => (request.ask.namespace.clone().unwrap_or_default(), String::new()),
            };
            tracing::debug!(group = %line.1, %why, "held");
            let waiter = (&request.ask, &refusals);
            match self.waiting.wait(line, waiter, limit, (&self.directory, seen)).await {
                Outcome::Go | Outcome::Expired => is_passing = false,
                Outcome::Stopping => {
                    return Err(ForwardError::Stopping { model: model_name(request), why });
                }
                Outcome::Full => return Err(ForwardError::TooManyHeld { model: model_name(request), why }),
            }
        }
    }

    /// Picks and notes the choice in one step, so that the next request already sees it.
    fn send_to_best(
        &self,
        view: &View,
        target: &Target,
        (refusals, now): (&Refusals, Moment),
    ) -> Result<Sent, Unserved> {
        let mut in_flight = self.in_flight.lock();
        let choices = view.pick(target, &in_flight, |worker| refusals.refuses(worker, now))?;
        let best = &choices[0];
        let (worker, base) = (best.worker.clone(), best.base.clone());
        tracing::debug!(worker = %worker.endpoint.id, model = %target.model, score = ?best.score, "picked");
        in_flight.add(&worker.endpoint.id, &base, &target.model);
        self.sends.count(&worker.endpoint.attached);
        self.metrics.in_flight.inc();
        let proxy = self.own.upgrade().expect("a proxy that forwards is alive");
        Ok(Sent { proxy, worker, base, target: target.clone() })
    }

    async fn attempt(&self, request: &Inference, sent: Sent) -> Result<Response<Body>, Refused> {
        let outgoing = outgoing(request, &sent).map_err(Refused::Unreachable)?;
        let response = self.client.request(outgoing).await.map_err(|error| {
            let cause = innermost(&error);
            if error.is_connect() { Refused::Unreachable(cause) } else { Refused::Broken(cause) }
        })?;
        let (mut parts, mut body) = response.into_parts();
        if is_refusal(parts.status) {
            let limited = Limited::new(body, REFUSAL_BYTES);
            let body = match tokio::time::timeout(REFUSAL_TIME, limited.collect()).await {
                Ok(Ok(body)) => body.to_bytes(),
                Ok(Err(_)) | Err(_) => Bytes::new(),
            };
            return Err(Refused::Answer(Refusal { status: parts.status, headers: parts.headers, body }));
        }
        // Up to here, and until the first bytes are in hand, another worker can answer instead.
        let first = match body.frame().await {
            None => None,
            Some(Ok(frame)) => Some(frame),
            Some(Err(error)) => return Err(Refused::Broken(innermost(&error))),
        };
        self.metrics.time_to_first_byte.observe((self.clock.now() - request.arrived).as_secs_f64());
        parts.headers = headers::to_client(parts.headers);
        if let Ok(name) = HeaderValue::from_str(sent.worker()) {
            parts.headers.insert(label::WORKER_HEADER, name);
        }
        let relay = Relay::new(&parts, first, body, sent);
        Ok(Response::from_parts(parts, Body::new(relay)))
    }

    fn give_up(&self, request: &Inference, why: Unserved, refusals: &Refusals, now: Moment) -> ForwardError {
        let retry_after = match &why {
            Unserved::Failed { retry_at, .. } => retry_at.map(|at| at.saturating_sub(seconds_since_epoch())),
            Unserved::ScaledToZero => None,
            Unserved::NoWorker => Some(30),
            Unserved::Refused => Some(refusals.next_end(now).map_or(1, |end| (end - now).as_secs())),
            Unserved::Unread | Unserved::Unreachable | Unserved::Starting | Unserved::OnItsWay => Some(5),
        };
        ForwardError::Unserved {
            model: model_name(request),
            why,
            waited: now - request.arrived,
            retry_after: retry_after.map(|s| s.max(1)),
        }
    }
}

/// Until when a request may be held: as long as its placement says, but only shortly where it
/// waits for news to arrive.
fn limit(view: &View, target: Option<&Target>, why: &Unserved, arrived: Moment) -> Moment {
    let Some(target) = target else { return arrived + NEWS_GRACE };
    let hold = view.catalog.group(target).map_or(Duration::ZERO, |(ns, _)| ns.hold(&target.model.group));
    match why {
        Unserved::OnItsWay => arrived + hold.min(NEWS_GRACE),
        _ => arrived + hold,
    }
}

fn model_name(request: &Inference) -> String {
    request.ask.model.clone().unwrap_or_else(|| "the default model".into())
}

fn is_refusal(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::NOT_FOUND
            | StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
    )
}

/// The worker's own words, for a client.
fn pass_on(refusal: Refusal, request: &Inference) -> Response<Body> {
    let mut response = Response::new(Body::from(refusal.body));
    *response.status_mut() = refusal.status;
    *response.headers_mut() = headers::to_client(refusal.headers);
    response.headers_mut().remove(header::CONTENT_LENGTH);
    tracing::debug!(status = %refusal.status, model = ?request.ask.model, "every worker refused");
    response
}

fn outgoing(request: &Inference, sent: &Sent) -> Result<Request<Full<Bytes>>, String> {
    let endpoint = &sent.worker.endpoint;
    let uri: Uri = format!("{}{}", endpoint.attached.data_url, request.path)
        .parse()
        .map_err(|e| format!("its address is not a URL: {e}"))?;
    let mut outgoing = Request::new(Full::new(request.body.clone()));
    *outgoing.method_mut() = Method::POST;
    *outgoing.uri_mut() = uri;
    *outgoing.headers_mut() = request.headers.clone();
    let headers = outgoing.headers_mut();
    let model = HeaderValue::from_str(&sent.target.model.to_string()).map_err(|e| e.to_string())?;
    headers.insert(label::MODEL_HEADER, model);
    let token = endpoint.token.bearer().map_err(|e| format!("no token could be made for it: {e}"))?;
    if let Some(token) = token {
        let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|e| e.to_string())?;
        value.set_sensitive(true);
        headers.insert(header::AUTHORIZATION, value);
    }
    Ok(outgoing)
}

fn log_refusal(worker: &Worker<Place>, request: &Inference, refused: &Refused) {
    let (worker, model) = (&worker.endpoint.id, request.ask.model.as_deref().unwrap_or_default());
    match refused {
        Refused::Unreachable(cause) => tracing::info!(%worker, model, cause, "worker cannot be reached"),
        Refused::Broken(cause) => {
            tracing::warn!(%worker, model, cause, "worker broke off before the first byte")
        }
        Refused::Answer(refusal) if refused.trouble() == Trouble::Token => {
            tracing::warn!(%worker, status = %refusal.status, "worker does not accept the gateway's token");
        }
        Refused::Answer(refusal) => {
            tracing::debug!(%worker, model, status = %refusal.status, "worker refused")
        }
    }
}

/// The innermost cause says what a person needs ("connection refused").
pub fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn seconds_since_epoch() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.expect("the clock is past 1970").as_secs()
}
