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

/// An error with all its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        let says = source.to_string();
        // Some errors repeat the text of their cause.
        if !text.contains(&says) {
            text = format!("{text}: {says}");
        }
        cause = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chain_tells_every_cause_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("failed to apply")]
        struct Outer(#[source] std::io::Error);
        assert_eq!(chain(&Outer(std::io::Error::other("no room"))), "failed to apply: no room");
        assert_eq!(chain(&std::io::Error::other("no room")), "no room");
    }
}
