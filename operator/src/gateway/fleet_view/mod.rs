//! The fleet view: what each worker says it holds and why, for people ([`html`]) and tools. Pure.
//!
//! It is read from the same streams as everything else, and shows nothing that cannot be believed: of a worker whose stream is
//! broken it says only that and why. It is bounded: so many workers on a page, so many lenses of each.

pub mod html;

use std::{cmp::Reverse, collections::BTreeMap};

use serde::{Deserialize, Serialize};
use turret_crds::report::{ArtifactState, BaseReport, LensReport, Tier, WorkerIdentity, WorkerState};

use super::directory::{Place, View};
use crate::fleet::{Link, Worker};

/// Workers on a page where nobody says how many, and at most.
const WORKERS: (usize, usize) = (50, 200);
/// Lenses of each worker that are shown where nobody says how many, and at most.
const LENSES: (usize, usize) = (20, 1000);

/// What somebody wants to see. A field that is absent or empty lets everything through.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filter {
    /// Workers of this namespace.
    #[serde(default)]
    pub namespace: Option<String>,
    /// Workers of placements of this name.
    #[serde(default)]
    pub placement: Option<String>,
    /// `GROUP:LENS` or `LENS`: workers that know it, and of each only what is called so.
    #[serde(default)]
    pub lens: Option<String>,
    /// Workers whose id comes after this one: the `next` of the page before.
    #[serde(default)]
    pub after: Option<String>,
    /// Workers on a page; 50 when absent, at most 200.
    #[serde(default)]
    pub workers: Option<usize>,
    /// Lenses that are shown of each worker; 20 when absent, at most 1000.
    #[serde(default)]
    pub lenses: Option<usize>,
}

/// Some workers.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Page<'a> {
    /// Workers that the filter lets through, on all pages.
    pub total_workers: usize,
    /// Those of this page, sorted by id.
    pub workers: Vec<WorkerRow<'a>>,
    /// What to give as `after` for the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next: Option<&'a str>,
}

/// A worker.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct WorkerRow<'a> {
    /// `NAMESPACE/POD`, or its URL without a cluster.
    pub id: &'a str,
    /// Namespace of its placement.
    pub namespace: &'a str,
    /// Its placement.
    pub placement: &'a str,
    /// Its state stream: `Connecting`, `Open` or `Lost`.
    pub link: &'static str,
    /// Why it is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<&'a str>,
    /// What it says; absent while its stream is not open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub report: Option<Report<'a>>,
}

/// What a worker says, in the words of its own state, with fewer lenses.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report<'a> {
    /// Who it is.
    pub worker: &'a WorkerIdentity,
    /// What moves: document, active base, switch, tiers, rows.
    pub state: &'a WorkerState,
    /// Its bases.
    pub bases: &'a [BaseReport],
    /// Its lenses, counted.
    pub lens_counts: LensCounts,
    /// Those that failed, are in use, are high up or were used last come first.
    pub lenses: Vec<&'a LensReport>,
    /// Lenses that the filter lets through and that are not shown.
    pub lenses_left_out: usize,
}

/// The lenses of a worker, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LensCounts {
    /// All that it knows.
    pub total: usize,
    /// Of them, those that cannot be served.
    pub failed: usize,
    /// By the highest tier that holds them.
    pub by_tier: BTreeMap<Tier, usize>,
}

impl LensCounts {
    fn of<'a>(lenses: impl Iterator<Item = &'a LensReport>) -> Self {
        let mut counts = Self::default();
        for lens in lenses {
            counts.total += 1;
            counts.failed += usize::from(has_failed(lens));
            *counts.by_tier.entry(lens.tier).or_default() += 1;
        }
        counts
    }
}

impl Filter {
    /// Whether a worker is meant.
    fn lets_through(&self, worker: &Worker<Place>) -> bool {
        let place = &worker.endpoint.attached;
        let is = |wanted: &Option<String>, found: &str| said(wanted).is_none_or(|wanted| wanted == found);
        let knows = |lens: &str| {
            worker.believed().is_some_and(|report| report.lenses.iter().any(|l| is_called(l, lens)))
        };
        is(&self.namespace, &place.namespace)
            && is(&self.placement, &place.placement)
            && said(&self.lens).is_none_or(knows)
    }
}

/// What a form sends for a field that is left empty is nothing.
fn said(field: &Option<String>) -> Option<&str> {
    field.as_deref().map(str::trim).filter(|text| !text.is_empty())
}

