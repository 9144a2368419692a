use std::{collections::VecDeque, sync::Arc};

use proptest::prelude::*;
use turret_crds::report::{
    BaseReport, DeviceReport, LensReport, SwitchPhase, SwitchReport, WorkerIdentity, WorkerState,
};

use super::*;
use crate::{
    fleet::{Endpoint, Link},
    keys::TokenSource,
};

/// A worker that serves the groups `north` (base `n`) and `south` (base `s`), with `n` active.
fn worker(name: &str) -> Worker<()> {
    let base = |key: &str, group: &str, tier| BaseReport {
        key: BaseKey(key.into()),
        groups: vec![group.into()],
        state: ArtifactState::Ready,
        tier,
        digest: None,
        revision: None,
        bytes: None,
        fetch: None,
        max_context_tokens: None,
        running_rows: 0,
        waiting_rows: 0,
    };
    let report = WorkerReport {
        protocol: 1,
        worker: WorkerIdentity {
            name: name.into(),
            instance: "1".into(),
            version: "0".into(),
            device: DeviceReport { kind: "cpu".into(), name: String::new(), total_bytes: 0 },
        },
        state: WorkerState { ready: true, active_base: Some(BaseKey("n".into())), ..WorkerState::default() },
        bases: vec![base("n", "north", Tier::Device), base("s", "south", Tier::Disk)],
        lenses: vec![
            lens("north", "cold", Tier::Disk),
            lens("north", "warm", Tier::Device),
            lens("south", "cold", Tier::Disk),
        ],
        aliases: Arc::default(),
    };
    Worker {
        endpoint: Arc::new(Endpoint {
            id: WorkerId(name.into()),
            control_url: "".into(),
            token: TokenSource::Open,
            attached: (),
        }),
        link: Link::Open,
        report: Some(Arc::new(report)),
    }
}

fn switching_to(base: &str) -> Option<SwitchReport> {
    let phase = SwitchPhase::Loading;
    Some(SwitchReport { from: None, to: BaseKey(base.into()), phase, percent: 0, waiting_requests: 0 })
}

fn lens(group: &str, name: &str, tier: Tier) -> Arc<LensReport> {
    LensReport::new(group, name, ArtifactState::Ready, tier).into()
}

fn with(mut worker: Worker<()>, change: impl FnOnce(&mut WorkerReport)) -> Worker<()> {
    change(Arc::make_mut(worker.report.as_mut().unwrap()));
    worker
}

fn set_lens(report: &mut WorkerReport, name: &str, change: impl FnOnce(&mut LensReport)) {
    let lens = report.lenses.iter_mut().find(|l| l.name == name && l.group == "north").unwrap();
    change(Arc::make_mut(lens));
}

fn failed_state() -> ArtifactState {
    ArtifactState::Failed {
        reason: FailureReason::DigestMismatch,
        message: "wanted 1, have 2".into(),
        retry_at: None,
    }
}

fn model(name: &str) -> ModelName {
    match name.split_once(':') {
        Some((group, lens)) => ModelName { group: group.into(), lens: Some(lens.into()) },
        None => ModelName { group: name.into(), lens: None },
    }
}

fn order(name: &str, workers: &[Worker<()>], in_flight: &InFlight) -> Vec<String> {
    let choices = pick(&model(name), workers, in_flight, |_| false).unwrap();
    choices.iter().map(|c| c.worker.endpoint.id.to_string()).collect()
}

fn why(name: &str, workers: &[Worker<()>]) -> Unserved {
    pick(&model(name), workers, &InFlight::default(), |_| false).unwrap_err()
}

fn sent(pairs: &[(&str, &str, &str, u32)]) -> InFlight {
    let mut in_flight = InFlight::default();
    for (worker, base, name, count) in pairs {
        for _ in 0..*count {
            in_flight.add(&WorkerId((*worker).into()), &BaseKey((*base).into()), &model(name));
        }
    }
    in_flight
}

