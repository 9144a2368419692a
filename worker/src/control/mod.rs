//! `turret-worker control`: a worker's control port, by hand.
//!
//! [`client`] asks, [`progress`] tells how far something is that somebody waits for, [`show`] turns answers into text for
//! people. What is asked here is what the port allows: declared things sooner, or kept longer, never contradicted.

mod client;
mod progress;
mod show;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Args, Subcommand};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;
use serde_json::{Value, json};
use turret_crds::WorkerReport;
use turret_crds::report::{LeaseReport, PolicyReport, StateEvent};

use crate::config::{TokenError, static_token};
use crate::residency::orders::epoch_seconds;
use client::Client;

/// Where a worker listens that was told nothing else.
const DEFAULT_URL: &str = "http://127.0.0.1:8081";
/// Heading of the options that every command has.
const EVERYWHERE: &str = "Options of every command";
const AFTER_HELP: &str = "\
A lens is written GROUP:LENS; its name alone will do where only one group has it. What is declared (residency, budgets,
policy) can be carried out sooner by hand, not contradicted: change it in the ModelGroup or the ModelPlacement.

In a cluster, `kubectl port-forward POD 8081` leads to a worker's control port.";

/// Options of `control`.
#[derive(Clone, Debug, Args)]
#[group(skip)]
#[command(after_help = AFTER_HELP)]
pub struct ControlArgs {
    #[command(subcommand)]
    command: ControlCommand,
    /// The worker's control port.
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "TURRET_CONTROL_URL",
        default_value = DEFAULT_URL,
        value_parser = parse_url,
        help_heading = EVERYWHERE
    )]
    url: Url,
    /// The token that the worker was started with, or one signed for it.
    #[arg(
        long,
        global = true,
        value_name = "TOKEN",
        env = "TURRET_TOKEN",
        hide_env_values = true,
        help_heading = EVERYWHERE
    )]
    token: Option<String>,
    /// The same, read from a file; goes before --token.
    #[arg(long, global = true, value_name = "FILE", help_heading = EVERYWHERE)]
    token_file: Option<PathBuf>,
    /// Print the answer as JSON.
    #[arg(long, global = true, help_heading = EVERYWHERE)]
    json: bool,
}

#[derive(Clone, Debug, Subcommand)]
enum ControlCommand {
    /// Show what the worker holds: the active base, bytes in every tier, bases, lenses.
    State {
        /// Go on with a line for every change, until the worker ends or you interrupt it. With --json: the worker's own
        /// stream, a JSON object a line.
        #[arg(long)]
        watch: bool,
    },
    /// Bring lenses into memory before a request needs them.
    #[command(visible_alias = "preload")]
    Load {
        /// The lenses.
        #[arg(value_name = "GROUP:LENS", required = true)]
        lenses: Vec<String>,
        /// How long to wait until all are there; after that they go on being loaded, and this ends with 1. 0: not at all.
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        wait: u32,
    },
    /// Let a lens leave memory, unless rows use it or something keeps it.
    #[command(visible_alias = "unload")]
    Evict {
        /// The lens.
        #[arg(value_name = "GROUP:LENS")]
        lens: String,
    },
    /// Keep a lens in memory until the worker restarts. `residency: Pinned` in its ModelGroup keeps it for good.
    Pin {
        /// The lens.
        #[arg(value_name = "GROUP:LENS")]
        lens: String,
    },
    /// Let a lens that was pinned by hand leave again.
    Unpin {
        /// The lens.
        #[arg(value_name = "GROUP:LENS")]
        lens: String,
    },
    /// Reserve a lens for some time: it is loaded, and not evicted meanwhile.
    #[command(subcommand)]
    Lease(LeaseCommand),
    /// Make the base of a group the active one.
    #[command(visible_alias = "activate")]
    Switch {
        /// The group, as the placement calls it.
        group: String,
        /// How long to wait until it is active; after that the switch goes on, and this ends with 1. 0: not at all.
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        wait: u32,
    },
    /// Show which eviction policy is in force, and its watermarks.
    ///
    /// They are declared, so they are changed where they are declared, and no worker restarts for it: in the file the
    /// worker was started with, or by
    /// `kubectl patch mpl NAME --type merge -p '{"spec": {"eviction": {"policy": "LRU"}}}'`
    Policy,
    /// Take no new requests, until it is undone or the worker restarts; what runs and waits goes on.
    Drain {
        /// Take requests again.
        #[arg(long)]
        undo: bool,
    },
}

