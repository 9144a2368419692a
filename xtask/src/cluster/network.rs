//! The link between this machine and a node: one veth pair, and two routes through it. All
//! of it goes with the node's network namespace.

use std::fs;
use std::process::Command;
use std::time::Duration;

use super::subnets::{Range, Subnets, parse_routes};
use super::wait;

/// The node's end of the link.
const NODE_LINK: &str = "node0";
/// The routing table, in the node, of what is refused.
const REFUSED: u32 = 96;
/// How long the kernel may take to remove a link after its namespace.
const LEAVING: Duration = Duration::from_secs(5);

/// This machine's end of a link. The index tells it from a later one of the same name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    name: String,
    index: String,
}

impl Link {
    fn named(name: &str) -> Option<Link> {
        let index = fs::read_to_string(format!("/sys/class/net/{name}/ifindex")).ok()?;
        Some(Link { name: name.to_owned(), index })
    }

    fn exists(&self) -> bool {
        Link::named(&self.name).as_ref() == Some(self)
    }
}

/// Why the link is not there.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// It could not be started.
    #[error("failed to start `ip` (package iproute2)")]
    Start(#[source] std::io::Error),
    /// It failed.
    #[error("`ip {arguments}` failed: {output}")]
    Failed {
        /// What it was told.
        arguments: String,
        /// What it said.
        output: String,
    },
    /// The new link is not there.
    #[error("the link `{name}` vanished right after it was made: the node has ended")]
    Vanished {
        /// Its name.
        name: String,
    },
}

/// The destinations of all routes of this machine.
pub fn routes() -> Result<Vec<Range>, NetworkError> {
    Ok(parse_routes(&ip("-4 route show table all")?))
}

/// Links this machine to the network namespace of `node`.
pub fn link(subnets: &Subnets, node: u32) -> Result<Link, NetworkError> {
    let name = subnets.host_link();
    ip(&format!("link add {name} type veth peer name {NODE_LINK} netns {node}"))?;
    ip(&format!("addr add {}/30 dev {name}", subnets.gateway()))?;
    ip(&format!("link set {name} up"))?;
    for range in [subnets.pods(), subnets.services()] {
        ip(&format!("route add {range} via {}", subnets.node()))?;
    }
    let link = Link::named(&name);
    link.ok_or(NetworkError::Vanished { name })
}

/// Waits until the kernel has removed the link with the node's namespace, and does it itself
/// should the kernel not.
pub fn unlink(link: &Link) -> Result<(), NetworkError> {
    match wait::until(LEAVING, || (!link.exists()).then_some(())) {
        Some(()) => Ok(()),
        None => ip(&format!("link delete {}", link.name)).map(drop),
    }
}

/// Sets the node's side up, from inside.
pub fn join(subnets: &Subnets) -> Result<(), NetworkError> {
    ip("link set lo up")?;
    ip(&format!("addr add {}/30 dev {NODE_LINK}", subnets.node()))?;
    ip(&format!("link set {NODE_LINK} up"))?;
    ip(&format!("route add default via {}", subnets.gateway()))?;
    refuse_unknown_services(subnets)
}

/// What pods or this machine send to a service that kube-proxy does not know yet would leave
/// by the default route, be remembered by connection tracking as going nowhere, and stay lost
/// however often it is sent again. Refused at once, it is tried anew and then goes through.
/// The node's own programs look their route up before kube-proxy's rules, so they are exempt.
fn refuse_unknown_services(subnets: &Subnets) -> Result<(), NetworkError> {
    ip(&format!("route add unreachable {} table {REFUSED}", subnets.services()))?;
    ip(&format!("rule add not iif lo lookup {REFUSED}"))?;
    Ok(())
}

fn ip(arguments: &str) -> Result<String, NetworkError> {
    let program = crate::packages::find_program("ip").unwrap_or_else(|| "ip".into());
    let output =
        Command::new(program).args(arguments.split_whitespace()).output().map_err(NetworkError::Start)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let output = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(NetworkError::Failed { arguments: arguments.to_owned(), output })
}
