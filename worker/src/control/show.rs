//! What the control port answered, as text for people. Pure; the time is handed in, in seconds since the epoch.

use turret_crds::document::BaseKey;
use turret_crds::report::{
    ArtifactState, BaseReport, FetchReport, LeaseReport, LensReport, PolicyReport, SwitchPhase, SwitchReport,
    Tier, TierReport, WorkerReport, WorkerState,
};

use super::progress::loading;
use crate::eviction::command::written;

/// What stands where there is nothing to say.
const NOTHING: &str = "-";

/// Everything that a worker holds.
pub(super) fn state(report: &WorkerReport, now: u64) -> String {
    let mut parts = vec![facts(&state_facts(report)), tiers(&report.state.tiers)];
    if !report.bases.is_empty() {
        parts.push(bases(report));
    }
    if !report.lenses.is_empty() {
        parts.push(lenses(report, now));
    }
    parts.join("\n\n")
}

fn state_facts(report: &WorkerReport) -> Vec<(&'static str, String)> {
    let WorkerReport { worker, state, .. } = report;
    let device = &worker.device;
    let mut facts = vec![
        ("worker", format!("{} {}, {}: {}", worker.name, worker.version, device.kind, device.name)),
        ("ready", readiness(state).to_owned()),
        ("active", active(report)),
    ];
    if let Some(under_way) = &state.switch {
        facts.push(("switch", switch(report, under_way)));
    }
    facts.push(("rows", rows(state)));
    if let Some(document) = &state.document {
        facts.push(("document", document.sequence.to_string()));
    }
    if let Some(short) = &state.cannot_fit {
        facts.push(("budgets", format!("not those of document {}: {}", short.sequence, short.message)));
    }
    facts
}

fn readiness(state: &WorkerState) -> &'static str {
    match (state.ready, state.draining, &state.active_base) {
        (true, ..) => "yes",
        (false, true, _) => "no, it is draining",
        (false, false, None) => "no, its first base is not active yet",
        (false, false, Some(_)) => "no, lenses are being loaded ahead of requests",
    }
}

fn active(report: &WorkerReport) -> String {
    report.state.active_base.as_ref().map_or_else(|| "nothing".to_owned(), |key| called(report, key))
}

/// Where a switch stands: from, to, how much is loaded or what has to end first, who waits.
fn switch(report: &WorkerReport, switch: &SwitchReport) -> String {
    let far = match switch.phase {
        SwitchPhase::Draining => format!("{} to end", count(report.state.running_rows.into(), "row")),
        SwitchPhase::Loading => format!("{} % loaded", switch.percent),
    };
    let from = switch.from.as_ref().map_or_else(|| "nothing".to_owned(), |key| called(report, key));
    let waiting = count(switch.waiting_requests.into(), "request");
    format!("{from} → {}, {far}, {waiting} waiting", called(report, &switch.to))
}

fn rows(state: &WorkerState) -> String {
    format!("{} running, {} waiting", state.running_rows, state.waiting_rows)
}

/// What clients call a base: its groups.
fn called(report: &WorkerReport, key: &BaseKey) -> String {
    match report.bases.iter().find(|base| base.key == *key) {
        Some(base) if !base.groups.is_empty() => base.groups.join(", "),
        _ => key.to_string(),
    }
}

fn tiers(tiers: &[TierReport]) -> String {
    let rows = tiers.iter().map(|tier| {
        [
            format!("{:?}", tier.tier),
            bytes(tier.base_bytes + tier.lens_bytes + tier.working_bytes),
            bytes(tier.budget_bytes),
            bytes(tier.base_bytes),
            bytes(tier.lens_bytes),
            bytes(tier.lens_budget_bytes),
            bytes(tier.working_bytes),
        ]
    });
    table(["TIER", "TAKEN", "BUDGET", "BASES", "LENSES", "LENS BUDGET", "WORKING"], rows)
}

