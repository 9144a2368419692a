//! Asking for a file: the request, its redirects, and what the answer says of the file.

use std::time::{Duration, SystemTime};

use reqwest::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Response, StatusCode};
use turret_crds::condition::FailureReason;

use super::{Broken, Content, Fetcher, Wanted};
use crate::residency::content::Linked;
use crate::residency::hosts::{MAX_REDIRECTS, Refused, refusal};
use crate::telemetry::chain;

/// The answer at the end of all redirects.
pub(super) struct Reply {
    pub(super) response: Response,
    /// Whether the host that was asked gave it itself.
    pub(super) at_home: bool,
    pub(super) linked: Linked,
}

impl Fetcher {
    /// Sends a request, and follows its redirects where that is allowed. The token stays with the first host.
    pub(super) async fn get(
        &self,
        wanted: &Wanted<'_>,
        known: Option<&str>,
        headers: HeaderMap,
    ) -> Result<Reply, Broken> {
        let (mut url, mut at_home) = (wanted.url.clone(), true);
        let mut linked = Linked::default();
        for _ in 0..=MAX_REDIRECTS {
            self.hosts.check(&url).map_err(|refused| not_allowed(&wanted.key, &refused))?;
            let mut request = self.client.get(url.clone()).headers(headers.clone());
            if let Some(bearer) = wanted.token.header().filter(|_| at_home) {
                request = request.header(AUTHORIZATION, bearer);
            }
            let response = request.send().await.map_err(|e| failed(&wanted.key, e))?;
            if at_home && wanted.content != Content::Changing {
                linked.read(&response);
            }
            let is_redirect =
                response.status().is_redirection() && response.status() != StatusCode::NOT_MODIFIED;
            let location = text(response.headers(), &LOCATION).filter(|_| is_redirect).map(str::to_owned);
            let reply = Reply { response, at_home, linked };
            // A hub that names what is here has nothing more to say.
            if known.is_some_and(|known| reply.names(known)) {
                return Ok(reply);
            }
            let Some(location) = location else { return Ok(reply) };
            linked = reply.linked;
            let next = url.join(&location).map_err(|error| {
                let message = format!("`{}` is redirected to what is no URL: {error}", wanted.key);
                Broken::last(FailureReason::SourceUnavailable, message)
            })?;
            at_home &= next.origin() == url.origin();
            url = next;
        }
        let message = format!("`{}` is redirected more than {MAX_REDIRECTS} times", wanted.key);
        Err(Broken::last(FailureReason::SourceUnavailable, message))
    }
}

impl Reply {
    /// Whether the hub itself says that a file is what is known by this name.
    pub(super) fn names(&self, known: &str) -> bool {
        let status = self.response.status();
        let is_told = self.at_home && (status.is_success() || status.is_redirection());
        is_told && self.linked.etag() == Some(known)
    }

    /// Refuses what is of another commit than the one that was asked for.
    pub(super) fn check_commit(&self, wanted: &Wanted<'_>) -> Result<(), Broken> {
        let Content::OfCommit(commit) = wanted.content else { return Ok(()) };
        self.linked.is_of(commit).map_err(|other| {
            let what = format!("`{}`: the hub answered with the commit {other}", wanted.key);
            Broken::last(FailureReason::SourceUnavailable, what)
        })
    }

    /// The length of the whole file, where it is told: as it is where the file is stored, and by the hub.
    pub(super) fn agreed_length(&self, key: &str, stored: Option<u64>) -> Result<Option<u64>, Broken> {
        self.linked.length(stored).map_err(|other| {
            let message =
                format!("`{key}` has {} bytes where it is stored, the hub says {}", other.0, other.1);
            Broken::last(FailureReason::SourceUnavailable, message)
        })
    }

    /// What this state of the file is told from another by.
    pub(super) fn validator(&self, content: Content<'_>) -> Option<String> {
        match content {
            Content::OfCommit(_) => self.linked.etag().map(str::to_owned),
            Content::Changing => validator(self.response.headers()),
        }
    }
}

