//! Workers as EndpointSlices name them: pure.

use std::{collections::BTreeMap, sync::Arc};

use k8s_openapi::api::discovery::v1::EndpointSlice;
use turret_crds::label;

use super::directory::Place;

/// Where a worker pod is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerAddress {
    /// Where it belongs and takes requests.
    pub place: Place,
    /// UID of its placement: the audience of tokens.
    pub placement_uid: Arc<str>,
    /// Base URL of its control port, without a trailing slash.
    pub control_url: Arc<str>,
}

/// The worker pods that slices name, by `namespace/pod`.
///
/// Readiness is not read here: a worker's own state stream knows it sooner than the kubelet. A pod
/// that several slices name (IPv4 and IPv6) is taken once, with the smallest address.
pub fn workers<'a>(slices: impl IntoIterator<Item = &'a EndpointSlice>) -> BTreeMap<String, WorkerAddress> {
    let mut workers: BTreeMap<String, WorkerAddress> = BTreeMap::new();
    for slice in slices {
        for (id, address) in workers_of(slice) {
            match workers.get_mut(&id) {
                Some(known) if known.control_url <= address.control_url => {}
                Some(known) => *known = address,
                None => {
                    workers.insert(id, address);
                }
            }
        }
    }
    workers
}

fn workers_of(slice: &EndpointSlice) -> Vec<(String, WorkerAddress)> {
    let label = |name: &str| slice.metadata.labels.as_ref()?.get(name).map(String::as_str);
    let (Some(namespace), Some(placement), Some(uid)) =
        (slice.metadata.namespace.as_deref(), label(label::PLACEMENT), label(label::PLACEMENT_UID))
    else {
        return Vec::new();
    };
    let port = |name: &str, default: u16| {
        let named = slice.ports.iter().flatten().find(|p| p.name.as_deref() == Some(name));
        named.and_then(|p| p.port).and_then(|p| u16::try_from(p).ok()).unwrap_or(default)
    };
    let data_port = port(label::DATA_PORT_NAME, label::DATA_PORT);
    let control_port = port(label::CONTROL_PORT_NAME, label::CONTROL_PORT);
    let (namespace, placement, uid): (Arc<str>, Arc<str>, Arc<str>) =
        (namespace.into(), placement.into(), uid.into());
    let mut workers = Vec::new();
    for endpoint in &slice.endpoints {
        let pod = endpoint.target_ref.as_ref().filter(|t| t.kind.as_deref() == Some("Pod"));
        let (Some(pod), Some(address)) = (pod.and_then(|t| t.name.as_deref()), endpoint.addresses.first())
        else {
            continue;
        };
        let host = if address.contains(':') { format!("[{address}]") } else { address.clone() };
        let address = WorkerAddress {
            place: Place {
                namespace: namespace.clone(),
                placement: placement.clone(),
                data_url: format!("http://{host}:{data_port}").into(),
            },
            placement_uid: uid.clone(),
            control_url: format!("http://{host}:{control_port}").into(),
        };
        workers.push((format!("{namespace}/{pod}"), address));
    }
    workers
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn slice(address_type: &str, labels: serde_json::Value, endpoints: serde_json::Value) -> EndpointSlice {
        serde_json::from_value(json!({
            "addressType": address_type,
            "metadata": {"name": "s", "namespace": "lab", "labels": labels},
            "endpoints": endpoints,
            "ports": [{"name": "http", "port": 9080}, {"name": "control", "port": 9081}],
        }))
        .unwrap()
    }

    fn pod(name: &str, address: &str) -> serde_json::Value {
        json!({"addresses": [address], "conditions": {"ready": false}, "targetRef": {"kind": "Pod", "name": name}})
    }

    #[test]
    fn pods_are_found_once_whether_ready_or_not() {
        let labels = json!({label::PLACEMENT: "shared", label::PLACEMENT_UID: "uid-1"});
        let slices = [
            slice("IPv6", labels.clone(), json!([pod("a", "fd00::1")])),
            slice(
                "IPv4",
                labels,
                json!([pod("a", "10.0.0.1"), pod("b", "10.0.0.2"), {"addresses": ["10.0.0.9"]}]),
            ),
            slice("IPv4", json!({label::PLACEMENT: "no-uid"}), json!([pod("c", "10.0.0.3")])),
        ];
        let found = workers(&slices);
        assert_eq!(found.keys().collect::<Vec<_>>(), ["lab/a", "lab/b"]);
        let a = &found["lab/a"];
        assert_eq!(&*a.control_url, "http://10.0.0.1:9081");
        assert_eq!(&*a.place.data_url, "http://10.0.0.1:9080");
        assert_eq!((&*a.place.namespace, &*a.place.placement, &*a.placement_uid), ("lab", "shared", "uid-1"));
        assert_eq!(&*workers(&slices[..1])["lab/a"].control_url, "http://[fd00::1]:9081");
    }
}
