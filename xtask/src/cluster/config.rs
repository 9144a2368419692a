//! Pure: what each component of a cluster is started with, from the cluster's description.
//!
//! Kubernetes reads JSON wherever it reads YAML, so everything but containerd's and
//! CoreDNS' own formats is a JSON value.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::pki::Identity;
use super::state::State;
use super::subnets::Subnets;

/// The node's name in Kubernetes.
pub const NODE: &str = "node-1";
/// The image that holds a pod's namespaces.
pub const PAUSE_IMAGE: &str = "turret.local/pause:1";
/// The domain of services' names.
const DOMAIN: &str = "cluster.local";

/// When a component starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// At once.
    Storage,
    /// When etcd answers: an API server that comes too early waits a second before it asks again.
    Api,
    /// When the API server is ready.
    Rest,
}

/// A program of the cluster.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Component {
    /// Its name, which is also its log's.
    pub name: String,
    /// The program's file.
    pub program: PathBuf,
    /// What it is started with.
    pub arguments: Vec<String>,
    /// When it is started.
    pub phase: Phase,
}

/// What the node's first process is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NodePlan {
    /// The cluster's folder.
    pub state: State,
    /// The cluster's control groups.
    pub cgroup: String,
    /// Where the programs lie.
    pub bin: PathBuf,
    /// The node's addresses.
    pub subnets: Subnets,
    /// What to start.
    pub components: Vec<Component>,
}

/// Who talks to the API server, with the certificate's subject: `(file, user, group)`.
pub const CLIENTS: [(&str, &str, &str); 7] = [
    ("admin", "turret-local-admin", "system:masters"),
    ("kubelet-client", "kube-apiserver-kubelet-client", "system:masters"),
    ("controller-manager", "system:kube-controller-manager", ""),
    ("scheduler", "system:kube-scheduler", ""),
    ("proxy", "system:kube-proxy", ""),
    ("dns", "coredns", "system:masters"),
    ("supervisor", "turret-local-supervisor", "system:masters"),
];

/// Everything the node's first process needs to know.
pub fn node_plan(state: &State, cgroup: &str, bin: &Path, subnets: &Subnets) -> NodePlan {
    NodePlan {
        state: state.clone(),
        cgroup: cgroup.to_owned(),
        bin: bin.to_path_buf(),
        subnets: subnets.clone(),
        components: components(state, bin, subnets),
    }
}