/// What a file is asked for with: only if it is another than that which is known, and only what is not there yet.
pub(super) fn conditions(
    content: Content<'_>,
    known: Option<&str>,
    begun: Option<&str>,
    start: u64,
) -> HeaderMap {
    let mut headers = HeaderMap::new();
    match (content, known) {
        (_, None) => {}
        (Content::OfCommit(_), Some(name)) => set(&mut headers, IF_NONE_MATCH, &format!("\"{name}\"")),
        (Content::Changing, Some(tag)) if is_tag(tag) => set(&mut headers, IF_NONE_MATCH, tag),
        (Content::Changing, Some(date)) => set(&mut headers, IF_MODIFIED_SINCE, date),
    }
    if let Some(begun) = begun {
        set(&mut headers, RANGE, &format!("bytes={start}-"));
        // Where a hub's content is stored it has another tag; the hub itself says whether it is the same.
        if content == Content::Changing {
            set(&mut headers, IF_RANGE, begun);
        }
    }
    headers
}

/// What a server tells one state of a file from another by. A date serves better than a tag that is weak: it takes part in
/// resuming.
fn validator(headers: &HeaderMap) -> Option<String> {
    let header = |name: &HeaderName| text(headers, name).map(str::to_owned);
    let tag = header(&ETAG);
    tag.clone().filter(|tag| !tag.starts_with("W/")).or_else(|| header(&LAST_MODIFIED)).or(tag)
}

fn is_tag(validator: &str) -> bool {
    validator.starts_with('"') || validator.starts_with("W/")
}

/// Whether an answer is of another state of a file than that which was begun.
pub(super) fn contradicts(headers: &HeaderMap, begun: &str) -> bool {
    let name = if is_tag(begun) { ETAG } else { LAST_MODIFIED };
    text(headers, &name).is_some_and(|now| now != begun)
}

/// A header's value, if it is text.
pub fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

pub(super) fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    // A tag that is no header's value came in no header; without it the file is asked for anew.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// The length of the whole file, of which `start` bytes are there, as its server tells it.
pub(super) fn length(response: &Response, start: u64) -> Option<u64> {
    let rest = || text(response.headers(), &CONTENT_LENGTH)?.parse::<u64>().ok();
    match response.status() {
        StatusCode::RANGE_NOT_SATISFIABLE => Some(start),
        // A part may end before the file does.
        StatusCode::PARTIAL_CONTENT => {
            length_by_range(response).or_else(|| Some(start.saturating_add(rest()?)))
        }
        _ => rest(),
    }
}

/// The same, by the range that an answer is of.
pub(super) fn length_by_range(response: &Response) -> Option<u64> {
    text(response.headers(), &CONTENT_RANGE)?.split_once('/')?.1.parse().ok()
}

pub(super) fn range_start(response: &Response) -> Option<u64> {
    let range = text(response.headers(), &CONTENT_RANGE)?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

pub(super) fn whole_length(response: &Response) -> Option<u64> {
    text(response.headers(), &CONTENT_RANGE)?.strip_prefix("bytes */")?.parse().ok()
}

/// When a server wants to be asked again: a number of seconds, or a date.
fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let value = text(headers, &RETRY_AFTER)?.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = SystemTime::from(jiff::fmt::rfc2822::parse(value).ok()?.timestamp());
    Some(date.duration_since(now).unwrap_or_default())
}

/// A request that got no answer. The URL may carry a signature, so it is not told.
pub fn failed(what: &str, error: reqwest::Error) -> Broken {
    if let Some(refused) = refusal(&error) {
        return not_allowed(what, &refused);
    }
    Broken::network(format!("failed to fetch `{what}`: {}", chain(&error.without_url())))
}

/// A host that files may not be fetched from.
pub fn not_allowed(what: &str, refused: &Refused) -> Broken {
    Broken::last(FailureReason::NotAllowed, format!("`{what}` is refused: {refused}"))
}