#[test]
fn an_active_base_goes_before_everything() {
    let other = with(worker("a"), |r| r.state.active_base = Some(BaseKey("s".into())));
    let busy = with(worker("b"), |r| r.state.running_rows = 40);
    assert_eq!(order("north:warm", &[other, busy], &InFlight::default()), ["b", "a"]);
}

#[test]
fn a_base_that_comes_goes_before_one_that_leaves() {
    let coming = with(worker("a"), |r| {
        r.state.active_base = Some(BaseKey("s".into()));
        r.state.switch = switching_to("n");
    });
    let leaving = with(worker("b"), |r| r.state.switch = switching_to("s"));
    assert_eq!(order("north", &[leaving.clone(), coming.clone()], &InFlight::default()), ["a", "b"]);
    let asked_for_another = worker("b");
    let in_flight = sent(&[("b", "s", "south", 1)]);
    assert_eq!(order("north", &[asked_for_another, coming], &in_flight), ["a", "b"]);
}

#[test]
fn a_burst_over_another_base_makes_one_worker_switch() {
    let workers = [worker("a"), worker("b")];
    let mut in_flight = InFlight::default();
    let first = order("south", &workers, &in_flight)[0].clone();
    in_flight.add(&WorkerId(first.as_str().into()), &BaseKey("s".into()), &model("south"));
    for _ in 0..40 {
        assert_eq!(order("south", &workers, &in_flight)[0], first, "the others follow the first");
        in_flight.add(&WorkerId(first.as_str().into()), &BaseKey("s".into()), &model("south"));
        assert_ne!(order("north", &workers, &in_flight)[0], first, "the old base goes elsewhere");
    }
}

#[test]
fn an_idle_worker_is_switched_rather_than_a_busy_one() {
    let busy = with(worker("a"), |r| r.state.running_rows = 1);
    assert_eq!(order("south", &[busy, worker("b")], &InFlight::default()), ["b", "a"]);
    let parked = with(worker("a"), |r| r.bases[1].tier = Tier::Device);
    assert_eq!(
        order("south", &[worker("b"), parked], &InFlight::default()),
        ["a", "b"],
        "a parked base is cheap"
    );
}

#[test]
fn the_worker_that_holds_the_lens_is_preferred_until_it_is_crowded() {
    let warm = with(worker("b"), |r| set_lens(r, "cold", |l| l.tier = Tier::Device));
    let workers = [worker("a"), with(warm, |r| r.state.running_rows = CROWD - 1)];
    assert_eq!(order("north:cold", &workers, &InFlight::default()), ["b", "a"]);
    assert_eq!(order("north:cold", &workers, &sent(&[("b", "n", "north:cold", CROWD)])), ["a", "b"]);
}

#[test]
fn who_holds_the_lens_answers_and_else_whom_it_is_assigned_to() {
    let assigned = |name: &str| with(worker(name), |r| set_lens(r, "cold", |l| l.assigned = true));
    let holding = |worker: Worker<()>| with(worker, |r| set_lens(r, "cold", |l| l.tier = Tier::Device));
    let busy = |worker: Worker<()>, rows: u32| with(worker, |r| r.state.running_rows = rows);
    let first = |workers: &[Worker<()>]| order("north:cold", workers, &InFlight::default())[0].clone();
    for (a, b) in [("a", "b"), ("b", "a")] {
        assert_eq!(first(&[busy(assigned(a), 9), worker(b)]), a, "it comes where it is to stay");
        assert_eq!(first(&[assigned(a), holding(worker(b))]), b, "it is there already");
        assert_eq!(first(&[holding(busy(assigned(a), 9)), holding(worker(b))]), a, "of those who hold it");
        assert_eq!(first(&[holding(busy(assigned(a), CROWD)), worker(b)]), b, "nobody waits for advice");
        let remote = with(assigned(a), |r| set_lens(r, "cold", |l| l.tier = Tier::Remote));
        assert_eq!(first(&[remote.clone(), worker(b)]), a, "also where it is farther away");
        let in_flight = sent(&[(b, "n", "north:cold", 1)]);
        assert_eq!(order("north:cold", &[remote, worker(b)], &in_flight)[0], b, "it is on its way there");
    }
}