fn components(state: &State, bin: &Path, subnets: &Subnets) -> Vec<Component> {
    let text = |path: PathBuf| path.display().to_string();
    let pki = |file: &str| text(state.pki(file));
    let config = |file: &str| text(state.config(file));
    let kubeconfig = |client: &str| format!("--kubeconfig={}", config(&kubeconfig_file(client)));
    let component = |name: &str, program: &str, phase, arguments: Vec<String>| Component {
        name: name.to_owned(),
        program: bin.join(program),
        arguments,
        phase,
    };
    vec![
        component(
            "etcd",
            "etcd",
            Phase::Storage,
            vec![
                format!("--data-dir={}", text(state.data("etcd"))),
                "--listen-client-urls=http://127.0.0.1:2379".into(),
                "--advertise-client-urls=http://127.0.0.1:2379".into(),
                "--listen-peer-urls=http://127.0.0.1:2380".into(),
                // The data need not outlive the cluster, let alone a power cut.
                "--unsafe-no-fsync".into(),
                "--log-level=warn".into(),
            ],
        ),
        component(
            "apiserver",
            "kube-apiserver",
            Phase::Api,
            vec![
                "--etcd-servers=http://127.0.0.1:2379".into(),
                "--secure-port=6443".into(),
                format!("--advertise-address={}", subnets.node()),
                format!("--service-cluster-ip-range={}", subnets.services()),
                format!("--tls-cert-file={}", pki("apiserver.crt")),
                format!("--tls-private-key-file={}", pki("apiserver.key")),
                format!("--client-ca-file={}", pki("ca.crt")),
                format!("--service-account-key-file={}", pki("accounts.pub")),
                format!("--service-account-signing-key-file={}", pki("accounts.key")),
                format!("--service-account-issuer=https://kubernetes.default.svc.{DOMAIN}"),
                format!("--kubelet-client-certificate={}", pki("kubelet-client.crt")),
                format!("--kubelet-client-key={}", pki("kubelet-client.key")),
                format!("--kubelet-certificate-authority={}", pki("ca.crt")),
                "--kubelet-preferred-address-types=InternalIP".into(),
                "--authorization-mode=Node,RBAC".into(),
                "--enable-admission-plugins=NodeRestriction".into(),
                "--allow-privileged=true".into(),
                format!("--audit-policy-file={}", config("audit-policy.json")),
                format!("--audit-log-path={}", text(state.audit_log())),
                // One file: whoever reads it should not miss what was rotated away.
                "--audit-log-maxsize=4096".into(),
            ],
        ),
        component(
            "containerd",
            "containerd",
            Phase::Storage,
            vec!["--config".into(), config("containerd.toml")],
        ),
        component(
            "controller-manager",
            "kube-controller-manager",
            Phase::Rest,
            vec![
                kubeconfig("controller-manager"),
                format!("--service-account-private-key-file={}", pki("accounts.key")),
                format!("--root-ca-file={}", pki("ca.crt")),
                "--use-service-account-credentials=true".into(),
                "--leader-elect=false".into(),
                // At the usual 20 requests a second its controllers take four seconds to start.
                "--kube-api-qps=500".into(),
                "--kube-api-burst=1000".into(),
                // A claim that is seen before its volume is looked at again only this often.
                "--pvclaimbinder-sync-period=1s".into(),
            ],
        ),
        component(
            "scheduler",
            "kube-scheduler",
            Phase::Rest,
            vec![kubeconfig("scheduler"), "--leader-elect=false".into()],
        ),
        component(
            "kubelet",
            "kubelet",
            Phase::Rest,
            vec![
                kubeconfig("kubelet"),
                format!("--config={}", config("kubelet.json")),
                format!("--hostname-override={NODE}"),
                format!("--node-ip={}", subnets.node()),
                format!("--root-dir={}", text(state.data("kubelet"))),
                // Without it the kubelet asks for the certificate folder's default in /var.
                format!("--cert-dir={}", text(state.data("kubelet").join("pki"))),
            ],
        ),
        component(
            "proxy",
            "kube-proxy",
            Phase::Rest,
            vec![format!("--config={}", config("proxy.json")), format!("--hostname-override={NODE}")],
        ),
        component("dns", "coredns", Phase::Rest, vec!["-conf".into(), config("Corefile")]),
    ]
}

/// The file in the configuration folder with a component's kubeconfig.
pub fn kubeconfig_file(client: &str) -> String {
    format!("{client}.kubeconfig")
}

/// A kubeconfig that holds its certificates itself, so that it can be copied.
pub fn kubeconfig(name: &str, server: &str, authority: &str, identity: &Identity) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {
            "server": server,
            "certificate-authority-data": BASE64.encode(authority),
        }}],
        "users": [{"name": name, "user": {
            "client-certificate-data": BASE64.encode(&identity.certificate),
            "client-key-data": BASE64.encode(&identity.key),
        }}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    })
}

/// Where the API server answers.
pub fn server_url(subnets: &Subnets) -> String {
    format!("https://{}:6443", subnets.node())
}

/// What the API server writes down: who did what to which object and how it ended, and for
/// writes of Turret's own objects also what was sent.
pub fn audit_policy() -> Value {
    json!({
        "apiVersion": "audit.k8s.io/v1",
        "kind": "Policy",
        "omitStages": ["RequestReceived"],
        "rules": [
            {
                "level": "Request",
                "verbs": ["create", "update", "patch", "delete", "deletecollection"],
                "resources": [{"group": "turret.dev"}],
            },
            {"level": "Metadata"},
        ],
    })
}

