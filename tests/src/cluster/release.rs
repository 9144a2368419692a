//! The installed chart: the operator and the gateway as `helm install` makes them.

use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::api::ListParams;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config, ResourceExt as _};
use turret_crds::label;

use super::audit::AuditLog;
use super::environment::Environment;
use super::eventually::{PATIENCE, eventually, when};
use super::objects::restricted_namespace;
use super::tools::Tools;

/// The namespace of the release.
pub const NAMESPACE: &str = "turret-system";
/// The name of the release.
pub const NAME: &str = "turret";

/// The installed chart, and everything a scenario needs to talk to it.
pub struct Release {
    /// What the suite was told.
    pub environment: Environment,
    /// An administrator's client of the API server.
    pub client: Client,
    /// A client of gateway and workers.
    pub http: reqwest::Client,
    /// kubectl and helm.
    pub tools: Tools,
    /// The API server's audit log.
    pub audit: AuditLog,
    /// `http://ADDRESS:PORT` of the gateway's service.
    pub gateway_url: String,
}

/// One of the two programs of the release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// `turret-operator run`.
    Operator,
    /// `turret-operator gateway`.
    Gateway,
}

impl Part {
    fn component(self) -> &'static str {
        match self {
            Self::Operator => "operator",
            Self::Gateway => "gateway",
        }
    }
}

impl Release {
    /// Installs the chart with helm and waits until both parts are available.
    pub async fn install(environment: Environment) -> Result<Self> {
        // Both TLS users of this process, kube and reqwest, take the provider from here. A second
        // call in one process finds it set, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let tools = Tools::new(environment.clone());
        tools.apply(&restricted_namespace(NAMESPACE).to_string()).await?;
        helm_install(&tools, &environment, &[]).await?;
        let client = client(&environment).await?;
        let gateway_url = gateway_url(&client).await?;
        let http = reqwest::Client::builder()
            .timeout(Duration::from_secs(60))
            // The cluster's addresses are routes of this machine, never behind a proxy.
            .no_proxy()
            .build()?;
        let audit = AuditLog::at(&environment.audit_log);
        Ok(Self { environment, client, http, tools, audit, gateway_url })
    }

    /// Has the release serve these namespaces only, or all where there are none, and waits until the pods of before are gone.
    pub async fn serve_only(&self, namespaces: &[&str]) -> Result<()> {
        helm_install(&self.tools, &self.environment, namespaces).await?;
        for part in [Part::Operator, Part::Gateway] {
            let what = format!("one pod of the {} runs", part.component());
            eventually(PATIENCE, &what, async || {
                let pods = self.pods(part).await?;
                Ok(when(pods.len() == 1 && pods.iter().all(is_ready), || format!("{} pods", pods.len())))
            })
            .await?;
        }
        Ok(())
    }

    /// `helm uninstall`, waiting until its objects are gone.
    pub async fn uninstall(&self) -> Result<()> {
        self.tools.helm(["uninstall", NAME, "-n", NAMESPACE, "--wait", "--timeout", "2m"]).await?;
        Ok(())
    }

    /// The Deployment of a part.
    pub async fn deployment(&self, part: Part) -> Result<Deployment> {
        let selector =
            ListParams::default().labels(&format!("{}={}", label::APP_COMPONENT, part.component()));
        let deployments: Api<Deployment> = Api::namespaced(self.client.clone(), NAMESPACE);
        let mut found = deployments.list(&selector).await?.items;
        if found.len() != 1 {
            bail!("there are {} Deployments of the component {}", found.len(), part.component());
        }
        Ok(found.remove(0))
    }

