//! Fetches files by name, from a hub or from any other server: resumed where an earlier attempt ended, hashed while
//! written, asked for again only when they may have changed.
//!
//! Redirects are followed here and not by the HTTP client, because what a hub says of a file is in the answer that
//! redirects to its content, and because a token must not go along to another host.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use reqwest::header::{
    AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, ETAG, HeaderMap, HeaderName, HeaderValue,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, LOCATION, RANGE, RETRY_AFTER,
};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;
use turret_crds::condition::FailureReason;

use super::cache::{Cache, NoRoom, Partial, Readers, UrlRecord};
use super::content::{Hashes, Linked};
use super::failure::{Failure, backoff, disk_failure};
use super::files::Hasher;
use super::hosts::{ClientError, Hosts, MAX_REDIRECTS, Redirects, Refused, refusal};
use super::resolve::on_loader_thread;
use super::token::Token;
use crate::telemetry::chain;

/// Attempts to continue a download before the artifact counts as failed; it is then retried with the rest.
const ATTEMPTS: u32 = 4;
/// An attempt that came this much further than those before does not count: a large file over a bad line takes many.
const PROGRESS_BYTES: u64 = 64 << 10;
/// A server that brings less than [`PROGRESS_BYTES`] in this time is as good as silent. It must not keep others waiting.
const PACE: Duration = Duration::from_secs(60);
/// Room is made in such steps for a file whose length its server does not tell.
const STEP_BYTES: u64 = 64 << 20;
/// How often is looked whether another process has done with a file.
const OTHER_PROCESS: Duration = Duration::from_millis(250);
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

/// Told how many bytes of a folder are there, and of how many, as far as is known.
pub type OnFetch = Arc<dyn Fn(u64, Option<u64>) + Send + Sync>;

