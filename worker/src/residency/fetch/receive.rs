//! Receiving a file: into the room that was made for it, hashed while it is written, taken when it is what it should be.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use reqwest::StatusCode;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::oneshot;
use tokio::time::Instant;
use turret_crds::condition::FailureReason;

use super::ask::{Reply, failed, length};
use super::{Broken, Fetcher, PROGRESS_BYTES, Wanted};
use crate::residency::Message;
use crate::residency::cache::{NoRoom, Partial, Readers, UrlRecord};
use crate::residency::content::Hashes;
use crate::residency::failure::{Failure, disk_failure};
use crate::residency::resolve::on_loader_thread;

/// A server that brings less than [`PROGRESS_BYTES`] in this time is as good as silent. It must not keep others waiting.
const PACE: Duration = Duration::from_secs(60);
/// Room is made in such steps for a file whose length its server does not tell.
const STEP_BYTES: u64 = 64 << 20;
/// A JSON file of a model is never larger.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// How far a download came, and where.
pub(super) struct Arrival {
    pub(super) partial: Arc<Partial>,
    /// Bytes that are there.
    pub(super) start: u64,
}

impl Fetcher {
    /// Writes what comes behind what is there, and takes the file when it is what it should be.
    pub(super) async fn receive(
        &self,
        wanted: &Wanted<'_>,
        reply: Reply,
        arrival: &Arrival,
        validator: Option<String>,
    ) -> Result<UrlRecord, Broken> {
        let (key, start) = (&wanted.key, arrival.start);
        let expected = reply.agreed_length(key, length(&reply.response, start))?;
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

    /// Makes room for all of a file. Where there is none, what can come again leaves for it.
    async fn make_room(&self, wanted: &Wanted<'_>, arrival: &Arrival, needed: u64) -> Result<(), Broken> {
        loop {
            let (partial, beside) = (arrival.partial.clone(), wanted.beside);
            let made = on_loader_thread(move || Ok(partial.make_room(needed, beside)));
            let Err(error) = made.await.map_err(Broken::Final)? else { return Ok(()) };
            if let NoRoom::Now { needed, budget, used } = error
                && self.let_leave(used.saturating_add(needed).saturating_sub(budget)).await > 0
            {
                continue;
            }
            if let NoRoom::Alone { .. } = error {
                // What can never be whole takes nobody's room.
                arrival.discard().await;
            }
            return Err(no_room(&wanted.key, &error));
        }
    }

    /// Has files leave that can be fetched again, at least so many bytes if there are. Tells how many left.
    async fn let_leave(&self, bytes: u64) -> u64 {
        let Some(owner) = &self.owner else { return 0 };
        let (reply, answer) = oneshot::channel();
        let _ = owner.send(Message::MakeWay { bytes, reply });
        answer.await.unwrap_or(0)
    }

    /// Removes from the disk what nobody needs, and after that what can be fetched again. Tells how many bytes.
    async fn free(&self, bytes: u64) -> Result<u64, Failure> {
        loop {
            let cache = self.cache.clone();
            let freed = on_loader_thread(move || cache.free(bytes).map_err(|e| disk_failure(&e))).await?;
            if freed > 0 || self.let_leave(bytes).await == 0 {
                return Ok(freed);
            }
        }
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
        let freed = self.free(missing).await;
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
pub(super) struct Pace {
    since: Instant,
    bytes: u64,
}

impl Pace {
    pub(super) fn begin(now: Instant) -> Self {
        Self { since: now, bytes: 0 }
    }

    pub(super) fn keeps_up(&mut self, bytes: u64, now: Instant) -> bool {
        self.bytes += bytes;
        if now - self.since < PACE {
            return true;
        }
        let enough = self.bytes >= PROGRESS_BYTES;
        *self = Self::begin(now);
        enough
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
    pub(super) async fn discard(&self) {
        let partial = self.partial.clone();
        let _ = tokio::task::spawn_blocking(move || partial.discard()).await;
    }
}

/// Why a file gets no room, as a failure of whoever wants it.
pub(super) fn no_room(key: &str, error: &NoRoom) -> Broken {
    let message = format!("failed to fetch `{key}`: {error}");
    match error {
        NoRoom::Alone { .. } => Broken::last(FailureReason::DoesNotFit, message),
        // Others may leave, and nothing else would have it looked at again.
        NoRoom::Now { .. } => Broken::last(FailureReason::DiskFull, message),
        NoRoom::Io(error) => disk(error),
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
    async fn a_trickle_is_no_progress() {
        let begun = Instant::now();
        let at = |seconds| begun + Duration::from_secs(seconds);
        let mut pace = Pace::begin(begun);
        assert!(pace.keeps_up(1, at(59)));
        assert!(pace.keeps_up(PROGRESS_BYTES, at(60)));
        assert!(pace.keeps_up(1, at(119)));
        assert!(!pace.keeps_up(1, at(120)));
    }
}
