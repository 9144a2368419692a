//! A Hugging Face hub in miniature, as its clients see it: listings, small files behind a redirect of its own, large ones
//! on another server that takes no token, headers of every kind; and all that can go wrong on the way.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// The one commit of every repository.
pub const COMMIT: &str = "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567";
/// Bytes that are given to the connection at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// The hub. Ends with the runtime, or when it is switched off.
pub struct HubServer {
    /// Its address, for `HF_ENDPOINT`.
    pub endpoint: String,
    world: Arc<World>,
    off: CancellationToken,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Whether it came to where large files are stored.
    pub stored: bool,
    /// Its path.
    pub path: String,
    /// Its `Range`.
    pub range: Option<String>,
    /// Its `Authorization`.
    pub authorization: Option<String>,
    /// Bytes that were sent in answer.
    pub served: usize,
    /// When.
    pub at: Instant,
}

/// What a server does in place of what it should.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Closes the connection after so many bytes.
    Cut(usize),
    /// Answers with a status, and perhaps a `Retry-After`.
    Status(u16, Option<u64>),
}

/// What is not as it should be for as long as it is set.
#[derive(Clone, Debug)]
pub enum Lie {
    /// The first byte is another.
    Content,
    /// The last byte is another.
    End,
    /// The hub says so many bytes.
    Size(usize),
    /// It is stored elsewhere.
    Elsewhere(String),
}

#[derive(Default)]
struct World {
    storage: Mutex<String>,
    repos: Mutex<BTreeMap<String, BTreeMap<String, Bytes>>>,
    /// The token that is asked for.
    token: Mutex<Option<String>>,
    /// Tokens of which one is asked for where it is not for the names of files.
    gate: Mutex<Vec<String>>,
    /// By the end of a path: what happens next.
    faults: Mutex<BTreeMap<String, VecDeque<Fault>>>,
    lies: Mutex<BTreeMap<String, Lie>>,
    /// The end of paths that are answered later, and what they wait for.
    held: Mutex<Option<(String, CancellationToken)>>,
    /// Whether every file is sent whole, whatever part of it was asked for.
    whole_only: AtomicBool,
    seen: Mutex<Vec<Seen>>,
}

impl HubServer {
    /// Starts a hub without repositories, for this machine only.
    pub async fn start() -> Self {
        Self::start_on(Ipv4Addr::LOCALHOST.into()).await
    }

    /// The same at an address of this machine, for whoever reaches that.
    pub async fn start_on(address: IpAddr) -> Self {
        let world = Arc::new(World::default());
        let off = CancellationToken::new();
        let serve = async |router: Router| {
            let listener = TcpListener::bind((address, 0)).await.unwrap();
            let address = format!("http://{}", listener.local_addr().unwrap());
            let off = off.clone();
            tokio::spawn(async move {
                tokio::select! {
                    served = axum::serve(listener, router) => served.unwrap(),
                    () = off.cancelled() => {}
                }
            });
            address
        };
        let endpoint = serve(Router::new().fallback(hub).with_state(world.clone())).await;
        let storage = serve(Router::new().fallback(storage).with_state(world.clone())).await;
        *world.storage.lock().unwrap() = storage;
        Self { endpoint, world, off }
    }

    /// Adds the files of a folder to a repository, below a path in it.
    pub fn add(&self, repo: &str, path: &str, folder: &Path) {
        for entry in std::fs::read_dir(folder).unwrap().flatten().filter(|e| e.path().is_file()) {
            let name = entry.file_name().into_string().unwrap();
            self.put(repo, &format!("{path}{name}"), std::fs::read(entry.path()).unwrap());
        }
    }

    /// Adds a file to a repository.
    pub fn put(&self, repo: &str, path: &str, content: Vec<u8>) {
        lock(&self.world.repos).entry(repo.into()).or_default().insert(path.into(), content.into());
    }

    /// Asks for a token from now on.
    pub fn ask_for(&self, token: &str) {
        *lock(&self.world.token) = Some(token.into());
    }

    /// Lets everybody see which files there are, and only those with one of these tokens have them.
    pub fn gate(&self, tokens: &[&str]) {
        *lock(&self.world.gate) = tokens.iter().map(|token| format!("Bearer {token}")).collect();
    }

    /// The next answers for paths that end so.
    pub fn next(&self, end: &str, faults: impl IntoIterator<Item = Fault>) {
        lock(&self.world.faults).entry(end.into()).or_default().extend(faults);
    }

    /// What is not as it should be for paths that end so; `None` makes it right.
    pub fn lie(&self, end: &str, lie: Option<Lie>) {
        let mut lies = lock(&self.world.lies);
        match lie {
            Some(lie) => lies.insert(end.into(), lie),
            None => lies.remove(end),
        };
    }

    /// Answers nothing for paths that end so before [`Self::release`].
    pub fn hold(&self, end: &str) {
        *lock(&self.world.held) = Some((end.into(), CancellationToken::new()));
    }

    /// Answers what was held.
    pub fn release(&self) {
        if let Some((_, barrier)) = lock(&self.world.held).take() {
            barrier.cancel();
        }
    }

