//! Fetches files by name, from a hub or from any other server: resumed where an earlier attempt ended, hashed while
//! written, asked for again only when they may have changed.
//!
//! Redirects are followed here and not by the HTTP client, because what a hub says of a file is in the answer that
//! redirects to its content, and because a token must not go along to another host.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use parking_lot::Mutex;
use reqwest::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_NONE_MATCH,
    IF_RANGE, LAST_MODIFIED, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use turret_crds::condition::FailureReason;

use super::cache::{Cache, UrlRecord};
use super::content::{Hashes, Linked};
use super::failure::{Failure, backoff};
use super::files::{FileIdentity, Hasher};
use super::hosts::{ClientError, Hosts, MAX_REDIRECTS, Redirects, Refused, refusal};
use super::source::io_failure;
use super::token::Token;
use crate::telemetry::chain;

/// Attempts to continue a download before the artifact counts as failed; it is then retried with the rest.
const ATTEMPTS: u32 = 4;
/// An attempt that brought this much does not count: a large file over a bad line takes many.
const PROGRESS_BYTES: u64 = 64 << 10;
/// A server that asks for more patience than this is asked again earlier.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);
/// A JSON file of a model is never larger.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Fetches files into the cache.
#[derive(Clone, Debug)]
pub struct Fetcher {
    client: Client,
    hosts: Hosts,
    cache: Arc<Cache>,
    hasher: Arc<Hasher>,
    /// Files that are being fetched: two that want the same one take turns, and the second finds it.
    busy: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
}

/// A file on a server.
#[derive(Debug)]
pub struct Wanted<'a> {
    /// What it is called in the cache and in messages.
    pub key: String,
    /// Where it is asked for.
    pub url: Url,
    /// Its name in its folder.
    pub name: &'a str,
    /// Shown to the host of `url`, and to no other.
    pub token: &'a Token,
    /// Whether it can change.
    pub content: Content<'a>,
}

/// Whether a file can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    /// Yes: it is asked for again, and the server says whether it is still the same.
    Changing,
    /// No: it is a file of this commit of a hub's repository.
    OfCommit(&'a str),
}

/// How far a download came, and where.
struct Arrival {
    partial: PathBuf,
    validator: PathBuf,
    /// Bytes that are there.
    start: u64,
}

/// The answer at the end of all redirects.
struct Reply {
    response: Response,
    /// Whether the host that was asked gave it itself.
    at_home: bool,
    linked: Linked,
}

/// Why an attempt failed.
#[derive(Debug)]
pub enum Broken {
    /// Trying again at once may help.
    Network {
        /// Why.
        failure: Failure,
        /// When the server wants to be asked again.
        retry_after: Option<Duration>,
        /// Bytes that came before.
        arrived: u64,
    },
    /// It does not.
    Final(Failure),
}

impl Broken {
    /// A failure that may pass by itself.
    pub fn network(message: impl Into<String>) -> Self {
        let failure = Failure::new(FailureReason::SourceUnavailable, message);
        Self::Network { failure, retry_after: None, arrived: 0 }
    }

    /// A failure that stays.
    pub fn last(reason: FailureReason, message: impl Into<String>) -> Self {
        Self::Final(Failure::new(reason, message))
    }

    fn after(self, bytes: u64) -> Self {
        match self {
            Self::Network { failure, retry_after, arrived: _ } => {
                Self::Network { failure, retry_after, arrived: bytes }
            }
            last => last,
        }
    }
}

/// Tries until it works, cannot work, or failed often enough in a row.
pub async fn persist<T, F>(what: &str, mut attempt: impl FnMut() -> F) -> Result<T, Broken>
where
    F: Future<Output = Result<T, Broken>>,
{
    let mut failures = 0;
    loop {
        let (failure, retry_after, arrived) = match attempt().await {
            Ok(value) => return Ok(value),
            Err(Broken::Final(failure)) => return Err(Broken::Final(failure)),
            Err(Broken::Network { failure, retry_after, arrived }) => (failure, retry_after, arrived),
        };
        failures = if arrived >= PROGRESS_BYTES { 1 } else { failures + 1 };
        if failures == ATTEMPTS {
            return Err(Broken::Network { failure, retry_after, arrived });
        }
        let pause = retry_after.map_or(Duration::ZERO, |wish| wish.min(MAX_RETRY_AFTER));
        let pause = pause.max(backoff(failures) / 4);
        tracing::debug!(what, failures, pause = ?pause, error = failure.message, "interrupted, trying again");
        tokio::time::sleep(pause).await;
    }
}