/// A file on a server.
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
    /// Bytes of the same folder that are there already: the disk must hold them all.
    pub beside: u64,
    /// Told how far it is, with those.
    pub on_fetch: &'a OnFetch,
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
    partial: Arc<Partial>,
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
        /// Bytes of the file that are there.
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
    let (mut failures, mut furthest) = (0, 0);
    loop {
        let (failure, retry_after, arrived) = match attempt().await {
            Ok(value) => return Ok(value),
            Err(Broken::Final(failure)) => return Err(Broken::Final(failure)),
            Err(Broken::Network { failure, retry_after, arrived }) => (failure, retry_after, arrived),
        };
        // From the beginning again and again is not further, however much comes each time.
        failures = if arrived >= furthest + PROGRESS_BYTES { 1 } else { failures + 1 };
        furthest = furthest.max(arrived);
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

    /// What is known of a file, if it is here unharmed.
    pub async fn known(&self, key: &str) -> Result<Option<UrlRecord>, Failure> {
        let (cache, hasher, key) = (self.cache.clone(), self.hasher.clone(), key.to_owned());
        on_loader_thread(move || Ok(cache.known_good(&key, &hasher))).await
    }

    async fn find(&self, wanted: &Wanted<'_>) -> Result<Option<UrlRecord>, Failure> {
        let may_have = |known: &UrlRecord| known.readers.has(wanted.token);
        let settled = |known: &UrlRecord| wanted.content != Content::Changing && may_have(known);
        let mut partial = None;
        // What is known is read again once the file is ours: whoever had it before may have finished it.
        let (known, partial) = loop {
            let known = self.known(&wanted.key).await?;
            match (known, partial.take()) {
                (Some(known), _) if settled(&known) => return Ok(Some(known)),
                (known, Some(partial)) => break (known, partial),
                (_, None) => partial = self.take_on(&wanted.key).await?,
            }
            if partial.is_none() {
                tracing::debug!(file = wanted.key, "another process fetches it");
                tokio::time::sleep(OTHER_PROCESS).await;
            }
        };
        let result = persist(&wanted.key, || self.attempt(wanted, known.as_ref(), &partial)).await;
        match result {
            Ok(found) => Ok(found),
            Err(Broken::Final(failure)) => {
                if let Some(mut known) = known
                    && failure.reason == FailureReason::Unauthorized
                    && known.readers.expel(wanted.token)
                    && let Err(error) = self.note(known).await
                {
                    tracing::warn!(file = wanted.key, %error, "failed to note who may not have a file any more");
                }
                Err(failure)
            }
            // What was good yesterday is still good if it cannot be asked for today, for those who were given it.
            Err(Broken::Network { failure, .. }) => match known.filter(may_have) {
                Some(known) => {
                    let (file, error) = (&wanted.key, failure.message);
                    tracing::warn!(file, error, "source not reachable, using the cached file");
                    Ok(Some(known))
                }
                None => Err(failure),
            },
        }
    }

    async fn take_on(&self, key: &str) -> Result<Option<Arc<Partial>>, Failure> {
        let (cache, key) = (self.cache.clone(), key.to_owned());
        on_loader_thread(move || Ok(cache.take_on(&key).map_err(|e| disk_failure(&e))?.map(Arc::new))).await
    }

    async fn note(&self, record: UrlRecord) -> Result<UrlRecord, Failure> {
        let cache = self.cache.clone();
        on_loader_thread(move || {
            cache.note(&record).map_err(|e| disk_failure(&e))?;
            Ok(record)
        })
        .await
    }

    /// The server says that a file is what is known, to whoever asked.
    async fn admit(&self, known: &UrlRecord, token: &Token) -> Result<Option<UrlRecord>, Broken> {
        let mut known = known.clone();
        match known.readers.admit(token) {
            true => self.note(known).await.map(Some).map_err(Broken::Final),
            false => Ok(Some(known)),
        }
    }

    async fn attempt(
        &self,
        wanted: &Wanted<'_>,
        known: Option<&UrlRecord>,
        partial: &Arc<Partial>,
    ) -> Result<Option<UrlRecord>, Broken> {
        let key = &wanted.key;
        let start = tokio::fs::metadata(partial.path()).await.map_or(0, |m| m.len());
        let mut arrival = Arrival { partial: partial.clone(), start };
        let begun = tokio::fs::read_to_string(partial.validator()).await.ok();
        // A weak tag is also that of other bytes with the same meaning.
        let begun = begun.filter(|v| start > 0 && !v.is_empty() && !v.starts_with("W/"));
        let headers = conditions(wanted.content, known, begun.as_deref(), start);
        let resumed = headers.contains_key(RANGE);
        let mut reply = self.get(wanted, known, headers).await?;
        let changed = || Broken::network(format!("`{key}` changed during the download"));
        if let Content::OfCommit(commit) = wanted.content {
            reply.linked.is_of(commit).map_err(|other| {
                let what = format!("`{key}`: the hub answered with the commit {other}");
                Broken::last(FailureReason::SourceUnavailable, what)
            })?;
            if let Some(known) = known.filter(|known| reply.names(known)) {
                return self.admit(known, wanted.token).await;
            }
            if resumed && reply.linked.etag_or(begun.as_deref()) != begun.as_deref() {
                arrival.discard().await;
                return Err(changed());
            }
        }
        let status = reply.response.status();
        if resumed
            && matches!(status, StatusCode::PARTIAL_CONTENT | StatusCode::RANGE_NOT_SATISFIABLE)
            && wanted.content == Content::Changing
            && begun.as_ref().is_some_and(|begun| contradicts(reply.response.headers(), begun))
        {
            // The server does not know `If-Range`.
            arrival.discard().await;
            return Err(changed());
        }
        if let Some(known) = known.filter(|_| status == StatusCode::NOT_MODIFIED) {
            return self.admit(known, wanted.token).await;
        }
        arrival.start = match status {
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if resumed && range_start(&reply.response) == Some(start) => start,
            StatusCode::RANGE_NOT_SATISFIABLE if resumed => {
                if whole_length(&reply.response) == Some(start) {
                    // All of it had arrived before; it is only looked at.
                    return self.receive(wanted, reply, &arrival, begun).await.map(Some);
                }
                arrival.discard().await;
                return Err(changed());
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => return Ok(None),
            _ => return Err(refused(wanted, &reply)),
        };
        let validator = match wanted.content {
            Content::OfCommit(_) => reply.linked.etag().map(str::to_owned),
            Content::Changing => validator(reply.response.headers()),
        };
        let mut record = self.receive(wanted, reply, &arrival, validator).await?;
        // Those who were given the same content before may have it from there as well.
        if let Some(known) = known.filter(|known| known.sha256 == record.sha256) {
            record.readers = known.readers.clone();
            record.readers.admit(wanted.token);
            record = self.note(record).await.map_err(Broken::Final)?;
        }
        Ok(Some(record))
    }

    /// Sends a request, and follows its redirects where that is allowed. The token stays with the first host.
    async fn get(
        &self,
        wanted: &Wanted<'_>,
        known: Option<&UrlRecord>,
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

    /// Writes what comes behind what is there, and takes the file when it is what it should be.
    async fn receive(
        &self,
        wanted: &Wanted<'_>,
        reply: Reply,
        arrival: &Arrival,
        validator: Option<String>,
    ) -> Result<UrlRecord, Broken> {
        let (key, start) = (&wanted.key, arrival.start);
        let length = length(&reply.response, start);
        let expected = reply.linked.length(length).map_err(|other| {
            let message =
                format!("`{key}` has {} bytes where it is stored, the hub says {}", other.0, other.1);
            Broken::last(FailureReason::SourceUnavailable, message)
        })?;
        let most = if wanted.name.ends_with(".safetensors") { u64::MAX } else { MAX_JSON_BYTES };
        if expected.is_some_and(|bytes| bytes > most) {
            return Err(too_large(key, most));
        }
        let mut hashes = Hashes::begin(&reply.linked, expected).ok_or_else(|| {
            let message = format!("the server of `{key}` does not tell its length, so it cannot be verified");
            Broken::last(FailureReason::SourceUnavailable, message)
        })?;
        let linked = reply.linked.clone();
        let incoming = Incoming { reply, arrival, expected, most: expected.unwrap_or(most).min(most) };
        let size = match self.pour(wanted, incoming, &mut hashes, validator.as_deref()).await {
            Ok(size) => size,
            Err(Interrupted::By(broken)) => return Err(broken),
            Err(Interrupted::Disk(error)) => {
                return Err(self.disk_is_full(wanted, arrival, expected, &error).await);
            }
        };
        if let Some(expected) = expected.filter(|expected| *expected != size) {
            let message = format!("`{key}` ended after {size} bytes of {expected}");
            return Err(Broken::network(message).after(size));
        }
        let sha256 = match hashes.finish(&linked) {
            Ok(sha256) => sha256,
            Err(found) => {
                arrival.discard().await;
                let named = linked.etag().unwrap_or_default();
                let message =
                    format!("`{key}` arrived as {found}, the hub names it {named}; it was not kept");
                // What was there before may have been what is wrong.
                return Err(match start {
                    0 => Broken::last(FailureReason::DigestMismatch, message),
                    _ => Broken::network(message),
                });
            }
        };
        let readers = Readers::of(wanted.token);
        let record = UrlRecord { url: key.clone(), sha256, size, validator, readers };
        let (cache, hasher, partial) = (self.cache.clone(), self.hasher.clone(), arrival.partial.clone());
        let kept = on_loader_thread(move || {
            cache.keep(&partial, &record, &hasher).map_err(|e| disk_failure(&e))?;
            Ok(record)
        });
        let record = kept.await.map_err(Broken::Final)?;
        tracing::debug!(file = key, size, resumed_at = start, "fetched");
        Ok(record)
    }

    /// Writes and hashes what comes, in the room that was made for it. Tells the size of what is there then.
    async fn pour(
        &self,
        wanted: &Wanted<'_>,
        incoming: Incoming<'_>,
        hashes: &mut Hashes,
        validator: Option<&str>,
    ) -> Result<u64, Interrupted> {
        let Incoming { mut reply, arrival, expected, most } = incoming;
        let key = &wanted.key;
        let mut room = expected.unwrap_or(arrival.start + STEP_BYTES);
        self.make_room(wanted, arrival, room).await?;
        let mut file = arrival.open(hashes, validator).await?;
        let mut size = arrival.start;
        let mut pace = Pace::begin(Instant::now());
        while reply.response.status() != StatusCode::RANGE_NOT_SATISFIABLE {
            let chunk = match reply.response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) => break,
                Err(error) => {
                    // What has arrived is the start of the next attempt.
                    file.flush().await?;
                    return Err(failed(key, error).after(size).into());
                }
            };
            size += chunk.len() as u64;
            if size > most {
                drop(file);
                arrival.discard().await;
                return Err(too_large(key, most).into());
            }
            if size > room {
                room = size + STEP_BYTES;
                self.make_room(wanted, arrival, room).await?;
            }
            hashes.update(&chunk);
            file.write_all(&chunk).await?;
            let known = expected.map(|bytes| wanted.beside + bytes);
            (wanted.on_fetch)(wanted.beside + size, known);
            if !pace.keeps_up(chunk.len() as u64, Instant::now()) {
                file.flush().await?;
                let message = format!("`{key}` came at less than {PROGRESS_BYTES} bytes a minute");
                return Err(Broken::network(message).after(size).into());
            }
        }
        file.flush().await?;
        Ok(size)
    }

    async fn make_room(&self, wanted: &Wanted<'_>, arrival: &Arrival, needed: u64) -> Result<(), Broken> {
        let (partial, beside) = (arrival.partial.clone(), wanted.beside);
        let made = on_loader_thread(move || Ok(partial.make_room(needed, beside)));
        let Err(error) = made.await.map_err(Broken::Final)? else { return Ok(()) };
        let message = format!("failed to fetch `{}`: {error}", wanted.key);
        Err(match error {
            NoRoom::Alone { .. } => {
                // What can never be whole takes nobody's room.
                arrival.discard().await;
                Broken::last(FailureReason::DoesNotFit, message)
            }
            // Others may leave, and nothing else would have it looked at again.
            NoRoom::Now { .. } => Broken::last(FailureReason::DiskFull, message),
            NoRoom::Io(error) => disk(&error),
        })
    }

    /// What becomes of a download that the disk does not take: what nobody needs goes, or else the download does.
    async fn disk_is_full(
        &self,
        wanted: &Wanted<'_>,
        arrival: &Arrival,
        expected: Option<u64>,
        error: &io::Error,
    ) -> Broken {
        if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return disk(error);
        }
        let there = tokio::fs::metadata(arrival.partial.path()).await.map_or(0, |m| m.len());
        let missing = expected.unwrap_or(there + STEP_BYTES).saturating_sub(there);
        let cache = self.cache.clone();
        let freed = on_loader_thread(move || cache.free(missing).map_err(|e| disk_failure(&e))).await;
        let budget = self.cache.budget();
        let message = format!(
            "failed to fetch `{}`: the disk is full: {missing} more bytes of it did not fit, although the disk budget is \
             {budget} bytes; lower spec.memory.diskBudget, or make the disk larger",
            wanted.key
        );
        let failure = Failure::new(FailureReason::DiskFull, message);
        match freed {
            Ok(freed) if freed > 0 => Broken::Network { failure, retry_after: None, arrived: there },
            _ => {
                // Others may have use for what it took.
                arrival.discard().await;
                Broken::Final(failure)
            }
        }
    }
}

