//! What waits is told to the operator, and to nobody else.

use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::watch;
use turret_crds::token::Scope;
use turret_operator::{
    demand::{AUDIENCE, Asked, Gateways, PATH},
    gateway::Settings,
    keys::{GATEWAY_ISSUER, OPERATOR_ISSUER, Signer, SigningKey},
};

use crate::{
    fake_worker::{FakeWorker, report},
    harness::{Gateway, PATIENCE, answered, group, placement},
};

/// Follows a gateway as the operator does.
struct Operator {
    gateways: Gateways,
    open: Gauge,
    changed: watch::Receiver<u64>,
}

impl Operator {
    fn with(key: &SigningKey) -> Self {
        let signer = Arc::new(Signer::new(OPERATOR_ISSUER, Scope::Serve, key.clone()));
        let http = turret_operator::gateway::fleet_client().unwrap();
        let (sender, changed) = watch::channel(0);
        let open = Gauge::default();
        let gateways = Gateways::new(http, signer, open.clone(), move |_| sender.send_modify(|n| *n += 1));
        Self { gateways, open, changed }
    }

    fn follow(&self, gateway: &Gateway) {
        self.gateways.follow_exactly([("g".into(), gateway.url.as_str().into())].into());
    }

    /// What is asked of `lab/p`, once it is as wanted.
    async fn until(&mut self, what: &str, wanted: impl Fn(&Asked) -> bool) -> Asked {
        let key = ("lab".to_owned(), "p".to_owned());
        let heard = async {
            loop {
                let asked = self.gateways.asked(&key);
                if wanted(&asked) {
                    return asked;
                }
                self.changed.changed().await.unwrap();
            }
        };
        match tokio::time::timeout(PATIENCE, heard).await {
            Ok(asked) => asked,
            Err(_) => panic!("not {what}: {:?}", self.gateways.asked(&key)),
        }
    }
}

/// A gateway whose signer holds this key.
async fn gateway_with(key: &SigningKey) -> Gateway {
    let signer = Arc::new(OnceLock::new());
    let _ = signer.set(Arc::new(Signer::new(GATEWAY_ISSUER, Scope::Serve, key.clone())));
    Gateway::declared(Settings { signer, ..Settings::default() }).await
}

/// `lab/p` serves the group `north` on as many workers as its requests take, and begins with none.
fn declare(gateway: &Gateway) {
    let mut scaled = placement("lab", "p", &["north"], 300);
    scaled.spec.replicas = 0;
    scaled.spec.autoscaling =
        Some(serde_json::from_value(serde_json::json!({"minReplicas": 0, "maxReplicas": 2})).unwrap());
    gateway.declare(&[("lab", &[group("lab", "north", &[])], &[scaled])]);
}

#[tokio::test]
async fn a_request_for_what_was_scaled_to_zero_waits_is_told_and_is_answered_when_a_worker_comes() {
    let key = SigningKey::generate();
    let mut operator = Operator::with(&key);
    let gateway = gateway_with(&key).await;
    declare(&gateway);
    operator.follow(&gateway);
    let quiet = operator.until("heard", |asked| asked.is_heard && !asked.sent.is_empty()).await;
    assert_eq!((quiet.waiting, quiet.sent["gateway/g"], operator.open.get()), (0, 0, 1));

    let asking = [gateway.asking("north"), gateway.asking("north")];
    operator.until("told of both", |asked| asked.waiting == 2).await;
    let worker = FakeWorker::start(report("w", &[("north", "n", &[])])).await;
    gateway.follow(&[("lab", "p", &worker)]).await;
    for asked in asking {
        assert_eq!(answered(asked.await.unwrap().unwrap()).await.0, "w");
    }
    operator.until("told of the end", |asked| asked.waiting == 0 && asked.sent["gateway/g"] == 2).await;
}

#[tokio::test]
async fn a_gateway_that_ends_has_nothing_waiting_and_does_not_wait_for_its_reader() {
    let key = SigningKey::generate();
    let mut operator = Operator::with(&key);
    let mut gateway = gateway_with(&key).await;
    declare(&gateway);
    operator.follow(&gateway);
    let asking = gateway.asking("north");
    operator.until("told", |asked| asked.waiting == 1).await;
    gateway.stop();
    gateway.ended().await;
    operator.until("lost", |asked| !asked.is_heard).await;
    assert_eq!(asking.await.unwrap().unwrap().status(), 503);
    assert_eq!(operator.gateways.asked(&("lab".into(), "p".into())), Asked::default());
    operator.gateways.follow_exactly(BTreeMap::new());
    assert_eq!(operator.open.get(), 0);
}

#[tokio::test]
async fn only_who_holds_the_gateways_key_is_told() {
    let (key, other) = (SigningKey::generate(), SigningKey::generate());
    let gateway = gateway_with(&key).await;
    declare(&gateway);
    let get = async |token: Option<&str>| {
        let request = gateway.client.get(format!("{}{PATH}", gateway.url));
        let request = token.iter().fold(request, |request, token| request.bearer_auth(token));
        request.send().await.unwrap().status().as_u16()
    };
    let token = |issuer, key: &SigningKey, audience: &str| {
        Signer::new(issuer, Scope::Serve, key.clone()).token(audience).unwrap()
    };
    assert_eq!(get(None).await, 401);
    for (issuer, key, audience, status) in [
        (OPERATOR_ISSUER, &key, AUDIENCE, 200),
        (OPERATOR_ISSUER, &other, AUDIENCE, 401),
        // What the gateway shows to workers must not open it.
        (GATEWAY_ISSUER, &key, "uid-of-a-placement", 401),
        (OPERATOR_ISSUER, &key, "uid-of-a-placement", 401),
    ] {
        assert_eq!(get(Some(&*token(issuer, key, audience))).await, status, "{issuer} for {audience}");
    }
    // Without a cluster there is no key, and nobody who asks.
    let without = Gateway::declared(Settings::default()).await;
    assert_eq!(without.get(PATH).await.0, 401);
}
