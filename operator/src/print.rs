//! What `turret-operator` prints: the CRDs, the permissions it uses, and its metrics.

use std::io::Write;

use crate::rbac;

/// Writes both CRDs as a YAML stream.
pub fn crds(mut out: impl Write) -> anyhow::Result<()> {
    for crd in turret_crds::crds() {
        writeln!(out, "---")?;
        serde_yaml::to_writer(&mut out, &crd)?;
    }
    Ok(())
}

/// Writes all metrics of operator and gateway in the OpenMetrics text format.
pub fn metrics(mut out: impl Write) -> anyhow::Result<()> {
    for text in [crate::metrics::Metrics::reference(), crate::gateway::metrics::Metrics::reference()] {
        write!(out, "{text}")?;
    }
    Ok(())
}

/// Writes the RBAC rules as one YAML document.
pub fn rbac(out: impl Write) -> anyhow::Result<()> {
    Ok(serde_yaml::to_writer(out, &rbac::rules())?)
}
