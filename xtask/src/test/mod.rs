//! `cargo xtask test`: every suite, each with its time, and one closing line that counts them all.
//!
//! Everything is built first, in one profile and one folder outside the clone ([`program`]); the
//! suites then run the finished programs and build nothing but the few things of `unit` that only
//! builds of their own can. What cannot run here is skipped aloud, and with `CI=true` that is a
//! failure.

mod on_cluster;
mod program;
mod tally;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use self::program::{Built, Manner, TestProgram};
use self::tally::{Tally, table};
use crate::packages::{self, Need, Proof};
use crate::{folders, stage};

/// What to test.
#[derive(Args)]
pub struct TestArguments {
    /// Which suites; all when none is named
    suites: Vec<Suite>,
    /// Only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    only: Option<OsString>,
    /// Folder of recorded cases for the suite `parity`; the repository's own when absent
    #[arg(long, value_name = "DIR")]
    cases: Option<PathBuf>,
    #[command(flatten)]
    cluster: on_cluster::ClusterArguments,
}

/// A suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
enum Suite {
    /// Format, clippy, and that generated files are fresh
    Lint,
    /// The tests of every crate, its documentation's examples, and threads in every order
    Unit,
    /// Every architecture and lens against recorded numbers
    Parity,
    /// Worker and gateway over HTTP, without a cluster
    Api,
    /// The installed chart on a real Kubernetes, and that Kubernetes itself
    Cluster,
    /// Faults between the operator and a real API server, and crashes behind every write
    Faults,
}

impl Suite {
    const ALL: [Suite; 6] =
        [Suite::Lint, Suite::Unit, Suite::Parity, Suite::Api, Suite::Cluster, Suite::Faults];

    fn name(self) -> &'static str {
        match self {
            Suite::Lint => "lint",
            Suite::Unit => "unit",
            Suite::Parity => "parity",
            Suite::Api => "api",
            Suite::Cluster => "cluster",
            Suite::Faults => "faults",
        }
    }

    /// The suite that a program of tests belongs to.
    fn of(program: &TestProgram) -> Suite {
        match (program.kind.as_str(), program.name.as_str()) {
            ("test", "cluster") if program.package == TESTS => Suite::Cluster,
            ("test", "faults") if program.package == TESTS => Suite::Faults,
            ("test", "parity") => Suite::Parity,
            ("test", _) if program.package == TESTS => Suite::Api,
            _ => Suite::Unit,
        }
    }
}

/// The crate of the suites that need more than one crate.
const TESTS: &str = "turret-tests";
/// What a C++ compiler is needed for; a C compiler is there, or this program were not.
const NEEDS: [Need; 1] =
    [Need { proof: Proof::Program("c++"), package: "g++", purpose: "build the tokenizers" }];

/// Runs the suites; an error when a test failed, or when one was skipped that must not be.
pub fn run(arguments: &TestArguments) -> Result<()> {
    let began = Instant::now();
    let suites = chosen(&arguments.suites);
    packages::ensure(&NEEDS)?;
    let built =
        if suites.iter().all(|suite| *suite == Suite::Lint) { Built::default() } else { program::build()? };
    let mut results = Vec::new();
    for suite in suites {
        stage::say(format!("\n== {}", suite.name()));
        let began = Instant::now();
        let tally = carry_out(suite, &built, arguments).unwrap_or_else(|error| {
            println!("FAILED: the suite {}: {error:#}", suite.name());
            Tally::one(false)
        });
        results.push((suite.name(), tally, began.elapsed()));
    }
    let sum: Tally = results.iter().map(|(_, tally, _)| *tally).sum();
    println!("\n{}all in {:.0} s\n{sum}", table(&results), began.elapsed().as_secs_f64());
    verdict(sum, in_ci())
}

fn chosen(named: &[Suite]) -> Vec<Suite> {
    let mut suites = if named.is_empty() { Suite::ALL.to_vec() } else { named.to_vec() };
    // The quick ones first, whatever the order they were named in.
    suites.sort_unstable();
    suites.dedup();
    suites
}

fn verdict(sum: Tally, ci: bool) -> Result<()> {
    if sum.failed > 0 {
        bail!("{} tests failed", sum.failed);
    }
    if sum.skipped > 0 && ci {
        bail!("{} tests were skipped, which CI=true does not allow", sum.skipped);
    }
    if sum.passed == 0 && sum.skipped == 0 {
        bail!("nothing was tested: no test has such a name");
    }
    Ok(())
}

fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| !matches!(value.as_str(), "" | "0" | "false"))
}

fn carry_out(suite: Suite, built: &Built, arguments: &TestArguments) -> Result<Tally> {
    let mut manner = Manner {
        arguments: arguments.only.iter().cloned().collect(),
        variables: products(built),
        limit: Duration::from_secs(600),
        ..Manner::default()
    };
    match suite {
        Suite::Lint => lint(),
        Suite::Unit => {
            let tests = each(suite, built, &manner)?;
            let models = each(suite, &program::build_models()?, &manner)?;
            let examples = if arguments.only.is_none() { examples()? } else { Tally::default() };
            Ok([tests, models, examples].into_iter().sum())
        }
        Suite::Parity => {
            if let Some(cases) = &arguments.cases {
                let cases = std::path::absolute(cases)?;
                manner.variables.push(("TURRET_PARITY_CASES", cases.into()));
            }
            each(suite, built, &Manner { shown: arguments.cases.is_some(), ..manner })
        }
        Suite::Api => each(suite, built, &manner),
        Suite::Cluster | Suite::Faults => {
            let program = built.tests.iter().find(|program| Suite::of(program) == suite);
            let program = program.with_context(|| format!("cargo built no test `{}`", suite.name()))?;
            on_cluster::run(program, built, manner, &arguments.cluster)
        }
    }
}

