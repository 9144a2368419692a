//! Which faults there are, and what they befall. Pure: the same seed, and the same place among like requests or events, always
//! give the same fault, however requests of other kinds fall between.

use std::fmt;

use axum::http::{Method, Uri};

use crate::numbers::mixed;

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// One object.
    Get,
    /// All objects of a kind.
    List,
    /// Their changes.
    Watch,
    /// A new object.
    Create,
    /// An object in place of another.
    Replace,
    /// A part of an object.
    Patch,
    /// That there be no object.
    Delete,
}

/// A request to the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// What it asks for.
    pub verb: Verb,
    /// Plural of the kind, and the subresource: `modelgroups/status`.
    pub resource: String,
    /// Of one object.
    pub name: Option<String>,
    /// What a watch and the list before it have in common.
    pub subject: String,
}

impl Call {
    /// What a request asks for.
    pub fn of(method: &Method, uri: &Uri) -> Self {
        let segments: Vec<&str> = uri.path().trim_matches('/').split('/').collect();
        let rest = match segments.as_slice() {
            ["api", _, rest @ ..] | ["apis", _, _, rest @ ..] => rest,
            other => other,
        };
        let rest = match rest {
            ["namespaces", _, rest @ ..] if !rest.is_empty() => rest,
            other => other,
        };
        let (resource, name) = match rest {
            [resource, name, part, ..] => (format!("{resource}/{part}"), Some((*name).to_owned())),
            [resource, name] => ((*resource).to_owned(), Some((*name).to_owned())),
            [resource] => ((*resource).to_owned(), None),
            [] => (uri.path().to_owned(), None),
        };
        let parameter = |wanted: &str| {
            let mut pairs =
                uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
            pairs.find(|(name, _)| *name == wanted).map(|(_, value)| value)
        };
        let verb = match method.as_str() {
            "POST" => Verb::Create,
            "PUT" => Verb::Replace,
            "PATCH" => Verb::Patch,
            "DELETE" => Verb::Delete,
            _ if parameter("watch") == Some("true") => Verb::Watch,
            // What an API serves is asked for once, and nothing to be followed.
            _ if name.is_none() && !rest.is_empty() => Verb::List,
            _ => Verb::Get,
        };
        let subject = format!("{} {}", uri.path(), parameter("fieldSelector").unwrap_or_default());
        Self { verb, resource, name, subject }
    }

    /// Whether it changes something, but for renewals of the Lease: those come with time and not with what is to be done.
    pub fn counts(&self) -> bool {
        let is_write = !matches!(self.verb, Verb::Get | Verb::List | Verb::Watch);
        is_write && !(self.is_of_election() && self.verb == Verb::Replace)
    }

    /// Whether it is about the Lease.
    pub fn is_of_election(&self) -> bool {
        self.resource == "leases"
    }

    /// What is numbered apart from other requests.
    pub fn kind(&self) -> String {
        format!("{:?} {}", self.verb, self.resource)
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.kind(), self.name.as_deref().unwrap_or_default())
    }
}

/// A crash of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crash {
    /// After so many writes.
    pub after: usize,
    /// Whether it still hears that the last of them succeeded.
    pub answered: bool,
}

