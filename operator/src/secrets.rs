//! Signing keys in Secrets: followed, and filled when empty.
//!
//! The chart renders both Secrets empty, so that the operator needs no right to make Secrets of any
//! name. Emptying one replaces its key.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use futures::{Stream, StreamExt};
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{
    Api, ResourceExt,
    api::{Patch, PatchParams, PostParams},
    runtime::{WatchStreamExt, watcher},
};
use tokio::sync::watch;
use turret_crds::token::{PublicKey, Scope};

use crate::{
    controllers::status_write::FIELD_MANAGER,
    keys::{SECRET_FIELD, Signer, SigningKey},
    relisting::relisting,
    telemetry::chain,
};

/// A Secret that is still empty is filled again after this long.
const RETRY: Duration = Duration::from_secs(2);

fn observe(api: Api<Secret>, name: &str) -> impl Stream<Item = Option<Secret>> + Send + use<> {
    let (name, watched) = (name.to_owned(), name.to_owned());
    let seen = relisting(move || watcher::watch_object(api.clone(), &watched).default_backoff());
    seen.filter_map(move |seen| {
        let seen = seen
            .inspect_err(|error| {
                tracing::warn!(
                    secret = name,
                    error = %chain(error),
                    "failed to watch a Secret"
                );
            })
            .ok();
        std::future::ready(seen)
    })
}

enum Found {
    Key(Box<SigningKey>),
    Empty,
    Broken,
}

fn key_of(secret: &Secret) -> Found {
    let field = secret.data.as_ref().and_then(|d| d.get(SECRET_FIELD)).filter(|d| !d.0.is_empty());
    let Some(field) = field else { return Found::Empty };
    match SigningKey::from_pem(&String::from_utf8_lossy(&field.0)) {
        Ok(key) => Found::Key(Box::new(key)),
        Err(error) => {
            tracing::error!(secret = %secret.name_any(), %error, "a signing key cannot be used");
            Found::Broken
        }
    }
}

/// Follows a Secret and fills it for as long as it is empty or absent. The leader's task.
async fn follow_and_fill(api: Api<Secret>, name: String, keys: watch::Sender<Option<SigningKey>>) {
    let mut secrets = std::pin::pin!(observe(api.clone(), &name));
    // What was seen last, while it has no key.
    let mut empty: Option<Option<Secret>> = None;
    loop {
        if let Some(seen) = &empty {
            let filled = fill(&api, &name, seen.as_ref()).await;
            match filled {
                Ok(key) => {
                    tracing::info!(secret = name, key, "made a signing key");
                    empty = None;
                }
                // Somebody was faster, and the watch shows what they wrote; or it was refused for now.
                Err(error) => tracing::warn!(
                    secret = name,
                    error = %chain(&error),
                    "failed to write a signing key, looking again"
                ),
            }
        }
        let next = secrets.next();
        let seen = match &empty {
            None => next.await,
            Some(_) => match tokio::time::timeout(RETRY, next).await {
                Ok(seen) => seen,
                Err(_) => continue,
            },
        };
        let Some(secret) = seen else { return };
        empty = match secret.as_ref().map(key_of) {
            Some(Found::Key(key)) => {
                keys.send_if_modified(|old| {
                    let is_new = old.as_ref() != Some(&*key);
                    *old = Some(*key);
                    is_new
                });
                None
            }
            Some(Found::Empty) | None => Some(secret),
            Some(Found::Broken) => None,
        };
    }
}

/// Writes a new key on what was seen, and fails if that is not so any more: an old view must not replace a key that is in
/// use, nor one that a person brought. Answers the key's id.
async fn fill(api: &Api<Secret>, name: &str, seen: Option<&Secret>) -> kube::Result<String> {
    let key = SigningKey::generate();
    let data = BTreeMap::from([(SECRET_FIELD.to_owned(), ByteString(key.to_pem().into_bytes()))]);
    let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
    match seen {
        Some(seen) => {
            let metadata = ObjectMeta { resource_version: seen.resource_version(), ..metadata };
            let secret = Secret { metadata, data: Some(data), ..Secret::default() };
            let params = PatchParams::apply(FIELD_MANAGER).force();
            api.patch(name, &params, &Patch::Apply(&secret)).await?;
        }
        None => {
            let params = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
            api.create(&params, &Secret { metadata, data: Some(data), ..Secret::default() }).await?;
        }
    }
    Ok(key.id().to_owned())
}

/// Both keys, followed and filled: the operator's, to sign with, and the public halves of both.
pub struct Keys {
    /// The operator's signer.
    pub signer: Arc<Signer>,
    /// Signs what gateways are shown: with their own key, since they know no other.
    pub gateway_signer: Arc<Signer>,
    /// What goes into every document.
    pub public: watch::Receiver<Vec<PublicKey>>,
}

/// Starts to follow both Secrets; returns when both hold a key.
pub async fn start(
    tasks: &mut tokio::task::JoinSet<()>,
    api: Api<Secret>,
    operator: &str,
    gateway: &str,
) -> Keys {
    let mut follow = |name: &str| {
        let (sender, receiver) = watch::channel(None);
        tasks.spawn(follow_and_fill(api.clone(), name.to_owned(), sender));
        receiver
    };
    let (mut operator, mut gateway) = (follow(operator), follow(gateway));
    let first = async |keys: &mut watch::Receiver<Option<SigningKey>>| {
        let key =
            keys.wait_for(Option::is_some).await.expect("the task that follows the Secret runs for ever");
        key.clone().expect("waited for a key")
    };
    let own = first(&mut operator).await;
    let mut theirs = first(&mut gateway).await;
    let signer = Arc::new(Signer::new(crate::keys::OPERATOR_ISSUER, Scope::Control, own));
    let (sender, public) = watch::channel(vec![signer.public(), theirs.public(Scope::Serve)]);
    let gateway_signer = Arc::new(Signer::new(crate::keys::OPERATOR_ISSUER, Scope::Serve, theirs.clone()));
    let (shared, for_gateways) = (signer.clone(), gateway_signer.clone());
    tasks.spawn(async move {
        loop {
            tokio::select! {
                Ok(()) = operator.changed() => {
                    if let Some(key) = operator.borrow_and_update().clone() {
                        shared.replace(key);
                    }
                }
                Ok(()) = gateway.changed() => {
                    if let Some(key) = gateway.borrow_and_update().clone() {
                        for_gateways.replace(key.clone());
                        theirs = key;
                    }
                }
                else => return,
            }
            sender.send_replace(vec![shared.public(), theirs.public(Scope::Serve)]);
        }
    });
    Keys { signer, gateway_signer, public }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn secret(data: serde_json::Value) -> Secret {
        serde_json::from_value(json!({"metadata": {"name": "s"}, "data": data})).unwrap()
    }

    #[test]
    fn an_empty_secret_is_filled_a_broken_one_is_left_for_a_person() {
        assert!(matches!(key_of(&secret(json!({}))), Found::Empty));
        assert!(matches!(key_of(&secret(json!({SECRET_FIELD: ""}))), Found::Empty));
        assert!(matches!(key_of(&secret(json!({SECRET_FIELD: "bm9uc2Vuc2U="}))), Found::Broken));
        let pem = ByteString(SigningKey::generate().to_pem().into_bytes());
        assert!(matches!(key_of(&secret(json!({SECRET_FIELD: pem}))), Found::Key(_)));
    }
}
