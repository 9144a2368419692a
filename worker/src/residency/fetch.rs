//! Fetches the files of an `https://` folder by name: resumed where an earlier attempt ended, hashed while written,
//! asked for again only when the server says they changed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use reqwest::header::{CONTENT_LENGTH, CONTENT_RANGE, ETAG, IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE};
use reqwest::{Client, Response, StatusCode};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use turret_crds::condition::FailureReason;

use super::cache::{Cache, UrlRecord};
use super::failure::{Failure, backoff};
use super::files::{FileIdentity, Hasher};
use super::source::io_failure;
use crate::telemetry::chain;

/// Attempts to continue a download before the artifact counts as failed; it is then retried with the rest.
const ATTEMPTS: u32 = 4;
/// A JSON file of a model is never larger.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// Fetches files into the cache.
#[derive(Clone, Debug)]
pub struct Fetcher {
    client: Client,
    cache: Arc<Cache>,
    hasher: Arc<Hasher>,
}

/// Why no client for HTTPS can be made.
#[derive(Debug, thiserror::Error)]
#[error("failed to set up the HTTPS client; check the certificates that SSL_CERT_FILE names")]
pub struct ClientError(#[source] reqwest::Error);

impl Fetcher {
    /// A fetcher that trusts the system's certificates, or those `SSL_CERT_FILE` names.
    pub fn new(cache: Arc<Cache>, hasher: Arc<Hasher>) -> Result<Self, ClientError> {
        let client = Client::builder()
            .https_only(true)
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(60))
            .user_agent(concat!("turret-worker/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(ClientError)?;
        Ok(Self { client, cache, hasher })
    }

    /// The cache it fetches into.
    pub fn cache(&self) -> &Arc<Cache> {
        &self.cache
    }

    /// A file of a folder; `None` when the server does not have it.
    pub async fn file(&self, folder_url: &str, name: &str) -> Result<Option<UrlRecord>, Failure> {
        let url = format!("{folder_url}/{name}");
        let mut attempt = 1;
        loop {
            match self.attempt(&url, name).await {
                Ok(found) => return Ok(found),
                Err(Broken::Final(failure)) => return Err(failure),
                Err(Broken::Network(failure)) if attempt == ATTEMPTS => {
                    // What was good yesterday is still good if it cannot be asked for today.
                    return match self.cache.known(&url) {
                        Some(known) => {
                            tracing::warn!(
                                url,
                                error = failure.message,
                                "source not reachable, using the cached file"
                            );
                            Ok(Some(known))
                        }
                        None => Err(failure),
                    };
                }
                Err(Broken::Network(failure)) => {
                    tracing::debug!(url, attempt, error = failure.message, "download interrupted");
                    tokio::time::sleep(backoff(attempt) / 4).await;
                    attempt += 1;
                }
            }
        }
    }

    async fn attempt(&self, url: &str, name: &str) -> Result<Option<UrlRecord>, Broken> {
        let known = self.cache.known(url);
        let (partial, validator_path) = self.cache.partial(url).map_err(|e| disk(&e))?;
        let arrived = tokio::fs::metadata(&partial).await.map_or(0, |m| m.len());
        let validator = tokio::fs::read_to_string(&validator_path).await.ok().filter(|v| !v.is_empty());
        let mut request = self.client.get(url);
        let mut resume = false;
        if let Some(tag) = known.as_ref().and_then(|k| k.validator.clone()) {
            request = request.header(IF_NONE_MATCH, tag);
        } else if let Some(validator) = &validator
            && arrived > 0
        {
            resume = true;
            request = request.header(RANGE, format!("bytes={arrived}-")).header(IF_RANGE, validator);
        }
        let response = request.send().await.map_err(|e| network(url, &e))?;
        let start = match response.status() {
            StatusCode::NOT_MODIFIED if known.is_some() => return Ok(known),
            StatusCode::OK => 0,
            StatusCode::PARTIAL_CONTENT if resume && range_start(&response) == Some(arrived) => arrived,
            StatusCode::RANGE_NOT_SATISFIABLE if resume => {
                let _ = tokio::fs::remove_file(&partial).await;
                return Err(Broken::Network(Failure::new(
                    FailureReason::SourceUnavailable,
                    format!("`{url}` changed during the download"),
                )));
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => return Ok(None),
            status => return Err(refused(url, status)),
        };
        self.receive(url, name, response, start, &partial, &validator_path).await.map(Some)
    }

    async fn receive(
        &self,
        url: &str,
        name: &str,
        response: Response,
        start: u64,
        partial: &Path,
        validator_path: &Path,
    ) -> Result<UrlRecord, Broken> {
        let header = |name| response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let validator = header(ETAG).filter(|tag| !tag.starts_with("W/")).or_else(|| header(LAST_MODIFIED));
        let rest = header(CONTENT_LENGTH).and_then(|l| l.parse::<u64>().ok());
        let expected = rest.map(|rest| start + rest);
        let most = if name.ends_with(".safetensors") { u64::MAX } else { MAX_JSON_BYTES };
        if expected.is_some_and(|bytes| bytes > most) {
            return Err(Broken::Final(too_large(url, most)));
        }
        self.cache.make_room(rest.unwrap_or(0)).map_err(|e| {
            Broken::Final(Failure::new(FailureReason::DoesNotFit, format!("failed to fetch `{url}`: {e}")))
        })?;
        let mut hasher = Sha256::new();
        let mut file = if start == 0 {
            tokio::fs::write(validator_path, validator.clone().unwrap_or_default())
                .await
                .map_err(|e| disk(&e))?;
            tokio::fs::File::create(partial).await.map_err(|e| disk(&e))?
        } else {
            let mut file = tokio::fs::File::open(partial).await.map_err(|e| disk(&e))?;
            let mut chunk = vec![0; 1 << 20];
            loop {
                match file.read(&mut chunk).await.map_err(|e| disk(&e))? {
                    0 => break,
                    n => hasher.update(&chunk[..n]),
                }
            }
            tokio::fs::OpenOptions::new().append(true).open(partial).await.map_err(|e| disk(&e))?
        };
        let mut size = start;
        let mut body = response.bytes_stream();
        while let Some(chunk) = body.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    // What has arrived is the start of the next attempt.
                    file.flush().await.map_err(|e| disk(&e))?;
                    return Err(network(url, &error));
                }
            };
            size += chunk.len() as u64;
            if size > most {
                return Err(Broken::Final(too_large(url, most)));
            }
            hasher.update(&chunk);
            file.write_all(&chunk).await.map_err(|e| disk(&e))?;
        }
        file.flush().await.map_err(|e| disk(&e))?;
        drop(file);
        if expected.is_some_and(|expected| expected != size) {
            let message = format!("`{url}` ended after {size} bytes of {}", expected.unwrap_or_default());
            return Err(Broken::Network(Failure::new(FailureReason::SourceUnavailable, message)));
        }
        let record = UrlRecord { url: url.into(), sha256: hex::encode(hasher.finalize()), size, validator };
        self.cache.keep(partial, &record).map_err(|e| disk(&e))?;
        let _ = tokio::fs::remove_file(validator_path).await;
        if let Ok(identity) = FileIdentity::at(&self.cache.blob(&record.sha256)) {
            self.hasher.remember(identity, record.sha256.clone());
        }
        tracing::debug!(url, size, resumed_at = start, "fetched");
        Ok(record)
    }
}

