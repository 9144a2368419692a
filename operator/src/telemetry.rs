//! Logs: text for people on a terminal, JSON in a pod; filtered by `RUST_LOG`, and as somebody says later.

use std::io::IsTerminal;

use tracing_subscriber::{
    EnvFilter, Registry, filter::ParseError, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

/// What is logged, changeable while the process runs. Cheap to clone.
#[derive(Clone)]
pub struct LogFilter(reload::Handle<EnvFilter, Registry>);

/// Why what is logged stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum LogFilterError {
    /// Nothing was said.
    #[error("say what to log: a level such as `info`, or directives such as `info,turret_operator=debug`")]
    Empty,
    /// It cannot be understood.
    #[error("`{directives}` cannot be understood: {source}")]
    Malformed {
        /// What was said.
        directives: String,
        /// Why.
        source: ParseError,
    },
    /// Nothing is logged by this process, or by other means.
    #[error("the log cannot be changed: {0}")]
    Gone(#[from] reload::Error),
}

impl LogFilter {
    /// What is logged now, as `RUST_LOG` says it.
    pub fn directives(&self) -> String {
        self.0.with_current(ToString::to_string).unwrap_or_default()
    }

    /// Logs this from now on, as `RUST_LOG` says it. On an error nothing changes.
    pub fn set(&self, directives: &str) -> Result<(), LogFilterError> {
        let directives = directives.trim();
        if directives.is_empty() {
            return Err(LogFilterError::Empty);
        }
        let filter = EnvFilter::try_new(directives)
            .map_err(|source| LogFilterError::Malformed { directives: directives.to_owned(), source })?;
        // Said before it may not be heard any more, and after, when it may be heard at last.
        tracing::info!(directives, "what is logged changes");
        self.0.reload(filter)?;
        tracing::debug!(directives, "what is logged has changed");
        Ok(())
    }
}

/// A filter with these directives, which [`LogFilter`] changes. What is wrong in them is left out.
pub fn filter(directives: &str) -> (reload::Layer<EnvFilter, Registry>, LogFilter) {
    let (layer, handle) = reload::Layer::new(EnvFilter::new(directives));
    (layer, LogFilter(handle))
}

/// Starts logging to stderr. Does nothing when logging is started already.
pub fn start() -> LogFilter {
    let (filter, log) = filter("info,kube_client=warn,kube_runtime=warn");
    if let Ok(from_environment) = EnvFilter::try_from_default_env() {
        // Nobody else has the filter yet.
        let _ = log.0.reload(from_environment);
    }
    let registry = tracing_subscriber::registry().with(filter);
    // A second start (in tests) is no error: the first one keeps logging.
    let _ = if std::io::stderr().is_terminal() {
        registry.with(fmt::layer().with_writer(std::io::stderr)).try_init()
    } else {
        registry.with(fmt::layer().with_writer(std::io::stderr).json().flatten_event(true)).try_init()
    };
    log
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
