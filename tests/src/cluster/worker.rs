//! A worker's own report, asked for as the operator asks for it: with a signed token.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use k8s_openapi::api::core::v1::{Pod, Secret};
use kube::{Api, ResourceExt as _};
use turret_crds::token::{Claims, LIFETIME_SECONDS, Scope};
use turret_crds::{WorkerReport, label};

use super::gateway::Gateway;
use super::recount::Samples;
use super::release::{NAMESPACE, Release};
use super::space::Space;

/// Signs as the operator does, with the key of its Secret. Only an administrator can.
struct Signer {
    key: EncodingKey,
}

impl Signer {
    /// With the operator's key.
    async fn of_operator(release: &Release) -> Result<Self> {
        let secrets: Api<Secret> = Api::namespaced(release.client.clone(), NAMESPACE);
        let data = secrets.get("turret-operator-keys").await?.data.unwrap_or_default();
        let pem = data.get("key.pem").with_context(|| format!("the Secret has {:?}", data.keys()))?;
        let key = EncodingKey::from_ed_pem(&pem.0).context("the operator's key is no Ed25519 PEM")?;
        Ok(Self { key })
    }

    /// A token for the workers of a placement.
    async fn token(&self, space: &Space<'_>, placement: &str) -> Result<String> {
        let document = space.document(placement).await?;
        // The workers know the key by the id that their document gives it.
        let known = document.public_keys.iter().find(|key| key.scope == Scope::Control);
        let key_id = known.context("the worker document has no key of the operator")?.id.clone();
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let claims = Claims {
            iss: "turret-operator".into(),
            aud: document.placement.uid,
            nbf: now.saturating_sub(5),
            exp: now + LIFETIME_SECONDS,
            scope: Scope::Control,
        };
        let header = Header { kid: Some(key_id), ..Header::new(Algorithm::EdDSA) };
        Ok(jsonwebtoken::encode(&header, &claims, &self.key)?)
    }
}

/// A way to one worker pod, past the gateway.
pub struct Direct {
    http: reqwest::Client,
    address: String,
    token: String,
    pod: String,
}

impl Direct {
    /// To a pod of a placement, for as long as a token lives.
    pub async fn to(release: &Release, space: &Space<'_>, placement: &str, pod: &Pod) -> Result<Self> {
        let token = Signer::of_operator(release).await?.token(space, placement).await?;
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone());
        let address = address.with_context(|| format!("the pod {} has no address", pod.name_any()))?;
        Ok(Self { http: release.http.clone(), address, token, pod: pod.name_any() })
    }

    /// What the worker says of itself now.
    pub async fn report(&self) -> Result<WorkerReport> {
        let url = format!("http://{}:{}/control/v1/state", self.address, label::CONTROL_PORT);
        let response = self.http.get(&url).bearer_auth(&self.token).send().await;
        let response = response.with_context(|| format!("failed to ask {} at {url}", self.pod))?;
        if !response.status().is_success() {
            bail!("{url} answered {}: {}", response.status(), response.text().await.unwrap_or_default());
        }
        response.json().await.with_context(|| format!("{url} answered something else than a report"))
    }

    /// What it counts, as it is scraped.
    pub async fn metrics(&self) -> Result<Samples> {
        let url = format!("http://{}:{}/metrics", self.address, label::DATA_PORT);
        let response = self.http.get(&url).send().await.and_then(|answer| answer.error_for_status());
        let response = response.with_context(|| format!("failed to ask {} at {url}", self.pod))?;
        Ok(Samples::read(&response.text().await?))
    }

    /// Lets a lens (`GROUP:LENS`) leave its memory; whether it does, which it does not while rows use it.
    pub async fn evict(&self, lens: &str) -> Result<bool> {
        let url = format!("http://{}:{}/control/v1/lenses/{lens}/evict", self.address, label::CONTROL_PORT);
        let response = self.http.post(&url).bearer_auth(&self.token).send().await;
        let response = response.with_context(|| format!("failed to ask {} at {url}", self.pod))?;
        match response.status().as_u16() {
            202 => Ok(true),
            409 => Ok(false),
            status => bail!("{url} answered {status}: {}", response.text().await.unwrap_or_default()),
        }
    }

    /// A client of its data port.
    pub fn client(&self) -> Gateway {
        let url = format!("http://{}:{}", self.address, label::DATA_PORT);
        Gateway::of_worker(self.http.clone(), &url, &self.token)
    }
}
