//! Loads, second by second, and what becomes of the workers.

use proptest::prelude::*;

use super::*;

fn limits(min: i32, max: i32, target: u32, to_zero_after: u64, down_after: u64) -> Limits {
    let seconds = Duration::from_secs;
    Limits { min, max, target, to_zero_after: seconds(to_zero_after), down_after: seconds(down_after) }
}

fn rows(rows: u32) -> Load {
    Load { rows, can_wake: true, ..Load::default() }
}

fn held(held: u32) -> Load {
    Load { held, can_wake: true, ..Load::default() }
}

/// A placement that is looked at every second.
struct Simulation {
    limits: Limits,
    past: Past,
    second: u64,
    /// When the number of workers changed, and from what to what.
    changes: Vec<(u64, i32, i32)>,
}

impl Simulation {
    fn begin(limits: Limits, replicas: i32) -> Self {
        Self { limits, past: Past::begin(replicas, Moment::ZERO), second: 0, changes: Vec::new() }
    }

    fn now(&self) -> Moment {
        Duration::from_secs(self.second)
    }

    fn replicas(&self) -> i32 {
        self.past.replicas()
    }

    /// This load is heard and carried out; then a second goes by.
    fn hear(&mut self, load: Load) -> Decision {
        let now = self.now();
        self.past.note(&self.limits, load, now);
        let decision = decide(&self.limits, &self.past, now);
        if decision.replicas != self.past.replicas() {
            self.changes.push((self.second, self.past.replicas(), decision.replicas));
        }
        self.past.settle(decision.replicas, now);
        self.second += 1;
        decision
    }

    fn hear_all(&mut self, loads: impl IntoIterator<Item = u32>) {
        for load in loads {
            self.hear(rows(load));
        }
    }
}

#[test]
fn as_many_as_the_load_takes_come_at_once_and_leave_after_the_delay() {
    let mut s = Simulation::begin(limits(1, 8, 4, 600, 30), 1);
    s.hear_all([0, 4, 5, 16]);
    assert_eq!(s.changes, [(2, 1, 2), (3, 2, 4)], "5 rows are one too many for one worker");
    s.hear_all(vec![3; 29]);
    assert_eq!(s.replicas(), 4);
    let left = s.hear(rows(3)).look_again;
    assert_eq!((s.replicas(), left), (4, Some(Duration::from_secs(1))));
    let decision = s.hear(rows(3));
    assert_eq!((decision.replicas, decision.why.as_str()), (1, "1 worker was enough for 30 s"));
    assert_eq!(s.changes[2..], [(34, 4, 1)], "the four were needed until 16 rows became 3, at 4 s");
}

#[test]
fn a_flood_doubles_the_workers_and_not_more_within_its_window() {
    let mut s = Simulation::begin(limits(0, 100, 1, 600, 300), 0);
    let first = s.hear(held(1000));
    assert_eq!((first.replicas, first.look_again), (4, Some(RAISE_WINDOW)));
    s.hear_all(vec![1000; 60]);
    assert_eq!(s.changes, [(0, 0, 4), (15, 4, 8), (30, 8, 16), (45, 16, 32), (60, 32, 64)]);
}

#[test]
fn held_requests_count_like_rows_and_wake_the_first_worker_at_once() {
    let mut s = Simulation::begin(limits(0, 8, 4, 10, 0), 0);
    s.hear(rows(0));
    assert_eq!(s.hear(held(1)).replicas, 1);
    assert_eq!(s.hear(Load { held: 3, ..rows(3) }).replicas, 2);
}

#[test]
fn the_last_worker_leaves_only_when_nobody_asked_for_long_enough() {
    let mut s = Simulation::begin(limits(0, 8, 4, 10, 0), 1);
    s.hear_all([1, 0, 0, 0, 0, 0, 1]);
    s.hear_all(vec![0; 10]);
    assert_eq!(s.replicas(), 1, "ten seconds since the last one ended are not over");
    let decision = s.hear(rows(0));
    assert_eq!((decision.replicas, decision.why.as_str()), (0, "nobody asked for 10 s"));
    assert_eq!(s.changes, [(17, 1, 0)]);
    assert_eq!(s.hear(rows(0)).look_again, None);

    let mut kept = Simulation::begin(limits(1, 8, 4, 10, 0), 1);
    kept.hear_all(vec![0; 100]);
    assert_eq!(kept.changes, [], "a minimum of one is kept");
}