/// The kubelet's configuration.
pub fn kubelet(state: &State, subnets: &Subnets, cgroup: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{}", state.containerd_socket().display()),
        "authentication": {
            "anonymous": {"enabled": false},
            "webhook": {"enabled": true},
            "x509": {"clientCAFile": state.pki("ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": state.pki("kubelet.crt"),
        "tlsPrivateKeyFile": state.pki("kubelet.key"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{cgroup}"),
        "enforceNodeAllocatable": [],
        "failSwapOn": false,
        "failCgroupV1": false,
        "clusterDNS": [subnets.dns_service()],
        "clusterDomain": DOMAIN,
        "resolvConf": state.config("resolv.conf"),
        "podLogsDir": state.data("pod-logs"),
        "volumePluginDir": state.data("volume-plugins"),
        "syncFrequency": "10s",
        // The machine belongs to its owner: only a disk that is really full evicts, and no
        // image is collected, because none can be pulled again.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
    })
}

/// kube-proxy's configuration. The zeroes keep it from changing the machine's own limits.
pub fn proxy(state: &State, subnets: &Subnets) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": state.config(&kubeconfig_file("proxy"))},
        "mode": "iptables",
        "iptables": {"minSyncPeriod": "0s", "syncPeriod": "30s"},
        "clusterCIDR": subnets.pods().to_string(),
        "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
    })
}

/// How pods are joined to the network: each by its own link to the node, which routes. A
/// bridge would need the `br_netfilter` module for services of the same node to work.
pub fn pod_network(state: &State, subnets: &Subnets) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [{
            "type": "ptp",
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "dataDir": state.data("ipam"),
                "ranges": [[{"subnet": subnets.pods().to_string()}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }],
    })
}

/// containerd's configuration.
pub fn containerd(state: &State, bin: &Path, snapshotter: &str) -> String {
    // A JSON string is a TOML string.
    let quoted = |path: &Path| json!(path).to_string();
    format!(
        r#"version = 3
root = {root}
state = {run}
# NRI listens in the machine's own folders, and nothing here uses it.
disabled_plugins = ["io.containerd.nri.v1.nri"]
[grpc]
address = {socket}
[plugins."io.containerd.cri.v1.runtime"]
# Without CAP_SYS_RESOURCE a sandbox's score cannot be lowered, and no sandbox would start.
restrict_oom_score_adj = true
# A profile would stay in the machine's kernel after the cluster.
disable_apparmor = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
BinaryName = {runc}
SystemdCgroup = false
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = [{bin}]
conf_dir = {cni}
[plugins."io.containerd.cri.v1.images"]
snapshotter = "{snapshotter}"
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE_IMAGE}"
"#,
        root = quoted(&state.data("containerd")),
        run = quoted(&state.run("containerd")),
        socket = quoted(&state.containerd_socket()),
        runc = quoted(&bin.join("runc")),
        bin = quoted(bin),
        cni = quoted(&state.config("cni")),
    )
}

/// CoreDNS' configuration: the names of the cluster and no others, since it has no upstream.
pub fn corefile(state: &State, subnets: &Subnets) -> String {
    format!(
        ".:53 {{\n    bind {address}\n    ready {address}:8181\n    errors\n    cache 5\n    kubernetes {DOMAIN} in-addr.arpa {{\n        \
         kubeconfig {kubeconfig}\n        ttl 5\n    }}\n}}\n",
        address = subnets.node(),
        kubeconfig = state.config(&kubeconfig_file("dns")).display(),
    )
}