fn is_called(lens: &LensReport, name: &str) -> bool {
    match name.split_once(':') {
        Some((group, name)) => lens.group == group && lens.name == name,
        None => lens.name == name,
    }
}

fn has_failed(lens: &LensReport) -> bool {
    matches!(lens.state, ArtifactState::Failed { .. })
}

/// The page that somebody wants to see.
pub fn page<'a>(view: &'a View, filter: &Filter) -> Page<'a> {
    let meant: Vec<&Worker<Place>> = view.workers.values().filter(|w| filter.lets_through(w)).collect();
    let after = said(&filter.after);
    let count = filter.workers.unwrap_or(WORKERS.0).clamp(1, WORKERS.1);
    let mut rest = meant.iter().copied().filter(|w| after.is_none_or(|after| &*w.endpoint.id.0 > after));
    let workers: Vec<WorkerRow<'a>> = rest.by_ref().take(count).map(|worker| row(worker, filter)).collect();
    let next = rest.next().and_then(|_| workers.last().map(|last| last.id));
    Page { total_workers: meant.len(), workers, next }
}

fn row<'a>(worker: &'a Worker<Place>, filter: &Filter) -> WorkerRow<'a> {
    let place = &worker.endpoint.attached;
    let (link, lost) = match &worker.link {
        Link::Connecting => ("Connecting", None),
        Link::Open => ("Open", None),
        Link::Lost(why) => ("Lost", Some(&**why)),
    };
    let report = worker.believed().map(|report| {
        let all = report.lenses.iter().map(|lens| &**lens);
        let lens = said(&filter.lens);
        let mut lenses: Vec<&LensReport> =
            all.clone().filter(|l| lens.is_none_or(|name| is_called(l, name))).collect();
        lenses.sort_by(|a, b| rank(a).cmp(&rank(b)));
        let shown = filter.lenses.unwrap_or(LENSES.0).min(LENSES.1);
        let lenses_left_out = lenses.len().saturating_sub(shown);
        lenses.truncate(shown);
        Report {
            worker: &report.worker,
            state: &report.state,
            bases: &report.bases,
            lens_counts: LensCounts::of(all),
            lenses,
            lenses_left_out,
        }
    });
    WorkerRow {
        id: &worker.endpoint.id.0,
        namespace: &place.namespace,
        placement: &place.placement,
        link,
        lost,
        report,
    }
}

type Rank<'a> = (bool, Reverse<bool>, Reverse<Tier>, Reverse<Option<u64>>, &'a str, &'a str);

