//! From where files may be fetched. What a tenant writes into `source.uri` must not reach what only this pod can: a
//! cloud's metadata service, a node's kubelet, a database next door.
//!
//! Names are judged before a request is sent ([`Hosts::check`], for every redirect again), addresses when the name is
//! looked up for the connection ([`Hosts::connect`]), so a name cannot be public while it is judged and private when it
//! is used. Behind a proxy the proxy looks names up: where they may lead is for its rules to say.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use reqwest::{Client, ClientBuilder, Url};
use turret_crds::host_pattern::{HostPattern, is_below};
use url::Host;

/// The setting that allows hosts.
const SETTING: &str = "--allowed-source-hosts";
/// Redirects that are followed; a hub's take two.
pub const MAX_REDIRECTS: usize = 8;
/// Domains below which the Hugging Face hub, and mirrors of it, store files.
const HUB_STORAGE: [&str; 2] = ["huggingface.co", "hf.co"];

/// Which hosts are allowed.
#[derive(Clone, Debug)]
pub struct Hosts(Arc<Rules>);

#[derive(Debug)]
struct Rules {
    allowed: Vec<HostPattern>,
    endpoint: Url,
    /// Somebody named the endpoint, so it may be anywhere.
    endpoint_given: bool,
    /// Names of the proxies that this process is told to use.
    proxies: Vec<String>,
}

/// How far a host may lead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// It was named.
    Anywhere,
    /// To public addresses, and those that were named.
    Public,
    /// To addresses that were named.
    Listed,
}

/// A host that files may not be fetched from.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Nothing allows it.
    #[error(
        "the host `{0}` is not allowed; an administrator can add it to {SETTING} (the chart's `worker.allowedSourceHosts`)"
    )]
    Host(String),
    /// It leads where it may not.
    #[error(
        "the host `{host}` is not allowed: it leads to {address}, which is not a public address; an administrator can name \
         it in {SETTING} (the chart's `worker.allowedSourceHosts`)"
    )]
    Address {
        /// The host.
        host: String,
        /// Where it leads.
        address: IpAddr,
    },
    /// What is sent could be read and changed on the way.
    #[error("the host `{0}` is not allowed over plain HTTP; use https")]
    Plain(String),
}

