//! `cargo xtask demo`: from a clone to right answers of every lens of two groups, on a real Kubernetes.
//!
//! Without options on a cluster of its own ([`crate::cluster`]), with `--context` on one that exists ([`existing`]).
//! Both end in [`perform`], which knows the cluster only as a [`Target`].

mod client;
mod existing;
mod expected;
mod objects;
mod target;

use std::ffi::OsString;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::client::Gateway;
use self::expected::Expected;
use self::objects::Samples;
use self::target::Target;
use crate::cluster::{self, Cluster};
use crate::stage::{self, say};
use crate::{folders, image};

/// Options of `cargo xtask demo`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// Leave everything running at the end, and say how to go on by hand.
    #[arg(long)]
    keep: bool,
    /// Take down what `--keep` left running, and nothing else.
    #[arg(long, conflicts_with = "keep")]
    down: bool,
    /// Size of the synthesised base for the switch and the reload; 0 leaves that part out. Default: 1Gi, and 0
    /// on a cluster that exists
    #[arg(long, value_name = "BYTES")]
    large: Option<String>,
    #[command(flatten)]
    existing: existing::ExistingArgs,
}

impl Args {
    /// Size of the large base; `0` for none.
    fn large(&self) -> &str {
        let default = if self.existing.is_meant() { "0" } else { "1Gi" };
        self.large.as_deref().unwrap_or(default)
    }
}

/// Name of the demo's own cluster.
const CLUSTER: &str = "demo";
/// Namespace of the samples.
const NAMESPACE: &str = "turret-demo";
/// Namespace of the release.
const SYSTEM: &str = "turret-system";
/// The claim that holds the demo's files, unless another one is given.
const CLAIM: &str = "lenses";
const QUESTION: &str = "What colour is the sky?";

/// Runs the demo.
pub fn run(args: &Args) -> Result<()> {
    if let Some(context) = args.existing.context()? {
        return existing::run(args, &context);
    }
    if args.down {
        return cluster::down(CLUSTER);
    }
    let began = Instant::now();
    let images = image::build(&image::Program::ALL)?;
    let cluster = cluster::up(&cluster::Options { name: CLUSTER.into(), ..Default::default() })?;
    let target = Target::local(&cluster, SYSTEM, NAMESPACE);
    let result = show_locally(args, &cluster, &target, &images);
    if result.is_err() {
        say(format!(
            "\nThe demo failed. The cluster is still up: export KUBECONFIG={}\nTake it down with: cargo xtask demo --down",
            cluster.kubeconfig.display()
        ));
        return result;
    }
    if args.keep {
        let enter = format!(
            "export KUBECONFIG={} PATH={}:$PATH",
            cluster.kubeconfig.display(),
            cluster.bin.display()
        );
        go_on_by_hand(&target, &enter, "cargo xtask demo --down");
    } else {
        cluster::down(CLUSTER)?;
        say("Run it with --keep to go on by hand.");
    }
    say(format!("The demo took {:.0} s.", began.elapsed().as_secs_f64()));
    Ok(())
}

fn show_locally(args: &Args, cluster: &Cluster, target: &Target, images: &[image::Image]) -> Result<()> {
    let files = cluster.volumes.join("demo");
    stage::run("copying the demo family to the node", |_| {
        copy_readable(&folders::repository().join("tests/fixtures/demo"), &files)
    })?;
    stage::run("loading the images into the node", |_| {
        images.iter().try_for_each(|image| cluster.load(&image.path))
    })?;
    // turret.local/turret-worker sets worker.image.tag
    let part = |image: &image::Image| image.name.rsplit('-').next().unwrap_or_default().to_owned();
    let set: Vec<String> =
        images.iter().map(|image| format!("{}.image.tag={}", part(image), image.content_tag)).collect();
    stage::run("installing the chart with Helm", |_| install(target, &set))?;
    let mut first = Samples(vec![objects::namespace(NAMESPACE)]);
    first.0.extend(objects::local_volume(NAMESPACE, CLAIM, &files));
    apply(target, &first)?;
    let large = args.large();
    let synthesise = || {
        let folder = files.join("large");
        let mut command = Command::new(folders::cargo_target()?.join("debug/turret-worker"));
        command.args(objects::synth(&folder.to_string_lossy(), large));
        let output = command.output().context("failed to run turret-worker synth")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "turret-worker synth failed: {said}");
        make_readable(&folder)
    };
    let samples =
        Samples::read(&folders::repository().join("manifests/samples/demo-family.yaml"), NAMESPACE)?;
    let large =
        (large != "0").then_some(Large { bytes: large, synthesise: &synthesise, adapt: &|objects| objects });
    perform(target, &samples, CLAIM, large.as_ref())
}

/// The part of the demo with a base that is large enough for the bytes to matter.
struct Large<'a> {
    /// Its size, for people.
    bytes: &'a str,
    /// Writes it below `large` on the claim.
    synthesise: &'a dyn Fn() -> Result<()>,
    /// Makes its objects fit the cluster.
    adapt: &'a dyn Fn(Samples) -> Samples,
}