/// A file that comes.
struct Incoming<'a> {
    reply: Reply,
    arrival: &'a Arrival,
    expected: Option<u64>,
    /// It may not be longer.
    most: u64,
}

/// What ended a file before its end.
enum Interrupted {
    By(Broken),
    Disk(io::Error),
}

impl From<Broken> for Interrupted {
    fn from(broken: Broken) -> Self {
        Self::By(broken)
    }
}

impl From<io::Error> for Interrupted {
    fn from(error: io::Error) -> Self {
        Self::Disk(error)
    }
}

/// Whether enough comes. A server that sends a byte now and then never lets a read time out.
struct Pace {
    since: Instant,
    bytes: u64,
}

impl Pace {
    fn begin(now: Instant) -> Self {
        Self { since: now, bytes: 0 }
    }

    fn keeps_up(&mut self, bytes: u64, now: Instant) -> bool {
        self.bytes += bytes;
        if now - self.since < PACE {
            return true;
        }
        let enough = self.bytes >= PROGRESS_BYTES;
        *self = Self::begin(now);
        enough
    }
}

impl Reply {
    /// Whether the hub itself says that a file is what is known of it.
    fn names(&self, known: &UrlRecord) -> bool {
        let status = self.response.status();
        let is_told = self.at_home && (status.is_success() || status.is_redirection());
        is_told && self.linked.etag().is_some() && self.linked.etag() == known.validator.as_deref()
    }
}