#[test]
fn a_request_that_nobody_saw_running_counts_by_its_number() {
    let counted = |count: u64| Load { counted: [("w".to_owned(), count)].into(), ..rows(0) };
    let mut s = Simulation::begin(limits(0, 8, 4, 10, 0), 1);
    for count in [7, 7, 7, 7, 7, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8] {
        s.hear(counted(count));
    }
    assert_eq!(s.changes, []);
    s.hear(counted(8));
    assert_eq!(s.changes, [(15, 1, 0)]);
    // A new source's numbers are no requests.
    let mut new = Simulation::begin(limits(0, 8, 4, 10, 0), 1);
    (0..10).for_each(|_| drop(new.hear(rows(0))));
    assert_eq!(new.hear(counted(7)).replicas, 0);
}

#[test]
fn nobody_leaves_while_a_worker_is_silent_or_nobody_could_wake_the_first() {
    let mut s = Simulation::begin(limits(0, 8, 4, 10, 5), 3);
    (0..100).for_each(|_| drop(s.hear(Load { is_silent: true, ..rows(0) })));
    assert_eq!(s.changes, []);
    (0..100).for_each(|_| drop(s.hear(Load { can_wake: false, ..rows(0) })));
    assert_eq!(s.changes, [(105, 3, 1)], "five seconds after the silence");
    s.hear(rows(0));
    assert_eq!(s.replicas(), 0);
}

#[test]
fn limits_that_are_changed_hold_at_once() {
    let mut s = Simulation::begin(limits(1, 8, 4, 600, 300), 1);
    s.hear(rows(32));
    s.limits = limits(1, 2, 4, 600, 300);
    let fewer = s.hear(rows(32));
    assert_eq!((fewer.replicas, fewer.why.as_str()), (2, "autoscaling allows 1 to 2"));
    s.limits = limits(6, 8, 4, 600, 300);
    assert_eq!(s.hear(rows(0)).replicas, 6);
}

#[test]
fn a_new_process_removes_nobody_sooner() {
    let mut s = Simulation::begin(limits(1, 8, 4, 600, 30), 1);
    s.hear_all([12; 10]);
    s.hear_all([0; 25]);
    assert_eq!(s.replicas(), 3);
    s.past = Past::begin(3, s.now());
    s.hear_all([0; 29]);
    assert_eq!(s.replicas(), 3, "the delay begins anew");
    s.hear_all([0; 2]);
    assert_eq!(s.replicas(), 1);
}

#[test]
fn a_sine_with_noise_does_not_flap() {
    // A period of two minutes between 0 and 100 rows, with a noise of a quarter; a delay of five.
    let mut s = Simulation::begin(limits(1, 16, 8, 600, 300), 1);
    let mut noise = 1_u64;
    for second in 0..7200_u32 {
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let wave = 50.0 + 50.0 * (f64::from(second) / 120.0 * std::f64::consts::TAU).sin();
        let load = wave * (0.75 + 0.25 * f64::from((noise >> 33) as u32) / f64::from(1_u32 << 31));
        s.hear(rows(load as u32));
    }
    let late: Vec<_> = s.changes.iter().filter(|(second, ..)| *second > 300).collect();
    // The highest peak of a period differs from the next one's by the noise alone.
    assert!(late.len() <= 24 && s.replicas() >= 11, "{} changes in two hours: {late:?}", late.len());
    let downs = late.iter().filter(|(_, from, to)| to < from).count();
    assert!(downs <= 12, "{downs} times down");
}

fn some_limits() -> impl Strategy<Value = Limits> {
    (0..4i32, 0..30i32, 1..20u32, 10..120u64, 0..120u64)
        .prop_map(|(min, more, target, zero, down)| limits(min, (min + more).max(1), target, zero, down))
}