    /// The pods of a part.
    pub async fn pods(&self, part: Part) -> Result<Vec<Pod>> {
        let selector =
            ListParams::default().labels(&format!("{}={}", label::APP_COMPONENT, part.component()));
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), NAMESPACE);
        Ok(pods.list(&selector).await?.items)
    }

    /// The address under which pods reach this machine: its end of the way to the node.
    pub async fn address_of_this_machine(&self) -> Result<IpAddr> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let node = nodes.list(&ListParams::default()).await?.items.pop().context("the cluster has a node")?;
        let addresses = node.status.and_then(|status| status.addresses).unwrap_or_default();
        let internal = addresses.iter().find(|address| address.type_ == "InternalIP");
        let node: IpAddr = internal.context("the node has no address")?.address.parse()?;
        // Nothing is sent: this only chooses the way to the node, and so the address it begins with.
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((node, 9))?;
        Ok(socket.local_addr()?.ip())
    }

    /// How the API server calls a part: `system:serviceaccount:NAMESPACE:NAME`.
    pub async fn user(&self, part: Part) -> Result<String> {
        let deployment = self.deployment(part).await?;
        let pod = deployment.spec.and_then(|spec| spec.template.spec);
        let account = pod.and_then(|pod| pod.service_account_name);
        let account = account.with_context(|| format!("the {} has no service account", part.component()))?;
        Ok(format!("system:serviceaccount:{NAMESPACE}:{account}"))
    }

    /// Sets how many pods of a part run, and waits until it is so.
    pub async fn scale(&self, part: Part, replicas: i32) -> Result<()> {
        let name = self.deployment(part).await?.name_any();
        let (target, count) = (format!("deployment/{name}"), format!("--replicas={replicas}"));
        self.tools.kubectl(["scale", "-n", NAMESPACE, &target, &count]).await?;
        let what = format!("{replicas} pods of the {} run", part.component());
        eventually(PATIENCE, &what, async || {
            let pods = self.pods(part).await?;
            let ready = pods.iter().filter(|pod| is_ready(pod)).count();
            let wanted = usize::try_from(replicas)?;
            Ok(when(pods.len() == wanted && ready == wanted, || {
                format!("{} pods, {ready} ready", pods.len())
            }))
        })
        .await
    }
}

/// Whether a pod takes requests.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.into_iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True")
}

async fn helm_install(tools: &Tools, environment: &Environment, namespaces: &[&str]) -> Result<()> {
    let mut arguments: Vec<String> =
        ["upgrade", "--install", NAME, "charts/turret", "-n", NAMESPACE].map(String::from).into();
    for (part, image) in [("operator", &environment.operator_image), ("worker", &environment.worker_image)] {
        let (repository, tag) = image.rsplit_once(':').context("an image reference has a tag")?;
        let set = [("repository", repository), ("tag", tag)]
            .map(|(key, value)| format!("{part}.image.{key}={value}"));
        arguments.extend(["--set-string".into(), set.join(",")]);
    }
    if !namespaces.is_empty() {
        arguments.extend(["--set".into(), format!("watchNamespaces={{{}}}", namespaces.join(","))]);
    }
    arguments.extend(["--wait", "--timeout", "3m"].map(String::from));
    tools.helm(arguments).await?;
    Ok(())
}

async fn client(environment: &Environment) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(&environment.kubeconfig)?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

async fn gateway_url(client: &Client) -> Result<String> {
    let selector = ListParams::default().labels(&format!("{}=gateway", label::APP_COMPONENT));
    let services: Api<Service> = Api::namespaced(client.clone(), NAMESPACE);
    let found = services.list(&selector).await?.items;
    let service = found.first().context("the release has no Service of the gateway")?;
    let spec = service.spec.as_ref().context("a Service has a spec")?;
    let address = spec.cluster_ip.as_deref().context("the gateway's Service has no address")?;
    let ports = spec.ports.as_deref().unwrap_or_default();
    let port =
        ports.iter().find(|port| port.name.as_deref() == Some(label::DATA_PORT_NAME)).or(ports.first());
    let port = port.context("the gateway's Service has no port")?.port;
    Ok(format!("http://{address}:{port}"))
}