/// Why no client can be made.
#[derive(Debug, thiserror::Error)]
#[error("failed to set up the HTTPS client; check the certificates that SSL_CERT_FILE names")]
pub struct ClientError(#[source] reqwest::Error);

impl Hosts {
    /// The rules of a list of patterns. `endpoint` is the hub's; `given` when somebody named it.
    pub fn new(allowed: Vec<HostPattern>, endpoint: Url, given: bool) -> Self {
        Self(Arc::new(Rules { allowed, endpoint, endpoint_given: given, proxies: proxies() }))
    }

    /// Whether a URL may be asked for. Where its name leads is judged when it is connected to.
    pub fn check(&self, url: &Url) -> Result<(), Refused> {
        let rules = &self.0;
        let host = url.host_str().unwrap_or_default().to_owned();
        let allowed = match url.host() {
            Some(Host::Domain(name)) => rules.reach(name).is_some(),
            Some(Host::Ipv4(address)) => rules.allows_literal(address.into()),
            Some(Host::Ipv6(address)) => rules.allows_literal(address.into()),
            None => false,
        };
        if !allowed {
            return Err(Refused::Host(host));
        }
        let is_plain_hub = rules.endpoint.scheme() == "http" && url.host() == rules.endpoint.host();
        match url.scheme() {
            "https" => Ok(()),
            "http" if is_plain_hub => Ok(()),
            _ => Err(Refused::Plain(host)),
        }
    }

    /// A client that connects to what is allowed only, and follows redirects to nothing else.
    pub fn client(&self, redirects: Redirects) -> Result<Client, ClientError> {
        let policy = match redirects {
            Redirects::Returned => Policy::none(),
            Redirects::Followed => {
                let hosts = self.clone();
                Policy::custom(move |attempt| match hosts.check(attempt.url()) {
                    Ok(()) if attempt.previous().len() <= MAX_REDIRECTS => attempt.follow(),
                    Ok(()) => attempt.error("too many redirects"),
                    Err(refused) => attempt.error(refused),
                })
            }
        };
        self.builder().redirect(policy).build().map_err(ClientError)
    }

    fn builder(&self) -> ClientBuilder {
        Client::builder()
            .dns_resolver(Arc::new(self.clone()))
            .connect_timeout(Duration::from_secs(10))
            .read_timeout(Duration::from_secs(60))
            .user_agent(concat!("turret-worker/", env!("CARGO_PKG_VERSION")))
    }

    /// Addresses that a name may be connected to, of those that it has.
    fn connect(&self, name: &str, found: &[IpAddr]) -> Result<Vec<IpAddr>, Refused> {
        let rules = &self.0;
        let refused = |address: Option<&IpAddr>| match address {
            Some(address) => Refused::Address { host: name.into(), address: *address },
            None => Refused::Host(name.into()),
        };
        if rules.is_proxy(name) {
            return Ok(found.to_vec());
        }
        let reach = rules.reach(name).ok_or_else(|| refused(None))?;
        let (allowed, other): (Vec<IpAddr>, Vec<IpAddr>) =
            found.iter().copied().partition(|address| match reach {
                Reach::Anywhere => true,
                Reach::Public => is_public(*address) || rules.holds(*address),
                Reach::Listed => rules.holds(*address),
            });
        // A name that leads to both is used as far as it may be.
        if allowed.is_empty() && !other.is_empty() { Err(refused(other.first())) } else { Ok(allowed) }
    }
}

/// What a client does with a redirect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redirects {
    /// It is the answer.
    Returned,
    /// It is followed where that is allowed.
    Followed,
}

impl Resolve for Hosts {
    fn resolve(&self, name: Name) -> Resolving {
        let hosts = self.clone();
        Box::pin(async move {
            let name = name.as_str();
            let found: Vec<IpAddr> = tokio::net::lookup_host((name, 0)).await?.map(|a| a.ip()).collect();
            let allowed = hosts.connect(name, &found)?;
            Ok(Box::new(allowed.into_iter().map(|address| SocketAddr::new(address, 0))) as Addrs)
        })
    }
}

impl Rules {
    fn reach(&self, name: &str) -> Option<Reach> {
        let name = name.trim_end_matches('.');
        let is_endpoint = self.endpoint.domain().is_some_and(|e| e.eq_ignore_ascii_case(name));
        let hub = self.allowed.contains(&HostPattern::Hub);
        if self.allowed.iter().any(|p| p.names(name)) || (hub && is_endpoint && self.endpoint_given) {
            return Some(Reach::Anywhere);
        }
        // A proxy is to be gone through, not to.
        if self.is_proxy(name) {
            return None;
        }
        let is_storage = || HUB_STORAGE.iter().any(|d| name.eq_ignore_ascii_case(d) || is_below(name, d));
        if self.allowed.contains(&HostPattern::Public) || (hub && (is_endpoint || is_storage())) {
            return Some(Reach::Public);
        }
        self.allowed.iter().any(|p| matches!(p, HostPattern::Network(_))).then_some(Reach::Listed)
    }

    /// An address in a URL was either meant, or is an attempt.
    fn allows_literal(&self, address: IpAddr) -> bool {
        let endpoint = match self.endpoint.host() {
            Some(Host::Ipv4(endpoint)) => Some(IpAddr::from(endpoint)),
            Some(Host::Ipv6(endpoint)) => Some(endpoint.into()),
            _ => None,
        };
        self.holds(address) || (self.allowed.contains(&HostPattern::Hub) && endpoint == Some(address))
    }