/// What a person wants to see first.
fn rank(lens: &LensReport) -> Rank<'_> {
    (
        !has_failed(lens),
        Reverse(lens.active_rows > 0),
        Reverse(lens.tier),
        Reverse(lens.last_used),
        lens.group.as_str(),
        lens.name.as_str(),
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use std::sync::Arc;

    use turret_crds::{WorkerReport, condition::FailureReason, report::DeviceReport};

    use super::*;
    use crate::{
        fleet::{Endpoint, WorkerId},
        gateway::catalog::Catalog,
        keys::TokenSource,
    };

    pub(crate) fn lens(name: &str, tier: Tier, last_used: Option<u64>) -> LensReport {
        LensReport { last_used, ..LensReport::new("g", name, ArtifactState::Ready, tier) }
    }

    /// A worker of a placement, whose stream is open where it reports lenses.
    pub(crate) fn worker(id: &str, placement: &str, link: Link, lenses: Vec<LensReport>) -> Worker<Place> {
        let (namespace, name) = id.split_once('/').expect("NAMESPACE/POD");
        let report = WorkerReport {
            protocol: 1,
            worker: WorkerIdentity {
                name: name.into(),
                instance: "1".into(),
                version: "0".into(),
                device: DeviceReport { kind: "cpu".into(), name: "cpu".into(), total_bytes: 0 },
            },
            state: WorkerState::default(),
            bases: Vec::new(),
            lenses: lenses.into_iter().map(Arc::new).collect(),
            aliases: Arc::default(),
        };
        let place =
            Place { namespace: namespace.into(), placement: placement.into(), data_url: "http://w".into() };
        let endpoint = Endpoint {
            id: WorkerId(id.into()),
            control_url: "http://c".into(),
            token: TokenSource::Open,
            attached: place,
        };
        Worker { endpoint: endpoint.into(), link, report: Some(report.into()) }
    }

    pub(crate) fn view(workers: Vec<Worker<Place>>) -> View {
        let workers = workers.into_iter().map(|w| (w.endpoint.id.clone(), w)).collect::<BTreeMap<_, _>>();
        View { catalog: Arc::new(Catalog::default()), workers: Arc::new(workers) }
    }

    fn three() -> View {
        view(vec![
            worker("lab/a", "p", Link::Open, vec![lens("x", Tier::Device, Some(1))]),
            worker("lab/b", "q", Link::Open, vec![lens("y", Tier::Disk, None)]),
            worker("prod/a", "p", Link::Lost("refused".into()), vec![lens("x", Tier::Device, None)]),
        ])
    }

    fn ids<'a>(page: &Page<'a>) -> Vec<&'a str> {
        page.workers.iter().map(|w| w.id).collect()
    }

    fn some(text: &str) -> Option<String> {
        Some(text.into())
    }

    #[test]
    fn workers_are_chosen_by_namespace_placement_and_lens() {
        let view = three();
        for (filter, expected) in [
            (Filter::default(), vec!["lab/a", "lab/b", "prod/a"]),
            (Filter { namespace: some(" "), ..Filter::default() }, vec!["lab/a", "lab/b", "prod/a"]),
            (Filter { namespace: some("lab"), ..Filter::default() }, vec!["lab/a", "lab/b"]),
            (Filter { placement: some("p"), ..Filter::default() }, vec!["lab/a", "prod/a"]),
            // What a lost worker said before is not believed.
            (Filter { lens: some("x"), ..Filter::default() }, vec!["lab/a"]),
            (Filter { lens: some("g:y"), ..Filter::default() }, vec!["lab/b"]),
            (Filter { lens: some("other:y"), ..Filter::default() }, vec![]),
        ] {
            let page = page(&view, &filter);
            assert_eq!(ids(&page), expected, "{filter:?}");
            assert_eq!(page.total_workers, expected.len());
        }
    }

    #[test]
    fn pages_follow_one_another_and_miss_nobody() {
        let view = three();
        let mut filter = Filter { workers: Some(2), ..Filter::default() };
        let first = page(&view, &filter);
        assert_eq!(
            (ids(&first), first.next, first.total_workers),
            (vec!["lab/a", "lab/b"], Some("lab/b"), 3)
        );
        filter.after = first.next.map(Into::into);
        let last = page(&view, &filter);
        assert_eq!((ids(&last), last.next), (vec!["prod/a"], None));
        let none = Filter { workers: Some(0), ..Filter::default() };
        assert_eq!(page(&view, &none).workers.len(), 1, "a page that leads nowhere is none");
    }

    #[test]
    fn of_a_lost_worker_only_the_reason_is_told() {
        let view = three();
        let page = page(&view, &Filter { namespace: some("prod"), ..Filter::default() });
        let json = serde_json::to_value(&page).expect("a page is JSON");
        assert_eq!(
            json["workers"][0],
            serde_json::json!({
                "id": "prod/a", "namespace": "prod", "placement": "p", "link": "Lost", "lost": "refused",
            })
        );
    }

    #[test]
    fn what_failed_or_is_in_use_is_shown_first_and_the_rest_is_counted() {
        let failed = LensReport {
            state: ArtifactState::Failed {
                reason: FailureReason::SourceNotFound,
                message: "gone".into(),
                retry_at: None,
            },
            ..lens("z-failed", Tier::Remote, None)
        };
        let active = LensReport { active_rows: 1, ..lens("y-active", Tier::Device, Some(1)) };
        let lenses = vec![
            lens("disk", Tier::Disk, Some(9)),
            lens("old", Tier::Device, Some(2)),
            lens("recent", Tier::Device, Some(3)),
            active,
            failed,
        ];
        let view = view(vec![worker("lab/a", "p", Link::Open, lenses)]);
        let page = page(&view, &Filter { lenses: Some(4), ..Filter::default() });
        let report = page.workers[0].report.as_ref().expect("it is open");
        let names: Vec<&str> = report.lenses.iter().map(|l| l.name.as_str()).collect();
        assert_eq!((names, report.lenses_left_out), (vec!["z-failed", "y-active", "recent", "old"], 1));
        let by_tier = [(Tier::Remote, 1), (Tier::Disk, 1), (Tier::Device, 3)].into();
        assert_eq!(report.lens_counts, LensCounts { total: 5, failed: 1, by_tier });
        let json = serde_json::to_value(&page).expect("a page is JSON");
        assert_eq!(json["workers"][0]["report"]["lensCounts"]["byTier"]["Device"], 3);
    }
}