#[derive(Clone, Debug, Subcommand)]
enum LeaseCommand {
    /// Reserve a lens.
    Acquire {
        /// The lens.
        #[arg(value_name = "GROUP:LENS")]
        lens: String,
        /// When the lease ends, unless it is renewed.
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        ttl: u64,
        /// Where there is no room for all that is leased, the higher comes first.
        #[arg(long, value_name = "N", default_value_t = 0)]
        priority: u32,
        /// Who holds it, for whoever looks at the list.
        #[arg(long, value_name = "TEXT")]
        holder: Option<String>,
    },
    /// Let a lease run longer.
    Renew {
        /// Its name, which `acquire` printed.
        id: String,
        /// When it ends from now on, whatever was left of it.
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        ttl: u64,
    },
    /// End a lease.
    Release {
        /// Its name, which `acquire` printed.
        id: String,
    },
    /// Show the leases that run, the oldest first.
    List,
}

/// Why something was not done, or not said.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The token cannot be had.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// There is nothing to wait with.
    #[error("failed to start")]
    Runtime(#[source] io::Error),
    /// There is no client, or the token cannot be sent.
    #[error("failed to make a request")]
    Request(#[source] reqwest::Error),
    /// Nobody is there.
    #[error(
        "nobody answers at {url}; check that the worker runs, and that --url is its control port (8081 by default; in \
         a cluster, `kubectl port-forward POD 8081`)"
    )]
    Unreachable {
        /// Who was asked.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// Somebody is there, and says nothing.
    #[error("{url} takes the request and does not answer; the worker's log, or its `/livez`, may say why")]
    Silent {
        /// Who was asked.
        url: String,
    },
    /// The connection ended in the middle.
    #[error("{url} broke off its answer; did the worker end?")]
    BrokenOff {
        /// Who was asked.
        url: String,
        /// Why.
        #[source]
        source: reqwest::Error,
    },
    /// A stream of changes has an end only when its worker has.
    #[error("the worker at {url} is ending, and so did its stream")]
    Ended {
        /// Who was asked.
        url: String,
    },
    /// It is not what a worker says.
    #[error("the answer of {url} is none of a worker's")]
    Answer {
        /// Who was asked.
        url: String,
        /// Where it differs.
        #[source]
        source: serde_json::Error,
    },
    /// No token, or none that allows this.
    #[error(
        "{url} does not allow this: {reason}; give the worker's token by --token-file, --token or TURRET_TOKEN"
    )]
    NotAllowed {
        /// Who was asked.
        url: String,
        /// Why, in the worker's words.
        reason: String,
    },
    /// It does not know the request at all.
    #[error("{url} answers: {reason}; --url is a worker's control port (8081 by default), not its data port")]
    OtherPort {
        /// Who was asked.
        url: String,
        /// What it says.
        reason: String,
    },
    /// The worker does not do it.
    #[error("{reason}")]
    Refused {
        /// Why, in the worker's words.
        reason: String,
    },
    /// It takes longer than somebody wanted to wait.
    #[error("{what} after {seconds} s; it goes on, and `turret-worker control state` tells how far")]
    Late {
        /// What is not so yet.
        what: String,
        /// How long.
        seconds: u32,
    },
    /// The answer cannot be printed.
    #[error("failed to print the answer")]
    Print(#[source] io::Error),
}

/// An answer, for machines and for people.
struct Answer {
    json: Value,
    text: String,
}

impl Answer {
    /// It is so.
    fn done(text: String) -> Self {
        Self { json: json!({"outcome": "Done"}), text }
    }

    /// It begins to be so.
    fn accepted(text: String) -> Self {
        Self { json: json!({"outcome": "Accepted"}), text }
    }
}

/// Body of `GET /control/v1/leases`.
#[derive(Deserialize)]
struct Leases {
    leases: Vec<LeaseReport>,
}

