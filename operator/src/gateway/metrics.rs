//! The gateway's metrics, `turret_gateway_*`. No label can grow with what clients send.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, EncodeLabelValue, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

/// How an attempt on a worker went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Trouble {
    /// It could not be reached.
    Unreachable,
    /// The connection broke before the first byte of the answer.
    BrokenEarly,
    /// The connection broke after bytes had been passed on.
    BrokenMidway,
    /// It refused (503).
    Unavailable,
    /// Its queue is full (429).
    Full,
    /// It did not take the gateway's token (401, 403).
    Token,
    /// It does not know the model (404).
    UnknownModel,
}

/// How holding a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum HoldEnd {
    /// Something changed, and it went on.
    LetGo,
    /// It waited as long as it may.
    Expired,
    /// No place was left.
    Refused,
    /// Its client left.
    Cancelled,
    /// The gateway stopped.
    Stopped,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Kind {
    kind: Trouble,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct End {
    end: HoldEnd,
}

/// All of them.
pub struct Metrics {
    registry: Registry,
    requests: Family<Code, Counter>,
    upstream_errors: Family<Kind, Counter>,
    holds: Family<End, Counter>,
    /// Requests sent again to another worker, or to the same one later.
    pub retries: Counter,
    /// Requests that wait for a worker.
    pub held: Gauge,
    /// Requests that a worker is answering.
    pub in_flight: Gauge,
    /// From the arrival of a request to the first byte of its answer.
    pub time_to_first_byte: Histogram,
    /// Workers whose state stream is open.
    pub workers: Gauge<u64, AtomicU64>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All at zero.
    pub fn new() -> Self {
        let mut registry = Registry::with_prefix("turret_gateway");
        let metrics = Self {
            requests: Family::default(),
            upstream_errors: Family::default(),
            holds: Family::default(),
            retries: Counter::default(),
            held: Gauge::default(),
            in_flight: Gauge::default(),
            time_to_first_byte: Histogram::new(exponential_buckets(0.001, 2.0, 18)),
            workers: Gauge::default(),
            registry: Registry::default(),
        };
        registry.register(
            "requests",
            "Inference requests answered, by class of the status",
            metrics.requests.clone(),
        );
        registry.register(
            "upstream_errors",
            "Attempts on a worker that went wrong, by kind",
            metrics.upstream_errors.clone(),
        );
        registry.register("holds", "Requests that were held, by how that ended", metrics.holds.clone());
        registry.register("retries", "Attempts after the first one of a request", metrics.retries.clone());
        registry.register("held", "Requests that wait for a worker", metrics.held.clone());
        registry.register("in_flight", "Requests that a worker is answering", metrics.in_flight.clone());
        registry.register_with_unit(
            "time_to_first_byte",
            "From the arrival of an inference request to the first byte of its answer",
            Unit::Seconds,
            metrics.time_to_first_byte.clone(),
        );
        registry.register("workers", "Workers whose state stream is open", metrics.workers.clone());
        for class in ["2xx", "3xx", "4xx", "5xx"] {
            let _ = metrics.requests.get_or_create(&Code { code: class.into() });
        }
        Self { registry, ..metrics }
    }

    /// All metrics with every label they can have, for the reference.
    pub fn reference() -> String {
        let metrics = Self::new();
        metrics.upstream_error(Trouble::Unreachable);
        metrics.hold_ended(HoldEnd::LetGo);
        metrics.text()
    }

    /// Counts an answered request.
    pub fn answered(&self, status: http::StatusCode) {
        let class = format!("{}xx", status.as_u16() / 100);
        self.requests.get_or_create(&Code { code: class }).inc();
    }

    /// Counts an attempt that went wrong.
    pub fn upstream_error(&self, kind: Trouble) {
        self.upstream_errors.get_or_create(&Kind { kind }).inc();
    }

    /// Counts the end of a hold.
    pub fn hold_ended(&self, end: HoldEnd) {
        self.holds.get_or_create(&End { end }).inc();
    }

    /// In the OpenMetrics text format.
    pub fn text(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to memory cannot fail");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_have_our_prefix_and_bounded_labels() {
        let metrics = Metrics::new();
        metrics.answered(http::StatusCode::NOT_FOUND);
        metrics.upstream_error(Trouble::BrokenEarly);
        metrics.hold_ended(HoldEnd::LetGo);
        metrics.time_to_first_byte.observe(0.003);
        let text = metrics.text();
        for line in [
            "turret_gateway_requests_total{code=\"2xx\"} 0",
            "turret_gateway_requests_total{code=\"4xx\"} 1",
            "turret_gateway_upstream_errors_total{kind=\"BrokenEarly\"} 1",
            "turret_gateway_holds_total{end=\"LetGo\"} 1",
            "turret_gateway_time_to_first_byte_seconds_count 1",
            "turret_gateway_held 0",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }
}