impl Fetcher {
    /// A fetcher that trusts the system's certificates, or those `SSL_CERT_FILE` names, and asks allowed hosts only.
    pub fn new(cache: Arc<Cache>, hasher: Arc<Hasher>, hosts: Hosts) -> Result<Self, ClientError> {
        let client = hosts.client(Redirects::Returned)?;
        Ok(Self { client, hosts, cache, hasher, busy: Arc::default() })
    }

    /// The cache it fetches into.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// A file; `None` when the server does not have it.
    pub async fn file(&self, wanted: &Wanted<'_>) -> Result<Option<UrlRecord>, Failure> {
        let turn = self.busy.lock().entry(wanted.key.clone()).or_default().clone();
        let found = {
            let _turn = turn.lock().await;
            self.find(wanted).await
        };
        drop(turn);
        self.busy.lock().retain(|_, turn| Arc::strong_count(turn) > 1);
        found
    }

    async fn find(&self, wanted: &Wanted<'_>) -> Result<Option<UrlRecord>, Failure> {
        let known = || self.cache.known(&wanted.key);
        if let Content::OfCommit(_) = wanted.content
            && let Some(known) = known()
        {
            return Ok(Some(known));
        }
        match persist(&wanted.key, || self.attempt(wanted)).await {
            Ok(found) => Ok(found),
            Err(Broken::Final(failure)) => Err(failure),
            // What was good yesterday is still good if it cannot be asked for today.
            Err(Broken::Network { failure, .. }) => match known() {
                Some(known) => {
                    let (file, error) = (&wanted.key, failure.message);
                    tracing::warn!(file, error, "source not reachable, using the cached file");
                    Ok(Some(known))
                }
                None => Err(failure),
            },
        }
    }

    async fn attempt(&self, wanted: &Wanted<'_>) -> Result<Option<UrlRecord>, Broken> {
        let key = &wanted.key;
        let known = self.cache.known(key);
        let (partial, validator) = self.cache.partial(key).map_err(|e| disk(&e))?;
        let start = tokio::fs::metadata(&partial).await.map_or(0, |m| m.len());
        let mut arrival = Arrival { partial, validator, start };
        let begun = tokio::fs::read_to_string(&arrival.validator).await.ok();
        let begun = begun.filter(|v| !v.is_empty() && start > 0);
        let mut headers = HeaderMap::new();
        if let Some(tag) = known.as_ref().and_then(|k| k.validator.as_ref()) {
            set(&mut headers, IF_NONE_MATCH, tag);
        } else if let Some(begun) = &begun {
            set(&mut headers, RANGE, &format!("bytes={start}-"));
            // Where a hub's content is stored it has another tag; the hub itself says whether it is the same.
            if wanted.content == Content::Changing {
                set(&mut headers, IF_RANGE, begun);
            }
        }
        let resumed = headers.contains_key(RANGE);
        let mut reply = self.get(wanted, headers).await?;
        if let Content::OfCommit(commit) = wanted.content {
            reply.linked.is_of(commit).map_err(|other| {
                let what = format!("`{key}`: the hub answered with the commit {other}");
                Broken::last(FailureReason::SourceUnavailable, what)
            })?;
            if resumed && reply.linked.etag_or(begun.as_deref()) != begun.as_deref() {
                arrival.discard().await;
                return Err(Broken::network(format!("`{key}` changed during the download")));
            }
        }
        let status = reply.response.status();
        arrival.start = match status {
            StatusCode::NOT_MODIFIED if known.is_some() => return Ok(known),
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if resumed && range_start(&reply.response) == Some(start) => start,
            StatusCode::RANGE_NOT_SATISFIABLE if resumed => {
                if whole_length(&reply.response) == Some(start) {
                    // All of it had arrived before; it is only looked at.
                    return self.receive(wanted, reply, &arrival, begun).await.map(Some);
                }
                arrival.discard().await;
                return Err(Broken::network(format!("`{key}` changed during the download")));
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => return Ok(None),
            _ => return Err(refused(wanted, &reply)),
        };
        let header = |name: &HeaderName| text(reply.response.headers(), name).map(str::to_owned);
        let validator = match wanted.content {
            Content::OfCommit(_) => reply.linked.etag().map(str::to_owned),
            Content::Changing => {
                header(&ETAG).filter(|t| !t.starts_with("W/")).or_else(|| header(&LAST_MODIFIED))
            }
        };
        self.receive(wanted, reply, &arrival, validator).await.map(Some)
    }

    /// Sends a request, and follows its redirects where that is allowed. The token stays with the first host.
    async fn get(&self, wanted: &Wanted<'_>, headers: HeaderMap) -> Result<Reply, Broken> {
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
            let location = text(response.headers(), &LOCATION).filter(|_| response.status().is_redirection());
            let Some(location) = location else { return Ok(Reply { response, at_home, linked }) };
            let next = url.join(location).map_err(|error| {
                let message = format!("`{}` is redirected to what is no URL: {error}", wanted.key);
                Broken::last(FailureReason::SourceUnavailable, message)
            })?;
            at_home &= next.origin() == url.origin();
            url = next;
        }
        let message = format!("`{}` is redirected more than {MAX_REDIRECTS} times", wanted.key);
        Err(Broken::last(FailureReason::SourceUnavailable, message))
    }

