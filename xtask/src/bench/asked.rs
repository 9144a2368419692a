//! An engine that runs, and takes what it is asked for.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// For loading an engine, and for a take.
const PATIENCE: Duration = Duration::from_secs(240);

/// A process of an engine. It waits, using nothing, while others take their turns.
pub(super) struct Asked {
    process: Child,
    answers: Receiver<String>,
    /// What it prints beside its answers.
    log: PathBuf,
    /// Version and instruction sets, in the engine's own words.
    pub(super) info: String,
    pub(super) takes: Vec<String>,
    /// All that it says of itself.
    pub(super) about: Value,
}

impl Asked {
    /// Starts it and waits until it is ready for the first question.
    pub(super) fn start(command: &mut Command, log: &Path) -> Result<Self> {
        let errors = File::create(log).with_context(|| format!("failed to write {}", log.display()))?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors);
        let program = Path::new(command.get_program()).display().to_string();
        let mut process = command.spawn().with_context(|| format!("failed to run {program}"))?;
        let lines = BufReader::new(process.stdout.take().expect("it is piped")).lines();
        let (sender, answers) = channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let mut asked = Self {
            process,
            answers,
            log: log.to_owned(),
            info: String::new(),
            takes: Vec::new(),
            about: Value::Null,
        };
        let about = asked.answer()?;
        asked.info = about["info"].as_str().context("the engine does not say what it is")?.trim().to_owned();
        let takes = about["takes"].as_array().context("the engine does not say what it can do")?;
        asked.takes = takes.iter().filter_map(|name| Some(name.as_str()?.to_owned())).collect();
        asked.about = about;
        Ok(asked)
    }

    /// Seconds by what was found.
    pub(super) fn take(&mut self, name: &str) -> Result<BTreeMap<String, f64>> {
        let questions = self.process.stdin.as_mut().expect("it is piped");
        writeln!(questions, "{name}").context("the engine listens no more")?;
        seconds_of(&self.answer()?)
    }

    /// Whether it can be asked again.
    pub(super) fn is_there(&mut self) -> bool {
        matches!(self.process.try_wait(), Ok(None))
    }

    fn answer(&mut self) -> Result<Value> {
        match self.answers.recv_timeout(PATIENCE) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("`{line}` is no answer")),
            Err(_) => {
                let _ = self.process.kill();
                let end = self.process.wait()?;
                let said = std::fs::read_to_string(&self.log).unwrap_or_default();
                match said.lines().rev().find(|line| !line.trim().is_empty()) {
                    Some(last) => bail!("{end}: {last}"),
                    None => bail!("{end}, after at most {} seconds, without a word", PATIENCE.as_secs()),
                }
            }
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        // Nothing it holds outlives it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn seconds_of(answer: &Value) -> Result<BTreeMap<String, f64>> {
    if let Some(error) = answer["error"].as_str() {
        bail!("{error}");
    }
    let found = answer["seconds"].as_object().with_context(|| format!("{answer} has no seconds"))?;
    let seconds = found.iter().map(|(name, value)| {
        let value = value.as_f64().filter(|value| *value > 0.0);
        anyhow::Ok((name.clone(), value.with_context(|| format!("`{name}` took no time"))?))
    });
    let seconds: BTreeMap<_, _> = seconds.collect::<Result<_>>()?;
    ensure!(!seconds.is_empty(), "nothing was found");
    Ok(seconds)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shell(script: &str) -> Result<Asked> {
        let folder = tempfile::tempdir()?;
        Asked::start(Command::new("sh").args(["-c", script]), &folder.path().join("log"))
    }

    #[test]
    fn an_engine_is_asked_line_by_line() {
        let script = r#"
            echo '{"info": "shell ", "takes": ["one"], "more": 3}'
            read -r name; echo "{\"seconds\": {\"$name\": 0.5}}"
            read -r name; echo '{"error": "tired"}'
            read -r name; echo "out of memory" >&2; exit 3"#;
        let mut asked = shell(script).unwrap();
        assert_eq!((asked.info.as_str(), &asked.takes[..]), ("shell", &["one".to_owned()][..]));
        assert_eq!(asked.about["more"], 3);
        assert_eq!(asked.take("one").unwrap(), BTreeMap::from([("one".into(), 0.5)]));
        assert_eq!(asked.take("one").unwrap_err().to_string(), "tired");
        assert!(asked.is_there());
        let gone = asked.take("one").unwrap_err().to_string();
        assert!(gone.contains("exit status: 3"), "{gone}");
        assert!(!asked.is_there());
    }

    #[test]
    fn an_engine_that_does_not_start_says_why() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut command = Command::new("sh");
        let started = Asked::start(command.args(["-c", "echo no such model >&2; exit 2"]), &log);
        assert_eq!(started.err().unwrap().to_string(), "exit status: 2: no such model");
    }

    #[test]
    fn an_answer_without_seconds_is_none() {
        assert!(seconds_of(&json!({"seconds": {"one": 0.0}})).is_err());
        assert!(seconds_of(&json!({"seconds": {}})).is_err());
        assert!(seconds_of(&json!({})).is_err());
    }
}
