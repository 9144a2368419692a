//! From which hosts sources may be fetched, as operator and worker are told: `hub,public,*.example.org,10.1.0.0/16`.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// What is allowed where nobody says otherwise.
pub const DEFAULT_SOURCE_HOSTS: &str = "hub,public";

/// One entry of the list of allowed hosts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostPattern {
    /// `hub`: the endpoint of the hub, and the hosts on which it stores files.
    Hub,
    /// `public`: every name that leads to public addresses only.
    Public,
    /// A host by its name, wherever that leads.
    Name(String),
    /// `*.example.org`: every name below `example.org`, wherever that leads.
    Below(String),
    /// Addresses: `10.1.0.0/16`, `192.0.2.7`.
    Network(IpNet),
}

/// An entry that names no host.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` names no host; write `hub`, `public`, a name (models.example.org), names below one (*.example.org), or \
     an address or network (10.1.0.0/16), without scheme and port"
)]
pub struct InvalidPattern(String);

impl HostPattern {
    /// Whether a name is meant by name.
    pub fn names(&self, host: &str) -> bool {
        match self {
            Self::Name(name) => host.eq_ignore_ascii_case(name),
            Self::Below(domain) => is_below(host, domain),
            Self::Hub | Self::Public | Self::Network(_) => false,
        }
    }

    /// Whether an address is meant by its number.
    pub fn holds(&self, address: IpAddr) -> bool {
        matches!(self, Self::Network(network) if network.contains(&address.to_canonical()))
    }
}

/// Whether a host's name ends with `.DOMAIN`.
pub fn is_below(host: &str, domain: &str) -> bool {
    let start = host.len().checked_sub(domain.len() + 1).filter(|start| *start > 0);
    start.is_some_and(|start| {
        host.as_bytes()[start] == b'.' && host.as_bytes()[start + 1..].eq_ignore_ascii_case(domain.as_bytes())
    })
}

impl FromStr for HostPattern {
    type Err = InvalidPattern;

    fn from_str(text: &str) -> Result<Self, InvalidPattern> {
        let text = text.trim();
        match text {
            "hub" => return Ok(Self::Hub),
            "public" => return Ok(Self::Public),
            _ => {}
        }
        if let Ok(network) = text.parse::<IpNet>() {
            return Ok(Self::Network(network.trunc()));
        }
        if let Ok(address) = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            return Ok(Self::Network(address.into()));
        }
        let (below, name) = match text.strip_prefix("*.") {
            Some(domain) => (true, domain),
            None => (false, text),
        };
        let label = |label: &str| {
            !label.is_empty() && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
        };
        // A name of digits alone is an address that somebody spelled oddly.
        let is_number = name.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        if name.len() > 253 || is_number || !name.split('.').all(label) {
            return Err(InvalidPattern(text.into()));
        }
        let name = name.to_ascii_lowercase();
        Ok(if below { Self::Below(name) } else { Self::Name(name) })
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hub => f.write_str("hub"),
            Self::Public => f.write_str("public"),
            Self::Name(name) => f.write_str(name),
            Self::Below(domain) => write!(f, "*.{domain}"),
            Self::Network(network) => write!(f, "{network}"),
        }
    }
}

/// Patterns as one value of a command line.
pub fn join(patterns: &[HostPattern]) -> String {
    let texts: Vec<String> = patterns.iter().map(ToString::to_string).collect();
    texts.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> HostPattern {
        text.parse().unwrap()
    }

    #[test]
    fn a_pattern_is_read_and_written() {
        for text in ["hub", "public", "models.example.org", "*.example.org", "10.1.0.0/16", "192.0.2.7/32"] {
            assert_eq!(read(text).to_string(), text);
        }
        assert_eq!(read("Models.Example.org"), HostPattern::Name("models.example.org".into()));
        assert_eq!(read("[::1]").to_string(), "::1/128");
        let all: Vec<HostPattern> = DEFAULT_SOURCE_HOSTS.split(',').map(read).collect();
        assert_eq!(join(&all), DEFAULT_SOURCE_HOSTS);
    }

    #[test]
    fn what_names_no_host_is_refused() {
        for text in
            ["", "*", "*.", "https://a", "a:80", "a b", "a..b", "10.0.0.0/99", "0x7f.1/8", "127.1", "é"]
        {
            assert!(text.parse::<HostPattern>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_are_compared_by_labels() {
        assert!(read("a.example.org").names("A.example.ORG"));
        assert!(!read("a.example.org").names("b.a.example.org"));
        assert!(read("*.example.org").names("b.a.example.org"));
        for other in ["example.org", "badexample.org", ".example.org", "example.org.evil.net"] {
            assert!(!read("*.example.org").names(other), "{other}");
        }
        assert!(!read("public").names("public") && !read("hub").names("hub"));
    }

    #[test]
    fn addresses_are_compared_as_numbers() {
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(read("10.1.0.0/16").holds(address("10.1.255.1")));
        assert!(read("10.1.0.0/16").holds(address("::ffff:10.1.2.3")), "the same address, spelled as IPv6");
        assert!(!read("10.1.0.0/16").holds(address("10.2.0.1")));
        assert!(!read("public").holds(address("10.1.2.3")));
    }
}
