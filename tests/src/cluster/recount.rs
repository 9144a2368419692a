//! What a worker says of itself against a recount: the sums in its report against its own lists, and both against its metrics.

use std::collections::BTreeMap;

use turret_crds::WorkerReport;
use turret_crds::report::Tier;

/// Metrics as they are scraped; those that are whole numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Samples(BTreeMap<String, u64>);

impl Samples {
    /// Reads the OpenMetrics text format.
    pub fn read(text: &str) -> Self {
        let samples = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse::<u64>().ok()?))
        });
        Self(samples.collect())
    }

    /// The one with exactly this name, and these labels in this order; 0 when there is none.
    pub fn one(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// The sum of all of a name whose labels hold this text.
    pub fn sum(&self, name: &str, labels: &str) -> u64 {
        let holds =
            |key: &str| key.strip_prefix(name).is_some_and(|l| l.starts_with('{') && l.contains(labels));
        self.0.iter().filter(|(key, _)| holds(key)).map(|(_, value)| value).sum()
    }
}

/// What does not agree, in words; empty when all does. For a worker at rest whose lenses are all of different files, and which
/// was told to forget none.
pub fn differences(report: &WorkerReport, samples: &Samples) -> Vec<String> {
    let state = &report.state;
    let Some(device) = state.tiers.iter().find(|tier| tier.tier == Tier::Device) else {
        return vec!["the report has no device tier".into()];
    };
    let resident: Vec<_> = report.lenses.iter().filter(|lens| lens.tier == Tier::Device).collect();
    let lens_bytes: u64 = resident.iter().filter_map(|lens| lens.bytes).sum();
    let bases = report.bases.iter().filter(|base| base.tier == Tier::Device);
    let base_bytes: u64 = bases.filter_map(|base| base.bytes).sum();
    let count = resident.len() as u64;
    let sum = |of: fn(&turret_crds::report::LensReport) -> u64| -> u64 {
        report.lenses.iter().map(|lens| of(lens)).sum()
    };
    let evictions = samples.sum("turret_lens_evictions_total", "reason=");
    let answered = samples.sum("turret_requests_total", "code=\"200\"")
        - samples.sum("turret_requests_total", "lens=\"\",code=\"200\"");
    let pairs = [
        ("rows", u64::from(state.running_rows) + u64::from(state.waiting_rows), 0),
        ("rows of lenses", sum(|lens| lens.active_rows.into()), 0),
        ("bytes of lenses", device.lens_bytes, lens_bytes),
        ("bytes of bases", device.base_bytes, base_bytes),
        ("bytes of lenses in metrics", samples.one(&tier_bytes("turret_tier_bytes", "lens")), lens_bytes),
        ("bytes of bases in metrics", samples.one(&tier_bytes("turret_tier_bytes", "base")), base_bytes),
        (
            "the lens budget in metrics",
            samples.one(&tier_bytes("turret_tier_budget_bytes", "lens")),
            device.lens_budget_bytes,
        ),
        ("lenses in metrics", samples.one("vllm:num_gpu_loaded_lora_adapters"), count),
        ("named lenses in metrics", samples.sum("vllm:lora_adapter_loaded", "level=\"device\""), count),
        ("evictions", state.evictions, evictions),
        ("loads", sum(|lens| lens.loads), count + evictions),
        ("answers", sum(|lens| lens.served), answered),
    ];
    let differ = pairs.iter().filter(|(_, said, counted)| said != counted);
    let mut found: Vec<String> =
        differ.map(|(what, said, counted)| format!("{what}: {said} said, {counted} counted")).collect();
    for lens in &resident {
        let name = format!("adapter_name=\"{}:{}\"", lens.group, lens.name);
        if samples.sum("vllm:lora_adapter_loaded", &name) != 1 {
            found.push(format!("`{}:{}` is in memory and not in metrics", lens.group, lens.name));
        }
    }
    let limits = [
        ("lenses", device.lens_bytes, device.lens_budget_bytes),
        ("everything", device.base_bytes + device.lens_bytes + device.working_bytes, device.budget_bytes),
    ];
    let beyond = limits.iter().filter(|(_, bytes, budget)| bytes > budget);
    found
        .extend(beyond.map(|(what, bytes, budget)| format!("{what}: {bytes} bytes of a budget of {budget}")));
    found
}

/// A metric of the device tier.
fn tier_bytes(name: &str, part: &str) -> String {
    format!("{name}{{tier=\"device\",part=\"{part}\"}}")
}

#[cfg(test)]
mod tests {
    use turret_crds::report::{
        ArtifactState, DeviceReport, LensReport, TierReport, WorkerIdentity, WorkerState,
    };

    use super::*;

    /// Two lenses, one of them in memory, each loaded once.
    fn report() -> WorkerReport {
        let mut gone = LensReport::new("g", "gone", ArtifactState::Ready, Tier::Disk);
        (gone.bytes, gone.loads, gone.served) = (Some(7), 1, 2);
        let mut held = LensReport::new("g", "held", ArtifactState::Ready, Tier::Device);
        (held.bytes, held.loads, held.served) = (Some(5), 1, 3);
        let device = TierReport {
            tier: Tier::Device,
            base_bytes: 0,
            lens_bytes: 5,
            working_bytes: 10,
            budget_bytes: 20,
            lens_budget_bytes: 8,
        };
        WorkerReport {
            protocol: 1,
            worker: WorkerIdentity {
                name: "w".into(),
                instance: "i".into(),
                version: "0".into(),
                device: DeviceReport { kind: "cpu".into(), name: "cpu".into(), total_bytes: 100 },
            },
            state: WorkerState { tiers: vec![device], evictions: 1, ..WorkerState::default() },
            bases: Vec::new(),
            lenses: vec![gone.into(), held.into()],
            aliases: Default::default(),
        }
    }

    const METRICS: &str = "\
# TYPE turret_tier_bytes gauge
turret_tier_bytes{tier=\"device\",part=\"lens\"} 5
turret_tier_bytes{tier=\"device\",part=\"base\"} 0
turret_tier_budget_bytes{tier=\"device\",part=\"lens\"} 8
vllm:num_gpu_loaded_lora_adapters 1
vllm:lora_adapter_loaded{adapter_name=\"g:held\",level=\"device\",pinned=\"false\"} 1
vllm:kv_cache_usage_perc 0.5
turret_lens_evictions_total{reason=\"Room\"} 1
turret_requests_total{group=\"g\",lens=\"held\",code=\"200\"} 3
turret_requests_total{group=\"g\",lens=\"gone\",code=\"200\"} 2
turret_requests_total{group=\"g\",lens=\"\",code=\"200\"} 9
turret_requests_total{group=\"g\",lens=\"gone\",code=\"503\"} 4
# EOF
";

    #[test]
    fn a_report_that_agrees_with_its_lists_and_metrics_has_no_differences() {
        assert_eq!(differences(&report(), &Samples::read(METRICS)), [""; 0]);
    }

    #[test]
    fn each_sum_that_is_wrong_is_named() {
        let mut wrong = report();
        wrong.state.tiers[0].lens_bytes = 9;
        wrong.state.evictions = 2;
        let found = differences(&wrong, &Samples::read(METRICS));
        assert_eq!(
            found,
            [
                "bytes of lenses: 9 said, 5 counted",
                "evictions: 2 said, 1 counted",
                "lenses: 9 bytes of a budget of 8",
            ]
        );
        let unnamed = METRICS.replace("g:held", "g:other");
        let found = differences(&report(), &Samples::read(&unnamed));
        assert_eq!(found, ["`g:held` is in memory and not in metrics"]);
    }
}
