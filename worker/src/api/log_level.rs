//! `/loglevel` on the control port: what is logged, changed while the worker runs.
//!
//! It needs no token, since what it shows is no secret, and is changed from the same machine only: that is where `kubectl
//! port-forward` comes from, and who may do that is decided by the cluster.

use std::net::{IpAddr, SocketAddr};

use axum::Router;
use axum::extract::{ConnectInfo, DefaultBodyLimit, State};
use axum::routing::get;

use super::error::ApiError;
use crate::telemetry::LogFilter;

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
) -> Result<String, ApiError> {
    if !is_this_machine(peer.ip()) {
        let why = "the log level is changed from the same machine only; kubectl port-forward leads there";
        return Err(ApiError::forbidden(why));
    }
    log.set(&directives).map_err(|error| ApiError::invalid(None, error.to_string()))?;
    Ok(format!("{}\n", log.directives()))
}

fn is_this_machine(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_this_machine_in_either_notation() {
        for (address, is_near) in [
            ("127.0.0.1", true),
            ("::1", true),
            ("::ffff:127.0.0.1", true),
            ("10.0.0.7", false),
            ("::ffff:10.0.0.7", false),
        ] {
            assert_eq!(is_this_machine(address.parse().unwrap()), is_near, "{address}");
        }
    }
}