/// What goes wrong between operator and API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Events do not come; a while later the watch is told that its place is gone.
    EventsAreDropped,
    /// Events come late, and those behind them too.
    EventsAreDelayed,
    /// Events come twice.
    EventsAreDoubled,
    /// Events come in another order; a while later the watch is told that its place is gone.
    EventsAreReordered,
    /// Watches end behind an event, orderly or by a reset.
    WatchesEnd,
    /// `410 Gone`: in a watch, in answer to opening one until all is listed again, and in answer to a list.
    PlacesAreGone,
    /// An operator that restarts is shown lists as they were when it started the time before, and events since then late.
    ListsAreStale,
    /// `409 Conflict` in answer to writes.
    WritesConflict,
    /// `429 Too Many Requests` with `Retry-After`.
    RequestsAreThrottled,
    /// `500 Internal Server Error`.
    RequestsFail,
    /// `503 Service Unavailable`.
    ServerIsUnavailable,
    /// Connections are reset before the API server has the request, or before the operator has the answer.
    ConnectionsAreReset,
    /// Nothing is heard for a while, then the connection is reset; on either side of the API server.
    RequestsHang,
    /// All times of the API server jump ahead by an hour and back by an hour.
    ClocksAreSet,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::EventsAreDropped,
        Self::EventsAreDelayed,
        Self::EventsAreDoubled,
        Self::EventsAreReordered,
        Self::WatchesEnd,
        Self::PlacesAreGone,
        Self::ListsAreStale,
        Self::WritesConflict,
        Self::RequestsAreThrottled,
        Self::RequestsFail,
        Self::ServerIsUnavailable,
        Self::ConnectionsAreReset,
        Self::RequestsHang,
        Self::ClocksAreSet,
    ];

    /// Its name as part of a namespace's: `events-are-dropped`.
    pub fn slug(self) -> String {
        let mut slug = String::new();
        for letter in format!("{self:?}").chars() {
            if letter.is_ascii_uppercase() && !slug.is_empty() {
                slug.push('-');
            }
            slug.push(letter.to_ascii_lowercase());
        }
        slug
    }

    /// What becomes of a request that is struck.
    pub fn deed(self, call: &Call, roll: Roll) -> Deed {
        let is_watch = call.verb == Verb::Watch;
        let side = if roll.coin(1) { Side::Before } else { Side::After };
        match self {
            Self::WritesConflict if matches!(call.verb, Verb::Patch | Verb::Replace) => Deed::Refuse(409),
            Self::RequestsAreThrottled => Deed::Refuse(429),
            Self::RequestsFail => Deed::Refuse(500),
            Self::ServerIsUnavailable => Deed::Refuse(503),
            Self::ConnectionsAreReset => Deed::Break(side),
            // The election gives up after three seconds; what then happens is tried where leaders change. Each costs seconds and
            // a look as many requests as there are kinds, so fewer are struck.
            Self::RequestsHang if !is_watch && !call.is_of_election() && roll.below(3) == 0 => {
                Deed::Hang(side)
            }
            Self::PlacesAreGone if call.verb == Verb::List => Deed::Refuse(410),
            Self::PlacesAreGone if is_watch => Deed::Gone,
            _ => Deed::Pass,
        }
    }
}

/// What becomes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deed {
    /// It goes its way.
    Pass,
    /// It is answered with this status, and the API server never hears of it.
    Refuse(u16),
    /// So is a watch, again and again until all is listed again.
    Gone,
    /// Its connection is reset.
    Break(Side),
    /// The same after a while.
    Hang(Side),
}

/// Where on its way a request is broken off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Before the API server has it.
    Before,
    /// After the API server has carried it out.
    After,
}

/// What is thrown for one request or event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Roll {
    number: u64,
    nth: u32,
}

impl Roll {
    /// Thrown with `seed` for the `nth` (from 0) of a kind.
    pub fn of(seed: u64, kind: &str, nth: u32) -> Self {
        // FNV-1a over all that it depends on, then the finish of SplitMix64.
        let bytes = seed.to_le_bytes().into_iter().chain(kind.bytes()).chain(nth.to_le_bytes());
        let folded = bytes.fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { number: mixed(folded), nth }
    }

    /// Whether the fault strikes: one in two, and at most two in a row, so that what is tried again succeeds.
    pub fn strikes(self) -> bool {
        self.nth % 3 != 2 && self.coin(0)
    }

    /// Further throws of the same roll.
    pub fn coin(self, which: u32) -> bool {
        (self.number >> which) & 1 == 1
    }