proptest! {
    /// A load that stays ends in one number of workers, the one it takes, and nothing changes any more.
    #[test]
    fn a_constant_load_has_a_fixed_point(limits in some_limits(), load in 0..400u32, start in 0..40i32) {
        let mut s = Simulation::begin(limits, start);
        s.hear_all(vec![load; 400]);
        let wanted = limits.workers_for(load).max(limits.min).min(limits.max);
        prop_assert_eq!(s.replicas(), wanted);
        s.changes.clear();
        s.hear_all(vec![load; 400]);
        prop_assert_eq!(s.changes, vec![]);
    }

    /// Whatever the load does: no worker leaves within the delay after one came, none that was wanted within the delay,
    /// and the last one not before its own.
    #[test]
    fn nothing_flaps(
        limits in some_limits(),
        loads in proptest::collection::vec((0..200u32, 1..40usize), 1..40),
    ) {
        let mut s = Simulation::begin(limits, 1.clamp(limits.min, limits.max));
        s.changes.clear();
        let loads: Vec<u32> = loads.iter().flat_map(|(load, seconds)| vec![*load; *seconds]).collect();
        s.hear_all(loads.iter().copied());
        let (down, zero) = (limits.down_after.as_secs(), limits.to_zero_after.as_secs());
        for (at, from, to) in &s.changes {
            prop_assert!((limits.min..=limits.max).contains(to));
            if to > from {
                continue;
            }
            let ups = s.changes.iter().filter(|(up, from, to)| to > from && up <= at);
            prop_assert!(ups.clone().all(|(up, ..)| at - up >= down), "down at {at}: {:?}", s.changes);
            let since = usize::try_from(at.saturating_sub(down)).unwrap();
            let recently = &loads[since..=usize::try_from(*at).unwrap()];
            prop_assert!(recently.iter().all(|load| limits.workers_for(*load).min(limits.max) <= (*to).max(1)));
            if *to == 0 {
                let quiet = usize::try_from(at.saturating_sub(zero)).unwrap();
                prop_assert!(*at >= zero && loads[quiet..=usize::try_from(*at).unwrap()].iter().all(|l| *l == 0));
            }
        }
    }

    /// A wave that comes again within the delay changes nothing from its second time on.
    #[test]
    fn a_wave_that_returns_within_the_delay_changes_nothing(
        wave in proptest::collection::vec(0..40u32, 1..50), start in 1..8i32,
    ) {
        let mut s = Simulation::begin(limits(1, 40, 4, 600, 60), start);
        // Forty rows take ten workers: two windows of growth at most. The start is forgotten after the delay.
        for _ in 0..(120 / wave.len() + 2) {
            s.hear_all(wave.iter().copied());
        }
        s.changes.clear();
        for _ in 0..10 {
            s.hear_all(wave.iter().copied());
        }
        prop_assert_eq!(s.changes, vec![]);
    }

    /// A load is followed within the windows of growth it takes.
    #[test]
    fn a_spike_is_followed(limits in some_limits(), load in 1..400u32) {
        let mut s = Simulation::begin(limits, limits.min);
        s.hear_all([0; 5]);
        s.hear_all(vec![load; 61]);
        let wanted = limits.workers_for(load).max(limits.min).min(limits.max);
        // 4, 8, 16, 32 and 64 within a minute.
        prop_assert!(s.replicas() >= wanted.min(64));
    }

    /// Whoever looks only when something is heard, and when a decision says so, misses nothing.
    #[test]
    fn a_decision_holds_until_it_is_to_be_looked_at_again(
        limits in some_limits(), loads in proptest::collection::vec(0..200u32, 1..60), can_wake in any::<bool>(),
    ) {
        let mut s = Simulation::begin(limits, 1.clamp(limits.min, limits.max));
        for load in loads {
            s.hear(Load { can_wake, ..rows(load) });
            // The second that went by belongs to the load before.
            let now = s.now() - Duration::from_secs(1);
            let decision = decide(&limits, &s.past, now);
            prop_assert_eq!(decision.replicas, s.replicas(), "deciding twice is deciding once");
            let until = decision.look_again.unwrap_or(Duration::from_secs(1_000_000));
            prop_assert!(!until.is_zero());
            let later = decide(&limits, &s.past, now + until - Duration::from_millis(1));
            prop_assert_eq!(later.replicas, s.replicas());
        }
    }
}