fn bases(report: &WorkerReport) -> String {
    let rows = report.bases.iter().map(|base| {
        let is_active = report.state.active_base.as_ref() == Some(&base.key);
        let active = if is_active { "yes" } else { NOTHING };
        [
            called(report, &base.key),
            place(base.tier, &base.state, base.fetch.as_ref()),
            base.bytes.map_or_else(|| NOTHING.to_owned(), bytes),
            active.to_owned(),
            error(&base.state),
        ]
    });
    table(["BASE OF", "TIER", "BYTES", "ACTIVE", "ERROR"], rows)
}

fn lenses(report: &WorkerReport, now: u64) -> String {
    let rows = report.lenses.iter().map(|lens| {
        let last_use = lens.last_used.map(|at| format!("{} ago", span(now.saturating_sub(at))));
        let last_use = last_use.unwrap_or_else(|| NOTHING.to_owned());
        [
            name(lens),
            place(lens.tier, &lens.state, lens.fetch.as_ref()),
            lens.bytes.map_or_else(|| NOTHING.to_owned(), bytes),
            kept(lens).to_owned(),
            lens.served.to_string(),
            last_use,
            error(&lens.state),
        ]
    });
    table(["NAME", "TIER", "BYTES", "KEPT", "SERVED", "LAST USE", "ERROR"], rows)
}

fn name(lens: &LensReport) -> String {
    format!("{}:{}", lens.group, lens.name)
}

/// The tier, and what happens to it there.
fn place(tier: Tier, state: &ArtifactState, fetch: Option<&FetchReport>) -> String {
    match state {
        ArtifactState::Resolving => {
            format!("{tier:?}, {}", fetch.map_or_else(|| "being checked".to_owned(), fetched))
        }
        ArtifactState::Loading { percent } => format!("{tier:?} → {percent} %"),
        ArtifactState::Ready | ArtifactState::Failed { .. } => format!("{tier:?}"),
    }
}

fn fetched(fetch: &FetchReport) -> String {
    match fetch.known_bytes {
        Some(known) => format!("fetched {} of {}", bytes(fetch.fetched_bytes), bytes(known)),
        None => format!("fetched {}", bytes(fetch.fetched_bytes)),
    }
}

fn kept(lens: &LensReport) -> &'static str {
    match (lens.pinned, lens.leases > 0) {
        (true, true) => "pinned, leased",
        (true, false) => "pinned",
        (false, true) => "leased",
        (false, false) => NOTHING,
    }
}

fn error(state: &ArtifactState) -> String {
    match state {
        ArtifactState::Failed { reason, message, .. } => format!("{reason}: {message}"),
        _ => NOTHING.into(),
    }
}

/// The policy in force.
pub(super) fn policy(policy: &PolicyReport) -> String {
    let percent = |percent: Option<u32>| percent.map(|percent| format!("{percent} % of the lens budget"));
    let never = || "none: idle lenses stay until there is need for room".to_owned();
    let mut all = vec![
        ("policy", written(policy.policy)),
        ("idle after", format!("{} s", policy.idle_seconds)),
        ("high watermark", percent(policy.high_watermark_percent).unwrap_or_else(never)),
    ];
    all.extend(percent(policy.low_watermark_percent).map(|text| ("low watermark", text)));
    all.extend(policy.sweep_seconds.map(|seconds| ("looked at every", format!("{seconds} s"))));
    facts(&all)
}

/// One lease.
pub(super) fn lease(lease: &LeaseReport, now: u64) -> String {
    let LeaseReport { id, group, lens, .. } = lease;
    let left = span(lease.expires_at.saturating_sub(now));
    let there = if lease.resident { "which is in memory" } else { "which is on its way into memory" };
    printable(&format!("lease {id} keeps `{group}:{lens}`, {there}, for {left}"))
}