/// Where the product's programs are, for tests that start them.
fn products(built: &Built) -> Vec<(&'static str, OsString)> {
    let named = [("turret-worker", "TURRET_TEST_WORKER"), ("turret-operator", "TURRET_TEST_OPERATOR")];
    named
        .into_iter()
        .filter_map(|(name, variable)| Some((variable, built.products.get(name)?.clone().into())))
        .collect()
}

/// Runs every program of a suite.
fn each(suite: Suite, built: &Built, manner: &Manner) -> Result<Tally> {
    let mut tallies = Vec::new();
    for program in built.tests.iter().filter(|program| Suite::of(program) == suite) {
        let began = Instant::now();
        let tally = program::run(program, manner)?;
        if tally != Tally::default() {
            let (package, name, kind) = (&program.package, &program.name, &program.kind);
            let seconds = began.elapsed().as_secs_f64();
            stage::say(format!("▸ {package} {name} ({kind}): {tally} … {seconds:.1} s"));
        }
        tallies.push(tally);
    }
    if tallies.is_empty() {
        bail!("cargo built no test of this suite");
    }
    Ok(tallies.into_iter().sum())
}

/// The examples in the documentation, which only rustdoc can build.
fn examples() -> Result<Tally> {
    let mut command = folders::cargo()?;
    command.args(["test", "--workspace", "--doc", "--quiet"]);
    let output = stage::run("trying the documentation's examples", |_| {
        command.stderr(Stdio::inherit()).output().context("failed to start cargo")
    })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let tally = tally::judge(text.lines(), output.status.success());
    if tally.failed > 0 {
        println!("{text}");
    }
    Ok(tally)
}

fn lint() -> Result<Tally> {
    let checks: [(&str, &[&str]); 2] = [
        ("the format", &["fmt", "--all", "--check"]),
        ("clippy", &["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]),
    ];
    let mut tallies = Vec::new();
    for (name, arguments) in checks {
        let mut command = folders::cargo()?;
        let checked = stage::run(format!("checking {name}"), |_| {
            let status =
                command.args(arguments).stdin(Stdio::null()).status().context("failed to start cargo")?;
            if status.success() { Ok(()) } else { bail!("`cargo {}` found something", arguments.join(" ")) }
        });
        tallies.push(Tally::one(passes(checked)));
    }
    tallies.push(Tally::one(generated_files_are_fresh()?));
    Ok(tallies.into_iter().sum())
}

/// `cargo xtask generate --check`, as somebody would run it.
fn generated_files_are_fresh() -> Result<bool> {
    let this = crate::folders::this_program()?;
    let mut command = std::process::Command::new(this);
    let checked = stage::run("checking generated files", |_| {
        let status = command.args(["generate", "--check"]).status().context("failed to start generate")?;
        if status.success() { Ok(()) } else { bail!("`cargo xtask generate --check` found something") }
    });
    Ok(passes(checked))
}

/// Whether a check passes; what it found is said.
fn passes(checked: Result<()>) -> bool {
    if let Err(error) = &checked {
        println!("FAILED: {error:#}");
    }
    checked.is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(package: &str, kind: &str, name: &str) -> TestProgram {
        TestProgram {
            package: package.into(),
            kind: kind.into(),
            name: name.into(),
            file: PathBuf::new(),
            folder: PathBuf::new(),
        }
    }

    #[test]
    fn a_program_s_suite_follows_from_what_it_is() {
        let suite = |package, kind, name| Suite::of(&program(package, kind, name));
        assert_eq!(suite(TESTS, "test", "cluster"), Suite::Cluster);
        assert_eq!(suite(TESTS, "test", "faults"), Suite::Faults);
        assert_eq!(suite(TESTS, "test", "worker_api"), Suite::Api);
        assert_eq!(suite(TESTS, "test", "parity"), Suite::Parity);
        assert_eq!(suite(TESTS, "lib", "turret_tests"), Suite::Unit);
        assert_eq!(suite("turret-worker", "test", "cluster"), Suite::Unit);
        assert_eq!(suite("turret-crds", "test", "crd"), Suite::Unit);
        assert_eq!(suite("turret-threads", "loom", "turret_threads"), Suite::Unit);
    }

    #[test]
    fn all_suites_run_when_none_is_named_and_each_only_once() {
        assert_eq!(chosen(&[]), Suite::ALL);
        assert_eq!(chosen(&[Suite::Cluster, Suite::Unit, Suite::Unit]), [Suite::Unit, Suite::Cluster]);
    }

    #[test]
    fn a_skip_fails_only_in_ci_and_nothing_at_all_fails_everywhere() {
        let skipped = Tally { passed: 3, failed: 0, skipped: 1 };
        assert!(verdict(skipped, false).is_ok());
        assert!(verdict(skipped, true).is_err());
        assert!(verdict(Tally::default(), false).is_err());
        assert!(verdict(Tally::one(false), false).is_err());
    }
}
