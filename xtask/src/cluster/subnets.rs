//! Which addresses a cluster uses: its link to this machine, its pods and its services.
//!
//! There are sixteen slots, each a set of ranges that touches no other slot's. A cluster
//! takes the first slot that neither another cluster nor any route of this machine uses, so
//! that clusters of several names, a VPN and a company's network live side by side.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// How many clusters fit on one machine.
const SLOTS: u8 = 16;

/// The addresses of one cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnets {
    slot: u8,
}

/// Every slot is taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "no free addresses for the cluster: each of its {SLOTS} choices (10.96–10.111.0.0/16 with 10.123.N.0/30 and \
     10.244.N.0/24) overlaps a route of this machine, the last one {route}; take another cluster down or leave the \
     network that uses them"
)]
pub struct NoFreeSubnet {
    route: Range,
}

/// An IPv4 range, as in `10.96.0.0/16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    base: u32,
    length: u32,
}

impl Range {
    fn new(address: [u8; 4], length: u32) -> Range {
        Range { base: u32::from_be_bytes(address), length }
    }

    /// Reads `10.96.0.0/16`, or a bare address as a range of one.
    pub fn parse(text: &str) -> Option<Range> {
        let (address, length) = text.split_once('/').unwrap_or((text, "32"));
        let address: Ipv4Addr = address.parse().ok()?;
        let length = length.parse().ok().filter(|length| *length <= 32)?;
        Some(Range { base: u32::from(address), length })
    }

    fn overlaps(self, other: Range) -> bool {
        let shorter = self.length.min(other.length);
        let differing = self.base ^ other.base;
        shorter == 0 || differing >> (32 - shorter) == 0
    }
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.base), self.length)
    }
}

impl Subnets {
    /// The first slot whose ranges touch none of `routes`.
    pub fn choose(routes: &[Range]) -> Result<Subnets, NoFreeSubnet> {
        let mut refused = None;
        for slot in 0..SLOTS {
            let subnets = Subnets { slot };
            match subnets.taken_by(routes) {
                None => return Ok(subnets),
                Some(route) => refused = Some(route),
            }
        }
        Err(NoFreeSubnet { route: refused.expect("a slot is refused because of a route") })
    }

    fn taken_by(&self, routes: &[Range]) -> Option<Range> {
        let own = [self.link(), self.pods(), self.services()];
        routes.iter().copied().find(|route| own.iter().any(|range| range.overlaps(*route)))
    }

    /// The network between this machine and the node.
    fn link(&self) -> Range {
        Range::new([10, 123, self.slot, 0], 30)
    }

    /// Where pods live.
    pub fn pods(&self) -> Range {
        Range::new([10, 244, self.slot, 0], 24)
    }

    /// Where services live.
    pub fn services(&self) -> Range {
        Range::new([10, 96 + self.slot, 0, 0], 16)
    }

    /// This machine's address on the link: the node's gateway.
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 123, self.slot, 1)
    }

    /// The node's address on the link, where the API server listens.
    pub fn node(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 123, self.slot, 2)
    }

    /// The address of the service `kubernetes.default`.
    pub fn kubernetes_service(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 96 + self.slot, 0, 1)
    }

    /// The address of the service `kube-dns`.
    pub fn dns_service(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 96 + self.slot, 0, 10)
    }

    /// The name of this machine's end of the link.
    pub fn host_link(&self) -> String {
        format!("turret{}", self.slot)
    }
}

/// Reads the destinations out of `ip -4 route show table all`; the default route overlaps
/// everything and hinders nothing.
pub fn parse_routes(text: &str) -> Vec<Range> {
    const KINDS: [&str; 6] = ["local", "broadcast", "unreachable", "blackhole", "prohibit", "throw"];
    text.lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let first = words.next()?;
            Range::parse(if KINDS.contains(&first) { words.next()? } else { first })
        })
        .filter(|range| range.length > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(text: &str) -> Vec<Range> {
        parse_routes(text)
    }

    #[test]
    fn an_empty_machine_gets_the_usual_addresses() {
        let subnets = Subnets::choose(&[]).unwrap();
        assert_eq!(subnets.services().to_string(), "10.96.0.0/16");
        assert_eq!(subnets.pods().to_string(), "10.244.0.0/24");
        assert_eq!(subnets.dns_service().to_string(), "10.96.0.10");
        assert_eq!(subnets.node().to_string(), "10.123.0.2");
        assert_eq!(subnets.host_link(), "turret0");
    }

    #[test]
    fn a_second_cluster_gets_the_next_slot() {
        let first = "default via 192.168.0.1 dev eth0\n\
                     10.123.0.0/30 dev turret0 proto kernel scope link src 10.123.0.1\n\
                     10.244.0.0/24 via 10.123.0.2 dev turret0\n\
                     local 10.123.0.1 dev turret0 table local";
        assert_eq!(Subnets::choose(&routes(first)).unwrap(), Subnets { slot: 1 });
    }

    #[test]
    fn a_range_that_contains_a_slot_or_lies_in_it_refuses_it() {
        assert_eq!(Subnets::choose(&routes("10.96.0.0/14 dev vpn")).unwrap(), Subnets { slot: 4 });
        assert_eq!(Subnets::choose(&routes("10.96.7.7 dev vpn")).unwrap(), Subnets { slot: 1 });
        assert_eq!(Subnets::choose(&routes("10.112.0.0/16 dev x")).unwrap(), Subnets { slot: 0 });
    }

    #[test]
    fn a_network_over_all_choices_is_named_in_the_refusal() {
        let refusal = Subnets::choose(&routes("10.0.0.0/8 dev vpn")).unwrap_err();
        assert!(refusal.to_string().contains("the last one 10.0.0.0/8"), "{refusal}");
    }

    #[test]
    fn no_two_slots_overlap() {
        for one in 0..SLOTS {
            for other in (0..SLOTS).filter(|other| *other != one) {
                let one = Subnets { slot: one };
                let other = Subnets { slot: other };
                assert_eq!(
                    one.taken_by(&[other.link(), other.pods(), other.services()]),
                    None,
                    "{one:?} {other:?}"
                );
            }
        }
    }

    #[test]
    fn lines_that_are_no_routes_and_default_routes_are_passed_over() {
        assert_eq!(routes("default via 1.1.1.1\n0.0.0.0/0 dev x\n\nfe80::/64 dev y"), []);
        assert_eq!(routes("broadcast 10.1.2.3 dev z").len(), 1);
    }
}