/// All leases.
pub(super) fn leases(leases: &[LeaseReport], now: u64) -> String {
    if leases.is_empty() {
        return "no lease is running".into();
    }
    let rows = leases.iter().map(|lease| {
        let there = if lease.resident { "yes" } else { "not yet" };
        [
            lease.id.clone(),
            format!("{}:{}", lease.group, lease.lens),
            lease.holder.clone().unwrap_or_else(|| NOTHING.to_owned()),
            lease.priority.to_string(),
            span(lease.expires_at.saturating_sub(now)),
            there.to_owned(),
        ]
    });
    table(["ID", "LENS", "HOLDER", "PRIORITY", "ENDS IN", "IN MEMORY"], rows)
}

/// A line for everything that differs between two reports of one worker. Bytes in tiers follow from what moved.
pub(super) fn changes(before: &WorkerReport, after: &WorkerReport) -> Vec<String> {
    let mut lines = state_changes(before, after);
    for base in &after.bases {
        let of = format!("base of {}", called(after, &base.key));
        match before.bases.iter().find(|old| old.key == base.key) {
            Some(old) => lines.extend(line(&of, base_changes(old, base))),
            None => lines.push(format!("{of}: declared")),
        }
    }
    for lens in &after.lenses {
        match before.lens(&lens.group, &lens.name) {
            Some(old) => lines.extend(line(&name(lens), lens_changes(old, lens))),
            None => lines.push(format!("{}: declared", name(lens))),
        }
    }
    for base in before.bases.iter().filter(|old| !after.bases.iter().any(|base| base.key == old.key)) {
        lines.push(format!("base of {}: no longer declared", called(before, &base.key)));
    }
    for lens in before.lenses.iter().filter(|old| after.lens(&old.group, &old.name).is_none()) {
        lines.push(format!("{}: no longer declared", name(lens)));
    }
    lines.iter().map(|line| printable(line)).collect()
}

fn line(what: &str, parts: Vec<String>) -> Option<String> {
    (!parts.is_empty()).then(|| format!("{what}: {}", parts.join(", ")))
}

fn state_changes(before: &WorkerReport, after: &WorkerReport) -> Vec<String> {
    let (old, new) = (&before.state, &after.state);
    let mut lines = Vec::new();
    if let Some(document) = &new.document
        && old.document != new.document
    {
        lines.push(format!("document: {} is in force", document.sequence));
    }
    if let Some(short) = &new.cannot_fit
        && old.cannot_fit != new.cannot_fit
    {
        lines.push(format!("budgets: not those of document {}: {}", short.sequence, short.message));
    }
    if readiness(old) != readiness(new) {
        lines.push(format!("ready: {}", readiness(new)));
    }
    let stand = |state: &WorkerState| state.switch.as_ref().map(|s| (s.to.clone(), s.phase, s.percent));
    if let Some(under_way) = &new.switch
        && stand(old) != stand(new)
    {
        lines.push(format!("switch: {}", switch(after, under_way)));
    }
    if old.active_base != new.active_base {
        lines.push(format!("active: {}", active(after)));
    }
    if rows(old) != rows(new) {
        lines.push(format!("rows: {}", rows(new)));
    }
    lines
}

fn base_changes(old: &BaseReport, new: &BaseReport) -> Vec<String> {
    let mut parts = Vec::new();
    if old.tier != new.tier {
        parts.push(format!("{:?} → {:?}", old.tier, new.tier));
    }
    parts.extend(progress(&old.state, &new.state));
    parts
}

fn lens_changes(old: &LensReport, new: &LensReport) -> Vec<String> {
    let mut parts = Vec::new();
    if old.tier != new.tier {
        let why = new.last_eviction.as_ref().filter(|_| old.last_eviction != new.last_eviction);
        let why = why.map_or_else(String::new, |why| format!(" ({}: {})", why.reason, why.message));
        parts.push(format!("{:?} → {:?}{why}", old.tier, new.tier));
    }
    parts.extend(progress(&old.state, &new.state));
    if old.pinned != new.pinned {
        let pinned = if new.pinned { "pinned" } else { "no longer pinned" };
        parts.push(pinned.to_owned());
    }
    if old.leases != new.leases {
        parts.push(count(new.leases, "lease"));
    }
    if old.active_rows != new.active_rows {
        parts.push(count(new.active_rows.into(), "row"));
    }
    if old.served != new.served {
        parts.push(format!("{} served", new.served));
    }
    if old.errors != new.errors {
        parts.push(count(new.errors, "error"));
    }
    parts
}

