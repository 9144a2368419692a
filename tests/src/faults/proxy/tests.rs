use std::sync::Mutex;

use axum::Router;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use super::*;

/// An API server that takes everything, and what it was asked for.
async fn upstream() -> (Client, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let noted = asked.clone();
    let router = Router::new().fallback(move |request: axum::extract::Request| {
        noted.lock().unwrap().push(format!("{} {}", request.method(), request.uri().path()));
        let event = r#"{"type":"ADDED","object":{"metadata":{"name":"a"}}}"#;
        let is_watch = request.uri().query() == Some("watch=true");
        let text = if is_watch { format!("{event}\n{event}\n") } else { "{}".to_owned() };
        std::future::ready(text)
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut config = Config::new(url.parse().unwrap());
    // No authority is asked for, and none need be installed on this machine.
    config.root_cert = Some(Vec::new());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (Client::try_from(config).unwrap(), asked)
}

/// A proxy, a client behind it, and what arrived.
async fn proxy(fault: Option<Fault>) -> (Proxy, Client, Arc<Mutex<Vec<String>>>) {
    let _ = rustls::crypto::ring::default_provider().install_default();
    let (upstream, asked) = upstream().await;
    let proxy = Proxy::start(upstream, &Tls::new().unwrap(), fault, 1).await.unwrap();
    let kubeconfig: Kubeconfig = serde_json::from_value(proxy.kubeconfig("n")).unwrap();
    let options = KubeConfigOptions::default();
    let mut config = Config::from_custom_kubeconfig(kubeconfig, &options).await.unwrap();
    (config.proxy_url, config.default_retry) = (None, false);
    (proxy, Client::try_from(config).unwrap(), asked)
}

async fn ask(client: &Client, method: &str, uri: &str) -> kube::Result<String> {
    let request = Request::builder().method(method).uri(uri).body(b"{}".to_vec()).unwrap();
    client.request_text(request).await
}

const SERVICE: &str = "/api/v1/namespaces/n/services/s";

#[tokio::test]
async fn a_crash_lets_exactly_so_many_writes_through_and_none_of_the_dead() {
    let (proxy, client, asked) = proxy(None).await;
    proxy.begin_step(Some(Crash { after: 2, answered: false }));
    assert_eq!(ask(&client, "PATCH", SERVICE).await.unwrap(), "{}");
    let (second, third) = (ask(&client, "PATCH", SERVICE), ask(&client, "PATCH", SERVICE));
    let writes = async { tokio::join!(second, third) };
    let death = async {
        proxy.crash_is_due().await;
        proxy.next_life();
    };
    let ((second, third), ()) = tokio::join!(writes, death);
    assert!(second.is_err() && third.is_err(), "one was not answered, the other not carried out");
    assert_eq!(*asked.lock().unwrap(), vec![format!("PATCH {SERVICE}"); 2]);
    assert_eq!(ask(&client, "GET", SERVICE).await.unwrap(), "{}", "the next life is served");
    assert_eq!(proxy.record().writes().len(), 2);
}

#[tokio::test]
async fn an_answered_crash_is_due_when_the_next_write_comes() {
    let (proxy, client, asked) = proxy(None).await;
    proxy.begin_step(Some(Crash { after: 1, answered: true }));
    assert_eq!(ask(&client, "PATCH", SERVICE).await.unwrap(), "{}");
    let death = async {
        proxy.crash_is_due().await;
        proxy.next_life();
    };
    let (next, ()) = tokio::join!(ask(&client, "PATCH", SERVICE), death);
    assert!(next.is_err());
    assert_eq!(asked.lock().unwrap().len(), 1);
}

#[tokio::test]
async fn faults_reach_whoever_is_behind_the_proxy() {
    let (proxy, client, asked) = proxy(Some(Fault::RequestsFail)).await;
    let mut failed = 0;
    for _ in 0..12 {
        match ask(&client, "GET", SERVICE).await {
            Ok(text) => assert_eq!(text, "{}"),
            Err(kube::Error::Api(status)) => {
                assert_eq!(status.code, 500);
                failed += 1;
            }
            Err(other) => panic!("{other}"),
        }
    }
    assert!(failed > 0 && failed < 12, "{failed} of 12");
    assert_eq!((asked.lock().unwrap().len(), proxy.record().strikes()), (12 - failed, failed as u32));
}

#[tokio::test]
async fn events_of_a_watch_are_doubled_on_their_way() {
    let (proxy, client, _) = proxy(Some(Fault::EventsAreDoubled)).await;
    let mut lines = 0;
    for _ in 0..6 {
        let text = ask(&client, "GET", "/api/v1/namespaces/n/services?watch=true").await.unwrap();
        lines += text.lines().count();
    }
    assert_eq!(lines, 12 + proxy.record().strikes() as usize);
    assert!(lines > 12);
}