#[test]
fn a_switch_is_made_where_the_base_is_to_stay() {
    let prefers =
        |name: &str, base: &str| with(worker(name), |r| r.state.preferred_base = Some(BaseKey(base.into())));
    for (a, b) in [("a", "b"), ("b", "a")] {
        let workers = [prefers(a, "s"), prefers(b, "n")];
        assert_eq!(order("south", &workers, &InFlight::default())[0], a);
        assert_eq!(order("north", &workers, &InFlight::default())[0], b, "and leaves the other one alone");
        let free = [worker(a), prefers(b, "n")];
        assert_eq!(order("south", &free, &InFlight::default())[0], a);
        let busy = with(prefers(a, "s"), |r| r.state.running_rows = 1);
        assert_eq!(order("south", &[busy, worker(b)], &InFlight::default())[0], b, "it need not wait");
    }
}

#[test]
fn without_advice_a_lens_comes_where_it_would_be_assigned() {
    use turret_crds::assign::{Assignment, LensDemand, LensId, Situation, WorkerRoom, assign};
    let names = ["a", "b", "c"];
    let room = |name: &&str| WorkerRoom {
        name: (*name).into(),
        lens_budget_bytes: u64::MAX,
        weight: 1,
        availability: turret_crds::assign::Availability::Available,
        active_base: None,
    };
    let key = BaseKey("n".into());
    let id = LensId::of("north", "cold");
    let situation = Situation {
        bases: vec![turret_crds::assign::BaseDemand { key: key.clone(), demand_millirows: 0 }],
        lenses: vec![LensDemand {
            id: id.clone(),
            base: key.clone(),
            bytes: 1,
            residency: turret_crds::group::LensResidency::Preloaded,
            priority: 100,
            demand_millirows: 0,
        }],
        workers: names.iter().map(room).collect(),
        ..Situation::default()
    };
    let assigned = assign(&situation, &Assignment::default());
    let workers = names.map(worker);
    let best = order("north:cold", &workers, &InFlight::default());
    assert_eq!(best, assigned.order(&key, Some(&id)));
}

#[test]
fn a_lens_on_its_way_is_not_loaded_twice() {
    let loading =
        with(worker("b"), |r| set_lens(r, "cold", |l| l.state = ArtifactState::Loading { percent: 3 }));
    assert_eq!(order("north:cold", &[worker("a"), loading], &InFlight::default()), ["b", "a"]);
    for asked in ["a", "b"] {
        let in_flight = sent(&[(asked, "n", "north:cold", 1)]);
        assert_eq!(order("north:cold", &[worker("a"), worker("b")], &in_flight)[0], asked);
    }
}

#[test]
fn of_equal_workers_the_shorter_queue_wins_and_reports_are_not_counted_twice() {
    let a = with(worker("a"), |r| r.state.running_rows = 3);
    let b = with(worker("b"), |r| r.state.waiting_rows = 2);
    assert_eq!(order("north", &[a.clone(), b.clone()], &InFlight::default()), ["b", "a"]);
    assert_eq!(order("north", &[a.clone(), b.clone()], &sent(&[("b", "n", "north", 2)])), ["b", "a"]);
    assert_eq!(order("north", &[a, b], &sent(&[("b", "n", "north", 4)])), ["a", "b"]);
}

#[test]
fn lenses_spread_over_equal_workers_and_the_order_of_workers_does_not_matter() {
    let (a, b) = (worker("a"), worker("b"));
    let mut first = std::collections::BTreeMap::new();
    for n in 0..64 {
        let name = format!("l{n}");
        let add = |w: &Worker<()>| with(w.clone(), |r| r.lenses.push(lens("zoo", &name, Tier::Disk)));
        let add = |w| with(add(w), |r| r.bases[0].groups.push("zoo".into()));
        let (a, b) = (add(&a), add(&b));
        let model = format!("zoo:{name}");
        let best = order(&model, &[a.clone(), b.clone()], &InFlight::default())[0].clone();
        assert_eq!(order(&model, &[b, a], &InFlight::default())[0], best);
        *first.entry(best).or_insert(0) += 1;
    }
    assert!(first.values().all(|n| (16..=48).contains(n)), "{first:?}");
}

