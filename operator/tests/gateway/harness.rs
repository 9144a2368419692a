//! A gateway in this process, over fake workers.

use std::{collections::BTreeMap, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{net::TcpListener, sync::oneshot, task::JoinHandle};
use turret_crds::{ModelGroup, ModelPlacement};
use turret_operator::{
    fleet::{Endpoint, WorkerId},
    gateway::{
        Settings,
        catalog::{Catalog, Namespace},
        directory::{Directory, Place},
        fleet_client, serve, static_directory,
    },
    keys::TokenSource,
};

use crate::fake_worker::{FakeWorker, TOKEN};

/// What a test may take at most before it is called stuck.
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Gateway {
    pub url: String,
    pub directory: Arc<Directory>,
    pub client: reqwest::Client,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
}

fn provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

impl Gateway {
    /// Over workers given by URL, each of which has spoken.
    pub async fn over(workers: &[&FakeWorker]) -> Self {
        Self::over_with(workers, Settings::default()).await
    }

    pub async fn over_with(workers: &[&FakeWorker], settings: Settings) -> Self {
        provider();
        let addresses: Vec<_> = workers.iter().map(|w| w.address.clone()).collect();
        let directory = static_directory(fleet_client().unwrap(), "default", &addresses, Some(TOKEN));
        let gateway = Self::serve(directory, settings).await;
        gateway.heard(workers.len()).await;
        gateway
    }

    /// Over what is declared, as in a cluster; workers are followed when [`Self::follow`] says so.
    pub async fn declared(settings: Settings) -> Self {
        provider();
        Self::serve(Arc::new(Directory::declared(fleet_client().unwrap())), settings).await
    }

    async fn serve(directory: Arc<Directory>, settings: Settings) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address: SocketAddr = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(serve(settings, directory.clone(), listener, async move {
            let _ = stopped.await;
        }));
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { url: format!("http://{address}"), directory, client, stop: Some(stop), served }
    }

    /// Follows these workers, each in a namespace, as part of a placement.
    pub async fn follow(&self, workers: &[(&str, &str, &FakeWorker)]) {
        self.directory.follow(workers.iter().map(|(namespace, placement, worker)| Endpoint {
            id: WorkerId(format!("{namespace}/{}", worker.name).into()),
            control_url: worker.address.control_url.as_str().into(),
            token: TokenSource::Static(TOKEN.into()),
            attached: Place {
                namespace: (*namespace).into(),
                placement: (*placement).into(),
                data_url: worker.address.data_url.as_str().into(),
            },
        }));
        self.heard(workers.len()).await;
    }

    pub fn declare(&self, namespaces: &[(&str, &[ModelGroup], &[ModelPlacement])]) {
        self.directory.declare(Catalog {
            namespaces: namespaces
                .iter()
                .map(|(name, groups, placements)| {
                    let declared = Namespace::declared(*groups, *placements, &BTreeMap::new());
                    ((*name).to_owned(), Arc::new(declared))
                })
                .collect(),
            complete: true,
        });
    }

    async fn heard(&self, workers: usize) {
        let mut changes = self.directory.changes();
        let heard = async {
            while self.directory.open_streams() < workers as u64 {
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, heard).await.expect("every worker's stream opens");
    }

    /// Waits until the gateway has heard what a worker reports now.
    pub async fn caught_up(&self, worker: &FakeWorker) {
        let mut changes = self.directory.changes();
        let wanted = worker.report();
        let heard = async {
            let knows = || {
                let view = self.directory.view();
                view.workers.values().any(|w| w.believed().is_some_and(|r| **r == wanted))
            };
            while !knows() {
                changes.changed().await.unwrap();
            }
        };
        tokio::time::timeout(PATIENCE, heard).await.expect("the gateway hears of the change");
    }

    pub fn post(&self, path: &str, body: impl Into<reqwest::Body>) -> reqwest::RequestBuilder {
        self.client
            .post(format!("{}{path}", self.url))
            .header("content-type", "application/json")
            .bearer_auth("sk-of-the-client")
            .body(body)
    }

    pub fn ask(&self, model: &str) -> reqwest::RequestBuilder {
        self.post("/v1/chat/completions", format!(r#"{{"model":"{model}","messages":[]}}"#))
    }

    /// Asks in a task of its own.
    pub fn asking(&self, model: &str) -> JoinHandle<reqwest::Result<reqwest::Response>> {
        let request = self.ask(model);
        tokio::spawn(request.send())
    }

    pub async fn get(&self, path: &str) -> (u16, serde_json::Value) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        let status = response.status().as_u16();
        (status, serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default())
    }

    /// The value of a metric.
    pub async fn metric(&self, name: &str) -> f64 {
        let text =
            self.client.get(format!("{}/metrics", self.url)).send().await.unwrap().text().await.unwrap();
        let line = text.lines().find(|l| l.split(' ').next() == Some(name));
        line.map_or(0.0, |l| l.rsplit(' ').next().unwrap().parse().unwrap())
    }

    /// Waits until a metric has a value.
    pub async fn until(&self, name: &str, value: f64) {
        let reached = async {
            while self.metric(name).await != value {
                tokio::task::yield_now().await;
            }
        };
        let Ok(()) = tokio::time::timeout(PATIENCE, reached).await else {
            panic!("{name} is {} and not {value}", self.metric(name).await)
        };
    }

    /// Tells it to stop.
    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Waits for its end.
    pub async fn ended(self) {
        tokio::time::timeout(PATIENCE, self.served).await.expect("the gateway ends").unwrap();
    }
}

/// The worker and the model of an answer.
pub async fn answered(response: reqwest::Response) -> (String, String) {
    let status = response.status();
    let text = response.text().await.unwrap();
    assert_eq!(status, 200, "{text}");
    let body: serde_json::Value = serde_json::from_str(&text).unwrap();
    (body["worker"].as_str().unwrap().into(), body["model"].as_str().unwrap().into())
}

/// Status, `Retry-After`, code and message of a refusal, which must have OpenAI's shape.
pub async fn refused(response: reqwest::Response) -> (u16, Option<u64>, String, String) {
    let status = response.status().as_u16();
    let retry_after = response.headers().get("retry-after").map(|v| v.to_str().unwrap().parse().unwrap());
    let text = response.text().await.unwrap();
    let body: serde_json::Value = serde_json::from_str(&text).expect(&text);
    let error = body["error"].as_object().expect(&text);
    assert!(error.contains_key("type") && error.contains_key("param"), "{text}");
    let field = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (status, retry_after, field("code"), field("message"))
}

pub fn group(namespace: &str, name: &str, lenses: &[&str]) -> ModelGroup {
    let lenses: Vec<_> = lenses
        .iter()
        .map(|l| serde_json::json!({"name": l, "displayName": l.to_uppercase(), "source": {"uri": format!("pvc://m/{l}")}}))
        .collect();
    serde_json::from_value(serde_json::json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelGroup",
        "metadata": {"name": name, "namespace": namespace, "creationTimestamp": "2026-01-02T03:04:05Z"},
        "spec": {"base": {"source": {"uri": format!("pvc://m/{name}")}}, "lenses": lenses},
    }))
    .unwrap()
}

pub fn placement(namespace: &str, name: &str, groups: &[&str], hold_seconds: i32) -> ModelPlacement {
    let groups: Vec<_> = groups.iter().map(|g| serde_json::json!({"name": g})).collect();
    serde_json::from_value(serde_json::json!({
        "apiVersion": "turret.dev/v1alpha1", "kind": "ModelPlacement",
        "metadata": {"name": name, "namespace": namespace, "uid": "u"},
        "spec": {"groups": groups, "admission": {"holdSeconds": hold_seconds}},
    }))
    .unwrap()
}
