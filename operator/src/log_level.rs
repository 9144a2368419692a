//! `/loglevel`: what is logged, changed while the process runs.
//!
//! ```sh
//! kubectl -n turret-system port-forward deployment/turret-operator 8080 &
//! curl http://127.0.0.1:8080/loglevel
//! curl -X PUT http://127.0.0.1:8080/loglevel -d info,turret_operator=debug
//! ```
//!
//! It is changed from the same machine only, which is where a forwarded port comes from: who may do that is decided by the
//! cluster.

use std::net::{IpAddr, SocketAddr};

use axum::{
    Router,
    extract::{ConnectInfo, DefaultBodyLimit, State},
    routing::get,
};
use http::StatusCode;

use crate::telemetry::{LogFilter, LogFilterError};

/// Longest directives, bytes.
const MAX_BYTES: usize = 4096;

/// The route. The server must know its peers' addresses (`into_make_service_with_connect_info`).
pub fn routes(log: LogFilter) -> Router {
    Router::new()
        .route("/loglevel", get(show).put(change))
        .layer(DefaultBodyLimit::max(MAX_BYTES))
        .with_state(log)
}

async fn show(State(log): State<LogFilter>) -> String {
    format!("{}\n", log.directives())
}

async fn change(
    State(log): State<LogFilter>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    directives: String,
) -> (StatusCode, String) {
    if !is_this_machine(peer.ip()) {
        let why = "the log level is changed from the same machine only; kubectl port-forward leads there\n";
        return (StatusCode::FORBIDDEN, why.into());
    }
    match log.set(&directives) {
        Ok(()) => (StatusCode::OK, format!("{}\n", log.directives())),
        Err(error @ LogFilterError::Gone(_)) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")),
    }
}

fn is_this_machine(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use axum::{body::Body, extract::connect_info::MockConnectInfo};
    use http::Request;
    use http_body_util::BodyExt;
    use tower::ServiceExt;

    use super::*;
    use crate::telemetry;

    async fn ask(log: &telemetry::LogFilter, peer: &str, method: &str, body: &str) -> (u16, String) {
        let peer: SocketAddr = peer.parse().unwrap();
        let routes = routes(log.clone()).layer(MockConnectInfo(peer));
        let request =
            Request::builder().method(method).uri("/loglevel").body(Body::from(body.to_owned())).unwrap();
        let response = routes.oneshot(request).await.unwrap();
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(bytes.to_vec()).unwrap())
    }

    #[tokio::test]
    async fn the_level_is_told_to_everybody_and_changed_from_this_machine_only() {
        let (layer, log) = telemetry::filter("info");
        let (near, mapped, far) = ("127.0.0.1:1", "[::ffff:127.0.0.1]:1", "10.0.0.7:1");
        assert_eq!(ask(&log, far, "GET", "").await, (200, "info\n".into()));
        assert_eq!(ask(&log, far, "PUT", "debug").await.0, 403);
        assert_eq!(
            ask(&log, near, "PUT", "turret_operator=debug\n").await,
            (200, "turret_operator=debug\n".into())
        );
        assert_eq!(ask(&log, mapped, "PUT", "warn").await, (200, "warn\n".into()));
        for wrong in ["", "  ", "turret_operator=loud", "a=b=c"] {
            let (status, said) = ask(&log, near, "PUT", wrong).await;
            assert_eq!(status, 400, "`{wrong}`: {said}");
        }
        assert_eq!(ask(&log, near, "PUT", &"x".repeat(5000)).await.0, 413);
        assert_eq!(ask(&log, near, "GET", "").await.1, "warn\n", "what is refused changes nothing");
        drop(layer);
        assert_eq!(ask(&log, near, "PUT", "info").await.0, 500, "nobody logs any more");
    }
}
