//! The admin port: the fleet view and the log level. Who can reach it sees all namespaces, so it is an address of its own,
//! and none where nobody asks for one.

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{Query, State},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use http::{HeaderMap, HeaderValue, StatusCode, header};

use crate::{
    gateway::{
        directory::Directory,
        fleet_view::{Filter, html, page},
    },
    log_level,
    telemetry::LogFilter,
};

/// What a browser may do with the page: show it.
const POLICY: &str =
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; frame-ancestors 'none'";

/// The routes. The server must know its peers' addresses, see [`log_level`].
pub fn router(directory: Arc<Directory>, log: LogFilter) -> Router {
    Router::new()
        .route("/", get(fleet))
        .route("/fleet", get(fleet))
        .with_state(directory)
        .merge(log_level::routes(log))
}

/// `GET /fleet`: a page for who accepts HTML, JSON for all others.
async fn fleet(
    State(directory): State<Arc<Directory>>,
    Query(filter): Query<Filter>,
    headers: HeaderMap,
) -> Response {
    let view = directory.view();
    let for_people = accepts_html(&headers);
    // Thousands of lenses are put in order: requests are not to wait for that.
    let written = tokio::task::spawn_blocking(move || {
        let page = page(&view, &filter);
        if for_people {
            return ([(header::CONTENT_SECURITY_POLICY, POLICY)], Html(html::render(&page, &filter)))
                .into_response();
        }
        Json(page).into_response()
    });
    let mut response = match written.await {
        Ok(response) => response,
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")).into_response(),
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::VARY, HeaderValue::from_static("accept"));
    response
}

fn accepts_html(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|kind| kind.trim().starts_with("text/html"))
}
