//! A worker given on the command line: pure.

use std::str::FromStr;

use http::Uri;

/// A worker without a cluster: where it takes requests, and where it reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StaticWorker {
    /// Base URL of its data port, without a trailing slash.
    pub data_url: String,
    /// Base URL of its control port, without a trailing slash.
    pub control_url: String,
}

/// A worker that cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidWorker {
    /// Not a URL of the kind that is needed.
    #[error("`{0}` is not a URL like http://127.0.0.1:8080 (plain http, no path)")]
    Url(String),
    /// There is no port after this one.
    #[error("`{0}` has no next port for the control port; give it as URL,CONTROL_URL")]
    NoNextPort(String),
}

impl FromStr for StaticWorker {
    type Err = InvalidWorker;

    /// Reads `URL[,CONTROL_URL]`. Without the second the control port is the port after the first's, as
    /// 8081 is after 8080.
    fn from_str(text: &str) -> Result<Self, InvalidWorker> {
        let (data, control) = match text.split_once(',') {
            Some((data, control)) => (data, Some(control)),
            None => (text, None),
        };
        let (host, port) = host_and_port(data)?;
        let control_url = match control {
            Some(control) => {
                let (host, port) = host_and_port(control)?;
                format!("http://{host}:{port}")
            }
            None => {
                let next = port.checked_add(1).ok_or_else(|| InvalidWorker::NoNextPort(data.into()))?;
                format!("http://{host}:{next}")
            }
        };
        Ok(Self { data_url: format!("http://{host}:{port}"), control_url })
    }
}

fn host_and_port(url: &str) -> Result<(String, u16), InvalidWorker> {
    let invalid = || InvalidWorker::Url(url.to_owned());
    let uri: Uri = url.trim().parse().map_err(|_| invalid())?;
    let authority = uri.authority().filter(|a| !a.as_str().contains('@')).ok_or_else(invalid)?;
    let is_plain =
        uri.scheme_str() == Some("http") && matches!(uri.path(), "" | "/") && uri.query().is_none();
    if !is_plain || authority.host().is_empty() {
        return Err(invalid());
    }
    Ok((authority.host().to_owned(), authority.port_u16().unwrap_or(80)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_one_url_or_two() {
        for (text, data, control) in [
            ("http://127.0.0.1:8080", "http://127.0.0.1:8080", "http://127.0.0.1:8081"),
            ("http://w:9000/,http://w:9100/", "http://w:9000", "http://w:9100"),
            ("http://w", "http://w:80", "http://w:81"),
            ("http://[::1]:8080", "http://[::1]:8080", "http://[::1]:8081"),
        ] {
            let worker: StaticWorker = text.parse().unwrap();
            assert_eq!((worker.data_url.as_str(), worker.control_url.as_str()), (data, control), "{text}");
        }
    }

    #[test]
    fn what_is_no_worker_is_said() {
        for text in [
            "",
            "127.0.0.1:8080",
            "https://w:8080",
            "http://w:8080/v1",
            "http://u@w:1",
            "http://w:1,ftp://w:2",
        ] {
            assert!(matches!(text.parse::<StaticWorker>(), Err(InvalidWorker::Url(_))), "{text}");
        }
        assert!(matches!("http://w:65535".parse::<StaticWorker>(), Err(InvalidWorker::NoNextPort(_))));
    }
}
