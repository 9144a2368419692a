//! What the gateway reads of a request before it goes on: its namespace, its body, its `model`, and who asks.

use std::{sync::Arc, time::Duration};

use axum::{
    body::Body,
    extract::{FromRequestParts, RawPathParams},
};
use bytes::Bytes;
use http::{HeaderMap, header, request::Parts};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use turret_crds::alias::Asker;

use super::{App, error::ApiError};
use crate::gateway::headers::NAMESPACE_HEADER;

/// How long a client may take to send its body.
const BODY_TIME: Duration = Duration::from_secs(60);

/// A request that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// The body is too long.
    #[error("the body is longer than the {limit} bytes this gateway takes (--max-body-bytes)")]
    TooLarge {
        /// The limit.
        limit: usize,
    },
    /// The body came too slowly.
    #[error("the body did not arrive within {} s", BODY_TIME.as_secs())]
    TooSlow,
    /// The connection broke while the body came.
    #[error("the body did not arrive as a whole: {0}")]
    Interrupted(String),
    /// The body is JSON, but no object.
    #[error("the body must be a JSON object")]
    NotAnObject,
    /// The body is no JSON, or its `model` no string.
    #[error("the body cannot be read as JSON: {0}")]
    NotJson(serde_json::Error),
    /// The bodies of all requests together take too much memory.
    #[error("too many large requests wait already; send it again later")]
    Crowded,
    /// A namespace that cannot exist.
    #[error("`{0}` is not the name of a namespace")]
    Namespace(String),
    /// The path says one namespace and the header another.
    #[error(
        "the path names the namespace `{path}` and the header {NAMESPACE_HEADER} `{header}`; send one of them"
    )]
    TwoNamespaces {
        /// In the path.
        path: String,
        /// In the header.
        header: String,
    },
}

/// The namespace a request names: by its path, its header, or `--default-namespace`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedNamespace(pub Option<String>);

impl FromRequestParts<Arc<App>> for NamedNamespace {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, ApiError> {
        let params = RawPathParams::from_request_parts(parts, app).await.ok();
        let in_path = params.iter().flatten().find(|(name, _)| *name == "namespace").map(|(_, value)| value);
        Ok(Self(named_namespace(in_path, &parts.headers, app.default_namespace.as_deref())?))
    }
}

fn named_namespace(
    in_path: Option<&str>,
    headers: &HeaderMap,
    default: Option<&str>,
) -> Result<Option<String>, RequestError> {
    let in_header = headers
        .get(NAMESPACE_HEADER)
        .map(|value| String::from_utf8_lossy(value.as_bytes()).trim().to_owned())
        .filter(|value| !value.is_empty());
    let named = match (in_path, in_header) {
        (Some(path), Some(header)) if path != header => {
            return Err(RequestError::TwoNamespaces { path: path.to_owned(), header });
        }
        (Some(path), _) => path.to_owned(),
        (None, Some(header)) => header,
        (None, None) => return Ok(default.map(str::to_owned)),
    };
    let is_label = (1..=63).contains(&named.len())
        && named.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if is_label { Ok(Some(named)) } else { Err(RequestError::Namespace(named)) }
}

/// A body in memory, and its share of the memory for bodies.
pub struct ReadBody {
    /// The bytes, as they came.
    pub bytes: Bytes,
    /// Given back when the request is done.
    pub share: OwnedSemaphorePermit,
}

/// Reads a body of at most `limit` bytes. `memory` counts KiB for all bodies together.
pub async fn read_body(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    memory: &Arc<Semaphore>,
) -> Result<ReadBody, RequestError> {
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > limit) {
        return Err(RequestError::TooLarge { limit });
    }
    let kib = u32::try_from(declared.unwrap_or(limit).div_ceil(1024)).unwrap_or(u32::MAX);
    let share = memory.clone().try_acquire_many_owned(kib).map_err(|_| RequestError::Crowded)?;
    let read = tokio::time::timeout(BODY_TIME, Limited::new(body, limit).collect());
    let bytes = match read.await {
        Err(_) => return Err(RequestError::TooSlow),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(RequestError::TooLarge { limit }),
        Ok(Err(error)) => return Err(RequestError::Interrupted(error.to_string())),
        Ok(Ok(body)) => body.to_bytes(),
    };
    Ok(ReadBody { bytes, share })
}