/// The service `kube-dns` in front of the CoreDNS that runs beside the kubelet.
pub fn dns_service(subnets: &Subnets) -> Value {
    let metadata = |extra: Value| {
        let mut metadata = json!({"name": "kube-dns", "namespace": "kube-system"});
        metadata["labels"] = extra;
        metadata
    };
    let port = |protocol: &str| json!({"name": format!("dns-{}", protocol.to_lowercase()), "port": 53, "protocol": protocol});
    json!({
        "apiVersion": "v1",
        "kind": "List",
        "items": [
            {
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": metadata(json!({"k8s-app": "kube-dns", "kubernetes.io/name": "CoreDNS"})),
                "spec": {"clusterIP": subnets.dns_service(), "ports": [port("UDP"), port("TCP")]},
            },
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": metadata(json!({
                    "kubernetes.io/service-name": "kube-dns",
                    "endpointslice.kubernetes.io/managed-by": "cluster.turret.dev",
                })),
                "addressType": "IPv4",
                "endpoints": [{"addresses": [subnets.node()], "conditions": {"ready": true}}],
                "ports": [port("UDP"), port("TCP")],
            },
        ],
    })
}

/// The status patch that gives the node its made-up accelerators.
pub fn accelerators(count: u32) -> Value {
    let amount = json!({"nvidia.com/gpu": count.to_string()});
    json!({"status": {"capacity": amount, "allocatable": amount}})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (State, Subnets) {
        (State::at("/var/lib/turret/x"), Subnets::choose(&[]).unwrap())
    }

    #[test]
    fn every_component_reads_files_of_the_cluster_and_writes_only_there() {
        let (state, subnets) = sample();
        for component in components(&state, Path::new("/bins"), &subnets) {
            for argument in &component.arguments {
                let value = argument.split_once('=').map_or(argument.as_str(), |(_, value)| value);
                if value.starts_with('/') {
                    assert!(value.starts_with("/var/lib/turret/x/"), "{}: {argument}", component.name);
                }
            }
        }
    }

    #[test]
    fn every_kubeconfig_that_is_used_belongs_to_a_client() {
        let (state, subnets) = sample();
        let plan = node_plan(&state, "c", Path::new("/bins"), &subnets);
        let text = serde_json::to_string(&plan).unwrap()
            + &corefile(&state, &subnets)
            + &proxy(&state, &subnets).to_string();
        let mut known: Vec<_> = CLIENTS.iter().map(|(file, ..)| *file).collect();
        known.push("kubelet");
        let used: Vec<_> = text
            .split(".kubeconfig")
            .filter_map(|before| before.rsplit_once("/config/"))
            .map(|(_, client)| client)
            .collect();
        assert!(used.len() >= 5, "{used:?}");
        assert!(used.iter().all(|client| known.contains(client)), "{used:?}");
    }

    #[test]
    fn audit_keeps_what_was_sent_for_turrets_own_objects_only() {
        let policy = audit_policy();
        let rules = policy["rules"].as_array().unwrap();
        assert_eq!(rules.len(), 2);
        assert_eq!(rules[0]["resources"][0]["group"], "turret.dev");
        assert_eq!(rules[1], json!({"level": "Metadata"}));
    }

    #[test]
    fn containerd_is_configured_in_one_folder() {
        let (state, _) = sample();
        let text = containerd(&state, Path::new("/bins"), "overlayfs");
        assert!(text.contains(r#"address = "/var/lib/turret/x/run/containerd.sock""#), "{text}");
        assert!(text.contains(r#"BinaryName = "/bins/runc""#), "{text}");
        assert!(text.contains(r#"snapshotter = "overlayfs""#), "{text}");
    }

    #[test]
    fn dns_answers_at_the_address_that_the_kubelet_tells_pods() {
        let (state, subnets) = sample();
        let service = &dns_service(&subnets)["items"][0];
        assert_eq!(service["spec"]["clusterIP"], kubelet(&state, &subnets, "c")["clusterDNS"][0]);
        assert!(corefile(&state, &subnets).contains("bind 10.123.0.2"));
    }

    #[test]
    fn a_kubeconfig_carries_its_certificates() {
        let (_, subnets) = sample();
        let identity = Identity { certificate: "CERT".into(), key: "KEY".into() };
        let config = kubeconfig("turret-local", &server_url(&subnets), "CA", &identity);
        assert_eq!(config["clusters"][0]["cluster"]["server"], "https://10.123.0.2:6443");
        assert_eq!(config["users"][0]["user"]["client-key-data"], BASE64.encode("KEY"));
    }
}
