//! The gateway in front of two real workers with the demo family, as on a laptop: three programs,
//! no cluster. Answers are compared with the recorded ones to the last character.

use std::io::Write as _;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::{StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};
use turret_crds::WorkerReport;
use turret_tests::cluster::family::{Case, Family};
use turret_tests::cluster::gateway::{Gateway, Mode};

const TOKEN: &str = "shared-by-hand";
/// What starting three programs, or ending one, may take before they are called stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// A program that ends with the test.
struct Program(Child);

impl Program {
    fn start(name: &str, arguments: &[&str], log: &Path) -> Result<Self> {
        let log = std::fs::File::create(log)?;
        let child = Command::new(built(name)?)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("failed to start {name}"))?;
        Ok(Self(child))
    }

    fn terminate(&self) -> Result<()> {
        let sent = Command::new("kill").args(["-TERM", &self.0.id().to_string()]).status()?;
        if sent.success() { Ok(()) } else { bail!("kill -TERM ended with {sent}") }
    }

    async fn exit_code(mut self) -> Result<Option<i32>> {
        let wait = tokio::task::spawn_blocking(move || self.0.wait());
        Ok(tokio::time::timeout(PATIENCE, wait).await.context("the program does not end")???.code())
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A program of this workspace. `cargo xtask test` says where the programs are that it built. Otherwise this builds
/// them: cargo does so for the tests of their own crate only.
fn built(name: &str) -> Result<PathBuf> {
    let given = format!("TURRET_TEST_{}", name.trim_start_matches("turret-").to_uppercase());
    if let Some(program) = std::env::var_os(given) {
        return Ok(program.into());
    }
    let here = std::env::current_exe()?;
    let folder = here.ancestors().nth(2).context("the test lies in a target folder")?;
    if let Some(cargo) = std::env::var_os("CARGO") {
        let status = Command::new(cargo)
            .args(["build", "--quiet", "--workspace", "--bin", name])
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .status()?;
        anyhow::ensure!(status.success(), "cargo build --workspace --bin {name} ended with {status}");
    }
    let program = folder.join(name);
    anyhow::ensure!(program.exists(), "{} is missing; run `cargo build --package {name}`", program.display());
    Ok(program)
}

/// An address nobody listens on now.
fn free_address() -> Result<String> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.to_string())
}

/// The groups of the family, as a person would write them.
fn groups_yaml(family: &Family) -> String {
    let folder = Family::folder();
    let source = |path: &str| json!({"uri": format!("file://{}", folder.join(path).display())});
    let mut yaml = String::new();
    for (name, base) in &family.bases {
        let lenses: Vec<Value> =
            base.lenses.iter().map(|(lens, l)| json!({"name": lens, "source": source(&l.path)})).collect();
        let group = json!({
            "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup", "metadata": {"name": name},
            "spec": {"base": {"source": source(&base.path), "dtype": "F32"}, "lenses": lenses},
        });
        yaml += &format!("---\n{}", serde_yaml::to_string(&group).expect("JSON is YAML"));
    }
    yaml
}

/// Two workers and a gateway over them.
struct Laptop {
    gateway: Program,
    url: String,
    client: reqwest::Client,
    controls: Vec<String>,
    _workers: Vec<Program>,
    folder: tempfile::TempDir,
}

impl Laptop {
    fn start(family: &Family) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let groups = folder.path().join("groups.yaml");
        std::fs::File::create(&groups)?.write_all(groups_yaml(family).as_bytes())?;
        let groups = groups.to_str().context("a temporary path is text")?;
        let (mut workers, mut controls, mut given) = (Vec::new(), Vec::new(), Vec::new());
        for name in ["left", "right"] {
            let (data, control) = (free_address()?, free_address()?);
            let cache = folder.path().join(name);
            let arguments = [
                "serve",
                "-f",
                groups,
                "--listen",
                &data,
                "--control-listen",
                &control,
                "--token",
                TOKEN,
                "--name",
                name,
                "--device",
                "cpu",
                "--threads",
                "1",
                "--cache-dir",
                cache.to_str().context("a temporary path is text")?,
            ];
            workers.push(Program::start(
                "turret-worker",
                &arguments,
                &folder.path().join(format!("{name}.log")),
            )?);
            given.push(format!("http://{data},http://{control}"));
            controls.push(format!("http://{control}"));
        }
        let listen = free_address()?;
        let mut arguments = vec!["gateway", "--listen", &listen, "--worker-token", TOKEN];
        for worker in &given {
            arguments.extend(["--worker", worker]);
        }
        let gateway = Program::start("turret-operator", &arguments, &folder.path().join("gateway.log"))?;
        let client = reqwest::Client::builder().no_proxy().build()?;
        let url = format!("http://{listen}");
        Ok(Self { gateway, url, client, controls, _workers: workers, folder })
    }

    /// Waits until the gateway listens. What its workers still do then is no reason to wait: it holds requests.
    async fn up(&self) -> Result<()> {
        let answers = async {
            while self.client.get(format!("{}/livez", self.url)).send().await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, answers).await.context("the gateway does not listen")
    }

    async fn reports(&self) -> Result<Vec<WorkerReport>> {
        let mut reports = Vec::new();
        for control in &self.controls {
            let request = self.client.get(format!("{control}/control/v1/state")).bearer_auth(TOKEN);
            reports.push(request.send().await?.error_for_status()?.json().await?);
        }
        Ok(reports)
    }

    /// What the programs said, for a failure.
    fn logs(&self) -> String {
        let mut text = String::new();
        for name in ["gateway", "left", "right"] {
            let log =
                std::fs::read_to_string(self.folder.path().join(format!("{name}.log"))).unwrap_or_default();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            text += &format!("--- {name}\n{}\n", tail.into_iter().rev().collect::<Vec<_>>().join("\n"));
        }
        text
    }
}

