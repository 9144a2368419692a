//! What the operator's metrics say at one moment. Pure.

use turret_crds::{ModelGroup, ModelPlacement};

/// The text of `/metrics`.
#[derive(Clone, Debug)]
pub struct Scrape(pub String);

impl Scrape {
    /// Looks at objects of all kinds.
    pub fn looks(&self) -> u64 {
        self.looks_at_groups() + self.looks_at_placements()
    }

    /// Looks at groups.
    pub fn looks_at_groups(&self) -> u64 {
        self.looks_at::<ModelGroup>()
    }

    /// Looks at placements.
    pub fn looks_at_placements(&self) -> u64 {
        self.looks_at::<ModelPlacement>()
    }

    fn looks_at<K: kube::Resource<DynamicType = ()>>(&self) -> u64 {
        let label = format!("kind=\"{}\"", K::kind(&()));
        self.sum("turret_operator_reconciles_total", &label) as u64
    }

    /// Worker streams that are open.
    pub fn streams(&self) -> u64 {
        self.sum("turret_operator_worker_streams", "") as u64
    }

    /// Whether it acts.
    pub fn leads(&self) -> bool {
        self.sum("turret_operator_leader", "") > 0.0
    }

    /// All lines of a metric that have this among their labels.
    fn sum(&self, metric: &str, label: &str) -> f64 {
        let value = |line: &str| {
            let rest = line.strip_prefix(metric)?;
            let (labels, value) = rest.rsplit_once(' ')?;
            // The name of another metric may begin with the same letters.
            let is_it = (labels.is_empty() || labels.starts_with('{')) && labels.contains(label);
            is_it.then(|| value.parse::<f64>().ok()).flatten()
        };
        self.0.lines().filter_map(value).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_found_by_name_and_kind() {
        let text = "# HELP turret_operator_reconciles Looks at an object.\n\
                    turret_operator_reconciles_total{kind=\"ModelGroup\"} 7\n\
                    turret_operator_reconciles_total{kind=\"ModelPlacement\"} 5\n\
                    turret_operator_worker_streams 3\n\
                    turret_operator_worker_streams_else 9\n\
                    turret_operator_leader 1\n# EOF\n";
        let scrape = Scrape(text.into());
        assert_eq!((scrape.looks_at_groups(), scrape.looks_at_placements(), scrape.looks()), (7, 5, 12));
        assert_eq!((scrape.streams(), scrape.leads()), (3, true));
        let nothing = Scrape(String::new());
        assert_eq!((nothing.looks(), nothing.streams(), nothing.leads()), (0, 0, false));
    }
}
