//! Gateways as EndpointSlices name them: pure.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use turret_crds::label;

/// Selects the slices of gateways, by the labels that the chart gives their Service.
pub fn selector() -> String {
    format!("{}=turret,{}=gateway", label::APP_NAME, label::APP_COMPONENT)
}

/// The gateway pods that slices name, each with the base URL of its port, without a trailing slash.
///
/// Ready or not: requests may still wait at a gateway that leaves. A pod that several slices name (IPv4 and IPv6) is taken once,
/// with the smallest address.
pub fn gateways<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>) -> BTreeMap<Arc<str>, Arc<str>> {
    let mut gateways: BTreeMap<Arc<str>, Arc<str>> = BTreeMap::new();
    for (name, url) in slices.into_iter().flat_map(gateways_of) {
        let known = gateways.entry(name).or_insert_with(|| url.clone());
        if url < *known {
            *known = url;
        }
    }
    gateways
}

fn gateways_of(slice: &EndpointSlice) -> Vec<(Arc<str>, Arc<str>)> {
    let ports = slice.ports.iter().flatten();
    let named = ports.filter(|port| port.name.as_deref() == Some(label::DATA_PORT_NAME));
    let Some(port) = named.filter_map(|port| port.port).next() else { return Vec::new() };
    let url = |address: &str| {
        if address.contains(':') {
            format!("http://[{address}]:{port}")
        } else {
            format!("http://{address}:{port}")
        }
    };
    let pods = slice.endpoints.iter().filter_map(|endpoint| {
        let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"))?;
        Some((pod.name.as_deref()?.into(), url(endpoint.addresses.first()?).into()))
    });
    pods.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn slice(type_: &str, port: &str, endpoints: serde_json::Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "addressType": type_, "metadata": {"name": "s", "namespace": "turret-system"},
            "endpoints": endpoints, "ports": [{"name": port, "port": 8080}],
        }))
        .unwrap()
    }

    #[test]
    fn every_gateway_is_found_once_ready_or_not() {
        let pod = |name: &str, address: &str| {
            json!({"addresses": [address], "conditions": {"ready": false, "terminating": true},
                   "targetRef": {"kind": "Pod", "name": name}})
        };
        let slices = [
            slice("IPv6", "http", json!([pod("a", "fd00::1")])),
            slice(
                "IPv4",
                "http",
                json!([pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), {"addresses": ["10.0.0.9"]}]),
            ),
            slice("IPv4", "metrics", json!([pod("c", "10.0.0.3")])),
        ];
        let found = gateways(&slices);
        let found: Vec<(&str, &str)> = found.iter().map(|(name, url)| (&**name, &**url)).collect();
        assert_eq!(found, [("a", "http://10.0.0.1:8080"), ("b", "http://10.0.0.2:8080")]);
        assert_eq!(&*gateways(&slices[..1])["a"], "http://[fd00::1]:8080");
    }
}
