//! The control port: documents in, state out; what somebody asks by hand.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use turret_crds::WorkerDocument;
use turret_crds::document::{EvictionRule, Verdict};
use turret_crds::report::{LeaseReport, PolicyReport, StateEvent, diff};

use super::App;
use super::error::ApiError;
use super::models::{alias_of, find, leads_to};
use crate::document;
use crate::residency::orders::{Obeyed, Order, OrderError, lease_number};

/// Changes within this time travel together.
const COALESCE: Duration = Duration::from_millis(50);
/// A line at least this often.
const HEARTBEAT: Duration = Duration::from_secs(5);

/// What came of an offered document.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Offered {
    /// `Taken`, `Same` or `Stale`.
    verdict: &'static str,
    /// Sequence of the document that was applied last in all its parts.
    applied_sequence: Option<u64>,
}

/// `PUT /control/v1/document`.
pub async fn put_document(State(app): State<App>, body: Bytes) -> Result<Response, ApiError> {
    let document: WorkerDocument = serde_json::from_slice(&body)
        .map_err(|e| ApiError::invalid(None, format!("the body is not a worker document: {e}")))?;
    document::check(&document).map_err(|e| ApiError::invalid(None, e.to_string()))?;
    let (sequence, digest) = (document.sequence, document.digest.clone());
    let verdict = app.residency.offer(document).await;
    let applied_sequence = app.residency.view().report.state.document.as_ref().map(|d| d.sequence);
    let offered = |verdict| Json(Offered { verdict, applied_sequence }).into_response();
    match verdict {
        Verdict::Take => Ok(offered("Taken")),
        Verdict::Same => Ok(offered("Same")),
        Verdict::Stale => Ok(offered("Stale")),
        Verdict::Conflict => Err(ApiError::conflict(format!(
            "another document with sequence {sequence} is applied, this one has digest {digest}; somebody else writes documents too"
        ))),
    }
}

/// Query of `GET /control/v1/state`.
#[derive(Debug, Default, Deserialize)]
pub struct StateQuery {
    /// Stream the changes too.
    #[serde(default)]
    watch: bool,
}

/// `GET /control/v1/state`.
pub async fn get_state(State(app): State<App>, Query(query): Query<StateQuery>) -> Response {
    if query.watch { watch_state(app) } else { Json(app.residency.view().report.clone()).into_response() }
}

fn watch_state(app: App) -> Response {
    let lines = async_stream::stream! {
        let mut view = app.residency.watch();
        let mut last = view.borrow_and_update().report.clone();
        yield line(&StateEvent::Snapshot(Box::new(last.clone())));
        let mut heartbeat = Instant::now() + HEARTBEAT;
        loop {
            let ends = tokio::select! {
                changed = view.changed() => changed.is_err(),
                () = tokio::time::sleep_until(heartbeat) => {
                    heartbeat = Instant::now() + HEARTBEAT;
                    yield line(&StateEvent::Heartbeat);
                    continue;
                }
                () = app.stop.cancelled() => true,
            };
            if !ends {
                tokio::time::sleep(COALESCE).await;
            }
            let now = view.borrow_and_update().report.clone();
            if let Some(change) = diff(&last, &now) {
                last = now;
                heartbeat = Instant::now() + HEARTBEAT;
                yield line(&StateEvent::Change(change));
            }
            if ends {
                return;
            }
        }
    };
    let headers = [(header::CONTENT_TYPE, "application/x-ndjson"), (header::CACHE_CONTROL, "no-store")];
    (StatusCode::OK, headers, Body::from_stream(lines)).into_response()
}

fn line(event: &StateEvent) -> Result<Bytes, std::convert::Infallible> {
    let mut line = serde_json::to_vec(event).expect("a report is JSON");
    line.push(b'\n');
    Ok(line.into())
}

/// `GET /control/v1/policy`: the eviction policy that is declared, and in force.
pub async fn get_policy(State(app): State<App>) -> Json<PolicyReport> {
    let view = app.residency.view();
    let rule = view.document.as_ref().map_or_else(EvictionRule::default, |document| document.eviction);
    Json(rule.into())
}