/// How far an artifact came.
fn progress(old: &ArtifactState, new: &ArtifactState) -> Option<String> {
    if old == new {
        return None;
    }
    match new {
        ArtifactState::Resolving => Some("being checked".into()),
        ArtifactState::Loading { percent } => Some(format!("{percent} % loaded")),
        ArtifactState::Failed { .. } => Some(error(new)),
        // That it came is said by its tier.
        ArtifactState::Ready if loading(old).is_some() => None,
        ArtifactState::Ready => Some("found good".into()),
    }
}

fn count(number: u64, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// Without what would move a terminal's cursor or worse: names of holders and messages come from others.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn bytes(bytes: u64) -> String {
    let (unit, size) = match bytes {
        0..0x400 => return format!("{bytes} B"),
        0x400..0x10_0000 => ("KiB", 1_u32 << 10),
        0x10_0000..0x4000_0000 => ("MiB", 1 << 20),
        _ => ("GiB", 1 << 30),
    };
    format!("{:.1} {unit}", bytes as f64 / f64::from(size))
}

/// A time as `kubectl get` writes ages.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(label, _)| label.chars().count()).max().unwrap_or(0);
    let lines: Vec<String> =
        facts.iter().map(|(label, text)| printable(&format!("{label:<width$}   {text}"))).collect();
    lines.join("\n")
}