/// Applies the samples, asks every model, adds a lens meanwhile. The chart is installed and the files are on the claim.
fn perform(target: &Target, samples: &Samples, claim: &str, large: Option<&Large<'_>>) -> Result<()> {
    let models = samples.models();
    let (late, _) =
        models.iter().rev().find(|(name, _)| name.contains(':')).context("the samples have no lens")?;
    stage::run(format!("applying the samples (all but {late}) and waiting until they are ready"), |_| {
        apply(target, &samples.without(late))?;
        wait_ready(target, samples)
    })?;

    let forward = PortForward::open(target)?;
    let gateway = Gateway::new(forward.url(), &target.namespace);
    let expected = Expected::read(&folders::repository().join("tests/fixtures/demo/expected.json"))?;
    println!("\n“{QUESTION}”, asked of every base and every lens:\n");
    println!("  {:<22} {:<52} {:>9}  where the time went", "model", "answer", "took");
    for (model, folder) in models.iter().filter(|(name, _)| name != late) {
        ask(&gateway, &expected, model, folder)?;
    }

    add_while_serving(target, &gateway, &expected, samples, late)?;
    if let Some(large) = large {
        show_large(large, target, &gateway, samples, claim)?;
    }
    println!();
    print!("{}", target.kubectl(["get", "mg,mpl", "-n", &target.namespace])?);
    println!();
    Ok(())
}

/// Asks one model and holds the answer against the recorded one.
fn ask(gateway: &Gateway, expected: &Expected, model: &str, folder: &str) -> Result<()> {
    let answer = gateway.ask(model, QUESTION, 64)?;
    let wanted = expected.answer(folder, QUESTION)?;
    println!("  {:<22} {:<52} {:>6} ms  {}", model, answer.text, answer.took.as_millis(), spent(&answer));
    ensure!(answer.text == wanted, "`{model}` should have answered “{wanted}”");
    Ok(())
}

fn spent(answer: &client::Answer) -> String {
    let mut parts = Vec::new();
    if let Some(switch) = answer.base_switch {
        parts.push(format!("base switch {}", millis(switch)));
    }
    if let Some(load) = answer.lens_load {
        parts.push(format!("lens load {}", millis(load)));
    }
    parts.push(format!("on {}", answer.worker));
    parts.join(", ")
}