/// Asks, and prints the answer.
///
/// # Errors
/// When it is not done, or cannot be said.
pub fn run(args: &ControlArgs) -> Result<(), ControlError> {
    // ring is the one TLS provider; this fails only when it is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    match runtime.map_err(ControlError::Runtime)?.block_on(carry_out(args)) {
        // Whoever reads has seen enough.
        Err(ControlError::Print(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

async fn carry_out(args: &ControlArgs) -> Result<(), ControlError> {
    let client = Client::new(args.url.clone(), token(args)?)?;
    let answer = match &args.command {
        ControlCommand::State { watch: true } => return watch(&client, args.json).await,
        ControlCommand::State { watch: false } => {
            let (report, json) = client.ask::<WorkerReport>(Method::GET, &["state"], None).await?;
            Answer { json, text: show::state(&report, epoch_seconds()) }
        }
        ControlCommand::Load { lenses, wait } => load(&client, lenses, *wait).await?,
        ControlCommand::Evict { lens } => {
            client.order(Method::POST, &["lenses", lens, "evict"]).await?;
            Answer::accepted(format!("`{lens}` leaves memory"))
        }
        ControlCommand::Pin { lens } => {
            client.order(Method::POST, &["lenses", lens, "pin"]).await?;
            Answer::done(format!("`{lens}` stays in memory until the worker restarts"))
        }
        ControlCommand::Unpin { lens } => {
            client.order(Method::DELETE, &["lenses", lens, "pin"]).await?;
            Answer::done(format!("`{lens}` may leave memory again"))
        }
        ControlCommand::Lease(command) => lease(&client, command).await?,
        ControlCommand::Switch { group, wait } => switch(&client, group, *wait).await?,
        ControlCommand::Policy => {
            let (policy, json) = client.ask::<PolicyReport>(Method::GET, &["policy"], None).await?;
            Answer { json, text: show::policy(&policy) }
        }
        ControlCommand::Drain { undo: false } => {
            client.order(Method::POST, &["drain"]).await?;
            let text = "the worker takes no new requests; `turret-worker control drain --undo` has it take them again";
            Answer::accepted(text.into())
        }
        ControlCommand::Drain { undo: true } => {
            client.order(Method::DELETE, &["drain"]).await?;
            Answer::done("the worker takes requests".into())
        }
    };
    match args.json {
        true => say(&format!("{:#}", answer.json)),
        false => say(&answer.text),
    }
}

/// The token to show. A file that is named goes before a variable that happens to be set.
fn token(args: &ControlArgs) -> Result<Option<String>, TokenError> {
    match &args.token_file {
        Some(file) => static_token(None, Some(file)),
        None => static_token(args.token.as_deref().filter(|token| !token.is_empty()), None),
    }
}

async fn load(client: &Client, lenses: &[String], wait: u32) -> Result<Answer, ControlError> {
    let deadline = Instant::now() + Duration::from_secs(u64::from(wait));
    if lenses.len() > 1 {
        // All are begun before the first is waited for.
        for lens in lenses {
            client.load(lens, 0).await?;
        }
    }
    let mut on_their_way = false;
    for lens in lenses {
        let rest = deadline.saturating_duration_since(Instant::now()).as_secs_f64().ceil() as u32;
        let status = progress::beside(client.load(lens, rest), client, lens).await?;
        if status == StatusCode::ACCEPTED && wait > 0 {
            return Err(ControlError::Late { what: format!("`{lens}` is not in memory"), seconds: wait });
        }
        on_their_way |= status == StatusCode::ACCEPTED;
    }
    let (names, are) = (lenses.join("`, `"), if lenses.len() == 1 { "is" } else { "are" });
    Ok(match on_their_way {
        true => Answer::accepted(format!("`{names}` {are} on the way into memory")),
        false => Answer::done(format!("`{names}` {are} in memory")),
    })
}

async fn switch(client: &Client, group: &str, wait: u32) -> Result<Answer, ControlError> {
    client.order(Method::POST, &["groups", group, "activate"]).await?;
    if wait == 0 {
        return Ok(Answer::accepted(format!("a switch to the base of `{group}` begins")));
    }
    let limit = Duration::from_secs(u64::from(wait));
    match tokio::time::timeout(limit, progress::until_active(client, group)).await {
        Ok(result) => result.map(|()| Answer::done(format!("the base of `{group}` is active"))),
        Err(_) => {
            let what = format!("the base of `{group}` is not active");
            Err(ControlError::Late { what, seconds: wait })
        }
    }
}

async fn lease(client: &Client, command: &LeaseCommand) -> Result<Answer, ControlError> {
    let (method, path, body) = match command {
        LeaseCommand::Acquire { lens, ttl, priority, holder } => {
            let mut body = json!({"lens": lens, "ttlSeconds": ttl, "priority": priority});
            if let Some(holder) = holder {
                body["holder"] = holder.as_str().into();
            }
            (Method::POST, vec!["leases"], body)
        }
        LeaseCommand::Renew { id, ttl } => {
            (Method::PUT, vec!["leases", id.as_str()], json!({"ttlSeconds": ttl}))
        }
        LeaseCommand::Release { id } => {
            client.order(Method::DELETE, &["leases", id]).await?;
            return Ok(Answer::done(format!("lease {id} has ended")));
        }
        LeaseCommand::List => {
            let (list, json) = client.ask::<Leases>(Method::GET, &["leases"], None).await?;
            return Ok(Answer { json, text: show::leases(&list.leases, epoch_seconds()) });
        }
    };
    let (lease, json) = client.ask::<LeaseReport>(method, &path, Some(&body)).await?;
    Ok(Answer { json, text: show::lease(&lease, epoch_seconds()) })
}

/// Prints the state, then a line for every change. Does not end well: a worker's stream ends with the worker.
async fn watch(client: &Client, json: bool) -> Result<(), ControlError> {
    let mut watch = client.watch().await?;
    let mut known: Option<WorkerReport> = None;
    loop {
        let (line, event) = watch.event().await?;
        match event {
            StateEvent::Heartbeat => {}
            _ if json => say(&line)?,
            StateEvent::Snapshot(report) => {
                say(&show::state(&report, epoch_seconds()))?;
                known = Some(*report);
            }
            StateEvent::Change(change) => {
                let Some(before) = known.take() else { continue };
                let mut after = before.clone();
                after.apply(change);
                for line in show::changes(&before, &after) {
                    say(&line)?;
                }
                known = Some(after);
            }
        }
    }
}

/// Prints one answer. A pipe that nobody reads any more is an error here and none in [`run`].
fn say(text: &str) -> Result<(), ControlError> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}").and_then(|()| out.flush()).map_err(ControlError::Print)
}

fn parse_url(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok().filter(|url| matches!(url.scheme(), "http" | "https"));
    url.ok_or_else(|| format!("write http://HOST:PORT, as in {DEFAULT_URL}"))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config::{Cli, Command};

    fn args(words: &[&str]) -> Result<ControlArgs, String> {
        let words = ["turret-worker", "control"].into_iter().chain(words.iter().copied());
        match Cli::try_parse_from(words).map_err(|error| error.to_string())?.command {
            Command::Control(args) => Ok(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn options_of_every_command_may_stand_before_and_behind_it() {
        let url = "http://10.0.0.7:8081/";
        for words in [
            ["--url", url, "--json", "lease", "list"],
            ["lease", "--json", "--url", url, "list"],
            ["lease", "list", "--url", url, "--json"],
        ] {
            let args = args(&words).unwrap();
            assert_eq!((args.url.as_str(), args.json), (url, true), "{words:?}");
        }
    }

    #[test]
    fn every_command_is_understood_under_each_of_its_names() {
        for words in [
            &["state", "--watch"][..],
            &["load", "a:b", "--wait", "0"],
            &["preload", "a:b"],
            &["evict", "a:b"],
            &["unload", "a:b"],
            &["pin", "a:b"],
            &["unpin", "a:b"],
            &["lease", "acquire", "a:b", "--priority", "3", "--ttl", "5", "--holder", "me"],
            &["lease", "renew", "x-1", "--ttl", "5"],
            &["lease", "release", "x-1"],
            &["switch", "a"],
            &["activate", "a"],
            &["policy"],
            &["drain", "--undo"],
        ] {
            assert!(args(words).is_ok(), "{words:?}");
        }
    }

    #[test]
    fn a_url_that_no_control_port_has_is_refused() {
        for url in ["127.0.0.1:8081", "localhost:8081", "unix:/run/turret", ""] {
            let error = args(&["state", "--url", url]).unwrap_err();
            assert!(error.contains("http://HOST:PORT"), "{error}");
        }
    }
}