fn table<const N: usize>(header: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = std::iter::once(header.map(str::to_owned))
        .chain(rows)
        .map(|row| row.map(|cell| printable(&cell)))
        .collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..N).map(width).collect();
    let lines: Vec<String> = rows
        .iter()
        .map(|row| {
            let cells = row.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}"));
            cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use serde_json::json;
    use turret_crds::document::EvictionRule;
    use turret_crds::report::{Eviction, EvictionReason};

    use super::*;

    const NOW: u64 = 1_750_000_000;

    /// A worker with two bases, on its way from the first to the second.
    pub(in crate::control) fn report() -> WorkerReport {
        let lens = |group: &str, name: &str, more: serde_json::Value| {
            let mut lens = json!({"group": group, "name": name, "tier": "Disk", "state": {"phase": "Ready"},
                                  "bytes": 1_258_291, "activeRows": 0, "served": 0});
            lens.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            lens
        };
        let failed =
            json!({"phase": "Failed", "reason": "DigestMismatch", "message": "the files are others"});
        serde_json::from_value(json!({
            "protocol": 1,
            "worker": {
                "name": "demo-0", "instance": "1f2e", "version": "0.1.0",
                "device": {"kind": "cpu", "name": "some CPU, 2 threads", "totalBytes": 8_589_934_592_u64},
            },
            "state": {
                "document": {"sequence": 7, "digest": "sha256:07"},
                "ready": true, "draining": false, "activeBase": "key-a", "switch": {"from": "key-a", "to": "key-b", "phase": "Loading", "percent": 70, "waitingRequests": 1},
                "tiers": [
                    {"tier": "Disk", "baseBytes": 0, "lensBytes": 0, "workingBytes": 0,
                     "budgetBytes": 68_719_476_736_u64, "lensBudgetBytes": 68_719_476_736_u64},
                    {"tier": "Device", "baseBytes": 6_291_456, "lensBytes": 1_258_291, "workingBytes": 2048,
                     "budgetBytes": 536_870_912, "lensBudgetBytes": 67_108_864},
                ],
                "runningRows": 2, "waitingRows": 1, "switches": 0, "evictions": 0,
            },
            "bases": [
                {"key": "key-a", "groups": ["a"], "state": {"phase": "Ready"}, "tier": "Device", "bytes": 6_291_456},
                {"key": "key-b", "groups": ["b", "c"], "state": {"phase": "Loading", "percent": 70}, "tier": "Disk"},
            ],
            "lenses": [
                lens("a", "french", json!({"tier": "Device", "pinned": true, "leases": 2, "served": 12,
                                           "lastUsed": NOW - 90})),
                lens("a", "json", json!({"state": {"phase": "Loading", "percent": 40}})),
                lens("b", "polite", json!({"state": failed, "tier": "Remote", "bytes": null})),
                lens("b", "slow", json!({"state": {"phase": "Resolving"}, "tier": "Remote", "bytes": null,
                                         "fetch": {"fetchedBytes": 3 << 20, "knownBytes": 12 << 20}})),
            ],
        }))
        .unwrap()
    }

    #[test]
    fn the_state_is_facts_and_tables_in_columns() {
        let wanted = "\
worker     demo-0 0.1.0, cpu: some CPU, 2 threads
ready      yes
active     a
switch     a → b, c, 70 % loaded, 1 request waiting
rows       2 running, 1 waiting
document   7

TIER     TAKEN     BUDGET      BASES     LENSES    LENS BUDGET   WORKING
Disk     0 B       64.0 GiB    0 B       0 B       64.0 GiB      0 B
Device   7.2 MiB   512.0 MiB   6.0 MiB   1.2 MiB   64.0 MiB      2.0 KiB

BASE OF   TIER          BYTES     ACTIVE   ERROR
a         Device        6.0 MiB   yes      -
b, c      Disk → 70 %   -         -        -

NAME       TIER                                  BYTES     KEPT             SERVED   LAST USE   ERROR
a:french   Device                                1.2 MiB   pinned, leased   12       90s ago    -
a:json     Disk → 40 %                           1.2 MiB   -                0        -          -
b:polite   Remote                                -         -                0        -          DigestMismatch: the files are others
b:slow     Remote, fetched 3.0 MiB of 12.0 MiB   -         -                0        -          -";
        assert_eq!(state(&report(), NOW), wanted);
    }

    #[test]
    fn a_worker_that_has_nothing_yet_says_why() {
        let mut report = report();
        report.bases.clear();
        report.lenses.clear();
        report.state = WorkerState { draining: true, ..WorkerState::default() };
        let text = state(&report, NOW);
        assert!(text.contains("ready    no, it is draining\nactive   nothing\n"), "{text}");
        report.state.draining = false;
        assert!(state(&report, NOW).contains("no, its first base is not active yet"));
    }

    #[test]
    fn every_change_is_a_line_and_no_change_is_none() {
        type Edit = fn(&mut WorkerReport);
        fn lens(report: &mut WorkerReport, at: usize) -> &mut LensReport {
            Arc::make_mut(&mut report.lenses[at])
        }
        let cases: [(Edit, &[&str]); 17] = [
            (|_| {}, &[]),
            (|r| r.state.tiers[1].lens_bytes = 5, &[]),
            (|r| r.state.ready = false, &["ready: no, lenses are being loaded ahead of requests"]),
            (|r| r.state.draining = true, &[]),
            (|r| r.state.switch = None, &[]),
            (
                |r| r.state.switch.as_mut().unwrap().phase = SwitchPhase::Draining,
                &["switch: a → b, c, 2 rows to end, 1 request waiting"],
            ),
            (|r| r.state.active_base = Some(BaseKey("key-b".into())), &["active: b, c"]),
            (|r| r.state.running_rows = 0, &["rows: 0 running, 1 waiting"]),
            (|r| r.state.document.as_mut().unwrap().sequence = 8, &["document: 8 is in force"]),
            (
                |r| (r.bases[1].tier, r.bases[1].state) = (Tier::Device, ArtifactState::Ready),
                &["base of b, c: Disk → Device"],
            ),
            (|r| lens(r, 1).state = ArtifactState::Loading { percent: 60 }, &["a:json: 60 % loaded"]),
            (
                |r| {
                    lens(r, 1).tier = Tier::Device;
                    lens(r, 1).state = ArtifactState::Ready;
                    lens(r, 1).active_rows = 1;
                },
                &["a:json: Disk → Device, 1 row"],
            ),
            (
                |r| {
                    let (reason, message) = (EvictionReason::Room, "least recently used".to_owned());
                    lens(r, 0).tier = Tier::Disk;
                    lens(r, 0).last_eviction = Some(Eviction { reason, message, at: NOW });
                },
                &["a:french: Device → Disk (Room: least recently used)"],
            ),
            (
                |r| {
                    lens(r, 0).pinned = false;
                    lens(r, 0).leases = 1;
                    lens(r, 0).served = 13;
                    lens(r, 0).errors = 1;
                },
                &["a:french: no longer pinned, 1 lease, 13 served, 1 error"],
            ),
            (|r| lens(r, 2).state = ArtifactState::Resolving, &["b:polite: being checked"]),
            (|r| lens(r, 2).state = ArtifactState::Ready, &["b:polite: found good"]),
            (|r| drop(r.lenses.remove(1)), &["a:json: no longer declared"]),
        ];
        for (n, (edit, lines)) in cases.into_iter().enumerate() {
            let before = report();
            let mut after = before.clone();
            edit(&mut after);
            assert_eq!(changes(&before, &after), lines, "case {n}");
        }
        let mut fewer = report();
        fewer.lenses.remove(1);
        assert_eq!(changes(&fewer, &report()), ["a:json: declared"]);
    }

    #[test]
    fn a_policy_with_watermarks_and_without() {
        let plain = PolicyReport::from(EvictionRule::default());
        let wanted = "\
policy           ALRFU
idle after       300 s
high watermark   none: idle lenses stay until there is need for room";
        assert_eq!(policy(&plain), wanted);
        let swept = PolicyReport {
            high_watermark_percent: Some(80),
            low_watermark_percent: Some(50),
            sweep_seconds: Some(60),
            ..plain
        };
        let wanted = "\
policy            ALRFU
idle after        300 s
high watermark    80 % of the lens budget
low watermark     50 % of the lens budget
looked at every   60 s";
        assert_eq!(policy(&swept), wanted);
    }

    #[test]
    fn leases_are_told_with_the_time_that_is_left() {
        let mine = LeaseReport {
            id: "1f2e-1".into(),
            group: "a".into(),
            lens: "french".into(),
            holder: Some("me\u{1b}[31m".into()),
            priority: 3,
            expires_at: NOW + 59,
            resident: true,
        };
        assert_eq!(lease(&mine, NOW), "lease 1f2e-1 keeps `a:french`, which is in memory, for 59s");
        let other = LeaseReport { holder: None, resident: false, expires_at: NOW - 1, ..mine.clone() };
        let wanted = "\
ID       LENS       HOLDER    PRIORITY   ENDS IN   IN MEMORY
1f2e-1   a:french   me [31m   3          59s       yes
1f2e-1   a:french   -         3          0s        not yet";
        assert_eq!(leases(&[mine, other], NOW), wanted);
        assert_eq!(leases(&[], NOW), "no lease is running");
    }

    #[test]
    fn bytes_and_times_have_the_unit_that_reads_best() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1 << 20, "1.0 MiB"),
            (3 << 29, "1.5 GiB"),
            (5 << 40, "5120.0 GiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
        for (seconds, text) in [(0, "0s"), (119, "119s"), (120, "2m"), (7200, "2h"), (172_800, "2d")] {
            assert_eq!(span(seconds), text);
        }
    }
}
