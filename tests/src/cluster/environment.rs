//! What the suite is told about the cluster it runs on: variables set by `cargo xtask test cluster`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The cluster a suite runs on.
#[derive(Clone, Debug)]
pub struct Environment {
    /// An administrator's kubeconfig.
    pub kubeconfig: PathBuf,
    /// Folder with `kubectl` and `helm`.
    pub programs: PathBuf,
    /// Folder of this machine that pods may mount with `hostPath`.
    pub volumes: PathBuf,
    /// The API server's audit log.
    pub audit_log: PathBuf,
    /// The built `turret-operator` of this machine, for what it prints about itself.
    pub operator: PathBuf,
    /// The built `turret-worker` of this machine, to make bases with.
    pub worker: PathBuf,
    /// Root of the repository, for the charts.
    pub repository: PathBuf,
    /// Reference of the imported operator image.
    pub operator_image: String,
    /// Reference of the imported worker image.
    pub worker_image: String,
    /// How long the Zipf load goes on.
    pub zipf_load: Duration,
    /// What random objects are made from.
    pub random_seed: u64,
    /// How many cases of random objects are tried.
    pub random_cases: usize,
}

/// Set to run the suite; absent means that there is no cluster to run on.
pub const KUBECONFIG: &str = "TURRET_TEST_KUBECONFIG";
/// Seconds for which the scenario with the Zipf load asks. Absent: as short as the others, to be run with all of them;
/// `TURRET_ZIPF_SECONDS=600 cargo xtask test cluster --only zipf` is the long run.
pub const ZIPF_SECONDS: &str = "TURRET_ZIPF_SECONDS";
/// Seed of random objects. Absent: always the same, so that what fails fails again.
pub const RANDOM_SEED: &str = "TURRET_RANDOM_SEED";
/// Cases of random objects. Absent: few enough to be run with all other tests;
/// `TURRET_RANDOM_SEED=$RANDOM TURRET_RANDOM_CASES=50 cargo xtask test faults --only random` is a long run.
pub const RANDOM_CASES: &str = "TURRET_RANDOM_CASES";

/// The seed where nobody says otherwise.
const SEED: u64 = 20_240_607;
/// The cases where nobody says otherwise.
const CASES: usize = 4;
/// The Zipf load where nobody says otherwise.
const SHORT_LOAD: Duration = Duration::from_secs(20);

impl Environment {
    /// Reads the variables; `None` where no cluster was given.
    pub fn read() -> Result<Option<Self>> {
        if std::env::var_os(KUBECONFIG).is_none() {
            return Ok(None);
        }
        let environment = Self {
            kubeconfig: path(KUBECONFIG)?,
            programs: path("TURRET_TEST_PROGRAMS")?,
            volumes: path("TURRET_TEST_VOLUMES")?,
            audit_log: path("TURRET_TEST_AUDIT_LOG")?,
            operator: path("TURRET_TEST_OPERATOR")?,
            worker: path("TURRET_TEST_WORKER")?,
            repository: path("TURRET_TEST_REPOSITORY")?,
            operator_image: text("TURRET_TEST_OPERATOR_IMAGE")?,
            worker_image: text("TURRET_TEST_WORKER_IMAGE")?,
            zipf_load: number(ZIPF_SECONDS)?.map_or(SHORT_LOAD, Duration::from_secs),
            random_seed: number(RANDOM_SEED)?.unwrap_or(SEED),
            random_cases: number(RANDOM_CASES)?.map_or(Ok(CASES), usize::try_from)?,
        };
        Ok(Some(environment))
    }
}

fn text(variable: &str) -> Result<String> {
    std::env::var(variable)
        .with_context(|| format!("{variable} is not set; run this suite with `cargo xtask test cluster`"))
}

fn number(variable: &str) -> Result<Option<u64>> {
    let Ok(text) = std::env::var(variable) else { return Ok(None) };
    let number = text.parse::<u64>();
    number.map(Some).with_context(|| format!("{variable} is `{text}`, not a whole number"))
}

fn path(variable: &str) -> Result<PathBuf> {
    let path = PathBuf::from(text(variable)?);
    if !path.exists() {
        bail!("{variable} names {}, which does not exist", path.display());
    }
    Ok(path)
}
