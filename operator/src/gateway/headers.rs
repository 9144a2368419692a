//! Which headers travel on, and which end here: pure.

use http::{HeaderMap, HeaderName, HeaderValue, header};
use turret_crds::label;

/// Header that names the namespace of a request.
pub const NAMESPACE_HEADER: &str = "x-turret-namespace";
/// Header that names a request, from the client to the worker's log and back.
pub const REQUEST_ID_HEADER: &str = "x-request-id";

/// Headers that speak of one connection only (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Headers of a request that are the gateway's business: it sets them anew, or has dealt with them.
const ENDS_HERE: [&str; 6] =
    ["authorization", "content-length", "expect", "host", label::MODEL_HEADER, NAMESPACE_HEADER];

/// Removes what speaks of one connection, also what `Connection` names.
fn drop_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

/// What of a client's headers a worker sees. The rest is added with each attempt.
pub fn to_worker(client: &HeaderMap) -> HeaderMap {
    let mut headers = client.clone();
    drop_hop_by_hop(&mut headers);
    for name in ENDS_HERE {
        headers.remove(name);
    }
    headers
}

/// What of a worker's headers a client sees.
pub fn to_client(mut worker: HeaderMap) -> HeaderMap {
    drop_hop_by_hop(&mut worker);
    worker
}

/// The id of a request: the client's, if it can be printed and is not too long, or a new one.
pub fn request_id(client: &HeaderMap, new: impl FnOnce() -> String) -> HeaderValue {
    let given = client
        .get(REQUEST_ID_HEADER)
        .filter(|v| (1..=128).contains(&v.len()) && v.as_bytes().iter().all(u8::is_ascii_graphic));
    match given {
        Some(id) => id.clone(),
        None => HeaderValue::from_str(&new()).unwrap_or(HeaderValue::from_static("unnamed")),
    }
}

/// `Retry-After` in seconds. The form with a date is not used between our parts.
pub fn retry_after(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    fn names(map: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<&str> = map.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn a_worker_sees_only_what_is_meant_for_it() {
        let client = headers(&[
            ("authorization", "Bearer sk-client"),
            ("connection", "keep-alive, X-Private"),
            ("content-length", "12"),
            ("content-type", "application/json"),
            ("host", "example.org"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("traceparent", "00-1-2-01"),
            ("transfer-encoding", "chunked"),
            ("x-private", "1"),
            ("x-turret-model", "north:stolen"),
            ("x-turret-namespace", "lab"),
        ]);
        assert_eq!(names(&to_worker(&client)), ["content-type", "traceparent"]);
    }

    #[test]
    fn a_client_sees_all_but_the_connection() {
        let worker = headers(&[
            ("connection", "close"),
            ("content-type", "text/event-stream"),
            ("transfer-encoding", "chunked"),
            ("x-turret-lens-digest", "sha256:1"),
        ]);
        assert_eq!(names(&to_client(worker)), ["content-type", "x-turret-lens-digest"]);
    }

    #[test]
    fn a_request_keeps_its_id_if_it_is_a_decent_one() {
        let new = || "new".to_owned();
        assert_eq!(request_id(&headers(&[("x-request-id", "abc-1")]), new), "abc-1");
        assert_eq!(request_id(&headers(&[("x-request-id", "a b")]), new), "new");
        assert_eq!(request_id(&headers(&[("x-request-id", "")]), new), "new");
        assert_eq!(request_id(&HeaderMap::new(), new), "new");
    }

    #[test]
    fn retry_after_is_a_number_of_seconds() {
        assert_eq!(retry_after(&headers(&[("retry-after", "7")])), Some(7));
        assert_eq!(retry_after(&headers(&[("retry-after", "Wed, 21 Oct 2015 07:28:00 GMT")])), None);
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }
}
