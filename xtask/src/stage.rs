//! Stages: what a command is doing now, and how long each part of it took.
//!
//! Everything goes to stderr, so that what a command answers on stdout can be piped.
//! A stage that is quick prints one line when it ends. One that lasts says so after two
//! seconds and then every ten, with the latest note, so that nobody watches a silent screen.

use std::fmt::Display;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// When a stage that still runs first says so.
const FIRST_LINE: Duration = Duration::from_secs(2);
/// How often it says so afterwards.
const NEXT_LINE: Duration = Duration::from_secs(10);

/// A stage that is running; tells of itself until it ends.
pub struct Stage {
    name: String,
    began: Instant,
    note: Arc<Mutex<String>>,
    ticker: Option<(Sender<()>, JoinHandle<()>)>,
}

/// Runs `work` as a stage called `name`, and says how long it took or that it failed.
pub fn run<T, E>(name: impl Into<String>, work: impl FnOnce(&Stage) -> Result<T, E>) -> Result<T, E> {
    let stage = Stage::begin(name);
    let result = work(&stage);
    stage.end(if result.is_ok() { Ending::Done } else { Ending::Failed });
    result
}

/// Prints a line that belongs to no stage.
pub fn say(line: impl Display) {
    eprintln!("{line}");
}

enum Ending {
    Done,
    Failed,
}

impl Stage {
    /// Starts a stage. Prefer [`run`], which cannot forget to end it.
    fn begin(name: impl Into<String>) -> Stage {
        let name = name.into();
        let began = Instant::now();
        let note = Arc::new(Mutex::new(String::new()));
        let (ended, wait) = mpsc::channel::<()>();
        let ticker = std::thread::spawn({
            let (name, note) = (name.clone(), Arc::clone(&note));
            move || {
                let mut pause = FIRST_LINE;
                while wait.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
                    let note = note.lock().unwrap_or_else(PoisonError::into_inner).clone();
                    eprintln!("{}", progress_line(&name, &note, began.elapsed()));
                    pause = NEXT_LINE;
                }
            }
        });
        Stage { name, began, note, ticker: Some((ended, ticker)) }
    }

    /// Says what the stage is at; shown with its next progress line.
    pub fn note(&self, text: impl Into<String>) {
        *self.note.lock().unwrap_or_else(PoisonError::into_inner) = text.into();
    }

    fn end(mut self, ending: Ending) {
        self.stop_ticker();
        eprintln!("{}", last_line(&self.name, &ending, self.began.elapsed()));
    }

    fn stop_ticker(&mut self) {
        if let Some((ended, ticker)) = self.ticker.take() {
            drop(ended);
            // The ticker only prints; that it panicked is no reason to fail the stage.
            let _ = ticker.join();
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.stop_ticker();
    }
}

fn progress_line(name: &str, note: &str, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs();
    if note.is_empty() {
        format!("  … {name}, {seconds} s")
    } else {
        format!("  … {name}, {seconds} s: {note}")
    }
}

fn last_line(name: &str, ending: &Ending, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64();
    match ending {
        Ending::Done => format!("▸ {name} … {seconds:.1} s"),
        Ending::Failed => format!("✗ {name} … failed after {seconds:.1} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_stage_shows_tenths_of_seconds() {
        let line = last_line("building", &Ending::Done, Duration::from_millis(312_440));
        assert_eq!(line, "▸ building … 312.4 s");
    }

    #[test]
    fn a_failed_stage_says_so_and_hands_the_error_on() {
        let result: Result<(), &str> = run("trying", |_| Err("no"));
        assert_eq!(result, Err("no"));
        let line = last_line("trying", &Ending::Failed, Duration::ZERO);
        assert_eq!(line, "✗ trying … failed after 0.0 s");
    }

    #[test]
    fn progress_shows_the_latest_note_only_when_there_is_one() {
        let fifteen = Duration::from_secs(15);
        assert_eq!(progress_line("building", "", fifteen), "  … building, 15 s");
        assert_eq!(progress_line("building", "kubelet", fifteen), "  … building, 15 s: kubelet");
    }
}
