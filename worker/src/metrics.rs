//! Metrics: the model-server protocol's names where they can be filled truthfully, and our own beside them.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus_client::encoding::{EncodeLabelSet, text::encode};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use turret_crds::report::Tier;

use crate::engine::handle::Snapshot;
use crate::residency::View;

type Float = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    group: String,
    lens: String,
    code: u16,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LensLabels {
    adapter_name: String,
    level: String,
    pinned: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CacheLabels {
    block_size: u32,
    num_gpu_blocks: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TierLabels {
    tier: String,
    part: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct EvictionLabels {
    reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct BaseLabels {
    base: String,
}

/// Everything this worker counts.
#[derive(Debug)]
pub struct Metrics {
    registry: Mutex<Registry>,
    requests: Family<RequestLabels, Counter>,
    time_to_first_token: Histogram,
    request_duration: Histogram,
    lens_wait: Histogram,
    switch_wait: Histogram,
    running: Gauge,
    waiting: Gauge,
    kv_use: Float,
    cache: Family<CacheLabels, Gauge>,
    loaded: Family<LensLabels, Gauge>,
    loaded_count: Gauge,
    prompt_tokens: Counter,
    generated_tokens: Counter,
    prefix_queries: Counter,
    prefix_hits: Counter,
    preemptions: Counter,
    steps: Counter,
    switches: Counter,
    evictions: Family<EvictionLabels, Counter>,
    leases: Gauge,
    ready: Gauge,
    active: Family<BaseLabels, Gauge>,
    switching: Family<BaseLabels, Gauge>,
    switch_waiting: Gauge,
    tiers: Family<TierLabels, Gauge>,
    budgets: Family<TierLabels, Gauge>,
}

fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 18))
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// All metrics, at zero.
    pub fn new() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::default()),
            requests: Family::default(),
            time_to_first_token: seconds(),
            request_duration: seconds(),
            lens_wait: seconds(),
            switch_wait: seconds(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            kv_use: Float::default(),
            cache: Family::default(),
            loaded: Family::default(),
            loaded_count: Gauge::default(),
            prompt_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            prefix_queries: Counter::default(),
            prefix_hits: Counter::default(),
            preemptions: Counter::default(),
            steps: Counter::default(),
            switches: Counter::default(),
            evictions: Family::default(),
            leases: Gauge::default(),
            ready: Gauge::default(),
            active: Family::default(),
            switching: Family::default(),
            switch_waiting: Gauge::default(),
            tiers: Family::default(),
            budgets: Family::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&self) {
        let mut registry = self.registry.lock();
        let r = &mut *registry;
        r.register("vllm:num_requests_running", "Requests in the batch", self.running.clone());
        r.register("vllm:num_requests_waiting", "Requests that wait", self.waiting.clone());
        r.register("vllm:kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1", self.kv_use.clone());
        r.register("vllm:cache_config_info", "Shape of the KV cache", self.cache.clone());
        r.register(
            "vllm:prefix_cache_queries",
            "Prompt tokens that were looked for in the KV cache",
            self.prefix_queries.clone(),
        );
        r.register(
            "vllm:prefix_cache_hits",
            "Prompt tokens that were found in the KV cache",
            self.prefix_hits.clone(),
        );
        r.register("vllm:lora_adapter_loaded", "Lenses in memory", self.loaded.clone());
        r.register("vllm:num_gpu_loaded_lora_adapters", "Lenses in device memory", self.loaded_count.clone());
        r.register("turret_requests", "Answered requests by group, lens and status", self.requests.clone());
        let second = || Unit::Seconds;
        r.register_with_unit(
            "turret_time_to_first_token",
            "From the request to its first token",
            second(),
            self.time_to_first_token.clone(),
        );
        r.register_with_unit(
            "turret_request_duration",
            "From the request to its end",
            second(),
            self.request_duration.clone(),
        );
        r.register_with_unit(
            "turret_lens_load",
            "Loads of a lens that a request waited for",
            second(),
            self.lens_wait.clone(),
        );
        r.register_with_unit(
            "turret_base_switch",
            "Switches of base that a request waited for",
            second(),
            self.switch_wait.clone(),
        );
        r.register("turret_prompt_tokens", "Prompt tokens computed", self.prompt_tokens.clone());
        r.register("turret_generated_tokens", "Tokens generated", self.generated_tokens.clone());
        r.register(
            "turret_preemptions",
            "Rows that stepped back for want of KV blocks",
            self.preemptions.clone(),
        );
        r.register("turret_engine_steps", "Steps of the engine", self.steps.clone());
        r.register("turret_base_switches", "Switches of base", self.switches.clone());
        r.register("turret_lens_evictions", "Lenses that left memory, by reason", self.evictions.clone());
        r.register("turret_lens_leases", "Leases that run", self.leases.clone());
        r.register("turret_ready", "Whether this worker takes requests", self.ready.clone());
        r.register("turret_active_base", "The active base", self.active.clone());
        r.register(
            "turret_switching_base",
            "The base that is being switched to: how much of it is in memory, percent",
            self.switching.clone(),
        );
        r.register(
            "turret_switch_waiting",
            "Requests that wait for the base that is being switched to",
            self.switch_waiting.clone(),
        );
        let bytes = || Unit::Bytes;
        r.register_with_unit("turret_tier", "Bytes in use by tier and part", bytes(), self.tiers.clone());
        r.register_with_unit(
            "turret_tier_budget",
            "Bytes allowed by tier and part",
            bytes(),
            self.budgets.clone(),
        );
    }

    /// All metrics with every label they can have, for the reference.
    pub fn reference() -> String {
        let metrics = Self::new();
        metrics.answered("", None, 200, Duration::ZERO);
        drop(metrics.cache.get_or_create(&CacheLabels { block_size: 0, num_gpu_blocks: 0 }));
        let lens = LensLabels { adapter_name: String::new(), level: String::new(), pinned: String::new() };
        drop(metrics.loaded.get_or_create(&lens));
        drop(metrics.evictions.get_or_create(&EvictionLabels { reason: String::new() }));
        drop(metrics.active.get_or_create(&BaseLabels { base: String::new() }));
        drop(metrics.switching.get_or_create(&BaseLabels { base: String::new() }));
        for family in [&metrics.tiers, &metrics.budgets] {
            drop(family.get_or_create(&TierLabels { tier: String::new(), part: String::new() }));
        }
        let mut text = String::new();
        encode(&mut text, &metrics.registry.lock()).expect("writing to memory cannot fail");
        text
    }

    /// Counts an answered request.
    pub fn answered(&self, group: &str, lens: Option<&str>, code: u16, took: Duration) {
        let labels = RequestLabels { group: group.into(), lens: lens.unwrap_or_default().into(), code };
        self.requests.get_or_create(&labels).inc();
        self.request_duration.observe(took.as_secs_f64());
    }

    /// Notes when the first token came.
    pub fn first_token(&self, after: Duration) {
        self.time_to_first_token.observe(after.as_secs_f64());
    }

    /// Notes what a request waited for.
    pub fn waited(&self, lens_load: Option<Duration>, switch: Option<Duration>) {
        if let Some(load) = lens_load {
            self.lens_wait.observe(load.as_secs_f64());
        }
        if let Some(switch) = switch {
            self.switch_wait.observe(switch.as_secs_f64());
        }
    }

    /// All metrics as text, the state's as of now.
    pub fn text(&self, view: &View, engine: &Snapshot) -> String {
        let registry = self.registry.lock();
        self.refresh(view, engine);
        let mut text = String::new();
        encode(&mut text, &registry).expect("writing to memory cannot fail");
        text
    }

    fn refresh(&self, view: &View, engine: &Snapshot) {
        use std::sync::atomic::Ordering::Relaxed;
        let state = &view.report.state;
        self.running.set(state.running_rows.into());
        self.waiting.set(state.waiting_rows.into());
        let used = engine.kv_blocks_total.saturating_sub(engine.kv_blocks_free);
        self.kv_use.set(f64::from(used) / f64::from(engine.kv_blocks_total.max(1)));
        self.cache.clear();
        let blocks =
            CacheLabels { block_size: engine.kv_block_tokens, num_gpu_blocks: engine.kv_blocks_total };
        self.cache.get_or_create(&blocks).set(1);
        self.loaded.clear();
        let loaded: Vec<_> = view.report.lenses.iter().filter(|l| l.tier == Tier::Device).collect();
        for lens in &loaded {
            let labels = LensLabels {
                adapter_name: format!("{}:{}", lens.group, lens.name),
                level: "device".into(),
                pinned: lens.pinned.to_string(),
            };
            self.loaded.get_or_create(&labels).set(1);
        }
        self.loaded_count.set(loaded.len() as i64);
        for (counter, total) in [
            (&self.prompt_tokens, engine.prompt_tokens_total),
            (&self.generated_tokens, engine.generated_tokens_total),
            (&self.prefix_queries, engine.prefix_queried_tokens_total),
            (&self.prefix_hits, engine.prefix_cached_tokens_total),
            (&self.preemptions, engine.preemptions_total),
            (&self.steps, engine.steps_total),
            (&self.switches, state.switches),
        ] {
            counter.inner().store(total, Relaxed);
        }
        for (reason, total) in &view.evictions {
            let labels = EvictionLabels { reason: reason.to_string() };
            self.evictions.get_or_create(&labels).inner().store(*total, Relaxed);
        }
        self.leases.set(view.leases.len() as i64);
        self.ready.set(state.ready.into());
        self.active.clear();
        if let Some(base) = &state.active_base {
            self.active.get_or_create(&BaseLabels { base: base.to_string() }).set(1);
        }
        self.switching.clear();
        if let Some(switch) = &state.switch {
            let labels = BaseLabels { base: switch.to.to_string() };
            self.switching.get_or_create(&labels).set(switch.percent.into());
        }
        let waiting = state.switch.as_ref().map_or(0, |switch| switch.waiting_requests);
        self.switch_waiting.set(waiting.into());
        for tier in &state.tiers {
            let name = format!("{:?}", tier.tier).to_lowercase();
            let labels = |part: &str| TierLabels { tier: name.clone(), part: part.into() };
            for (part, bytes) in
                [("base", tier.base_bytes), ("lens", tier.lens_bytes), ("working", tier.working_bytes)]
            {
                self.tiers.get_or_create(&labels(part)).set(bytes as i64);
            }
            for (part, bytes) in [("all", tier.budget_bytes), ("lens", tier.lens_budget_bytes)] {
                self.budgets.get_or_create(&labels(part)).set(bytes as i64);
            }
        }
    }
}