/// What `{id}` in a path means: `GROUP:LENS`, or `LENS` where only one group has it.
fn lens_name(app: &App, id: &str) -> Result<(String, String), ApiError> {
    let view = app.residency.view();
    let document = view.document.as_deref();
    let name = find(document, id)?;
    if let Some(alias) = alias_of(document, &name) {
        let leads_to = leads_to(&name.group, alias);
        let message = format!("`{id}` is an alias; name a lens: it leads to {leads_to}");
        return Err(ApiError::invalid(Some("id"), message));
    }
    let lens = name.lens.ok_or_else(|| {
        ApiError::invalid(Some("id"), format!("`{id}` is a group; a lens is written GROUP:LENS"))
    })?;
    Ok((name.group, lens))
}

async fn order(app: &App, order: Order) -> Result<Obeyed, ApiError> {
    Ok(app.residency.order(order).await?)
}

/// Query of a load.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadQuery {
    /// How long to wait until the lens is in memory, seconds; after that it goes on being loaded. 0: not at all.
    #[serde(default = "one_minute")]
    wait_seconds: u32,
}

fn one_minute() -> u32 {
    60
}

/// `POST /control/v1/lenses/{id}/load`: brings a lens to the device. 204 once it is there, 202 if it takes longer than
/// `waitSeconds` (60).
pub async fn load(
    State(app): State<App>,
    Path(id): Path<String>,
    Query(query): Query<LoadQuery>,
) -> Result<StatusCode, ApiError> {
    let lens = lens_name(&app, &id)?;
    let residency = app.residency.clone();
    // Not given up with the connection, nor with the wait.
    let loading = tokio::spawn(async move { residency.order(Order::Load { lens }).await });
    match tokio::time::timeout(Duration::from_secs(query.wait_seconds.into()), loading).await {
        Ok(Ok(result)) => result.map(|_| StatusCode::NO_CONTENT).map_err(ApiError::from),
        Ok(Err(panicked)) => Err(ApiError::internal(panicked.to_string())),
        Err(_) => Ok(StatusCode::ACCEPTED),
    }
}

/// `POST /control/v1/lenses/{id}/evict`: lets a lens leave the device. 409 while rows use it, or when it is pinned or leased.
pub async fn evict(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let lens = lens_name(&app, &id)?;
    order(&app, Order::Evict { lens }).await?;
    Ok(StatusCode::ACCEPTED)
}