fn millis(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// Applies the last lens while another is asked without pause: nothing may fail, and the time from
/// `kubectl apply` to the first answer is printed.
fn add_while_serving(
    target: &Target,
    gateway: &Gateway,
    expected: &Expected,
    samples: &Samples,
    late: &str,
) -> Result<()> {
    let models = samples.models();
    let (other, other_folder) =
        models.iter().find(|(name, _)| name != late).context("the samples have one model only")?;
    let (_, folder) = models.iter().find(|(name, _)| name == late).context("the lens is in the samples")?;
    let other_wanted = expected.answer(other_folder, QUESTION)?;
    let wanted = expected.answer(folder, QUESTION)?;
    println!("\nAdding {late} with kubectl apply, while {other} is asked without pause:");
    let done = AtomicBool::new(false);
    let (asked, waited) = std::thread::scope(|scope| -> Result<(usize, Duration)> {
        let load = scope.spawn(|| -> Result<usize> {
            let mut asked = 0;
            while !done.load(Ordering::Relaxed) {
                let answer = gateway.ask(other, QUESTION, 64)?;
                ensure!(answer.text == other_wanted, "`{other}` answered “{}” meanwhile", answer.text);
                asked += 1;
            }
            Ok(asked)
        });
        let added = (|| {
            let began = Instant::now();
            apply(target, samples)?;
            let applied = began.elapsed();
            let deadline = began + Duration::from_secs(60);
            let answer = loop {
                match gateway.ask(late, QUESTION, 64) {
                    Ok(answer) => break answer,
                    Err(error) if Instant::now() > deadline => return Err(error),
                    Err(_) => {}
                }
            };
            ensure!(answer.text == wanted, "`{late}` answered “{}” instead of “{wanted}”", answer.text);
            let waited = began.elapsed();
            println!(
                "  {late:<22} {:<52} {:>6} ms  from kubectl apply ({} ms of them kubectl's own)",
                answer.text,
                waited.as_millis(),
                applied.as_millis()
            );
            Ok(waited)
        })();
        done.store(true, Ordering::Relaxed);
        let asked = load.join().map_err(|_| anyhow::anyhow!("the asking thread panicked"))??;
        Ok((asked, added?))
    })?;
    println!("  {asked} requests to {other} in these {:.1} s, all answered right.", waited.as_secs_f64());
    Ok(())
}

/// Shows a switch and a lens reload of a base that is large enough for the bytes to matter.
fn show_large(
    large: &Large<'_>,
    target: &Target,
    gateway: &Gateway,
    samples: &Samples,
    claim: &str,
) -> Result<()> {
    let small = samples.of_kind("ModelGroup").next().context("the samples have no group")?;
    let small_name = small["metadata"]["name"].as_str().unwrap_or_default();
    let synthesising = format!("synthesising a base of {} with two lenses", large.bytes);
    stage::run(synthesising, |_| (large.synthesise)())?;
    stage::run("applying it with a worker of its own", |_| {
        let objects = (large.adapt)(objects::large(&target.namespace, claim, small));
        apply(target, &objects)?;
        wait_ready(target, &objects)
    })?;
    println!(
        "\nA base of {} and lenses of rank 64 over it, on one worker beside {small_name}:\n",
        large.bytes
    );
    let show = |model: &str, what: &str| -> Result<()> {
        let answer = gateway.ask(model, QUESTION, 1)?;
        println!("  {model:<22} {what:<52} {:>6} ms  {}", answer.took.as_millis(), spent(&answer));
        Ok(())
    };
    show("large", "first request: switch to the base from disk")?;
    show("large:one", "first use of a lens")?;
    show("large:two", "another lens, which evicts the first")?;
    show("large:one", "reload of the evicted lens")?;
    show("large:one", "resident: no load, no switch")?;
    Ok(())
}

fn install(target: &Target, set: &[String]) -> Result<()> {
    let chart = folders::repository().join("charts/turret");
    let mut arguments: Vec<OsString> =
        vec!["upgrade".into(), "--install".into(), objects::RELEASE.into(), chart.into()];
    let fixed = ["--namespace", &target.system, "--create-namespace", "--wait", "--timeout", "180s"];
    arguments.extend(fixed.map(OsString::from));
    for value in set {
        arguments.extend(["--set-string".into(), value.into()]);
    }
    target.helm(arguments).map(drop)
}

fn apply(target: &Target, objects: &Samples) -> Result<()> {
    target.kubectl_with_input(["apply", "-f", "-"], &objects.to_json()).map(drop)
}

/// Waits for these groups and placements; workers' images may have to be pulled first.
fn wait_ready(target: &Target, objects: &Samples) -> Result<()> {
    let namespace = target.namespace.as_str();
    for kind in ["ModelPlacement", "ModelGroup"] {
        let names: Vec<String> = objects
            .of_kind(kind)
            .map(|object| format!("{kind}/{}", object["metadata"]["name"].as_str().unwrap_or_default()))
            .collect();
        let names = names.iter().map(String::as_str);
        let words = ["wait", "-n", namespace, "--for=condition=Ready", "--timeout=300s"];
        if let Err(error) = target.kubectl(words.into_iter().chain(names)) {
            let state =
                target.kubectl(["get", "mg,mpl,pods", "-n", namespace, "-o", "wide"]).unwrap_or_default();
            bail!("{error:#}\n{state}");
        }
    }
    Ok(())
}

/// How a person goes on where the demo ended; `enter` makes kubectl speak with the cluster.
fn go_on_by_hand(target: &Target, enter: &str, down: &str) {
    let Target { namespace, system, .. } = target;
    say(format!(
        "\nEverything is still running. Go on by hand:\n\
         \n  {enter}\
         \n  kubectl get mg,mpl -n {namespace}\
         \n  kubectl explain modelgroup.spec.lenses\
         \n  kubectl port-forward -n {system} service/turret-gateway 8000:80 &\
         \n  curl -s localhost:8000/ns/{namespace}/v1/models\
         \n  curl -s localhost:8000/ns/{namespace}/v1/chat/completions -H 'content-type: application/json' \\\
         \n       -d '{{\"model\": \"demo-qwen:pirate\", \"messages\": [{{\"role\": \"user\", \"content\": \"{QUESTION}\"}}]}}'\n\
         \nTake it down: {down}",
    ));
}

/// `kubectl port-forward` to the gateway, ended when dropped.
struct PortForward {
    child: Child,
    port: u16,
}

impl PortForward {
    fn open(target: &Target) -> Result<PortForward> {
        use std::io::BufRead;
        let mut child = target
            .command()
            .args(["port-forward", "-n", &target.system, "service/turret-gateway", ":80"])
            .stdout(Stdio::piped())
            .spawn()
            .context("failed to start kubectl port-forward")?;
        let stdout = child.stdout.take().context("the child has a pipe")?;
        let mut lines = std::io::BufReader::new(stdout).lines();
        // "Forwarding from 127.0.0.1:40123 -> 8080"
        let port = loop {
            let line = lines
                .next()
                .context("kubectl port-forward ended at once")?
                .context("failed to read its output")?;
            if let Some(port) = line.split("127.0.0.1:").nth(1).and_then(|rest| rest.split(' ').next()) {
                break port.parse().with_context(|| format!("no port in `{line}`"))?;
            }
        };
        std::thread::spawn(move || lines.for_each(drop));
        Ok(PortForward { child, port })
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }
}

impl Drop for PortForward {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Copies a folder so that a pod without privileges can read it, whatever the clone's permissions are.
fn copy_readable(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("-rT").arg(from).arg(to).status().context("failed to run cp")?;
    ensure!(status.success(), "failed to copy `{}` to `{}`", from.display(), to.display());
    make_readable(to)
}

fn make_readable(folder: &Path) -> Result<()> {
    let status =
        Command::new("chmod").args(["-R", "a+rX"]).arg(folder).status().context("failed to run chmod")?;
    ensure!(status.success(), "failed to make `{}` readable", folder.display());
    Ok(())
}
