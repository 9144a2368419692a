//! Logs: text for people on a terminal, JSON in a pod; filtered by `RUST_LOG`.

use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, fmt};

/// Starts logging to stderr. Does nothing when logging is started already.
pub fn start() {
    let filter = EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| EnvFilter::new("info,kube_client=warn,kube_runtime=warn"));
    let builder = fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A second start (in tests) is no error: the first one keeps logging.
    let _ = if std::io::stderr().is_terminal() {
        builder.try_init()
    } else {
        builder.json().flatten_event(true).try_init()
    };
}
