//! Logging: one line per event on standard error, as text for people or JSON where a cluster collects it. What is logged can be
//! changed while the process runs.

use std::io::IsTerminal;

use tracing_subscriber::filter::ParseError;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, reload};

/// What is logged, changeable while the process runs. Cheap to clone.
#[derive(Clone)]
pub struct LogFilter(reload::Handle<EnvFilter, Registry>);

/// Why what is logged stays as it is.
#[derive(Debug, thiserror::Error)]
pub enum LogFilterError {
    /// Nothing was said.
    #[error("say what to log: a level such as `info`, or directives such as `info,turret_worker=debug`")]
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

    /// Logs this from now on, as `RUST_LOG` says it.
    ///
    /// # Errors
    /// When it cannot be understood. Nothing changes then.
    pub fn set(&self, directives: &str) -> Result<(), LogFilterError> {
        let directives = directives.trim();
        if directives.is_empty() {
            return Err(LogFilterError::Empty);
        }
        let filter = EnvFilter::try_new(directives)
            .map_err(|source| LogFilterError::Malformed { directives: directives.to_owned(), source })?;
        tracing::info!(directives, "what is logged changes");
        self.0.reload(filter)?;
        Ok(())
    }
}

/// Starts logging. `RUST_LOG` chooses what is logged at first; `json` writes one JSON object per line.
pub fn start(json: bool) -> LogFilter {
    // hf-hub calls every refusal of a hub an error, before it is known what becomes of it.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info,hf_hub=off"));
    let (filter, handle) = reload::Layer::new(filter);
    let for_people = std::io::stderr().is_terminal();
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(for_people);
    let registry = tracing_subscriber::registry().with(filter);
    if json {
        registry.with(log.json().flatten_event(true)).init();
    } else {
        registry.with(log.with_target(false)).init();
    }
    LogFilter(handle)
}

/// An error with all its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_logged_changes_to_what_can_be_understood() {
        let (layer, handle) = reload::Layer::<EnvFilter, Registry>::new(EnvFilter::new("info"));
        let log = LogFilter(handle);
        assert_eq!(log.directives(), "info");
        log.set(" turret_worker=debug\n").unwrap();
        assert_eq!(log.directives(), "turret_worker=debug");
        assert!(matches!(log.set(" "), Err(LogFilterError::Empty)));
        assert!(matches!(log.set("turret_worker=loud"), Err(LogFilterError::Malformed { .. })));
        assert_eq!(log.directives(), "turret_worker=debug", "what is refused changes nothing");
        drop(layer);
        assert!(matches!(log.set("info"), Err(LogFilterError::Gone(_))));
    }
}