    /// Writes what comes behind what is there, and takes the file when it is what it should be.
    async fn receive(
        &self,
        wanted: &Wanted<'_>,
        reply: Reply,
        arrival: &Arrival,
        validator: Option<String>,
    ) -> Result<UrlRecord, Broken> {
        let (key, start) = (&wanted.key, arrival.start);
        let is_there = reply.response.status() == StatusCode::RANGE_NOT_SATISFIABLE;
        let rest = match is_there {
            true => Some(0),
            false => text(reply.response.headers(), &CONTENT_LENGTH).and_then(|l| l.parse::<u64>().ok()),
        };
        let expected = reply.linked.length(rest.map(|rest| start + rest)).map_err(|other| {
            let message =
                format!("`{key}` has {} bytes where it is stored, the hub says {}", other.0, other.1);
            Broken::last(FailureReason::SourceUnavailable, message)
        })?;
        let most = if wanted.name.ends_with(".safetensors") { u64::MAX } else { MAX_JSON_BYTES };
        if expected.is_some_and(|bytes| bytes > most) {
            return Err(too_large(key, most));
        }
        self.cache
            .make_room(rest.unwrap_or(0))
            .map_err(|e| Broken::last(FailureReason::DoesNotFit, format!("failed to fetch `{key}`: {e}")))?;
        let mut hashes = Hashes::begin(&reply.linked, expected).ok_or_else(|| {
            let message = format!("the server of `{key}` does not tell its length, so it cannot be verified");
            Broken::last(FailureReason::SourceUnavailable, message)
        })?;
        let mut file = arrival.open(&mut hashes, validator.as_deref()).await.map_err(|e| disk(&e))?;
        let mut size = start;
        let mut body = reply.response.bytes_stream();
        while !is_there && let Some(chunk) = body.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    // What has arrived is the start of the next attempt.
                    file.flush().await.map_err(|e| disk(&e))?;
                    return Err(failed(key, error).after(size - start));
                }
            };
            size += chunk.len() as u64;
            if size > expected.unwrap_or(most).min(most) {
                drop(file);
                arrival.discard().await;
                return Err(too_large(key, expected.unwrap_or(most).min(most)));
            }
            hashes.update(&chunk);
            file.write_all(&chunk).await.map_err(|e| disk(&e))?;
        }
        file.flush().await.map_err(|e| disk(&e))?;
        drop(file);
        if let Some(expected) = expected.filter(|expected| *expected != size) {
            let message = format!("`{key}` ended after {size} bytes of {expected}");
            return Err(Broken::network(message).after(size - start));
        }
        let sha256 = match hashes.finish(&reply.linked) {
            Ok(sha256) => sha256,
            Err(found) => {
                arrival.discard().await;
                let named = reply.linked.etag().unwrap_or_default();
                let message =
                    format!("`{key}` arrived as {found}, the hub names it {named}; it was not kept");
                // What was there before may have been what is wrong.
                return Err(match start {
                    0 => Broken::last(FailureReason::DigestMismatch, message),
                    _ => Broken::network(message),
                });
            }
        };
        let record = UrlRecord { url: key.clone(), sha256, size, validator };
        self.cache.keep(&arrival.partial, &record).map_err(|e| disk(&e))?;
        let _ = tokio::fs::remove_file(&arrival.validator).await;
        if let Ok(identity) = FileIdentity::at(&self.cache.blob(&record.sha256)) {
            self.hasher.remember(identity, record.sha256.clone());
        }
        tracing::debug!(file = key, size, resumed_at = start, "fetched");
        Ok(record)
    }
}