pub(super) fn refused(wanted: &Wanted<'_>, reply: &Reply) -> Broken {
    let status = reply.response.status();
    let host = reply.response.url().host_str().unwrap_or_default();
    let message = format!("`{}`: {host} answered {status}", wanted.key);
    let wish = retry_after(reply.response.headers(), SystemTime::now());
    let again = |message| match Broken::network(message) {
        Broken::Network { failure, arrived, .. } => Broken::Network { failure, retry_after: wish, arrived },
        last => last,
    };
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if reply.at_home => {
            Broken::last(FailureReason::Unauthorized, format!("{message}, asked {}", wanted.token.origin()))
        }
        // Where content is stored, a signature is asked for, and every attempt brings a new one.
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => again(message),
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => again(message),
        s if s.is_server_error() => again(message),
        _ => Broken::last(FailureReason::SourceUnavailable, message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(&str, &str)]) -> Response {
        let mut answer = http::Response::builder().status(status);
        for (name, value) in headers {
            answer = answer.header(*name, *value);
        }
        answer.body(Vec::new()).unwrap().into()
    }

    #[test]
    fn the_length_is_that_of_the_whole_file() {
        let of = |status, headers: &[(&str, &str)]| length(&answer(status, headers), 10);
        assert_eq!(of(200, &[("content-length", "30")]), Some(30));
        assert_eq!(of(200, &[]), None);
        assert_eq!(of(206, &[("content-length", "5"), ("content-range", "bytes 10-14/30")]), Some(30));
        assert_eq!(of(206, &[("content-length", "20"), ("content-range", "bytes 10-29/*")]), Some(30));
        assert_eq!(of(416, &[("content-range", "bytes */10"), ("content-length", "0")]), Some(10));
    }

    #[test]
    fn a_file_is_asked_for_by_what_its_server_calls_it() {
        let asked = |content, validator: Option<&str>, begun| {
            let headers = conditions(content, validator, begun, 7);
            let mut asked: Vec<String> =
                headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
            asked.sort();
            asked
        };
        let date = "Wed, 21 Oct 2015 07:28:00 GMT";
        let same = Content::Changing;
        assert!(asked(same, None, None).is_empty());
        assert_eq!(asked(same, Some("\"a\""), None), ["if-none-match: \"a\""]);
        assert_eq!(asked(same, Some(date), None), [format!("if-modified-since: {date}")]);
        assert_eq!(asked(same, None, Some("\"b\"")), ["if-range: \"b\"", "range: bytes=7-"]);
        // Another state of a known file is continued as well.
        assert_eq!(
            asked(same, Some("W/\"a\""), Some("\"b\"")),
            ["if-none-match: W/\"a\"", "if-range: \"b\"", "range: bytes=7-"]
        );
        assert_eq!(
            asked(Content::OfCommit("c"), Some("a"), Some("a")),
            ["if-none-match: \"a\"", "range: bytes=7-"]
        );
    }

    #[test]
    fn a_part_of_another_state_is_not_taken_for_the_rest() {
        let headers = |pairs: &[(&str, &str)]| answer(206, pairs).headers().clone();
        assert!(contradicts(&headers(&[("etag", "\"b\"")]), "\"a\""));
        assert!(!contradicts(&headers(&[("etag", "\"a\"")]), "\"a\""));
        assert!(!contradicts(&headers(&[]), "\"a\""));
        assert!(contradicts(&headers(&[("last-modified", "x"), ("etag", "\"b\"")]), "y"));
        let both = [("etag", "W/\"a\""), ("last-modified", "x")];
        assert_eq!(validator(&headers(&both)).as_deref(), Some("x"));
        assert_eq!(validator(&headers(&both[..1])).as_deref(), Some("W/\"a\""));
    }

    #[test]
    fn a_wish_to_wait_is_a_number_or_a_date() {
        let wish = |value: &str| {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, HeaderValue::from_str(value).unwrap())]);
            retry_after(&headers, SystemTime::UNIX_EPOCH + Duration::from_secs(10)).map(|d| d.as_secs())
        };
        assert_eq!(wish("12"), Some(12));
        assert_eq!(wish("Thu, 01 Jan 1970 00:01:00 GMT"), Some(50));
        assert_eq!(wish("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        assert_eq!(wish("soon"), None);
    }
}
