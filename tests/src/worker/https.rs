//! A small HTTPS server over a folder, with a certificate authority made for the occasion, that can break connections off.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::hub::range_of;

/// The server. Ends with the runtime.
pub struct Https {
    /// `https://localhost:PORT`.
    pub url: String,
    /// The authority's certificate, for `SSL_CERT_FILE`.
    pub ca: PathBuf,
    state: Arc<State>,
}

struct State {
    root: PathBuf,
    /// For each path: break the connection after so many bytes, this often.
    breaks: Mutex<BTreeMap<String, (usize, u32)>>,
    /// Status answered instead of the file.
    refuse: Mutex<Option<u16>>,
    /// Bytes a millisecond, at most.
    pace: Mutex<usize>,
    /// Every request.
    seen: Mutex<Vec<Seen>>,
}

/// A request as it came.
struct Seen {
    path: String,
    range: Option<String>,
    authorization: Option<String>,
}

impl Https {
    /// Serves a folder; the authority's certificate is written into `scratch`.
    pub async fn serve(root: &Path, scratch: &Path) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority_key = KeyPair::generate().unwrap();
        let ca = scratch.join("ca.pem");
        std::fs::write(&ca, authority.self_signed(&authority_key).unwrap().pem()).unwrap();
        let issuer = Issuer::new(authority, authority_key);
        let key = KeyPair::generate().unwrap();
        let certificate =
            CertificateParams::new(vec!["localhost".into()]).unwrap().signed_by(&key, &issuer).unwrap();
        let private = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], private)
            .unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("https://localhost:{}", listener.local_addr().unwrap().port());
        let state = Arc::new(State {
            root: root.into(),
            breaks: Mutex::default(),
            refuse: Mutex::default(),
            pace: Mutex::new(usize::MAX),
            seen: Mutex::default(),
        });
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                let (acceptor, state) = (acceptor.clone(), shared.clone());
                tokio::spawn(async move {
                    if let Ok(stream) = acceptor.accept(connection).await {
                        let _ = answer(stream, &state).await;
                    }
                });
            }
        });
        Self { url, ca, state }
    }

    /// Breaks the connection after so many bytes of a path, this often.
    pub fn break_off(&self, path: &str, after: usize, times: u32) {
        self.state.breaks.lock().unwrap().insert(path.into(), (after, times));
    }

    /// Answers every request with a status; `None` serves files again.
    pub fn refuse(&self, status: Option<u16>) {
        *self.state.refuse.lock().unwrap() = status;
    }

    /// Sends no more than so many bytes a millisecond on each connection.
    pub fn pace(&self, bytes: usize) {
        *self.state.pace.lock().unwrap() = bytes;
    }

    /// Ranges that were asked for, of one path, in order.
    pub fn ranges(&self, path: &str) -> Vec<Option<String>> {
        let seen = self.state.seen.lock().unwrap();
        seen.iter().filter(|s| s.path == path).map(|s| s.range.clone()).collect()
    }

    /// What was shown to be let in, with every request for one path, in order.
    pub fn authorizations(&self, path: &str) -> Vec<Option<String>> {
        let seen = self.state.seen.lock().unwrap();
        seen.iter().filter(|s| s.path == path).map(|s| s.authorization.clone()).collect()
    }
}

async fn answer(
    mut stream: tokio_rustls::server::TlsStream<tokio::net::TcpStream>,
    state: &State,
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split_whitespace().nth(1).unwrap_or("/").to_owned();
    let header = |name: &str| {
        let line = head.lines().find(|l| l.to_ascii_lowercase().starts_with(&format!("{name}:")))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let range = header("range");
    let authorization = header("authorization");
    state.seen.lock().unwrap().push(Seen { path: path.clone(), range: range.clone(), authorization });
    let status = |status: u16| {
        format!("HTTP/1.1 {status} Status\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").into_bytes()
    };
    let refused = *state.refuse.lock().unwrap();
    let file = std::fs::read(state.root.join(path.trim_start_matches('/')));
    let reply = match (refused, file) {
        (Some(code), _) => status(code),
        (None, Err(_)) => status(404),
        (None, Ok(content)) => {
            let tag = format!("\"{}\"", hex::encode(&Sha256::digest(&content)[..8]));
            if header("if-none-match").as_deref() == Some(&tag) {
                status(304)
            } else {
                let part = range
                    .filter(|_| header("if-range").is_none_or(|known| known == tag))
                    .and_then(|range| range_of(&range));
                let whole = content.len();
                let (code, from, to) = part.map_or((200, 0, whole), |(from, to)| (206, from, to.min(whole)));
                let mut head = format!("HTTP/1.1 {code} OK\r\nETag: {tag}\r\nConnection: close\r\n");
                if part.is_some() {
                    head += &format!("Content-Range: bytes {from}-{}/{whole}\r\n", to - 1);
                }
                head += &format!("Content-Length: {}\r\n\r\n", to - from);
                let mut reply = head.into_bytes();
                let mut body = &content[from..to];
                let mut breaks = state.breaks.lock().unwrap();
                if let Some((after, times)) = breaks.get_mut(&path)
                    && *times > 0
                {
                    *times -= 1;
                    body = &body[..(*after).min(body.len())];
                }
                reply.extend_from_slice(body);
                reply
            }
        }
    };
    let pace = *state.pace.lock().unwrap();
    for piece in reply.chunks(pace) {
        stream.write_all(piece).await?;
        if pace < reply.len() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    stream.shutdown().await
}