impl Arrival {
    /// Opens the file to be continued, hashing what is there, or begins it.
    async fn open(&self, hashes: &mut Hashes, validator: Option<&str>) -> std::io::Result<tokio::fs::File> {
        if self.start == 0 {
            tokio::fs::write(&self.validator, validator.unwrap_or_default()).await?;
            return tokio::fs::File::create(&self.partial).await;
        }
        let mut file = tokio::fs::File::open(&self.partial).await?;
        let mut chunk = vec![0; 1 << 20];
        loop {
            match file.read(&mut chunk).await? {
                0 => break,
                n => hashes.update(&chunk[..n]),
            }
        }
        tokio::fs::OpenOptions::new().append(true).open(&self.partial).await
    }

    /// Throws away what has arrived.
    async fn discard(&self) {
        for path in [&self.partial, &self.validator] {
            let _ = tokio::fs::remove_file(path).await;
        }
    }
}

/// A header's value, if it is text.
pub fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    // A tag that is no header's value came in no header; without it the file is asked for anew.
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

fn range_start(response: &Response) -> Option<u64> {
    let range = text(response.headers(), &CONTENT_RANGE)?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn whole_length(response: &Response) -> Option<u64> {
    text(response.headers(), &CONTENT_RANGE)?.strip_prefix("bytes */")?.parse().ok()
}

/// When a server wants to be asked again: a number of seconds, or a date.
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
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

fn refused(wanted: &Wanted<'_>, reply: &Reply) -> Broken {
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

fn too_large(key: &str, most: u64) -> Broken {
    Broken::last(FailureReason::Malformed, format!("`{key}` is larger than {most} bytes"))
}

fn disk(error: &std::io::Error) -> Broken {
    let mut failure = io_failure(error, "failed to write to the cache folder");
    failure.reason = FailureReason::Internal;
    Broken::Final(failure)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn attempts_that_bring_something_do_not_count_and_a_wish_to_wait_is_honoured_within_reason() {
        let tried = std::cell::Cell::new(0);
        let flaky = async |arrived: &[u64], wish: Option<u64>| {
            tried.set(0);
            let began = tokio::time::Instant::now();
            let result = persist("a", || {
                let at = tried.replace(tried.get() + 1);
                std::future::ready(match arrived.get(at) {
                    Some(&arrived) => Err(Broken::Network {
                        failure: Failure::new(FailureReason::SourceUnavailable, "cut"),
                        retry_after: wish.map(Duration::from_secs),
                        arrived,
                    }),
                    None => Ok(()),
                })
            });
            let result = result.await.is_ok();
            (result, tried.get(), began.elapsed().as_secs())
        };
        assert_eq!(flaky(&[0, 0, 0], None).await, (true, 4, 1));
        assert_eq!(flaky(&[0, 0, 0, 0], None).await, (false, 4, 1));
        assert!(flaky(&[1 << 20; 20], None).await.0);
        assert_eq!(flaky(&[0], Some(7)).await, (true, 2, 7));
        assert_eq!(flaky(&[0], Some(3600)).await, (true, 2, 30));
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