/// Every recorded conversation with every base and lens, as `model` and case, the bases taking turns.
fn questions(family: &Family) -> Vec<(String, &Case)> {
    let mut asked = Vec::new();
    for (group, base) in &family.bases {
        asked.extend(base.cases.iter().enumerate().map(|(n, case)| (n, group.clone(), case)));
        for (lens, recorded) in &base.lenses {
            let model = format!("{group}:{lens}");
            asked.extend(recorded.cases.iter().enumerate().map(|(n, case)| (n, model.clone(), case)));
        }
    }
    asked.sort_by_key(|(n, ..)| *n);
    asked.into_iter().map(|(_, model, case)| (model, case)).collect()
}

async fn ask_all(gateway: &Gateway, questions: &[(String, &Case)]) -> Result<usize> {
    let asked = futures::stream::iter(questions.iter().enumerate()).map(|(n, (model, case))| async move {
        let mode = if n % 2 == 0 { Mode::Whole } else { Mode::Streamed };
        gateway.verify(model, case, mode).await
    });
    let answers: Vec<_> = asked.buffer_unordered(8).try_collect().await?;
    Ok(answers.len())
}

async fn every_answer_is_the_recorded_one(laptop: &Laptop, family: &Family) -> Result<()> {
    let gateway = Gateway::of_namespace(laptop.client.clone(), &laptop.url, "default");
    let questions = questions(family);
    assert!(questions.len() >= 81, "the family has two bases and seven lenses with nine conversations each");
    ask_all(&gateway, &questions).await?;
    let settled = laptop.reports().await?;
    let active: Vec<_> = settled.iter().map(|r| r.state.active_base.clone()).collect();
    anyhow::ensure!(active[0].is_some() && active[0] != active[1], "the workers hold {active:?}");
    // Both bases are there now: asking everything again, in both ways, moves none.
    let turned: Vec<_> = questions.iter().rev().cloned().collect();
    ask_all(&gateway, &turned).await?;
    let after = laptop.reports().await?;
    for (before, after) in settled.iter().zip(&after) {
        anyhow::ensure!(
            before.state.switches == after.state.switches,
            "{} switched again: {} and then {}",
            after.worker.name,
            before.state.switches,
            after.state.switches
        );
    }
    let mut wanted: Vec<String> = questions.iter().map(|(model, _)| model.clone()).collect();
    wanted.sort();
    wanted.dedup();
    let listed = gateway.models().await.map_err(|refused| anyhow::anyhow!("{refused}"))?;
    anyhow::ensure!(listed == wanted, "{listed:?} are listed, {wanted:?} are served");
    Ok(())
}

async fn a_stream_outlives_the_order_to_stop(laptop: Laptop, family: &Family) -> Result<()> {
    let (group, base) = family.bases.first_key_value().context("the family has bases")?;
    let body = json!({"model": group, "messages": base.cases[0].messages, "temperature": 0, "stream": true, "max_tokens": 64});
    let response = laptop
        .client
        .post(format!("{}/v1/chat/completions", laptop.url))
        .json(&body)
        .send()
        .await?
        .error_for_status()?;
    let mut stream = response.bytes_stream();
    let mut text = String::new();
    text += std::str::from_utf8(&stream.next().await.context("a first event")??)?;
    laptop.gateway.terminate()?;
    while let Some(chunk) = stream.next().await {
        text += std::str::from_utf8(&chunk?)?;
    }
    anyhow::ensure!(text.trim_end().ends_with("data: [DONE]"), "the stream was cut off: {text}");
    let Laptop { gateway, _workers, folder, .. } = laptop;
    anyhow::ensure!(gateway.exit_code().await? == Some(0), "the gateway did not end well");
    drop((_workers, folder));
    Ok(())
}

#[tokio::test]
async fn the_demo_family_answers_through_the_gateway_and_each_worker_keeps_one_base() -> Result<()> {
    // Another part of the process may have chosen it already; there is only one to choose.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let family = Family::read()?;
    let laptop = Laptop::start(&family)?;
    laptop.up().await?;
    if let Err(error) = every_answer_is_the_recorded_one(&laptop, &family).await {
        bail!("{error:#}\n{}", laptop.logs());
    }
    a_stream_outlives_the_order_to_stop(laptop, &family).await
}
