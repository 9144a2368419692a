//! `docs/reference/metrics.md`: what the programs say of their metrics.
//!
//! Each program prints all of its metrics once, in the format in which they are scraped, with every label
//! they can have; the page is read from that, so a metric that exists is on it.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};

use super::{NOTICE, cell};

/// Where a family of metrics is served, by the beginning of its name.
const SERVED: [(&str, &str, &str); 4] = [
    ("turret_operator_", "Operator", "Port 8080 of `turret-operator run`."),
    ("turret_gateway_", "Gateway", "Port 8080 of `turret-operator gateway`, beside the clients' API."),
    (
        "vllm:",
        "Worker, by the model-server protocol",
        "Port 8080 of a worker. Names that gateways and autoscalers for model servers already read; an adapter is a lens.",
    ),
    ("turret_", "Worker", "Port 8080 of a worker."),
];

/// One metric, as it was printed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Metric {
    kind: String,
    help: String,
    labels: Vec<String>,
}

/// The page, from what the programs print.
pub fn page(printed: &[String]) -> Result<String> {
    let mut metrics = BTreeMap::new();
    for text in printed {
        metrics.extend(read(text)?);
    }
    ensure!(!metrics.is_empty(), "the programs print no metrics");
    let mut page = format!(
        "<!-- {NOTICE} -->\n\n# Metrics reference\n\nEverything serves `GET /metrics` without a token, in the OpenMetrics text \
         format. A histogram NAME is scraped as `NAME_bucket`, `NAME_sum` and `NAME_count`.\n"
    );
    for (prefix, title, place) in SERVED {
        let first = |name: &str| SERVED.iter().find(|(p, ..)| name.starts_with(p)).map(|(p, ..)| *p);
        let served = metrics.iter().filter(|(name, _)| first(name) == Some(prefix));
        write!(page, "\n## {title}\n\n{place}\n\n| metric | kind | labels | meaning |\n|---|---|---|---|\n")?;
        for (name, Metric { kind, help, labels }) in served {
            let labels: Vec<String> = labels.iter().map(|label| format!("`{label}`")).collect();
            writeln!(page, "| `{name}` | {kind} | {} | {} |", labels.join(", "), cell(help))?;
        }
    }
    let nowhere = metrics.keys().find(|name| !SERVED.iter().any(|(prefix, ..)| name.starts_with(prefix)));
    ensure!(nowhere.is_none(), "the metric {nowhere:?} belongs to no section of the page");
    Ok(page)
}

/// The metrics of a text as it is scraped, by the names under which they are found.
fn read(text: &str) -> Result<BTreeMap<String, Metric>> {
    let mut families: BTreeMap<&str, Metric> = BTreeMap::new();
    for line in text.lines().filter(|line| *line != "# EOF") {
        let described = |keyword: &str| line.strip_prefix(keyword).and_then(|rest| rest.split_once(' '));
        if let Some((name, help)) = described("# HELP ") {
            families.entry(name).or_default().help = help.trim_end_matches('.').to_owned();
        } else if let Some((name, kind)) = described("# TYPE ") {
            families.entry(name).or_default().kind = kind.to_owned();
        } else if !line.starts_with('#') {
            let (name, labels) = sample(line);
            // The longest name that the sample's begins with: the family it belongs to.
            let family = families.iter_mut().filter(|(family, _)| name.starts_with(**family));
            let (_, family) = family.max_by_key(|(family, _)| family.len()).with_context(|| {
                format!("the sample `{line}` belongs to no metric that was described before")
            })?;
            for label in labels.into_iter().filter(|label| *label != "le") {
                if !family.labels.iter().any(|known| known == label) {
                    family.labels.push(label.to_owned());
                }
            }
        }
    }
    // Counters are scraped with a suffix that their description lacks.
    let scraped =
        |name: &str, kind: &str| if kind == "counter" { format!("{name}_total") } else { name.to_owned() };
    Ok(families.into_iter().map(|(name, metric)| (scraped(name, &metric.kind), metric)).collect())
}

/// Name and label names of a sample line. The values are never of interest, and hold no quotes here.
fn sample(line: &str) -> (&str, Vec<&str>) {
    let Some((name, rest)) = line.split_once('{') else {
        return (line.split(' ').next().unwrap_or(line), Vec::new());
    };
    let labels = rest.split_once('}').map_or(rest, |(labels, _)| labels);
    (name, labels.split(',').filter_map(|pair| pair.split_once('=')).map(|(name, _)| name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPERATOR: &str = "# HELP turret_operator_applies Owned objects written, by kind.\n\
                            # TYPE turret_operator_applies counter\nturret_operator_applies_total{kind=\"\"} 0\n# EOF\n";
    const WORKER: &str = "# HELP turret_wait_seconds A | wait.\n# TYPE turret_wait_seconds histogram\n\
                          # UNIT turret_wait_seconds seconds\nturret_wait_seconds_sum 0.0\n\
                          turret_wait_seconds_bucket{le=\"1.0\",group=\"\"} 0\n# HELP vllm:x X.\n# TYPE vllm:x gauge\nvllm:x 0\n";

    #[test]
    fn a_metric_is_listed_where_it_is_served_with_its_labels() {
        let page = page(&[OPERATOR.into(), WORKER.into()]).unwrap();
        let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
        assert_eq!(
            rows,
            [
                "| `turret_operator_applies_total` | counter | `kind` | Owned objects written, by kind |",
                "| `vllm:x` | gauge |  | X |",
                "| `turret_wait_seconds` | histogram | `group` | A \\| wait |",
            ]
        );
    }

    #[test]
    fn a_metric_of_another_prefix_is_not_forgotten_silently() {
        let text = OPERATOR.replace("turret_operator", "other");
        assert!(page(&[text]).unwrap_err().to_string().contains("other_applies_total"));
        assert!(page(&[String::new()]).is_err());
    }
}