enum Broken {
    /// Trying again at once may help.
    Network(Failure),
    /// It does not.
    Final(Failure),
}

fn range_start(response: &Response) -> Option<u64> {
    let range = response.headers().get(CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn network(url: &str, error: &reqwest::Error) -> Broken {
    let message = format!("failed to fetch `{url}`: {}", chain(error));
    Broken::Network(Failure::new(FailureReason::SourceUnavailable, message))
}

fn refused(url: &str, status: StatusCode) -> Broken {
    let message = format!("`{url}` answered {status}");
    match status {
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
            Broken::Final(Failure::new(FailureReason::Unauthorized, message))
        }
        s if s.is_server_error() || s == StatusCode::TOO_MANY_REQUESTS => {
            Broken::Network(Failure::new(FailureReason::SourceUnavailable, message))
        }
        _ => Broken::Final(Failure::new(FailureReason::SourceUnavailable, message)),
    }
}

fn too_large(url: &str, most: u64) -> Failure {
    Failure::new(FailureReason::Malformed, format!("`{url}` is larger than {most} bytes"))
}

fn disk(error: &std::io::Error) -> Broken {
    let mut failure = io_failure(error, "failed to write to the cache folder");
    failure.reason = FailureReason::Internal;
    Broken::Final(failure)
}
