//! Fetches files by name, from a hub or from any other server: resumed where an earlier attempt ended, hashed while
//! written, asked for again only when they may have changed.
//!
//! Redirects are followed here and not by the HTTP client, because what a hub says of a file is in the answer that
//! redirects to its content, and because a token must not go along to another host.
//!
//! [`ask`] sends requests and reads what answers say, [`receive`] writes what comes, [`glimpse`] looks at files without
//! fetching them.

mod ask;
mod glimpse;
mod receive;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::header::RANGE;
use reqwest::{Client, StatusCode, Url};
use tokio::sync::mpsc;
use turret_crds::condition::FailureReason;

use self::ask::{conditions, contradicts, range_start, refused, whole_length};
pub use self::ask::{failed, not_allowed, text};
use self::receive::Arrival;
use super::Message;
use super::cache::{Cache, Partial, UrlRecord};
use super::failure::{Failure, backoff, disk_failure};
use super::files::Hasher;
use super::hosts::{ClientError, Hosts, Redirects};
use super::resolve::on_loader_thread;
use super::token::Token;

/// Attempts to continue a download before the artifact counts as failed; it is then retried with the rest.
const ATTEMPTS: u32 = 4;
/// An attempt that came this much further than those before does not count: a large file over a bad line takes many.
const PROGRESS_BYTES: u64 = 64 << 10;
/// How often is looked whether another process has done with a file.
const OTHER_PROCESS: Duration = Duration::from_millis(250);
/// A server that asks for more patience than this is asked again earlier.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(30);

/// Fetches files into the cache.
#[derive(Clone, Debug)]
pub struct Fetcher {
    client: Client,
    hosts: Hosts,
    cache: Arc<Cache>,
    hasher: Arc<Hasher>,
    /// Files that are being fetched: two that want the same one take turns, and the second finds it.
    busy: Arc<Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>>,
    /// Who knows what may leave the disk.
    owner: Option<mpsc::UnboundedSender<Message>>,
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
        Ok(Self { client, hosts, cache, hasher, busy: Arc::default(), owner: None })
    }

    /// The same for an owner of residency, who lets files leave the disk where there is no room for others.
    pub(super) fn of_owner(self, owner: mpsc::UnboundedSender<Message>) -> Self {
        Self { owner: Some(owner), ..self }
    }

    /// The cache it fetches into.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// A file; `None` when the server does not have it.
    pub async fn file(&self, wanted: &Wanted<'_>) -> Result<Option<UrlRecord>, Failure> {
        self.in_turn(&wanted.key, self.find(wanted)).await
    }

    async fn in_turn<T>(&self, key: &str, work: impl Future<Output = T>) -> T {
        let turn = self.busy.lock().entry(key.to_owned()).or_default().clone();
        let done = {
            let _turn = turn.lock().await;
            work.await
        };
        drop(turn);
        self.busy.lock().retain(|_, turn| Arc::strong_count(turn) > 1);
        done
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
        let tag = known.and_then(|known| known.validator.as_deref());
        let headers = conditions(wanted.content, tag, begun.as_deref(), start);
        let resumed = headers.contains_key(RANGE);
        let mut reply = self.get(wanted, tag, headers).await?;
        let changed = || Broken::network(format!("`{key}` changed during the download"));
        if wanted.content != Content::Changing {
            reply.check_commit(wanted)?;
            if let Some(known) = known.filter(|_| tag.is_some_and(|tag| reply.names(tag))) {
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
        let validator = reply.validator(wanted.content);
        let mut record = self.receive(wanted, reply, &arrival, validator).await?;
        // Those who were given the same content before may have it from there as well.
        if let Some(known) = known.filter(|known| known.sha256 == record.sha256) {
            record.readers = known.readers.clone();
            record.readers.admit(wanted.token);
            record = self.note(record).await.map_err(Broken::Final)?;
        }
        Ok(Some(record))
    }
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
}