impl Arrival {
    /// Opens the file to be continued, hashing what is there, or begins it.
    async fn open(&self, hashes: &mut Hashes, validator: Option<&str>) -> io::Result<tokio::fs::File> {
        let path = self.partial.path();
        if self.start == 0 {
            // Emptied first: what is there must never be found with the validator of something else.
            let file = tokio::fs::File::create(&path).await?;
            tokio::fs::write(self.partial.validator(), validator.unwrap_or_default()).await?;
            return Ok(file);
        }
        let mut file = tokio::fs::File::open(&path).await?;
        let mut chunk = vec![0; 1 << 20];
        loop {
            match file.read(&mut chunk).await? {
                0 => break,
                n => hashes.update(&chunk[..n]),
            }
        }
        tokio::fs::OpenOptions::new().append(true).open(&path).await
    }

    /// Throws away what has arrived.
    async fn discard(&self) {
        let partial = self.partial.clone();
        let _ = tokio::task::spawn_blocking(move || partial.discard()).await;
    }
}

/// What a file is asked for with: only if it is another than that which is known, and only what is not there yet.
fn conditions(content: Content<'_>, known: Option<&UrlRecord>, begun: Option<&str>, start: u64) -> HeaderMap {
    let mut headers = HeaderMap::new();
    match (content, known.and_then(|known| known.validator.as_deref())) {
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
fn contradicts(headers: &HeaderMap, begun: &str) -> bool {
    let name = if is_tag(begun) { ETAG } else { LAST_MODIFIED };
    text(headers, &name).is_some_and(|now| now != begun)
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

/// The length of the whole file, of which `start` bytes are there, as its server tells it.
fn length(response: &Response, start: u64) -> Option<u64> {
    let rest = || text(response.headers(), &CONTENT_LENGTH)?.parse::<u64>().ok();
    match response.status() {
        StatusCode::RANGE_NOT_SATISFIABLE => Some(start),
        // A part may end before the file does.
        StatusCode::PARTIAL_CONTENT => {
            let range = text(response.headers(), &CONTENT_RANGE);
            let whole = range.and_then(|range| range.split_once('/')?.1.parse::<u64>().ok());
            whole.or_else(|| Some(start.saturating_add(rest()?)))
        }
        _ => rest(),
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

fn disk(error: &io::Error) -> Broken {
    Broken::Final(disk_failure(error))
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
        let further: Vec<u64> = (1..20).map(|n| n << 20).collect();
        assert!(flaky(&further, None).await.0);
        assert!(!flaky(&[1 << 20; 20], None).await.0, "the same again is no progress");
        assert_eq!(flaky(&[0], Some(7)).await, (true, 2, 7));
        assert_eq!(flaky(&[0], Some(3600)).await, (true, 2, 30));
    }

    #[tokio::test(start_paused = true)]
    async fn a_trickle_is_no_progress() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut pace = Pace::begin(begun);
        assert!(pace.keeps_up(1, at(59)));
        assert!(pace.keeps_up(PROGRESS_BYTES, at(60)));
        assert!(pace.keeps_up(1, at(119)));
        assert!(!pace.keeps_up(1, at(120)));
    }

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
        let known = |validator: Option<&str>| UrlRecord {
            url: "https://h/a".into(),
            sha256: String::new(),
            size: 1,
            validator: validator.map(str::to_owned),
            readers: Readers::default(),
        };
        let asked = |content, validator: Option<&str>, begun| {
            let headers = conditions(content, validator.map(|v| known(Some(v))).as_ref(), begun, 7);
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