    fn holds(&self, address: IpAddr) -> bool {
        self.allowed.iter().any(|pattern| pattern.holds(address))
    }

    fn is_proxy(&self, name: &str) -> bool {
        self.proxies.iter().any(|proxy| proxy.eq_ignore_ascii_case(name))
    }
}

/// Names of the proxies in the variables that the HTTP client reads.
fn proxies() -> Vec<String> {
    ["HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .filter_map(|value| proxy_host(&value))
        .collect()
}

fn proxy_host(value: &str) -> Option<String> {
    let url = match value.contains("://") {
        true => value.to_owned(),
        false => format!("http://{value}"),
    };
    Url::parse(&url).ok()?.host_str().map(str::to_owned)
}

/// Networks of IANA's registries of special-purpose addresses: not for the Internet, or not for one host there.
static SPECIAL: LazyLock<Vec<IpNet>> = LazyLock::new(|| {
    [
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        // Azure's own: a virtual machine's agent gets its certificates and secrets there.
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
    ]
    .iter()
    .map(|network| network.parse().expect("a network"))
    .collect()
});
/// IPv6 addresses of single hosts on the Internet.
static GLOBAL: LazyLock<IpNet> = LazyLock::new(|| "2000::/3".parse().expect("a network"));
/// IPv4 addresses as hosts without IPv4 see them.
static TRANSLATED: LazyLock<IpNet> = LazyLock::new(|| "64:ff9b::/96".parse().expect("a network"));

/// Whether an address is one of a host on the Internet.
fn is_public(address: IpAddr) -> bool {
    let address = match address.to_canonical() {
        IpAddr::V6(v6) if TRANSLATED.contains(&address) => {
            let [.., a, b, c, d] = v6.octets();
            IpAddr::from([a, b, c, d])
        }
        canonical => canonical,
    };
    (address.is_ipv4() || GLOBAL.contains(&address)) && !SPECIAL.iter().any(|n| n.contains(&address))
}

/// The refusal behind an error of the HTTP client, if that is why it failed.
pub fn refusal(error: &reqwest::Error) -> Option<Refused> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(refused) = error.downcast_ref::<Refused>() {
            return Some(refused.clone());
        }
        cause = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts(allowed: &str, endpoint: Option<&str>) -> Hosts {
        let allowed = allowed.split(',').map(|p| p.parse().unwrap()).collect();
        let url = Url::parse(endpoint.unwrap_or("https://huggingface.co")).unwrap();
        Hosts::new(allowed, url, endpoint.is_some())
    }

    fn allows(hosts: &Hosts, url: &str) -> bool {
        hosts.check(&Url::parse(url).unwrap()).is_ok()
    }

    fn leads(hosts: &Hosts, name: &str, found: &[&str]) -> Result<usize, Refused> {
        let found: Vec<IpAddr> = found.iter().map(|a| a.parse().unwrap()).collect();
        hosts.connect(name, &found).map(|allowed| allowed.len())
    }

    #[test]
    fn addresses_that_are_not_on_the_internet_are_not_public() {
        for address in [
            "127.0.0.1",
            "10.0.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "168.63.129.16",
            "100.100.100.200",
            "0.0.0.0",
            "255.255.255.255",
            "224.0.0.1",
            "198.19.0.1",
            "::",
            "::1",
            "fe80::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
            "2001:db8::1",
            "fec0::1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        for address in
            ["1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"]
        {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn by_default_every_name_with_a_public_address_is_allowed_and_no_address() {
        let hosts = hosts("hub,public", None);
        for url in
            ["https://huggingface.co/a", "https://cdn-lfs.hf.co/a", "https://models.example.org:8443/a"]
        {
            assert!(allows(&hosts, url), "{url}");
        }
        for url in [
            "https://127.0.0.1/a",
            "https://1.1.1.1/a",
            "https://[::1]/a",
            "https://2130706433/a",
            "https://0x7f.1/a",
            "http://models.example.org/a",
            "http://huggingface.co/a",
            "ftp://models.example.org/a",
        ] {
            assert!(!allows(&hosts, url), "{url}");
        }
        assert_eq!(leads(&hosts, "models.example.org", &["1.1.1.1"]), Ok(1));
        assert_eq!(leads(&hosts, "models.example.org", &["10.0.0.1", "1.1.1.1"]), Ok(1), "only where it may");
        for address in ["127.0.0.1", "169.254.169.254", "fd00::1"] {
            for name in ["models.example.org", "localhost", "huggingface.co"] {
                let refused = leads(&hosts, name, &[address]).unwrap_err();
                assert_eq!(
                    refused,
                    Refused::Address { host: name.into(), address: address.parse().unwrap() }
                );
                assert!(refused.to_string().contains(SETTING));
            }
        }
    }

    #[test]
    fn what_is_named_may_be_anywhere_and_the_list_is_all_there_is() {
        let hosts = hosts("models.corp,*.lab.corp,10.1.0.0/16", None);
        assert_eq!(leads(&hosts, "models.corp", &["192.168.0.1"]), Ok(1));
        assert_eq!(leads(&hosts, "a.lab.corp", &["192.168.0.1"]), Ok(1));
        assert_eq!(leads(&hosts, "other.corp", &["10.1.2.3"]), Ok(1), "by its address");
        assert!(leads(&hosts, "other.corp", &["10.2.0.1"]).is_err());
        assert!(leads(&hosts, "models.example.org", &["1.1.1.1"]).is_err());
        assert!(allows(&hosts, "https://10.1.2.3/a") && !allows(&hosts, "https://10.2.0.1/a"));
        let only_hub = self::hosts("hub", None);
        assert!(
            allows(&only_hub, "https://huggingface.co/a")
                && allows(&only_hub, "https://cas-bridge.xethub.hf.co/a")
        );
        let refused = only_hub.check(&Url::parse("https://models.example.org/a").unwrap()).unwrap_err();
        assert!(refused.to_string().contains("models.example.org") && refused.to_string().contains(SETTING));
    }

    #[test]
    fn an_endpoint_that_was_given_may_be_private_and_plain() {
        let hosts = hosts("hub,public", Some("http://hub.corp:8080"));
        assert!(allows(&hosts, "http://hub.corp:9000/a"), "files may be on another port");
        assert!(!allows(&hosts, "http://other.corp/a"));
        assert_eq!(leads(&hosts, "hub.corp", &["10.0.0.1"]), Ok(1));
        assert!(leads(&hosts, "other.corp", &["10.0.0.1"]).is_err());
        let literal = self::hosts("hub", Some("http://127.0.0.1:8080"));
        assert!(allows(&literal, "http://127.0.0.1:9/a") && !allows(&literal, "http://127.0.0.2/a"));
        assert!(!allows(&self::hosts("public", Some("http://127.0.0.1:8080")), "http://127.0.0.1:8080/a"));
    }

    #[test]
    fn a_proxy_is_gone_through_and_not_to() {
        let mut rules = Rules {
            allowed: vec![HostPattern::Public],
            endpoint: Url::parse("https://huggingface.co").unwrap(),
            endpoint_given: false,
            proxies: vec![proxy_host("http://user:secret@proxy.corp:3128").unwrap()],
        };
        rules.proxies.extend(proxy_host("other-proxy.corp:3128"));
        // A network lets names pass that lead into it, and where a proxy's leads is not asked.
        rules.allowed.push("192.0.2.0/24".parse().unwrap());
        let hosts = Hosts(Arc::new(rules));
        for proxy in ["proxy.corp", "other-proxy.corp"] {
            assert_eq!(leads(&hosts, proxy, &["10.0.0.1"]), Ok(1), "{proxy}");
            assert!(!allows(&hosts, &format!("https://{proxy}/a")), "{proxy}");
        }
    }
}