#[test]
fn who_cannot_serve_is_left_out_and_the_reason_is_the_hopeful_one() {
    let lost = Worker { link: Link::Lost("gone".into()), ..worker("lost") };
    let unready = with(worker("unready"), |r| r.state.ready = false);
    let draining = with(worker("draining"), |r| r.state.draining = true);
    let unaware = with(worker("unaware"), |r| r.lenses.clear());
    let failing = with(worker("failing"), |r| set_lens(r, "warm", |l| l.state = failed_state()));
    let workers = [&lost, &unready, &draining, &unaware, &failing].map(Clone::clone);
    let served =
        pick(&model("north:warm"), workers.iter().chain([&worker("good")]), &InFlight::default(), |_| false)
            .unwrap()
            .len();
    assert_eq!(served, 1);
    let ask = |workers: &[&Worker<()>]| {
        why("north:warm", &workers.iter().map(|w| (*w).clone()).collect::<Vec<_>>())
    };
    assert_eq!(ask(&[]), Unserved::NoWorker);
    assert_eq!(ask(&[&lost]), Unserved::Unreachable);
    assert_eq!(ask(&[&lost, &unready, &unaware, &failing]), Unserved::Starting);
    assert_eq!(ask(&[&draining]), Unserved::Starting);
    assert_eq!(ask(&[&unaware, &failing]), Unserved::OnItsWay);
    assert_eq!(
        ask(&[&failing, &lost]).to_string(),
        "the lens `north:warm` cannot be served: DigestMismatch: wanted 1, have 2"
    );
}

#[test]
fn a_failed_base_is_named_also_before_the_worker_is_ready() {
    let failed = with(worker("a"), |r| {
        r.state.ready = false;
        r.bases[0].state = failed_state();
    });
    assert_eq!(
        why("north:warm", &[failed]).to_string(),
        "the base of `north` cannot be served: DigestMismatch: wanted 1, have 2"
    );
}

#[test]
fn a_refusal_counts_until_its_time_or_until_the_worker_changes() {
    let second = Moment::from_secs;
    let mut refusals = Refusals::default();
    refusals.add(&worker("a"), second(5));
    let asks = |worker: &Worker<()>, now| {
        pick(&model("north"), [worker], &InFlight::default(), |w| refusals.refuses(w, now)).map(|c| c.len())
    };
    assert_eq!(asks(&worker("a"), second(4)), Err(Unserved::Refused));
    assert_eq!(asks(&worker("a"), second(5)), Ok(1));
    assert_eq!(asks(&worker("b"), second(4)), Ok(1));
    let busier = with(worker("a"), |r| r.state.running_rows = 7);
    assert_eq!(asks(&busier, second(4)), Err(Unserved::Refused), "traffic is no reason to ask again");
    let switched = with(worker("a"), |r| r.state.active_base = Some(BaseKey("s".into())));
    assert_eq!(asks(&switched, second(4)), Ok(1));
    let restarted = with(worker("a"), |r| r.worker.instance = "2".into());
    assert_eq!(asks(&restarted, second(4)), Ok(1));
    assert_eq!((refusals.next_end(second(4)), refusals.next_end(second(5))), (Some(second(5)), None));
}

#[test]
fn what_was_sent_and_answered_leaves_nothing_behind() {
    let mut in_flight = sent(&[("a", "n", "north", 2), ("b", "s", "south:cold", 1)]);
    assert_eq!(in_flight.total(), 3);
    for (worker, base, name) in
        [("a", "n", "north"), ("b", "s", "south:cold"), ("a", "n", "north"), ("c", "n", "north")]
    {
        in_flight.remove(&WorkerId(worker.into()), &BaseKey(base.into()), &model(name));
    }
    assert_eq!(in_flight, InFlight::default());
}