    /// Sends every file whole from now on, whatever part of it is asked for.
    pub fn send_whole(&self) {
        self.world.whole_only.store(true, Ordering::Relaxed);
    }

    /// Requests for paths that end so.
    pub fn seen(&self, end: &str) -> Vec<Seen> {
        lock(&self.world.seen).iter().filter(|s| s.path.ends_with(end)).cloned().collect()
    }

    /// Requests that brought a file's content, or part of it.
    pub fn served(&self, end: &str) -> Vec<Seen> {
        self.seen(end).into_iter().filter(|s| s.served > 0).collect()
    }

    /// Answers nobody any more.
    pub fn switch_off(&self) {
        self.off.cancel();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

impl World {
    /// Notes a request; the number is its place.
    fn note(&self, stored: bool, path: &str, headers: &HeaderMap) -> usize {
        let header = |name| headers.get(name).map(|v| v.to_str().unwrap().to_owned());
        let mut seen = lock(&self.seen);
        seen.push(Seen {
            stored,
            path: path.into(),
            range: header(header::RANGE),
            authorization: header(header::AUTHORIZATION),
            served: 0,
            at: Instant::now(),
        });
        seen.len() - 1
    }

    /// What is to go wrong now. A connection is cut in the middle of content only.
    fn fault(&self, path: &str, is_content: bool) -> Option<Fault> {
        let mut faults = lock(&self.faults);
        let next = faults.iter_mut().find(|(end, _)| path.ends_with(end.as_str())).map(|(_, next)| next)?;
        next.pop_front_if(|fault| is_content || matches!(fault, Fault::Status(..)))
    }

    /// What an answer has to wait for, if it is held.
    fn barrier(&self, path: &str) -> Option<CancellationToken> {
        let held = lock(&self.held);
        held.as_ref().filter(|(end, _)| path.ends_with(end.as_str())).map(|(_, barrier)| barrier.clone())
    }

    fn lie_of(&self, path: &str) -> Option<Lie> {
        lock(&self.lies).iter().find(|(end, _)| path.ends_with(end.as_str())).map(|(_, lie)| lie.clone())
    }

    /// A file's content, or part of it, whole or cut.
    fn content(
        self: &Arc<Self>,
        number: usize,
        path: &str,
        content: &Bytes,
        etag: &str,
        cut: Option<usize>,
    ) -> Response {
        let mut content = content.to_vec();
        match self.lie_of(path) {
            Some(Lie::Content) => content[0] ^= 1,
            Some(Lie::End) => *content.last_mut().unwrap() ^= 1,
            _ => {}
        }
        let asked = lock(&self.seen)[number].range.clone();
        let asked = asked.filter(|_| !self.whole_only.load(Ordering::Relaxed));
        let part = asked.and_then(|range| range_of(&range));
        let whole = content.len();
        let (from, to) = part.map_or((0, whole), |(from, to)| (from, to.min(whole)));
        if from >= whole {
            let headers = [(header::CONTENT_RANGE, format!("bytes */{whole}"))];
            return (StatusCode::RANGE_NOT_SATISFIABLE, headers).into_response();
        }
        let rest = Bytes::from(content).slice(from..to);
        let length = rest.len();
        let end = cut.unwrap_or(length).min(length);
        let world = self.clone();
        let body = async_stream::stream! {
            for at in (0..end).step_by(CHUNK_BYTES) {
                let chunk = rest.slice(at..end.min(at + CHUNK_BYTES));
                lock(&world.seen)[number].served += chunk.len();
                yield Ok(chunk);
                // The connection is to have it before more is asked for.
                tokio::task::yield_now().await;
            }
            if end < length {
                yield Err(std::io::Error::other("cut"));
            }
        };
        let mut answer = Response::builder()
            .header(header::ETAG, etag)
            .header(header::CONTENT_LENGTH, length)
            .header(header::ACCEPT_RANGES, "bytes")
            .header("x-repo-commit", COMMIT);
        if part.is_some() {
            answer = answer
                .status(StatusCode::PARTIAL_CONTENT)
                .header(header::CONTENT_RANGE, format!("bytes {from}-{}/{whole}", to - 1));
        }
        answer.body(Body::from_stream(body)).unwrap()
    }
}

/// The first byte that is asked for, and the one behind the last.
pub(super) fn range_of(range: &str) -> Option<(usize, usize)> {
    let (from, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let behind = if last.is_empty() { usize::MAX } else { last.parse::<usize>().ok()? + 1 };
    Some((from.parse().ok()?, behind))
}

/// A refusal as the hub words it.
fn refusal(status: u16, code: &str, message: &str) -> Response {
    let headers = [("x-error-code", code), ("x-error-message", message), ("x-request-id", "Root=1-0")];
    let body = axum::Json(json!({"error": message}));
    (StatusCode::from_u16(status).unwrap(), headers, body).into_response()
}

fn faulty(status: u16, retry_after: Option<u64>) -> Response {
    let mut response = StatusCode::from_u16(status).unwrap().into_response();
    if let Some(seconds) = retry_after {
        response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    response
}

async fn hub(State(world): State<Arc<World>>, request: Request) -> Result<Response, Infallible> {
    let path = request.uri().path().to_owned();
    let number = world.note(false, &path, request.headers());
    if let Some(barrier) = world.barrier(&path) {
        barrier.cancelled().await;
    }
    let cut = match world.fault(&path, path.starts_with("/api/resolve-cache/")) {
        Some(Fault::Status(status, wish)) => return Ok(faulty(status, wish)),
        Some(Fault::Cut(bytes)) => Some(bytes),
        None => None,
    };
    let shown = lock(&world.seen)[number].authorization.clone();
    let wanted = lock(&world.token).as_ref().map(|token| format!("Bearer {token}"));
    if wanted.is_some() && shown != wanted {
        return Ok(refusal(401, "GatedRepo", "Access to this model is restricted. Please log in."));
    }
    let words: Vec<&str> = path.trim_matches('/').split('/').collect();
    let (repo, rest, is_listing, is_moved) = match words.as_slice() {
        ["api", "models", org, repo, "revision", rest @ ..] => (format!("{org}/{repo}"), rest, true, false),
        ["api", "resolve-cache", "models", org, repo, rest @ ..] => {
            (format!("{org}/{repo}"), rest, false, true)
        }
        [org, repo, "resolve", rest @ ..] => (format!("{org}/{repo}"), rest, false, false),
        _ => return Ok(refusal(404, "EntryNotFound", "There is nothing here")),
    };
    let Some(files) = lock(&world.repos).get(&repo).cloned() else {
        return Ok(refusal(404, "RepoNotFound", "Repository not found"));
    };
    if rest.first() != Some(&COMMIT) {
        return Ok(refusal(404, "RevisionNotFound", "Invalid rev id"));
    }
    let gate = lock(&world.gate).clone();
    let is_open = is_listing || gate.is_empty() || shown.is_some_and(|shown| gate.contains(&shown));
    if !is_open {
        return Ok(refusal(403, "GatedRepo", "Access to this model is restricted."));
    }
    if is_listing {
        let siblings: Vec<_> = files.keys().map(|name| json!({"rfilename": name})).collect();
        let info = json!({"_id": "1", "id": repo, "sha": COMMIT, "private": false, "gated": false, "siblings": siblings});
        return Ok(axum::Json(info).into_response());
    }
    let name = rest[1..].join("/");
    let Some(content) = files.get(&name) else {
        return Ok(refusal(404, "EntryNotFound", "Entry not found"));
    };
    let mut response = StatusCode::FOUND.into_response();
    let mut say = |name: &'static str, value: String| {
        response.headers_mut().insert(name, value.parse().unwrap());
    };
    say("x-repo-commit", COMMIT.into());
    if name.ends_with(".safetensors") {
        let sha256 = hex::encode(Sha256::digest(content));
        let lie = world.lie_of(&path);
        let size = if let Some(Lie::Size(size)) = lie { size } else { content.len() };
        let at = match lie {
            Some(Lie::Elsewhere(at)) => at,
            _ => format!("{}/xet/{repo}/{name}?Expires=1&Signature=secret-of-the-url", lock(&world.storage)),
        };
        say("location", at);
        say("x-linked-etag", format!("\"{sha256}\""));
        say("x-linked-size", size.to_string());
        say("x-xet-hash", "f".repeat(64));
        say("x-xet-refresh-route", format!("/api/models/{repo}/xet-read-token/{COMMIT}"));
        say("etag", format!("\"{}\"", "e".repeat(64)));
        return Ok(response);
    }
    if !is_moved {
        say("location", format!("/api/resolve-cache/models/{repo}/{}", rest.join("/")));
        *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
        return Ok(response);
    }
    let mut git = Sha1::new_with_prefix(format!("blob {}\0", content.len()));
    git.update(content);
    let etag = format!("\"{}\"", hex::encode(git.finalize()));
    Ok(world.content(number, &path, content, &etag, cut))
}

async fn storage(State(world): State<Arc<World>>, request: Request) -> Result<Response, Infallible> {
    let path = request.uri().path().to_owned();
    let number = world.note(true, &path, request.headers());
    // As object stores do: the signature in the URL is all they take.
    if request.headers().contains_key(header::AUTHORIZATION) {
        return Ok((StatusCode::BAD_REQUEST, "only one way of authentication is allowed").into_response());
    }
    let cut = match world.fault(&path, true) {
        Some(Fault::Status(status, wish)) => return Ok(faulty(status, wish)),
        Some(Fault::Cut(bytes)) => Some(bytes),
        None => None,
    };
    let words: Vec<&str> = path.trim_matches('/').splitn(4, '/').collect();
    let ["xet", org, repo, name] = words.as_slice() else {
        return Ok(StatusCode::FORBIDDEN.into_response());
    };
    let content =
        lock(&world.repos).get(&format!("{org}/{repo}")).and_then(|files| files.get(*name).cloned());
    match content {
        // The tag of the storage is of another kind.
        Some(content) => Ok(world.content(number, &path, &content, &format!("\"{}\"", "d".repeat(64)), cut)),
        None => Ok(StatusCode::FORBIDDEN.into_response()),
    }
}