    /// A number below `bound`.
    pub fn below(self, bound: u64) -> u64 {
        (self.number >> 8) % bound
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(method: &str, uri: &str) -> Call {
        Call::of(&method.parse().unwrap(), &uri.parse().unwrap())
    }

    #[test]
    fn requests_are_told_apart_by_their_path_and_query() {
        let at = "/apis/turret.dev/v1alpha1/namespaces/n/modelgroups";
        let group = call("PATCH", &format!("{at}/g/status?force=true&fieldManager=m"));
        assert_eq!((group.verb, group.resource.as_str()), (Verb::Patch, "modelgroups/status"));
        assert_eq!(
            (group.name.as_deref(), group.to_string().as_str()),
            (Some("g"), "Patch modelgroups/status g")
        );
        let (list, watch) =
            (call("GET", &format!("{at}?limit=500")), call("GET", &format!("{at}?&watch=true")));
        assert_eq!((list.verb, watch.verb), (Verb::List, Verb::Watch));
        assert_eq!(list.subject, watch.subject);
        let one = call("GET", "/api/v1/namespaces/n/secrets?fieldSelector=metadata.name%3Da&watch=true");
        let other = call("GET", "/api/v1/namespaces/n/secrets?fieldSelector=metadata.name%3Db&watch=true");
        assert_ne!(one.subject, other.subject);
        assert_eq!(call("GET", "/api/v1/pods").resource, "pods");
        assert_eq!(call("GET", "/api/v1/namespaces/n").resource, "namespaces");
        assert_eq!(call("GET", "/api/v1/namespaces/n/configmaps/c").verb, Verb::Get);
        assert_eq!(call("GET", "/apis/resource.k8s.io/v1").verb, Verb::Get);
    }

    #[test]
    fn all_writes_count_but_renewals_of_the_lease() {
        let leases = "/apis/coordination.k8s.io/v1/namespaces/n/leases";
        assert!(call("POST", leases).counts());
        assert!(!call("PUT", &format!("{leases}/turret-operator")).counts());
        assert!(call("POST", "/apis/events.k8s.io/v1/namespaces/n/events").counts());
        assert!(!call("GET", leases).counts());
    }

    #[test]
    fn a_roll_depends_on_the_seed_the_kind_and_the_place_alone() {
        let rolls = |seed: u64, kind: &str| (0..60).map(|n| Roll::of(seed, kind, n)).collect::<Vec<_>>();
        assert_eq!(rolls(7, "Patch services"), rolls(7, "Patch services"));
        assert_ne!(rolls(7, "Patch services"), rolls(8, "Patch services"));
        assert_ne!(rolls(7, "Patch services"), rolls(7, "Patch deployments"));
    }

    #[test]
    fn about_one_in_three_is_struck_and_never_three_in_a_row() {
        let struck: Vec<bool> = (0..300).map(|n| Roll::of(1, "x", n).strikes()).collect();
        let count = struck.iter().filter(|struck| **struck).count();
        assert!((60..=140).contains(&count), "{count}");
        assert!(struck.windows(3).all(|three| three.contains(&false)));
    }

    #[test]
    fn each_fault_befalls_what_it_is_about() {
        let rolls = || (0..20).map(|n| Roll::of(3, "x", n));
        let patch = call("PATCH", "/api/v1/namespaces/n/services/s");
        let list = call("GET", "/api/v1/namespaces/n/services");
        let watch = call("GET", "/api/v1/namespaces/n/services?watch=true");
        let lease = call("PUT", "/apis/coordination.k8s.io/v1/namespaces/n/leases/l");
        assert!(rolls().all(|roll| Fault::WritesConflict.deed(&patch, roll) == Deed::Refuse(409)));
        assert!(rolls().all(|roll| Fault::WritesConflict.deed(&list, roll) == Deed::Pass));
        assert!(rolls().all(|roll| Fault::PlacesAreGone.deed(&list, roll) == Deed::Refuse(410)));
        assert!(rolls().all(|roll| Fault::PlacesAreGone.deed(&watch, roll) == Deed::Gone));
        assert!(rolls().all(|roll| Fault::RequestsHang.deed(&lease, roll) == Deed::Pass));
        let broken: Vec<_> = rolls().map(|roll| Fault::ConnectionsAreReset.deed(&patch, roll)).collect();
        assert!(broken.contains(&Deed::Break(Side::Before)) && broken.contains(&Deed::Break(Side::After)));
        for fault in [Fault::EventsAreDropped, Fault::ListsAreStale, Fault::ClocksAreSet] {
            assert!(rolls().all(|roll| fault.deed(&patch, roll) == Deed::Pass));
        }
    }

    #[test]
    fn names_of_faults_fit_into_names_of_namespaces() {
        assert_eq!(Fault::RequestsAreThrottled.slug(), "requests-are-throttled");
        assert!(Fault::ALL.iter().all(|fault| fault.slug().len() < 40));
    }
}
