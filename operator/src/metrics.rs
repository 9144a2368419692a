//! The operator's metrics, all of them, prefix `turret_operator_`.

use std::{sync::Arc, time::Instant};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::Registry,
};

/// Which kind of object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Kind {
    /// Its name.
    pub kind: &'static str,
}

/// How something ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Outcome {
    /// `ok` or `failed`.
    pub outcome: &'static str,
}

/// Which way a number of workers went.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Direction {
    /// `up` or `down`.
    pub direction: &'static str,
}

/// The metrics. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    registry: Arc<Registry>,
    reconciles: Family<Kind, Counter>,
    reconcile_errors: Family<Kind, Counter>,
    reconcile_seconds: Family<Kind, Histogram>,
    /// Server-side applies sent.
    pub applies: Family<Kind, Counter>,
    /// Status writes sent.
    pub status_writes: Family<Kind, Counter>,
    /// Documents given to workers.
    pub pushes: Family<Outcome, Counter>,
    /// Hints that were published.
    pub hints_published: Counter,
    /// State streams that are open.
    pub worker_streams: Gauge,
    /// Gateways that tell what waits.
    pub gateway_streams: Gauge,
    /// Changes of a number of workers by autoscaling.
    pub rescales: Family<Direction, Counter>,
    /// Whether this replica is the leader.
    pub leader: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("turret_operator");
        let seconds =
            || Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1.0, 5.0]);
        let metrics = Self {
            registry: Arc::default(),
            reconciles: Family::default(),
            reconcile_errors: Family::default(),
            reconcile_seconds: Family::new_with_constructor(seconds),
            applies: Family::default(),
            status_writes: Family::default(),
            pushes: Family::default(),
            hints_published: Counter::default(),
            worker_streams: Gauge::default(),
            gateway_streams: Gauge::default(),
            rescales: Family::default(),
            leader: Gauge::default(),
        };
        registry.register("reconciles", "Looks at an object", metrics.reconciles.clone());
        registry.register(
            "reconcile_errors",
            "Looks at an object that failed and are tried again",
            metrics.reconcile_errors.clone(),
        );
        registry.register(
            "reconcile_duration_seconds",
            "Time of one look at an object, requests included",
            metrics.reconcile_seconds.clone(),
        );
        registry.register("applies", "Owned objects written, by kind", metrics.applies.clone());
        registry.register("status_writes", "Statuses written, by kind", metrics.status_writes.clone());
        registry.register("document_pushes", "Worker documents given to workers", metrics.pushes.clone());
        registry.register(
            "hints_published",
            "Times that a placement's workers were advised otherwise which lenses to hold",
            metrics.hints_published.clone(),
        );
        registry.register(
            "worker_streams",
            "Worker state streams that are open",
            metrics.worker_streams.clone(),
        );
        registry.register(
            "gateway_streams",
            "Gateways that tell what waits; without any, nothing is scaled to zero, and nothing wakes",
            metrics.gateway_streams.clone(),
        );
        registry.register(
            "rescales",
            "Changes of a placement's number of workers by its autoscaling, by direction",
            metrics.rescales.clone(),
        );
        registry.register(
            "leader",
            "1 on the replica that acts, 0 on those that stand by",
            metrics.leader.clone(),
        );
        Self { registry: Arc::new(registry), ..metrics }
    }
}

impl Metrics {
    /// All metrics with every label they can have, for the reference.
    pub fn reference() -> String {
        let metrics = Self::default();
        let kind = Kind { kind: "" };
        for family in
            [&metrics.reconciles, &metrics.reconcile_errors, &metrics.applies, &metrics.status_writes]
        {
            drop(family.get_or_create(&kind));
        }
        drop(metrics.reconcile_seconds.get_or_create(&kind));
        drop(metrics.pushes.get_or_create(&Outcome { outcome: "" }));
        drop(metrics.rescales.get_or_create(&Direction { direction: "" }));
        metrics.text()
    }

    /// All metrics in the OpenMetrics text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string cannot fail");
        text
    }

    /// Counts a look at an object, and times it until the value is dropped.
    pub fn reconcile(&self, kind: &'static str) -> Reconcile {
        let label = Kind { kind };
        self.reconciles.get_or_create(&label).inc();
        Reconcile { histogram: self.reconcile_seconds.get_or_create(&label).clone(), started: Instant::now() }
    }

    /// Counts a look at an object that failed.
    pub fn reconcile_failed(&self, kind: &'static str) {
        self.reconcile_errors.get_or_create(&Kind { kind }).inc();
    }
}

/// Times a look at an object.
pub struct Reconcile {
    histogram: Histogram,
    started: Instant,
}

impl Drop for Reconcile {
    fn drop(&mut self) {
        self.histogram.observe(self.started.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_named_with_their_prefix_and_units() {
        let metrics = Metrics::default();
        drop(metrics.reconcile("ModelGroup"));
        metrics.leader.set(1);
        let text = metrics.text();
        for line in [
            "turret_operator_reconciles_total{kind=\"ModelGroup\"} 1",
            "turret_operator_reconcile_duration_seconds_count{kind=\"ModelGroup\"} 1",
            "turret_operator_leader 1",
        ] {
            assert!(text.contains(line), "{line} in\n{text}");
        }
    }
}