/// A worker that switches when nothing runs over its active base, as DESIGN's rule says for idle bases.
struct Simulated {
    active: usize,
    /// Ticks until a switch is done, and to which base.
    switching: Option<(u32, usize)>,
    /// Base and remaining ticks of each row.
    rows: Vec<(usize, u32)>,
    switches: u32,
    /// Reports that are still on their way to the gateway.
    reports: VecDeque<(usize, Option<usize>, u32)>,
}

const BASES: [(&str, &str); 2] = [("n", "north"), ("s", "south")];

impl Simulated {
    fn tick(&mut self, in_flight: &mut InFlight, id: &WorkerId) {
        if let Some((left, next)) = self.switching {
            self.switching = (left > 1).then_some((left - 1, next));
            if left <= 1 {
                self.active = next;
            }
        } else if let Some((waiting, _)) = self.rows.first().copied()
            && !self.rows.iter().any(|(base, _)| *base == self.active)
        {
            self.switching = Some((3, waiting));
            self.switches += 1;
        } else {
            let active = self.active;
            self.rows.retain_mut(|(base, left)| {
                if *base == active {
                    *left -= 1;
                }
                if *left == 0 {
                    in_flight.remove(id, &BaseKey(BASES[*base].0.into()), &model(BASES[*base].1));
                }
                *left > 0
            });
        }
        let rows = u32::try_from(self.rows.len()).unwrap();
        self.reports.push_back((self.active, self.switching.map(|s| s.1), rows));
    }
}

proptest! {
    #[test]
    fn two_workers_and_two_bases_settle_into_one_base_each(
        arrivals in proptest::collection::vec(proptest::option::of(0..2usize), 300..400),
        lag in 1..4usize,
        row_ticks in 4..9u32,
    ) {
        let mut workers = [worker("a"), worker("b")];
        let mut simulated = [(); 2].map(|()| Simulated {
            active: 0, switching: None, rows: Vec::new(), switches: 0, reports: VecDeque::new(),
        });
        let mut in_flight = InFlight::default();
        for arrival in arrivals {
            if let Some(base) = arrival {
                let (key, group) = BASES[base];
                let best = order(group, &workers, &in_flight)[0].clone();
                in_flight.add(&WorkerId(best.as_str().into()), &BaseKey(key.into()), &model(group));
                let at = usize::from(best == "b");
                simulated[at].rows.push((base, row_ticks));
            }
            for (worker, simulated) in workers.iter_mut().zip(&mut simulated) {
                simulated.tick(&mut in_flight, &worker.endpoint.id);
                if simulated.reports.len() > lag {
                    let (active, switching, rows) = simulated.reports.pop_front().unwrap();
                    let state = &mut Arc::make_mut(worker.report.as_mut().unwrap()).state;
                    state.active_base = Some(BaseKey(BASES[active].0.into()));
                    state.switch = switching.and_then(|b| switching_to(BASES[b].0));
                    state.running_rows = rows;
                }
            }
        }
        let switches: u32 = simulated.iter().map(|s| s.switches).sum();
        prop_assert!(switches <= 1, "{} switches", switches);
    }

    #[test]
    fn the_best_never_depends_on_the_order_in_which_workers_are_found(
        rows in proptest::collection::vec((0..40u32, 0..2usize, any::<bool>()), 1..6), turn in 0..6usize, ask in 0..3usize,
    ) {
        let mut workers: Vec<Worker<()>> = rows.iter().enumerate().map(|(n, (rows, base, warm))| {
            with(worker(&format!("w{n}")), |r| {
                r.state.running_rows = *rows;
                r.state.active_base = Some(BaseKey(BASES[*base].0.into()));
                set_lens(r, "cold", |l| if *warm { l.tier = Tier::Device });
            })
        }).collect();
        let name = ["north", "north:cold", "south"][ask];
        let before = order(name, &workers, &InFlight::default());
        let count = workers.len();
        workers.rotate_left(turn % count);
        prop_assert_eq!(order(name, &workers, &InFlight::default()), before);
    }
}
