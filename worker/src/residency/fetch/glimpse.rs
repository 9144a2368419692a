//! A look at a file that is not fetched: its length, its name, and its header. That is enough to know whether a lens can be
//! served, and costs no more however large the lens is.

use reqwest::StatusCode;
use reqwest::header::RANGE;
use tokio::time::Instant;
use turret_crds::condition::FailureReason;

use super::ask::{Reply, conditions, failed, length, length_by_range, range_start, refused, set};
use super::receive::{Pace, no_room};
use super::{Broken, Content, Fetcher, PROGRESS_BYTES, Wanted, persist};
use crate::model::tensor_file::head_bytes;
use crate::residency::cache::{Glimpse, Readers};
use crate::residency::failure::{Failure, disk_failure};
use crate::residency::resolve::on_loader_thread;

/// Bytes that are asked for at first: the headers of most lenses are shorter, and those of others take one more request.
const FIRST_BYTES: u64 = 64 << 10;

/// What comes of a look.
enum Look {
    /// The file is the one that was seen before.
    Same,
    /// What it is.
    At(Glimpse),
    /// Its header ends after so many bytes, and less has come.
    Short(u64),
    /// Too little is told of it.
    Unfit,
}

impl Fetcher {
    /// A look at a safetensors file. `None` when it is to be had whole: it is here already, its server tells too little of it,
    /// or does not have it.
    pub async fn glimpse(&self, wanted: &Wanted<'_>) -> Result<Option<Glimpse>, Failure> {
        self.in_turn(&wanted.key, self.look(wanted)).await
    }

    async fn look(&self, wanted: &Wanted<'_>) -> Result<Option<Glimpse>, Failure> {
        let key = &wanted.key;
        if self.known(key).await?.is_some() {
            return Ok(None);
        }
        let seen = self.seen(key).await?;
        let tag = seen.as_ref().and_then(|seen| seen.validator.as_deref());
        let looked = persist(key, || self.look_once(wanted, tag)).await;
        match (looked, seen) {
            (Ok(Look::At(mut glimpse)), seen) => {
                // Those who were told the same before may be told that as well.
                if let Some(seen) = seen.filter(|seen| seen.is_of(&glimpse)) {
                    glimpse.readers = seen.readers;
                    glimpse.readers.admit(wanted.token);
                }
                self.note_glimpse(glimpse).await.map(Some)
            }
            (Ok(Look::Same), Some(mut seen)) => match seen.readers.admit(wanted.token) {
                true => self.note_glimpse(seen).await.map(Some),
                false => Ok(Some(seen)),
            },
            (Ok(_), _) => Ok(None),
            (Err(Broken::Final(failure)), seen) => {
                if let Some(mut seen) = seen
                    && failure.reason == FailureReason::Unauthorized
                    && seen.readers.expel(wanted.token)
                    && let Err(error) = self.note_glimpse(seen).await
                {
                    tracing::warn!(file = key, %error, "failed to note who may not see a file any more");
                }
                Err(failure)
            }
            // What was seen yesterday still counts if it cannot be asked for today, for those who were told.
            (Err(Broken::Network { failure, .. }), seen) => {
                let seen = seen.filter(|seen| seen.readers.has(wanted.token));
                let seen = seen.ok_or_else(|| failure.clone())?;
                tracing::warn!(
                    file = key,
                    error = failure.message,
                    "source not reachable, using what was seen"
                );
                Ok(Some(seen))
            }
        }
    }

    async fn seen(&self, key: &str) -> Result<Option<Glimpse>, Failure> {
        let (cache, key) = (self.cache.clone(), key.to_owned());
        on_loader_thread(move || Ok(cache.glimpse(&key))).await
    }

    async fn note_glimpse(&self, glimpse: Glimpse) -> Result<Glimpse, Failure> {
        let cache = self.cache.clone();
        on_loader_thread(move || {
            cache.note_glimpse(&glimpse).map_err(|e| disk_failure(&e))?;
            Ok(glimpse)
        })
        .await
    }

    async fn look_once(&self, wanted: &Wanted<'_>, tag: Option<&str>) -> Result<Look, Broken> {
        match self.look_at(wanted, tag, FIRST_BYTES).await? {
            // From its start again: what two answers say may not be of one file.
            Look::Short(needed) => self.look_at(wanted, tag, needed).await,
            look => Ok(look),
        }
    }

    /// Asks for the first bytes of a file. `tag` is what it was known by before.
    async fn look_at(&self, wanted: &Wanted<'_>, tag: Option<&str>, bytes: u64) -> Result<Look, Broken> {
        let mut headers = conditions(wanted.content, tag, None, 0);
        set(&mut headers, RANGE, &format!("bytes=0-{}", bytes - 1));
        let mut reply = self.get(wanted, tag, headers).await?;
        reply.check_commit(wanted)?;
        let status = reply.response.status();
        if tag.is_some_and(|tag| status == StatusCode::NOT_MODIFIED || reply.names(tag)) {
            return Ok(Look::Same);
        }
        let length = match status {
            StatusCode::PARTIAL_CONTENT if range_start(&reply.response) == Some(0) => {
                length_by_range(&reply.response)
            }
            // All of it comes, of which only the start is read.
            StatusCode::OK => length(&reply.response, 0),
            StatusCode::PARTIAL_CONTENT
            | StatusCode::RANGE_NOT_SATISFIABLE
            | StatusCode::NOT_FOUND
            | StatusCode::GONE => return Ok(Look::Unfit),
            _ => return Err(refused(wanted, &reply)),
        };
        let sha256 = reply.linked.sha256().map(str::to_ascii_lowercase);
        // What git keeps is small, and its name is of another kind.
        if sha256.is_none() && wanted.content != Content::Changing {
            return Ok(Look::Unfit);
        }
        let Some(size) = reply.agreed_length(&wanted.key, length)? else { return Ok(Look::Unfit) };
        self.cache.fits_alone(size, wanted.beside).map_err(|error| no_room(&wanted.key, &error))?;
        let validator = reply.validator(wanted.content);
        let (head, needed) = read_head(&wanted.key, &mut reply, size).await?;
        if (head.len() as u64) < needed {
            return match status {
                StatusCode::PARTIAL_CONTENT if bytes < needed => Ok(Look::Short(needed)),
                _ => Err(Broken::network(format!("`{}` ended within its header", wanted.key))),
            };
        }
        let (url, readers) = (wanted.key.clone(), Readers::of(wanted.token));
        Ok(Look::At(Glimpse { url, sha256, size, validator, readers, head }))
    }
}

/// The bytes of a file before its first tensor, as far as they come, and how many these are.
async fn read_head(key: &str, reply: &mut Reply, size: u64) -> Result<(Vec<u8>, u64), Broken> {
    let mut head = Vec::new();
    let mut pace = Pace::begin(Instant::now());
    loop {
        let needed = head_bytes(&head, size);
        if head.len() as u64 >= needed {
            head.truncate(needed as usize);
            return Ok((head, needed));
        }
        let Some(chunk) = reply.response.chunk().await.map_err(|e| failed(key, e))? else {
            return Ok((head, needed));
        };
        head.extend_from_slice(&chunk);
        if !pace.keeps_up(chunk.len() as u64, Instant::now()) {
            return Err(Broken::network(format!(
                "`{key}` came at less than {PROGRESS_BYTES} bytes a minute"
            )));
        }
    }
}
