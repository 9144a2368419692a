//! How far something is that somebody waits for: told by the worker's state, drawn on a terminal.

use std::io::{self, IsTerminal as _, Write as _};

use turret_crds::report::{ArtifactState, WorkerReport};

use super::ControlError;
use super::client::Client;
use super::show::printable;

/// Cells of the bar.
const CELLS: usize = 24;

/// Where a switch to the base of a group stands.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Stand {
    /// It is the active one.
    Active,
    /// It is not yet; how much of it is loaded, while it is.
    OnItsWay(Option<u8>),
    /// It will not be.
    Failed(String),
}

/// Waits for an answer. Meanwhile shows how far a lens is, to whoever sits at a terminal.
pub(super) async fn beside<T>(asked: impl Future<Output = T>, client: &Client, lens: &str) -> T {
    let Some(mut bar) = Bar::on_terminal() else { return asked.await };
    let draw = async {
        // Whoever cannot see how far it is waits all the same.
        if let Ok(mut watch) = client.watch().await {
            while let Ok(report) = watch.report().await {
                if let Some(percent) = lens_percent(report, lens) {
                    bar.draw(lens, percent);
                }
            }
        }
        std::future::pending::<()>().await;
    };
    tokio::select! {
        answer = asked => answer,
        () = draw => unreachable!("it waits for ever"),
    }
}

/// Waits until the base of a group is active. Shows meanwhile how far it is, to whoever sits at a terminal.
pub(super) async fn until_active(client: &Client, group: &str) -> Result<(), ControlError> {
    let mut bar = Bar::on_terminal();
    let mut watch = client.watch().await?;
    loop {
        match stand(watch.report().await?, group) {
            Stand::Active => return Ok(()),
            Stand::Failed(reason) => return Err(ControlError::Refused { reason }),
            Stand::OnItsWay(Some(percent)) => {
                if let Some(bar) = &mut bar {
                    bar.draw(group, percent);
                }
            }
            Stand::OnItsWay(None) => {}
        }
    }
}

/// How much of an artifact is loaded, while it is.
pub(super) fn loading(state: &ArtifactState) -> Option<u8> {
    match state {
        ArtifactState::Loading { percent } => Some(*percent),
        _ => None,
    }
}

/// How much of a lens is loaded. It is called `GROUP:LENS` or, where the worker did not mind, by its name alone.
fn lens_percent(report: &WorkerReport, called: &str) -> Option<u8> {
    let lens = report.lenses.iter().find(|lens| match called.split_once(':') {
        Some((group, name)) => lens.group == group && lens.name == name,
        None => lens.name == called,
    })?;
    loading(&lens.state)
}

fn stand(report: &WorkerReport, group: &str) -> Stand {
    let Some(base) = report.base_of(group) else {
        return Stand::Failed(format!("`{group}` is no longer declared"));
    };
    if report.state.active_base.as_ref() == Some(&base.key) {
        return Stand::Active;
    }
    match &base.state {
        ArtifactState::Failed { reason, message, .. } => {
            Stand::Failed(printable(&format!("the base of `{group}` cannot be served: {reason}: {message}")))
        }
        state => Stand::OnItsWay(loading(state)),
    }
}

/// One line on the terminal, drawn over and over, gone at its end. It is on standard error, so that what is printed can
/// be piped.
struct Bar {
    width: usize,
}

impl Bar {
    fn on_terminal() -> Option<Self> {
        io::stderr().is_terminal().then_some(Self { width: 0 })
    }

    fn draw(&mut self, what: &str, percent: u8) {
        self.put(&bar(what, percent));
    }

    fn put(&mut self, text: &str) {
        let width = self.width;
        let mut out = io::stderr().lock();
        // A bar that cannot be drawn is no reason to stop what it is about.
        let _ = write!(out, "\r{text:<width$}").and_then(|()| out.flush());
        self.width = text.chars().count();
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if self.width > 0 {
            self.put("");
            let _ = write!(io::stderr(), "\r");
        }
    }
}

fn bar(what: &str, percent: u8) -> String {
    let full = CELLS * usize::from(percent.min(100)) / 100;
    format!("{} [{}{}] {percent:>3} %", printable(what), "#".repeat(full), "-".repeat(CELLS - full))
}

#[cfg(test)]
mod tests {
    use turret_crds::condition::FailureReason;
    use turret_crds::document::BaseKey;

    use super::super::show::tests::report;
    use super::*;

    #[test]
    fn a_bar_is_as_long_at_its_end_as_at_its_beginning() {
        assert_eq!(bar("a:b", 0), "a:b [------------------------]   0 %");
        assert_eq!(bar("a:b", 50), "a:b [############------------]  50 %");
        assert_eq!(bar("a:b", 100), "a:b [########################] 100 %");
    }

    #[test]
    fn a_lens_is_found_under_its_whole_name_and_its_own() {
        let report = report();
        for (called, percent) in
            [("a:json", Some(40)), ("json", Some(40)), ("b:json", None), ("a:french", None), ("", None)]
        {
            assert_eq!(lens_percent(&report, called), percent, "{called}");
        }
    }

    #[test]
    fn a_switch_is_over_when_the_base_is_active_or_cannot_be() {
        let mut report = report();
        assert_eq!(stand(&report, "a"), Stand::Active);
        assert_eq!(stand(&report, "b"), Stand::OnItsWay(Some(70)));
        report.bases[1].state = ArtifactState::Ready;
        assert_eq!(stand(&report, "b"), Stand::OnItsWay(None), "rows end first");
        report.state.active_base = Some(BaseKey("key-b".into()));
        assert_eq!(stand(&report, "b"), Stand::Active);
        report.bases[0].state = ArtifactState::Failed {
            reason: FailureReason::DoesNotFit,
            message: "9 bytes too many".into(),
            retry_at: None,
        };
        let failed = "the base of `a` cannot be served: DoesNotFit: 9 bytes too many";
        assert_eq!(stand(&report, "a"), Stand::Failed(failed.into()));
        assert_eq!(stand(&report, "d"), Stand::Failed("`d` is no longer declared".into()));
    }
}