/// What a body says of where it is to go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    /// Its `model`.
    pub model: Option<String>,
    /// Who asks, if it says so.
    pub asker: Option<Asker>,
}

/// Reads what a body says of where it is to go. The rest is the worker's to judge.
pub fn probe(body: &[u8]) -> Result<Probed, RequestError> {
    // Of the asker's fields, [`turret_crds::alias::ASKER_FIELDS`], whatever is no text says nothing.
    #[derive(Deserialize)]
    struct Probe {
        #[serde(default)]
        model: Option<String>,
        #[serde(default)]
        user: Value,
        #[serde(default)]
        safety_identifier: Value,
        #[serde(default)]
        prompt_cache_key: Value,
    }
    // A struct can also be read from an array, which is not what is meant here.
    if body
        .trim_ascii_start()
        .first()
        .is_some_and(|b| matches!(b, b'[' | b'"' | b'0'..=b'9' | b'-' | b't' | b'f' | b'n'))
    {
        return Err(RequestError::NotAnObject);
    }
    let probe: Probe = serde_json::from_slice(body).map_err(RequestError::NotJson)?;
    let names = [&probe.user, &probe.safety_identifier, &probe.prompt_cache_key];
    let name = names.into_iter().filter_map(Value::as_str).find(|name| !name.is_empty());
    Ok(Probed { asker: name.map(Asker::called), model: probe.model.filter(|name| !name.is_empty()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_read_and_nothing_else_is_judged() {
        let model_of = |body: &[u8]| probe(body).map(|probed| probed.model);
        assert_eq!(
            model_of(br#" {"model": "a:b", "x": [1, {"model": 2}]}"#).unwrap().as_deref(),
            Some("a:b")
        );
        assert_eq!(model_of(br#"{"model": null}"#).unwrap(), None);
        assert_eq!(model_of(br#"{"model": ""}"#).unwrap(), None);
        assert_eq!(model_of(b"{}").unwrap(), None);
        for bad in [&b"[\"a\"]"[..], b"\"a\"", b"7", b"null"] {
            assert!(matches!(model_of(bad), Err(RequestError::NotAnObject)), "{bad:?}");
        }
        for bad in [&b""[..], b"{", br#"{"model": 3}"#, br#"{"model": "a", "model": "b"}"#, b"\xff\xfe"] {
            assert!(matches!(model_of(bad), Err(RequestError::NotJson(_))), "{bad:?}");
        }
    }

    #[test]
    fn who_asks_is_the_first_field_that_says_so() {
        let asker_of = |body: &str| probe(body.as_bytes()).unwrap().asker;
        let ann = Some(Asker::called("ann"));
        for body in [
            r#"{"user": "ann", "safety_identifier": "bob"}"#,
            r#"{"safety_identifier": "ann", "prompt_cache_key": "bob", "user": null}"#,
            r#"{"prompt_cache_key": "ann", "user": "", "safety_identifier": 7}"#,
        ] {
            assert_eq!(asker_of(body), ann, "{body}");
        }
        assert_eq!(asker_of(r#"{"user": ["ann"]}"#), None);
    }

    #[test]
    fn the_namespace_is_said_once() {
        let mut headers = HeaderMap::new();
        let named = |path, headers: &HeaderMap| named_namespace(path, headers, Some("home"));
        assert_eq!(named(None, &headers).unwrap().as_deref(), Some("home"));
        assert_eq!(named(Some("lab"), &headers).unwrap().as_deref(), Some("lab"));
        headers.insert(NAMESPACE_HEADER, "prod".parse().unwrap());
        assert_eq!(named(None, &headers).unwrap().as_deref(), Some("prod"));
        assert_eq!(named(Some("prod"), &headers).unwrap().as_deref(), Some("prod"));
        assert!(matches!(named(Some("lab"), &headers), Err(RequestError::TwoNamespaces { .. })));
        headers.insert(NAMESPACE_HEADER, "No Namespace".parse().unwrap());
        assert!(matches!(named(None, &headers), Err(RequestError::Namespace(_))));
    }
}