/// `POST /control/v1/lenses/{id}/pin`: keeps a lens on the device until the worker restarts; `residency: Pinned` in its
/// ModelGroup keeps it for good.
pub async fn pin(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let lens = lens_name(&app, &id)?;
    order(&app, Order::Pin { lens, pinned: true }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `DELETE /control/v1/lenses/{id}/pin`: lets a lens that was pinned by hand leave again. 409 when it is declared `Pinned`.
pub async fn unpin(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let lens = lens_name(&app, &id)?;
    order(&app, Order::Pin { lens, pinned: false }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Body of `POST /control/v1/lenses/{id}/feedback`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewFeedback {
    /// From 0, useless, to 1, perfect.
    score: f64,
}

/// `POST /control/v1/lenses/{id}/feedback`: counts what somebody thinks of a lens's answer. The state has the mean.
pub async fn rate(
    State(app): State<App>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<StatusCode, ApiError> {
    let lens = lens_name(&app, &id)?;
    let NewFeedback { score } = read(&body)?;
    if !(0.0..=1.0).contains(&score) {
        return Err(ApiError::invalid(Some("score"), format!("`score` is {score}; it goes from 0 to 1")));
    }
    order(&app, Order::Rate { lens, score_milli: (score * 1000.0).round() as u32 }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /control/v1/groups/{group}/activate`: makes a group's base the active one, as a switch for waiting requests does.
pub async fn activate(State(app): State<App>, Path(group): Path<String>) -> Result<StatusCode, ApiError> {
    order(&app, Order::Switch { group }).await?;
    Ok(StatusCode::ACCEPTED)
}

/// Body of `POST /control/v1/leases`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NewLease {
    /// `GROUP:LENS`, or `LENS` where only one group has it.
    lens: String,
    /// Seconds until it ends, unless it is renewed.
    ttl_seconds: u64,
    /// Where there is no room for all, the higher comes first. 0 when absent.
    #[serde(default)]
    priority: u32,
    /// Who holds it, in the client's own words: for whoever looks at the list.
    #[serde(default)]
    holder: Option<String>,
}

/// Longest name of a holder.
const MAX_HOLDER: usize = 128;

/// `POST /control/v1/leases`: reserves a lens. It is loaded, and not evicted before the lease ends.
pub async fn acquire_lease(State(app): State<App>, body: Bytes) -> Result<Response, ApiError> {
    let wanted: NewLease = read(&body)?;
    if wanted.holder.as_ref().is_some_and(|holder| holder.len() > MAX_HOLDER) {
        let what = format!("`holder` is longer than {MAX_HOLDER} bytes");
        return Err(ApiError::invalid(Some("holder"), what));
    }
    let lens = lens_name(&app, &wanted.lens)?;
    let ttl = Duration::from_secs(wanted.ttl_seconds);
    let (holder, priority) = (wanted.holder, wanted.priority);
    let lease = order(&app, Order::AcquireLease { lens, holder, priority, ttl }).await?;
    Ok((StatusCode::CREATED, lease_body(lease)).into_response())
}

/// Body of `PUT /control/v1/leases/{id}`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Renewal {
    /// Seconds from now until it ends, whatever was left.
    ttl_seconds: u64,
}

/// `PUT /control/v1/leases/{id}`: lets a lease run longer. 404 when it has ended.
pub async fn renew_lease(
    State(app): State<App>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<Response, ApiError> {
    let renewal: Renewal = read(&body)?;
    let id = lease_id(&app, &id)?;
    let ttl = Duration::from_secs(renewal.ttl_seconds);
    Ok(lease_body(order(&app, Order::RenewLease { id, ttl }).await?).into_response())
}

/// `DELETE /control/v1/leases/{id}`: ends a lease. 404 when it has ended already.
pub async fn release_lease(State(app): State<App>, Path(id): Path<String>) -> Result<StatusCode, ApiError> {
    let id = lease_id(&app, &id)?;
    order(&app, Order::ReleaseLease { id }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Body of `GET /control/v1/leases`.
#[derive(Debug, Serialize)]
struct LeaseList {
    /// The oldest first.
    leases: Arc<Vec<LeaseReport>>,
}

/// `GET /control/v1/leases`: all that run.
pub async fn list_leases(State(app): State<App>) -> Response {
    Json(LeaseList { leases: app.residency.view().leases.clone() }).into_response()
}

fn lease_id(app: &App, id: &str) -> Result<u64, ApiError> {
    let instance = &app.residency.view().report.worker.instance;
    lease_number(id, instance).map_err(|error| OrderError::from(error).into())
}

fn lease_body(obeyed: Obeyed) -> Json<Option<LeaseReport>> {
    match obeyed {
        Obeyed::Lease(lease) => Json(Some(lease)),
        Obeyed::Done => Json(None),
    }
}

fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(body)
        .map_err(|e| ApiError::invalid(None, format!("the body is not what is expected: {e}")))
}

/// `POST /control/v1/retry`: looks again, at once, at what failed: bases, lenses and files that could not be fetched.
pub async fn retry(State(app): State<App>) -> Result<StatusCode, ApiError> {
    order(&app, Order::Retry).await?;
    Ok(StatusCode::ACCEPTED)
}

/// `POST /control/v1/drain`: takes no new requests from now on, and reports the worker as not ready; what runs and waits
/// goes on. The process does not end; SIGTERM does that.
pub async fn drain(State(app): State<App>) -> Result<StatusCode, ApiError> {
    order(&app, Order::Drain { drained: true }).await?;
    Ok(StatusCode::ACCEPTED)
}

/// `DELETE /control/v1/drain`: takes requests again. 503 when the process is about to end.
pub async fn undrain(State(app): State<App>) -> Result<StatusCode, ApiError> {
    order(&app, Order::Drain { drained: false }).await?;
    Ok(StatusCode::NO_CONTENT)
}
